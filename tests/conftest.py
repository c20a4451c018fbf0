"""Fixtures that more than one test file uses."""

import pytest
from hypothesis import HealthCheck, settings

from moe_fast import kernels
from moe_fast.kernels.level import levels_available, load

# How long an example takes, to make or to try, depends on who else works on the machine.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")


@pytest.fixture(scope="module", params=levels_available())
def level(request):
    """Each SIMD level in turn that this processor runs, in use while the test runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "compiled", load(request.param))
        patch.setattr(kernels, "level_in_use", request.param)
        yield request.param
