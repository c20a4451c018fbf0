"""The compiled kernels, at the level chosen for this processor when first imported."""

from moe_fast.kernels.level import chosen, load

level = chosen()
compiled = load(level)
