"""A plugin of pytest: this processor, with what is emulated, runs every level."""

from moe_fast.kernels import level

level.supports = lambda name: True
