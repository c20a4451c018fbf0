"""A hundred builds killed at random moments, each then completed by the same call."""

from __future__ import annotations

import random
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from folders import contents
from moe_fast import MoeConfig, build_moe
from moe_fast.demo import make_dense_model

KILLS = 50  # each of new outputs and of replaced ones
# Forked where everything is imported already, so that the time until the kill is spent building.
context = get_context("forkserver")
context.set_forkserver_preload(["moe_fast.checkpoint.build", "moe_fast.checkpoint.random_pieces"])


class Build(context.Process):
    """A build in a process of its own."""

    def __init__(self, dense: Path, output: Path, **how: Any) -> None:
        # Waiting for the disk makes writing the longest part, the one to be killed in.
        how |= {"max_shard_size": "150kB", "checksum": True, "fsync": True}
        super().__init__(target=build_moe, args=(dense, output, MoeConfig(8)), kwargs=how)
        self.start()

    def finish(self) -> None:
        self.join()
        assert self.exitcode == 0

    def kill_after(self, seconds: float) -> bool:
        """Kill it; returns whether it was still running."""
        time.sleep(seconds)
        self.kill()
        self.join()
        return self.exitcode != 0


def timed(dense: Path, output: Path) -> float:
    started = time.perf_counter()
    Build(dense, output).finish()
    return time.perf_counter() - started


@pytest.mark.parametrize("replacing", [False, True], ids=["new output", "replaced output"])
def test_killed_at_random_moments(tmp_path, replacing):
    for seed in (0, 1):
        make_dense_model(tmp_path / f"dense-{seed}", seed=seed, num_hidden_layers=6)
    dense, place = tmp_path / "dense-1", tmp_path / "place"
    output = place / "moe"
    Build(dense, tmp_path / "whole").finish()
    seconds = min(timed(dense, tmp_path / f"timed-{i}") for i in range(5))
    whole = contents(tmp_path / "whole")
    assert len(whole) > 30
    Build(tmp_path / "dense-0", tmp_path / "old").finish()
    old = contents(tmp_path / "old")

    choose = random.Random(0)
    died = went_on = rounds = 0
    while died < KILLS or went_on < KILLS // 10:
        rounds += 1
        assert rounds < 10 * KILLS, (died, went_on)
        if replacing:
            build_moe(
                tmp_path / "dense-0", output, MoeConfig(8), overwrite=True, max_shard_size="150kB"
            )
            old = contents(output)
        how = {"overwrite": replacing, "threads": choose.choice([1, 3])}
        finished: set[int] = set()
        for _ in range(choose.choice([1, 1, 2])):
            died += Build(dense, output, **how).kill_after(choose.uniform(0, seconds))
            if output.exists() and contents(output) == whole:
                # Killed after its last rename it leaves this, unlocked, for the next one to remove.
                beside = {".moe.partial", ".moe.partial/lock"}
                break
            # What stands in the output's place is the old one, or nothing, where the kill fell
            # between the two renames that replace it: then it stands beside.
            assert not output.exists() or (replacing and contents(output) == old)
            kept = [file for file in place.glob(".moe.partial/*/*") if file.name in whole]
            finished = {file.stat().st_ino for file in kept if file.parent.name != "old"}
        else:
            beside = set()
            Build(dense, output, **how).finish()
            went_on += len({file.stat().st_ino for file in output.iterdir()} & finished) > 0
        assert contents(output) == whole
        if not replacing:
            others = [path for path in place.rglob("*") if not path.is_relative_to(output)]
            assert {path.relative_to(place).as_posix() for path in others} <= beside
            output.rename(tmp_path / f"done-{rounds}")
    print(f"{died} builds died in {rounds} rounds, {went_on} went on from finished files")
