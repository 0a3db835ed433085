/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Both ends of TCP and UDP conversations, in pods and in guests without any library; talk.py
 * compiles it.
 *
 *   talk serve PORT
 *   talk tcp|udp ADDRESS PORT COUNT SIZE ANSWER PAUSE
 *
 * "serve" listens on PORT, TCP and UDP, IPv4 and IPv6, says "ready" and answers until killed.
 * A message is a header, which says how many bytes of body follow and how many are wanted back,
 * and the body. The answer depends on every byte of the body, so that no side can be right by
 * accident. "tcp" and "udp" exchange COUNT messages (0: until SIGTERM) of SIZE bytes for answers
 * of ANSWER bytes, PAUSE milliseconds apart, and print one JSON object:
 *
 *   sent, answered, wrong   messages; "wrong" are answers with other bytes than they should have
 *   longest                 milliseconds without an answer while one was due
 *   error                   why it ended early; empty if it did not
 *
 * TCP waits for each answer; UDP sends on, and waits for what is late at the end alone.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CHUNK 16384
#define DATAGRAM 65507
/* A broken connection recovers by retransmission; emulated machines are slow. */
#define PATIENCE_MS 30000
#define LATE_MS 3000

struct header {
	uint64_t number;
	uint64_t size;	 /* of the body that follows */
	uint64_t wanted; /* bytes of the answer, which for UDP has the number before it */
};

static volatile sig_atomic_t stopped;

static struct {
	uint64_t sent, answered, wrong;
	int64_t longest;
	const char *error;
} report = { .error = "" };

static void stop(int signal)
{
	(void)signal;
	stopped = 1;
}

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* --- bytes ------------------------------------------------------------------------------- */

#define HASH_START 0xcbf29ce484222325ULL

/* FNV-1a */
static uint64_t hash(uint64_t state, const uint8_t *data, size_t size)
{
	for (size_t at = 0; at < size; at++)
		state = (state ^ data[at]) * 0x100000001b3ULL;
	return state;
}

/* xorshift64, a byte a step: bytes that depend on the seed alone */
static uint64_t stretch(uint64_t state, uint8_t *data, size_t size)
{
	for (size_t at = 0; at < size; at++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		data[at] = state >> 32;
	}
	return state;
}

static uint64_t seed(uint64_t number)
{
	return number * 0x9e3779b97f4a7c15ULL | 1;
}

static bool write_all(int fd, const void *data, size_t size)
{
	while (size) {
		ssize_t done = send(fd, data, size, MSG_NOSIGNAL);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return false;
		data = (const uint8_t *)data + done;
		size -= done;
	}
	return true;
}

static bool read_all(int fd, void *data, size_t size)
{
	while (size) {
		ssize_t done = recv(fd, data, size, 0);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return false;
		data = (uint8_t *)data + done;
		size -= done;
	}
	return true;
}

/* --- the server -------------------------------------------------------------------------- */

static void serve_connection(int fd)
{
	static uint8_t data[CHUNK];
	struct header header;

	while (read_all(fd, &header, sizeof(header))) {
		uint64_t state = HASH_START;

		for (uint64_t left = header.size; left;) {
			size_t size = left < CHUNK ? left : CHUNK;

			if (!read_all(fd, data, size))
				return;
			state = hash(state, data, size);
			left -= size;
		}
		state |= 1;
		for (uint64_t left = header.wanted; left;) {
			size_t size = left < CHUNK ? left : CHUNK;

			state = stretch(state, data, size);
			if (!write_all(fd, data, size))
				return;
			left -= size;
		}
	}
}

static void serve_datagram(int fd)
{
	static uint8_t data[DATAGRAM];
	struct sockaddr_in6 peer;
	socklen_t length = sizeof(peer);
	struct header *header = (void *)data;
	ssize_t size = recvfrom(fd, data, sizeof(data), 0, (struct sockaddr *)&peer, &length);
	uint64_t state;

	if (size < (ssize_t)sizeof(*header) || header->wanted > DATAGRAM - sizeof(header->number))
		return;
	state = hash(HASH_START, data + sizeof(*header), size - sizeof(*header)) | 1;
	size = header->wanted;
	stretch(state, data + sizeof(header->number), size);
	sendto(fd, data, sizeof(header->number) + size, 0, (struct sockaddr *)&peer, length);
}

static int bound(int type, uint16_t port)
{
	struct sockaddr_in6 address = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	int fd = socket(AF_INET6, type, 0), on = 1, off = 0;

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
		perror("bind");
		exit(1);
	}
	return fd;
}

static int serve(uint16_t port)
{
	struct pollfd ready[2] = {
		{ .fd = bound(SOCK_STREAM, port), .events = POLLIN },
		{ .fd = bound(SOCK_DGRAM, port), .events = POLLIN },
	};

	signal(SIGCHLD, SIG_IGN);
	if (listen(ready[0].fd, 16) < 0)
		return 1;
	puts("ready");
	fflush(stdout);
	for (;;) {
		if (poll(ready, 2, -1) < 0)
			continue;
		if (ready[0].revents) {
			int fd = accept(ready[0].fd, NULL, NULL);

			if (fd >= 0 && fork() == 0) {
				serve_connection(fd);
				_exit(0);
			}
			close(fd);
		}
		if (ready[1].revents)
			serve_datagram(ready[1].fd);
	}
}

/* --- the clients ------------------------------------------------------------------------- */

struct plan {
	uint64_t count, size, answer;
	int pause; /* ms */
};

static int connected(int type, const char *text, uint16_t port)
{
	struct sockaddr_in6 address = { .sin6_family = AF_INET6, .sin6_port = htons(port) };
	struct timeval patience = { .tv_sec = PATIENCE_MS / 1000 };
	int fd = socket(AF_INET6, type, 0), on = 1;
	char mapped[64];

	snprintf(mapped, sizeof(mapped), strchr(text, ':') ? "%s" : "::ffff:%s", text);
	if (inet_pton(AF_INET6, mapped, &address.sin6_addr) != 1) {
		report.error = "no address";
		return -1;
	}
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	if (type == SOCK_STREAM)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	if (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
		report.error = strerror(errno);
		return -1;
	}
	return fd;
}

static void note_gap(int64_t since)
{
	int64_t gap = now_ms() - since;

	if (gap > report.longest)
		report.longest = gap;
}

static bool more(const struct plan *plan)
{
	return !stopped && (!plan->count || report.sent < plan->count);
}

/* One message and its answer; false: the connection is broken. */
static bool ask(int fd, const struct plan *plan, uint64_t number)
{
	static uint8_t data[CHUNK], expected[CHUNK];
	struct header header = { number, plan->size, plan->answer };
	uint64_t source = seed(number), state = HASH_START;
	bool right = true;

	errno = 0;
	if (!write_all(fd, &header, sizeof(header)))
		return false;
	for (uint64_t left = plan->size; left;) {
		size_t size = left < CHUNK ? left : CHUNK;

		source = stretch(source, data, size);
		state = hash(state, data, size);
		if (!write_all(fd, data, size))
			return false;
		left -= size;
	}
	report.sent++;
	state |= 1;
	for (uint64_t left = plan->answer; left;) {
		size_t size = left < CHUNK ? left : CHUNK;

		state = stretch(state, expected, size);
		if (!read_all(fd, data, size))
			return false;
		right &= !memcmp(data, expected, size);
		left -= size;
	}
	report.answered++;
	report.wrong += !right;
	return true;
}

static void talk_tcp(const char *address, uint16_t port, const struct plan *plan)
{
	int fd = connected(SOCK_STREAM, address, port);

	while (fd >= 0 && more(plan)) {
		int64_t start = now_ms();

		if (!ask(fd, plan, report.sent)) {
			report.error = errno ? strerror(errno) : "end of stream";
			break;
		}
		note_gap(start);
		usleep(plan->pause * 1000);
	}
}

/* The answer to message ``number``, if it is the first one to it. */
static void hear(int fd, const struct plan *plan, uint8_t *heard, uint64_t most)
{
	static uint8_t data[DATAGRAM], expected[DATAGRAM];
	uint64_t number, state;
	ssize_t size = recv(fd, data, sizeof(data), MSG_DONTWAIT);

	if (size < (ssize_t)sizeof(number))
		return;
	memcpy(&number, data, sizeof(number));
	if (number >= report.sent || number >= most || heard[number]) {
		report.wrong++;
		return;
	}
	heard[number] = 1;
	report.answered++;
	stretch(seed(number), expected, plan->size);
	state = hash(HASH_START, expected, plan->size) | 1;
	stretch(state, expected, plan->answer);
	size -= sizeof(number);
	report.wrong += size != (ssize_t)plan->answer ||
			memcmp(data + sizeof(number), expected, plan->answer) != 0;
}

static void talk_udp(const char *address, uint16_t port, const struct plan *plan)
{
	static uint8_t data[DATAGRAM];
	const uint64_t most = 1 << 20;
	uint8_t *heard = calloc(most, 1);
	int fd = connected(SOCK_DGRAM, address, port);
	struct pollfd ready = { .fd = fd, .events = POLLIN };
	int64_t next = now_ms(), last = next, end = 0;

	while (fd >= 0) {
		int64_t now = now_ms();
		uint64_t before = report.answered;

		if (more(plan) && now >= next && report.sent < most) {
			struct header header = { report.sent, plan->size, plan->answer };

			memcpy(data, &header, sizeof(header));
			stretch(seed(report.sent), data + sizeof(header), plan->size);
			/* ECONNREFUSED of an earlier one counts as its loss. */
			send(fd, data, sizeof(header) + plan->size, 0);
			report.sent++;
			next = now + plan->pause;
			end = now + LATE_MS;
		} else if (!more(plan) && (report.answered == report.sent || now > end)) {
			break;
		}
		poll(&ready, 1, next > now_ms() ? (int)(next - now_ms()) : 1);
		hear(fd, plan, heard, most);
		if (report.answered != before) {
			note_gap(last);
			last = now_ms();
		}
	}
	if (report.answered < report.sent)
		note_gap(last);
	free(heard);
}

int main(int count, char **words)
{
	if (count == 3 && !strcmp(words[1], "serve"))
		return serve(atoi(words[2]));
	if (count != 8) {
		fputs("see talk.c\n", stderr);
		return 2;
	}
	struct plan plan = { strtoull(words[4], NULL, 10), strtoull(words[5], NULL, 10),
			     strtoull(words[6], NULL, 10), atoi(words[7]) };

	signal(SIGTERM, stop);
	if (!strcmp(words[1], "tcp"))
		talk_tcp(words[2], atoi(words[3]), &plan);
	else
		talk_udp(words[2], atoi(words[3]), &plan);
	printf("{\"sent\": %llu, \"answered\": %llu, \"wrong\": %llu, \"longest\": %lld, "
	       "\"error\": \"%s\"}\n",
	       (unsigned long long)report.sent, (unsigned long long)report.answered,
	       (unsigned long long)report.wrong, (long long)report.longest, report.error);
	return 0;
}
