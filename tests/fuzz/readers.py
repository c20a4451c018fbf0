"""Fuzz everything that reads files from strangers, guided by coverage.

    pip install atheris
    PYTHONPATH=src python tests/fuzz/readers.py -max_total_time=60

Each input becomes a file: a safetensors header, an index, a configuration or a manifest; either
the input itself, or one that holds with up to four edits that the input chooses. Any outcome but a
value or a `CheckpointError` is a finding, and so is whatever takes ten seconds or two gigabytes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["moe_fast"]):
    from moe_fast.checkpoint.manifest import MANIFEST, MANIFEST_VERSION, read_manifest
    from moe_fast.errors import CheckpointError
    from moe_fast.families.config import ROPE_KEYS
    from moe_fast.families.registry import dense_families
    from moe_fast.models.dense import open_dense_model
    from moe_fast.models.folder import read_checkpoint
    from moe_fast.storage.safetensors_header import INDEX_FILE, SINGLE_FILE, read_header

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
SHARD = "a.safetensors"
MODEL = {
    "model.embed_tokens.weight": [2, 2],
    "model.norm.weight": [2],
    **{f"model.layers.0.{name}_layernorm.weight": [2] for name in ("input", "post_attention")},
    **{f"model.layers.0.self_attn.{name}_proj.weight": [2, 2] for name in "qkvo"},
    **{f"model.layers.0.mlp.{name}_proj.weight": [2, 2] for name in ("gate", "up", "down")},
    "lm_head.weight": [2, 2],
}
CONFIG = {
    "model_type": "llama",
    "vocab_size": 2,
    "hidden_size": 2,
    "intermediate_size": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "eos_token_id": [1, 2],
}
INDEX = {"weight_map": dict.fromkeys(MODEL, SHARD), "metadata": {"total_size": 4}}
REQUEST = {
    "models": [{"model": "a", "noise_scale": 0.5, "source_layers": [0]}],
    "base": "a",
    "config": {"num_experts": 2},
}
MANIFEST_VALUE = {
    "manifest_version": MANIFEST_VERSION,
    "moe_fast": "0",
    "operation": "build",
    "request": REQUEST,
    "family": "mixtral",
    "facts": {"source_model": [[0]], "source_layer": [[0]]},
    "source_files": [{"path": "a", "size": 1, "mtime_ns": 1, "header_sha256": "0"}],
    "files": {"config.json": {"size": 1}},
}


def model_header() -> tuple[dict[str, Any], int]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in MODEL.items():
        end = position + 4 * 2 ** len(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, end]}
        position = end
    return header, position


HEADER, DATA_SIZE = model_header()
KEYS = [*CONFIG, *HEADER, *REQUEST, *(key for keys in ROPE_KEYS.values() for key in keys), "x"]
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 4, 16, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 10**400),
    *(0.0, -0.0, 0.5, 1e308, "", "x", "F16", "\ud800", "../a", "x" * 10_000),
    *([], {}, [0, 4], [[[]]], [0] * 100, {"a": {"b": {}}}),
    *dense_families(),
    *ROPE_KEYS,
]


def edited(value: Any, choose: atheris.FuzzedDataProvider) -> Any:
    """`value` with up to four edits."""
    value = {"": deepcopy(value)}
    for _ in range(choose.ConsumeIntInRange(0, 4)):
        place: Any = value
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = choose.PickValueInList(list(keys))
            if not isinstance(place[key], (dict, list)) or choose.ConsumeBool():
                break
            place = place[key]
        edit = choose.ConsumeIntInRange(0, 3)
        if edit == 0 and keys:
            place[key] = deepcopy(choose.PickValueInList(VALUES))
        elif edit == 1 and keys and place is not value:
            del place[key]
        elif edit == 2 and isinstance(place, dict):
            place[choose.PickValueInList(KEYS)] = deepcopy(choose.PickValueInList(VALUES))
        elif edit == 3 and keys and isinstance(place[key], int):
            place[key] += choose.ConsumeIntInRange(-9, 9)
    return value.get("")


def text(value: Any, choose: atheris.FuzzedDataProvider) -> bytes:
    if choose.ConsumeBool():
        return choose.ConsumeBytes(sys.maxsize)
    return json.dumps(edited(value, choose)).encode()


def place(name: str, data: bytes) -> Path:
    (FOLDER / name).write_bytes(data)
    return FOLDER / name


def with_data(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(DATA_SIZE)


def read_one(data: bytes) -> None:
    choose = atheris.FuzzedDataProvider(data)
    kind = choose.ConsumeIntInRange(0, 4)
    if kind == 0:
        read_header(place("b.safetensors", with_data(text(HEADER, choose))))
    elif kind == 1:
        read_header(place("b.safetensors", choose.ConsumeBytes(sys.maxsize)))
    elif kind == 2:
        (FOLDER / SINGLE_FILE).unlink(missing_ok=True)
        place(INDEX_FILE, text(INDEX, choose))
        read_checkpoint(FOLDER)
    elif kind == 3:
        place(MANIFEST, text(MANIFEST_VALUE, choose))
        read_manifest(FOLDER)
    else:
        place(SINGLE_FILE, with_data(json.dumps(edited(HEADER, choose)).encode()))
        place("config.json", text(CONFIG, choose))
        open_dense_model(FOLDER)


def read_what_holds() -> None:
    """What the edits start from is accepted; otherwise they would reach nothing."""
    place(INDEX_FILE, json.dumps(INDEX).encode())
    place("config.json", json.dumps(CONFIG).encode())
    place(MANIFEST, json.dumps(MANIFEST_VALUE).encode())
    open_dense_model(FOLDER)
    read_manifest(FOLDER)


def one_input(data: bytes) -> None:
    message = ""
    try:
        read_one(data)
    except CheckpointError as error:
        message = str(error)
    if len(message) > 20_000:
        raise RuntimeError(f"a message of {len(message)} characters")


if __name__ == "__main__":
    place(SHARD, with_data(json.dumps(HEADER).encode()))
    read_what_holds()
    atheris.Setup([sys.argv[0], "-timeout=10", "-rss_limit_mb=2000", *sys.argv[1:]], one_input)
    atheris.Fuzz()
