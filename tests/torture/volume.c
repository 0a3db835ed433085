// SPDX-License-Identifier: Apache-2.0
/*
 * Very many short connections between two network namespaces, each by a plan that both ends
 * derive from a seed, each byte and each errno checked against what the kernel path gives.
 *
 *   volume CLIENT_NETNS SERVER_NETNS ADDRESS PORT THREADS SECONDS CONNECTIONS SEED
 *
 * It ends after so many seconds or connections (0: no limit) and prints one JSON object. What
 * was wrong goes to stderr, with the connection's seed. Exit status 1: something was wrong.
 *
 * Each client thread has a listener on a port of its own, with two server threads, so that a
 * server that still waits for the end of one connection does not hold up the next.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MOST_THREADS 64
#define MOST_ROUNDS 6
#define CHUNK 65536
#define HANGS_AFTER 15 /* seconds without progress */
#define MOST_SHOWN 20

/* How a connection ends; what comes before are rounds of request and answer. */
enum ending {
	CLIENT_HALF_CLOSES,	/* then the server's tail and close */
	CLIENT_TAIL_HALF_CLOSE, /* then one byte from the server */
	SERVER_HALF_CLOSES,	/* after its tail; then one byte from the client */
	SERVER_CLOSES,		/* after its tail */
	CLIENT_CLOSES,		/* after its tail, without a look */
	BOTH_HALF_CLOSE,	/* at once, each after its tail */
	CLIENT_RESETS,		/* SO_LINGER 0 */
	WRITE_TO_CLOSED,	/* the server writes to a client that is gone: once, then EPIPE */
	PIPELINED,		/* all requests, half-close, then all answers */
	ENDINGS,
};

static const char *const ENDING_NAMES[] = {
	"client half-closes", "client sends and half-closes",
	"server half-closes", "server closes",
	"client closes",      "both half-close",
	"client resets",      "write to a closed one",
	"pipelined",
};

struct plan {
	uint64_t seed;
	enum ending ending;
	int rounds;
	int request[MOST_ROUNDS], answer[MOST_ROUNDS];
	int tail; /* of the client */
	int server_tail;
	int think;    /* microseconds before the last word */
	bool polling; /* non-blocking sockets and poll */
	bool vectors; /* writev and readv */
	bool no_delay;
};

/* One end of one connection. */
struct end {
	int fd;
	const struct plan *plan;
	const char *name;
	uint64_t random;
	uint32_t sent, received; /* bytes so far */
	bool half_closed;
	char wrong[160]; /* empty: nothing */
};

struct worker {
	pthread_t thread;
	int number;
	bool client;
	volatile uint64_t seed; /* of the connection in hand; 0: none */
	volatile time_t since;	/* when it began */
	uint64_t connections, differences, bytes;
	uint64_t woken_by_end, woken_by_reset, woken_in_doubt; /* see known() */
};

static char *client_netns, *server_netns, *address;
static int first_port, threads;
static uint64_t most_connections, start_seed;
static volatile bool stop;
static uint64_t begun, shown;
static int listeners[MOST_THREADS];
static struct worker workers[3 * MOST_THREADS];

static uint64_t next_random(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state >> 11;
}

static int between(uint64_t *state, int least, int most)
{
	return least + (int)(next_random(state) % (uint64_t)(most - least + 1));
}

static int some_size(uint64_t *state)
{
	return next_random(state) % 8 ? between(state, 1, 300) : between(state, 1, 40000);
}

static void make_plan(uint64_t seed, struct plan *plan)
{
	uint64_t state = seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull;

	for (int i = 0; i < 4; i++)
		next_random(&state);
	*plan = (struct plan){ .seed = seed };
	plan->ending = next_random(&state) % ENDINGS;
	plan->rounds = between(&state, 0, MOST_ROUNDS - 1);
	for (int i = 0; i < plan->rounds; i++) {
		plan->request[i] = some_size(&state);
		plan->answer[i] = some_size(&state);
	}
	plan->tail = next_random(&state) % 4 ? between(&state, 0, 500) : some_size(&state);
	plan->server_tail = next_random(&state) % 4 ? between(&state, 0, 500) : some_size(&state);
	plan->think = next_random(&state) % 16 ? 0 : between(&state, 1, 2000);
	plan->polling = next_random(&state) % 4 == 0;
	plan->vectors = next_random(&state) % 4 == 0;
	plan->no_delay = next_random(&state) % 4 != 0;
	/* Of a pipeline, no more than both buffers hold for certain. */
	for (int i = 0; plan->ending == PIPELINED && i < plan->rounds; i++) {
		plan->request[i] = plan->request[i] % 1000 + 1;
		plan->answer[i] = plan->answer[i] % 1000 + 1;
	}
}

/* The byte at a place of one direction of a connection. */
static unsigned char content(uint64_t seed, bool from_client, uint32_t place)
{
	uint32_t mixed = (uint32_t)seed + place * 2654435761u + (from_client ? 77 : 0);

	return (mixed ^ mixed >> 15) * 2246822519u >> 24;
}

static bool is_client(const struct end *end)
{
	return end->name[0] == 'c';
}

static bool wrong(struct end *end, const char *what, int number)
{
	if (!end->wrong[0])
		snprintf(end->wrong, sizeof(end->wrong), "%s: %s after %u sent, %u received: %s",
			 end->name, what, end->sent, end->received,
			 number ? strerror(number) : "-");
	return false;
}

static bool wait_for(struct end *end, short events)
{
	struct pollfd waiting = { .fd = end->fd, .events = events };

	return end->plan->polling && errno == EAGAIN && poll(&waiting, 1, -1) >= 0;
}

static bool write_all(struct end *end, int size)
{
	static __thread unsigned char data[CHUNK];

	while (size > 0) {
		int now = next_random(&end->random) % 3 ? size : between(&end->random, 1, size);
		ssize_t sent;

		if (now > CHUNK)
			now = CHUNK;
		for (int i = 0; i < now; i++)
			data[i] = content(end->plan->seed, is_client(end), end->sent + i);
		if (end->plan->vectors && now > 1) {
			struct iovec parts[2] = { { data, now / 2 },
						  { data + now / 2, now - now / 2 } };
			struct msghdr message = { .msg_iov = parts, .msg_iovlen = 2 };

			sent = sendmsg(end->fd, &message, MSG_NOSIGNAL);
		} else {
			sent = send(end->fd, data, now, MSG_NOSIGNAL);
		}
		if (sent < 0 && wait_for(end, POLLOUT))
			continue;
		if (sent <= 0)
			return wrong(end, "send", errno);
		end->sent += sent;
		size -= sent;
	}
	return true;
}

/*
 * A blocking recv that the lane wakes early (EAGAIN): the socket has sent its FIN while answers were
 * unread, or the peer resets. Both are known limits, and the next call is right again. So is the
 * third, for nodes without guards, which volume.py keeps within bounds: at the FIN it was in
 * doubt whether something was on its way.
 */
static bool known(const struct end *end, struct worker *worker)
{
	if (errno != EAGAIN || end->plan->polling)
		return false;
	if ((end->plan->ending == PIPELINED && is_client(end)) ||
	    end->plan->ending == BOTH_HALF_CLOSE)
		worker->woken_by_end++;
	else if (end->plan->ending == CLIENT_RESETS && !is_client(end))
		worker->woken_by_reset++;
	else if (end->half_closed)
		worker->woken_in_doubt++;
	else
		return false;
	return true;
}

/* One recv; -1 with errno, 0 at the end of the stream. Checks the bytes. */
static ssize_t read_some(struct end *end, struct worker *worker, int most)
{
	static __thread unsigned char data[CHUNK];
	ssize_t got;

	if (most > CHUNK)
		most = CHUNK;
	do {
		if (end->plan->vectors && most > 1) {
			struct iovec parts[2] = { { data, most / 2 },
						  { data + most / 2, most - most / 2 } };

			got = readv(end->fd, parts, 2);
		} else {
			got = recv(end->fd, data, most, 0);
		}
	} while (got < 0 && (wait_for(end, POLLIN) || known(end, worker)));
	for (ssize_t i = 0; i < got; i++) {
		if (data[i] != content(end->plan->seed, !is_client(end), end->received + i)) {
			wrong(end, "a byte is not the one that was sent", 0);
			errno = EBADMSG;
			return -1;
		}
	}
	if (got > 0)
		end->received += got;
	return got;
}

static bool read_all(struct end *end, struct worker *worker, int size)
{
	while (size > 0) {
		ssize_t got = read_some(end, worker, size);

		if (got < 0)
			return wrong(end, "recv", errno);
		if (!got)
			return wrong(end, "the stream has ended early", 0);
		size -= got;
	}
	return true;
}

static bool read_end(struct end *end, struct worker *worker)
{
	ssize_t got = read_some(end, worker, 100);

	if (got < 0)
		return wrong(end, "recv at the end", errno);
	return got ? wrong(end, "more than was sent", 0) : true;
}

static bool half_close(struct end *end)
{
	end->half_closed = true;
	return shutdown(end->fd, SHUT_WR) ? wrong(end, "shutdown", errno) : true;
}

static void think(const struct plan *plan)
{
	if (plan->think)
		usleep(plan->think);
}

static bool client_ends(struct end *end, struct worker *worker)
{
	const struct plan *plan = end->plan;

	switch (plan->ending) {
	case CLIENT_HALF_CLOSES:
		return half_close(end) && read_all(end, worker, plan->server_tail) &&
		       read_end(end, worker);
	case CLIENT_TAIL_HALF_CLOSE:
		return write_all(end, plan->tail) && half_close(end) && read_all(end, worker, 1) &&
		       read_end(end, worker);
	case SERVER_HALF_CLOSES:
		if (!read_all(end, worker, plan->server_tail) || !read_end(end, worker))
			return false;
		think(plan);
		return write_all(end, 1);
	case SERVER_CLOSES:
		return read_all(end, worker, plan->server_tail) && read_end(end, worker);
	case CLIENT_CLOSES:
		return write_all(end, plan->tail);
	case BOTH_HALF_CLOSE:
		return write_all(end, plan->tail) && half_close(end) &&
		       read_all(end, worker, plan->server_tail) && read_end(end, worker);
	case CLIENT_RESETS: {
		struct linger now = { .l_onoff = 1 };

		/* The server's byte says that it has read all, so nothing is lost by the reset. */
		if (!write_all(end, plan->tail) || !read_all(end, worker, 1))
			return false;
		think(plan);
		return !setsockopt(end->fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
	}
	case WRITE_TO_CLOSED:
		return true;
	case PIPELINED:
	case ENDINGS:
		break;
	}
	return half_close(end);
}

static bool server_ends(struct end *end, struct worker *worker)
{
	const struct plan *plan = end->plan;

	switch (plan->ending) {
	case CLIENT_HALF_CLOSES:
		if (!read_end(end, worker))
			return false;
		think(plan);
		return write_all(end, plan->server_tail);
	case CLIENT_TAIL_HALF_CLOSE:
		if (!read_all(end, worker, plan->tail) || !read_end(end, worker))
			return false;
		think(plan);
		return write_all(end, 1);
	case SERVER_HALF_CLOSES:
		return write_all(end, plan->server_tail) && half_close(end) &&
		       read_all(end, worker, 1) && read_end(end, worker);
	case SERVER_CLOSES:
		return write_all(end, plan->server_tail);
	case CLIENT_CLOSES:
		return read_all(end, worker, plan->tail) && read_end(end, worker);
	case BOTH_HALF_CLOSE:
		return write_all(end, plan->server_tail) && half_close(end) &&
		       read_all(end, worker, plan->tail) && read_end(end, worker);
	case CLIENT_RESETS:
		if (!read_all(end, worker, plan->tail) || !write_all(end, 1))
			return false;
		if (read_some(end, worker, 1) >= 0 || errno != ECONNRESET)
			return wrong(end, "no ECONNRESET", errno);
		return true;
	case WRITE_TO_CLOSED: {
		struct pollfd waiting = { .fd = end->fd };

		if (!read_end(end, worker) || !write_all(end, 1))
			return false;
		poll(&waiting, 1, -1); /* the reset: POLLERR and POLLHUP are always told */
		if (send(end->fd, "x", 1, MSG_NOSIGNAL) >= 0 || errno != EPIPE)
			return wrong(end, "no EPIPE", errno);
		return true;
	}
	case PIPELINED:
	case ENDINGS:
		break;
	}
	return read_end(end, worker);
}

static bool talk(struct end *end, struct worker *worker)
{
	const struct plan *plan = end->plan;
	bool client = is_client(end), going = true;

	if (plan->ending == PIPELINED && client) {
		for (int i = 0; going && i < plan->rounds; i++)
			going = write_all(end, plan->request[i]);
		going = going && half_close(end);
		for (int i = 0; going && i < plan->rounds; i++)
			going = read_all(end, worker, plan->answer[i]);
		return going && read_end(end, worker);
	}
	for (int i = 0; going && i < plan->rounds; i++) {
		if (client)
			going = write_all(end, plan->request[i]) &&
				read_all(end, worker, plan->answer[i]);
		else
			going = read_all(end, worker, plan->request[i]) &&
				write_all(end, plan->answer[i]);
	}
	return going && (client ? client_ends(end, worker) : server_ends(end, worker));
}

static void prepare(const struct end *end)
{
	int on = 1;

	if (end->plan->no_delay)
		setsockopt(end->fd, IPPROTO_TCP, 1 /* TCP_NODELAY */, &on, sizeof(on));
	if (end->plan->polling)
		fcntl(end->fd, F_SETFL, O_NONBLOCK);
}

static void settle(struct worker *worker, const struct end *end)
{
	worker->connections++;
	worker->bytes += end->received;
	if (end->wrong[0]) {
		worker->differences++;
		if (__atomic_fetch_add(&shown, 1, __ATOMIC_RELAXED) < MOST_SHOWN)
			fprintf(stderr, "seed %llu, %s: %s\n", (unsigned long long)end->plan->seed,
				ENDING_NAMES[end->plan->ending], end->wrong);
	}
	worker->seed = 0;
}

static void enter(const char *path)
{
	int netns = open(path, O_RDONLY | O_CLOEXEC);

	if (netns < 0 || setns(netns, CLONE_NEWNET)) {
		perror(path);
		exit(2);
	}
	close(netns);
}

/* An address with its port; false if it is neither IPv4 nor IPv6. */
static socklen_t target(struct sockaddr_storage *to, int port)
{
	struct sockaddr_in *v4 = (void *)to;
	struct sockaddr_in6 *v6 = (void *)to;

	memset(to, 0, sizeof(*to));
	if (inet_pton(AF_INET, address, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(port);
		return sizeof(*v4);
	}
	inet_pton(AF_INET6, address, &v6->sin6_addr);
	v6->sin6_family = AF_INET6;
	v6->sin6_port = htons(port);
	return sizeof(*v6);
}

static void *serve(void *argument)
{
	struct worker *worker = argument;

	for (;;) {
		struct plan plan;
		struct end end = { .name = "server", .plan = &plan };
		uint64_t seed;
		size_t got = 0;

		end.fd = accept(listeners[worker->number % threads], NULL, NULL);
		if (end.fd < 0)
			return NULL;
		worker->since = time(NULL);
		/* The seed comes first; a short read of it is no difference. */
		while (got < sizeof(seed)) {
			ssize_t part = recv(end.fd, (char *)&seed + got, sizeof(seed) - got, 0);

			if (part <= 0)
				break;
			got += part;
		}
		if (got == sizeof(seed)) {
			make_plan(seed, &plan);
			worker->seed = seed;
			end.random = seed ^ 0x5555;
			end.received = 0;
			prepare(&end);
			talk(&end, worker);
		} else {
			make_plan(0, &plan);
			wrong(&end, "no seed", errno);
		}
		settle(worker, &end);
		close(end.fd);
	}
}

static void *connect_often(void *argument)
{
	struct worker *worker = argument;
	struct sockaddr_storage to;
	socklen_t length = target(&to, first_port + worker->number);

	enter(client_netns);
	while (!stop) {
		uint64_t count = __atomic_fetch_add(&begun, 1, __ATOMIC_RELAXED);
		struct plan plan;
		struct end end = { .name = "client", .plan = &plan };

		if (most_connections && count >= most_connections)
			break;
		make_plan(start_seed + count, &plan);
		end.random = plan.seed ^ 0xaaaa;
		worker->since = time(NULL);
		worker->seed = plan.seed;
		end.fd = socket(to.ss_family, SOCK_STREAM, 0);
		if (connect(end.fd, (void *)&to, length)) {
			wrong(&end, "connect", errno);
		} else if (send(end.fd, &plan.seed, sizeof(plan.seed), MSG_NOSIGNAL) !=
			   sizeof(plan.seed)) {
			wrong(&end, "send of the seed", errno);
		} else {
			prepare(&end);
			talk(&end, worker);
		}
		settle(worker, &end);
		close(end.fd);
	}
	return NULL;
}

/* True, with a line to stderr, if a connection has not ended for too long. */
static bool somebody_hangs(void)
{
	time_t now = time(NULL);

	for (int i = 0; i < 3 * threads; i++) {
		struct plan plan;

		if (!workers[i].seed || now - workers[i].since <= HANGS_AFTER)
			continue;
		make_plan(workers[i].seed, &plan);
		fprintf(stderr, "seed %llu, %s: the %s hangs\n", (unsigned long long)plan.seed,
			ENDING_NAMES[plan.ending], workers[i].client ? "client" : "server");
		return true;
	}
	return false;
}

static void report(double seconds, bool hang)
{
	uint64_t connections = 0, differences = 0, bytes = 0, by_end = 0, by_reset = 0;
	uint64_t in_doubt = 0;

	for (int i = 0; i < 3 * threads; i++) {
		connections += workers[i].client ? workers[i].connections : 0;
		differences += workers[i].differences;
		bytes += workers[i].bytes;
		by_end += workers[i].woken_by_end;
		by_reset += workers[i].woken_by_reset;
		in_doubt += workers[i].woken_in_doubt;
	}
	printf("{\"connections\": %llu, \"differences\": %llu, \"bytes\": %llu, "
	       "\"woken_by_end\": %llu, \"woken_by_reset\": %llu, \"woken_in_doubt\": %llu, "
	       "\"seconds\": %.1f}\n",
	       (unsigned long long)connections, (unsigned long long)differences + hang,
	       (unsigned long long)bytes, (unsigned long long)by_end, (unsigned long long)by_reset,
	       (unsigned long long)in_doubt, seconds);
	fflush(stdout);
	_exit(differences || hang ? 1 : 0);
}

int main(int count, char **arguments)
{
	struct timespec from, now;
	double seconds = 0, most_seconds;
	bool hang = false, done = false;

	if (count != 9) {
		fprintf(stderr,
			"usage: %s CLIENT_NETNS SERVER_NETNS ADDRESS PORT THREADS SECONDS "
			"CONNECTIONS SEED\n",
			arguments[0]);
		return 2;
	}
	client_netns = arguments[1];
	server_netns = arguments[2];
	address = arguments[3];
	first_port = atoi(arguments[4]);
	threads = atoi(arguments[5]);
	most_seconds = atof(arguments[6]);
	most_connections = strtoull(arguments[7], NULL, 10);
	start_seed = strtoull(arguments[8], NULL, 10);
	if (threads < 1 || threads > MOST_THREADS)
		return 2;

	enter(server_netns);
	for (int i = 0; i < threads; i++) {
		struct sockaddr_storage to;
		socklen_t length = target(&to, first_port + i);
		int on = 1;

		listeners[i] = socket(to.ss_family, SOCK_STREAM, 0);
		setsockopt(listeners[i], SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
		if (bind(listeners[i], (void *)&to, length) || listen(listeners[i], 128)) {
			perror("listen");
			return 2;
		}
	}
	clock_gettime(CLOCK_MONOTONIC, &from);
	for (int i = 0; i < 3 * threads; i++) {
		workers[i].client = i < threads;
		workers[i].number = i % threads;
		pthread_create(&workers[i].thread, NULL, i < threads ? connect_often : serve,
			       &workers[i]);
	}
	while (!done && !hang) {
		usleep(50000);
		clock_gettime(CLOCK_MONOTONIC, &now);
		seconds = now.tv_sec - from.tv_sec + (now.tv_nsec - from.tv_nsec) / 1e9;
		stop = most_seconds && seconds >= most_seconds;
		hang = somebody_hangs();
		done = stop || (most_connections && begun >= most_connections);
	}
	/* The last connections end, or hang. */
	for (int i = 0; i < 3 * threads; i++)
		while (!hang && workers[i].seed) {
			usleep(1000);
			hang = somebody_hangs();
		}
	for (int i = 0; i < threads && !hang; i++)
		pthread_join(workers[i].thread, NULL);
	report(seconds, hang);
}
