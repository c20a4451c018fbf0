"""A Mixture-of-Experts model run by transformers, one layer and one expert in memory at a time.

transformers' own modules compute everything, in float32: its model is made without memory, and each
layer gets its weights when its turn comes. All tokens go through a layer before the next one, and
what a layer's experts read goes through one expert after the other.
"""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_fast.calibration.running import quiet_transformers
from moe_fast.calibration.texts import TokenSequences
from moe_fast.dtypes import DTYPE_NAMES, WEIGHT_DTYPES
from moe_fast.errors import ArgumentTypeError, CheckpointError, MoeConfigError
from moe_fast.models.moe import LAYER, MoeLayer, MoeModel, is_mtp
from moe_fast.models.quantisation import block_of, find_scales
from moe_fast.records import dataclass
from moe_fast.single_file import map_new_file, whole_file
from moe_fast.storage.files import OpenFiles
from moe_fast.storage.fp8 import dequantised
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.wording import brief

if TYPE_CHECKING:
    import torch

    from moe_fast.models.key_mapping import Sources

Floats = npt.NDArray[np.float32]
NUMBERS_AT_A_TIME = 2**24  # in the hidden states of a batch
FEWEST_TOKENS = 2048  # in a batch, unless the text has fewer
ROWS_AT_A_TIME = 8192  # that one expert reads
SCALE_ENDING = "_scale_inv"


class Reached(Exception):
    """Ends a forward pass where nothing more of it is needed."""


def require_transformers(what: str) -> None:
    """Raise `ImportError` unless torch and transformers 5 are installed, for `what` needs them."""
    try:
        import torch  # noqa: F401
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} runs the model, which needs {error.name}: pip install 'moe-fast[calibration]'",
            name=error.name,
        ) from None
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ImportError(
            f"{what} needs transformers 5 or later, this is {transformers.__version__}: "
            "pip install 'moe-fast[calibration]'",
            name="transformers",
        )


def open_device(name: str | torch.device) -> torch.device:
    """One of torch's devices, by its name.

    Raises
    ------
    MoeConfigError
        No such device here.
    ArgumentTypeError
        Neither a string nor a device.
    """
    import torch

    if not isinstance(name, (str, torch.device)):
        raise ArgumentTypeError(f"must be a string, got {brief(name)}", argument="device")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ModuleNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MoeConfigError(
            f"must be a device of torch's here, such as 'cpu', got {str(name)!r}: {reason}",
            argument="device",
        ) from None
    return device


@dataclass
class ExpertInputs:
    """What the experts of a layer read of all tokens, and who reads what.

    `states` are `(T, width)`; `chosen` and `weights` are `(T, k)`: the experts of each token, and
    what the layer multiplies their outputs with. Where it multiplies their inputs, as in Llama 4,
    `states` are `(T, E, width)`, and `weights` are 1.
    """

    states: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor


Visit = Callable[["Expert", "torch.Tensor", "torch.Tensor"], None]


@dataclass(frozen=True)
class Expert:
    """An expert of a layer, and how often the layer's tokens choose it."""

    layer: MoeLayer
    number: int
    num_tokens: int


class LayeredModel:
    """A model that reads some tokens, layer after layer.

    Parameters
    ----------
    model : MoeModel
        On disk.
    tokens : TokenSequences
        What it reads.
    device : str
        Where it computes.
    work : Path
        A folder for what is between two layers, which may be more than fits into memory.

    Raises
    ------
    CheckpointError
        A family that transformers does not know, weights that are quantised in an unknown way, or
        names that it has no place for.
    """

    def __init__(
        self, model: MoeModel, tokens: TokenSequences, device: torch.device, work: Path
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.device = device
        self.work = work
        self.scales = find_scales(model)
        self.files = OpenFiles()
        with quiet_transformers():
            self.network = make_network(model)
        self.layers, self.prefix = find_decoder_layers(self.network, model)
        self.base: str = self.prefix.removesuffix("layers.")
        self.decoder: Any = self.network.get_submodule(self.base.strip("."))
        self.sources = self.find_sources()
        self.experts = {layer.number: layer for layer in model.layers if not is_mtp(layer)}
        self.read_bytes = 0
        self.first_rows = np.cumsum([0, *map(len, tokens.sequences)])
        self.ids = self.load_outside_layers()

    def __enter__(self) -> LayeredModel:
        self.files.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.files.__exit__(*error)

    @property
    def num_layers(self) -> int:
        """The layers to run: nobody reads what follows the last experts."""
        return max(self.experts) + 1

    # Names and weights

    def find_sources(self) -> dict[str, Sources]:
        """The tensors of the checkpoint for each parameter of the network."""
        from moe_fast.models.key_mapping import find_sources

        self.names = {
            self.canonical(name): name
            for name in self.model.tensors
            if not name.endswith(SCALE_ENDING)
        }
        parameters = self.network.state_dict()
        found, _ = find_sources(self.network, parameters, self.names)
        for name, sources in list(found.items()):
            targets = [] if sources.converter is None else sources.converter.target_patterns
            for target in targets[1:]:  # what one tensor is split into
                found.setdefault(name.replace(targets[0], target), sources)
        return found

    def canonical(self, name: str) -> str:
        """A tensor's name as if the language model were not a part of another."""
        if self.model.language_key is None or not self.model.layers:
            return name
        match = LAYER.match(f"{self.model.layers[0].block}.")
        wrapper = "" if match is None else match["model"]
        if wrapper and name.startswith(wrapper):
            return self.base + name.removeprefix(wrapper)
        return name

    def read(self, tensor: Tensor) -> torch.Tensor:
        """A tensor of the checkpoint as float32; FP8 with scales is dequantised as it is read."""
        import torch

        self.read_bytes += tensor.nbytes
        if tensor.name in self.scales:
            weight = dequantised(tensor, self.scales[tensor.name], block_of(self.model), "F32")
            data = bytearray().join(weight.read(0, weight.nbytes))
            return torch.frombuffer(data, dtype=torch.float32).reshape(tensor.shape)
        if tensor.dtype not in WEIGHT_DTYPES and tensor.dtype != "F64":
            raise CheckpointError(
                f"is {tensor.dtype}, which is not computed with; {', '.join(WEIGHT_DTYPES)}, and "
                "F8_E4M3 with scales for blocks, are",
                file=tensor.file.path,
                tensor=tensor.name,
            )
        if not tensor.nbytes:
            return torch.empty(tensor.shape)
        data = self.files.read(tensor.file, tensor.offset, tensor.nbytes)
        dtype = getattr(torch, DTYPE_NAMES[tensor.dtype])
        return torch.frombuffer(data, dtype=dtype).reshape(tensor.shape).float()

    def tensor(self, name: str) -> Tensor:
        return self.model.tensors[self.names[name]]

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter of the network that is one tensor of the checkpoint, or made of several."""
        import torch

        sources = self.sources.get(name)
        if sources is None:
            raise CheckpointError(
                f"holds no tensor for {name!r} of {type(self.network).__name__} of transformers",
                file=self.model.path,
            )
        if sources.converter is None:
            return self.read(self.tensor(sources.names[""][0]))
        parts = {
            pattern: [self.read(self.tensor(each)) for each in names]
            for pattern, names in sources.names.items()
        }
        made: Any = parts
        targets = sources.converter.target_patterns
        try:
            for step in sources.converter.operations:
                made = step.convert(
                    made,
                    source_patterns=sources.converter.source_patterns,
                    target_patterns=sources.converter.target_patterns,
                    full_layer_name=name.replace(
                        next((t for t in targets if t in name), targets[0]), targets[0]
                    ),
                    model=self.network,
                    config=self.network.config,
                    missing_keys=set(),
                )
        except Exception as error:
            raise CheckpointError(
                f"transformers does not make {name!r} of {sources}: {error}", file=self.model.path
            ) from None
        value = made[next((key for key in made if key in name), next(iter(made)))]
        value = value[0] if isinstance(value, list) else value
        return torch.as_tensor(value)

    def load_outside_layers(self) -> list[npt.NDArray[np.int64]]:
        """Fill what stands before the layers; the tokens as rows of the embeddings that were read.

        Of embeddings only the rows of these tokens are read.
        """
        import torch

        from moe_fast.models.buffers import initialize_buffers

        distinct = np.unique(np.concatenate(self.tokens.sequences))
        state = self.network.state_dict()
        with quiet_transformers():
            initialize_buffers(self.network, state, self.device)
        weights: dict[str, torch.Tensor] = {}
        owners = dict(self.network.named_modules())
        for name in state:
            owner = owners[name.rpartition(".")[0]]
            if name.startswith(self.prefix) or not name.startswith(self.base):
                continue
            if isinstance(owner, torch.nn.Embedding):
                weights[name] = self.rows(name, distinct)
                owner.padding_idx = None
            elif not self.is_after_layers(name):
                weights[name] = self.parameter(name)
        self.assign(self.network, weights)
        return [np.searchsorted(distinct, sequence) for sequence in self.tokens.sequences]

    def is_after_layers(self, name: str) -> bool:
        """Whether a parameter belongs to the norm after the last layer, which nobody reads."""
        return name.removeprefix(self.base).startswith(
            ("norm.", "final_layernorm.", "norm_f.", "embedding_norm.")
        )

    def rows(self, name: str, distinct: npt.NDArray[np.int64]) -> torch.Tensor:
        import torch

        sources = self.sources.get(name)
        if sources is None or sources.converter is not None:
            return self.parameter(name)[torch.from_numpy(distinct)]
        tensor = self.tensor(sources.names[""][0])
        nbytes = tensor.nbytes // tensor.shape[0]
        rows = [
            self.read(
                Tensor(tensor.name, tensor.dtype, (1, *tensor.shape[1:]), tensor.file,
                       tensor.offset + int(row) * nbytes, nbytes)
            )
            for row in distinct
        ]  # fmt: skip
        return torch.cat(rows)

    def assign(self, module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
        """Put weights in the place of a module's, whatever their shapes."""
        import torch

        for name, value in weights.items():
            path, _, last = name.rpartition(".")
            owner = module.get_submodule(path)
            on_device = value if value.is_meta else value.to(self.device)
            if last in owner._parameters:
                owner._parameters[last] = torch.nn.Parameter(on_device, requires_grad=False)
            else:
                owner._buffers[last] = on_device

    @contextmanager
    def loaded(self, number: int) -> Iterator[torch.nn.Module]:
        """A layer with its weights, but for those of its experts; without them again after it."""
        layer = self.layers[number]
        empty = layer.state_dict()
        path = f"{self.prefix}{number}."
        experts = self.expert_module(number)
        skipped = None if experts is None else experts[0].removeprefix(path) + "."
        weights = {
            name: self.parameter(path + name)
            for name in empty
            if skipped is None or not self.is_expert_weight(path + name, skipped, path)
        }
        self.assign(layer, weights)
        try:
            yield layer
        finally:
            self.assign(layer, empty)

    def is_expert_weight(self, name: str, skipped: str, path: str) -> bool:
        if not name.removeprefix(path).startswith(skipped):
            return False
        return "correction_bias" not in name

    # Experts

    def expert_module(self, number: int) -> tuple[str, torch.nn.Module] | None:
        """The module that holds the experts of a layer, and its path; `None` in a dense layer."""
        if number not in self.experts:
            return None
        path = f"{self.prefix}{number}."
        for name, module in self.layers[number].named_modules():
            own = dict(module.named_parameters(recurse=False))
            if hasattr(module, "num_experts") and any(len(p.shape) == 3 for p in own.values()):
                return path + name, module
        raise CheckpointError(
            f"{type(self.network).__name__} of transformers has no experts in layer {number} that "
            "can be run one at a time",
            file=self.model.path,
        )

    def expert_weights(self, number: int, expert: int) -> dict[str, torch.Tensor]:
        """The parameters of one expert, by their names in the module, each `(1, ...)`."""
        found = self.expert_module(number)
        assert found is not None
        path, module = found
        return {
            name: self.expert_parameter(f"{path}.{name}", expert)
            for name, _ in module.named_parameters(recurse=False)
            if "correction_bias" not in name
        }

    def expert_parameter(self, name: str, expert: int) -> torch.Tensor:
        import torch

        sources = self.sources.get(name)
        if sources is None:
            raise CheckpointError(f"holds no tensor for {name!r}", file=self.model.path)
        steps = [] if sources.converter is None else sources.converter.operations
        kinds = [(type(step).__name__, getattr(step, "dim", 0)) for step in steps]
        if kinds in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
            patterns = [p for p in sources.converter.source_patterns if p in sources.names]
            parts = [self.read(self.tensor(sources.names[p][expert])) for p in patterns]
            return torch.cat(parts)[None]
        if kinds:
            return self.parameter(name)[expert : expert + 1]
        tensor = self.tensor(sources.names[""][0])
        nbytes = tensor.nbytes // tensor.shape[0]
        shape = (1, *tensor.shape[1:])
        offset = tensor.offset + expert * nbytes
        return self.read(Tensor(tensor.name, tensor.dtype, shape, tensor.file, offset, nbytes))

    def router_parameter(self, number: int) -> str:
        """The parameter that holds a layer's router."""
        router = self.experts[number].router
        assert router is not None
        name = self.canonical(router.name)
        return next(p for p, found in self.sources.items() if name in found.names.get("", ()))

    def layer_of(self, name: str) -> int | None:
        """The layer that a tensor of the checkpoint belongs to, if to one of those that run."""
        match = LAYER.fullmatch(self.canonical(name))
        return None if match is None else int(match["number"])

    # Running

    def batches(self, number: int) -> list[list[int]]:
        """The sequences that go through a layer together."""
        width = self.network.config.hidden_size
        size = max(FEWEST_TOKENS, NUMBERS_AT_A_TIME // width)
        if self.multiplies_inputs(number):
            size = max(256, size // self.model.num_experts)
        return list(self.tokens.batches(size))

    def multiplies_inputs(self, number: int) -> bool:
        """Whether the weight of an expert multiplies its input, as in Llama 4."""
        found = self.expert_module(number)
        return found is not None and len(inspect.signature(type(found[1]).forward).parameters) == 2

    def run_layer(
        self, number: int, before: np.memmap[Any, Any] | None, visit: Visit,
        read_router: Callable[[torch.Tensor], None] | None = None,
    ) -> np.memmap[Any, Any]:  # fmt: skip
        """Run all tokens through a layer; the hidden states after it, `(T, hidden_size)`.

        `before` are those that the layer reads, none for the first.
        `visit(expert, outputs, weights)` sees what each expert gives for the tokens
        that chose it, `(n, width)`, before they are multiplied with `weights`, `(n,)`.
        `read_router(logits)` sees all tokens' logits, `(T, E)`, a batch at a time.
        """
        import torch

        batches = self.batches(number)
        experts = self.expert_module(number)
        with self.loaded(number) as layer, torch.inference_mode(), self.others_passed(number) as at:
            run = LayerRun(self, layer, number, before, at)
            if experts is None:
                for batch in batches:
                    run.forward(batch)
                return run.result
            module = experts[1]
            one = single_expert(module)
            with router_logits_read(self, number, run, read_router):
                if len(batches) == 1:

                    def compute(inputs: ExpertInputs) -> torch.Tensor:
                        return self.through_experts(number, one, inputs, visit)

                    with run.experts_replaced(module, compute):
                        run.forward(batches[0])
                    return run.result
                inputs = run.collect_inputs(module, batches)
            outputs = self.through_experts(number, one, inputs, visit)
            run.with_outputs(module, batches, outputs)
            return run.result

    def through_experts(
        self, number: int, one: torch.nn.Module, inputs: ExpertInputs, visit: Visit
    ) -> torch.Tensor:
        """What the experts give for all tokens together, `(T, width)`, one expert at a time."""
        import torch

        layer = self.experts[number]
        per_expert = inputs.states.dim() == 3
        rows_shape = inputs.states.shape[0], inputs.states.shape[-1]
        total = torch.zeros(rows_shape, dtype=torch.float32, device=inputs.states.device)
        for expert in sorted(layer.experts):
            rows, places = torch.where(inputs.chosen == expert)
            found = Expert(layer, expert, len(rows))
            weights = inputs.weights[rows, places]
            if not len(rows):
                continue
            self.assign(one, self.expert_weights(number, expert))
            for start in range(0, len(rows), ROWS_AT_A_TIME):
                some = slice(start, start + ROWS_AT_A_TIME)
                states = (
                    inputs.states[rows[some], expert] if per_expert else inputs.states[rows[some]]
                )
                output = run_expert(one, states.to(self.device), per_expert)
                weight = weights[some].to(self.device)
                visit(found, output, weight)
                part = output * weight[:, None]
                total.index_add_(0, rows[some], part.to(total.device))
        return total

    @contextmanager
    def others_passed(self, number: int) -> Iterator[dict[str, Any]]:
        """Every other layer passes on what it gets, the one before what is set in the dict."""
        at: dict[str, Any] = {}

        def passing(index: int) -> Callable[..., Any]:
            def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
                return at["states"] if index == number - 1 else hidden_states

            return forward

        others = [(i, layer) for i, layer in enumerate(self.layers) if i != number]
        for i, layer in others:
            layer.forward = passing(i)
        try:
            yield at
        finally:
            for _, layer in others:
                del layer.forward


class LayerRun:
    """One layer, run for a batch of sequences after the other."""

    def __init__(
        self, model: LayeredModel, layer: torch.nn.Module, number: int,
        before: np.memmap[Any, Any] | None, at: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model = model
        self.layer = layer
        self.number = number
        self.before = before
        self.after: np.memmap[Any, Any] | None = None
        self.at = at
        self.batch: list[int] = []

    @property
    def result(self) -> np.memmap[Any, Any]:
        assert self.after is not None
        return self.after

    def rows(self, batch: Sequence[int]) -> npt.NDArray[np.int64]:
        """The rows of a batch's tokens among those of all sequences."""
        first = self.model.first_rows
        return np.concatenate([np.arange(first[i], first[i + 1]) for i in batch])

    def valid(self, batch: Sequence[int]) -> torch.Tensor:
        """Which tokens of a padded batch are not padding, `(batch, length)`."""
        import torch

        lengths = torch.tensor([len(self.model.ids[i]) for i in batch])
        return torch.arange(int(lengths.max()))[None] < lengths[:, None]

    def forward(self, batch: list[int], stop_before_output: bool = False) -> None:
        """Run a batch, and keep what the layer makes of it."""
        import torch

        model = self.model
        self.batch = batch
        valid = self.valid(batch)
        self.current_valid = valid.to(model.device)
        ids = TokenSequences(tuple(model.ids)).padded(batch)
        if self.before is not None:
            states = torch.zeros((*valid.shape, self.before.shape[1]))
            states[valid] = torch.from_numpy(self.before[self.rows(batch)])
            self.at["states"] = states.to(model.device)

        def forward(*args: Any, **kwargs: Any) -> Any:
            layer_class: Any = type(self.layer)
            with self.shared_states(kwargs.get("shared_kv_states"), batch):
                output = layer_class.forward(self.layer, *args, **kwargs)
            self.keep(output, valid, batch)
            raise Reached

        layer: Any = self.layer
        layer.forward = forward
        try:
            model.decoder(input_ids=torch.from_numpy(ids).to(model.device), use_cache=False)
        except Reached:
            pass
        finally:
            del layer.forward

    @contextmanager
    def shared_states(self, shared: Any, batch: Sequence[int]) -> Iterator[None]:
        """Give the layer the keys and values that earlier ones share, and keep what it shares.

        In Gemma 4, later layers read those of the last earlier layer of their kind.
        """
        import torch

        if shared is None:
            yield
            return
        file = self.model.work / f"shared.{batch[0]}"
        kept = torch.load(file, map_location=self.model.device) if file.exists() else {}
        shared.update(kept)
        yield
        if any(kept.get(kind) is not states for kind, states in shared.items()):
            whole = io.BytesIO()  # torch's own errors do not say that the disk is full
            torch.save(dict(shared), whole)
            with whole_file(file) as stream:
                stream.write(whole.getbuffer())

    def keep(self, output: Any, valid: torch.Tensor, batch: Sequence[int]) -> None:
        states = output[0] if isinstance(output, tuple) else output
        found = states.cpu()[valid].numpy()
        if self.after is None:
            total = int(self.model.first_rows[-1])
            path = self.model.work / f"states.{self.number}"
            self.after = map_new_file(path, np.float32, (total, found.shape[1]))
        self.after[self.rows(batch)] = found

    @contextmanager
    def experts_replaced(
        self, module: torch.nn.Module, compute: Callable[[ExpertInputs], torch.Tensor]
    ) -> Iterator[None]:
        """The layer's experts give what `compute` gives for the tokens that are not padding."""
        import torch

        num_experts = self.model.model.num_experts

        def forward(states: torch.Tensor, *choice: torch.Tensor, **named: torch.Tensor) -> Any:
            shape = states.shape
            flat = states.reshape(-1, shape[-1])
            valid = self.current_valid.reshape(-1)
            chosen_and_weights = (*choice, *named.values())
            if chosen_and_weights:
                chosen, weights = (each.reshape(len(flat), -1) for each in chosen_and_weights)
                inputs = ExpertInputs(flat[valid], chosen[valid], weights[valid].float())
            else:
                each = flat.reshape(num_experts, -1, shape[-1]).transpose(0, 1)
                inputs = inputs_of_all(each[valid], self.model.model.num_experts_per_tok or 1)
            found = compute(inputs).to(flat.device)
            if chosen_and_weights:
                output = torch.zeros_like(flat)
                output[valid] = found.to(output.dtype)
                return output.reshape(shape)
            # What is added over the experts stands in the first one's place.
            summed = torch.zeros_like(flat).reshape(num_experts, -1, shape[-1])
            summed[0, valid] = found.to(flat.dtype)
            return summed.reshape(shape)

        replaced: Any = module
        replaced.forward = forward
        try:
            yield
        finally:
            del replaced.forward

    def collect_inputs(self, module: torch.nn.Module, batches: Sequence[list[int]]) -> ExpertInputs:
        """What the experts read of all batches; the layer is run up to them."""
        import torch

        total = int(self.model.first_rows[-1])
        stores: dict[str, torch.Tensor] = {}

        def store(inputs: ExpertInputs) -> torch.Tensor:
            rows = torch.from_numpy(self.rows(self.batch))
            for name in ("states", "chosen", "weights"):
                part = getattr(inputs, name).cpu()
                if name not in stores:
                    stores[name] = self.disk_tensor(name, (total, *part.shape[1:]), part.dtype)
                stores[name][rows] = part
            raise Reached

        with self.experts_replaced(module, store):
            for batch in batches:
                self.forward(batch)
        return ExpertInputs(**stores)

    def with_outputs(
        self, module: torch.nn.Module, batches: Sequence[list[int]], outputs: torch.Tensor
    ) -> None:
        """Run the layer again, with what its experts gave."""
        import torch

        def give(_: ExpertInputs) -> torch.Tensor:
            return outputs[torch.from_numpy(self.rows(self.batch))]

        with self.experts_replaced(module, give):
            for batch in batches:
                self.forward(batch)

    def disk_tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in a file of the work folder, which the system keeps in memory as it can."""
        import torch

        kind = torch.empty(0, dtype=dtype).numpy().dtype
        return torch.from_numpy(map_new_file(self.model.work / name, kind, shape))


def inputs_of_all(states: torch.Tensor, top_k: int) -> ExpertInputs:
    """The choice behind inputs that are zero for whoever was not chosen, `(T, E, width)`."""
    import torch

    chosen = (states != 0).any(-1).float().topk(top_k, dim=1).indices
    return ExpertInputs(states, chosen, torch.ones(chosen.shape, device=states.device))


def single_expert(module: torch.nn.Module) -> torch.nn.Module:
    """A module like the layer's experts, with place for one of them."""
    one = copy.copy(module)
    one._parameters = dict(module._parameters)
    one._buffers = dict(module._buffers)
    one.__dict__.pop("forward", None)
    one.num_experts = 1
    return one


def run_expert(one: torch.nn.Module, states: torch.Tensor, alone: bool) -> torch.Tensor:
    """What one expert gives for some tokens, `(n, width)`, before any weight."""
    import torch

    forward: Any = type(one).forward
    if alone:
        return torch.as_tensor(forward(one, states))
    chosen = torch.zeros((len(states), 1), dtype=torch.long, device=states.device)
    weights = torch.ones((len(states), 1), dtype=states.dtype, device=states.device)
    return torch.as_tensor(forward(one, states, chosen, weights))


@contextmanager
def router_logits_read(
    model: LayeredModel, number: int, run: LayerRun, read: Callable[[torch.Tensor], None] | None
) -> Iterator[None]:
    """Give the router's logits of each batch to `read`, computed from what the router reads."""
    import torch

    if read is None:
        yield
        return

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else next(iter(kwargs.values()))
        weight: Any = module.weight
        flat = states.reshape(-1, states.shape[-1])[run.current_valid.reshape(-1)].float()
        read(torch.nn.functional.linear(flat, weight.float()))

    router = model.network.get_submodule(model.router_parameter(number).rpartition(".")[0])
    handle = router.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def make_network(model: MoeModel) -> Any:
    """transformers' model of the language model, without memory.

    Raises
    ------
    CheckpointError
        A family that transformers does not know.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    load: Any = AutoConfig.from_pretrained
    make: Any = AutoModelForCausalLM.from_config
    try:
        config = load(str(model.path), local_files_only=True, trust_remote_code=False)
        config = config.get_text_config(decoder=True)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        with torch.device("meta"):
            network = make(config, dtype=torch.float32, trust_remote_code=False)
    except Exception as error:  # configurations and models raise what they like
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"transformers does not make a model of it: {reason or repr(error)}",
            file=model.path / "config.json",
        ) from None
    if getattr(network.config, "_experts_implementation", None) is not None:
        network.config._experts_implementation = "eager"
    return network.eval()


def find_decoder_layers(network: Any, model: MoeModel) -> tuple[Any, str]:
    """The layers of a network, and what the names of their parameters begin with."""
    import torch

    for name, module in network.named_modules():
        if isinstance(module, torch.nn.ModuleList) and name.rpartition(".")[2] == "layers":
            return module, f"{name}."
    raise CheckpointError(
        f"{type(network).__name__} of transformers has no layers in a row", file=model.path
    )
