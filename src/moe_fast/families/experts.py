"""The expert axis of a family: every tensor of a checkpoint that counts experts, by its name.

Who prunes, copies or converts experts must take all of these along: each expert's own tensors,
whatever stands behind their names (weights, scales, biases), the tensors that stack the experts of
a layer, and routers with their biases. What is not named here counts no experts: attention, norms,
shared experts, dense layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from moe_fast.config import Layout
from moe_fast.families.dense import FFN
from moe_fast.records import dataclass

GATE_UP_DOWN: Mapping[str, str] = {role: role for role in FFN}
W1_W3_W2: Mapping[str, str] = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
UP_DOWN: Mapping[str, str] = {"up_proj": "up_proj", "down_proj": "down_proj"}
BOTH = (Layout.PER_EXPERT, Layout.FUSED)
# Gate over up, `[E, 2I, H]`, and down, `[E, H, I]`, as transformers 5 has them in memory.
STACKED: Mapping[str, tuple[str, ...]] = {
    "experts.gate_up_proj": ("gate_proj", "up_proj"),
    "experts.down_proj": ("down_proj",),
}
GRANITE_STACKED: Mapping[str, tuple[str, ...]] = {
    "input_linear.weight": ("gate_proj", "up_proj"),
    "output_linear.weight": ("down_proj",),
}
# Tensors whose slices of an expert are one matrix: transposed, or gate and up in turn.
WHOLE: Mapping[str, tuple[str, ...]] = {
    "experts.gate_up_proj": ("gate_up_proj",),
    "experts.down_proj": ("down_proj",),
}
NORMALISED_KEYS = ("norm_topk_prob", "moe_renormalize")
BIAS = "gate.e_score_correction_bias"


@dataclass(frozen=True)
class ExpertAxis:
    """Where the checkpoints of some families count experts; all names are those inside a block.

    Parameters
    ----------
    model_types : tuple of str
        The families, as config.json names them.
    block : str
        The name of the MoE block inside its layer; empty if the layer itself is the block.
    router : str
        The router's weight, `[E, H]`.
    counted : tuple of str
        The other tensors of one number an expert, of shape `[E]` or `[1, E]`: what is added to
        scores, or multiplies an expert's output.
    layouts : tuple of Layout
        How checkpoints of the family store experts.
    parts : mapping
        What each matrix of an expert is called after the expert's number, and its role.
    stacked : mapping
        The tensors that hold all experts of a layer, and what each expert's slice of them holds.
        Others below `experts.` count experts too where their first axis does (scales, biases).
    fused_block, fused_router : str, optional
        The names of block and router where the experts are stacked, if they are others.
    copies_share : str
        Whether copies of an expert that are chosen together have its weight together: `"always"`,
        as after a softmax; `"if normalised"`, where the weights of the chosen experts may be
        divided by their sum and config.json says so; or `"never"`.
    obstacle : str, optional
        Why experts can be looked at and not operated on.
    """

    model_types: tuple[str, ...]
    block: str = "mlp"
    router: str = "gate.weight"
    counted: tuple[str, ...] = ()
    layouts: tuple[Layout, ...] = BOTH
    parts: Mapping[str, str] = field(default_factory=lambda: GATE_UP_DOWN)
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: STACKED)
    fused_block: str | None = None
    fused_router: str | None = None
    copies_share: Literal["always", "if normalised", "never"] = "always"
    obstacle: str | None = None

    def shares_weight(self, config: Mapping[str, Any]) -> bool:
        """Whether copies of an expert that are chosen together have its weight together."""
        if self.copies_share != "if normalised":
            return self.copies_share == "always"
        return any(config.get(key) is True for key in NORMALISED_KEYS)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names that the block has, in one layout or the other."""
        return tuple(dict.fromkeys((self.block, self.fused_block or self.block)))

    @property
    def routers(self) -> tuple[str, ...]:
        """The names that the router has, in one layout or the other."""
        return tuple(dict.fromkeys((self.router, self.fused_router or self.router)))

    @property
    def roles(self) -> tuple[str, ...]:
        """What an expert consists of."""
        if Layout.PER_EXPERT in self.layouts:
            return tuple(self.parts.values())
        return tuple(role for roles in self.stacked.values() for role in roles)

    def renamed(self, name: str, layout: Layout) -> str:
        """A router's name, or that of another tensor of the block, in a layout."""
        if name in self.routers:
            return (self.fused_router or self.router) if layout is Layout.FUSED else self.router
        return name

    def block_in(self, layout: Layout) -> str:
        """The block's name in a layout."""
        if layout is Layout.FUSED and self.fused_block is not None:
            return self.fused_block
        return self.block


def mixtral_like(
    *model_types: str,
    counted: tuple[str, ...] = (),
    fused_router: str | None = None,
    copies_share: Literal["always", "if normalised", "never"] = "always",
) -> ExpertAxis:
    """`block_sparse_moe.experts.0.w1` and so on; stacked, the block is called `mlp`."""
    return ExpertAxis(
        model_types,
        block="block_sparse_moe",
        counted=counted,
        parts=W1_W3_W2,
        fused_block="mlp",
        fused_router=fused_router,
        copies_share=copies_share,
    )
