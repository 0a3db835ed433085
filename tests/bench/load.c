/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Load for bench_lane.py: blocking sockets, one connection at a time, the same program on
 * every path that is compared.
 *
 *   load NETNS CGROUP CPU exec PROGRAM [ARGUMENT…]
 *   load NETNS CGROUP CPU serve TEST PORT ADDRESS SIZE NODELAY WARM_MS MEASURE_MS
 *   load NETNS CGROUP CPU ask   TEST PORT ADDRESS SIZE NODELAY WARM_MS MEASURE_MS
 *
 * First it goes where the load is to run: network namespace, cgroup, CPU. TEST is
 *
 *   lat      ask sends SIZE bytes, serve sends them back; ask measures the time of each turn
 *   stream   ask sends messages of SIZE bytes; serve reads SIZE bytes at a time and measures
 *   request  ask connects, sends REQUEST bytes, reads RESPONSE; serve closes first, as a web
 *            server without keep-alive, so that ask does not run out of ports; ask measures
 *   connect  likewise without a word
 *
 * The one that measures prints a line per connection (stream) or at the end:
 *   {"count": turns or bytes, "seconds": …, "p50_us": …, "p99_us": …, "max_us": …}
 * serve prints {"ready": true} once it listens, and goes on until it is killed.
 *
 * Reads and writes are those of qperf's tcp_lat and tcp_bw (plain read(2) and write(2) of
 * one message), so that the two can be compared; qperf leaves Nagle's algorithm on and runs
 * for whole seconds only.
 */
#define _GNU_SOURCE
#include "common.h"

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <sys/socket.h>

#define REQUEST 128
#define RESPONSE 1024
#define LARGEST (1 << 20)
/* A run that does not end by itself; the signal's default is to kill. */
#define PATIENCE_S 20
/* Reads of small messages between two looks at the clock, which costs some 25 ns. */
#define SMALL 4096
#define STRIDE 16

struct job {
	const char *test;
	int port;
	const char *address;
	size_t size;
	int nodelay;
	struct span span;
};

static char buffer[LARGEST];

static void join_cgroup(const char *cgroup)
{
	char path[4096];
	int descriptor;

	snprintf(path, sizeof(path), "%s/cgroup.procs", cgroup);
	descriptor = open(path, O_WRONLY | O_CLOEXEC);
	if (descriptor < 0 || write(descriptor, "0", 1) != 1)
		fail("cannot enter cgroup %s", cgroup);
	close(descriptor);
}

/* ---- whole messages -------------------------------------------------------------- */

/* True if all was read; false at the end of the stream or when the peer has reset. */
static bool read_all(int sock, size_t size)
{
	for (size_t have = 0; have < size;) {
		ssize_t got = read(sock, buffer + have, size - have);

		if (got < 0 && errno != ECONNRESET)
			fail("read");
		if (got <= 0)
			return false;
		have += got;
	}
	return true;
}

/* True if all was written; false when the peer has gone. */
static bool write_all(int sock, size_t size)
{
	for (size_t sent = 0; sent < size;) {
		ssize_t put = write(sock, buffer + sent, size - sent);

		if (put < 0 && errno != ECONNRESET && errno != EPIPE)
			fail("write");
		if (put <= 0)
			return false;
		sent += put;
	}
	return true;
}

static struct sockaddr_in endpoint(const struct job *job)
{
	struct sockaddr_in result = { .sin_family = AF_INET, .sin_port = htons(job->port) };

	if (inet_pton(AF_INET, job->address, &result.sin_addr) != 1) {
		errno = EINVAL;
		fail("address %s", job->address);
	}
	return result;
}

static void set_nodelay(int sock, const struct job *job)
{
	if (job->nodelay &&
	    setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &job->nodelay, sizeof(job->nodelay)))
		fail("TCP_NODELAY");
}

/* ---- serve ----------------------------------------------------------------------- */

/* What arrives between warm_ns and warm_ns + measure_ns after the first byte. */
static void measure_stream(int sock, const struct job *job)
{
	unsigned int stride = job->size < SMALL ? STRIDE : 1;
	int64_t start = 0, begin = 0, now = 0;
	unsigned int reads = 0;
	uint64_t bytes = 0;

	for (;;) {
		ssize_t got = read(sock, buffer, job->size);

		if (got <= 0) {
			errno = got ? errno : EPIPE;
			fail("the stream ended before its time");
		}
		bytes += got;
		if (++reads % stride && start)
			continue;
		now = now_ns();
		if (!start) {
			start = now;
		} else if (!begin && now - start >= job->span.warm) {
			begin = now;
			bytes = 0;
		} else if (begin && now - begin >= job->span.measure) {
			break;
		}
	}
	printf("{\"count\": %llu, \"seconds\": %.9f}\n", (unsigned long long)bytes,
	       (now - begin) / 1e9);
}

static void answer(int sock, const struct job *job)
{
	if (!strcmp(job->test, "lat")) {
		while (read_all(sock, job->size) && write_all(sock, job->size))
			;
	} else if (!strcmp(job->test, "stream")) {
		measure_stream(sock, job);
	} else if (!strcmp(job->test, "request")) {
		if (read_all(sock, REQUEST))
			write_all(sock, RESPONSE);
	}
}

static _Noreturn void serve(const struct job *job)
{
	struct sockaddr_in own = endpoint(job);
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int one = 1;

	if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) ||
	    bind(listener, (struct sockaddr *)&own, sizeof(own)) || listen(listener, 128))
		fail("cannot listen on port %d", job->port);
	puts("{\"ready\": true}");
	for (;;) {
		int sock = accept(listener, NULL, NULL);

		if (sock < 0)
			fail("accept");
		set_nodelay(sock, job);
		answer(sock, job);
		close(sock);
	}
}

/* ---- ask ------------------------------------------------------------------------- */

static int connected(const struct job *job)
{
	struct sockaddr_in server = endpoint(job);
	int sock = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (sock < 0 || connect(sock, (struct sockaddr *)&server, sizeof(server)))
		fail("cannot connect to %s:%d", job->address, job->port);
	set_nodelay(sock, job);
	return sock;
}

/* What a client has: of test lat a connection. */
struct client {
	const struct job *job;
	int sock;
};

/* One turn of what is measured. */
static void turn(const void *context)
{
	const struct client *client = context;
	const struct job *job = client->job;
	int sock = client->sock;

	if (!strcmp(job->test, "lat")) {
		if (!write_all(sock, job->size) || !read_all(sock, job->size))
			fail("the server has gone");
		return;
	}
	sock = connected(job);
	if (!strcmp(job->test, "request") &&
	    (!write_all(sock, REQUEST) || !read_all(sock, RESPONSE)))
		fail("no answer");
	if (read_all(sock, 1))
		fail("more than the answer");
	close(sock);
}

static void ask(const struct job *job)
{
	bool stream = !strcmp(job->test, "stream");
	bool one = stream || !strcmp(job->test, "lat");
	struct client client = { job, one ? connected(job) : -1 };

	alarm(PATIENCE_S);
	if (stream) {
		/* Until the server has measured and goes away. */
		while (write_all(client.sock, job->size))
			;
	} else {
		measure_turns(turn, &client, job->span, 1);
	}
	if (one)
		close(client.sock);
}

int main(int argc, char **argv)
{
	struct job job;

	if (argc < 6) {
		fprintf(stderr, "load: see the top of load.c\n");
		return 2;
	}
	join_cgroup(argv[2]);
	go_to(argv[1], atoi(argv[3]));
	if (!strcmp(argv[4], "exec")) {
		execvp(argv[5], argv + 5);
		fail("cannot run %s", argv[5]);
	}
	if (argc != 12) {
		fprintf(stderr, "load: see the top of load.c\n");
		return 2;
	}
	job = (struct job){
		.test = argv[5],
		.port = atoi(argv[6]),
		.address = argv[7],
		.size = atol(argv[8]),
		.nodelay = atoi(argv[9]),
		.span = { atoll(argv[10]) * 1000000, atoll(argv[11]) * 1000000 },
	};
	if (job.size < 1 || job.size > LARGEST) {
		fprintf(stderr, "load: size %zu is not from 1 to %d\n", job.size, LARGEST);
		return 2;
	}
	signal(SIGPIPE, SIG_IGN);
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (!strcmp(argv[4], "serve"))
		serve(&job);
	ask(&job);
	return 0;
}
