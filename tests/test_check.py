"""Damage is found and named; what is sound passes; what cannot be checked says so."""

from __future__ import annotations

import json
import re
import shutil
import sys
from hashlib import sha256
from html import escape
from pathlib import Path

import numpy as np
import pytest

for extra in ("safetensors", "ml_dtypes", "typer"):
    pytest.importorskip(extra)

from safetensors.numpy import load_file

from command import run
from families import LINEAR, LLAMA3, LONGROPE, OWN, YARN, make_model
from folders import edit_json, rewrite
from moe_fast import (
    CheckpointError,
    ExpertSource,
    MoeConfig,
    MoeConfigError,
    build_moe,
    check_moe,
    convert_moe,
    inspect_model,
)
from moe_fast.checkpoint.check import Status
from moe_fast.checkpoint.design import design_of
from moe_fast.checkpoint.manifest import read_manifest
from moe_fast.demo import make_dense_model

CONFIG = MoeConfig(num_experts=4)
BLOCK = "model.layers.1.block_sparse_moe"
CHECKS = (
    "headers",
    "manifest",
    "experts",
    "routers",
    "other weights",
    "configuration",
    "tokenizer",
    "structure",
    "routing",
    "readers",
)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    for seed, name in enumerate(("first", "second")):
        make_dense_model(tmp_path / name, seed=seed)
    return [tmp_path / "first", tmp_path / "second"]


@pytest.fixture
def moe(models: list[Path], tmp_path: Path) -> Path:
    build_moe(models, tmp_path / "moe", CONFIG)
    return tmp_path / "moe"


def edit_tensor(folder: Path, name: str, change) -> None:
    """Change the bytes of one tensor in place."""
    with (folder / "model.safetensors").open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        begin, end = json.loads(stream.read(length))[name]["data_offsets"]
        stream.seek(8 + length + begin)
        data = bytearray(stream.read(end - begin))
        stream.seek(8 + length + begin)
        stream.write(change(data))


def flip(position: int):
    """Change one bit of one byte."""

    def change(data: bytearray) -> bytearray:
        data[position] ^= 1
        return data

    return change


def failed(report) -> list[str]:
    return [finding.check for finding in report.findings if finding.status is Status.FAILED]


def statuses(report) -> dict[str, str]:
    return {finding.check: str(finding.status) for finding in report.findings}


def test_a_sound_output_passes_every_check(moe):
    report = check_moe(moe)
    assert statuses(report) == dict.fromkeys(CHECKS, "passed")
    assert report.passed
    assert report.problems == ()
    assert [reader.name for reader in report.readers if reader.loads] == [
        "transformers 4",
        "transformers 5",
        "vLLM",
        "llama.cpp",
    ]


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_every_family_and_layout_passes(tmp_path, family, layout):
    make_model(tmp_path / "dense", family)
    if family == "granite" and layout == "per-expert":
        layout = None
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, layout=layout)
    report = check_moe(tmp_path / "moe")
    expected = dict.fromkeys(CHECKS, "passed") | {"tokenizer": "not possible"}
    assert statuses(report) == expected, report.problems


@pytest.mark.parametrize("target", ["qwen2_moe", "granitemoeshared", "deepseek"])
def test_shared_experts_pass(tmp_path, target):
    make_model(tmp_path / "dense", "llama")
    build_moe(
        tmp_path / "dense",
        tmp_path / "moe",
        CONFIG,
        target=target,
        shared_experts=[tmp_path / "dense"] * 2,
    )
    report = check_moe(tmp_path / "moe")
    assert report.passed, report.problems


def test_noise_and_scale_are_made_again_from_the_seed(models, tmp_path):
    noisy = [ExpertSource(models[0], noise_scale=0.1), ExpertSource(models[1], residual_scale=0.5)]
    build_moe(noisy, tmp_path / "moe", CONFIG, seed=7)
    assert check_moe(tmp_path / "moe").passed
    edit_json_request(tmp_path / "moe", seed=8)
    assert failed(check_moe(tmp_path / "moe")) == ["experts", "routers"]  # both are drawn


def edit_json_request(moe: Path, **changes: object) -> None:
    file = moe / "moe_fast.json"
    manifest = json.loads(file.read_text())
    manifest["request"] |= changes
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "check", "origin"),
    [
        (f"{BLOCK}.experts.3.w2.weight", "experts", "'model.layers.1.mlp.down_proj.weight' of"),
        (f"{BLOCK}.gate.weight", "routers", "what is made for it"),
        ("model.layers.0.input_layernorm.weight", "other weights", "'model.layers.0.input_"),
        ("model.norm.weight", "other weights", "'model.norm.weight' of"),
        ("model.embed_tokens.weight", "other weights", "'model.embed_tokens.weight' of"),
    ],
    ids=["expert", "router", "layer norm", "last norm", "embedding"],
)
def test_one_bit_is_found_and_named(moe, name, check, origin):
    edit_tensor(moe, name, flip(37))
    report = check_moe(moe)
    assert failed(report) == [check]
    (problem,) = report.problems
    assert f"tensor '{name}' differs from {origin}" in problem
    assert "at byte 37 of" in problem


@pytest.mark.parametrize("position", [0, 32767])
def test_the_first_and_the_last_byte(moe, position):
    edit_tensor(moe, f"{BLOCK}.experts.0.w1.weight", flip(position))
    assert f"at byte {position} of 32768" in check_moe(moe).problems[0]


def test_a_bit_in_a_fused_tensor_names_the_source(models, tmp_path):
    build_moe(models, tmp_path / "moe", CONFIG, layout="fused")
    up_of_expert_1 = 3 * 128 * 64 * 4
    edit_tensor(tmp_path / "moe", "model.layers.0.mlp.experts.gate_up_proj", flip(up_of_expert_1))
    (problem,) = check_moe(tmp_path / "moe").problems
    assert "differs from 'model.layers.0.mlp.up_proj.weight' of" in problem
    assert str(models[1]) in problem


def test_swapped_experts_are_both_named(moe):
    tensors = load_file(moe / "model.safetensors")
    for part in ("w1", "w2", "w3"):
        names = [f"{BLOCK}.experts.{expert}.{part}.weight" for expert in (0, 1)]
        for name, other in (names, names[::-1]):
            edit_tensor(moe, name, lambda _, other=other: tensors[other].tobytes())
    report = check_moe(moe)
    assert failed(report) == ["experts"]
    assert len(report.problems) == 6
    for expert in (0, 1):
        assert sum(f"experts.{expert}.w" in problem for problem in report.problems) == 3


def test_a_truncated_file(moe):
    file = moe / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    report = check_moe(moe)
    assert not report.passed
    assert "model.safetensors" in report.problems[0]
    assert statuses(report) == {"headers": "failed"}


def test_missing_and_foreign_tensors(moe):
    def change(tensors):
        del tensors["model.layers.0.self_attn.q_proj.weight"]
        return tensors | {"model.layers.0.extra.weight": np.zeros(3, np.float32)}

    rewrite(moe, change)
    problems = check_moe(moe)["other weights"].problems
    assert "tensor 'model.layers.0.self_attn.q_proj.weight' is missing" in problems[0]
    assert "tensor 'model.layers.0.extra.weight' was not asked for" in problems[1]
    structure = check_moe(moe)["structure"].problems
    assert any("q_proj.weight' is missing" in p for p in structure)
    assert any("extra.weight' is not part of a Mixtral model" in p for p in structure)


def test_another_dtype_is_told(moe):
    name = f"{BLOCK}.gate.weight"
    rewrite(moe, lambda tensors: tensors | {name: tensors[name].astype(np.float16)})
    (problem,) = check_moe(moe)["routers"].problems
    assert "is F16 of shape [4, 64] where F32 of shape [4, 64] was asked for" in problem


def test_a_model_that_was_trained_since(moe, models):
    """One failure that says so, not one for every expert and norm."""
    (moe / "moe_fast.json").unlink()
    rewrite(moe, lambda tensors: {name: array + 1 for name, array in tensors.items()})
    report = check_moe(moe, against=models)
    assert failed(report) == ["experts"]
    (problem,) = report["experts"].problems
    assert "no expert equals an FFN of the sources: the model was trained or changed" in problem
    assert report["other weights"].status is Status.NOT_POSSIBLE
    assert check_moe(moe).passed


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, the build writes 1e-05"),
        ({"rope_theta": 5.0}, "rope_theta is 5.0, the build writes 10000.0"),
        ({"hidden_act": "absent"}, "hidden_act is missing"),
        ({"surprise": 1}, "surprise is none of the keys that the build writes"),
    ],
    ids=["value", "rope", "missing", "extra"],
)
def test_a_wrong_key_of_the_configuration_is_named(moe, changes, problem):
    edit_json(moe / "config.json", **changes)
    report = check_moe(moe)
    assert "configuration" in failed(report)
    assert problem in report["configuration"].problems[0]


def test_a_changed_and_a_missing_tokenizer_file(moe):
    (moe / "tokenizer.json").write_text("{}")
    (moe / "generation_config.json").unlink()
    problems = check_moe(moe)["tokenizer"].problems
    assert "generation_config.json: is missing; the source has it" in problems[0]
    assert "tokenizer.json: differs from" in problems[1]


def test_routers_that_are_no_numbers(moe):
    nan = np.float32(np.nan).tobytes()
    edit_tensor(moe, f"{BLOCK}.gate.weight", lambda data: nan + data[4:])
    (problem,) = check_moe(moe)["routing"].problems
    assert "the router of layer 1 holds numbers that are not finite" in problem


def test_routers_that_tie_are_told(models, tmp_path):
    build_moe(models, tmp_path / "moe", CONFIG, routers="uniform")
    report = check_moe(tmp_path / "moe")
    assert report.passed
    assert "in 2 of them all logits tie" in report["routing"].summary


def test_predicted_load_is_told(moe):
    routers = inspect_model(moe).routers
    load, entropy = (
        " to ".join(f"{end(getattr(router, name) for router in routers):.3f}" for end in (min, max))
        for name in ("coefficient_of_variation", "mean_entropy")
    )
    summary = check_moe(moe)["routing"].summary
    assert f"load cv {load} (0 is even), entropy {entropy} (at most ln 4 = 1.386)" in summary


# Routers that took a run of a model are known by their digests


def test_routers_are_held_to_the_digests_of_the_manifest(moe):
    manifest = json.loads((moe / "moe_fast.json").read_text())
    manifest["request"]["routers"] = {"method": "hidden"}
    routers = load_file(moe / "model.safetensors")
    names = [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)]
    digests = [sha256(routers[name].tobytes()).hexdigest() for name in names]
    manifest["decisions"] = {"router_sha256": digests}
    (moe / "moe_fast.json").write_text(json.dumps(manifest))
    report = check_moe(moe)  # without a run of the model, which has no prompts
    assert report.passed, report.problems
    edit_tensor(moe, names[1], flip(3))
    (problem,) = check_moe(moe)["routers"].problems
    assert problem.endswith("gate.weight' is not the one whose SHA-256 moe_fast.json has")
    edit_json(moe / "moe_fast.json", decisions={"router_sha256": digests[:1]})
    assert "1 digests for 2 routers" in check_moe(moe)["routers"].summary
    edit_json_request(moe, routers={})  # what can be made again is
    assert "what is made for it" in check_moe(moe)["routers"].problems[0]


# Manifests


def test_recorded_sizes_are_compared(moe):
    files = {"model.safetensors": {"size": 3}, "other.safetensors": {"size": 5}}
    edit_json(moe / "moe_fast.json", files=files)
    problems = check_moe(moe)["manifest"].problems
    assert "bytes, 3 were written" in problems[0]
    assert "other.safetensors: is missing" in problems[1]


def test_recorded_digests_are_compared(models, tmp_path):
    build_moe(models, tmp_path / "moe", CONFIG, checksum=True)
    assert "of them the recorded SHA-256" in check_moe(tmp_path / "moe")["manifest"].summary
    file = tmp_path / "moe" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "its SHA-256 is not" in check_moe(tmp_path / "moe")["manifest"].problems[0]
    file.write_bytes(data.replace(b'"format":"pt"', b'"format":"PT"'))
    assert "its header is not the one" in check_moe(tmp_path / "moe")["manifest"].problems[0]


def test_people_may_edit_the_card(moe):
    (moe / "README.md").write_text("# My model\n")
    assert check_moe(moe).passed


@pytest.mark.parametrize("name", ["../first/model.safetensors", "/etc/passwd", "a\\b", "c:d", ""])
def test_a_manifest_names_files_of_its_folder_alone(moe, name):
    edit_json(moe / "moe_fast.json", files={name: {"size": 3}})
    problems = check_moe(moe)["manifest"].problems
    assert f"{name!r} is not the name of a file in the folder" in problems[0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [("[]", "must be a JSON object"), ("{", "not valid JSON"), ("{}", "manifest_version is None")],
)
def test_a_manifest_that_is_none(moe, text, problem):
    (moe / "moe_fast.json").write_text(text)
    report = check_moe(moe)
    assert problem in report["manifest"].problems[0]
    assert report["experts"].status is Status.NOT_POSSIBLE


def test_a_request_of_the_wrong_kind(moe):
    edit_json_request(moe, models=[{"model": 3}])
    report = check_moe(moe)
    assert failed(report) == ["manifest"]
    assert "request.models[0].model: must be a string, got 3" in report["manifest"].problems[0]


def test_a_check_in_a_notebook_and_on_one_line(moe):
    (moe / "tokenizer.json").unlink()
    report = check_moe(moe)
    assert repr(report).startswith(f"<CheckReport of {moe}: headers: passed, manifest: failed, ")
    assert len(repr(report)) < 500
    html = report._repr_html_()
    assert re.search("<td[^>]*>failed</td><td[^>]*>tokenizer</td>", html)
    for problem in report["tokenizer"].problems:
        assert escape(problem) in html


def test_a_request_for_a_huge_number_of_experts_plans_nothing(moe):
    edit_json_request(moe, config=MoeConfig(num_experts=10**15).to_dict())
    (problem,) = check_moe(moe)["experts"].problems
    assert "is for 1000000000000000 experts, 4 are here" in problem


@pytest.mark.parametrize("share", [r"\\server\share\model", "//server/share/model"])
def test_a_manifest_opens_no_network_share(moe, share):
    edit_json_request(moe, base=share)
    report = check_moe(moe)
    assert report["experts"].status is Status.NOT_POSSIBLE
    assert "names network shares" in report["experts"].summary


# Sources that have moved, checkpoints without a manifest


def test_sources_that_are_gone_are_asked_for(moe, models):
    models[1].rename(models[1].parent / "elsewhere")
    report = check_moe(moe)
    assert report.passed
    assert report["experts"].status is Status.NOT_POSSIBLE
    assert "second: is not a folder with a model" in report["experts"].summary
    assert "--against" in report["experts"].summary


def test_moved_sources_are_recognised_by_name_or_by_order(moe, models, tmp_path):
    (tmp_path / "there").mkdir()
    moved = [shutil.move(model, tmp_path / "there" / model.name) for model in models]
    for against in (moved, moved[::-1]):
        report = check_moe(moe, against=against)
        assert statuses(report) == dict.fromkeys(CHECKS, "passed")
    renamed = [Path(path).rename(tmp_path / f"{i}") for i, path in enumerate(moved)]
    assert check_moe(moe, against=renamed).passed
    assert failed(check_moe(moe, against=renamed[::-1])) == ["experts", "other weights"]
    with pytest.raises(MoeConfigError, match=r"^against must list the 2 folders that the manifest"):
        check_moe(moe, against=renamed[0])


def test_without_a_manifest_experts_are_looked_for(moe, models):
    (moe / "moe_fast.json").unlink()
    report = check_moe(moe)
    assert report["experts"].status is Status.NOT_POSSIBLE
    assert report["structure"].status is Status.PASSED
    report = check_moe(moe, against=models)
    assert report.passed
    assert report["experts"].summary == (
        "8 of 8 experts equal an FFN of the sources, byte for byte"
    )
    assert report["other weights"].status is Status.PASSED
    report = check_moe(moe, against=models[:1])
    assert len(report["experts"].problems) == 4
    assert f"expert 1 of {BLOCK} equals no FFN of the sources" in report["experts"].problems[2]
    edit_tensor(moe, "model.norm.weight", flip(0))
    report = check_moe(moe, against=models)
    assert "'model.norm.weight' equals that of none" in report["other weights"].problems[0]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, the safetensors hold"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; it must be an integer"),
        ({"intermediate_size": 64}, "has the shape [128, 64], config.json makes it [64, 64]"),
        ({"vocab_size": 255}, "config.json makes it [255, 64]"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5; it must be an integer from 1 to 4"),
        ({"num_local_experts": 5}, "holds 4 experts, config.json has 5"),
        ({"num_experts": 5}, "num_experts is 5, the safetensors hold 4 experts"),
        ({"rope_theta": 5.0}, "rope_theta is 5.0, that of rope_parameters 10000.0"),
        ({"rope_parameters": 3}, "rope_parameters is 3; it must be an object"),
        ({"tie_word_embeddings": False}, "tensor 'lm_head.weight' is missing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configuration_and_shapes_are_held_to_the_familys_rules(moe, changes, problem):
    (moe / "moe_fast.json").unlink()
    edit_json(moe / "config.json", **changes)
    report = check_moe(moe)
    assert failed(report)[0] == "structure"
    assert any(problem in found for found in report["structure"].problems)


def test_a_family_without_rules_is_checked_as_far_as_it_goes(moe):
    (moe / "moe_fast.json").unlink()
    edit_json(moe / "config.json", model_type="olmoe")
    report = check_moe(moe)
    assert report.passed
    assert report["structure"].status is report["readers"].status is Status.NOT_POSSIBLE
    assert "no rules for model_type 'olmoe'" in report["structure"].summary
    rewrite(moe, lambda tensors: {n: t for n, t in tensors.items() if n != f"{BLOCK}.gate.weight"})
    assert "has no router" in check_moe(moe)["structure"].problems[0]


# Readers


def readers(moe: Path) -> dict[str, tuple[str, ...]]:
    """Why each reader does not load it; nothing for those that do."""
    found = check_moe(moe).readers
    assert all(reader.loads == (not reader.reasons) for reader in found)
    return {reader.name: reader.reasons for reader in found}


def test_readers_of_the_fused_layout(tmp_path):
    make_model(tmp_path / "llama", "llama")
    make_model(tmp_path / "qwen3", "qwen3")
    build_moe(tmp_path / "llama", tmp_path / "mixtral", CONFIG, layout="fused")
    build_moe(tmp_path / "qwen3", tmp_path / "qwen3_moe", CONFIG, layout="fused")
    reason = "does not read the fused layout; convert it to per-expert"
    found = readers(tmp_path / "mixtral")
    assert found["transformers 5"] == ()
    assert found["transformers 4"] == found["vLLM"] == (reason,)
    assert found["llama.cpp"][0] == reason
    (tmp_path / "qwen3_moe" / "tokenizer.json").write_text("{}")
    found = readers(tmp_path / "qwen3_moe")
    assert found["llama.cpp"] == found["vLLM"] == ()
    assert found["transformers 4"] == (reason,)


def test_readers_of_families(tmp_path):
    make_model(tmp_path / "llama", "llama")
    make_model(tmp_path / "olmo2", "olmo2")
    build_moe(tmp_path / "llama", tmp_path / "deepseek", CONFIG, target="deepseek")
    build_moe(tmp_path / "llama", tmp_path / "granite", CONFIG, target="granitemoe")
    build_moe(tmp_path / "olmo2", tmp_path / "flex", CONFIG)
    assert "has no deepseek of its own" in readers(tmp_path / "deepseek")["transformers 5"]
    assert readers(tmp_path / "deepseek")["vLLM"] == ()
    assert readers(tmp_path / "granite")["transformers 4"] == ()
    assert "has no flex_olmo of its own" in readers(tmp_path / "flex")["llama.cpp"]


@pytest.mark.parametrize(
    ("source", "target", "reasons"),
    [
        (
            "qwen2",
            "qwen2_moe",
            (
                "wants a head of its own in a qwen2_moe, here it is the embedding",
                "does not divide the weights of a qwen2_moe's chosen experts by their sum, "
                "norm_topk_prob is true",
            ),
        ),
        (
            "llama",
            "deepseek",
            (
                "does not divide the weights of a deepseek's chosen experts by their sum, "
                "norm_topk_prob is true",
                "wants a shared expert in a deepseek, here is none",
            ),
        ),
        ("qwen3", "qwen3_moe", ()),
    ],
)
def test_what_llama_cpp_does_its_own_way(tmp_path, source, target, reasons):
    make_model(tmp_path / "dense", source, tie_word_embeddings=True)
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, target=target)
    assert readers(tmp_path / "moe")["llama.cpp"] == reasons
    edit_json(tmp_path / "moe" / "config.json", norm_topk_prob=False, tie_word_embeddings=False)
    turned = "divides the weights of a qwen3_moe's chosen experts by their sum"
    found = readers(tmp_path / "moe")["llama.cpp"]
    without_shared = ["wants a shared expert in a deepseek"] if target == "deepseek" else []
    expected = without_shared if reasons else [turned]
    assert [reason.partition(",")[0] for reason in found] == expected


@pytest.mark.parametrize(
    ("source", "target", "changes", "reason"),
    [
        ("qwen3", "qwen3_moe", {"attention_bias": True}, "has no place for the bias of o_proj"),
        ("llama", "granitemoe", {"attention_bias": True}, None),
        ("llama", "mixtral", {"rope_scaling": LLAMA3}, None),
        ("llama", "mixtral", {"rope_scaling": LINEAR}, None),
        ("granite", "granitemoe", {"rope_scaling": LLAMA3}, "has no rope of type llama3"),
        ("qwen3", "qwen3_moe", {"rope_scaling": LLAMA3}, "has no rope of type llama3"),
        ("qwen3", "qwen3_moe", {"rope_scaling": YARN}, None),
        ("mistral", "mixtral", {"sliding_window": 4}, "has no sliding window in a mixtral"),
        ("mistral", "mixtral", {"sliding_window": 512}, None),
        ("mistral", "mixtral", {"sliding_window": None}, None),
        ("qwen3", "qwen3_moe", {"sliding_window": 4, "use_sliding_window": False}, None),
    ],
)
def test_what_llama_cpp_has_no_place_for(tmp_path, source, target, changes, reason):
    make_model(tmp_path / "dense", source, **changes)
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, target=target)
    found = readers(tmp_path / "moe")["llama.cpp"]
    assert len(found) == (reason is not None)
    assert all(reason in line for line in found)


def test_the_rope_that_llama_cpp_leaves_out_of_a_deepseek(tmp_path):
    make_model(tmp_path / "dense", "llama", rope_scaling=LINEAR)
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, target="deepseek")
    assert "has no rope of type linear in a deepseek" in readers(tmp_path / "moe")["llama.cpp"]


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("llama", "granitemoe", "leaves the biases of attention out of a granitemoe"),
        ("granite", "granitemoeshared", "leaves the biases of attention out of a granitemoeshared"),
        ("qwen3", "qwen3_moe", "leaves the bias of o_proj out of a qwen3_moe"),
        ("olmo2", "flex_olmo", None),
        ("qwen2", "qwen2_moe", None),
    ],
)
def test_the_biases_that_vllm_leaves_out(tmp_path, source, target, reason):
    for biased in (False, True):
        dense, moe = tmp_path / f"dense{biased}", tmp_path / f"moe{biased}"
        make_model(dense, source, attention_bias=biased)
        build_moe(dense, moe, CONFIG, target=target)
        assert readers(moe)["vLLM"] == ((reason,) if biased and reason else ())


def test_keys_that_transformers_4_does_not_look_at(moe):
    edit_json(moe / "config.json", rope_theta="absent")
    (reason,) = readers(moe)["transformers 4"]
    assert "rope_theta is 10000.0; it would take 1000000.0" in reason
    llama3 = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 8.0}
    edit_json(moe / "config.json", rope_parameters=llama3, rope_theta=1e6)
    (reason,) = readers(moe)["transformers 4"]
    assert "looks for rope_scaling, config.json has it only in rope_parameters" in reason
    edit_json(moe / "config.json", rope_parameters="absent", num_local_experts="absent")
    found = readers(moe)
    assert "looks for num_local_experts, config.json has num_experts" in found["transformers 4"][0]
    assert found["transformers 5"] == ()
    assert found["llama.cpp"] != ()


def test_where_transformers_4_looks_for_the_context_before_scaling(moe, tmp_path):
    config = moe / "config.json"
    edit_json(config, rope_scaling=LONGROPE, rope_parameters=LONGROPE | {"rope_theta": 1e4})
    reason = "looks for original_max_position_embeddings outside of rope_parameters"
    assert readers(moe)["transformers 4"] == (f"{reason}; moe-fast convert writes both spellings",)
    convert_moe(moe, tmp_path / "converted", layout="per-expert")
    assert readers(tmp_path / "converted")["transformers 4"] == ()


def test_nothing_loads_it(moe):
    edit_json(moe / "config.json", num_local_experts="absent", num_experts="absent")
    report = check_moe(moe)
    assert len(report["readers"].problems) == 4


# Logits; that they are what they should be is for tests/real, with torch


def test_without_torch_logits_are_not_possible(moe, monkeypatch):
    assert "logits" not in statuses(check_moe(moe))
    monkeypatch.setitem(sys.modules, "torch", None)
    finding = check_moe(moe, text="Hello")["logits"]
    assert finding.status is Status.NOT_POSSIBLE
    assert finding.summary == "running models needs torch: pip install torch transformers"
    (moe / "moe_fast.json").unlink()
    finding = check_moe(moe, text="Hello")["logits"]
    assert finding.summary == "needs the dense model to compare with (--against)"


def test_logits_open_no_network_share(moe):
    edit_json_request(moe, base="//server/share/model")
    report = check_moe(moe, text="Hello")
    assert "names network shares" in report["logits"].summary


NO_REASON = None
ELSEWHERE = "experts come from elsewhere than the base's own layers"
CHANGED = "experts have noise or a scale"


def reason_of(output):
    """Why an output may compute something else than what it was made from."""
    return design_of(read_manifest(output).request).reason_to_differ


@pytest.mark.parametrize(
    ("source", "options", "reason"),
    [
        ({}, {}, NO_REASON),
        ({}, {"target": "qwen2_moe", "layout": "fused", "routers": "uniform"}, NO_REASON),
        ({}, {"dtype": "float32"}, NO_REASON),
        ({"source_layers": [0, 1]}, {}, NO_REASON),
        ({"source_layers": [1, 0]}, {}, ELSEWHERE),
        ({"noise_scale": 0.1}, {}, CHANGED),
        ({"residual_scale": 0.5}, {}, CHANGED),
        ({}, {"base": "second"}, ELSEWHERE),
        ({}, {"dtype": "bfloat16"}, "weights were rounded to bfloat16"),
        ({"noise_scale": 0.1}, {"dtype": "bfloat16"}, CHANGED),
        ({}, {"target": "deepseek", "shared_experts": "second"}, "shared experts add their output"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_when_logits_are_meant_to_be_equal(models, tmp_path, source, options, reason):
    options = {k: str(tmp_path / v) if v == "second" else v for k, v in options.items()}
    build_moe(ExpertSource(models[0], **source), tmp_path / "moe", CONFIG, **options)
    assert reason_of(tmp_path / "moe") == reason


def test_a_conversion_is_meant_to_be_equal_unless_it_rounds(moe, tmp_path):
    for dtype, reason in (
        (None, None),
        ("float32", None),
        ("float16", "weights were rounded to float16"),
    ):
        convert_moe(moe, tmp_path / f"{dtype}", dtype=dtype)
        assert reason_of(tmp_path / f"{dtype}") == reason
    convert_moe(tmp_path / "float16", tmp_path / "again", dtype="float16")
    assert reason_of(tmp_path / "again") is None


# Arguments and the command


def test_what_is_no_moe_is_refused(models, tmp_path):
    with pytest.raises(CheckpointError, match="absent: is not a folder with a model"):
        check_moe(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="first: holds no experts; it is not an MoE"):
        check_moe(models[0])


def test_progress_ends_at_the_total(moe):
    calls = []
    check_moe(moe, progress=lambda done, total: calls.append((done, total)))
    size = sum(t.nbytes for t in load_file(moe / "model.safetensors").values())
    assert calls[-1] == (size, size)
    assert calls == sorted(calls)


def test_command(moe, models):
    done = run("check", moe)
    assert (done.returncode, done.stderr) == (0, "")
    assert "loads in transformers 4, transformers 5, vLLM, llama.cpp" in done.stdout
    (moe / "moe_fast.json").unlink()
    done = run("check", moe, "--against", models[0], "--against", models[1])
    assert done.returncode == 0
    assert "8 of 8 experts equal an FFN of the sources" in done.stdout
    kept = f"{BLOCK}.experts.0."
    rewrite(
        moe, lambda tensors: {n: t if n.startswith(kept) else t + 1 for n, t in tensors.items()}
    )
    done = run("check", moe, "--against", models[0])
    assert done.returncode == 1
    assert "and 4 more, which --json lists" in done.stdout  # of 14 weights beside the experts
    found = done.stdout
    done = run("check", moe, "--against", models[0], "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["passed"] is False
    assert "moe: 2 checks failed; 3 of 10 checks were not possible" in found
    done = run("check", moe)
    assert done.returncode == 0
    assert (
        "not possible  experts, routers, other weights, configuration, tokenizer: neither a manif"
    ) in done.stdout
    assert "moe: passed; 6 of 10 checks were not possible" in done.stdout


def test_a_failed_check_does_not_say_that_all_is_well(moe):
    edit_json(moe / "config.json", hidden_act="absent", surprise=1)
    (moe / "tokenizer.json").write_text("{}")
    report = check_moe(moe)
    assert report["configuration"].summary == "2 problems"
    assert report["tokenizer"].summary == "1 problem"
