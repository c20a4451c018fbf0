"""One MoE from dense models on disk: what is written, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

for extra in ("ml_dtypes", "safetensors", "typer", "rich"):
    pytest.importorskip(extra)

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from command import run
from families import LLAMA3, LONGROPE, make_model
from folders import config_of, contents, convert, edit_config, names_in, rewrite
from forward import Model
from moe_fast import CheckpointError, MoeConfig, MoeConfigError, build_moe, compute_gate_weights
from moe_fast.checkpoint.check import check_moe
from moe_fast.demo import make_demo, make_dense_model

TOKENS = np.array([72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100])
CONFIG = MoeConfig(num_experts=4, num_experts_per_tok=2)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    make_dense_model(tmp_path / "dense", seed=0)
    return tmp_path / "dense"


@pytest.fixture
def two_models(dense: Path) -> list[Path]:
    make_dense_model(dense.parent / "other", seed=1)
    return [dense, dense.parent / "other"]


def in_shards(folder: Path, number: int) -> None:
    """The model's one file as `number` files with an index."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for i in range(number):
        part = dict(list(tensors.items())[i::number])
        save_file(part, folder / f"part-{i}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def assert_same_function(dense: Path, moe: Path) -> None:
    expected = Model(dense).logits(TOKENS)
    tolerance = 1e-13 * np.abs(expected).max()
    np.testing.assert_allclose(Model(moe).logits(TOKENS), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("init", ["random", "uniform", "balanced"])
def test_one_model_keeps_its_function(dense, tmp_path, init):
    build_moe(dense, tmp_path / "moe", CONFIG, routers=init)
    assert_same_function(dense, tmp_path / "moe")


def test_two_models_change_the_function(two_models, tmp_path):
    build_moe(two_models, tmp_path / "moe", CONFIG)
    difference = Model(tmp_path / "moe").logits(TOKENS) - Model(two_models[0]).logits(TOKENS)
    assert np.abs(difference).max() > 1e-3


def test_each_expert_is_the_ffn_the_plan_names(two_models, tmp_path):
    build_moe(two_models, tmp_path / "moe", MoeConfig(num_experts=5))
    moe = load_file(tmp_path / "moe" / "model.safetensors")
    sources = [load_file(m / "model.safetensors") for m in two_models]
    for layer in range(2):
        for expert in range(5):
            for name, role in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
                prefix = f"model.layers.{layer}"
                built = moe[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"]
                source = sources[expert % 2][f"{prefix}.mlp.{role}_proj.weight"]
                assert built.tobytes() == source.tobytes()


@pytest.mark.parametrize("base", [None, 0, 1])
def test_everything_else_comes_from_the_base(two_models, tmp_path, base):
    chosen = None if base is None else two_models[base]
    build_moe(two_models, tmp_path / "moe", CONFIG, base=chosen)
    moe = load_file(tmp_path / "moe" / "model.safetensors")
    rest = load_file(two_models[base or 0] / "model.safetensors")
    rest = {name: array for name, array in rest.items() if ".mlp." not in name}
    assert {name for name in moe if "block_sparse_moe" not in name} == set(rest)
    for name, array in rest.items():
        assert moe[name].tobytes() == array.tobytes()


def test_routers_are_consecutive_stretches_and_layer_0_is_the_reference(dense, tmp_path):
    build_moe(dense, tmp_path / "moe", CONFIG, routers="balanced")
    moe = load_file(tmp_path / "moe" / "model.safetensors")
    routers = [moe[f"model.layers.{n}.block_sparse_moe.gate.weight"] for n in range(2)]
    reference = compute_gate_weights(64, 4, "balanced").T.astype(np.float32)
    assert routers[0].tobytes() == reference.tobytes()
    both = compute_gate_weights(128, 4, "balanced")  # one stream over both layers
    scale = np.float64(0.01) / np.sqrt(128) / (np.float64(0.01) / np.sqrt(64))
    np.testing.assert_allclose(
        (routers[1].T.astype(np.float64) - 0.25) * scale, both[64:] - 0.25, rtol=1e-3, atol=1e-8
    )


@pytest.fixture(scope="module")
def wide_tokens():
    return np.random.default_rng(0).normal(size=(4000, 4096))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
@pytest.mark.parametrize("init", ["random", "balanced"])
def test_routers_spread_tokens_in_every_dtype(tmp_path, wide_tokens, dtype, init):
    make_model(
        tmp_path / "wide",
        "mistral",
        hidden_size=4096,
        head_dim=8,
        intermediate_size=8,
        dtype=dtype,
        torch_dtype=np.dtype(dtype).name,
    )
    build_moe(tmp_path / "wide", tmp_path / "moe", MoeConfig(), routers=init)
    with safe_open(tmp_path / "moe" / "model.safetensors", "numpy") as file:
        router = file.get_tensor("model.layers.1.block_sparse_moe.gate.weight")
    assert router.dtype == dtype
    first = np.argsort(-(wide_tokens @ router.T.astype(np.float64)), axis=1)[:, :2]
    load = np.bincount(first.reshape(-1), minlength=8)
    assert load.std() / load.mean() < 0.1


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16], ids=str)
def test_sixteen_bit_weights_are_copied_as_they_are(dense, tmp_path, dtype):
    convert(dense, dtype)
    build_moe(dense, tmp_path / "moe", CONFIG)
    assert check_moe(tmp_path / "moe").passed
    config = config_of(tmp_path / "moe")
    assert config["dtype"] == config["torch_dtype"] == np.dtype(dtype).name


def test_shards_in_and_out(dense, tmp_path):
    build_moe(dense, tmp_path / "single", CONFIG)
    in_shards(dense, 3)
    build_moe(dense, tmp_path / "moe", CONFIG, max_shard_size="200kB")
    shards = sorted((tmp_path / "moe").glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "moe" / "model.safetensors.index.json").read_text())
    found = {}
    for shard in shards:
        tensors = load_file(shard)
        assert sum(t.nbytes for t in tensors.values()) <= 200_000
        assert all(index["weight_map"][name] == shard.name for name in tensors)
        found |= tensors
    single = load_file(tmp_path / "single" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in single.values())
    assert found.keys() == single.keys() == index["weight_map"].keys()
    assert all(found[name].tobytes() == single[name].tobytes() for name in single)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_the_hub_caches_links_are_followed(dense, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(dense.iterdir())):
        shutil.move(file, blobs / f"{i:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{i:040x}")
    build_moe(snapshot, tmp_path / "moe", CONFIG)
    assert check_moe(tmp_path / "moe").passed
    assert not any(p.is_symlink() for p in (tmp_path / "moe").iterdir())


def test_untied_head(dense, tmp_path):
    head = np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)
    rewrite(dense, lambda tensors: tensors | {"lm_head.weight": head})
    edit_config(dense, tie_word_embeddings=False)
    build_moe(dense, tmp_path / "moe", CONFIG)
    assert_same_function(dense, tmp_path / "moe")


def test_tokenizer_and_generation_settings_are_copied_unchanged(dense, tmp_path):
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    (dense / "pytorch_model.bin").write_bytes(b"never copied")
    build_moe(dense, tmp_path / "moe", CONFIG)
    copied = {
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert copied < set(names_in(tmp_path / "moe"))
    assert "pytorch_model.bin" not in names_in(tmp_path / "moe")
    for name in copied:
        assert (tmp_path / "moe" / name).read_bytes() == (dense / name).read_bytes()


def test_configuration_in_both_spellings(dense, tmp_path):
    build_moe(dense, tmp_path / "moe", CONFIG)
    config = config_of(tmp_path / "moe")
    assert config["num_local_experts"] == config["num_experts"] == 4
    assert config["num_experts_per_tok"] == 2
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["sliding_window"] is None
    assert config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_theta": "absent", "rope_parameters": {"rope_theta": 500000.0, **LLAMA3}},
    ],
    ids=["transformers 4", "transformers 5"],
)
def test_rope_scaling_is_kept(dense, tmp_path, spelling):
    edit_config(dense, **spelling)
    build_moe(dense, tmp_path / "moe", CONFIG)
    config = config_of(tmp_path / "moe")
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"] == LLAMA3
    assert config["rope_parameters"] == {"rope_theta": 500000.0, **LLAMA3}


@pytest.mark.parametrize("where", ["beside", "within"])
def test_the_context_before_scaling_is_kept_wherever_it_stands(dense, tmp_path, where):
    original = {"original_max_position_embeddings": 32}
    beside = where == "beside"
    # Beside, it counts more than within.
    within = original if not beside else {"original_max_position_embeddings": 64}
    edit_config(dense, rope_scaling=LONGROPE | within, **(original if beside else {}))
    build_moe(dense, tmp_path / "moe", CONFIG)
    config = config_of(tmp_path / "moe")
    assert config["rope_scaling"] == LONGROPE | original
    assert config["rope_parameters"] == {"rope_theta": 10000.0, **LONGROPE, **original}
    assert config["original_max_position_embeddings"] == 32


def test_old_spelling_of_linear_scaling(dense, tmp_path):
    edit_config(dense, rope_scaling={"type": "linear", "factor": 2.0})
    build_moe(dense, tmp_path / "moe", CONFIG)
    config = config_of(tmp_path / "moe")
    assert config["rope_parameters"]["rope_type"] == "linear"
    assert config["rope_parameters"]["factor"] == 2.0


def test_what_a_config_leaves_out_is_its_familys_default(dense, tmp_path):
    edit_config(dense, model_type="mistral", rope_theta="absent", rms_norm_eps="absent")
    build_moe(dense, tmp_path / "moe", CONFIG)
    config = config_of(tmp_path / "moe")
    assert config["rope_theta"] == 10000.0  # Mixtral's own default is a million
    assert config["rms_norm_eps"] == 1e-6
    assert config["sliding_window"] == 4096


def test_report(two_models, tmp_path):
    report = build_moe(two_models, tmp_path / "moe", MoeConfig(num_experts=3))
    moe = load_file(tmp_path / "moe" / "model.safetensors")
    assert report.num_parameters == sum(t.size for t in moe.values())
    assert report.num_bytes == (tmp_path / "moe" / "model.safetensors").stat().st_size
    assert (report.num_experts, report.num_experts_per_tok, report.num_layers) == (3, 2, 2)
    assert report.load_balance == pytest.approx(1 / 3)
    assert report.warnings == ()


def test_models_without_an_expert_are_warned_of(two_models, tmp_path):
    one = MoeConfig(num_experts=1, num_experts_per_tok=1)
    report = build_moe(two_models, tmp_path / "moe", one)
    assert list(report.unused_models) == [1]
    assert any("other" in w and "gives no expert" in w for w in report.warnings)


def refused(match, *args, **kwargs) -> None:
    """The build raises and nothing is left beside the models."""
    output = Path(args[1])
    before = names_in(output.parent)
    with pytest.raises(CheckpointError, match=match):
        build_moe(*args, **kwargs)
    assert names_in(output.parent) == before


def test_models_that_do_not_fit_are_refused_with_every_reason(dense, tmp_path):
    make_dense_model(tmp_path / "wider", seed=1, intermediate_size=160)
    make_dense_model(tmp_path / "deeper", seed=1, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        build_moe([dense, tmp_path / "wider", tmp_path / "deeper"], tmp_path / "moe", CONFIG)
    assert [p.rsplit(": ", 1)[1] for p in caught.value.problems] == [
        "intermediate_size is 160, the base model has 128",
        "num_hidden_layers is 3, the base model has 2",
    ]
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attention_bias": True}, r"q_proj\.bias' is missing"),
        ({"vocab_size": 300}, r"embed_tokens.*\[256, 64\], config.json makes it \[300, 64\]"),
        ({"num_attention_heads": 8}, r"k_proj.*\[32, 64\], config.json makes it \[16, 64\]"),
        ({"hidden_size": "64"}, "hidden_size is '64'; it must be an integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000.*2 layers"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"rope_scaling": 3}, "rope_scaling is 3"),
        ({"quantization_config": {}}, "quantised"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_do_not_hold(dense, tmp_path, changes, match):
    edit_config(dense, **changes)
    refused(match, dense, tmp_path / "moe", CONFIG)


def test_attention_biases_have_no_place_in_mixtral(dense, tmp_path):
    def with_biases(tensors):
        for layer in range(2):
            for name, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
                bias = np.zeros(rows, np.float32)
                tensors[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = bias
        return tensors

    rewrite(dense, with_biases)
    edit_config(dense, attention_bias=True)
    match = r"o_proj\.bias': Mixtral has no place for this bias"
    refused(match, dense, tmp_path / "moe", CONFIG, target="mixtral")


def test_missing_and_unknown_tensors_are_named(dense, tmp_path):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        return tensors | {"lora_A.weight": np.zeros(3, np.float32)}

    rewrite(dense, change)
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        build_moe(dense, tmp_path / "moe", CONFIG)
    message = str(caught.value)
    assert "'model.layers.1.mlp.up_proj.weight' is missing" in message
    assert "'lora_A.weight' is not part of a llama model" in message


def test_other_dtypes_beside_the_bases_are_refused(two_models, tmp_path):
    convert(two_models[1], np.float16)
    refused(
        r"gate_proj\.weight' is F16, as are 5 others; the base",
        two_models,
        tmp_path / "moe",
        CONFIG,
    )


def test_an_existing_output_is_kept_unless_told(dense, tmp_path):
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "precious").write_text("x")
    refused("exists already", dense, tmp_path / "moe", CONFIG)
    refused("holds no model", dense, tmp_path / "moe", CONFIG, overwrite=True)
    assert (tmp_path / "moe" / "precious").exists()
    (tmp_path / "moe" / "config.json").write_text("{}")
    build_moe(dense, tmp_path / "moe", CONFIG, overwrite=True)
    assert not (tmp_path / "moe" / "precious").exists()
    assert check_moe(tmp_path / "moe").passed


def test_a_build_that_is_interrupted_leaves_nothing(dense, tmp_path):
    def interrupt(written, total):
        raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        build_moe(dense, tmp_path / "moe", CONFIG, progress=interrupt)
    assert not (tmp_path / "moe").exists()


def test_routing_that_mixtral_readers_do_not_know(dense, tmp_path):
    switch = MoeConfig(4, 1, routing_method="switch_transformer")
    refused("routing_method 'switch_transformer'", dense, tmp_path / "moe", switch)
    refused("gate_hidden_dim 32", dense, tmp_path / "moe", MoeConfig(4, gate_hidden_dim=32))


def test_wrong_arguments(dense, tmp_path):
    output = tmp_path / "moe"
    with pytest.raises(MoeConfigError, match=r"^models must name at least one model$"):
        build_moe([], output)
    with pytest.raises(CheckpointError, match="absent: is not a folder"):
        build_moe(tmp_path / "absent", output)
    with pytest.raises(TypeError, match="config must be a MoeConfig, got 8"):
        build_moe(dense, output, 8)
    with pytest.raises(MoeConfigError, match=r"num_experts_per_tok must be at most"):
        build_moe(dense, output, MoeConfig(num_experts=1))
    with pytest.raises(MoeConfigError, match="routers must be one of"):
        build_moe(dense, output, routers="kaiming")
    with pytest.raises(MoeConfigError, match="max_shard_size must be at least 1 MB, got 0"):
        build_moe(dense, output, max_shard_size=0)
    assert not output.exists()


def test_command(two_models, tmp_path):
    done = run("build", *two_models, "-o", tmp_path / "moe", "--experts", 4)
    assert done.returncode == 0
    assert done.stderr == ""  # silence in a pipe
    for expected in ("4 per layer, 2 per token", "use of models", "bytes", "seconds"):
        assert expected in done.stdout
    done = run("check", tmp_path / "moe")
    assert done.returncode == 0
    assert "8 experts equal their sources, byte for byte" in done.stdout


def test_command_reports_errors_without_a_traceback(dense, tmp_path):
    done = run("build", dense, tmp_path / "absent", "-o", tmp_path / "moe")
    assert done.returncode == 1
    assert "absent: is not a folder" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("build", dense, "-o", tmp_path / "moe", "--experts", 0)
    assert done.returncode == 2
    assert "error: --experts must be at least 1, got 0\n" in done.stderr
    assert not (tmp_path / "moe").exists()


def test_building_imports_no_framework(dense, tmp_path):
    code = (
        "import sys\nfrom moe_fast import build_moe\n"
        f"build_moe({str(dense)!r}, {str(tmp_path / 'moe')!r})\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_demo(tmp_path):
    done = run("demo", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert "16 experts equal their sources, byte for byte" in done.stdout
    done = json.loads(run("demo", tmp_path / "demo", "--overwrite", "--json").stdout)
    assert (done["build"]["num_experts"], done["check"]["passed"]) == (8, True)
    assert names_in(tmp_path / "demo") == ["dense-a", "dense-b", "moe"]


@pytest.mark.parametrize("name", ["dense-a", "dense-b", "moe"])
def test_a_demo_replaces_nothing_unasked(tmp_path, name):
    own = tmp_path / "demo" / name
    make_model(own, "mistral")
    before = contents(own)
    done = run("demo", tmp_path / "demo")
    assert done.returncode == 1
    assert (
        f"demo: has {name} already; use them, choose another folder, or recreate them: --overwrite"
        in done.stderr
    )
    assert names_in(tmp_path / "demo") == [name]
    assert contents(own) == before
    (own / "config.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: exists already, holds no model, and is"):
        make_demo(tmp_path / "demo", overwrite=True)
    assert names_in(tmp_path / "demo") == [name]


def test_a_demo_replaces_what_it_is_told_to_whole(tmp_path):
    make_model(tmp_path / "demo" / "dense-b", "mistral")
    (tmp_path / "demo" / "dense-b" / "model.safetensors.index.json").write_text("{}")
    _, checked = make_demo(tmp_path / "demo", overwrite=True)
    assert checked.passed
    assert not (tmp_path / "demo" / "dense-b" / "model.safetensors.index.json").exists()


def test_a_demo_in_a_file(tmp_path):
    (tmp_path / "demo").write_text("x")
    with pytest.raises(CheckpointError, match="demo is not a folder"):
        make_demo(tmp_path / "demo")


def test_reports_as_json(dense, tmp_path):
    done = run("build", dense, "-o", tmp_path / "moe", "--experts", 4, "--json")
    report = json.loads(done.stdout)
    assert report["output"] == str(tmp_path / "moe")
    assert (report["num_experts"], report["unused_models"], report["warnings"]) == (4, [], [])
    report = json.loads(run("check", tmp_path / "moe", "--json").stdout)
    assert report["passed"] is True


NUMPY_ALONE = """
import sys
sys.modules |= dict.fromkeys(("ml_dtypes", "safetensors", "typer", "rich", "yaml"))
import moe_fast
noisy = moe_fast.ExpertSource("dense", noise_scale=0.1, residual_scale=0.5)
options = dict(config=moe_fast.MoeConfig(4), routers=sys.argv[1], dtype="bfloat16")
moe_fast.build_moe(["dense", noisy], "moe", target="qwen2_moe", shared_experts="dense", **options)
moe_fast.convert_moe("moe", "half", dtype="float16", layout="fused")
assert moe_fast.check_moe("moe").passed
assert moe_fast.check_moe("half").passed
moe_fast.inspect_model("moe")
"""


@pytest.mark.parametrize("routers", ["balanced", "random", "uniform", "normal", "linear"])
def test_bfloat16_takes_numpy_alone(tmp_path, routers):
    make_model(tmp_path / "dense", "qwen2", dtype=ml_dtypes.bfloat16, torch_dtype="bfloat16")
    subprocess.run([sys.executable, "-c", NUMPY_ALONE, routers], cwd=tmp_path, check=True)
    tensors = load_file(tmp_path / "moe" / "model.safetensors")
    gates = np.stack([tensors[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(2)])
    if routers in ("balanced", "random", "uniform"):
        expected = np.stack(
            [
                compute_gate_weights(
                    48, 4, routers, dtype="bfloat16", transpose=True, layer=layer,
                    remove_base=routers == "balanced",
                )
                for layer in range(2)
            ]
        )  # fmt: skip
        assert gates.tobytes() == expected.tobytes()
    else:
        assert (np.isfinite(gates.astype(np.float32))).all()
    experts = "model.layers.1.mlp.experts.{}.down_proj.weight"
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    source = dense["model.layers.1.mlp.down_proj.weight"]
    assert (tensors[experts.format(0)] == source).all()
    difference = tensors[experts.format(1)].astype(np.float32) / 0.5 - source.astype(np.float32)
    assert 0.08 < difference.std() < 0.12
