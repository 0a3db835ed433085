/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The few kernel structures that our programs read, with only the members they read.
 * libbpf relocates every access to the running kernel's own layout (CO-RE), so neither
 * order nor size matters here; names do. Taking them from a generated vmlinux.h would
 * put 3 MB into git for these lines.
 */
#ifndef NEARPATH_KERNEL_TYPES_H
#define NEARPATH_KERNEL_TYPES_H

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct list_head {
	struct list_head *next;
};

typedef struct {
	int counter;
} atomic_t;

typedef struct refcount_struct {
	atomic_t refs;
} refcount_t;

struct sock;

struct sock_common {
	struct sock *skc_listener; /* of a request socket: the listening socket */
	unsigned char skc_state;
	unsigned long skc_flags; /* spelled sk_flags in the kernel; bits of enum sock_flags */
};

struct wait_queue_entry {
	void *func;
	struct list_head entry;
};

struct wait_queue_head {
	struct list_head head;
};

struct epoll_event {
	__u32 events;
} __attribute__((packed));

struct epitem {
	struct epoll_event event;
};

struct poll_table_entry {
	unsigned int key; /* the events that poll(2) was asked for */
	struct wait_queue_entry wait;
};

struct eppoll_entry {
	struct epitem *base;
	struct wait_queue_entry wait;
};

struct socket_wq {
	struct wait_queue_head wait;
};

struct sock {
	struct sock_common __sk_common;
	struct {
		atomic_t rmem_alloc; /* spelled sk_rmem_alloc in the kernel */
	} sk_backlog;
	int sk_rcvbuf;
	int sk_rcvlowat;
	unsigned int sk_shutdown; /* bits RCV_SHUTDOWN 1, SEND_SHUTDOWN 2 */
	struct socket_wq *sk_wq;
	void *sk_user_data; /* of a socket in a sockmap: its sk_psock, low bits are flags */
};

struct inet_sock {
	struct sock sk;
};

struct tcp_ulp_ops {
	char name[16];
};

struct inet_connection_sock {
	struct inet_sock icsk_inet;
	const struct tcp_ulp_ops *icsk_ulp_ops; /* set: TLS, MPTCP subflow, ... */
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 write_seq;  /* end of what the application has written to TCP */
	__u32 copied_seq; /* end of what the application has read from TCP */
	unsigned char is_mptcp : 1;
	unsigned char nonagle : 4; /* TCP_NODELAY, TCP_CORK */
};

struct request_sock {
	struct sock_common __req_common;
};

struct inet_request_sock {
	struct request_sock req;
};

struct tcp_request_sock {
	struct inet_request_sock req;
	__u32 rcv_isn;
	__u32 snt_isn;
};

struct sk_msg_sg {
	__u32 size; /* bytes that are still to be moved */
};

struct sk_msg {
	struct sk_msg_sg sg;
};

struct sk_psock {
	struct list_head ingress_msg; /* redirected data that nobody has read yet */
	refcount_t refcnt;
};

struct bpf_sock_ops_kern {
	struct sock *sk;
};

struct msghdr {
	unsigned int msg_flags;
};

struct socket {
	struct sock *sk;
};

#pragma clang attribute pop

/* Only the name counts: the value is taken from the running kernel. */
enum sock_flags {
	SOCK_ZEROCOPY,
};

#endif
