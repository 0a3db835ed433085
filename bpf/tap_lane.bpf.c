/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Tap lane: from a virtual machine's tap to its pod's NIC and back, without the bridge.
 *
 *     host veth ═ eth0-nic ──[nearpath_tap, target = tap0]──▶ tap0 ─ VM
 *                     ▲                                         │
 *                     └────[nearpath_tap, target = eth0-nic]────┘
 *
 *     peer:  host veth ◀───[nearpath_tap, target = eth0-nic]─── tap0 ─ VM
 *
 * One instance for each device and direction, for an ifindex means something in its own
 * namespace alone. The filter on the device's ingress holds it: no pins, it goes with the device.
 *
 * Whatever the bridge itself may have to see passes, and so does what cannot be redirected:
 * TC_ACT_UNSPEC, so that other people's filters after ours still see it.
 */
#include <stdbool.h>

#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#define PACKET_HOST 0 /* linux/if_packet.h */
#define ADDRESSES 3

/* Shared with datapath/tap_programs.py. MAC addresses: their first byte is the lowest. */
struct lane {
	__u64 own[ADDRESSES]; /* of the bridge and its two ports: frames for the pod itself */
	__u64 host;	      /* of the host veth */
	__u32 target;	      /* ifindex to redirect to */
	__u32 peer;	      /* 1: to the other end of that */
	__u32 switched;	      /* 1: the host veth is a port of a bridge or the like */
	__u32 unused;
};

const volatile struct lane lane = {};

struct taken {
	__u64 packets;
	__u64 bytes;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct taken);
} taken SEC(".maps");

static __always_inline void count(struct __sk_buff *skb)
{
	__u32 zero = 0, segments = skb->gso_segs;
	struct taken *own = bpf_map_lookup_elem(&taken, &zero);

	if (!own)
		return;
	/* As the action's statistics count: segments, and bytes without the Ethernet header. */
	own->packets += segments > 1 ? segments : 1;
	own->bytes += skb->len - 14;
}

SEC("tc")
int nearpath_tap(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 mtu = 0;
	__u64 to;
	int i;

	if (data + 14 > end)
		return TC_ACT_UNSPEC;
	to = *(__u32 *)data | (__u64) * (__u16 *)(data + 4) << 32;
	/* Broadcast and multicast: DHCP, ARP, neighbour discovery, 01:80:c2:00:00:0x. */
	if (to & 1)
		return TC_ACT_UNSPEC;
	for (i = 0; i < ADDRESSES; i++)
		if (to == lane.own[i])
			return TC_ACT_UNSPEC;
	/*
	 * bpf_redirect() drops what goes to a device that is gone. So ask first; and frames
	 * larger than the MTU are the bridge's to judge (redirect_peer would let them pass).
	 */
	if (bpf_check_mtu(skb, lane.target, &mtu, 0, 0))
		return TC_ACT_UNSPEC;
	count(skb);
	if (lane.peer && to == lane.host) {
		/* Kernels before 6.15 (c43272299488) leave it as it was for the tap's own MAC. */
		bpf_skb_change_type(skb, PACKET_HOST);
		return bpf_redirect_peer(lane.target, 0);
	}
	/*
	 * Kernels from 6.15 on make it PACKET_HOST whoever it is for. A switch does not care; IP
	 * of the host would take frames that are not for it.
	 */
	if (lane.peer && lane.switched)
		return bpf_redirect_peer(lane.target, 0);
	return bpf_redirect(lane.target, 0);
}

char LICENSE[] SEC("license") = "GPL";
