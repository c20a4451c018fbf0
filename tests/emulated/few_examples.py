"""A plugin of pytest: `--hypothesis-profile few`, for processors that are emulated."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "few", deadline=None, max_examples=5, suppress_health_check=[HealthCheck.too_slow]
)
