"""The demo's picture: a small SVG, written by hand so that nothing else is needed.

Left the latencies as bars from zero; right the bandwidths, which span three orders of
magnitude, as pairs of points on a logarithmic scale. Below each size the ratio.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from nearpath import VERSION
from nearpath.node.demo import BANDWIDTH, KERNEL, LATENCY, NEARPATH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nearpath.node.demo import Outcome, Series

_WIDTH, _HEIGHT = 1120, 560
_TOP, _BOTTOM = 120, 430  # of the plots
_PANELS = {LATENCY: (70, 540), BANDWIDTH: (640, 1100)}
# Told apart also without colours (grey against dark) and by the colour-blind.
_COLORS = {KERNEL: "#9aa5b1", NEARPATH: "#0b6e4f"}
_NAMES = {KERNEL: "kernel path", NEARPATH: "nearpath"}
_INK, _GREY, _FAINT, _LOSS = "#1f2933", "#616e7c", "#d9dee4", "#b42318"
_TITLES = {
    LATENCY: ("TCP latency, one way", "µs, lower is better"),
    BANDWIDTH: ("TCP bandwidth", "MB/s, higher is better, logarithmic scale"),
}


def size_name(size: int) -> str:
    """``64 B``, ``4 KiB``."""
    return f"{size // 1024} KiB" if size and size % 1024 == 0 else f"{size} B"


def number(value: float) -> str:
    """A value with three significant digits, without exponent."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{min(digits, 2)}f}"


class Canvas:
    """Collects SVG elements."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def add(self, tag: str, content: str = "", **attributes: float | str) -> None:
        """An element; underscores in names of attributes stand for hyphens."""
        shown = "".join(
            f' {name.replace("_", "-")}="{round(value, 1) if isinstance(value, float) else value}"'
            for name, value in attributes.items()
        )
        self.parts.append(f"<{tag}{shown}>{escape(content)}</{tag}>")

    def text(self, x: float, y: float, content: str, **style: float | str) -> None:
        """A line of text, with a white rim that keeps it legible on lines."""
        plain: dict[str, float | str] = {"font_size": 12, "text_anchor": "middle", "fill": _INK}
        rim: dict[str, float | str] = {
            "stroke": "#ffffff",
            "stroke_width": 3,
            "stroke_linejoin": "round",
        }
        self.add("text", content, x=x, y=y, paint_order="stroke", **{**plain, **rim, **style})

    def rect(self, x: float, y: float, color: str, *, width: float, height: float) -> None:
        """A filled rectangle."""
        self.add("rect", x=x, y=y, width=width, height=height, fill=color, rx=1.5)

    def line(self, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
        """A thin line."""
        (x1, y1), (x2, y2) = start, end
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=color)


def round_step(highest: float) -> float:
    """Distance of about five grid lines, 1, 2 or 5 times a power of ten."""
    rough = highest / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough)


def _frame(canvas: Canvas, test: str, series: Sequence[Series]) -> list[float]:
    """Title, sizes and ratios of a panel; the middle of each size's column."""
    left, right = _PANELS[test]
    title, unit = _TITLES[test]
    canvas.text(left, 82, title, font_size=17, text_anchor="start", font_weight=600)
    canvas.text(left, 101, unit, text_anchor="start", fill=_GREY)
    column = (right - left) / len(series)
    middles = [left + column * (index + 0.5) for index in range(len(series))]
    for middle, each in zip(middles, series, strict=True):
        canvas.text(middle, _BOTTOM + 20, size_name(each.size))
        color = {NEARPATH: _COLORS[NEARPATH], KERNEL: _LOSS}.get(each.winner, _INK)
        ratio = f"{each.ratio:.2f}"
        canvas.text(middle, _BOTTOM + 42, ratio, font_size=13, fill=color, font_weight=600)
    return middles


def _bars(canvas: Canvas, series: Sequence[Series]) -> None:
    left, right = _PANELS[LATENCY]
    highest = max(each.median(path) for each in series for path in _COLORS)
    step = round_step(highest)
    top = step * math.ceil(highest / step)
    scale = (_BOTTOM - _TOP) / top
    for tick in range(round(top / step) + 1):
        y = _BOTTOM - tick * step * scale
        canvas.line((left, y), (right, y), _FAINT)
        canvas.text(left - 8, y + 4, f"{tick * step:g}", text_anchor="end", fill=_GREY)
    width = (right - left) / len(series) * 0.38
    for middle, each in zip(_frame(canvas, LATENCY, series), series, strict=True):
        for path, x in ((KERNEL, middle - width - 1), (NEARPATH, middle + 1)):
            value = each.median(path)
            height = value * scale
            canvas.rect(x, _BOTTOM - height, _COLORS[path], width=width, height=height)
            canvas.text(x + width / 2, _BOTTOM - height - 5, number(value), font_size=10)


def _points(canvas: Canvas, series: Sequence[Series]) -> None:
    left, right = _PANELS[BANDWIDTH]
    values = [each.median(path) for each in series for path in _COLORS]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    scale = (_BOTTOM - _TOP) / (high - low)

    def height(value: float) -> float:
        return _BOTTOM - (math.log10(value) - low) * scale

    for power in range(low, high + 1):
        y = height(10.0**power)
        canvas.line((left, y), (right, y), _FAINT)
        canvas.text(left - 8, y + 4, f"{10.0**power:g}", text_anchor="end", fill=_GREY)
    for middle, each in zip(_frame(canvas, BANDWIDTH, series), series, strict=True):
        ends = {path: height(each.median(path)) for path in _COLORS}
        canvas.line((middle, ends[KERNEL]), (middle, ends[NEARPATH]), _GREY)
        for path, y in ends.items():
            canvas.add("circle", cx=middle, cy=y, r=5.5, fill=_COLORS[path])
        above, below = sorted(ends, key=lambda path: ends[path])
        canvas.text(middle, ends[above] - 11, number(each.median(above)), font_size=10)
        canvas.text(middle, ends[below] + 19, number(each.median(below)), font_size=10)


def svg(outcome: Outcome) -> str:
    """The picture of an outcome."""
    canvas = Canvas()
    canvas.rect(0, 0, "#ffffff", width=_WIDTH, height=_HEIGHT)
    title = "Two pods on one node: kernel path and nearpath"
    canvas.text(24, 38, title, font_size=22, text_anchor="start", font_weight=700)
    x = _WIDTH - 250
    for path, name in _NAMES.items():
        canvas.rect(x, 24, _COLORS[path], width=14, height=14)
        canvas.text(x + 20, 36, name, font_size=13, text_anchor="start")
        x += 120
    _bars(canvas, [each for each in outcome.series if each.test == LATENCY])
    _points(canvas, [each for each in outcome.series if each.test == BANDWIDTH])
    for test in _PANELS:
        canvas.text(_PANELS[test][0] - 8, _BOTTOM + 42, "ratio", text_anchor="end", fill=_GREY)
    conditions = outcome.conditions
    control = f"congestion control {conditions['congestion control']}"
    ratio = "ratio: nearpath / kernel path, red where nearpath loses"
    lines = (
        ("kernel " + conditions["kernel"], control, conditions["pinning"]),
        ("path: " + conditions["path"],),
        (f"qperf, {conditions['runs']}", f"nearpath {VERSION}", ratio),
    )
    for index, content in enumerate(map(" · ".join, lines)):
        canvas.text(24, 504 + 19 * index, content, text_anchor="start")
    body = "\n".join(canvas.parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="Inter, Helvetica, Arial, sans-serif">\n{body}\n</svg>\n'
    )
