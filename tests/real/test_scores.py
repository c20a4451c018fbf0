"""Scores of experts are what hooks on transformers' own modules see of the whole model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as torch_load
from safetensors.torch import save_file as torch_save
from transformers import AutoTokenizer

from command import run
from moe_fast import (
    CheckpointError,
    MoeConfigError,
    ScoreReport,
    make_dense_model,
    prune_moe,
    score_experts,
)
from moe_fast.calibration import layers
from moe_fast.calibration.texts import read_tokens
from moe_models import NUM_EXPERTS, OWN, TOP_K, save_random_moe

# Sequences of several lengths: none of the padding between may count.
GENERATOR = np.random.default_rng(0)
TOKENS = [GENERATOR.integers(1, 96, size) for size in (12, 7, 12, 20, 1)]
NOT_OPERATED_ON = ("jetmoe", "longcat_flash")
FAMILIES = [family for family in OWN if family not in NOT_OPERATED_ON]
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "deepseek_v3": {"n_group": 2, "topk_group": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "gemma4_text": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 8,
        "layer_types": [*("full_attention", "sliding_attention") * 2, "full_attention"],
    },
}


def seen_by_hooks(model: Any) -> dict[str, dict[str, Any]]:
    """The scores of each layer, from what its experts read, a sequence at a time."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if name.endswith("experts") and hasattr(module, "num_experts"):
            number = name.partition("layers.")[2].partition(".")[0]
            found[number] = {
                "frequency": np.zeros(NUM_EXPERTS),
                "weighted": np.zeros(NUM_EXPERTS),
                "norms": np.zeros(NUM_EXPERTS),
                "outputs": 0,
            }
            module.register_forward_pre_hook(add_up(found[number]))
    with torch.inference_mode():
        for tokens in TOKENS:
            model(torch.from_numpy(tokens)[None], use_cache=False)
    return found


def add_up(totals: dict[str, Any]) -> Any:
    def hook(module: Any, inputs: tuple[Any, ...]) -> None:
        forward = type(module).forward
        if len(inputs) == 1:  # Llama 4: inputs are multiplied, and zero for whoever is not chosen
            states = inputs[0].reshape(NUM_EXPERTS, -1, inputs[0].shape[-1])
            outputs = forward(module, inputs[0]).reshape(states.shape)
            rows = [(states[e].abs().sum(-1) > 0).nonzero()[:, 0] for e in range(NUM_EXPERTS)]
            given = [(outputs[e, rows[e]], torch.ones(len(rows[e]))) for e in range(NUM_EXPERTS)]
        else:
            states, chosen, weights = inputs
            given = []
            for e in range(NUM_EXPERTS):
                rows, places = torch.where(chosen == e)
                alone = torch.full((len(rows), 1), e)
                output = forward(module, states[rows], alone, torch.ones(len(rows), 1))
                given.append((output, weights[rows, places]))
        for e, (output, weight) in enumerate(given):
            norms = output.double().norm(dim=1)
            totals["frequency"][e] += len(norms)
            totals["norms"][e] += norms.sum()
            totals["weighted"][e] += (norms * weight.double()).sum()
        totals["outputs"] += np.stack([o.double().sum(0).numpy() for o, _ in given])

    return hook


def assert_scores(found: dict[str, Any], totals: dict[str, Any]) -> None:
    count = np.maximum(totals["frequency"], 1)
    np.testing.assert_array_equal(found["frequency"], totals["frequency"])
    for measure, expected in (
        ("ean_sum", totals["norms"]),
        ("ean_mean", totals["norms"] / count),
        ("reap", totals["weighted"] / count),
    ):
        np.testing.assert_allclose(found[measure], expected, rtol=2e-4, err_msg=measure)


CASES = [(family, {}) for family in FAMILIES] + list(HYBRIDS.items())


@pytest.mark.parametrize(("family", "changes"), CASES, ids=str)
@pytest.mark.parametrize("batches", ["one batch", "several"])
def test_scores_are_what_hooks_see(tmp_path, monkeypatch, family, changes, batches):
    if batches == "several":
        monkeypatch.setattr(layers, "NUMBERS_AT_A_TIME", 1)
        monkeypatch.setattr(layers, "FEWEST_TOKENS", 24)
    model = save_random_moe(tmp_path / "moe", family, **changes)
    report = score_experts(tmp_path / "moe", tmp_path / "s.json", tokens=TOKENS, mean_outputs=True)
    expected = seen_by_hooks(model)
    assert report.layers.keys() == expected.keys()
    assert report.num_tokens == sum(map(len, TOKENS))
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["num_tokens"] == report.num_tokens
    assert written["layers"] == report.layers
    means = load_file(tmp_path / "s.safetensors")
    for key, totals in expected.items():
        assert sum(totals["frequency"]) == report.num_tokens * TOP_K
        assert_scores(report.layers[key], totals)
        mean = totals["outputs"] / np.maximum(totals["frequency"], 1)[:, None]
        scale = np.abs(mean).max()
        np.testing.assert_allclose(means[f"layers.{key}.mean_outputs"], mean, atol=1e-4 * scale)


def small(folder: Path, **changes: Any) -> Any:
    return save_random_moe(folder, "qwen3_moe", **changes)


def test_what_is_cut_off_goes_on_after_the_last_whole_layer(tmp_path):
    small(tmp_path / "moe")
    whole = score_experts(tmp_path / "moe", tokens=TOKENS)
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 9:  # in the second layer
            raise KeyboardInterrupt("stopped")

    output = tmp_path / "s.json"
    with pytest.raises(KeyboardInterrupt, match="stopped") as told:
        score_experts(tmp_path / "moe", output, tokens=TOKENS, progress=stop)
    assert "partial; do the same again to resume" in told.value.__notes__[0]
    state = json.loads((tmp_path / ".s.json.partial" / "state.json").read_text())
    assert state["done"] == 1
    seen = []
    report = score_experts(
        tmp_path / "moe", output, tokens=TOKENS, progress=lambda done, total: seen.append(done)
    )
    assert len(seen) == 2 * (NUM_EXPERTS + 1)
    assert report.layers == whole.layers
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_what_is_cut_off_in_the_first_layer_leaves_nothing(tmp_path):
    small(tmp_path / "moe")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt("stopped")

    with pytest.raises(KeyboardInterrupt, match="stopped"):
        score_experts(tmp_path / "moe", tmp_path / "s.json", tokens=TOKENS, progress=stop)
    assert [file.name for file in tmp_path.iterdir()] == ["moe"]


def test_other_tokens_do_not_go_on(tmp_path):
    small(tmp_path / "moe")
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 9:
            raise KeyboardInterrupt("stopped")

    with pytest.raises(KeyboardInterrupt, match="stopped"):
        score_experts(tmp_path / "moe", tmp_path / "s.json", tokens=TOKENS, progress=stop)
    report = score_experts(tmp_path / "moe", tmp_path / "s.json", tokens=TOKENS[:2])
    assert report.layers == score_experts(tmp_path / "moe", tokens=TOKENS[:2]).layers


def test_the_similarity_of_routers_rows(tmp_path):
    model = small(tmp_path / "moe")
    score_experts(tmp_path / "moe", tmp_path / "s.json", tokens=TOKENS, gate_similarity=True)
    logits: dict[int, Any] = {}

    def keep(number: int) -> Any:
        def hook(module: Any, inputs: Any, outputs: Any) -> None:
            logits.setdefault(number, []).append(outputs[0].double().reshape(-1, NUM_EXPERTS))

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(keep(number))
    with torch.inference_mode():
        for tokens in TOKENS:
            model(torch.from_numpy(tokens)[None], use_cache=False)
    found = load_file(tmp_path / "s.safetensors")
    for number, parts in logits.items():
        columns = torch.cat(parts).T
        expected = torch.nn.functional.cosine_similarity(columns[:, None], columns[None], dim=-1)
        np.testing.assert_allclose(found[f"layers.{number}.gate_similarity"], expected, atol=1e-5)


def test_a_language_model_inside_another(tmp_path):
    """The layers of a multimodal model are found behind what stands before their names."""
    model = save_random_moe(tmp_path / "text", "qwen3_5_moe_text")
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    (tmp_path / "moe").mkdir()
    wrapped = {n.replace("model.", "model.language_model.", 1): t for n, t in tensors.items()}
    wrapped["model.visual.blocks.0.mlp.weight"] = np.ones((2, 2), np.float32)
    save_file(wrapped, tmp_path / "moe" / "model.safetensors", metadata={"format": "pt"})
    whole = {"model_type": "qwen3_5_moe", "text_config": config}
    (tmp_path / "moe" / "config.json").write_text(json.dumps(whole))
    report = score_experts(tmp_path / "moe", tokens=TOKENS)
    for key, totals in seen_by_hooks(model).items():
        assert_scores(report.layers[key], totals)


def test_fp8_is_dequantised_as_it_is_read(tmp_path):
    """The scores of a model in FP8 are those of the same numbers in float32."""
    small(tmp_path / "plain")
    tensors = torch_load(tmp_path / "plain" / "model.safetensors")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    quantised, plain = {}, {}
    for name, tensor in tensors.items():
        quantised[name], plain[name] = tensor, tensor
        if name.endswith("proj.weight"):
            rows, columns = (-(-size // 16) for size in tensor.shape)
            scale = torch.rand(rows, columns) + 0.5
            quantised[name] = tensor.to(torch.float8_e4m3fn)
            quantised[f"{name}_scale_inv"] = scale
            wide = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
            plain[name] = quantised[name].float() * wide[: tensor.shape[0], : tensor.shape[1]]
    for folder, weights in (("fp8", quantised), ("exact", plain)):
        (tmp_path / folder).mkdir()
        torch_save(weights, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        keys = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        added = {"quantization_config": keys} if folder == "fp8" else {}
        (tmp_path / folder / "config.json").write_text(json.dumps(config | added))
    found = score_experts(tmp_path / "fp8", tokens=TOKENS).layers
    expected = score_experts(tmp_path / "exact", tokens=TOKENS).layers
    for key in expected:
        assert found[key]["frequency"] == expected[key]["frequency"]
        np.testing.assert_allclose(found[key]["reap"], expected[key]["reap"], rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"tokens": []}, MoeConfigError, "tokens hold no token"),
        ({"tokens": [[96]]}, MoeConfigError, "must be tokens of the model, 0 to 95, got 96"),
        ({"tokens": [[1]], "length": 0}, MoeConfigError, "length must be at least 1"),
        ({"tokens": [[1]], "device": "abacus"}, MoeConfigError, "device must be a device of torch"),
        ({"tokens": [[1]], "device": "meta"}, MoeConfigError, "got 'meta': it holds no numbers"),
        ({"tokens": [[1]], "device": 3}, TypeError, "device must be a string"),
        ({"tokens": [[1]], "mean_outputs": 1}, TypeError, "mean_outputs must be True or False"),
        ({"tokens": [[1]], "mean_outputs": True}, MoeConfigError, "beside the scores: name an out"),
        ({}, MoeConfigError, "texts must be given, or tokens"),
    ],
    ids=str,
)
def test_what_cannot_be_scored(tmp_path, given, kind, message):
    small(tmp_path / "moe")
    with pytest.raises(kind, match=message):
        score_experts(tmp_path / "moe", **given)


def test_nothing_is_replaced_or_left_half_written(tmp_path):
    small(tmp_path / "moe")
    (tmp_path / "s.json").write_text("mine")
    with pytest.raises(CheckpointError, match=r"s\.json: exists already"):
        score_experts(tmp_path / "moe", tmp_path / "s.json", tokens=TOKENS)
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    name = next(name for name in tensors if ".experts.3.down_proj" in name)
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, tmp_path / "moe" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layer 0: expert 3 gives outputs that are not fini"):
        score_experts(tmp_path / "moe", tmp_path / "t.json", tokens=TOKENS)
    assert not list(tmp_path.glob("*t.json*"))


def test_the_command(tmp_path):
    small(tmp_path / "moe")
    np.save(tmp_path / "tokens.npy", np.stack([TOKENS[0], TOKENS[2]]))
    arguments = ["score", "moe", "-o", "s.json", "--tokens", "tokens.npy"]
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "experts  6 per layer" in done.stdout
    assert run(*arguments, cwd=tmp_path).returncode == 1
    done = run(*arguments, "--overwrite", "--json", cwd=tmp_path)
    printed = json.loads(done.stdout)
    assert ScoreReport.from_dict(printed).to_dict() | {"version": 1} == printed
    page = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
    keys = re.findall(
        r"^\| `([^`]+)` \|", page.partition("\n## score")[2].partition("\n## ")[0], re.M
    )
    assert {key.partition(".")[0] for key in keys} == printed.keys()
    assert {key.rpartition(".")[2] for key in keys if "LAYER" in key} == printed["layers"][
        "0"
    ].keys()
    pruned = prune_moe(
        tmp_path / "moe", tmp_path / "pruned", num_experts=4, scores=tmp_path / "s.json"
    )
    assert pruned.num_experts == 4
    small(tmp_path / "other", initializer_range=0.1)
    with pytest.raises(CheckpointError, match=r"s\.json: are the scores of another model, 'moe'"):
        prune_moe(tmp_path / "other", tmp_path / "p", num_experts=4, scores=tmp_path / "s.json")


def test_conversations_go_through_the_chat_template(smollm2, tmp_path):
    talks = [
        [{"role": "user", "content": "What is a router?"}],
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello, wörld"}],
    ]
    lines = [json.dumps({"messages": talk}) for talk in talks]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    config = json.loads((smollm2 / "config.json").read_text())
    found = read_tokens(smollm2, config, texts=tmp_path / "talks.jsonl").sequences
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for sequence, talk in zip(found, talks, strict=True):
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        assert sequence.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    (tmp_path / "wrong.jsonl").write_text(json.dumps({"messages": [{"role": 3}]}))
    with pytest.raises(CheckpointError, match=r"wrong\.jsonl:1: messages: the chat template of"):
        read_tokens(smollm2, config, texts=tmp_path / "wrong.jsonl")


def test_a_model_without_a_chat_template(tmp_path):
    make_dense_model(tmp_path / "dense", seed=0)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    with pytest.raises(CheckpointError, match=r"a\.jsonl:1: messages: "):
        read_tokens(tmp_path / "dense", config, texts=tmp_path / "a.jsonl")


def test_the_example_prunes_what_it_trained(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "prune_scored.py"
    steps = ["--steps=2", "--dense-steps=2", "--characters=4000", "--length=32"]
    done = subprocess.run(
        [sys.executable, script, tmp_path, *steps], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(losses) == 11
    assert np.isfinite(list(losses.values())).all()
