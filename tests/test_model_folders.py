"""Folders as people have them: names that frameworks change, formats of other programs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

for extra in ("ml_dtypes", "safetensors"):
    pytest.importorskip(extra)

from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, load_file, save_file

from families import make_model
from folders import contents, rewrite
from moe_fast import CheckpointError, MoeConfig, build_moe, check_moe, convert_moe, inspect_model
from moe_fast.demo import make_dense_model
from moe_fast.models.folder import canonical_names, read_checkpoint

CONFIG = MoeConfig(num_experts=2)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# What people's training loops save: how each name of the layout of Hugging Face is changed.
WRAPPINGS: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "AutoModel": lambda name: name.removeprefix("model."),
    "AutoModel, compiled": lambda name: "_orig_mod." + name.removeprefix("model."),
    "Lightning": lambda name: f"model.{name}",
    "somebody's own": lambda name: f"policy.llm.{name}",
    "inner, compiled": lambda name: name.replace("model.", "model._orig_mod."),
    "FSDP": lambda name: (
        "_fsdp_wrapped_module." + name.replace("layers.1.", "layers.1._fsdp_wrapped_module.")
    ),
    "checkpointing": lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp."),
}
wrappings = pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)


def rename(folder: Path, wrap: Callable[[str], str]) -> None:
    rewrite(folder, lambda tensors: {wrap(name): tensor for name, tensor in tensors.items()})


def in_shards(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    weight_map = {}
    for i in range(3):
        part = dict(list(tensors.items())[i::3])
        name = f"model-{i + 1:05d}-of-00003.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@wrappings
@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_a_model_under_other_names_is_read(tmp_path, wrap, family):
    """Tied or not, in one file or several; the output is that of the model under its own names."""
    dense = make_model(tmp_path / "dense", family, tie_word_embeddings=family == "llama")
    build_moe(dense, tmp_path / "expected", CONFIG)
    rename(dense, wrap)
    if family == "olmo2":
        in_shards(dense)
    assert build_moe(dense, tmp_path / "moe", CONFIG).warnings == ()
    expected, found = (load_file(tmp_path / name / SINGLE) for name in ("expected", "moe"))
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
    assert check_moe(tmp_path / "moe").passed
    assert inspect_model(dense).num_parameters == sum(t.size for t in load_dense(dense).values())


def load_dense(folder: Path) -> dict:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@wrappings
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_an_moe_under_other_names_is_read_and_does_not_load(tmp_path, wrap, layout):
    make_dense_model(tmp_path / "dense", seed=0)
    moe = tmp_path / "moe"
    build_moe(tmp_path / "dense", moe, CONFIG, layout=layout, target="qwen2_moe")
    expected = contents(moe)[SINGLE]
    before = {reader.name: reader for reader in check_moe(moe).readers}
    rename(moe, wrap)
    (moe / "moe_fast.json").unlink()
    assert inspect_model(moe).num_experts == 2
    report = check_moe(moe, against=tmp_path / "dense")
    assert report["experts"].status == report["other weights"].status == "passed"
    assert "moe-fast convert renames them" in report["structure"].problems[-1]
    for reader in report.readers:
        aware = {"transformers 4": ["AutoModel"], "transformers 5": ["AutoModel", "Lightning"]}
        knows = wrap in [WRAPPINGS[name] for name in aware.get(reader.name, ())]
        assert reader.loads == (before[reader.name].loads and knows)
        assert knows == ("moe-fast convert renames it" not in "".join(reader.reasons))
    convert_moe(moe, tmp_path / "converted")
    assert load_file(tmp_path / "converted" / SINGLE).keys() == load_bytes(expected).keys()
    assert check_moe(tmp_path / "converted").passed
    assert all(
        reader == before[reader.name] for reader in check_moe(tmp_path / "converted").readers
    )


def load_bytes(data: bytes) -> dict:
    return load(data)


def test_errors_name_tensors_as_the_file_has_them(tmp_path):
    dense = make_model(tmp_path / "dense", "llama")

    def change(tensors):
        tensors = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
        norm = tensors.pop("_orig_mod.model.norm.weight")
        return tensors | {"_orig_mod.model.norm.weight": norm[:5], "_orig_mod.extra": norm}

    rewrite(dense, change)
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        build_moe(dense, tmp_path / "moe", CONFIG)
    assert "tensor '_orig_mod.extra' is not part" in str(caught.value)
    assert "tensor '_orig_mod.model.norm.weight' has the shape [5]" in str(caught.value)


LAYOUT = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"]


@pytest.mark.parametrize(
    "names",
    [
        LAYOUT,
        [*LAYOUT, "lm_head.weight"],
        ["transformer.wte.weight", "transformer.h.0.attn.weight"],
        ["model.language_model.embed_tokens.weight", "model.visual.x", "lm_head.weight"],
        ["language_model.model.embed_tokens.weight", "vision_tower.x"],
        [*LAYOUT, "model.layers.61.embed_tokens.weight", "model.layers.61.eh_proj.weight"],
        ["a.embed_tokens.weight.absmax", "a.b"],
        [],
    ],
)
def test_names_that_are_left_as_they_are(names):
    assert canonical_names(names) == names


def test_names_that_would_become_equal_are_left_as_they_are(tmp_path):
    dense = make_model(tmp_path / "dense", "llama")
    rewrite(dense, lambda t: t | {"_orig_mod.model.norm.weight": t["model.norm.weight"]})
    assert read_checkpoint(dense).keys() == load_file(dense / SINGLE).keys()


@given(
    st.lists(
        st.lists(
            st.sampled_from(["model", "_orig_mod", "module", "layers", "0", "lm_head", "weight"]),
            max_size=5,
        ).map(".".join)
        | st.sampled_from(["embed_tokens.weight", "model.embed_tokens.weight"]),
        unique=True,
    )
)
def test_canonical_names_stay(names):
    once = canonical_names(names)
    assert len(once) == len(names)
    if names and "model.embed_tokens.weight" in once:
        assert canonical_names(once) == once


# What is no model here, and what is said of it


def test_an_adapter(tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")
    words = "has no config.json; it holds adapter_config.json: an adapter .*merge_and_unload"
    for refuse in (lambda: convert_moe(folder, tmp_path / "out"), lambda: inspect_model(folder)):
        with pytest.raises(CheckpointError, match=words):
            refuse()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: names no base_model_name"):
        build_moe(folder, tmp_path / "out", CONFIG)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    says(folder, "lora: holds adapter_config.json: an adapter", needs_weights=True)


def says(folder: Path, match: str, *, needs_weights: bool = False) -> None:
    """Build, convert and inspect refuse a folder with these words."""
    if needs_weights:  # as little of a configuration as a dense model has
        make_model(folder.parent / "complete", "llama")
        shutil.copy(folder.parent / "complete" / "config.json", folder)
    output = folder.parent / "output"
    for refuse in (
        lambda: build_moe(folder, output, CONFIG),
        lambda: convert_moe(folder, output),
        lambda: inspect_model(folder),
    ):
        with pytest.raises(CheckpointError, match=match):
            refuse()
    assert not output.exists()


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (
            ["params.json", "consolidated.safetensors", "tekken.json"],
            "Mistral's own format; take c",
        ),
        (
            ["params.json", "consolidated-00001-of-00002.safetensors"],
            "Mistral's own format; take c",
        ),
        (["params.json", "consolidated.00.pth"], "a pickle file, .*Meta's own format; take c"),
        (["x.gguf"], "holds x.gguf, and GGUF is not read"),
        (["zero_to_fp32.py", "latest"], "DeepSpeed.*python zero_to_fp32.py . OUTPUT --safe_seri"),
        (["__0_0.distcp", ".metadata"], "checkpoint of FSDP; merge it: accelerate merge-weights"),
        (["pytorch_model.bin"], "holds pytorch_model.bin, a pickle file"),
    ],
)
def test_formats_of_other_programs(tmp_path, files, match):
    folder = tmp_path / "other"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    says(folder, f"has no config.json; it .*{match}")
    says(folder, f"other: .*{match}", needs_weights=True)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (
            ["model-00001-of-00001.safetensors"],
            rf"holds model-00001-of-00001.safetensors and no {INDEX}; .*call it {SINGLE}",
        ),
        (
            ["model-00001-of-00001.safetensors", "training_args.bin", "optimizer.pt"],
            rf"holds model-00001-of-00001.safetensors and no {INDEX}; .*call it {SINGLE}",
        ),
        (["weights.safetensors"], rf"holds weights.safetensors and no {INDEX}; .*call it {SINGLE}"),
        (
            ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"],
            rf"holds 2 of 3 shards \(model-00001-of-00003.safetensors\) and no {INDEX}, which says",
        ),
        (["a.safetensors", "b.safetensors", "c.safetensors"], r"holds a.safetensors, b.*, \.\.\. "),
        (["training_args.bin", "optimizer.pt", "rng_state_0.pth"], f"holds neither {SINGLE} nor"),
    ],
)
def test_weights_that_no_index_names(tmp_path, files, match):
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes(b"")
    says(folder, match, needs_weights=True)


def test_a_shard_that_is_all_becomes_a_model_as_it_is_said(tmp_path):
    dense = make_model(tmp_path / "dense", "llama")
    build_moe(dense, tmp_path / "expected", CONFIG)
    shard = dense / "model-00001-of-00001.safetensors"
    (dense / SINGLE).rename(shard)
    with pytest.raises(CheckpointError, match=f"call it {SINGLE}"):
        build_moe(dense, tmp_path / "moe", CONFIG)
    shard.rename(dense / SINGLE)
    build_moe(dense, tmp_path / "moe", CONFIG)
    assert contents(tmp_path / "moe")[SINGLE] == contents(tmp_path / "expected")[SINGLE]


# Two sets of weights


def second_set(folder: Path, other: str = "model-00001-of-00001.safetensors") -> None:
    """An index beside model.safetensors that names another file."""
    shutil.copy(folder / SINGLE, folder / other)
    index = {"weight_map": dict.fromkeys(load_file(folder / SINGLE), other)}
    (folder / INDEX).write_text(json.dumps(index))


def test_an_index_of_other_files_is_warned_of(tmp_path):
    first = make_model(tmp_path / "first", "llama")
    second = make_model(tmp_path / "second", "llama", seed=1)
    second_set(second)
    where = f"{second / SINGLE}: is read, {INDEX} beside it names 'model-00001-of-00001.safeten"
    for models in (second, [first, second]):
        report = build_moe(models, tmp_path / "moe", CONFIG, overwrite=True)
        (warning,) = report.warnings
        assert warning.startswith(where)
    second_set(tmp_path / "moe", "other.safetensors")
    where = f"{tmp_path / 'moe' / SINGLE}: is read, {INDEX} beside it names 'other.safetensors'"
    (warning,) = convert_moe(tmp_path / "moe", tmp_path / "half", dtype="float16").warnings
    assert warning.startswith(where)
    assert where in check_moe(tmp_path / "moe")["headers"].summary
    assert any(where in problem for problem in inspect_model(tmp_path / "moe").problems)


def test_an_index_of_the_same_file_is_no_second_set(tmp_path):
    dense = make_model(tmp_path / "dense", "llama")
    index = {"weight_map": dict.fromkeys(load_file(dense / SINGLE), SINGLE)}
    (dense / INDEX).write_text(json.dumps(index))
    assert build_moe(dense, tmp_path / "moe", CONFIG).warnings == ()
    assert inspect_model(dense).problems == ()


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": {"a": "../b.safetensors"}}'])
def test_an_index_that_does_not_hold_beside_the_weights(tmp_path, text):
    dense = make_model(tmp_path / "dense", "llama")
    (dense / INDEX).write_text(text)
    (warning,) = build_moe(dense, tmp_path / "moe", CONFIG).warnings
    assert str(dense / INDEX) in warning
    assert warning.endswith(f"; {SINGLE} beside it is read")
