"""Arguments as people write them: sizes, dtypes, paths."""

from __future__ import annotations

import os
import typing
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import Dtype, ExpertSource, Layout, MoeConfigError, RouterInit, RoutingMethod
from moe_fast.checks import as_path, as_size
from moe_fast.config import DtypeName, LayoutName, RouterInitName, RoutingMethodName
from moe_fast.dtypes import as_dtype, as_weight_dtype


@pytest.mark.parametrize(("value", "size"), [
    (5_000_000_000, 5 * 10**9),
    (np.int64(10**6), 10**6),
    (5e9, 5 * 10**9),
    ("5000000000", 5 * 10**9),
    ("5GB", 5 * 10**9),
    ("5G", 5 * 10**9),
    ("5 gb", 5 * 10**9),
    ("5GiB", 5 * 2**30),
    ("1.5MB", 1_500_000),
    ("500MB", 5 * 10**8),
    ("2TB", 2 * 10**12),
    ("1TiB", 2**40),
    ("20kB", 20_000),
    ("20KiB", 20_480),
    ("300B", 300),
    (" 1 MB ", 10**6),
])  # fmt: skip
def test_sizes(value, size):
    assert as_size(value, "size") == size
    assert type(as_size(value, "size")) is int


@given(st.integers(1, 2**53))
def test_any_number_of_bytes_is_a_size(number):
    assert as_size(f"{number}B", "size") == number


@pytest.mark.parametrize(("value", "message"), [
    (5, "must be at least 1 MB, got 5; write '5GB' for gigabytes, or '5B' if you mean bytes"),
    ("5", "must be at least 1 MB, got 5; write '5GB' for gigabytes, or '5B' if you mean bytes"),
    (0, "must be at least 1 MB, got 0; write '5GB'"),
    (-1, "must be at least 1 MB, got -1; write '5GB'"),
    (999_999, "must be at least 1 MB, got 999999"),
    ("0GB", "must be at least one byte, got '0GB'"),
    ("0.1B", "must be at least one byte, got '0.1B'"),
    ("5XB", "must be a size such as '500MB', '5GB' or '5GiB', got '5XB'"),
    ("", "must be a size such as"),
    ("GB", "must be a size such as"),
    ("-5GB", "must be a size such as"),
    ("5GB5", "must be a size such as"),
    (2**63, "must be at most 9223372036854775807"),
    ("9" * 20, "must be at most 9223372036854775807, got 9999"),
    ("9" * 5000, "must be a size such as"),
])  # fmt: skip
def test_what_is_no_size(value, message):
    with pytest.raises(MoeConfigError) as caught:  # noqa: PT011
        as_size(value, "max_shard_size")
    assert str(caught.value).startswith(f"max_shard_size {message}")


@pytest.mark.parametrize("value", [None, True, 1.5e-3, 1234567.5, b"5GB", [5]])
def test_other_types_are_no_size(value):
    with pytest.raises(TypeError, match=r"^size must be an integer, got "):
        as_size(value, "size")


class FakeTorchDtype:
    """torch need not be here: its dtypes are told by their module and their name."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f"torch.{self.name}"


FakeTorchDtype.__module__ = "torch"


@pytest.mark.parametrize(("value", "expected"), [
    *((name, "float32") for name in ("float32", "fp32", "f32", "F32", "float", "torch.float32")),
    *((name, "bfloat16") for name in ("bfloat16", "bf16", "BF16", "torch.bfloat16")),
    *((name, "float16") for name in ("float16", "fp16", "f16", "half", "torch.half")),
    (Dtype.BFLOAT16, "bfloat16"),
    (np.float32, "float32"),
    (np.dtype("float16"), "float16"),
    (FakeTorchDtype("bfloat16"), "bfloat16"),
    (FakeTorchDtype("float32"), "float32"),
])  # fmt: skip
def test_dtypes(value, expected):
    found = as_weight_dtype(value, "dtype")
    assert (found, type(found)) == (expected, Dtype)


def test_dtypes_of_other_packages():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert as_weight_dtype(ml_dtypes.bfloat16, "dtype") == "bfloat16"
    assert as_weight_dtype(np.dtype(ml_dtypes.bfloat16), "dtype") == "bfloat16"
    for name in ("bf16", "torch.bfloat16", FakeTorchDtype("bfloat16")):
        if name != "torch.bfloat16":
            assert as_dtype(name) == ml_dtypes.bfloat16
    assert as_dtype("fp16") == np.float16
    assert as_dtype("float") == np.float64  # NumPy's own name for it


@pytest.mark.parametrize("value", ["int8", "float64", "", "bf 16", np.int8, float, np.float64])
def test_other_dtypes(value):
    with pytest.raises(MoeConfigError, match=r"^dtype must be one of 'float32', 'bfloat16', 'flo"):
        as_weight_dtype(value, "dtype")


@pytest.mark.parametrize("value", [3, None, b"float32"])
def test_what_is_no_dtype(value):
    with pytest.raises(TypeError, match=r"^dtype must be a dtype or the name of one, got "):
        as_weight_dtype(value, "dtype")


def test_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for given_path in ("~/models/a", Path("~/models/a"), PurePosixPath("~/models/a")):
        assert as_path(given_path, "path") == tmp_path / "models" / "a"
    assert as_path("a/~b", "path") == Path("a/~b")
    assert as_path("~no-such-user/a", "path") == Path("~no-such-user/a")
    assert ExpertSource("~/a").model == os.path.join(tmp_path, "a")  # noqa: PTH118
    assert ExpertSource("./org/name").model == "./org/name"  # not a name on the Hub


@pytest.mark.parametrize(("names", "kind"), [
    (RoutingMethodName, RoutingMethod),
    (RouterInitName, RouterInit),
    (LayoutName, Layout),
])  # fmt: skip
def test_literals_are_the_values_of_the_enumerations(names, kind):
    assert set(typing.get_args(names)) == set(kind)


def test_every_literal_of_a_dtype_is_one():
    names = typing.get_args(DtypeName)
    assert {as_weight_dtype(name, "dtype") for name in names} == set(Dtype)
