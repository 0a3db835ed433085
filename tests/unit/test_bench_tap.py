"""The pure parts of the tap lane's bench: what is measured, and what is made of it."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from bench import tap_lab, tap_picture, tap_plan, tap_report, tap_text
from bench.bench_tap import chosen
from bench.tap_plan import (
    ARMS,
    BASELINE,
    BRIDGE,
    FROM_VM,
    LATENCY,
    MIRROR,
    PEER,
    REDIRECT,
    SUPER_TO_VM,
    TO_VM,
    Arm,
    Point,
)
from bench.tap_report import TapSeries
from nearpath.errors import NearpathError
from nearpath.lanes.checksum import KEEP, SKIP, SOFTWARE

if TYPE_CHECKING:
    from pathlib import Path

CONDITIONS = {
    key: f"the {key}" for key in ("kernel", "machine", "pinning", "path", "runs", "nearpath")
}


def series(
    test: str = LATENCY, size: int = 64, *, netfilter: bool = True, **ratios: float
) -> TapSeries:
    """Three rounds in which the bridge has 10 and modes with skip have their ratio of that."""
    made = TapSeries(Point(test, size, 3, netfilter))
    for noise in (0.99, 1.0, 1.01):
        for arm in made.point.arms:
            ratio = ratios.get(arm.mode, 1.0) if arm.checksum != SOFTWARE else 1.0
            made.add(arm, 10 * noise * ratio, 20.0)
    return made


# -- what is measured ------------------------------------------------------------------------


def test_the_arms() -> None:
    """Each mode with each checksum mode, but for the one that nearpath refuses."""
    assert Arm(BRIDGE, KEEP) == BASELINE
    assert BASELINE in ARMS
    assert len(set(ARMS)) == 11
    assert Arm(PEER, SOFTWARE) not in ARMS
    assert Point(LATENCY, 1, 1, netfilter=False).arms == (
        BASELINE,
        *(Arm(mode, SKIP) for mode in (BRIDGE, MIRROR, REDIRECT, PEER)),
    )


def test_the_targets() -> None:
    trip, stream, whole = Point(LATENCY, 1, 1), Point(TO_VM, 64, 1), Point(SUPER_TO_VM, 1, 1)
    assert [trip.target(Arm(mode, SKIP)) for mode in (BRIDGE, MIRROR, REDIRECT, PEER)] == [
        *(None, 0.92, None, 0.83),
    ]
    assert [stream.target(Arm(mode, SKIP)) for mode in (BRIDGE, MIRROR, REDIRECT, PEER)] == [
        *(None, 1.2, 1.2, 1.2),
    ]
    for point in (trip, stream, whole):
        assert all(point.target(arm) is None for arm in ARMS if arm.checksum != SKIP)
        assert whole.target(Arm(PEER, SKIP)) is None
    plain = Point(LATENCY, 1, 1, netfilter=False)
    assert all(plain.target(arm) is None for arm in ARMS)


@pytest.mark.parametrize(
    ("size", "frames"), [(1, 1), (1472, 1), (1473, 2), (4096, 3), (16 * 1024, 12)]
)
def test_frames_of_a_message(size: int, frames: int) -> None:
    """The MTU of 1,500 holds 1,472 bytes with headers; fragments have 1,480 each."""
    assert Point(TO_VM, size, 1).frames == frames


def test_what_is_under_way_fits_the_taps_queue() -> None:
    """Which has room for 500 frames; what is lost ends the bench."""
    for point in tap_plan.points(quick=False):
        assert 1 <= point.window <= 64
        assert point.window * point.frames <= 400


def test_the_time_that_it_takes() -> None:
    assert 4 < sum(each.seconds for each in tap_plan.points(quick=False)) / 60 < 8
    assert sum(each.seconds for each in tap_plan.points(quick=True)) / 60 < 1.2


def test_all_sizes_of_the_targets_are_measured() -> None:
    sizes = {point.size for point in tap_plan.points(quick=False) if point.test == LATENCY}
    assert {1, 16 * 1024} <= sizes
    assert {point.rounds for point in tap_plan.points(quick=True, rounds=7)} == {7}


@pytest.mark.parametrize(
    ("words", "tests"),
    [
        (["round"], {LATENCY}),
        (["stream"], {TO_VM, FROM_VM}),
        (["to the VM"], {TO_VM, SUPER_TO_VM}),
        (["nothing"], set()),
        ([], set(tap_plan.TESTS)),
    ],
)
def test_only(words: list[str], tests: set[str]) -> None:
    assert {point.test for point in chosen(tap_plan.points(quick=False), words)} == tests


# -- figures ---------------------------------------------------------------------------------


def test_what_the_generator_prints() -> None:
    printed = {"count": 64_000, "seconds": 0.5, "p50_us": 7.0, "p99_us": 30.0, "max_us": 90.0}
    trip = tap_lab.interpret(Point(LATENCY, 64, 1), printed, 0.1)
    assert trip == tap_lab.Reading(7.0, 30.0, 64_000, 0.1)
    stream = tap_lab.interpret(Point(TO_VM, 64, 1), printed, 0.0)
    assert stream.value == pytest.approx(0.128)
    assert stream.messages == 1000
    with pytest.raises(NearpathError, match="measured nothing"):
        tap_lab.interpret(Point(LATENCY, 64, 1), {**printed, "count": 0}, 0.0)


def test_verdicts() -> None:
    """Per arm; the round trip of redirect has no target."""
    made = series(mirror=0.9, redirect=2.0, peer=0.9)
    verdicts = {arm.mode: made.verdict(arm.name) for arm in ARMS if arm.checksum == SKIP}
    assert verdicts == {BRIDGE: "", MIRROR: "met", REDIRECT: "", PEER: "not met"}
    made.values[f"{MIRROR}, {SKIP}"] = [9.0, 9.1, 9.9]
    assert made.verdict(f"{MIRROR}, {SKIP}") == "met?"
    assert series(TO_VM, mirror=1.3).verdict(f"{MIRROR}, {SKIP}") == "met"


def test_tables() -> None:
    made = [
        series(mirror=0.9, redirect=0.88, peer=0.8),
        series(TO_VM, 1024, mirror=1.1, redirect=1.2, peer=1.3),
        series(mirror=0.97, netfilter=False),
    ]
    trips, stream, tails, plain = tap_report.tables(made)
    assert trips.title == "Round trip: µs, lower is better"
    keep = trips.rows[0]
    assert keep[:5] == ("64 B", KEEP, "10.0", "", "")
    assert keep[5:9] == ("9.00", "0.90", "0.90", "")
    skip = trips.rows[1]
    assert skip[5:9] == ("9.00", "0.90", "0.90", "≤ 0.92 met")
    assert skip[9:12] == ("8.80", "0.88", "0.88")
    assert skip[12:] == ("8.00", "0.80", "0.80", "≤ 0.83 met")
    software = trips.rows[2]
    assert software[:4] == ("64 B", SOFTWARE, "10.0", "1.00")
    assert software[-4:] == ("", "", "", "")
    assert stream.rows[1][8] == "≥ 1.20 not met"
    assert tails.rows[0] == ("64 B", KEEP, "20.0", "20.0", "20.0", "20.0")
    assert plain.rows[0][:6] == (LATENCY, "64 B", "µs", "10.0", "9.70", "0.97")
    for table in (trips, stream, tails, plain):
        assert {len(row) for row in table.rows} == {len(table.heads)}


def test_the_summary_names_the_worst() -> None:
    made = [series(size=1, mirror=0.9, peer=0.8), series(size=1024, mirror=0.95, peer=0.8)]
    rows = [row for row in tap_report.summary(made).rows if row[1] == f"{MIRROR}, {SKIP}"]
    assert rows == [
        (LATENCY, "mirror, skip", "≤ 0.92", "1 of 2", "0", "0.93", "0.95", "1 KiB"),
    ]


def test_the_json_has_every_arm() -> None:
    found = series(mirror=0.9).as_json()
    assert len(found["arms"]) == len(ARMS)
    assert found["arms"]["mirror, skip"]["ratio"] == pytest.approx(0.9)
    assert found["arms"]["mirror, skip"]["target"] == 0.92


# -- the page --------------------------------------------------------------------------------


def test_the_page_admits_where_the_lane_loses() -> None:
    made = [
        series(mirror=0.9, redirect=1.1, peer=0.9),
        series(size=1024, mirror=0.9, redirect=0.9, peer=0.8),
        series(mirror=1.2, netfilter=False),
    ]
    page = tap_text.markdown(made, CONDITIONS, "picture.svg")
    assert "![Ratios to the unmodified bridge](picture.svg)" in page
    assert tap_text.losses(made) == [
        "Target ≤ 0.83 missed: round trip, peer, skip: 0.90 at 64 B.",
        "Slower than the unmodified bridge: round trip, redirect, skip: 1.10 at 64 B.",
        (
            "Slower than the unmodified bridge: round trip without netfilter, mirror, skip: "
            "1.20 at 64 B."
        ),
    ]
    assert all(f"- {line}\n" in page for line in tap_text.losses(made))


def test_the_page_says_so_where_it_does_not_lose() -> None:
    made = [series(mirror=0.9, redirect=0.9, peer=0.8)]
    assert tap_text.losses(made) == []
    assert "- Nowhere beyond the noise." in tap_text.markdown(made, CONDITIONS, "")
    (trip,) = tap_text.findings(made)
    assert "mirror 0.90, redirect 0.90, peer 0.80 times the bridge's time" in trip


def test_the_picture() -> None:
    """Well-formed, everything inside, a mark for each arm that is shown, and on white."""
    made = [
        *(series(size=size, mirror=0.9, redirect=0.88, peer=0.8) for size in (1, 1024)),
        series(FROM_VM, 1024, mirror=1.1, redirect=1.2, peer=1.3),
        series(SUPER_TO_VM, tap_plan.SUPER),
        series(netfilter=False),
    ]
    root = ET.fromstring(tap_picture.svg(made, CONDITIONS))  # noqa: S314 - our own
    space = "{http://www.w3.org/2000/svg}"
    assert root[0].get("fill") == "#ffffff"
    # In the legend mirror and redirect also hollow.
    assert len(root.findall(f"{space}circle")) == 2 + 2 * 3 + 1
    assert len(root.findall(f"{space}polygon")) == 1 + 4
    texts = [element.text for element in root.iter(f"{space}text")]
    assert "Stream to the VM, UDP" in texts
    assert "mirror 0.92" in texts
    assert "by software 1.00" in texts  # of super packets
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for element in root.iter(f"{space}text"):
        assert 0 <= float(element.get("x", -1)) <= width - 10
        assert 0 <= float(element.get("y", -1)) <= height


# -- the guest -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checksum functions of tap.c as a program: hexadecimal bytes in, folded sum out."""
    directory = tmp_path_factory.mktemp("tap")
    wrapper = directory / "sums.c"
    wrapper.write_text(
        f"""
#define main tap_main
#include "{tap_lab.SOURCE}"
#undef main
int main(int argc, char **argv)
{{
	uint8_t bytes[4096];
	size_t size = 0;

	for (unsigned int byte; argc == 2 && sscanf(argv[1] + 2 * size, "%2x", &byte) == 1; size++)
		bytes[size] = byte;
	printf("%u\\n", ntohs(fold(sum(bytes, size, 0))));
}}
""",
        encoding="utf-8",
    )
    program = directory / "sums"
    compiler = shutil.which("cc") or shutil.which("clang")
    assert compiler, "no C compiler: make setup"
    subprocess.run([compiler, "-o", program, wrapper], check=True, timeout=60)
    return program


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 20, 1471])
def test_the_guests_checksums(sums: Path, size: int) -> None:
    """As RFC 1071 has them, also of an odd number of bytes."""
    data = bytes((7 * index + 250) % 256 for index in range(size))
    padded = data + bytes(size % 2)
    total = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    shown = subprocess.run([sums, data.hex()], capture_output=True, check=True, timeout=60)
    assert int(shown.stdout) == total


def test_the_guests_address_is_the_launchers() -> None:
    assert socket.inet_aton(tap_lab.GUEST)
