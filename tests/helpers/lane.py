"""Which path a conversation between two pods took: by the lane's counters and by capture."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from helpers.capture import capture
from helpers.netns import host_veth
from helpers.traffic import converse

if TYPE_CHECKING:
    from helpers.capture import Seen
    from helpers.node import Node
    from helpers.traffic import Conversation

MESSAGES = 300
SIZE = 100
# What the kernel path may carry of an accelerated conversation: the first messages of each
# direction (the peer has not joined yet, it is probation, or its reader has not been seen to
# wait, for whoever reads so soon after writing need not, which takes long on a busy machine) …
FIRST_MESSAGES = 240
# … the server's farewell, which follows the client's half-close, …
FAREWELL = 1
# … and, once per revalidate interval, one message of each direction.
REVALIDATE_SECONDS = 1.0


class Pod(Protocol):
    """What both runtimes' pods have."""

    @property
    def netns(self) -> str:
        """Path of the network namespace."""

    @property
    def ips(self) -> tuple[str, ...]:
        """Addresses without prefix length."""

    @property
    def inside(self) -> tuple[str, ...]:
        """Words to put before a command that shall run in the pod."""


@dataclass(frozen=True)
class Watched:
    """A conversation, what crossed the host veths, and how far the lane's counter moved.

    Attributes:
        views: of the client's veth and of the server's.
        redirected: messages, of the whole node.
    """

    talk: Conversation
    views: tuple[Seen, ...]
    redirected: int

    def assert_accelerated(self) -> None:
        """The data is right, the handshake crossed both veths, the messages did not."""
        self._assert_right()
        allowed = FIRST_MESSAGES + 2 * int(self.talk.seconds / REVALIDATE_SECONDS)
        # MESSAGES requests and as many answers; the farewell may take either path.
        least, most = 2 * MESSAGES - allowed, 2 * MESSAGES + FAREWELL
        assert least <= self.redirected <= most, f"{self.redirected} of {least} to {most}"
        # Whatever was redirected crossed no veth.
        by_kernel = most - self.redirected + FAREWELL
        for seen in self.views:
            assert seen.payload_segments <= by_kernel
            assert seen.payload_bytes <= by_kernel * SIZE

    def assert_kernel_path(self) -> None:
        """The data is right and all of it crossed the veths."""
        self._assert_right()
        assert self.redirected == 0
        for seen in self.views:
            assert seen.payload_bytes >= 2 * MESSAGES * SIZE

    def _assert_right(self) -> None:
        assert self.talk.intact
        assert self.talk.messages == MESSAGES
        for seen in self.views:
            assert (seen.syn, seen.syn_ack, seen.rst) == (1, 1, 0)


def watch(
    node: Node,
    client: Pod | None,
    server: Pod,
    address: str,
    *,
    listen: int = 0,
    port: int = 0,
) -> Watched:
    """Converse, MESSAGES times SIZE bytes each way, while the host veths are captured.

    Args:
        client: None: the node itself.
        address: that the client connects to.
        listen: port of the server; 0: any.
        port: that the client connects to, if that is not the server's.
    """
    before = node.lane()["redirected_messages"]
    with ExitStack() as captures:
        views = [
            (captures.enter_context(capture(host_veth(pod.netns))), pod)
            for pod in (client, server)
            if pod is not None
        ]
        talk = converse(
            client.inside if client else (),
            server.inside,
            address,
            messages=MESSAGES,
            size=SIZE,
            listen=listen,
            port=port,
        )
    return Watched(
        talk=talk,
        views=tuple(
            view.on_port(talk.port if pod is server else port or talk.port) for view, pod in views
        ),
        redirected=node.lane()["redirected_messages"] - before,
    )
