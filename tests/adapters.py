"""LoRA adapters as PEFT writes them, made without it, and the models that they make."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes  # noqa: F401 - so that NumPy knows bfloat16
import numpy as np
from safetensors.numpy import load_file, save_file

FFN = ("gate_proj", "up_proj", "down_proj")


def make_adapter(folder, base, *, rank=3, alpha=6, seed=0, dtype=np.float32, modules=FFN, **config):
    """An adapter of `base`; `modules` names the projections that it changes."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.split(".")[-1] in modules:
            rows, columns = weight.shape
            for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = random.normal(size=shape).astype(dtype)
                tensors[f"base_model.model.{module}.lora_{side}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors")
    written = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": alpha,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": list(modules),
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def change(folder, **values):
    """Set keys of an adapter's configuration."""
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_tensors(folder, edit):
    """Replace an adapter's tensors by what `edit` makes of them."""
    file = Path(folder) / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file)


def merged(base, adapter, folder, scale=lambda module, rank: 2.0):
    """The model that an adapter makes: `W + scale * (B @ A)`, in float32, rounded once."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        prefix = f"base_model.model.{module}"
        if f"{prefix}.lora_A.weight" in factors:
            a, b = (factors[f"{prefix}.lora_{side}.weight"].astype(np.float32) for side in "AB")
            total = np.zeros(weight.shape, np.float32)
            for q in range(len(a)):
                total += b[:, q : q + 1] * a[q]
            total *= np.float32(scale(module, len(a)))
            weights[name] = (weight.astype(np.float32) + total).astype(weight.dtype)
        elif prefix + ".weight" in factors:
            weights[name] = factors[prefix + ".weight"].astype(weight.dtype)
    save_file(weights, folder / "model.safetensors")
    return folder
