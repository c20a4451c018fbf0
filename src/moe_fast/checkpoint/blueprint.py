"""A request to build as every tensor of its output, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moe_fast.checkpoint.construction import Construction
from moe_fast.checkpoint.header import DTYPE_CODES
from moe_fast.checkpoint.prompt_gates import prompt_gates
from moe_fast.checkpoint.request import BuildRequest, ExpertSource
from moe_fast.checkpoint.source import DenseModel, open_dense_model
from moe_fast.checkpoint.table import OutputTensor
from moe_fast.checkpoint.targets import Target, choose
from moe_fast.config import PROMPT_MODES, RouterInit
from moe_fast.errors import CheckpointError, of_all
from moe_fast.health import RouterHealth, as_hidden_states, router_health
from moe_fast.plan import MoeConstructionPlan, plan_moe_construction
from moe_fast.wording import ranges


@dataclass(frozen=True)
class Blueprint:
    """What a request comes to: every tensor of the output, nothing written."""

    target: Target
    construction: Construction
    tensors: tuple[OutputTensor, ...]
    rejected_targets: Mapping[str, tuple[str, ...]]
    hidden_states: npt.NDArray[np.float32] | None = None
    """What routers made from them will read of the prompts, `(num_layers, T, hidden_size)`."""

    def health(self, request: BuildRequest, given: npt.ArrayLike | None) -> RouterHealth:
        """What the routers would do with given hidden states, else with these or random ones."""
        remedy = "balancing in training helps"
        if request.gate_mode in PROMPT_MODES:
            remedy = "give experts prompts that differ more, and more of them"
        elif request.gate_mode is None and request.router_init is RouterInit.UNIFORM:
            remedy = "routers that start balanced or random tell experts apart"
        layers, states = self.construction.moe_layers, self.hidden_states
        if states is not None and len(layers) < len(states):
            states = states[list(layers)]
        source = "random tokens" if states is None else "tokens of the prompts"
        if given is not None:
            hidden_size = self.construction.base.sizes.hidden_size
            states = as_hidden_states(given, len(layers), hidden_size)
            source = "given tokens"
        return router_health(
            self.construction.routers(),
            states,
            request.config.num_experts_per_tok,
            layers=layers,
            source=source,
            remedy=remedy,
        )


def prepare(request: BuildRequest, gate_digests: Sequence[str] = ()) -> Blueprint:
    """Open the sources of a request and lay out its output.

    From headers alone, unless routers are to be made from prompts. With the digests of such routers
    they are not made again.
    """
    asked = (*request.models, *request.shared_experts)
    sources, base = open_sources([m.model for m in asked], request.base)
    plan = plan_for(request, base.sizes.num_hidden_layers)
    construction = Construction(
        base=base,
        sources=sources[: len(request.models)],
        models=request.models,
        plan=plan,
        config=request.config,
        router_init=request.router_init,
        gate_mode=request.gate_mode,
        seed=request.seed,
        shared_sources=sources[len(request.models) :],
        shared_experts=request.shared_experts,
        dense_layers=request.dense_layers,
        converted_to=None if request.dtype is None else DTYPE_CODES[request.dtype],
    )
    problems = construction.problems()
    try:
        target, rejected = choose(request.target, construction, request.layout)
    except CheckpointError as error:
        problems += error.problems
    if problems:
        raise CheckpointError(*problems)
    hidden_states = None
    if gate_digests:
        layers = len(construction.moe_layers)
        gates = layers * 2 if construction.prompts_of_shared() else layers
        if len(gate_digests) != gates:
            raise CheckpointError(f"gate_sha256 has {len(gate_digests)} digests for {gates} gates")
        construction = replace(construction, gate_digests=gate_digests)
    elif request.gate_mode in PROMPT_MODES:
        experts = [request.models[i] for i in plan.source_model[0]]
        shared = [in_common(request.shared_experts)] if construction.prompts_of_shared() else []
        made = prompt_gates(request.gate_mode, base, experts, shared)
        construction = replace(
            construction,
            gates=made.weights[:, : len(experts)],
            shared_gates=made.weights[:, len(experts) :] if shared else None,
        )
        hidden_states = made.hidden_states
    tensors = tuple(target.tensors(construction, request.layout))
    return Blueprint(target, construction, tensors, rejected, hidden_states)


def in_common(experts: Sequence[ExpertSource]) -> ExpertSource:
    """One expert with the prompts of all."""
    return replace(
        experts[0],
        positive_prompts=tuple(p for expert in experts for p in expert.positive_prompts),
        negative_prompts=tuple(p for expert in experts for p in expert.negative_prompts),
    )


def plan_for(request: BuildRequest, num_layers: int) -> MoeConstructionPlan:
    """Round robin over the models, each from its own source layers."""
    absent = [layer for layer in request.dense_layers if not 0 <= layer < num_layers]
    problems = [
        f"dense_layers: there is no layer {ranges(absent)}, the base model has {num_layers}"
    ] * bool(absent)
    if len({*request.dense_layers}) == num_layers and not problems:
        problems.append("dense_layers: lists every layer; an MoE has experts in one at least")
    problems += [
        f"source_layers of {m.model}: lists {len(m.source_layers)} layers, the output has "
        f"{num_layers}; list one for each"
        for m in (*request.models, *request.shared_experts)
        if m.source_layers is not None and len(m.source_layers) != num_layers
    ]
    if problems:
        raise CheckpointError(*problems)
    plan = plan_moe_construction(len(request.models), num_layers, request.config)
    if all(model.source_layers is None for model in request.models):
        return plan
    layers = np.array([m.source_layers or range(num_layers) for m in request.models])
    return MoeConstructionPlan(
        plan.source_model, layers[plan.source_model[0]].T, num_models=plan.num_models
    )


def open_sources(models: Sequence[str], base: str) -> tuple[list[DenseModel], DenseModel]:
    """The source models and the base, each folder opened once; all their problems at once."""
    opened = of_all(open_dense_model, (*models, base))
    return [opened[model] for model in models], opened[base]
