/* SPDX-License-Identifier: GPL-2.0-only */
/* The switch: every message of a socket in the lane chooses its path. */
#ifndef NEARPATH_PATH_H
#define NEARPATH_PATH_H

#include "kernel_socket.h"
#include "maps.h"

#define NS_PER_MS (1000 * 1000ull)
#define NS_PER_US 1000ull
#define RCV_SHUTDOWN 1 /* include/net/sock.h */
#define SEND_SHUTDOWN 2
#define TCP_NAGLE_OFF 1 /* include/net/tcp.h */
/* What a redirected message takes beside its bytes: struct sk_msg, from kmalloc-1k. */
#define MESSAGE_BYTES 1024
/* Of struct connection.decider: more than one task has sent. */
#define SEVERAL 1ull
/* A patient reader is looked at anew when none of these bits is set in its message's number. */
#define LOOK_AGAIN 63

/*
 * Is this message one too many of a stream? More than stream_messages one way, none back,
 * each within stream_gap_us of the one before, and of a size with which the kernel path
 * carries streams faster: Nagle's algorithm gathers small messages into fewer and larger
 * segments, while a redirect wakes the reader for each. Measured with qperf tcp_bw (kernel
 * 6.18, veth and bridge), lane to kernel path: 0.5 at 1 byte, 0.7 at 64; at 512 it depends on
 * how much the reader asks for; 1.3 and more from 1 KiB, hence the default. `nearpath
 * calibrate` measures the node. Slower one-way messages stay: they gain from the shorter way
 * and have nothing to be gathered with. With TCP_NODELAY nothing is gathered, and the lane is
 * faster at any size: at 16 bytes 1.1 and 1.2 on one CPU (light path, heavy path), 1.2 and 2.2 on
 * two; at 1 byte 0.9 and 1.1, 1.2 and 2.2.
 */
static __always_inline bool streaming(struct connection *connection, __u32 side, __u32 size,
				      __u64 now, struct tcp_sock *tp, const struct settings *s)
{
	bool gathered = !(BPF_CORE_READ_BITFIELD(tp, nonagle) & TCP_NAGLE_OFF);
	__u32 from = gathered ? s->stream_from : 0;
	bool goes_on = (size < from || size >= s->stream_to) && connection->streak_side == side &&
		       now - connection->sent_at < s->stream_gap_us * NS_PER_US;

	connection->streak = goes_on ? connection->streak + 1 : 0;
	connection->streak_side = side;
	connection->sent_at = now;
	return s->stream_messages && connection->streak > s->stream_messages;
}

/*
 * Is there too much that was redirected and nobody has read yet? A redirect has no flow
 * control. Up to a share of the buffer; beyond, TCP's own window takes over while it is still
 * open: were the buffer full, TCP's segments would be dropped and the sender would wait for
 * its retransmission timer, for reading redirected bytes sends no window update. And
 * sk_rmem_alloc counts bytes, but every message takes MESSAGE_BYTES more.
 */
static __always_inline bool receiver_behind(struct connection *connection, __u32 side,
					    struct sock *receiver, __u64 unread, __u32 size,
					    const struct settings *s)
{
	__u64 limit = BPF_CORE_READ(receiver, sk_rcvbuf);
	__u64 messages = connection->redirected_messages[side] - connection->empty_at[side];
	/* With the one in hand; alone it may take all of the share, as 64 KiB of 128 do. */
	__u64 taken = unread + size + (messages ? messages + 1 : 0) * MESSAGE_BYTES;

	if (s->receiver_percent && taken > limit * s->receiver_percent / 100)
		return true;
	return s->unread_messages && messages >= s->unread_messages;
}

/*
 * Seams. A read ends where redirected bytes end, even if bytes sent by TCP lie behind them
 * (tcp_bpf_recvmsg). Patient readers come back for those. Careful ones take a short read for
 * all there is: with edge-triggered epoll they wait for an event that has been (nginx, tokio,
 * Netty) and hang. Hasty ones do so once EPOLLRDHUP has told them that the stream is at its
 * end: they close and lose the rest (HAProxy). What is to be redirected to whom cannot wait
 * until a burst turns out to be too large for the lane, so only readers that have been seen
 * to be patient get anything by it, and those of the careful that were seen (by the guards) to
 * read on until EAGAIN (Envoy, Go). Of the hasty that would prove nothing: HAProxy reads on,
 * but for the one time when data and the end come together.
 *
 * Once patient is not for ever, for a program may hand the socket to epoll later: it is looked
 * at anew for the first messages, with each by the kernel path, and now and then.
 */
static __always_inline enum counter reader_is_patient(struct connection *connection, __u32 side)
{
	__u32 reader = !side;
	int known = connection->reader[reader];
	bool drains = connection->drains & 1 << reader;
	int kind;

	if (known == HASTY || (known == CAREFUL && !drains))
		return C_CAREFUL;
	if (known != NOBODY && connection->redirected_messages[side] > LOOK_AGAIN &&
	    connection->redirected_messages[side] & LOOK_AGAIN &&
	    connection->path[side] == C_REDIRECTED_MESSAGES)
		return C_REDIRECTED_MESSAGES;
	kind = kind_of_reader(connection->sk[reader]);
	/* Seen through a waiter that was just going away? Careful is for ever, so look again. */
	if (kind > PATIENT && kind_of_reader(connection->sk[reader]) != kind)
		kind = NOBODY;
	/* Who was careful once, waits in recvmsg now, and may be careful again, is careful. */
	if (kind < known)
		kind = known;
	connection->reader[reader] = kind;
	if (kind == HASTY || (kind == CAREFUL && !drains))
		return C_CAREFUL;
	return kind != NOBODY ? C_REDIRECTED_MESSAGES : C_READER_UNKNOWN;
}

/*
 * Why this message should take the kernel path, or C_REDIRECTED_MESSAGES if it need not.
 * What must not be redirected whoever reads it was sorted out before (choose_path).
 */
static __always_inline enum counter reason_for_kernel(struct connection *connection, __u32 side,
						      struct sock *receiver, __u64 unread,
						      __u32 size, __u64 now,
						      const struct settings *s)
{
	__u32 peer = !side;

	if (s->paused)
		return C_PAUSED;
	if (!s->redirect)
		return C_REDIRECT_OFF;
	if (connection->wants_out[side])
		return connection->wants_out[side];
	if (s->careful) {
		enum counter reason = reader_is_patient(connection, side);

		if (reason != C_REDIRECTED_MESSAGES)
			return reason;
	}
	/*
	 * The guards see how the reader reads before anything is redirected to it. Not only its
	 * first call: proxies read a header with recv and then splice the rest.
	 */
	if (connection->kernel_messages[side] < s->probation && !(connection->waived & 1 << peer))
		return C_PROBATION;
	/*
	 * Policy, conntrack and counters see a message of each direction now and then. If
	 * policy drops it, the receiver is never drained again and the rest follows it.
	 */
	if (s->revalidate_ms && now - connection->kernel_at[side] > s->revalidate_ms * NS_PER_MS)
		return C_REVALIDATE;
	/* SO_RCVLOWAT: a redirect wakes the reader whatever it asked for. */
	if (BPF_CORE_READ(receiver, sk_rcvlowat) > 1)
		return C_LOW_WATER;
	if (receiver_behind(connection, side, receiver, unread, size, s))
		return C_RECEIVER_BEHIND;
	return C_REDIRECTED_MESSAGES;
}

/*
 * The path of one message: C_REDIRECTED_MESSAGES, or the reason for the kernel path.
 *
 * Redirect → kernel is always in order, for tcp_bpf_recvmsg reads the redirected queue first
 * (but see seams); kernel → redirect only when nothing sent by TCP is unread.
 */
static __always_inline enum counter choose_path(struct connection *connection, __u32 side,
						struct tcp_sock *tp, __u32 size, __u64 message)
{
	__u32 peer = !side;
	struct tcp_sock *receiver = (struct tcp_sock *)connection->sk[peer];
	struct sock *sk = &tp->inet_conn.icsk_inet.sk;
	struct settings *s = settings_now();
	__u64 now = bpf_ktime_get_ns();
	enum counter reason;
	__u64 unread, task;

	if (!s)
		return C_PAUSED;
	if (!(connection->joined & 1 << peer))
		return C_PEER_NOT_JOINED;
	/* The kernel answers EPIPE, which tcp_bpf_sendmsg leaves to it. */
	if (sk->sk_shutdown & SEND_SHUTDOWN)
		return C_CLOSING;
	/*
	 * Shut both ways, TCP answers by a reset what comes then; and with something unread the
	 * receiver's FIN could not take it out of the map.
	 */
	if (BPF_CORE_READ(&receiver->inet_conn.icsk_inet.sk, sk_shutdown) & RCV_SHUTDOWN)
		return C_PEER_LEFT;
	/*
	 * Kernel TLS that was switched on since: we see what will be encrypted, and the reader
	 * would get it in the clear.
	 */
	if (tp->inet_conn.icsk_ulp_ops || has_ulp(receiver))
		return C_ULP_SET;
	if (s->guards && connection->blocked[side])
		return connection->blocked[side];
	/* Kernels before 6.5 never complete a MSG_ZEROCOPY of a socket in a sockmap. */
	if (sk->__sk_common.skc_flags & 1ul << bpf_core_enum_value(enum sock_flags, SOCK_ZEROCOPY))
		connection->wants_out[side] = C_ZEROCOPY;
	if (streaming(connection, side, size, now, tp, s) && !connection->wants_out[side])
		connection->wants_out[side] = C_STREAMING;
	/*
	 * The receiver may be gone and its memory another socket's: then the numbers do not
	 * match, or the map sockets does not have it. Redirected bytes move neither number.
	 */
	if (s->drained && BPF_CORE_READ(receiver, copied_seq) != tp->write_seq)
		return C_NOT_DRAINED;
	/* Nothing of TCP's is unread, so this is what was redirected. */
	unread = BPF_CORE_READ(receiver, inet_conn.icsk_inet.sk.sk_backlog.rmem_alloc.counter);
	if (!unread)
		connection->empty_at[side] = connection->redirected_messages[side];
	reason = reason_for_kernel(connection, side, &receiver->inet_conn.icsk_inet.sk, unread,
				   size, now, s);
	if (reason != C_REDIRECTED_MESSAGES)
		return reason;
	/*
	 * Last, and in this order: our mark, a full barrier (that of the atomic), their bit.
	 * See redirect_in_flight().
	 */
	connection->redirected_at[side] = now;
	connection->decided[side]++;
	task = bpf_get_current_task();
	if (connection->decider[side] != task)
		connection->decider[side] = connection->decider[side] ? SEVERAL : task;
	connection->message[side] = message;
	if (__sync_fetch_and_add(&connection->leaving, 0) & 1 << peer) {
		connection->decided[side]--;
		return C_PEER_LEFT;
	}
	return C_REDIRECTED_MESSAGES;
}

/*
 * So much in a row by the kernel path, both ways, and the lane will not help any more: a reader
 * that is always behind and so never drained, one that is careful, one that calls what the lane
 * does not support. Such a connection is better off outside, for inside it is slower than without
 * us (0.7 at 64 and 256 KiB on one CPU, kernel 6.18): tcp_bpf_push() makes a segment of each page
 * of the message, 32 KiB at most, where tcp_sendmsg() makes segments of 64.
 */
static __always_inline void unhelped(struct connection *connection, __u32 side, __u32 size)
{
	struct settings *s = settings_now();

	/* Not if somebody has switched the lane off for a while. */
	if (!s || !s->unhelped_kib || s->paused || !s->redirect)
		return;
	/* Atomic, or a reset by the other side might get lost. */
	__sync_fetch_and_add(&connection->unhelped, size);
	if (!connection->wants_out[side] && connection->unhelped >> 10 >= s->unhelped_kib)
		connection->wants_out[side] = C_UNHELPED;
}

/* Keep the books of one message; called under this side's socket lock only. */
static __always_inline void count_message(struct connection *connection, __u64 netns, __u32 side,
					  enum counter path, __u32 size)
{
	struct counters *c = bpf_map_lookup_elem(&counters, &netns);

	connection->path[side] = path;
	if (path == C_REDIRECTED_MESSAGES) {
		connection->redirected_messages[side]++;
		connection->redirected_bytes[side] += size;
		connection->unhelped = 0;
	} else {
		connection->kernel_at[side] = bpf_ktime_get_ns();
		connection->kernel_messages[side]++;
		connection->kernel_bytes[side] += size;
		unhelped(connection, side, size);
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

#endif
