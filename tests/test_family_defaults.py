"""Missing keys have the defaults of their MoE family; keys that it does not read are not read."""

from __future__ import annotations

import json

import pytest

for extra in ("safetensors", "ml_dtypes"):
    pytest.importorskip(extra)


from families import LINEAR, LLAMA3, LONGROPE, YARN, make_model
from folders import config_of, edit_config, rewrite
from moe_fast import MoeConfig, build_moe, check_moe, convert_moe
from moe_fast.checkpoint.check import Status
from moe_fast.families.registry import moe_families
from test_readers import FAMILIES, about, reasons_of

CONFIG = MoeConfig(num_experts=4)


@pytest.fixture(params=FAMILIES)
def moe(request, tmp_path):
    """An MoE of each family, without a manifest that knows its config.json."""
    source = FAMILIES[request.param]
    make_model(tmp_path / "dense", source, **{"head_dim": 12} if source == "qwen3" else {})
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, target=request.param)
    (tmp_path / "moe" / "moe_fast.json").unlink()
    return tmp_path / "moe"


def problems_of(moe) -> tuple[str, ...]:
    finding = check_moe(moe)["structure"]
    assert finding.status in (Status.PASSED, Status.FAILED)
    return finding.problems


def test_a_head_dim_that_is_missing(moe, tmp_path):
    """It is hidden_size / num_attention_heads, whatever dense Qwen3's is."""
    edit_config(moe, head_dim="absent")
    if moe_families()[config_of(moe)["model_type"]].defaults.get("head_dim") is not None:
        assert problems_of(moe)
        return
    assert not problems_of(moe)
    assert convert_moe(moe, tmp_path / "other").num_tensors


def test_key_value_heads_that_are_missing(moe):
    """Each family has a number of its own; the models here have 2."""
    edit_config(moe, num_key_value_heads="absent")
    family = moe_families()[config_of(moe)["model_type"]]
    number = family.defaults["num_key_value_heads"] or 4
    if number == 2 or family.blocks == "latent attention":
        assert not problems_of(moe)
        return
    (first, *_) = problems_of(moe)
    assert first.endswith(f"config.json makes it [{number * 12}, 48]")


STRAY = {
    "moe_intermediate_size": 7,
    "shared_expert_intermediate_size": 7,
    "shared_intermediate_size": 7,
    "n_shared_experts": 3,
    "n_routed_experts": 3,
    "moe_num_experts": 3,
    "num_experts": 3,
    "num_local_experts": 3,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 2,
    "attention_bias": True,
    "mlp_bias": True,
    "qkv_bias": False,
    "use_qk_norm": True,
}


# In the class of the configuration, and read by none of the model's; EXAONE-MoE's class reads
# it where `mlp_layer_types` is not there.
UNREAD = {
    "nemotron_h": ("n_shared_experts", "attention_bias"),
    "exaone_moe": ("first_k_dense_replace",),
}


@pytest.mark.parametrize("key", STRAY)
def test_a_key_that_the_family_does_not_read(moe, tmp_path, key):
    family = moe_families()[config_of(moe)["model_type"]]
    edit_config(moe, **{key: STRAY[key]})
    read = key in family.defaults or key in family.count_keys
    assert bool(problems_of(moe)) == (read and key not in UNREAD.get(family.name, ()))


def test_a_stray_number_of_experts_is_not_what_convert_writes(tmp_path):
    make_model(tmp_path / "dense", "qwen2")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    edit_config(tmp_path / "moe", num_local_experts=3)
    reason = about(reasons_of(tmp_path / "moe")["llama.cpp"], "looks for num_local_experts, which")
    assert reason == ["looks for num_local_experts, which is 3 for 4 experts"]
    assert not about(reasons_of(tmp_path / "moe")["transformers 5"], "num_local_experts")
    convert_moe(tmp_path / "moe", tmp_path / "other")
    assert config_of(tmp_path / "other")["num_experts"] == 4
    assert not about(reasons_of(tmp_path / "other")["llama.cpp"], "num_local_experts")


def test_a_qwen2_moe_without_biases(tmp_path):
    make_model(tmp_path / "dense", "llama")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, target="qwen2_moe")
    moe = tmp_path / "moe"
    rewrite(moe, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(".bias")})
    assert about(problems_of(moe), "q_proj.bias")
    edit_config(moe, qkv_bias=False)
    assert not problems_of(moe)


WHOLE = {
    "attention_dropout": 0,
    "initializer_range": 1,
    "rms_norm_eps": 1,
    "rope_theta": 10000,
}


def whole_numbers(value, path="") -> set[str]:
    """The keys, with those that they stand under, whose values are integers."""
    if isinstance(value, dict):
        return {n for key, item in value.items() for n in whole_numbers(item, f"{path}.{key}")}
    if isinstance(value, list):
        return {n for item in value for n in whole_numbers(item, path)}
    return {path.removeprefix(".")} if type(value) is int else set()


# The integers of a config.json, whatever has been given for the floats.
INTEGERS = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "num_experts", "num_local_experts"),
    *("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "shared_intermediate_size", "first_k_dense_replace"),
    *("moe_layer_freq", "decoder_sparse_step", "max_window_layers", "n_group", "topk_group"),
    *("num_nextn_predict_layers", "pretraining_tp", "original_max_position_embeddings"),
    *("sliding_window", "kv_lora_rank", "q_lora_rank", "qk_head_dim", "qk_nope_head_dim"),
    *("qk_rope_head_dim", "v_head_dim", "mamba_chunk_size", "mamba_d_conv", "mamba_d_head"),
    *("mamba_d_state", "mamba_expand", "mamba_n_groups", "mamba_n_heads", "moe_topk"),
    *("eod_token_id", "conv_L_cache", "num_dense_layers", "linear_conv_kernel_dim"),
    *("linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads"),
    *("linear_num_value_heads", "num_shared_experts", "prefix_dense_intermediate_size"),
    *("top_k_experts", "hidden_size_per_layer_input", "num_kv_shared_layers"),
    *("per_layer_config.2.head_dim", "vocab_size_per_layer_input", "conv_kernel", "n_groups"),
    *("moe_shared_expert_intermediate_size", "ssm_state_size", "num_logits_to_keep", "chunk_size"),
    *("mamba_head_dim", "mamba_num_heads", "expand", "hidden_dropout", "moe_num_shared_experts"),
    *("moe_k", "moe_num_experts"),
    *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "expert_hidden_dim"),
    "rope_scaling.original_max_position_embeddings",
    "rope_parameters.original_max_position_embeddings",
}


@pytest.mark.parametrize("target", FAMILIES)
@pytest.mark.parametrize("command", ["build", "convert"])
def test_floats_are_written_as_floats(tmp_path, target, command):
    changes = dict(WHOLE)
    if target.startswith("granite"):
        names = ("embedding", "attention", "residual")
        changes |= {f"{name}_multiplier": 1 for name in names} | {"logits_scaling": 2}
    make_model(tmp_path / "dense", FAMILIES[target], **changes)
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, target=target)
    if command == "convert":
        config = config_of(tmp_path / "moe")
        floats = {key: int(v) for key, v in config.items() if type(v) is float}
        edit_config(tmp_path / "moe", **floats | {"rms_norm_eps": 1})
        assert "rms_norm_eps" in whole_numbers(config_of(tmp_path / "moe"))
        convert_moe(tmp_path / "moe", tmp_path / "other")
    config = config_of(tmp_path / ("moe" if command == "build" else "other"))
    assert config["rms_norm_eps"] in (1, None)
    assert whole_numbers(config) <= INTEGERS


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3, YARN, LONGROPE])
def test_floats_of_ropes(tmp_path, rope):
    def whole(value):
        return [whole(v) for v in value] if isinstance(value, list) else int(value)

    rope = {key: value if key == "rope_type" else whole(value) for key, value in rope.items()}
    make_model(tmp_path / "dense", "llama", rope_scaling=rope, rope_theta=10000)
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    config = config_of(tmp_path / "moe")
    assert config["rope_parameters"]["rope_theta"] == 10000
    assert whole_numbers(config) <= INTEGERS
    assert check_moe(tmp_path / "moe").passed


@pytest.mark.parametrize(
    ("target", "key", "value"),
    [
        ("flex_olmo", "attention_dropout", 0),
        ("mixtral", "rms_norm_eps", 1),
        ("mixtral", "router_jitter_noise", 0),
        ("mixtral", "use_cache", "false"),
        ("mixtral", "num_key_value_heads", None),
        ("qwen3_moe", "norm_topk_prob", None),
        ("qwen2_moe", "mlp_only_layers", [0.5]),
        ("granitemoe", "tie_word_embeddings", 0),
        ("glm4_moe", "routed_scaling_factor", 1),
        ("mixtral", "num_experts_per_tok", True),
    ],
)
def test_a_value_of_a_type_that_transformers_5_refuses(tmp_path, target, key, value):
    make_model(tmp_path / "dense", FAMILIES[target])
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, target=target)
    before = reasons_of(tmp_path / "moe")
    assert before["transformers 5"] == ()
    edit_config(tmp_path / "moe", **{key: value})
    reasons = reasons_of(tmp_path / "moe")
    assert about(reasons["transformers 5"], f"for {key}, config.json has {value!r}")
    assert not about(reasons["transformers 4"], f"for {key}")


@pytest.mark.parametrize(
    ("target", "key", "value"),
    [
        ("mixtral", "attention_dropout", 0),
        ("qwen2_moe", "num_key_value_heads", None),
        ("granitemoe", "embedding_multiplier", 12),
        ("qwen2_moe", "mlp_only_layers", []),
        ("mixtral", "eos_token_id", [1, 2]),
        ("mixtral", "moe_intermediate_size", None),
    ],
)
def test_a_value_that_transformers_5_takes(tmp_path, target, key, value):
    make_model(tmp_path / "dense", FAMILIES[target])
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, target=target)
    edit_config(tmp_path / "moe", **{key: value})
    assert not about(reasons_of(tmp_path / "moe")["transformers 5"], key)


def test_every_key_that_a_family_reads_has_a_type():
    for family in moe_families().values():
        if "transformers 5" in family.rules.natively:
            assert set(family.defaults) <= set(family.key_types())


def test_what_is_no_configuration_of_the_family(tmp_path):
    make_model(tmp_path / "dense", "llama")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    config = config_of(tmp_path / "moe")
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config | {"hidden_size": None}))
    assert about(problems_of(tmp_path / "moe"), "hidden_size is None")
    edit_config(tmp_path / "moe", hidden_size="absent")
    assert about(problems_of(tmp_path / "moe"), "hidden_size is missing")
