"""`build_moe`: the order of the steps, nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_fast.checkpoint.blueprint import prepare
from moe_fast.checkpoint.header import json_text
from moe_fast.checkpoint.hub import find_model
from moe_fast.checkpoint.manifest import FileRecord, Manifest, SourceRecord
from moe_fast.checkpoint.output import (
    Contents,
    Progress,
    Writing,
    companions_of,
    lack_of_space,
    obstacles,
    overflow_warnings,
    write_checkpoint,
)
from moe_fast.checkpoint.provenance import CARD, file_metadata, model_card
from moe_fast.checkpoint.request import BuildRequest, ExpertSource, ModelPath
from moe_fast.checkpoint.table import index_json, into_shards
from moe_fast.checkpoint.targets import as_target_name
from moe_fast.config import Dtype, GateMode, Layout, MoeConfig, RouterInit, as_member
from moe_fast.errors import CheckpointError, as_index, of_all
from moe_fast.health import RouterHealth
from moe_fast.plan import MoeConstructionPlan
from moe_fast.reports import Report, pandas_frame

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["BuildReport", "build_moe"]


@dataclass(frozen=True)
class BuildReport(Report):
    """What was built; `load_balance` and `unused_models` are those of the plan's report.

    Where the sources chose the target, `rejected_targets` says of each that does not fit them why.
    """

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
    experts: tuple[tuple[str, ...], ...] = field(repr=False)
    """The models that each expert of a layer comes from, over all layers."""
    files: Mapping[str, int] = field(repr=False)
    """The bytes of each file of weights."""
    routers: RouterHealth = field(repr=False)
    """How tokens will spread over the experts, as far as the routers tell before training."""
    dry_run: bool = False
    warnings: tuple[str, ...] = ()
    dense_layers: tuple[int, ...] = ()
    rejected_targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)

    def to_frame(self) -> DataFrame:
        """The experts of a layer as a pandas data frame, one row an expert with its models.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        return pandas_frame({"expert": range(len(self.experts)), "models": self.experts})


def build_moe(
    models: ModelPath | ExpertSource | Sequence[ModelPath | ExpertSource],
    output: ModelPath,
    config: MoeConfig | None = None,
    *,
    target: str = "auto",
    layout: Layout | str | None = None,
    dtype: Dtype | str | None = None,
    base: ModelPath | None = None,
    shared_experts: ModelPath | ExpertSource | Sequence[ModelPath | ExpertSource] = (),
    dense_layers: Iterable[int] = (),
    router_init: RouterInit | str = RouterInit.BALANCED,
    gate_mode: GateMode | str | None = None,
    seed: int = 0,
    hidden_states: npt.ArrayLike | None = None,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    checksum: bool = False,
    fsync: bool = False,
    dry_run: bool = False,
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
        Folders of Llama, Mistral, Qwen2, Qwen3, OLMo2 or Granite models in the Hugging Face layout,
        safetensors, of one shape. An `ExpertSource` is a folder and what happens to its weights on
        the way. What is no folder and reads `"organisation/name"`, or with a revision
        `"organisation/name@revision"`, is a repository on the Hugging Face Hub: it is taken from
        the Hub's cache, and fetched into it first unless `HF_HUB_OFFLINE=1`.
    output : path
        The folder to create.
    config : MoeConfig, optional
        By default 8 experts, 2 per token.
    target : str
        The family to build: `"mixtral"`, `"qwen3_moe"`, `"qwen2_moe"`, `"granitemoe"`,
        `"flex_olmo"`, `"granitemoeshared"`, `"deepseek"`, or `"auto"`, the first of them that has a
        place for everything the base has.
    layout : Layout or str, optional
        `"per-expert"`, the default, which every reader knows, or `"fused"`, which few do but
        transformers 5. GraniteMoE has a fused layout of its own and no other.
    dtype : Dtype or str, optional
        `"float32"`, `"bfloat16"` or `"float16"`: what every weight is converted to, rounded to
        nearest and to even. By default weights keep the sources' dtype, which then must be one.
    base : path, optional
        The model that gives attention, embeddings, norms and tokenizer; by default the first.
    shared_experts : path, ExpertSource, or sequence of them
        Models whose FFN every token goes through, where the target has such experts. Their output
        is added to that of the routed experts, so to keep a model's function, scale both: with one
        shared expert, each by a `residual_scale` of 0.5 (in Qwen2-MoE the routed ones alone; a gate
        that starts near one half scales the shared one). Prompts of theirs make that gate, where
        `gate_mode` makes routers from prompts.
    dense_layers : iterable of int
        Layers that keep the FFN of the base in place of experts, where the target can say so:
        Qwen2-MoE and Qwen3-MoE any, DeepSeek-MoE the first ones and, after them, all but every
        n-th.
    router_init : RouterInit or str
        How the routers start. In a 16-bit dtype the balanced init leaves out its constant base,
        which rounding would merge with the noise; a softmax router does not see the difference.
    gate_mode : GateMode or str, optional
        How the routers start, in place of `router_init`: `"random"` draws from the standard normal
        distribution, `"uniform_random"` as `torch.nn.Linear` starts. `"cheap_embed"` and
        `"hidden"` make them from the prompts of each `ExpertSource`: from the embeddings of their
        tokens, or from what the routers will read of them, which takes a run of the base model.
    seed : int
        Of these draws, and of the noise that an `ExpertSource` asks for.
    hidden_states : array_like, shape (T, hidden_size) or (L, T, hidden_size), optional
        What the routers of the L layers with experts will read, to predict the load from, as
        `predict_load` does; no byte of the output depends on it. By default the tokens of the
        prompts where routers are made from what they will read of them, else random ones.
    max_shard_size : int
        Bytes of weights per file, at most, unless a single tensor is larger.
    overwrite : bool
        Whether an existing `output` may be replaced; it stays until the new one is complete.
    threads : int, optional
        Files written at a time. By default `MOE_FAST_NUM_THREADS`, or 1.
    executor : concurrent.futures.Executor, optional
        Writes the files in place of threads: a `ProcessPoolExecutor`, or the `get_executor()` of a
        Dask client. Its workers need the models and the output under the same paths.
    checksum : bool
        Whether the manifest gets the SHA-256 of every file.
    fsync : bool
        Whether to wait until the output would last through a power cut.
    dry_run : bool
        Whether to find every problem and report what would be written, and write nothing.
    progress : callable, optional
        Called many times with the bytes written so far and the bytes to write in all.

    Returns
    -------
    BuildReport

    Raises
    ------
    CheckpointError
        With every reason why the models cannot be combined, or not be written to `output`; nothing
        has been written then.
    OSError
        The disk is full, a file cannot be read or written. As after any other end of the process,
        the files that were finished stay beside `output`, hidden; the same call goes on with them,
        another one removes them.
    TypeError, MoeConfigError
        An argument of the wrong kind or out of range; `hidden_states` of another shape than the
        routers read.

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
    if not experts:
        raise CheckpointError("models must name at least one model folder")
    request = BuildRequest(
        models=experts,
        base=experts[0].model if base is None else os.fspath(base),
        config=config,
        target=as_target_name(target),
        layout=None if layout is None else as_member(layout, Layout, "layout"),
        dtype=None if dtype is None else as_member(dtype, Dtype, "dtype"),
        shared_experts=as_expert_sources(shared_experts),
        dense_layers=as_layers(dense_layers),
        router_init=as_member(router_init, RouterInit, "router_init"),
        gate_mode=None if gate_mode is None else as_member(gate_mode, GateMode, "gate_mode"),
        seed=as_index(seed, "seed"),
        max_shard_size=as_index(max_shard_size, "max_shard_size", minimum=1),
    )
    how = Writing(overwrite, threads, executor, checksum, fsync, dry_run, progress)
    request = request.moved(of_all(find_model, request.folders()))
    return build_checkpoint(request, output, how, hidden_states=hidden_states)


def build_checkpoint(
    request: BuildRequest,
    output: ModelPath,
    how: Writing,
    warnings: Sequence[str] = (),
    hidden_states: npt.ArrayLike | None = None,
    recipe: Path | None = None,
) -> BuildReport:
    """Build what a request asks for; the report has `warnings` before those of the build.

    `recipe` is the file that the request was read from, which the output must not replace.
    """
    started = time.perf_counter()
    output = Path(output)
    try:
        blueprint = prepare(request)
    except CheckpointError as error:
        in_the_way = obstacles(output, (), how)
        raise CheckpointError(*error.problems, *in_the_way) from None
    target, construction = blueprint.target, blueprint.construction
    tensors, plan = blueprint.tensors, construction.plan
    moe_fast_version = version("moe-fast")
    config_json = target.config(construction)
    metadata = file_metadata(construction, moe_fast_version)
    shards = into_shards(tensors, request.max_shard_size, metadata)
    texts = {
        "config.json": json_text(config_json),
        CARD: model_card(request, target, construction, config_json, moe_fast_version),
        **index_json(shards),
    }
    contents = Contents(shards, texts, companions_of(construction.base.path))
    source_files = construction.files()
    mapped = hidden_states.filename if isinstance(hidden_states, np.memmap) else None
    also_read = [Path(file) for file in (recipe, mapped) if file is not None]
    problems = [
        *obstacles(output, source_files, how, also_read),
        *lack_of_space(output, contents),
    ]
    if problems:
        raise CheckpointError(*problems)
    records: Mapping[str, FileRecord] = {}
    health = blueprint.health(request, hidden_states)
    if not how.dry_run:

        def manifest(files: dict[str, FileRecord]) -> str:
            return Manifest(
                moe_fast=moe_fast_version,
                request=replace(request, target=target.name),  # "auto" may choose otherwise one day
                target=target.name,
                source_model=plan.source_model.tolist(),
                source_layer=plan.source_layer.tolist(),
                source_files=tuple(SourceRecord.of(file) for file in source_files),
                files=files,
                gate_sha256=construction.digests_to_keep(),
            ).text()

        records = write_checkpoint(output, contents, manifest, how)

    sizes = construction.base.sizes
    report = plan.report(sizes.hidden_size, sizes.intermediate_size, plan.num_experts)
    return BuildReport(
        output=output,
        target=target.name,
        num_experts=plan.num_experts,
        num_experts_per_tok=request.config.num_experts_per_tok,
        num_layers=plan.num_layers,
        dense_layers=request.dense_layers,
        num_parameters=sum(t.weight.num_parameters for t in tensors),
        load_balance=report.load_balance,
        unused_models=report.unused_models,
        num_bytes=contents.nbytes,
        num_files=len(shards),
        seconds=time.perf_counter() - started,
        experts=models_of_experts(request.models, plan),
        files={shard.file_name: shard.nbytes for shard in shards},
        dry_run=how.dry_run,
        warnings=(
            *warnings,
            *construction.warnings(),
            *target.warnings(construction),
            *warnings_for(request, report.unused_models),
            *overflow_warnings(records),
            *health.warnings,
        ),
        routers=health,
        rejected_targets=blueprint.rejected_targets,
    )


def as_expert_sources(models: Any) -> tuple[ExpertSource, ...]:
    """The argument `models` or `shared_experts`."""
    if isinstance(models, (str, os.PathLike, ExpertSource)):
        models = [models]
    return tuple(m if isinstance(m, ExpertSource) else ExpertSource(m) for m in models)


def as_layers(layers: Any) -> tuple[int, ...]:
    """The argument `dense_layers`: each layer once, in order."""
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"dense_layers must list layers, got {layers!r}")
    return tuple(sorted({as_index(layer, "dense_layers") for layer in layers}))


def models_of_experts(
    models: Sequence[ExpertSource], plan: MoeConstructionPlan
) -> tuple[tuple[str, ...], ...]:
    return tuple(
        tuple(models[model].model for model in sorted({*plan.source_model[:, expert].tolist()}))
        for expert in range(plan.num_experts)
    )


def warnings_for(request: BuildRequest, unused_models: Sequence[int]) -> list[str]:
    return [
        f"{request.models[model].model}: gives no expert; there are more models than experts"
        for model in unused_models
    ]
