"""Every family there is: each file of this package lists its own.

`DENSE` are those that experts are made from, `MOE` those that `build` writes, and `EXPERTS` says
where checkpoints count experts, of these and of many others.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType, ModuleType

from moe_fast import families
from moe_fast.families.dense import DenseFamily
from moe_fast.families.experts import ExpertAxis
from moe_fast.families.moe import MoeFamily


@functools.cache
def dense_families() -> Mapping[str, DenseFamily]:
    """The dense families by the `model_type` of their config.json, in alphabetical order."""
    found = [family for lineage in lineages() for family in getattr(lineage, "DENSE", ())]
    found.sort(key=lambda family: family.model_type)
    return MappingProxyType({family.model_type: family for family in found})


@functools.cache
def moe_families() -> Mapping[str, MoeFamily]:
    """The MoE families by name, in the order in which `target="auto"` tries them."""
    found = [family for lineage in lineages() for family in getattr(lineage, "MOE", ())]
    found.sort(key=lambda family: (family.auto_rank is None, family.auto_rank, family.name))
    return MappingProxyType({family.name: family for family in found})


@functools.cache
def expert_axes() -> Mapping[str, ExpertAxis]:
    """Where each family counts experts, by its `model_type`."""
    found = [axis for lineage in lineages() for axis in getattr(lineage, "EXPERTS", ())]
    axes = {name: axis for axis in found for name in axis.model_types}
    plain = {
        family.name: ExpertAxis(
            (family.name,),
            block=family.block,
            layouts=family.layouts,
            parts=dict(family.expert_names),
        )
        for family in moe_families().values()
    }
    return MappingProxyType({**plain, **axes})


@functools.cache
def lineages() -> tuple[ModuleType, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    return tuple(
        importlib.import_module(f"{families.__name__}.{name}")
        for name in names
        if name not in BASES
    )


# The files of this package that are not about one lineage.
BASES = (
    *("choice", "config", "dense", "experts", "key_types", "moe", "readers", "registry", "rules"),
    *("twins", "wrappers"),
)
