"""The picture of the tap lane's bench: ratios to the unmodified bridge, as an SVG.

Above the round trips, below the streams. A mark per mode and message size: filled with
checksums skipped, hollow with checksums by software; the bar is the 95 % confidence interval.
On white, whatever is around it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bench.report import number, size_text
from bench.tap_plan import (
    BASELINE,
    FROM_VM,
    LATENCY,
    MIRROR,
    PEER,
    REDIRECT,
    SUPER_FROM_VM,
    SUPER_TO_VM,
    TO_VM,
    UNITS,
    Arm,
)
from nearpath.lanes.checksum import SKIP, SOFTWARE
from nearpath.node.demo_picture import Canvas

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.tap_report import TapSeries

_WIDTH, _HEIGHT = 1120, 800
_INK, _GREY, _FAINT = "#1f2933", "#616e7c", "#d9dee4"
# Told apart also without colours: by shape, and by their order from left to right.
_COLORS = {MIRROR: "#0b6e4f", REDIRECT: "#2b6cb0", PEER: "#b7541a"}
_STEP = 0.05
_BEYOND = 0.08


class _Panel:
    """One plot: a column per message size, ratios upwards."""

    def __init__(self, canvas: Canvas, corner: tuple[float, float], width: float) -> None:
        self._canvas = canvas
        self._left, self._top = corner
        self._right = self._left + width
        self._bottom = self._top + 190
        self._low = self._high = 1.0

    def draw(self, title: str, group: Sequence[TapSeries]) -> None:
        """All of it; ``group`` is not empty."""
        canvas = self._canvas
        better = "lower is better" if group[0].less_is_better else "higher is better"
        canvas.text(
            self._left,
            self._top - 30,
            title,
            font_size=17,
            text_anchor="start",
            font_weight=600,
        )
        note = f"ratio to the unmodified bridge, {better}"
        canvas.text(self._left, self._top - 12, note, text_anchor="start", fill=_GREY)
        self._scale(group)
        column = (self._right - self._left) / len(group)
        for index, each in enumerate(group):
            self._column(self._left + column * (index + 0.5), min(column, 140.0), each)
        for at, text in ((20, "message"), (40, "bridge")):
            canvas.text(self._left - 12, self._bottom + at, text, text_anchor="end", fill=_GREY)

    def _y(self, ratio: float) -> float:
        share = (ratio - self._low) / (self._high - self._low)
        return self._bottom - min(max(share, 0), 1) * (self._bottom - self._top)

    def _scale(self, group: Sequence[TapSeries]) -> None:
        """Choose the axis, and draw it with the targets."""
        targets = {
            mode: target
            for each in group
            for mode in _COLORS
            if (target := each.point.target(Arm(mode, SKIP))) is not None
        }
        shown = [(each, arm.name) for each in group for arm in _arms(each)]
        marks = [1.0, *targets.values(), *(each.ratio(name) for each, name in shown)]
        ends = [end for each, name in shown for end in each.interval(name)]
        # What is more uncertain than that leaves the plot, so that the marks remain apart.
        ends = [min(max(end, min(marks) - _BEYOND), max(marks) + _BEYOND) for end in ends]
        ends += marks
        self._low = math.floor(min(ends) / _STEP) * _STEP
        self._high = max(math.ceil(max(ends) / _STEP) * _STEP, self._low + _STEP)
        step = _STEP * math.ceil((self._high - self._low) / _STEP / 8)
        for tick in range(math.floor((self._high - self._low) / step + 0.001) + 1):
            ratio = self._low + tick * step
            y = self._y(ratio)
            self._canvas.line((self._left, y), (self._right, y), _FAINT)
            label = f"{ratio:.2f}"
            self._canvas.text(self._left - 12, y + 4, label, text_anchor="end", fill=_GREY)
        self._canvas.line((self._left, self._y(1)), (self._right, self._y(1)), _INK)
        shared = len(set(targets.values())) == 1
        for mode, target in list(targets.items())[: 1 if shared else None]:
            self._canvas.add(
                "line",
                x1=self._left,
                x2=self._right,
                y1=self._y(target),
                y2=self._y(target),
                stroke=_INK if shared else _COLORS[mode],
                stroke_dasharray="6 4",
            )
            whose = "" if shared else f"{mode} "
            self._canvas.text(
                self._right + 4,
                self._y(target) + 4,
                f"{whose}{target:.2f}",
                font_size=11,
                text_anchor="start",
                fill=_INK if shared else _COLORS[mode],
            )

    def _column(self, middle: float, width: float, each: TapSeries) -> None:
        canvas = self._canvas
        canvas.text(middle, self._bottom + 20, _label(each))
        unit = UNITS[each.point.test]
        value = f"{number(each.median(BASELINE.name))} {unit}"
        canvas.text(middle, self._bottom + 40, value, fill=_GREY)
        arms = _arms(each)
        step = width / (len(arms) + 1)
        for place, arm in enumerate(arms):
            x = middle + (place - (len(arms) - 1) / 2) * step
            worse, better = each.interval(arm.name)
            color = _COLORS[arm.mode]
            canvas.line((x, self._y(worse)), (x, self._y(better)), color)
            mark(canvas, arm, x, self._y(each.ratio(arm.name)))
        if _is_super(each) and (cut := f"{MIRROR}, {SOFTWARE}") in each.values:
            text = f"by software {each.ratio(cut):.2f}"
            canvas.text(middle, self._bottom - 8, text, font_size=11, fill=_COLORS[MIRROR])


def mark(canvas: Canvas, arm: Arm, x: float, y: float) -> None:
    """Circle, square or diamond; hollow with checksums by software."""
    color = _COLORS[arm.mode]
    fill = "#ffffff" if arm.checksum == SOFTWARE else color
    style: dict[str, Any] = {"fill": fill, "stroke": color, "stroke_width": 1.8}
    if arm.mode == MIRROR:
        canvas.add("circle", cx=x, cy=y, r=4.6, **style)
    elif arm.mode == REDIRECT:
        canvas.add("rect", x=x - 4.2, y=y - 4.2, width=8.4, height=8.4, **style)
    else:
        points = f"{x:.1f},{y - 6:.1f} {x + 6:.1f},{y:.1f} {x:.1f},{y + 6:.1f} {x - 6:.1f},{y:.1f}"
        canvas.add("polygon", points=points, **style)


def _is_super(each: TapSeries) -> bool:
    return each.point.test in {SUPER_TO_VM, SUPER_FROM_VM}


def _label(each: TapSeries) -> str:
    return "57.5 KiB, GSO" if _is_super(each) else size_text(each.point.size)


def _arms(each: TapSeries) -> list[Arm]:
    """That get a mark; super packets that are cut by software are far off any scale."""
    sums = (SKIP,) if _is_super(each) else (SKIP, SOFTWARE)
    arms = [Arm(mode, checksum) for checksum in sums for mode in _COLORS]
    return [arm for arm in arms if arm.name in each.values]


def _legend(canvas: Canvas) -> None:
    x = 640.0
    for mode in _COLORS:
        mark(canvas, Arm(mode, SKIP), x, 32)
        canvas.text(x + 12, 36, mode, font_size=13, text_anchor="start")
        x += 90
    mark(canvas, Arm(MIRROR, SOFTWARE), x, 32)
    mark(canvas, Arm(REDIRECT, SOFTWARE), x + 14, 32)
    canvas.text(x + 26, 36, "checksums by software", font_size=13, text_anchor="start")


def svg(series: Sequence[TapSeries], conditions: Mapping[str, str]) -> str:
    """The picture; panels without figures stay away."""
    canvas = Canvas()
    canvas.add("rect", x=0, y=0, width=_WIDTH, height=_HEIGHT, fill="#ffffff", rx=8)
    title = "Tap lane against the bridge in a VM's pod"
    canvas.text(24, 38, title, font_size=22, text_anchor="start", font_weight=700)
    _legend(canvas)
    panels = (
        ("Round trip, UDP", (LATENCY,), (90.0, 130.0), 950.0),
        ("Stream to the VM, UDP", (TO_VM, SUPER_TO_VM), (90.0, 460.0), 410.0),
        ("Stream from the VM, UDP", (FROM_VM, SUPER_FROM_VM), (630.0, 460.0), 410.0),
    )
    for heading, tests, corner, width in panels:
        group = [each for each in series if each.point.test in tests and each.point.netfilter]
        if group:
            _Panel(canvas, corner, width).draw(heading, group)
    lines = (
        (f"kernel {conditions['kernel']}", conditions["machine"], conditions["pinning"]),
        (conditions["path"],),
        (conditions["runs"], f"nearpath {conditions['nearpath']}", "bars: 95 % confidence"),
    )
    for index, content in enumerate(map(" · ".join, lines)):
        canvas.text(24, _HEIGHT - 58 + 19 * index, content, text_anchor="start")
    body = "\n".join(canvas.parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="Inter, Helvetica, Arial, sans-serif">\n{body}\n</svg>\n'
    )
