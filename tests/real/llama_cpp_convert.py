"""Converts a model folder to GGUF with llama.cpp's own converter.

    python llama_cpp_convert.py SOURCE MODEL --outtype f32 --outfile MODEL.gguf

`SOURCE` is the folder with `convert_hf_to_gguf.py`. The converter refuses tokenizers whose way of
splitting text it does not know; prompts are tokens here, and no text is split.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    source, *arguments = sys.argv[1:]
    sys.path[:0] = [source, str(Path(source, "gguf-py"))]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "default"
    sys.argv[1:] = arguments
    runpy.run_path(str(Path(source, "convert_hf_to_gguf.py")), run_name="__main__")
