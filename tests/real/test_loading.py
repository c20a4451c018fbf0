"""`moe_fast.torch.load_into`: the model that `from_pretrained` makes of the written build."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import moe_fast.torch
from families import make_model
from moe_fast import CheckpointError, ExpertSource, MoeConfig, MoeConfigError, design_moe
from moe_fast.loading import model as loading
from moe_fast.loading import tensors

CONFIG = MoeConfig(4)
# Every family with a class in transformers: the dense model, and what makes it the target.
FAMILIES = {
    "mixtral": ("llama", {}),
    "qwen2_moe": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3", {"tie_word_embeddings": True}),
    "granitemoe": ("granite", {}),
    "granitemoeshared": ("granite", {}),
    "flex_olmo": ("olmo2", {}),
}


def make_design(folder, target, **options):
    """Experts that differ, so that one in another's place is seen."""
    family, changes = FAMILIES[target]
    dense = folder / "dense"
    if not dense.exists():
        make_model(dense, family, eos_token_id=1, **changes)
    models = [ExpertSource(dense), ExpertSource(dense, noise_scale=0.1)]
    if target in ("granitemoeshared", "qwen2_moe"):
        options["shared_experts"] = ExpertSource(dense, noise_scale=0.2)
    return design_moe(models, CONFIG, target=target, **options)


def empty_model(design, **changes):
    config = AutoConfig.for_model(**(dict(design.config) | changes))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype)


def tensors_of(model):
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def assert_same(model, expected):
    found, wanted = tensors_of(model), tensors_of(expected)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype, name
        assert torch.equal(value, wanted[name]), name
        assert value.requires_grad == wanted[name].requires_grad, name
    tokens = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("layout", [None, "fused"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", FAMILIES)
def test_every_family_is_what_from_pretrained_makes(target, dtype, layout, tmp_path):
    design = make_design(tmp_path, target, dtype=dtype, layout=layout)
    design.write(tmp_path / "built")
    model = empty_model(design)
    moe_fast.torch.load_into(model, design)
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "built"))
    if FAMILIES[target][1].get("tie_word_embeddings"):
        assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_the_models_dtype_is_honoured(stored, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "STAGE", 4096)  # so that parameters take several stages
    design = make_design(tmp_path, "mixtral", dtype=stored)
    design.write(tmp_path / "built")
    model = empty_model(design, dtype=wanted)
    moe_fast.torch.load_into(model, design)
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "built", dtype=wanted))


def test_a_model_with_memory_is_filled_where_it_is(tmp_path):
    design = make_design(tmp_path, "qwen3_moe")
    design.write(tmp_path / "built")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**design.config))
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    moe_fast.torch.load_into(model, design)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == before
    assert not model.lm_head.weight.requires_grad
    model.model.embed_tokens.weight.requires_grad_(True)
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "built"))


def test_strided_parameters_are_filled_too(tmp_path):
    design = make_design(tmp_path, "mixtral")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**design.config))
    name = "model.layers.0.self_attn.q_proj.weight"
    projection = model.get_submodule(name.removesuffix(".weight"))
    projection.weight = nn.Parameter(torch.zeros_like(projection.weight).T.contiguous().T)
    assert not projection.weight.is_contiguous()
    moe_fast.torch.load_into(model, design)
    assert torch.equal(projection.weight, moe_fast.torch.read(design, name))


def test_a_model_under_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    design = make_design(tmp_path, "mixtral")
    design.write(tmp_path / "built")
    config = AutoConfig.for_model(**design.config)
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    moe_fast.torch.load_into(model, design)
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "built"))


def test_a_model_of_ones_own_is_filled_by_name(tmp_path):
    design = make_design(tmp_path, "mixtral")

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            for name in design.names():
                module = self
                *parts, last = name.split(".")
                for part in parts:
                    if not hasattr(module, part):
                        module.add_module(part, nn.Module())
                    module = getattr(module, part)
                module.register_parameter(last, nn.Parameter(torch.empty(design.shape(name))))

    with torch.device("meta"):
        model = Named()
    moe_fast.torch.load_into(model, design)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, moe_fast.torch.read(design, name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_are_read_as_they_are_stored(dtype, tmp_path):
    design = make_design(tmp_path, "qwen2_moe", dtype=dtype)
    design.write(tmp_path / "built")
    stored = moe_fast.torch.read(design, "model.norm.weight")
    assert stored.dtype is getattr(torch, dtype)
    for name in design.names():
        tensor = moe_fast.torch.read(design, name)
        assert tensor.view(torch.uint8).numpy().tobytes() == design.read_bytes(name)
        for rows in (slice(1, 3), slice(-1, None), slice(2, 2)):
            assert torch.equal(moe_fast.torch.read(design, name, rows), tensor[rows])
    with pytest.raises(MoeConfigError, match=r"name must be that of a tensor .* 'lm_hat'"):
        moe_fast.torch.read(design, "lm_hat")


def is_empty(model):
    return all(parameter.is_meta for parameter in model.parameters())


# Another configuration than the design's, and what is said of it.
OTHERS = {
    "fewer experts": (
        {"num_local_experts": 3, "num_experts": 3},
        r"'model\.layers\.0\.mlp\.experts\.gate_up_proj' has the shape \(3, 160, 48\); the design "
        r"has \(4, 160, 48\) for it \(model\.layers\.0\.block_sparse_moe\.experts\.0\.w1\.weight "
        r"and 7 more\)",
    ),
    "narrower": ({"intermediate_size": 72}, r"has the shape \(4, 144, 48\); the design has"),
    "fewer layers": (
        {"num_hidden_layers": 1},
        r"tensor 'model\.layers\.1\.block_sparse_moe\.gate\.weight': MixtralForCausalLM has no "
        "parameter for it",
    ),
    "more layers": (
        {"num_hidden_layers": 3},
        r"parameter 'model\.layers\.2\.mlp\.experts\.gate_up_proj': the design has no tensor",
    ),
    "tied": (
        {"tie_word_embeddings": True},
        r"'model\.embed_tokens\.weight' is 'lm_head\.weight' too.*tie_word_embeddings=False",
    ),
    "another family": ({"model_type": "qwen3_moe"}, "Qwen3MoeForCausalLM has no parameter for it"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_model_of_another_shape_is_left_alone(other, tmp_path):
    changes, message = OTHERS[other]
    design = make_design(tmp_path, "mixtral")
    model = empty_model(design, **changes)
    with pytest.raises(CheckpointError, match=message):
        moe_fast.torch.load_into(model, design)
    assert is_empty(model)


def test_a_source_that_changed_is_named_before_anything_is_filled(tmp_path):
    design = make_design(tmp_path, "mixtral")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**design.config))
    before = {name: value.clone() for name, value in model.named_parameters()}
    file = tmp_path / "dense" / "model.safetensors"
    os.utime(file, ns=(0, 0))
    with pytest.raises(CheckpointError, match=f"{file}: changed since the design was made"):
        moe_fast.torch.load_into(model, design)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file}: No such file"):
        moe_fast.torch.load_into(model, design)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("empty", [True, False])
def test_a_source_that_changes_meanwhile(empty, tmp_path, monkeypatch):
    design = make_design(tmp_path, "mixtral")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**design.config))
    model = empty_model(design) if empty else model
    file = tmp_path / "dense" / "model.safetensors"

    def fill_and_touch(*arguments):
        os.utime(file, ns=(0, 0))
        return tensors.fill(*arguments)

    monkeypatch.setattr(loading, "fill", fill_and_touch)
    with pytest.raises(CheckpointError, match=f"{file}: changed while") as caught:
        moe_fast.torch.load_into(model, design)
    if empty:
        assert is_empty(model)
    else:
        assert "may hold new weights, others old ones" in caught.value.__notes__[0]


def test_weights_that_become_infinite_are_counted(tmp_path):
    make_model(tmp_path / "dense", "llama")
    source = ExpertSource(tmp_path / "dense", residual_scale=1e6, source_layers=(0, 0))
    design = design_moe(source, CONFIG)
    large = moe_fast.torch.read(design, "model.layers.0.block_sparse_moe.experts.0.w2.weight")
    count = 4 * int((large.abs() >= 65520).sum())
    assert count > 0
    model = empty_model(design, dtype="float16")
    message = (
        rf"'model\.layers\.[01]\.mlp\.experts\.down_proj': {count} finite weights became infinite "
        r"in torch\.float16"
    )
    with pytest.warns(UserWarning, match=message):
        moe_fast.torch.load_into(model, design)


def one_tensor(design):
    """A design of the last norm alone, as `norm`."""
    return replace(design, weights={"norm": design.weights["model.norm.weight"]})


class WithAngles(nn.Module):
    """A parameter, and a buffer that no checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.empty(48))
        self.register_buffer("angles", torch.empty(3), persistent=False)


class Computing(WithAngles):
    def initialize_weights(self):
        self.angles.copy_(torch.arange(3))


class Forgetting(WithAngles):
    def initialize_weights(self):
        pass


@pytest.mark.parametrize("kind", [WithAngles, Forgetting])
def test_buffers_that_nothing_computes_are_named(kind, tmp_path):
    design = one_tensor(make_design(tmp_path, "mixtral"))
    with torch.device("meta"):
        model = kind()
    with pytest.raises(CheckpointError, match=rf"buffer 'angles' is in no .* {kind.__name__} does"):
        moe_fast.torch.load_into(model, design)
    assert model.norm.is_meta
    assert model.angles.is_meta


def test_buffers_that_have_memory_stay(tmp_path):
    design = one_tensor(make_design(tmp_path, "mixtral"))
    with torch.device("meta"):
        model = Computing()
    moe_fast.torch.load_into(model, design)
    assert torch.equal(model.angles, torch.arange(3.0))
    model.angles.fill_(7)
    moe_fast.torch.load_into(model, design)
    assert torch.equal(model.angles, torch.full((3,), 7.0))


# Three experts and 97 words on two processes: uneven shards.
SHARDED = [
    ("rows", 3, 97, False),
    ("rows", 4, 96, True),
    ("columns", 4, 96, False),
    ("experts", 4, 96, False),
    ("experts", 4, 96, True),
    ("tensors", 4, 96, True),
]
SHARDED_SMOLLM2 = ["rows", "columns"]


@pytest.fixture(scope="module")
def ranks(smollm2, tmp_path_factory):
    """What two processes held and read of each model, and the bytes of its file or `None`.

    The same two load them all, because starting them takes longer than that.
    """
    scratch = tmp_path_factory.mktemp("sharded")
    jobs, sizes = [], []
    for i, (way, num_experts, words, tied) in enumerate(SHARDED):
        dense, built = scratch / f"dense{i}", scratch / f"built{i}"
        make_model(dense, "qwen3", vocab_size=words, tie_word_embeddings=tied, eos_token_id=1)
        design_moe(dense, MoeConfig(num_experts)).write(built)
        jobs.append([way, str(dense), num_experts, str(built)])
        sizes.append((built / "model.safetensors").stat().st_size)
    jobs += [[way, str(smollm2), CONFIG.num_experts, None] for way in SHARDED_SMOLLM2]
    sizes += [None for _ in SHARDED_SMOLLM2]
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", Path(__file__).with_name("sharded.py")),
            scratch / "jobs.json",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # What two processes print may stand in one line.
    printed = [json.loads(each) for each in re.findall(r"\{.*?\}", done.stdout)]
    found = []
    for job, size in enumerate(sizes):
        two = [rank for rank in printed if rank["job"] == job]
        assert sorted(rank["rank"] for rank in two) == [0, 1]
        found.append((two, size))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", range(len(SHARDED)), ids=map(str, SHARDED))
def test_shards_of_two_processes_make_the_whole(case, ranks):
    """Every shard is what the file has there, and so are the logits."""
    (first, second), size = ranks[case]
    assert first["held"] + second["held"] < 1.3 * size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", SHARDED_SMOLLM2)
def test_two_processes_read_what_they_hold(way, smollm2, ranks):
    two, _ = ranks[len(SHARDED) + SHARDED_SMOLLM2.index(way)]
    held = sum(rank["held"] for rank in two)
    assert held >= design_moe(smollm2, CONFIG).num_bytes * 0.99
    assert max(rank["held"] for rank in two) < 0.52 * held
    assert sum(rank["read"] for rank in two) <= 1.05 * held
