"""Routing tensors forwards and backwards, as training does, against torch's own operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.measure import Row
from benchmarks.reference import Reference
from moe_fast import MoeConfig

TOKENS = 4096
SIZES = ((8, 2), (64, 8), (256, 8))


def rows(reference: Reference | None) -> Iterator[Row]:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)
    for experts, k in SIZES:
        for normalised in (True, False):
            for losses in (False, True):
                yield row(torch, experts, k, normalised, losses)


def row(torch: Any, experts: int, k: int, normalised: bool, losses: bool) -> Row:
    from moe_fast.torch import route

    config = MoeConfig(experts, k)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, experts, generator=generator, requires_grad=True)
    given = torch.randn(TOKENS, k, generator=generator)

    def ours() -> Any:
        routing = route(logits, config, norm_topk_prob=normalised)
        loss = (routing.weights * given).sum()
        if losses:
            loss = loss + 0.01 * routing.load_balancing_loss() + 0.001 * routing.z_loss()
        return torch.autograd.grad(loss, logits)[0]

    def theirs() -> Any:
        scores = logits.softmax(-1)
        weights, chosen = scores.topk(k)
        if normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        loss = (weights * given).sum()
        if losses:
            load = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
            loss = loss + 0.01 * experts * (load * scores.mean(0)).sum()
            loss = loss + 0.001 * logits.logsumexp(-1).square().mean()
        return torch.autograd.grad(loss, logits)[0]

    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-5)
    work = f"gradients, {TOKENS} × {experts}, k = {k}"
    work += ", renormalised" if normalised else ", over all experts"
    if losses:
        return Row(f"{work}, with losses", ours, "torch", theirs, 4.0)
    return Row(work, ours, "torch", theirs)
