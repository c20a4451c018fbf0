"""`moe-fast` and `python -m moe_fast`."""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> None:
    """Run the command; Ctrl-C at any moment ends it with one word and exit code 130."""
    try:
        run(sys.argv[1:])
    except KeyboardInterrupt:  # commands report their own, and clean up
        stop()


def stop(*_: object) -> "NoReturn":
    """End at once; nothing is open yet, or all is closed."""
    sys.stderr.write("interrupted\n")
    sys.stderr.flush()
    os._exit(130)  # as shells do: 128 and the number of the signal


def run(arguments: list[str]) -> None:
    if arguments == ["--version"]:  # needs none of what the commands need
        from moe_fast.version import __version__

        print(f"moe-fast {__version__}")
        return
    import gc
    import signal

    # A large model's design is hundreds of thousands of objects, none of them garbage: to look
    # through them as often as Python does takes a quarter of the time.
    gc.set_threshold(50_000, 20, 20)
    # An exception would not do: modules of NumPy that it comes up in make an ImportError of it.
    guarded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if guarded:
        signal.signal(signal.SIGINT, stop)
    try:
        from moe_fast.requirements import require_numpy

        require_numpy()
        from moe_fast.command.cli import command_for
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(
            f"moe-fast: the command needs {error.name}: pip install 'moe-fast[checkpoint,cli]'"
        )
    except ImportError as error:  # too old a NumPy, or no kernels; the message says what to do
        sys.exit(f"error: {error}")
    if guarded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        command_for(arguments)()
        sys.stdout.flush()
    except OSError as error:  # commands report their own: this is a full disk behind a `>`
        # Or the interpreter tries the rest again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"error: standard output: {error.strerror}")


if __name__ == "__main__":
    main()
