/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The maps of the socket lane, pinned once per node and shared by its programs. The sizes of
 * half_open, sockets, connections and readers follow the node's memory (datapath/sizes.py).
 *
 * map          key                       value                 writer             reader
 * pods         netns cookie              struct pod            ADD, DEL           sock_ops, guards
 * settings     0                         struct settings       user space         all
 * half_open    {c, s}                    struct half_open      sock_ops (server)  sock_ops (client)
 * sockets      {own, other}              socket                sock_ops           sk_msg
 * facts        socket                    struct socket_facts   sock_ops, guards   all
 * connections  {c, s}                    struct connection     all                all, user space
 * readers      struct reader             struct reading        sock_ops, guards   sock_ops
 * counters     netns cookie              struct counters       all                user space
 */
#ifndef NEARPATH_MAPS_H
#define NEARPATH_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "nearpath.h"

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

/* LRU: what a class of connections does is learnt again if it was forgotten. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct reader);
	__type(value, struct reading);
} readers SEC(".maps");

/* Not preallocated: most nodes have far fewer pods than this and many CPUs. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4097);
	__type(key, __u64);
	__type(value, struct counters);
} counters SEC(".maps");

static __always_inline void count(__u64 netns, enum counter which, __u64 amount)
{
	struct counters *c = bpf_map_lookup_elem(&counters, &netns);

	if (c)
		c->value[which] += amount;
}

static const struct counters no_counts; /* 300 bytes too many for the stack */

static __always_inline void count_new(__u64 netns, enum counter which)
{
	if (!bpf_map_lookup_elem(&counters, &netns))
		bpf_map_update_elem(&counters, &netns, &no_counts, BPF_NOEXIST);
	count(netns, which, 1);
}

static __always_inline struct settings *settings_now(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&settings, &zero);
}

/* The kind of reader that the sockets of one side of a connection have. */
static __always_inline struct reader reader_key(const struct connection *connection, __u32 reader)
{
	struct reader key = { .port = connection->endpoint[SERVER].local_port, .side = reader & 1 };

	key.netns = connection->netns[reader & 1];
	key.peer_netns = connection->netns[!(reader & 1)];
	return key;
}

#endif
