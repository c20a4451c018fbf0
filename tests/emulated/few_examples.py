"""A plugin of pytest: `--hypothesis-profile few`, for processors that are emulated."""

from hypothesis import settings

settings.register_profile("few", deadline=None, max_examples=5)
