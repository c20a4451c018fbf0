"""What is to be built: the number of experts, how tokens are routed, how routers start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any, ClassVar, Literal, SupportsIndex

from moe_fast.checks import as_index, as_member
from moe_fast.errors import MoeConfigError
from moe_fast.plain import typed
from moe_fast.wording import brief_number

__all__ = ["Dtype", "Layout", "MoeConfig", "RouterInit", "RoutingMethod"]


RoutingMethodName = Literal["top_k", "switch_transformer", "expert_choice"]
RouterInitName = Literal["random", "uniform", "balanced"]
LayoutName = Literal["per-expert", "fused"]
DtypeName = Literal[
    "float32", "fp32", "f32", "float", "torch.float32",
    "bfloat16", "bf16", "torch.bfloat16",
    "float16", "fp16", "f16", "half", "torch.float16",
]  # fmt: skip


class RoutingMethod(StrEnum):
    """How tokens are assigned to experts.

    `"top_k"`: each token takes its k best experts (Shazeer et al. 2017). `"switch_transformer"`:
    each token takes one expert, up to the expert's capacity (Fedus et al. 2022).
    `"expert_choice"`: each expert takes its best tokens (Zhou et al. 2022).
    """

    TOP_K = "top_k"
    SWITCH_TRANSFORMER = "switch_transformer"
    EXPERT_CHOICE = "expert_choice"


class RouterInit(StrEnum):
    """How router weights are initialised.

    `"random"`: draws from `[-scale, 0]` with `scale = 1 / sqrt(hidden_dim)`. `"uniform"`:
    `1 / num_experts` everywhere, so that all logits of a token are equal. `"balanced"`:
    `1 / num_experts` plus draws from `[-p, 0]` with `p = 0.01 / sqrt(hidden_dim)`.
    """

    RANDOM = "random"
    UNIFORM = "uniform"
    BALANCED = "balanced"


class Layout(StrEnum):
    """How a checkpoint stores the experts of a layer.

    `"per-expert"`: one tensor for each matrix of each expert. `"fused"`: one tensor for the gate
    and up projections of all experts, and one for their down projections.
    """

    PER_EXPERT = "per-expert"
    FUSED = "fused"


class Dtype(StrEnum):
    """A dtype that weights can be converted to: `"float32"`, `"bfloat16"` or `"float16"`.

    Other spellings are understood too: `Dtype("bf16")`, `Dtype("half")`, `Dtype("torch.float16")`.
    """

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @classmethod
    def _missing_(cls, value: object) -> Dtype | None:
        """As libraries write them: `torch.bfloat16`, `bf16`, `FP16`, `half`."""
        return DTYPE_SPELLINGS.get(str(value).lower().removeprefix("torch."))


DTYPE_SPELLINGS = {
    **dict.fromkeys(("float32", "fp32", "f32", "float"), Dtype.FLOAT32),
    **dict.fromkeys(("bfloat16", "bf16"), Dtype.BFLOAT16),
    **dict.fromkeys(("float16", "fp16", "f16", "half"), Dtype.FLOAT16),
}


@dataclass(frozen=True, init=False)
class MoeConfig:
    """Shape of the Mixture-of-Experts layers to construct. Immutable and hashable.

    Parameters
    ----------
    num_experts : int
        Experts per layer, at least 1.
    num_experts_per_tok : int, optional
        Experts per token, from 1 to `num_experts`. By default 2; in builds with a `granularity`,
        as many experts as one whole copy has. `"switch_transformer"` requires 1.
    routing_method : RoutingMethod or str
        `"top_k"`, `"switch_transformer"` or `"expert_choice"`.
    gate_hidden_dim : int, optional
        Width of the router's input where it differs from the model's hidden size.

    Raises
    ------
    TypeError
        On creation, if a number is not an integer or the method is not a string.
    MoeConfigError
        On creation, if the method is unknown; in `validate`, if a number is out of range.

    Examples
    --------
    >>> from moe_fast import MoeConfig
    >>> MoeConfig(num_experts=4).validate()
    >>> MoeConfig(4, routing_method="expert_choice").routing_method
    <RoutingMethod.EXPERT_CHOICE: 'expert_choice'>
    >>> MoeConfig(num_experts=0).validate()
    Traceback (most recent call last):
        ...
    moe_fast.errors.MoeConfigError: num_experts must be at least 1, got 0
    """

    # Defaults here too: what reads a configuration back takes them for keys that are not there.
    num_experts: int = 8
    num_experts_per_tok: int = 2
    routing_method: RoutingMethod = RoutingMethod.TOP_K
    gate_hidden_dim: int | None = None

    says_experts_per_tok: ClassVar[bool]
    """Whether `num_experts_per_tok` was given; no part of the configuration's value."""

    # Written out because it takes more than the fields hold: NumPy integers, a method's string.
    def __init__(
        self,
        num_experts: SupportsIndex = 8,
        num_experts_per_tok: SupportsIndex | None = None,
        routing_method: RoutingMethod | RoutingMethodName = RoutingMethod.TOP_K,
        gate_hidden_dim: SupportsIndex | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "num_experts", as_index(num_experts, "num_experts", minimum=None))
        put(self, "says_experts_per_tok", num_experts_per_tok is not None)
        if num_experts_per_tok is None:
            num_experts_per_tok = type(self).num_experts_per_tok
        put(
            self,
            "num_experts_per_tok",
            as_index(num_experts_per_tok, "num_experts_per_tok", minimum=None),
        )
        put(self, "routing_method", as_member(routing_method, RoutingMethod, "routing_method"))
        if gate_hidden_dim is not None:
            gate_hidden_dim = as_index(gate_hidden_dim, "gate_hidden_dim", minimum=None)
        put(self, "gate_hidden_dim", gate_hidden_dim)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values that JSON can hold."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "routing_method": str(self.routing_method)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoeConfig:
        """Create a configuration from the result of `to_dict`.

        Raises
        ------
        MoeConfigError
            If a key is unknown or a value has the wrong type; the message names it.

        Examples
        --------
        >>> from moe_fast import MoeConfig
        >>> MoeConfig.from_dict({"num_experts": 4, "routing_method": "top_k"}).num_experts
        4
        """
        config: MoeConfig = typed(dict(values), cls, cls.__name__)
        return config

    def with_granularity(self, granularity: int) -> MoeConfig:
        """Return the configuration with `num_experts_per_tok` set, for FFNs split into experts.

        If it was not given, a token takes `granularity` experts, one whole copy.
        """
        if self.says_experts_per_tok or granularity == 1:
            return self
        return replace(self, num_experts_per_tok=granularity)

    def validate(self) -> None:
        """Raise `MoeConfigError` for the first number that is out of range."""
        as_index(self.num_experts, "num_experts", minimum=1)
        as_index(self.num_experts_per_tok, "num_experts_per_tok", minimum=1)
        if self.num_experts_per_tok > self.num_experts:
            raise MoeConfigError(
                f"must be at most {self.num_experts}, the number of experts, "
                f"got {brief_number(self.num_experts_per_tok)}",
                argument="num_experts_per_tok",
            )
        if self.gate_hidden_dim is not None:
            as_index(self.gate_hidden_dim, "gate_hidden_dim", minimum=1)


def choose_config(
    num_experts: int | None, num_experts_per_tok: int | None, granularity: int = 1
) -> MoeConfig:
    """The configuration of a build that says these numbers, or does not: 8 copies, split."""
    if num_experts is None:
        num_experts = MoeConfig.num_experts * max(1, granularity)
    return MoeConfig(num_experts, num_experts_per_tok).with_granularity(max(1, granularity))
