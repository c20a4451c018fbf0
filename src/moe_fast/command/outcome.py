"""How a command ends: with a report, in tables or JSON, or with an error and its exit code."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from moe_fast.command.console import complain
from moe_fast.command.declaration import Call
from moe_fast.command.options import in_options, is_about_option, option_names
from moe_fast.errors import MoeFastError, list_problems
from moe_fast.reports import Report, json_document

AnyReport = TypeVar("AnyReport", bound=Report)
FULL = (errno.ENOSPC, errno.EDQUOT)


def show(report: AnyReport, as_table: Callable[[AnyReport], None], as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        as_table(report)


def print_json(values: Mapping[str, Any]) -> None:
    print(json_document(values))


@contextmanager
def reported_errors(call: Call, in_recipe: Sequence[str] = (), **called: str) -> Iterator[None]:
    """Turn an error of this package or of the system into a message and an exit code.

    The code is 2 if the value of an option is wrong, and 1 otherwise. The message names the option,
    unless a recipe says its value; `called` has the options of arguments with other names.
    """
    try:
        yield
    except MoeFastError as error:
        parameters = [each for each in call.command.parameters if each.name not in in_recipe]
        options = option_names(parameters, called)
        problems = [in_options(problem, options) for problem in error.problems]
        complain(f"error: {list_problems(problems)}")
        fail(error, 2 if any(is_about_option(each, options) for each in error.problems) else 1)
    except (ImportError, MemoryError, OSError) as error:
        complain(f"error: {describe_os_error(error) if isinstance(error, OSError) else error}")
        fail(error, 1)
    except KeyboardInterrupt as error:
        complain("interrupted")
        fail(error, 130)  # as shells do: 128 and the number of the signal


def fail(error: BaseException, code: int) -> NoReturn:
    for note in getattr(error, "__notes__", ()):
        complain(note)
    raise SystemExit(code) from None


def describe_os_error(error: OSError) -> str:
    """An error of the system as a message: the file, and what is wrong with it."""
    if error.strerror is None:
        return str(error)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
    advice = "; make room, or choose another disk" if error.errno in FULL else ""
    return ": ".join([*([" -> ".join(names)] if names else []), f"{error.strerror}{advice}"])
