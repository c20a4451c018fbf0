"""Fixtures that more than one test file uses."""

from zlib import crc32

import pytest
from hypothesis import HealthCheck, settings

from moe_fast import kernels
from moe_fast.kernels.level import levels_available, load

# How long an example takes, to make or to try, depends on who else works on the machine.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


def pytest_addoption(parser):
    parser.addoption(
        "--sample",
        type=int,
        default=1,
        metavar="N",
        help="run one in N of each test's parameters: the same ones each time, at least one",
    )


def pytest_collection_modifyitems(config, items):
    """By a hash of its name: every N-th in order would be all of one kind in a product of kinds."""
    one_in = config.getoption("--sample")
    tests = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {min(each, key=place).nodeid for each in tests.values()}
    chosen = [item for item in items if place(item) % one_in == 0 or item.nodeid in kept]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
        items[:] = chosen


def place(item):
    return crc32(item.nodeid.encode())


@pytest.fixture(scope="module", params=levels_available())
def level(request):
    """Each SIMD level in turn that this processor runs, in use while the test runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "compiled", load(request.param))
        patch.setattr(kernels, "level_in_use", request.param)
        yield request.param
