"""The compiled kernels, at the level chosen for this processor when first imported."""

from moe_fast.kernels.level import chosen, load

level_in_use = chosen()
compiled = load(level_in_use)
