"""What an upcycled model's start is worth: held-out loss after further training, by start.

    python -m benchmarks.training RESULTS.jsonl FOLDER

A small dense model is trained on text of several kinds, then on and on in many ways: as it is, and
upcycled by moe_fast with each start, on the same batches. RESULTS gets a line for each run as soon
as it ends; runs that have a line are not repeated. FOLDER keeps the text and the dense model.
`--steps` and `--dense-steps` make it short. `--model` names a checkpoint to start from in place of
the small model. Everything runs in one thread and float32.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from benchmarks.corpus import read_corpus
from moe_fast import MoeConfig, design_moe
from moe_fast.request import RouterMethod
from moe_fast.torch import load_into

VOCABULARY = 1024
LENGTH, SEQUENCES = 128, 8  # of a batch
HELD_OUT = 12_288  # tokens, in pieces of LENGTH from everywhere in the held-out texts
POINTS = 8  # at which the held-out loss is measured
STEPS, DENSE_STEPS = 240, 4000
PEAK, OTHER_PEAK, DENSE_PEAK = 2e-4, 5e-4, 3e-3
BALANCE = 0.01  # weight of each layer's Switch loss
TOP_K = 2


@dataclass(frozen=True)
class Run:
    """One way to train the dense model on. Without routers it stays dense."""

    arm: str
    routers: RouterMethod | None = None
    logit_std: float | None = None
    reinit: float = 0.0
    granularity: int = 1
    times: float = 1.0  # as many steps
    peak: float = PEAK
    seed: int = 0

    @property
    def top_k(self) -> int:
        return TOP_K * self.granularity if self.routers else 0

    @property
    def from_text(self) -> bool:
        return self.routers in ("calibrated", "clustered")


DENSE = Run("dense")
BALANCED = Run("balanced", "balanced")
NORMAL = Run("normal, 3", "normal", 3)
CALIBRATED = Run("calibrated, 3", "calibrated", 3)
MAIN = (
    DENSE,
    BALANCED,
    Run("standard normal", "normal"),
    NORMAL,
    CALIBRATED,
    Run("clustered, 3", "clustered", 3),
)
SCALES = tuple(
    Run(f"{routers}, {logit_std:g}", routers, logit_std)
    for logit_std in (1, 10, 0.3)
    for routers in ("calibrated", "clustered")
)
FINE = Run("calibrated, 3, granularity 2", "calibrated", 3, granularity=2)
REINIT = Run("calibrated, 3, reinit 0.5", "calibrated", 3, reinit=0.5)
LONGER = Run("dense, as much time", times=1.8)
LONG = 4.0


def all_runs() -> Iterator[Run]:
    """In the order of their importance, so that a stop loses least."""
    long = [replace(run, arm=f"{run.arm}, long", times=LONG) for run in (DENSE, CALIBRATED, REINIT)]
    for seed in range(2):
        for run in MAIN:
            yield replace(run, seed=seed)
    yield from (*SCALES[:4], LONGER, *long[:2])
    for run in MAIN:
        yield replace(run, seed=2)
    yield from (FINE, *SCALES[4:])
    for run in MAIN:
        yield replace(run, peak=OTHER_PEAK)
    yield long[2]
    for seed in (1, 2):
        for run in (LONGER, *SCALES, FINE):
            yield replace(run, seed=seed)


def repeated_runs(seeds: int) -> Iterator[Run]:
    """The dense model and the starts without options, with many seeds: its own gain is small."""
    for seed in range(seeds):
        for run in (DENSE, NORMAL, BALANCED, CALIBRATED):
            yield replace(run, seed=seed)


class Corpus:
    """The tokens of a folder; made from the texts of this system if it has none."""

    def __init__(self, folder: Path, model: Path | None, held_out: int) -> None:
        if not (folder / "tokenizer.json").exists():
            make_corpus(folder, model, held_out)
        self.train = torch.from_numpy(np.load(folder / "train.npy"))
        self.held_out = torch.from_numpy(np.load(folder / "held_out.npy"))
        self.sample = folder / "sample.npy"

    def batches(self, sequences: int, seed: int) -> Iterator[torch.Tensor]:
        """Random windows, `(sequences, LENGTH)`, without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.train) - LENGTH, (sequences, 1), generator=generator)
            yield self.train[starts + torch.arange(LENGTH)]


def make_corpus(folder: Path, model: Path | None, held_out_tokens: int) -> None:
    """Write the tokens, made with a model's tokenizer, or one of their own."""
    train, held_out = read_corpus()
    for kind in train:
        print(f"{kind}: {sum(map(len, train[kind])):,} characters", flush=True)
    if model is None:
        tokenizer = make_tokenizer(text for texts in train.values() for text in texts)
    else:
        tokenizer = AutoTokenizer.from_pretrained(model)
    folder.mkdir(parents=True, exist_ok=True)
    used, kept, sample = [], [], []
    for kind in train:
        used.append(np.concatenate(tokenizer(train[kind])["input_ids"]).astype(np.int64))
        sample.append(pieces(used[-1], 2 * 8192 // len(train)))
        ids = np.concatenate(tokenizer(held_out[kind])["input_ids"]).astype(np.int64)
        kept.append(pieces(ids, held_out_tokens // len(train)))
    np.save(folder / "train.npy", np.concatenate(used))
    np.save(folder / "held_out.npy", np.concatenate(kept))
    np.save(folder / "sample.npy", np.concatenate(sample))
    tokenizer.save_pretrained(folder)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def pieces(tokens: np.ndarray, count: int) -> np.ndarray:
    """About `count` tokens, `(pieces, LENGTH)`, at equal distances."""
    whole = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)
    number = min(len(whole), round(count / LENGTH))
    return whole[np.linspace(0, len(whole) - 1, number).astype(int)]


def switch_loss(router_logits: list[torch.Tensor], top_k: int) -> torch.Tensor:
    """The Switch loss, summed over the layers; 1 a layer where the load is even."""
    losses = []
    for logits in router_logits:
        chosen = logits.topk(top_k, -1).indices.flatten()
        load = torch.bincount(chosen, minlength=logits.shape[-1]) / len(chosen)
        losses.append(logits.shape[-1] * (load * logits.softmax(-1).mean(0)).sum())
    return torch.stack(losses).sum()


@torch.inference_mode()
def judge(model: Any, tokens: torch.Tensor, top_k: int) -> tuple[float, list[list[int]]]:
    """The mean loss per token, and how many tokens each expert of each layer gets."""
    losses, counts = [], np.zeros(0)
    options = {"output_router_logits": True} if top_k else {}
    for batch in tokens.split(32):
        output = model(batch, labels=batch, use_cache=False, **options)
        losses.append(float(output.loss) * len(batch))
        if top_k:
            chosen = [logits.topk(top_k, -1).indices.flatten() for logits in output.router_logits]
            experts = output.router_logits[0].shape[-1]
            found = np.stack([torch.bincount(c, minlength=experts).numpy() for c in chosen])
            counts = found if not counts.size else counts + found
    return sum(losses) / len(tokens), counts.tolist()


def train(
    model: Any,
    corpus: Corpus,
    batches: Iterator[torch.Tensor],
    steps: int,
    peak: float,
    top_k: int = 0,
) -> dict[str, Any]:
    """Train in place; the held-out loss before, and at POINTS points, and the time it took.

    AdamW; the rate rises for the first twentieth of the steps, and falls to zero as a cosine.
    """
    optimizer = torch.optim.AdamW(model.parameters(), peak, weight_decay=0.01, betas=(0.9, 0.95))
    tokens, seconds = 0, 0.0
    loss, load = judge(model, corpus.held_out, top_k)
    found: dict[str, Any] = {"tokens": [0], "seconds": [0.0], "loss": [loss], "load_start": load}
    options = {"output_router_logits": True} if top_k else {}
    warmup = max(1, steps // 20)
    for step in range(steps):
        begin = time.thread_time()
        rate = min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        batch = next(batches)
        output = model(batch, labels=batch, use_cache=False, **options)
        total = output.loss
        if top_k:
            total = total + BALANCE * switch_loss(output.router_logits, top_k)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += batch.numel()
        seconds += time.thread_time() - begin
        if (step + 1) * POINTS // steps > step * POINTS // steps:
            loss, load = judge(model, corpus.held_out, top_k)
            found["tokens"].append(tokens)
            found["seconds"].append(round(seconds, 3))
            found["loss"].append(round(loss, 5))
    return {**found, "load_end": load}


def make_dense(folder: Path, corpus: Corpus, steps: int) -> None:
    """Train the dense model, unless it is there."""
    if (folder / "config.json").exists():
        return
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
        )
    )
    print(f"{model.num_parameters():,} parameters, {len(corpus.train):,} tokens", flush=True)
    batches = corpus.batches(SEQUENCES, seed=1000)
    found = train(model, corpus, batches, steps, DENSE_PEAK)
    print(json.dumps({"arm": "pretraining", **found}), flush=True)
    model.save_pretrained(folder)


def upcycle(dense: Path, corpus: Corpus, run: Run, experts: int) -> Any:
    """The model of a run, filled from its design."""
    if run.routers is None:
        return AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    design = design_moe(
        dense,
        MoeConfig(experts * run.granularity, run.top_k),
        target="mixtral",
        routers=run.routers,
        logit_std=run.logit_std,
        tokens=corpus.sample if run.from_text else None,
        granularity=run.granularity,
        shuffle=run.granularity > 1,
        reinit=run.reinit,
        seed=run.seed,
    )
    with torch.device("meta"):
        config = AutoConfig.for_model(**{**design.config, "router_aux_loss_coef": 0.0})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    load_into(model, design)
    return model.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dense-steps", type=int, default=DENSE_STEPS)
    parser.add_argument("--arms", type=int, help="how many runs, the most important first")
    parser.add_argument("--seeds", type=int, help="few starts, with so many seeds")
    parser.add_argument("--model", type=Path, help="train on from this checkpoint")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=SEQUENCES, help="of a batch")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="tokens")
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpus = Corpus(options.folder, options.model, options.held_out)
    dense = options.model or options.folder / "dense"
    if options.model is None:
        make_dense(dense, corpus, options.dense_steps)
    done = set()
    if options.results.exists():
        lines = map(json.loads, options.results.read_text().splitlines())
        done = {(line["arm"], line["peak"], line["seed"]) for line in lines}
    runs = all_runs() if options.seeds is None else repeated_runs(options.seeds)
    for run in list(runs)[: options.arms]:
        if (run.arm, run.peak, run.seed) in done:
            continue
        done.add((run.arm, run.peak, run.seed))
        model = upcycle(dense, corpus, run, options.experts)
        batches = corpus.batches(options.sequences, run.seed)
        steps = round(options.steps * run.times)
        found = train(model, corpus, batches, steps, run.peak, run.top_k)
        line = {"arm": run.arm, "peak": run.peak, "seed": run.seed, **found}
        with options.results.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        print(
            f"{run.arm}, {run.peak}, {run.seed}: {line['loss'][0]:.4f} {line['loss'][-1]:.4f} "
            f"{line['seconds'][-1]:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
