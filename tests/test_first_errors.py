"""The errors that a newcomer meets first: each says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moe_fast
from moe_fast import CheckpointError, build_moe
from moe_fast.demo import make_dense_model

ROOT = Path(__file__).parents[1]


def error_of(code, **environment):
    """The last line that a failing script prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture
def dense(tmp_path):
    pytest.importorskip("safetensors")
    make_dense_model(tmp_path / "dense", seed=0)
    return tmp_path / "dense"


@pytest.mark.parametrize(("use", "start"), [
    ("import moe_fast; moe_fast.MoeConfig", "ImportError: "),
    ("from moe_fast import route", "ImportError: "),
    ("from moe_fast.__main__ import run; run(['doctor'])", "error: "),
])  # fmt: skip
def test_an_old_numpy(use, start):
    code = f"import numpy; numpy.__version__ = '1.25.2'; {use}"
    assert error_of(code) == (
        f"{start}moe_fast needs NumPy 1.26 or later, this is 1.25.2: pip install --upgrade numpy"
    )


def test_kernels_that_were_never_compiled(tmp_path):
    shutil.copytree(
        Path(moe_fast.__file__).parent,
        tmp_path / "moe_fast",
        ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"),
    )
    message = error_of("from moe_fast import route", PYTHONPATH=str(tmp_path))
    assert message.startswith(f"ImportError: {tmp_path}")
    assert "In a checkout: make build" in message
    assert "pip install --force-reinstall moe-fast" in message


@pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="tests an installation, not a checkout"
)
def test_no_compiler(tmp_path):
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")
    shutil.copytree(
        ROOT, tmp_path / "checkout",
        ignore=shutil.ignore_patterns(".*", "build", "dist", "site", "tests", "*.so", "*.pyd"),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=tmp_path / "checkout",
        env=os.environ | {"CC": "there-is-no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "there-is-no-such-compiler" in done.stderr
    assert "apt install build-essential python3-dev" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("package", "code", "message"), [
    ("ml_dtypes", "from moe_fast import compute_gate_weights as c; c(4, 2, dtype='bfloat16')",
     "dtype 'bfloat16' needs ml_dtypes: pip install 'moe-fast[checkpoint]'"),
    ("typer", "from moe_fast.__main__ import main; main()",
     "moe-fast: the command needs typer: pip install 'moe-fast[checkpoint,cli]'"),
    ("matplotlib", "from moe_fast import plan_moe_construction as p; p(1, 1).plot()",
     "pictures need matplotlib: pip install 'moe-fast[plot]'"),
    ("pandas", "from moe_fast import plan_moe_construction as p; p(1, 1).to_frame()",
     "to_frame needs pandas: pip install pandas"),
])  # fmt: skip
def test_a_missing_extra(package, code, message, tmp_path):
    # As if it were not installed: nothing on the path finds it.
    hide = (
        "import sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {package!r}:\n"
        f"            raise ModuleNotFoundError(f'No module named {{name!r}}', name={package!r})\n"
        "sys.meta_path.insert(0, Hidden())\n"
    )
    assert error_of(hide + code).endswith(message)


def test_interrupted_before_the_command_is_loaded():
    code = (
        "import sys\n"
        "class Impatient:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'moe_fast.command.cli':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Impatient())\n"
        "from moe_fast.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_interrupted_while_numpy_is_loaded():
    """NumPy makes an ImportError of an exception that comes up in the modules it loads."""
    code = (
        "import signal, sys\n"
        # Ignored where the tests themselves run in the background of a shell.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Impatient:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'numpy._core.multiarray':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Impatient())\n"
        "sys.argv = ['moe-fast', 'doctor']\n"
        "from moe_fast.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def a_file(folder):
    shutil.rmtree(folder)
    folder.touch()


def without_config(folder):
    (folder / "config.json").unlink()


def with_gguf(folder):
    without_config(folder)
    (folder / "model.gguf").write_bytes(b"GGUF")


def with_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def of_another_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))


def an_moe(folder):
    build_moe(folder, folder.parent / "moe")
    shutil.rmtree(folder)
    (folder.parent / "moe").rename(folder)


@pytest.mark.parametrize(("change", "message"), [
    (shutil.rmtree, "dense: is not a folder with a model; there is no file or folder of that name"),
    (a_file, "dense: is not a folder with a model; it is a file, and a model is the folder with"),
    (without_config, "dense: is not a model folder: it has no config.json$"),
    (with_gguf, "holds model.gguf, and GGUF is not read: load it with transformers .*gguf_file="),
    (with_a_pickle, "pytorch_model.bin, a pickle file.*save the model as safetensors"),
    (of_another_kind, "model_type 'gpt2' is not supported; supported are .*llama, .*mistral"),
    (an_moe, r"the model \(mixtral\) is a Mixture of Experts already; .* from dense models"),
])  # fmt: skip
def test_a_folder_that_is_no_dense_model(dense, change, message):
    change(dense)
    with pytest.raises(CheckpointError, match=message):
        build_moe(dense, dense.parent / "out")
    assert not (dense.parent / "out").exists()


def test_a_gguf_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"GGUF is not read: .* gguf_file='model.gguf'"):
        build_moe(tmp_path / "model.gguf", tmp_path / "out")


def test_an_output_that_exists(dense):
    build_moe(dense, dense.parent / "out")
    with pytest.raises(CheckpointError, match=r"exists already.*--overwrite, .*overwrite=True"):
        build_moe(dense, dense.parent / "out")


def test_models_of_different_sizes(dense):
    make_dense_model(dense.parent / "wide", seed=1, intermediate_size=256)
    with pytest.raises(CheckpointError, match="intermediate_size is 256, the base model has 128"):
        build_moe([dense, dense.parent / "wide"], dense.parent / "out")


@pytest.mark.parametrize(("arguments", "message"), [
    (["biuld"], "Did you mean 'build'?"),
    (["build", "dense"], "Missing option '--output' / '-o'"),
    (["build", "dense", "-o", "out", "--expert", "4"], "--experts"),
    (["build", "dense", "-o", "out", "--max-shard-size", "5XB"], "such as '500MB', '5GB'"),
    (["build", "dense", "-o", "out", "--routers", "even"], "balanced"),
])  # fmt: skip
def test_a_mistyped_command(arguments, message, tmp_path):
    pytest.importorskip("typer")
    done = subprocess.run(
        [sys.executable, "-m", "moe_fast", *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(moe_fast.__file__).parents[1])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert message in done.stderr
