"""Routing against the routers of transformers 5 and Megatron-LM's formulas, where nothing ties."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralTopKRouter,
    load_balancing_loss_func,
)
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe_fast import MoeConfig, RoutingStats, build_moe, predict_load
from moe_fast.torch import huggingface_load_balancing_loss, route

EXAMPLES = Path(__file__).parents[2] / "examples"
HIDDEN, TOKENS = 48, 600
# Values closer than this may stand in another order after the rounding of a sum or a softmax.
CLEAR = 1e-5


def mixtral(experts, k):
    return MixtralTopKRouter(
        MixtralConfig(hidden_size=HIDDEN, num_local_experts=experts, num_experts_per_tok=k)
    )


def qwen3_moe(experts, k, norm_topk_prob):
    return Qwen3MoeTopKRouter(
        Qwen3MoeConfig(
            hidden_size=HIDDEN, num_experts=experts, num_experts_per_tok=k,
            norm_topk_prob=norm_topk_prob,
        )
    )  # fmt: skip


def deepseek_v3(experts, k, n_group, topk_group, norm_topk_prob):
    router = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=HIDDEN, n_routed_experts=experts, num_experts_per_tok=k, n_group=n_group,
            topk_group=topk_group, norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.5,
        )
    )  # fmt: skip
    router.e_score_correction_bias.copy_(torch.randn(experts) / 10)
    return router


def sigmoid_options(router):
    return {
        "scores": "sigmoid",
        "selection_bias": router.e_score_correction_bias,
        "n_group": router.num_group,
        "topk_group": router.topk_group,
        "norm_topk_prob": router.norm_topk_prob,
        "routed_scaling_factor": router.routed_scaling_factor,
    }


# A router of transformers, and the options of `route` that say the same.
ROUTERS = {
    "Mixtral": (mixtral, (8, 2), lambda router: {}),
    "Mixtral, 64": (mixtral, (64, 8), lambda router: {}),
    "Qwen3-MoE": (qwen3_moe, (128, 8, True), lambda router: {}),
    "Qwen3-MoE, no norm": (qwen3_moe, (60, 4, False), lambda router: {"norm_topk_prob": False}),
    "DeepSeek-V3": (deepseek_v3, (256, 8, 8, 4, True), sigmoid_options),
    "DeepSeek-V3, no norm": (deepseek_v3, (32, 3, 4, 2, False), sigmoid_options),
    "DeepSeek-V3, one group": (deepseek_v3, (64, 6, 1, 1, True), sigmoid_options),
}


def clear(values, k):
    """Rows whose k + 1 largest values are well apart."""
    best = values.sort(-1, descending=True).values[:, : k + 1]
    return (best.diff(dim=-1).abs() > CLEAR).all(-1)


def clear_rows(router, logits):
    """Tokens for which rounding cannot change what the router chooses."""
    if not isinstance(router, DeepseekV3TopkRouter):
        return clear(logits.float(), router.top_k)
    scores = logits.sigmoid() + router.e_score_correction_bias
    groups = scores.view(len(logits), router.num_group, -1).topk(2).values.sum(-1)
    return clear(scores, 3 * router.top_k) & clear(groups, router.topk_group)


def sorted_by_expert(indices, *values):
    order = indices.argsort(-1)
    return [x.gather(-1, order) for x in (indices, *values)]


@pytest.mark.parametrize("name", ROUTERS)
def test_it_chooses_and_weighs_as_transformers_does(name):
    make, arguments, options = ROUTERS[name]
    torch.manual_seed(0)
    router = make(*arguments)
    torch.nn.init.normal_(router.weight, std=0.2)
    with torch.no_grad():
        hidden = torch.randn(TOKENS, HIDDEN)
        hidden = hidden[clear_rows(router, router(hidden)[0])]
    assert len(hidden) > 0.9 * TOKENS
    logits, weights, indices = router(hidden)
    found = route(logits, MoeConfig(router.num_experts, router.top_k), **options(router))
    if not isinstance(router, DeepseekV3TopkRouter):  # which does not sort
        assert torch.equal(found.expert_indices, indices.int())
    chosen, ours = sorted_by_expert(found.expert_indices.long(), found.weights)
    expected, theirs = sorted_by_expert(indices, weights)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(ours, theirs)
    given = torch.randn(theirs.shape)
    (ours,) = torch.autograd.grad(ours, router.weight, given, retain_graph=True)
    (theirs,) = torch.autograd.grad(theirs, router.weight, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_logits_are_weighed_as_transformers_does():
    """Qwen3-MoE computes weights in float32 and rounds them to bfloat16."""
    torch.manual_seed(0)
    router = qwen3_moe(128, 8, True).bfloat16()
    torch.nn.init.normal_(router.weight, std=0.2)
    with torch.no_grad():
        hidden = torch.randn(TOKENS, HIDDEN).bfloat16()
        hidden = hidden[clear_rows(router, router(hidden)[0])]
        assert len(hidden) > TOKENS / 3
        logits, weights, indices = router(hidden)
    found = route(logits, MoeConfig(128, 8))
    assert torch.equal(found.expert_indices, indices.int())
    # Both round what may differ in its last bit of float32.
    assert found.weights.dtype == torch.float32
    torch.testing.assert_close(found.weights.bfloat16(), weights, rtol=2**-7, atol=0)
    assert (found.weights.bfloat16() == weights).double().mean() > 0.99


def megatron(logits, k, capacity_factor, policy, norm):
    """Dense weights `[T, E]` and choices before and after dropping, from Megatron's definitions."""
    tokens, experts = logits.shape
    if norm:
        best, indices = logits.topk(k)
        weights = best.softmax(-1)
    else:
        weights, indices = logits.softmax(-1).topk(k)
    dense = torch.zeros_like(logits).scatter(1, indices, weights)
    chosen = torch.zeros_like(logits).scatter(1, indices, 1.0).bool()
    capacity = math.ceil(tokens * k / experts * capacity_factor)
    if policy == "probs":
        place = dense.topk(min(capacity, tokens), dim=0).indices
        kept = torch.zeros_like(dense).scatter(0, place, 1.0).bool() & chosen
    else:
        kept = chosen & (chosen.cumsum(0) <= capacity)
    return dense * kept, chosen, kept, capacity


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 1.25, 8.0])
@pytest.mark.parametrize(("experts", "k", "norm"), [(8, 2, True), (64, 8, True), (16, 1, False)])
def test_it_drops_as_megatron_does(experts, k, norm, capacity_factor, policy):
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, experts, dtype=torch.float64) + torch.randn(experts) / 2
    logits.requires_grad_()
    dense, chosen, kept, capacity = megatron(logits, k, capacity_factor, policy, norm)
    found = route(
        logits, MoeConfig(experts, k), norm_topk_prob=norm, capacity_factor=capacity_factor,
        drop_policy=policy,
    )  # fmt: skip
    assert found.routing.capacity == capacity
    assert found.tokens_per_expert.tolist() == kept.sum(0).tolist()
    assert found.routing.tokens_per_expert_before_drop.tolist() == chosen.sum(0).tolist()
    assert found.routing.num_dropped == (chosen & ~kept).sum()
    assert (found.routing.num_dropped > 0) == (capacity_factor < 8)
    # One column more takes what was dropped.
    place = torch.where(found.expert_indices >= 0, found.expert_indices, experts).long()
    ours = torch.zeros(TOKENS, experts + 1).double().scatter(1, place, found.weights)[:, :experts]
    torch.testing.assert_close(ours, dense)
    given = torch.randn(dense.shape, dtype=torch.float64)
    (ours,) = torch.autograd.grad(ours, logits, given)
    (theirs,) = torch.autograd.grad(dense, logits, given)
    torch.testing.assert_close(ours, theirs)
    # Padded to the capacity: each expert's tokens in order, then nothing.
    tokens, weights = found.routing.by_expert(capacity)
    for expert in range(experts):
        (expected,) = torch.nonzero(kept[:, expert], as_tuple=True)
        assert tokens[expert].tolist() == expected.tolist() + [-1] * (capacity - len(expected))
        padded = dense[expected, expert].tolist() + [0.0] * (capacity - len(expected))
        np.testing.assert_allclose(weights[expert], padded, rtol=1e-12)


@pytest.mark.parametrize("capacity_factor", [1.0, 1.25])
def test_switch_is_fedus_definition(capacity_factor):
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, 8)
    dense, _, kept, capacity = megatron(logits, 1, capacity_factor, "position", norm=False)
    found = route(logits, MoeConfig(8, 1, "switch_transformer"), capacity_factor=capacity_factor)
    assert found.routing.capacity == capacity
    assert torch.equal(found.expert_indices[:, 0] >= 0, kept.any(1))
    torch.testing.assert_close(found.weights[:, 0], dense.sum(1))


def test_expert_choice_is_zhous_definition():
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, 16, dtype=torch.float64)
    weights, tokens = logits.softmax(-1).T.topk(TOKENS * 2 // 16)
    found = route(logits, MoeConfig(16, 2, "expert_choice"), sorted=True)
    assert torch.equal(found.token_indices, tokens.int())
    torch.testing.assert_close(found.weights, weights)


EXPERTS, K = 8, 2


@pytest.fixture(scope="module")
def run(smollm2, tmp_path_factory):
    """What every router of SmolLM2 as an MoE reads, answers and chooses, for texts of three kinds.

    `folder`, and for all layers `inputs`, `logits`, `weights`, `indices`.
    """
    folder = tmp_path_factory.mktemp("routers") / "moe"
    build_moe(smollm2, folder, MoeConfig(EXPERTS, K), routers="random", seed=1)
    kinds = yaml.safe_load((EXAMPLES / "kinds.yml").read_text(encoding="utf-8"))
    text = "\n".join(text for texts in kinds["held_out"].values() for text in texts[:2])
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, list] = {"inputs": [], "logits": [], "weights": [], "indices": []}

    def watch(_, inputs, outputs):
        values = inputs[0].reshape(-1, inputs[0].shape[-1]), *outputs
        for name, value in zip(seen, values, strict=True):
            seen[name].append(value.clone())

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(watch)
    with torch.no_grad():
        answer = model(tokens, output_router_logits=True)
    assert len(seen["logits"]) == len(answer.router_logits) == 30
    assert all(map(torch.equal, seen["logits"], answer.router_logits))
    apart = torch.stack([clear(logits, K) for logits in seen["logits"]]).all(0)
    assert len(apart) > 100
    assert apart.double().mean() > 0.95
    return {name: [value[apart] for value in values] for name, values in seen.items()} | {
        "folder": folder
    }


def test_real_routers_choose_and_weigh_the_same(run):
    chosen = torch.stack(run["indices"])
    assert len(chosen.unique()) == EXPERTS
    for logits, weights, indices in zip(run["logits"], run["weights"], run["indices"], strict=True):
        found = route(logits, MoeConfig(EXPERTS, K))
        assert torch.equal(found.expert_indices, indices.int())
        torch.testing.assert_close(found.weights, weights)


def test_real_load_and_loss_are_those_of_transformers(run):
    stats = RoutingStats(MoeConfig(EXPERTS, K), 30)
    for layer, logits in enumerate(run["logits"]):
        stats.update(logits.numpy(), layer)
    counts = [torch.bincount(x.flatten(), minlength=EXPERTS).tolist() for x in run["indices"]]
    assert stats.counts.tolist() == counts
    expected = load_balancing_loss_func(tuple(run["logits"]), EXPERTS, K)
    assert stats.huggingface_load_balancing_loss() == pytest.approx(expected.item(), rel=1e-5)


def test_the_real_loss_has_the_gradient_that_transformers_trains_with(run):
    layers = [logits.clone().requires_grad_() for logits in run["logits"]]
    theirs = load_balancing_loss_func(tuple(layers), EXPERTS, K)
    ours = huggingface_load_balancing_loss([route(x, MoeConfig(EXPERTS, K)) for x in layers])
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, layers) for loss in (ours, theirs)]
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)


def test_predicted_load_is_what_transformers_measures(run):
    with safe_open(run["folder"] / "model.safetensors", "pt") as file:
        routers = [
            file.get_tensor(f"model.layers.{layer}.block_sparse_moe.gate.weight").float().numpy()
            for layer in range(30)
        ]
    inputs = np.stack([x.numpy() for x in run["inputs"]])
    predicted = predict_load(routers, inputs, num_experts_per_tok=K)
    measured = [torch.bincount(x.flatten(), minlength=EXPERTS).tolist() for x in run["indices"]]
    assert predicted.counts.tolist() == measured
    shares = np.array(measured) / (inputs.shape[1] * K)
    np.testing.assert_allclose(predicted.load, shares, rtol=1e-12)
    assert predicted.coefficient_of_variation.max() > 0.2  # uneven, or nothing was to predict
