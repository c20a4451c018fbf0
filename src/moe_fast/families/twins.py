"""Pairs of families whose blocks nobody else has: hybrids, latent attention, parallel blocks.

The dense one says which tensors its layers have; the MoE takes all but the FFN over as they are,
names and keys alike, and puts its experts where the FFN was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_fast.dtypes import DTYPE_NAMES
from moe_fast.errors import CheckpointError
from moe_fast.families.config import Rope, Sizes
from moe_fast.families.dense import QKVO, DenseFamily
from moe_fast.families.moe import MoeFamily, Parts
from moe_fast.storage.strict_json import brief

Shapes = dict[str, tuple[int, ...]]
LATENT = "latent attention"
# Keys of a dense config.json that say nothing of an MoE made of it.
NOT_KEPT = (
    *("architectures", "model_type", "auto_map", "transformers_version"),
    *("dtype", "torch_dtype", "quantization_config"),
)


class OwnBlocks(DenseFamily):
    """A dense family of blocks that only one MoE family has too."""

    def read_rope(self, config: Mapping[str, Any], sizes: Sizes, file: Path) -> Rope:
        """Whatever it is, the MoE has the same; two sources are compared by it."""
        found = config.get("rope_parameters") or config.get("rope_scaling")
        return Rope(0.0, {"as it is": found, "theta": config.get("rope_theta")})


class Twin(MoeFamily):
    """An MoE of the blocks of its dense twin."""

    dropped: tuple[str, ...] = ()
    """Keys of the dense twin that the MoE does not read."""

    def config(self, parts: Parts) -> dict[str, Any]:
        base, dtype = parts.base, DTYPE_NAMES[parts.dtype]
        kept = {k: v for k, v in base.config.items() if k not in (*NOT_KEPT, *self.dropped)}
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            **kept,
            **self.own_config(parts),
            "output_router_logits": False,
            "dtype": dtype,
            "torch_dtype": dtype,
        }


def read_kinds(
    config: Mapping[str, Any], sizes: Sizes, default: Sequence[str], spellings: Mapping[str, str]
) -> list[str]:
    """What each layer is, by `layer_types`, under the names that `spellings` maps others to.

    Raises
    ------
    CheckpointError
        For a list of another length, and for kinds that the family does not have.
    """
    listed = config["layer_types"]
    kinds = list(default) if listed is None else listed
    if isinstance(kinds, list):
        kinds = [spellings.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    known = set(spellings.values())
    if not isinstance(kinds, list) or len(kinds) != sizes.num_hidden_layers or set(kinds) - known:
        raise CheckpointError(
            f"layer_types is {brief(listed)}; it must list {sizes.num_hidden_layers} of "
            f"{', '.join(sorted(known))}",
            file="config.json",
        )
    return kinds


def attention_shapes(
    sizes: Sizes,
    *,
    names: Sequence[str] = QKVO,
    bias: bool = False,
    norms: Sequence[str] = (),
    query_factor: int = 1,
) -> Shapes:
    """Plain attention: its projections, and norms over each head's queries and keys."""
    hidden, queries = sizes.hidden_size, sizes.num_attention_heads * sizes.head_dim
    keys = sizes.num_key_value_heads * sizes.head_dim
    shapes = dict(
        zip(
            names,
            ((queries * query_factor, hidden), (keys, hidden), (keys, hidden), (hidden, queries)),
            strict=True,
        )
    )
    found: Shapes = {f"self_attn.{name}.weight": shape for name, shape in shapes.items()}
    if bias:
        found |= {f"self_attn.{name}.bias": shape[:1] for name, shape in shapes.items()}
    return found | {f"self_attn.{norm}.weight": (sizes.head_dim,) for norm in norms}
