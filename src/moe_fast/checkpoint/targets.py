"""What a Mixture-of-Experts family calls its tensors and its configuration.

One class a family. A target names shapes and pieces and never opens a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moe_fast.checkpoint.construction import Construction
from moe_fast.checkpoint.header import DTYPE_NAMES, shown
from moe_fast.checkpoint.source import (
    FFN,
    NORMS_AFTER,
    NORMS_BEFORE,
    QKV,
    QKVO,
    ROPE_TYPES,
    DenseModel,
)
from moe_fast.checkpoint.table import OutputTensor, Weight
from moe_fast.config import Layout, RoutingMethod
from moe_fast.errors import CheckpointError

GATE_UP = ("gate_proj", "up_proj")
Shapes = dict[str, tuple[int, ...]]
SPANS = {None: "nothing", "head": "each head", "width": "the full width"}


class ExpertTensor(NamedTuple):
    """A tensor with weights of experts: `parts` are `(expert, role)`, one after the other.

    A stacked tensor has a first axis that counts the experts.
    """

    name: str
    parts: tuple[tuple[int, str], ...]
    stacked: bool = False


class Target:
    """A Mixture-of-Experts family: what fits it, its tensors, its configuration.

    What it says of attention and norms is what its blocks have a place for. Its router is a softmax
    over all experts; each token goes to the k with the greatest weights, which are divided by their
    sum. So experts that are copies of one FFN compute what that FFN computes.
    """

    name: str
    title: str
    architecture: str
    dense_twin: str
    """The dense family that it is outside of its experts."""
    layouts: tuple[Layout, ...] = (Layout.PER_EXPERT, Layout.FUSED)
    norms = NORMS_BEFORE
    qk_norm: str | None = None
    attention_biases: tuple[tuple[str, ...], ...] = ((),)
    own_head_dim = True
    sliding_window = True
    multipliers = False
    rope_types: Sequence[str] = ROPE_TYPES
    shared_experts = False
    shared_gate = False
    dense_places = "has experts in every layer"
    expert_names: tuple[tuple[str, str], ...] = tuple((role, role) for role in FFN)
    block = "mlp"

    def problems(self, construction: Construction, layout: Layout | None = None) -> list[str]:
        """Why this cannot become the target, all reasons; empty where it can."""
        reasons = [*self.routing_problems(construction), *self.block_problems(construction.base)]
        if layout not in (None, *self.layouts):
            reasons.append(f"layout {str(layout)!r}: {self.title} has {self.layouts[0]!s} alone")
        return reasons

    def routing_problems(self, construction: Construction) -> Iterator[str]:
        config, hidden = construction.config, construction.base.sizes.hidden_size
        if config.routing_method is not RoutingMethod.TOP_K:
            yield (
                f"routing_method {str(config.routing_method)!r}: readers of {self.title} "
                "checkpoints route by 'top_k' alone"
            )
        if config.gate_hidden_dim not in (None, hidden):
            yield (
                f"gate_hidden_dim {config.gate_hidden_dim}: {self.title}'s router reads the "
                f"model's hidden size, {hidden}"
            )
        shared = construction.shared_experts
        if shared and not self.shared_experts:
            yield f"shared experts ({', '.join(e.model for e in shared)}): {self.title} has none"
        elif not self.shared_gate:
            for expert in shared:
                if expert.positive_prompts or expert.negative_prompts:
                    yield (
                        f"prompts of the shared expert {expert.model}: {self.title} has no gate "
                        "for it that prompts could make"
                    )
        layers = frozenset(construction.dense_layers)
        if self.dense_keys(layers, construction.plan.num_layers) is None:
            listed = ", ".join(map(str, sorted(layers)))
            yield f"dense_layers {listed}: {self.title} {self.dense_places}"

    def block_problems(self, base: DenseModel) -> Iterator[str]:
        """What the base's blocks have or lack."""

        def at(name: str) -> str:
            tensor = base.tensors[f"model.layers.0.{name}"]
            return f"{tensor.file.path}: tensor {tensor.name!r}"

        config, sizes = f"{base.path / 'config.json'}", base.sizes
        if base.family.norms != self.norms:
            place = "before" if self.norms == NORMS_BEFORE else "after"
            (norm, *_) = (name for name in base.family.norms if name not in self.norms)
            yield f"{at(f'{norm}.weight')}: {self.title} has norms {place} attention and FFN alone"
        if base.family.qk_norm != self.qk_norm:
            if base.family.qk_norm is None:
                yield (
                    f"{config}: model_type {base.family.model_type} has no norm on queries and "
                    f"keys; {self.title} has one over {SPANS[self.qk_norm]}, which no weight undoes"
                )
            else:
                yield (
                    f"{at('self_attn.q_norm.weight')}: {self.title} has no place for a norm over "
                    f"{SPANS[base.family.qk_norm]} of queries and keys"
                )
        if base.attention_biases not in self.attention_biases:
            name = base.attention_biases[-1]
            yield f"{at(f'self_attn.{name}.bias')}: {self.title} has no place for this bias"
        if base.ffn_biases:
            yield f"{at('mlp.gate_proj.bias')}: {self.title} has no place for FFN biases"
        if not self.own_head_dim and sizes.head_dim * sizes.num_attention_heads != (
            sizes.hidden_size
        ):
            yield (
                f"{at('self_attn.q_proj.weight')}: head_dim is {sizes.head_dim}; readers of "
                f"{self.title} take hidden_size / num_attention_heads, "
                f"{sizes.hidden_size} / {sizes.num_attention_heads}"
            )
        longest = base.config["max_position_embeddings"]
        windows = {width if width and width < longest else None for width in base.windows}
        if len(windows) > 1:
            yield f"{config}: sliding_window in some layers alone, {self.title} has it in all"
        elif windows != {None} and not self.sliding_window:
            yield f"{config}: sliding_window is {base.windows[0]}; {self.title} has none"
        neutral = (1.0, sizes.head_dim**-0.5, 1.0, 1.0)
        if not self.multipliers and base.multipliers != neutral:
            names = zip(base.multipliers._fields, base.multipliers, neutral, strict=True)
            found = [f"{name} {value}" for name, value, none in names if value != none]
            yield f"{config}: {', '.join(found)}: {self.title} has no multipliers"
        rope = "default" if base.rope.scaling is None else base.rope.scaling["rope_type"]
        if rope not in self.rope_types:
            yield (
                f"{config}: rope_type is {rope!r}; "
                f"{self.title} has {', '.join(self.rope_types)} alone"
            )

    def warnings(self, construction: Construction) -> list[str]:
        """What fits the target and may yet surprise."""
        return []

    def dense_keys(self, layers: frozenset[int], num_layers: int) -> dict[str, Any] | None:
        """The keys of config.json that leave exactly these layers dense; `None` if none can."""
        return None if layers else {}

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
        """The layers that a config.json of the family leaves dense.

        Raises
        ------
        CheckpointError
            Where a key of it has a value of another kind.
        """
        return frozenset()

    def expert_tensors(self, layer: int, num_experts: int, layout: Layout) -> list[ExpertTensor]:
        """The tensors that hold a layer's experts, in order."""
        experts = range(num_experts)
        prefix = f"model.layers.{layer}.{self.block}.experts"
        if layout is Layout.PER_EXPERT:
            return [
                ExpertTensor(f"{prefix}.{expert}.{name}.weight", ((expert, role),))
                for expert in experts
                for name, role in self.expert_names
            ]
        return stacks(f"{prefix}.gate_up_proj", f"{prefix}.down_proj", experts)

    def router_name(self, layer: int, layout: Layout) -> str:
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def tensors(
        self, construction: Construction, layout: Layout | None = None
    ) -> Iterator[OutputTensor]:
        """Every tensor of the output, in the order of the model."""
        layout = layout or self.layouts[0]
        num_experts = construction.plan.num_experts
        dense = frozenset(construction.dense_layers)
        yield from construction.before_layers()
        for layer in range(construction.plan.num_layers):
            prefix = f"model.layers.{layer}"
            for name, weight in self.attention(construction, layer):
                yield OutputTensor(f"{prefix}.{name}", weight)
            if layer in dense:
                for role in FFN:
                    name = f"{prefix}.mlp.{role}.weight"
                    yield OutputTensor(name, construction.dense_ffn(layer, role))
                continue
            yield OutputTensor(self.router_name(layer, layout), construction.router(layer))
            for tensor in self.expert_tensors(layer, num_experts, layout):
                weights = [construction.expert(layer, e, role) for e, role in tensor.parts]
                yield OutputTensor(tensor.name, joined(weights, tensor, num_experts))
            for name, weight in self.shared(construction, layer):
                yield OutputTensor(f"{prefix}.{name}", weight)
        yield from construction.after_layers()

    def attention(self, construction: Construction, layer: int) -> Iterator[tuple[str, Weight]]:
        """Attention and norms of a layer, with their names inside the layer."""
        yield from construction.layer(layer)

    def shared(self, construction: Construction, layer: int) -> Iterator[tuple[str, Weight]]:
        """What belongs to the shared experts of a layer, with its names inside the layer."""
        yield from ()

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> Shapes:
        """What a config.json of the family makes the shapes of these tensors.

        Raises
        ------
        CheckpointError
            Where a key of it has a value of another kind.
        """
        return {}

    def config(self, construction: Construction) -> dict[str, Any]:
        """The output's config.json, in the spellings of transformers 4 and 5.

        Every key stands there whose default differs from reader to reader or from the source's.
        """
        carried = (
            "hidden_act",
            "max_position_embeddings",
            "initializer_range",
            "rms_norm_eps",
            "attention_dropout",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        )
        base, sizes = construction.base, construction.base.sizes
        dtype = DTYPE_NAMES[construction.dtype]
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "vocab_size": sizes.vocab_size,
            "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.intermediate_size,
            "num_hidden_layers": sizes.num_hidden_layers,
            "num_attention_heads": sizes.num_attention_heads,
            "num_key_value_heads": sizes.num_key_value_heads,
            **({"head_dim": sizes.head_dim} if self.own_head_dim else {}),
            **{key: base.config[key] for key in carried},
            **self.own_config(construction),
            "num_experts_per_tok": construction.config.num_experts_per_tok,
            "output_router_logits": False,
            **base.rope.in_every_spelling(),
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    def own_config(self, construction: Construction) -> dict[str, Any]:
        """The keys that this family alone has."""
        raise NotImplementedError


def stacks(gate_up: str, down: str, experts: range) -> list[ExpertTensor]:
    """Gate over up of every expert in one tensor, down of every expert in another."""
    pairs = tuple((expert, role) for expert in experts for role in GATE_UP)
    downs = tuple((expert, "down_proj") for expert in experts)
    return [ExpertTensor(gate_up, pairs, stacked=True), ExpertTensor(down, downs, stacked=True)]


def joined(weights: Sequence[Weight], tensor: ExpertTensor, num_experts: int) -> Weight:
    """The weights of a tensor's parts as that tensor."""
    rows, columns = weights[0].shape
    if not tensor.stacked:
        return Weight.stacked(weights, (rows * len(weights), columns))
    return Weight.stacked(weights, (num_experts, rows * len(weights) // num_experts, columns))


def ffn_shapes(prefix: str, width: int, hidden: int) -> Shapes:
    down = FFN[-1]
    return {
        f"{prefix}.{role}.weight": (hidden, width) if role == down else (width, hidden)
        for role in FFN
    }


def as_count(
    config: Mapping[str, Any], key: str, default: int | None = None, *, minimum: int = 0
) -> int:
    """An integer of a config.json."""
    value = config.get(key, default)
    if type(value) is not int or value < minimum:
        raise CheckpointError(
            f"config.json: {key} is {shown(value)}; it must be an integer of at least {minimum}"
        )
    return value


def num_experts(construction: Construction) -> dict[str, int]:
    """The number of experts in both spellings, of which each reader looks for one."""
    number = construction.plan.num_experts
    return {"num_local_experts": number, "num_experts": number}


class Mixtral(Target):
    """Mixtral (Jiang et al. 2024)."""

    name = "mixtral"
    title = "Mixtral"
    architecture = "MixtralForCausalLM"
    dense_twin = "mistral"
    expert_names = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))

    def expert_tensors(self, layer: int, num_experts: int, layout: Layout) -> list[ExpertTensor]:
        tensors = super().expert_tensors(layer, num_experts, layout)
        return [t._replace(name=self.block_name(t.name, layout)) for t in tensors]

    def router_name(self, layer: int, layout: Layout) -> str:
        return self.block_name(super().router_name(layer, layout), layout)

    def block_name(self, name: str, layout: Layout) -> str:
        """transformers 5 renamed the block when it fused the experts."""
        return name if layout is Layout.FUSED else name.replace(".mlp.", ".block_sparse_moe.")

    def own_config(self, construction: Construction) -> dict[str, Any]:
        return {
            **num_experts(construction),
            "sliding_window": construction.base.windows[0],
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
        }


class Qwen(Target):
    """What Qwen2-MoE and Qwen3-MoE share."""

    def dense_keys(self, layers: frozenset[int], num_layers: int) -> dict[str, Any]:
        return {"decoder_sparse_step": 1, "mlp_only_layers": sorted(layers)}

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
        step = as_count(config, "decoder_sparse_step", 1, minimum=1)
        listed = config.get("mlp_only_layers") or []
        if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
            raise CheckpointError(
                f"config.json: mlp_only_layers is {shown(listed)}; it must list layers"
            )
        between = (layer for layer in range(num_layers) if (layer + 1) % step)
        return frozenset(between) | (frozenset(listed) & frozenset(range(num_layers)))

    def own_config(self, construction: Construction) -> dict[str, Any]:
        sizes, window = construction.base.sizes, construction.base.windows[0]
        return {
            **num_experts(construction),
            "moe_intermediate_size": sizes.intermediate_size,
            **self.dense_keys(frozenset(construction.dense_layers), sizes.num_hidden_layers),
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.001,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": sizes.num_hidden_layers if window is None else 0,
        }


class Qwen3Moe(Qwen):
    """Qwen3-MoE (Yang et al. 2025): norms on each head's queries and keys."""

    name = "qwen3_moe"
    title = "Qwen3-MoE"
    architecture = "Qwen3MoeForCausalLM"
    dense_twin = "qwen3"
    qk_norm = "head"
    attention_biases = ((), QKVO)

    def own_config(self, construction: Construction) -> dict[str, Any]:
        biased = bool(construction.base.attention_biases)
        return {**super().own_config(construction), "attention_bias": biased}


class Qwen2Moe(Qwen):
    """Qwen2-MoE (Yang et al. 2024): biases on queries, keys and values, one gated shared FFN.

    A source without those biases gets zeros. Where no shared expert is asked for, the one that the
    family must have adds nothing.
    """

    name = "qwen2_moe"
    title = "Qwen2-MoE"
    architecture = "Qwen2MoeForCausalLM"
    dense_twin = "qwen2"
    attention_biases = ((), QKV)
    own_head_dim = False
    shared_experts = True
    shared_gate = True
    # Divides among tensor-parallel ranks and fills a block of llama.cpp's quantisation.
    silent_width = 256

    def attention(self, construction: Construction, layer: int) -> Iterator[tuple[str, Weight]]:
        for name, weight in construction.layer(layer):
            yield name, weight
            projection = name.removeprefix("self_attn.").removesuffix(".weight")
            if projection in QKV and not construction.base.attention_biases:
                bias = Weight.zeros(weight.dtype, weight.shape[:1])
                yield f"self_attn.{projection}.bias", bias

    def shared(self, construction: Construction, layer: int) -> Iterator[tuple[str, Weight]]:
        for role in FFN:
            if construction.shared_experts:
                weight = construction.shared(layer, role)
            else:
                weight = construction.silent(layer, self.shared_width(construction), role)
            yield f"mlp.shared_expert.{role}.weight", weight
        yield "mlp.shared_expert_gate.weight", construction.shared_gate(layer)

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> Shapes:
        width = as_count(config, "shared_expert_intermediate_size")
        shapes = ffn_shapes("mlp.shared_expert", width, hidden)
        return shapes | {"mlp.shared_expert_gate.weight": (1, hidden)}

    def shared_width(self, construction: Construction) -> int:
        width = construction.base.sizes.intermediate_size
        return len(construction.shared_experts) * width or min(self.silent_width, width)

    def own_config(self, construction: Construction) -> dict[str, Any]:
        windows = construction.base.windows
        kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
        return {
            **super().own_config(construction),
            "shared_expert_intermediate_size": self.shared_width(construction),
            "qkv_bias": True,
            "layer_types": kinds,
        }


class GraniteMoe(Target):
    """GraniteMoE: experts fused on disk, multipliers on embedding, attention, residual, logits."""

    name = "granitemoe"
    title = "GraniteMoE"
    architecture = "GraniteMoeForCausalLM"
    dense_twin = "granite"
    layouts = (Layout.FUSED,)
    attention_biases = ((), QKVO)
    own_head_dim = False
    sliding_window = False
    multipliers = True
    block = "block_sparse_moe"

    def expert_tensors(self, layer: int, num_experts: int, layout: Layout) -> list[ExpertTensor]:
        prefix = f"model.layers.{layer}.{self.block}"
        names = (f"{prefix}.input_linear.weight", f"{prefix}.output_linear.weight")
        return stacks(*names, range(num_experts))

    def router_name(self, layer: int, layout: Layout) -> str:
        return f"model.layers.{layer}.{self.block}.router.layer.weight"

    def own_config(self, construction: Construction) -> dict[str, Any]:
        return {
            **num_experts(construction),
            "attention_bias": bool(construction.base.attention_biases),
            **construction.base.multipliers._asdict(),
            "router_aux_loss_coef": 0.001,
        }


class GraniteMoeShared(GraniteMoe):
    """GraniteMoE with shared experts, whose outputs are added to the routed ones'."""

    name = "granitemoeshared"
    title = "GraniteMoE Shared"
    architecture = "GraniteMoeSharedForCausalLM"
    shared_experts = True

    def shared(self, construction: Construction, layer: int) -> Iterator[tuple[str, Weight]]:
        if construction.shared_experts:
            gate, up = (construction.shared(layer, role) for role in GATE_UP)
            width, hidden = gate.shape
            yield "shared_mlp.input_linear.weight", Weight.stacked((gate, up), (2 * width, hidden))
            yield "shared_mlp.output_linear.weight", construction.shared(layer, "down_proj")

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> Shapes:
        width = as_count(config, "shared_intermediate_size", 0)
        if not width:
            return {}
        return {
            "shared_mlp.input_linear.weight": (2 * width, hidden),
            "shared_mlp.output_linear.weight": (hidden, width),
        }

    def own_config(self, construction: Construction) -> dict[str, Any]:
        width = len(construction.shared_experts) * construction.base.sizes.intermediate_size
        return {**super().own_config(construction), "shared_intermediate_size": width}


class FlexOlmo(Target):
    """FlexOlmo (Shi et al. 2025): OLMo2 with experts in place of each FFN."""

    name = "flex_olmo"
    title = "FlexOlmo"
    architecture = "FlexOlmoForCausalLM"
    dense_twin = "olmo2"
    norms = NORMS_AFTER
    qk_norm = "width"
    attention_biases = ((), QKVO)
    sliding_window = False

    def own_config(self, construction: Construction) -> dict[str, Any]:
        return {
            **num_experts(construction),
            "attention_bias": bool(construction.base.attention_biases),
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.01,
        }


class DeepSeek(Target):
    """DeepSeek-MoE, the first version (Dai et al. 2024): shared experts added to the routed ones.

    transformers reads it with the code that DeepSeek keeps on the Hub.
    """

    name = "deepseek"
    title = "DeepSeek-MoE"
    architecture = "DeepseekForCausalLM"
    dense_twin = "llama"
    layouts = (Layout.PER_EXPERT,)
    own_head_dim = False
    sliding_window = False
    rope_types = ("default", "linear", "dynamic")
    shared_experts = True
    dense_places = (
        "can leave the first layers dense, and of those after them all but every n-th, not these"
    )

    def dense_keys(self, layers: frozenset[int], num_layers: int) -> dict[str, Any] | None:
        first = min(frozenset(range(num_layers)) - layers)
        for step in range(1, num_layers + 1):
            keys = {"first_k_dense_replace": first, "moe_layer_freq": step}
            if self.dense_layers(keys, num_layers) == layers:
                return keys
        return None

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
        first = as_count(config, "first_k_dense_replace", 0)
        step = as_count(config, "moe_layer_freq", 1, minimum=1)
        return frozenset(n for n in range(num_layers) if n < first or n % step)

    def warnings(self, construction: Construction) -> list[str]:
        if construction.config.num_experts_per_tok > 1:
            return []
        return [
            "num_experts_per_tok 1: DeepSeek-MoE leaves the weight of a single expert as it is, so "
            "that each FFN's output shrinks to that share until training makes up for it"
        ]

    def shared(self, construction: Construction, layer: int) -> Iterator[tuple[str, Weight]]:
        if construction.shared_experts:
            for role in FFN:
                yield f"mlp.shared_experts.{role}.weight", construction.shared(layer, role)

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> Shapes:
        if config.get("n_shared_experts") is None:
            return {}
        number = as_count(config, "n_shared_experts", 0)
        width = number * as_count(config, "moe_intermediate_size")
        return ffn_shapes("mlp.shared_experts", width, hidden)

    def config(self, construction: Construction) -> dict[str, Any]:
        config = super().config(construction)
        if config["rope_scaling"] is not None:  # Its code takes exactly these two keys.
            scaling = config["rope_scaling"]
            config["rope_scaling"] = {"type": scaling["rope_type"], "factor": scaling["factor"]}
        return config

    def own_config(self, construction: Construction) -> dict[str, Any]:
        code = "deepseek-ai/deepseek-moe-16b-base"
        layers = frozenset(construction.dense_layers)
        return {
            "n_routed_experts": construction.plan.num_experts,
            # DeepSeek's code makes an FFN of width 0 where it is 0, and dividing by that ends vLLM.
            "n_shared_experts": len(construction.shared_experts) or None,
            "moe_intermediate_size": construction.base.sizes.intermediate_size,
            **(self.dense_keys(layers, construction.plan.num_layers) or {}),
            "scoring_func": "softmax",
            "norm_topk_prob": True,
            "aux_loss_alpha": 0.001,
            "seq_aux": True,
            "attention_bias": False,
            "pretraining_tp": 1,
            "auto_map": {
                "AutoConfig": f"{code}--configuration_deepseek.DeepseekConfig",
                "AutoModel": f"{code}--modeling_deepseek.DeepseekModel",
                "AutoModelForCausalLM": f"{code}--modeling_deepseek.DeepseekForCausalLM",
            },
        }


# In the order in which "auto" tries them: the more readers, the earlier.
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Mixtral(),
        Qwen3Moe(),
        Qwen2Moe(),
        GraniteMoe(),
        FlexOlmo(),
        GraniteMoeShared(),
        DeepSeek(),
    )
}
# Several targets under one name, in the order in which they are tried.
GROUPS: dict[str, tuple[str, ...]] = {
    "auto": tuple(TARGETS),
    "qwen": ("qwen2_moe", "qwen3_moe"),
    "mergekit": (  # as mergekit-moe does, and then what it cannot write
        *("mixtral", "deepseek", "qwen2_moe", "qwen3_moe"),
        *("granitemoe", "flex_olmo", "granitemoeshared"),
    ),
}
# What people ask for and no dense family becomes.
IMPOSSIBLE = {
    "olmoe": "its attention normalises queries and keys over their full width and its norms stand "
    "before attention and FFN; no dense family has both",
    "deepseek_v2": "its attention is latent (MLA), which no dense source has",
    "deepseek_v3": "its attention is latent (MLA), which no dense source has",
    "phimoe": "its norms are LayerNorm, with a mean and a bias, which no dense source here has",
}


def as_target_name(name: Any) -> str:
    """The argument `target`: "auto" or the name of a target, hyphens and case aside.

    Raises
    ------
    TypeError, CheckpointError
        A target that is no string, is unknown, or cannot be made from any dense model.
    """
    if not isinstance(name, str):
        raise TypeError(f"target must be the name of a target, got {name!r}")
    plain = {key.replace("_", ""): key for key in (*GROUPS, *TARGETS, *IMPOSSIBLE)}
    plain["deepseekmoe"] = DeepSeek.name
    key = plain.get(name.lower().replace("-", "").replace("_", ""))
    if key in IMPOSSIBLE:
        raise CheckpointError(f"target {name!r}: {IMPOSSIBLE[key]}")
    if key is None:
        raise CheckpointError(f"target {name!r} is not known; known are auto, {', '.join(TARGETS)}")
    return key


def choose(
    name: str, construction: Construction, layout: Layout | None
) -> tuple[Target, dict[str, tuple[str, ...]]]:
    """The target of that name, or the first that fits of a group; and why others do not.

    Raises
    ------
    CheckpointError
        With every reason why the target, or each of all, does not fit.
    """
    wanted = [TARGETS[each] for each in GROUPS.get(name) or (as_target_name(name),)]
    problems = {target.name: tuple(target.problems(construction, layout)) for target in wanted}
    fitting = [target for target in wanted if not problems[target.name]]
    if fitting:
        return fitting[0], {name: reasons for name, reasons in problems.items() if reasons}
    raise CheckpointError(
        *(
            reason if len(problems) == 1 else f"{target}: {reason}"
            for target, reasons in problems.items()
            for reason in reasons
        )
    )
