"""Make the recorded pods known to the programs again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nearpath import state
from nearpath.datapath import loader
from nearpath.lanes import socket

if TYPE_CHECKING:
    from nearpath.place import Place


def recorded(place: Place) -> int:
    """Register each recorded attachment that wants the lane and whose namespace is unknown.

    The datapath must be loaded.

    Returns:
        How many were unknown.
    """
    known = socket.registered(place)
    wanted = state.lane_cookies(place, loader.is_guarded(place))
    unknown = [cookie for cookie in wanted if cookie not in known]
    for cookie in unknown:
        socket.register(place, cookie)
    return len(unknown)
