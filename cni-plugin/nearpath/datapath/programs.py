"""Build, attach and replace the programs; pins are as loader.py describes, its lock is held."""

from __future__ import annotations

import os
from errno import EPERM
from typing import TYPE_CHECKING

from nearpath import state
from nearpath.datapath import bundle, calibration, changes, libbpf, settings, sizes
from nearpath.datapath.loader import GUARD_LINK, LINK
from nearpath.datapath.maps import Descriptor
from nearpath.datapath.unloader import remove_pins
from nearpath.errors import BpfError
from nearpath.kernel import features

if TYPE_CHECKING:
    from nearpath.place import Place

_OBJECT = "socket_lane"
_GUARDS = "guards"
_COUNTING = "nearpath_delivered"  # the guard that counts redirects that have arrived
_SOCKOPS = "nearpath_sockops"
_MESSAGE = "nearpath_message"


def build(place: Place, most_connections: int) -> None:
    """Create maps and programs under loading/ and rename it to the layout's directory."""
    staging = f"{place.pin_dir}/loading"
    remove_pins(staging)
    os.mkdir(staging, 0o700)
    with libbpf.Object(bundle.object_path(_OBJECT)) as built:
        built.pin_maps_under(staging)
        built.set_sizes(sizes.of_maps(most_connections or sizes.most_connections()))
        built.load()
        programs, maps = built.programs(), built.maps()
        # Before any socket can join: a socket keeps the program that its map had then.
        libbpf.attach_to_map(programs[_MESSAGE], maps["sockets"])
        for name, program in programs.items():
            program.pin(f"{staging}/prog_{name}")
    _note_digest(place)
    os.rename(staging, place.layout_dir)


def attach(place: Place, cgroup: str) -> None:
    """Attach the sock_ops program to the cgroup: from here on sockets join."""
    with Descriptor.open_pinned(f"{place.layout_dir}/prog_{_SOCKOPS}") as program:
        try:
            link = libbpf.attach_to_cgroup(program, cgroup)
        except BpfError as error:
            if error.errno == EPERM:
                error.remedy = (
                    "another program is attached to this cgroup exclusively (without "
                    "BPF_F_ALLOW_MULTI): see bpftool cgroup tree"
                )
            raise
        with link:
            link.pin(f"{place.layout_dir}/{LINK}")


def attach_guards(place: Place) -> bool:
    """Attach bpf/guards.bpf.c if the kernel lets us; in the place of those there are.

    Why not is kept in the guards file, for status and doctor. The lane can do without guards
    for pods that accept that, so a refusal is no error here.

    Returns:
        True if they are attached.
    """
    problem = ""
    for left_out in (frozenset[str](), libbpf.YOUNG):
        try:
            _attach_guards(place, left_out)
        except BpfError as error:
            problem = problem or error.message
        else:
            state.write_file(place.guards_file, b"")
            return True
    state.write_file(place.guards_file, problem.encode())
    return False


def _attach_guards(place: Place, left_out: frozenset[str]) -> None:
    with libbpf.Object(bundle.object_path(_GUARDS)) as built:
        built.pin_maps_under(place.layout_dir)
        built.set_sizes(sizes.of_pinned(place))
        built.leave_out(left_out)
        built.load()
        # The old one goes first: with both, each arrival would be counted twice, and a redirect
        # still on its way taken for one that has arrived. What nobody counts in between only
        # leaves the question open (redirect_in_flight(), bpf/socket_lane.bpf.c).
        try:
            os.unlink(f"{place.layout_dir}/link_{_COUNTING}")
        except FileNotFoundError:
            pass
        programs = built.programs()
        # And the new one comes last: the kernel takes a moment to let go of the old one.
        names = sorted(programs, key=lambda name: name == _COUNTING)
        links = [(name, libbpf.attach_tracing(programs[name])) for name in names]
        try:
            for name, link in links:
                _pin_over(link, f"{place.layout_dir}/link_{name}", place)
            # One that says that all are there. Not the counting one, which must go by one pin.
            _pin_over(links[0][1], f"{place.layout_dir}/{GUARD_LINK}", place)
        finally:
            for _, link in links:
                link.close()


def replace(place: Place) -> bool:
    """Put our programs in the place of others of the same layout.

    Returns:
        False if ours are there already.
    """
    if _noted_digest(place) == _digest():
        return False
    with libbpf.Object(bundle.object_path(_OBJECT)) as built:
        built.pin_maps_under(place.layout_dir)
        built.set_sizes(sizes.of_pinned(place))
        built.load()
        programs, maps = built.programs(), built.maps()
        libbpf.attach_to_map(programs[_MESSAGE], maps["sockets"])
        with Descriptor.open_pinned(f"{place.layout_dir}/{LINK}") as link:
            libbpf.update_link(link, programs[_SOCKOPS])
        for name, program in programs.items():
            _pin_over(program, f"{place.layout_dir}/prog_{name}", place)
    attach_guards(place)
    _note_digest(place)
    return True


def _pin_over(descriptor: Descriptor, path: str, place: Place) -> None:
    """Pin at ``path``, in the place of what is pinned there."""
    # No dot in the name: bpffs keeps those for itself (bpf_lookup, kernel/bpf/inode.c).
    fresh = f"{place.layout_dir}/new_pin"
    try:
        os.unlink(fresh)
    except FileNotFoundError:
        pass
    descriptor.pin(fresh)
    os.rename(fresh, path)


def set_defaults(place: Place, guarded: bool) -> None:
    """Settings of a datapath that is being loaded."""
    chosen = dict(settings.DEFAULTS)
    chosen.update(calibration.thresholds(place))
    # Nobody watches the first messages without guards, so they need not take the long way.
    if not guarded:
        chosen.update(guards=0, probation=0)
    chosen["mptcp_fallback"] = int(features.mptcp_children_are_safe(features.version()))
    chosen.update(changes.read(place))
    settings.write(place, **chosen)


def _digest() -> str:
    """Digest of our BPF objects, to tell other programs of the same layout from ours."""
    from _blake2 import blake2b

    digest = blake2b()
    for name in (_OBJECT, _GUARDS):
        with open(bundle.object_path(name), "rb") as content:
            digest.update(content.read())
    return digest.hexdigest()[:32]


def _note_digest(place: Place) -> None:
    state.write_file(place.digest_file, _digest().encode())


def _noted_digest(place: Place) -> str:
    return (state.read_file(place.digest_file) or b"").decode("ascii", "replace")
