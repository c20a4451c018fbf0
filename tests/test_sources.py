"""Dense families with names, an order or tensors of their own, as sources."""

from __future__ import annotations

import json

import numpy as np
import pytest

for extra in ("ml_dtypes", "safetensors"):
    pytest.importorskip(extra)

from ml_dtypes import bfloat16, float8_e4m3fn
from safetensors.numpy import load_file

from adapters import make_adapter
from command import run
from dense_families import FAMILIES, write_dense
from families import make_model
from folders import config_of, edit_config, rewrite
from moe_fast import CheckpointError, ExpertSource, MoeConfig, build_moe, check_moe, convert_moe
from moe_fast.families.choice import targets_of
from moe_fast.families.registry import dense_families, moe_families
from moe_fast.storage.pieces import Given, PairsToHalves

CONFIG = MoeConfig(num_experts=4, num_experts_per_tok=2)
# What "auto" makes of the model in the golden file.
TARGETS = {
    "cohere2": "cohere2_moe",
    "cwm": "mixtral",
    "ernie4_5": "mixtral",
    "exaone": "mixtral",
    "gemma": "granitemoe",
    "gemma4_text": "gemma4_text",
    "glm": "glm4_moe",
    "granite_swa": "granitemoe_swa",
    "granitemoehybrid": "granitemoehybrid",
    "helium": "mixtral",
    "hunyuan_v1_dense": "hunyuan_v1_moe",
    "hyperclovax": "granitemoe",
    "internlm3": "mixtral",
    "iquestcoder": "mixtral",
    "lfm2": "lfm2_moe",
    "ministral": "mixtral",
    "ministral3": "mixtral",
    "nemotron_h": "nemotron_h",
    "olmo3": "flex_olmo",
    "phi3": "mixtral",
    "qwen3_5_text": "qwen3_5_moe_text",
    "seed_oss": "qwen2_moe",
    "smollm3": "granitemoe_swa",
    "vaultgemma": "granitemoe",
    "youtu": "deepseek_v3",
}
# Those whose blocks one MoE family alone has.
TWINS = (
    *("cohere2", "granitemoehybrid", "hunyuan_v1_dense", "lfm2", "nemotron_h", "qwen3_5_text"),
    "youtu",
)


def halves(rows: np.ndarray, head_dim: int, rotated: int) -> np.ndarray:
    """Each head's rotated rows, the even ones before the odd ones."""
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    parts = [heads[:, 0:rotated:2], heads[:, 1:rotated:2], heads[:, rotated:]]
    return np.concatenate(parts, axis=1).reshape(rows.shape)


def built(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_becomes_of_a_model_by_default_and_that_it_is_checked(tmp_path, family):
    write_dense(tmp_path / "dense", family)
    report = build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    assert report.target == TARGETS[family]
    checked = check_moe(tmp_path / "moe")
    assert [finding for finding in checked.findings if finding.status == "failed"] == []
    loads = [reader.name for reader in checked.readers if reader.loads]
    assert "transformers 5" in loads
    convert_moe(tmp_path / "moe", tmp_path / "half", dtype="bfloat16")
    failed = {f.check for f in check_moe(tmp_path / "half").findings if f.status == "failed"}
    assert not failed


def test_every_family_is_in_the_golden_file():
    llama_like = {"llama", "mistral", "qwen2", "qwen3", "olmo2", "granite"}
    assert dense_families().keys() - llama_like == FAMILIES.keys() == TARGETS.keys()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("damage", ["missing", "misshapen", "more"])
def test_a_tensor_that_is_wrong_has_the_name_that_it_has_in_the_file(tmp_path, family, damage):
    tensors = write_dense(tmp_path / "dense", family)
    ffn = ("mlp", "feed_forward", "mixer.up_proj")
    name = next(n for n in tensors if ".1." in n and any(part in n for part in ffn))
    array = tensors.pop(name)
    if damage == "misshapen":
        tensors[name] = array[:-1].copy()
    elif damage == "more":
        tensors |= {name: array, f"{name}.more": array.copy()}
        name = f"{name}.more"
    rewrite(tmp_path / "dense", lambda _: tensors)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")) as caught:
        build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    assert len(caught.value.problems) == 1
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(("family", "rotated"), [("helium", 12), ("ernie4_5", 12), ("glm", 6)])
def test_rows_of_queries_and_keys_are_put_in_the_other_order(tmp_path, family, rotated):
    dense = write_dense(tmp_path / "dense", family)
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    moe = built(tmp_path / "moe")
    prefix = "model.layers.1.self_attn."
    names = [name for name in moe if name.startswith(prefix)]
    assert len(names) == (7 if family == "glm" else 4)
    for name in names:
        expected = dense[name]
        if name.startswith((f"{prefix}q_proj", f"{prefix}k_proj")):
            expected = halves(expected, 12, rotated)
            assert not np.array_equal(expected, dense[name])
        assert np.array_equal(moe[name], expected), name


@pytest.mark.parametrize("family", ["phi3", "glm"])
def test_tensors_that_hold_several_are_split(tmp_path, family):
    dense = write_dense(tmp_path / "dense", family)
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    moe = built(tmp_path / "moe")
    gate, up = np.split(dense["model.layers.1.mlp.gate_up_proj.weight"], 2)
    block = "block_sparse_moe" if family == "phi3" else "mlp"
    names = ("w1", "w3") if family == "phi3" else ("gate_proj", "up_proj")
    for expert in range(4):
        for name, expected in zip(names, (gate, up), strict=True):
            found = moe[f"model.layers.1.{block}.experts.{expert}.{name}.weight"]
            assert np.array_equal(found, expected)
    if family == "phi3":
        whole = dense["model.layers.1.self_attn.qkv_proj.weight"]
        for name, expected in zip("qkv", np.split(whole, (48, 72)), strict=True):
            found = moe[f"model.layers.1.self_attn.{name}_proj.weight"]
            assert np.array_equal(found, expected)


def test_names_of_exaone(tmp_path):
    dense = write_dense(tmp_path / "dense", "exaone")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    moe = built(tmp_path / "moe")
    for theirs, ours in {
        "wte": "embed_tokens",
        "ln_f": "norm",
        "h.2.attn.attention.out_proj": "layers.2.self_attn.o_proj",
        "h.2.attn.attention.k_proj": "layers.2.self_attn.k_proj",
        "h.2.ln_1": "layers.2.input_layernorm",
        "h.2.ln_2": "layers.2.post_attention_layernorm",
        "h.2.mlp.c_fc_0": "layers.2.block_sparse_moe.experts.3.w1",
        "h.2.mlp.c_fc_1": "layers.2.block_sparse_moe.experts.3.w3",
        "h.2.mlp.c_proj": "layers.2.block_sparse_moe.experts.3.w2",
    }.items():
        expected = dense[f"transformer.{theirs}.weight"]
        assert np.array_equal(moe[f"model.{ours}.weight"], expected)


def test_keys_by_the_names_that_the_hub_has(tmp_path):
    write_dense(tmp_path / "dense", "exaone")
    config = config_of(tmp_path / "dense")
    edit_config(
        tmp_path / "dense",
        num_layers=config["num_hidden_layers"],
        layer_norm_epsilon=config["rms_norm_eps"],
        activation_function="silu",
        **dict.fromkeys(("num_hidden_layers", "rms_norm_eps", "hidden_act"), "absent"),
    )
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    written = config_of(tmp_path / "moe")
    for key in ("num_hidden_layers", "rms_norm_eps", "hidden_act"):
        assert written[key] == config[key]


def test_sinks_that_take_nothing_and_layers_without_rotary_embedding(tmp_path):
    write_dense(tmp_path / "dense", "smollm3")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    sinks = built(tmp_path / "moe")["model.layers.1.self_attn.sinks"]
    assert sinks.tolist() == [-1e4] * 4
    assert config_of(tmp_path / "moe")["layer_rope_theta"] == [2e6, 0, 2e6]
    report = build_moe(tmp_path / "dense", tmp_path / "dry", CONFIG, dry_run=True)
    (reason,) = report.rejected_targets["mixtral"]
    assert reason.endswith("layer 1 without rotary embedding; Mixtral has one in all")


def test_the_mean_of_models_in_different_orders(tmp_path):
    """Helium's rows are put in Llama's order before they are averaged."""
    helium = write_dense(tmp_path / "helium", "helium")
    sizes = {"num_hidden_layers": 3, "tie_word_embeddings": False, "rope_theta": 1e5}
    make_model(tmp_path / "llama", "llama", **sizes)
    llama = built(tmp_path / "llama")
    models = [tmp_path / "llama", tmp_path / "helium"]
    build_moe(models, tmp_path / "moe", CONFIG, backbone="mean")
    name = "model.layers.1.self_attn.k_proj.weight"
    expected = (llama[name] + halves(helium[name], 12, 12)) / np.float32(2)
    assert np.array_equal(built(tmp_path / "moe")[name], expected)
    assert check_moe(tmp_path / "moe").passed


def test_layers_of_nemotron_h_without_an_ffn_stay_as_they_are(tmp_path):
    dense = write_dense(tmp_path / "dense", "nemotron_h")
    report = build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    assert report.dense_layers == report.layers_without_ffn == (0, 2)
    moe, config = built(tmp_path / "moe"), config_of(tmp_path / "moe")
    kinds = ["linear_attention", "moe", "full_attention", "moe"]
    assert config["layers_block_type"] == kinds
    for name, array in dense.items():
        if ".mixer.up_proj" in name or ".mixer.down_proj" in name:
            for expert in range(4):
                found = moe[name.replace(".mixer.", f".mixer.experts.{expert}.")]
                assert np.array_equal(found, array)
        else:
            assert np.array_equal(moe[name], array)
    assert not moe["backbone.layers.1.mixer.shared_experts.down_proj.weight"].any()
    build_moe(tmp_path / "dense", tmp_path / "fewer", CONFIG, dense_layers=(1,))
    kinds = ["linear_attention", "mlp", "full_attention", "moe"]
    assert config_of(tmp_path / "fewer")["layers_block_type"] == kinds
    assert check_moe(tmp_path / "fewer").passed


def test_nemotron_h_by_the_letters_of_older_files(tmp_path):
    write_dense(tmp_path / "dense", "nemotron_h")
    edit_config(tmp_path / "dense", layers_block_type="absent", hybrid_override_pattern="M-*-")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, granularity=2)
    config = config_of(tmp_path / "moe")
    assert "hybrid_override_pattern" not in config
    assert config["layers_block_type"][1] == "moe"
    assert config["routed_scaling_factor"] == 2.0
    assert check_moe(tmp_path / "moe").passed


def test_norms_of_gemma_get_what_they_add_to_themselves(tmp_path):
    dense = write_dense(tmp_path / "dense", "gemma", dtype=bfloat16)
    report = build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    assert "norms are weights plus 1, in float32" in report.warnings[0]
    moe = built(tmp_path / "moe")
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert moe[name].dtype == np.float32
        assert np.array_equal(moe[name], dense[name].astype(np.float32) + np.float32(1))
    config = config_of(tmp_path / "moe")
    assert config["embedding_multiplier"] == pytest.approx(48**0.5)
    assert config["hidden_act"] == "gelu_pytorch_tanh"
    reasons = {each.name: each.reasons for each in check_moe(tmp_path / "moe").readers}
    assert any("has silu alone in a granitemoe" in reason for reason in reasons["vLLM"])


def test_the_context_of_ministral_3_ends_where_its_queries_grow(tmp_path):
    write_dense(tmp_path / "dense", "ministral3")
    report = build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    assert "from position 48 on, queries are multiplied" in report.warnings[0]
    config = config_of(tmp_path / "moe")
    assert config["max_position_embeddings"] == 48
    assert "llama_4_scaling_beta" not in config["rope_parameters"]
    rope = config_of(tmp_path / "dense")["rope_parameters"] | {"llama_4_scaling_beta": 0.0}
    edit_config(tmp_path / "dense", rope_parameters=rope)
    assert build_moe(tmp_path / "dense", tmp_path / "same", CONFIG).warnings == ()
    assert config_of(tmp_path / "same")["max_position_embeddings"] == 64


@pytest.mark.parametrize("family", ["llama", "ernie4_5"])
def test_queries_and_keys_of_ernie_turn_neighbours(tmp_path, family):
    if family == "llama":
        make_model(tmp_path / "dense", "llama")
    else:
        write_dense(tmp_path / "dense", family)
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, target="ernie4_5_moe")
    dense, moe = built(tmp_path / "dense"), built(tmp_path / "moe")
    for name in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{name}.weight"
        turned = family == "llama" and "v_proj" not in name
        found = halves(moe[name], 12, 12) if turned else moe[name]
        assert np.array_equal(found, dense[name])
        assert np.array_equal(moe[name], dense[name]) != turned


REFUSALS = [
    (
        "hyperclovax",
        {"use_post_norm": True},
        "use_post_norm is true: no MoE has norms before and after",
    ),
    ("vaultgemma", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0; no MoE"),
    ("vaultgemma", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; it must be"),
    ("nemotron_h", {"layers_block_type": "M-"}, "layers_block_type is 'M-'; it must list a kind"),
    ("nemotron_h", {"layers_block_type": ["mamba", "x"]}, "it must list 2 of full_attention, "),
    ("nemotron_h", {"layers_block_type": ["mamba", "attention"]}, "layers_block_type has no mlp"),
    ("nemotron_h", {"layers_block_type": ["mamba", "moe"]}, "is a Mixture of Experts already"),
    ("nemotron_h", {"mlp_bias": True}, "mlp_bias|is missing"),
    ("smollm3", {"no_rope_layers": [1, 2, 0]}, "no_rope_layers is .*; it must list 3 of 0 and 1"),
    ("smollm3", {"no_rope_layers": [1]}, "it must list 3 of 0 and 1"),
    (
        "smollm3",
        {"no_rope_layers": None, "no_rope_layer_interval": 0},
        "no_rope_layer_interval is 0; it must be an integer of at least 1",
    ),
    ("granite_swa", {"layer_rope_theta": [1e4]}, "layer_rope_theta is .* list 3 numbers"),
    ("granite_swa", {"layer_rope_theta": [1e4, -1, 0]}, "layer_rope_theta is .* list 3 numbers"),
    ("glm", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0}}, "above 0"),
    ("glm", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "3 of .* 12"),
    ("seed_oss", {"attention_out_bias": 1}, "attention_out_bias is 1; it must be true or false"),
    (
        "olmo3",
        {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": 1.0}}},
        "FlexOlmo, which OLMo 3 becomes, has one rotary embedding for all layers",
    ),
]


@pytest.mark.parametrize(("family", "changes", "match"), REFUSALS)
def test_configurations_that_do_not_hold(tmp_path, family, changes, match):
    write_dense(tmp_path / "dense", family, **changes)
    if family == "olmo3":
        kinds = ["full_attention", "sliding_attention", "sliding_attention"]
        edit_config(tmp_path / "dense", layer_types=kinds)
    with pytest.raises(CheckpointError, match=match):
        build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)


@pytest.mark.parametrize("rotated", [4, 8, 12])
@pytest.mark.parametrize("columns", [1, 7, 100_000])
def test_pairs_to_halves(rotated, columns):
    rows = np.random.default_rng(0).integers(256, size=(36, columns), dtype=np.uint8)
    piece = PairsToHalves(Given(rows.tobytes()), columns, 12, rotated)
    assert piece.nbytes == rows.nbytes
    chunks = [bytes(chunk) for chunk in piece.chunks()]
    assert b"".join(chunks) == halves(rows, 12, rotated).tobytes()
    assert max(map(len, chunks)) <= 12 * columns


def wrap(folder, model_type, prefix="model.language_model.", head="lm_head.weight"):
    """Make a model the language model of a multimodal one; return what else that has."""
    text = config_of(folder)
    rest = {
        "model.visual.patch.weight": np.ones((3, 5), np.float32),
        "mtp.norm.weight": np.ones(4, np.float32),
    }

    def renamed(tensors):
        named = {f"{prefix}{name.removeprefix('model.')}": t for name, t in tensors.items()}
        if f"{prefix}lm_head.weight" in named:
            named[head] = named.pop(f"{prefix}lm_head.weight")
        return named | rest

    rewrite(folder, renamed)
    outer = {"model_type": model_type, "architectures": ["X"], "vision_config": {"depth": 1}}
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    text["tie_word_embeddings"] = not tied["tie_word_embeddings"]  # the whole's counts
    (folder / "config.json").write_text(json.dumps({**outer, **tied, "text_config": text}))
    return rest


@pytest.mark.parametrize(
    ("family", "outer", "moe", "architecture"),
    [
        ("qwen3_5_text", "qwen3_5", "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
        ("gemma4_text", "gemma4", "gemma4", "Gemma4ForConditionalGeneration"),
    ],
)
def test_what_surrounds_a_language_model_travels(tmp_path, family, outer, moe, architecture):
    write_dense(tmp_path / "dense", family)
    build_moe(tmp_path / "dense", tmp_path / "alone", CONFIG)
    alone, text = built(tmp_path / "alone"), config_of(tmp_path / "alone")
    rest = wrap(tmp_path / "dense", outer)
    report = build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    found, config = built(tmp_path / "moe"), config_of(tmp_path / "moe")
    expected = {
        name.replace("model.", "model.language_model.", 1): array for name, array in alone.items()
    }
    checked = check_moe(tmp_path / "moe")
    assert {each.name: each.loads for each in checked.readers} == {
        "transformers 4": False,
        "transformers 5": True,
        "vLLM": False,
        "llama.cpp": False,
    }
    assert checked.readers[2].reasons == (f"has been asked for no {moe} yet, it may load it",)
    assert "of the language model are those of" in checked["structure"].summary
    if family == "qwen3_5_text":
        (warning,) = report.warnings
        assert "1 tensor of layers that predict ahead, mtp.norm.weight first" in warning
        del rest["mtp.norm.weight"]
    assert found.keys() == (expected | rest).keys()
    assert all(np.array_equal(found[name], array) for name, array in (expected | rest).items())
    assert config["model_type"] == moe
    assert config["architectures"] == [architecture]
    assert config["vision_config"] == {"depth": 1}
    assert config["text_config"] == {k: v for k, v in text.items() if k != "architectures"}
    failed = [f for f in check_moe(tmp_path / "moe").findings if f.status == "failed"]
    assert failed == []


def test_a_tensor_that_is_missing_inside_a_multimodal_model_is_found(tmp_path):
    write_dense(tmp_path / "dense", "qwen3_5_text")
    wrap(tmp_path / "dense", "qwen3_5")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    name = "model.language_model.layers.0.mlp.shared_expert.up_proj.weight"
    rewrite(tmp_path / "moe", lambda tensors: {n: t for n, t in tensors.items() if n != name})
    found = check_moe(tmp_path / "moe")["structure"]
    assert found.status == "failed"
    assert "layers.0.mlp.shared_expert.up_proj.weight' is missing" in str(found.problems[0])


PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@pytest.mark.parametrize("outer", ["qwen3_5", "mistral3"])
def test_what_reads_pictures_travels_with_what_sees_them(tmp_path, outer):
    if outer == "qwen3_5":
        write_dense(tmp_path / "dense", "qwen3_5_text")
    else:
        make_model(tmp_path / "dense", "mistral")
    wrap(tmp_path / "dense", outer)
    for name in (*PROCESSORS, "chat_template.jinja"):
        (tmp_path / "dense" / name).write_text("{}")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    there = {name for name in PROCESSORS if (tmp_path / "moe" / name).is_file()}
    assert there == (set(PROCESSORS) if outer == "qwen3_5" else set())
    assert (tmp_path / "moe" / "chat_template.jinja").is_file()
    assert check_moe(tmp_path / "moe").passed


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    ],
)
def test_what_has_no_place_is_left_out_with_a_word(tmp_path, prefix, head):
    make_model(tmp_path / "dense", "mistral")
    build_moe(tmp_path / "dense", tmp_path / "alone", CONFIG)
    wrap(tmp_path / "dense", "mistral3", prefix, head)
    report = build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    assert report.target == "mixtral"
    (warning,) = report.warnings
    assert "mistral3 is more than its language model; Mixtral has no place for the rest" in warning
    assert "2 tensors are left out" in warning
    assert config_of(tmp_path / "moe") == config_of(tmp_path / "alone")
    assert built(tmp_path / "moe").keys() == built(tmp_path / "alone").keys()
    assert check_moe(tmp_path / "moe").passed


def test_a_language_model_that_is_not_found(tmp_path):
    make_model(tmp_path / "dense", "mistral")
    wrap(tmp_path / "dense", "mistral3", "somewhere.")
    with pytest.raises(CheckpointError, match=r"language_model\.embed_tokens\.weight, of"):
        build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)


def test_layers_that_predict_ahead_are_left_out_with_a_word(tmp_path):
    write_dense(tmp_path / "dense", "qwen3_5_text")
    rewrite(tmp_path / "dense", lambda t: t | {"mtp.norm.weight": np.ones(4, np.float32)})
    report = build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    assert "1 tensor of layers that predict ahead" in report.warnings[0]
    assert check_moe(tmp_path / "moe").passed


BLOCK = (16, 16)


def quantise(folder, *, method="fp8", block=BLOCK, only="layers"):
    """Put all matrices of the layers in FP8; return what they are then in float32."""
    meant = {}

    def change(tensors):
        found = {}
        generator = np.random.default_rng(0)
        for name, array in tensors.items():
            found[name] = meant[name] = array
            if array.ndim == 2 and "layers" in name and only in name:
                scales = generator.uniform(0.5, 2, [-(-n // 16) for n in array.shape])
                scales = scales.astype(np.float32)
                found[name] = array.astype(float8_e4m3fn)
                found[f"{name}_scale_inv"] = scales
                wide = scales.repeat(16, 0)[: array.shape[0]].repeat(16, 1)[:, : array.shape[1]]
                meant[name] = (found[name].astype(np.float64) * wide).astype(np.float32)
        return found

    rewrite(folder, change)
    edit_config(folder, quantization_config={"quant_method": method, "weight_block_size": block})
    return meant


@pytest.mark.parametrize("family", ["llama", "helium", "lfm2", "gemma", "nemotron_h"])
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"granularity": 2}], ids=str)
def test_weights_in_fp8_are_dequantised(tmp_path, family, options):
    make_model(tmp_path / "dense", family)
    make_model(tmp_path / "plain", family)
    meant = quantise(tmp_path / "dense")
    rewrite(tmp_path / "plain", lambda _: meant)
    config = MoeConfig(4, 2)
    for name in ("dense", "plain"):
        build_moe(tmp_path / name, tmp_path / f"moe-{name}", config, **options)
    found, expected = built(tmp_path / "moe-dense"), built(tmp_path / "moe-plain")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name
    assert check_moe(tmp_path / "moe-dense").passed
    assert "quantization_config" not in config_of(tmp_path / "moe-dense")
    assert (options == {"dtype": "bfloat16"}) == (array.dtype == bfloat16)


def test_noise_is_added_to_what_fp8_means(tmp_path):
    make_model(tmp_path / "dense", "llama")
    make_model(tmp_path / "plain", "llama")
    meant = quantise(tmp_path / "dense")
    rewrite(tmp_path / "plain", lambda _: meant)
    for name in ("dense", "plain"):
        build_moe(ExpertSource(tmp_path / name, noise_scale=0.1), tmp_path / f"moe-{name}", CONFIG)
    found, expected = built(tmp_path / "moe-dense"), built(tmp_path / "moe-plain")
    assert all(np.array_equal(found[name], array) for name, array in expected.items())


def test_an_adapter_of_a_model_in_a_model(tmp_path):
    write_dense(tmp_path / "dense", "qwen3_5_text")
    plain = make_adapter(tmp_path / "plain", tmp_path / "dense")
    build_moe(plain, tmp_path / "alone", CONFIG)
    wrap(tmp_path / "dense", "qwen3_5")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "dense")
    assert "model.language_model." in next(iter(load_file(adapter / "adapter_model.safetensors")))
    build_moe(adapter, tmp_path / "moe", CONFIG)
    alone, found = built(tmp_path / "alone"), built(tmp_path / "moe")
    changed = [name for name in alone if ".experts." in name]
    assert changed
    for name in changed:
        inner = name.replace("model.", "model.language_model.", 1)
        assert np.array_equal(found[inner], alone[name]), name


def test_what_shares_a_tensor_in_fp8_is_dequantised_where_blocks_end_with_it(tmp_path):
    make_model(tmp_path / "dense", "phi3")
    make_model(tmp_path / "plain", "phi3")
    meant = quantise(tmp_path / "dense", only="gate_up")
    rewrite(tmp_path / "plain", lambda _: meant)
    for name in ("dense", "plain"):
        build_moe(tmp_path / name, tmp_path / f"moe-{name}", CONFIG)
    found, expected = built(tmp_path / "moe-dense"), built(tmp_path / "moe-plain")
    assert all(np.array_equal(found[name], array) for name, array in expected.items())
    make_model(tmp_path / "all", "phi3")
    quantise(tmp_path / "all")
    with pytest.raises(CheckpointError, match=r"v_proj\.weight begins in the middle of a block"):
        build_moe(tmp_path / "all", tmp_path / "moe", CONFIG)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "awq"}, "quantization_config: 'awq' cannot be dequantised; 'fp8' with scales"),
        ({"method": "fp8", "block": None}, "'fp8' without weight_block_size cannot be"),
        ({"block": [8, 16]}, r"scale_inv' is F32 of shape .* scales of blocks of \[8, 16\] are"),
    ],
)
def test_other_quantised_models_are_refused_by_name(tmp_path, changes, match):
    make_model(tmp_path / "dense", "llama")
    quantise(tmp_path / "dense", **changes)
    with pytest.raises(CheckpointError, match=match):
        build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("gemma2", "caps logits"), ("exaone4", "normalises each head"), ("olmo", "no weights")],
)
def test_what_fits_nothing_says_why(tmp_path, model_type, why):
    make_model(tmp_path / "dense", "llama")
    edit_config(tmp_path / "dense", model_type=model_type)
    with pytest.raises(CheckpointError, match=f"{model_type}' fits no MoE: .*{why}"):
        build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)


def test_the_command_lists_what_becomes_what():
    done = run("families", "--json")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert listed["becomes"].keys() == dense_families().keys()
    assert listed["readers"].keys() == moe_families().keys()
    for family, target in TARGETS.items():
        assert target in listed["becomes"][family]
    qwen3 = ["qwen3_moe", "glm4_moe", "dots1", "hy_v3", "mellum", "exaone_moe"]
    assert listed["becomes"]["qwen3"] == qwen3
    assert listed["becomes"]["olmo2"] == ["flex_olmo"]
    assert not listed["fit_nothing"].keys() & listed["becomes"].keys()
    text = run("families").stdout
    assert "mixtral" in text
    assert "gemma2" in text


def test_what_is_said_to_fit_does_and_the_rest_does_not(tmp_path):
    """By the models in the golden file, which have nothing special."""
    for family in FAMILIES:
        write_dense(tmp_path / family, family)
        report = build_moe(tmp_path / family, tmp_path / "moe", CONFIG, dry_run=True)
        listed = {target.name for target in targets_of(dense_families()[family])}
        fitting = moe_families().keys() - report.rejected_targets.keys()
        assert fitting <= listed, family


@pytest.mark.parametrize("before", ["", "module."])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_that_training_left(tmp_path, family, before):
    """As `AutoModel` saves them, without a head, or as DDP does."""
    write_dense(tmp_path / "dense", family, tie_word_embeddings=True)
    build_moe(tmp_path / "dense", tmp_path / "expected", CONFIG)

    def renamed(tensors):
        stem = {"exaone": "transformer.", "nemotron_h": "backbone."}.get(family, "model.")
        return {
            f"{before}{name.removeprefix('' if before else stem)}": t for name, t in tensors.items()
        }

    rewrite(tmp_path / "dense", renamed)
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    found, expected = built(tmp_path / "moe"), built(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["granitemoehybrid", "gemma4_text"])
def test_what_has_experts_already(tmp_path, family):
    write_dense(tmp_path / "dense", family)
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    with pytest.raises(CheckpointError, match=f"{family}.* is a Mixture of Experts already"):
        build_moe(tmp_path / "moe", tmp_path / "again", CONFIG)


STRANGE = (None, True, -1, 0, 1.5, "x", [], [1], {}, {"0": []}, 10**30, ["x", "x", "x"])


@pytest.mark.parametrize("family", [*TWINS, "gemma4_text", "phi3", "smollm3", "olmo3"])
def test_strange_values_of_any_key_are_refused_or_make_a_model(tmp_path, family):
    """And never end in another error."""
    write_dense(tmp_path / "dense", family)
    config = config_of(tmp_path / "dense")
    outcomes = set()
    for key in {*config, *dense_families()[family].defaults} - {"model_type"}:
        for value in STRANGE:
            (tmp_path / "dense" / "config.json").write_text(json.dumps(config | {key: value}))
            try:
                build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, dry_run=True)
            except CheckpointError:
                outcomes.add("refused")
            else:
                outcomes.add("made")
    assert outcomes == {"refused", "made"}


def test_the_command_says_which_layers_have_no_ffn(tmp_path):
    pytest.importorskip("typer")
    write_dense(tmp_path / "dense", "nemotron_h")
    for options, said in ((), "4, without FFN: 0, 2"), (("--dense-layers", "1"), "4, dense: 1, w"):
        output = tmp_path / f"moe{len(options)}"
        done = run("build", tmp_path / "dense", "-o", output, *options)
        assert done.returncode == 0, done.stderr
        assert f" {said}" in done.stdout
