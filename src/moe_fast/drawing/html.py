"""Plans and reports as HTML, for notebooks and for the report of a build: no scripts, no network.

Text takes the colour of what surrounds it, so that light and dark pages both work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast.drawing.colours import MODEL_COLORS, ExpertOrigins, contrasting, model_color

__all__ = ["pairs_table", "plan_picture", "shares_picture", "table"]
# Pictures with more cells or shapes take a browser seconds to open.
MOST_CELLS = 1_000_000
MOST_SHAPES = 20_000
MOST_NUMBERED_CELLS = 600
WIDTH, HEIGHT = 480.0, 400.0
LARGEST_CELL = (36.0, 18.0)
ABOVE, LEFT, BELOW = 6, 44, 36
LONGEST_LIST = 8


def pairs_table(pairs: Mapping[str, Any]) -> str:
    """A table of names and values, one pair a row."""
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th>'
        f'<td style="text-align:left">{escape(text_of(value))}</td></tr>'
        for name, value in pairs.items()
    )
    return f"<table>{rows}</table>"


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()
) -> str:
    """A table of texts; the columns `numbers` are aligned to the right."""
    # Notebooks align every cell to the right that says nothing else.
    text, number = ' style="text-align:left"', ' class="number"'

    def line(tag: str, row: Sequence[str]) -> str:
        kinds = [number if column in numbers else text for column in range(len(row))]
        cells = [f"<{tag}{kind}>{escape(t)}</{tag}>" for kind, t in zip(kinds, row, strict=True)]
        return f"<tr>{''.join(cells)}</tr>"

    lines = [line("th", header), *(line("td", row) for row in rows)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def text_of(value: Any) -> str:
    """A value as people read it: thousands apart, floats rounded, long lists shortened."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if is_dataclass(value):
        pairs = ((each.name, getattr(value, each.name)) for each in fields(value))
        return "; ".join(f"{name.replace('_', ' ')}: {text_of(item)}" for name, item in pairs)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {text_of(item)}" for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        if value and (is_dataclass(value[0]) or isinstance(value[0], (tuple, list))):
            return f"{len(value):,} entries"
        more = ", … " if len(value) > LONGEST_LIST else ""
        total = f"({len(value):,} in all)" if more else ""
        return ", ".join(map(text_of, value[:LONGEST_LIST])) + more + total or "none"
    return str(value)


def plan_picture(plan: ExpertOrigins, labels: Sequence[str] | None = None) -> str:
    """Which source model gives each expert of each layer: an SVG drawing and a legend.

    A plan that is too large to draw gives a sentence that says so.
    """
    models = plan.source_model
    if not models.size:
        return "<p>No experts.</p>"
    if models.size > MOST_CELLS or len(runs := equal_runs(models)) > MOST_SHAPES:
        return f"<p>{models.size:,} experts: too many to draw.</p>"
    rows, columns = models.shape
    width = min(WIDTH / columns, LARGEST_CELL[0])
    height = min(HEIGHT / rows, LARGEST_CELL[1])
    colors = {int(model): model_color(int(model), plan.num_models) for model in np.unique(models)}
    shapes: dict[int, list[str]] = {}
    for layer, expert, length in runs:
        shape = rectangle(LEFT + expert * width, layer * height, width, length * height)
        shapes.setdefault(int(models[layer, expert]), []).append(shape)
    drawing = [
        f'<path d="{"".join(parts)}" fill="{colors[model]}" shape-rendering="crispEdges"/>'
        for model, parts in shapes.items()
    ]
    moved = np.argwhere(plan.source_layer != np.arange(rows)[:, np.newaxis])
    if 0 < len(moved) <= MOST_SHAPES:
        corners = "".join(
            f"M{LEFT + expert * width:.6g} {layer * height:.6g}h{width / 3:.6g}"
            f"l{-width / 3:.6g} {height / 2:.6g}z"
            for layer, expert in moved
        )
        drawing.append(f'<path d="{corners}" fill="#000"/>')
    if models.size <= MOST_NUMBERED_CELLS and width >= 14 and height >= 11:
        drawing += [
            f'<text x="{LEFT + (expert + 0.5) * width:.6g}" y="{(layer + 0.5) * height + 3.5:.6g}" '
            'font-size="10" text-anchor="middle" '
            f'fill="{contrasting(colors[int(model)])}">{model}</text>'
            for (layer, expert), model in np.ndenumerate(models)
        ]
    drawing += axes(rows, columns, width, height)
    size = (LEFT + columns * width + 8, rows * height + ABOVE + BELOW)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-ABOVE} {size[0]:.6g} {size[1]:.6g}" '
        f'width="{size[0]:.0f}" style="max-width:100%;height:auto;color:inherit" role="img" '
        'aria-label="Source model of each expert of each layer" font-family="sans-serif">'
        f"{''.join(drawing)}</svg>"
    )
    note = ""
    if len(moved):
        note = (
            f"<p>A black corner: one of {len(moved):,} experts whose weights come from another "
            "layer than their own.</p>"
        )
    return f"<div>{svg}</div>{legend(sorted(shapes), plan.num_models, labels)}{note}"


def shares_picture(sizes: Mapping[str, int]) -> str:
    """One bar of which each part takes its share, and a legend; the order is that of `sizes`."""
    total = sum(sizes.values())
    if not total:
        return ""
    bars, items, start = [], [], 0.0
    for place, (name, size) in enumerate(sizes.items()):
        color = MODEL_COLORS[place % len(MODEL_COLORS)]
        width = WIDTH * size / total
        bars.append(
            f'<rect x="{start:.6g}" width="{width:.6g}" height="28" fill="{color}">'
            f"<title>{escape(name)}: {100 * size / total:.1f} %</title></rect>"
        )
        items.append(legend_item(color, f"{name} {100 * size / total:.1f} %"))
        start += width
    return (
        f'<div><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.6g} 28" '
        f'width="{WIDTH:.0f}" style="max-width:100%;height:auto" role="img" '
        f'aria-label="Shares of the bytes">{"".join(bars)}</svg></div><div>{"".join(items)}</div>'
    )


def equal_runs(models: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """The first layer, expert and length of every run of layers in which an expert's model stays.

    Layers mostly repeat, so runs are far fewer than cells.
    """
    starts = np.ones(models.shape, bool)
    starts[1:] = models[1:] != models[:-1]
    first = np.flatnonzero(starts.T)
    lengths = np.diff(first, append=models.size)
    experts, layers = np.divmod(first, len(models))
    return list(zip(layers.tolist(), experts.tolist(), lengths.tolist(), strict=True))


def rectangle(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.6g} {y:.6g}h{width:.6g}v{height:.6g}h{-width:.6g}z"


def axes(rows: int, columns: int, width: float, height: float) -> Iterator[str]:
    """Numbers and names of both axes."""
    bottom = rows * height
    for layer in ticks(rows, height, 16):
        yield (
            f'<text x="{LEFT - 6}" y="{(layer + 0.5) * height + 4:.6g}" font-size="11" '
            f'text-anchor="end" fill="currentColor">{layer}</text>'
        )
    for expert in ticks(columns, width, 30):
        yield (
            f'<text x="{LEFT + (expert + 0.5) * width:.6g}" y="{bottom + 14:.6g}" font-size="11" '
            f'text-anchor="middle" fill="currentColor">{expert}</text>'
        )
    middle = LEFT + columns * width / 2
    yield (
        f'<text x="{middle:.6g}" y="{bottom + 30:.6g}" font-size="12" text-anchor="middle" '
        'fill="currentColor">expert</text>'
    )
    yield (
        f'<text transform="translate(12 {bottom / 2:.6g}) rotate(-90)" font-size="12" '
        'text-anchor="middle" fill="currentColor">layer</text>'
    )


def ticks(count: int, size: float, room: float) -> range:
    """Every 1st, 2nd, 5th, 10th, ... place, so that each has `room`."""
    step = 1
    for step in (m * 10**e for e in range(7) for m in (1, 2, 5)):
        if step * size >= room:
            break
    return range(0, count, step)


def legend(used: Sequence[int], num_models: int, labels: Sequence[str] | None) -> str:
    """The models in use, each with its colour; beyond a dozen, the first and the last."""
    listed = used if len(used) <= 12 else (used[0], used[-1])
    items = [
        legend_item(
            model_color(model, num_models),
            f"{model}: {labels[model]}" if labels else f"model {model}",
        )
        for model in listed
    ]
    return f"<div>{(' … ' if len(listed) < len(used) else '').join(items)}</div>"


def legend_item(color: str, text: str) -> str:
    return (
        '<span style="display:inline-block;margin-right:1.2em"><span style="display:inline-block;'
        f'width:.9em;height:.9em;vertical-align:-.1em;background:{color}"></span> '
        f"{escape(text)}</span>"
    )
