"""`build_moe`: the order of the steps, nothing else."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from moe_fast.checkpoint.construction import Construction
from moe_fast.checkpoint.request import BuildRequest, ExpertSource
from moe_fast.checkpoint.source import DenseModel, open_dense_model
from moe_fast.checkpoint.table import OutputTensor, Shard, index_json, into_shards
from moe_fast.checkpoint.targets import TARGETS, Mixtral
from moe_fast.checkpoint.writer import appearing, write_shard
from moe_fast.config import GateMode, MoeConfig, RouterInit, as_member
from moe_fast.errors import CheckpointError, as_index
from moe_fast.plan import MoeConstructionPlan, plan_moe_construction
from moe_fast.reports import Report

__all__ = ["BuildReport", "build_moe"]

ModelPath = str | os.PathLike[str]
Progress = Callable[[int, int], None]

MANIFEST = "moe_fast.json"
# What belongs to the base model besides its weights and is copied as it is.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.*",
    "generation_config.json",
)


@dataclass(frozen=True)
class BuildReport(Report):
    """What was built; `load_balance` and `unused_models` are those of the plan's report."""

    output: Path
    target: str
    num_experts: int
    num_experts_per_tok: int
    num_layers: int
    num_parameters: int
    load_balance: float
    unused_models: Sequence[int]
    num_bytes: int
    num_files: int
    seconds: float
    warnings: tuple[str, ...] = ()


def build_moe(
    models: ModelPath | ExpertSource | Sequence[ModelPath | ExpertSource],
    output: ModelPath,
    config: MoeConfig | None = None,
    *,
    base: ModelPath | None = None,
    router_init: RouterInit | str = RouterInit.BALANCED,
    gate_mode: GateMode | str | None = None,
    seed: int = 0,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Build a Mixture-of-Experts checkpoint from dense models, streaming from disk to disk.

    Expert `e` of layer `l` is the feed-forward network of layer `l` of model `e % len(models)`
    (see `plan_moe_construction`); everything else comes from `base`. With one model, the result
    computes what the model computes, whatever its routers choose (sparse upcycling,
    Komatsuzaki et al. 2023).

    Parameters
    ----------
    models : path, ExpertSource, or sequence of them
        Folders of Llama or Mistral models in the Hugging Face layout, safetensors, of one shape. An
        `ExpertSource` is a folder and what happens to its weights on the way.
    output : path
        The folder to create.
    config : MoeConfig, optional
        By default 8 experts, 2 per token.
    base : path, optional
        The model that gives attention, embeddings, norms and tokenizer; by default the first.
    router_init : RouterInit or str
        How the routers start. In a 16-bit dtype the balanced init leaves out its constant base,
        which rounding would merge with the noise; a softmax router does not see the difference.
    gate_mode : GateMode or str, optional
        How the routers start, in place of `router_init`: `"random"` draws from the standard normal
        distribution, `"uniform_random"` as `torch.nn.Linear` starts.
    seed : int
        Of these draws, and of the noise that an `ExpertSource` asks for.
    max_shard_size : int
        Bytes of weights per file, at most, unless a single tensor is larger.
    overwrite : bool
        Whether an existing `output` may be replaced.
    progress : callable, optional
        Called many times with the bytes written so far and the bytes to write in all.

    Returns
    -------
    BuildReport

    Raises
    ------
    CheckpointError
        With every reason why the models cannot be combined; nothing has been written then.
    TypeError, MoeConfigError
        An argument of the wrong kind or out of range.

    Examples
    --------
    >>> from moe_fast import MoeConfig, build_moe
    >>> from moe_fast.demo import make_dense_model
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> report = build_moe(f"{folder}/dense", f"{folder}/moe", MoeConfig(num_experts=4))
    >>> report.num_experts, report.num_layers, report.load_balance
    (4, 2, 0.0)
    """
    config = MoeConfig() if config is None else config
    if not isinstance(config, MoeConfig):
        raise TypeError(f"config must be a MoeConfig, got {config!r}")
    config.validate()
    experts = as_expert_sources(models)
    request = BuildRequest(
        models=experts,
        base=experts[0].model if base is None else str(Path(base).absolute()),
        config=config,
        router_init=as_member(router_init, RouterInit, "router_init"),
        gate_mode=None if gate_mode is None else as_member(gate_mode, GateMode, "gate_mode"),
        seed=as_index(seed, "seed"),
        max_shard_size=as_index(max_shard_size, "max_shard_size", minimum=1),
    )
    return build_checkpoint(request, output, overwrite=overwrite, progress=progress)


def build_checkpoint(
    request: BuildRequest,
    output: ModelPath,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    warnings: Sequence[str] = (),
) -> BuildReport:
    """Build what a request asks for; the report has `warnings` before those of the build."""
    started = time.perf_counter()
    output = Path(output)
    blueprint = prepare(request)
    target, construction = blueprint.target, blueprint.construction
    tensors, plan = blueprint.tensors, construction.plan
    shards = into_shards(tensors, request.max_shard_size)

    with appearing(output, overwrite=overwrite) as folder:
        written = WrittenBytes(sum(shard.nbytes for shard in shards), progress)
        for shard in shards:
            write_shard(shard, folder, written.add)
        texts = {
            "config.json": json_text(target.config(construction)),
            MANIFEST: json_text(manifest(request, blueprint, shards)),
            **index_json(shards),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
        copy_companions(construction.base.path, folder)

    sizes = construction.base.sizes
    report = plan.report(sizes.hidden_size, sizes.intermediate_size, plan.num_experts)
    return BuildReport(
        output=output,
        target=target.name,
        num_experts=plan.num_experts,
        num_experts_per_tok=request.config.num_experts_per_tok,
        num_layers=plan.num_layers,
        num_parameters=sum(t.weight.num_parameters for t in tensors),
        load_balance=report.load_balance,
        unused_models=report.unused_models,
        num_bytes=written.count,
        num_files=len(shards),
        seconds=time.perf_counter() - started,
        warnings=(
            *warnings,
            *construction.warnings(),
            *warnings_for(request, report.unused_models),
        ),
    )


def as_expert_sources(models: Any) -> tuple[ExpertSource, ...]:
    """The argument `models`, its folders absolute."""
    if isinstance(models, (str, os.PathLike, ExpertSource)):
        models = [models]
    experts = [m if isinstance(m, ExpertSource) else ExpertSource(m) for m in models]
    if not experts:
        raise CheckpointError("models must name at least one model folder")
    return tuple(replace(e, model=str(Path(e.model).absolute())) for e in experts)


class WrittenBytes:
    """Adds up what the shards report and passes it on."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.count = 0
        self.total = total
        self.progress = progress

    def add(self, count: int) -> None:
        self.count += count
        if self.progress is not None:
            self.progress(self.count, self.total)


@dataclass(frozen=True)
class Blueprint:
    """What a request comes to: every tensor of the output, nothing written."""

    target: Mixtral
    construction: Construction
    tensors: tuple[OutputTensor, ...]


def prepare(request: BuildRequest) -> Blueprint:
    """Open the sources of a request and lay out its output, from headers alone."""
    sources, base = open_sources([m.model for m in request.models], request.base)
    target = TARGETS["mixtral"]
    plan = plan_for(request, base.sizes.num_hidden_layers)
    construction = Construction(
        base,
        sources,
        request.models,
        plan,
        request.config,
        request.router_init,
        request.gate_mode,
        request.seed,
    )
    problems = construction.problems() + target.problems(construction)
    if problems:
        raise CheckpointError(*problems)
    return Blueprint(target, construction, tuple(target.tensors(construction)))


def plan_for(request: BuildRequest, num_layers: int) -> MoeConstructionPlan:
    """Round robin over the models, each from its own source layers."""
    plan = plan_moe_construction(len(request.models), num_layers, request.config)
    if all(model.source_layers is None for model in request.models):
        return plan
    problems = [
        f"source_layers of {m.model}: lists {len(m.source_layers)} layers, the output has "
        f"{num_layers}; list one for each"
        for m in request.models
        if m.source_layers is not None and len(m.source_layers) != num_layers
    ]
    if problems:
        raise CheckpointError(*problems)
    layers = np.array([m.source_layers or range(num_layers) for m in request.models])
    return MoeConstructionPlan(
        plan.source_model, layers[plan.source_model[0]].T, num_models=plan.num_models
    )


def open_sources(models: Sequence[str], base: str) -> tuple[list[DenseModel], DenseModel]:
    """The source models and the base, each folder opened once; all their problems at once."""
    opened: dict[str, DenseModel] = {}
    problems: list[str] = []
    for folder in dict.fromkeys((*models, base)):
        try:
            opened[folder] = open_dense_model(folder)
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(*problems)
    return [opened[model] for model in models], opened[base]


def warnings_for(request: BuildRequest, unused_models: Sequence[int]) -> list[str]:
    warnings = [
        f"{request.models[model].model}: gives no expert; there are more models than experts"
        for model in unused_models
    ]
    if request.gate_mode is None and request.router_init is RouterInit.UNIFORM:
        warnings.append(
            "router_init 'uniform' makes all logits tie: every token goes to the same experts "
            "until training moves the routers"
        )
    return warnings


def manifest(
    request: BuildRequest, blueprint: Blueprint, shards: Sequence[Shard]
) -> dict[str, Any]:
    """What `check_moe` needs to know: what was asked for, what came of it, what was written."""
    plan = blueprint.construction.plan
    return {
        "moe_fast": version("moe-fast"),
        "request": request.to_dict(),
        "target": blueprint.target.name,
        "source_model": plan.source_model.tolist(),
        "source_layer": plan.source_layer.tolist(),
        "files": {shard.file_name: shard.nbytes for shard in shards},
    }


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def copy_companions(model: Path, folder: Path) -> None:
    """Copy tokenizer and generation settings, unchanged; links are followed."""
    for pattern in COMPANIONS:
        for file in sorted(model.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
