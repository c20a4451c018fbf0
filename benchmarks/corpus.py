"""Text of several kinds, from packages of a Debian system: code, manuals, licences, quotations.

Each kind gives the same number of characters, from many files, each of which gives at most a
little. Every sixteenth file is held out.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path

KINDS = {
    "Python": ("usr/lib/python3*/**/*.py",),
    "C": ("usr/include/*.h", "usr/include/linux/*.h", "usr/include/x86_64-linux-gnu/**/*.h"),
    "Perl": ("usr/share/perl/5*/**/*.pm", "usr/share/perl5/**/*.pm"),
    "manual pages": ("usr/share/man/man[1-8]/*.gz",),
    "German manual pages": ("usr/share/man/de/man[1-8]/*.gz",),
    "French manual pages": ("usr/share/man/fr/man[1-8]/*.gz",),
    "changelogs": ("usr/share/doc/*/changelog*.gz",),
    "licences": ("usr/share/common-licenses/*", "usr/share/doc/*/copyright"),
    "help of Vim": ("usr/share/vim/vim*/doc/*.txt",),
    "HTML": ("usr/share/doc/**/*.html",),
    "quotations": ("usr/share/games/fortunes/*[a-z]",),
}
CHARACTERS_OF_KIND = 900_000
MOST_CHARACTERS = 60_000  # of one file, so that no file stands for its kind
HELD_OUT = 16  # every so many files


def read_corpus(root: Path = Path("/")) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The texts of each kind to train on, and those held out."""
    train: dict[str, list[str]] = {}
    held_out: dict[str, list[str]] = {}
    for kind, patterns in KINDS.items():
        files = sorted({path.resolve() for glob in patterns for path in root.glob(glob)})
        texts = spread([text for text in read(files) if len(text) > 500])
        if texts:
            train[kind] = [text for i, text in enumerate(texts) if i % HELD_OUT]
            held_out[kind] = texts[::HELD_OUT]
    return train, held_out


def read(files: Iterable[Path]) -> Iterator[str]:
    """The start of each file that is text."""
    for file in files:
        if not file.is_file() or file.suffix in (".dat", ".u8"):
            continue
        data = file.read_bytes()
        if file.suffix == ".gz":
            data = gzip.decompress(data)
        try:
            yield data.decode()[:MOST_CHARACTERS]
        except UnicodeDecodeError:
            continue


def spread(texts: list[str]) -> list[str]:
    """Texts at equal distances, until they have as many characters as a kind gets."""
    total = sum(map(len, texts))
    chosen: list[str] = []
    seen = taken = 0
    for text in texts:
        seen += len(text)
        if taken + len(text) / 2 <= CHARACTERS_OF_KIND * min(1.0, seen / total):
            chosen.append(text)
            taken += len(text)
    return chosen
