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
    count = 0
    guarded = loader.is_guarded(place)
    for record in state.records(place):
        cookie = state.cookie_of(record)
        wanted = state.wants_lane(record) and (guarded or state.may_go_unguarded(record))
        if cookie and wanted and not socket.is_registered(place, cookie):
            socket.register(place, cookie)
            count += 1
    return count
