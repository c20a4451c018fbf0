"""Texts and tokens, however they are given, are the same sequences; what is none is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from folders import config_of, edit_json
from moe_fast import ArgumentTypeError, CheckpointError, MoeConfigError
from moe_fast.calibration.texts import TokenSequences, read_tokens
from moe_fast.demo import make_dense_model


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A model whose tokens are bytes, and that reads 64 of them."""
    folder = tmp_path_factory.mktemp("texts") / "dense"
    make_dense_model(folder, seed=0)
    edit_json(folder / "config.json", max_position_embeddings=64)
    return folder


def read(folder: Path, **given) -> list[list[int]]:
    found = read_tokens(folder, config_of(folder), **given)
    return [sequence.tolist() for sequence in found.sequences]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "Hello, wörld\n"),
        ("a.md", "\ufeff# Hello"),
        ("a.jsonl", '{"text": "Hello"}\n\n{"text": "", "id": 3}\n{"text": "a\\u2028b"}\n'),
    ],
)
def test_files_hold_texts(dense, tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    expected = {
        "a.txt": [content],
        "a.md": ["# Hello"],
        "a.jsonl": ["Hello", "a\u2028b"],
    }[name]
    expected = [list(text.encode()) for text in expected]
    assert read(dense, texts=tmp_path / name) == expected
    assert read(dense, texts=[str(tmp_path / name)] * 2) == expected * 2


def test_other_strings_are_texts(dense):
    assert read(dense, texts=["see a.txt\n", "b"]) == [list(b"see a.txt\n"), list(b"b")]


def test_no_token_of_a_long_text_is_left_out(dense):
    found = read(dense, texts="x" * 130)
    assert [len(sequence) for sequence in found] == [64, 64, 2]
    found = read_tokens(dense, config_of(dense), texts="x" * 130, length=50).sequences
    assert [len(sequence) for sequence in found] == [50, 50, 30]


def test_a_text_begins_with_the_beginning_of_text_once(dense, tmp_path):
    folder = tmp_path / "dense"
    make_dense_model(folder, seed=0)
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<"}))
    assert read(folder, texts=["Hello", "<Hello"]) == [list(b"<Hello")] * 2
    with pytest.raises(MoeConfigError, match="texts holds a text without a token: ''"):
        read(folder, texts=[""])


@pytest.mark.parametrize("kind", ["array", "list", "ragged", "file", "one"])
def test_tokens_are_taken_as_they_are(dense, tmp_path, kind):
    array = np.arange(6, dtype=np.uint16).reshape(2, 3)
    np.save(tmp_path / "tokens.npy", array)
    given = {
        "array": array,
        "list": array.tolist(),
        "ragged": [[0, 1, 2], np.array([3, 4])],
        "file": tmp_path / "tokens.npy",
        "one": [0, 1, 2],
    }[kind]
    expected = {"ragged": [[0, 1, 2], [3, 4]], "one": [[0, 1, 2]]}.get(kind, array.tolist())
    assert read(dense, tokens=given) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff", "a.txt: is not text in UTF-8"),
        ("a.txt", b"", "a.txt: holds no text with a token"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl: holds no text with a token"),
        ("a.jsonl", b'{"text": "a"}\n{"prompt": "a"}', "a.jsonl:2: must be an object with the key"),
        ("a.jsonl", b'["a"]', "a.jsonl:1: must be an object with the key"),
        ("a.jsonl", b"a", "a.jsonl:1: must be an object with the key"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: must be an object with the key"),
        ("a.txt", None, "a.txt: No such file"),
    ],
)
def test_files_that_hold_no_text(dense, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read(dense, texts=str(tmp_path / name))


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({}, MoeConfigError, "texts must be given, or tokens"),
        ({"texts": "a", "tokens": [1]}, MoeConfigError, "texts must not be given beside tokens"),
        ({"texts": [3]}, ArgumentTypeError, "texts must be files or strings, got 3"),
        ({"texts": []}, MoeConfigError, "texts hold no token"),
        ({"texts": Path("a.pdf")}, MoeConfigError, "texts must be files ending in .txt"),
        ({"tokens": []}, MoeConfigError, "tokens hold no token"),
        ({"tokens": [[1, -1]]}, MoeConfigError, "be tokens of the model, 0 to 255, got -1"),
        ({"tokens": [[1], [256]]}, MoeConfigError, "0 to 255, got 256"),
        ({"tokens": np.ones((2, 3))}, MoeConfigError, "tokens must be integers of shape"),
        ({"tokens": np.ones((2, 3), bool)}, MoeConfigError, "tokens must be integers of shape"),
        ({"tokens": np.ones((1, 2, 3), int)}, MoeConfigError, "tokens must be integers of shape"),
        ({"tokens": [[[1]]]}, MoeConfigError, "tokens must be sequences of integers"),
        ({"tokens": "absent.npy"}, CheckpointError, "absent.npy: cannot be read as a .npy file"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_text(dense, given, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        read(dense, **given)


def test_a_file_of_tokens_is_named(dense, tmp_path):
    np.save(tmp_path / "tokens.npy", np.ones(3))
    with pytest.raises(CheckpointError, match=r"tokens\.npy: must be integers of shape"):
        read(dense, tokens=tmp_path / "tokens.npy")


def test_batches_hold_each_sequence_once():
    lengths = [3, 50, 1, 7, 7, 2, 9]
    sequences = TokenSequences(tuple(np.arange(n) for n in lengths))
    batches = list(sequences.batches(20))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = sequences.padded(batch)
        assert padded.size <= 20 or len(batch) == 1
        for row, i in zip(padded, batch, strict=True):
            assert row[: lengths[i]].tolist() == list(range(lengths[i]))
            assert not row[lengths[i] :].any()


def test_the_digest_tells_tokens_apart():
    def digest(*sequences):
        return TokenSequences(tuple(map(np.array, sequences))).digest

    assert digest([1, 2], [3]) == digest([1, 2], [3])
    assert len({digest([1, 2], [3]), digest([1], [2, 3]), digest([1, 2, 3]), digest([1, 2])}) == 4
