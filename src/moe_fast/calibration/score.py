"""`score_experts`: what each expert of an MoE is worth, by what it does with texts."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_fast.calibration.layers import (
    Expert,
    LayeredModel,
    open_device,
    require_transformers,
)
from moe_fast.calibration.texts import Texts, TokenArrays, TokenSequences, read_tokens
from moe_fast.checks import as_flag, as_index, as_path
from moe_fast.errors import CheckpointError, MoeConfigError
from moe_fast.models.moe import MoeModel, open_moe_model, require_experts
from moe_fast.models.scores import MEASURES, digest_routers
from moe_fast.progress import Progress, ShowsProgress, as_progress
from moe_fast.records import dataclass
from moe_fast.reports import Report, pandas_frame
from moe_fast.request import ModelPath
from moe_fast.single_file import check_place, whole_file
from moe_fast.storage.safetensors_header import header_bytes
from moe_fast.storage.staging import locked
from moe_fast.storage.strict_json import json_text, read_json
from moe_fast.storage.tensors import FORMAT
from moe_fast.version import __version__
from moe_fast.wording import format_count, format_numbers

if TYPE_CHECKING:
    import torch
    from pandas import DataFrame

__all__ = ["ScoreReport", "score_experts"]
Doubles = npt.NDArray[np.float64]
STATE = "state.json"


@dataclass(frozen=True)
class ScoreReport(Report):
    """The scores of the experts of a model.

    Attributes
    ----------
    model : Path
        The folder of the model.
    output : Path or None
        The file of scores, if one was written.
    num_tokens : int
        Tokens that the model read.
    num_experts : int
        Experts per layer.
    layers : mapping
        `layers["0"]["reap"]` lists the scores of the experts of layer 0 by one measure; the
        measures are `frequency`, `reap`, `ean_sum` and `ean_mean`, as in `score_experts`.
    routers_sha256 : str
        A digest of the first numbers of all routers, which tells this model from others.
    arrays : Path or None
        The file of mean outputs and similarities, if they were requested.
    seconds : float
        Time that the run took.
    warnings : tuple of str
        Layers in which experts got no token.
    """

    model: Path
    output: Path | None
    num_tokens: int
    num_experts: int
    layers: Mapping[str, Mapping[str, Sequence[float]]] = field(repr=False)
    routers_sha256: str
    arrays: Path | None
    seconds: float
    warnings: tuple[str, ...] = ()

    def to_frame(self) -> DataFrame:
        """Return the scores as a pandas data frame, one row per expert of a layer.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        rows = [(key, e) for key in self.layers for e in range(self.num_experts)]
        columns: dict[str, Any] = {
            "layer": [key for key, _ in rows],
            "expert": [expert for _, expert in rows],
        }
        for measure in MEASURES:
            columns[measure] = [self.layers[key][measure][expert] for key, expert in rows]
        return pandas_frame(columns)


def score_experts(
    model: ModelPath,
    output: ModelPath | None = None,
    *,
    texts: Texts | None = None,
    tokens: TokenArrays | None = None,
    length: int | None = None,
    mean_outputs: bool = False,
    gate_similarity: bool = False,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ScoreReport:
    r"""Run an MoE on texts and measure how important each expert of each layer is.

    With :math:`X_j` the tokens that the router sends to expert j, :math:`f_j(x)` its output and
    :math:`g_j(x)` the weight by which the layer multiplies it:

    - `frequency`: :math:`|X_j|`
    - `reap`: the mean over :math:`X_j` of :math:`g_j(x) \lVert f_j(x) \rVert_2` (REAP, arXiv
      2510.13999, eq. 9)
    - `ean_sum`, `ean_mean`: the sum and the mean over :math:`X_j` of
      :math:`\lVert f_j(x) \rVert_2`

    Experts without a token have 0. Everything is computed by transformers' own modules in float32,
    with one layer's attention and one expert in memory at a time, whatever the model's size. An
    interrupted run resumes after the last complete layer.

    Parameters
    ----------
    model : path
        A folder with an MoE of a family that transformers knows, in float32, bfloat16, float16, or
        FP8 with scales for blocks.
    output : path, optional
        The JSON file to write, which `prune_moe`, `merge_experts`, `expand_moe` and `extract_dense`
        read.
    texts : path, str or sequence of them
        Files: `.txt` and `.md` hold one text, `.jsonl` one per line, under the key `text`, or
        `messages` for the tokenizer's chat template. Other strings are texts themselves.
    tokens : array, sequence of arrays, or path
        Instead of texts: integers, `(sequences, length)`, sequences of several lengths, or a .npy
        file.
    length : int, optional
        Texts are truncated to this many tokens; by default the model's context, at most 2048.
    mean_outputs : bool
        Whether to store the mean output of each expert over its tokens, `(E, width)`, in a file
        beside `output`, which ends in .safetensors. `merge_experts` needs this and
        `gate_similarity` to form groups by scores.
    gate_similarity : bool
        Whether to store the cosine between the router's logits of each two experts, `(E, E)`, over
        all tokens.
    device : str or torch.device
        The torch device to compute on.
    overwrite : bool
        Whether to replace an existing file.
    progress : bool or callable, optional
        `True` shows a bar; a function is called repeatedly with the number of bytes of weights read
        so far and in total.

    Returns
    -------
    ScoreReport

    Raises
    ------
    CheckpointError
        If the model has no experts, transformers cannot run it, a file contains no token, or
        `output` exists or cannot be written.
    OSError
        If the disk is full. Finished layers are kept, and the same call resumes.
    TypeError, MoeConfigError
        If an argument has the wrong type or is out of range.
    ModuleNotFoundError
        Without torch or transformers: `pip install "moe-fast[calibration]"`.

    Examples
    --------
    >>> from moe_fast import build_moe, make_dense_model, score_experts
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> _ = build_moe(f"{folder}/dense", f"{folder}/moe")
    >>> report = score_experts(f"{folder}/moe", texts="To be, or not to be")
    >>> sum(report.layers["0"]["frequency"]), report.num_tokens
    (38, 19)
    """
    started = time.perf_counter()
    folder = as_path(model, "model")
    wants = {
        "mean_outputs": as_flag(mean_outputs, "mean_outputs"),
        "gate_similarity": as_flag(gate_similarity, "gate_similarity"),
    }
    if length is not None:
        length = as_index(length, "length", minimum=1)
    file = None if output is None else as_path(output, "output")
    arrays = check_output(file, overwrite=overwrite, matrices=any(wants.values()))
    opened = open_moe_model(folder)
    require_experts(opened)
    require_transformers("score")
    torch_device = open_device(device)
    read = read_tokens(folder, opened.language_config, texts=texts, tokens=tokens, length=length)
    with work_folder(file) as work:
        key = key_of(opened, read, wants, str(torch_device))
        with LayeredModel(opened, read, torch_device, work) as runner:
            layers = run(runner, key, wants, as_progress(progress, "reading"))
        if arrays is not None:
            write_arrays(work, list(layers), arrays)
        digest = digest_routers(opened)
        if file is not None:
            value = {
                "model": folder.absolute().name,
                "num_tokens": read.num_tokens,
                "routers_sha256": digest,
                **({} if arrays is None else {"arrays": arrays.name}),
                "layers": layers,
            }
            write_whole(file, json_text(value).encode())
    return ScoreReport(
        model=folder,
        output=file,
        num_tokens=read.num_tokens,
        num_experts=opened.num_experts,
        layers=layers,
        routers_sha256=digest,
        arrays=arrays,
        seconds=time.perf_counter() - started,
        warnings=tuple(warn_of_idle_experts(layers, read.num_tokens)),
    )


def check_output(file: Path | None, *, overwrite: bool, matrices: bool) -> Path | None:
    """The file of matrices, if there is to be one.

    Raises
    ------
    CheckpointError
        A file that exists, or a place that cannot be written.
    """
    if file is None:
        if matrices:
            raise MoeConfigError(
                "mean_outputs and gate_similarity are written beside the scores: name an output"
            )
        return None
    arrays = file.with_suffix(".safetensors") if matrices else None
    for path in filter(None, (file, arrays)):
        check_place(path, overwrite=overwrite)
    return arrays


@contextmanager
def work_folder(output: Path | None) -> Iterator[Path]:
    """A folder for what is not finished: beside the output, where it stays if cut off."""
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    work = output.absolute().with_name(f".{output.name}.partial")
    with locked(work / "lock", output):
        try:
            yield work
        except CheckpointError:  # the input is wrong: nothing of it is worth keeping
            empty(work)
            raise
        except BaseException as error:
            if (work / STATE).is_file():
                error.add_note(f"what is finished is kept in {work}; do the same again to resume")
            else:
                empty(work)
            raise
        empty(work)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()


def key_of(model: MoeModel, tokens: TokenSequences, wants: Mapping[str, bool], device: str) -> str:
    """What tells a run from others, so that only the same one is resumed."""
    files = sorted({tensor.file for tensor in model.tensors.values()})
    return sha256(repr((__version__, files, tokens.digest, wants, device)).encode()).hexdigest()


@dataclass
class Totals:
    """What is added up over the tokens of one layer, `(E,)` each."""

    frequency: npt.NDArray[np.int64]
    weighted: Doubles
    norms: Doubles
    outputs: Doubles | None = None
    logits: Doubles | None = None
    """The products of the router's logits, `(E, E)`."""

    @classmethod
    def of(cls, num_experts: int) -> Totals:
        return cls(np.zeros(num_experts, np.int64), np.zeros(num_experts), np.zeros(num_experts))

    def visit(self, expert: Expert, outputs: torch.Tensor, weights: torch.Tensor) -> None:
        """Add what an expert gives for some of its tokens."""
        import torch

        number = expert.number
        norms = torch.linalg.vector_norm(outputs.double(), dim=1)
        total = float(norms.sum())
        if not np.isfinite(total):
            raise CheckpointError(
                f"layer {expert.layer.key}: expert {number} gives outputs that are not finite"
            )
        self.frequency[number] += len(norms)
        self.norms[number] += total
        self.weighted[number] += float((norms * weights.double()).sum())
        if self.outputs is not None or self.wants_outputs:
            if self.outputs is None:
                self.outputs = np.zeros((len(self.frequency), outputs.shape[1]))
            self.outputs[number] += outputs.double().sum(dim=0).cpu().numpy()

    wants_outputs: bool = False

    def read_router(self, logits: torch.Tensor) -> None:
        products = (logits.double().T @ logits.double()).cpu().numpy()
        self.logits = products if self.logits is None else self.logits + products

    def scores(self) -> dict[str, list[float]]:
        count = np.maximum(self.frequency, 1)
        return {
            "frequency": self.frequency.tolist(),
            "reap": (self.weighted / count).tolist(),
            "ean_sum": self.norms.tolist(),
            "ean_mean": (self.norms / count).tolist(),
        }


def run(
    runner: LayeredModel, key: str, wants: Mapping[str, bool], progress: ShowsProgress | None
) -> dict[str, Any]:
    """Run the model, and keep after each layer what is needed to go on from there."""
    work = runner.work
    done, layers, width = read_state(work, key)
    total = sum(
        tensor.nbytes
        for name, tensor in runner.model.tensors.items()
        if runner.layer_of(name) in range(done, runner.num_layers)
    )
    before = None
    if done:
        shape = (runner.tokens.num_tokens, width)
        before = np.memmap(work / f"states.{done - 1}", np.float32, "r", shape=shape)
    for number in range(done, runner.num_layers):
        layer = runner.experts.get(number)
        totals = Totals.of(runner.model.num_experts)
        totals.wants_outputs = wants["mean_outputs"]

        def visit(expert: Expert, *given: torch.Tensor, totals: Totals = totals) -> None:
            totals.visit(expert, *given)
            if progress is not None:
                progress(min(runner.read_bytes, total), total)

        read_router = totals.read_router if wants["gate_similarity"] else None
        after = runner.run_layer(number, before, visit, read_router)
        if layer is not None:
            layers[layer.key] = totals.scores()
            save_matrices(work, layer.key, totals)
        after.flush()
        state = {"key": key, "done": number + 1, "width": after.shape[1], "layers": layers}
        write_whole(work / STATE, json_text(state).encode())
        (work / f"states.{number - 1}").unlink(missing_ok=True)
        before = after
        if progress is not None:
            last = number + 1 == runner.num_layers
            progress(total if last else min(runner.read_bytes, total), total)
    return layers


def read_state(work: Path, key: str) -> tuple[int, dict[str, Any], int]:
    """The layers that are done, their scores, and the width of what they gave."""
    file = work / STATE
    state = read_json(file, limit=2**30) if file.is_file() else {}
    if not isinstance(state, dict) or state.get("key") != key:
        empty(work)
        return 0, {}, 0
    return state["done"], state["layers"], state["width"]


def save_matrices(work: Path, key: str, totals: Totals) -> None:
    if totals.wants_outputs:
        outputs = totals.outputs
        if outputs is None:
            outputs = np.zeros((len(totals.frequency), 1))
        means = outputs / np.maximum(totals.frequency, 1)[:, None]
        save_array(work / f"mean_outputs.{key}.npy", means.astype(np.float32))
    if totals.logits is not None:
        norms = np.sqrt(np.maximum(np.diag(totals.logits), np.finfo(np.float64).tiny))
        cosines = np.clip(totals.logits / np.outer(norms, norms), -1, 1)
        save_array(work / f"gate_similarity.{key}.npy", cosines.astype(np.float32))


def save_array(file: Path, array: npt.NDArray[np.float32]) -> None:
    whole = io.BytesIO()  # NumPy's own errors do not say that the disk is full
    np.save(whole, array)
    write_whole(file, whole.getbuffer())


def write_arrays(work: Path, keys: list[str], file: Path) -> None:
    """One tensor a layer and kind, `layers.3.mean_outputs` and `layers.3.gate_similarity`."""
    found = {
        f"layers.{key}.{kind}": work / f"{kind}.{key}.npy"
        for key in keys
        for kind in ("mean_outputs", "gate_similarity")
        if (work / f"{kind}.{key}.npy").is_file()
    }
    arrays = {name: np.load(path, mmap_mode="r") for name, path in found.items()}
    header = header_bytes([(n, "F32", a.shape, a.nbytes) for n, a in arrays.items()], FORMAT)
    write_whole(file, header, *(array.tobytes() for array in arrays.values()))


def write_whole(file: Path, *parts: bytes | memoryview) -> None:
    with whole_file(file) as stream:
        for part in parts:
            stream.write(part)


def warn_of_idle_experts(layers: Mapping[str, Any], num_tokens: int) -> Iterator[str]:
    idle = {key: layer["frequency"].count(0) for key, layer in layers.items()}
    idle = {key: count for key, count in idle.items() if count}
    if idle:
        most = max(idle.values())
        yield (
            f"{format_numbers('layer', list(map(int, idle)))}: up to "
            f"{format_count(most, 'expert')} got none of the {num_tokens} tokens, and have the "
            "score 0; more text may tell more"
        )
