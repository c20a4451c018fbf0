"""Routers from prompts: the definition, written again in plain NumPy, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

for extra in ("safetensors", "ml_dtypes", "typer"):
    pytest.importorskip(extra)

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

pytest.importorskip("tokenizers")

from folders import convert
from moe_fast import CheckpointError, ExpertSource, MoeConfig, build_moe
from moe_fast.calibration.activations import embeddings
from moe_fast.calibration.tokenizer import PromptTokenizer
from moe_fast.checkpoint.check import check_moe
from moe_fast.demo import make_dense_model
from moe_fast.models.dense import open_dense_model

PAIR = MoeConfig(num_experts=2, num_experts_per_tok=1)
HELLO, CODE = ("Hello, world", "Goodbye!"), ("def f(x):\n    return x",)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    make_dense_model(tmp_path / "dense", seed=0)
    return tmp_path / "dense"


def routers(folder: Path) -> list[np.ndarray]:
    tensors = load_file(folder / "model.safetensors")
    return [tensors[f"model.layers.{n}.block_sparse_moe.gate.weight"] for n in range(2)]


def direction(table: np.ndarray, prompts, start: bytes = b"") -> np.ndarray:
    """The normalised sum of the embeddings of all bytes, which are the tokens here."""
    total = sum(table[byte] for prompt in prompts for byte in start + prompt.encode())
    return total / np.linalg.norm(total)


def configure(folder: Path, **changes) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def experts(dense: Path, **second) -> list[ExpertSource]:
    first = ExpertSource(dense, positive_prompts=HELLO)
    return [first, ExpertSource(dense, **({"positive_prompts": CODE} | second))]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_cheap_embed_is_its_definition(dense, tmp_path, dtype):
    convert(dense, dtype)
    tensors = load_file(dense / "model.safetensors")
    table = tensors["model.embed_tokens.weight"].astype(np.float64)
    models = experts(dense, negative_prompts=("no", "never"))
    build_moe(models, tmp_path / "moe", PAIR, routers="cheap_embed")
    difference = direction(table, CODE) - direction(table, ("no", "never"))
    expected = np.stack([direction(table, HELLO), difference / np.linalg.norm(difference)])
    for router in routers(tmp_path / "moe"):
        assert router.tobytes() == expected.astype(np.float32).astype(dtype).tobytes()
    assert check_moe(tmp_path / "moe").passed


@pytest.mark.parametrize("token", ["<", {"content": "<", "special": True}], ids=["text", "object"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_prompts_start_with_the_beginning_of_text(dense, tmp_path, token, file):
    (dense / file).write_text(json.dumps({"bos_token": token}))
    build_moe(experts(dense), tmp_path / "moe", PAIR, routers="cheap_embed")
    table = load_file(dense / "model.safetensors")["model.embed_tokens.weight"].astype(np.float64)
    expected = np.stack([direction(table, prompts, b"<") for prompts in (HELLO, CODE)])
    assert routers(tmp_path / "moe")[0].tobytes() == expected.astype(np.float32).tobytes()


def test_nothing_is_cut_or_padded(dense):
    file = dense / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["truncation"] = {
        "max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"
    }  # fmt: skip
    tokenizer["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    file.write_text(json.dumps(tokenizer))
    assert PromptTokenizer(dense).tokens("Hello") == list(b"Hello")


def test_embeddings_are_the_rows_of_the_table(dense):
    table = load_file(dense / "model.safetensors")["model.embed_tokens.weight"]
    tokens = [5, 255, 5, 0]
    assert (embeddings(open_dense_model(dense), tokens) == table[tokens]).all()


def test_experts_in_turn_share_their_models_prompts(dense, tmp_path):
    build_moe(experts(dense), tmp_path / "moe", MoeConfig(4, 1), routers="cheap_embed")
    router = routers(tmp_path / "moe")[0]
    assert (router[:2] == router[2:]).all()
    assert (router[0] != router[1]).any()


def edit(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json: is missing, and"),
        (edit("tokenizer.json", "{}"), r"dense.tokenizer\.json: is not a tokenizer: "),
        (edit("tokenizer_config.json", '{"bos_token": 3}'), r"bos_token is 3; it must be a string"),
        (edit("tokenizer_config.json", "[1"), r"dense.tokenizer_config\.json: not valid JSON"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be(dense, tmp_path, break_it, message):
    break_it(dense)
    with pytest.raises(CheckpointError, match=message):
        build_moe(experts(dense), tmp_path / "moe", PAIR, routers="cheap_embed")
    assert not (tmp_path / "moe").exists()


def test_a_tokenizer_of_another_model(dense, tmp_path):
    tokenizer = json.loads((dense / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["Hello"] = 256
    tokenizer["added_tokens"] = [
        {"id": 256, "content": "Hello", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    ]  # fmt: skip
    (dense / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = (
        r"'model\.embed_tokens\.weight' has 256 rows; the tokenizer beside it gives the token 256"
    )
    with pytest.raises(CheckpointError, match=message):
        build_moe(experts(dense), tmp_path / "moe", PAIR, routers="cheap_embed")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"positive_prompts": ()}, r"^expert 1 has no positive_prompts, which routers"),
        ({"positive_prompts": ("",)}, r"tokenizer\.json: finds no token in the prompt ''$"),
        (
            {"positive_prompts": ("ab",), "negative_prompts": ("ba",)},
            r"^expert 1: its negative prompts cancel its positive ones in layer 0",
        ),
    ],
)  # fmt: skip
def test_prompts_that_give_no_direction(dense, tmp_path, second, message):
    with pytest.raises(CheckpointError, match=message):
        build_moe(experts(dense, **second), tmp_path / "moe", PAIR, routers="cheap_embed")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_hidden_says_what_it_needs(dense, tmp_path, monkeypatch, missing):
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    if missing == "transformers":
        monkeypatch.setitem(sys.modules, "torch", sys)
    message = rf"^routers='hidden' runs the base model, which needs {missing}: pip install torch"
    with pytest.raises(ModuleNotFoundError, match=message):
        build_moe(experts(dense), tmp_path / "moe", PAIR, routers="hidden")
    assert not (tmp_path / "moe").exists()


def test_without_tokenizers(dense, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^prompts need tokenizers: pip install 'moe-fast"
    ):
        build_moe(experts(dense), tmp_path / "moe", PAIR, routers="cheap_embed")
