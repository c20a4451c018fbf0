"""Pictures: what is drawn, where, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_fast import MoeConfig, MoeConfigError, MoeConstructionPlan, plan_moe_construction
from moe_fast.drawing.plotting import (
    SCALE,
    compute_router_similarity,
    plot_curves,
    plot_load,
    plot_plan,
    plot_router_similarity,
)

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import to_rgba


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    pyplot.close("all")


def drawn(ax):
    """What the cells show: colours as the values before the colour map, and the texts."""
    (image,) = ax.images
    return image.get_array(), {
        (int(text.get_position()[1]), int(text.get_position()[0])): text.get_text()
        for text in ax.texts
    }


MIXED = MoeConstructionPlan([[0, 1, 2], [2, 2, 0]], [[0, 0, 0], [1, 0, 1]])


def test_a_plan_shows_the_model_of_every_expert():
    values, texts = drawn(plot_plan(MIXED))
    np.testing.assert_array_equal(values, MIXED.source_model)
    # expert 1 of layer 1 alone has its weights from another layer
    assert texts == {(0, 0): "0", (0, 1): "1", (0, 2): "2",
                     (1, 0): "2", (1, 1): "2:L0", (1, 2): "0"}  # fmt: skip


def test_a_legend_names_every_model_in_the_color_of_its_cells():
    ax = plot_plan(MIXED, labels=["chat", "code", "maths"])
    (image,) = ax.images
    colors = image.cmap(image.norm(image.get_array()))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "0: chat",
        "1: code",
        "2: maths",
    ]
    for model, patch in enumerate(ax.get_legend().get_patches()):
        np.testing.assert_allclose(patch.get_facecolor(), colors[0, model])


def test_a_legend_of_long_names_leaves_the_title_whole():
    labels = ["organisation/some-model-7B-instruct-v0.3", "organisation/another-model-7B-code-v1"]
    ax = plot_plan(plan_moe_construction(2, 4), labels=labels)
    ax.figure.draw_without_rendering()
    whole = ax.figure.bbox
    for part in (ax.title, ax.get_legend()):
        box = part.get_window_extent()
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1


def test_many_models_get_a_scale_in_place_of_a_legend():
    ax = plot_plan(plan_moe_construction(16, 2, MoeConfig(num_experts=16)))
    assert ax.get_legend() is None
    assert ax.figure.axes[-1].get_ylabel() == "source model"


@pytest.mark.parametrize("labels", [["a"], ["a", "b", "c", "d"]])
def test_labels_must_name_every_model(labels):
    with pytest.raises(MoeConfigError, match=f"labels must name all 3 models.*got {len(labels)}"):
        plot_plan(MIXED, labels=labels)


def test_grids_too_fine_for_text_have_none():
    ax = plot_plan(plan_moe_construction(4, 200, MoeConfig(num_experts=256)))
    assert not ax.texts


@pytest.mark.parametrize("draw", [
    lambda ax: plot_plan(MIXED, ax),
    lambda ax: plot_load([[1, 2], [3, 4]], ax),
    lambda ax: plot_router_similarity(np.eye(3), ax),
], ids=["plan", "load", "similarity"])  # fmt: skip
def test_given_axes_are_drawn_into_and_returned(draw):
    figure, (left, right) = pyplot.subplots(1, 2)
    assert draw(right) is right
    assert right.images
    assert not left.images
    assert pyplot.get_fignums() == [figure.number]
    figure.canvas.draw()


def test_axes_that_hold_a_picture_already():
    ax = plot_load([[1, 2]])
    plot_load([[3, 1]], ax)
    assert [text.get_text() for text in ax.texts] == ["0.67", "1.33", "1.50", "0.50"]


def test_load_is_relative_to_even_in_each_layer():
    ax = plot_load([[90, 110], [1, 3], [0, 0]])
    values, texts = drawn(ax)
    np.testing.assert_allclose(values[:2], [[0.9, 1.1], [0.5, 1.5]])
    assert values.mask.tolist() == [[False, False], [False, False], [True, True]]
    assert texts == {(0, 0): "0.90", (0, 1): "1.10", (1, 0): "0.50", (1, 1): "1.50",
                     (2, 0): "", (2, 1): ""}  # fmt: skip


def test_shares_and_counts_give_the_same_picture():
    counts = np.array([[3, 5, 8], [4, 4, 8]])
    shares = counts / counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(drawn(plot_load(counts))[0], drawn(plot_load(shares))[0])


def test_one_layer_may_come_flat():
    assert drawn(plot_load([1, 2, 3]))[0].shape == (1, 3)


def test_loads_without_tokens():
    ax = plot_load(np.zeros((2, 3)))
    ax.figure.canvas.draw()
    assert drawn(ax)[0].mask.all()


@pytest.mark.parametrize("draw", [
    lambda: plot_load(np.zeros((0, 4))),
    lambda: plot_load([]),
    lambda: plot_plan(MoeConstructionPlan(np.zeros((3, 0), int), np.zeros((3, 0), int))),
    lambda: plot_router_similarity(np.zeros((2, 0, 4))),
    lambda: plot_router_similarity(np.zeros((0, 2, 4))),
], ids=["no layers", "flat", "no experts", "no rows", "no routers"])  # fmt: skip
def test_empty_grids_are_refused(draw):
    with pytest.raises(MoeConfigError, match="nothing to draw in a grid of the shape"):
        draw()


@pytest.mark.parametrize(("load", "error", "message"), [
    ([[1, -2]], MoeConfigError, "load must not be negative, got -2"),
    ([[1, np.nan]], MoeConfigError, r"load must be finite, got nan at \[0, 1\]"),
    (np.ones((1, 2, 3)), MoeConfigError, r"load must have 1 or 2 dimensions.*\(1, 2, 3\)"),
    ("loads", TypeError, "load must be an array of numbers, got str"),
    ([[1], [2, 3]], TypeError, "load must be an array of numbers, got list"),
    ([[True]], TypeError, "load must be an array of numbers"),
])  # fmt: skip
def test_bad_loads(load, error, message):
    with pytest.raises(error, match=message):
        plot_load(load)


@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=3, max_side=5),
        elements=st.floats(-1e3, 1e3, allow_subnormal=False).filter(lambda x: abs(x) > 1e-3),
    )
)
def test_similarity_is_the_cosine(routers):
    cosines = compute_router_similarity(routers)
    for place in np.ndindex(cosines.shape):
        *layer, left, right = place
        a, b = routers[(*layer, left)], routers[(*layer, right)]
        expected = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        assert cosines[place] == pytest.approx(expected, abs=1e-12)
    assert np.abs(cosines).max() <= 1


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_similarity_of_rows_of_any_size(scale):
    cosines = compute_router_similarity(np.array([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0]]) * scale)
    np.testing.assert_allclose(cosines, [[1, 0.96, 0], [0.96, 1, 0], [0, 0, 0]], rtol=1e-12)


def test_similarity_of_a_layer_or_of_all():
    routers = np.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    np.testing.assert_allclose(drawn(plot_router_similarity(routers))[0], [[1, 0.5], [0.5, 1]])
    np.testing.assert_allclose(drawn(plot_router_similarity(routers, layer=0))[0], np.eye(2))
    ax = plot_router_similarity(routers[1])
    assert drawn(ax)[1] == dict.fromkeys(np.ndindex(2, 2), "1.00")


class Tensor:
    """What a tensor of torch does that NumPy cannot read, and torch not installed."""

    def __init__(self, values) -> None:
        self.values = np.asarray(values, np.float64)

    def detach(self):
        return self

    cpu = detach

    def double(self):
        return self.values

    def __array__(self, *_, **__):
        raise TypeError("Got unsupported ScalarType BFloat16")


def test_similarity_reads_tensors():
    rows = np.array([[3.0, 4.0], [4.0, 3.0]])
    expected = compute_router_similarity(rows)
    np.testing.assert_array_equal(compute_router_similarity(Tensor(rows)), expected)
    both = compute_router_similarity([Tensor(rows), Tensor(rows)])
    np.testing.assert_array_equal(both, [expected, expected])
    values, _ = drawn(plot_load(Tensor([[1.0, 3.0]])))
    np.testing.assert_array_equal(values, [[0.5, 1.5]])


def test_similarity_reads_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    routers = np.eye(2, dtype=ml_dtypes.bfloat16)
    np.testing.assert_array_equal(compute_router_similarity(routers), np.eye(2))


@pytest.mark.parametrize(("routers", "layer", "error", "message"), [
    (np.ones(3), None, MoeConfigError, r"routers must have 2 or 3 dimensions.*\(3,\)"),
    (np.full((2, 2), np.inf), None, MoeConfigError, r"routers must be finite, got inf at \[0, 0\]"),
    (np.ones((2, 2, 2)), 2, MoeConfigError, "layer must be below 2, got 2"),
    (np.ones((2, 2, 2)), 0.5, TypeError, "layer must be an integer, got 0.5"),
    (np.ones((2, 2), complex), None, TypeError, "routers must be an array of numbers"),
])  # fmt: skip
def test_bad_routers(routers, layer, error, message):
    with pytest.raises(error, match=message):
        plot_router_similarity(routers, layer=layer)


def test_text_stands_out_from_its_cell():
    ax = plot_load([[0.0, 4.0]])
    (image,) = ax.images
    cells = image.cmap(image.norm(image.get_array()))[0, :, :3].mean(axis=-1)
    for text, cell in zip(ax.texts, cells, strict=True):
        assert abs(np.mean(to_rgba(text.get_color())[:3]) - cell) > 0.5


def test_the_scale_keeps_its_order_in_grey():
    lightness = matplotlib.colormaps[SCALE](np.linspace(0, 1, 64))[:, :3] @ (0.299, 0.587, 0.114)
    assert (np.diff(lightness) > 0).all()


def test_without_matplotlib_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from moe_fast.drawing.plotting import plot_load\n"
        "try:\n    plot_load([1, 2])\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "pictures need matplotlib: pip install 'moe-fast[plot]'\n"


def test_curves_are_lines_that_the_legend_names():
    curves = {"dense": [[0, 10, 20], [3.0, 2.9, 2.8]], "upcycled": np.array([[0, 20], [3.0, 2.5]])}
    ax = plot_curves(curves, xlabel="seconds", ylabel="loss")
    for line, points in zip(ax.lines, curves.values(), strict=True):
        np.testing.assert_array_equal(line.get_data(), points)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["dense", "upcycled"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("seconds", "loss")
    looks = {(line.get_color(), line.get_linestyle()) for line in ax.lines}
    assert len(looks) == len({style for _, style in looks}) == 2


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        ([[0, 1, 2]], r"dense must have the shape \(2, num_points\), got \(1, 3\)"),
        ([0, 1], r"dense must have 2 dimensions, got the shape \(2,\)"),
        ([[0, 1], [1, np.nan]], r"dense must be finite, got nan at \[1, 1\]"),
    ],
)
def test_a_curve_that_is_none_is_named(curve, message):
    with pytest.raises(MoeConfigError, match=message):
        plot_curves({"dense": curve})


def test_no_curve_is_yellow_on_white():
    ax = plot_curves({str(number): [[0, 1], [2, 3]] for number in range(7)})
    assert len({line.get_color() for line in ax.lines}) == 7
    assert "#f0e442" not in {line.get_color() for line in ax.lines}
