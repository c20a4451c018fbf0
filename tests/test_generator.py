"""The kernels that draw: every number they can draw, and how they round any value."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moe_fast import kernels
from reference import conversion, generator

pytestmark = pytest.mark.usefixtures("level")

# How a kernel's output is read as numbers.
READ = {
    "float64": lambda stored: stored,
    "float32": lambda stored: stored,
    "float16": lambda stored: stored.view(np.float16),
    "bfloat16": lambda stored: (stored.astype(np.uint32) << 16).view(np.float32),
}
STORED = {"float64": np.float64, "float32": np.float32, "float16": "u2", "bfloat16": "u2"}


def fill(dtype, size, *, first=0, step=1, full_range=False, base=0.0, scale=1.0):
    """A row of draws `step` apart, from draw `first` of the "random" stream on."""
    out = np.empty(size, STORED[dtype])
    seed = generator.SEEDS["random"]
    kernel = getattr(kernels.compiled, f"fill_{dtype}")
    kernel(out, 0, size, 1, size, seed, first, 0, 0, step, full_range, base, scale, False)
    return READ[dtype](out)


def test_the_twin_jumps_as_it_steps():
    state = seed = 0xDEADBEEF
    for steps in range(50):
        assert generator.state_after(seed, steps) == state
        state = (state * generator.MULTIPLIER + 1) % 2**64
    assert generator.state_after(seed, 2**64 + 3) == generator.state_after(seed, 3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("full_range", [False, True], ids=["31-bits", "32-bits"])
def test_every_quotient(full_range):
    """The kernel's product equals the reference's division for every number it can draw.

    In steps of 2^33 draws the lower 33 bits of the state stay as they are, and the upper 31 are a
    generator of their own: its increment is odd and its multiplier 1 more than a multiple of 4, so
    it takes every value once (Hull and Dobell 1962). Likewise in steps of 2^32.
    """
    bits = 32 if full_range else 31
    step, chunk = 2 ** (64 - bits), 2**16
    seed = generator.SEEDS["random"]
    states = np.array([generator.state_after(seed, 1 + i * step) for i in range(chunk)], np.uint64)
    # What takes a whole chunk of states to the next.
    increment = generator.state_after(0, chunk * step)
    multiplier = np.uint64((generator.state_after(1, chunk * step) - increment) % 2**64)
    total = 0
    for first in range(0, 2**bits, chunk):
        drawn = states >> np.uint64(64 - bits)
        expected = (drawn.astype(np.float64) / 4294967295.0) * 2.0 - 1.0
        result = fill(
            "float64", chunk, first=first * step % 2**64, step=step, full_range=full_range
        )
        assert result.tobytes() == expected.tobytes()
        total += int(drawn.sum())
        states = states * multiplier + np.uint64(increment)
    assert total == 2**bits * (2**bits - 1) // 2


def near_ties(dtype):
    """Numbers on, right below and right above the middle between two of `dtype`."""
    precision, smallest = conversion.FORMATS[dtype]

    def number(significand, exponent, side, sign):
        middle = math.ldexp(2 * significand + 1, max(exponent - precision, smallest) - 1)
        return sign * (math.nextafter(middle, side) if side is not None else middle)

    return st.builds(
        number,
        st.integers(0, 2**precision - 1),
        st.integers(-30, 1),
        st.sampled_from([None, 0.0, math.inf]),
        st.sampled_from([1.0, -1.0]),
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@given(data=st.data())
def test_every_value_is_rounded_once(dtype, data):
    values = st.floats(-2, 2).filter(lambda x: x == 0 or abs(x) > 2.0**-100) | near_ties(dtype)
    base = data.draw(values)
    (result,) = set(fill(dtype, 3, base=base, scale=0.0).tolist())
    assert result == conversion.nearest(base, dtype)
    assert math.copysign(1, result) == math.copysign(1, base) or base == 0


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rounds_as_numpy_does(dtype):
    for scale in (1.0, 1e-3, 1e-6):  # the last two have subnormal float16
        exact = fill("float64", 100_003, full_range=True, scale=scale)
        result = fill(dtype, 100_003, full_range=True, scale=scale)
        assert result.tobytes() == exact.astype(dtype).tobytes()


@pytest.mark.parametrize("dtype", READ)
def test_every_small_size(dtype):
    """From nothing to several rounds of the widest level's lanes, and one more or less."""
    whole = [conversion.nearest(x, dtype) for x in fill("float64", 140).tolist()]
    for size in range(1, 141):
        assert fill(dtype, size).tolist() == whole[:size]


@pytest.mark.parametrize("dtype", READ)
@given(
    size=st.integers(1, 150),
    first=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**64 - 1) | st.integers(1, 300),
    offset=st.integers(0, 33),
)
@example(size=1, first=2**64 - 2, step=1, offset=0)
def test_draws_from_anywhere_in_any_steps(dtype, size, first, step, offset):
    """Whatever the address of the first value, no value beside the row is touched."""
    seed = generator.SEEDS["random"]
    out = np.full(offset + size + 40, 7, STORED[dtype])
    row = out[offset : offset + size]
    kernel = getattr(kernels.compiled, f"fill_{dtype}")
    for stream in (False, True):
        row[:] = 7
        kernel(row, 0, size, 1, size, seed, first, 0, 0, step, False, 0.0, 1.0, stream)
        states = [generator.state_after(seed, first + i * step + 1) for i in range(size)]
        expected = [(state >> 33) / 4294967295.0 * 2.0 - 1.0 for state in states]
        assert READ[dtype](row).tolist() == [conversion.nearest(x, dtype) for x in expected]
        assert (out[:offset] == 7).all()
        assert (out[offset + size :] == 7).all()
