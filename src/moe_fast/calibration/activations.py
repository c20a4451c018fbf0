"""What a dense model makes of tokens: their embeddings, and what its routers would read.

Runs a model, which needs transformers and torch, and memory for one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_fast.calibration.running import read_settings, running
from moe_fast.dtypes import DTYPE_NAMES
from moe_fast.errors import CheckpointError
from moe_fast.families.dense import DenseModel
from moe_fast.storage.files import OpenFiles
from moe_fast.storage.floats import decode
from moe_fast.storage.safetensors_header import Tensor

if TYPE_CHECKING:
    import torch


Floats = npt.NDArray[np.float32]
Visit = Callable[[int, int, Floats], None]
TOKENS_AT_A_TIME = 8192  # in one batch of texts, with what pads them


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

    `inputs`, `(T, hidden_size)`, is what the feed-forward network reads of each of the text's
    tokens: the residual stream after attention, and the norm between. As long as the experts of a
    token compute the same, routers in that place read exactly this.

    The model runs in float32 on the processor; its weights are read one layer at a time.

    Raises
    ------
    CheckpointError
        A text that is too long for the model, or a config.json that transformers does not take.
    ModuleNotFoundError
        Without transformers or torch.
    """
    try:
        import torch
        from transformers import AutoModel
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"routers='hidden' runs the base model, which needs {error.name}: "
            "pip install torch transformers (routers='cheap_embed' needs neither)",
            name=error.name,
        ) from None

    if model.wrapper is not None or model.family.blocks is not None or model.block is not None:
        raise CheckpointError(
            "routers='hidden' runs models of plain attention alone, neither quantised nor inside "
            "of others; take another way for routers to start",
            file=model.path / "config.json",
        )
    config_file = model.path / "config.json"
    failing = "transformers does not run the model of this configuration"
    with running(config_file, failing):
        config = read_settings(model.path, model.config)
    longest = max(len(text) for text in texts)
    if longest > config.max_position_embeddings:
        raise CheckpointError(
            f"a prompt has {longest} tokens; "
            f"the model reads at most {config.max_position_embeddings}",
            file=model.path,
        )
    with running(config_file, failing):
        with torch.device("meta"):
            network: Any = AutoModel.from_config(config, dtype=torch.float32)
            network.eval()
        network.rotary_emb = type(network.rotary_emb)(config=config)
        network.norm = torch.nn.Identity()  # nobody reads what follows the last layer

    def find(name: str) -> Tensor:
        return model.stored[name] if name in model.stored else model.tensors[name]

    def load(number: int, layer: torch.nn.Module) -> None:
        names = layer.state_dict()
        prefix = f"model.layers.{number}."
        weights = {name: read_tensor(find(prefix + name)) for name in names}
        layer.load_state_dict(weights, assign=True)

    batch = range(0)

    def read(number: int, inputs: torch.Tensor) -> None:
        for row, i in enumerate(batch):
            visit(number, i, inputs[row, : len(texts[i])].numpy())

    for number, layer in enumerate(network.layers):
        layer.register_forward_pre_hook(lambda layer, _, number=number: load(number, layer))
        layer.mlp.register_forward_pre_hook(lambda _, x, number=number: read(number, x[0]))
        layer.register_forward_hook(lambda layer, *_: layer.to("meta") and None)
    size = max(1, TOKENS_AT_A_TIME // longest)
    for start in range(0, len(texts), size):
        batch = range(len(texts))[start : start + size]
        # Padded at the end, where attention to what came before never sees it.
        padded = np.zeros((len(batch), longest, model.sizes.hidden_size), np.float32)
        for row, i in enumerate(batch):
            padded[row, : len(texts[i])] = embeddings(model, texts[i])
        with running(config_file, failing), torch.inference_mode():
            network(inputs_embeds=torch.from_numpy(padded), use_cache=False)


def read_tensor(tensor: Tensor) -> torch.Tensor:
    """A tensor of a source, as float32."""
    import torch

    with OpenFiles() as files:
        data = files.read(tensor.file, tensor.offset, tensor.nbytes)
    dtype = getattr(torch, DTYPE_NAMES[tensor.dtype])
    return torch.frombuffer(data, dtype=dtype).reshape(tensor.shape).float()
