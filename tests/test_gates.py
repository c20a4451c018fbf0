"""Router weights: every option at every SIMD level against the plain twin, bit for bit."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import MoeConfigError, RouterInit, compute_gate_weights, compute_router_weights
from moe_fast.routing import weights as gates
from reference import conversion, generator

GOLDEN = json.loads((Path(__file__).parent / "golden" / "gate_weights.json").read_text())
DTYPES = list(conversion.FORMATS)
if importlib.util.find_spec("ml_dtypes") is None:
    DTYPES.remove("bfloat16")

pytestmark = pytest.mark.usefixtures("level")


@pytest.fixture(scope="module", params=[False, True], ids=["cached", "streamed"])
def as_if_large(request):
    """Even the smallest matrix is shared out among threads, through or around the caches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "VALUES_PER_THREAD", 1)
        patch.setattr(gates, "STREAMED_BYTES", -1 if request.param else 2**62)
        yield


def twin(hidden_dim, num_experts, init, *, dtype="float64", transpose=False, rows=None, **options):
    """What `compute_gate_weights` should give, one draw at a time."""
    of_hidden = None if transpose else rows
    weights = generator.gate_weights(hidden_dim, num_experts, init, rows=of_hidden, **options)
    rounded = [conversion.nearest(value, dtype) for value in weights.ravel().tolist()]
    # Casting is exact here: the values are already numbers of the dtype.
    result = np.array(rounded, dtype="float64").reshape(weights.shape).astype(dtype)
    if transpose:
        result = result.T[slice(*rows)] if rows else result.T
    return result


def assert_same_bits(result, expected):
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    assert result.tobytes() == expected.tobytes()


def test_the_twin_keeps_the_sign_of_what_rounds_to_zero():
    assert str(conversion.nearest(-1e-9, "float16")) == str(np.float64(np.float16(-1e-9))) == "-0.0"


@pytest.mark.parametrize(
    "entry", GOLDEN, ids=lambda e: f"{e['init']}-{e['hidden_dim']}x{e['num_experts']}"
)
def test_equals_the_reference_library(entry):
    weights = compute_gate_weights(entry["hidden_dim"], entry["num_experts"], entry["init"])
    digest = hashlib.sha256(weights.astype("<f8").tobytes()).hexdigest()
    assert digest == entry["sha256_le_f64"]


@st.composite
def calls(draw):
    """Arguments of `compute_gate_weights`, for at most some thousand values."""
    hidden_dim = draw(st.integers(0, 90))
    num_experts = draw(st.integers(0, 40))
    transpose = draw(st.booleans())
    size = num_experts if transpose else hidden_dim
    bounds = st.lists(st.integers(0, size), min_size=2, max_size=2).map(sorted).map(tuple)
    options = {
        "dtype": draw(st.sampled_from(DTYPES)),
        "layer": draw(st.integers(0, 3) | st.integers(0, 2**70)),
        "rows": draw(st.none() | bounds),
        "full_range": draw(st.booleans()),
        "remove_base": draw(st.booleans()),
        "transpose": transpose,
    }
    return (hidden_dim, num_experts, draw(st.sampled_from(RouterInit))), options


@given(call=calls(), threads=st.integers(1, 5))
def test_equals_the_twin(as_if_large, call, threads):
    arguments, options = call
    result = compute_gate_weights(*arguments, threads=threads, **options)
    assert_same_bits(result, twin(*arguments, **options))


@given(call=calls(), threads=st.integers(1, 5), num_layers=st.integers(0, 4))
def test_router_weights_stack_gate_weights(as_if_large, call, threads, num_layers):
    arguments, options = call
    result = compute_router_weights(num_layers, *arguments, threads=threads, **options)
    layers = [options["layer"] + i for i in range(num_layers)]
    expected = [compute_gate_weights(*arguments, **{**options, "layer": la}) for la in layers]
    assert len(result) == num_layers
    for layer, matrix in zip(result, expected, strict=True):
        assert_same_bits(layer, matrix)


def test_layers_take_consecutive_stretches():
    routers = compute_router_weights(3, 5, 7, "random")
    one = generator.gate_weights(5 * 3, 7, "random")
    # The scale differs, the draws do not.
    np.testing.assert_allclose(routers.reshape(15, 7) * np.sqrt(5 / 15), one, rtol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_into_out(dtype):
    out = np.zeros((3, 11, 5), reference_dtype(dtype))
    result = compute_gate_weights(11, 5, "random", out=out[1])
    assert np.shares_memory(result, out)
    assert_same_bits(out[1], twin(11, 5, "random", dtype=dtype))
    assert not out[0].any()
    assert not out[2].any()


def reference_dtype(name):
    return np.zeros(0).astype(name).dtype


def test_writes_into_a_memory_map(tmp_path):
    out = np.memmap(tmp_path / "weights", dtype="float32", mode="w+", shape=(64, 8))
    compute_gate_weights(64, 8, out=out)
    out.flush()
    stored = np.fromfile(tmp_path / "weights", dtype="float32").reshape(64, 8)
    assert_same_bits(stored, twin(64, 8, "balanced", dtype="float32"))


BAD = {
    "hidden_dim-float": ({"hidden_dim": 4.0}, TypeError, r"hidden_dim must be an integer.*4\.0"),
    "num_experts-negative": ({"num_experts": -1}, MoeConfigError, "num_experts must be at least 0"),
    "hidden_dim-huge": ({"hidden_dim": 2**63}, MoeConfigError, "hidden_dim must be at most"),
    "init": ({"init": "xavier"}, MoeConfigError, "init must be one of 'random', .* got 'xavier'"),
    "dtype": ({"dtype": "int8"}, MoeConfigError, "dtype must be one of float64, .* got 'int8'"),
    "dtype-swapped": ({"dtype": ">f4"}, MoeConfigError, "dtype must be one of .* got '>f4'"),
    "dtype-nonsense": ({"dtype": "bf17"}, MoeConfigError, "dtype must be one of .* got 'bf17'"),
    "layer": ({"layer": -1}, MoeConfigError, "layer must be at least 0, got -1"),
    "rows-number": ({"rows": 3}, TypeError, r"rows must be a pair \(start, stop\), got 3"),
    "rows-order": ({"rows": (3, 2)}, MoeConfigError, r"start <= stop <= 16, got \(3, 2\)"),
    "rows-beyond": ({"rows": (0, 17)}, MoeConfigError, r"start <= stop <= 16, got \(0, 17\)"),
    "rows-negative": ({"rows": (-1, 1)}, MoeConfigError, r"rows\[0\] must be at least 0, got -1"),
    "rows-transpose": (
        {"rows": (0, 5), "transpose": True}, MoeConfigError, r"start <= stop <= 4, got \(0, 5\)",
    ),
    "threads": ({"threads": 0}, MoeConfigError, "threads must be at least 1, got 0"),
    "threads-many": ({"threads": 10**6}, MoeConfigError, "threads must be at most 1024"),
    "out-list": ({"out": [0.0]}, TypeError, "out must be a NumPy array, got list"),
    "out-shape": (
        {"out": np.empty((4, 16))}, MoeConfigError, r"out must have the shape \(16, 4\).*\(4, 16\)",
    ),
    "out-dtype": (
        {"out": np.empty((16, 4)), "dtype": "float32"},
        MoeConfigError,
        "out must have .* dtype float32, got .* float64",
    ),
    "out-dtype-none": (
        {"out": np.empty((16, 4), "int8")},
        MoeConfigError,
        r"out\.dtype must be one of float64, .* got dtype\('int8'\)",
    ),
    "out-strided": (
        {"out": np.empty((4, 16)).T}, MoeConfigError, "out must be C-contiguous, aligned, writable",
    ),
    "out-read-only": (
        {"out": np.broadcast_to(np.empty((16, 4)), (16, 4))},
        MoeConfigError,
        "out must be C-contiguous, aligned, writable",
    ),
    "out-unaligned": (
        {"out": np.empty(16 * 4 * 8 + 1, "u1")[1:].view("f8").reshape(16, 4)},
        MoeConfigError,
        "out must be C-contiguous, aligned, writable",
    ),
    "memory": ({"hidden_dim": 2**62, "num_experts": 8}, MemoryError, "no memory for weights of"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        compute_gate_weights(**{"hidden_dim": 16, "num_experts": 4, **wrong})


def test_a_slice_of_a_matrix_beyond_memory():
    rows = (2**60, 2**60 + 3)
    result = compute_gate_weights(2**62, 3, "random", rows=rows)
    assert_same_bits(result, twin(2**62, 3, "random", rows=rows))


def test_bfloat16_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"ml_dtypes: pip install 'moe-fast\[checkpoint\]'"):
        compute_gate_weights(4, 2, dtype="bfloat16")


def test_bfloat16_balanced_needs_the_base_removed():
    """Rounding to 8 bits leaves no noise beside the base, and all of it without."""
    pytest.importorskip("ml_dtypes")
    with_base = compute_gate_weights(2048, 8, dtype="bfloat16")
    without = compute_gate_weights(2048, 8, dtype="bfloat16", remove_base=True)
    assert len(np.unique(with_base.astype(float))) == 1
    assert len(np.unique(without.astype(float))) > 500
