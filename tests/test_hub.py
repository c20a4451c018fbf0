"""Models by their name on the Hugging Face Hub, from a cache laid out as its library does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

for extra in ("huggingface_hub", "ml_dtypes", "safetensors"):
    pytest.importorskip(extra)

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from moe_fast import CheckpointError, MoeConfig, RecipeError, build_moe, build_recipe, check_moe
from moe_fast.demo import make_dense_model
from moe_fast.storage.hub import FETCHED, OF_FOLDERS, find_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = MoeConfig(num_experts=2)


def cache(cache: Path, name: str, seed: int, revision: str = "main") -> Path:
    """A model in the cache: blobs named by digest, a snapshot of links to them, a reference."""
    make_dense_model(cache / "made", seed=seed)
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for made in (folder / "blobs", folder / "refs", snapshot):
        made.mkdir(parents=True)
    for file in (cache / "made").iterdir():
        blob = folder / "blobs" / sha256(file.read_bytes()).hexdigest()
        shutil.move(file, blob)
        if os.name == "nt":  # where links take privileges, the library copies
            shutil.copy(blob, snapshot / file.name)
        else:
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (folder / "refs" / revision).write_text(COMMIT)
    return snapshot


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache, no network, and an empty folder to work in."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # The library reads the environment once, when it is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_a_name_is_the_folder_in_the_cache(hub):
    snapshot = cache(hub, "some/dense-model", seed=0)
    assert find_model("some/dense-model") == str(snapshot)
    assert find_model(Path("some/dense-model")) == str(snapshot)
    assert find_model(f"some/dense-model@{COMMIT}") == str(snapshot)


def test_a_path_is_a_name_where_backslashes_separate(hub, monkeypatch):
    snapshot = cache(hub, "some/dense-model", seed=0)
    monkeypatch.setattr(os, "sep", "\\")
    assert find_model("some\\dense-model") == str(snapshot)


def test_a_revision_is_asked_for_by_its_name(hub):
    snapshot = cache(hub, "some/model", seed=0, revision="v2")
    assert find_model("some/model@v2") == str(snapshot)
    with pytest.raises(CheckpointError, match=r"^'some/model' is no folder here, and no model"):
        find_model("some/model")


def test_a_folder_of_that_name_wins(hub):
    cache(hub, "some/model", seed=0)
    make_dense_model("some/model", seed=1)
    assert find_model("some/model") == str(Path.cwd() / "some/model")


@pytest.mark.parametrize("name", ["model", "a/b/c", "/a/b", "../a", "./a/b", "a/b+lora", "a/.b"])
def test_what_cannot_be_a_name_is_a_folder(name):
    assert find_model(name) == str(Path(name).absolute())


def test_what_is_built_from_names_is_what_is_built_from_their_folders(hub):
    one, two = cache(hub, "some/one", seed=0), cache(hub, "some/two", seed=1)
    build_moe(["some/one", "some/two"], "named", CONFIG, base="some/two", target="mixtral")
    build_moe([one, two], "paths", CONFIG, base=two)
    for left, right in zip(
        sorted(Path("named").iterdir()), sorted(Path("paths").iterdir()), strict=True
    ):
        assert left.read_bytes() == right.read_bytes()
    assert check_moe("named").passed
    card = Path("named/README.md").read_text()
    assert '- "some/two"\n- "some/one"\n' in card  # as the Hub's metadata has them
    assert str(hub) not in card


def test_the_command(hub):
    pytest.importorskip("typer")
    cache(hub, "some/one", seed=0)
    command = [sys.executable, "-m", "moe_fast", "build", "some/one", "-o", "moe"]
    subprocess.run(command, check=True, capture_output=True)
    assert check_moe("moe").passed
    command[4] = "some/other"
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'some/other' is no folder here, and no model that the ")


def test_recipes(hub):
    pytest.importorskip("yaml")
    one, two = cache(hub, "some/one", seed=0), cache(hub, "some/two", seed=1)
    Path("recipe.yml").write_text(f"""\
base_model: some/one
gate_mode: random
experts:
  - source_model: some/one
  - source_model:
      model:
        path: some/two
        revision: {COMMIT}
""")
    report = build_recipe("recipe.yml", "moe")
    assert report.experts == ((str(one),), (str(two),))
    assert check_moe("moe").passed


def test_a_recipe_names_the_line_of_each_model_that_is_not_there(hub):
    pytest.importorskip("yaml")
    cache(hub, "some/one", seed=0)
    Path("recipe.yml").write_text("""\
base_model: some/one
gate_mode: random
experts:
  - source_model: some/one
  - source_model: some/two
  - source_model: some/three
""")
    with pytest.raises(RecipeError, match=r"^2 problems:") as error:
        build_recipe("recipe.yml", "moe")
    for line, problem in zip((5, 6), error.value.problems, strict=True):
        assert problem.startswith(f"recipe.yml:{line}: experts[{line - 4}].source_model: 'some/t")
    assert not Path("moe").exists()


def test_nothing_is_looked_for_while_a_recipe_is_wrong(monkeypatch):
    pytest.importorskip("yaml")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    Path("recipe.yml").write_text("models: [some/one]\nnum_expert: 2\n")
    with pytest.raises(RecipeError, match=r"recipe\.yml:2: num_expert: unknown key; did you mean"):
        build_recipe("recipe.yml", "moe")


def test_all_that_are_missing_are_named():
    message = r"(?s)^3 problems:.*'a/one' is no folder here, and.*LocalEntryNotFound.*'a/b'.*'a/c'"
    with pytest.raises(CheckpointError, match=message):
        build_moe(["a/one", "a/b"], "moe", CONFIG, base="a/c")
    assert not Path("moe").exists()


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = r"^'a/b' is no folder here; to take it for a model on .*'moe-fast\[hub\]'$"
    with pytest.raises(CheckpointError, match=message):
        build_moe("a/b", "moe", CONFIG)


def test_a_snapshot_without_its_weights(hub):
    snapshot = cache(hub, "some/one", seed=0)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        build_moe("some/one", "moe", CONFIG)


REMOTE = {
    "config.json": True,
    "model.safetensors": True,
    "model-00001-of-00002.safetensors": True,
    "model.safetensors.index.json": True,
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "tokenizer.model": True,
    "generation_config.json": True,
    "README.md": True,
    "pytorch_model.bin": False,
    "model.pkl": False,
    "tokenizer.pkl": False,
    "tokenizer.py": False,
    "modeling_llama.py": False,
    "training_args.bin": False,
    "optimizer.pt": False,
    "consolidated.safetensors": False,
    "original/model.safetensors": False,
    "onnx/config.json": False,
    "model.gguf": False,
}


def test_only_what_a_model_folder_holds_is_fetched(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **how: asked.update(how) or "folder"
    )
    find_model("a/b")
    patterns = {key: asked[f"{key}_patterns"] for key in ("allow", "ignore")}
    assert patterns == {"allow": FETCHED, "ignore": OF_FOLDERS}
    fetched = filter_repo_objects(REMOTE, allow_patterns=FETCHED, ignore_patterns=OF_FOLDERS)
    assert list(fetched) == [name for name, wanted in REMOTE.items() if wanted]


def test_the_sources_are_the_real_files(hub):
    """The manifest knows the snapshot, which has the commit in its name."""
    cache(hub, "some/one", seed=0)
    build_moe("some/one", "moe", CONFIG)
    manifest = json.loads(Path("moe/moe_fast.json").read_text())
    assert Path(manifest["request"]["base"]).name == COMMIT
