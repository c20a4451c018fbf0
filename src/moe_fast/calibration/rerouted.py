"""What the routers of an MoE read, layer by layer, each layer with the router that it is to get."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast.calibration.layers import LayeredModel, LayerRun, Reached, open_device
from moe_fast.calibration.layers import require_transformers as require
from moe_fast.calibration.texts import TokenSequences
from moe_fast.errors import CheckpointError
from moe_fast.models.moe import MoeModel

Floats = npt.NDArray[np.float32]


class ReroutedModel(LayeredModel):
    """A model whose routers are replaced on the way."""

    def __init__(self, *arguments: Any) -> None:
        self.replaced: dict[str, Any] = {}
        super().__init__(*arguments)

    def parameter(self, name: str) -> Any:
        return self.replaced[name] if name in self.replaced else super().parameter(name)

    def replace_router(self, number: int, rows: Floats) -> None:
        """Give a layer another router, without a bias for its choice."""
        import torch

        name = self.router_parameter(number)
        self.replaced[name] = torch.from_numpy(rows)
        block = name.rpartition(".")[0].rpartition(".")[0]
        for other, value in self.network.state_dict().items():
            if other.startswith(f"{block}.") and is_choice_bias(other):
                self.replaced[other] = torch.zeros(value.shape)

    def router_inputs(self, number: int, before: Any) -> Floats:
        """What the router of a layer reads of all tokens, `(T, hidden_size)`."""
        import torch

        path = self.router_parameter(number).rpartition(".")[0]
        found: list[Floats] = []

        def read(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else next(iter(kwargs.values()))
            flat = states.reshape(-1, states.shape[-1])[run.current_valid.reshape(-1)]
            found.append(flat.float().cpu().numpy())
            raise Reached

        inputs: Floats | None = None
        router = self.network.get_submodule(path)
        handle = router.register_forward_pre_hook(read, with_kwargs=True)
        try:
            with self.loaded(number) as layer, self.others_passed(number) as at:
                run = LayerRun(self, layer, number, before, at)
                for batch in self.batches(number):
                    with torch.inference_mode():
                        run.forward(batch)
                    rows = found.pop()
                    if inputs is None:
                        inputs = np.empty((self.tokens.num_tokens, rows.shape[1]), np.float32)
                    inputs[run.rows(batch)] = rows
        finally:
            handle.remove()
        assert inputs is not None
        if not np.isfinite(inputs).all():
            raise CheckpointError(
                f"what the router of layer {number} reads of the tokens is not finite; the weights "
                "up to there are damaged, or too large for float32",
                file=self.model.path,
            )
        return inputs


def is_choice_bias(name: str) -> bool:
    """Whether a tensor of an MoE block moves its router's choice."""
    inside = name.rpartition("experts.")[2] if "correction_bias" not in name else name
    return inside.endswith(("correction_bias", "expert_bias", "gate.bias", "router.bias"))


def stream_moe_inputs(
    model: MoeModel,
    tokens: TokenSequences,
    made: dict[int, Floats],
    *,
    device: str = "cpu",
    needed_by: str = "reading texts",
) -> Iterator[tuple[int, Floats]]:
    """Each layer's number, and what its router reads of all tokens, `(T, hidden_size)`.

    Before the next is asked for, `made` may get the layer's new rows: later layers then read what
    they will read behind it. One layer's attention and one expert are in memory at a time.
    """
    require(needed_by)
    place = open_device(device)
    with tempfile.TemporaryDirectory() as folder:
        runner = ReroutedModel(model, tokens, place, Path(folder))
        with runner.files:
            before: Any = None
            for number in range(runner.num_layers):
                if number in runner.experts:
                    yield number, runner.router_inputs(number, before)
                    if number in made:
                        runner.replace_router(number, made[number])
                if number + 1 < runner.num_layers:
                    before = runner.run_layer(number, before, lambda *_: None)
