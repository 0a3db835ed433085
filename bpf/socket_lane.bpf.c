/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Socket lane: TCP between two pod sockets on this node, moved from socket to socket.
 *
 *   client            kernel path (SYN, SYN-ACK, ACK)            server
 *   connect() ───────────────────────────────────────────────▶ listen()
 *                                     TIMEOUT_INIT: half_open[{c, s}]      sock_ops
 *   ACTIVE_ESTABLISHED: half_open? → sockets[{c, s}]                       sock_ops
 *                           PASSIVE_ESTABLISHED: sockets[{s, c}]           sock_ops
 *   send() ── choose_path() ── redirect to sockets[{s, c}] ───▶ recv()     sk_msg
 *                  └───────── or kernel path ────────────────▶
 *
 * c and s are the initial sequence numbers plus one. Whatever cannot be paired or moved
 * takes the kernel path: the sk_msg program always returns SK_PASS, sock_ops always 1.
 *
 * map          key                       value                 writer             reader
 * pods         netns cookie              struct pod            ADD, DEL           sock_ops
 * settings     0                         struct settings       user space         both
 * half_open    {c, s}                    struct half_open      sock_ops (server)  sock_ops (client)
 * sockets      {own, other}              socket                sock_ops           sk_msg
 * facts        socket                    struct socket_facts   sock_ops           both
 * connections  {c, s}                    struct connection     both               both, user space
 * counters     netns cookie              struct counters       both               user space
 *
 * Deleting from sockets destroys unread redirected data: only leave() does it, and only when
 * there is none.
 */
#include <stdbool.h>

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#include "kernel_types.h"
#include "nearpath.h"

#define E2BIG 7
#define EBUSY 16
#define NS_PER_MS (1000 * 1000ull)

/*
 * A redirect decided by the peer longer ago than this has arrived. Normally it takes a
 * microsecond, but its task can be preempted, or throttled by its CPU quota: the default
 * period of CFS bandwidth control is 100 ms, and it may hit twice.
 */
#define IN_FLIGHT_NS (200 * NS_PER_MS)
/* Tasks waiting on one socket that waiting_tasks() looks at before it gives up. */
#define MOST_WAITERS 8
/* Times that redirect_in_flight() looks at the peer. */
#define PATIENCE 200
/* Redirected messages that a reader may leave unread; see choose_path(). */
#define MOST_UNREAD_MESSAGES 256
/*
 * More than STREAK messages of less than SMALL bytes one way, none back, each within
 * STREAK_GAP_NS of the one before: a stream, which TCP gathers into fewer and larger
 * segments (Nagle, auto-corking), while a redirect wakes the reader for each. Measured with
 * qperf tcp_bw (kernel 6.18, veth and bridge), lane to kernel path: 0.5 at 1 byte, 0.7 at
 * 64, 1.2 (one CPU) and 0.8 (two) at 256, 1.8 and more from 1 KiB. Slower one-way messages
 * stay: they gain from the shorter way and have nothing to be gathered with.
 */
#define STREAK 64
#define SMALL 512
#define STREAK_GAP_NS (NS_PER_MS / 5)
/* sk_user_data's low bits are flags (SK_USER_DATA_*, include/net/sock.h). */
#define USER_DATA_FLAGS 7ull

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct pod);
} pods SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct settings);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct sequences);
	__type(value, struct half_open);
} half_open SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 65536);
	__type(key, struct sequences);
	__type(value, __u32);
} sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct socket_facts);
} facts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768);
	__type(key, struct sequences);
	__type(value, struct connection);
} connections SEC(".maps");

/* Not preallocated: most nodes have far fewer pods than this and many CPUs. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4097);
	__type(key, __u64);
	__type(value, struct counters);
} counters SEC(".maps");

/* Weak: without it waiting_tasks() finds nobody and the answer is the careful one. */
extern const void woken_wake_function __ksym __weak;

static __always_inline void count(__u64 netns, enum counter which, __u64 amount)
{
	struct counters *c = bpf_map_lookup_elem(&counters, &netns);

	if (c)
		c->value[which] += amount;
}

static __always_inline void count_new(__u64 netns, enum counter which)
{
	if (!bpf_map_lookup_elem(&counters, &netns)) {
		struct counters zero = {};

		bpf_map_update_elem(&counters, &netns, &zero, BPF_NOEXIST);
	}
	count(netns, which, 1);
}

static __always_inline struct settings *settings_now(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&settings, &zero);
}

static __always_inline bool paused(void)
{
	struct settings *s = settings_now();

	return !s || s->paused;
}

static __always_inline bool in_lane(__u64 netns)
{
	struct pod *pod = bpf_map_lookup_elem(&pods, &netns);

	return pod && pod->flags & POD_SOCKET_LANE;
}

static __always_inline bool has_ulp(struct tcp_sock *tp)
{
	return BPF_CORE_READ(tp, inet_conn.icsk_ulp_ops) != NULL;
}

static __always_inline bool is_mptcp(struct tcp_sock *tp)
{
	/* The member exists only with CONFIG_MPTCP. */
	return bpf_core_field_exists(tp->is_mptcp) && BPF_CORE_READ_BITFIELD_PROBED(tp, is_mptcp);
}

/* The kernel's own socket behind a sock_ops context; NULL when it cannot be read. */
static __always_inline struct sock *kernel_socket(struct bpf_sock_ops *ctx)
{
	struct bpf_sock_ops_kern *kern = (void *)ctx;

	return BPF_CORE_READ(kern, sk);
}

/* ---- pairing --------------------------------------------------------------------- */

/*
 * A SYN has arrived at a listener of a pod; the SYN-ACK has not left yet. The only place
 * where both sequence numbers are known before the client sees them. The socket is a
 * request socket, of which the verifier gives us nothing, hence the probe reads.
 */
static __always_inline void syn_received(struct bpf_sock_ops *ctx)
{
	struct half_open value = { .netns = bpf_get_netns_cookie(ctx) };
	struct tcp_request_sock *request;
	struct tcp_sock *listener;
	struct sequences key;

	if (!in_lane(value.netns))
		return;
	request = (struct tcp_request_sock *)kernel_socket(ctx);
	if (!request)
		return;
	/*
	 * The child of an MPTCP listener that falls back to TCP looks like plain TCP, and
	 * accept() on kernels before the stable fixes of December 2025 (c77b3b79a92e)
	 * crashes when a sockmap has changed its protocol. Only the listener tells.
	 */
	listener = (struct tcp_sock *)BPF_CORE_READ(request, req.req.__req_common.skc_listener);
	if (!listener)
		return;
	if (is_mptcp(listener)) {
		count_new(value.netns, C_MPTCP);
		return;
	}
	if (has_ulp(listener)) {
		count_new(value.netns, C_ULP);
		return;
	}
	key.first = BPF_CORE_READ(request, rcv_isn) + 1;
	key.second = BPF_CORE_READ(request, snt_isn) + 1;
	bpf_map_update_elem(&half_open, &key, &value, BPF_ANY);
}

/* Why this socket must not be put into a sockmap, or COUNTERS if it may. */
static __always_inline enum counter refusal(struct bpf_sock_ops *ctx)
{
	struct tcp_sock *tp = (struct tcp_sock *)kernel_socket(ctx);

	if (!tp)
		return C_JOIN_FAILED;
	if (is_mptcp(tp))
		return C_MPTCP;
	if (has_ulp(tp))
		return C_ULP;
	return COUNTERS;
}

/* Put the socket into the lane: facts first, for sk_msg may run as soon as it is in. */
static __always_inline enum counter join(struct bpf_sock_ops *ctx, struct sequences *own,
					 struct socket_facts *facts_of_socket)
{
	struct bpf_sock *sk = ctx->sk;
	long error;

	if (!sk || !bpf_sk_storage_get(&facts, sk, facts_of_socket, BPF_SK_STORAGE_GET_F_CREATE))
		return C_JOIN_FAILED;
	error = bpf_sock_hash_update(ctx, &sockets, own, BPF_NOEXIST);
	if (!error) {
		/* Keep the flags that other sock_ops programs on this node have set. */
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags |
						       BPF_SOCK_OPS_STATE_CB_FLAG |
						       BPF_SOCK_OPS_RTT_CB_FLAG);
		return C_JOINED;
	}
	bpf_sk_storage_delete(&facts, sk);
	if (error == -EBUSY)
		return C_SOCKET_BUSY; /* another sockmap user has it */
	return error == -E2BIG ? C_MAP_FULL : C_JOIN_FAILED;
}

static __always_inline void client_established(struct bpf_sock_ops *ctx)
{
	struct sequences key = { .first = ctx->snd_nxt, .second = ctx->rcv_nxt };
	struct socket_facts own = { .connection = key, .side = CLIENT };
	struct connection connection = {};
	struct half_open *server;
	enum counter outcome;

	own.netns = bpf_get_netns_cookie(ctx);
	if (!in_lane(own.netns))
		return;
	server = bpf_map_lookup_elem(&half_open, &key);
	if (!server) {
		count_new(own.netns, C_PEER_ELSEWHERE);
		return;
	}
	outcome = refusal(ctx);
	if (outcome == COUNTERS) {
		connection.sk[CLIENT] = (__u64)kernel_socket(ctx);
		connection.kernel_at[CLIENT] = bpf_ktime_get_ns();
		connection.netns[CLIENT] = own.netns;
		connection.netns[SERVER] = server->netns;
		connection.joined = 1 << CLIENT;
		if (bpf_map_update_elem(&connections, &key, &connection, BPF_NOEXIST)) {
			outcome = C_MAP_FULL;
		} else {
			outcome = join(ctx, &key, &own);
			if (outcome != C_JOINED)
				bpf_map_delete_elem(&connections, &key);
		}
	}
	count_new(own.netns, outcome);
}

static __always_inline void server_established(struct bpf_sock_ops *ctx)
{
	struct sequences own = { .first = ctx->snd_nxt, .second = ctx->rcv_nxt };
	struct sequences key = { .first = own.second, .second = own.first };
	struct socket_facts facts_of_socket = { .connection = key, .side = SERVER };
	struct connection *connection;
	enum counter outcome;

	facts_of_socket.netns = bpf_get_netns_cookie(ctx);
	if (!in_lane(facts_of_socket.netns))
		return;
	bpf_map_delete_elem(&half_open, &key);
	connection = bpf_map_lookup_elem(&connections, &key);
	if (!connection) {
		count_new(facts_of_socket.netns, C_PEER_ELSEWHERE);
		return;
	}
	outcome = refusal(ctx);
	if (outcome == COUNTERS) {
		connection->sk[SERVER] = (__u64)kernel_socket(ctx);
		connection->kernel_at[SERVER] = bpf_ktime_get_ns();
		outcome = join(ctx, &own, &facts_of_socket);
		/* Last: from here on the client may redirect to us. */
		if (outcome == C_JOINED)
			__sync_fetch_and_or(&connection->joined, 1 << SERVER);
	}
	count_new(facts_of_socket.netns, outcome);
}

/* ---- leaving --------------------------------------------------------------------- */

static __always_inline struct sk_psock *psock_of(struct sock *sk)
{
	return (struct sk_psock *)((__u64)BPF_CORE_READ(sk, sk_user_data) & ~USER_DATA_FLAGS);
}

static __always_inline bool queue_empty(struct sock *sk)
{
	struct sk_psock *psock = psock_of(sk);

	return BPF_CORE_READ(psock, ingress_msg.next) ==
	       __builtin_preserve_access_index(&psock->ingress_msg);
}

/*
 * Tasks that sleep in recvmsg or sendmsg of this socket (not in poll or epoll). Global and
 * with an integer for an argument, so that the verifier looks at it once and not for every
 * turn of the loop around it.
 */
__noinline int waiting_tasks(__u64 address)
{
	struct sock *sk = (struct sock *)address;
	struct socket_wq *wq = BPF_CORE_READ(sk, sk_wq);
	struct list_head *head, *item;
	int found = 0;

	if (!wq)
		return 0;
	head = __builtin_preserve_access_index(&wq->wait.head);
	item = BPF_CORE_READ(head, next);
	for (int i = 0; i < MOST_WAITERS && item && item != head; i++) {
		struct wait_queue_entry *entry;

		entry = (void *)item - bpf_core_field_offset(struct wait_queue_entry, entry);
		if (BPF_CORE_READ(entry, func) == &woken_wake_function)
			found++;
		item = BPF_CORE_READ(item, next);
	}
	return found;
}

/*
 * May a redirect that the peer has decided still be on its way? Each sendmsg and recvmsg
 * of a socket in a sockmap holds a reference on its psock from start to end
 * (tcp_bpf_sendmsg, tcp_bpf_recvmsg), so a peer with no reference beyond the map's, or
 * with one for each task that sleeps, has nothing under way. Else only time can tell.
 *
 * The caller has set our leaving bit with a full barrier before. The peer's sendmsg takes
 * its reference and sets redirected_at, a full barrier follows in choose_path(), and then
 * it reads the bit. So either it sees the bit and takes the kernel path, or we see both.
 */
static __always_inline bool redirect_in_flight(const struct connection *connection, __u32 peer)
{
	struct sk_psock *psock;
	struct sock *sk;

	/* Never, or closed: no sendmsg of it can be running any more. */
	if (!connection->redirected_at[peer] || !(connection->joined & 1 << peer))
		return false;
	if (bpf_ktime_get_ns() - connection->redirected_at[peer] > IN_FLIGHT_NS)
		return false;
	sk = (struct sock *)connection->sk[peer];
	psock = psock_of(sk);
	if (!psock)
		return true;
	/*
	 * A task of the peer that is just leaving recvmsg or sendmsg on another CPU is the
	 * usual reason for a reference too many; it takes less than this loop (about 20 us).
	 */
	for (int i = 0; i < PATIENCE; i++)
		if (BPF_CORE_READ(psock, refcnt.refs.counter) == 1 + waiting_tasks((__u64)sk))
			return false;
	return true;
}

enum departure {
	WAS_OUT,
	OUT,
	STILL_IN
};

/*
 * Out of the map, if that destroys nothing: it would what was redirected and not read, so
 * only with an empty queue and nothing on its way.
 */
static __always_inline enum departure leave(struct bpf_sock_ops *ctx, struct connection *connection,
					    struct socket_facts *own)
{
	struct sequences key = own->connection;
	struct sock *sk = kernel_socket(ctx);

	/* From here on the peer takes the kernel path; see redirect_in_flight(). */
	__sync_fetch_and_or(&connection->leaving, 1 << (own->side & 1));
	/* close(2) has taken it out already (sock_map_close). */
	if (!sk || !psock_of(sk))
		return WAS_OUT;
	if (own->side == SERVER) {
		key.first = own->connection.second;
		key.second = own->connection.first;
	}
	if (redirect_in_flight(connection, !(own->side & 1)) || !queue_empty(sk))
		return STILL_IN;
	return bpf_map_delete_elem(&sockets, &key) ? WAS_OUT : OUT;
}

static __always_inline struct connection *connection_of(struct bpf_sock_ops *ctx,
							struct socket_facts **own)
{
	struct bpf_sock *sk = ctx->sk;

	if (!sk)
		return NULL;
	*own = bpf_sk_storage_get(&facts, sk, NULL, 0);
	if (!*own)
		return NULL;
	return bpf_map_lookup_elem(&connections, &(*own)->connection);
}

/*
 * An acknowledgement has come in: the first moment after sk_msg has found a stream at which
 * its sender can be taken out of the map. From then on it sends at native speed.
 */
static __always_inline void acknowledged(struct bpf_sock_ops *ctx)
{
	struct connection *connection;
	struct socket_facts *own;

	connection = connection_of(ctx, &own);
	if (!connection || !(connection->streaming & 1 << (own->side & 1)))
		return;
	if (leave(ctx, connection, own) == OUT)
		count(own->netns, C_LEFT_STREAMING, 1);
}

static __always_inline void state_changed(struct bpf_sock_ops *ctx, __u32 state)
{
	struct connection *connection;
	enum departure departure;
	struct socket_facts *own;
	__u32 mine;

	if (state != BPF_TCP_FIN_WAIT1 && state != BPF_TCP_LAST_ACK && state != BPF_TCP_CLOSE)
		return;
	connection = connection_of(ctx, &own);
	if (!connection)
		return;
	/*
	 * With our FIN sent, a blocking reader of a socket in the map would be woken by
	 * FIN_WAIT1 → FIN_WAIT2 and get EAGAIN, for tcp_bpf_recvmsg waits only once. Closed,
	 * by a reset most likely, every write would report the error again, for
	 * tcp_bpf_sendmsg does not consume sk_err. Out of the map it is as on the kernel path.
	 */
	departure = leave(ctx, connection, own);
	if (state != BPF_TCP_CLOSE) {
		if (departure != WAS_OUT)
			count(own->netns, departure == OUT ? C_LEFT : C_STAYED, 1);
		return;
	}
	mine = 1 << (own->side & 1);
	if (!(__sync_fetch_and_and(&connection->joined, ~mine) & ~mine))
		bpf_map_delete_elem(&connections, &own->connection);
}

SEC("sockops")
int nearpath_sockops(struct bpf_sock_ops *ctx)
{
	/*
	 * ctx->reply is left as it is: 0 means "use the default" for every operation here,
	 * and another program on this cgroup may have put its own answer there.
	 */
	switch (ctx->op) {
	case BPF_SOCK_OPS_TIMEOUT_INIT:
		if (!ctx->is_fullsock && !paused())
			syn_received(ctx);
		break;
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		if (!paused())
			client_established(ctx);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		if (!paused())
			server_established(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		state_changed(ctx, ctx->args[1]);
		break;
	case BPF_SOCK_OPS_RTT_CB:
		acknowledged(ctx);
		break;
	}
	return 1;
}

/* ---- the switch ------------------------------------------------------------------ */

/* Is this message one too many of a stream of small ones? See STREAK. */
static __always_inline bool streaming(struct connection *connection, __u32 side, __u32 size,
				      __u64 now)
{
	bool goes_on = size < SMALL && connection->streak_side == side &&
		       now - connection->sent_at < STREAK_GAP_NS;

	connection->streak = goes_on ? connection->streak + 1 : 0;
	connection->streak_side = side;
	connection->sent_at = now;
	if (connection->streak > STREAK)
		__sync_fetch_and_or(&connection->streaming, 1 << side);
	return connection->streaming & 1 << side;
}

/*
 * The path of one message: C_REDIRECTED_MESSAGES, or the reason for the kernel path.
 *
 * The order matters. Redirect → kernel is always in order, for tcp_bpf_recvmsg reads the
 * redirected queue first; kernel → redirect only when nothing sent by TCP is unread.
 */
static __always_inline enum counter choose_path(struct connection *connection, __u32 side,
						struct tcp_sock *tp, __u32 size)
{
	__u32 peer = !side;
	struct tcp_sock *receiver = (struct tcp_sock *)connection->sk[peer];
	struct settings *s = settings_now();
	__u64 now = bpf_ktime_get_ns();
	__u32 unread, limit;

	if (!s || s->paused)
		return C_PAUSED;
	if (!(connection->joined & 1 << peer))
		return C_PEER_NOT_JOINED;
	if (streaming(connection, side, size, now))
		return C_STREAMING;
	/*
	 * Policy, conntrack and counters see a message of each direction now and then. If
	 * policy drops it, the receiver is never drained again and the rest follows it.
	 */
	if (s->revalidate_ms && now - connection->kernel_at[side] > s->revalidate_ms * NS_PER_MS)
		return C_REVALIDATE;
	/*
	 * The receiver may be gone and its memory another socket's: then the numbers do not
	 * match, or the map sockets does not have it. Redirected bytes move neither number.
	 */
	if (BPF_CORE_READ(receiver, copied_seq) != tp->write_seq)
		return C_NOT_DRAINED;
	/*
	 * A redirect has no flow control. Up to half of the buffer; beyond, TCP's own window
	 * takes over while it is still open: were the buffer full, TCP's segments would be
	 * dropped and the sender would wait for its retransmission timer, for reading
	 * redirected bytes sends no window update.
	 */
	unread = BPF_CORE_READ(receiver, inet_conn.icsk_inet.sk.sk_backlog.rmem_alloc.counter);
	limit = BPF_CORE_READ(receiver, inet_conn.icsk_inet.sk.sk_rcvbuf);
	if (unread + size > limit / 2)
		return C_RECEIVER_BEHIND;
	/* sk_rmem_alloc counts bytes; every message takes another 1 KiB (struct sk_msg). */
	if (!unread)
		connection->empty_at[side] = connection->redirected_messages[side];
	else if (connection->redirected_messages[side] - connection->empty_at[side] >=
		 MOST_UNREAD_MESSAGES)
		return C_RECEIVER_BEHIND;
	/*
	 * Last, and in this order: our mark, a full barrier (that of the atomic), their bit.
	 * See redirect_in_flight().
	 */
	connection->redirected_at[side] = now;
	if (__sync_fetch_and_add(&connection->leaving, 0) & 1 << peer)
		return C_PEER_LEFT;
	return C_REDIRECTED_MESSAGES;
}

static __always_inline void count_message(struct connection *connection, __u64 netns, __u32 side,
					  enum counter path, __u32 size)
{
	struct counters *c = bpf_map_lookup_elem(&counters, &netns);

	/* Written under this side's socket lock only, so plain additions do. */
	if (path == C_REDIRECTED_MESSAGES) {
		connection->redirected_messages[side]++;
		connection->redirected_bytes[side] += size;
	} else {
		connection->kernel_at[side] = bpf_ktime_get_ns();
		connection->kernel_messages[side]++;
		connection->kernel_bytes[side] += size;
	}
	if (!c)
		return;
	if (path == C_REDIRECTED_MESSAGES) {
		c->value[C_REDIRECTED_MESSAGES]++;
		c->value[C_REDIRECTED_BYTES] += size;
	} else {
		c->value[C_KERNEL_MESSAGES]++;
		c->value[C_KERNEL_BYTES] += size;
		if (path < COUNTERS)
			c->value[path]++;
	}
}

SEC("sk_msg")
int nearpath_message(struct sk_msg_md *msg)
{
	struct bpf_sock *sk = msg->sk;
	struct connection *connection;
	struct socket_facts *own;
	struct sequences peer;
	struct tcp_sock *tp;
	enum counter path;
	__u32 side;

	if (!sk)
		return SK_PASS;
	own = bpf_sk_storage_get(&facts, sk, NULL, 0);
	if (!own)
		return SK_PASS;
	connection = bpf_map_lookup_elem(&connections, &own->connection);
	tp = bpf_skc_to_tcp_sock(sk);
	if (!connection || !tp)
		return SK_PASS;
	side = own->side & 1;
	path = choose_path(connection, side, tp, msg->size);
	if (path == C_REDIRECTED_MESSAGES) {
		peer = own->connection;
		if (side == CLIENT) {
			peer.first = own->connection.second;
			peer.second = own->connection.first;
		}
		if (bpf_msg_redirect_hash(msg, &sockets, &peer, BPF_F_INGRESS) != SK_PASS)
			path = C_REDIRECT_FAILED;
	}
	count_message(connection, own->netns, side, path, msg->size);
	return SK_PASS;
}

char LICENSE[] SEC("license") = "GPL";
