"""An output appears whole or not at all; the same build goes on from what another left."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

for extra in ("ml_dtypes", "safetensors"):
    pytest.importorskip(extra)

from folders import contents, names_in
from moe_fast import CheckpointError, MoeConfig, build_moe, build_recipe, convert_moe
from moe_fast.demo import make_dense_model
from moe_fast.storage import staging, writer

CONFIG = MoeConfig(num_experts=3)
needs_links = pytest.mark.skipif(
    sys.platform == "win32", reason="links need a privilege on Windows"
)
SHARD = 100_000  # bytes; the outputs here have about eight files of weights


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    make_dense_model(tmp_path / "dense", seed=0)
    return tmp_path / "dense"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that only the output is written to."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def build(dense: Path, output: Path, **options: object) -> None:
    build_moe(dense, output, CONFIG, max_shard_size=f"{SHARD}B", **options)


def stop_after(count: int):
    """A progress callback that ends the build like Ctrl-C once `count` bytes are written."""

    def progress(written: int, total: int) -> None:
        if written > count:
            raise KeyboardInterrupt("stop")

    return progress


def interrupt(dense: Path, output: Path, count: int = 3 * SHARD, **options: object) -> Path:
    """Break a build off; returns the folder in which its finished files are kept."""
    with pytest.raises(KeyboardInterrupt, match="stop") as caught:
        build(dense, output, progress=stop_after(count), **options)
    assert not output.exists()
    (kept,) = (output.parent / f".{output.name}.partial").glob("*/")
    assert str(kept) in "".join(caught.value.__notes__)
    return kept


def identity(file: Path) -> tuple[int, int]:
    return file.stat().st_ino, file.stat().st_mtime_ns


def test_a_finished_build_leaves_nothing_beside_its_output(dense, place):
    build(dense, place / "moe")
    assert names_in(place) == ["moe"]


@pytest.mark.parametrize(
    "options", [{}, {"threads": 3}, {"checksum": True}, {"fsync": True}], ids=str
)
def test_the_same_build_goes_on_where_one_was_interrupted(dense, place, options):
    build(dense, place / "whole", **options)
    kept = interrupt(dense, place / "moe", **options)
    finished = {name: identity(kept / name) for name in names_in(kept)}
    assert 1 <= len(finished) < len(list((place / "whole").glob("*.safetensors")))
    reported = []
    build(dense, place / "moe", progress=lambda *args: reported.append(args), **options)
    assert {name: identity(place / "moe" / name) for name in finished} == finished
    assert contents(place / "moe") == contents(place / "whole")
    assert names_in(place) == ["moe", "whole"]
    assert reported[-1][0] == reported[-1][1]


def test_a_build_interrupted_before_its_first_file_leaves_nothing(dense, place):
    with pytest.raises(KeyboardInterrupt, match="stop"):
        build(dense, place / "moe", progress=stop_after(0))
    assert names_in(place) == []


def other_seed(dense: Path) -> None:
    make_dense_model(dense, seed=1)


def touched(dense: Path) -> None:
    os.utime(dense / "model.safetensors", ns=(0, 0))


def same_header(dense: Path) -> None:
    """Weights of the same size, written again: told by the file's time alone."""
    file = dense / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")


def test_a_worker_that_is_not_told_of_an_error_leaves_nothing(place):
    """Dask says that a task is cancelled while a worker still writes its file."""
    late = []

    def fail(output):
        with staging.staged(output, "0" * 64) as growing:
            late.append(threading.Thread(target=make_files_while_it_stands, args=(growing,)))
            late[-1].start()
            while not any(growing.iterdir()):
                pass
            raise CheckpointError("found by another worker")

    for _ in range(20):
        with pytest.raises(CheckpointError, match="found by another worker"):
            fail(place / "moe")
        late[-1].join()
        assert names_in(place) == []


def make_files_while_it_stands(folder):
    with contextlib.suppress(FileNotFoundError):
        for i in range(5000):
            (folder / str(i)).touch()


@pytest.mark.parametrize("change", [other_seed, touched, same_header])
def test_a_build_from_changed_sources_starts_afresh(dense, place, change):
    kept = interrupt(dense, place / "moe")
    finished = {identity(kept / name) for name in names_in(kept)}
    change(dense)
    build(dense, place / "moe")
    assert not finished & {identity(file) for file in (place / "moe").iterdir()}
    build(dense, place / "whole")
    assert contents(place / "moe") == contents(place / "whole")
    assert names_in(place) == ["moe", "whole"]


def test_another_build_starts_afresh(dense, place):
    interrupt(dense, place / "moe")
    for output in ("moe", "whole"):
        build_moe(dense, place / output, MoeConfig(2), max_shard_size=f"{SHARD}B")
    assert contents(place / "moe") == contents(place / "whole")
    assert names_in(place) == ["moe", "whole"]


@pytest.mark.parametrize("damage", ["truncated", "another header", "missing"])
def test_a_damaged_file_is_written_again(dense, place, damage):
    build(dense, place / "whole")
    kept = interrupt(dense, place / "moe")
    file = kept / names_in(kept)[0]
    data = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(data[:-1])
    elif damage == "another header":
        file.write_bytes(data[:20] + b"?" + data[21:])
    else:
        file.unlink()
        (kept / "stranger").write_text("x")
    build(dense, place / "moe")
    assert contents(place / "moe") == contents(place / "whole")


def test_an_output_is_replaced_only_by_a_complete_one(dense, place):
    build(dense, place / "moe")
    before = contents(place / "moe")
    make_dense_model(dense, seed=1)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        build(dense, place / "moe", overwrite=True, progress=stop_after(3 * SHARD))
    assert contents(place / "moe") == before
    build(dense, place / "moe", overwrite=True)
    assert contents(place / "moe") != before
    assert names_in(place) == ["moe"]


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "stop"), KeyboardInterrupt("stop")], ids=repr)
def test_a_failing_last_rename_brings_the_old_output_back(dense, place, monkeypatch, fault):
    build(dense, place / "moe")
    before = contents(place / "moe")
    rename = Path.rename

    def failing(self, target):
        if len(self.name) == 64:
            raise fault
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    make_dense_model(dense, seed=1)
    with pytest.raises(type(fault), match="stop"):
        build(dense, place / "moe", overwrite=True)
    assert contents(place / "moe") == before


@pytest.mark.parametrize("made_since", [False, True])
def test_a_replacement_cut_off_between_its_renames_is_undone_and_done_again(
    dense, place, made_since
):
    build(dense, place / "moe")
    kept = interrupt(dense, place / "other")
    (place / "moe").rename(kept.parent / "old")  # where kill -9 can leave it
    if made_since:
        (place / "other").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        build(dense, place / "other")
    assert (place / "other" / "config.json").exists()
    build(dense, place / "other", overwrite=True)
    assert names_in(place) == ["other"]


def test_a_build_in_another_process_is_refused_until_it_ends(dense, place):
    holder = textwrap.dedent(
        f"""
        import sys
        from moe_fast.storage.staging import staged
        from pathlib import Path
        with staged(Path({str(place / "moe")!r}), "0" * 64) as folder:
            (folder / "model.safetensors").touch()
            print("ready", flush=True)
            sys.stdin.read()
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(CheckpointError, match="another build is writing it"):
            build(dense, place / "moe")
        assert names_in(place) == [".moe.partial"]
        process.kill()
    assert not (place / "moe").exists()
    build(dense, place / "moe")
    assert names_in(place) == ["moe"]


def test_a_build_in_another_thread_is_refused(dense, place):
    with staging.staged(place / "moe", "0" * 64):
        errors = []

        def work() -> None:
            try:
                build(dense, place / "moe")
            except CheckpointError as error:
                errors.append(str(error))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert "another build is writing it" in errors[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_that_outlives_the_build_does_not_hold_its_lock(dense, place):
    holder = textwrap.dedent(
        f"""
        import os, signal, time
        from moe_fast.storage.staging import staged
        from pathlib import Path
        with staged(Path({str(place / "moe")!r}), "0" * 64) as folder:
            child = os.fork()
            if child:
                print(child, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        """
    )
    done = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True)
    child = int(done.stdout.readline())
    done.wait()
    try:
        build(dense, place / "moe")
    finally:
        os.kill(child, signal.SIGKILL)
        done.stdout.close()
    assert (place / "moe" / "config.json").exists()


def test_the_lock_file_of_a_build_that_just_ended_is_not_mistaken_for_ours(place, monkeypatch):
    """Between opening and locking, the holder may remove the file and end."""
    lock_file = staging.lock_file
    path = place / ".moe.partial" / "lock"
    removed = []

    def remove_first(file: int) -> None:
        if not removed:
            removed.append(path.unlink())
        lock_file(file)

    monkeypatch.setattr(staging, "lock_file", remove_first)
    with staging.locked(path, place / "moe"):
        assert path.exists()
    assert names_in(place) == []


def test_a_file_system_without_locks_can_be_written_to(dense, place, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    build(dense, place / "moe")
    assert names_in(place) == ["moe"]


@needs_links
def test_a_link_to_a_folder_to_come_is_followed(dense, place):
    (place / "link").symlink_to(place / "far" / "moe")
    build(dense, place / "link")
    assert (place / "link").is_symlink()
    assert (place / "far" / "moe" / "config.json").exists()


def refused(match: str, *args: object, **options: object) -> None:
    with pytest.raises(CheckpointError, match=match):
        build(*args, **options)


def test_an_output_that_holds_its_sources_is_refused(dense, tmp_path):
    before = contents(dense)
    for output in (dense, tmp_path, dense / ".." / "dense"):
        for overwrite in (False, True):
            match = (
                rf"^{re.escape(os.path.realpath(output))}: would replace {re.escape(str(dense))}, "
            )
            refused(match, dense, output, overwrite=overwrite)
    assert contents(dense) == before


def test_an_output_that_holds_any_of_its_sources_is_refused(dense, tmp_path):
    make_dense_model(tmp_path / "moe" / "second", seed=1)
    (tmp_path / "moe" / "config.json").write_text("{}")
    match = rf"moe: would replace .*{re.escape(str(tmp_path / 'moe' / 'second'))}, which"
    refused(match, [dense, tmp_path / "moe" / "second"], tmp_path / "moe", overwrite=True)
    second = tmp_path / "moe" / "second"
    refused(match, dense, tmp_path / "moe", overwrite=True, base=second)
    refused(
        match, dense, tmp_path / "moe", overwrite=True, target="qwen2_moe", shared_experts=second
    )
    assert (tmp_path / "moe" / "second" / "config.json").exists()


@pytest.mark.parametrize("made", [False, True])
def test_an_output_in_one_of_its_sources_is_refused(dense, tmp_path, made):
    output = dense / "deep" / "moe"
    if made:
        output.mkdir(parents=True)
    before = sorted(dense.rglob("*"))
    match = rf"^{re.escape(str(output))}: lies in {re.escape(str(dense))}, which it is made from"
    refused(match, dense, output)
    refused(match, dense, output, overwrite=True)
    assert sorted(dense.rglob("*")) == before


@needs_links
def test_an_output_in_what_a_source_is_a_link_to_is_refused(dense, tmp_path):
    (tmp_path / "link").symlink_to(dense)
    refused(
        rf"moe: lies in {re.escape(str(tmp_path / 'link'))}, which",
        tmp_path / "link",
        dense / "moe",
    )
    refused(rf"would replace {re.escape(str(tmp_path / 'link'))}, which", tmp_path / "link", dense)
    refused(rf"moe: lies in {re.escape(str(dense))}, which", dense, tmp_path / "link" / "moe")


@needs_links
def test_an_output_with_the_links_of_a_source_is_refused(dense, tmp_path):
    """As in the Hub's cache: the weights lie elsewhere, but configuration and tokenizer may not."""
    links = tmp_path / "elsewhere"
    links.mkdir()
    for file in dense.iterdir():
        (links / file.name).symlink_to(file)
    refused(rf"would replace {re.escape(str(links))}, which", links, links, overwrite=True)


def test_an_output_that_holds_what_else_is_read_is_refused(dense, place):
    np.save(place / "hidden.npy", np.zeros((4, 64), np.float32))
    (place / "config.json").write_text("{}")
    mapped = np.load(place / "hidden.npy", mmap_mode="r")
    match = rf"place: would replace {re.escape(str(place / 'hidden.npy'))}, which it is made from"
    refused(match, dense, place, overwrite=True, hidden_states=mapped)
    pytest.importorskip("yaml")
    recipe = place / "recipe.yml"
    recipe.write_text(f"models: [{dense.as_posix()}]\n")
    with pytest.raises(CheckpointError, match=rf"would replace {re.escape(str(recipe))}, which"):
        build_recipe(recipe, place, overwrite=True)
    build_recipe(recipe, place / "moe")
    assert recipe.exists()


@needs_links
def test_an_output_that_holds_what_its_sources_link_to_is_refused(dense, tmp_path):
    before = contents(dense)
    links = tmp_path / "elsewhere"
    links.mkdir()
    for file in dense.iterdir():
        (links / file.name).symlink_to(file)
    refused("which it is made from", links, dense, overwrite=True)
    assert contents(dense) == before


def test_a_folder_without_a_model_is_never_overwritten(dense, place):
    (place / "photographs").write_text("x")
    refused("holds no model", dense, place, overwrite=True)
    (place / "file").write_text("x")
    for overwrite in (False, True):
        refused("exists already and is not a folder", dense, place / "file", overwrite=overwrite)
    refused("file is not a folder", dense, place / "file" / "moe")
    assert (place / "photographs").read_text() == (place / "file").read_text() == "x"


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_becomes_the_output(dense, place, overwrite):
    (place / "moe").mkdir(mode=0o750)
    mode = (place / "moe").stat().st_mode
    with pytest.raises(KeyboardInterrupt, match="stop"):
        build(dense, place / "moe", overwrite=overwrite, progress=stop_after(3 * SHARD))
    assert names_in(place / "moe") == []
    (kept,) = (place / ".moe.partial").glob("*/")
    finished = {name: identity(kept / name) for name in names_in(kept)}
    build(dense, place / "moe", overwrite=overwrite)
    assert (
        finished.items()
        <= {n: identity(place / "moe" / n) for n in names_in(place / "moe")}.items()
    )
    assert names_in(place) == ["moe"]
    assert (place / "moe").stat().st_mode == mode
    build(dense, place / "whole")
    assert contents(place / "moe") == contents(place / "whole")


def test_what_is_put_into_an_empty_folder_during_the_build_stays(dense, place):
    (place / "moe").mkdir()

    def put(written: int, total: int) -> None:
        (place / "moe" / "notes").write_text("x")

    with pytest.raises(OSError, match="moe") as caught:
        build(dense, place / "moe", progress=put)
    assert caught.value.errno in (errno.ENOTEMPTY, errno.EEXIST)
    assert names_in(place / "moe") == ["notes"]
    (place / "moe" / "notes").unlink()
    build(dense, place / "moe")
    assert names_in(place) == ["moe"]


def test_what_appears_during_the_build_stays(dense, place):
    def put(written: int, total: int) -> None:
        (place / "moe").write_text("x")

    with pytest.raises(OSError, match="moe"):
        build(dense, place / "moe", progress=put)
    assert (place / "moe").read_text() == "x"


def test_two_builds_into_an_empty_folder_refuse_each_other(dense, place):
    (place / "moe").mkdir()
    with staging.staged(place / "moe", "0" * 64):
        refused("another build is writing it", dense, place / "moe")


@needs_links
def test_a_link_to_an_empty_folder_is_followed(dense, place):
    (place / "moe").mkdir()
    (place / "link").symlink_to(place / "moe")
    build(dense, place / "link")
    assert (place / "link").is_symlink()
    assert (place / "moe" / "config.json").exists()


@pytest.mark.parametrize("inside", [".", "below"])
def test_the_folder_that_the_build_runs_in_is_not_replaced(dense, place, monkeypatch, inside):
    build(dense, place / "moe")
    (place / "moe" / "below").mkdir()
    monkeypatch.chdir(place / "moe" / inside)
    refused(r"moe: is where this runs.*new folder in it", dense, place / "moe", overwrite=True)
    (place / "empty").mkdir()
    monkeypatch.chdir(place / "empty")
    refused(r"empty: is where this runs.*new folder in it", dense, Path())
    build(dense, Path("moe"))
    assert names_in(place / "empty") == ["moe"]


def test_a_mount_point_is_not_replaced(dense, place, monkeypatch):
    (place / "moe").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == place / "moe")
    refused(r"moe: is a mount point.*new folder in it", dense, place / "moe")


def test_a_folder_that_may_not_be_changed_is_refused_beforehand(dense, place, monkeypatch):
    (place / "moe").mkdir()
    # In place of its permissions, which do not bind root.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place / "moe")
    refused("moe: exists already and may not be changed", dense, place / "moe")


def test_problems_of_models_and_output_come_together(dense, place):
    (place / "moe").write_text("x")
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        build(place / "absent", place / "moe")
    assert "absent: is not a folder" in str(caught.value)
    assert "moe: exists already" in str(caught.value)


def test_a_disk_too_full_is_found_before_anything_is_written(dense, place, monkeypatch):
    usage = type(os)("usage")
    usage.free = 500_000
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    refused(r"needs [\d,]+ bytes of disk, 500,000 are free", dense, place / "moe")
    assert names_in(place) == []


def free_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = type(os)("usage")
    usage.free = free
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)


@pytest.mark.parametrize("options", [{}, {"checksum": True}, {"dtype": "float16"}], ids=str)
@pytest.mark.parametrize("name", ["tokenizer.model", "additional_chat_templates/a.jinja"])
def test_all_files_count_and_not_much_more(dense, place, monkeypatch, options, name):
    """As many bytes as the whole output takes in blocks, and a few for the folders, are enough."""
    (dense / name).parent.mkdir(exist_ok=True)
    (dense / name).write_bytes(bytes(400_000))
    build(dense, place / "whole", **options)
    files = [file for file in (place / "whole").rglob("*") if file.is_file()]
    needed = sum(staging.on_disk(file.stat().st_size) for file in files)
    free_bytes(monkeypatch, needed - 1)
    refused(rf"needs [\d,]+ bytes of disk, {needed - 1:,} are", dense, place / "moe", **options)
    assert names_in(place) == ["whole"]
    margin = 8 * 4096 + 4096 * ("dtype" in options)  # folders; overflows that did not happen
    free_bytes(monkeypatch, needed + margin)
    build(dense, place / "moe", **options)


def test_all_files_of_a_conversion_count(dense, place, monkeypatch):
    build(dense, place / "moe")
    (place / "moe" / "tokenizer.model").write_bytes(bytes(400_000))
    free_bytes(monkeypatch, sum(f.stat().st_size for f in (place / "moe").glob("*.safetensors")))
    with pytest.raises(CheckpointError, match="bytes of disk"):
        convert_moe(place / "moe", place / "half")
    assert names_in(place) == ["moe"]


def test_what_an_unfinished_build_takes_counts_as_free(dense, place, monkeypatch):
    kept = interrupt(dense, place / "moe", count=5 * SHARD)
    assert len(names_in(kept)) >= 4
    usage = type(os)("usage")
    usage.free = 500_000
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    build(dense, place / "moe")


def test_a_dry_run_writes_nothing(dense, place):
    before = contents(dense)
    report = build_moe(dense, place / "moe", CONFIG, max_shard_size=f"{SHARD}B", dry_run=True)
    assert report.dry_run
    assert names_in(place) == []
    assert contents(dense) == before
    build(dense, place / "moe")
    sizes = {p.name: p.stat().st_size for p in (place / "moe").glob("*.safetensors")}
    assert report.files == sizes
    assert report.num_bytes == sum(sizes.values())


def test_durable_before_it_appears(dense, place, monkeypatch):
    """Files, their names, and the output's own name, in this order."""
    events = []
    monkeypatch.setattr(writer, "sync_file", lambda stream: events.append(stream.name))
    monkeypatch.setattr(staging, "sync_folder", events.append)
    build(dense, place / "moe", fsync=True)
    *files, growing, parent = events
    files = [re.sub(r"\.[0-9a-f]{16}$", "", Path(file).name) for file in files]
    assert sorted(files) == names_in(place / "moe")
    assert len(growing.name) == 64
    assert parent == place


def command(dense: Path, output: Path, *options: str) -> list[str]:
    arguments = [
        "build",
        dense,
        "-o",
        output,
        "--experts",
        3,
        "--max-shard-size",
        f"{SHARD}B",
        *options,
    ]
    return [sys.executable, "-m", "moe_fast", *map(str, arguments)]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_tells_how_to_go_on(dense, place):
    pytest.importorskip("typer")
    code = textwrap.dedent(
        f"""
        import signal, sys
        # Ignored where the tests themselves run in the background of a shell.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from moe_fast.storage import writer
        written = writer.write_shard
        count = 0
        def one_more(*args, **options):
            global count
            count += 1
            if count == 3:
                signal.raise_signal(signal.SIGINT)
            return written(*args, **options)
        writer.write_shard = one_more
        sys.argv[1:] = {command(dense, place / "moe")[3:]!r}
        from moe_fast.__main__ import main
        main()
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.startswith("interrupted\nwhat is finished is kept in")
    assert "Traceback" not in done.stderr
    done = subprocess.run(command(dense, place / "moe"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dry_run_of_the_command(dense, place):
    pytest.importorskip("typer")
    done = subprocess.run(
        command(dense, place / "moe", "--dry-run"), capture_output=True, text=True
    )
    assert done.returncode == 0
    for expected in (f"0-2  {dense}", "model-00001-of-0000", "nothing is written"):
        assert expected in done.stdout
    assert names_in(place) == []
    done = subprocess.run(
        command(dense, place / "moe", "--dry-run", "--max-shard-size", "1B"),
        capture_output=True,
        text=True,
    )
    files = done.stdout.partition("\nfiles\n")[2].split("\n\n")[0].splitlines()
    number = int(files[-1].partition("-of-")[2][:5])
    assert files[0].startswith("  model-00001-of-")
    assert files[-1].startswith(f"  model-{number:05d}-of-")
    assert files[-2] == f"  and {number - 11} more"
    assert len(files) == 12
    report = json.loads(
        subprocess.run(
            command(dense, place / "moe", "--dry-run", "--json"), capture_output=True, text=True
        ).stdout
    )
    assert report["dry_run"] is True
    assert report["experts"] == [[str(dense)]] * 3
