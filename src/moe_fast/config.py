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
    """How tokens find experts."""

    TOP_K = "top_k"
    """Each token takes its k best experts (Shazeer et al. 2017)."""
    SWITCH_TRANSFORMER = "switch_transformer"
    """Each token takes one expert, up to the expert's capacity (Fedus et al. 2022)."""
    EXPERT_CHOICE = "expert_choice"
    """Each expert takes its best tokens (Zhou et al. 2022)."""


class RouterInit(StrEnum):
    """How router weights start, before any training."""

    RANDOM = "random"
    """Draws in `[-scale, 0]` with `scale = 1 / sqrt(hidden_dim)`."""
    UNIFORM = "uniform"
    """`1 / num_experts` everywhere: every logit of a token ties."""
    BALANCED = "balanced"
    """`1 / num_experts` plus noise of at most `0.01 / sqrt(hidden_dim)`."""


class Layout(StrEnum):
    """How a checkpoint stores the experts of a layer."""

    PER_EXPERT = "per-expert"
    """Every matrix of every expert in a tensor of its own."""
    FUSED = "fused"
    """One tensor for gate and up of all experts, one for down."""


class Dtype(StrEnum):
    """What weights can be converted to on their way."""

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
        Experts that each token is sent to, from 1 to `num_experts`. By default 2, or in builds with
        a `granularity` the experts of one whole copy.
    routing_method : RoutingMethod or str
        `"top_k"`, `"switch_transformer"` or `"expert_choice"`.
    gate_hidden_dim : int, optional
        Width of the router's input where it differs from the model's hidden size.

    Raises
    ------
    TypeError
        On creation: an argument that is not an integer, or a method that is not a string.
    MoeConfigError
        On creation for an unknown method; in `validate` for numbers out of range.

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
        """The configuration in plain values, as JSON has them."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "routing_method": str(self.routing_method)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoeConfig:
        """The configuration that `to_dict` gave.

        Raises
        ------
        MoeConfigError
            A key that is unknown, or a value of another type: the message names it.

        Examples
        --------
        >>> from moe_fast import MoeConfig
        >>> MoeConfig.from_dict({"num_experts": 4, "routing_method": "top_k"}).num_experts
        4
        """
        config: MoeConfig = typed(dict(values), cls, cls.__name__)
        return config

    def with_granularity(self, granularity: int) -> MoeConfig:
        """The same for experts split in so many: a token takes one whole copy, if nobody said."""
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
