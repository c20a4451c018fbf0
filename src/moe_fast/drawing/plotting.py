"""Pictures of plans, loads and routers, drawn by matplotlib: `pip install 'moe-fast[plot]'`.

Every function draws into the axes it is given, or into new ones, and returns them. Colours keep
their order in grey print and for colour-blind readers, and small grids carry their numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from moe_fast.checks import as_index, as_path
from moe_fast.drawing.colours import MODEL_COLORS, SCALE, ExpertOrigins
from moe_fast.errors import ArgumentTypeError, MoeConfigError
from moe_fast.matmul import matmul
from moe_fast.single_file import check_place, whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


__all__ = [
    "compute_router_similarity",
    "plot_curves",
    "plot_load",
    "plot_plan",
    "plot_router_similarity",
    "save_load_picture",
]
# Without the yellow, which is hard to see as a line on white.
LINE_COLORS = ("black", *(color for color in MODEL_COLORS if color != "#f0e442"))
FONT_SIZE = 7.0
POINTS_PER_INCH = 72.0
DASHES = ("-", "--", "-.", ":")


def plot_plan(
    plan: ExpertOrigins, ax: Axes | None = None, *, labels: Sequence[str] | None = None
) -> Axes:
    """Draw which source model each expert of each layer comes from.

    Each expert is a cell, and each model has a colour and a number. A cell whose weights come from
    another layer than its own names that layer, as in `1:L3`.

    Parameters
    ----------
    plan : MoeConstructionPlan
        What to draw, or anything else with `source_model`, `source_layer` and `num_models`.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default new axes.
    labels : sequence of str, optional
        One name per model for the legend; by default their numbers.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib.
    MoeConfigError
        If the number of labels is not that of the models.

    Examples
    --------
    >>> from moe_fast import plan_moe_construction, plot_plan
    >>> ax = plot_plan(plan_moe_construction(3, 12), labels=["chat", "code", "maths"])
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('expert', 'layer')
    """
    if labels is not None and len(labels) != plan.num_models:
        raise MoeConfigError(
            f"must name all {plan.num_models} models of the plan, got {len(labels)}",
            argument="labels",
        )
    models = plan.source_model
    moved = plan.source_layer != np.arange(len(models))[:, np.newaxis]
    ax = axes_for(ax, models.shape, longest_label=max(map(len, labels or ()), default=0))
    if plan.num_models > len(MODEL_COLORS):
        image = draw_grid(ax, models, cmap=SCALE, vmin=0, vmax=plan.num_models - 1)
        ax.figure.colorbar(image, ax=ax, label="source model")
    else:
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch

        colors = MODEL_COLORS[: max(plan.num_models, 1)]
        image = draw_grid(
            ax, models, cmap=ListedColormap(colors), vmin=-0.5, vmax=len(colors) - 0.5
        )
        patches = [
            Patch(color=color, label=f"{model}: {labels[model]}" if labels else f"model {model}")
            for model, color in enumerate(colors)
        ]
        ax.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)

    def text(layer: int, expert: int) -> str:
        model = str(models[layer, expert])
        return f"{model}:L{plan.source_layer[layer, expert]}" if moved[layer, expert] else model

    write_cells(image, text, characters=6 if moved.any() else 2)
    ax.set(xlabel="expert", ylabel="layer", title="Source model of each expert")
    return ax


def plot_load(load: npt.ArrayLike, ax: Axes | None = None) -> Axes:
    """Draw a heat map of how the tokens of each layer spread over its experts.

    Each layer's counts are divided by their mean: 1 is an even load, 0 an expert without tokens.
    With a capacity factor of 1.25, an expert above 1.25 drops tokens. A layer without any token
    stays blank.

    Parameters
    ----------
    load : array_like, shape (num_layers, num_experts) or (num_experts,)
        Tokens per expert, as counts or as shares.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default new axes.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib.
    TypeError, MoeConfigError
        If `load` is not a one- or two-dimensional array of finite numbers of at least 0.

    Examples
    --------
    >>> from moe_fast import plot_load
    >>> ax = plot_load([[90, 110, 100, 100], [400, 0, 0, 0]])
    >>> ax.images[0].get_array().tolist()
    [[0.9, 1.1, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0]]
    """
    counts = as_numbers(load, "load", dims=(1, 2))
    if counts.size and counts.min() < 0:
        raise MoeConfigError(f"must not be negative, got {counts.min():g}", argument="load")
    counts = np.atleast_2d(counts)
    totals = counts.sum(axis=1, keepdims=True)
    relative = np.ma.masked_invalid(
        np.divide(
            counts * counts.shape[1], totals, out=np.full_like(counts, np.nan), where=totals > 0
        )
    )
    ax = axes_for(ax, counts.shape)
    highest = max(2.0, float(relative.max())) if relative.count() else 2.0
    image = draw_grid(ax, relative, cmap=SCALE, vmin=0, vmax=highest)
    bar = ax.figure.colorbar(image, ax=ax, label="load (1 = even)")
    bar.ax.axhline(1.0, color="white", linewidth=2)
    bar.ax.axhline(1.0, color="black", linewidth=0.8)

    def text(layer: int, expert: int) -> str:
        value = relative[layer, expert]
        return "" if value is np.ma.masked else f"{value:.2f}"

    write_cells(image, text, characters=4)
    ax.set(xlabel="expert", ylabel="layer", title="Load per layer and expert")
    return ax


def plot_curves(
    curves: Mapping[str, npt.ArrayLike],
    ax: Axes | None = None,
    *,
    xlabel: str = "tokens",
    ylabel: str = "held-out loss",
) -> Axes:
    """Draw the losses of training runs, or other curves, one line per run.

    Lines differ in colour, and in their dashes for printing in grey.

    Parameters
    ----------
    curves : mapping of str to array_like, shape (2, num_points)
        For each name in the legend, the x values and the y values of the points.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default new axes.
    xlabel, ylabel : str
        The labels of the axes.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib.
    TypeError, MoeConfigError
        If a curve is not an array of finite numbers of that shape.

    Examples
    --------
    >>> from moe_fast import plot_curves
    >>> ax = plot_curves({"dense": [[0, 1000], [2.9, 2.8]], "upcycled": [[0, 1000], [2.9, 2.7]]})
    >>> [line.get_label() for line in ax.lines]
    ['dense', 'upcycled']
    """
    arrays = {name: as_numbers(curve, name, dims=(2,)) for name, curve in curves.items()}
    for name, points in arrays.items():
        if len(points) != 2:
            raise MoeConfigError(
                f"must have the shape (2, num_points), got {points.shape}", argument=name
            )
    ax = axes_for(ax, (10, 10))
    for number, (name, points) in enumerate(arrays.items()):
        color = LINE_COLORS[number % len(LINE_COLORS)]
        ax.plot(*points, DASHES[number % len(DASHES)], color=color, label=name, linewidth=1.4)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(fontsize=FONT_SIZE)
    return ax


def save_load_picture(load: npt.ArrayLike, path: str | os.PathLike[str]) -> None:
    """Draw `plot_load` into a file whose ending says the format, without a window.

    Raises
    ------
    ModuleNotFoundError, TypeError, MoeConfigError
        As `plot_load`; also for an ending that matplotlib does not write.
    """
    path = as_path(path, "path")
    if not path.suffix:
        raise MoeConfigError(
            f"must end in the format of the picture, such as .png or .svg, got '{path}'",
            argument="path",
        )
    check_place(path, overwrite=True)
    figure = cast("Figure", plot_load(load).figure)
    from matplotlib import pyplot

    try:
        with whole_file(path) as stream:
            figure.savefig(stream, format=path.suffix[1:])
    except ValueError as error:
        raise MoeConfigError(f"'{path}' cannot be written: {error}", argument="path") from None
    finally:
        pyplot.close(figure)


def compute_router_similarity(routers: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Compute the cosines between the experts' rows of a router, in float64.

    Experts whose rows point the same way get the same tokens. An expert whose row is zero has no
    direction: its cosines are 0, with itself too.

    Parameters
    ----------
    routers : array_like, shape (..., num_experts, hidden_size)
        As checkpoints store them; transpose what `compute_gate_weights` gives by default.

    Returns
    -------
    ndarray of float64, shape (..., num_experts, num_experts)

    Raises
    ------
    TypeError, MoeConfigError
        If `routers` is not an array of finite numbers with at least two dimensions.

    Examples
    --------
    >>> from moe_fast import compute_router_similarity
    >>> compute_router_similarity([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]).tolist()
    [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]
    """
    rows = as_numbers(routers, "routers", dims=None)
    # Scaled first: the squares of very large or small weights do not fit.
    largest = np.abs(rows).max(axis=-1, keepdims=True, initial=0.0)
    rows = np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    rows = np.divide(rows, lengths, out=rows, where=lengths > 0)
    cosines: npt.NDArray[np.float64] = matmul(rows, rows.swapaxes(-1, -2))
    return np.clip(cosines, -1.0, 1.0, out=cosines)


def plot_router_similarity(
    routers: npt.ArrayLike, ax: Axes | None = None, *, layer: int | None = None
) -> Axes:
    """Draw a heat map of the cosines between the experts' rows of the routers.

    Parameters
    ----------
    routers : array_like, shape (num_layers, num_experts, hidden_size) or (num_experts, hidden_size)
        As checkpoints store them; transpose what `compute_gate_weights` gives by default.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default new axes.
    layer : int, optional
        The layer to draw; by default the mean over the layers.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ModuleNotFoundError
        Without matplotlib.
    TypeError, MoeConfigError
        If `routers` has another shape or is not finite, or there is no such `layer`.

    Examples
    --------
    >>> from moe_fast import compute_router_weights, plot_router_similarity
    >>> routers = compute_router_weights(2, 64, 8, "random", transpose=True, full_range=True)
    >>> plot_router_similarity(routers, layer=1).get_title()
    'Router similarity of layer 1'
    """
    stacked = as_numbers(routers, "routers", dims=(2, 3))
    stacked = stacked[np.newaxis] if stacked.ndim == 2 else stacked
    title = f"Router similarity, mean over {len(stacked)} layers"
    if layer is not None or len(stacked) == 1:
        layer = as_index(0 if layer is None else layer, "layer")
        if layer >= len(stacked):
            raise MoeConfigError(f"must be below {len(stacked)}, got {layer}", argument="layer")
        title = f"Router similarity of layer {layer}"
        stacked = stacked[layer : layer + 1]
    cosines = np.zeros((stacked.shape[1],) * 2 if len(stacked) else (0, 0))
    for router in stacked:
        cosines += compute_router_similarity(router) / len(stacked)
    ax = axes_for(ax, cosines.shape, square=True)
    image = draw_grid(ax, cosines, cmap=SCALE, vmin=min(0.0, cosines.min(initial=0.0)), vmax=1.0)
    ax.set_aspect("equal")
    ax.figure.colorbar(image, ax=ax, label="cosine")
    write_cells(image, lambda i, j: f"{cosines[i, j]:z.2f}", characters=4)
    ax.set(xlabel="expert", ylabel="expert", title=title)
    return ax


def as_numbers(
    values: npt.ArrayLike, name: str, dims: tuple[int, ...] | None
) -> npt.NDArray[np.float64]:
    """`values` as finite float64 numbers with one of the numbers of dimensions `dims`."""
    given: Any = values
    listed = given if isinstance(given, (list, tuple)) else [given]
    if any(callable(getattr(each, "detach", None)) for each in listed):
        # torch's tensors; NumPy has no bfloat16, and float64 holds it.
        arrays = [np.asarray(each.detach().cpu().double()) for each in listed]
        values = np.stack(arrays) if listed is given else arrays[0]
    try:
        array = np.asarray(values)
        if array.dtype.kind in "OUSMmbc":
            raise TypeError
        array = array.astype(np.float64)
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            f"must be an array of numbers, got {type(values).__name__}", argument=name
        ) from None
    if array.ndim < 2 if dims is None else array.ndim not in dims:
        wanted = "at least 2" if dims is None else " or ".join(map(str, dims))
        raise MoeConfigError(
            f"must have {wanted} dimensions, got the shape {array.shape}", argument=name
        )
    if not np.isfinite(array).all():
        place = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        raise MoeConfigError(f"must be finite, got {array[place]} at {list(place)}", argument=name)
    return array


def axes_for(
    ax: Axes | None, shape: tuple[int, ...], *, square: bool = False, longest_label: int = 0
) -> Axes:
    """The axes to draw into: the caller's, or new ones that suit grid and legend."""
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "pictures need matplotlib: pip install 'moe-fast[plot]'", name="matplotlib"
        ) from None
    if ax is not None:
        return ax
    rows, columns = shape
    width = min(max(2.5 + 0.4 * columns, 4.5), 12.0) + min(max(longest_label - 8, 0) * 0.09, 8.0)
    height = min(max(1.5 + 0.25 * rows, 2.5), 10.0)
    size = (width, width - 1.0) if square else (width, height)
    return pyplot.subplots(figsize=size, layout="constrained")[1]


def draw_grid(ax: Axes, values: npt.NDArray[Any], **options: Any) -> Any:
    """One cell a value, whole numbers alone on both axes."""
    from matplotlib.ticker import MaxNLocator

    if not values.size:
        raise MoeConfigError(f"nothing to draw in a grid of the shape {values.shape}")

    image = ax.imshow(values, aspect="auto", interpolation="nearest", **options)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return image


def write_cells(image: Any, text: Callable[[int, int], str], *, characters: int) -> None:
    """`text(row, column)` in every cell, where all of them fit; dark on light, light on dark."""
    ax, values = image.axes, image.get_array()
    rows, columns = values.shape
    box = ax.get_window_extent()
    points = POINTS_PER_INCH / ax.figure.dpi
    if (
        box.height * points / rows < 1.2 * FONT_SIZE
        or box.width * points / columns < 0.6 * FONT_SIZE * characters
    ):
        return
    lightness = matmul(image.cmap(image.norm(values))[..., :3], np.array([0.299, 0.587, 0.114]))
    for row in range(rows):
        for column in range(columns):
            color = "black" if lightness[row, column] > 0.5 else "white"
            ax.text(
                column, row, text(row, column),
                ha="center", va="center", color=color, fontsize=FONT_SIZE,
            )  # fmt: skip
