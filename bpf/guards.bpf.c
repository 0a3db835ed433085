/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Guards: notice calls that the socket lane does not support, before it is too late.
 *
 *   call on a socket in the lane        without the guard           with it, from then on
 *   splice(2) from it                   waits for ever              its peer's messages take
 *   recv with MSG_WAITALL               may return less             the kernel path
 *   recv with MSG_TRUNC, MSG_OOB        EFAULT, waits for ever
 *   ioctl FIONREAD                      not all, or nothing         … and it leaves the map
 *   send with MSG_OOB                   urgency is lost             its own messages do
 *
 * They only mark; choose_path() heeds the marks. What the first calls of a reader are, they see
 * before anything is redirected to it (probation), and what one reader has been seen to do
 * holds for all of its kind (map readers). A call that is already asleep when the first
 * redirect arrives is beyond help; so is the one after which a program changes its ways.
 *
 * A program of their own, for some kernels and sandboxes refuse fentry; see "guards" in
 * conf/README.md. Maps are those of socket_lane.bpf.c, by their pins.
 */
#include <stdbool.h>

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "kernel_types.h"
#include "maps.h"

#define EAGAIN 11
/* include/linux/socket.h */
#define MSG_OOB 0x1
#define MSG_PEEK 0x2
#define MSG_TRUNC 0x20
#define MSG_WAITALL 0x100
#define SIOCINQ 0x541B /* FIONREAD; include/uapi/asm-generic/ioctls.h */
/* include/linux/version.h */
#define VERSION(major, minor) (((major) << 16) + ((minor) << 8))

extern int LINUX_KERNEL_VERSION __kconfig;

static __always_inline struct connection *connection_of(struct sock *sk, struct socket_facts **own)
{
	*own = bpf_sk_storage_get(&facts, sk, NULL, 0);
	if (!*own)
		return NULL;
	return bpf_map_lookup_elem(&connections, &(*own)->connection);
}

/* The reader is not fit: nothing more is redirected to it, nor to its like (readers). */
static __always_inline void mark_unfit(struct sock *sk, enum counter seen)
{
	struct reading *known, first = { .unfit = 1 };
	struct connection *connection;
	struct socket_facts *own;
	struct reader key;
	__u32 writer;

	connection = connection_of(sk, &own);
	if (!connection)
		return;
	writer = !(own->side & 1);
	if (connection->blocked[writer])
		return;
	connection->blocked[writer] = C_NOT_FIT;
	count(own->netns, seen, 1);
	key = reader_key(connection, own->side);
	known = bpf_map_lookup_elem(&readers, &key);
	if (known)
		__sync_fetch_and_add(&known->unfit, 1);
	else
		bpf_map_update_elem(&readers, &key, &first, BPF_NOEXIST);
}

SEC("fentry/tcp_splice_read")
int nearpath_splice(__u64 *ctx) /* (sock, ppos, pipe, len, flags) */
{
	struct socket *socket = (struct socket *)ctx[0];
	struct sock *sk = socket->sk;

	if (sk)
		mark_unfit(sk, C_SEEN_SPLICE);
	return 0;
}

SEC("fentry/tcp_bpf_recvmsg")
int nearpath_receive(__u64 *ctx)
{
	/*
	 * (sk, msg, len, flags, addr_len); before 5.19 (ec095263a965) nonblock before flags.
	 * Volatile, or clang computes an address in the context, which the verifier refuses.
	 */
	__u32 fourth = *(const volatile __u64 *)&ctx[3];
	__u32 fifth = *(const volatile __u64 *)&ctx[4];
	__u32 flags = LINUX_KERNEL_VERSION >= VERSION(5, 19) ? fourth : fifth;

	if (flags & (MSG_WAITALL | MSG_TRUNC | MSG_OOB))
		mark_unfit((struct sock *)ctx[0], C_SEEN_FLAGS);
	return 0;
}

/* A redirect has arrived: it is in the receiver's queue, or has failed. See leave(). */
SEC("fexit/tcp_bpf_sendmsg_redir")
int nearpath_delivered(__u64 *ctx) /* (sk of the receiver, ...) */
{
	struct socket_facts *own = bpf_sk_storage_get(&facts, (struct sock *)ctx[0], NULL, 0);

	if (own)
		__sync_fetch_and_add(&own->delivered, 1);
	return 0;
}

/*
 * Does the reader ask again after a short read, until it is told EAGAIN? Then it may be
 * edge-triggered and still find what comes behind redirected bytes; see seams in path.h.
 */
SEC("fexit/tcp_bpf_recvmsg")
int nearpath_received(__u64 *ctx)
{
	/* The value is behind the arguments, of which older kernels have one more; see above. */
	int sixth = *(const volatile __u64 *)&ctx[5];
	__u64 asked = ctx[2];
	__u32 flags = *(const volatile __u64 *)&ctx[3];
	struct reading *known, first = {};
	struct connection *connection;
	struct socket_facts *own;
	struct reader key;
	bool was_short;

	if (LINUX_KERNEL_VERSION < VERSION(5, 19) || flags & MSG_PEEK)
		return 0;
	connection = connection_of((struct sock *)ctx[0], &own);
	if (!connection)
		return 0;
	was_short = own->short_read;
	own->short_read = sixth > 0 && (__u64)sixth < asked;
	if (!was_short || connection->reader[own->side & 1] != CAREFUL ||
	    (sixth <= 0 && sixth != -EAGAIN))
		return 0;
	if (sixth < 0)
		own->drained++;
	key = reader_key(connection, own->side);
	known = bpf_map_lookup_elem(&readers, &key);
	if (!known) {
		bpf_map_update_elem(&readers, &key, &first, BPF_NOEXIST);
		return 0;
	}
	__sync_fetch_and_add(sixth > 0 ? &known->stopped : &known->drained, 1);
	if (own->drained >= DRAINED_HERE && known->drained >= DRAINED_OFTEN &&
	    known->drained >= known->stopped)
		__sync_fetch_and_or(&connection->drains, 1 << (own->side & 1));
	return 0;
}

SEC("fentry/tcp_bpf_sendmsg")
int nearpath_send(__u64 *ctx) /* (sk, msg, size) */
{
	struct msghdr *message = (struct msghdr *)ctx[1];
	struct connection *connection;
	struct socket_facts *own;

	/* Runs before this call's own sk_msg program, which knows nothing of flags. */
	if (!(message->msg_flags & MSG_OOB))
		return 0;
	connection = connection_of((struct sock *)ctx[0], &own);
	if (connection && !connection->blocked[own->side & 1])
		connection->blocked[own->side & 1] = C_URGENT;
	return 0;
}

/*
 * The kernel tells only half: before 6.12.117 and 6.18 what TCP has, since then what was
 * redirected. The first answer may be wrong; the socket leaves, so that the next are right.
 */
static __always_inline void asked_for_size(struct sock *sk, __u32 command)
{
	struct connection *connection;
	struct socket_facts *own;

	if (command != SIOCINQ)
		return;
	connection = connection_of(sk, &own);
	if (!connection)
		return;
	mark_unfit(sk, C_SEEN_IOCTL);
	if (!connection->wants_out[own->side & 1])
		connection->wants_out[own->side & 1] = C_IOCTL;
}

SEC("fentry/tcp_ioctl")
int nearpath_ioctl(__u64 *ctx) /* (sk, cmd, arg) */
{
	asked_for_size((struct sock *)ctx[0], ctx[1]);
	return 0;
}

/* In the place of tcp_ioctl for sockets in a sockmap; younger kernels have it. */
SEC("fentry/tcp_bpf_ioctl")
int nearpath_bpf_ioctl(__u64 *ctx) /* (sk, cmd, karg) */
{
	asked_for_size((struct sock *)ctx[0], ctx[1]);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
