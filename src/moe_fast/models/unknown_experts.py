"""Experts in a layout that no family here has: what names and config.json tell of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.families.config import NUM_EXPERTS_KEYS, TOP_K_KEYS, first_size
from moe_fast.records import dataclass
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.wording import brief, format_count

# What files call the part of a layer that holds experts: `experts`, `local_experts`, `expert_0`,
# MLX's `switch_mlp`, `moe`, `moe_block`, ...
PART = re.compile(r"\w*experts?(?:_\d+)?|switch_(?:mlp|glu)|\w*_moe|moe(?:_\w+)?")
NOT_ROUTED = re.compile(r"shared|dense_expert")
ROUTER = re.compile(r"(?:^|\.)(?:gate|router)\.(?:\w+\.)?weight$")
NUMBER = re.compile(r"\d{1,6}", re.ASCII)
MOST_NAMES = 6
LARGEST_COUNT = 2**16  # experts of a layer


@dataclass(frozen=True)
class UnknownExperts:
    """Experts that can be told of and not be taken apart.

    Parameters
    ----------
    names : tuple of str
        What their tensors are called, numbers as `*`; empty if config.json alone tells of experts.
    layers : tuple of str
        The beginnings of the names of the layers that hold them.
    num_experts : int, optional
        Of each layer, by their names, else by the first axis of tensors that stack them, by the
        rows of a router, or by config.json.
    num_experts_per_tok : int, optional
        As config.json has it.
    routers : mapping
        Of each layer whose router is called as most are: that tensor.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    num_experts: int | None
    num_experts_per_tok: int | None
    routers: Mapping[str, Tensor]

    def describe(self) -> str:
        """What holds the experts, in words."""
        if not self.names:
            return f"config.json counts {self.num_experts}, and no tensor is known to hold one"
        shown = ", ".join(brief(name) for name in self.names[:MOST_NAMES])
        more = max(len(self.names) - MOST_NAMES, 0)
        where = format_count(len(self.layers), "layer")
        return f"{shown}{f' and {more} more' * bool(more)}, in {where}"


def find_unknown_experts(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> UnknownExperts | None:
    """Experts among tensors that no known layout explains; `None` where nothing tells of any."""
    names: dict[str, None] = {}
    layers: dict[str, None] = {}
    numbers: set[int] = set()
    stacked: int | None = None
    for name, tensor in tensors.items():
        place = place_of(name)
        if place is None:
            continue
        layer, inside = place
        layers[layer] = None
        names[NUMBER.sub("*", name)] = None
        numbers.update(numbers_of(inside))
        if stacked is None and len(tensor.shape) > 2:
            stacked = tensor.shape[0]
    routers: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = layer_of(name.split("."))
        is_router = ROUTER.search(name) and not NOT_ROUTED.search(name)
        if is_router and layer in layers and len(tensor.shape) == 2:
            routers.setdefault(layer, tensor)
    rows = next((router.shape[0] for router in routers.values()), None)
    counted = first_size_in(config, NUM_EXPERTS_KEYS)
    if not names and (counted or 0) < 2:
        return None
    found = (1 + max(numbers) if numbers else None, stacked, rows, counted)
    num_experts = next((n for n in found if n is not None and 0 < n <= LARGEST_COUNT), None)
    per_token = first_size_in(config, TOP_K_KEYS)
    return UnknownExperts(tuple(names), tuple(layers), num_experts, per_token, routers)


def place_of(name: str) -> tuple[str, list[str]] | None:
    """The layer of a tensor of experts, and the parts of its name from the experts on."""
    if NOT_ROUTED.search(name):
        return None
    parts = name.split(".")
    for number, part in enumerate(parts):
        if PART.fullmatch(part):
            return layer_of(parts[:number]), parts[number:]
    return None


def layer_of(parts: list[str]) -> str:
    """The beginning of a name up to its layer's number; all of it without one."""
    for number in range(len(parts)):
        if NUMBER.fullmatch(parts[number]):
            return ".".join(parts[: number + 1])
    return ""


def numbers_of(parts: list[str]) -> Iterator[int]:
    """The number of an expert, by the parts of a name from the experts on."""
    for part in parts:
        match = re.fullmatch(r"(?:\w*expert_|weight|bias)?(\d{1,6})", part, re.ASCII)
        if match is not None:
            yield int(match[1])
            return


def first_size_in(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first of `keys` that holds a positive integer, here or one level down."""
    inner = (value for value in config.values() if isinstance(value, dict))
    found = (first_size(each, keys) for each in (config, *inner))
    return next((value for value in found if value is not None), None)
