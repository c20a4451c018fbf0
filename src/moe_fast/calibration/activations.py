"""What a dense model makes of tokens: their embeddings, and what its routers would read.

Runs a model, which needs transformers and torch, and memory for one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_fast.calibration.layers import open_device
from moe_fast.calibration.running import read_settings, return_memory, running
from moe_fast.calibration.texts import Tokens, TokenSequences
from moe_fast.dtypes import DTYPE_NAMES, WEIGHT_DTYPES
from moe_fast.errors import CheckpointError
from moe_fast.families.dense import DenseModel
from moe_fast.storage.files import OpenFiles
from moe_fast.storage.floats import decode

if TYPE_CHECKING:
    import torch


Floats = npt.NDArray[np.float32]
Visit = Callable[[int, int, Floats], None]
TOKENS_AT_A_TIME = 1024  # in one batch of texts, with what pads them


def embeddings(model: DenseModel, tokens: Sequence[int]) -> Floats:
    """The embeddings of some tokens, `(T, hidden_size)`; the others are not read.

    Raises
    ------
    CheckpointError
        A token that the model does not have.
    """
    table = model.tensors["model.embed_tokens.weight"]
    rows, columns = table.shape
    if max(tokens) >= rows:
        raise CheckpointError(
            f"has {rows} rows; the tokenizer beside it gives the token {max(tokens)}",
            file=table.file.path,
            tensor=table.name,
        )
    distinct, places = np.unique(tokens, return_inverse=True)
    nbytes = table.nbytes // rows
    found = bytearray()
    with OpenFiles() as files:
        for row in distinct.tolist():
            found += files.read(table.file, table.offset + row * nbytes, nbytes)
    return decode(found, table.dtype).reshape(-1, columns)[places]


def visit_router_inputs(model: DenseModel, texts: Sequence[Sequence[int]], visit: Visit) -> None:
    """Call `visit(layer, i, inputs)` with what each layer's router will read of text `i`.

    As `stream_router_inputs` says, whose errors it has. `inputs` are `(T, hidden_size)`.
    """
    longest = max(len(text) for text in texts)
    if longest > model.config["max_position_embeddings"]:
        raise CheckpointError(
            f"a prompt has {longest} tokens; "
            f"the model reads at most {model.config['max_position_embeddings']}",
            file=model.path,
        )
    ends = np.cumsum([len(text) for text in texts])[:-1].tolist()
    for layer, inputs in stream_router_inputs(model, texts, needed_by="routers='hidden'"):
        for number, rows in enumerate(np.split(inputs, ends)):
            visit(layer, number, rows)


def stream_router_inputs(
    model: DenseModel,
    texts: Sequence[Sequence[int] | Tokens],
    *,
    experts: DenseModel | None = None,
    source_layers: Sequence[int] | None = None,
    device: str = "cpu",
    needed_by: str = "reading texts",
) -> Iterator[tuple[int, Floats]]:
    """Each layer's number, and what its router will read of all tokens, `(T, hidden_size)`.

    That is what the feed-forward network reads of each token, text by text: the residual stream
    after attention, and the norm between. As long as the experts of a token compute the same,
    routers in that place read exactly this.

    The model runs in float32, all texts through one layer and then through the next, so that the
    weights of one layer are in memory, beside two numbers for each token and hidden unit.

    Parameters
    ----------
    model : DenseModel
    texts : sequence of sequences of int
        Tokens, at least one in each.
    experts : DenseModel, optional
        The model whose feed-forward networks run between; by default `model`.
    source_layers : sequence of int, optional
        The layer of `experts` that each layer takes its network from; by default the same.
    device : str
        Where torch computes.
    needed_by : str
        What the error says if torch or transformers are missing.

    Raises
    ------
    CheckpointError
        A token that the model does not have, a config.json that transformers does not take, or
        activations that are not finite.
    MoeConfigError
        A device that torch does not have here.
    ModuleNotFoundError
        Without transformers or torch.
    """
    try:
        import torch
        from transformers import AutoModel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{needed_by} runs the base model, which needs {error.name}: "
            "pip install torch transformers (routers='cheap_embed' needs neither)",
            name=error.name,
        ) from None
    if not model.family.runs_by_layer:
        raise CheckpointError(
            f"{needed_by} runs one layer after the other; those of {model.family.model_type} need "
            "more than the state that the one before leaves: take another way for routers to start",
            file=model.path / "config.json",
        )
    place = open_device(device)
    config_file = model.path / "config.json"
    failing = "transformers does not run the model of this configuration"
    with running(config_file, failing):
        config = read_settings(model.path, model.config).get_text_config(decoder=True)
        with torch.device("meta"):
            network: Any = AutoModel.from_config(config, dtype=torch.float32)
            network.eval()
        for name, child in list(network.named_children()):
            if "Rotary" in type(child).__name__:
                setattr(network, name, type(child)(config=config).to(place))
            elif "Norm" in type(child).__name__:
                # Nobody reads what follows the last layer.
                setattr(network, name, torch.nn.Identity())
    sequences = TokenSequences(tuple(np.array(text, np.int64) for text in texts))
    ends = np.cumsum([len(text) for text in texts])
    batches = list(sequences.batches(TOKENS_AT_A_TIME))
    states, calls = [], []
    with (
        running(config_file, failing),
        torch.inference_mode(),
    ):  # a step at a time: it must not hold where the caller computes
        for batch in batches:
            state, call = first_states(network, model, sequences, batch, place)
            states.append(state)
            calls.append(call)
    for number, layer in enumerate(network.layers):
        inputs = np.empty((sequences.num_tokens, model.sizes.hidden_size), np.float32)
        source = number if source_layers is None else source_layers[number]
        ffn = model.family.ffn_module if number in model.ffn_layers else None
        load_layer(layer, number, model, experts or model, source, ffn, place)
        with running(config_file, failing), torch.inference_mode():
            for i, batch in enumerate(batches):
                states[i], found = run_layer(layer, ffn, states[i].to(place), calls[i][number])
                for row, text in enumerate(batch):
                    length = len(sequences.sequences[text])
                    inputs[ends[text] - length : ends[text]] = found[row, :length]
        layer.to("meta")
        return_memory()
        if ffn is None:
            continue
        if not np.isfinite(inputs).all():
            raise CheckpointError(
                f"what the router of layer {number} reads of the tokens is not finite; the weights "
                "up to there are damaged, or too large for float32",
                file=model.path,
            )
        yield number, inputs


def run_layer(
    layer: torch.nn.Module, ffn: str | None, states: torch.Tensor, others: dict[str, Any]
) -> tuple[torch.Tensor, Floats]:
    """What leaves a layer, and what its feed-forward network read, if it has one by that name."""
    read: list[torch.Tensor] = []
    module = layer if ffn is None else layer.get_submodule(ffn)
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(args[0] if args else next(iter(kwargs.values()))),
        with_kwargs=True,
    )
    result = layer(states, **others)
    hook.remove()
    left: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return left.cpu(), read[0].cpu().numpy()


def first_states(
    network: Any,
    model: DenseModel,
    sequences: TokenSequences,
    batch: Sequence[int],
    place: torch.device,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """What enters the first layer, and the other arguments of each layer: masks, positions.

    The network makes them, whose layers only pass on what they read.
    """
    import torch

    padded = sequences.padded(batch)
    found = embeddings(model, padded.reshape(-1).tolist()).reshape(*padded.shape, -1)
    # Gemma's embedding multiplies its rows itself.
    found = found * np.float32(getattr(network.get_input_embeddings(), "scalar_embed_scale", 1))
    entered: list[torch.Tensor] = []
    calls: list[dict[str, Any]] = []

    def pass_on(hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
        entered.append(hidden_states)
        calls.append(others)
        return hidden_states

    forwards = [layer.forward for layer in network.layers]
    for layer in network.layers:
        layer.forward = pass_on
    network(inputs_embeds=torch.from_numpy(found).to(place), use_cache=False)
    for layer, forward in zip(network.layers, forwards, strict=True):
        layer.forward = forward
    return entered[0].cpu(), calls


def load_layer(
    layer: torch.nn.Module,
    number: int,
    model: DenseModel,
    experts: DenseModel,
    source: int,
    ffn: str | None,
    place: torch.device,
) -> None:
    """Give a layer its weights: the feed-forward network's are those of layer `source`."""
    weights = {}
    for name in layer.state_dict():
        of_ffn = ffn is not None and name.startswith(f"{ffn}.")
        origin, layer_number = (experts, source) if of_ffn else (model, number)
        weights[name] = read_weight(origin, layer_number, name).to(place)
    layer.load_state_dict(weights, assign=True)


def read_weight(model: DenseModel, layer: int, name: str) -> torch.Tensor:
    """A tensor of a layer as the model's own class has it, in float32."""
    import torch

    theirs = f"{model.family.name_in_files('model.layers.')}{layer}.{name}"
    ours = model.family.name_here(theirs)
    if model.block is not None and ours in model.scales:
        weight = model.changed(ours, "F32")
        data = bytearray(b"".join(chunk for piece in weight.pieces for chunk in piece.chunks()))
        return torch.frombuffer(data, dtype=torch.float32).reshape(weight.shape)
    # As the file has it, where others see it in another order or as parts.
    tensor = model.stored[theirs] if theirs in model.stored else model.tensors[ours]
    if tensor.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            "is in FP8, and shares its tensor with others: such a model is not run to start "
            "routers; take another way",
            file=tensor.file.path,
            tensor=tensor.name,
        )
    with OpenFiles() as files:
        read = files.read(tensor.file, tensor.offset, tensor.nbytes)
    dtype = getattr(torch, DTYPE_NAMES[tensor.dtype])
    return torch.frombuffer(read, dtype=dtype).reshape(tensor.shape).float()
