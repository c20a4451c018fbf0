"""A dense model made of an upcycled MoE is the dense model that it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for extra in ("safetensors", "ml_dtypes", "typer"):
    pytest.importorskip(extra)

from safetensors.numpy import load_file

from command import run
from families import make_model
from folders import config_of, edit_config
from forward import Model
from moe_families import write_moe
from moe_fast import CheckpointError, MoeConfig, MoeConfigError, build_moe, check_moe, extract_dense
from moe_fast.models.dense import open_dense_model

CONFIG = MoeConfig(num_experts=4)
PAIRS = {
    "mixtral": ("mistral", {}),
    "mixtral of llama": ("llama", {}),
    "qwen2_moe": ("qwen2", {}),
    "qwen3_moe": ("qwen3", {}),
    "flex_olmo": ("olmo2", {}),
    "granitemoe": ("granite", {"attention_bias": True}),
    "granitemoeshared": ("granite", {}),
    "deepseek": ("llama", {}),
}


def built(tmp_path: Path, name: str, seeds: int = 1, **options) -> Path:
    family, changes = PAIRS[name]
    sources = [tmp_path / f"dense-{seed}" for seed in range(seeds)]
    for seed, source in enumerate(sources):
        make_model(source, family, seed=seed, **changes)
    build_moe(sources, tmp_path / "moe", CONFIG, target=name.partition(" ")[0], **options)
    return tmp_path / "moe"


LAYOUTS = [
    (name, layout)
    for name in PAIRS
    for layout in ("per-expert", "fused")
    if layout == "fused" or not name.startswith("granite")
    if layout == "per-expert" or name != "deepseek"
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_an_upcycled_model_gives_the_dense_one_back(tmp_path, name, layout):
    moe = built(tmp_path, name, layout=layout)
    extract_dense(moe, tmp_path / "extracted", expert=2)
    expected = load_file(tmp_path / "dense-0" / "model.safetensors")
    found = load_file(tmp_path / "extracted" / "model.safetensors")
    assert found.keys() == expected.keys()
    for tensor, array in expected.items():
        assert found[tensor].tobytes() == array.tobytes(), tensor
    opened, source = (open_dense_model(tmp_path / n) for n in ("extracted", "dense-0"))
    assert (opened.sizes, opened.rope, opened.windows) == (
        source.sizes, source.rope, source.windows
    )  # fmt: skip
    assert opened.multipliers == source.multipliers
    tokens = np.arange(12)
    np.testing.assert_array_equal(
        Model(tmp_path / "extracted").logits(tokens), Model(tmp_path / "dense-0").logits(tokens)
    )
    checked = check_moe(tmp_path / "extracted")
    assert checked.passed, checked.problems
    assert "byte for byte" in checked["other weights"].summary


def test_the_mean_is_that_of_numpy(tmp_path):
    moe = built(tmp_path, "mixtral", seeds=4)
    extract_dense(moe, tmp_path / "mean", mean=True)
    found = load_file(tmp_path / "mean" / "model.safetensors")
    sources = [load_file(tmp_path / f"dense-{seed}" / "model.safetensors") for seed in range(4)]
    for role in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.1.mlp.{role}.weight"
        mean = np.mean([source[name].astype(np.float64) for source in sources], axis=0)
        np.testing.assert_array_equal(found[name], mean.astype(np.float32))
    assert check_moe(tmp_path / "mean").passed


def test_the_best_stand_side_by_side(tmp_path):
    moe = built(tmp_path, "mixtral", seeds=4)
    scores = {"layers": {"0": {"reap": [1, 4, 3, 2]}, "1": {"reap": [9, 0, 1, 5]}}}
    extract_dense(moe, tmp_path / "best", best=2, scores=scores)
    found = load_file(tmp_path / "best" / "model.safetensors")
    chosen = {0: (1, 2), 1: (0, 3)}
    sources = [load_file(tmp_path / f"dense-{seed}" / "model.safetensors") for seed in range(4)]
    for layer, experts in chosen.items():
        name = f"model.layers.{layer}.mlp.{{}}_proj.weight".format
        for role, axis, scale in (("gate", 0, 1), ("up", 0, 1), ("down", 1, 0.5)):
            parts = [sources[e][name(role)] * np.float32(scale) for e in experts]
            np.testing.assert_array_equal(found[name(role)], np.concatenate(parts, axis))
    width = json.loads((tmp_path / "best" / "config.json").read_text())["intermediate_size"]
    assert width == 2 * open_dense_model(tmp_path / "dense-0").sizes.intermediate_size
    assert check_moe(tmp_path / "best").passed


def test_dense_layers_stay(tmp_path):
    moe = built(tmp_path, "qwen3_moe", dense_layers=[0])
    extract_dense(moe, tmp_path / "extracted", expert=1)
    assert check_moe(tmp_path / "extracted").passed
    found = load_file(tmp_path / "extracted" / "model.safetensors")
    assert found.keys() == load_file(tmp_path / "dense-0" / "model.safetensors").keys()
    scores = {"layers": {"1": {"reap": [1, 2, 3, 4]}}}
    with pytest.raises(CheckpointError, match="one width"):
        extract_dense(moe, tmp_path / "no", best=2, scores=scores)


def test_what_is_refused(tmp_path):
    make_model(tmp_path / "dense", "qwen2")
    shared = [tmp_path / "dense"]
    build_moe(
        tmp_path / "dense", tmp_path / "moe", CONFIG, target="qwen2_moe", shared_experts=shared
    )
    with pytest.raises(CheckpointError, match="belongs to a shared expert, which a dense model"):
        extract_dense(tmp_path / "moe", tmp_path / "no", expert=0)
    write_moe(tmp_path / "olmoe", "olmoe")
    with pytest.raises(CheckpointError, match="'olmoe' has no dense twin here; mixtral"):
        extract_dense(tmp_path / "olmoe", tmp_path / "no", expert=0)
    for options in ({}, {"expert": 0, "mean": True}):
        with pytest.raises(MoeConfigError, match="expert or mean, best or copy must say"):
            extract_dense(tmp_path / "moe", tmp_path / "no", **options)
    with pytest.raises(MoeConfigError, match="scores are for best"):
        extract_dense(tmp_path / "moe", tmp_path / "no", best=2)
    with pytest.raises(MoeConfigError, match="expert must be at most 3, got 4"):
        extract_dense(tmp_path / "moe", tmp_path / "no", expert=4)
    assert not (tmp_path / "no").exists()


def test_a_changed_byte_is_seen(tmp_path):
    moe = built(tmp_path, "mixtral")
    extract_dense(moe, tmp_path / "extracted", expert=0)
    edit_config(tmp_path / "extracted", hidden_act="gelu")
    with (tmp_path / "extracted" / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x55")
    report = check_moe(tmp_path / "extracted")
    assert [f.check for f in report.findings if f.status == "failed"] == [
        "manifest", "other weights", "configuration"
    ]  # fmt: skip


def test_the_command(tmp_path):
    moe = built(tmp_path, "mixtral")
    done = run("extract", moe, "-o", tmp_path / "out", "--expert", "1")
    assert done.returncode == 0, done.stderr
    assert "4 per layer to none: a dense model" in done.stdout
    done = run("extract", moe, "-o", tmp_path / "out", "--mean", "--dry-run", "--overwrite")
    assert done.returncode == 0, done.stderr
    done = run("check", tmp_path / "out")
    assert done.returncode == 0, done.stdout


def fine_grained(folder: Path, target: str, dense: str, shards: int, **options: Any) -> Path:
    make_model(folder / "dense", dense, **PAIRS.get(target, ("", {}))[1])
    width = open_dense_model(folder / "dense").sizes.intermediate_size
    assert width % shards == 0
    config = MoeConfig(num_experts=2 * shards, num_experts_per_tok=shards)
    build_moe(
        folder / "dense", folder / "moe", config, target=target, granularity=shards, **options
    )
    return folder / "moe"


@pytest.mark.parametrize("how", ["manifest", "router", "asked"])
@pytest.mark.parametrize(
    ("target", "dense", "shards"),
    [("mixtral", "llama", 2), ("mixtral", "llama", 4), ("qwen3_moe", "qwen3", 4),
     ("glm4_moe", "qwen3", 4), ("glm4_moe", "llama", 2)],
)  # fmt: skip
def test_the_shards_of_a_copy_give_the_dense_model_back(tmp_path, target, dense, shards, how):
    moe = fine_grained(tmp_path, target, dense, shards)
    if how != "manifest":
        (moe / "moe_fast.json").unlink()
    given = {"granularity": shards} if how == "asked" else {}
    report = extract_dense(moe, tmp_path / "extracted", copy=1, **given)
    assert report.num_experts == 0
    expected = load_file(tmp_path / "dense" / "model.safetensors")
    found = load_file(tmp_path / "extracted" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name
    open_dense_model(tmp_path / "extracted")
    assert check_moe(tmp_path / "extracted").passed


def test_shards_of_another_number_give_it_back_up_to_rounding(tmp_path):
    make_model(tmp_path / "dense", "llama", intermediate_size=48)
    config = MoeConfig(num_experts=6, num_experts_per_tok=3)
    build_moe(tmp_path / "dense", tmp_path / "moe", config, granularity=3)
    extract_dense(tmp_path / "moe", tmp_path / "extracted", copy=0)
    expected = load_file(tmp_path / "dense" / "model.safetensors")
    found = load_file(tmp_path / "extracted" / "model.safetensors")
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=2e-7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"copy": 2}, "copy must be at most 1, got 2"),
        ({"copy": 0, "granularity": 3}, "granularity must divide the 8 experts, got 3"),
        ({"copy": 0, "expert": 0}, "expert or mean, best or copy must say"),
        ({"expert": 0, "granularity": 4}, "granularity is for copy"),
    ],
)
def test_copies_that_are_none(tmp_path, given, message):
    moe = fine_grained(tmp_path, "mixtral", "llama", 4)
    with pytest.raises(MoeConfigError, match=message):
        extract_dense(moe, tmp_path / "extracted", **given)


def test_a_model_that_does_not_say_its_shards(tmp_path):
    moe = built(tmp_path, "mixtral")
    with pytest.raises(MoeConfigError, match="granularity must say how many shards a copy has"):
        extract_dense(moe, tmp_path / "extracted", copy=0)


# Keys that transformers writes, and that decide nothing.
UNNEEDED = {"rms_norm_eps", "qk_head_dim", "mtp_layers_block_type", "moe_shared_expert_overlap"}
# Of families whose blocks are their own, and of others that spell keys in their own way.
BACK_AGAIN = [
    ("cohere2", "cohere2_moe"),
    ("ernie4_5", "ernie4_5_moe"),
    ("gemma4_text", "gemma4_text"),
    ("granitemoehybrid", "granitemoehybrid"),
    ("hunyuan_v1_dense", "hunyuan_v1_moe"),
    ("lfm2", "lfm2_moe"),
    ("llama", "solar_open"),
    ("nemotron_h", "nemotron_h"),
    ("qwen3", "dots1"),
    ("qwen3", "hy_v3"),
    ("qwen3", "mellum"),
    ("qwen3_5_text", "qwen3_5_moe_text"),
    ("youtu", "deepseek_v3"),
    ("youtu", "glm4_moe_lite"),
]


@pytest.mark.parametrize(("family", "target"), BACK_AGAIN)
def test_a_model_of_any_blocks_there_and_back_again(tmp_path, family, target):
    """Every tensor is the source's, and config.json says enough to make the same MoE of it."""
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    changes = {}
    if target in ("dots1", "mellum"):
        kinds = ["sliding_attention", "full_attention"]
        changes = {"use_sliding_window": True, "sliding_window": 7, "layer_types": kinds}
    make_model(dense, family, **changes)
    build_moe(dense, moe, CONFIG, target=target)
    if target == "gemma4_text":
        with pytest.raises(CheckpointError, match="it has an FFN beside its experts already"):
            extract_dense(moe, tmp_path / "extracted", expert=1)
        return
    extract_dense(moe, tmp_path / "extracted", expert=1)
    expected = load_file(dense / "model.safetensors")
    found = load_file(tmp_path / "extracted" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name
    assert check_moe(tmp_path / "extracted").passed
    build_moe(tmp_path / "extracted", tmp_path / "again", CONFIG, target=target)
    first, second = config_of(moe), config_of(tmp_path / "again")
    assert first.keys() - second.keys() <= UNNEEDED
    assert second == {key: first[key] for key in second}
    weights = (load_file(each / "model.safetensors") for each in (moe, tmp_path / "again"))
    for one, other in zip(*(sorted(each.items()) for each in weights), strict=True):
        assert one[0] == other[0]
        assert np.array_equal(one[1], other[1])
