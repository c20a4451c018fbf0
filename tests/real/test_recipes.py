"""The same recipe through mergekit-moe and through us: the same tensors, byte for byte.

mergekit-moe fuses the experts of Mixtral and Qwen3-MoE, so that its output is converted first. Left
out are routers where they are drawn at random, since nobody can draw the same numbers by another
generator, and noise for the same reason.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from families import make_model
from folders import config_of
from mergekit_moe import build_all_with_mergekit
from moe_fast import build_recipe, check_moe, convert_moe
from moe_fast.demo import make_dense_model

GATE = re.compile(r"\.(mlp|block_sparse_moe)\.(gate|shared_expert_gate)\.weight$")
NAMES = ("one", "two", "three")
HELLO, CODE = ["Hello, world", "Goodbye!"], ["def f(x):\n    return x"]
FLOAT32, FLOAT16, BFLOAT16 = np.float32, np.float16, ml_dtypes.bfloat16


def make_source(folder: Path, family: str, seed: int, dtype: Any, **changes: Any) -> None:
    """A model of a family with the demo's tokenizer, which mergekit-moe cannot do without."""
    demo = folder.with_name("demo")
    make_dense_model(demo, seed=0)
    name = np.dtype(dtype).name
    make_model(folder, family, seed=seed, dtype=dtype, vocab_size=256, torch_dtype=name, **changes)
    for file in demo.glob("*token*"):
        shutil.copy(file, folder)
    # mergekit-moe pads with the first of these tokens, and looks for the class by its name.
    change(folder / "tokenizer_config.json", bos_token="<", eos_token="~")
    change(folder / "config.json", architectures=[f"{family.capitalize()}ForCausalLM"])


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def experts(*options: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"source_model": name, **each} for name, each in zip(NAMES, options, strict=False)]


PROMPTS = experts(
    {"positive_prompts": HELLO, "negative_prompts": CODE},
    {"positive_prompts": CODE},
    {"positive_prompts": ["4 + 5 = 9"]},
)
CHATS = experts(
    {"positive_prompts": ["<|im_start|>user\nWho are you?<|im_end|>", "<|im_start|>user\nHelp"]},
    {"positive_prompts": ["As a physician,"]},
    {"positive_prompts": ["[Genre: Fantasy]\n[Tags: humor]", "> open the door", "Guten Tag!"]},
)
CLOWN_CAR = {"gate_mode": "hidden", "dtype": "bfloat16"}
PLAIN = experts({}, {})
SCALED = experts({"residual_scale": 0.3}, {"residual_scale": 1e-3}, {})
SHARED = [{"source_model": "two", "residual_scale": 0.1}]
GATED = [{**SHARED[0], "positive_prompts": HELLO + CODE, "negative_prompts": ["no"]}]
# Source family, dtype of each source, the recipe apart from its models, the target.
CASES = {
    "plain": ("llama", [FLOAT32], {"experts": PLAIN}, "mixtral"),
    "plain, bfloat16": ("mistral", [BFLOAT16], {"experts": PLAIN}, "mixtral"),
    "tied": ("llama", [FLOAT32], {"experts": PLAIN}, "mixtral"),
    "scaled": ("llama", [FLOAT32], {"experts": SCALED}, "mixtral"),
    "scaled, bfloat16": ("llama", [BFLOAT16], {"experts": SCALED}, "mixtral"),
    "scaled, float16": ("llama", [FLOAT16], {"experts": SCALED}, "mixtral"),
    "to bfloat16": ("llama", [FLOAT32], {"experts": SCALED, "dtype": "bfloat16"}, "mixtral"),
    "to float16": ("llama", [BFLOAT16], {"experts": SCALED, "dtype": "float16"}, "mixtral"),
    "to float32": (
        "llama",
        [BFLOAT16, FLOAT16, FLOAT32],
        {"experts": SCALED, "dtype": "float32", "experts_per_token": 3},
        "mixtral",
    ),
    "to the base's dtype": ("llama", [FLOAT16, FLOAT32, BFLOAT16], {"experts": SCALED}, "mixtral"),
    "cheap_embed": (
        "llama",
        [FLOAT32],
        {"experts": PROMPTS, "gate_mode": "cheap_embed"},
        "mixtral",
    ),
    "cheap_embed, bfloat16": (
        "llama",
        [BFLOAT16],
        {"experts": PROMPTS, "gate_mode": "cheap_embed"},
        "mixtral",
    ),
    "qwen": ("qwen2", [FLOAT32], {"experts": SCALED, "shared_experts": SHARED}, "qwen2_moe"),
    "qwen of llama": (
        "llama",
        [BFLOAT16],
        {"experts": SCALED, "shared_experts": SHARED, "architecture": "Qwen"},
        "qwen2_moe",
    ),
    "qwen, gated": (
        "qwen2",
        [FLOAT32],
        {"experts": PROMPTS, "shared_experts": GATED, "gate_mode": "cheap_embed"},
        "qwen2_moe",
    ),
    "qwen3": (
        "qwen3",
        [FLOAT32],
        {"experts": SCALED, "architecture": "qwen", "dtype": "bfloat16"},
        "qwen3_moe",
    ),
    # The form of the examples in mergekit's documentation, with chat templates in their prompts.
    "hidden": ("mistral", [FLOAT32], {**CLOWN_CAR, "experts": CHATS}, "mixtral"),
    "hidden, gated": (
        "llama",
        [BFLOAT16],
        {**CLOWN_CAR, "experts": CHATS, "shared_experts": GATED, "architecture": "qwen"},
        "qwen2_moe",
    ),
    "deepseek": ("llama", [FLOAT32], {"experts": SCALED, "shared_experts": SHARED}, "deepseek"),
}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: array
        for file in sorted(folder.glob("*.safetensors"))
        for name, array in load_file(file).items()
    }


def assert_same_tensors(ours: Path, theirs: Path, *, but: re.Pattern[str]) -> None:
    left, right = tensors_of(ours), tensors_of(theirs)
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert (array.dtype, array.shape) == (right[name].dtype, right[name].shape), name
        if not but.search(name):
            assert array.tobytes() == right[name].tobytes(), name


def converted(theirs: Path, scratch: Path) -> Path:
    """mergekit-moe's output with one tensor for each expert."""
    model_type = config_of(theirs)["model_type"]
    if model_type not in ("mixtral", "qwen3_moe"):
        return theirs
    convert_moe(theirs, scratch / "converted", layout="per-expert")
    return scratch / "converted"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> dict[str, Path]:
    """The folder of each case, with its models and its recipe, and what mergekit-moe made of it."""
    scratch = tmp_path_factory.mktemp("recipes")
    recipes = {}
    for number, (case, (family, dtypes, recipe, _)) in enumerate(CASES.items()):
        folder = scratch / str(number)
        tied = {"tie_word_embeddings": True} if case == "tied" else {}
        for seed, name in enumerate(NAMES):
            make_source(folder / name, family, seed, dtypes[seed % len(dtypes)], **tied)
        recipes[folder] = {"base_model": "one", "gate_mode": "random", **recipe}
    build_all_with_mergekit(recipes)
    return dict(zip(CASES, recipes, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_tensors_equal_those_of_mergekit_moe(case, theirs, tmp_path, monkeypatch):
    *_, recipe, target = CASES[case]
    monkeypatch.chdir(theirs[case])
    report = build_recipe("recipe.yml", tmp_path / "ours")
    assert report.target == target
    per_expert = converted(Path("mergekit"), tmp_path)
    assert_same_tensors(tmp_path / "ours", per_expert, but=GATE)
    assert check_moe(tmp_path / "ours").passed
    if recipe.get("gate_mode") == "cheap_embed":
        assert_gates_agree(tmp_path / "ours", per_expert, 4 if "shared_experts" in recipe else 2)


def assert_gates_agree(ours: Path, theirs: Path, number: int) -> None:
    left, right = tensors_of(ours), tensors_of(theirs)
    gates = [name for name in left if GATE.search(name)]
    assert len(gates) == number
    for name in gates:
        # Theirs are added up in float32. A weight of 16 bits may round to either side.
        place = 0 if left[name].dtype == np.float32 else 2.0**-8
        expected = right[name].astype(np.float64)
        np.testing.assert_allclose(left[name].astype(np.float64), expected, rtol=place, atol=1e-6)
