"""Routers from prompts: what each expert is for, as a direction that its tokens point in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from moe_fast.calibration.activations import embeddings, visit_router_inputs
from moe_fast.calibration.tokenizer import PromptTokenizer
from moe_fast.errors import CheckpointError
from moe_fast.families.dense import DenseModel
from moe_fast.records import dataclass
from moe_fast.request import ExpertSource, RouterMethod

Vector = npt.NDArray[np.float64]
MOST_KEPT = 2**24  # numbers of hidden states
SMALLEST_NORM = 1e-8  # what is shorter is divided by this, as in mergekit-moe


@dataclass(frozen=True)
class PromptRows:
    """Routers made from prompts.

    `weights` are `(num_layers, num_experts, hidden_size)`, the shared expert last. `hidden_states`,
    where they are known, are what the routers will read of some of the prompts' tokens,
    `(num_layers, T, hidden_size)`.
    """

    weights: npt.NDArray[np.float32]
    hidden_states: npt.NDArray[np.float32] | None = None


def make_prompt_rows(
    method: RouterMethod,
    base: DenseModel,
    experts: Sequence[ExpertSource],
    shared: Sequence[ExpertSource] = (),
) -> PromptRows:
    """Routers from the prompts of the experts, in the order of the experts.

    A shared expert gets a row as the others do: what its gate multiplies with.

    `"cheap_embed"`: the embeddings of all tokens of all prompts of an expert are added up and
    divided by their norm; from this, the same of its negative prompts is subtracted. Every layer is
    alike.

    `"hidden"`: what the layer's router reads of a prompt's tokens is averaged, and these averages
    over an expert's prompts; from this, the same of its negative prompts is subtracted.

    In both, the difference is divided by its norm. Prompts start with the tokenizer's beginning of
    text where it has one, which `"hidden"` leaves out of the average.

    Raises
    ------
    CheckpointError
        A tokenizer or a model that does not fit, a prompt without tokens, or an expert whose
        negative prompts cancel its positive ones.
    ModuleNotFoundError
        Without tokenizers; for `"hidden"`, without transformers or torch.
    """
    names = [*(f"expert {number}" for number in range(len(experts))), *["the shared expert"]]
    experts = [*experts, *shared]
    for name, expert in zip(names, experts, strict=False):
        if not expert.positive_prompts:
            raise CheckpointError(f"{name} has no positive_prompts, which routers={method!r} need")
    tokenizer = PromptTokenizer(base.path)
    prompts = dict.fromkeys(p for e in experts for p in (*e.positive_prompts, *e.negative_prompts))
    tokens = {prompt: tokenizer.tokens(prompt) for prompt in prompts}
    first = 1 if tokenizer.start and method == "hidden" else 0
    for prompt, found in tokens.items():
        if len(found) <= first:
            raise CheckpointError(f"finds no token in the prompt {prompt!r}", file=tokenizer.file)
    if method == "cheap_embed":
        rows = make_embedding_rows(base, experts, tokens)
    else:
        rows = make_hidden_rows(base, experts, tokens, first)
    for layer, number in np.argwhere(np.linalg.norm(rows.weights, axis=2) < 0.5).tolist():
        raise CheckpointError(
            f"{names[number]}: its negative prompts cancel its positive ones in layer {layer}, "
            "so that no direction is left for its router"
        )
    return rows


def make_embedding_rows(
    base: DenseModel, experts: Sequence[ExpertSource], tokens: Mapping[str, Sequence[int]]
) -> PromptRows:
    def direction(prompts: Sequence[str]) -> Vector:
        found = sorted(token for prompt in prompts for token in tokens[prompt])
        total = np.zeros(base.sizes.hidden_size)
        for embedding in embeddings(base, found) if found else ():
            total += embedding
        return normalised(total)

    rows = [
        normalised(direction(e.positive_prompts) - direction(e.negative_prompts)) for e in experts
    ]
    shape = (base.sizes.num_hidden_layers, len(rows), base.sizes.hidden_size)
    return PromptRows(np.broadcast_to(np.array(rows, np.float32), shape))


def make_hidden_rows(
    base: DenseModel,
    experts: Sequence[ExpertSource],
    tokens: Mapping[str, Sequence[int]],
    first: int,
) -> PromptRows:
    num_layers, hidden_size = base.sizes.num_hidden_layers, base.sizes.hidden_size
    means = {prompt: np.zeros((num_layers, hidden_size)) for prompt in tokens}
    prompts = list(tokens)
    count = sum(len(found) - first for found in tokens.values())
    step = -(-count * num_layers * hidden_size // MOST_KEPT)
    kept: list[list[npt.NDArray[np.float32]]] = [[] for _ in range(num_layers)]

    def read(layer: int, number: int, inputs: npt.NDArray[np.float32]) -> None:
        means[prompts[number]][layer] = inputs[first:].mean(axis=0, dtype=np.float64)
        kept[layer].append(inputs[first::step].copy())

    visit_router_inputs(base, list(tokens.values()), read)

    def mean(prompts: Sequence[str]) -> Vector:
        total = np.zeros((num_layers, hidden_size))
        for prompt in prompts:
            total += means[prompt]
        return total / max(1, len(prompts))

    gates = [mean(e.positive_prompts) - mean(e.negative_prompts) for e in experts]
    weights = np.array([[normalised(layer) for layer in gate] for gate in gates], np.float32)
    read_by = [np.concatenate(k) if k else None for k in kept]
    nothing = np.zeros_like(next(found for found in read_by if found is not None))
    states = [nothing if found is None else found for found in read_by]  # no FFN, no router
    return PromptRows(weights.swapaxes(0, 1), np.stack(states))


def normalised(vector: Vector) -> Vector:
    """The vector divided by its norm, of whose sum the order does not matter."""
    norm = math.sqrt(math.fsum((vector * vector).tolist()))
    return vector / max(norm, SMALLEST_NORM)
