"""Normal draws: every SIMD level against the plain twin, the twin against the standard library."""

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import kernels
from reference import normal as reference

seeds = st.integers(0, 2**64 - 1)
# What a draw's upper 32 bits can be, the ends and the borders of the regions among them.
uppers = st.integers(0, 2**32 - 1) | st.sampled_from(
    [
        0,
        1,
        2**31 - 1,
        2**31,
        2**32 - 1,
        *(round(2**32 * p) + d for p in (0.075, 0.925) for d in (-1, 0, 1)),
    ]
)


def draws(seed, first, count, scale=1.0):
    out = np.full(count, np.nan, np.float32)
    kernels.compiled.fill_normal(out, 0, count, seed, first, scale)
    return out


def test_the_stream_is_splitmix64():
    """The first draws of the seed 1234567 as its other implementations give them."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [reference.splitmix64(1234567, i) for i in range(3)] == published


def test_the_twin_is_the_inverse_of_the_normal_distribution():
    normal = statistics.NormalDist()
    for i in range(20_000):
        p = ((reference.splitmix64(7, i) >> 32) + 0.5) / 2**32
        assert reference.normal(7, i) == pytest.approx(normal.inv_cdf(p), rel=2e-15)


@given(uppers)
def test_every_region_is_the_inverse(upper):
    def upper_bits(seed, index):
        return upper << 32

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "splitmix64", upper_bits)
        value = reference.normal(0, 0)
    assert value == pytest.approx(statistics.NormalDist().inv_cdf((upper + 0.5) / 2**32), rel=2e-15)


@pytest.mark.usefixtures("level")
@given(seeds, seeds, st.integers(0, 600), st.floats(0, 1e6))
def test_equals_the_twin_bit_for_bit(seed, first, count, scale):
    expected = [reference.normal(seed, first + i) * scale for i in range(count)]
    assert draws(seed, first, count, scale).tobytes() == np.array(expected, np.float32).tobytes()


@pytest.mark.usefixtures("level")
def test_any_part_can_be_drawn_alone():
    whole = draws(3, 1000, 5000)
    out = np.full(5000, np.nan, np.float32)
    kernels.compiled.fill_normal(out, 1234, 4321, 3, 1000, 1.0)
    assert np.isnan(out[:1234]).all()
    assert np.isnan(out[4321:]).all()
    assert (out[1234:4321] == whole[1234:4321]).all()
    assert (draws(3, 1000 + 1234, 100) == whole[1234:1334]).all()


def test_moments_of_a_million_draws():
    values = draws(0, 0, 1_000_000).astype(np.float64)
    # Six standard errors of each moment.
    assert abs(values.mean()) < 6e-3
    assert abs((values**2).mean() - 1) < 6 * np.sqrt(2) * 1e-3
    assert abs((values**3).mean()) < 6 * np.sqrt(15) * 1e-3
    assert abs((values**4).mean() - 3) < 6 * np.sqrt(96) * 1e-3
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 6e-3


def test_seeds_give_streams_of_their_own():
    assert abs(np.corrcoef(draws(0, 0, 100_000), draws(1, 0, 100_000))[0, 1]) < 6 / np.sqrt(100_000)
