"""Dense models on disk become one Mixture-of-Experts checkpoint: design and report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_fast.checkpoint.build_request import (
    Backbone,
    BuildRequest,
    ReinitSets,
    as_request,
    located,
    request_values,
    said_of_routers,
)
from moe_fast.checkpoint.card import distinct_names, file_metadata, model_card
from moe_fast.checkpoint.construction import Construction, Split, open_sources, plan_experts
from moe_fast.checkpoint.design import Design, Facts, design_of, find_rounding, make_design
from moe_fast.checkpoint.manifest import Manifest
from moe_fast.checkpoint.output import Writing, warn_of_overflow
from moe_fast.checkpoint.random_pieces import choose_stream
from moe_fast.checkpoint.routers import RouterContext, digest_routers, make_routers
from moe_fast.checks import as_path
from moe_fast.config import Layout, LayoutName, MoeConfig
from moe_fast.dtypes import DTYPE_CODES
from moe_fast.errors import CheckpointError, MoeConfigError
from moe_fast.families.choice import choose
from moe_fast.families.dense import LAST_NORM, DenseModel
from moe_fast.families.key_types import with_floats
from moe_fast.families.readers import find_readers
from moe_fast.families.wrappers import has_place, warn_of_rest, wrapped_config, wrapped_weights
from moe_fast.models.folder import find_second_weights
from moe_fast.models.readers import contents_of, warn_of_readers
from moe_fast.plain import typed
from moe_fast.plan import MoeConstructionPlan, MoeReport
from moe_fast.progress import Progress
from moe_fast.records import dataclass
from moe_fast.reports import Report, pandas_frame
from moe_fast.request import DEFAULT_SHARD_SIZE, ExpertSource, ModelPath, RouterMethod, RouterStart
from moe_fast.routing.health import HealthRecord, RouterHealth, as_hidden_states, router_health
from moe_fast.storage.companions import find_companions, find_missing_code
from moe_fast.storage.floats import decode
from moe_fast.storage.hub import find_missing_tokenizer
from moe_fast.storage.writer import FileRecord

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from pandas import DataFrame

    from moe_fast.calibration.texts import TokenArrays
    from moe_fast.checkpoint.clusters import Labels
    from moe_fast.dtypes import DtypeLike

__all__ = ["BuildReport", "build_moe", "design_moe"]


@dataclass(frozen=True)
class BuildDesign(Design):
    """A design with what the report of a build tells."""

    construction: Construction = field(kw_only=True, repr=False)
    plan_report: MoeReport = field(kw_only=True, repr=False)
    rejected_targets: Mapping[str, tuple[str, ...]] = field(kw_only=True, repr=False)

    def predict_health(self, hidden_states: npt.ArrayLike | None = None) -> RouterHealth:
        """What the routers do with given hidden states, else with known ones or random ones."""
        construction = self.construction
        layers, routers = construction.moe_layers, construction.routers
        if hidden_states is None and routers.health is not None:
            return routers.health
        if hidden_states is None and routers.start.has_text:
            return judge_on_text(construction)
        states = routers.hidden_states
        if states is not None and len(layers) < len(states):
            states = states[list(layers)]
        source = "random tokens" if states is None else "tokens of the prompts"
        if hidden_states is not None:
            hidden_size = construction.base.sizes.hidden_size
            states = as_hidden_states(hidden_states, len(layers), hidden_size)
            source = "given tokens"
        # The shards of a copy share a row: who is chosen is decided among copies.
        repeats, shape = construction.row_repeats, construction.routers.context.shape
        pieces = (construction.routers.router(layer) for layer in layers)
        return router_health(
            (decode(b"".join(p.chunks()), construction.dtype).reshape(shape) for p in pieces),
            states,
            max(1, construction.config.num_experts_per_tok // repeats),
            layers=layers,
            source=source,
            remedy=construction.routers.remedy,
        )


def judge_on_text(construction: Construction) -> RouterHealth:
    """What routers do with a text that they were not made from."""
    from moe_fast.calibration.activations import stream_router_inputs  # what reads texts, if any do
    from moe_fast.calibration.selection import select_tokens

    start, base = construction.routers.start, construction.base
    chosen = select_tokens(
        base.path, base.config, 0, texts=start.texts, tokens=start.tokens,
        tokens_used=start.tokens_used,
    )  # fmt: skip
    context = construction.routers.context
    record = HealthRecord(
        context.num_experts_per_tok,
        source="tokens of the texts",
        remedy=construction.routers.remedy,
    )
    for layer, inputs in stream_router_inputs(base, chosen.sequences, device=start.device):
        if layer in context.layers:
            data = b"".join(construction.routers.router(layer).chunks())
            record.add(layer, decode(data, context.dtype).reshape(context.shape), inputs)
    return record.report()


@dataclass(frozen=True)
class BuildReport(Report):
    """What `build_moe` built.

    Attributes
    ----------
    output : Path
        The folder.
    target : str
        The family that was built, as `config.json` names it in `model_type`.
    num_experts, num_experts_per_tok : int
        Experts per layer, and experts per token.
    num_layers, num_parameters : int
        All layers and all parameters of the output.
    load_balance : float
        How evenly the models are used: the coefficient of variation of the number of experts taken
        from each; 0 is even.
    unused_models : sequence of int
        Numbers of the models that no expert comes from.
    num_bytes, num_files : int
        Size of the weights in bytes, and number of files of weights.
    seconds : float
        Time that the build took.
    experts : tuple of tuple of str
        For each expert of a layer, the models that it comes from, over all layers.
    files : mapping of str to int
        Size in bytes of each file of weights.
    routers : RouterHealth
        The predicted load of the experts before training.
    dry_run : bool
        Whether nothing was written.
    warnings : tuple of str
        What to know before using the output.
    dense_layers : tuple of int
        Layers without experts.
    layers_without_ffn : tuple of int
        Those of `dense_layers` that have no feed-forward network at all.
    granularity : int
        The number of experts that each feed-forward network was split into.
    rejected_targets : mapping of str to tuple of str
        With `target="auto"`, the families that do not fit the models, and why.
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
    files: Mapping[str, int] = field(repr=False)
    routers: RouterHealth = field(repr=False)
    dry_run: bool = False
    warnings: tuple[str, ...] = ()
    dense_layers: tuple[int, ...] = ()
    layers_without_ffn: tuple[int, ...] = ()
    granularity: int = 1
    rejected_targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)

    def to_frame(self) -> DataFrame:
        """Return the experts and the models they come from as a pandas data frame.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        names = distinct_names(model for models in self.experts for model in models)
        models = [", ".join(names[model] for model in models) for models in self.experts]
        return pandas_frame({"expert": range(len(self.experts)), "models": models})


def build_moe(
    models: ModelPath | ExpertSource | Sequence[ModelPath | ExpertSource],
    output: ModelPath,
    config: MoeConfig | None = None,
    *,
    target: str = "auto",
    layout: Layout | LayoutName | None = None,
    dtype: DtypeLike | None = None,
    base: ModelPath | None = None,
    shared_experts: ModelPath | ExpertSource | Sequence[ModelPath | ExpertSource] = (),
    dense_layers: Iterable[int] = (),
    routers: RouterMethod | RouterStart = "auto",
    logit_std: float | None = None,
    texts: ModelPath | Sequence[ModelPath] = (),
    tokens: TokenArrays | None = None,
    tokens_used: int | None = None,
    device: str | None = None,
    seed: int = 0,
    granularity: int = 1,
    mix_copies: bool = False,
    shuffle: bool = False,
    reinit: float = 0.0,
    reinit_sets: ReinitSets = "shared",
    split: Split | None = None,
    backbone: Backbone | Sequence[float] = "base",
    hidden_states: npt.ArrayLike | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    checksum: bool = False,
    fsync: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Build a Mixture-of-Experts checkpoint from dense models, streaming from disk to disk.

    Expert `e` of layer `l` is the feed-forward network of layer `l` of model `e % len(models)` (see
    `plan_moe_construction`); everything else comes from `base`. With one model, the MoE computes
    what the model computes, whatever its routers choose (sparse upcycling, Komatsuzaki et al.
    2023).

    Parameters
    ----------
    models : path, ExpertSource, or sequence of them
        Folders of dense models in the Hugging Face layout, with safetensors, all of the same shape
        and of a family that `moe-fast families` lists. An `ExpertSource` is a folder and the
        changes to make to its weights. A LoRA adapter, as PEFT saves it, means its base model with
        the adapter merged; `"MODEL+ADAPTER"` names the model explicitly. A string that is not a
        folder and reads `"organisation/name"`, or with a revision `"organisation/name@revision"`,
        is a repository on the Hugging Face Hub. It is read from the Hub's cache, and downloaded
        first if needed, unless `HF_HUB_OFFLINE=1`.
    output : path
        The folder to create.
    config : MoeConfig, optional
        By default 8 experts, 2 per token; with a `granularity`, 8 copies of it, one per token.
    target : str
        The family to build: `"mixtral"`, `"qwen3_moe"`, `"granitemoe"` or another that
        `moe-fast families` lists, or `"auto"`, the first of them that can represent everything in
        the base.
    layout : str or Layout, optional
        `"per-expert"`, the default, which every reader supports, or `"fused"`, which hardly any
        reader except transformers 5 supports. GraniteMoE has only its own fused layout.
    dtype : str or dtype, optional
        The dtype to convert every weight to, rounded to nearest even: `"float32"`, `"bfloat16"` or
        `"float16"`, for short `"fp32"`, `"bf16"`, `"fp16"`, or such a dtype of torch or NumPy. By
        default weights keep the sources' dtype, which must then be the same for all.
    base : path, optional
        The model to take attention, embeddings, norms and tokenizer from; by default the first.
    shared_experts : path, ExpertSource, or sequence of them
        Models whose FFN every token passes through, if the target has shared experts. Their output
        is added to that of the routed experts. To keep a model's function, scale both: with one
        shared expert, each by a `residual_scale` of 0.5 (in Qwen2-MoE only the routed ones, because
        a gate that is near one half initially scales the shared one). If routers are made from
        prompts, that gate is made from the prompts of the shared experts.
    dense_layers : iterable of int
        Layers that keep the FFN of the base instead of experts, if the target allows it: Qwen2-MoE
        and Qwen3-MoE any, DeepSeek-MoE the first ones and, after these, all but every n-th.
    routers : str or RouterStart
        How the routers are initialised. `"auto"` means `"calibrated"` if texts or tokens are given,
        otherwise `"normal"` with a `logit_std` of 3, or `"balanced"` with `split`. `"balanced"`,
        `"random"` and `"uniform"` are those of `RouterInit`, `"normal"` is drawn from the standard
        normal distribution, `"linear"` is like `torch.nn.Linear`. `"cheap_embed"` and `"hidden"`
        compute them from the prompts of each `ExpertSource`: from the embeddings of their tokens,
        or from the routers' inputs, which needs a run of the base model. `"calibrated"`,
        `"clustered"`, `"ridge"` and `"means"` compute them from texts, as described in
        `RouterStart`. In a 16-bit dtype, `"balanced"` leaves out its constant base, beside which
        rounding would lose the noise; this does not change the output of a softmax router.
    logit_std : float, optional
        How sharp the initial routers are: the standard deviation of a token's logits over the
        experts, as in `RouterStart`. By default 3 for `"auto"` and for routers made from texts;
        others keep the scale of their method.
    texts : path, str or sequence of them
        The texts from which routers are made (by the methods that need texts), on which `logit_std`
        is measured and the load is predicted: files that end in `.txt`, `.md` or `.jsonl`, or texts
        themselves. The base model is run on them, which needs torch and transformers.
    tokens : array, sequence of arrays, or path, optional
        Instead of texts: integers, `(sequences, length)`, sequences of several lengths, or a
        `.npy` file of such an array. The manifest stores the digest of arrays.
    tokens_used : int, optional
        How many of these tokens, spread evenly over the texts, the routers are made from: by
        default 256 for each expert, from 8192 to 32,768, and never fewer than 40 for each. The load
        is judged on a quarter as many of the other tokens.
    device : str, optional
        The device on which torch runs the base: `"cpu"`, the default, `"cuda"`, ...
    seed : int
        The seed of random routers, of the noise of an `ExpertSource`, of `shuffle` and `reinit`.
    granularity : int
        The number of experts that each feed-forward network is split into (He et al. 2024, arXiv
        2410.07524). `num_experts` counts the split ones: expert `e` is a shard of copy
        `e // granularity`, which comes from model `e // granularity % len(models)`; the shards of a
        copy share its row of the router. The model's function is preserved if `num_experts_per_tok`
        is a multiple of `granularity`: up and down projections are scaled, by powers of two if
        `granularity` is one, or, in families with a `routed_scaling_factor`, that factor is. By
        default a token uses one copy.
    mix_copies : bool
        In families that choose groups of experts first, whether a token may be sent to shards of
        several copies. By default whole copies are chosen, even if logits tie in 16 bits.
    shuffle : bool
        Whether the neurons of each copy are shuffled before they are split.
    reinit : float
        The fraction of each expert's neurons to reinitialise, 0 to 1, as in Drop-Upcycling
        (Nakamura et al. 2025, arXiv 2502.19261): they are drawn from the normal distribution with
        the mean and the standard deviation of the weights they replace. 0.5 was the best in the
        paper.
    split : str, optional
        How to split each FFN of one model into all experts, without copies (LLaMA-MoE, Zhu et al.
        2024, arXiv 2406.16554): expert `e` is part `e` of `num_experts` equal ones. `"contiguous"`
        cuts neurons in their order, `"random"` in a random one, `"clustered"` groups neurons with
        similar rows of the gate projection (balanced k-means; the manifest stores the clusters).
        The result is exact if `num_experts_per_tok` equals `num_experts`, in which case all parts
        have the same row of the router initially, and otherwise an approximation.
    backbone : str or sequence of float
        The weights outside the experts: `"base"`, or `"mean"`, the mean over `models` in float32,
        rounded once, as in Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816). A sequence
        gives the weight of each model in this mean. Tokenizer and config.json come from the base.
    reinit_sets : str
        `"shared"`: the same neurons in gate, up and down projections, as in the paper;
        `"separate"`: different ones in each, as in the authors' code.
    hidden_states : array_like, shape (T, hidden_size) or (L, T, hidden_size), optional
        The inputs of the routers of the L layers with experts, on which the load is predicted as by
        `predict_load`; the output does not depend on them. By default, those of the prompts' tokens
        if `routers` is `"hidden"`, else of random tokens.
    max_shard_size : int or str
        Weights per file, at most, unless a single tensor is larger: a number of bytes, or a string
        such as `"500MB"`, `"5GB"` or `"5GiB"`. Less than a megabyte needs a unit (`"300kB"`),
        because a plain 5 is probably a mistake.
    overwrite : bool
        Whether an existing `output` may be replaced; it stays until the new one is complete.
    threads : int, optional
        Files written at a time. By default `MOE_FAST_NUM_THREADS`, or 1.
    executor : concurrent.futures.Executor, optional
        Writes the files instead of threads: a `ProcessPoolExecutor`, or the `get_executor()` of a
        Dask client. Its workers need the models and the output under the same paths.
    checksum : bool
        Whether to store the SHA-256 of every file in the manifest.
    fsync : bool
        Whether to wait until the output would survive a power failure.
    dry_run : bool
        Whether to write nothing, and only find every problem and report what would be written.
    progress : bool or callable, optional
        `True` shows a bar; a function is called repeatedly with the number of bytes written so far
        and in total.

    Returns
    -------
    BuildReport

    Raises
    ------
    CheckpointError
        If the models cannot be combined or the output cannot be written, with every reason; nothing
        has been written then.
    OSError
        If the disk is full, or a file cannot be read or written. As after any interruption,
        finished files stay in a hidden folder beside `output`; the same call resumes with them,
        another call removes them.
    TypeError, MoeConfigError
        If an argument has the wrong type or is out of range, or `hidden_states` does not have the
        shape of the routers' inputs.

    Examples
    --------
    >>> from moe_fast import MoeConfig, build_moe, make_dense_model
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> report = build_moe(f"{folder}/dense", f"{folder}/moe", MoeConfig(num_experts=4))
    >>> report.num_experts, report.num_layers, report.load_balance
    (4, 2, 0.0)
    """
    request = as_request(
        models, config, target, layout, dtype, base, shared_experts, dense_layers,
        routers, said_of_routers(logit_std, texts, tokens, tokens_used, device), seed,
        granularity, mix_copies, shuffle, reinit, reinit_sets, split, backbone,
        max_shard_size,
    )  # fmt: skip
    writing = Writing(overwrite, threads, executor, checksum, fsync, dry_run, progress)
    return build(located(request), output, writing, hidden_states=hidden_states)


def design_moe(
    models: ModelPath | ExpertSource | Sequence[ModelPath | ExpertSource],
    config: MoeConfig | None = None,
    *,
    target: str = "auto",
    layout: Layout | LayoutName | None = None,
    dtype: DtypeLike | None = None,
    base: ModelPath | None = None,
    shared_experts: ModelPath | ExpertSource | Sequence[ModelPath | ExpertSource] = (),
    dense_layers: Iterable[int] = (),
    routers: RouterMethod | RouterStart = "auto",
    logit_std: float | None = None,
    texts: ModelPath | Sequence[ModelPath] = (),
    tokens: TokenArrays | None = None,
    tokens_used: int | None = None,
    device: str | None = None,
    seed: int = 0,
    granularity: int = 1,
    mix_copies: bool = False,
    shuffle: bool = False,
    reinit: float = 0.0,
    reinit_sets: ReinitSets = "shared",
    split: Split | None = None,
    backbone: Backbone | Sequence[float] = "base",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> Design:
    """Describe the checkpoint that `build_moe` would write, as tensors to list and to read.

    The arguments are those of `build_moe`. Nothing is written. Only headers are read, unless
    routers are made from prompts or texts; each tensor's bytes are read or computed when they are
    requested.

    Returns
    -------
    Design

    Raises
    ------
    CheckpointError, TypeError, MoeConfigError
        As for `build_moe`.

    Examples
    --------
    >>> from moe_fast import MoeConfig, design_moe, make_dense_model
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> design = design_moe(f"{folder}/dense", MoeConfig(num_experts=4), dtype="float32")
    >>> design.read("model.layers.0.block_sparse_moe.gate.weight").shape
    (4, 64)
    """
    request = as_request(
        models, config, target, layout, dtype, base, shared_experts, dense_layers,
        routers, said_of_routers(logit_std, texts, tokens, tokens_used, device), seed,
        granularity, mix_copies, shuffle, reinit, reinit_sets, split, backbone,
        max_shard_size,
    )  # fmt: skip
    return design_of(located(request))


def build(
    request: BuildRequest,
    output: ModelPath,
    writing: Writing,
    warnings: Sequence[str] = (),
    hidden_states: npt.ArrayLike | None = None,
    recipe: Path | None = None,
) -> BuildReport:
    """Write what a request asks for; the report has `warnings` before those of the build.

    `recipe` is the file that the request was read from, which the output must not replace.
    """
    output = as_path(output, "output")
    if hidden_states is not None and request.routers.has_text:
        raise MoeConfigError(
            "must not stand beside texts or tokens: one of them says what the routers read",
            argument="hidden_states",
        )
    started = time.perf_counter()
    mapped = hidden_states.filename if isinstance(hidden_states, np.memmap) else None
    also_read = [Path(file) for file in (recipe, mapped) if file is not None]
    design = make_design(request, output, writing)
    assert isinstance(design, BuildDesign)
    design = replace(design, warnings=(*warnings, *design.warnings), also_read=also_read)
    health = design.predict_health(hidden_states)
    records = design.write(output, writing)
    seconds = time.perf_counter() - started
    return describe_build(design, output, health, records, writing, seconds)


@design_of.register
def design_build(request: BuildRequest, decisions: Facts | None = None) -> BuildDesign:
    """From headers alone, unless routers are to be made from prompts, or a head is tied."""
    construction = construct(request, decisions or {})
    problems = construction.problems()
    try:
        family, rejected = choose(request.target, construction, request.layout)
    except CheckpointError as error:
        problems += error.problems
    if problems:
        raise CheckpointError(*problems)
    layout = request.layout or family.layouts[0]
    construction = replace(construction, scale_shards=family.scaling_key is None)
    plan, config = construction.plan, with_floats(family.config(construction))
    sizes = construction.base.sizes
    plan_report = plan.report(
        sizes.hidden_size,
        sizes.intermediate_size,
        plan.num_experts,
        granularity=request.shards,
    )
    request = replace(request, target=family.name)  # "auto" may choose otherwise one day
    base = construction.base
    weights = dict(family.tensors(construction, layout))
    weights = wrapped_weights(family, base, weights, construction.convert)
    config = wrapped_config(family, base, config)
    contents = contents_of(
        config,
        weights,
        construction.base.path,
        layout=layout,
        num_experts=plan.num_experts,
    )
    readers = find_readers(config, contents)
    return BuildDesign(
        weights=weights,
        config=config,
        companions=find_companions(
            base.path, processors=base.wrapper is None or has_place(family, base)
        ),
        sources=[each for model in construction.opened_models() for each in model.sources()],
        family=family.name,
        num_experts=len(construction.moe_layers) * plan.num_experts,
        manifest=Manifest(
            request=request,
            family=family.name,
            facts={
                "source_model": plan.source_model.tolist(),
                "source_layer": plan.source_layer.tolist(),
            },
            decisions={
                **digest_routers(construction.routers),
                **({"clusters": written_clusters(construction)} if construction.clusters else {}),
            },
        ),
        reference=construction.base.path,
        reason_to_differ=find_reason_to_differ(request, construction.base),
        card=model_card(request_values(request), family, construction, config, readers),
        warnings=(
            *(w for each in construction.opened_models() for w in find_second_weights(each.path)),
            *find_missing_code(construction.base.path),
            *find_missing_tokenizer(construction.base.path),
            *construction.warnings(),
            *family.warnings(construction),
            *(
                f"{base.path / 'config.json'}: {each}"
                for each in base.family.reservations(base.config, base.tensors[LAST_NORM].dtype)
            ),
            *warn_of_rest(family, base),
            *warn_of_readers(config, contents, construction.base.path),
            *warn_of_unused_models(request.models, plan_report),
        ),
        metadata=file_metadata(construction),
        max_shard_size=request.max_shard_size,
        construction=construction,
        plan_report=plan_report,
        rejected_targets=rejected,
    )


def construct(request: BuildRequest, decisions: Facts) -> Construction:
    """Open the sources of a request, and say where everything comes from."""
    asked = (*request.models, *request.shared_experts)
    sources, base = open_sources(asked, request.base)
    num_layers = base.sizes.num_hidden_layers
    with_ffn = base.ffn_layers
    dense = {*request.dense_layers, *(n for n in range(num_layers) if n not in with_ffn)}
    plan = plan_experts(
        request.models,
        request.shared_experts,
        sorted(dense),
        request.config,
        num_layers,
        request.shards,
    )
    dtype = None if request.dtype is None else DTYPE_CODES[request.dtype]
    context = RouterContext(
        base=base,
        experts=[request.models[model] for model in plan.source_model[0][:: request.row_repeats]],
        shared_experts=request.shared_experts,
        layers=[layer for layer in range(num_layers) if layer not in dense],
        dtype=dtype or base.expert_dtype,
        seed=request.seed,
        num_experts_per_tok=max(1, request.config.num_experts_per_tok // request.row_repeats),
        opened={source.origin: model for source, model in zip(asked, sources, strict=True)},
    )
    construction = Construction(
        base=base,
        sources=sources[: len(request.models)],
        models=request.models,
        plan=plan,
        config=request.config,
        routers=make_routers(
            request.routers, context, as_digests(decisions.get("router_sha256", ()))
        ),
        seed=request.seed,
        shared_sources=sources[len(request.models) :],
        shared_experts=request.shared_experts,
        dense_layers=sorted(dense),
        converted_to=dtype,
        granularity=request.shards,
        row_repeats=request.row_repeats,
        split=request.split,
        mix_copies=request.mix_copies,
        shuffled=request.shuffle,
        reinit=request.reinit,
        separate_sets=request.reinit_sets == "separate",
        backbone=weigh_models(request, sources),
    )
    if request.split != "clustered" or construction.problems():
        return construction
    return replace(construction, clusters=find_clusters(construction, decisions.get("clusters")))


def find_clusters(construction: Construction, kept: Any) -> dict[int, Labels]:
    """The cluster of each neuron in each layer with experts: those `kept` by a manifest, or new."""
    from moe_fast.checkpoint.clusters import cluster_neurons, read_labels

    width, parts = construction.base.sizes.intermediate_size, construction.granularity
    layers = construction.moe_layers
    if kept is not None:
        if not isinstance(kept, Mapping) or {*kept} != {str(layer) for layer in layers}:
            raise CheckpointError("clusters must be given for each layer with experts")
        return {layer: read_labels(kept[str(layer)], width, parts) for layer in layers}
    found = {}
    for layer in layers:
        source_layer = int(construction.plan.source_layer[layer, 0])
        source = construction.sources[0]
        rows = source.ffn_weight(source_layer, source.family.roles[0])
        stream = choose_stream(construction.seed, f"{layer} clusters")
        found[layer] = cluster_neurons(rows, parts, stream)
    return found


def written_clusters(construction: Construction) -> dict[str, str]:
    """The same as a manifest keeps them."""
    from moe_fast.checkpoint.clusters import write_labels

    return {str(layer): write_labels(labels) for layer, labels in construction.clusters.items()}


def weigh_models(
    request: BuildRequest, sources: Sequence[DenseModel]
) -> list[tuple[DenseModel, float]]:
    """The models that the backbone is the mean of, each once, with its weight; none: the base's."""
    if request.backbone == "base":
        return []
    weights = request.backbone_weights or (1.0,) * len(request.models)
    found: dict[str, tuple[DenseModel, float]] = {}
    for model, weight in zip(sources, weights, strict=False):
        if model.identity not in found:
            found[model.identity] = model, weight
        elif request.backbone_weights:
            found[model.identity] = model, found[model.identity][1] + weight
    return list(found.values())


def as_digests(digests: Any) -> tuple[str, ...]:
    """The digests of a manifest, which may hold anything."""
    try:
        found: tuple[str, ...] = typed(list(digests), tuple[str, ...], "router_sha256")
    except (TypeError, MoeConfigError):
        raise CheckpointError("router_sha256 must list digests") from None
    return found


def find_reason_to_differ(request: BuildRequest, base: DenseModel) -> str | None:
    """Why an output need not compute what its base does.

    `None` where it must: experts that are all the same FFN add up to that FFN, whatever the router
    says, because a token's weights add up to 1. Rounding is a reason only where nothing else is.
    """
    if base.block is not None:
        return "weights in FP8 were dequantised, and readers round otherwise"
    if request.backbone != "base" and len({source.origin for source in request.models}) > 1:
        return "everything but the experts is the mean of the models"
    if request.shared_experts:
        return "shared experts add their output"
    for source in request.models:
        same_layers = source.source_layers in (None, tuple(range(len(source.source_layers or ()))))
        if source.model != request.base or not same_layers:
            return "experts come from elsewhere than the base's own layers"
        if source.lora is not None:
            return "experts have adapters folded in"
        if source.noise_scale != 0 or source.residual_scale != 1:
            return "experts have noise or a scale"
    if request.reinit:
        return "neurons of the experts were drawn anew"
    if request.config.num_experts_per_tok % request.shards:
        return "tokens take some shards of a copy and not the others"
    return find_rounding(request.dtype, base.tensors)


def warn_of_unused_models(models: Sequence[ExpertSource], report: MoeReport) -> list[str]:
    return [
        f"{models[model].origin}: gives no expert; there are more models than experts"
        for model in report.unused_models
    ]


def describe_build(
    design: BuildDesign,
    output: Path,
    health: RouterHealth,
    records: Mapping[str, FileRecord],
    writing: Writing,
    seconds: float,
) -> BuildReport:
    construction = design.construction
    plan, report = construction.plan, design.plan_report
    return BuildReport(
        output=output,
        target=design.family,
        num_experts=plan.num_experts,
        num_experts_per_tok=construction.config.num_experts_per_tok,
        num_layers=plan.num_layers,
        dense_layers=tuple(construction.dense_layers),
        layers_without_ffn=tuple(
            n for n in range(plan.num_layers) if n not in construction.base.ffn_layers
        ),
        granularity=construction.granularity,
        num_parameters=design.num_parameters,
        load_balance=report.load_balance,
        unused_models=report.unused_models,
        num_bytes=design.num_bytes,
        num_files=len(design.shards),
        seconds=seconds,
        experts=models_of_experts(construction.models, plan),
        files={shard.file_name: shard.nbytes for shard in design.shards},
        dry_run=writing.dry_run,
        warnings=(*design.warnings, *warn_of_overflow(records), *health.warnings),
        routers=health,
        rejected_targets=design.rejected_targets,
    )


def models_of_experts(
    models: Sequence[ExpertSource], plan: MoeConstructionPlan
) -> tuple[tuple[str, ...], ...]:
    return tuple(
        tuple(models[model].origin for model in sorted({*plan.source_model[:, expert].tolist()}))
        for expert in range(plan.num_experts)
    )
