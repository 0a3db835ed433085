/* SPDX-License-Identifier: Apache-2.0 */
/* What the generators of the benches share: errors, where to run, times of turns. */
#ifndef COMMON_H
#define COMMON_H

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

/* For how long, in ns; what comes in warm is not measured. */
struct span {
	int64_t warm;
	int64_t measure;
};

static _Noreturn void fail(const char *format, ...)
{
	int error = errno;
	va_list arguments;

	fprintf(stderr, "%s: ", program_invocation_short_name);
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fprintf(stderr, ": %s\n", strerror(error));
	exit(1);
}

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static void go_to(const char *netns, int cpu)
{
	cpu_set_t cpus;
	int descriptor;

	/* The bench keeps the namespaces alive, and must not be outlived. */
	if (prctl(PR_SET_PDEATHSIG, SIGKILL))
		fail("prctl");
	descriptor = open(netns, O_RDONLY | O_CLOEXEC);
	if (descriptor < 0 || setns(descriptor, CLONE_NEWNET))
		fail("cannot enter network namespace %s", netns);
	close(descriptor);
	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	if (sched_setaffinity(0, sizeof(cpus), &cpus))
		fail("cannot run on CPU %d", cpu);
}

static int compare_times(const void *left, const void *right)
{
	uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;

	return (a > b) - (a < b);
}

/*
 * Take turns, measure each, and print
 *   {"count": turns times unit, "seconds": …, "p50_us": …, "p99_us": …, "max_us": …}
 */
static void measure_turns(void (*turn)(const void *), const void *context, struct span span,
			  size_t unit)
{
	/* No turn takes less than a microsecond. */
	size_t most = span.measure / 1000 + 1, turns = 0;
	uint32_t *times = malloc(most * sizeof(*times));
	int64_t start = now_ns(), begin, before, after;

	if (!times)
		fail("malloc");
	memset(times, 0, most * sizeof(*times)); /* no page faults later */
	while (now_ns() - start < span.warm)
		turn(context);
	begin = now_ns();
	for (after = begin; after - begin < span.measure && turns < most; turns++) {
		before = after;
		turn(context);
		after = now_ns();
		times[turns] = after - before < UINT32_MAX ? after - before : UINT32_MAX;
	}
	qsort(times, turns, sizeof(*times), compare_times);
	printf("{\"count\": %zu, \"seconds\": %.9f, \"p50_us\": %.3f, \"p99_us\": %.3f, "
	       "\"max_us\": %.3f}\n",
	       turns * unit, (after - begin) / 1e9, times[turns / 2] / 1e3,
	       times[turns * 99 / 100] / 1e3, times[turns - 1] / 1e3);
	free(times);
}

#endif
