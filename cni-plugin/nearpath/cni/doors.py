"""What the commands ask of the kernel, each imported when it is first used.

One small class, so that the commands' rules (fail open, undo, order of steps) can be
tested without root by putting another one in its place.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nearpath.place import Place


class Doors:
    """The real kernel."""

    def is_own_netns(self, path: str) -> bool:
        """True if ``path`` is the network namespace that the plugin itself runs in.

        Raises:
            NetnsError: it cannot be opened.
        """
        from nearpath.kernel import netns

        return netns.is_own(path)

    def inspect(self, path: str, ifname: str) -> tuple[int, int | None]:
        """Cookie of a network namespace, and the ifindex of the host end of its veth.

        Raises:
            NetnsError: it cannot be entered, or the kernel has no cookies.
        """
        from nearpath.kernel import links, netns

        with netns.entered(path):
            return netns.current_cookie(), links.veth_peer_index(ifname)

    def link_name(self, index: int) -> str | None:
        """Name of a link of the plugin's own namespace, or None."""
        from nearpath.kernel import links

        return links.name_of(index)

    def is_loaded(self, place: Place) -> bool:
        """True if the datapath is pinned."""
        from nearpath.datapath import loader

        return loader.is_loaded(place)

    def is_guarded(self, place: Place) -> bool:
        """True if the guards of the loaded datapath are attached."""
        from nearpath.datapath import loader

        return loader.is_guarded(place)

    def prepare(self, place: Place, most_connections: int = 0) -> bool:
        """Make sure that the datapath is loaded; True if this call loaded it.

        Args:
            most_connections: for the sizes of the maps that a load makes; 0: by memory.

        Raises:
            Unavailable, BpfError: it cannot be.
        """
        from nearpath.datapath import loader

        return not loader.is_loaded(place) and loader.ensure(place, most_connections)

    def register(self, place: Place, cookie: int) -> None:
        """Let the socket lane serve a network namespace."""
        from nearpath.lanes import socket

        socket.register(place, cookie)

    def unregister(self, place: Place, cookie: int) -> None:
        """The reverse; no datapath or no such entry is fine."""
        from nearpath.lanes import socket

        socket.unregister(place, cookie)

    def is_registered(self, place: Place, cookie: int) -> bool:
        """True if the socket lane serves this network namespace."""
        from nearpath.lanes import socket

        return socket.is_registered(place, cookie)

    def registered(self, place: Place) -> list[int]:
        """Cookies of all network namespaces that the datapath knows."""
        from nearpath.datapath import tables

        return list(tables.all_pods(place))

    def sweep(self, place: Place) -> None:
        """Remove the maps of earlier versions that no socket is in any more."""
        from nearpath.datapath import loader

        if loader.has_retired(place):
            from nearpath.datapath import unloader

            unloader.sweep_empty(place)

    def watch(self, place: Place) -> bool:
        """Make sure that a watcher of virtual machines runs; True if one was started.

        Raises:
            NearpathError: none can be started.
        """
        from nearpath.lanes import watch

        return watch.ensure(place)

    def withdraw(self, place: Place, cookie: int, path: str) -> None:
        """Undo all that was done in the namespace of a virtual machine's pod; lock held.

        Args:
            path: of the namespace, which may be gone.
        """
        from nearpath.lanes import vm

        vm.withdraw(place, cookie, path)

    def sweep_taps(self, place: Place) -> None:
        """Undo what is left in namespaces of virtual machines' pods that have no record.

        Raises:
            NearpathError: not everywhere.
        """
        from nearpath.lanes import vm

        for error in vm.sweep(place):
            raise error
