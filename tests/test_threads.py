"""The pool: every range once, errors passed on, alive in a forked child."""

import hashlib
import multiprocessing
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import MoeConfigError, compute_gate_weights
from moe_fast.threads import as_threads, default_threads, share


@given(size=st.integers(0, 200), threads=st.integers(1, 9), grain=st.integers(1, 50))
def test_ranges_cover_the_whole_once(size, threads, grain):
    ranges = []
    share(lambda start, stop: ranges.append((start, stop)), size, threads, grain=grain)
    assert sorted(i for start, stop in ranges for i in range(start, stop)) == list(range(size))
    assert len(ranges) <= threads
    assert all(stop - start >= grain for start, stop in ranges) or len(ranges) == 1


def test_ranges_run_at_the_same_time():
    together = threading.Barrier(3, timeout=30)
    share(lambda start, stop: together.wait(), 3, 3)


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_waits_for_the_other_ranges(failing):
    done = []

    def work(start, stop):
        if start == failing:
            raise ValueError(f"range {start} failed")
        threading.Event().wait(0.05)
        done.append(start)

    with pytest.raises(ValueError, match=f"range {failing} failed"):
        share(work, 4, 4)
    assert sorted(done) == [i for i in range(4) if i != failing]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork.*JAX:RuntimeWarning")
def test_a_forked_child_makes_its_own_pool():
    expected = digest_of_two_threads()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(digest_of_two_threads()))
    child.start()
    try:
        assert receiver.poll(60), "the child hangs"
        assert receiver.recv() == expected
    finally:
        child.kill()
        child.join()


def digest_of_two_threads():
    weights = compute_gate_weights(1024, 512, threads=2)  # large enough to be shared
    return hashlib.sha256(weights).hexdigest()


@pytest.fixture
def environment(monkeypatch):
    default_threads.cache_clear()
    yield monkeypatch
    default_threads.cache_clear()


def test_the_default_is_one_thread(environment):
    environment.delenv("MOE_FAST_NUM_THREADS", raising=False)
    assert as_threads(None) == 1


def test_the_environment_sets_the_default(environment):
    environment.setenv("MOE_FAST_NUM_THREADS", "3")
    assert as_threads(None) == 3
    assert as_threads(2) == 2


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "4096"])
def test_a_bad_environment_is_named(environment, value):
    environment.setenv("MOE_FAST_NUM_THREADS", value)
    with pytest.raises(MoeConfigError, match=f"MOE_FAST_NUM_THREADS must be .* got '{value}'"):
        compute_gate_weights(4, 2)
