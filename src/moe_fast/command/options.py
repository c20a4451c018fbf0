"""What the command calls the arguments that messages name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

__all__ = ["in_options"]
# Where the command and Python differ: Python's name, and the command's.
CALLED = {
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "n_group": "groups",
    "norm_topk_prob": "norm",
    "num_experts": "experts",
    "num_experts_per_tok": "experts_per_token",
    "num_layers": "layers",
    "num_models": "models",
    "topk_group": "groups_per_token",
}


def in_options(text: str, parameters: Iterable[Any], kept: Collection[str] = ()) -> str:
    """`text` with Python's names for a command's `parameters` replaced by what users write.

    Names of more than one word are found anywhere, others where an error about an argument has
    them: first. Paths stay as they are, and so do the parameters `kept`.
    """
    written = {
        each.name: each.opts[0] if each.opts[0].startswith("-") else each.name.upper()
        for each in parameters
        if each.name not in kept
    }
    names = {name: option for name, option in written.items() if "_" in name}
    names |= {name: written[called] for name, called in CALLED.items() if called in written}
    text = re.sub(r"^\w+(?= must | ')", lambda word: written.get(word[0], word[0]), text)
    return re.sub(r"(?<![\w./\\'-])\w+(?![\w/\\'])", lambda word: names.get(word[0], word[0]), text)
