"""A request survives its trip through JSON, and nothing else passes for one."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from moe_fast import MoeConfig, MoeConfigError, RoutingMethod
from moe_fast.checkpoint.build_request import BuildRequest
from moe_fast.plain import typed
from moe_fast.request import ExpertSource, RouterStart

REQUEST = BuildRequest(
    models=(
        ExpertSource("/models/a"),
        ExpertSource("/models/b", noise_scale=0.1, residual_scale=-2.5, source_layers=(1, 0)),
    ),
    base="/models/a",
    config=MoeConfig(num_experts=4, num_experts_per_tok=1, routing_method="expert_choice"),
    routers=RouterStart("random"),
    seed=7,
    max_shard_size=1000,
)


def changed(**changes):
    return json.loads(json.dumps(asdict(REQUEST))) | changes


def test_a_request_comes_back_from_json_equal():
    read = typed(changed(), BuildRequest, "manifest")
    assert read == REQUEST
    assert read.config.routing_method is RoutingMethod.EXPERT_CHOICE


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"^m: must be a mapping, got null$"),
        ([], r"^m: must be a mapping, got \[\]$"),
        (changed(models="a"), r"^m\.models: must be a list, got 'a'$"),
        (
            changed(models=[{"model": 3}]),
            r"^m\.models\[0\]\.model: must be a string, got 3; put it in quotes$",
        ),
        (
            changed(models=[{"model": "a", "noise_scale": -1}]),
            r"^m\.models\[0\]: noise_scale must be at least 0, got -1\.0$",
        ),
        (changed(base=None), r"^m\.base: must be a string, got null$"),
        (changed(max_shard_size=True), r"^m\.max_shard_size: must be an integer, got True$"),
        (changed(max_shard_size=1.0), r"^m\.max_shard_size: must be an integer, got 1\.0$"),
        (
            changed(routers={"method": "zero"}),
            r"^m\.routers\.method: must be one of auto, balanced, random, uniform, .*, got 'zero'$",
        ),
        (changed(routers="random"), r"^m\.routers: must be a mapping, got 'random'$"),
        (changed(surprise=1), r"^m\.surprise: unknown key; known are models, base, config"),
        ({"models": []}, r"^m: the key 'base' is missing$"),
        (
            changed(config={"num_experts": 2, "top_k": 2}),
            r"^m\.config\.top_k: unknown key; known are num_experts, ",
        ),
    ],
)
def test_what_is_no_request_is_refused_by_name(value, message):
    with pytest.raises(MoeConfigError, match=message):
        typed(value, BuildRequest, "m")
