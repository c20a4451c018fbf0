"""`extract_dense`: an MoE checkpoint back to a dense model of its twin family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from moe_fast.calibration.score import ScoreReport
from moe_fast.checkpoint.arrangement import Group, mean_of, range_of
from moe_fast.checkpoint.construction import shard_factor
from moe_fast.checkpoint.design import Facts, design_of
from moe_fast.checkpoint.expert_lists import Keep, best_experts, list_problems, read_scores
from moe_fast.checkpoint.manifest import read_manifest
from moe_fast.checkpoint.operation import (
    OperationDesign,
    OperationReport,
    design_operation,
    files_given,
    perform,
)
from moe_fast.checkpoint.output import Writing
from moe_fast.checks import as_index, as_path, as_size
from moe_fast.dtypes import WEIGHT_DTYPES
from moe_fast.errors import CheckpointError, MoeConfigError
from moe_fast.families.config import Multipliers
from moe_fast.families.dense import DenseFamily
from moe_fast.families.moe import MoeFamily
from moe_fast.families.registry import dense_families, moe_families
from moe_fast.families.wrappers import wrapped_family
from moe_fast.models.inspection import read_floats
from moe_fast.models.moe import MoeLayer, MoeModel, open_moe_model, require_experts
from moe_fast.models.structure import structure_problems
from moe_fast.progress import Progress
from moe_fast.records import dataclass
from moe_fast.request import DEFAULT_SHARD_SIZE, ModelPath, Request
from moe_fast.storage.arithmetic import LinearCombination
from moe_fast.storage.files import OpenFiles
from moe_fast.storage.pieces import Piece, SideBySide
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.tensors import OutputTensor, Weight

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["extract_dense"]
# What a dense model's config.json takes over besides the keys that its family has defaults for.
TAKEN_OVER = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters", "use_cache"),
    *("original_max_position_embeddings", "sliding_window", "use_sliding_window"),
    *("max_window_layers", "layer_types", "dtype", "torch_dtype", "transformers_version"),
)


@dataclass(frozen=True)
class ExtractRequest(Request):
    """The experts of each layer that become its FFN; `model` is a folder.

    Several stand side by side, or are averaged where `mean`.
    """

    operation: ClassVar[str] = "extract"

    model: str
    experts: Mapping[str, tuple[int, ...]]
    mean: bool = False
    shards_of_one: bool = False
    """Whether they are the shards of one FFN, in their order, and not FFNs of their own."""
    by: str | None = None
    """What they were chosen by; nothing follows from it."""
    max_shard_size: int = DEFAULT_SHARD_SIZE

    def folders(self) -> list[str]:
        return [self.model]

    def moved(self, now: Mapping[str, str]) -> ExtractRequest:
        return replace(self, model=now[self.model])


def extract_dense(
    model: ModelPath,
    output: ModelPath,
    *,
    expert: int | None = None,
    mean: bool = False,
    best: int | None = None,
    copy: int | None = None,
    granularity: int | None = None,
    scores: ModelPath | Mapping[str, Any] | ScoreReport | None = None,
    by: str = "reap",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    checksum: bool = False,
    fsync: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> OperationReport:
    """Write a dense model whose FFN is made of experts of an MoE.

    Its family is one that `build_moe` makes such MoEs from. Give exactly one of `expert`, `mean`,
    `best` and `copy`.

    Parameters
    ----------
    model : path
        A folder with an MoE of a family that `build_moe` can build, except Gemma 4 and multimodal
        models, without shared experts whose output is not zero.
    output : path
        The folder to create.
    expert : int, optional
        The expert to use in every layer.
    mean : bool
        Whether to use the mean of all experts, computed in float64 and rounded once.
    best : int, optional
        How many experts to put side by side in one wider FFN: those with the greatest `scores` in
        each layer, the output of each divided by their number (arXiv 2605.28207).
    copy : int, optional
        The copy of a fine-grained model whose shards to join. The result is byte for byte the FFN
        that `build_moe` split, if the granularity is a power of two and nothing was shuffled or
        reinitialised.
    granularity : int, optional
        The number of shards per copy; by default the one in the model's manifest, or else the
        number of adjacent experts with the same router row.
    scores : path, mapping or ScoreReport, optional
        As in `prune_moe`.
    by : str
        The score to use.
    max_shard_size : int or str
        Largest number of bytes of weights per file, unless a single tensor is larger.
    overwrite, threads, executor, checksum, fsync, dry_run, progress
        As in `build_moe`.

    Returns
    -------
    OperationReport

    Raises
    ------
    CheckpointError
        If the model is of another family, or has parts that a dense model cannot have, with every
        reason.
    TypeError, MoeConfigError
        If an argument has the wrong type or is out of range.

    Examples
    --------
    >>> from moe_fast import MoeConfig, build_moe, extract_dense, make_dense_model
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> _ = build_moe(f"{folder}/dense", f"{folder}/moe", MoeConfig(num_experts=4))
    >>> extract_dense(f"{folder}/moe", f"{folder}/extracted", expert=0).model_type
    'mistral'
    """
    shard_size = as_size(max_shard_size, "max_shard_size")
    writing = Writing(overwrite, threads, executor, checksum, fsync, dry_run, progress)
    folder = as_path(model, "model").absolute()
    opened = open_moe_model(folder)
    require_experts(opened)
    if (expert is not None) + bool(mean) + (best is not None) + (copy is not None) != 1:
        raise MoeConfigError(
            "or mean, best or copy must say which experts make the FFN, and one of them alone",
            argument="expert",
        )
    if granularity is not None and copy is None:
        raise MoeConfigError("is for copy, and nothing else needs it", argument="granularity")
    if (best is None) != (scores is None):
        raise MoeConfigError("are for best, which needs them", argument="scores")
    most = opened.num_experts
    if best is not None:
        number = as_index(best, "best", minimum=1, maximum=most)
        chosen: Keep = {
            key: tuple(experts)
            for key, experts in best_experts(read_scores(scores, by, opened), number).items()
        }
    else:
        experts = range(most)
        if copy is not None:
            experts = shards_of(opened, copy, granularity)
        if expert is not None:
            experts = range(as_index(expert, "expert", maximum=most - 1), expert + 1)
        chosen = {layer.key: tuple(experts) for layer in opened.layers}
    request = ExtractRequest(
        model=str(folder),
        experts=chosen,
        mean=bool(mean),
        shards_of_one=copy is not None,
        by=None if best is None else by,
        max_shard_size=shard_size,
    )
    return perform(request, output, writing, files_given(scores))


def shards_of(model: MoeModel, copy: Any, granularity: int | None) -> range:
    """The experts that are the shards of a copy."""
    shards = find_granularity(model) if granularity is None else granularity
    shards = as_index(shards, "granularity", minimum=1, maximum=model.num_experts)
    if model.num_experts % shards:
        raise MoeConfigError(
            f"must divide the {model.num_experts} experts, got {shards}", argument="granularity"
        )
    number = as_index(copy, "copy", maximum=model.num_experts // shards - 1)
    return range(number * shards, (number + 1) * shards)


def find_granularity(model: MoeModel) -> int:
    """How many shards a copy has: the manifest says so, or experts that share a router's row do.

    Raises
    ------
    MoeConfigError
        If neither does.
    """
    with suppress(CheckpointError):
        built = getattr(read_manifest(model.path).request, "granularity", 1)
        if built > 1:
            return int(built)
    router = model.layers[0].router
    assert router is not None
    with OpenFiles() as files:
        rows = read_floats(router, files)
    if rows is not None:
        starts = [0, *(n for n in range(1, len(rows)) if (rows[n] != rows[n - 1]).any()), len(rows)]
        sizes = {stop - start for start, stop in pairwise(starts)}
        if len(sizes) == 1 and sizes != {1}:
            return sizes.pop()
    raise MoeConfigError(
        "must say how many shards a copy has: there is no manifest of a fine-grained build, and "
        "experts beside each other do not share the router's rows",
        argument="granularity",
    )


@design_of.register
def design_extracted(request: ExtractRequest, decisions: Facts | None = None) -> OperationDesign:
    """From headers, and shared experts that may be silent."""
    model = open_moe_model(request.model)
    require_experts(model)
    family = moe_families().get(model.model_type)
    if wrapped_family(model.config, moe_families()) is not None:
        raise CheckpointError(
            "is a multimodal model, and a dense model is extracted of a language model alone",
            file=model.path / "config.json",
        )
    if family is None:
        raise CheckpointError(
            f"{model.path / 'config.json'}: model_type {model.model_type!r} has no dense twin here;"
            f" {', '.join(moe_families())} have one"
        )
    twin = dense_families()[family.twin_name(model.config)]
    if not twin.runs_by_layer:  # the FFN beside the experts would be left without a place
        raise CheckpointError(
            f"{family.title} cannot be extracted: it has an FFN beside its experts already",
            file=model.path / "config.json",
        )
    left_out = set(router_tensors(model))
    problems = [
        *structure_problems(model),
        *expert_problems(model, request),
        *shared_problems(model, left_out),
    ]
    if problems:
        raise CheckpointError(*problems)
    first = next(iter(model.layers[0].experts.values()))
    width = wide(request) * first[twin.roles[0]].shape[0]
    problems = dense_layer_problems(model, twin, width)
    if problems:
        raise CheckpointError(*problems)
    number = len(next(iter(request.experts.values())))
    which = (
        f"the mean of {number} experts" if request.mean else f"{number} expert" + "s" * (number > 1)
    )
    if request.shards_of_one:
        which = f"the {number} shards of a copy"
    return design_operation(
        request,
        model,
        dict(dense_tensors(model, twin, request, left_out)),
        dense_config(model, family, twin, width),
        experts_per_layer=0,
        experts_per_tok=None,
        reason_to_differ="the router no longer chooses among its experts",
        max_shard_size=request.max_shard_size,
        facts={"num_experts_before": model.num_experts},
        sentence=f"made a dense model of it: {which} of each layer became its FFN",
    )


def wide(request: ExtractRequest) -> int:
    """How many experts stand side by side."""
    return 1 if request.mean else len(next(iter(request.experts.values())))


def expert_problems(model: MoeModel, request: ExtractRequest) -> Iterator[str]:
    lists = {layer.key: request.experts.get(layer.key) for layer in model.layers}
    for key, experts in lists.items():
        if not experts:
            yield f"experts: layer {key} is missing"
        else:
            yield from list_problems(experts, model.num_experts, f"experts: layer {key}")
    if len({len(experts) for experts in lists.values() if experts}) > 1:
        yield "experts: layers have different numbers of them"
    for layer in model.layers:
        for tensor in (t for expert in layer.experts.values() for t in expert.values()):
            if tensor.dtype not in WEIGHT_DTYPES:
                yield (
                    f"{tensor.file.path}: tensor {tensor.name!r} is {tensor.dtype}; "
                    f"{', '.join(WEIGHT_DTYPES)} can be extracted"
                )
                return


def router_tensors(model: MoeModel) -> Iterator[str]:
    """What only routes, and has no place in a dense model."""
    for layer in model.layers:
        yield from (tensor.name for tensor in layer.counted.values())


def shared_problems(model: MoeModel, left_out: set[str]) -> Iterator[str]:
    """Shared experts that add something; the names of those that add nothing join `left_out`."""
    with OpenFiles() as files:
        for layer in model.layers:
            prefix = f"{layer.block.rpartition('.')[0]}."
            shared = [
                name for name in model.tensors if name.startswith(prefix) and "shared" in name
            ]
            down = [n for n in shared if "down_proj" in n or "output_linear" in n]
            silent = all(is_zero(model.tensors[name], files) for name in down)
            if shared and not (down and silent):
                yield (
                    f"{model.tensors[shared[0]].file.path}: tensor {shared[0]!r} belongs to a "
                    "shared expert, which a dense model has no place for"
                )
            left_out.update(shared)


def is_zero(tensor: Tensor, files: OpenFiles) -> bool:
    """Whether all numbers of a tensor are zero, read in parts."""
    for start in range(0, tensor.nbytes, 2**20):
        count = min(2**20, tensor.nbytes - start)
        if any(files.read(tensor.file, tensor.offset + start, count)):
            return False
    return True


def dense_layer_problems(model: MoeModel, twin: DenseFamily, width: int) -> list[str]:
    """Layers that were dense already, of another width than the others become."""
    return [
        f"{tensor.file.path}: tensor {name!r} has {tensor.shape[0]} rows, the FFNs made of experts "
        f"{width}; config.json of a dense model holds one width"
        for name, tensor in model.tensors.items()
        if twin.name_here(name).endswith(f".mlp.{twin.roles[0]}.weight")
        and tensor.shape[0] != width
    ]


def dense_tensors(
    model: MoeModel, twin: DenseFamily, request: ExtractRequest, left_out: set[str]
) -> Iterator[OutputTensor]:
    """The model's tensors in their order, each layer's FFN where its first expert stood."""
    done = set()
    for name, tensor in model.tensors.items():
        layer = model.places[name][0] if name in model.places else None
        if layer is not None and layer.key not in done and is_expert(name, layer):
            done.add(layer.key)
            prefix = layer.block.rpartition(".")[0]
            experts = request.experts[layer.key]
            weights = {}
            for role in twin.roles:
                if request.shards_of_one:
                    weight = joined_shards(layer, experts, role, scale_of_shards(model))
                else:
                    weight = ffn_weight(layer, experts, role, request.mean)
                weights[f"{prefix}.mlp.{role}.weight"] = weight
            for whole, parts in twin.stored({n: w.shape for n, w in weights.items()}).items():
                held = [weights[part] for part in parts]
                shape = (sum(weight.shape[0] for weight in held), *held[0].shape[1:])
                yield OutputTensor(twin.name_in_files(whole), Weight.stacked(held, shape))
        elif layer is None and name not in left_out:
            yield OutputTensor(name, Weight.of(tensor))


def is_expert(name: str, layer: MoeLayer) -> bool:
    inner = name.removeprefix(f"{layer.block}.")
    return inner.startswith("experts.") or "put_linear" in inner


def ffn_weight(layer: MoeLayer, experts: tuple[int, ...], role: str, mean: bool) -> Weight:
    """One matrix of the FFN that some experts of a layer make."""
    parts = [layer.experts[expert][role] for expert in experts]
    rows, columns = parts[0].shape
    if mean or len(parts) == 1:
        return Weight(parts[0].dtype, (rows, columns), (mean_of(parts, Group(experts)),))
    if role != "down_proj":
        return Weight(parts[0].dtype, (rows * len(parts), columns), tuple(map(range_of, parts)))
    scaled = tuple(
        (LinearCombination((range_of(part),), (1.0,), float(len(parts)), part.dtype),)
        for part in parts
    )
    shape = (rows, columns * len(parts))
    return Weight(parts[0].dtype, shape, (SideBySide(rows, scaled),))


def scale_of_shards(model: MoeModel) -> float:
    """What the model multiplies the sum of the chosen experts with."""
    factor = model.config.get("routed_scaling_factor")
    return float(factor) if isinstance(factor, (int, float)) and factor > 0 else 1.0


def joined_shards(layer: MoeLayer, experts: tuple[int, ...], role: str, scale: float) -> Weight:
    """One matrix of the FFN that was split into shards, without what made up for their weights.

    Each shard had an equal share of a copy's weight, times `scale`.
    """
    parts = [layer.experts[expert][role] for expert in experts]
    rows, columns = parts[0].shape
    shards = len(parts)
    # The product of both is `shards / scale`, of which nothing is left where the scale made up.
    factor = 1.0 if role == "gate_proj" or scale == shards else shard_factor(shards, role)
    if role == "down_proj" and scale not in (1.0, shards):
        factor /= scale
    pieces: list[Piece] = [
        range_of(part)
        if factor == 1
        else LinearCombination((range_of(part),), (1.0,), factor, part.dtype)
        for part in parts
    ]
    if role != "down_proj":
        return Weight(parts[0].dtype, (rows * shards, columns), tuple(pieces))
    shape = (rows, columns * shards)
    return Weight(parts[0].dtype, shape, (SideBySide(rows, tuple((p,) for p in pieces)),))


def dense_config(
    model: MoeModel, family: MoeFamily, twin: DenseFamily, width: int
) -> dict[str, Any]:
    """The config.json of the dense model."""
    known = {*TAKEN_OVER, *twin.defaults}
    if twin.blocks is not None:
        known |= set(family.also_read)
    if twin.multipliers:
        known |= set(Multipliers._fields)
    config = {key: value for key, value in model.config.items() if key in known}
    biased = any(name.endswith("self_attn.o_proj.bias") for name in model.tensors)
    return {
        "architectures": [twin.architecture],
        "model_type": twin.model_type,
        **config,
        **twin.of_width(model.config, width),
        **family.kept_for_dense(model.config),
        **({"mlp_bias": False} if twin.mlp_bias else {}),
        **({"attention_bias": biased} if twin.biases is None else {}),
    }
