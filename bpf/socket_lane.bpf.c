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
 * The maps are in maps.h, the switch is choose_path() in path.h.
 *
 * Deleting from sockets destroys unread redirected data: only leave() does it, and only when
 * there is none.
 */
#include <bpf/bpf_endian.h>

#include "path.h"

#define E2BIG 7
#define EBUSY 16
#define AF_INET 2
/*
 * Read a member of the context here and now: clang likes to join reads of two branches to one
 * by a computed address, which the verifier refuses.
 */
#define READ(member) (*(const volatile __u32 *)&(member))

/*
 * A redirect decided by the peer longer ago than this has arrived. Normally it takes a
 * microsecond, but its task can be preempted, or throttled by its CPU quota: the default
 * period of CFS bandwidth control is 100 ms, and it may hit twice.
 */
#define IN_FLIGHT_NS (200 * NS_PER_MS)
/* Times that redirect_in_flight() looks at the peer. */
#define PATIENCE 200
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
	struct settings *s = settings_now();
	struct tcp_request_sock *request;
	struct tcp_sock *listener;
	struct sequences key;

	if (!s || !in_lane(value.netns))
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
	if (is_mptcp_listener(listener)) {
		if (!s->mptcp_fallback) {
			count_new(value.netns, C_MPTCP);
			return;
		}
	} else if (has_ulp(listener)) {
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
	if (sends_zerocopy((struct sock *)tp))
		return C_ZEROCOPY;
	return COUNTERS;
}

static __always_inline void note_endpoint(struct bpf_sock_ops *ctx, struct endpoint *own)
{
	__u32 local_ip4, remote_ip4;

	own->family = ctx->family;
	own->local_port = ctx->local_port;
	/* In network order, in the upper half of the word. */
	own->remote_port = bpf_ntohl(ctx->remote_port);
	for (int i = 0; i < 4; i++) {
		own->local_ip[i] = READ(ctx->local_ip6[i]);
		own->remote_ip[i] = READ(ctx->remote_ip6[i]);
	}
	local_ip4 = READ(ctx->local_ip4);
	remote_ip4 = READ(ctx->remote_ip4);
	if (own->family == AF_INET) {
		own->local_ip[0] = local_ip4;
		own->remote_ip[0] = remote_ip4;
	}
}

/*
 * What is known of how this kind of connection is read by one side. Programs of one kind
 * (clients in this pod of that port of that pod) read alike: enough connections read to
 * their end by patient readers with calls that the lane supports spare the next ones their
 * probation; one that it does not support keeps the lane from all that follow.
 */
static __always_inline void recall_reader(struct connection *connection, __u32 reader)
{
	struct reader key = reader_key(connection, reader);
	struct settings *s = settings_now();
	struct reading *known;

	known = bpf_map_lookup_elem(&readers, &key);
	if (!s || !known)
		return;
	if (known->unfit) {
		connection->blocked[!reader] = C_NOT_FIT;
		return;
	}
	if (known->careful)
		connection->reader[reader] = known->careful;
	if (s->proven && known->fit >= s->proven) {
		if (!known->careful)
			connection->reader[reader] = PATIENT;
		connection->waived |= 1 << reader;
		count(key.netns, C_WAIVED, 1);
	}
}

/* A connection is at its end: what did its reader turn out to be? */
static __always_inline void remember_reader(const struct connection *connection, __u32 reader)
{
	struct reader key = reader_key(connection, reader);
	struct reading *known, first = {};
	struct settings *s = settings_now();
	__u32 writer = !reader;
	__u32 kind = connection->reader[reader];
	__u32 careful = kind > PATIENT ? kind : 0;

	/* Nobody seen reading, or nothing to read: nothing learnt. And unfit was noted at once. */
	if (!s || connection->blocked[writer] || (s->careful && kind == NOBODY) ||
	    !(connection->kernel_messages[writer] + connection->redirected_messages[writer]))
		return;
	known = bpf_map_lookup_elem(&readers, &key);
	if (!known) {
		first.fit = 1;
		first.careful = careful;
		bpf_map_update_elem(&readers, &key, &first, BPF_NOEXIST);
		return;
	}
	if (careful > known->careful)
		known->careful = careful;
	if (known->fit < s->proven)
		__sync_fetch_and_add(&known->fit, 1);
}

/* Put the socket into the lane: facts first, for sk_msg may run as soon as it is in. */
static __always_inline enum counter join(struct bpf_sock_ops *ctx, struct sequences *own,
					 struct socket_facts *facts_of_socket)
{
	struct bpf_sock *sk = ctx->sk;
	long error;

	facts_of_socket->callbacks = ctx->bpf_sock_ops_cb_flags;
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
		note_endpoint(ctx, &connection.endpoint[CLIENT]);
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
		note_endpoint(ctx, &connection->endpoint[SERVER]);
		/* Here for both, for only the server knows its own port. */
		recall_reader(connection, CLIENT);
		recall_reader(connection, SERVER);
		outcome = join(ctx, &own, &facts_of_socket);
		/* Last: from here on the client may redirect to us. */
		if (outcome == C_JOINED)
			__sync_fetch_and_or(&connection->joined, 1 << SERVER);
	}
	count_new(facts_of_socket.netns, outcome);
}

/* ---- leaving --------------------------------------------------------------------- */

/*
 * May a redirect that the peer has decided still be on its way to us? Each sendmsg and recvmsg
 * of a socket in a sockmap holds a reference on its psock from start to end
 * (tcp_bpf_sendmsg, tcp_bpf_recvmsg), so a peer with no reference beyond the map's, or
 * with one for each task that sleeps, has nothing under way.
 *
 * Often the peer's task has woken us and could not go on since. If it is the only one that ever
 * sent, its last message tells: the kernel moves its bytes into our queue under our lock, which
 * we hold, and what is left of it is 0 then (bpf_tcp_ingress, sk_msg_xfer). The message lies on
 * the task's stack; what is there later says nothing, but then nothing is under way either.
 * Else only time can tell.
 *
 * The caller has set our leaving bit with a full barrier before. The peer's sendmsg takes
 * its reference and sets redirected_at, a full barrier follows in choose_path(), and then
 * it reads the bit. So either it sees the bit and takes the kernel path, or we see both.
 */
static __always_inline bool redirect_in_flight(const struct connection *connection, __u32 peer,
					       __u32 delivered)
{
	struct sk_psock *psock;
	struct sk_msg *message;
	struct sock *sk;

	/* Never, or closed: no sendmsg of it can be running any more. */
	if (!connection->redirected_at[peer] || !(connection->joined & 1 << peer))
		return false;
	if (bpf_ktime_get_ns() - connection->redirected_at[peer] > IN_FLIGHT_NS)
		return false;
	/* With guards we know. */
	if (delivered == connection->decided[peer])
		return false;
	sk = (struct sock *)connection->sk[peer];
	psock = psock_of(sk);
	message = (struct sk_msg *)connection->message[peer];
	if (!psock)
		return true;
	/*
	 * A task of the peer that is just leaving recvmsg or sendmsg on another CPU is the
	 * usual reason for a reference too many; it takes less than this loop (about 20 us).
	 */
	for (int i = 0; i < PATIENCE; i++) {
		if (BPF_CORE_READ(psock, refcnt.refs.counter) == 1 + waiting_tasks((__u64)sk))
			return false;
		if (connection->decider[peer] != SEVERAL && !BPF_CORE_READ(message, sg.size))
			return false;
	}
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
	__u32 mine = 1 << (own->side & 1);

	/* close(2) has taken it out already (sock_map_close). */
	if (!sk || !psock_of(sk)) {
		__sync_fetch_and_or(&connection->leaving, mine);
		return WAS_OUT;
	}
	/*
	 * The ULP reads and writes by itself, and taking it from below would be asking a lot.
	 * And while something is unread the peer must not be sent to the kernel path: see seams.
	 */
	if (has_ulp((struct tcp_sock *)sk) || !queue_empty(sk))
		return STILL_IN;
	/* From here on the peer takes the kernel path; see redirect_in_flight(). */
	__sync_fetch_and_or(&connection->leaving, mine);
	if (redirect_in_flight(connection, !(own->side & 1), own->delivered) || !queue_empty(sk)) {
		__sync_fetch_and_and(&connection->leaving, ~mine);
		return STILL_IN;
	}
	if (own->side == SERVER) {
		key.first = own->connection.second;
		key.second = own->connection.first;
	}
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
 * An acknowledgement has come in: the first moment after sk_msg has found that a socket is
 * better off outside at which it can be taken out of the map. From then on it is native.
 */
static __always_inline void acknowledged(struct bpf_sock_ops *ctx)
{
	struct connection *connection;
	struct socket_facts *own;
	__u32 why;

	connection = connection_of(ctx, &own);
	if (!connection)
		return;
	why = connection->wants_out[own->side & 1];
	if (!why || leave(ctx, connection, own) != OUT)
		return;
	/* Native from now on, which would be in vain with a callback for every acknowledgement. */
	if (!(own->callbacks & BPF_SOCK_OPS_RTT_CB_FLAG))
		bpf_sock_ops_cb_flags_set(ctx,
					  ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_RTT_CB_FLAG);
	switch (why) {
	case C_STREAMING:
		count(own->netns, C_LEFT_STREAMING, 1);
		break;
	case C_UNHELPED:
		count(own->netns, C_LEFT_UNHELPED, 1);
		break;
	case C_DUPLEX:
		count(own->netns, C_LEFT_DUPLEX, 1);
		break;
	case C_ZEROCOPY:
		count(own->netns, C_LEFT_ZEROCOPY, 1);
		break;
	default:
		count(own->netns, C_LEFT_IOCTL, 1);
	}
}

static __always_inline void state_changed(struct bpf_sock_ops *ctx, __u32 state)
{
	struct connection *connection;
	enum departure departure;
	struct socket_facts *own;
	__u32 mine;

	if (state != BPF_TCP_FIN_WAIT1 && state != BPF_TCP_FIN_WAIT2 && state != BPF_TCP_LAST_ACK &&
	    state != BPF_TCP_CLOSE)
		return;
	connection = connection_of(ctx, &own);
	if (!connection)
		return;
	/*
	 * With our FIN sent, a blocking reader of a socket in the map would be woken by
	 * FIN_WAIT1 → FIN_WAIT2 and get EAGAIN, for tcp_bpf_recvmsg waits only once. If it could
	 * not leave then, it may with the FIN's acknowledgement. Closed,
	 * by a reset most likely, every write would report the error again, for
	 * tcp_bpf_sendmsg does not consume sk_err. Out of the map it is as on the kernel path.
	 */
	departure = leave(ctx, connection, own);
	if (state != BPF_TCP_CLOSE) {
		if (departure == OUT)
			count(own->netns, C_LEFT, 1);
		else if (departure == STILL_IN && state != BPF_TCP_FIN_WAIT2)
			count(own->netns, C_STAYED, 1);
		return;
	}
	remember_reader(connection, own->side & 1);
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

/* ---- messages ---------------------------------------------------------------------- */

/*
 * A task sleeps in recvmsg of this socket while another sends: tcp_bpf_recvmsg waits only
 * once and would return EAGAIN when the writer, having filled the send buffer, is woken. Such
 * sockets leave. Looked for when a message takes the kernel path, for only then can the
 * send buffer fill up, and the looking costs as much as choosing.
 */
static __always_inline void notice_duplex(struct connection *connection, __u32 side)
{
	struct settings *s = settings_now();

	if (s && s->duplex && !connection->wants_out[side] && waiting_tasks(connection->sk[side]))
		connection->wants_out[side] = C_DUPLEX;
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
	path = choose_path(connection, side, tp, msg->size, (__u64)msg);
	if (path != C_REDIRECTED_MESSAGES)
		notice_duplex(connection, side);
	if (path == C_REDIRECTED_MESSAGES) {
		peer = own->connection;
		if (side == CLIENT) {
			peer.first = own->connection.second;
			peer.second = own->connection.first;
		}
		if (bpf_msg_redirect_hash(msg, &sockets, &peer, BPF_F_INGRESS) != SK_PASS) {
			connection->decided[side]--;
			path = C_REDIRECT_FAILED;
		}
	}
	count_message(connection, own->netns, side, path, msg->size);
	return SK_PASS;
}

char LICENSE[] SEC("license") = "GPL";
