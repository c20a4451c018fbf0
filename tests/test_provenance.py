"""The model card and the metadata that an output carries: true, valid, and nobody's secret."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

for extra in ("safetensors", "ml_dtypes", "typer"):
    pytest.importorskip(extra)

from safetensors import safe_open

from families import make_model
from moe_fast import ExpertSource, MoeConfig, build_moe, build_recipe
from moe_fast.checkpoint.card import model_name
from moe_fast.demo import make_dense_model

yaml = pytest.importorskip("yaml")

CONFIG = MoeConfig(num_experts=4)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    make_dense_model(tmp_path / "dense", seed=0)
    return tmp_path / "dense"


def card(moe: Path) -> tuple[dict, str]:
    """The metadata of a card, read as YAML, and its text."""
    text = (moe / "README.md").read_text(encoding="utf-8")
    start, header, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(header), body


def copied(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    return folder


def metadata_of(moe: Path) -> dict[str, str]:
    with safe_open(moe / "model.safetensors", "numpy") as file:
        return file.metadata()


def test_a_card_says_where_experts_come_from(dense, tmp_path):
    second = copied(dense, tmp_path / "second")
    models = [ExpertSource(dense), ExpertSource(second, noise_scale=0.01, residual_scale=0.5)]
    build_moe(models, tmp_path / "moe", CONFIG)
    metadata, body = card(tmp_path / "moe")
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": ["dense", "second"],
        "tags": ["moe", "merge", "moe_fast", "mixtral"],
    }
    assert "# Mixtral of 4 experts from dense, second" in body
    assert "| 0, 2 | dense | the same | none |" in body
    assert "| 1, 3 | second | the same | noise of 0.01 and output times 0.5 |" in body
    assert "Everything else comes from dense." in body
    assert "Readers: transformers 4, transformers 5, vLLM, llama.cpp." in body
    assert metadata_of(tmp_path / "moe")["experts"] == "0, 2: dense; 1, 3: second"


def test_source_layers_and_shared_experts_are_told(dense, tmp_path):
    build_moe(ExpertSource(dense, source_layers=[1, 0]), tmp_path / "moe", CONFIG)
    assert "| 0-3 | dense | 1, 0 | none |" in card(tmp_path / "moe")[1]
    build_moe(dense, tmp_path / "shared", CONFIG, target="deepseek", shared_experts=dense)
    body = card(tmp_path / "shared")[1]
    assert "Every token also goes through the FFN of dense." in body
    assert "trust_remote_code=True" in body
    assert "transformers 5 does not load it: has no deepseek of its own." in body


def test_a_fused_output_says_who_does_not_read_it(dense, tmp_path):
    build_moe(dense, tmp_path / "moe", CONFIG, layout="fused")
    body = card(tmp_path / "moe")[1]
    assert "Readers: transformers 5." in body
    assert "vLLM does not load it: does not read the fused layout; convert it" in body


def recipe_in(moe: Path) -> str:
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card(moe)[1], flags=re.DOTALL)
    return recipe


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        (
            {"noise_scale": 1e-05, "residual_scale": 0.5, "source_layers": (1, 0)},
            {"seed": 7, "routers": "random", "dtype": "bfloat16", "layout": "fused"},
        ),
        (
            {"positive_prompts": ('a "b": {c}', "new\nline `x` ü🙂"), "negative_prompts": ["# no"]},
            {"routers": "cheap_embed"},
        ),
        ({}, {"target": "qwen2_moe", "shared_experts": "second", "dense_layers": [1]}),
    ],
    ids=["plain", "changed", "prompts", "shared and dense"],
)
def test_the_recipe_of_a_card_builds_the_same_again(dense, tmp_path, monkeypatch, changes, options):
    monkeypatch.chdir(tmp_path)
    make_dense_model(tmp_path / "second", seed=1)
    prompts = {"positive_prompts": ["other"]} if options.get("routers") else {}
    models = [ExpertSource("dense", **prompts), ExpertSource("second", **changes)]
    build_moe(models, "moe", CONFIG, base="second", **options)
    (tmp_path / "recipe.yml").write_text(recipe_in(tmp_path / "moe"), encoding="utf-8")
    report = build_recipe("recipe.yml", "again")
    for file in (tmp_path / "moe").iterdir():
        assert (report.output / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_recipe_too_long_for_a_card_is_in_the_manifest(dense, tmp_path):
    models = [ExpertSource(dense, positive_prompts=["x" * 20_000])]
    build_moe(models, tmp_path / "moe", CONFIG)
    body = card(tmp_path / "moe")[1]
    assert "It is in the manifest, `moe_fast.json`." in body
    assert "xxx" not in body


def test_no_path_leaves_the_machine(dense, tmp_path):
    build_moe([dense, copied(dense, tmp_path / "b")], tmp_path / "moe", CONFIG)
    assert str(tmp_path) not in (tmp_path / "moe" / "README.md").read_text()
    assert not any(str(tmp_path) in value for value in metadata_of(tmp_path / "moe").values())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/models/dense", "dense"),
        ("/cache/hub/models--org--A-model.v2/snapshots/0a1b2c", "org/A-model.v2"),
        ("/cache/hub/models--gpt2/snapshots/0a1b2c/", "gpt2"),
        ("/cache/hub/models--org--a/snapshots/0a1b2c/sub", "sub"),
        ("/", "model"),
    ],
)
def test_models_are_named_as_people_know_them(path, name):
    assert model_name(path) == name


def test_folders_of_one_name_are_told_apart(dense, tmp_path):
    other = copied(dense, tmp_path / "elsewhere" / "dense")
    build_moe([dense, other], tmp_path / "moe", CONFIG)
    body = card(tmp_path / "moe")[1]
    assert "| 0, 2 | dense | the same |" in body
    assert "| 1, 3 | dense (2) | the same |".replace("(2)", "\\(2\\)") in body


ODD = [
    'quo"te',
    "back`tick`s",
    "a | b",
    "- list",
    "key: value # comment",
    "ünïcode 模型 🙂",
    "*[link](x)*",
    "'single'",
    "&anchor !tag %",
    "tab\there",
]
if sys.platform != "win32":
    ODD += ["line\nbreak", "back\\slash", "bell\a", "\u202eright to left"]


@pytest.mark.parametrize("name", ODD if sys.platform != "win32" else ODD[3:6])
def test_odd_names_keep_the_card_valid(dense, tmp_path, name):
    odd = dense.rename(tmp_path / name)
    build_moe(odd, tmp_path / "moe", CONFIG)
    metadata, body = card(tmp_path / "moe")
    assert metadata["tags"][0] == "moe"
    assert "base_model" not in metadata  # the Hub would refuse such a name
    assert yaml.safe_load(recipe_in(tmp_path / "moe"))["base_model"] == name
    rows = [line for line in body.splitlines() if line.startswith("| 0-3 |")]
    assert len(rows) == 1
    assert rows[0].replace(r"\|", "").count("|") == 5


def test_a_name_that_is_no_unicode(dense, tmp_path):
    if sys.platform in ("win32", "darwin"):
        pytest.skip("file names are Unicode here")
    odd = dense.rename(tmp_path / "by\udc80te")
    build_moe(odd, tmp_path / "moe", CONFIG)
    assert "| 0-3 | by?te |" in card(tmp_path / "moe")[1]


CARD = """---
license: apache-2.0
language:
- en
license_link: "https://example.org/LICENSE"
---
# The dense model
"""


@pytest.mark.parametrize(
    ("text", "license_values"),
    [
        (CARD, {"license": "apache-2.0", "license_link": "https://example.org/LICENSE"}),
        (CARD.replace("apache-2.0", "[mit, apache-2.0]"), {"license_link": CARD.split('"')[1]}),
        ("license: mit\n", {}),
        ("---\nlicense: mit\n", {}),
        ("", {}),
        ("---\nlicense: !!python/object:os.system x\n---\n", {}),
        (None, {}),
    ],
    ids=["plain", "list", "no front matter", "unclosed", "empty", "tag", "none"],
)
def test_the_license_is_the_base_models(dense, tmp_path, text, license_values):
    if text is not None:
        (dense / "README.md").write_text(text)
    build_moe(dense, tmp_path / "moe", CONFIG)
    metadata, body = card(tmp_path / "moe")
    assert {k: v for k, v in metadata.items() if k.startswith("license")} == license_values
    assert "The dense model" not in body
    if text is not None:
        assert (dense / "README.md").read_text() == text


def test_a_card_that_is_no_text_is_left_alone(dense, tmp_path):
    (dense / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    build_moe(dense, tmp_path / "moe", CONFIG)
    assert "license" not in card(tmp_path / "moe")[0]


def test_many_experts_stay_short(dense, tmp_path):
    models = [copied(dense, tmp_path / f"model-with-a-long-name-{i}") for i in range(64)]
    build_moe(models, tmp_path / "moe", MoeConfig(num_experts=64))
    assert len(metadata_of(tmp_path / "moe")["experts"]) < 1100
    assert "from model-with-a-long-name-0, " in card(tmp_path / "moe")[1]
    assert ", ...\n" in card(tmp_path / "moe")[1]


def test_the_hubs_library_reads_the_card(dense, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    (dense / "README.md").write_text(CARD)
    build_moe(dense, tmp_path / "moe", CONFIG)
    data = hub.ModelCard.load(tmp_path / "moe" / "README.md").data
    assert data.library_name == "transformers"
    assert data.base_model == "dense" or data.base_model == ["dense"]
    assert data.license == "apache-2.0"
    assert data.tags == ["moe", "merge", "moe_fast", "mixtral"]


def test_metadata_is_in_every_shard(tmp_path):
    make_model(tmp_path / "dense", "qwen3")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, max_shard_size="200kB")
    shards = sorted((tmp_path / "moe").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safe_open(shard, "numpy") as file:
            assert file.metadata()["experts"] == "0-3: dense"
            assert file.metadata()["format"] == "pt"
