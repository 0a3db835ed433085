"""Make the recorded pods known to the programs again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nearpath import state
from nearpath.lanes import socket
from nearpath.node.status import lane_state

if TYPE_CHECKING:
    from nearpath.place import Place


def recorded(place: Place) -> int:
    """Register each recorded attachment whose lane is on and whose namespace is unknown.

    The datapath must be loaded.

    Returns:
        How many were unknown.
    """
    count = 0
    for record in state.records(place):
        cookie = record.get("netns_cookie")
        wanted = lane_state(record, "", registered=True)[0] == "on"
        if not wanted or not isinstance(cookie, int) or cookie <= 0:
            continue
        if not socket.is_registered(place, cookie):
            socket.register(place, cookie)
            count += 1
    return count


def left_behind(place: Place) -> int:
    """How many attachments were made while the datapath was unloaded by an operator.

    They stay as they are: a record changes in ADD and DEL alone, so that neither has to
    expect another writer.
    """
    lanes = (lane_state(record, "", registered=True) for record in state.records(place))
    return sum(lane == ("off", "unloaded-by-operator") for lane in lanes)
