"""Results in other libraries' arrays, and written into theirs, without a copy."""

import mmap
from multiprocessing import shared_memory

import numpy as np
import pytest

from moe_fast import compute_gate_weights, compute_router_weights


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_torch_takes_results(dtype):
    torch = pytest.importorskip("torch")
    weights = compute_gate_weights(33, 5, dtype=dtype)
    for tensor in (torch.from_numpy(weights), torch.from_dlpack(weights)):
        assert tensor.data_ptr() == weights.ctypes.data
        assert tensor.dtype == getattr(torch, dtype)
        assert tensor.tolist() == weights.tolist()


def test_torch_takes_bfloat16():
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("ml_dtypes")
    weights = compute_gate_weights(33, 5, dtype="bfloat16", remove_base=True)
    tensor = torch.from_numpy(weights.view(np.uint16)).view(torch.bfloat16)
    assert tensor.data_ptr() == weights.ctypes.data
    assert tensor.tolist() == weights.astype(float).tolist()


def test_a_torch_parameter_is_filled():
    torch = pytest.importorskip("torch")
    gate = torch.nn.Linear(33, 5, bias=False)
    compute_gate_weights(33, 5, "random", out=gate.weight.detach().numpy(), transpose=True)
    expected = compute_gate_weights(33, 5, "random", dtype="float32")
    assert gate.weight.tolist() == expected.T.tolist()


def test_a_bfloat16_torch_parameter_is_filled():
    torch, ml_dtypes = pytest.importorskip("torch"), pytest.importorskip("ml_dtypes")
    weight = torch.empty(5, 33, dtype=torch.bfloat16)
    out = weight.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    compute_gate_weights(33, 5, "random", out=out, transpose=True)
    expected = compute_gate_weights(33, 5, "random", dtype="bfloat16")
    assert weight.tolist() == expected.T.astype(float).tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("num_experts", [1, 5, 64])
def test_jax_takes_results(dtype, num_experts):
    jax = pytest.importorskip("jax")
    weights = compute_gate_weights(33, num_experts, dtype=dtype)
    array = jax.dlpack.from_dlpack(weights)
    assert array.unsafe_buffer_pointer() == weights.ctypes.data
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, weights)


def test_jax_takes_float64():
    jax = pytest.importorskip("jax")
    weights = compute_gate_weights(33, 5)
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        array = jax.dlpack.from_dlpack(weights)
        assert array.unsafe_buffer_pointer() == weights.ctypes.data
        np.testing.assert_array_equal(array, weights)
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (1000, 5), (3000, 256)])
def test_results_begin_where_every_library_likes(shape):
    assert compute_gate_weights(*shape, dtype="float16").ctypes.data % 64 == 0
    assert compute_router_weights(2, *shape).ctypes.data % 64 == 0


def test_shared_memory_is_filled():
    memory = shared_memory.SharedMemory(create=True, size=33 * 5 * 4)
    try:
        out = np.ndarray((33, 5), np.float32, memory.buf)
        compute_gate_weights(33, 5, out=out)
        np.testing.assert_array_equal(out, compute_gate_weights(33, 5, dtype="float32"))
        del out
    finally:
        memory.close()
        memory.unlink()


@pytest.mark.parametrize("offset", [0, 8, 24])
def test_a_memory_map_is_filled(tmp_path, offset):
    path = tmp_path / "weights"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        out = np.frombuffer(mapped, np.float64, 33 * 5, offset).reshape(33, 5)
        compute_gate_weights(33, 5, out=out)
        del out
    expected = compute_gate_weights(33, 5).astype("<f8").tobytes()
    assert path.read_bytes() == bytes(offset) + expected + bytes(4096 - offset - len(expected))
