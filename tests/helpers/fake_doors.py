"""Stand-in for the kernel in unit tests of the CNI commands.

This is a fake, and only the rules around it are tested with it: failing open, undo, the
order of steps, exit codes. That the real kernel does what it pretends to is the business of
tests/integration and tests/e2e.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nearpath.cni.doors import Doors
from nearpath.kernel.netns import NetnsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nearpath.place import Place

OWN_NETNS = "/proc/self/ns/net"


class FakeDoors(Doors):
    """Namespaces, a datapath and its registrations, all in memory.

    Attributes:
        namespaces: path to cookie; any other path does not exist.
        loaded: the datapath is loaded.
        guarded: its guards are attached.
        watchers: how many watchers of virtual machines were asked for.
        withdrawn: cookies of virtual machines' pods that were undone.
        room: what each prepare() was told of connections.
        pods: registered cookies.
        broken: method name to what to do instead of it (raise, sleep).
        calls: names of the methods called, in order.
        places: of all calls.
        before: called before every change with the method's name.
    """

    def __init__(self, namespaces: dict[str, int] | None = None, *, loaded: bool = True) -> None:
        self.namespaces = {"/run/netns/a": 1001} if namespaces is None else namespaces
        self.loaded = loaded
        self.guarded = True
        self.watchers = 0
        self.withdrawn: list[int] = []
        self.room: list[int] = []
        self.pods: set[int] = set()
        self.broken: dict[str, Callable[[], object]] = {}
        self.calls: list[str] = []
        self.places: set[Place | None] = set()
        self.before: Callable[[str], None] = lambda _: None

    def break_with(self, method: str, error: BaseException) -> None:
        """Let a method raise from now on."""

        def fail() -> None:
            raise error

        self.broken[method] = fail

    def _enter(self, method: str, place: Place | None = None) -> None:
        self.places |= {place} - {None}
        self.calls.append(method)
        self.before(method)
        if method in self.broken:
            self.broken[method]()

    def is_own_netns(self, path: str) -> bool:
        self._enter("is_own_netns")
        if path != OWN_NETNS and path not in self.namespaces:
            raise NetnsError(f"cannot open network namespace {path!r}: No such file or directory")
        return path == OWN_NETNS

    def inspect(self, path: str, ifname: str) -> tuple[int, int | None]:
        self._enter("inspect")
        if path == OWN_NETNS:
            return 1, None
        if path not in self.namespaces:
            raise NetnsError(f"cannot open network namespace {path!r}: No such file or directory")
        return self.namespaces[path], 7 if ifname == "eth0" else None

    def link_name(self, index: int) -> str | None:
        self._enter("link_name")
        return f"veth{index}"

    def is_loaded(self, place: Place) -> bool:
        self._enter("is_loaded", place)
        return self.loaded

    def is_guarded(self, place: Place) -> bool:
        self._enter("is_guarded", place)
        return self.guarded

    def prepare(self, place: Place, most_connections: int = 0) -> bool:
        self._enter("prepare", place)
        self.room.append(most_connections)
        before, self.loaded = self.loaded, True
        return not before

    def sweep(self, place: Place) -> None:
        self._enter("sweep", place)

    def register(self, place: Place, cookie: int) -> None:
        self._enter("register", place)
        self.pods.add(cookie)

    def unregister(self, place: Place, cookie: int) -> None:
        self._enter("unregister", place)
        self.pods.discard(cookie)

    def is_registered(self, place: Place, cookie: int) -> bool:
        self._enter("is_registered", place)
        return cookie in self.pods

    def registered(self, place: Place) -> list[int]:
        self._enter("registered", place)
        return sorted(self.pods)

    def watch(self, place: Place) -> bool:
        self._enter("watch", place)
        self.watchers += 1
        return self.watchers == 1

    def withdraw(self, place: Place, cookie: int, path: str) -> None:
        self._enter("withdraw", place)
        self.withdrawn.append(cookie)

    def sweep_taps(self, place: Place) -> None:
        self._enter("sweep_taps", place)
