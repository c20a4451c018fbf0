"""Plans: round robin, nested sequences over read-only arrays, the report."""

import copy
import math
import pickle
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import (
    ExpertAssignment,
    MoeConfig,
    MoeConfigError,
    MoeConstructionPlan,
    MoeReport,
    RouterInit,
    compute_expert_load_balance,
    plan_moe_construction,
)

sizes = st.integers(1, 12)


def plan_of(num_models, num_layers, num_experts):
    return plan_moe_construction(num_models, num_layers, MoeConfig(num_experts, 1))


def by_definition(num_models, num_layers, num_experts):
    return [
        [ExpertAssignment(e, e % num_models, layer) for e in range(num_experts)]
        for layer in range(num_layers)
    ]


@st.composite
def plans_and_lists(draw):
    """A plan, round robin or of any arrays, beside the nested lists that it stands for."""
    layers, experts = draw(sizes), draw(sizes)
    if draw(st.booleans()):
        models = draw(sizes)
        return plan_of(models, layers, experts), by_definition(models, layers, experts)
    rows = st.lists(st.integers(0, 9), min_size=experts, max_size=experts)
    arrays = st.lists(rows, min_size=layers, max_size=layers)
    source_model, source_layer = draw(arrays), draw(arrays)
    lists = [
        [ExpertAssignment(e, *pair) for e, pair in enumerate(zip(*both, strict=True))]
        for both in zip(source_model, source_layer, strict=True)
    ]
    return MoeConstructionPlan(source_model, source_layer), lists


keys = st.integers(-14, 13)
slices = st.slices(12) | st.builds(
    slice, *[st.none() | keys] * 2, st.sampled_from([None, 1, 2, -1])
)


def same_outcome(left, right, key):
    """The item of both at `key`, or `IndexError` from both."""
    try:
        expected = right[key]
    except IndexError:
        with pytest.raises(IndexError, match=rf"{key} is out of range: there are {len(right)}"):
            left[key]
        return None
    assert left[key] == expected
    return left[key], expected


# ---- like nested sequences ----


@given(sizes, sizes, sizes)
def test_round_robin(models, layers, experts):
    plan = plan_of(models, layers, experts)
    assert plan.assignments == by_definition(models, layers, experts)
    assert (plan.num_models, plan.num_layers, plan.num_experts) == (models, layers, experts)
    assert plan.router_init is RouterInit.BALANCED


def test_the_default_configuration_has_eight_experts():
    assert plan_moe_construction(2, 3) == plan_moe_construction(2, 3, MoeConfig())
    assert plan_moe_construction(2, 3).num_experts == 8


@given(plans_and_lists())
def test_length_iteration_equality(both):
    assignments, lists = both[0].assignments, both[1]
    assert isinstance(assignments, Sequence)
    assert isinstance(assignments[0], Sequence)
    assert len(assignments) == len(lists)
    assert [list(layer) for layer in assignments] == lists
    assert [list(layer) for layer in reversed(assignments)] == lists[::-1]
    assert list(reversed(assignments[0])) == lists[0][::-1]
    assert assignments == lists
    assert lists == assignments
    assert assignments == tuple(map(tuple, lists))
    assert assignments[0] == tuple(lists[0])
    assert lists[0] in assignments
    assert lists[0][-1] in assignments[0]
    assert assignments.index(lists[-1]) == lists.index(lists[-1])
    assert assignments[0].count(lists[0][0]) == 1
    item = assignments[0][0]
    assert type(item) is ExpertAssignment
    assert {type(field) for field in item} == {int}


@given(plans_and_lists(), plans_and_lists())
def test_equal_exactly_when_the_lists_are(left, right):
    assert (left[0].assignments == right[0].assignments) == (left[1] == right[1])
    assert (left[0].assignments == right[1]) == (left[1] == right[1])
    assert (left[0].assignments[0] == right[0].assignments[0]) == (left[1][0] == right[1][0])
    assert (left[0].assignments != right[1]) == (left[1] != right[1])


@pytest.mark.parametrize("other", [None, 0, "ab", {"a": 1}, [], [[]], object(), [1, 2], "abcdefgh"])
def test_not_equal_to_anything_else(other):
    plan = plan_moe_construction(2, 2)
    assert plan.assignments != other
    assert plan.assignments[0] != other
    assert plan != other


@given(plans_and_lists(), keys, keys)
def test_indexing(both, layer, expert):
    found = same_outcome(both[0].assignments, both[1], layer)
    if found:
        same_outcome(*found, expert)


@given(plans_and_lists(), slices, slices, keys)
def test_slicing(both, layers, experts, key):
    part, expected = both[0].assignments[layers], both[1][layers]
    assert part == expected
    assert len(part) == len(expected)
    for layer, row in zip(part, expected, strict=True):
        assert layer[experts] == row[experts]
        assert list(layer[experts]) == row[experts]
        same_outcome(layer[experts], row[experts], key)
    assert compute_expert_load_balance(part) == compute_expert_load_balance(expected)


@pytest.mark.parametrize("key", [1.0, "0", None, (0, 0)])
def test_keys_that_are_none(key):
    assignments = plan_moe_construction(2, 2).assignments
    with pytest.raises(TypeError, match=r"^layer must be an integer or a slice, got"):
        assignments[key]
    with pytest.raises(TypeError, match=r"^expert must be an integer or a slice, got"):
        assignments[0][key]


def test_numpy_integers_index():
    assignments = plan_moe_construction(3, 4).assignments
    assert assignments[np.int64(-1)][np.uint8(4)] == ExpertAssignment(4, 1, 3)


def test_an_absurd_index_is_out_of_range():
    with pytest.raises(
        IndexError, match=r"^layer 2\*\*16609 or more is out of range: there are 2$"
    ):
        plan_moe_construction(2, 2).assignments[10**5000]


def test_no_hash():
    plan = plan_moe_construction(2, 2)
    for thing in (plan, plan.assignments, plan.assignments[0]):
        with pytest.raises(TypeError, match="unhashable type"):
            hash(thing)


@given(plans_and_lists())
def test_pickled_and_copied(both):
    plan, lists = both
    for restore in (lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy):
        for thing, expected in (
            (plan, plan),
            (plan.assignments, lists),
            (plan.assignments[-1], lists[-1]),
            (plan.assignments[::2], lists[::2]),
            (plan.assignments[0][::-1], lists[0][::-1]),
        ):
            restored = restore(thing)
            assert type(restored) is type(thing)
            assert restored == expected
            assert not restored.source_model.flags.writeable
            assert not restored.source_layer.flags.writeable
        assert restore(plan).num_models == plan.num_models


def test_repr_is_short_and_tells_the_sizes():
    plan = plan_moe_construction(3, 1000, MoeConfig(1000))
    assert repr(plan) == (
        "MoeConstructionPlan(num_models=3, num_layers=1000, num_experts=1000, "
        "router_init='balanced')"
    )
    assert len(repr(plan.assignments)) < 1000
    assert repr(plan.assignments).endswith("... 1000 in all]")
    assert repr(plan.assignments[5][:1]) == (
        "[ExpertAssignment(expert_index=0, source_model=0, source_layer=5)]"
    )


# ---- arrays ----


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p.assignments, lambda p: p.assignments[1]])
@pytest.mark.parametrize("name", ["source_model", "source_layer"])
@pytest.mark.parametrize("arrays", [None, ([[0, 1], [1, 0]], [[0, 0], [1, 1]])])
def test_arrays_are_read_only(make, name, arrays):
    plan = MoeConstructionPlan(*arrays) if arrays else plan_moe_construction(2, 2)
    array = getattr(make(plan), name)
    assert array.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        array[...] = 7
    with pytest.raises(ValueError, match="cannot set WRITEABLE flag"):
        array.flags.writeable = True


def test_arrays_have_the_plans_shape():
    plan = plan_moe_construction(3, 2, MoeConfig(4))
    assert plan.source_model.tolist() == [[0, 1, 2, 0]] * 2
    assert plan.source_layer.tolist() == [[0] * 4, [1] * 4]
    assert plan.assignments.source_model.tolist() == plan.source_model.tolist()
    assert plan.assignments[1].source_layer.tolist() == [1] * 4


def test_a_plan_does_not_see_later_changes_to_its_arguments():
    models, layers = np.zeros((2, 2), int), np.zeros((2, 2), int)
    view = models.view()
    view.flags.writeable = False
    plan = MoeConstructionPlan(view, layers)
    models[:], layers[:] = 9, 9
    assert plan.source_model.max() == plan.source_layer.max() == 0


@pytest.mark.parametrize("name", ["num_models", "router_init", "source_model", "num_layers"])
def test_a_plan_is_immutable(name):
    with pytest.raises(AttributeError, match=name):
        setattr(plan_moe_construction(2, 2), name, 1)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_every_integer_dtype(dtype):
    array = np.array([[0, 2], [1, 2]], dtype)
    plan = MoeConstructionPlan(array, array[::-1])
    assert plan.num_models == 3
    assert plan.source_layer.tolist() == [[1, 2], [0, 2]]
    # Slices with any stride, Fortran order, and another byte order too.
    assert MoeConstructionPlan(np.asfortranarray(array), array[::-1]) == plan
    assert MoeConstructionPlan(array.astype(array.dtype.newbyteorder()), array[::-1]) == plan


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0.0]], [[0]]), TypeError, "source_model must hold integers, got an array of float64"),
        (([[0]], [["a"]]), TypeError, "source_layer must hold integers, got an array of <U1"),
        (([[True]], [[0]]), TypeError, "source_model must hold integers, got an array of bool"),
        (
            ([[None]], [[0]]),
            TypeError,
            "source_model must be an integer, got None of type NoneType",
        ),
        (([[0, -1]], [[0, 0]]), MoeConfigError, "source_model must be at least 0, got -1"),
        (
            ([[2**63]], [[0]]),
            MoeConfigError,
            f"source_model must be at most {2**63 - 1}, got {2**63}",
        ),
        (
            ([[2**64]], [[0]]),
            MoeConfigError,
            f"source_model must be at most {2**63 - 1}, got {2**64}",
        ),
        (([[0], [0, 1]], [[0]]), MoeConfigError, "source_model must have rows of one length"),
        (
            ([0], [0]),
            MoeConfigError,
            r"source_model and source_layer must both .* \(1,\) and \(1,\)",
        ),
        (([[0]], [[0, 0]]), MoeConfigError, r".* got \(1, 1\) and \(1, 2\)"),
    ],
)
def test_arrays_that_make_no_plan(arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        MoeConstructionPlan(*arguments)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"num_models": 1}, MoeConfigError, "source_model holds 1, but num_models is 1"),
        ({"num_models": -1}, MoeConfigError, "num_models must be at least 0, got -1"),
        ({"num_models": 2.0}, TypeError, r"num_models must be an integer, got 2\.0 of type float"),
        (
            {"router_init": "zero"},
            MoeConfigError,
            "router_init must be one of 'random', .*, got 'zero'",
        ),
        ({"router_init": 1}, TypeError, "router_init must be a RouterInit or its string, got 1"),
    ],
)
def test_keywords_that_make_no_plan(keywords, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        MoeConstructionPlan([[0, 1]], [[0, 0]], **keywords)


def test_empty_plans():
    plan = MoeConstructionPlan([[]], [[]])
    assert (plan.num_layers, plan.num_experts, plan.num_models) == (1, 0, 0)
    assert plan.assignments == [[]]
    assert plan.report(4, 4, 0) == MoeReport(0, 1, 0.0, 0)


# ---- wrong arguments ----


@pytest.mark.parametrize("name", ["num_models", "num_layers"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, MoeConfigError, "must be at least 1, got 0"),
        (-1, MoeConfigError, "must be at least 1, got -1"),
        (1.0, TypeError, r"must be an integer, got 1\.0 of type float"),
        ("1", TypeError, "must be an integer, got '1' of type str"),
        (True, TypeError, "must be an integer, got True of type bool"),
        (None, TypeError, "must be an integer, got None of type NoneType"),
    ],
)
def test_wrong_numbers(name, value, error, message):
    with pytest.raises(error, match=f"^{name} {message}$"):
        plan_moe_construction(**{"num_models": 1, "num_layers": 1, name: value})


@pytest.mark.parametrize("config", [8, "top_k", {"num_experts": 8}, MoeConfig])
def test_wrong_configuration(config):
    with pytest.raises(TypeError, match=r"^config must be a MoeConfig, got "):
        plan_moe_construction(1, 1, config)


# ---- sizes ----


def test_a_thousand_by_a_thousand_costs_kilobytes():
    tracemalloc.start()
    plan = plan_moe_construction(7, 1000, MoeConfig(1000))
    assert plan.assignments[999][999] == ExpertAssignment(999, 5, 999)
    assert plan.report(4096, 11008, 1000).num_layers == 1000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**18
    assert len(pickle.dumps(plan)) < 2**15


def test_more_layers_and_experts_than_memory_has_places():
    """2**46 assignments: whatever looks at all of them one by one never ends."""
    plan = plan_of(3, 2**23, 2**23)
    assert plan.assignments[-1][-1] == ExpertAssignment(2**23 - 1, (2**23 - 1) % 3, 2**23 - 1)
    assert plan.report(1, 1, 1).load_balance == plan_of(3, 1, 2**23).report(1, 1, 1).load_balance
    assert plan == plan_of(3, 2**23, 2**23)
    assert plan != plan_of(2, 2**23, 2**23)
    assert "8388608" in repr(plan)


@pytest.mark.parametrize(
    "size", [2**27 + 1, 2**40, 2**62, 2**63, 2**64 + 1, pytest.param(10**5000, id="huge")]
)
def test_absurd_sizes_name_the_argument(size):
    with pytest.raises(MoeConfigError, match=r"^num_layers must be at most 134217728, got "):
        plan_moe_construction(1, size)
    with pytest.raises(MoeConfigError, match=r"^num_experts must be at most 134217728, got "):
        plan_of(1, 1, size)


@pytest.mark.parametrize("size", [2**63, 2**64, 10**30])
def test_more_models_than_indices(size):
    with pytest.raises(
        MoeConfigError, match=f"^num_models must be at most {2**63 - 1}, got {size}"
    ):
        plan_moe_construction(size, 1)


def test_absurdly_many_models():
    plan = plan_moe_construction(2**63 - 1, 2)
    assert [a.source_model for a in plan.assignments[1]] == list(range(8))
    assert plan.report(1, 1, 8).unused_models == range(8, 2**63 - 1)


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space")
def test_too_little_memory_names_the_argument():
    script = """
import resource, sys
from moe_fast import MoeConfig, compute_expert_load_balance, plan_moe_construction
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for call in (
    lambda: plan_moe_construction(1, 1, MoeConfig(2**26)),
    lambda: plan_moe_construction(1, 2**26),
    lambda: compute_expert_load_balance([2**26]),
):
    try:
        call()
    except MemoryError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        "num_experts=67108864: no memory for a table of 536870912 bytes",
        "num_layers=67108864: no memory for a table of 536870912 bytes",
        "source_model=67108864: no memory for 67108865 counters",
    ]


# ---- the report ----

naturals = st.integers(0, 2**70)


@given(plans_and_lists(), naturals, naturals, naturals)
def test_the_report_counts_exactly(both, hidden_dim, intermediate_dim, num_experts):
    plan, lists = both
    report = plan.report(hidden_dim, intermediate_dim, num_experts)
    ffn = 3 * hidden_dim * intermediate_dim  # gate, up and down projections
    assert report.total_params_estimate == len(lists) * num_experts * (ffn + hidden_dim)
    assert type(report.total_params_estimate) is int
    assert report.num_experts == num_experts
    assert report.num_layers == len(lists)
    assert report.load_balance == compute_expert_load_balance(lists)
    used = {a.source_model for layer in lists for a in layer}
    assert report.unused_models == tuple(m for m in range(plan.num_models) if m not in used)


def test_numpy_sizes_do_not_wrap():
    report = plan_moe_construction(1, 2).report(np.int32(2**31 - 1), np.int64(2**62), np.uint8(255))
    assert report.total_params_estimate == 2 * 255 * (3 * (2**31 - 1) * 2**62 + 2**31 - 1)


def test_the_report_names_models_that_are_left_out():
    assert plan_moe_construction(11, 1).report(1, 1, 8).unused_models == (8, 9, 10)
    assert MoeConstructionPlan([[4, 1]], [[0, 0]]).report(1, 1, 1).unused_models == (0, 2, 3)
    assert plan_moe_construction(8, 1).report(1, 1, 8).unused_models == ()


@pytest.mark.parametrize("name", ["hidden_dim", "intermediate_dim", "num_experts"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, MoeConfigError, "must be at least 0, got -1"),
        (1.5, TypeError, r"must be an integer, got 1\.5 of type float"),
        ("1", TypeError, "must be an integer, got '1' of type str"),
        (False, TypeError, "must be an integer, got False of type bool"),
    ],
)
def test_the_report_refuses(name, value, error, message):
    arguments = {"hidden_dim": 4, "intermediate_dim": 4, "num_experts": 4, name: value}
    with pytest.raises(error, match=f"^{name} {message}$"):
        plan_moe_construction(1, 1).report(**arguments)


# ---- load balance ----


def by_counting(models):
    """The definition, in exact integers until the floats begin."""
    counts = [0] * (max(models) + 1)
    for model in models:
        counts[model] += 1
    mean = float(sum(counts)) / float(len(counts))
    variance = 0.0
    for count in counts:
        variance += (count - mean) * (count - mean)
    return math.sqrt(variance / float(len(counts))) / mean


@given(st.lists(st.lists(st.integers(0, 30), max_size=9), max_size=9))
def test_load_balance(layers):
    models = [model for layer in layers for model in layer]
    expected = by_counting(models) if models else 0.0
    assignments = [[ExpertAssignment(0, model, 0) for model in layer] for layer in layers]
    for form in (layers, assignments, tuple(map(tuple, assignments)), models):
        assert compute_expert_load_balance(form) == expected
    for dtype in (np.int8, np.uint16, np.int64, np.uint64):
        array = np.array(models, dtype)
        assert compute_expert_load_balance(array) == expected
        assert compute_expert_load_balance(array[::-1].reshape(-1, 1)) == expected


@given(plans_and_lists())
def test_load_balance_of_every_form_of_a_plan(both):
    plan, lists = both
    expected = by_counting([a.source_model for layer in lists for a in layer])
    for form in (plan, plan.assignments, list(plan.assignments), lists, plan.source_model):
        assert compute_expert_load_balance(form) == expected
    assert compute_expert_load_balance(plan.assignments[0]) == compute_expert_load_balance(
        lists[:1]
    )


@pytest.mark.parametrize("nothing", [[], (), [[]], [[], []], np.empty((0, 3)), np.array([], int)])
def test_no_assignments_are_balanced(nothing):
    assert compute_expert_load_balance(nothing) == 0.0


def test_a_model_above_all_used_ones_is_not_counted():
    assert plan_moe_construction(64, 2, MoeConfig(3)).report(1, 1, 3).load_balance == 0.0


@pytest.mark.parametrize(
    ("assignments", "error", "message"),
    [
        (None, TypeError, "assignments must be a plan, .*, got NoneType"),
        (7, TypeError, "assignments must be a plan, .*, got int"),
        ("01", TypeError, "assignments must be a plan, .*, got str"),
        (b"01", TypeError, "assignments must be a plan, .*, got bytes"),
        ({0: 1}, TypeError, "assignments must be a plan, .*, got dict"),
        ({0, 1}, TypeError, "assignments must be a plan, .*, got set"),
        (iter([[0]]), TypeError, "assignments must be a plan, .*, got list_iterator"),
        ([[0.0]], TypeError, r"source_model must be an integer, got 0\.0 of type float"),
        ([["0"]], TypeError, "source_model must be an integer, got '0' of type str"),
        (["01"], TypeError, "source_model must be an integer, got '01' of type str"),
        ([[True]], TypeError, "source_model must be an integer, got True of type bool"),
        ([[[0]]], TypeError, r"source_model must be an integer, got \[0\] of type list"),
        ([[-1]], MoeConfigError, "source_model must be at least 0, got -1"),
        ([[ExpertAssignment(0, -2, 0)]], MoeConfigError, "source_model must be at least 0, got -2"),
        (
            [[ExpertAssignment(0, 0.5, 0)]],
            TypeError,
            r"source_model must be an integer, got 0\.5 .*",
        ),
        ([2**63], MoeConfigError, f"source_model must be at most {2**63 - 1}, got {2**63}"),
        (np.array([-1, 0]), MoeConfigError, "assignments must be at least 0, got -1"),
        (np.array([0.0]), TypeError, "assignments must hold integers, got an array of float64"),
        (np.array([True]), TypeError, "assignments must hold integers, got an array of bool"),
        (np.array(["0"]), TypeError, "assignments must hold integers, got an array of <U1"),
        (np.array([2**64]), MoeConfigError, f"assignments must be at most .*, got {2**64}"),
        ([2**27], MoeConfigError, "source_model must be at most 134217727, got 134217728"),
        ([2**63 - 1], MoeConfigError, "source_model must be at most 134217727, got .*"),
    ],
)
def test_load_balance_refuses(assignments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        compute_expert_load_balance(assignments)


def test_a_sequence_that_holds_itself_ends():
    endless = []
    endless.append(endless)
    with pytest.raises(
        TypeError, match=r"^source_model must be an integer, got \[\[.* of type list$"
    ):
        compute_expert_load_balance(endless)


# ---- many threads at once ----


def test_threads_share_a_plan():
    plan = plan_of(7, 40, 30)
    lists = by_definition(7, 40, 30)
    expected = plan.report(64, 128, 30)
    failures = []
    start = threading.Barrier(8)

    def work(seed):
        generator = np.random.default_rng(seed)
        start.wait()
        for _ in range(30):
            layer, expert = int(generator.integers(40)), int(generator.integers(30))
            checks = (
                plan.assignments[layer][expert] == lists[layer][expert],
                plan.assignments[layer] == lists[layer],
                plan.report(64, 128, 30) == expected,
                compute_expert_load_balance(plan) == expected.load_balance,
                compute_expert_load_balance(lists[:layer])
                == compute_expert_load_balance(plan.assignments[:layer]),
                plan_of(7, 40, 30) == plan,
                pickle.loads(pickle.dumps(plan)) == plan,
            )
            if not all(checks):
                failures.append((seed, layer, expert, checks))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
