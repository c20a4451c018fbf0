"""Normal draws and plain arithmetic: every SIMD level against the plain twin."""

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


@pytest.mark.usefixtures("level")
@given(st.integers(0, 300), st.integers(0, 2**32 - 1), st.floats(-2, 2), st.booleans())
def test_sums_are_those_of_their_lanes(size, seed, mean, squared):
    values = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    deviations = values.astype(np.float64) - mean
    terms = deviations * deviations if squared else deviations
    lanes = [0.0] * 64
    for i, term in enumerate(terms.tolist()):
        lanes[i % 64] += term
    expected = 0.0
    for lane in lanes:
        expected += lane
    assert kernels.compiled.sum_deviations(values, mean, squared) == expected


@pytest.mark.usefixtures("level")
@given(st.integers(0, 5), st.integers(1, 40), st.sampled_from([np.uint16, np.uint32]), st.data())
def test_columns_taken_and_put_back(rows, width, kind, data):
    columns = data.draw(st.lists(st.integers(0, width - 1), unique=True))
    columns = np.array(columns, np.intp)
    matrix = np.arange(rows * width, dtype=kind).reshape(rows, width)
    word = "uint16_t" if kind is np.uint16 else "uint32_t"
    out = np.empty((rows, len(columns)), kind)
    kernels.compiled.take_columns[word](matrix, columns, out)
    expected = matrix.copy()
    assert (out == expected[:, columns]).all()
    kernels.compiled.put_columns[word](out + kind(1), columns, matrix)
    expected[:, columns] += kind(1)
    assert (matrix == expected).all()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_scaled_numbers_are_rounded_once(kind):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else np.float16)
    bits = np.arange(2**16, dtype=np.uint16)
    # Some processors report the signaling NaNs among the bits.
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = bits.view(dtype).astype(np.float32)
    for factor in (1.0, 2.0, 3.0, 0.3):
        out = np.empty_like(bits)
        count = getattr(kernels.compiled, f"scale_{kind}")(bits, factor, out)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = (numbers * np.float32(factor)).astype(dtype).astype(np.float32)
            found = out.view(dtype).astype(np.float32)
        assert np.array_equal(found, expected, equal_nan=True)
        infinite = np.isinf(expected) & np.isfinite(numbers)
        assert count == infinite.sum()


@pytest.mark.usefixtures("level")
@given(
    st.integers(1, 5), st.integers(0, 5), st.integers(1, 200), st.integers(0, 2**32 - 1),
    st.floats(-4, 4, width=32),
)  # fmt: skip
def test_the_product_is_its_twins(rows, rank, width, seed, scale):
    random = np.random.default_rng(seed)
    b, a, w = (
        random.normal(size=shape).astype(np.float32)
        for shape in ((rows, rank), (rank, width), (rows, width))
    )
    total = np.zeros_like(w)
    for q in range(rank):
        total += b[:, q : q + 1] * a[q]
    expected = w + np.float32(scale) * total if rank else w.copy()
    kernels.compiled.add_product(b, a, scale, w)
    assert w.tobytes() == expected.tobytes()
