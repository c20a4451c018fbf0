"""Models by their name on the Hugging Face Hub, from a cache laid out as its library does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

for extra in ("huggingface_hub", "ml_dtypes", "safetensors"):
    pytest.importorskip(extra)

import huggingface_hub
from huggingface_hub import constants
from safetensors.numpy import load_file, save_file

from adapters import change, make_adapter, merged
from folders import edit_json
from hub_server import Hub, serve
from moe_fast import CheckpointError, MoeConfig, RecipeError, build_moe, build_recipe, check_moe
from moe_fast.demo import make_dense_model
from moe_fast.models.folder import read_checkpoint
from moe_fast.storage.hub import find_model
from moe_fast.storage.safetensors_header import read_header

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
    with pytest.raises(CheckpointError, match=r"^'some/model' is not a local folder, and not a"):
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
    assert done.stderr.startswith("error: 'some/other' is not a local folder, and not a model")


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
    message = (
        r"(?s)^3 problems:.*'a/one' is not a local folder, and.*LocalEntryNotFound.*'a/b'.*'a/c'"
    )
    with pytest.raises(CheckpointError, match=message):
        build_moe(["a/one", "a/b"], "moe", CONFIG, base="a/c")
    assert not Path("moe").exists()


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = r"^'a/b' is not a local folder; to take it for a model on .*'moe-fast\[hub\]'$"
    with pytest.raises(CheckpointError, match=message):
        build_moe("a/b", "moe", CONFIG)


def test_a_snapshot_without_its_weights(hub):
    snapshot = cache(hub, "some/one", seed=0)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        build_moe("some/one", "moe", CONFIG)


# What a repository may hold, and whether it is fetched.
REMOTE = {
    "config.json": True,
    "model.safetensors": True,
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "tokenizer.model": True,
    "tokenizer.model.v3": True,
    "qwen.tiktoken": True,
    "chat_template.jinja": True,
    "additional_chat_templates/tool_use.jinja": True,
    "generation_config.json": True,
    "README.md": True,
    "model-00001-of-00002.safetensors": False,  # in no index
    "pytorch_model.bin": False,
    "model.pkl": False,
    "tokenizer.pkl": False,
    "tokenizer.py": False,
    "modeling_llama.py": False,
    "training_args.bin": False,
    "optimizer.pt": False,
    "consolidated.safetensors": False,
    "original/model.safetensors": False,
    "original/tokenizer.json": False,
    "additional_chat_templates/deeper/x.jinja": False,
    "onnx/config.json": False,
    "model.gguf": False,
}


@pytest.fixture
def online(tmp_path) -> Iterator[tuple[Path, str, type[Hub]]]:
    """A Hub that this machine serves: the folder of its repositories, its address, its handler."""
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as (address, handler):
        yield tmp_path / "served", address, handler


def fetch(hub: Path, address: str, *names: str) -> str:
    """The folders that a process finds for models, or its errors; by default for org/name.

    A process, because the library reads its environment once. It asks a server in trouble again and
    again, for half a minute in all; here, without waiting in between.
    """
    program = (
        "import sys, time\ntime.sleep = lambda seconds: None\n"
        "from moe_fast import CheckpointError\n"
        "from moe_fast.storage.hub import find_model\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        print(find_model(name))\n"
        "    except CheckpointError as error:\n        print('error:', error)\n"
    )
    environment = os.environ | {
        "HF_HUB_CACHE": str(hub),
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", program, *(names or ("org/name",))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def files_below(folder: Path) -> set[str]:
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if not f.is_dir()}


def split(folder: Path, names: list[str]) -> None:
    """Spread the weights of a folder over files of these names, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(names):
        part = dict(list(tensors.items())[i :: len(names)])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_only_what_a_model_folder_holds_is_fetched(hub, online):
    served, address, handler = online
    for name in REMOTE:
        (served / "org/name" / name).parent.mkdir(parents=True, exist_ok=True)
        (served / "org/name" / name).write_text(json.dumps({"name": name}))
    folder = Path(fetch(hub, address))
    assert files_below(folder) == {name for name, wanted in REMOTE.items() if wanted}
    assert sorted(handler.downloads) == sorted(files_below(folder))


SHARDS = [
    ["model.safetensors-00001-of-00002.safetensors", "model.safetensors-00002.safetensors"],
    ["pytorch_model-00001-of-00002.safetensors", "pytorch_model-00002-of-00002.safetensors"],
    ["weights[1].safetensors", "weights[2].safetensors", "anders.safetensors"],
    ["model.safetensors"],
]


def test_the_index_says_which_files_are_fetched(hub, online):
    served, address, _ = online
    for i, names in enumerate(SHARDS):
        make_dense_model(served / f"org/{i}", seed=i)
        split(served / f"org/{i}", names)
        (served / f"org/{i}/weights1.safetensors").write_text("of no index")
    folders = fetch(hub, address, *(f"org/{i}" for i in range(len(SHARDS)))).splitlines()
    for i, (folder, names) in enumerate(zip(folders, SHARDS, strict=True)):
        found = {name for name in files_below(Path(folder)) if name.endswith(".safetensors")}
        assert found == set(names)
        build_moe(folder, f"moe-{i}", CONFIG)
        assert check_moe(f"moe-{i}").passed


def test_an_index_cannot_ask_for_files_elsewhere(hub, online):
    served, address, _ = online
    make_dense_model(served / "org/name", seed=0)
    split(served / "org/name", ["part.safetensors"])
    index = served / "org/name/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../x.safetensors"}}))
    assert "must be the name of a .safetensors file in the same folder" in fetch(hub, address)


CODE = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_a_configuration_names_is_fetched(hub, online, file):
    served, address, _ = online
    make_dense_model(served / "org/name", seed=0)
    edit_json(served / "org/name" / file, **CODE)
    for name in ("tokenization_own.py", "imported_by_it.py", "scripts/train.py"):
        (served / "org/name" / name).parent.mkdir(exist_ok=True)
        (served / "org/name" / name).write_text("raise SystemExit")
    found = {n for n in files_below(Path(fetch(hub, address))) if n.endswith(".py")}
    assert found == {"tokenization_own.py", "imported_by_it.py"}


def know_tree(snapshot: Path, *further: str) -> None:
    """Let the cache know all files of the repository, as huggingface_hub 1.22 and later does."""
    (snapshot.parents[1] / "trees").mkdir()
    names = [*(file.name for file in snapshot.iterdir()), *further]
    files = {name: {"size": 1, "blob_id": "0" * 40} for name in names}
    tree = {"format_version": 1, "files": files}
    (snapshot.parents[1] / "trees" / f"{COMMIT}.json").write_text(json.dumps(tree))


OPTIONAL = ("README.md", "chat_template.jinja", "additional_chat_templates/rag.jinja", "x.model")


def test_a_cache_without_what_is_optional_is_complete(hub):
    for name in ("some/one", "some/two"):
        snapshot = cache(hub, name, seed=0)
        if name == "some/two":
            shutil.move(snapshot / "model.safetensors", snapshot / "a-1.safetensors")
            index = {
                "weight_map": dict.fromkeys(
                    read_header(snapshot / "a-1.safetensors"), "a-1.safetensors"
                )
            }
            (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
        know_tree(snapshot, *OPTIONAL)
        assert build_moe(name, f"{name}-moe", CONFIG).warnings == ()


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "served"])
def test_a_complete_cache_needs_no_network(hub, online, address):
    """It is down, or the repository is gone."""
    snapshot = cache(hub, "org/name", seed=0)
    know_tree(snapshot, *OPTIONAL)
    assert fetch(hub, online[1] if address == "served" else address) == str(snapshot)


def test_a_file_that_is_optional_may_fail(hub, online):
    served, address, handler = online
    make_dense_model(served / "org/name", seed=0)
    (served / "org/name/README.md").write_text("hello")
    handler.failing = {"README.md"}
    folder = fetch(hub, address)
    assert read_checkpoint(Path(folder)).keys() == read_checkpoint(served / "org/name").keys()
    handler.failing = {"model.safetensors"}
    shutil.rmtree(hub)
    message = fetch(hub, address)
    assert message.startswith("error: 'org/name': the Hub's cache has no model.safetensors, and it")


@pytest.mark.parametrize("missing", ["model.safetensors", "b.safetensors"])
def test_a_cache_without_what_is_needed_is_not_complete(hub, missing):
    snapshot = cache(hub, "some/one", seed=0)
    shutil.copy(snapshot / "model.safetensors", snapshot / "a.safetensors")
    if missing == "b.safetensors":
        index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model.safetensors").unlink()
    know_tree(snapshot, missing)
    match = rf"^'some/one': the Hub's cache has no {missing}, and it cannot be fetched: \w+"
    with pytest.raises(CheckpointError, match=match):
        build_moe("some/one", "moe", CONFIG)


def test_a_base_from_a_cache_without_its_tokenizer_is_warned_of(hub):
    one, two = cache(hub, "some/one", seed=0), cache(hub, "some/two", seed=0)
    for file in two.glob("tokenizer*"):
        file.unlink()
    know_tree(two, "tokenizer.json")
    assert build_moe([one, two], "moe", CONFIG).warnings == ()
    (warning,) = build_moe([two, one], "two", CONFIG).warnings
    assert warning.startswith(f"{two}: the Hub's cache has no tokenizer for it, so the output gets")


OTHERS = [
    (["adapter_model.bin", "README.md"], "holds adapter_model.bin: an adapter"),
    (["a.Q4.gguf", "README.md"], "holds a.Q4.gguf, and GGUF is not read: load it with transformer"),
    (["config.json", "consolidated.safetensors"], "a model in Mistral's own format; take"),
    (["config.json", "model-00001-of-00002.safetensors"], "holds 1 of 2 shards"),
    (["config.json", "pytorch_model.bin"], "holds pytorch_model.bin, a pickle file"),
    (["deeper/config.json"], "has no config.json"),
]


def test_repositories_of_something_else(hub, online):
    served, address, _ = online
    for i, (names, _) in enumerate(OTHERS):
        for name in names:
            (served / f"org/{i}" / name).parent.mkdir(parents=True, exist_ok=True)
            (served / f"org/{i}" / name).write_text("{}")
    (served / "org" / "lora").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (served / "org" / "lora" / name).write_text("{}")
    snapshot = Path(fetch(hub, address, "org/lora").strip())
    assert {file.name for file in snapshot.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    lines = fetch(hub, address, *(f"org/{i}" for i in range(len(OTHERS)))).splitlines()
    for i, (line, (_, message)) in enumerate(zip(lines, OTHERS, strict=True)):
        assert line.startswith(f"error: 'org/{i}' on the Hugging Face Hub h")
        assert message in line


def test_the_sources_are_the_real_files(hub):
    """The manifest knows the snapshot, which has the commit in its name."""
    cache(hub, "some/one", seed=0)
    build_moe("some/one", "moe", CONFIG)
    manifest = json.loads(Path("moe/moe_fast.json").read_text())
    assert Path(manifest["request"]["base"]).name == COMMIT


def test_an_adapter_of_the_cache(hub, tmp_path):
    """By its own name, whose base is a name too, and beside a model."""
    base = cache(hub, "org/base", seed=1)
    adapter = make_adapter(tmp_path / "made", base, base_model_name_or_path="org/base")
    snapshot = hub / "models--org--lora" / "snapshots" / COMMIT
    shutil.copytree(adapter, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    merged(base, adapter, tmp_path / "merged")
    build_moe(tmp_path / "merged", tmp_path / "expected", CONFIG)
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    for number, source in enumerate(("org/lora", "org/base+org/lora", f"{base}+org/lora")):
        output = tmp_path / f"moe{number}"
        build_moe(source, output, CONFIG)
        found = load_file(output / "model.safetensors")
        assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)
    change(snapshot, base_model_name_or_path="org/other")
    with pytest.raises(CheckpointError, match="its base is not here: 'org/other' is not a local"):
        build_moe("org/lora", tmp_path / "refused", CONFIG)


def test_an_address_elsewhere_is_refused_as_one():
    with pytest.raises(
        CheckpointError, match=r"^https://example\.com/model: is not a model's address"
    ):
        find_model("https://example.com/model")
