"""The manifest of an output, and what happens to one that was tampered with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

for extra in ("ml_dtypes", "safetensors"):
    pytest.importorskip(extra)

from moe_fast import CheckpointError, MoeConfig, build_moe
from moe_fast.checkpoint.manifest import MANIFEST, read_manifest
from moe_fast.demo import make_dense_model


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("manifest")
    make_dense_model(folder / "dense", seed=0)
    build_moe(folder / "dense", folder / "moe", MoeConfig(3), max_shard_size="100kB", checksum=True)
    return folder


def test_every_file_is_recorded(built):
    moe = built / "moe"
    manifest = read_manifest(moe)
    assert manifest.files.keys() == {p.name for p in moe.iterdir()} - {MANIFEST}
    shards = 0
    for name, record in manifest.files.items():
        data = (moe / name).read_bytes()
        assert record.size == len(data)
        assert record.sha256 == hashlib.sha256(data).hexdigest()
        if name.endswith(".safetensors"):
            header = data[: 8 + int.from_bytes(data[:8], "little")]
            assert record.header_sha256 == hashlib.sha256(header).hexdigest()
            shards += 1
        else:
            assert record.header_sha256 is None
    assert shards > 3


def test_the_sources_are_identified(built):
    (source,) = read_manifest(built / "moe").source_files
    file = built / "dense" / "model.safetensors"
    data = file.read_bytes()
    assert (source.path, source.size) == (str(file), len(data))
    assert source.mtime_ns == file.stat().st_mtime_ns
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    assert source.header_sha256 == hashlib.sha256(header).hexdigest()


def test_digests_are_left_out_unless_asked_for(built, tmp_path):
    build_moe(built / "dense", tmp_path / "moe", MoeConfig(3))
    assert (
        "sha256"
        not in json.loads((tmp_path / "moe" / MANIFEST).read_text())["files"]["config.json"]
    )
    assert read_manifest(tmp_path / "moe").files["model.safetensors"].sha256 is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda v: v.clear(), "manifest_version is None, this version of moe_fast reads 1"),
        (lambda v: v.update(manifest_version=2), "manifest_version is 2, this version of moe_fast"),
        (lambda v: v.pop("moe_fast"), "the key 'moe_fast' is missing"),
        (lambda v: v.update(operation="bake"), "the operation 'bake' is not known here"),
        (lambda v: v.pop("files"), "the key 'files' is missing"),
        (lambda v: v.update(surprise=1), r"surprise: unknown key; known are "),
        (lambda v: v.update(facts=[]), "facts: "),
        (
            lambda v: v["source_files"][0].update(size=True),
            r"source_files\[0\].size: must be an integer, got True",
        ),
        (
            lambda v: v["files"].update({"config.json": 3}),
            r"files.config.json: must be a mapping, got 3",
        ),
        (
            lambda v: v["request"]["config"].update(num_experts=0),
            r"request: num_experts must be at least 1",
        ),
    ],
)
def test_a_manifest_that_does_not_hold_is_refused_with_its_key(built, tmp_path, change, match):
    value = json.loads((built / "moe" / MANIFEST).read_text())
    change(value)
    (tmp_path / MANIFEST).write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=match):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"), [("[]", "must be a JSON object"), ("{", "not valid JSON")]
)
def test_a_manifest_that_is_no_object(tmp_path, text, match):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=match):
        read_manifest(tmp_path)
