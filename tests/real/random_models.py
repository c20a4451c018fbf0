"""Small models with random weights, of any family that transformers knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_fast import ExpertSource, MoeConfig, build_moe

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}


def random_model(family: str, dtype: torch.dtype, **keys: Any) -> PreTrainedModel:
    """A model as transformers starts it, the same each time; `keys` of its configuration."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | keys)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def save_random_model(folder: Path, family: str, **changes: Any) -> None:
    """A float32 model as transformers makes and saves it, its norms and biases random too."""
    keys = {"initializer_range": 0.2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    model = random_model(family, torch.float32, **keys | changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            assert parameter.std() > 0, name
    model.save_pretrained(folder)


def build_random_moe(
    source: Path, folder: Path, config: MoeConfig, target: str, options: dict[str, Any]
) -> Path:
    """An MoE of different experts from one dense model; `shared_experts` may be just `True`."""
    options = dict(options)
    if options.pop("shared_experts", False):
        options["shared_experts"] = [ExpertSource(source, noise_scale=0.02)]
    experts = [ExpertSource(source, noise_scale=noise) for noise in (0.0, 0.05, 0.1)]
    build_moe(experts, folder, config, target=target, routers="random", seed=5, **options)
    return folder
