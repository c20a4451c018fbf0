"""What readers make of a checkpoint otherwise than config.json says: warned of, not loading."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

for extra in ("safetensors", "ml_dtypes"):
    pytest.importorskip(extra)

from ml_dtypes import bfloat16

from families import LINEAR, LLAMA3, make_model
from folders import edit_config, edit_json, rewrite
from moe_fast import MoeConfig, build_moe, check_moe, convert_moe
from moe_fast.demo import make_dense_model
from moe_fast.families.readers import Contents, find_readers
from moe_fast.families.registry import moe_families
from moe_fast.models.readers import numbers_from

CONFIG = MoeConfig(num_experts=4)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FAMILIES = {
    "mixtral": "llama",
    "qwen3_moe": "qwen3",
    "qwen2_moe": "qwen2",
    "granitemoe": "granite",
    "granitemoeshared": "granite",
    "granitemoe_swa": "granite",
    "flex_olmo": "olmo2",
    "glm4_moe": "llama",
    "deepseek": "llama",
    "cohere2_moe": "cohere2",
    "deepseek_v3": "youtu",
    "gemma4_text": "gemma4_text",
    "granitemoehybrid": "granitemoehybrid",
    "hunyuan_v1_moe": "hunyuan_v1_dense",
    "lfm2_moe": "lfm2",
    "qwen3_5_moe_text": "qwen3_5_text",
    "nemotron_h": "nemotron_h",
    "ernie4_5_moe": "ernie4_5",
    "dots1": "qwen3",
    "hy_v3": "qwen3",
    "mellum": "qwen3",
    "exaone_moe": "qwen3",
    "solar_open": "llama",
    "glm4_moe_lite": "youtu",
}


def reasons_of(moe: Path) -> dict[str, tuple[str, ...]]:
    """Why each reader does not load it; nothing for those that do."""
    return {reader.name: reader.reasons for reader in check_moe(moe).readers}


def asked_readers(target: str) -> set[str]:
    """The readers that know the family."""
    return set(moe_families()[target].rules.natively)


def about(texts: tuple[str, ...], word: str) -> list[str]:
    return [text for text in texts if word in text]


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    make_dense_model(tmp_path / "dense", seed=0)
    return tmp_path / "dense"


def store_head(folder: Path, factor: float) -> None:
    """Store the embedding times `factor` as the head."""

    def changed(tensors):
        embedding = "backbone.embeddings.weight" if EMBEDDING not in tensors else EMBEDDING
        return tensors | {HEAD: tensors[embedding] * np.float32(factor)}

    rewrite(folder, changed)


@pytest.mark.parametrize("target", FAMILIES)
def test_a_stored_head_of_a_tied_model(tmp_path, target):
    make_model(tmp_path / "dense", FAMILIES[target], tie_word_embeddings=True)
    store_head(tmp_path / "dense", -1)
    report = build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, target=target)
    (warning,) = about(report.warnings, HEAD)
    assert warning.startswith(f"{tmp_path / 'dense' / 'config.json'}: tie_word_embeddings is true")
    converted = convert_moe(tmp_path / "moe", tmp_path / "other")
    assert about(converted.warnings, HEAD)
    for folder in ("moe", "other"):
        reasons = reasons_of(tmp_path / folder)
        taking = [reader for reader in reasons if about(reasons[reader], "takes the stored head")]
        asked = asked_readers(target)
        assert taking == [r for r in ("transformers 5", "vLLM", "llama.cpp") if r in asked]
    assert [
        reader.name for reader in converted.readers if about(reader.reasons, "stored head")
    ] == taking


@pytest.mark.parametrize(("tied", "factor"), [(True, 1), (False, -1), (False, 1)])
def test_a_head_that_every_reader_takes_alike(dense, tmp_path, tied, factor):
    edit_config(dense, tie_word_embeddings=tied)
    store_head(dense, factor)
    report = build_moe(dense, tmp_path / "moe", CONFIG)
    assert not report.warnings
    assert not any(about(reasons, "head") for reasons in reasons_of(tmp_path / "moe").values())


def test_a_head_that_rounding_makes_the_embedding(dense, tmp_path):
    rewrite(dense, lambda t: t | {HEAD: t[EMBEDDING].astype(bfloat16).astype(np.float32)})
    assert about(build_moe(dense, tmp_path / "f32", CONFIG).warnings, HEAD)
    assert not build_moe(dense, tmp_path / "bf16", CONFIG, dtype="bfloat16").warnings


def test_a_head_is_read_no_further_than_it_differs(dense, tmp_path):
    """And nothing is read at all if no head is stored, or the model is not tied."""
    tensors = {}
    rewrite(dense, lambda found: tensors.update(found) or found)
    report = build_moe(dense, tmp_path / "moe", CONFIG, dry_run=True)
    assert HEAD not in tensors
    assert not report.warnings


@pytest.mark.parametrize("target", [name for name in FAMILIES if name != "deepseek"])
@pytest.mark.parametrize(("pad", "fits"), [(96, False), (-97, False), (95, True), (-96, True)])
def test_a_pad_token_beyond_the_vocabulary(tmp_path, target, pad, fits):
    make_model(tmp_path / "dense", FAMILIES[target], pad_token_id=pad)
    fits = fits or not moe_families()[target].pads
    report = build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, target=target)
    converted = convert_moe(tmp_path / "moe", tmp_path / "other")
    for warnings in (report.warnings, converted.warnings):
        assert len(about(warnings, f"pad_token_id is {pad}, the embedding has 96 rows")) == (
            not fits
        )
    for folder in ("moe", "other"):
        reasons = reasons_of(tmp_path / folder)
        for reader in {"transformers 4", "transformers 5"} & asked_readers(target):
            assert len(about(reasons[reader], "pad_token_id")) == (not fits)


def test_a_pad_token_that_is_the_familys_default(tmp_path):
    make_model(tmp_path / "dense", "olmo2")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    assert not about(reasons_of(tmp_path / "moe")["transformers 5"], "pad_token_id")
    edit_config(tmp_path / "moe", pad_token_id="absent")
    assert about(reasons_of(tmp_path / "moe")["transformers 5"], "pad_token_id is 100277")


def add_token(folder: Path, token: int, place: str) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    if place == "added":
        tokenizer["added_tokens"].append({"id": token, "content": "<extra>", "special": True})
    elif place == "vocab":
        tokenizer["model"]["vocab"]["<extra>"] = token
    elif place == "unigram":
        tokenizer["model"]["vocab"] = [[str(n), 0.0] for n in range(token + 1)]
    elif place == "configuration":
        added = {str(token): {"content": "<extra>"}}
        edit_json(folder / "tokenizer_config.json", added_tokens_decoder=added)
    else:
        (folder / place).write_text(json.dumps({"<extra>": token}))
    file.write_text(json.dumps(tokenizer))


PLACES = ["added", "vocab", "unigram", "configuration", "added_tokens.json", "vocab.json"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("more", [0, 1])
def test_tokens_beyond_the_embedding(dense, tmp_path, place, more):
    add_token(dense, 255 + more, place)
    report = build_moe(dense, tmp_path / "moe", CONFIG)
    converted = convert_moe(tmp_path / "moe", tmp_path / "fused", layout="fused")
    text = "the tokenizer has tokens up to 256, the embedding has 256 rows"
    assert len(about(report.warnings, text)) == len(about(converted.warnings, text)) == more
    for folder in ("moe", "fused"):
        reasons = reasons_of(tmp_path / folder)
        assert len(about(reasons["llama.cpp"], "takes no tokens beyond the embedding")) == more
        assert not about(reasons["transformers 5"], "tokens")


@pytest.mark.parametrize("least", [0, 7, 9, 10, 99, 100, 256, 1909, 49152, 99999])
def test_a_pattern_of_numbers_from_one_on(least):
    pattern = re.compile(numbers_from(least))
    near = {*range(30), *range(max(0, least - 1500), least + 1500), 10 * least, 10**6, 10**12}
    for number in near:
        assert bool(pattern.match(b"%d," % number)) == (number >= least), number


@pytest.mark.parametrize("text", ['": 999', ": 999,", '"vocab": [', "\\: 999"])
def test_a_token_whose_text_looks_like_json(dense, tmp_path, text):
    tokenizer = json.loads((dense / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"][text] = 255
    (dense / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert not about(build_moe(dense, tmp_path / "moe", CONFIG).warnings, "tokens up to")


@pytest.mark.parametrize("target", ["mixtral", "granitemoe", "deepseek", "qwen2_moe", "glm4_moe"])
def test_tokens_that_llama_cpp_leaves_out_of_sentencepiece(dense, tmp_path, target):
    add_token(dense, 256, "added_tokens.json")
    (dense / "tokenizer.model").write_bytes(b"sentencepiece")
    report = build_moe(dense, tmp_path / "moe", CONFIG, target=target)
    assert about(report.warnings, "tokens up to 256")
    refused = about(reasons_of(tmp_path / "moe")["llama.cpp"], "takes no tokens beyond")
    assert bool(refused) == (target in ("qwen2_moe", "glm4_moe"))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"model": []}', '{"added_tokens": [3, {"id": "x"}, {"id": 1e30}]}', "\udcff"],
)
def test_a_tokenizer_that_is_none(dense, tmp_path, text):
    (dense / "tokenizer.json").write_bytes(text.encode(errors="surrogateescape"))
    assert not build_moe(dense, tmp_path / "moe", CONFIG).warnings
    assert check_moe(tmp_path / "moe").passed


@pytest.mark.parametrize(("number", "too_many"), [(1024, False), (1025, True)])
def test_more_experts_than_llama_cpp_takes(dense, tmp_path, number, too_many):
    config = {"num_local_experts": number, "num_experts": number, "model_type": "mixtral"}
    readers = find_readers(config, Contents("per-expert", number))
    reasons = {reader.name: reader.reasons for reader in readers}
    assert len(about(reasons["llama.cpp"], "takes at most 1024 experts, here are 1025")) == too_many
    assert not about(reasons["vLLM"], "1024")


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("granite_swa", {"layer_types": ["full_attention"] * 3}, "wants a sliding window in some"),
        ("granite_swa", {"layer_rope_theta": [1e4, 0, 5e5]}, "has one rope_theta for all layers"),
        ("granitemoehybrid", {"position_embedding_type": "rope"}, "does not rotate queries and"),
        ("lfm2", {"tie_word_embeddings": False}, "has no place for a head of its own"),
        ("hunyuan_v1_dense", {}, "wants moe_topk of a hunyuan_v1_moe as a list"),
        ("qwen3_5_text", {}, "unless its converter is given --no-mtp"),
        ("nemotron_h", {}, "does not look at time_step_min of a nemotron_h"),
        ("nemotron_h", {"time_step_min": 1e-9}, None),
        ("nemotron_h", {"use_conv_bias": False}, "wants a bias in the convolutions"),
    ],
)
def test_what_llama_cpp_does_not_compute(tmp_path, family, changes, reason):
    make_model(tmp_path / "dense", family, **changes)
    if "use_conv_bias" in changes:
        rewrite(tmp_path / "dense", lambda t: {n: t[n] for n in t if "conv1d.bias" not in n})
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    reasons = reasons_of(tmp_path / "moe")["llama.cpp"]
    assert reasons == () if reason is None else about(reasons, reason)


@pytest.mark.parametrize(
    ("family", "target", "options", "changes", "reason"),
    [
        ("qwen3", "dots1", {}, {}, "wants as many heads of keys as of queries in a dots1: 2, 4"),
        ("qwen3", "dots1", {}, {"num_key_value_heads": 4}, None),
        ("qwen3", "dots1", {}, {"attention_bias": True}, "has no place for the bias of o_proj"),
        ("qwen3", "hy_v3", {}, {"attention_bias": True}, "has no place for the bias of o_proj"),
        ("qwen3", "hy_v3", {"dense_layers": (1,)}, {}, None),
        ("qwen3", "mellum", {}, {"attention_bias": True}, "has no place for the bias of o_proj"),
        ("qwen3", "mellum", {}, {"rope_scaling": LLAMA3}, "has no rope of type llama3 in a mellum"),
        ("qwen3", "mellum", {"dense_layers": (0,)}, {}, "wants experts in every layer of a mellum"),
        ("qwen3", "mellum", {}, {"tie_word_embeddings": True}, "wants a head of its own"),
        ("qwen3", "exaone_moe", {}, {"rope_scaling": LLAMA3}, None),
        ("qwen3", "exaone_moe", {}, {"rope_scaling": LINEAR}, "has no rope of type linear"),
        ("qwen3", "exaone_moe", {"dense_layers": (0,)}, {}, None),
        ("qwen3", "exaone_moe", {"dense_layers": (1,)}, {}, "takes the first layers of an exaone"),
        ("llama", "granitemoehybrid", {}, {}, None),
        ("llama", "granitemoehybrid", {}, {"head_dim": 20}, "for the head_dim of a granitemoehyb"),
        ("llama", "ernie4_5_moe", {}, {}, "needs tokenizer.model in a ernie4_5_moe"),
        ("llama", "ernie4_5_moe", {"dense_layers": (1,)}, {}, "they end at layer 0"),
        ("llama", "ernie4_5_moe", {"shared": 1}, {}, "takes intermediate_size / num_key_value"),
    ],
)
def test_what_llama_cpp_computes_of_what_llama_and_qwen3_become(
    tmp_path, family, target, options, changes, reason
):
    make_model(tmp_path / "dense", family, **changes)
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    options = dict(options)
    if options.pop("shared", 0):
        options["shared_experts"] = [tmp_path / "dense"]
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, target=target, **options)
    reasons = reasons_of(tmp_path / "moe")["llama.cpp"]
    assert reasons == () if reason is None else about(reasons, reason)


def test_where_llama_cpp_looks_for_the_dense_layers_of_exaone(tmp_path):
    make_model(tmp_path / "dense", "qwen3")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    moe = tmp_path / "moe"
    build_moe(tmp_path / "dense", moe, CONFIG, target="exaone_moe", dense_layers=(0,))
    edit_config(moe, first_k_dense_replace="absent")
    reason = "looks for first_k_dense_replace, which is None for 1 dense layers"
    assert reasons_of(moe)["llama.cpp"] == (reason,)
    edit_config(moe, mlp_layer_types="absent")
    assert reasons_of(moe)["llama.cpp"] == (reason,)
    for changes, dense in (({}, {0}), ({"first_k_dense_replace": 2}, {0, 1})):
        edit_config(moe, **changes)
        config = json.loads((moe / "config.json").read_text())
        assert moe_families()["exaone_moe"].dense_layers(config, 3) == dense


def test_ernie_is_read_with_its_sentencepiece(tmp_path):
    make_model(tmp_path / "dense", "llama")
    (tmp_path / "dense" / "tokenizer.model").write_bytes(b"sentencepiece")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, target="ernie4_5_moe")
    assert reasons_of(tmp_path / "moe")["llama.cpp"] == ()


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("cohere2", {"sliding_window": 7}, "takes the sliding window of a cohere2_moe to be one"),
        ("cohere2", {"sliding_window": 64}, None),
        ("lfm2", {"tie_word_embeddings": True}, None),
        ("lfm2", {"tie_word_embeddings": False}, "takes the embedding for the head of a lfm2_moe"),
        ("youtu", {}, None),
        ("granite_swa", {}, None),
        ("granitemoehybrid", {}, None),
    ],
)
def test_what_vllm_does_not_compute(tmp_path, family, changes, reason):
    make_model(tmp_path / "dense", family, **changes)
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    reasons = reasons_of(tmp_path / "moe")["vLLM"]
    assert reasons == () if reason is None else about(reasons, reason)
