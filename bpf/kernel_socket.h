/* SPDX-License-Identifier: GPL-2.0-only */
/* What our programs read from the kernel's own sockets, by probe reads. */
#ifndef NEARPATH_KERNEL_SOCKET_H
#define NEARPATH_KERNEL_SOCKET_H

#include <stdbool.h>

#include <linux/bpf.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "kernel_types.h"
#include "nearpath.h"

/* Tasks waiting on one socket that waiting_tasks() looks at before it gives up. */
#define MOST_WAITERS 8
/* sk_user_data's low bits are flags (SK_USER_DATA_*, include/net/sock.h). */
#define USER_DATA_FLAGS 7ull

#define ULP_MPTCP 0x706374706dull

/*
 * Wake functions, by which one can tell who waits on a socket: tasks in recvmsg and sendmsg,
 * poll and select, epoll. Weak: without them nobody is known, and the answer is the careful one.
 */
extern const void woken_wake_function __ksym __weak;
extern const void pollwake __ksym __weak;
extern const void ep_poll_callback __ksym __weak;

/* include/uapi/linux/eventpoll.h */
#define EPOLLRDHUP (1u << 13)
#define EPOLLET (1u << 31)

static __always_inline bool has_ulp(struct tcp_sock *tp)
{
	return BPF_CORE_READ(tp, inet_conn.icsk_ulp_ops) != NULL;
}

static __always_inline bool is_mptcp(struct tcp_sock *tp)
{
	/* The member exists only with CONFIG_MPTCP. */
	return bpf_core_field_exists(tp->is_mptcp) && BPF_CORE_READ_BITFIELD_PROBED(tp, is_mptcp);
}

/* A listener is one of MPTCP: its TCP socket below is a subflow, whatever its children are. */
static __always_inline bool is_mptcp_listener(struct tcp_sock *tp)
{
	__u64 name;

	if (is_mptcp(tp))
		return true;
	/* "mptcp" and the zeros behind it. */
	return has_ulp(tp) &&
	       !bpf_probe_read_kernel(&name, sizeof(name),
				      BPF_CORE_READ(tp, inet_conn.icsk_ulp_ops)->name) &&
	       name == ULP_MPTCP;
}

/* SO_ZEROCOPY is set: the socket may send with MSG_ZEROCOPY. */
static __always_inline bool sends_zerocopy(struct sock *sk)
{
	return BPF_CORE_READ(sk, __sk_common.skc_flags) &
	       1ul << bpf_core_enum_value(enum sock_flags, SOCK_ZEROCOPY);
}

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

/* Who waits to read from a socket: an enum reader_kind. */
__noinline int kind_of_reader(__u64 address)
{
	struct sock *sk = (struct sock *)address;
	struct socket_wq *wq = BPF_CORE_READ(sk, sk_wq);
	struct list_head *head, *item;
	int kind = NOBODY;

	if (!wq)
		return NOBODY;
	head = __builtin_preserve_access_index(&wq->wait.head);
	item = BPF_CORE_READ(head, next);
	for (int i = 0; i < MOST_WAITERS && item && item != head; i++) {
		struct poll_table_entry *poll;
		struct wait_queue_entry *entry;
		struct eppoll_entry *epoll;
		__u32 events = 0;
		void *wake;
		int this;

		entry = (void *)item - bpf_core_field_offset(struct wait_queue_entry, entry);
		wake = BPF_CORE_READ(entry, func);
		if (wake == &ep_poll_callback) {
			epoll = (void *)entry - bpf_core_field_offset(struct eppoll_entry, wait);
			events = BPF_CORE_READ(epoll, base, event.events);
		} else if (wake == &pollwake) {
			poll = (void *)entry - bpf_core_field_offset(struct poll_table_entry, wait);
			events = BPF_CORE_READ(poll, key);
		} else if (wake != &woken_wake_function) {
			/* Not known, or no waiter any more: nothing can be told. */
			return NOBODY;
		}
		this = events & EPOLLET ? CAREFUL : events & EPOLLRDHUP ? HASTY : PATIENT;
		if (kind < this)
			kind = this;
		item = BPF_CORE_READ(item, next);
	}
	return kind;
}

#endif
