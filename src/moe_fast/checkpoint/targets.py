"""What a Mixture-of-Experts family calls its tensors and its configuration.

One class a family. A target names shapes and pieces and never opens a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_fast.checkpoint.construction import Construction
from moe_fast.checkpoint.table import OutputTensor
from moe_fast.config import RoutingMethod

TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Mixtral:
    """Mixtral (Jiang et al. 2024): top-k routing, weights renormalised over the chosen.

    Experts are `block_sparse_moe.experts.E.w1` (gate), `w2` (down) and `w3` (up), one tensor each.
    """

    name = "mixtral"
    architecture = "MixtralForCausalLM"
    expert_names = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))

    def problems(self, construction: Construction) -> list[str]:
        """Why this cannot become the target; empty where it can."""
        base, config = construction.base, construction.config
        problems = []
        if config.routing_method is not RoutingMethod.TOP_K:
            problems.append(
                f"routing_method {str(config.routing_method)!r}: readers of Mixtral checkpoints "
                "route by 'top_k' alone"
            )
        if config.gate_hidden_dim not in (None, base.sizes.hidden_size):
            problems.append(
                f"gate_hidden_dim {config.gate_hidden_dim}: Mixtral's router reads the model's "
                f"hidden size, {base.sizes.hidden_size}"
            )
        for key, what in (("attention_bias", "attention biases"), ("mlp_bias", "FFN biases")):
            if base.config.get(key):
                problems.append(
                    f"{base.path / 'config.json'}: {key} is true; Mixtral has no place for {what}"
                )
        return problems

    def expert_tensor_names(self, layer: int, expert: int) -> Iterator[tuple[str, str]]:
        """The tensors of one expert, each with the dense model's role that it holds."""
        prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
        for name, role in self.expert_names:
            yield f"{prefix}.{name}.weight", role

    def tensors(self, construction: Construction) -> Iterator[OutputTensor]:
        """Every tensor of the output, in the order of the model."""
        yield from construction.before_layers()
        for layer in range(construction.plan.num_layers):
            prefix = f"model.layers.{layer}"
            for name, weight in construction.layer(layer):
                yield OutputTensor(f"{prefix}.{name}", weight)
            yield OutputTensor(f"{prefix}.block_sparse_moe.gate.weight", construction.router(layer))
            for expert in range(construction.plan.num_experts):
                for name, role in self.expert_tensor_names(layer, expert):
                    yield OutputTensor(name, construction.expert(layer, expert, role))
        yield from construction.after_layers()

    def config(self, construction: Construction) -> dict[str, Any]:
        """The output's config.json, in the spellings of transformers 4 and 5."""
        carried = (
            "hidden_act",
            "max_position_embeddings",
            "initializer_range",
            "rms_norm_eps",
            "attention_dropout",
            "sliding_window",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        )
        base, config = construction.base, construction.config
        sizes, rope = base.sizes, base.rope
        dtype = TORCH_DTYPES[construction.dtype]
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "vocab_size": sizes.vocab_size,
            "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.intermediate_size,
            "num_hidden_layers": sizes.num_hidden_layers,
            "num_attention_heads": sizes.num_attention_heads,
            "num_key_value_heads": sizes.num_key_value_heads,
            "head_dim": sizes.head_dim,
            **{key: base.config[key] for key in carried},
            "num_local_experts": config.num_experts,
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
            "rope_theta": rope.theta,
            "rope_scaling": None if rope.scaling is None else dict(rope.scaling),
            "rope_parameters": {
                **({"rope_type": "default"} if rope.scaling is None else rope.scaling),
                "rope_theta": rope.theta,
            },
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,
        }


TARGETS = {target.name: target for target in (Mixtral(),)}
