"""What was asked for: everything that decides the bytes of an output, and nothing else.

The output's manifest keeps the request as JSON. Whoever reads it back gets the same table of pieces
from it, so `check_moe` compares an output with what the builder would write today.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from moe_fast.config import Dtype, GateMode, Layout, MoeConfig, RouterInit
from moe_fast.errors import MoeConfigError, as_index, as_number

ModelPath = str | os.PathLike[str]


@dataclass(frozen=True)
class ExpertSource:
    """Where experts come from, and what happens to their weights on the way.

    Parameters
    ----------
    model : path or str
        The folder of a dense model, or the name of a repository on the Hugging Face Hub.
    noise_scale : float
        Standard deviation of the normal noise that is added to each weight; every expert gets noise
        of its own.
    residual_scale : float
        What the expert's output is multiplied by: the factor of its `down_proj`.
    source_layers : sequence of int, optional
        The model's layer that each layer of the output takes its expert from; by default the same.
    positive_prompts, negative_prompts : sequence of str
        What the experts are for, and not for, where routers are made from prompts.

    Raises
    ------
    TypeError, MoeConfigError
        A value of the wrong kind or out of range.

    Examples
    --------
    >>> from moe_fast import ExpertSource
    >>> ExpertSource("model", noise_scale=0.01).residual_scale
    1.0
    """

    model: str
    noise_scale: float = 0.0
    residual_scale: float = 1.0
    source_layers: tuple[int, ...] | None = None
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", os.fspath(self.model))
        for name in ("noise_scale", "residual_scale"):
            number = as_number(getattr(self, name), name)
            if not math.isfinite(number):
                raise MoeConfigError(f"{name} must be finite, got {number}")
            object.__setattr__(self, name, number)
        if self.noise_scale < 0:
            raise MoeConfigError(f"noise_scale must be at least 0, got {self.noise_scale}")
        if self.source_layers is not None:
            if not isinstance(self.source_layers, Iterable):
                raise TypeError(f"source_layers must list layers, got {self.source_layers!r}")
            layers = tuple(as_index(layer, "source_layers") for layer in self.source_layers)
            object.__setattr__(self, "source_layers", layers)
        for name in ("positive_prompts", "negative_prompts"):
            prompts = getattr(self, name)
            if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
                raise TypeError(f"{name} must list strings, got {prompts!r}")
            object.__setattr__(self, name, tuple(prompts))


@dataclass(frozen=True)
class BuildRequest:
    """One MoE to build, in plain values: strings, numbers, tuples, enumerations, dataclasses.

    Expert `e` is made as `models[e % len(models)]` says; `base` is a folder. Routers start by
    `gate_mode` where there is one, else by `router_init`. `seed` is that of noise and of random
    gates. `dense_layers` have the base's FFN in place of experts. A new field needs no code here to
    be kept and read back.
    """

    models: tuple[ExpertSource, ...]
    base: str
    config: MoeConfig = field(default_factory=MoeConfig)
    target: str = "auto"
    layout: Layout | None = None
    dtype: Dtype | None = None
    shared_experts: tuple[ExpertSource, ...] = ()
    dense_layers: tuple[int, ...] = ()
    router_init: RouterInit = RouterInit.BALANCED
    gate_mode: GateMode | None = None
    seed: int = 0
    max_shard_size: int = 5_000_000_000

    def folders(self) -> list[str]:
        """Every model that it names, once, in order."""
        experts = (*self.models, *self.shared_experts)
        return list(dict.fromkeys([*(expert.model for expert in experts), self.base]))

    def moved(self, now: Mapping[str, str]) -> BuildRequest:
        """The same of models that are elsewhere `now`."""
        return replace(
            self,
            models=tuple(replace(e, model=now[e.model]) for e in self.models),
            shared_experts=tuple(replace(e, model=now[e.model]) for e in self.shared_experts),
            base=now[self.base],
        )


@dataclass(frozen=True)
class ConvertRequest:
    """One MoE to write in another layout or dtype; `model` is a folder."""

    model: str
    layout: Layout | None = None
    dtype: Dtype | None = None
    max_shard_size: int = 5_000_000_000

    def folders(self) -> list[str]:
        """Every model that it names."""
        return [self.model]

    def moved(self, now: Mapping[str, str]) -> ConvertRequest:
        """The same of a model that is elsewhere `now`."""
        return replace(self, model=now[self.model])
