"""Experts in layouts that are not known, packed experts, and layers for multi-token prediction."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

for extra in ("ml_dtypes", "safetensors", "typer"):
    pytest.importorskip(extra)

import numpy as np
from safetensors.numpy import load_file, save_file

from command import run
from folders import edit_config
from moe_families import FAMILIES, write_model, write_moe
from moe_fast import (
    CheckpointError,
    check_moe,
    convert_moe,
    inspect_model,
    merge_experts,
    prune_moe,
)

HIDDEN, WIDTH, EXPERTS = 8, 4, 3
SWIGLU = ("gate_proj", "up_proj", "down_proj")


def ones(*shape: int, dtype: str = "f4") -> np.ndarray:
    return np.ones(shape, dtype)


def stacked(prefix: str, *names: str) -> dict[str, np.ndarray]:
    return {prefix + name: ones(EXPERTS, WIDTH, HIDDEN) for name in names}


def numbered(prefix: str, *suffixes: str) -> dict[str, np.ndarray]:
    return {
        prefix.format(expert) + suffix: ones(WIDTH, HIDDEN)
        for expert in range(EXPERTS)
        for suffix in suffixes
    }


ROUTER = ones(EXPERTS, HIDDEN)
# What the tensors of a layer are called, the router's name, and config.json's own keys.
UNKNOWN = {
    "MLX": (
        stacked("model.layers.0.mlp.switch_mlp.", *(f"{p}.weight" for p in SWIGLU)),
        "model.layers.0.mlp.gate.weight",
        {"model_type": "qwen3_moe", "num_experts": EXPERTS, "num_experts_per_tok": 2},
    ),
    "MLX, quantised": (
        {
            f"model.layers.0.mlp.switch_mlp.{p}.{kind}": ones(EXPERTS, WIDTH, 1, dtype=dtype)
            for p in SWIGLU
            for kind, dtype in (("weight", "u4"), ("scales", "f2"), ("biases", "f2"))
        },
        "model.layers.0.mlp.gate.weight",
        {"model_type": "glm4_moe", "num_experts_per_tok": 2, "quantization": {"bits": 4}},
    ),
    "DBRX": (
        {
            f"transformer.blocks.0.ffn.experts.mlp.{w}": ones(EXPERTS * WIDTH, HIDDEN)
            for w in ("w1", "v1", "w2")
        },
        "transformer.blocks.0.ffn.router.layer.weight",
        {
            "model_type": "dbrx", "n_layers": 1,
            "ffn_config": {"moe_num_experts": EXPERTS, "moe_top_k": 2},
        },
    ),
    "Step-3": (
        stacked("model.layers.0.moe.", *(f"{p}.weight" for p in SWIGLU)),
        "model.layers.0.moe.gate.weight",
        {"model_type": "step3_text", "moe_num_experts": EXPERTS, "moe_top_k": 2},
    ),
    "Switch": (
        numbered("encoder.block.0.layer.1.mlp.experts.expert_{}.", "wi.weight", "wo.weight"),
        "encoder.block.0.layer.1.mlp.router.classifier.weight",
        {"model_type": "switch_transformers", "num_experts": EXPERTS, "num_experts_per_tok": 2},
    ),
    "DeepSpeed": (
        numbered("model.h.0.mlp.deepspeed_moe.experts.deepspeed_experts.{}.", "fc1.weight"),
        "model.h.0.mlp.deepspeed_moe.gate.wg.weight",
        {"model_type": "gpt2", "num_experts": EXPERTS, "num_experts_per_tok": 2},
    ),
    "bitsandbytes, stacked": (
        {
            "model.layers.0.mlp.experts.gate_up_proj": ones(48, 1, dtype="u1"),
            "model.layers.0.mlp.experts.gate_up_proj.absmax": ones(3),
            "model.layers.0.mlp.experts.down_proj": ones(24, 1, dtype="u1"),
        },
        "model.layers.0.mlp.gate.weight",
        {
            "model_type": "qwen3_moe", "num_experts_per_tok": 2,
            "quantization_config": {"quant_method": "bitsandbytes"},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_can_be_told_of_a_layout_that_is_not_known(tmp_path, name):
    tensors, router, config = UNKNOWN[name]
    config = {"num_hidden_layers": 1, **config}
    folder = write_model(tmp_path / "moe", tensors | {router: ROUTER}, config)
    report = inspect_model(folder)
    assert report.layout == "unknown"
    assert report.unknown_experts
    assert (report.num_layers, report.num_moe_layers, report.num_mtp_layers) == (1, 1, 0)
    assert (report.num_experts, report.num_experts_per_tok) == (EXPERTS, 2)
    assert (report.active_parameters, report.parameters_per_expert) == (None, None)
    assert [router.tied_experts for router in report.routers] == [EXPERTS]
    assert report.copies is None
    printed = run("inspect", folder).stdout
    assert "not known here" in printed
    assert "dense" not in printed
    assert f"{EXPERTS} per layer, 2 per token" in printed
    page = tmp_path / "page.html"
    assert run("report", folder, "-o", page).returncode == 0
    assert "a layout that is not known here" in page.read_text()
    assert "dense model" not in page.read_text()


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_layout_that_is_not_known_is_refused_by_name(tmp_path, name):
    tensors, router, config = UNKNOWN[name]
    folder = write_model(tmp_path / "moe", tensors | {router: ROUTER}, config)
    for call in (
        lambda: check_moe(folder),
        lambda: convert_moe(folder, tmp_path / "out"),
        lambda: prune_moe(folder, tmp_path / "out", keep={"layers": {"0": [0]}}),
    ):
        with pytest.raises(CheckpointError, match="experts in a layout that is not known here"):
            call()
    assert not (tmp_path / "out").exists()


def test_experts_that_config_json_alone_tells_of(tmp_path):
    tensors = {"model.layers.0.mlp.w": ones(EXPERTS * WIDTH, HIDDEN)}
    config = {"model_type": "new_moe", "num_hidden_layers": 1, "num_local_experts": EXPERTS}
    report = inspect_model(write_model(tmp_path / "moe", tensors, config))
    assert (report.layout, report.num_experts, report.num_moe_layers) == ("unknown", EXPERTS, 0)
    assert report.unknown_experts == "config.json counts 3, and no tensor is known to hold one"
    edit_config(tmp_path / "moe", num_local_experts=0)
    assert inspect_model(tmp_path / "moe").layout == "dense"


def test_shared_experts_alone_are_no_experts(tmp_path):
    tensors = {"model.layers.0.mlp.shared_experts.up_proj.weight": ones(WIDTH, HIDDEN)}
    config = {"model_type": "llama", "num_hidden_layers": 1}
    assert inspect_model(write_model(tmp_path / "dense", tensors, config)).layout == "dense"


PACKINGS = {
    "awq": {
        "qweight": ones(HIDDEN, 1, dtype="i4"),
        "qzeros": ones(1, 1, dtype="i4"),
        "scales": ones(1, WIDTH, dtype="f2"),
    },
    "gptq": {
        "qweight": ones(1, WIDTH, dtype="i4"),
        "g_idx": ones(HIDDEN, dtype="i4"),
        "scales": ones(1, WIDTH, dtype="f2"),
    },
    "bitsandbytes": {
        "weight": ones(16, 1, dtype="u1"),
        "weight.absmax": ones(1),
        "weight.quant_map": ones(16),
    },
    "compressed-tensors": {
        "weight_packed": ones(WIDTH, 1, dtype="i4"),
        "weight_scale": ones(WIDTH, 1),
        "weight_shape": ones(2, dtype="i8"),
    },
    "hqq": {"W_q": ones(16, 1, dtype="u1"), "meta": ones(4)},
}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "never_heard_of"])
@pytest.mark.parametrize("method", PACKINGS)
def test_packed_experts_are_counted(tmp_path, family, method):
    block, parts = "mlp", SWIGLU
    if family == "mixtral":
        block, parts = "block_sparse_moe", ("w1", "w2", "w3")
    prefix = f"model.layers.0.{block}"
    tensors = {
        f"{prefix}.experts.{expert}.{part}.{kind}": array + array.dtype.type(expert)
        for expert in range(EXPERTS)
        for part in parts
        for kind, array in PACKINGS[method].items()
    }
    config = {
        "model_type": family, "num_hidden_layers": 1, "num_experts_per_tok": 1,
        "quantization_config": {"quant_method": method},
    }  # fmt: skip
    folder = write_model(tmp_path / "moe", tensors | {f"{prefix}.gate.weight": ROUTER}, config)
    report = inspect_model(folder)
    assert (report.num_experts, report.num_moe_layers) == (EXPERTS, 1)
    assert (report.layout, report.quantization) == ("per-expert", method)
    assert (report.active_parameters, report.copies, report.problems) == (None, (), ())
    if family == "mixtral":
        printed = run("inspect", folder).stdout
        assert f"'{method}'; how it packs numbers is not known here" in printed
    keep = {"layers": {"0": [0, 2]}}
    prune_moe(folder, tmp_path / "pruned", keep=keep)
    pruned = load_file(tmp_path / "pruned/model.safetensors")
    for place, expert in enumerate(keep["layers"]["0"]):
        for name, array in tensors.items():
            if f"experts.{expert}." in name:
                new = name.replace(f"experts.{expert}.", f"experts.{place}.")
                np.testing.assert_array_equal(pruned[new], array)
    with pytest.raises(CheckpointError, match=r"is [IU]\d+; "):
        merge_experts(folder, tmp_path / "merged", groups={"layers": {"0": [[0, 1, 2]]}})
    config["quantization_config"] = None
    report = inspect_model(write_model(tmp_path / "unnamed", tensors, config))
    assert report.quantization == "unknown"


def test_mxfp4(tmp_path):
    tensors = {
        "model.layers.0.mlp.router.weight": ROUTER,
        "model.layers.0.mlp.experts.gate_up_proj_blocks": ones(EXPERTS, WIDTH, 1, 4, dtype="u1"),
        "model.layers.0.mlp.experts.down_proj_blocks": ones(EXPERTS, HIDDEN, 1, 4, dtype="u1"),
    }
    config = {"model_type": "gpt_oss", "num_hidden_layers": 1, "num_experts_per_tok": 1}
    report = inspect_model(write_model(tmp_path / "moe", tensors, config))
    assert (report.layout, report.num_experts) == ("fused", EXPERTS)
    assert (report.quantization, report.active_parameters) == ("unknown", None)


def in_layer(tensors, number: int) -> dict[str, np.ndarray]:
    """The tensors of a layer, their names without what names the layer."""
    prefix = f"model.layers.{number}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


# Where families keep what predicts further tokens, and tensors that it has besides.
AHEAD = {
    "deepseek_v3": ("model.layers.{depth}.", "model.layers.{depth}.eh_proj.weight"),
    "glm4_moe": ("model.layers.{depth}.", "model.layers.{depth}.shared_head.norm.weight"),
    "qwen3_next": ("mtp.layers.0.", "mtp.fc.weight"),
    "qwen3_5_moe_text": ("mtp.layers.0.", "mtp.norm.weight"),
    "exaone_moe": ("mtp.layers.0.", "mtp.fc.weight"),
    "mimo_v2_flash": ("model.mtp.layers.0.", "model.mtp.layers.0.eh_proj.weight"),
    "ernie4_5_moe": ("model.mtp_block.0.", "model.mtp_linear_proj.0.weight"),
    "bailing_moe_v2": ("mtp.0.", "mtp.0.enorm.weight"),
}


@pytest.mark.parametrize("family", [f for f in AHEAD if f in FAMILIES])
def test_layers_for_multi_token_prediction_are_counted_apart(tmp_path, family):
    own = write_moe(tmp_path / "without", family)
    config = FAMILIES[family]["config"]
    depth = config["num_hidden_layers"]
    prefix, other = (name.format(depth=depth) for name in AHEAD[family])
    ahead = {prefix + name: tensor for name, tensor in in_layer(own, depth - 1).items()}
    assert any("experts" in name for name in ahead)
    ahead[other] = ones(HIDDEN, HIDDEN)
    without = inspect_model(tmp_path / "without")
    folder = write_model(tmp_path / "moe", own | ahead, config)
    report = inspect_model(folder)
    assert (without.num_mtp_layers, without.num_mtp_parameters) == (0, 0)
    assert (report.num_mtp_layers, report.num_mtp_parameters) == (
        1,
        sum(tensor.size for tensor in ahead.values()),
    )
    assert report.num_parameters == without.num_parameters + report.num_mtp_parameters
    for same in ("num_layers", "num_moe_layers", "num_experts", "active_parameters"):
        assert getattr(report, same) == getattr(without, same), same
    assert report.num_layers == depth
    assert [router.mtp for router in report.routers] == [False] * (len(report.routers) - 1) + [True]
    assert report.routers[-1].layer == depth
    assert report.routers[:-1] == without.routers
    printed = run("inspect", folder).stdout
    assert "1 layer for multi-token prediction besides" in printed
    assert "\nmtp.0  " in printed
    page = tmp_path / "page.html"
    run("report", folder, "-o", page)
    assert "1 for multi-token prediction" in page.read_text()
    document = json.loads(run("inspect", folder, "--json").stdout)
    assert (document["num_mtp_layers"], document["routers"][-1]["mtp"]) == (1, True)


def test_hidden_states_are_those_of_the_models_own_layers(tmp_path):
    own = write_moe(tmp_path / "without", "qwen3_next")
    ahead = {f"mtp.layers.0.{name}": tensor for name, tensor in in_layer(own, 0).items()}
    folder = write_model(tmp_path / "moe", own | ahead, FAMILIES["qwen3_next"]["config"])
    report = inspect_model(tmp_path / "without")
    width = next(t.shape[1] for n, t in own.items() if n.endswith("mlp.gate.weight"))
    states = np.random.default_rng(0).normal(size=(report.num_moe_layers, 16, width))
    expected = inspect_model(tmp_path / "without", hidden_states=states).routers
    found = inspect_model(folder, hidden_states=states).routers
    assert found[:-1] == expected
    assert (found[-1].finite, found[-1].mean_entropy) == (True, None)


def test_a_dense_model_with_layers_for_multi_token_prediction(tmp_path):
    """And a tower for images that has more layers than the language model."""
    tensors = {
        "model.language_model.layers.0.mlp.up_proj.weight": ones(WIDTH, HIDDEN),
        "model.visual.blocks.0.mlp.fc.weight": ones(WIDTH, HIDDEN),
        "model.visual.blocks.5.mlp.fc.weight": ones(WIDTH, HIDDEN),
        "model.mtp_layers.0.mlp.up_proj.weight": ones(2 * WIDTH, HIDDEN),
    }
    config = {"model_type": "mimo", "text_config": {"num_hidden_layers": 1}}
    report = inspect_model(write_model(tmp_path / "dense", tensors, config))
    assert (report.num_layers, report.num_mtp_layers) == (1, 1)
    assert report.num_mtp_parameters == 2 * WIDTH * HIDDEN
    assert report.active_parameters == 3 * WIDTH * HIDDEN
    assert "multi-token prediction besides" in run("inspect", tmp_path / "dense").stdout


def test_config_json_that_does_not_count_layers(tmp_path):
    tensors = write_moe(tmp_path / "moe", "qwen3_next")
    ahead = {f"mtp.layers.0.{name}": tensor for name, tensor in in_layer(tensors, 0).items()}
    folder = write_model(tmp_path / "ahead", tensors | ahead, {"model_type": "qwen3_next"})
    expected = FAMILIES["qwen3_next"]["config"]["num_hidden_layers"]
    report = inspect_model(folder)
    assert (report.num_layers, report.num_mtp_layers) == (expected, 1)


@pytest.mark.parametrize("number", [10**6 - 1, 10**9])
def test_numbers_from_names_cost_nothing(tmp_path: Path, number):
    name = f"model.layers.0.mlp.switch_mlp.{number}.weight"
    folder = tmp_path / "moe"
    folder.mkdir()
    save_file({name: ones(1, 1), f"mtp.layers.{number}.x": ones(1)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "num_hidden_layers": 2**62}))
    report = inspect_model(folder)
    assert report.layout == "unknown"
    assert report.num_experts is None
    assert math.isfinite(report.num_parameters)
    assert run("inspect", folder).returncode == 0


@pytest.mark.parametrize("key", ["model_type", "architectures"])
def test_names_from_config_json_do_not_command_the_terminal(tmp_path, key):
    config = {"num_hidden_layers": 1, "model_type": "x"}
    config[key] = "\x1b[2J" + "y" * 10_000 if key == "model_type" else ["\x1b[2J" * 1000]
    folder = write_model(tmp_path / "moe", {"model.layers.0.moe.w": ones(2, 2, 2)}, config)
    printed = run("inspect", folder).stdout
    assert "\x1b" not in printed
    assert len(printed) < 2000
