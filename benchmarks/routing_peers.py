"""What people call to route on a CPU: torch, NumPy and onnxruntime, each as fast as it goes.

Every function makes a call from float32 logits to what the row compares; torch and onnxruntime use
one thread. What is not installed makes none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Call = Callable[[Logits], Any]


def transformers_router(num_experts: int, k: int) -> Iterator[tuple[str, Call]]:
    """The router of transformers' Mixtral and Qwen3-MoE, then the sort and the counts.

    Gives weights, indices, tokens per expert, offsets and the permutation.
    """
    try:
        torch = one_thread_torch()
    except ImportError:
        return

    def call(logits: Logits) -> Any:
        probabilities = torch.nn.functional.softmax(
            torch.from_numpy(logits), dim=-1, dtype=torch.float
        )
        weights, indices = torch.topk(probabilities, k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        flat = indices.view(-1)
        counts = torch.bincount(flat, minlength=num_experts)
        return weights, indices, counts, offsets(torch, counts), torch.argsort(flat, stable=True)

    yield "transformers' router, sort and counts", call


def top_k(num_experts: int, k: int) -> Iterator[tuple[str, Call]]:
    """Renormalised weights and indices, best first: the softmax of the k largest logits."""
    try:
        torch = one_thread_torch()

        def by_torch(logits: Logits) -> Any:
            values, indices = torch.topk(torch.from_numpy(logits), k, dim=-1)
            return torch.softmax(values, dim=-1), indices

        yield "torch", by_torch
    except ImportError:
        pass

    def by_numpy(logits: Logits) -> Any:
        chosen = np.argpartition(logits, -k, axis=1)[:, -k:]
        values = np.take_along_axis(logits, chosen, axis=1)
        order = np.argsort(-values, axis=1)
        values = np.take_along_axis(values, order, axis=1)
        weights = np.exp(values - values[:, :1])
        weights /= weights.sum(axis=1, keepdims=True)
        return weights, np.take_along_axis(chosen, order, axis=1)

    yield "NumPy", by_numpy
    try:
        session = onnx_session(k)
    except ImportError:
        return
    yield "onnxruntime", lambda logits: session.run(None, {"logits": logits})


def switch(num_experts: int, capacity_factor: float) -> Iterator[tuple[str, Call]]:
    """Switch with capacity: weights and indices after the drop, and the kept permutation."""
    try:
        torch = one_thread_torch()
    except ImportError:
        return

    def call(logits: Logits) -> Any:
        z = torch.from_numpy(logits)
        largest, indices = z.max(dim=-1)
        weights = torch.exp(largest - torch.logsumexp(z, dim=-1))
        capacity = math.ceil(len(logits) / num_experts * capacity_factor)
        by_expert, permutation = torch.sort(indices, stable=True)
        counts = torch.bincount(indices, minlength=num_experts)
        place = torch.arange(len(logits)) - offsets(torch, counts)[by_expert]
        kept = place < capacity
        dropped = permutation[~kept]
        indices[dropped] = -1
        weights[dropped] = 0
        return weights, indices, permutation[kept]

    yield "torch, tuned", call


def expert_choice(num_experts: int, capacity: int) -> Iterator[tuple[str, Call]]:
    """Each expert's `capacity` best tokens in any order, and their scores."""
    try:
        torch = one_thread_torch()
    except ImportError:
        return

    def call(logits: Logits) -> Any:
        scores = torch.softmax(torch.from_numpy(logits), dim=-1)
        return torch.topk(scores.t().contiguous(), capacity, dim=-1, sorted=False)

    yield "torch, transposed top-k", call


def one_thread_torch() -> Any:
    import torch

    torch.set_num_threads(1)
    return torch


def offsets(torch: Any, counts: Any) -> Any:
    result = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=result[1:])
    return result


def onnx_session(k: int) -> Any:
    import onnxruntime
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [
            helper.make_node("TopK", ["logits", "k"], ["values", "indices"], axis=-1),
            helper.make_node("Softmax", ["values"], ["weights"], axis=-1),
        ],
        "router",
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [None, None])],
        [
            helper.make_tensor_value_info("weights", TensorProto.FLOAT, [None, None]),
            helper.make_tensor_value_info("indices", TensorProto.INT64, [None, None]),
        ],
        [helper.make_tensor("k", TensorProto.INT64, [1], [k])],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
