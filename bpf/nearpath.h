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
	__u32 unused;
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
	__u32 joined;	 /* bit per side: its socket is or was in the map sockets */
	__u32 leaving;	 /* bit per side: nothing may be redirected to it any more */
	__u32 streaming; /* bit per side: it streams small messages and is to leave */
	__u32 streak;	 /* small messages in a row from streak_side, close together */
	__u32 streak_side;
	__u32 unused;
	__u64 sent_at;	   /* ktime (ns) of the last of them */
	__u64 empty_at[2]; /* redirected_messages of each side when its peer had read all */
};

struct settings {
	__u32 paused;	     /* 1: no socket joins, every message takes the kernel path */
	__u32 revalidate_ms; /* longest time between two messages on the kernel path; 0: any */
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
	C_LEFT_STREAMING, /* left the map, for TCP gathers small messages */
	C_LEFT,		  /* left the map with its FIN, to be native again */
	C_STAYED,	  /* sent its FIN with redirected data unread or on its way */
	/* why a message of a joined socket took the kernel path */
	C_PAUSED,
	C_PEER_NOT_JOINED,
	C_REVALIDATE,
	C_STREAMING,
	C_PEER_LEFT,
	C_NOT_DRAINED,
	C_RECEIVER_BEHIND,
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
