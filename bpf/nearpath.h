/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the BPF programs and user space share: map keys and values, counters.
 * cni-plugin/nearpath/datapath/tables.py mirrors this file; a unit test compares them.
 * Bump LAYOUT in cni-plugin/nearpath/place.py when a key or value changes.
 */
#ifndef NEARPATH_H
#define NEARPATH_H

/* Sides of a connection; index into the arrays of struct connection. */
enum side {
	CLIENT = 0,
	SERVER = 1,
};

/*
 * Identity of a TCP connection on this node: both initial sequence numbers plus one.
 * Every NAT leaves them alone, so both ends agree on it whatever addresses they see.
 * Own socket first when it names a socket (map sockets), client first when it names a
 * connection (map connections).
 */
struct sequences {
	__u32 first;
	__u32 second;
};

struct pod {
	__u32 flags;
};

/* struct pod.flags */
#define POD_SOCKET_LANE 1u

struct half_open {
	__u64 netns; /* cookie of the server's network namespace */
};

struct socket_facts {
	struct sequences connection;
	__u64 netns; /* cookie of the socket's network namespace */
	__u32 side;
	__u32 callbacks; /* bpf_sock_ops_cb_flags of the socket before it joined */
	/* Kept by the guards alone. */
	__u32 delivered;  /* redirects to it that have arrived */
	__u32 short_read; /* 1: its last read got less than it had asked for */
	__u32 drained;	  /* short reads after which it asked again and was told EAGAIN */
};

/* One side's view of its connection; network byte order but for the ports. */
struct endpoint {
	__u32 local_ip[4]; /* IPv4 in the first word; the others mean nothing then */
	__u32 remote_ip[4];
	__u16 local_port;
	__u16 remote_port;
	__u16 family; /* AF_INET or AF_INET6 */
	__u16 unused;
};

struct connection {
	__u64 sk[2];		/* kernel address of each side's socket */
	__u64 netns[2];		/* cookie of each side's network namespace */
	__u64 kernel_at[2];	/* ktime (ns) when each side last used the kernel path */
	__u64 redirected_at[2]; /* ktime (ns) when each side last (nearly) redirected */
	__u64 redirected_messages[2];
	__u64 redirected_bytes[2];
	__u64 kernel_messages[2];
	__u64 kernel_bytes[2];
	__u64 sent_at;	    /* ktime (ns) of the last message of streak */
	__u64 empty_at[2];  /* redirected_messages of each side when its peer had read all */
	__u64 unhelped;	    /* bytes both ways by the kernel path since the last redirect */
	__u32 joined;	    /* bit per side: its socket is or was in the map sockets */
	__u32 leaving;	    /* bit per side: nothing may be redirected to it any more */
	__u32 waived;	    /* bit per side: its first message needs no probation */
	__u32 streak;	    /* messages of a stream in a row from streak_side */
	__u32 streak_side;  /* enum side */
	__u32 wants_out[2]; /* why each side's socket is to leave the map; 0: it is not */
	__u32 blocked[2];   /* why nothing of each side may be redirected; 0: it may */
	__u32 path[2];	    /* enum counter: path of each side's last message, or the reason */
	__u32 reader[2];    /* enum reader_kind: who was seen to read on each side */
	__u32 drains;	    /* bit per side: its reader reads on until EAGAIN */
	__u32 decided[2];   /* redirects of each side so far, also those still on their way */
	struct endpoint endpoint[2];
	__u64 decider[2]; /* kernel address of the task that decides each side's redirects */
	__u64 message[2]; /* and of the message of its last one */
};

/*
 * Who reads from a socket; see seams in path.h. PATIENT: a task in recvmsg, poll, select, or
 * epoll that reports as long as there is something to read. CAREFUL: edge-triggered epoll.
 * HASTY: epoll that is not, and asks for the end of the stream (EPOLLRDHUP). NOBODY waits at
 * this moment, or somebody that we do not know. The higher one prevails.
 */
enum reader_kind {
	NOBODY,
	PATIENT,
	CAREFUL,
	HASTY
};

/* How a program reads from a class of connections; see probation in socket_lane.bpf.c. */
struct reader {
	__u64 netns;	  /* cookie of the reader's network namespace */
	__u64 peer_netns; /* cookie of the other side's */
	__u32 port;	  /* that the server listens on */
	__u32 side;	  /* of the reader */
};

struct reading {
	__u32 fit;     /* connections read to their end with calls that the lane supports */
	__u32 unfit;   /* calls that it does not */
	__u32 careful; /* CAREFUL or HASTY if a reader of this kind was; else 0 */
	__u32 drained; /* short reads after which it asked again and was told EAGAIN … */
	__u32 stopped; /* … and after which it did not */
};

/*
 * Short reads followed by EAGAIN that show that readers read on: of a kind, and of a connection,
 * for programs that differ may be of one kind (all that connect to the sidecar of their pod).
 */
#define DRAINED_OFTEN 16
#define DRAINED_HERE 2

/*
 * Switches of the rules, live. Zero switches a rule off. Defaults: datapath/settings.py.
 * In every layout `paused` is the first word, for a loader pauses layouts it does not know.
 */
struct settings {
	__u32 paused;		/* 1: no socket joins, every message takes the kernel path */
	__u32 redirect;		/* 0: sockets join, but every message takes the kernel path */
	__u32 guards;		/* 1: what bpf/guards.bpf.c has found out is heeded */
	__u32 probation;	/* messages each way that take the kernel path first */
	__u32 proven;		/* connections with fit readers that waive probation; 0: none do */
	__u32 careful;		/* 1: readers must be known to read on after a short read */
	__u32 revalidate_ms;	/* longest time between two messages on the kernel path */
	__u32 drained;		/* 1: never redirect while bytes sent by TCP are unread */
	__u32 receiver_percent; /* of sk_rcvbuf that a reader may leave unread in the lane */
	__u32 unread_messages;	/* redirected messages that a reader may leave unread */
	__u32 stream_messages;	/* more in a row are a stream; see streaming() */
	__u32 stream_gap_us;	/* longest time between two messages of a stream */
	__u32 stream_from;	/* a stream of messages of this size and more stays in the lane … */
	__u32 stream_to;	/* … if they are smaller than this */
	__u32 unhelped_kib;	/* so much in a row by the kernel path, and both sockets leave */
	__u32 duplex;		/* 1: sockets with a reader that sleeps beside a writer leave */
	__u32 mptcp_fallback;	/* 1: plain TCP connections of MPTCP listeners may join */
};

/* Indices into struct counters. */
enum counter {
	/* messages and bytes by path */
	C_REDIRECTED_MESSAGES,
	C_REDIRECTED_BYTES,
	C_KERNEL_MESSAGES,
	C_KERNEL_BYTES,
	/* sockets */
	C_JOINED,
	C_WAIVED,	  /* joined without probation */
	C_LEFT_STREAMING, /* left the map, for the kernel path carries this stream faster */
	C_LEFT_UNHELPED,  /* left the map, for the lane has not helped its stream */
	C_LEFT_DUPLEX,	  /* left the map, for one task reads while another waits to write */
	C_LEFT_ZEROCOPY,  /* left the map, for it sends with MSG_ZEROCOPY */
	C_LEFT_IOCTL,	  /* left the map, for it asks how much there is to read */
	C_LEFT,		  /* left the map with its FIN, to be native again */
	C_STAYED,	  /* sent its FIN with redirected data unread or on its way */
	/* calls that the lane does not support, seen by the guards */
	C_SEEN_SPLICE,
	C_SEEN_FLAGS,
	C_SEEN_IOCTL,
	/* why a message of a joined socket took the kernel path */
	C_PAUSED,
	C_REDIRECT_OFF,
	C_PEER_NOT_JOINED,
	C_CLOSING,
	C_STREAMING,
	C_UNHELPED,
	C_DUPLEX,
	C_ZEROCOPY,
	C_IOCTL,
	C_NOT_FIT,
	C_READER_UNKNOWN,
	C_CAREFUL,
	C_URGENT,
	C_ULP_SET,
	C_LOW_WATER,
	C_PROBATION,
	C_REVALIDATE,
	C_NOT_DRAINED,
	C_RECEIVER_BEHIND,
	C_PEER_LEFT,
	C_REDIRECT_FAILED,
	/* why a socket of a pod did not join */
	C_PEER_ELSEWHERE,
	C_ULP,
	C_MPTCP,
	C_SOCKET_BUSY,
	C_MAP_FULL,
	C_JOIN_FAILED,
	COUNTERS,
};

struct counters {
	__u64 value[COUNTERS];
};

#endif
