"""HTML and SVG by elements, everything escaped that is not an element, and charts made of them.

Charts are drawn by hand and not by matplotlib: they take their colors from the page, so that they are right in dark
mode and in print, scale with the screen, and need no further package. A series is told from others by its marker and
its dashes as well as by its color.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 68.0, 14.0, 14.0, 50.0
VOID = ("meta", "col")
MARKERS = ("circle", "square", "triangle", "diamond", "cross")


CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
"""Characters that HTML has no place for, and the signs that show them."""


class Markup(str):
    """Text that is HTML already."""


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element of HTML or SVG.

    Args:
        name: of the element.
        children: what it holds: ``Markup`` as it is, anything else as escaped text, None not at all.
        attributes: with ``_`` for ``-`` and a last ``_`` left out (``class_``); None leaves one out, True has no value.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(_text(value))}"')
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(
        child if isinstance(child, Markup) else html.escape(_text(child)) for child in children if child is not None
    )
    return Markup(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{inside}</{name}>")


def joined(parts: Iterable[Markup], between: str = "") -> Markup:
    """Several elements one after another."""
    return Markup(html.escape(between).join(parts))


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).translate(CONTROLS)


@dataclass(frozen=True)
class Series:
    """What one line, or one set of points, of a chart shows.

    Attributes:
        name: in the legend.
        points: (x, y).
        color: the class of the page that colors it.
        marker: one of MARKERS, or "" for none.
        line: joins the points: "" for no line, "straight", "steps" for one that keeps its height up to the next point.
        dashes: of the line, as SVG has them.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    marker: str = "circle"
    line: str = "straight"
    dashes: str | None = None


@dataclass(frozen=True)
class Axis:
    """What an axis measures, from where to where, and how its numbers are written."""

    title: str
    low: float
    high: float
    write: Callable[[float], str] = "{:g}".format
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, 0 at the low and 1 at the high end; what lies beyond is put on the end."""
        low, high, value = (
            math.log10(v) if self.logarithmic else v for v in (self.low, self.high, self._within(value))
        )
        return (value - low) / (high - low) if high > low else 0.5

    def _within(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    @property
    def ticks(self) -> list[float]:
        """Round numbers between both ends, about five."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            stride = max(1, -(-(last - first) // 5))
            return [10.0**power for power in range(first, last + 1, stride)]
        rough = (self.high - self.low) / 5
        if not rough > 0.0:
            return [self.low]
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:g} %"


def chart(label: str, x: Axis, y: Axis, series: Sequence[Series], caption: object = None) -> Markup:
    """A figure of lines and points with a legend.

    Args:
        label: what a screen reader says instead of the picture.
        x, y: the axes.
        series: what is drawn, the first lowest.
        caption: what stands below.
    """
    content = [_frame(x, y, [(tick, x.write(tick)) for tick in x.ticks])]
    for one in series:
        places = [(_x(x.place(first)), _y(y.place(second))) for first, second in one.points]
        content += [_line(places, one)] if one.line and len(places) > 1 else []
        for (first, second), (left, top) in zip(one.points, places, strict=True):
            if one.marker:
                told = f"{one.name}: {x.title} {x.write(first)}, {y.title} {y.write(second)}"
                content.append(_marker(one.marker, left, top, one.color, told))
    return _figure(label, content, [(one.name, _key(one)) for one in series], caption)


def bars(
    label: str,
    x: Axis,
    y: Axis,
    columns: Sequence[tuple[float, Sequence[float]]],
    parts: Sequence[tuple[str, str]],
    caption: object = None,
) -> Markup:
    """A figure of stacked bars with a legend.

    Args:
        label: what a screen reader says instead of the picture.
        x, y: the axes; x from half a bar before the first to half a bar behind the last.
        columns: where each bar stands, and the heights of its parts from below.
        parts: name and color of each part.
        caption: what stands below.
    """
    stride = max(1, -(-len(columns) // 12))
    content = [_frame(x, y, [(place, x.write(place)) for place, _ in columns[::stride]])]
    width = min(48.0, 0.8 * (WIDTH - LEFT - RIGHT) / max(1, len(columns)))
    for place, heights in columns:
        base = 0.0
        for (name, color), height in zip(parts, heights, strict=True):
            top, bottom = _y(y.place(base + height)), _y(y.place(base))
            title = element("title", f"{x.title} {x.write(place)}, {name}: {y.write(height)}")
            box = {"x": _x(x.place(place)) - width / 2, "y": top, "width": width, "height": bottom - top}
            content += [element("rect", title, class_=f"bar {color}", **box)] if height else []
            base += height
    keys = [(name, element("rect", x=3, y=3, width=14, height=10, class_=f"bar {color}")) for name, color in parts]
    return _figure(label, content, keys, caption)


def _x(place: float) -> float:
    return LEFT + place * (WIDTH - LEFT - RIGHT)


def _y(place: float) -> float:
    return HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM)


def _frame(x: Axis, y: Axis, x_ticks: Sequence[tuple[float, str]]) -> Markup:
    """Grid, numbers and titles of the axes."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in y.ticks:
        top = _y(y.place(tick))
        parts.append(element("line", x1=LEFT, x2=right, y1=top, y2=top, class_="grid"))
        parts.append(element("text", y.write(tick), x=LEFT - 7, y=top + 4.5, text_anchor="end"))
    for tick, written in x_ticks:
        left = _x(x.place(tick))
        parts.append(element("line", x1=left, x2=left, y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(element("text", written, x=left, y=bottom + 19, text_anchor="middle"))
    parts.append(element("path", d=f"M{LEFT} {TOP}V{bottom}H{right}", class_="axis"))
    parts.append(element("text", x.title, x=(LEFT + right) / 2, y=HEIGHT - 8, text_anchor="middle", class_="title"))
    middle = (TOP + bottom) / 2
    turned = {"transform": f"rotate(-90 14 {middle:g})", "text_anchor": "middle", "class_": "title"}
    parts.append(element("text", y.title, x=14, y=middle, **turned))
    return joined(parts)


def _line(places: Sequence[tuple[float, float]], series: Series) -> Markup:
    """A line through these places."""
    left, top = places[0]
    path = f"M{left:.1f} {top:.1f}"
    for left, top in places[1:]:
        path += f"H{left:.1f}V{top:.1f}" if series.line == "steps" else f"L{left:.1f} {top:.1f}"
    return element("path", d=path, class_=f"line {series.color}", stroke_dasharray=series.dashes)


def _marker(marker: str, x: float, y: float, color: str, title: str | None = None) -> Markup:
    paths = {
        "square": f"M{x - 5:.1f} {y - 5:.1f}h10v10h-10z",
        "triangle": f"M{x:.1f} {y - 7:.1f}l7 12h-14z",
        "diamond": f"M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z",
        "cross": f"M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10",
        "circle": f"M{x - 5:.1f} {y:.1f}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    }
    told = None if title is None else element("title", title)
    return element("path", told, d=paths[marker], class_=f"marker {color}")


def _key(series: Series) -> Markup:
    parts = [_line([(0.0, 8.0), (28.0, 8.0)], series)] if series.line else []
    parts += [_marker(series.marker, 14.0, 8.0, series.color)] if series.marker else []
    return joined(parts)


def _figure(label: str, content: Sequence[Markup], keys: Sequence[tuple[str, Markup]], caption: object) -> Markup:
    picture = element(
        "svg", *content, viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}", role="img", aria_label=label, class_="chart"
    )
    legend = [
        element("li", element("svg", key, viewBox="0 0 28 16", aria_hidden="true", class_="key"), " ", name)
        for name, key in keys
    ]
    below = element("figcaption", caption) if caption is not None else None
    return element("figure", picture, element("ul", *legend, class_="legend"), below)
