"""A command as a whole process: how long it takes, and the most memory it has.

This file is also the program that runs it: the memory that Linux reports of a process is at least
that of the one that started it, so the one that starts it must be small.
"""

import json
import os
import subprocess
import sys
import time


def measured(command: list[str]) -> dict[str, float]:
    """Run a command and measure it from a small process; raise for an exit code but 0."""
    program = [sys.executable, "-S", "-E", __file__, *command]
    done = subprocess.run(program, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    usage: dict[str, float] = json.loads(done.stdout)
    return usage


def main() -> None:
    begin = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(1)
    unit = 1 if sys.platform == "darwin" else 1024
    cpu = usage.ru_utime + usage.ru_stime
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": usage.ru_maxrss * unit}))


if __name__ == "__main__":
    main()
