"""Whatever counts experts is found, in every family, by the names that transformers writes."""

from __future__ import annotations

import re

import numpy as np
import pytest

for extra in ("safetensors", "ml_dtypes"):
    pytest.importorskip(extra)

from moe_families import FAMILIES, NUM_EXPERTS, OPERATED_ON, write_model, write_moe
from moe_fast import CheckpointError, inspect_model
from moe_fast.families.registry import expert_axes, lineages
from moe_fast.models.moe import open_moe_model, require_experts


def counts_experts(name: str, shape: list[int]) -> bool:
    """By its number or its shape, for no other size of the models is that of their experts."""
    return re.search(r"\.experts\.\d", name) is not None or NUM_EXPERTS in shape


@pytest.mark.parametrize("family", OPERATED_ON)
def test_every_tensor_that_counts_experts_is_found(tmp_path, family):
    write_moe(tmp_path / "moe", family)
    model = open_moe_model(tmp_path / "moe")
    expected = {n for n, shape in FAMILIES[family]["tensors"].items() if counts_experts(n, shape)}
    assert expected
    assert set(model.places) == expected
    assert model.assumed is None
    assert model.num_experts == NUM_EXPERTS
    assert model.num_experts_per_tok == 2
    require_experts(model)
    report = inspect_model(tmp_path / "moe")
    assert report.problems == ()
    assert len(report.routers) == report.num_moe_layers >= 1
    assert all(router.finite for router in report.routers)


@pytest.mark.parametrize("family", OPERATED_ON)
def test_an_expert_is_its_own_weights(tmp_path, family):
    tensors = write_moe(tmp_path / "moe", family)
    model = open_moe_model(tmp_path / "moe")
    for layer in model.layers:
        for number, expert in layer.experts.items():
            for role, tensor in expert.items():
                data = np.fromfile(
                    tensor.file.path, np.float32, tensor.nbytes // 4, offset=tensor.offset
                )
                own = f"experts.{number}."
                candidates = [
                    array if own in name else array[number]
                    for name, array in tensors.items()
                    if name.startswith(layer.block)
                    and (own in name or (array.ndim > 2 and len(array) == NUM_EXPERTS))
                ]
                flat = [array.ravel() for array in candidates]
                halves = [half for array in flat for half in np.split(array, 2)]
                assert any(np.array_equal(data, array) for array in (*flat, *halves)), role


def test_a_family_is_in_one_place():
    axes = [axis for lineage in lineages() for axis in getattr(lineage, "EXPERTS", ())]
    listed = [name for axis in axes for name in axis.model_types]
    assert len(listed) == len(set(listed)) == len(expert_axes())


@pytest.mark.parametrize("family", ["jetmoe", "longcat_flash"])
def test_what_cannot_be_operated_on_can_be_looked_at(tmp_path, family):
    write_moe(tmp_path / "moe", family)
    assert inspect_model(tmp_path / "moe").num_moe_layers >= 1
    with pytest.raises(CheckpointError, match=f"{family}: its (attention|router)"):
        require_experts(open_moe_model(tmp_path / "moe"))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "lfm2_moe", "granitemoe", "minimax_m2"])
def test_an_unknown_family_of_common_names_is_read_with_what_is_assumed(tmp_path, family):
    write_moe(tmp_path / "known", family)
    write_moe(tmp_path / "unknown", family, model_type="unheard_of")
    known, unknown = (open_moe_model(tmp_path / name) for name in ("known", "unknown"))
    require_experts(unknown)
    assert set(unknown.places) == set(known.places)
    assert "what counts them besides" in unknown.assumed
    assert known.layers[0].router_name in unknown.assumed


def test_a_tensor_that_nothing_is_known_of_is_refused(tmp_path):
    tensors = write_moe(tmp_path / "moe", "mixtral")
    for name in ("gate.temperature_bias", "expert_weights"):
        extra = {f"model.layers.1.block_sparse_moe.{name}": np.ones(NUM_EXPERTS, np.float32)}
        folder = write_model(tmp_path / name, tensors | extra, FAMILIES["mixtral"]["config"])
        with pytest.raises(CheckpointError, match=rf"{name}' of shape \[6\] may count the 6 exp"):
            require_experts(open_moe_model(folder))


def test_what_stands_behind_an_experts_number_belongs_to_it(tmp_path):
    tensors = write_moe(tmp_path / "moe", "deepseek_v3")
    scales = {
        f"{name}_scale_inv": np.ones((1, 1), np.float32)
        for name in tensors
        if ".experts." in name and name.endswith(".weight")
    }
    folder = write_model(tmp_path / "fp8", tensors | scales, FAMILIES["deepseek_v3"]["config"])
    model = open_moe_model(folder)
    assert set(scales) <= set(model.places)
    lost = dict(scales)
    del lost["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"]
    folder = write_model(tmp_path / "lost", tensors | lost, FAMILIES["deepseek_v3"]["config"])
    message = r"layers.1.mlp.experts.3.up_proj.weight_scale_inv is missing; other"
    with pytest.raises(CheckpointError, match=message):
        require_experts(open_moe_model(folder))


def test_layers_that_predict_ahead(tmp_path):
    tensors = write_moe(tmp_path / "moe", "deepseek_v3")
    config = FAMILIES["deepseek_v3"]["config"]
    beyond = {n.replace("layers.2.", "layers.3."): t for n, t in tensors.items() if "s.2." in n}
    model = open_moe_model(write_model(tmp_path / "beyond", tensors | beyond, config))
    assert [layer.key for layer in model.layers] == ["1", "2", "mtp.0"]
    ahead = {n.replace("model.layers.2.", "mtp.layers.0."): t for n, t in tensors.items()}
    ahead = {n: t for n, t in ahead.items() if n.startswith("mtp.")}
    model = open_moe_model(write_model(tmp_path / "ahead", tensors | ahead, config))
    assert [(layer.key, layer.number) for layer in model.layers] == [
        ("1", 1), ("2", 2), ("mtp.0", 3)
    ]  # fmt: skip
    require_experts(model)


def test_a_language_model_inside_another(tmp_path):
    tensors = write_moe(tmp_path / "moe", "qwen3_5_moe_text")
    inner = FAMILIES["qwen3_5_moe_text"]["config"]
    outer = {"model_type": "qwen3_5_moe", "text_config": inner, "vision_config": {"depth": 2}}
    wrapped = {n.replace("model.", "model.language_model."): t for n, t in tensors.items()}
    wrapped["model.visual.blocks.0.mlp.linear_fc1.weight"] = np.ones((6, 6), np.float32)
    model = open_moe_model(write_model(tmp_path / "wrapped", wrapped, outer))
    require_experts(model)
    assert (model.num_experts, model.num_experts_per_tok) == (6, 2)
    assert all(name.startswith("model.language_model.") for name in model.places)
