"""`reroute_moe`: an MoE checkpoint whose routers start anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from moe_fast.calibration.rerouted import Floats, is_choice_bias, stream_moe_inputs
from moe_fast.calibration.texts import TokenArrays, Tokens, TokenSequences
from moe_fast.checkpoint.build_request import said_of_routers
from moe_fast.checkpoint.design import Facts, design_of
from moe_fast.checkpoint.neurons import RepeatedRows
from moe_fast.checkpoint.operation import (
    OperationDesign,
    OperationReport,
    design_operation,
    perform,
)
from moe_fast.checkpoint.output import Writing
from moe_fast.checkpoint.routers import RouterContext, digest_routers, make_routers
from moe_fast.checks import as_index, as_size
from moe_fast.dtypes import ITEM_SIZES, WEIGHT_DTYPES
from moe_fast.errors import CheckpointError, MoeConfigError
from moe_fast.models.moe import MoeLayer, MoeModel, is_mtp, open_moe_model, require_experts
from moe_fast.plain import typed
from moe_fast.progress import Progress
from moe_fast.records import dataclass
from moe_fast.request import (
    DEFAULT_SHARD_SIZE,
    ExpertSource,
    ModelPath,
    Request,
    RouterMethod,
    RouterStart,
    choose_start,
)
from moe_fast.storage.files import OpenFiles
from moe_fast.storage.floats import decode
from moe_fast.storage.pieces import Piece, Remembered
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.tensors import Weight

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["reroute_moe"]
OF_SOURCES = ("cheap_embed", "hidden", "ridge", "means")


@dataclass(frozen=True)
class RerouteRequest(Request):
    """How the routers of a finished MoE start; `model` is a folder."""

    operation: ClassVar[str] = "reroute"

    model: str
    routers: RouterStart = field(default_factory=RouterStart)
    seed: int = 0
    max_shard_size: int = DEFAULT_SHARD_SIZE

    def folders(self) -> list[str]:
        return [self.model]

    def moved(self, now: Mapping[str, str]) -> RerouteRequest:
        return replace(self, model=now[self.model])


@dataclass(frozen=True)
class MoeContext(RouterContext):
    """What a start may make the rows of a finished MoE from."""

    model: MoeModel = field(kw_only=True)
    num_rows: int = field(kw_only=True)
    hidden_size: int = field(kw_only=True)
    repeats: int = field(kw_only=True)
    """How many experts, one after the other, share a row."""
    made: dict[int, Floats] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.hidden_size

    @property
    def folder(self) -> Path:
        return self.model.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self.model.language_config

    def stream_inputs(
        self, texts: Sequence[Tokens], start: RouterStart, kind: ExpertSource | None
    ) -> Iterator[tuple[int, Floats]]:
        yield from stream_moe_inputs(
            self.model,
            TokenSequences(tuple(texts)),
            self.made,
            device=start.device,
            needed_by=f"routers={start.method!r}",
        )

    def use(self, layer: int, rows: Floats) -> Floats | None:
        self.made[layer] = np.repeat(rows, self.repeats, axis=0)
        (found,) = (each for each in self.model.layers if each.number == layer and not is_mtp(each))
        return read_rows(found)[:: self.repeats]


def reroute_moe(
    model: ModelPath,
    output: ModelPath,
    routers: RouterMethod | RouterStart = "calibrated",
    *,
    logit_std: float | None = None,
    texts: ModelPath | Sequence[ModelPath] = (),
    tokens: TokenArrays | None = None,
    tokens_used: int | None = None,
    device: str | None = None,
    seed: int = 0,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    checksum: bool = False,
    fsync: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> OperationReport:
    """Reinitialise the routers of an MoE checkpoint, made by any tool.

    All other weights are unchanged, except biases that affect a router's choice, which become 0.
    Consecutive experts that share a row, as the shards of one copy do, still share one. Multi-token
    prediction layers keep their routers.

    Parameters
    ----------
    model : path
        A folder with an MoE.
    output : path
        The folder to create.
    routers : str or RouterStart
        As in `build_moe`, except the methods that need several sources or their prompts. If routers
        are made from texts, the input of each layer is computed with the new routers of the layers
        before it.
    logit_std, texts, tokens, tokens_used, device, seed
        As in `build_moe`.
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
        If the model has no experts, or routers that are not matrices of floats.
    TypeError, MoeConfigError
        If an argument has the wrong type or is out of range.

    Examples
    --------
    >>> from moe_fast import MoeConfig, build_moe, make_dense_model, reroute_moe
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> _ = build_moe(f"{folder}/dense", f"{folder}/moe", MoeConfig(num_experts=4))
    >>> reroute_moe(f"{folder}/moe", f"{folder}/sharp", "normal", logit_std=3).num_experts
    4
    """
    said = said_of_routers(logit_std, texts, tokens, tokens_used, device)
    start = choose_start(routers, said=said)
    request = RerouteRequest(
        model=str(Path(model).absolute()),
        routers=start,
        seed=as_index(seed, "seed"),
        max_shard_size=as_size(max_shard_size, "max_shard_size"),
    )
    writing = Writing(overwrite, threads, executor, checksum, fsync, dry_run, progress)
    files = [Path(each) for each in (*start.texts, start.tokens) if each and is_there(each)]
    return perform(request, output, writing, files)


def is_there(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # a text, too long for a name
        return False


@design_of.register
def design_rerouted(request: RerouteRequest, decisions: Facts | None = None) -> OperationDesign:
    """From headers and routers alone, unless rows are made from texts."""
    model = open_moe_model(request.model)
    require_experts(model)
    if request.routers.method in OF_SOURCES:
        raise MoeConfigError(
            f"{request.routers.method!r} is made from the sources of a build; an MoE takes "
            "calibrated, clustered or drawn ones",
            argument="routers",
        )
    layers = [layer for layer in model.layers if not is_mtp(layer)]
    check_routers(layers)
    context = context_of(model, layers, request.seed)
    digests = typed(list((decisions or {}).get("router_sha256", ())), tuple[str, ...], "digests")
    made = make_routers(request.routers, context, digests)
    weights = {name: Weight.of(tensor) for name, tensor in model.tensors.items()}
    for layer in layers:
        assert layer.router is not None
        rows: Piece = made.router(layer.number)
        if context.repeats > 1:
            size, times = context.hidden_size * ITEM_SIZES[context.dtype], context.repeats
            if isinstance(rows, Remembered):
                rows = Remembered(rows.nbytes * times, rows.sha256, size, times)
            else:
                rows = RepeatedRows(rows, size, times)
        weights[layer.router.name] = Weight(context.dtype, layer.router.shape, (rows,))
        for name, tensor in layer.counted.items():
            if is_choice_bias(name):
                weights[tensor.name] = Weight.zeros(tensor.dtype, tensor.shape)
    warnings = []
    ahead = [layer.key for layer in model.layers if is_mtp(layer)]
    if ahead:
        warnings.append(f"layers that predict ahead keep their routers: {', '.join(ahead)}")
    health = None if digests else made.health
    if health is not None:
        warnings += health.warnings
    design = design_operation(
        request,
        model,
        weights,
        dict(model.config),
        experts_per_layer=model.num_experts,
        experts_per_tok=model.num_experts_per_tok,
        reason_to_differ="its routers start anew",
        max_shard_size=request.max_shard_size,
        facts={"rows_shared_by": context.repeats},
        decisions=digest_routers(made),
        sentence=f"started its routers anew by the method {request.routers.method}",
        warnings=warnings,
    )
    return replace(design, health=health)


def context_of(model: MoeModel, layers: Sequence[MoeLayer], seed: int) -> MoeContext:
    router = layers[0].router
    assert router is not None
    repeats = min(shared_rows(read_rows(layer), model.num_experts_per_tok) for layer in layers)
    top_k = model.num_experts_per_tok or 1
    opened: Any = None
    return MoeContext(
        base=opened,
        experts=[ExpertSource(str(model.path))] * (model.num_experts // repeats),
        shared_experts=(),
        layers=[layer.number for layer in layers],
        dtype=router.dtype,
        seed=seed,
        num_experts_per_tok=max(1, top_k // repeats),
        model=model,
        num_rows=model.num_experts // repeats,
        hidden_size=router.shape[1],
        repeats=repeats,
    )


def check_routers(layers: Sequence[MoeLayer]) -> None:
    """Raise `CheckpointError` unless all routers are matrices of one shape and dtype of floats."""
    problems = []
    first = layers[0].router
    for layer in layers:
        router = layer.router
        if router is None or len(router.shape) != 2:
            problems.append(f"{layer.block} has no router that is a matrix")
        elif router.dtype not in WEIGHT_DTYPES:
            problems.append(f"{router.name} is {router.dtype}; {', '.join(WEIGHT_DTYPES)} start")
        elif first is not None and (router.shape, router.dtype) != (first.shape, first.dtype):
            problems.append(f"{router.name} has another shape or dtype than {first.name}")
    if problems:
        raise CheckpointError(*problems)


def read_rows(layer: MoeLayer) -> Floats:
    """A layer's router, `(E, H)`."""
    router: Tensor | None = layer.router
    assert router is not None
    with OpenFiles() as files:
        data = files.read(router.file, router.offset, router.nbytes)
    return decode(data, router.dtype).reshape(router.shape)


def shared_rows(rows: Floats, top_k: int | None) -> int:
    """How many experts, one after the other, share each row and are chosen together."""
    number = len(rows)
    for size in range(min(number // 2, top_k or 1), 1, -1):
        if number % size or (top_k or 1) % size:
            continue
        groups = rows.reshape(number // size, size, -1)
        distinct = len({group[0].tobytes() for group in groups}) == len(groups)
        if distinct and (groups == groups[:, :1]).all():
            return size
    return 1
