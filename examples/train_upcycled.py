"""Upcycle a dense model into a Mixture of Experts and go on training it, on one or many devices.

    python examples/train_upcycled.py                        # a small model, trained on the way
    python examples/train_upcycled.py path/to/dense/model    # any model that moe_fast builds from
    torchrun --nproc-per-node 8 examples/train_upcycled.py path/to/dense/model
    accelerate launch examples/train_upcycled.py path/to/dense/model --accelerate

The upcycled model is not written before training: each process fills what it holds of it from the
dense model's files. Under torchrun the model is sharded with FSDP2; under accelerate, it is sharded
or copied as accelerate's configuration says.

Needs `moe-fast[all]`, torch and transformers. Prints, step by step, the loss and how evenly the
tokens spread over the experts: the coefficient of variation of the tokens per expert (0 is even),
averaged over the layers.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moe_fast import Design, MoeConfig, design_moe, read_recipe
from moe_fast.checkpoint.design import design_of
from moe_fast.demo import make_dense_model
from moe_fast.torch import load_into

NAMES = ("Ada", "Emmy", "Grace", "Sofia")
THINGS = ("apples", "books", "lamps", "maps")


def make_text(lines: int, seed: int) -> str:
    """Sums, sentences that count, definitions of functions: three kinds to divide."""
    chance = random.Random(seed)

    def line() -> str:
        a, b = chance.randrange(50), chance.randrange(50)
        return chance.choice(
            [
                f"{a} + {b} = {a + b}",
                f"{chance.choice(NAMES)} has {a} {chance.choice(THINGS)}.",
                f"def add_{a}(x): return x + {a}",
            ]
        )

    return "\n".join(line() for _ in range(lines))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def say(line: str) -> None:
    """Print a line, in one process."""
    if rank() == 0:
        print(line, flush=True)


def wait() -> None:
    """Until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes."""
    tensor = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@contextmanager
def shared_folder() -> Iterator[Path]:
    """A temporary folder for all processes of this machine."""
    with tempfile.TemporaryDirectory() if rank() == 0 else nullcontext() as made:
        folder = [made]
        if dist.is_initialized():
            dist.broadcast_object_list(folder)
        yield Path(folder[0])
        wait()


def batches(tokens: torch.Tensor, size: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """Random windows of the text, `(size, length)`, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - length, (size, 1), generator=generator)
        yield tokens[starts + torch.arange(length)]


def count_choices(router_logits: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    """Tokens per expert, `(layers, experts)`."""
    counts = []
    for logits in router_logits:
        chosen = logits.topk(k, -1).indices.flatten()
        counts.append(torch.bincount(chosen, minlength=logits.shape[-1]))
    return torch.stack(counts)


def balancing_loss(router_logits: Sequence[torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    """The Switch loss of each layer, averaged: 1 where the load is even.

    transformers' own loss pools the layers first, so that one can hide another.
    """
    load = counts / counts.sum(-1, keepdim=True)
    probabilities = torch.stack([logits.float().softmax(-1).mean(0) for logits in router_logits])
    return counts.shape[-1] * (load * probabilities).sum(-1).mean()


def step_in_backward(model: torch.nn.Module, learning_rate: float) -> None:
    """Adafactor that uses each gradient as soon as it is there, and drops it.

    Takes memory for little more than the weights.
    """
    for parameter in model.parameters():
        optimizer = torch.optim.Adafactor([parameter], learning_rate)

        def step(_: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    stream: Iterator[torch.Tensor],
    steps: int,
    device: torch.device,
    num_experts_per_tok: int | None = None,
    balance: float = 0.0,
    backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward,
) -> None:
    """Optimisation steps; with `num_experts_per_tok`, of an MoE whose load is kept even."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    options = {} if num_experts_per_tok is None else {"output_router_logits": True}
    for step in range(steps):
        batch = next(stream).to(device)
        output = model(batch, labels=batch, use_cache=False, **options)
        loss, line = output.loss, f"step {step:4d}  loss {summed(output.loss) / processes:.3f}"
        if num_experts_per_tok is not None:
            counts = count_choices(output.router_logits, num_experts_per_tok)
            loss = loss + balance * balancing_loss(output.router_logits, counts)
            load = summed(counts).float()
            line += f"  load cv {(load.std(-1, correction=0) / load.mean(-1)).mean():.3f}"
        backward(loss)
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        say(line)


def held_out_loss(
    model: torch.nn.Module, tokens: torch.Tensor, size: int, length: int, device: torch.device
) -> float:
    """Mean loss per token of a text that was not trained on."""
    windows = tokens[: len(tokens) // length * length].view(-1, length).to(device)
    with torch.no_grad():
        losses = [
            float(model(batch, labels=batch, use_cache=False).loss) * len(batch)
            for batch in windows.split(size)
        ]
    return sum(losses) / len(windows)


def make_optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)


def read_tokens(
    folder: str | Path, options: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor]:
    """The text to train on and the text held out, as a model's tokens."""
    if options.text is None:
        texts = make_text(3000, options.seed), make_text(100, options.seed + 1)
    else:
        text = options.text.read_text(encoding="utf-8")
        texts = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, second = (tokenizer(t, return_tensors="pt", verbose=False).input_ids[0] for t in texts)
    return first, second


def make_small_model(folder: Path, options: argparse.Namespace, device: torch.device) -> None:
    """Train the demo's dense model. Every process does the same, and one writes."""
    if rank() == 0:
        make_dense_model(folder, seed=options.seed)
    wait()
    tokens, held_out = read_tokens(folder, options)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    stream = batches(tokens, options.batch_size, options.length, options.seed)
    say("training the dense model")
    train(dense, make_optimizer(dense, 5e-3), stream, options.dense_steps, device)
    loss = held_out_loss(dense, held_out, options.batch_size, options.length, device)
    say(f"held-out loss, dense model: {loss:.4f}")
    wait()
    if rank() == 0:
        dense.save_pretrained(folder)
    wait()


def make_design(dense: str | Path, options: argparse.Namespace, tokens: torch.Tensor) -> Design:
    """Every tensor of the upcycled model, none made yet.

    Routers that are made from text read the text to train on, in every process alike.
    """
    config = MoeConfig(options.experts, options.experts_per_token)
    return design_moe(
        dense,
        config,
        routers=options.routers,
        logit_std=options.logit_std,
        tokens=tokens.numpy(),
        granularity=options.granularity,
        shuffle=options.granularity > 1,
        seed=options.seed,
    )


def shard(model: PreTrainedModel, bfloat16: bool) -> None:
    """FSDP2, layer by layer."""
    policy = MixedPrecisionPolicy()
    if bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def load(
    design: Design, device: torch.device, sharded: bool, options: argparse.Namespace
) -> PreTrainedModel:
    """The model of a design in float32; of a sharded one, what this process holds."""
    begin = time.perf_counter()
    config = AutoConfig.for_model(**{**design.config, "router_aux_loss_coef": 0.0})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if sharded:
        shard(model, options.bfloat16)
    load_into(model, design, device=device)
    say(f"loaded {design.num_parameters:,} parameters in {time.perf_counter() - begin:.2f} s")
    return model


def save(model: torch.nn.Module, folder: Path, tokenizer: Path) -> None:
    """The whole model and its tokenizer, gathered from the processes and written by one."""
    model = getattr(model, "module", model)  # DDP has the model inside
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=whole)
    if rank() == 0:
        for name in model.all_tied_weights_keys:
            del weights[name]
        model.save_pretrained(folder, state_dict=weights)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    wait()


def start(options: argparse.Namespace) -> tuple[torch.device, Any]:
    """This process's device, and accelerate where it is asked for."""
    if options.accelerate:
        from accelerate import Accelerator

        accelerator = Accelerator()
        return accelerator.device, accelerator
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dense", nargs="?", help="a dense model: a folder, or on the Hub")
    parser.add_argument("--recipe", type=Path, help="a recipe of experts, in place of a model")
    parser.add_argument("--text", type=Path, help="a text file, in place of a text made here")
    parser.add_argument("--output", type=Path, help="where to keep the trained model")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--granularity", type=int, default=1, help="shards of an FFN")
    parser.add_argument("--routers", default="auto", help="how routers start: auto reads the text")
    parser.add_argument("--logit-std", type=float, help="how sharp they start")
    parser.add_argument("--dense-steps", type=int, default=60, help="to train the small model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per process")
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--balance", type=float, default=0.1, help="weight of the balancing loss")
    parser.add_argument("--bfloat16", action="store_true", help="compute in it, where sharded")
    parser.add_argument("--low-memory", action="store_true", help="Adafactor, on one device")
    parser.add_argument("--accelerate", action="store_true", help="for accelerate launch")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.recipe is not None and options.dense is not None:
        parser.error("a recipe names its models: give --recipe or a model, not both")
    if options.low_memory and (options.accelerate or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        parser.error("--low-memory is for one process")

    device, accelerator = start(options)
    with shared_folder() as folder:
        dense = options.dense
        if dense is None and options.recipe is None:
            dense = folder / "dense"
            make_small_model(dense, options, device)

        if options.recipe is not None:
            design = design_of(read_recipe(options.recipe).request)
            tokens, held_out = read_tokens(design.reference, options)
        else:
            tokens, held_out = read_tokens(dense, options)
            design = make_design(dense, options, tokens)
        sharded = dist.is_initialized() if accelerator is None else accelerator.is_fsdp2
        model = load(design, device, sharded, options)
        optimizer = None
        if options.low_memory:
            step_in_backward(model, options.learning_rate)
        else:
            optimizer = make_optimizer(model, options.learning_rate)
        backward = torch.Tensor.backward
        if accelerator is not None:
            model, optimizer = accelerator.prepare(model, optimizer)
            backward = accelerator.backward

        windows = options.batch_size, options.length
        loss = held_out_loss(model, held_out, *windows, device)
        say(f"held-out loss, upcycled: {loss:.4f}")
        stream = batches(tokens, *windows, options.seed + rank())
        k = design.config["num_experts_per_tok"]
        train(model, optimizer, stream, options.steps, device, k, options.balance, backward)
        loss = held_out_loss(model, held_out, *windows, device)
        say(f"held-out loss, trained: {loss:.4f}")
        if options.output is not None:
            save(model, options.output, design.reference)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
