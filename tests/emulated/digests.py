"""Digests of what the kernels compute, to compare between processors: one line for each kernel.

Inputs are integers of a bit generator divided by powers of 2, which are the same everywhere.
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np

from moe_fast import MoeConfig, RoutingStats, compute_gate_weights, kernels, route

NUM_EXPERTS = (1, 2, 3, 4, 8, 16, 17, 32, 60, 64, 128, 160, 256)
PER_TOKEN = (1, 2, 3, 4, 6, 8, 9, 16)
FINENESS = (1, 64, 2**20)  # of the logits: many ties, some, hardly any
TOKENS = 37


def digest(*arrays: object) -> str:
    sha = hashlib.sha256()
    for array in arrays:
        array = np.asarray(array)
        sha.update(f"{array.dtype.str} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()[:16]


def logits(num_experts: int, dtype: str, fineness: int, tokens: int = TOKENS):
    random = np.random.default_rng([num_experts, fineness])
    values = random.integers(-8 * fineness, 8 * fineness, (tokens, num_experts)) / fineness
    return values.astype(dtype)


def gates():
    for dtype, init, hidden in itertools.product(
        ("float64", "float32", "float16"), ("balanced", "random", "uniform"), (5, 64, 129)
    ):
        for num_experts in (3, 8, 64):
            yield compute_gate_weights(hidden, num_experts, init, dtype=dtype, layer=3)
            yield compute_gate_weights(hidden, num_experts, init, dtype=dtype, full_range=True)


def bfloat16():
    out = np.empty(5000, np.uint16)
    for begin in (0, 1, 7):
        kernels.compiled.fill_bfloat16(
            out, begin, 5000 - begin, 50, 100, 42, 0, 5000, 100, 1, False, 0.0, 0.02, False
        )
        yield out[begin : 5000 - begin]


def normals():
    for scale in (1.0, 0.02):
        out = np.empty(20_003, np.float32)
        kernels.compiled.fill_normal(out, 0, len(out), 7, 11, scale)
        yield out


def conversions():
    words = np.random.default_rng(1).integers(0, 2**32, 20_003, np.uint64).astype(np.uint32)
    halves = words.astype(np.uint16)
    for name in ("float32_to_bfloat16", "float32_to_float16"):
        out = np.empty(len(words), np.uint16)
        yield getattr(kernels.compiled, name)(words, out)
        yield out
    for name in ("bfloat16_to_float16", "float16_to_bfloat16"):
        out = np.empty(len(words), np.uint16)
        yield getattr(kernels.compiled, name)(halves, out)
        yield out
    for name in ("float16_to_float32", "bfloat16_to_float32"):
        out = np.empty(len(words), np.uint32)
        yield getattr(kernels.compiled, name)(halves, out)
        yield out


def choices():
    for num_experts, k, dtype, scores, fineness in itertools.product(
        NUM_EXPERTS, PER_TOKEN, ("float16", "float32", "float64"), ("softmax", "sigmoid"), FINENESS
    ):
        if k <= num_experts:
            x = logits(num_experts, dtype, fineness)
            yield route(x, MoeConfig(num_experts, k), scores=scores)
            yield route(x[:1], MoeConfig(num_experts, k), scores=scores)


def other_choices():
    for num_experts, dtype, fineness in itertools.product(
        NUM_EXPERTS, ("float32", "float64"), FINENESS
    ):
        x = logits(num_experts, dtype, fineness, 500)
        switch = MoeConfig(num_experts, 1, "switch_transformer")
        for policy in ("position", "probs"):
            yield route(x, switch, capacity_factor=1.0, drop_policy=policy)
        yield route(x, MoeConfig(num_experts, min(2, num_experts), "expert_choice"))


def routing_arrays(routings):
    for routing in routings:
        for name in ("expert_indices", "token_indices", "weights", "tokens_per_expert"):
            value = getattr(routing, name, None)
            if value is not None:
                yield value


def statistics():
    for num_experts, dtype, scores in itertools.product(
        NUM_EXPERTS, ("float32", "float64"), ("softmax", "sigmoid")
    ):
        stats = RoutingStats(MoeConfig(num_experts, min(8, num_experts)), scores=scores)
        stats.update(logits(num_experts, dtype, 2**20, 300))
        yield from (stats.load, stats.mean_probabilities, stats.importance, stats.mean_entropy)
        yield stats.z_loss()


def main() -> None:
    for name, arrays in (
        ("gates", gates()),
        ("bfloat16 gates", bfloat16()),
        ("normals", normals()),
        ("conversions", conversions()),
        ("token choice", routing_arrays(choices())),
        ("switch and expert choice", routing_arrays(other_choices())),
        ("statistics", statistics()),
    ):
        every = list(arrays)
        print(f"{name}: {len(every)} arrays, {digest(*every)}")


if __name__ == "__main__":
    main()
