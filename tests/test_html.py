"""Plans and reports as HTML: well formed, true to what they show, harmless."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_fast import MoeConfig, MoeConstructionPlan, plan_moe_construction
from moe_fast.drawing.html import LEFT, model_color, pairs_table, plan_picture

SVG = "{http://www.w3.org/2000/svg}"
MOST_MODELS = 9


def svg_of(html):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", html)[0])


class Tags(HTMLParser):
    """The tags that are still open, and every tag and text that was seen."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], set(), ""

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_data(self, data):
        self.text += data


def read(html):
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert not tags.open
    return tags


def painted(svg, plan):
    """The grid of models, read back from the shapes and their colours."""
    models = {model_color(m, plan.num_models): m for m in range(plan.num_models)}
    shapes = [
        (models[path.get("fill")], *map(float, numbers))
        for path in svg.iter(f"{SVG}path")
        if path.get("fill") != "#000"
        for numbers in re.findall(r"M(\S+) (\S+?)h(\S+?)v(\S+?)h\S+?z", path.get("d"))
    ]
    width = shapes[0][3]
    height = max(y + h for _, _, y, _, h in shapes) / plan.num_layers
    grid = np.full(plan.source_model.shape, -1)
    for model, x, y, _, h in shapes:
        expert, layer, layers = ((x - LEFT) / width, y / height, h / height)
        cells = grid[round(layer) : round(layer + layers), round(expert)]
        assert (cells == -1).all()
        cells[:] = model
    return grid


@given(
    hnp.arrays(
        np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.integers(0, MOST_MODELS - 1),
    ),
    st.integers(0, MOST_MODELS),
)  # fmt: skip
def test_the_picture_is_the_plan(models, more):
    plan = MoeConstructionPlan(
        models, np.zeros_like(models), num_models=max(int(models.max()) + 1, more)
    )
    svg = svg_of(plan_picture(plan))
    np.testing.assert_array_equal(painted(svg, plan), models)


def test_layers_that_repeat_are_one_shape():
    html = plan_picture(plan_moe_construction(4, 1000, MoeConfig(num_experts=64)))
    assert html.count("M") < 100
    assert len(html) < 10_000


def test_experts_from_other_layers_have_a_corner():
    plan = MoeConstructionPlan([[0, 0], [0, 0]], [[0, 0], [0, 1]])
    html = plan_picture(plan)
    (corner,) = (p for p in svg_of(html).iter(f"{SVG}path") if p.get("fill") == "#000")
    assert corner.get("d").count("M") == 1
    assert "one of 1 experts whose weights come from another layer" in html
    assert "corner" not in plan_picture(plan_moe_construction(1, 2))


@pytest.mark.parametrize("num_models", [1, 3, 7, 8, 40])
def test_every_model_has_a_color_of_its_own(num_models):
    assert len({model_color(model, num_models) for model in range(num_models)}) == num_models


def test_labels_are_text_and_nothing_else():
    plan = plan_moe_construction(2, 1)
    tags = read(plan_picture(plan, labels=["<script>alert(1)</script>", 'a"&b']))
    assert "script" not in tags.seen
    assert "0: <script>alert(1)</script>" in tags.text
    assert '1: a"&b' in tags.text


def test_pairs_are_text_and_nothing_else():
    tags = read(pairs_table({"<b>": "<img src=x>", "n": 1234567, "none": None, "list": range(99)}))
    assert tags.seen == {"table", "tr", "th", "td"}
    assert "<img src=x>" in tags.text
    assert "1,234,567" in tags.text
    assert "7, … (99 in all)" in tags.text


@pytest.mark.parametrize(("plan", "text"), [
    (MoeConstructionPlan(np.zeros((0, 3), int), np.zeros((0, 3), int)), "No experts"),
    (plan_moe_construction(3, 10**5, MoeConfig(num_experts=10**5)), "too many to draw"),
    (MoeConstructionPlan(*np.random.default_rng(0).integers(0, 9, (2, 200, 200))),
     "40,000 experts: too many to draw"),
], ids=["none", "vast", "varied"])  # fmt: skip
def test_what_cannot_be_drawn_is_said(plan, text):
    html = plan._repr_html_()
    assert text in html
    assert "<svg" not in html


def test_a_plan_in_a_notebook():
    html = plan_moe_construction(3, 12)._repr_html_()
    tags = read(html)
    assert tags.text.startswith("12 layers of 8 experts from 3 models, routers start balanced")
    assert "script" not in tags.seen
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")


def test_a_report_in_a_notebook():
    report = plan_moe_construction(2**60, 2).report(4096, 14336, 8)
    tags = read(report._repr_html_())
    assert "total params estimate" in tags.text
    assert f"{report.total_params_estimate:,}" in tags.text
    assert f"{2**60 - 8:,} in all" in tags.text
