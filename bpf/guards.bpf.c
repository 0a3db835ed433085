/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Guards: notice calls that the socket lane does not support, before it is too late.
 *
 *   call on a socket in the lane        without the guard           with it, from then on
 *   splice(2) from it                   waits for ever              its peer's messages take
 *   recv with MSG_WAITALL               may return less             the kernel path
 *   recv with MSG_TRUNC, MSG_OOB        EFAULT, waits for ever
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
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "kernel_types.h"
#include "maps.h"

/* include/linux/socket.h */
#define MSG_OOB 0x1
#define MSG_TRUNC 0x20
#define MSG_WAITALL 0x100
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
	struct reader key = {};
	__u32 writer;

	connection = connection_of(sk, &own);
	if (!connection)
		return;
	writer = !(own->side & 1);
	if (connection->blocked[writer])
		return;
	connection->blocked[writer] = C_NOT_FIT;
	count(own->netns, seen, 1);
	key.netns = connection->netns[own->side & 1];
	key.peer_netns = connection->netns[writer];
	key.port = connection->endpoint[SERVER].local_port;
	key.side = own->side & 1;
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

char LICENSE[] SEC("license") = "GPL";
