"""Converts model folders to GGUF with llama.cpp's own converter, each in a process of its own.

    python llama_cpp_convert.py SOURCE

`SOURCE` is the folder with `convert_hf_to_gguf.py`. Each line of the input is a list, in JSON: a
file for what is printed, then the converter's arguments. Each line of the output is an exit code.
What takes seconds, importing torch and transformers, is done once, before the processes fork off.

The converter refuses tokenizers whose way of splitting text it does not know; prompts are tokens
here, and no text is split.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path


def convert(printed: str, *arguments: str) -> None:
    with Path(printed).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv[1:] = arguments
    runpy.run_path(str(Path(source, "convert_hf_to_gguf.py")), run_name="__main__")


if __name__ == "__main__":
    source = sys.argv[1]
    sys.path[:0] = [source, str(Path(source, "gguf-py"))]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "default"
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            convert(*json.loads(line))
            break
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
