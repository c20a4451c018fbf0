"""Where a model is: a folder, or a repository of the Hugging Face Hub, of which the cache has one.

Only what a model folder here can hold is ever fetched: safetensors, configuration, tokenizer. What
could run code when opened is left where it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from moe_fast.errors import CheckpointError
from moe_fast.storage.companions import COMPANIONS

# ORGANISATION/NAME, or ORGANISATION/NAME@REVISION.
REPOSITORY = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
# What browsers show, with one slash where pathlib has made one of two.
ADDRESS = re.compile(
    r"https?:/{1,2}(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<name>\w[\w.-]*/\w[\w.-]*)"
    r"(?:/tree/(?P<revision>[\w.-]+))?/?(?:[?#].*)?",
    re.ASCII,
)
FETCHED = [
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    *COMPANIONS,
    "README.md",  # says the license
]
OF_FOLDERS = ["*/*"]  # what lies deeper is another format's, or another model's


def repository_name(model: str) -> str:
    """`ORGANISATION/NAME@REVISION` for the address of a repository's page; other names as given."""
    match = ADDRESS.fullmatch(model)
    if match is None:
        return model
    return match["name"] + (f"@{match['revision']}" if match["revision"] else "")


def find_model(model: str | os.PathLike[str]) -> str:
    """The folder of a model, absolute: that of this path, or else the cache's of that repository.

    A folder that is there wins over a repository of its name. A missing folder whose name no
    repository has comes back as it is, for whoever opens it to say so.

    Raises
    ------
    CheckpointError
        For a name that is neither a folder nor a repository that can be had.
    """
    name = repository_name(os.fspath(model).replace(os.sep, "/"))
    path = Path(name)
    match = REPOSITORY.fullmatch(name)
    if match is None or os.path.lexists(path):
        return str(path.absolute())
    name = match[0]
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{name!r} is no folder here; to take it for a model on the Hugging Face Hub needs "
            "huggingface_hub: pip install 'moe-fast[hub]'"
        ) from None
    try:
        folder = snapshot_download(
            match["name"],
            revision=match["revision"],
            allow_patterns=FETCHED,
            ignore_patterns=OF_FOLDERS,
        )
    except Exception as error:  # those of the network are of whichever library it came with
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{name!r} is no folder here, and no model that the Hugging Face Hub or its cache "
            f"gives: {type(error).__name__}: {reason}"
        ) from None
    return str(Path(folder).absolute())
