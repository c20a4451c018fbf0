"""Weights that are not in the layout of Hugging Face, told by their names, and what to do then."""

from __future__ import annotations

import re
from collections.abc import Collection

from moe_fast.storage.safetensors_header import INDEX_FILE, SINGLE_FILE

GGUF = (
    "GGUF is not read: load it with transformers (from_pretrained with gguf_file={name!r}) and "
    "save it with save_pretrained"
)
# A pattern of names, and what to say of a folder with such a file. The first that fits counts.
FORMATS = (
    (
        r"adapter_config\.json|adapter_model\..+",
        "holds {name}: an adapter (a LoRA or another of PEFT's) without its base model; merge it "
        "first: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(...)",
    ),
    (
        r"consolidated.*\.safetensors",
        "holds {name}: a model in Mistral's own format; take config.json and model*.safetensors, "
        "which the Hub has of most of these models as well",
    ),
    (
        r"consolidated\.\d+\.pth",
        "holds {name}, a pickle file, which can run code when opened and is never read, in Meta's "
        "own format; take config.json and model*.safetensors, which the Hub has of most of these "
        "models as well",
    ),
    (r".+\.gguf", f"holds {{name}}, and {GGUF}"),
    (
        r"zero_to_fp32\.py|global_step\d+",
        "holds {name}: a checkpoint of DeepSpeed; make safetensors of it: "
        "python zero_to_fp32.py . OUTPUT --safe_serialization",
    ),
    (
        r"pytorch_model_fsdp_\d+|.+\.distcp",
        "holds {name}: a sharded checkpoint of FSDP; merge it: accelerate merge-weights",
    ),
    (
        r"(?!training_args|optimizer|scheduler|scaler|rng_state).+\.(bin|pt|pth|pkl|ckpt)",
        "holds {name}, a pickle file, which can run code when opened and is never read; save the "
        "model as safetensors (save_pretrained does)",
    ),
)
SHARD = re.compile(r".+-\d{5}-of-(?P<number>\d{5})\.safetensors", re.ASCII)


def describe_other_format(names: Collection[str]) -> str | None:
    """What a folder with files of these names holds in place of a model, and the remedy.

    `None` if no name tells.
    """
    for pattern, sentence in FORMATS:
        for name in sorted(names):
            if re.fullmatch(pattern, name, re.ASCII):
                return sentence.format(name=name)
    return None


def describe_loose_safetensors(names: Collection[str]) -> str | None:
    """The safetensors files that no reader finds: not `model.safetensors`, and in no index."""
    loose = [
        name
        for name in sorted(names)
        if name.endswith(".safetensors") and describe_other_format([name]) is None
    ]
    if not loose:
        return None
    shard = SHARD.fullmatch(loose[0])
    if shard is not None and int(shard["number"]) > 1:
        return (
            f"holds {len(loose)} of {int(shard['number'])} shards ({loose[0]}) and no "
            f"{INDEX_FILE}, which says what is in which; take it from where the shards are from"
        )
    if len(loose) == 1:
        return f"holds {loose[0]} and no {INDEX_FILE}; if that is the model, call it {SINGLE_FILE}"
    return (
        f"holds {loose[0]}, {loose[1]}{', ...' * (len(loose) > 2)} and no {INDEX_FILE}, which says "
        "what is in which; take it from where the files are from, or save the model again with "
        "save_pretrained"
    )
