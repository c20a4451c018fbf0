"""Which MoE family a dense model becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_fast.checks import unknown_choice
from moe_fast.config import Layout
from moe_fast.errors import ArgumentTypeError, CheckpointError, MoeConfigError
from moe_fast.families.dense import DenseFamily
from moe_fast.families.moe import MoeFamily, Parts
from moe_fast.families.registry import moe_families


def by_mergekit(families: Mapping[str, MoeFamily]) -> list[MoeFamily]:
    """As mergekit-moe tries them, and then what it cannot write."""
    order = ("mixtral", "deepseek moe", "qwen moe", "qwen3 moe", None)
    automatic = [family for family in families.values() if family.auto_rank is not None]
    return sorted(automatic, key=lambda family: order.index(family.mergekit_name))


# Several targets under one name, in the order in which they are tried.
GROUPS: dict[str, Callable[[Mapping[str, MoeFamily]], list[MoeFamily]]] = {
    "auto": lambda families: [f for f in families.values() if f.auto_rank is not None],
    "qwen": lambda families: [families["qwen2_moe"], families["qwen3_moe"]],
    "mergekit": by_mergekit,
}
# What people ask for and no dense family becomes.
IMPOSSIBLE = {
    "olmoe": "its attention normalises queries and keys over their full width and its norms stand "
    "before attention and FFN; no dense family has both",
    "deepseek_v2": "its latent attention is no dense source's; Youtu-LLM becomes deepseek_v3",
    "sarvam_moe": "its files hold queries, keys and values in one tensor, which is not written "
    "here; glm4_moe has the same blocks",
    "phimoe": "its norms are LayerNorm, with a mean and a bias, which no dense source here has",
}
# Dense families that fit no MoE, and why.
UNFIT = {
    "apertus": "its activation is xIELU",
    "arcee": "its FFN has no gate",
    "bamba": "there is no MoE of its blocks",
    "bitnet": "there is no MoE of its blocks",
    "exaone4": "its norms stand after attention and FFN, and it normalises each head",
    "falcon_h1": "there is no MoE of its blocks",
    "gemma2": "it caps logits, and has norms before and after attention and FFN",
    "gemma3": "it has norms before and after attention and FFN",
    "gemma3_text": "it has norms before and after attention and FFN",
    "glm4": "it has norms before and after attention and FFN; MoEs with those want others too",
    "jais2": "there is no MoE of its blocks",
    "minicpm3": "its latent attention comes with multipliers",
    "nemotron": "its FFN has no gate, and its norms are LayerNorm",
    "olmo": "its norms have no weights",
    "olmo_hybrid": "there is no MoE of its blocks",
    "stablelm": "its norms are LayerNorm; PhiMoE has those, and weights that do not add up to 1",
    "starcoder2": "its FFN has no gate, and its norms are LayerNorm",
}


def targets_of(family: DenseFamily) -> list[MoeFamily]:
    """The MoE families that models of a dense family may become, as `target="auto"` tries them."""
    return [target for target in moe_families().values() if target.may_take(family)]


def as_target_name(name: Any) -> str:
    """The argument `target`: "auto" or the name of a target, hyphens and case aside.

    Raises
    ------
    TypeError, MoeConfigError
        A target that is not a string, is unknown, or cannot be made from any dense model.
    """
    if not isinstance(name, str):
        raise ArgumentTypeError(f"must be the name of a target, got {name!r}", argument="target")
    plain = {key.replace("_", ""): key for key in (*GROUPS, *moe_families(), *IMPOSSIBLE)}
    plain["deepseekmoe"] = "deepseek"
    key = plain.get(name.lower().replace("-", "").replace("_", ""))
    if key in IMPOSSIBLE:
        raise MoeConfigError(f"cannot be {name!r}: {IMPOSSIBLE[key]}", argument="target")
    if key is None:
        raise unknown_choice(name, ["auto", *moe_families()], "target")
    return key


def check_layout(layout: Layout | None, layouts: Sequence[Layout], title: str) -> None:
    """Raise `MoeConfigError` for a layout that is none of a family's."""
    if layout not in (None, *layouts):
        raise MoeConfigError(
            f"must be {str(layouts[0])!r} for {title}, got {str(layout)!r}", argument="layout"
        )


def choose(
    name: str, parts: Parts, layout: Layout | None
) -> tuple[MoeFamily, dict[str, tuple[str, ...]]]:
    """The target of that name, or the first that fits of a group; and why others do not.

    Raises
    ------
    MoeConfigError
        A layout that the target does not have.
    CheckpointError
        With every reason why the target, or each of all, does not fit.
    """
    families = moe_families()
    if name in GROUPS:
        wanted = GROUPS[name](families)
    else:
        wanted = [families[as_target_name(name)]]
        check_layout(layout, wanted[0].layouts, wanted[0].title)
    problems = {family.name: tuple(family.problems(parts, layout)) for family in wanted}
    fitting = [family for family in wanted if not problems[family.name]]
    if fitting:
        return fitting[0], {name: reasons for name, reasons in problems.items() if reasons}
    raise CheckpointError(
        *(
            reason if len(problems) == 1 else f"{target}: {reason}"
            for target, reasons in problems.items()
            for reason in reasons
        )
    )
