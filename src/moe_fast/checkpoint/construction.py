"""What a target is built from: the base, the sources and the plan, as weights by role.

Whatever happens to a weight on its way happens here, so that a target only gives names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from moe_fast.checkpoint.averages import Averaged
from moe_fast.checkpoint.neurons import (
    NeuronColumns,
    NeuronRows,
    Neurons,
    Redrawn,
    RepeatedRows,
    Scaled,
)
from moe_fast.checkpoint.random_pieces import Perturbed, choose_stream
from moe_fast.checkpoint.routers import Routers
from moe_fast.checks import collect
from moe_fast.config import MoeConfig
from moe_fast.dtypes import ITEM_SIZES
from moe_fast.errors import MoeConfigError, Problem
from moe_fast.families.dense import DenseModel
from moe_fast.models.adapters import beside_ffn_problems, open_adapted_model
from moe_fast.models.dense import open_dense_model
from moe_fast.models.readers import find_other_token
from moe_fast.plan import MoeConstructionPlan, plan_moe_construction
from moe_fast.records import dataclass
from moe_fast.request import ExpertSource
from moe_fast.storage.low_rank import LowRankSum
from moe_fast.storage.pieces import FileRange, Piece, Remembered, SideBySide
from moe_fast.storage.tensors import OutputTensor, Weight
from moe_fast.wording import brief, format_numbers

if TYPE_CHECKING:
    from moe_fast.checkpoint.clusters import Labels

Split = Literal["contiguous", "random", "clustered"]


@dataclass(frozen=True)
class Construction:
    """One MoE to build: where its attention, its experts and its routers come from."""

    base: DenseModel
    sources: Sequence[DenseModel]
    models: Sequence[ExpertSource]
    """What was asked of each of the sources."""
    plan: MoeConstructionPlan
    config: MoeConfig
    routers: Routers
    seed: int
    """Of the noise."""
    shared_sources: Sequence[DenseModel] = ()
    shared_experts: Sequence[ExpertSource] = ()
    """What was asked of each of the shared sources."""
    dense_layers: Sequence[int] = ()
    """Layers without experts, which keep what the base has; plan rows for them mean nothing."""
    converted_to: str | None = None
    """The dtype of every output tensor; `None` keeps those of the sources."""

    granularity: int = 1
    """In how many experts each FFN is split."""
    row_repeats: int = 1
    """How many experts, one after the other, start with the same row of the router."""
    split: Split | None = None
    """How one FFN is split into all experts; none: it is copied, and the copies may be split."""
    clusters: Mapping[int, Labels] = field(default_factory=dict)
    """Of each layer's neurons, where these say how the FFN is split."""
    mix_copies: bool = False
    shuffled: bool = False
    """Whether the neurons of each copy are put into another order before they are split."""
    reinit: float = 0.0
    """The part of each expert's neurons that is drawn anew."""
    separate_sets: bool = False
    """Whether each matrix of an expert draws other neurons anew."""
    backbone: Sequence[tuple[DenseModel, float]] = ()
    """Models of which everything but the experts is the weighted mean; none: the base's own."""
    scale_shards: bool = True
    """Whether weights make up for the shares of the shards; else a key of config.json does."""

    @property
    def expert_width(self) -> int:
        return self.base.sizes.intermediate_size // self.granularity

    @property
    def num_layers(self) -> int:
        return self.plan.num_layers

    @property
    def num_experts(self) -> int:
        return self.plan.num_experts

    @property
    def dtype(self) -> str:
        """The dtype of experts and routers, as safetensors spells it."""
        return self.converted_to or self.base.expert_dtype

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with experts."""
        dense = frozenset(self.dense_layers)
        return tuple(layer for layer in range(self.plan.num_layers) if layer not in dense)

    def opened_models(self) -> list[DenseModel]:
        """The base and the sources, each once."""
        models = (self.base, *self.sources, *self.shared_sources)
        return list({model.identity: model for model in models}.values())

    def keep(self, name: str) -> Weight:
        """A tensor of the base as the output holds it: as it is, or the mean over the models."""
        kept = self.base.weight(name, self.converted_to)
        if not self.backbone:
            return self.convert(kept)
        weights = [model.weight(name, self.converted_to) for model, _ in self.backbone]
        mean = Averaged(
            tuple(weight.pieces[0] for weight in weights),
            tuple(weight.dtype for weight in weights),
            tuple(share for _, share in self.backbone),
            self.converted_to or kept.dtype,
        )
        return Weight(mean.to, kept.shape, (mean,))

    def convert(self, weight: Weight) -> Weight:
        return weight if self.converted_to is None else weight.converted(self.converted_to)

    def perturb(self, weight: Weight, model: ExpertSource, name: str) -> Weight:
        """A source's weight with its expert's noise and scale; `name` tells noise from noise."""
        scale = model.residual_scale if name.endswith("down_proj") else 1.0
        if model.noise_scale != 0 or scale != 1:
            (source,) = weight.pieces
            stream = choose_stream(self.seed, name)
            piece = Perturbed(source, weight.dtype, model.noise_scale, scale, stream)
            weight = Weight(weight.dtype, weight.shape, (piece,))
        return weight

    def before_layers(self) -> Iterator[OutputTensor]:
        """The embedding."""
        for name, _ in self.base.before_layers():
            yield OutputTensor(name, self.keep(name))

    def layer(self, layer: int) -> Iterator[tuple[str, Weight]]:
        """Attention and norms of a layer, under the base's names inside the layer."""
        for name, _ in self.base.layer(layer):
            yield name, self.keep(f"model.layers.{layer}.{name}")

    def after_layers(self) -> Iterator[OutputTensor]:
        """The last norm and the head."""
        for name, _ in self.base.after_layers():
            yield OutputTensor(name, self.keep(name))

    def expert(self, layer: int, expert: int, role: str) -> Weight:
        """The `gate_proj`, `up_proj` or `down_proj` of an expert."""
        model = self.plan.source_model[layer, expert]
        source_layer = int(self.plan.source_layer[layer, expert])
        weight = self.sources[model].ffn_weight(source_layer, role, self.converted_to)
        copy, shard = divmod(expert, self.granularity)
        weight = self.perturb(weight, self.models[model], f"{layer} {copy} {role}")
        columns = role == "down_proj"
        if self.granularity > 1 or self.shuffled:
            weight = take_neurons(weight, self.neurons(layer, copy, shard), columns)
        if self.reinit:
            number = int(self.reinit * self.expert_width)
            weight = self.redraw(weight, number, layer, expert, role)
        if self.granularity > 1 and self.scale_shards:
            factor = shard_factor(self.granularity, role)
            weight = scale_weight(weight, factor, self.converted_to or weight.dtype)
        return self.convert(weight)

    def neurons(self, layer: int, copy: int, shard: int) -> Neurons:
        """Those that an expert takes of its FFN."""
        width, whole = self.expert_width, self.base.sizes.intermediate_size
        start, stop = shard * width, (shard + 1) * width
        if layer in self.clusters:
            chosen = tuple(np.flatnonzero(self.clusters[layer] == shard).tolist())
            return Neurons(whole, start, stop, chosen=chosen)
        if self.shuffled or self.split == "random":
            stream = choose_stream(self.seed, f"{layer} {copy} neurons")
            return Neurons(whole, start, stop, stream)
        return Neurons(whole, start, stop)

    def redraw(self, weight: Weight, number: int, layer: int, expert: int, role: str) -> Weight:
        """An expert's matrix with `number` of its neurons drawn anew."""
        name = f"{layer} {expert} redrawn"
        chosen_by = choose_stream(
            self.seed, f"{name} {role} neurons" if self.separate_sets else name
        )
        stream = choose_stream(self.seed, f"{name} {role}")
        (source,) = weight.pieces
        columns = role == "down_proj"
        count = weight.shape[1] if columns else weight.shape[0]
        piece = Redrawn(source, weight.dtype, count, number, columns, chosen_by, stream)
        return Weight(weight.dtype, weight.shape, (piece,))

    def router(self, layer: int) -> Weight:
        """The router of a layer, `(num_experts, hidden_size)`."""
        shape = (self.num_experts, self.base.sizes.hidden_size)
        rows: Piece = self.routers.router(layer)
        if self.row_repeats > 1:
            size, times = shape[1] * ITEM_SIZES[self.dtype], self.row_repeats
            if isinstance(rows, Remembered):
                rows = Remembered(rows.nbytes * times, rows.sha256, size, times)
            else:
                rows = RepeatedRows(rows, size, times)
        return Weight(self.dtype, shape, (rows,))

    def dense_ffn(self, layer: int, role: str) -> Weight:
        """The `gate_proj`, `up_proj` or `down_proj` of a layer without experts."""
        return self.keep(f"model.layers.{layer}.mlp.{role}.weight")

    def shared_expert(self, layer: int, index: int, role: str) -> Weight:
        """The `gate_proj`, `up_proj` or `down_proj` of one shared expert."""
        model = self.shared_experts[index]
        source_layer = layer if model.source_layers is None else model.source_layers[layer]
        weight = self.shared_sources[index].ffn_weight(source_layer, role, self.converted_to)
        return self.convert(self.perturb(weight, model, f"{layer} shared {index} {role}"))

    def shared_ffn(self, layer: int, role: str) -> Weight:
        """All shared experts of a layer side by side, which is one FFN that adds up theirs."""
        weights = [self.shared_expert(layer, i, role) for i in range(len(self.shared_sources))]
        rows, columns = weights[0].shape
        if role != "down_proj":
            return Weight.stacked(weights, (rows * len(weights), columns))
        if len(weights) == 1:
            return weights[0]
        wide = SideBySide(rows, tuple(weight.pieces for weight in weights))
        return Weight(weights[0].dtype, (rows, columns * len(weights)), (wide,))

    def silent_ffn(self, layer: int, width: int, role: str) -> Weight:
        """A shared expert that adds nothing, for targets that must have one.

        Its down projection is zero. Gate and up are the first rows of the base's, so that training
        can wake it: with those zero as well, no gradient would ever reach it.
        """
        if role == "down_proj":
            return Weight.zeros(self.dtype, (self.base.sizes.hidden_size, width))
        whole = self.base.ffn_weight(layer, role, self.converted_to)
        neurons = Neurons(self.base.sizes.intermediate_size, 0, width)
        return self.convert(take_neurons(whole, neurons, columns=False))

    def shared_gate(self, layer: int) -> Weight:
        """What the sigmoid that weighs the shared expert reads, `(1, hidden_size)`."""
        shape = (1, self.base.sizes.hidden_size)
        return Weight(self.dtype, shape, (self.routers.shared_gate(layer),))

    def problems(self) -> list[str]:
        """Why the sources do not fit the base; empty where they do."""
        problems: list[str] = [*self.width_problems(), *self.backbone_problems()]
        if not self.backbone:
            problems += beside_ffn_problems(self.sources)
        problems += beside_ffn_problems(self.shared_sources)
        for source, model in self.all_sources():
            problems += find_misfits(source, self.base, model.source_layers)
            problems += find_missing_ffns(source, model.source_layers, self.moe_layers)
            if self.converted_to is None:
                problems += find_foreign_dtypes(source, self.dtype)
        return list(dict.fromkeys(problems))

    def warnings(self) -> list[str]:
        """What can be built, and may not be meant."""
        warnings = list(self.granularity_warnings())
        for source, _ in self.all_sources():
            warnings += find_drifts(source, self.base)
        return list(dict.fromkeys(warnings))

    def width_problems(self) -> Iterator[Problem]:
        width = self.base.sizes.intermediate_size
        if width % self.granularity:
            tensor = self.base.first_ffn
            parts = "the number of experts," if self.split else "granularity"
            yield Problem(
                f"{list(tensor.shape)}: intermediate_size {width} is not a multiple of {parts} "
                f"{self.granularity}",
                file=tensor.file.path,
                tensor=tensor.name,
            )

    def backbone_problems(self) -> Iterator[Problem]:
        """Why there is no mean over the models."""
        names = [name for name, _ in (*self.base.before_layers(), *self.base.after_layers())]
        for layer in range(self.num_layers):
            names += [f"model.layers.{layer}.{name}" for name, _ in self.base.layer(layer)]
        for layer in frozenset(self.dense_layers) & frozenset(self.base.ffn_layers):
            roles = self.base.family.roles
            names += [f"model.layers.{layer}.mlp.{role}.weight" for role in roles]
        for model, _ in self.backbone:
            token = find_other_token(model.path, self.base.path)
            if token is not None:
                what = (
                    f"numbers its tokens otherwise than the base model's, {brief(token)} for one: "
                    "there is no mean of their embeddings"
                )
                yield Problem(what, file=model.path / "tokenizer.json")
            for name in names:
                yield from self.mean_problems(model, name)

    def mean_problems(self, model: DenseModel, name: str) -> Iterator[Problem]:
        tensor, other = self.base.tensors[name], model.tensors.get(name)
        if other is None:
            what = "is missing, which the mean of models takes"
            yield Problem(what, file=model.path, tensor=tensor.name)
        elif other.shape != tensor.shape:
            yield Problem(
                f"has the shape {list(other.shape)}, the base model's {list(tensor.shape)}; their "
                "mean needs one shape",
                file=other.file.path,
                tensor=other.name,
            )

    def granularity_warnings(self) -> Iterator[str]:
        """What a split into these experts loses, or makes hard for readers."""
        if self.granularity == 1:
            return
        chosen, shards = self.config.num_experts_per_tok, self.granularity
        if self.split and chosen != shards:
            yield (
                f"num_experts_per_tok {chosen} of {shards} parts of one FFN: an approximation of "
                f"what the dense model computes, until it is trained; {shards} per token are exact"
            )
        elif chosen % shards:
            yield (
                f"num_experts_per_tok {chosen} is not a multiple of granularity {shards}: a token "
                "takes some shards of a copy and not the others, so that the output does not "
                "compute what the dense model computes"
            )
        unsuited = [
            f"{width} ({reader})" for width, reader in SUITABLE_WIDTHS if self.expert_width % width
        ]
        if unsuited:
            yield (
                f"experts are {self.expert_width} wide, not a multiple of {', '.join(unsuited)}: "
                "these may be slow or fail with experts of this width"
            )

    def all_sources(self) -> Iterator[tuple[DenseModel, ExpertSource]]:
        """The models that give experts, with what was asked of each."""
        yield from zip(self.sources, self.models, strict=True)
        yield from zip(self.shared_sources, self.shared_experts, strict=True)


def take_neurons(weight: Weight, neurons: Neurons, columns: bool) -> Weight:
    """Some neurons of a matrix: of its rows, or of its `columns`."""
    (source,) = weight.pieces
    rows, width = weight.shape
    if isinstance(source, LowRankSum):
        return take_neurons_of_sum(source, weight.shape, neurons, columns)
    if columns:
        piece: Piece = NeuronColumns(source, weight.dtype, neurons)
        return Weight(weight.dtype, (rows, neurons.count), (piece,))
    if neurons.in_place and isinstance(source, FileRange):
        size = width * ITEM_SIZES[weight.dtype]
        start = source.offset + neurons.start * size
        piece = FileRange(source.file, start, neurons.count * size)
    else:
        piece = NeuronRows(source, neurons)
    return Weight(weight.dtype, (neurons.count, width), (piece,))


def take_neurons_of_sum(
    total: LowRankSum, shape: tuple[int, ...], neurons: Neurons, columns: bool
) -> Weight:
    """The same of a sum, of which each neuron needs its own rows or columns alone."""
    rows, width = shape
    w = take_neurons(Weight(total.dtype, shape, (total.w,)), neurons, columns)
    if columns:
        a = Weight(total.a_dtype, (total.rank, width), (total.a,))
        (piece,) = take_neurons(a, neurons, columns).pieces
        total = replace(total, w=w.pieces[0], a=piece, columns=neurons.count)
    else:
        b = Weight(total.b_dtype, (rows, total.rank), (total.b,))
        (piece,) = take_neurons(b, neurons, columns).pieces
        total = replace(total, w=w.pieces[0], b=piece)
    return Weight(w.dtype, w.shape, (total,))


def scale_weight(weight: Weight, factor: float, dtype: str) -> Weight:
    """A weight times a factor in `dtype`, which must not be rounded to another one before."""
    if factor == 1:
        return weight
    pieces = tuple(Scaled(piece, weight.dtype, factor, dtype) for piece in weight.pieces)
    return Weight(dtype, weight.shape, pieces)


def shard_factor(granularity: int, role: str) -> float:
    """What makes `granularity` shards, each weighted by its share, add up to the whole FFN.

    The gate is left as it is: it goes through a function that is not linear. A power of two falls
    into two of them, so that no bit of a mantissa changes; another number goes to `down_proj`.
    """
    if role == "gate_proj":
        return 1.0
    up = 1 << (granularity.bit_length() - 1) // 2 if granularity.bit_count() == 1 else 1
    return float(up) if role == "up_proj" else granularity / up


# Of which expert widths must be multiples: to be run by grouped products, and to be quantised.
SUITABLE_WIDTHS = (
    (8, "transformers 5 in 16 bits"),
    (32, "llama.cpp's Q4_0 and Q8_0"),
    (128, "blocks of FP8"),
    (256, "llama.cpp's K-quants"),
)
# Where each size shows: the tensor of a dense model whose shape it decides.
SEEN_IN = {
    "vocab_size": "model.embed_tokens.weight",
    "hidden_size": "model.embed_tokens.weight",
    "intermediate_size": "model.layers.0.mlp.up_proj.weight",
    "num_attention_heads": "model.layers.0.self_attn.q_proj.weight",
    "num_key_value_heads": "model.layers.0.self_attn.k_proj.weight",
    "head_dim": "model.layers.0.self_attn.q_proj.weight",
}


def find_misfits(
    source: DenseModel, base: DenseModel, source_layers: Sequence[int] | None
) -> Iterator[str]:
    """Why experts of `source` cannot stand in `base`."""
    config = source.path / "config.json"
    num_layers = source.sizes.num_hidden_layers
    if source_layers is not None and max(source_layers, default=0) >= num_layers:
        yield Problem(
            f"has {num_layers} layers, source_layers names {max(source_layers)}", file=config
        )
    for name, value in vars(source.sizes).items():
        if name == "vocab_size" or (name == "num_hidden_layers" and source_layers is not None):
            continue
        if value != getattr(base.sizes, name):
            what = f"{name} is {value}, the base model has {getattr(base.sizes, name)}"
            tensor = source.tensors.get(SEEN_IN.get(name, ""))
            if tensor is not None:
                what = f"has the shape {list(tensor.shape)}: {what}"
                yield Problem(what, file=tensor.file.path, tensor=tensor.name)
            else:
                yield Problem(what, file=config)
    # A block of another form gives its FFN other inputs and does other things with the output.
    for what, (its, bases) in {
        "hidden_act": (activation_of(source), activation_of(base)),
        "FFN biases": (source.ffn_biases, base.ffn_biases),
        "attention biases": (source.attention_biases, base.attention_biases),
        "norms": (source.family.norms, base.family.norms),
        "norm of queries and keys": (source.family.qk_norm, base.family.qk_norm),
        "blocks": (source.family.blocks, base.family.blocks),
        "residual_multiplier": (
            source.multipliers.residual_multiplier,
            base.multipliers.residual_multiplier,
        ),
    }.items():
        if its != bases:
            yield Problem(
                f"{what}: {in_words(its)}, the base model has {in_words(bases)}", file=config
            )


def activation_of(model: DenseModel) -> object:
    return model.config.get("hidden_act", model.config.get("mlp_hidden_act"))


def find_missing_ffns(
    source: DenseModel, source_layers: Sequence[int] | None, moe_layers: Sequence[int]
) -> Iterator[str]:
    """The layers of `source` that are to give an FFN and have none."""
    there = frozenset(source.ffn_layers)
    layers = range(source.sizes.num_hidden_layers)
    wanted = moe_layers if source_layers is None else [source_layers[n] for n in moe_layers]
    missing = sorted({layer for layer in wanted if layer in layers} - there)
    if missing:
        yield Problem(
            f"{format_numbers('layer', missing)} of {source.path} would give experts, and has no "
            "FFN",
            file=source.path / "config.json",
        )


def find_foreign_dtypes(source: DenseModel, dtype: str) -> Iterator[str]:
    """The FFN weights of `source` that have another dtype than the experts are to have."""
    roles = source.family.roles
    tensors = [source.ffn(layer, role) for layer in source.ffn_layers for role in roles]
    foreign = [tensor for tensor in tensors if source.dtype_of(tensor) != dtype]
    if foreign:
        first, others = foreign[0], len(foreign) - 1
        more = f", as are {others} others" if others else ""
        yield Problem(
            f"is {first.dtype}{more}; the base model's FFN is {dtype}: "
            "name a dtype to convert all to",
            file=first.file.path,
            tensor=first.name,
        )


def find_drifts(source: DenseModel, base: DenseModel) -> Iterator[str]:
    """What `source` was trained with otherwise, and the output takes from the base.

    None of it is seen by an FFN, and fine-tuning changes it (rope to read longer texts, the
    vocabulary for chats), so it is not a reason to refuse an expert.
    """
    if source.sizes.vocab_size != base.sizes.vocab_size:
        yield (
            f"{source.path / 'config.json'}: vocab_size is {source.sizes.vocab_size}, the base "
            f"model has {base.sizes.vocab_size}; only FFN weights are taken, which learnt from "
            "other tokens"
        )
    drifting = {
        "rope": (source.rope, base.rope),
        "multipliers": (source.multipliers, base.multipliers),
        "rms_norm_eps": (source.config.get("rms_norm_eps"), base.config.get("rms_norm_eps")),
        "sliding windows": (source.windows, base.windows),
        "tie_word_embeddings": (
            source.config["tie_word_embeddings"],
            base.config["tie_word_embeddings"],
        ),
    }
    for what, (its, bases) in drifting.items():
        if its != bases:
            yield (
                f"{source.path / 'config.json'}: {what} differs from the base model's, "
                "which the output has"
            )


def in_words(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return "none" if value is None or value is False else str(value)


def plan_experts(
    models: Sequence[ExpertSource],
    shared_experts: Sequence[ExpertSource],
    dense_layers: Sequence[int],
    config: MoeConfig,
    num_layers: int,
    granularity: int = 1,
) -> MoeConstructionPlan:
    """Round robin over the models, each from its own source layers."""
    absent = [layer for layer in dense_layers if not 0 <= layer < num_layers]
    problems = []
    if absent:
        missing = format_numbers("layer", absent)
        what = f"lists {missing}; the base model has {num_layers}, from 0 on"
        problems.append(Problem(what, argument="dense_layers"))
    elif len({*dense_layers}) == num_layers:
        what = "lists every layer; an MoE has experts in at least one"
        problems.append(Problem(what, argument="dense_layers"))
    problems += [
        Problem(
            f"lists {len(m.source_layers)} layers for {m.model}, the output has {num_layers}; "
            "list one for each",
            argument="source_layers",
        )
        for m in (*models, *shared_experts)
        if m.source_layers is not None and len(m.source_layers) != num_layers
    ]
    if problems:
        raise MoeConfigError(*problems)
    plan = plan_moe_construction(len(models), num_layers, config, granularity=granularity)
    if all(model.source_layers is None for model in models):
        return plan
    layers = np.array([m.source_layers or range(num_layers) for m in models])
    return MoeConstructionPlan(
        plan.source_model, layers[plan.source_model[0]].T, num_models=plan.num_models
    )


def open_sources(sources: Sequence[ExpertSource], base: str) -> tuple[list[DenseModel], DenseModel]:
    """The source models and the base, each folder opened once; all their problems at once."""
    opened = collect(open_dense_model, (*(source.model for source in sources), base))

    def open_with_adapter(pair: tuple[str, str | None]) -> DenseModel:
        model, lora = pair
        return opened[model] if lora is None else open_adapted_model(Path(lora), opened[model])

    adapted = collect(open_with_adapter, [(source.model, source.lora) for source in sources])
    return [adapted[source.model, source.lora] for source in sources], opened[base]
