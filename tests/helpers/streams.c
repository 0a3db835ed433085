/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Verified TCP traffic between two network namespaces; streams.py compiles and runs it.
 *
 *   streams STATE LEFT RIGHT ADDRESS PORT COUNT KIND...
 *
 * For every KIND a server in RIGHT listens on a port of its own (PORT, PORT + 1, ...) and a
 * client in LEFT connects to it, again and again, until STATE says stop or COUNT connections
 * are done (0: no limit). Both are processes with blocking sockets and without timeouts, so
 * that every errno is a finding, but for a known limit that streams.py keeps within bounds
 * (read_some()); who hangs is noticed by streams.py, for the counters in STATE stand still
 * then. Both ends know every byte: it depends on the direction, on the connection and on the
 * position in the stream.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* A prime, so that no power of two of displaced bytes looks right. */
#define PERIOD 65521
#define CHUNK 65536
#define MOST_WORKERS 64

/* streams.py mirrors both. */
struct worker {
	uint64_t connections;
	uint64_t messages;
	uint64_t bytes;	   /* read and compared */
	uint64_t finished; /* bytes sent in the connection whose end the peer reads next */
	uint64_t woken;	   /* see read_some() */
	uint32_t ended;
	char failure[100];
};

struct state {
	uint32_t stop;
	uint32_t listening;
	struct worker worker[MOST_WORKERS];
};

/* One end of one connection. */
struct end {
	int fd;
	bool is_client, half_closed;
	uint32_t chance; /* both ends draw the same numbers from it */
	uint64_t start;	 /* in the pattern */
	uint64_t sent, received;
};

static struct state *state;
static struct worker *self, *other;
static uint8_t pattern[2][PERIOD + CHUNK]; /* client's and server's */
static const char *kind_name;

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...)
{
	int error = errno;
	char text[80];
	va_list rest;

	va_start(rest, format);
	vsnprintf(text, sizeof(text), format, rest);
	va_end(rest);
	if (self)
		snprintf(self->failure, sizeof(self->failure), "%s: %s (%s)", kind_name, text,
			 error ? strerrorname_np(error) : "-");
	else
		fprintf(stderr, "streams: %s (%s)\n", text, strerror(error));
	_exit(1);
}

static uint32_t draw(uint32_t *chance)
{
	*chance ^= *chance << 13;
	*chance ^= *chance >> 17;
	*chance ^= *chance << 5;
	return *chance;
}

/* From 1 to most; small ones are as frequent as large ones. */
static uint32_t draw_size(uint32_t *chance, uint32_t most)
{
	uint32_t size = draw(chance) % most;

	return 1 + (size >> draw(chance) % 12);
}

static void make_patterns(void)
{
	uint32_t chance = 2463534242u;

	for (int which = 0; which < 2; which++) {
		for (int at = 0; at < PERIOD; at++)
			pattern[which][at] = draw(&chance) >> 7;
		memcpy(pattern[which] + PERIOD, pattern[which], CHUNK);
	}
}

static const uint8_t *expected(const struct end *end, bool of_client, uint64_t at)
{
	return pattern[!of_client] + (end->start + at) % PERIOD;
}

static void compare(struct end *end, const uint8_t *got, size_t size)
{
	const uint8_t *wanted = expected(end, !end->is_client, end->received);

	errno = 0;
	if (memcmp(got, wanted, size)) {
		size_t at = 0;

		while (got[at] == wanted[at])
			at++;
		fail("wrong byte at %llu of connection %llu",
		     (unsigned long long)(end->received + at),
		     (unsigned long long)self->connections);
	}
	end->received += size;
	self->bytes += size;
}

static void send_bytes(struct end *end, size_t size)
{
	while (size) {
		size_t part = size < CHUNK ? size : CHUNK;
		ssize_t done = send(end->fd, expected(end, end->is_client, end->sent), part, 0);

		if (done < 0)
			fail("send at %llu", (unsigned long long)end->sent);
		end->sent += done;
		size -= done;
	}
}

/*
 * A blocking recv. One that waits after our own FIN may be woken early, once: the lane could not
 * rule out that something was on its way to us when the FIN left (a limit; rare without load).
 */
static ssize_t read_some(struct end *end, uint8_t *buffer, size_t size)
{
	ssize_t done;

	while ((done = recv(end->fd, buffer, size, 0)) < 0 && errno == EAGAIN && end->half_closed)
		self->woken++;
	return done;
}

/* Read and compare ``size`` bytes; false if the stream ends before the first of them. */
static bool read_bytes(struct end *end, size_t size)
{
	static uint8_t buffer[CHUNK];
	size_t left = size;

	while (left) {
		ssize_t done = read_some(end, buffer, left < CHUNK ? left : CHUNK);

		if (done < 0)
			fail("recv at %llu", (unsigned long long)end->received);
		if (!done && left == size)
			return false;
		if (!done) {
			errno = 0;
			fail("end of stream at %llu", (unsigned long long)end->received);
		}
		compare(end, buffer, done);
		left -= done;
	}
	return true;
}

/* Likewise, but there is more to come. */
static void expect_bytes(struct end *end, size_t size)
{
	errno = 0;
	if (!read_bytes(end, size))
		fail("early end of stream at %llu", (unsigned long long)end->received);
}

static void read_end(struct end *end)
{
	uint8_t byte;
	ssize_t done = read_some(end, &byte, 1);

	if (done < 0)
		fail("recv of the end");
	errno = 0;
	if (done)
		fail("more than was sent, after %llu", (unsigned long long)end->received);
}

static void finish(struct end *end)
{
	if (shutdown(end->fd, SHUT_WR))
		fail("shutdown");
	end->half_closed = true;
}

static void pause_ms(uint32_t most)
{
	uint32_t chance = (getpid() * 2654435761u ^ (uint32_t)self->messages) | 1;

	usleep(draw(&chance) % (most * 1000));
}

/* ---- kinds ------------------------------------------------------------------------------- */

/* Questions and answers over one connection until stop. */
static void ask_some(struct end *end, uint32_t most, uint32_t burst, uint32_t lazy_ms)
{
	for (;;) {
		uint32_t questions = 1 + draw(&end->chance) % burst;

		if (end->is_client && state->stop)
			break;
		if (!end->is_client && lazy_ms)
			pause_ms(lazy_ms);
		for (uint32_t i = 0; i < questions; i++) {
			uint32_t size = draw_size(&end->chance, most);

			if (end->is_client)
				send_bytes(end, size);
			else if (!read_bytes(end, size))
				return;
		}
		if (end->is_client && lazy_ms)
			pause_ms(lazy_ms);
		for (uint32_t i = 0; i < questions; i++) {
			uint32_t size = draw_size(&end->chance, most);

			if (!end->is_client)
				send_bytes(end, size);
			else
				expect_bytes(end, size);
		}
		self->messages += questions;
	}
	finish(end);
	read_end(end);
}

static void ask(struct end *end)
{
	ask_some(end, 20000, 1, 0);
}

/* Both ends are slow to read, so that there is always something unread. */
static void late(struct end *end)
{
	ask_some(end, 30000, 8, 10);
}

/* Both ways at once, not blocking, as fast as it goes; a little rest lets others run. */
static void bulk(struct end *end)
{
	uint32_t chance = end->chance ^ (end->is_client ? 0x5bd1e995 : 0x27d4eb2f);
	static uint8_t buffer[CHUNK];
	bool sending = true, reading = true;
	uint64_t rested = 0;

	if (fcntl(end->fd, F_SETFL, O_NONBLOCK))
		fail("fcntl");
	while (sending || reading) {
		struct pollfd wait = {
			.fd = end->fd,
			.events = (reading ? POLLIN : 0) | (sending ? POLLOUT : 0),
		};

		if (poll(&wait, 1, -1) < 0)
			fail("poll");
		if (sending && wait.revents & POLLOUT) {
			ssize_t done = send(end->fd, expected(end, end->is_client, end->sent),
					    draw_size(&chance, CHUNK), 0);

			if (done < 0 && errno != EAGAIN)
				fail("send at %llu", (unsigned long long)end->sent);
			if (done > 0)
				end->sent += done;
			if (state->stop) {
				self->finished = end->sent;
				__sync_synchronize();
				finish(end);
				sending = false;
			}
		}
		if (reading && wait.revents & (POLLIN | POLLHUP | POLLERR)) {
			ssize_t done = recv(end->fd, buffer, draw_size(&chance, CHUNK), 0);

			if (done < 0 && errno != EAGAIN)
				fail("recv at %llu", (unsigned long long)end->received);
			if (done > 0)
				compare(end, buffer, done);
			reading = done != 0;
		}
		self->messages++;
		if (end->received - rested > 4 << 20) {
			rested = end->received;
			usleep(2000);
		}
	}
	errno = 0;
	if (end->received != other->finished)
		fail("%llu bytes of %llu", (unsigned long long)end->received,
		     (unsigned long long)other->finished);
}

/* Small messages one way, then one answer: leaves the lane for streaming. */
static void flood(struct end *end)
{
	for (int round = 0; round < 3; round++) {
		uint32_t messages = 500 + draw(&end->chance) % 3000;

		for (uint32_t i = 0; i < messages; i++) {
			uint32_t size = draw_size(&end->chance, 400);

			if (end->is_client)
				send_bytes(end, size);
			else
				expect_bytes(end, size);
		}
		if (!end->is_client)
			send_bytes(end, 1000);
		else
			expect_bytes(end, 1000);
		self->messages += messages;
	}
	if (end->is_client) {
		finish(end);
		read_end(end);
	} else {
		read_end(end);
	}
}

/* A request that ends with the client's half-close, and an answer after that. */
static void half(struct end *end)
{
	uint32_t rounds = draw(&end->chance) % 4;
	uint32_t question = draw_size(&end->chance, 100000);
	uint32_t answer = draw_size(&end->chance, 100000);

	for (uint32_t i = 0; i < rounds; i++) {
		if (end->is_client)
			send_bytes(end, 100);
		expect_bytes(end, 100);
		if (!end->is_client)
			send_bytes(end, 100);
	}
	if (end->is_client) {
		send_bytes(end, question);
		finish(end);
		expect_bytes(end, answer);
		read_end(end);
	} else {
		expect_bytes(end, question);
		read_end(end);
		if (draw(&end->chance) % 4 == 0)
			pause_ms(3);
		send_bytes(end, answer);
	}
	self->messages++;
}

/* Connect, a few questions and answers, and either end closes first. */
static void brief(struct end *end)
{
	uint32_t rounds = 1 + draw(&end->chance) % 12;
	bool client_ends = draw(&end->chance) & 1;

	for (uint32_t i = 0; i < rounds; i++) {
		uint32_t question = draw_size(&end->chance, 3000);
		uint32_t answer = draw_size(&end->chance, 3000);

		if (end->is_client)
			send_bytes(end, question);
		expect_bytes(end, end->is_client ? answer : question);
		if (!end->is_client)
			send_bytes(end, answer);
	}
	if (end->is_client != client_ends)
		read_end(end);
	self->messages += rounds;
}

/* All the ways to end that a server sees, reset and unread bytes included. */
static void churn(struct end *end)
{
	uint32_t how = draw(&end->chance) % 16;
	uint32_t size = draw_size(&end->chance, 4000);
	struct linger reset = { .l_onoff = 1 };

	self->messages++;
	if (how < 8) {
		brief(end);
	} else if (how < 10) {
		half(end);
	} else if (how == 10) {
		/* Nothing at all. */
		if (!end->is_client)
			read_end(end);
	} else if (how == 11) {
		/* Written and closed at once; the reader gets it all. */
		if (end->is_client) {
			send_bytes(end, size);
		} else {
			expect_bytes(end, size);
			read_end(end);
		}
	} else if (how == 12) {
		/*
		 * Never read. A redirect that is decided while the server closes ends in EPIPE, once
		 * in 100,000 times; on the kernel path the next send does.
		 */
		if (end->is_client && send(end->fd, expected(end, true, 0), size, 0) < 0 &&
		    errno != EPIPE)
			fail("send to who never reads");
	} else {
		/* Reset by either end, with or without bytes that nobody reads. */
		bool resets = end->is_client == (how & 1);

		if (how > 13 &&
		    send(end->fd, expected(end, end->is_client, 0), size, MSG_NOSIGNAL) < 0 &&
		    errno != EPIPE && errno != ECONNRESET)
			fail("send to who resets");
		if (resets && setsockopt(end->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset)))
			fail("SO_LINGER");
	}
}

static const struct kind {
	const char *name;
	void (*talk)(struct end *end);
} kinds[] = {
	{ "ask", ask },	  { "late", late },   { "bulk", bulk },	  { "flood", flood },
	{ "half", half }, { "brief", brief }, { "churn", churn },
};

/* ---- processes --------------------------------------------------------------------------- */

static void enter(const char *netns)
{
	int fd = open(netns, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || setns(fd, CLONE_NEWNET))
		fail("cannot enter %s", netns);
	close(fd);
}

static void talk(const struct kind *kind, int fd, bool is_client)
{
	struct end end = {
		.fd = fd,
		.is_client = is_client,
		.chance = (uint32_t)self->connections * 2654435761u ^ 0x9e3779b9,
		.start = self->connections * 7919,
	};

	if (!end.chance)
		end.chance = 1;
	kind->talk(&end);
	if (close(fd))
		fail("close");
	self->connections++;
}

static void serve(const struct kind *kind, int listener)
{
	struct pollfd wait = { .fd = listener, .events = POLLIN };

	for (;;) {
		int ready = poll(&wait, 1, 20);
		int fd;

		if (ready < 0)
			fail("poll");
		/* The client ends first, and all of its connections are in the queue by then. */
		if (!ready && *(volatile uint32_t *)&other->ended &&
		    *(volatile uint64_t *)&other->connections == self->connections)
			break;
		if (!ready)
			continue;
		fd = accept(listener, NULL, NULL);
		if (fd < 0)
			fail("accept");
		talk(kind, fd, false);
	}
}

static void call(const struct kind *kind, const struct sockaddr_storage *address, socklen_t size,
		 uint64_t count)
{
	while (!*(volatile uint32_t *)&state->stop && (!count || self->connections < count)) {
		int fd = socket(address->ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

		if (fd < 0)
			fail("socket");
		if (!connect(fd, (const struct sockaddr *)address, size)) {
			talk(kind, fd, true);
			continue;
		}
		/*
		 * On a slow machine the server's reset comes before connect(2) has returned; EPIPE
		 * after its FIN (tcp_reset).
		 */
		if (kind->talk != churn || (errno != ECONNRESET && errno != EPIPE))
			fail("connect %llu", (unsigned long long)self->connections);
		close(fd);
		self->connections++;
	}
}

static socklen_t parse(const char *text, uint16_t port, struct sockaddr_storage *address)
{
	struct sockaddr_in6 *six = (struct sockaddr_in6 *)address;
	struct sockaddr_in *four = (struct sockaddr_in *)address;

	memset(address, 0, sizeof(*address));
	if (inet_pton(AF_INET6, text, &six->sin6_addr) == 1) {
		six->sin6_family = AF_INET6;
		six->sin6_port = htons(port);
		return sizeof(*six);
	}
	if (inet_pton(AF_INET, text, &four->sin_addr) != 1)
		fail("no address: %s", text);
	four->sin_family = AF_INET;
	four->sin_port = htons(port);
	return sizeof(*four);
}

static const struct kind *kind_of(const char *name)
{
	for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
		if (!strcmp(kinds[i].name, name))
			return &kinds[i];
	fail("no such kind: %s", name);
}

int main(int argc, char **argv)
{
	int failed = 0, status, one = 1, file;

	if (argc < 8 || argc - 7 > MOST_WORKERS / 2)
		fail("usage: streams STATE LEFT RIGHT ADDRESS PORT COUNT KIND...");
	signal(SIGPIPE, SIG_IGN);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	file = open(argv[1], O_RDWR | O_CLOEXEC);
	if (file < 0 || ftruncate(file, sizeof(*state)))
		fail("cannot open %s", argv[1]);
	state = mmap(NULL, sizeof(*state), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (state == MAP_FAILED)
		fail("mmap");
	make_patterns();
	for (int i = 7; i < argc; i++) {
		const struct kind *kind = kind_of(argv[i]);
		struct worker *pair = &state->worker[2 * (i - 7)];
		struct sockaddr_storage address;
		socklen_t size = parse(argv[4], atoi(argv[5]) + i - 7, &address);
		int listener;

		enter(argv[3]);
		listener = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (listener < 0 ||
		    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) ||
		    bind(listener, (struct sockaddr *)&address, size) || listen(listener, 128))
			fail("cannot listen");
		for (int is_client = 0; is_client < 2; is_client++) {
			if (fork())
				continue;
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			kind_name = is_client ? "client" : "server";
			self = &pair[!is_client];
			other = &pair[is_client];
			if (is_client) {
				close(listener);
				enter(argv[2]);
				call(kind, &address, size, strtoull(argv[6], NULL, 10));
			} else {
				serve(kind, listener);
			}
			__sync_synchronize();
			self->ended = 1;
			_exit(0);
		}
		close(listener);
		state->listening++;
	}
	while (wait(&status) > 0)
		failed |= status;
	return failed ? 1 : 0;
}
