"""LoRA adapters as experts: as if their models had been merged first, or refused."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("ml_dtypes")

import ml_dtypes

from adapters import FFN, change, change_tensors, make_adapter, merged
from dense_families import write_dense
from families import make_model
from moe_fast import (
    CheckpointError,
    ExpertSource,
    MoeConfig,
    RecipeError,
    build_moe,
    build_recipe,
    check_moe,
    design_moe,
    read_recipe,
)

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture
def base(tmp_path):
    make_model(tmp_path / "base", "llama")
    return tmp_path / "base"


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def assert_same_tensors(one, other):
    one, other = tensors_of(one), tensors_of(other)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("adapter_dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_as_if_merged_first(tmp_path, dtype, adapter_dtype):
    base = make_model(tmp_path / "base", "qwen3", dtype=dtype)
    adapter = make_adapter(tmp_path / "adapter", base, dtype=adapter_dtype)
    merged(base, adapter, tmp_path / "merged")
    report = build_moe([base, adapter], tmp_path / "moe", MoeConfig(4))
    build_moe([base, tmp_path / "merged"], tmp_path / "other", MoeConfig(4))
    assert_same_tensors(tmp_path / "moe", tmp_path / "other")
    assert report.experts[1] == (f"{base}+{adapter}",)
    checked = check_moe(tmp_path / "moe")
    assert checked.passed, checked.problems


@pytest.mark.parametrize(
    "options",
    [
        {"granularity": 4},
        {"granularity": 4, "shuffle": True, "reinit": 0.5},
        {"dtype": "bfloat16"},
        {"target": "qwen2_moe", "dense_layers": [0]},
        {"granularity": 2, "backbone": "mean"},
        {"granularity": 2, "layout": "fused"},
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_together_with_everything_else(tmp_path, base, options, noise):
    adapter = make_adapter(tmp_path / "adapter", base)
    merged(base, adapter, tmp_path / "merged")
    config = MoeConfig(4 * options.get("granularity", 1))
    sources = [ExpertSource(base, lora=adapter, noise_scale=noise), base]
    build_moe(sources, tmp_path / "moe", config, base=base, **options)
    others = [ExpertSource(tmp_path / "merged", noise_scale=noise), base]
    build_moe(others, tmp_path / "other", config, base=base, **options)
    assert_same_tensors(tmp_path / "moe", tmp_path / "other")
    assert check_moe(tmp_path / "moe").passed


def test_a_shared_expert(tmp_path, base):
    adapter = make_adapter(tmp_path / "adapter", base)
    merged(base, adapter, tmp_path / "merged")
    for name, model in (("moe", adapter), ("other", tmp_path / "merged")):
        options = {"target": "deepseek", "shared_experts": model, "granularity": 2}
        build_moe(base, tmp_path / name, MoeConfig(4), **options)
    assert_same_tensors(tmp_path / "moe", tmp_path / "other")


@pytest.mark.parametrize("weights", ["mean", (3, 1)])
def test_the_rest_goes_into_the_mean(tmp_path, base, weights):
    modules = (*FFN, *QKVO)
    adapters = [make_adapter(tmp_path / f"a{i}", base, seed=i, modules=modules) for i in (1, 2)]
    models = [merged(base, a, tmp_path / f"m{i}") for i, a in enumerate(adapters)]
    build_moe(adapters, tmp_path / "moe", MoeConfig(4), backbone=weights)
    build_moe(models, tmp_path / "other", MoeConfig(4), backbone=weights, base=base)
    assert_same_tensors(tmp_path / "moe", tmp_path / "other")
    assert check_moe(tmp_path / "moe").passed


def test_whole_tensors_that_were_trained(tmp_path, base):
    def add_head(tensors):
        head = tensors_of(base)["lm_head.weight"]
        return tensors | {"base_model.model.lm_head.weight": head[::-1].copy()}

    adapter = make_adapter(tmp_path / "adapter", base, modules_to_save=["lm_head"])
    change_tensors(adapter, add_head)
    merged(base, adapter, tmp_path / "merged")
    build_moe(adapter, tmp_path / "moe", MoeConfig(2), backbone="mean")
    build_moe(tmp_path / "merged", tmp_path / "other", MoeConfig(2), base=tmp_path / "merged")
    assert_same_tensors(tmp_path / "moe", tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"'base_model\.model\.lm_head\.weight' changes what"):
        build_moe(adapter, tmp_path / "refused", MoeConfig(2))


def test_ranks_and_alphas_of_single_modules(tmp_path, base):
    """As PEFT reads them: the first pattern that a name, or its end, is of."""
    adapter = make_adapter(
        tmp_path / "adapter",
        base,
        rank=4,
        alpha=8,
        use_rslora=True,
        alpha_pattern={"layers.1.mlp.up_proj": 3, r"layers\.\d\.mlp\.down_proj": 5, "up_pro": 99},
        rank_pattern={"gate_proj": 2},
    )

    def cut(tensors):
        return {
            name: (v[:2] if ".lora_A." in name else v[:, :2]).copy() if "gate_proj" in name else v
            for name, v in tensors.items()
        }

    change_tensors(adapter, cut)

    def scale(module, rank):
        alpha = 8
        if module == "model.layers.1.mlp.up_proj":
            alpha = 3
        if module.endswith("down_proj"):
            alpha = 5
        assert rank == (2 if module.endswith("gate_proj") else 4)
        return alpha / math.sqrt(rank)

    merged(base, adapter, tmp_path / "merged", scale)
    build_moe(adapter, tmp_path / "moe", MoeConfig(2))
    build_moe(tmp_path / "merged", tmp_path / "other", MoeConfig(2))
    assert_same_tensors(tmp_path / "moe", tmp_path / "other")


def test_a_model_and_its_adapter_in_one_string(tmp_path, base):
    adapter = make_adapter(tmp_path / "adapter", base, base_model_name_or_path="org/elsewhere")
    design = design_moe([f"{base}+{adapter}", base], MoeConfig(2), base=base)
    (source, _) = design.manifest.request.models
    assert (source.model, source.lora) == (str(base), str(adapter))
    shutil.copytree(base, tmp_path / "c+adapter")
    (source,) = design_moe(tmp_path / "c+adapter", MoeConfig(2)).manifest.request.models
    assert source.lora is None


def test_a_moved_adapter_is_found(tmp_path, base):
    adapter = make_adapter(tmp_path / "adapter", base)
    build_moe(adapter, tmp_path / "moe", MoeConfig(2))
    (tmp_path / "new").mkdir()
    now = [shutil.move(folder, tmp_path / "new") for folder in (base, adapter)]
    assert check_moe(tmp_path / "moe", against=now).passed
    change_tensors(now[1], lambda tensors: {name: v + 1 for name, v in tensors.items()})
    assert not check_moe(tmp_path / "moe", against=now).passed


def test_who_is_named(tmp_path, base):
    adapter = make_adapter(tmp_path / "adapter", base)
    build_moe([adapter, base], tmp_path / "moe", MoeConfig(2))
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "| 0 | base | the same | LoRA adapter folded in |" in card
    assert '{source_model: "base", lora: "adapter"}' in card
    manifest = json.loads((tmp_path / "moe" / "moe_fast.json").read_text())
    files = {record["path"] for record in manifest["source_files"]}
    assert str(adapter / "adapter_model.safetensors") in files


A = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
WRONG_CONFIGS = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA' is"),
    ({"use_dora": True}, "use_dora: DoRA divides each row"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is true: it is for layers that store"),
    ({"bias": "lora_only"}, "bias is 'lora_only': it trains biases"),
    ({"lora_bias": True}, "lora_bias: a bias of the adapter"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': such a start changes"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq': such a start changes"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters: only changes of"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication: the layers it was trained on"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: aLoRA acts on"),
    ({"r": 0}, "r is 0; it must be an integer of at least 1"),
    ({"r": "4"}, "r is '4'; it must be an integer"),
    ({"lora_alpha": None}, "lora_alpha is None; it must be a number"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    ({"alpha_pattern": {"up_proj": 10**400}}, "alpha_pattern: 'up_proj' is 1000"),
    ({"rank_pattern": {"up_proj": 0}}, "rank_pattern: 'up_proj' is 0; it must be a number above"),
    ({"rank_pattern": ["up_proj"]}, "rank_pattern is ['up_proj']; it must be a mapping"),
    ({"alpha_pattern": {"(a+)+": 1}}, "alpha_pattern: '(a+)+' is too involved a pattern"),
    ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '(' is not a regular expression"),
]
WRONG_TENSORS = [
    (lambda t: {n: v for n, v in t.items() if n != B}, A, "has no counterpart: lora_B is missing"),
    (lambda t: t | {A: t[A].astype(np.int8)}, A, "is I8: a quantised adapter; F32, F16"),
    (lambda t: t | {A: t[A][:2].copy()}, A, "has rank 2, lora_B beside it rank 3"),
    (lambda t: t | {A: t[A][:2].copy(), B: t[B][:, :2].copy()}, A,
     "has rank 2, lora_B beside it rank 2, adapter_config.json says 3"),
    (lambda t: t | {A: t[A][:, :8].copy()}, A, "has the shape [3, 8]; model.layers.1.mlp.up_proj"),
    (lambda t: t | {B: t[B][:8].copy()}, B, "has the shape [8, 3]; model.layers.1.mlp.up_proj"),
    (lambda t: t | {A: t[A][0].copy()}, A, "has the shape [48]; factors are matrices"),
    (lambda t: {n.replace("layers.1", "layers.7"): v for n, v in t.items()},
     A.replace("layers.1", "layers.7"), "changes model.layers.7.mlp.up_proj, which "),
    (lambda t: t | {A.replace("lora_A", "lora_magnitude_vector"): t[A][0].copy()},
     A.replace("lora_A", "lora_magnitude_vector"), "is a magnitude of DoRA"),
    (lambda t: t | {A.replace("lora_A", "lora_A.bias"): t[A][0].copy()},
     A.replace("lora_A", "lora_A.bias"), "is not a part of it; LoRA has"),
    (lambda t: t | {"base_model.model.score.weight": t[A][0].copy()},
     "base_model.model.score.weight", "is not a change of a tensor that "),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), WRONG_CONFIGS)
def test_what_is_no_lora(tmp_path, base, values, message):
    adapter = make_adapter(tmp_path / "adapter", base, **values)
    where = f"{adapter / 'adapter_config.json'}: "
    with pytest.raises(CheckpointError, match=re.escape(where + message)):
        build_moe([base, adapter], tmp_path / "moe", MoeConfig(2))
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(("edit", "tensor", "message"), WRONG_TENSORS)
def test_wrong_tensors(tmp_path, base, edit, tensor, message):
    adapter = make_adapter(tmp_path / "adapter", base)
    change_tensors(adapter, edit)
    where = f"{adapter / 'adapter_model.safetensors'}: tensor {tensor!r} "
    with pytest.raises(CheckpointError, match=re.escape(where + message)):
        build_moe([base, adapter], tmp_path / "moe", MoeConfig(2))
    assert not (tmp_path / "moe").exists()


def test_all_problems_at_once(tmp_path, base):
    one = make_adapter(tmp_path / "one", base, bias="all", use_dora=True)
    two = make_adapter(tmp_path / "two", base)
    change_tensors(two, lambda t: t | {A: t[A][:2].copy(), B: t[B][:8].copy()})
    with pytest.raises(CheckpointError, match="4 problems") as raised:
        build_moe([base, one, two], tmp_path / "moe", MoeConfig(3))
    said = "\n".join(raised.value.problems)
    assert len(raised.value.problems) == 4
    for message in ("bias is 'all'", "use_dora", "has rank 2", "has the shape [8, 3]"):
        assert message in said


def test_what_is_no_ffn_is_refused(tmp_path, base):
    adapter = make_adapter(tmp_path / "adapter", base, modules=(*FFN, *QKVO))
    message = r"[qkvo]_proj\.lora_A\.weight' changes what is not an FFN, as do 7 others.* backbone="
    with pytest.raises(CheckpointError, match=message):
        build_moe([base, adapter], tmp_path / "moe", MoeConfig(2))


def test_adapters_for_another_base(tmp_path, base):
    other = make_model(tmp_path / "other", "llama", seed=1)
    adapter = make_adapter(tmp_path / "adapter", other)
    message = rf"adapter_config\.json: is an adapter for '{re.escape(str(other))}', not for "
    with pytest.raises(CheckpointError, match=message):
        build_moe([base, adapter], tmp_path / "moe", MoeConfig(2))
    with pytest.raises(CheckpointError, match=message):
        build_moe(ExpertSource(base, lora=adapter), tmp_path / "moe", MoeConfig(2))
    change(adapter, base_model_name_or_path="/models/other-name")
    with pytest.raises(CheckpointError, match=r"if that is the same model, write .*base\+"):
        build_moe([base, adapter], tmp_path / "moe", MoeConfig(2))
    with pytest.raises(CheckpointError, match=r"its base '/models/other-name' is not here; name"):
        build_moe(adapter, tmp_path / "moe", MoeConfig(2))
    for share in ("//server/share/base", r"\\server\share\base"):  # never looked at
        change(adapter, base_model_name_or_path=share)
        with pytest.raises(CheckpointError, match=r"is on a network share; name the base"):
            build_moe(adapter, tmp_path / "moe", MoeConfig(2))
        build_moe(
            ExpertSource(base, lora=adapter), tmp_path / "share", MoeConfig(2), overwrite=True
        )
    change(adapter, base_model_name_or_path="/models/Base")  # the same name elsewhere
    build_moe([base, adapter], tmp_path / "moe", MoeConfig(2))


def test_what_is_no_adapter(tmp_path, base):
    with pytest.raises(CheckpointError, match=r"is not a LoRA adapter, it has no adapter_con"):
        build_moe(ExpertSource(base, lora=base), tmp_path / "moe", MoeConfig(2))
    adapter = make_adapter(tmp_path / "adapter", base)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle, which is never"):
        build_moe(adapter, tmp_path / "moe", MoeConfig(2))
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 30)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: "):
        build_moe(adapter, tmp_path / "moe", MoeConfig(2))
    with pytest.raises(
        CheckpointError, match=r"nope: is not a folder with a model; there is no file"
    ):
        build_moe(f"{base}+nope", tmp_path / "moe", MoeConfig(2))
    with pytest.raises(TypeError, match="lora must be a path"):
        ExpertSource(base, lora=3)


@pytest.mark.parametrize(
    "expert",
    [
        "{source_model: base, lora: adapter, noise_scale: 0.1}",
        "{source_model: base+adapter, noise_scale: 0.1}",
        "{source_model: {model: base, lora: adapter}, noise_scale: 0.1}",
        "{source_model: {model: {path: base}, lora: {path: adapter}}, noise_scale: 0.1}",
        "{source_model: adapter, noise_scale: 0.1}",
    ],
)
@pytest.mark.parametrize("listed", ["experts", "models"])
def test_recipes(tmp_path, base, monkeypatch, expert, listed):
    pytest.importorskip("yaml")
    make_adapter(tmp_path / "adapter", base)
    monkeypatch.chdir(tmp_path)
    text = f"base_model: base\nrouters: balanced\n{listed}:\n- {expert}\n- {{source_model: base}}\n"
    (tmp_path / "recipe.yml").write_text(text)
    (source, plain) = read_recipe("recipe.yml").request.models
    assert source == ExpertSource(base, lora=tmp_path / "adapter", noise_scale=0.1)
    assert plain == ExpertSource(base)


def test_a_recipe_of_adapters_alone(tmp_path, base, monkeypatch):
    pytest.importorskip("yaml")
    for i in range(2):
        make_adapter(tmp_path / f"a{i}", base, seed=i)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yml").write_text("models: [a0, a1]\ngranularity: 2\n")
    build_recipe("recipe.yml", "moe")
    build_moe(["a0", "a1"], "other", granularity=2)
    assert_same_tensors(tmp_path / "moe", tmp_path / "other")
    (tmp_path / "recipe.yml").write_text("models: [{source_model: base+a0, lora: a1}]\n")
    with pytest.raises(RecipeError, match=r"models\[0\]: names an adapter twice"):
        read_recipe("recipe.yml")


@pytest.mark.parametrize("family", ["phi3", "glm", "exaone", "helium"])
def test_names_and_parts_of_other_families(tmp_path, family):
    """Modules are called as in the family's files, and some hold several projections."""
    tensors = write_dense(tmp_path / "base", family)
    base = tmp_path / "base"
    inner = [name for name, t in tensors.items() if t.ndim == 2 and re.search(r"\.\d", name)]
    modules = {name.split(".")[-2] for name in inner}
    adapter = make_adapter(tmp_path / "adapter", base, modules=modules)
    merged(base, adapter, tmp_path / "merged")
    for name, model in (("moe", adapter), ("other", tmp_path / "merged")):
        options = {"backbone": "mean", "granularity": 2, "base": base}
        build_moe(model, tmp_path / name, MoeConfig(4), **options)
    assert_same_tensors(tmp_path / "moe", tmp_path / "other")
    assert check_moe(tmp_path / "moe").passed
