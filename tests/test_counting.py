"""Counting source models, at every SIMD level, against the plain twin."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import MoeConfigError, compute_expert_load_balance, kernels
from moe_fast.plan import TABLES
from reference import counting as reference

pytestmark = pytest.mark.usefixtures("level")

MODELS = st.lists(st.integers(0, 20), max_size=400)


@given(models=MODELS, num_tables=st.sampled_from([1, TABLES]), length=st.integers(1, 25))
def test_every_value_is_counted_or_refused(models, num_tables, length):
    models += [-1, -(2**63), 2**63 - 1]
    tables = np.zeros((num_tables, length), np.uint64)
    outside = kernels.compiled.count(np.array(models, np.int64), tables)
    assert tables.sum(axis=0).tolist() == [models.count(i) for i in range(length)]
    assert outside == sum(not 0 <= model < length for model in models)


@given(models=MODELS, step=st.sampled_from([-3, -1, 1, 2]), repeats=st.integers(1, 5))
def test_load_balance_of_any_strides(models, step, repeats):
    array = np.array(models, np.int64)[::step]
    repeated = np.broadcast_to(array, (repeats, len(array)))
    once = reference.load_balance(array.tolist())
    assert compute_expert_load_balance(array) == once
    assert compute_expert_load_balance(repeated) == reference.load_balance(array.tolist() * repeats)
    assert compute_expert_load_balance(np.repeat(array, 200).reshape(-1, 200).T) == (
        reference.load_balance(array.tolist() * 200)
    )


@given(st.lists(st.integers(0, 2**63), min_size=1, max_size=2) | st.lists(st.integers(0, 2**57)))
def test_counts_up_to_2_63_are_exact(counts):
    result = kernels.compiled.coefficient_of_variation(np.array(counts, np.uint64))
    assert result == reference.coefficient_of_variation(counts)


@given(
    models=st.lists(st.integers(0, 127), min_size=1, max_size=30),
    shape=st.sampled_from([(-1, 1), (1, -1)]),
    repeats=st.integers(1, 6),
)
def test_a_few_models_are_counted_without_a_table(models, shape, repeats):
    array = np.array(models, np.int64).reshape(shape)
    repeated = np.broadcast_to(array, [repeats if n == 1 else n for n in array.shape])
    expected = reference.load_balance(repeated.reshape(-1).tolist())
    assert kernels.compiled.load_balance(repeated) == expected
    assert kernels.compiled.load_balance(np.ascontiguousarray(repeated)) == expected
    assert compute_expert_load_balance(repeated.reshape(-1)) == expected  # counted with a table


@pytest.mark.parametrize("wrong", [-1, 128, 2**63 - 1, -(2**63)])
def test_more_than_a_few_models_are_left_to_a_table(wrong):
    assert kernels.compiled.load_balance(np.array([[0, wrong]])) == -1.0
    assert kernels.compiled.load_balance(np.zeros((64, 64), np.int64)) == 0.0
    assert kernels.compiled.load_balance(np.zeros((4097, 1), np.int64)) == -1.0
    assert kernels.compiled.load_balance(np.zeros((0, 3), np.int64)) == 0.0


def test_a_plan_of_more_assignments_than_memory_holds():
    models = np.broadcast_to(np.array([0, 0, 1], np.int64), (2**57 + 1, 3))
    expected = reference.coefficient_of_variation([2 * (2**57 + 1), 2**57 + 1])
    assert compute_expert_load_balance(models) == expected


def test_the_argument_is_not_changed():
    models = np.arange(1000, dtype=np.int64) % 7
    compute_expert_load_balance(models)
    assert models.flags.writeable
    np.testing.assert_array_equal(models, np.arange(1000) % 7)


def test_an_unaligned_array():
    models = (np.arange(1000) % 7).astype(np.int64)
    unaligned = np.frombuffer(b"\0" + models.tobytes(), np.int64, offset=1)
    assert not unaligned.flags.aligned
    assert compute_expert_load_balance(unaligned) == compute_expert_load_balance(models)


@pytest.mark.parametrize("size", [3, 1000])
def test_one_negative_index_is_refused(size):
    models = np.arange(size, dtype=np.int64) % 7
    models[size // 2] = -5
    with pytest.raises(MoeConfigError, match=r"^assignments must be at least 0, got -5$"):
        compute_expert_load_balance(models)
