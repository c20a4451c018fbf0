"""Routers from hidden states, judged by transformers: is what they are made from what they read?

What mergekit-moe makes of the same recipe comes from the Python that MOE_FAST_MERGEKIT names.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ml_dtypes import float8_e4m3fn
from transformers import AutoModelForCausalLM

import dense_models
from families import OWN, make_model
from folders import edit_config, rewrite
from mergekit_moe import build_with_mergekit
from moe_fast import CheckpointError, ExpertSource, MoeConfig, build_moe, check_moe
from moe_fast.calibration import activations
from moe_fast.calibration.activations import visit_router_inputs
from moe_fast.calibration.parity import compare_logits
from moe_fast.calibration.tokenizer import PromptTokenizer
from moe_fast.models.dense import open_dense_model
from random_models import save_random_model

EXAMPLES = Path(__file__).parents[2] / "examples"
KINDS = yaml.safe_load((EXAMPLES / "kinds.yml").read_text(encoding="utf-8"))
PROMPTS, HELD_OUT = KINDS["prompts"], KINDS["held_out"]
TOKENS = [np.random.default_rng(n).integers(96, size=n).tolist() for n in (5, 17, 1, 9)]


class Routers:
    """A built MoE in transformers, which keeps what its routers read."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.read: dict[int, np.ndarray] = {}
        self.weights = []
        for number, layer in enumerate(self.model.model.layers):
            mlp = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
            router = mlp.router if hasattr(mlp, "router") else mlp.gate
            router.register_forward_pre_hook(
                lambda _, inputs, number=number: self.read.update({number: inputs[0]})
            )
            weight = router.layer.weight if hasattr(router, "layer") else router.weight
            self.weights.append(weight.detach().numpy())

    def inputs(self, tokens: list[int]) -> np.ndarray:
        """What every layer's router reads of some tokens, `(num_layers, T, hidden_size)`."""
        with torch.inference_mode():
            self.model(torch.tensor([tokens]))
        layers = [self.read[number] for number in range(len(self.weights))]
        return np.stack([x.reshape(len(tokens), -1).numpy() for x in layers])

    def first_choices(self, tokens: list[int]) -> np.ndarray:
        """The best expert of each layer and token, `(num_layers, T)`."""
        logits = zip(self.inputs(tokens), self.weights, strict=True)
        return np.stack([np.argmax(x @ weight.T, axis=1) for x, weight in logits])


@pytest.mark.parametrize("batch", [8192, 20], ids=["one batch", "two batches"])
@pytest.mark.parametrize("family", OWN)
def test_it_is_what_the_routers_read(family, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "TOKENS_AT_A_TIME", batch)
    dense = make_model(tmp_path / "dense", family, num_hidden_layers=3)
    build_moe(dense, tmp_path / "moe", MoeConfig(4, 2))
    routers = Routers(tmp_path / "moe")
    visited = {}
    visit_router_inputs(
        open_dense_model(dense),
        TOKENS,
        lambda layer, text, inputs: visited.update({(layer, text): inputs.copy()}),
    )
    assert len(visited) == 3 * len(TOKENS)
    for text, tokens in enumerate(TOKENS):
        read = routers.inputs(tokens)
        scale = np.abs(read).max()
        for layer in range(3):
            assert visited[layer, text].shape == read[layer].shape
            np.testing.assert_allclose(visited[layer, text], read[layer], rtol=0, atol=1e-5 * scale)


def read_by_routers(folder: Path, tokens: list[int]) -> dict[int, np.ndarray]:
    """What the router of each layer with experts reads of tokens, wherever the layer has it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    read: dict[int, np.ndarray] = {}
    for number, layer in enumerate(model.model.layers):
        blocks = (getattr(layer, name, None) for name in BLOCKS)
        routers = [getattr(block, name, None) for block in blocks for name in ("gate", "router")]
        for router in (each for each in routers if each is not None):
            router.register_forward_pre_hook(
                lambda _, inputs, number=number: read.update({number: inputs[0].numpy()})
            )
    with torch.inference_mode():
        model(torch.tensor([tokens]))
    return {number: inputs.reshape(len(tokens), -1) for number, inputs in read.items()}


BLOCKS = ("mlp", "feed_forward", "mixer", "block_sparse_moe")
# Whose layers are not plain attention and an FFN by Llama's names.
OTHERS = (
    *("cohere2", "exaone", "gemma", "granitemoehybrid", "helium", "hunyuan_v1_dense", "lfm2"),
    *("ministral3", "nemotron_h", "phi3", "qwen3_5_text", "youtu"),
)


@pytest.mark.parametrize("family", OTHERS)
def test_it_is_what_the_routers_of_other_blocks_read(family, tmp_path):
    dense = tmp_path / "dense"
    save_random_model(dense, family, **dense_models.FAMILIES[family])
    build_moe(dense, tmp_path / "moe", MoeConfig(4, 2))
    visited = {}
    visit_router_inputs(
        open_dense_model(dense),
        TOKENS,
        lambda layer, text, inputs: visited.update({(layer, text): inputs.copy()}),
    )
    for text, tokens in enumerate(TOKENS):
        read = read_by_routers(tmp_path / "moe", tokens)
        assert {layer for layer, number in visited if number == text} == read.keys()
        for layer, inputs in read.items():
            atol = 1e-5 * np.abs(inputs).max()
            np.testing.assert_allclose(visited[layer, text], inputs, rtol=0, atol=atol)


def visited_inputs(folder: Path) -> np.ndarray:
    """What the routers of every layer would read of the first text."""
    found: list[np.ndarray] = []
    visit_router_inputs(
        open_dense_model(folder), TOKENS[:1], lambda _layer, _text, inputs: found.append(inputs)
    )
    return np.stack(found)


def test_weights_in_fp8_are_run_as_what_they_mean(tmp_path):
    for name in ("dense", "plain"):
        make_model(tmp_path / name, "llama")
    meant = {}

    def change(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = {}
        for name, array in tensors.items():
            found[name] = meant[name] = array
            if array.ndim == 2 and "layers" in name:
                found[name] = array.astype(float8_e4m3fn)
                meant[name] = found[name].astype(np.float32) * np.float32(0.5)
                blocks = [-(-size // 16) for size in array.shape]
                found[f"{name}_scale_inv"] = np.full(blocks, 0.5, np.float32)
        return found

    rewrite(tmp_path / "dense", change)
    rewrite(tmp_path / "plain", lambda _: meant)
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    edit_config(tmp_path / "dense", quantization_config=settings)
    expected = visited_inputs(tmp_path / "plain")
    assert np.array_equal(visited_inputs(tmp_path / "dense"), expected)


def test_a_language_model_inside_of_another_is_run_as_alone(tmp_path):
    alone, inside = tmp_path / "alone", tmp_path / "inside"
    for folder in (alone, inside):
        save_random_model(folder, "qwen3_5_text", **dense_models.FAMILIES["qwen3_5_text"])
    text = json.loads((inside / "config.json").read_text())
    outer = {"model_type": "qwen3_5", "architectures": ["X"], "text_config": text}
    (inside / "config.json").write_text(json.dumps(outer | {"tie_word_embeddings": False}))
    rewrite(
        inside,
        lambda tensors: {
            n.replace("model.", "model.language_model."): t for n, t in tensors.items()
        },
    )
    assert np.array_equal(visited_inputs(inside), visited_inputs(alone))


def test_gemma_4_is_not_run_layer_by_layer(tmp_path):
    dense = tmp_path / "dense"
    save_random_model(dense, "gemma4_text", **dense_models.FAMILIES["gemma4_text"])
    with pytest.raises(CheckpointError, match="those of gemma4_text need more than the state"):
        visit_router_inputs(open_dense_model(dense), TOKENS, lambda *_: None)


def experts(smollm2: Path) -> list[ExpertSource]:
    return [ExpertSource(smollm2, positive_prompts=prompts) for prompts in PROMPTS.values()]


@pytest.fixture(scope="module")
def hidden(smollm2, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hidden") / "moe"
    build_moe(experts(smollm2), folder, MoeConfig(3, 1), routers="hidden")
    return folder


def test_gates_are_the_mean_of_what_the_routers_read(smollm2, hidden):
    """Defined again, on the routers' inputs in the built model, whose experts are all alike."""
    routers = Routers(hidden)
    tokenizer = PromptTokenizer(smollm2)
    means = []
    for prompts in PROMPTS.values():
        read = [routers.inputs(tokenizer.tokens(prompt))[:, 1:] for prompt in prompts]
        means.append(np.mean([inputs.mean(axis=1) for inputs in read], axis=0))
    expected = np.stack(means, axis=1)
    expected /= np.linalg.norm(expected, axis=2, keepdims=True)
    # The gates are bfloat16, with 8 bits: half a place is 2^-9 of a weight.
    built = np.stack(routers.weights)
    np.testing.assert_allclose(built, expected, rtol=2**-8, atol=1e-4)


def test_the_check_knows_them_by_their_digests(hidden):
    manifest = json.loads((hidden / "moe_fast.json").read_text())
    assert len(manifest["decisions"]["router_sha256"]) == 30
    report = check_moe(hidden)
    assert report.passed, report.problems


def follows_the_kind(folder: Path, smollm2: Path) -> float:
    """How often a held-out token's first choice is the expert of its kind, over all layers."""
    routers, tokenizer = Routers(folder), PromptTokenizer(smollm2)
    shares = []
    for kind, texts in enumerate(HELD_OUT.values()):
        chosen = [routers.first_choices(tokenizer.tokens(text))[:, 1:] for text in texts]
        shares.append(np.mean(np.concatenate(chosen, axis=1) == kind))
    return float(np.mean(shares))


def test_first_choices_follow_the_kind_of_text(smollm2, hidden, tmp_path):
    build_moe(experts(smollm2), tmp_path / "cheap", MoeConfig(3, 1), routers="cheap_embed")
    recipe = {
        "base_model": str(smollm2),
        "gate_mode": "hidden",
        "experts_per_token": 1,
        "experts": [
            {"source_model": str(smollm2), "positive_prompts": prompts}
            for prompts in PROMPTS.values()
        ],
    }
    theirs = build_with_mergekit(recipe, tmp_path)
    follows = {
        name: follows_the_kind(folder, smollm2)
        for name, folder in {
            "hidden": hidden,
            "cheap": tmp_path / "cheap",
            "theirs": theirs,
        }.items()
    }
    print(follows)
    # Chance is 1/3.
    assert follows["hidden"] > 0.9
    assert follows["hidden"] > follows["theirs"]
    assert follows["hidden"] > follows["cheap"]


def test_the_picture_of_the_readme(smollm2, tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "route_by_kind.py", smollm2, "load.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    shares = re.findall(r"^(\w+): (\S+) % of the choices", done.stdout, re.M)
    assert [kind for kind, _ in shares] == list(PROMPTS)
    assert min(float(share) for _, share in shares) > 90


def edited(folder: Path, **changes) -> Path:
    """A model whose config.json has some changes."""
    make_model(folder, "llama")
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: v for key, v in config.items() if v is not ...}))
    return folder


def visited(folder: Path) -> list[np.ndarray]:
    found = []
    tokens = [TOKENS[0]]
    visit_router_inputs(open_dense_model(folder), tokens, lambda *given: found.append(given[2]))
    return found


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "flex_attention", "kernels-community/x"])
def test_attention_that_only_some_processors_have_is_not_asked_for(tmp_path, key, value):
    expected = visited(edited(tmp_path / "plain"))
    found = visited(edited(tmp_path / "flash", **{key: value}))
    for theirs, ours in zip(expected, found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    # And the same when a checkpoint is run whole.
    compare_logits(tmp_path / "plain", tmp_path / "flash", TOKENS[0])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"torch_dtype": "auto"}, "auto"),
        ({"hidden_act": "swiglu"}, "swiglu"),
        ({"use_cache": "false"}, "use_cache"),
        ({"pad_token_id": 300}, "[Pp]adding_idx"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_what_transformers_raises_is_one_line_about_config_json(tmp_path, changes, reason):
    folder = edited(tmp_path / "model", **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: transformers .*({reason})") as info:
        visited(folder)
    assert len(str(info.value).splitlines()) == 1
    assert len(str(info.value)) < 600
    with pytest.raises(CheckpointError, match=rf"model: transformers .*({reason})") as info:
        compare_logits(folder, folder, TOKENS[0])
    assert len(str(info.value).splitlines()) == 1


def test_errors_of_our_own_pass_through(tmp_path):
    def refuse(*_) -> None:
        raise CheckpointError("our own")

    model = open_dense_model(edited(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=r"^our own$"):
        visit_router_inputs(model, [TOKENS[0]], refuse)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_memory_does_not_grow_with_the_layers(smollm2):
    """A layer of SmolLM2 has 14 MB of weights in float32, and it has 30."""
    program = """
import sys
import numpy as np
from moe_fast.calibration.activations import stream_router_inputs
from moe_fast.models.dense import open_dense_model

texts = list(np.random.default_rng(0).integers(0, 49_000, (4, 256)))
for layer, _ in stream_router_inputs(open_dense_model(sys.argv[1]), texts):
    if layer in (5, 29):
        print(int(open("/proc/self/statm").read().split()[1]) * 4096)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(smollm2)], capture_output=True, text=True, check=True
    )
    early, late = map(int, done.stdout.split())
    assert late - early < 50e6
