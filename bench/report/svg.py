"""Inline SVG: axes, lines, bars. Colours are CSS classes (s0 .. s27), so a page's dark mode and print style reach them.

Coordinates are in pixels of the view box. Lines differ by dash as well as by colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, floor, isfinite, log10

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 38
PATTERNS = ("", "9 5", "11 4 2 4", "2 3", "4 4", "10 3 2 3 2 3", "2 6", "18 5", "18 4 6 4")
DASHES = ("", *(PATTERNS[(index + 4 * (index // 9)) % 9] for index in range(27)))
"""Dash of each style. The colours s1 .. s9 come again from s10 and from s19 on (in report.css), every time with a dash of another kind."""
NAME_CHARACTER, SETTINGS_CHARACTER = 6.7, 5.5
"""Widths of a character of a label at 11.5 px and of the smaller lines below it at 9.5 px, in a wide font."""
MOST_NAME, MOST_SETTINGS = 40, 38
"""Characters of a line; what is longer loses its middle."""
SETTINGS_LINE = 11


@dataclass(frozen=True, slots=True)
class Curve:
    """A line: its values over 0, 1, 2, ... or over `xs`."""

    label: str
    ys: Sequence[float]
    style: int
    """Number of its colour and dash; 0 is the wide grey baseline."""
    xs: Sequence[float] | None = None
    group: str = ""
    """What a toggle hides it by."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of one or more segments (label, length, style); a segment of several carries its style's number."""

    label: str
    segments: tuple[tuple[str, float, int], ...]
    note: str = ""
    group: str = ""
    points: tuple[float, ...] = ()
    """Single trials, drawn as dots where there are several."""
    settings: str = ""
    """What tells it from bars of the same label, comma-separated: small lines below the label."""


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that span `low` to `high`.

    >>> nice_ticks(0, 9.3)
    [0.0, 2.5, 5.0, 7.5, 10.0]
    """
    span = (high - low) or abs(high) or 1.0
    raw = span / max(about - 1, 1)
    power = 10 ** floor(log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that span `low` to `high`, thinned to at most six."""
    first, last = floor(log10(low)), ceil(log10(high))
    last = max(last, first + 1)
    step = ceil((last - first) / 5)
    return [10.0**power for power in range(first, last + step, step)]


def tick_text(value: float, *, log: bool = False) -> str:
    """A tick's label; on a logarithmic axis as a power of ten below 0.01.

    >>> [tick_text(value) for value in (0.0, 2.5, 1500.0, 1e-06)]
    ['0', '2.5', '1.5k', '1e-6']
    """
    if value and abs(value) < (5e-3 if log else 1e-3):
        return f"{value:.0e}".replace("e-0", "e-")
    if abs(value) >= 1000:
        return f"{value / 1000:g}k" if abs(value) < 1e6 else f"{value / 1e6:g}M"
    return f"{value:g}"


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear or logarithmic map from values to pixels."""

    ticks: Sequence[float]
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of `value`."""
        low, high, place = self.ticks[0], self.ticks[-1], value
        if self.log:
            low, high, place = log10(low), log10(high), log10(max(value, self.ticks[0]))
        return self.start + (place - low) / (high - low) * (self.end - self.start)


def line_chart(
    curves: Sequence[Curve], *, title: str, x_label: str, y_label: str, log: bool = False, limits: Sequence[tuple[float, str]] = ()
) -> Markup:
    """Curves over one pair of axes; `limits` are labelled horizontal lines. Values that are not finite are left out."""
    xs = [x for curve in curves for x in _xs(curve)]
    ys = [y for curve in curves for y in curve.ys if isfinite(y)] + [value for value, _ in limits]
    horizontal = Axis(nice_ticks(min(xs), max(xs), 6), LEFT, WIDTH - RIGHT)
    vertical = Axis(log_ticks(min(ys), max(ys)) if log else nice_ticks(min(ys), max(ys)), HEIGHT - BOTTOM, TOP, log)
    body = [_grid(horizontal, vertical, x_label, y_label)]
    body += [_line(curve, horizontal, vertical) for curve in curves]
    for value, words in limits:
        y = vertical(value)
        body.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="limit-text" x="{WIDTH - RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(words)}</text>')
    return _svg(body, HEIGHT, title)


def _xs(curve: Curve) -> Sequence[float]:
    return curve.xs if curve.xs is not None else range(len(curve.ys))


def _line(curve: Curve, horizontal: Axis, vertical: Axis) -> str:
    points = [(horizontal(x), vertical(y)) for x, y in zip(_xs(curve), curve.ys, strict=False) if isfinite(y)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = DASHES[curve.style % len(DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    ends = "".join(
        f'<circle r="{3.4 if curve.style == 0 else 2.6}" cx="{x:.1f}" cy="{y:.1f}"/>'
        for x, y in (points if len(points) <= 8 else points[-1:])
    )
    last = curve.ys[-1] if curve.ys else float("nan")
    name = f"<title>{escape(curve.label)}: {curve.ys[0]:.4g} to {last:.4g}</title>"
    return f'<g class="curve s{curve.style}" data-strategy="{escape(curve.group)}">{name}<polyline points="{path}"{dashed}/>{ends}</g>'


def _grid(horizontal: Axis, vertical: Axis, x_label: str, y_label: str) -> str:
    lines = []
    for tick in vertical.ticks:
        y = vertical(tick)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick_text(tick, log=vertical.log)}</text>')
    below = f'y="{HEIGHT - BOTTOM + 15}" text-anchor="middle"'
    lines += [f'<text x="{horizontal(tick):.1f}" {below}>{tick_text(tick)}</text>' for tick in horizontal.ticks]
    lines.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    lines.append(f'<text class="axis" transform="translate(11 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    return f'<g class="grid">{"".join(lines)}</g>'


def bar_chart(bars: Sequence[Bar], *, title: str, unit: str) -> Markup:
    """Horizontal bars, stacked where a bar has several segments, each with its number."""
    bottom, label_width = 34, _label_width(bars)
    *tops, end = accumulate((_row(bar, 25) for bar in bars), initial=TOP)
    height = end + bottom
    longest = max(max(sum(length for _, length, _ in bar.segments), *bar.points, 0.0) for bar in bars)
    scale = Axis(nice_ticks(0, longest or 1, 5), label_width, WIDTH - 58)
    body = [_bar_grid(scale, height - bottom, unit, label_width)]
    body += [_bar(bar, scale, top + 4, label_width) for bar, top in zip(bars, tops, strict=True)]
    return _svg(body, height, title)


def shortened(text: str, most: int) -> str:
    """Text of at most `most` characters: what is too long loses its middle.

    >>> shortened("a_rather_long_strategy", 11), shortened("short", 11)
    ('a_rat…ategy', 'short')
    """
    kept = most - 1
    return text if len(text) <= most else f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def settings_lines(settings: str) -> list[str]:
    """Settings over as few lines as hold them, broken between settings only.

    >>> settings_lines("global_batch 32, tensor_parallel 1, pipeline_parallel 1")
    ['global_batch 32, tensor_parallel 1,', 'pipeline_parallel 1']
    """
    lines: list[str] = []
    for part in settings.split(", ") if settings else ():
        if lines and len(lines[-1]) + len(part) + 3 <= MOST_SETTINGS:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    short = [shortened(line, MOST_SETTINGS - 1) for line in lines]
    return [*(f"{line}," for line in short[:-1]), *short[-1:]]


def _row(item: Bar | Change, least: int) -> int:
    """Height of an item's row."""
    lines = len(settings_lines(item.settings))
    return least + (SETTINGS_LINE * lines - 2 if lines else 0)


def _whole(item: Bar | Change) -> str:
    return f"{item.label} {item.settings}".rstrip()


def _label_width(items: Sequence[Bar | Change]) -> int:
    """Room for the longest line of all labels."""
    names = [NAME_CHARACTER * min(len(item.label), MOST_NAME) for item in items]
    lines = [SETTINGS_CHARACTER * len(line) for item in items for line in settings_lines(item.settings)]
    return max(64, 14 + round(max(*names, *lines, 0.0)))


def _label(item: Bar | Change, label_width: int, y: float) -> str:
    """The name of a row, and smaller below it what tells it from its neighbours."""
    x = label_width - 7
    name = f'<text class="bar-label" x="{x}" y="{y:.1f}" text-anchor="end">{escape(shortened(item.label, MOST_NAME))}</text>'
    return name + "".join(
        f'<text class="bar-settings" x="{x}" y="{y + SETTINGS_LINE * number:.1f}" text-anchor="end">{escape(line)}</text>'
        for number, line in enumerate(settings_lines(item.settings), 1)
    )


def _bar(bar: Bar, scale: Axis, y: float, label_width: int) -> str:
    parts, at = [], 0.0
    for label, length, style in bar.segments:
        x, width = scale(at), scale(at + length) - scale(at)
        name = f"<title>{escape(_whole(bar))}, {escape(label)}: {length:.4g}</title>"
        parts.append(f'<rect class="s{style}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="17" rx="1.5">{name}</rect>')
        if len(bar.segments) > 1 and width >= 14:
            parts.append(f'<text class="segment" x="{x + width / 2:.1f}" y="{y + 12.5:.1f}" text-anchor="middle">{style}</text>')
        at += length
    if len(bar.points) > 1:
        parts += [f'<circle cx="{scale(point):.1f}" cy="{y + 8.5:.1f}" r="2.3"/>' for point in bar.points]
        at = max(at, *bar.points)
    total = f'<text class="bar-value" x="{scale(at) + 5:.1f}" y="{y + 12.5:.1f}">{escape(bar.note or f"{at:.3g}")}</text>'
    text = f"<title>{escape(_whole(bar))}</title>{_label(bar, label_width, y + 12.5)}"
    return f'<g class="bar" data-strategy="{escape(bar.group)}">{text}{"".join(parts)}{total}</g>'


@dataclass(frozen=True, slots=True)
class Change:
    """A value before and after."""

    label: str
    before: float
    after: float
    style: int
    group: str = ""
    settings: str = ""
    """What tells it from changes of the same label, comma-separated: small lines below the label."""


def change_chart(changes: Sequence[Change], *, title: str, unit: str) -> Markup:
    """Before (ring) and after (dot) on one line each."""
    bottom, label_width = 34, _label_width(changes)
    *tops, end = accumulate((_row(change, 22) for change in changes), initial=TOP)
    height = end + bottom
    values = [value for change in changes for value in (change.before, change.after)]
    scale = Axis(nice_ticks(min(values), max(values), 6), label_width + 8, WIDTH - 64)
    body = [_bar_grid(scale, height - bottom, unit, label_width)]
    body += [_change(change, scale, top + 11, label_width) for change, top in zip(changes, tops, strict=True)]
    return _svg(body, height, title)


def _change(change: Change, scale: Axis, y: float, label_width: int) -> str:
    first, last = scale(change.before), scale(change.after)
    name = f"<title>{escape(_whole(change))}: {change.before:.4g} before, {change.after:.4g} after</title>"
    line = f'<line x1="{first:.1f}" x2="{last:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    dots = f'<circle class="ring" cx="{first:.1f}" cy="{y:.1f}" r="4.2"/><circle cx="{last:.1f}" cy="{y:.1f}" r="4.6"/>'
    number = f'<text class="bar-value" x="{WIDTH - 4}" y="{y + 4:.1f}" text-anchor="end">{change.after:.4g}</text>'
    parts = f"{name}{_label(change, label_width, y + 4)}{line}{dots}{number}"
    return f'<g class="change s{change.style}" data-strategy="{escape(change.group)}">{parts}</g>'


def _bar_grid(scale: Axis, bottom: float, unit: str, label_width: int) -> str:
    body = ['<g class="grid">']
    for tick in scale.ticks:
        x = scale(tick)
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        body.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{tick_text(tick)}</text>')
    body.append(
        f'<text class="axis" x="{(label_width + WIDTH - 58) / 2:.0f}" y="{bottom + 31}" text-anchor="middle">{escape(unit)}</text></g>'
    )
    return "".join(body)


def _svg(body: Sequence[str], height: int, title: str) -> Markup:
    opening = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" preserveAspectRatio="xMidYMid meet">'
    return Markup(f"{opening}{''.join(body)}</svg>")  # noqa: S704 (every text in it is escaped above)
