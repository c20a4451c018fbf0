"""FFNs split into finer experts: the function is kept, and every weight is where a twin puts it."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("ml_dtypes")

import ml_dtypes

from families import make_model
from forward import Model
from moe_fast import (
    CheckpointError,
    ExpertSource,
    MoeConfig,
    MoeConfigError,
    MoeReport,
    build_moe,
    build_recipe,
    check_moe,
    convert_moe,
    inspect_model,
    plan_moe_construction,
    write_report,
)
from reference import neurons

TOKENS = np.arange(24) * 37 % 96
PAIRS = [
    ("llama", "mixtral"),
    ("qwen3", "qwen3_moe"),
    ("qwen2", "qwen2_moe"),
    ("granite", "granitemoe"),
    ("olmo2", "flex_olmo"),
    ("llama", "deepseek"),
    ("llama", "glm4_moe"),
    ("qwen2", "glm4_moe"),
    ("qwen3", "glm4_moe"),
]
NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def assert_same_function(dense, moe, tolerance=1e-6):
    expected, found = Model(dense).logits(TOKENS), Model(moe).logits(TOKENS)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("copies", "shards"), [(4, 4), (3, 5), (2, 8)])
@pytest.mark.parametrize(("family", "target"), PAIRS)
def test_the_function_is_kept(tmp_path, family, target, copies, shards):
    make_model(tmp_path / "dense", family)
    config = MoeConfig(copies * shards, shards)
    options = {"granularity": shards, "target": target, "routers": "random"}
    report = build_moe(tmp_path / "dense", tmp_path / "moe", config, **options)
    assert report.num_experts == copies * shards
    assert_same_function(tmp_path / "dense", tmp_path / "moe")
    checked = check_moe(tmp_path / "moe")
    assert checked.passed, checked.problems
    assert not [w for w in report.warnings if "not compute" in w or "starve" in w or "tie" in w]


@pytest.mark.parametrize("target", ["mixtral", "glm4_moe"])
def test_two_copies_of_a_token(tmp_path, target):
    make_model(tmp_path / "dense", "llama")
    config = MoeConfig(16, 8)
    build_moe(tmp_path / "dense", tmp_path / "moe", config, granularity=4, target=target)
    assert_same_function(tmp_path / "dense", tmp_path / "moe")


@pytest.mark.parametrize(("options", "groups"), [({}, (4, 2)), ({"mix_copies": True}, (1, 1))])
def test_groups_are_the_copies(tmp_path, options, groups):
    make_model(tmp_path / "dense", "llama")
    config = MoeConfig(16, 8)
    options = {**options, "granularity": 4, "target": "glm4_moe"}
    build_moe(tmp_path / "dense", tmp_path / "moe", config, **options)
    written = Model(tmp_path / "moe").config
    assert (written["n_group"], written["topk_group"]) == groups
    assert written["routed_scaling_factor"] == 4.0
    assert_same_function(tmp_path / "dense", tmp_path / "moe")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shards", [2, 4, 8, 5])
def test_every_weight_is_the_twins(tmp_path, shards, dtype):
    for seed, name in enumerate(("a", "b")):
        make_model(tmp_path / name, "llama", seed=seed, dtype=dtype)
    models = [tmp_path / "a", tmp_path / "b"]
    config = MoeConfig(3 * shards, shards)
    build_moe(models, tmp_path / "moe", config, granularity=shards, target="mixtral")
    found = load_file(tmp_path / "moe" / "model.safetensors")
    sources = [load_file(model / "model.safetensors") for model in models]
    width = 80 // shards
    up = {2: 1, 4: 2, 8: 2, 5: 1}[shards]
    factors = {"gate_proj": 1, "up_proj": up, "down_proj": shards / up}
    for layer in range(2):
        block = f"model.layers.{layer}.block_sparse_moe"
        router = found[f"{block}.gate.weight"]
        assert (router.reshape(3, shards, -1) == router[::shards, np.newaxis]).all()
        assert len(np.unique(router.astype(np.float32), axis=0)) == 3
        for expert in range(3 * shards):
            copy, shard = divmod(expert, shards)
            rows = slice(shard * width, (shard + 1) * width)
            for role, factor in factors.items():
                whole = sources[copy % 2][f"model.layers.{layer}.mlp.{role}.weight"]
                part = whole[:, rows] if role == "down_proj" else whole[rows]
                expected = (part.astype(np.float32) * np.float32(factor)).astype(dtype)
                weight = found[f"{block}.experts.{expert}.{NAMES[role]}.weight"]
                assert weight.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_factors_meet_weights_in_the_dtype_that_is_asked_for(tmp_path, dtype):
    """5 times a bfloat16 is no bfloat16, and is a float32."""
    make_model(tmp_path / "dense", "llama", dtype=dtype)
    options = {"granularity": 5, "dtype": "float32", "target": "mixtral"}
    build_moe(tmp_path / "dense", tmp_path / "moe", MoeConfig(10), **options)
    assert_same_function(tmp_path / "dense", tmp_path / "moe")
    found = load_file(tmp_path / "moe" / "model.safetensors")
    whole = load_file(tmp_path / "dense" / "model.safetensors")
    down = whole["model.layers.1.mlp.down_proj.weight"]
    expert = found["model.layers.1.block_sparse_moe.experts.7.w2.weight"]
    assert (expert == 5 * down[:, 32:48].astype(np.float32)).all()
    assert check_moe(tmp_path / "moe").passed


def test_weights_that_become_infinite_are_counted(tmp_path):
    dense = make_model(tmp_path / "dense", "llama", dtype=np.float16)
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, :5] = 50000
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    report = build_moe(dense, tmp_path / "moe", MoeConfig(8), granularity=4, target="mixtral")
    said = [warning for warning in report.warnings if "float16" in warning and "w2" in warning]
    assert said, report.warnings


def test_shards_of_a_scaled_family_keep_their_bytes(tmp_path):
    make_model(tmp_path / "dense", "qwen3", dtype=ml_dtypes.bfloat16)
    config = MoeConfig(6, 3)
    shards = 2
    build_moe(tmp_path / "dense", tmp_path / "moe", config, granularity=shards, target="glm4_moe")
    found = load_file(tmp_path / "moe" / "model.safetensors")
    source = load_file(tmp_path / "dense" / "model.safetensors")
    down = source["model.layers.1.mlp.down_proj.weight"]
    for expert in range(6):
        columns = slice(expert % 2 * 40, expert % 2 * 40 + 40)
        weight = found[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]
        assert weight.tobytes() == down[:, columns].tobytes()


@pytest.mark.parametrize("target", ["mixtral", "glm4_moe", "granitemoe"])
def test_shuffled_copies_split_differently_and_compute_the_same(tmp_path, target):
    make_model(tmp_path / "dense", "llama")
    config = MoeConfig(12, 4)
    options = {"granularity": 4, "target": target, "seed": 3}
    build_moe(tmp_path / "dense", tmp_path / "moe", config, shuffle=True, **options)
    assert_same_function(tmp_path / "dense", tmp_path / "moe")
    assert check_moe(tmp_path / "moe").passed
    if target == "glm4_moe":
        found = load_file(tmp_path / "moe" / "model.safetensors")
        source = load_file(tmp_path / "dense" / "model.safetensors")
        prefix = "model.layers.0.mlp"
        orders = []
        for copy in range(3):
            gate, down = (
                np.concatenate(
                    [
                        found[f"{prefix}.experts.{copy * 4 + shard}.{role}.weight"]
                        for shard in range(4)
                    ],
                    axis=axis,
                )
                for role, axis in (("gate_proj", 0), ("down_proj", 1))
            )
            whole = source[f"{prefix}.gate_proj.weight"]
            order = [int(np.flatnonzero((whole == row).all(axis=1))[0]) for row in gate]
            assert sorted(order) == list(range(80))
            assert (down == source[f"{prefix}.down_proj.weight"][:, order]).all()
            orders.append(tuple(order))
        assert len(set(orders)) == 3


@pytest.mark.parametrize("sets", ["shared", "separate"])
@pytest.mark.parametrize(("shards", "part"), [(1, 0.5), (4, 0.3), (2, 1.0)])
def test_neurons_drawn_anew(tmp_path, shards, part, sets):
    make_model(tmp_path / "dense", "llama", hidden_size=96, intermediate_size=160)
    config = MoeConfig(2 * shards, shards)
    options = {"granularity": shards, "target": "glm4_moe", "reinit": part, "reinit_sets": sets}
    build_moe(tmp_path / "dense", tmp_path / "moe", config, **options)
    assert check_moe(tmp_path / "moe").passed
    found = load_file(tmp_path / "moe" / "model.safetensors")
    source = load_file(tmp_path / "dense" / "model.safetensors")
    width = 160 // shards
    drawn = []
    for expert in range(2 * shards):
        rows = slice(expert % shards * width, (expert % shards + 1) * width)
        changed = {}
        for role in NAMES:
            whole = source[f"model.layers.1.mlp.{role}.weight"]
            before = whole[:, rows].T if role == "down_proj" else whole[rows]
            after = found[f"model.layers.1.mlp.experts.{expert}.{role}.weight"]
            after = after.T if role == "down_proj" else after
            differ = (after != before).any(axis=1)
            assert differ.sum() == int(part * width)
            assert (after != before)[differ].mean() > 0.999
            old, new = before[differ], after[differ]
            assert abs(new.mean() - old.mean()) < 5 * old.std() / np.sqrt(old.size)
            assert abs(new.std() / old.std() - 1) < 5 / np.sqrt(2 * old.size)
            changed[role] = tuple(np.flatnonzero(differ))
            drawn.append(new.tobytes())
        same = len(set(changed.values())) == 1
        assert same == (sets == "shared" or part == 1)
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("sets", ["shared", "separate"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_every_drawn_weight_is_the_twins(tmp_path, dtype, sets):
    make_model(tmp_path / "dense", "llama", dtype=dtype)
    build_moe(
        tmp_path / "dense", tmp_path / "moe", MoeConfig(8), granularity=4, reinit=0.5, seed=11,
        target="glm4_moe", shuffle=True, reinit_sets=sets,
    )  # fmt: skip
    found = load_file(tmp_path / "moe" / "model.safetensors")
    whole = load_file(tmp_path / "dense" / "model.safetensors")
    for expert in (1, 6):
        copy, shard = divmod(expert, 4)
        order = neurons.shuffled(80, neurons.stream(11, f"1 {copy} neurons"))
        part = order[shard * 20 : shard * 20 + 20]
        for role in NAMES:
            rows = whole[f"model.layers.1.mlp.{role}.weight"].astype(np.float32)
            rows = (rows.T if role == "down_proj" else rows)[part]
            expected = neurons.redrawn(rows, 11, 1, expert, role, 0.5, sets == "separate")
            weight = found[f"model.layers.1.mlp.experts.{expert}.{role}.weight"]
            weight = (weight.T if role == "down_proj" else weight).astype(np.float64)
            kept = weight == rows
            assert kept.all(axis=1).sum() == 10
            step = 2.0 ** (-23 if dtype is np.float32 else -8)
            assert np.abs(weight - expected).max() <= step * np.abs(expected).max()
            assert (expected[kept.all(axis=1)] == rows[kept.all(axis=1)]).all()


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_large_matrix_is_drawn_as_a_small_one(tmp_path, monkeypatch, shuffle):
    """What is not held in memory is read for each pass."""
    make_model(tmp_path / "dense", "llama", dtype=ml_dtypes.bfloat16)
    for name, held in (("held", 2**20), ("read", 0)):
        monkeypatch.setattr("moe_fast.checkpoint.neurons.HELD", held)
        build_moe(tmp_path / "dense", tmp_path / name, MoeConfig(4), reinit=0.5, shuffle=shuffle)
    files = [tmp_path / name / "model.safetensors" for name in ("held", "read")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_drawn_weights_have_the_moments_of_those_replaced(tmp_path):
    """The arithmetic itself: what was drawn is mean + deviation * z for standard normal z."""
    make_model(tmp_path / "dense", "llama", num_hidden_layers=1)
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        build_moe(
            tmp_path / "dense", tmp_path / name, MoeConfig(2), reinit=0.5, seed=seed,
            target="mixtral", max_shard_size="20kB" if name == "again" else 5_000_000_000,
        )  # fmt: skip
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    again = {}
    for file in (tmp_path / "again").glob("*.safetensors"):
        again |= load_file(file)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert one.keys() == again.keys()
    assert all((one[name] == again[name]).all() for name in one)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert (one[name] != two[name]).any()


def test_scale_noise_and_splits_together(tmp_path):
    """A source's noise and scale come before the split, the same for all shards of a copy."""
    make_model(tmp_path / "dense", "llama")
    source = ExpertSource(tmp_path / "dense", noise_scale=0.1, residual_scale=0.5)
    build_moe(source, tmp_path / "whole", MoeConfig(2), target="mixtral", seed=5)
    build_moe(source, tmp_path / "fine", MoeConfig(8, 4), target="mixtral", seed=5, granularity=4)
    whole, fine = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "fine"))
    for copy in range(2):
        block = "model.layers.1.block_sparse_moe.experts"
        down = whole[f"{block}.{copy}.w2.weight"]
        parts = [fine[f"{block}.{copy * 4 + shard}.w2.weight"] for shard in range(4)]
        assert (np.concatenate(parts, axis=1) == 2 * down).all()
    assert check_moe(tmp_path / "fine").passed


def test_conversion_of_fine_experts(tmp_path):
    make_model(tmp_path / "dense", "llama")
    build_moe(tmp_path / "dense", tmp_path / "moe", MoeConfig(8, 4), granularity=4)
    convert_moe(tmp_path / "moe", tmp_path / "fused", layout="fused")
    assert_same_function(tmp_path / "dense", tmp_path / "fused")


def test_by_default_a_token_takes_one_copy(tmp_path):
    make_model(tmp_path / "dense", "llama")
    report = build_moe(tmp_path / "dense", tmp_path / "moe", granularity=4)
    assert (report.num_experts, report.num_experts_per_tok) == (32, 4)


@pytest.mark.parametrize("shards", [2, 4, 5])
def test_a_config_without_k_takes_one_copy(tmp_path, shards):
    make_model(tmp_path / "dense", "llama")
    config = MoeConfig(num_experts=4 * shards)
    assert config.num_experts_per_tok == 2
    report = build_moe(tmp_path / "dense", tmp_path / "moe", config, granularity=shards)
    assert report.num_experts_per_tok == shards
    assert_same_function(tmp_path / "dense", tmp_path / "moe")
    said = build_moe(
        tmp_path / "dense", tmp_path / "said", MoeConfig(4 * shards, 2), granularity=shards
    )
    assert said.num_experts_per_tok == 2


def test_shards_that_share_rows_are_no_fault(tmp_path):
    """Rows of a copy's shards are equal by intent; only routers of one row send all one way."""
    make_model(tmp_path / "dense", "llama")
    options = {"granularity": 4, "routers": "random"}
    build_moe(tmp_path / "dense", tmp_path / "moe", MoeConfig(16), **options)
    (one, _) = inspect_model(tmp_path / "moe").routers
    assert (one.tied_experts, one.row_repeats) == (16, 4)
    summary = check_moe(tmp_path / "moe")["routing"].summary
    assert "every 4 adjacent experts share a row: the shards of a copy" in summary
    assert "all logits tie" not in summary
    page = write_report(tmp_path / "moe", tmp_path / "page.html").read_text()
    assert "Experts share rows, 4 in a row" in page
    assert "always tie" not in page
    assert "expert e is shard e % 4 of copy e // 4" in page
    build_moe(tmp_path / "dense", tmp_path / "tied", MoeConfig(8), routers="uniform")
    assert "all logits tie" in check_moe(tmp_path / "tied")["routing"].summary
    assert inspect_model(tmp_path / "tied").routers[0].row_repeats == 8
    build_moe(tmp_path / "dense", tmp_path / "own", MoeConfig(8))
    assert inspect_model(tmp_path / "own").routers[0].row_repeats == 1


def test_recipes_say_it_all(tmp_path, monkeypatch):
    pytest.importorskip("yaml")
    for seed, name in enumerate("ab"):
        make_model(tmp_path / name, "llama", seed=seed)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yml").write_text(
        "models: [a, b]\ngranularity: 4\nmix_copies: true\nshuffle: True\nreinit: 0.5\n"
        "reinit_sets: separate\nbackbone: [2, 1]\nseed: 3\ntarget: glm4_moe\n"
    )
    build_recipe("recipe.yml", "recipe")
    build_moe(
        ["a", "b"], "python", granularity=4, mix_copies=True, shuffle=True, reinit=0.5, seed=3,
        reinit_sets="separate", backbone=(2, 1), target="glm4_moe",
    )  # fmt: skip
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("recipe", "python"))
    assert one.keys() == two.keys()
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)
    assert check_moe(tmp_path / "recipe").passed
    card = (tmp_path / "recipe" / "README.md").read_text()
    assert "shard e % 4 of copy e // 4" in card
    assert "50 % were drawn anew (others in gate, up and down projection)" in card
    assert (
        "Everything else is their weighted mean; tokenizer and config.json are those of a" in card
    )
    _, recipe, _ = card.split("```", 2)  # the card's own recipe makes the same again
    (tmp_path / "again.yml").write_text(recipe.removeprefix("yaml\n"))
    build_recipe("again.yml", "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(one[name].tobytes() == again[name].tobytes() for name in one)


def test_plan_and_report():
    plan = plan_moe_construction(3, 2, MoeConfig(12, 2), granularity=2)
    assert plan.source_model.tolist() == [[0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2]] * 2
    assert plan.report(64, 128, 12, granularity=2) == MoeReport(
        12, 2, 0.0, 2 * (12 * 3 * 64 * 64 + 64 * 12)
    )
    assert plan.report(64, 128, 12) == plan.report(64, 128, 12, granularity=1)


def test_what_is_lost_is_said(tmp_path):
    make_model(tmp_path / "dense", "llama")
    report = build_moe(tmp_path / "dense", tmp_path / "moe", MoeConfig(8, 3), granularity=4)
    assert any(
        "num_experts_per_tok 3 is not a multiple of granularity 4" in w for w in report.warnings
    )
    assert any(
        "experts are 20 wide, not a multiple of 8 (transformers 5" in w for w in report.warnings
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"granularity": 3}, MoeConfigError, r"num_experts \(8\) must be a multiple of granul"),
        ({"granularity": 0}, MoeConfigError, r"granularity must be at least 1, got 0"),
        ({"granularity": 2.0}, TypeError, r"granularity must be an integer"),
        ({"reinit": 1.5}, MoeConfigError, r"reinit must be from 0 to 1, got 1\.5"),
        ({"reinit": float("nan")}, MoeConfigError, r"reinit must be from 0 to 1, got nan"),
        ({"reinit_sets": "some"}, MoeConfigError, r"reinit_sets must be one of 'shared', 'sep"),
        ({"shuffle": 1}, TypeError, r"shuffle must be True or False, got 1"),
        (
            {"granularity": 8, "config": MoeConfig(16, 8), "width": 84},
            CheckpointError,
            r"model\.safetensors: tensor 'model\.layers\.0\.mlp\.gate_proj\.weight' \[84, 48\]: "
            r"intermediate_size 84 is not a multiple of granularity 8",
        ),
    ],
)
def test_wrong_input(tmp_path, options, error, message):
    options = dict(options)
    make_model(tmp_path / "dense", "llama", intermediate_size=options.pop("width", 80))
    with pytest.raises(error, match=message):
        build_moe(tmp_path / "dense", tmp_path / "moe", **{"config": MoeConfig(8)} | options)
    assert not (tmp_path / "moe").exists()
