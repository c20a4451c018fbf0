"""The colours of all pictures, and the arrays that a picture of a plan shows."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt

# Okabe and Ito's colours for the colour-blind (2008) without the black, in an order in which the
# first few differ in grey print too; beyond those, the numbers in the cells tell.
MODEL_COLORS = ("#0072b2", "#e69f00", "#f0e442", "#d55e00", "#56b4e9", "#009e73", "#cc79a7")
# Its lightness rises evenly, and red-green blindness changes little of it (Nuñez et al. 2018).
SCALE = "cividis"
# Points of that colour map.
CIVIDIS = ("#00224e", "#35456c", "#666970", "#948e77", "#c8b866", "#fee838")


class ExpertOrigins(Protocol):
    """Where each expert of each layer comes from: what a plan holds, and a picture shows."""

    @property
    def num_models(self) -> int: ...

    @property
    def source_model(self) -> npt.NDArray[Any]:
        """Integers `(num_layers, num_experts)`: the model of each expert."""
        ...

    @property
    def source_layer(self) -> npt.NDArray[Any]:
        """Integers `(num_layers, num_experts)`: that model's layer."""
        ...


def model_color(model: int, num_models: int) -> str:
    """The colour of a model: one of `MODEL_COLORS`, or with many models a point of the scale."""
    if num_models <= len(MODEL_COLORS):
        return MODEL_COLORS[model]
    place = model / (num_models - 1) * (len(CIVIDIS) - 1)
    start = min(int(place), len(CIVIDIS) - 2)
    left, right = (split_channels(color) for color in CIVIDIS[start : start + 2])
    part = place - start
    return "#" + "".join(
        f"{round(a + (b - a) * part):02x}" for a, b in zip(left, right, strict=True)
    )


def split_channels(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def contrasting(color: str) -> str:
    """Black or white, whichever stands out from `color`."""
    red, green, blue = split_channels(color)
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 127 else "#fff"
