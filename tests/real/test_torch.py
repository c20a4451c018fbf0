"""`moe_fast.torch.route`: gradients against differences and against torch's own formulas."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

import moe_fast
from moe_fast import MoeConfig, MoeConfigError, Router, RoutingError, RoutingStats
from moe_fast.routing import choose
from moe_fast.torch import huggingface_load_balancing_loss, route

BIAS = np.linspace(-0.3, 0.3, 8)
# k, method, options: every way in which weights come from logits.
CASES = {
    "top-k": (3, "top_k", {}),
    "scaled": (3, "top_k", {"routed_scaling_factor": 2.5}),
    "not renormalised": (3, "top_k", {"norm_topk_prob": False, "routed_scaling_factor": 2.5}),
    "sigmoid": (3, "top_k", {"scores": "sigmoid", "routed_scaling_factor": 2.5}),
    "sigmoid, not renormalised": (3, "top_k", {"scores": "sigmoid", "norm_topk_prob": False}),
    "bias": (3, "top_k", {"scores": "sigmoid", "selection_bias": BIAS}),
    "groups": (2, "top_k", {"scores": "sigmoid", "n_group": 4, "topk_group": 2}),
    "softmax groups": (2, "top_k", {"norm_topk_prob": False, "n_group": 4, "topk_group": 2}),
    "capacity by probs": (3, "top_k", {"capacity_factor": 0.7}),
    "capacity by position": (3, "top_k", {"capacity_factor": 0.7, "drop_policy": "position"}),
    "capacity 0": (3, "top_k", {"capacity_factor": 0.0}),
    "all experts": (8, "top_k", {}),
    "one expert": (1, "top_k", {"norm_topk_prob": False}),
    "switch": (1, "switch_transformer", {}),
    "switch, tight": (1, "switch_transformer", {"capacity_factor": 0.6}),
    "expert choice": (2, "expert_choice", {"routed_scaling_factor": 2.5}),
    "expert choice, sorted": (2, "expert_choice", {"sorted": True}),
    "expert choice, sigmoid": (3, "expert_choice", {"scores": "sigmoid"}),
}
every_case = pytest.mark.parametrize("case", CASES)
DIFFERENT_LOSSES = ["top-k", "sigmoid", "capacity by probs", "switch", "expert choice, sigmoid"]
LOSSES = ["load_balancing_loss", "z_loss", "importance_loss"]
TOKENS, EXPERTS = 6, 8


def make_logits(dtype=torch.float64, seed=0, tokens=TOKENS, experts=EXPERTS):
    """All logits, and so all scores, are well apart: no step of a difference changes a choice."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(tokens * experts, generator=generator).reshape(tokens, experts)
    return ((order / (tokens * experts) - 0.5) * 6).to(dtype).requires_grad_()


def call(case, logits, **more):
    k, method, options = CASES[case]
    config = MoeConfig(logits.shape[1], k, method)
    return route(logits, config, **options, **more)


def plain(case, logits, found):
    """The weights by torch's own formula, of the choice that was found."""
    _, method, options = CASES[case]
    sigmoid = options.get("scores") == "sigmoid"
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    scale = options.get("routed_scaling_factor", 1.0)
    if method == "expert_choice":
        return scores.T.gather(1, found.token_indices.long()) * scale
    # The choice before any was dropped, which the weights are renormalised over.
    unlimited = options | {"capacity_factor": math.inf}
    config = MoeConfig(logits.shape[1], CASES[case][0], method)
    chosen = moe_fast.route(logits.detach().numpy(), config, **unlimited).expert_indices
    weights = scores.gather(1, torch.from_numpy(chosen).long())
    if method == "top_k" and options.get("norm_topk_prob", True):
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if sigmoid else 0))
    return torch.where(found.expert_indices >= 0, weights, 0.0) * scale


@every_case
def test_the_gradient_of_weights_is_their_slope(case):
    assert torch.autograd.gradcheck(lambda z: call(case, z).weights, make_logits())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", DIFFERENT_LOSSES)
def test_the_gradient_of_a_loss_is_its_slope(case, loss):
    # The step is large because statistics are kept in units of 2^-32.
    torch.autograd.gradcheck(lambda z: getattr(call(case, z), loss)(0.7), make_logits(), eps=1e-4)


@pytest.mark.parametrize("case", DIFFERENT_LOSSES)
def test_the_gradient_of_the_pooled_loss_is_its_slope(case):
    torch.autograd.gradcheck(
        lambda *z: huggingface_load_balancing_loss([call(case, layer) for layer in z]),
        (make_logits(seed=1), make_logits(seed=2, tokens=9)),
        eps=1e-4,
    )


@every_case
@pytest.mark.parametrize("experts", [8, 48])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_and_gradients_are_those_of_the_plain_formula(case, experts, dtype):
    if "selection_bias" in CASES[case][2] and experts != 8:
        experts = 8
    logits = make_logits(dtype, tokens=64, experts=experts)
    found = call(case, logits)
    expected = plain(case, logits, found)
    torch.testing.assert_close(found.weights, expected)
    given = torch.randn(expected.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    (result,) = torch.autograd.grad(found.weights, logits, given)
    (slope,) = torch.autograd.grad(expected, logits, given)
    torch.testing.assert_close(result, slope)


@every_case
def test_the_routing_is_that_of_arrays(case):
    k, method, options = CASES[case]
    logits = make_logits(torch.float32, tokens=50)
    found = call(case, logits)
    expected = moe_fast.route(logits.detach().numpy(), MoeConfig(8, k, method), **options)
    assert found.routing.weights.tobytes() == expected.weights.tobytes()
    assert found.weights.detach().numpy().tobytes() == expected.weights.tobytes()
    for name in ("tokens_per_expert", "offsets", "permutation", "inverse_permutation"):
        np.testing.assert_array_equal(getattr(found, name).numpy(), getattr(expected, name))
    name = "token_indices" if method == "expert_choice" else "expert_indices"
    assert getattr(found, name).tolist() == getattr(expected, name).tolist()
    assert found.routing.num_dropped == expected.num_dropped
    assert found.routing.capacity == expected.capacity
    assert repr(found) == repr(expected).replace("Routing", "RoutingTensors")


@every_case
def test_losses_are_those_of_statistics(case):
    k, method, options = CASES[case]
    layers = [make_logits(seed=seed, tokens=50) for seed in (1, 2)]
    found = [call(case, logits) for logits in layers]
    stats = RoutingStats(MoeConfig(8, k, method), 2, **options)
    for layer, logits in enumerate(layers):
        stats.update(logits.detach().numpy(), layer)
    for loss in LOSSES:
        result = [getattr(routing, loss)(0.5).item() for routing in found]
        np.testing.assert_allclose(result, getattr(stats, loss)(0.5), rtol=1e-9, atol=1e-12)
    pooled = huggingface_load_balancing_loss(found, 0.5).item()
    assert pooled == pytest.approx(stats.huggingface_load_balancing_loss(0.5), rel=1e-12)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_losses_are_the_plain_formulas(scores):
    logits = make_logits(tokens=40)
    found = route(logits, MoeConfig(8, 2), scores=scores)
    p = logits.softmax(-1)
    if scores == "sigmoid":
        p = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    f = torch.bincount(found.expert_indices.flatten(), minlength=8).double() / 80
    weights = p.gather(1, found.expert_indices.long())
    weights = weights / weights.sum(-1, keepdim=True)
    importance = torch.zeros(40, 8).double().scatter(1, found.expert_indices.long(), weights).sum(0)
    expected = {
        "load_balancing_loss": 8 * (f * p.mean(0)).sum(),
        "z_loss": logits.logsumexp(-1).square().mean(),
        "importance_loss": importance.var(correction=0) / importance.mean().square(),
    }
    for name, loss in expected.items():
        result = getattr(found, name)()
        torch.testing.assert_close(result, loss, rtol=1e-8, atol=1e-10)
        (gradient,) = torch.autograd.grad(result, logits, retain_graph=True)
        (slope,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nothing_is_copied(dtype, monkeypatch):
    wide = torch.randn(20, 12).to(dtype)
    logits = wide[:, :8].requires_grad_()
    seen = []
    plain_call = Router.__call__

    def watched(router, array, **options):
        seen.append(array)
        return plain_call(router, array, **options)

    monkeypatch.setattr(Router, "__call__", watched)
    found = route(logits, MoeConfig(8))
    (array,) = seen
    assert array.ctypes.data == logits.data_ptr() == wide.data_ptr()
    assert array.strides == (12 * logits.element_size(), logits.element_size())
    names = ["tokens_per_expert", "offsets", "permutation", "expert_indices", "weights"]
    for name in names:
        assert getattr(found, name).data_ptr() == getattr(found.routing, name).ctypes.data


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_computed_with_in_float32(case, dtype):
    """Rounded once, at the end: weights have the bits of the same logits in float32."""
    logits = make_logits(dtype)
    same = logits.detach().float().requires_grad_()
    one, other = call(case, logits), call(case, same)
    assert one.weights.dtype == torch.float32
    assert torch.equal(one.weights, other.weights)
    given = torch.randn(one.weights.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(one.weights, logits, given)
    (expected,) = torch.autograd.grad(other.weights, same, given)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, expected.to(dtype))
    losses = (
        one.load_balancing_loss() + one.z_loss(),
        other.load_balancing_loss() + other.z_loss(),
    )
    assert torch.equal(*losses)


@every_case
@pytest.mark.parametrize("experts", [8, 264])
def test_threads_leave_the_bits_alone(case, experts, monkeypatch):
    if "selection_bias" in CASES[case][2]:
        experts = 8
    logits = make_logits(torch.float32, tokens=500, experts=experts)

    def bits(threads):
        found = call(case, logits, threads=threads)
        loss = found.weights.square().sum() + found.load_balancing_loss() + found.z_loss()
        (gradient,) = torch.autograd.grad(loss, logits)
        return found.weights.detach().numpy().tobytes(), gradient.numpy().tobytes()

    expected = bits(1)
    monkeypatch.setattr(choose, "LOGITS_PER_THREAD", 0)
    assert bits(2) == expected
    assert bits(3) == expected


@every_case
def test_a_router_in_place_of_its_configuration(case):
    k, method, options = CASES[case]
    logits = make_logits()
    router = Router(MoeConfig(8, k, method), **options)
    one, other = route(logits, router), call(case, logits)
    assert one.routing == other.routing
    assert torch.equal(one.weights, other.weights)
    assert torch.equal(one.load_balancing_loss(), other.load_balancing_loss())
    with pytest.raises(MoeConfigError, match="sorted is an option of the router that is given"):
        route(logits, router, sorted=True)


def test_without_gradients():
    logits = torch.randn(10, 8)
    assert not route(logits, MoeConfig(8)).weights.requires_grad
    assert not route(logits, MoeConfig(8)).load_balancing_loss().requires_grad
    with torch.no_grad():
        found = route(logits.clone().requires_grad_(), MoeConfig(8))
    assert not found.weights.requires_grad
    with torch.inference_mode():
        assert route(logits.clone(), MoeConfig(8)).weights.shape == (10, 2)
    found = route(logits.clone().requires_grad_(), MoeConfig(8))
    assert not found.expert_indices.requires_grad
    assert found.weights.requires_grad


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", DIFFERENT_LOSSES)
def test_a_loss_that_is_added_to_in_place_changes_no_other(case, loss):
    routing = call(case, make_logits())
    first, before = getattr(routing, loss)(), getattr(routing, loss)().item()
    first += 1.0
    assert getattr(routing, loss)().item() == before


def test_no_capacity_has_a_z_loss_with_a_gradient():
    logits = make_logits()
    routing = route(logits, MoeConfig(8, 2, "expert_choice"), capacity_factor=0.0)
    (result,) = torch.autograd.grad(routing.z_loss(), logits)
    (expected,) = torch.autograd.grad(logits.logsumexp(-1).square().mean(), logits)
    torch.testing.assert_close(result, expected)


def test_differentiable_once():
    logits = make_logits()
    found = route(logits, MoeConfig(8))
    for value in (found.weights.sum(), found.load_balancing_loss(), found.z_loss()):
        with pytest.raises(NotImplementedError, match="none themselves: create_graph must be Fal"):
            torch.autograd.grad(value, logits, create_graph=True)


def test_logits_changed_before_the_gradient_are_noticed():
    logits = make_logits()
    hidden = logits * 1
    weights = route(hidden, MoeConfig(8)).weights
    hidden += 1
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        weights.sum().backward()


def test_losses_have_gradients_after_that_of_the_weights():
    """What the gradient of a loss needs is not freed with what that of the weights needed."""
    logits = make_logits()
    found = route(logits, MoeConfig(8))
    found.weights.square().sum().backward()
    (found.load_balancing_loss() + found.z_loss()).backward()
    again = route(logits, MoeConfig(8))
    total = again.weights.square().sum() + again.load_balancing_loss() + again.z_loss()
    (expected,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(logits.grad, expected)


def test_a_few_steps_balance_a_router():
    """A router that sends all to two experts learns not to, by its balancing loss alone."""
    torch.manual_seed(0)
    hidden = torch.randn(400, 16) + 1
    router = torch.nn.Linear(16, 8, bias=False)
    with torch.no_grad():
        router.weight[:2] += 0.5
    optimizer = torch.optim.Adam(router.parameters(), 0.02)
    variation = []
    for _ in range(60):
        found = route(router(hidden), MoeConfig(8))
        loss = found.load_balancing_loss() + found.z_loss(1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        load = found.tokens_per_expert.double()
        variation.append((load.std() / load.mean()).item())
    assert variation[0] > 1.5
    assert variation[-1] < 0.3


def test_a_router_learns_through_its_weights():
    """Experts that scale by their own factor: the loss finds the one that every token needs."""
    torch.manual_seed(0)
    hidden = torch.randn(200, 8)
    kind = hidden[:, 0] > 0
    factor = torch.tensor([1.0, -1.0, 3.0, -3.0])
    router = torch.nn.Linear(8, 4)
    optimizer = torch.optim.Adam(router.parameters(), 0.05)
    target = torch.where(kind, 1.0, -1.0)
    losses = []
    for _ in range(80):
        found = route(router(hidden), MoeConfig(4))
        output = (factor[found.expert_indices.long()] * found.weights).sum(1)
        loss = (output - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


LOGITS = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (
            TypeError,
            "logits must be a torch.Tensor, got ndarray; moe_fast.route takes arrays",
            lambda: route(np.zeros((3, 4)), MoeConfig(4)),
        ),
        (
            RoutingError,
            r"logits must be on the CPU, got a tensor on meta; use logits.cpu\(\)",
            lambda: route(LOGITS.to("meta"), MoeConfig(4)),
        ),
        (
            TypeError,
            r"logits must be dense, got torch.sparse_coo; logits.to_dense\(\) is",
            lambda: route(LOGITS.to_sparse(), MoeConfig(4)),
        ),
        (
            TypeError,
            "logits must be float32, float64, bfloat16 or float16, got int64",
            lambda: route(LOGITS.long(), MoeConfig(4)),
        ),
        (RoutingError, r"got \(3, 4\)", lambda: route(LOGITS, MoeConfig(5))),
        (
            RoutingError,
            "logits of token 1 hold a NaN",
            lambda: route(torch.tensor([[1.0, 2], [3, torch.nan]]), MoeConfig(2)),
        ),
        (TypeError, "config must be a MoeConfig, got 4", lambda: route(LOGITS, 4)),
        (
            TypeError,
            "unexpected keyword argument 'score'",
            lambda: route(LOGITS, MoeConfig(4), score="sigmoid"),
        ),
        (
            RoutingError,
            "selection_bias must be on the CPU",
            lambda: route(LOGITS, MoeConfig(4), selection_bias=torch.zeros(4, device="meta")),
        ),
        (
            MoeConfigError,
            r"same number of experts, got routings to \[2, 4\]",
            lambda: huggingface_load_balancing_loss(
                [route(LOGITS, MoeConfig(4)), route(LOGITS[:, :2], MoeConfig(2))]
            ),
        ),
        (
            MoeConfigError,
            r"same number of experts, got routings to \[\]",
            lambda: huggingface_load_balancing_loss([]),
        ),
    ],
    ids=lambda value: None,
)
def test_bad_arguments_are_named(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_a_bias_may_be_a_tensor():
    logits = make_logits(torch.float32)
    bias = torch.nn.Parameter(torch.linspace(-1, 1, 8).bfloat16())
    found = route(logits, MoeConfig(8), scores="sigmoid", selection_bias=bias)
    expected = moe_fast.route(
        logits.detach().numpy(),
        MoeConfig(8),
        scores="sigmoid",
        selection_bias=bias.detach().float().numpy().astype(ml_dtypes.bfloat16),
    )
    assert found.expert_indices.tolist() == expected.expert_indices.tolist()
    found.weights.sum().backward()
    assert bias.grad is None
