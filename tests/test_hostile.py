"""Checkpoints that are broken or mean harm: a clear error with file and tensor, nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for extra in ("ml_dtypes", "safetensors", "typer", "rich"):
    pytest.importorskip(extra)

from typer.testing import CliRunner

from folders import edit_config, names_in
from moe_fast import CheckpointError, MoeConfig, build_moe, check_moe, inspect_model
from moe_fast.command import cli  # noqa: F401  # declares the commands
from moe_fast.command.application import make_application
from moe_fast.command.declaration import COMMANDS
from moe_fast.demo import make_dense_model
from moe_fast.families.registry import dense_families
from moe_fast.models.folder import read_checkpoint
from moe_fast.storage import safetensors_header as header_module
from moe_fast.storage.safetensors_header import read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "dense"
    make_dense_model(folder, seed=0)
    return folder


@pytest.fixture
def dense(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "dense")


def refused(dense: Path, match: str, *more: Path) -> str:
    """Library and command refuse, with the message returned; nothing is written."""
    output = dense.parent / "moe"
    before = sorted(dense.parent.iterdir())
    with pytest.raises(CheckpointError, match=match) as caught:
        build_moe([dense, *more], output, MoeConfig(3))
    arguments = ["build", *map(str, (dense, *more)), "-o", str(output), "--experts", "3"]
    done = CliRunner().invoke(make_application([COMMANDS["build"]]), arguments)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)  # and no traceback
    assert str(caught.value) in done.stderr
    assert len(done.stderr) < 10_000
    assert sorted(dense.parent.iterdir()) == before
    return str(caught.value)


def split(data: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def joined(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def with_header(dense: Path, change: Callable[[bytes], bytes]) -> None:
    """Rewrite the header's text; the data stays."""
    header, data = split((dense / WEIGHTS).read_bytes())
    (dense / WEIGHTS).write_bytes(joined(change(header), data))


def with_entry(dense: Path, name: str, **changes: Any) -> None:
    """Rewrite what the header says of one tensor."""

    def change(header: bytes) -> bytes:
        entries = json.loads(header)
        entries[name] |= changes
        return json.dumps(entries).encode()

    with_header(dense, change)


def entry(dense: Path, name: str) -> dict[str, Any]:
    return json.loads(split((dense / WEIGHTS).read_bytes())[0])[name]


# The file


@pytest.mark.parametrize("left", [0, 7, 8, 100, -1000, -1])
def test_truncated(dense, left):
    data = (dense / WEIGHTS).read_bytes()
    (dense / WEIGHTS).write_bytes(data[:left])
    refused(dense, r"model\.safetensors: .*(truncated|beyond the file|the file at)")


def test_with_bytes_at_its_end(dense):
    with (dense / WEIGHTS).open("ab") as file:
        file.write(b"x")
    refused(dense, r"model\.safetensors: the tensors end at byte \d+, the file at \d+")


@pytest.mark.parametrize(
    ("length", "match"),
    [
        (0, "length is 0 bytes in a file of"),
        (1, "length is 1 bytes in a file of"),
        (10**6, "length is 1000000 bytes in a file of"),
        (2**63, "length is 9223372036854775808 bytes in a file of"),
        (2**64 - 1, "length is 18446744073709551615 bytes in a file of"),
    ],
)
def test_header_length(dense, length, match):
    data = (dense / WEIGHTS).read_bytes()
    (dense / WEIGHTS).write_bytes(length.to_bytes(8, "little") + data[8:])
    refused(dense, rf"model\.safetensors: the header's {match}")


def test_header_of_more_than_100_megabytes(dense):
    with (dense / WEIGHTS).open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # sparse
    refused(dense, r"model\.safetensors: the header's length is 100000001 bytes, more than 10+")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"\xff\xfe{}", "not UTF-8: invalid start byte at byte 0"),
        (b"{\xc3\x28}", "not UTF-8: invalid continuation byte at byte 1"),
        ("{}".encode("utf-16"), "not UTF-8|not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b"hello", "not valid JSON: Expecting value"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": 1} {}', "not valid JSON: Extra data"),
        (b'{"a": 1}\0\0', "not valid JSON: Extra data"),
        (b"[]", "the header must be a JSON object"),
        (b"3 ", "the header must be a JSON object"),
        (b'{"a": NaN}', "not valid JSON: NaN is not JSON"),
        (b'{"a": -Infinity}', "not valid JSON: -Infinity is not JSON"),
        (b'{"a": 1e999}', "not valid JSON: the number '1e999' is too large"),
        (b'{"a": 1, "b": 2, "a": 3}', "not valid JSON: the key 'a' stands twice"),
        (b'{"a": {"x": 1, "x": 1}}', "not valid JSON: the key 'x' stands twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b"[" * 100_000, "not valid JSON: nested too deep"),
        (b'{"a":' * 100_000, "not valid JSON: nested too deep"),
        (b"[[]," * 2_000_000 + b"0]", "holds more JSON than any model's"),
        (b'{"__metadata__": 3}', "__metadata__ must map strings to strings"),
        (b'{"__metadata__": {"a": 3}}', "__metadata__ must map strings to strings"),
        (b'{"a": 3}', "tensor 'a' must have dtype, shape and data_offsets"),
        (b'{"a": {}}', "tensor 'a' must have dtype, shape and data_offsets"),
    ],
    ids=lambda value: ascii(value[:30]) if isinstance(value, bytes) else "",
)
def test_header_text(dense, text, match):
    with_header(dense, lambda header: text)
    refused(dense, rf"model\.safetensors: ({match})")


# What the header says of a tensor


@pytest.mark.parametrize(
    ("offsets", "match"),
    [
        ([-8, 8], "must have data_offsets"),
        ([8, 0], r"has data_offsets \[8, 0\] beyond"),
        ([0, 2**62], r"has data_offsets .* beyond the file's \d+ bytes"),
        ([0, 2**80], "must have data_offsets"),
        ([2**63 - 1, 2**63 - 1], r"has data_offsets .* beyond the file"),
        ([0.0, 8], "must have data_offsets"),
        ([True, 8], "must have data_offsets"),
        ([0], "must have data_offsets"),
        ([0, 8, 16], "must have data_offsets"),
        ("08", "must have data_offsets"),
        (None, "must have data_offsets"),
        ([[], {}], "must have data_offsets"),
    ],
)
def test_offsets(dense, offsets, match):
    with_entry(dense, UP, data_offsets=offsets)
    refused(dense, rf"model\.safetensors: tensor '{UP}' {match}")


def test_offsets_that_overlap(dense):
    with_entry(dense, UP, data_offsets=entry(dense, EMBEDDING)["data_offsets"], shape=[256, 64])
    refused(dense, rf"tensor '({UP}|{EMBEDDING})' .* overlaps the one before")


def test_offsets_that_leave_a_hole(dense):
    def without_a_norm(header: bytes) -> bytes:
        entries = json.loads(header)
        del entries["model.layers.1.input_layernorm.weight"]
        return json.dumps(entries).encode()

    with_header(dense, without_a_norm)
    refused(dense, r"tensor 'model.*' starts at byte \d+ of the data, leaves a hole")


def test_offsets_that_begin_with_a_hole(dense):
    header, data = split((dense / WEIGHTS).read_bytes())
    entries = json.loads(header)
    for name, value in entries.items():
        if name != "__metadata__":
            value["data_offsets"] = [offset + 8 for offset in value["data_offsets"]]
    (dense / WEIGHTS).write_bytes(joined(json.dumps(entries).encode(), bytes(8) + data))
    refused(dense, "starts at byte 8 of the data, leaves a hole, which ends at 0")


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        (
            [128, 63],
            r"has the shape \[128, 63\] of F32, which takes 32256 bytes; its data_offsets hold 327",
        ),
        ([2**32, 2**32], ".* takes 73786976294838206464 bytes"),
        ([2**62, 4, 2**62], r".* takes \d+ bytes"),
        ([2**63], "must have a shape of sizes"),
        ([2**63 - 1] * 64, r".* takes \d+\.\.\.\d+ bytes"),
        ([-128, -64], "must have a shape of sizes"),
        ([128.0, 64], "must have a shape of sizes"),
        ([True] * 2, "must have a shape of sizes"),
        (["128", 64], "must have a shape of sizes"),
        ({}, "must have a shape of sizes"),
        (None, "must have a shape of sizes"),
        ([1] * 65 + [128, 64], "has 67 dimensions, more than 64"),
        ([0] * 1_000_000, "has 1000000 dimensions, more than 64"),
        ([8192], r"has the shape \[8192\], config.json makes it \[128, 64\]"),
        ([64, 128], r"has the shape \[64, 128\], config.json makes it \[128, 64\]"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_shapes(dense, shape, match):
    with_entry(dense, UP, shape=shape)
    refused(dense, rf"model\.safetensors: tensor '{UP}' {match}")


@pytest.mark.parametrize("dtype", ["F33", "f32", "", None, 3, ["F32"], {}, "F32\0", "x" * 10**6])
def test_unknown_dtypes(dense, dtype):
    with_entry(dense, UP, dtype=dtype)
    refused(
        dense, rf"model\.safetensors: tensor '{UP}' has the unknown dtype .*; known are BOOL, U8"
    )


def test_dtypes_that_are_no_weights(dense):
    with_entry(dense, UP, dtype="I32")
    refused(dense, rf"model\.safetensors: tensor '{UP}' is I32; F32, F16 and BF16 can be built")


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "x" * 10**6, "\u202egnp.exe"])
def test_names_cannot_drive_the_terminal_nor_flood_it(dense, name):
    def renamed(header: bytes) -> bytes:
        entries = json.loads(header)
        entries[name] = entries.pop(UP)
        return json.dumps(entries).encode()

    with_header(dense, renamed)
    message = refused(dense, f"{UP}.* is missing")
    assert all(c.isprintable() or c == "\n" for c in message)
    assert len(message.splitlines()) == 3


def test_names_that_are_no_unicode(dense):
    with_header(dense, lambda header: header.replace(b"q_proj", b"\\ud800"))
    refused(dense, r"tensor '.*ud800.*' has a name that is not Unicode")


# The index


def in_shards(dense: Path) -> dict[str, str]:
    """The weights in two files and an index; returns what the index says."""
    header, data = split((dense / WEIGHTS).read_bytes())
    entries = {name: e for name, e in json.loads(header).items() if name != "__metadata__"}
    weight_map = {}
    for i in range(2):
        part: dict[str, Any] = {}
        parts = []
        position = 0
        for name, value in list(entries.items())[i::2]:
            begin, end = value["data_offsets"]
            parts.append(data[begin:end])
            part[name] = value | {"data_offsets": [position, position + end - begin]}
            position += end - begin
            weight_map[name] = f"part-{i}.safetensors"
        text = json.dumps(part).encode()
        (dense / f"part-{i}.safetensors").write_bytes(joined(text, b"".join(parts)))
    (dense / WEIGHTS).unlink()
    write_index(dense, weight_map)
    return weight_map


def write_index(dense: Path, weight_map: Any) -> None:
    (dense / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_shards_that_are_right_are_read(dense, pristine):
    in_shards(dense)
    assert read_checkpoint(dense).keys() == read_checkpoint(pristine).keys()


def test_index_naming_a_missing_shard(dense):
    in_shards(dense)
    (dense / "part-1.safetensors").unlink()
    refused(dense, r"part-1\.safetensors: No such file")


def test_index_naming_a_missing_tensor(dense):
    write_index(dense, in_shards(dense) | {"model.ghost": "part-0.safetensors"})
    refused(dense, r"part-0\.safetensors: tensor 'model.ghost' is named by the index and missing")


def test_shards_that_disagree_with_the_index(dense):
    weight_map = in_shards(dense)
    part = weight_map.pop(UP)
    write_index(dense, weight_map)
    refused(dense, rf"{part}: tensor '{UP}' is placed by the index in no file")
    other = {"part-0.safetensors": "part-1.safetensors"}.get(part, "part-0.safetensors")
    write_index(dense, weight_map | {UP: other})
    refused(dense, rf"2 problems.*\n.*\n.*{UP}")


@pytest.mark.parametrize(
    "file",
    [
        "../dense/part-0.safetensors",
        "/etc/passwd",
        "/etc/x.safetensors",
        "sub/part-0.safetensors",
        "sub\\part-0.safetensors",
        "C:part-0.safetensors",
        "..",
        ".",
        "",
        "part-0.safetensors\0",
        "part-0.safetensors\n.safetensors",
        "\ud800.safetensors",
        "pytorch_model.bin",
        "NUL",
        3,
        None,
        ["part-0.safetensors"],
    ],
    ids=ascii,
)
def test_index_naming_what_is_no_file_beside_it(dense, file):
    write_index(dense, in_shards(dense) | {UP: file})
    refused(
        dense,
        rf"index\.json: tensor '{UP}' is placed in .* must be the name of a \.safetensors file",
    )


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{}", "weight_map must map"),
        ("[]", "weight_map must map"),
        ('{"weight_map": {}}', "weight_map must map"),
        ('{"weight_map": []}', "weight_map must map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' stands twice"),
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_index_text(dense, text, match):
    (dense / WEIGHTS).unlink()
    (dense / INDEX).write_text(text)
    refused(dense, rf"index\.json: .*{match}")


def test_an_index_of_thousands_of_missing_files_is_given_up_on(dense):
    (dense / WEIGHTS).unlink()
    write_index(dense, {f"t{i}": f"{i}.safetensors" for i in range(10_000)})
    with pytest.raises(CheckpointError, match="100 problems"):
        read_checkpoint(dense)


def test_an_index_longer_than_any(dense, monkeypatch):
    in_shards(dense)
    monkeypatch.setattr(header_module, "LONGEST_INDEX", 1000)
    refused(dense, r"index\.json: is longer than 1000 bytes")


def test_shards_that_are_broken_are_all_named(dense):
    in_shards(dense)
    for i in range(2):
        (dense / f"part-{i}.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        read_checkpoint(dense)
    assert all(f"part-{i}" in problem for i, problem in enumerate(caught.value.problems))


# config.json


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"model_type": None},
            "model_type None is not supported; .*llama, .*mistral",
        ),
        ({"model_type": ["llama"] * 10**5}, "model_type .* is not supported"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, the safetensors hold 20"),
        ({"num_hidden_layers": 10**4000}, "num_hidden_layers is 1000+.*at least 1"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers is 2\.0; it must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True; it must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be an integer of at least 1"),
        ({"hidden_size": -64}, "hidden_size is -64; it must be an integer of at least 1"),
        ({"hidden_size": 2**40}, r"config.json makes it \[1099511627776\]"),
        ({"vocab_size": "256"}, "vocab_size is '256'; it must be an integer of at least 1"),
        ({"num_attention_heads": 10**18}, "q_proj"),
        ({"head_dim": [16]}, r"head_dim is \[16\]; it must be an integer of at least 1"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings is 'long'"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings is 10+; it must be"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a positive number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000+.*it must be a positive number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; it must be a positive number"),
        ({"hidden_act": {"a": 1}}, "hidden_act is {'a': 1}; it must be a string"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"attention_bias": 1}, "attention_bias is 1; it must be true or false"),
        ({"initializer_range": []}, r"initializer_range is \[\]; it must be a number"),
        ({"attention_dropout": False}, "attention_dropout is False; it must be a number"),
        ({"bos_token_id": "<s>"}, "bos_token_id is '<s>'; it must be a token's number or null"),
        ({"eos_token_id": [[2]]}, r"eos_token_id is \[\[2\]\]; it must be a token's number, a"),
        ({"rope_theta": None}, "rope_theta is None; it must be a positive number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*; it must be a positive number"),
        ({"rope_scaling": []}, r"rope_scaling is \[\]; it must be an object or null"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_type is 3; known are default, linear"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type is .* known are default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs the key 'factor'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": {"deep": [[[]]]}}},
            "the rope's 'factor' is .*; it must be a number or a list of numbers",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "x": [[1]]}},
            r"the rope's 'x' is \[\[1\]\]; it must be a number",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_configuration_values(dense, changes, match):
    sys.set_int_max_str_digits(0)
    try:
        edit_config(dense, **changes)
    finally:
        sys.set_int_max_str_digits(4300)
    refused(dense, match)


@pytest.mark.parametrize("family", dense_families())
def test_a_number_of_layers_from_a_file_is_not_counted_up_to(dense, family):
    edit_config(dense, model_type=family, num_hidden_layers=10**15)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        build_moe(dense, dense.parent / "moe")


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ],
)
def test_configuration_keys_that_are_missing(dense, key):
    edit_config(dense, **{key: "absent"})
    refused(dense, rf"config\.json: {key} (is missing|None)")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"hidden_size": NaN}', "NaN is not JSON"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "'hidden_size' stands twice"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"\xff", "not UTF-8"),
        (b" " * 10_000_001, "is longer than 10000000 bytes"),
    ],
    ids=lambda value: ascii(value[:30]) if isinstance(value, bytes) else "",
)
def test_configuration_text(dense, text, match):
    (dense / "config.json").write_bytes(text)
    refused(dense, rf"config\.json: .*{match}")


def test_fifty_thousand_layers_of_one_tensor_each(dense):
    """Names of layers cost the one who makes them up nothing."""
    header, data = split((dense / WEIGHTS).read_bytes())
    entries = json.loads(header)
    for layer in range(2, 50_000):
        name = f"model.layers.{layer}.input_layernorm.weight"
        entries[name] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}
    (dense / WEIGHTS).write_bytes(joined(json.dumps(entries).encode(), data))
    edit_config(dense, num_hidden_layers=50_000)
    refused(dense, "num_hidden_layers 50000, the safetensors hold 50018 tensors of 50000 layers")


# What stands in place of a file


@pytest.fixture(params=[WEIGHTS, INDEX, "part-0.safetensors", "config.json", "tokenizer.json"])
def place(request, dense: Path) -> Path:
    """The path of a file of the model, which the test replaces with something else."""
    if request.param in (INDEX, "part-0.safetensors"):
        in_shards(dense)
    (dense / request.param).unlink()
    return dense / request.param


def test_a_folder_in_place_of_a_file(dense, place):
    place.mkdir()
    if place.name == "tokenizer.json":  # one of many names that a tokenizer's files can have
        build_moe(dense, dense.parent / "moe", MoeConfig(3))
        assert not (dense.parent / "moe" / place.name).exists()
    else:
        refused(dense, rf"{place.name}: is not a regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on this system")
def test_a_fifo_in_place_of_a_file(dense, place):
    os.mkfifo(place)
    refused(dense, rf"{place.name}: is not a regular file")


@pytest.mark.skipif(sys.platform == "win32", reason="no devices as files on Windows")
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty"])
def test_a_device_in_place_of_a_file(dense, place, device):
    place.symlink_to(device)
    refused(dense, rf"{place.name}: is not a regular file")


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no sockets as files on this system")
def test_a_socket_in_place_of_a_file(dense, place, monkeypatch):
    monkeypatch.chdir(place.parent)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place.name)
        refused(dense, rf"{place.name}: is not a regular file")


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_links_that_lead_nowhere_and_in_circles(dense, place):
    place.symlink_to("nowhere")
    refused(dense, rf"{place.name}: No such file or directory")
    place.unlink()
    place.symlink_to(place.name)
    refused(dense, rf"{place.name}: Too many levels of symbolic links")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "a.pkl"])
def test_pickle_files_are_never_opened(dense, name):
    (dense / WEIGHTS).unlink()
    bomb = b"cos\nsystem\n(S'touch pwned'\ntR."
    (dense / name).write_bytes(bomb)
    refused(dense, f"{name}, a pickle file, which can run code when opened and is never read")
    assert (dense / name).read_bytes() == bomb


def test_a_pickle_named_like_safetensors(dense):
    (dense / WEIGHTS).write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    refused(dense, r"model\.safetensors: the header's length")


def test_an_empty_folder(dense):
    (dense / WEIGHTS).unlink()
    refused(dense, "holds neither model.safetensors nor model.safetensors.index.json")


# Places that cannot be read or written. The tests may run as root, for whom permissions do not
# count, so a child gives root up first.


def as_nobody(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a child without the rights of root; `build(...)` builds or prints why."""
    prelude = f"""
        import os, sys, tempfile
        sys.path[:] = {sys.path!r}
        from moe_fast import CheckpointError, MoeConfig, build_moe
        from moe_fast.demo import make_dense_model
        with tempfile.TemporaryDirectory() as folder:  # imports all that is needed, once refused
            make_dense_model(folder + "/dense", seed=0)
            for _ in range(2):
                try:
                    build_moe(folder + "/dense", folder + "/moe", MoeConfig(3))
                except CheckpointError as error:
                    str(error)
        environment = tuple(path for path in sys.path if path)
        def stay_out(event, arguments):  # of where nobody may not enter, for some
            if event in ("open", "os.listdir", "os.scandir"):
                if str(arguments[0]).startswith(environment):
                    raise AssertionError(f"{{arguments[0]}} is read after root was given up")
        sys.addaudithook(stay_out)
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        def build(*models, output):
            try:
                build_moe(models, output, MoeConfig(3))
            except CheckpointError as error:
                print(error)
    """
    code = textwrap.dedent(prelude) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.fixture
def open_place():
    """A folder that anyone may enter; those that pytest makes belong to one user."""
    if not hasattr(os, "setuid"):
        pytest.skip("no users to change to on this system")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)
        for path in Path(folder).rglob("*"):
            path.chmod(0o777)


@pytest.mark.parametrize(
    ("name", "named"),
    [(WEIGHTS, WEIGHTS), ("config.json",) * 2, ("tokenizer.json",) * 2, ("", "config.json")],
)
def test_places_that_cannot_be_read(pristine, open_place, name, named):
    dense = shutil.copytree(pristine, open_place / "dense")
    for file in dense.iterdir():
        file.chmod(0o644)
    (dense / name).chmod(0)
    done = as_nobody(f"build({str(dense)!r}, output={str(open_place / 'moe')!r})")
    assert done.stdout.strip() == f"{dense / named}: Permission denied"
    assert names_in(open_place) == ["dense"]


def test_places_that_cannot_be_written(pristine, open_place):
    dense = shutil.copytree(pristine, open_place / "dense")
    (dense / WEIGHTS).chmod(0o644)
    (open_place / "closed").mkdir(mode=0o555)
    for name in ("moe", "new/moe"):
        output = open_place / "closed" / name
        done = as_nobody(f"build({str(dense)!r}, output={str(output)!r})")
        assert "closed is not writable" in done.stdout
    assert list((open_place / "closed").iterdir()) == []


# Memory and time: read in a child, which tells the most memory it had


def bomb(kind: str) -> bytes:
    room = 99_999_000
    if kind == "brackets":
        return b"[" * room
    if kind == "objects":
        return b'{"a":[' + b"{}," * (room // 3) + b"{}]}"
    if kind == "keys":
        return b"{" + b'"":0,' * (room // 5) + b'"":0}'
    if kind == "one name":
        return b'{"' + b"a" * room + "\N{DROMEDARY CAMEL}".encode() + b'":0}'
    assert kind == "tensors"
    entries = (
        b'"%x":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}' % (i, i, i + 1)
        for i in range(400_000)
    )
    return b"{" + b",".join(entries) + b"}"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no ru_maxrss")
@pytest.mark.parametrize("kind", ["brackets", "objects", "keys", "one name", "tensors"])
def test_memory_is_bounded(tmp_path, kind):
    header = bomb(kind)
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(joined(header, b""))
        file.truncate(8 + len(header) + (400_000 if kind == "tensors" else 0))
    code = textwrap.dedent(
        f"""
        import resource, sys
        from pathlib import Path
        from moe_fast.storage.safetensors_header import read_header
        from moe_fast.errors import CheckpointError
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            found = len(read_header(Path({str(tmp_path / WEIGHTS)!r})))
        except CheckpointError as error:
            found = 0
            assert len(str(error)) < 1000
        unit = 1 if sys.platform == "darwin" else 1024
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(found, taken * unit // 1_000_000)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, megabytes = map(int, done.stdout.split())
    assert found == (400_000 if kind == "tensors" else 0)
    assert megabytes < 1000


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no ru_maxrss")
def test_memory_is_bounded_where_a_checkpoint_is_looked_into(dense, tmp_path):
    """A router of 8 GiB, and files beside it that are as large; none takes room on the disk."""
    moe = tmp_path / "moe"
    build_moe(dense, moe, MoeConfig(2), target="qwen2_moe")
    entries = json.loads(split((moe / WEIGHTS).read_bytes())[0])
    del entries["__metadata__"]
    router = entries["model.layers.1.mlp.gate.weight"]
    begin, end = router["data_offsets"]
    for value in entries.values():
        if value["data_offsets"][0] >= end:
            value["data_offsets"] = [
                offset + 2**33 - (end - begin) for offset in value["data_offsets"]
            ]
    router |= {"shape": [2, 2**30], "data_offsets": [begin, begin + 2**33]}
    header = json.dumps(entries).encode()
    with (moe / WEIGHTS).open("wb") as file:
        file.write(joined(header, b""))
        file.truncate(8 + len(header) + max(value["data_offsets"][1] for value in entries.values()))
    for file in ("tokenizer.json", "tokenizer_config.json", "README.md", "chat_template.jinja"):
        with (moe / file).open("wb") as stream:
            stream.truncate(2**33)
    code = textwrap.dedent(
        f"""
        import resource, sys
        from pathlib import Path
        from moe_fast import CheckpointError, check_moe, inspect_model, write_report, convert_moe
        from moe_fast.calibration.tokenizer import PromptTokenizer
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        moe, dense = Path({str(moe)!r}), {str(dense)!r}
        (moe / "moe_fast.json").rename(moe / "kept.json")
        for manifest in (False, True):
            report = check_moe(moe, against=dense)
            assert "no router has more than" in report["routing"].problems[0], report["routing"]
            assert "tokenizer.json: differs" in "".join(report["tokenizer"].problems)
            for read in (inspect_model, write_report, PromptTokenizer):
                try:
                    read(moe)
                    raise AssertionError(read)
                except CheckpointError as error:
                    assert "has more than" in str(error), error
            if not manifest:
                (moe / "kept.json").rename(moe / "moe_fast.json")
        unit = 1 if sys.platform == "darwin" else 1024
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit // 1_000_000)
        """
    )
    pytest.importorskip("tokenizers")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 500


@pytest.mark.parametrize(("layers", "num_experts"), [(1, 2**31), (5000, 200)])
def test_more_fused_experts_than_any_model_has(dense, tmp_path, layers, num_experts):
    moe = tmp_path / "moe"
    build_moe(dense, moe, MoeConfig(2), layout="fused")
    entries, end = {}, 0
    for layer in range(layers):
        entries[f"model.layers.{layer}.mlp.experts.down_proj"] = {
            "dtype": "U8",
            "shape": [num_experts, 1, 1],
            "data_offsets": [end, end + num_experts],
        }
        end += num_experts
    header = json.dumps(entries).encode()
    with (moe / WEIGHTS).open("wb") as file:
        file.write(joined(header, b""))
        file.truncate(8 + len(header) + end)
    match = (
        r"model\.safetensors: tensor '.*\.down_proj' has more experts than any model: \d+ in the"
    )
    with pytest.raises(CheckpointError, match=match):
        inspect_model(moe)
    assert re.search(match, check_moe(moe)["headers"].problems[0])


def test_a_header_with_nothing_in_it(tmp_path):
    (tmp_path / WEIGHTS).write_bytes(joined(b"{}", b""))
    assert read_header(tmp_path / WEIGHTS) == {}


def test_sources_are_refused_together(dense, pristine, tmp_path):
    other = shutil.copytree(pristine, tmp_path / "other")
    (dense / WEIGHTS).unlink()
    (other / "config.json").write_text("{")
    refused(
        dense, r"2 problems(.|\n)*dense: holds neither(.|\n)*other.config\.json: not valid", other
    )
