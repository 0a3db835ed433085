/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Load for bench_tap.py: UDP between a pod and a virtual machine that is only a process on
 * the tap. It does what qemu and a Linux guest with virtio-net would do to the device: opens
 * it with IFF_VNET_HDR, negotiates offloads, blocks in read(2), one write(2) per frame.
 *
 *   tap NETNS CPU guest DEVICE MAC ADDRESS
 *   tap NETNS CPU ask TEST ADDRESS SIZE WINDOW WARM_MS MEASURE_MS
 *
 * First it goes where the load is to run: network namespace, CPU, real-time. guest prints
 * {"ready": true} once it reads, and goes on until it is killed. ask runs in a pod, and
 * measures. TEST is
 *
 *   lat        ask sends SIZE bytes, guest sends them back
 *   to_vm      ask sends WINDOW messages of SIZE bytes, then asks how many bytes have come
 *   from_vm    ask asks for WINDOW messages of SIZE bytes, and reads them
 *   to_vm_gso, from_vm_gso   likewise, each message one super packet (UDP_SEGMENT); SIZE is
 *              more than a segment. It arrives in one piece unless the kernel must cut it.
 *
 * and prints {"count": turns or bytes, "seconds": …, "p50_us": …, "p99_us": …, "max_us": …}.
 * Streams have a window because UDP has none: on one CPU the sender would fill the tap's
 * queue and most messages would be lost. A lost message ends the run with an error.
 *
 * The guest is IPv4 only. What it sends has its checksum left open (NEEDS_CSUM), as a Linux
 * guest leaves it; what arrives without one left open is verified; datagrams above the MTU
 * go in fragments, whose checksum the sender computes, and are put together.
 */
#define _GNU_SOURCE
#include "common.h"

#include <arpa/inet.h>
#include <linux/if_ether.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/udp.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define MTU 1500
/* Of a fragment: a multiple of eight. */
#define PIECE 1480
/* Of a segment of a super packet. */
#define SEGMENT (MTU - 28)
#define LARGEST 65507
#define FRAME (sizeof(struct header) + 65536)
/* What has not come by then is lost: UDP says nothing. */
#define PATIENCE_S 5
/* Ports of the guest. */
#define ECHO 7
#define SINK 9
#define COUNT 10
#define SOURCE 19

#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20
#define TUN_F_USO6 0x40
#endif
#ifndef VIRTIO_NET_HDR_GSO_UDP_L4
#define VIRTIO_NET_HDR_GSO_UDP_L4 5
#endif
#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#define UDP_GRO 104
#endif

/* A frame on the tap of a guest with mergeable buffers, as far as UDP needs it. */
struct header {
	struct virtio_net_hdr_mrg_rxbuf virtio;
	struct ethhdr ethernet;
	struct iphdr ip;
	struct udphdr udp; /* of the first fragment alone */
} __attribute__((packed));

#define BEFORE_IP (sizeof(struct virtio_net_hdr_mrg_rxbuf) + sizeof(struct ethhdr))

/* What from_vm asks for. */
struct order {
	uint32_t count;
	uint32_t size;
	uint32_t gso;
};

struct job {
	const char *test;
	size_t size;
	unsigned int window;
	bool gso;
	struct span span;
};

struct guest {
	int tap;
	uint8_t mac[ETH_ALEN];
	uint32_t address;
	uint16_t identification;
	uint64_t sunk;		 /* bytes that SINK got since the last COUNT */
	uint8_t frame[FRAME];	 /* the last one that was read */
	struct header first;	 /* of the datagram that is being put together */
	uint8_t datagram[65536]; /* its UDP header and payload */
	size_t have;		 /* bytes of it */
};

/* So that whoever waits is switched to at once, and nobody else in between. */
static void be_real_time(void)
{
	struct sched_param real_time = { .sched_priority = 1 };

	if (sched_setscheduler(0, SCHED_FIFO, &real_time))
		fail("SCHED_FIFO");
}

/* ---- checksums ------------------------------------------------------------------- */

/* Sum of 16-bit words in memory order, not yet folded; only the last piece may be odd. */
static uint64_t sum(const void *data, size_t size, uint64_t start)
{
	const uint8_t *bytes = data;
	uint32_t word;
	uint16_t rest = 0;

	for (; size >= sizeof(word); size -= sizeof(word), bytes += sizeof(word)) {
		memcpy(&word, bytes, sizeof(word));
		start += word;
	}
	while (size) {
		size_t step = size < sizeof(rest) ? size : sizeof(rest);

		rest = 0;
		memcpy(&rest, bytes, step);
		start += rest;
		size -= step;
		bytes += step;
	}
	return start;
}

static uint16_t fold(uint64_t value)
{
	while (value >> 16)
		value = (value & 0xffff) + (value >> 16);
	return value;
}

static uint64_t pseudo_header(const struct header *header, size_t size)
{
	uint64_t start = htons(IPPROTO_UDP) + htons(size);

	/* Both addresses stand side by side. */
	return sum(&header->ip.saddr, 2 * sizeof(header->ip.saddr), start);
}

/* ---- the guest ------------------------------------------------------------------- */

static void put(struct guest *guest, struct header *header, size_t header_size, const void *data,
		size_t size)
{
	struct iovec parts[] = { { header, header_size }, { (void *)data, size } };

	header->ip.check = 0;
	header->ip.check = ~fold(sum(&header->ip, sizeof(header->ip), 0));
	if (writev(guest->tap, parts, size ? 2 : 1) < 0)
		fail("write to the tap");
}

/* Answer the datagram that came last; with gso as one super packet. */
static void reply(struct guest *guest, const void *data, size_t size, bool gso)
{
	struct header header = guest->first;
	size_t whole = sizeof(header.udp) + size;
	bool one = gso || whole + sizeof(header.ip) <= MTU;

	memset(&header.virtio, 0, sizeof(header.virtio));
	memcpy(header.ethernet.h_dest, guest->first.ethernet.h_source, ETH_ALEN);
	memcpy(header.ethernet.h_source, guest->mac, ETH_ALEN);
	header.ip.saddr = guest->first.ip.daddr;
	header.ip.daddr = guest->first.ip.saddr;
	header.ip.id = htons(guest->identification++);
	header.ip.ttl = 64;
	header.udp.source = guest->first.udp.dest;
	header.udp.dest = guest->first.udp.source;
	header.udp.len = htons(whole);
	header.udp.check = fold(pseudo_header(&header, whole));
	if (one) {
		header.ip.tot_len = htons(sizeof(header.ip) + whole);
		header.ip.frag_off = htons(IP_DF);
		header.virtio.hdr.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
		header.virtio.hdr.csum_start = sizeof(header.ethernet) + sizeof(header.ip);
		header.virtio.hdr.csum_offset = offsetof(struct udphdr, check);
		if (gso) {
			header.virtio.hdr.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4;
			header.virtio.hdr.gso_size = SEGMENT;
			header.virtio.hdr.hdr_len = sizeof(header) - sizeof(header.virtio);
		}
		put(guest, &header, sizeof(header), data, size);
		return;
	}
	uint64_t open = pseudo_header(&header, whole);

	header.udp.check = 0;
	header.udp.check = ~fold(sum(data, size, sum(&header.udp, sizeof(header.udp), open)));
	for (size_t at = 0; at < whole; at += PIECE) {
		size_t step = whole - at < PIECE ? whole - at : PIECE;
		size_t udp = at ? 0 : sizeof(header.udp);

		header.ip.tot_len = htons(sizeof(header.ip) + step);
		header.ip.frag_off = htons(at / 8 | (at + step < whole ? IP_MF : 0));
		put(guest, &header, BEFORE_IP + sizeof(header.ip) + udp,
		    (const uint8_t *)data + (at ? at - sizeof(header.udp) : 0), step - udp);
	}
}

/* A whole datagram is there. */
static void act(struct guest *guest)
{
	const uint8_t *data = guest->datagram + sizeof(struct udphdr);
	size_t size = guest->have - sizeof(struct udphdr);
	struct order order;

	switch (ntohs(guest->first.udp.dest)) {
	case ECHO:
		reply(guest, data, size, false);
		break;
	case SINK:
		guest->sunk += size;
		break;
	case COUNT:
		reply(guest, &guest->sunk, sizeof(guest->sunk), false);
		guest->sunk = 0;
		break;
	case SOURCE:
		if (size < sizeof(order))
			break;
		memcpy(&order, data, sizeof(order));
		while (order.count--)
			reply(guest, guest->frame + sizeof(struct header), order.size, order.gso);
		break;
	}
}

static void resolve(struct guest *guest, size_t size)
{
	static const uint8_t request[] = { 0, 1, 8, 0, 6, 4, 0, 1 };
	uint8_t *arp = guest->frame + BEFORE_IP;
	struct ethhdr *ethernet = (void *)(arp - sizeof(*ethernet));

	if (size < BEFORE_IP + 28 || memcmp(arp, request, sizeof(request)) ||
	    memcmp(arp + 24, &guest->address, sizeof(guest->address)))
		return;
	memset(guest->frame, 0, sizeof(struct virtio_net_hdr_mrg_rxbuf));
	memcpy(ethernet->h_dest, ethernet->h_source, ETH_ALEN);
	memcpy(ethernet->h_source, guest->mac, ETH_ALEN);
	arp[7] = 2;
	memmove(arp + 18, arp + 8, 10); /* the asker is the target now */
	memcpy(arp + 8, guest->mac, ETH_ALEN);
	memcpy(arp + 14, &guest->address, sizeof(guest->address));
	if (write(guest->tap, guest->frame, size) < 0)
		fail("write to the tap");
}

/* Take in the frame that was read; true if it completes a datagram. */
static bool take(struct guest *guest, size_t size)
{
	const struct header *header = (void *)guest->frame;
	size_t data = ntohs(header->ip.tot_len) - sizeof(header->ip);
	uint16_t fragment = ntohs(header->ip.frag_off);
	size_t at = (fragment & IP_OFFMASK) * 8;

	if (size < sizeof(*header) || header->ip.ihl != 5 || header->ip.protocol != IPPROTO_UDP ||
	    header->ip.daddr != guest->address || data > size - BEFORE_IP - sizeof(header->ip))
		return false;
	if (fold(sum(&header->ip, sizeof(header->ip), 0)) != 0xffff) {
		errno = EBADMSG;
		fail("IP checksum");
	}
	/* Nothing on this machine changes the order of frames. */
	if (at && at != guest->have)
		return false;
	if (!at)
		guest->first = *header;
	memcpy(guest->datagram + at, &header->udp, data);
	guest->have = at + data;
	if (fragment & IP_MF)
		return false;
	if (!(header->virtio.hdr.flags &
	      (VIRTIO_NET_HDR_F_NEEDS_CSUM | VIRTIO_NET_HDR_F_DATA_VALID)) &&
	    guest->first.udp.check &&
	    fold(sum(guest->datagram, guest->have, pseudo_header(header, guest->have))) != 0xffff) {
		errno = EBADMSG;
		fail("UDP checksum of %zu bytes", guest->have);
	}
	return true;
}

static int open_tap(const char *device)
{
	unsigned int offloads = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_USO4 | TUN_F_USO6;
	struct ifreq request = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
	int size = sizeof(struct virtio_net_hdr_mrg_rxbuf);
	int tap = open("/dev/net/tun", O_RDWR | O_CLOEXEC);

	snprintf(request.ifr_name, sizeof(request.ifr_name), "%s", device);
	if (tap < 0 || ioctl(tap, TUNSETIFF, &request) || ioctl(tap, TUNSETVNETHDRSZ, &size))
		fail("cannot open tap %s", device);
	/* Segmentation of UDP is there since 6.2. */
	if (ioctl(tap, TUNSETOFFLOAD, offloads) &&
	    ioctl(tap, TUNSETOFFLOAD, offloads & ~(TUN_F_USO4 | TUN_F_USO6)))
		fail("TUNSETOFFLOAD");
	return tap;
}

static _Noreturn void be_guest(char **arguments)
{
	static struct guest guest;
	uint8_t *mac = guest.mac;

	if (sscanf(arguments[1], "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", &mac[0], &mac[1], &mac[2],
		   &mac[3], &mac[4], &mac[5]) != ETH_ALEN ||
	    inet_pton(AF_INET, arguments[2], &guest.address) != 1) {
		errno = EINVAL;
		fail("MAC %s, address %s", arguments[1], arguments[2]);
	}
	guest.tap = open_tap(arguments[0]);
	puts("{\"ready\": true}");
	for (;;) {
		const struct header *header = (void *)guest.frame;
		ssize_t got = read(guest.tap, guest.frame, sizeof(guest.frame));

		if (got < 0)
			fail("read from the tap");
		/* Another guest's, which a bridge floods. */
		if (!(header->ethernet.h_dest[0] & 1) &&
		    memcmp(header->ethernet.h_dest, guest.mac, ETH_ALEN))
			continue;
		if (header->ethernet.h_proto == htons(ETH_P_ARP))
			resolve(&guest, got);
		else if (header->ethernet.h_proto == htons(ETH_P_IP) && take(&guest, got))
			act(&guest);
	}
}

/* ---- ask ------------------------------------------------------------------------- */

static uint8_t buffer[65536];

/* Not SO_RCVTIMEO, which costs a timer per message. */
static void give_up(int number)
{
	static const char text[] = "tap: no answer any more; a message was lost\n";

	(void)number;
	if (write(STDERR_FILENO, text, sizeof(text) - 1) < 0)
		_exit(2);
	_exit(1);
}

static int connected(const char *address, int port)
{
	struct sockaddr_in guest = { .sin_family = AF_INET, .sin_port = htons(port) };
	int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	int room = 16 << 20;

	if (inet_pton(AF_INET, address, &guest.sin_addr) != 1) {
		errno = EINVAL;
		fail("address %s", address);
	}
	if (sock < 0 || connect(sock, (struct sockaddr *)&guest, sizeof(guest)) ||
	    setsockopt(sock, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof(room)) ||
	    setsockopt(sock, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof(room)))
		fail("cannot connect to %s:%d", address, port);
	return sock;
}

static void say(int sock, const void *data, size_t size)
{
	if (send(sock, data, size, 0) != (ssize_t)size)
		fail("send of %zu bytes", size);
}

static void hear(int sock, void *data, size_t size)
{
	ssize_t got = recv(sock, data, size, 0);

	if (got < 0)
		fail("recv");
	if (got != (ssize_t)size) {
		errno = EBADMSG;
		fail("%zd bytes instead of %zu", got, size);
	}
}

/* Super packets or what they were cut into. */
static void hear_all(int sock, size_t size)
{
	for (size_t have = 0; have < size;) {
		ssize_t got = recv(sock, buffer, sizeof(buffer), 0);

		if (got <= 0)
			fail("recv");
		have += got;
	}
}

struct client {
	const struct job *job;
	int sock;
	int other; /* asks how many bytes have come */
};

/* One turn of what is measured. */
static void turn(const void *context)
{
	const struct client *client = context;
	const struct job *job = client->job;
	int sock = client->sock, other = client->other;
	struct order order = { job->window, job->size, job->gso };
	uint64_t come;

	if (!strcmp(job->test, "lat")) {
		say(sock, buffer, job->size);
		hear(sock, buffer, job->size);
	} else if (!strncmp(job->test, "to_vm", 5)) {
		for (unsigned int sent = 0; sent < job->window; sent++)
			say(sock, buffer, job->size);
		say(other, buffer, 1);
		hear(other, &come, sizeof(come));
		if (come != job->window * job->size) {
			errno = EBADMSG;
			fail("%llu of %u * %zu bytes have come", (unsigned long long)come,
			     job->window, job->size);
		}
	} else {
		say(sock, &order, sizeof(order));
		if (job->gso)
			hear_all(sock, job->window * job->size);
		for (unsigned int read = 0; !job->gso && read < job->window; read++)
			hear(sock, buffer, job->size);
	}
}

static void ask(const char *address, const struct job *job)
{
	bool lat = !strcmp(job->test, "lat"), to_vm = !strncmp(job->test, "to_vm", 5);
	struct client client = {
		.job = job,
		.sock = connected(address, lat	   ? ECHO
					   : to_vm ? SINK
						   : SOURCE),
		.other = connected(address, COUNT),
	};
	int segment = SEGMENT, one = 1;
	uint64_t come;

	if (job->gso &&
	    (setsockopt(client.sock, IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof(segment)) ||
	     setsockopt(client.sock, IPPROTO_UDP, UDP_GRO, &one, sizeof(one))))
		fail("UDP_SEGMENT");
	/* The first one waits for ARP; and what an earlier run has lost is forgotten. */
	say(client.other, buffer, 1);
	hear(client.other, &come, sizeof(come));
	measure_turns(turn, &client, job->span, lat ? 1 : job->window * job->size);
}

int main(int argc, char **argv)
{
	struct job job;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc == 7 && !strcmp(argv[3], "guest")) {
		go_to(argv[1], atoi(argv[2]));
		be_real_time();
		be_guest(argv + 4);
	}
	if (argc != 10 || strcmp(argv[3], "ask")) {
		fprintf(stderr, "tap: see the top of tap.c\n");
		return 2;
	}
	job = (struct job){
		.test = argv[4],
		.size = atol(argv[6]),
		.window = atoi(argv[7]),
		.gso = strlen(argv[4]) > 4 && !strcmp(argv[4] + strlen(argv[4]) - 4, "_gso"),
		.span = { atoll(argv[8]) * 1000000, atoll(argv[9]) * 1000000 },
	};
	if (job.size < 1 || job.size > LARGEST || job.window < 1) {
		fprintf(stderr, "tap: size %zu, window %u\n", job.size, job.window);
		return 2;
	}
	signal(SIGALRM, give_up);
	alarm(PATIENCE_S);
	go_to(argv[1], atoi(argv[2]));
	be_real_time();
	ask(argv[5], &job);
	return 0;
}
