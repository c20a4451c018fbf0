"""Routers made from texts, judged by what transformers' own routers do with other texts."""

from __future__ import annotations

import json
import re
import string
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn.cluster import KMeans
from sklearn.linear_model import Ridge
from transformers import AutoModelForCausalLM

from command import run
from families import OWN, make_model
from moe_fast import (
    CheckpointError,
    ExpertSource,
    MoeConfig,
    MoeConfigError,
    build_moe,
    build_recipe,
    check_moe,
    design_moe,
    inspect_model,
    reroute_moe,
)
from moe_fast.calibration.clustering import spherical_k_means, unit_rows
from moe_fast.calibration.kinds import ridge_rows
from moe_fast.demo import make_dense_model

RNG = np.random.default_rng(0)
GATE = "model.layers.{}.block_sparse_moe.gate.weight"


def words(count: int, seed: int, alphabet: str = string.ascii_letters) -> str:
    """Text of made-up words, with lengths and letters as uneven as in a language."""
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(10, len(alphabet) + 10)
    return " ".join(
        "".join(generator.choice(list(alphabet), size=n, p=weights / weights.sum()))
        for n in generator.integers(2, 9, size=count)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two dense models whose tokens share a direction, as trained ones do, and texts."""
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(("a", "b")):
        make_dense_model(folder / name, seed=seed)
        file = folder / name / "model.safetensors"
        tensors = load_file(file)
        shared = np.random.default_rng(5).standard_normal(64).astype(np.float32)
        table = tensors["model.embed_tokens.weight"]
        tensors["model.embed_tokens.weight"] = table + table.std() * shared
        save_file(tensors, file, metadata={"format": "pt"})
    (folder / "used.txt").write_text(words(1500, 1))
    (folder / "other.txt").write_text(words(400, 2))
    (folder / "digits.txt").write_text(words(1500, 3, "0123456789"))
    return folder


def bytes_of(file: Path, length: int = 256) -> torch.Tensor:
    """The text as the byte tokens of the small model."""
    data = list(file.read_bytes())
    return torch.tensor(data[: len(data) // length * length]).reshape(-1, length)


def routed(moe: Path, tokens: torch.Tensor) -> list[np.ndarray]:
    """How many tokens transformers sends to each expert, layer by layer."""
    model = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(tokens, output_router_logits=True).router_logits
    k, experts = model.config.num_experts_per_tok, logits[0].shape[-1]
    chosen = [layer.topk(k, dim=-1).indices.flatten() for layer in logits]
    return [torch.bincount(each, minlength=experts).numpy() for each in chosen]


def load_cv(moe: Path, tokens: torch.Tensor) -> float:
    """The greatest coefficient of variation of the load over the layers."""
    return max(float(load.std() / load.mean()) for load in routed(moe, tokens))


@pytest.mark.parametrize("method", ["calibrated", "clustered"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_is_even_on_other_text_in_transformers(folder, tmp_path, method, dtype):
    moe = tmp_path / "moe"
    options = {"texts": folder / "used.txt", "tokens_used": 6000, "dtype": dtype}
    report = build_moe(folder / "a", moe, MoeConfig(8, 2), routers=method, **options)
    build_moe(folder / "a", tmp_path / "balanced", MoeConfig(8, 2), routers="balanced", dtype=dtype)
    other = bytes_of(folder / "other.txt")
    assert load_cv(tmp_path / "balanced", other) > 0.5
    assert load_cv(moe, other) < 0.3
    health = report.routers
    assert health.hidden_states == "held-out tokens of the texts"
    assert health.num_tokens == pytest.approx(1500, abs=10)
    assert max(health.coefficient_of_variation) < 0.3
    assert min(health.coefficient_of_variation_before) > max(health.coefficient_of_variation)
    assert check_moe(moe).passed


@pytest.mark.parametrize("family", OWN)
def test_every_family_is_read(family, tmp_path):
    dense = make_model(tmp_path / "dense", family, num_hidden_layers=3)
    np.save(tmp_path / "tokens.npy", RNG.integers(96, size=(20, 40)))
    report = build_moe(
        dense, tmp_path / "moe", MoeConfig(4, 2), routers="calibrated",
        tokens=tmp_path / "tokens.npy",
    )  # fmt: skip
    assert report.routers.num_tokens == 800
    assert max(report.routers.coefficient_of_variation) < 0.15
    assert check_moe(tmp_path / "moe").passed


@pytest.mark.parametrize("method", ["calibrated", "clustered", "normal"])
def test_logits_are_as_sharp_as_asked_on_real_tokens(folder, tmp_path, method):
    text = folder / "used.txt"
    build_moe(
        folder / "a", tmp_path / "moe", MoeConfig(8, 2), routers=method, texts=text, logit_std=5
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(bytes_of(text), output_router_logits=True).router_logits
    for layer in logits:
        found = layer.double().var(dim=-1, correction=0).mean().sqrt()
        assert float(found) == pytest.approx(5, rel=0.01)
    assert check_moe(tmp_path / "moe").passed


@pytest.mark.parametrize("kind", ["array", "sequences"])
def test_tokens_in_memory_are_those_of_a_file(folder, tmp_path, kind):
    tokens = bytes_of(folder / "used.txt", 100).numpy()
    np.save(tmp_path / "tokens.npy", tokens)
    given = tokens if kind == "array" else [row.tolist() for row in tokens]
    for name, each in {"file": tmp_path / "tokens.npy", "memory": given}.items():
        build_moe(folder / "a", tmp_path / name, MoeConfig(4), tokens=each)
        assert check_moe(tmp_path / name).passed
    folders = tmp_path / "file", tmp_path / "memory"
    rows, same = (load_file(each / "model.safetensors")[GATE.format(1)] for each in folders)
    assert rows.tobytes() == same.tobytes()
    said = f"{tokens.size} tokens with the SHA-256"
    assert said in (tmp_path / "memory" / "moe_fast.json").read_text()
    design = design_moe(folder / "a", MoeConfig(4), tokens=given)
    assert design.read(GATE.format(1)).tobytes() == rows.tobytes()
    reroute_moe(tmp_path / "memory", tmp_path / "again", tokens=given)
    assert check_moe(tmp_path / "again").passed
    for wrong, message in (
        (tokens + 256 - tokens.max(), "tokens must be tokens of the model, 0 to 255, got 256"),
        (tokens / 2, "tokens must be integers of shape"),
    ):
        with pytest.raises(MoeConfigError, match=message):
            design_moe(folder / "a", MoeConfig(4), tokens=wrong)


def test_same_seed_same_rows_and_another_seed_others(folder):
    def rows(seed: int) -> bytes:
        design = design_moe(
            folder / "a", MoeConfig(4), routers="clustered", texts=folder / "used.txt", seed=seed,
            tokens_used=500,
        )  # fmt: skip
        return design.read_bytes(GATE.format(1))

    assert rows(1) == rows(1)
    assert rows(1) != rows(2)


def test_check_needs_neither_text_nor_torch(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(words(300, 1))
    moe = tmp_path / "moe"
    build_moe(folder / "a", moe, MoeConfig(4), routers="calibrated", texts=text)
    text.unlink()
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from moe_fast import check_moe\n"
        f"report = check_moe({str(moe)!r})\n"
        "print(report.passed, report['routers'].summary)\n"
    )
    (tmp_path / "check.py").write_text(script)
    done = run_python(tmp_path / "check.py")
    assert done == "True 2 routers equal what was asked for, byte for byte\n"
    tensors = load_file(moe / "model.safetensors")
    tensors[GATE.format(0)][0, 0] += 1
    save_file(tensors, moe / "model.safetensors", metadata={"format": "pt"})
    assert check_moe(moe)["routers"].status == "failed"


def run_python(script: Path) -> str:
    import subprocess

    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("experts", [2, 6])
@pytest.mark.parametrize("method", ["ridge", "means"])
def test_kinds_find_their_experts(folder, tmp_path, method, experts):
    models = [
        ExpertSource(folder / "a", texts=(str(folder / "used.txt"),)),
        ExpertSource(folder / "b", texts=(str(folder / "digits.txt"),)),
    ]
    moe = tmp_path / "moe"
    report = build_moe(models, moe, MoeConfig(experts, 1), routers=method)
    assert "tokens of the texts" in report.routers.hidden_states
    for kind, name in enumerate(("other.txt", "digits.txt")):
        for load in routed(moe, bytes_of(folder / name)):
            assert load[kind::2].sum() > 0.9 * load.sum()
            if experts > 2:  # its experts share the text of their kind
                assert load[kind::2].min() > 0.15 * load.sum()
    assert check_moe(moe).passed


def test_a_recipe_gives_texts_by_source(folder, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"models:\n- source_model: {folder}/a\n  texts: [{folder}/used.txt]\n"
        f"- source_model: {folder}/b\n  texts: [{folder}/digits.txt]\n"
        "num_experts: 4\nrouters: ridge\nlogit_std: 4\ntokens_used: 2000\ndtype: float32\n"
    )
    build_recipe(recipe, tmp_path / "recipe")
    models = [
        ExpertSource(folder / name, texts=(f"{folder}/{text}",))
        for name, text in (("a", "used.txt"), ("b", "digits.txt"))
    ]
    build_moe(
        models, tmp_path / "python", MoeConfig(4), routers="ridge", logit_std=4, tokens_used=2000,
        dtype="float32",
    )  # fmt: skip
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("recipe", "python"))
    assert first[GATE.format(1)].tobytes() == second[GATE.format(1)].tobytes()
    request = json.loads((tmp_path / "recipe" / "moe_fast.json").read_text())["request"]
    assert request["routers"]["tokens_used"] == 2000


def test_fine_grained_rows_are_those_of_copies(folder, tmp_path):
    report = build_moe(
        folder / "a", tmp_path / "moe", MoeConfig(16, 4), granularity=4, routers="calibrated",
        texts=folder / "used.txt",
    )  # fmt: skip
    rows = load_file(tmp_path / "moe" / "model.safetensors")[GATE.format(0)]
    assert (rows.reshape(4, 4, -1) == rows.reshape(4, 4, -1)[:, :1]).all()
    assert len({row.tobytes() for row in rows}) == 4
    health = report.routers
    assert max(health.coefficient_of_variation) < 0.3
    assert min(health.coefficient_of_variation_before) > max(health.coefficient_of_variation)
    assert check_moe(tmp_path / "moe").passed


def test_the_command(folder, tmp_path):
    options = ("--experts", "4", "--routers", "calibrated", "--tokens-used", "2000")
    texts = ("--text", folder / "used.txt", "--text", folder / "digits.txt")
    done = run("build", folder / "a", "-o", tmp_path / "moe", *options, *texts)
    assert done.returncode == 0, done.stderr
    assert "held-out tokens of the texts" in done.stdout
    done = run("build", folder / "a", "-o", tmp_path / "moe2", *texts, "--json")
    health = json.loads(done.stdout)["routers"]
    assert health["hidden_states"] == "tokens of the texts"
    assert max(health["coefficient_of_variation"]) > 0.5


def test_k_means_is_as_good_as_scikit_learns():
    centres = unit_rows(RNG.standard_normal((12, 32)))
    vectors = centres[RNG.integers(12, size=3000)] + 0.2 * RNG.standard_normal((3000, 32))
    vectors = unit_rows(vectors)
    ours, theirs = [], []
    for seed in range(8):
        centroids, labels = spherical_k_means(vectors, 12, seed=seed, balanced=False)
        ours.append(float((vectors * centroids[labels]).sum()))
        fitted = KMeans(12, n_init=1, random_state=seed).fit(vectors)
        centres = unit_rows(fitted.cluster_centers_)
        theirs.append(float((vectors * centres[fitted.labels_]).sum()))
    assert max(ours) > 0.999 * max(theirs)
    assert np.mean(ours) > 0.98 * np.mean(theirs)


def test_ridge_is_scikit_learns():
    inputs = [RNG.standard_normal((n, 30)).astype(np.float32) + 0.1 * n for n in (50, 70, 90)]
    x, y = np.concatenate(inputs), np.repeat(np.eye(3), [50, 70, 90], axis=0)
    fitted = Ridge(alpha=1e-2, fit_intercept=False).fit(x.astype(np.float64), y).coef_
    np.testing.assert_allclose(ridge_rows(inputs), unit_rows(fitted), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"^texts must be files of text, unless tokens are given: routers='calibrated' are"),
        ({"texts": "e"}, r"^texts must be at least 160 tokens, 20 for each of 8 experts, got 1$"),
        (
            {"texts": "e" * 159},
            r"^texts must be at least 160 tokens, 20 for each of 8 experts, got 159$",
        ),
        (
            {"texts": "e" * 500},
            r"^texts must vary, for 8 experts to be told apart: 500 tokens have 1 different ones$",
        ),
        (
            {"texts": "the quick brown fox " * 50, "tokens_used": 159},
            r"^tokens_used must be at least 160 tokens, 20 for each of 8 experts, got 159$",
        ),
        (
            {"texts": "the quick brown fox " * 50, "device": "abacus"},
            r"^device must be a device of torch's here, .* got 'abacus'",
        ),
        (
            {"texts": "the quick brown fox " * 50, "hidden_states": np.zeros((1, 64))},
            r"^hidden_states must not stand beside texts or tokens",
        ),
        (
            {"texts": Path("notes.log")},
            r"^texts must be files ending in \.txt, \.md, \.jsonl, got notes\.log$",
        ),
    ],
)
def test_texts_that_make_no_routers(folder, tmp_path, options, message):
    with pytest.raises(MoeConfigError, match=message):
        build_moe(folder / "a", tmp_path / "moe", MoeConfig(8), routers="calibrated", **options)
    assert not (tmp_path / "moe").exists()


def test_kinds_that_are_none(folder, tmp_path):
    text = str(folder / "used.txt")
    with pytest.raises(MoeConfigError, match=r"^routers 'ridge' tells the texts of several"):
        build_moe(folder / "a", tmp_path / "moe", MoeConfig(4), routers="ridge", texts=text)
    models = [ExpertSource(folder / "a", texts=(text,)), ExpertSource(folder / "b")]
    with pytest.raises(MoeConfigError, match=r"give each of them texts .*b has none$"):
        build_moe(models, tmp_path / "moe", MoeConfig(4), routers="means")


def test_hidden_states_that_are_not_finite(folder, tmp_path):
    make_dense_model(tmp_path / "dense", seed=0)
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] = np.inf
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the router of layer 1 reads .* is not finite"):
        build_moe(
            tmp_path / "dense", tmp_path / "moe", MoeConfig(4), routers="calibrated",
            texts=folder / "used.txt",
        )  # fmt: skip
    assert not (tmp_path / "moe").exists()


def different_experts(folder: Path, output: Path, **options) -> Path:
    """An MoE whose experts differ, so that routers decide what later layers read."""
    models = [ExpertSource(folder / name, noise_scale=0.1) for name in ("a", "b")]
    build_moe(models, output, MoeConfig(8, 2), dtype="float32", seed=4, **options)
    return output


@pytest.mark.parametrize("method", ["calibrated", "clustered"])
@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe"])
def test_a_finished_model_is_rerouted_evenly(folder, tmp_path, method, target):
    moe = different_experts(folder, tmp_path / "moe", target=target)
    report = reroute_moe(moe, tmp_path / "even", method, texts=folder / "used.txt")
    other = bytes_of(folder / "other.txt")
    assert load_cv(moe, other) > 0.6
    assert load_cv(tmp_path / "even", other) < 0.3
    assert min(report.routers.coefficient_of_variation_before) > 0.6
    assert max(report.routers.coefficient_of_variation) < 0.3
    assert check_moe(tmp_path / "even").passed
    old, new = (load_file(f / "model.safetensors") for f in (moe, tmp_path / "even"))
    changed = {name for name in new if new[name].tobytes() != old[name].tobytes()}
    assert len(changed) == 2
    assert all(name.endswith("gate.weight") for name in changed)


def test_the_said_load_is_that_behind_the_new_routers(folder, tmp_path):
    """Counted by transformers on the tokens that were used, in the rerouted model."""
    moe = different_experts(folder, tmp_path / "moe")
    np.save(tmp_path / "tokens.npy", bytes_of(folder / "used.txt", 200).numpy())
    report = reroute_moe(moe, tmp_path / "even", tokens=tmp_path / "tokens.npy", tokens_used=10**6)
    used = bytes_of(folder / "used.txt", 200)
    found = [load.std() / load.mean() for load in routed(tmp_path / "even", used)]
    assert report.routers.coefficient_of_variation == pytest.approx(found, abs=2e-3)


def test_inspect_says_what_transformers_routes(folder, tmp_path):
    moe = different_experts(folder, tmp_path / "moe")
    tokens = bytes_of(folder / "other.txt", 100)
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    report = inspect_model(moe, tokens=tmp_path / "tokens.npy", copies=False)
    assert report.hidden_states == "tokens of the texts"
    expected = [load.std() / load.mean() for load in routed(moe, tokens)]
    found = [router.coefficient_of_variation for router in report.routers]
    assert found == pytest.approx(expected, abs=2e-3)
    done = run("inspect", moe, "--no-copies", "--text", folder / "other.txt")
    assert done.returncode == 0, done.stderr
    assert "predicted on tokens of the texts" in done.stdout.replace("\n", " ")
    done = run("report", moe, "-o", tmp_path / "moe.html", "--text", folder / "other.txt")
    assert done.returncode == 0, done.stderr
    said = re.search(r"tokens of the texts, the load’s coefficient of variation is ([\d.]+) to "
                     r"([\d.]+)", (tmp_path / "moe.html").read_text("utf-8"))  # fmt: skip
    assert said is not None
    report = inspect_model(moe, texts=folder / "other.txt", copies=False)
    found = [router.coefficient_of_variation for router in report.routers]
    assert float(said[1]) == pytest.approx(min(found), abs=6e-4)
    assert float(said[2]) == pytest.approx(max(found), abs=6e-4)
    with pytest.raises(MoeConfigError, match="hidden_states, or texts or tokens"):
        inspect_model(moe, texts="a text", hidden_states=np.zeros((1, 64)))
