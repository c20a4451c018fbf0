"""The compiled kernels, at the level chosen for this processor when first imported."""

from typing import TYPE_CHECKING

from moe_fast.kernels.level import chosen, load

level_in_use = chosen()
if TYPE_CHECKING:
    from moe_fast.kernels import _baseline as compiled
else:
    compiled = load(level_in_use)
