"""Where a model is: a folder, or a repository of the Hugging Face Hub, of which the cache has one.

Only what a model folder here can hold is ever fetched: safetensors, configuration, tokenizer, and
code that a configuration names, which is copied and never run. Configuration and weights are
needed. The rest is optional: a cache that lacks it is as good as a repository that never had it.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from moe_fast.errors import CheckpointError
from moe_fast.storage.companions import CODE, COMPANIONS, TEMPLATES, has_tokenizer, named_code
from moe_fast.storage.files import is_absent
from moe_fast.storage.other_formats import describe_loose_safetensors, describe_other_format
from moe_fast.storage.safetensors_header import INDEX_FILE, SINGLE_FILE, read_index
from moe_fast.storage.strict_json import read_json

# ORGANISATION/NAME, or ORGANISATION/NAME@REVISION.
REPOSITORY = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
# What browsers show, with one slash where pathlib has made one of two.
ADDRESS = re.compile(
    r"(?:hf:/{1,2}|(?:https?:/{1,2})?(?:www\.)?(?:huggingface\.co|hf\.co)/|git@hf\.co:)"
    r"(?:models/)?(?P<name>\w[\w.-]*/\w[\w.-]*?)(?:\.git)?"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[\w.-]+))?/?(?:[?#].*)?",
    re.ASCII,
)
# The folder in which the Hub's cache keeps a revision of a model.
SNAPSHOT = re.compile(r"models--(?P<name>[\w.-]+)[/\\]snapshots[/\\]\w+[/\\]?$")
CONFIG = "config.json"
# What a repository of an adapter has in place of a model's files.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"  # says the license
# Fetched first; then what these say is needed.
FETCHED_FIRST = (CONFIG, ADAPTER_CONFIG, INDEX_FILE, *COMPANIONS, CARD)
OF_FOLDERS = ("*/*",)  # what lies deeper is another format's, or another model's


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
    name = os.fspath(model).replace(os.sep, "/")
    if not os.path.lexists(name):
        name = repository_name(name)
        if re.match("[a-z]{2,}:/", name):  # a Path has one slash
            raise CheckpointError(
                "is not a model's address on the Hugging Face Hub; download it and give its folder",
                file=name,
            )
    path = Path(name)
    match = REPOSITORY.fullmatch(name)
    if match is None or os.path.lexists(path):
        return str(path.absolute())
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{match[0]!r} is not a local folder; to take it for a model on the Hugging Face Hub "
            "needs huggingface_hub: pip install 'moe-fast[hub]'"
        ) from None
    return str(find_repository(match["name"], match["revision"], match[0]).absolute())


def find_repository(name: str, revision: str | None, called: str) -> Path:
    """The snapshot of a repository, whole as far as anybody needs it."""
    try:
        with quiet():
            folder, reason = fetch(name, revision, FETCHED_FIRST, OF_FOLDERS)
    except Exception as error:  # those of the network are of whichever library it came with
        raise CheckpointError(
            f"{called!r} is not a local folder, and not a model that the Hugging Face Hub or its "
            f"cache gives: {in_words(error)}"
        ) from None
    if is_absent(folder / CONFIG) and not is_absent(folder / ADAPTER_CONFIG):
        return find_adapter(folder, name, called)
    if is_absent(folder / CONFIG):
        raise CheckpointError(f"{called!r} on the Hugging Face Hub {describe(name, revision)}")
    # From here on by the commit, which the folder is named after: names may move on meanwhile.
    commit = folder.name
    weights = [SINGLE_FILE]
    if not is_absent(folder / INDEX_FILE):  # where both are there, readers take the single file
        weights += read_index(folder / INDEX_FILE)
    missing = missing_weights(folder, weights)
    if missing:
        _, reason = fetch(name, commit, [escape(file) for file in weights], ())
        missing = missing_weights(folder, weights)
    if missing and reason is not None:
        raise CheckpointError(
            f"{called!r}: the Hub's cache has no {missing[0]}"
            + f" and lacks {len(missing) - 1} files more" * (len(missing) > 1)
            + f", and it cannot be fetched: {in_words(reason)}"
        )
    if missing and len(weights) == 1 and (found := describe(name, commit, "")):
        raise CheckpointError(f"{called!r} on the Hugging Face Hub {found}")
    with quiet():
        fetch(name, commit, [TEMPLATES], ("*/*/*",))
        if named_code(folder, read_json(folder / CONFIG)):
            fetch(name, commit, [CODE], OF_FOLDERS)
    return folder


def find_adapter(folder: Path, name: str, called: str) -> Path:
    """The snapshot of an adapter's repository, with its weights."""
    if is_absent(folder / ADAPTER_WEIGHTS):
        try:
            fetch(name, folder.name, [ADAPTER_WEIGHTS], ())
        except Exception as error:
            raise CheckpointError(
                f"{called!r}: the Hub's cache has no {ADAPTER_WEIGHTS}, and it cannot be fetched: "
                f"{in_words(error)}"
            ) from None
    return folder


def missing_weights(folder: Path, weights: Sequence[str]) -> list[str]:
    """What a snapshot lacks of the single file and, without that, of those of the index."""
    if not is_absent(folder / weights[0]):
        return []
    return [file for file in weights[1:] or weights if is_absent(folder / file)]


@contextmanager
def quiet() -> Iterator[None]:
    """Small files are fetched without progress bars."""
    utils: Any = importlib.import_module("huggingface_hub.utils")
    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def fetch(
    name: str, revision: str | None, files: Sequence[str], but: Sequence[str]
) -> tuple[Path, Exception | None]:
    """The snapshot of a repository with the files of some patterns, as far as they can be had.

    If not all can be fetched, and the cache has the revision, also the reason. Which of the files
    are then missing, and whether it matters, is for the caller to see: the library says nothing of
    the one and refuses for any that it knows of.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    patterns = [CONFIG, *files]  # the library warns where nothing matches
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=list(but)
        )
    except Exception as error:
        try:
            config = hf_hub_download(name, CONFIG, revision=revision, local_files_only=True)
        except Exception:  # the cache has nothing of it, so the first error says why
            raise error from None
        return Path(config).parent, error
    return Path(folder), None


def describe(name: str, revision: str | None, otherwise: str = "has no config.json") -> str:
    """What a repository holds in place of a model, by the names of its files."""
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(name, revision=revision)
    except Exception:  # not known, then
        return otherwise
    names = [each for each in names if "/" not in each]
    return describe_other_format(names) or describe_loose_safetensors(names) or otherwise


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def find_missing_tokenizer(folder: Path) -> Iterator[str]:
    """A warning for a model of the Hub's cache that came without its tokenizer.

    Repositories have one, so a cache without it was filled for something else.
    """
    if SNAPSHOT.search(str(folder)) and not (has_tokenizer(folder) or named_code(folder)):
        yield (
            f"{folder}: the Hub's cache has no tokenizer for it, so the output gets none; fetch "
            "the whole model, with HF_HUB_OFFLINE unset"
        )
