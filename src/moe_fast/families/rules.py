"""What a family says of the programs that load its checkpoints.

transformers 4 (4.57.6) and 5 (5.23.0), vLLM (0.32.0) and llama.cpp (the converter of
llama-cpp-python 0.3.36) were asked themselves.
"""

from __future__ import annotations

from moe_fast.records import dataclass

__all__ = ["Reader"]

TRANSFORMERS_4, TRANSFORMERS_5 = "transformers 4", "transformers 5"
VLLM, LLAMA_CPP = "vLLM", "llama.cpp"
READERS = (TRANSFORMERS_4, TRANSFORMERS_5, VLLM, LLAMA_CPP)


@dataclass(frozen=True)
class Reader:
    """A program that loads checkpoints, and whether it loads this one.

    Attributes
    ----------
    name : str
        The program, such as `"vLLM"`.
    loads : bool
        Whether it loads the checkpoint.
    reasons : tuple of str
        Why it does not.
    """

    name: str
    loads: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rules:
    """What the readers know of one family.

    `count_key` is where they look for the number of experts. transformers 5 knows the other
    spelling as well where `either_count_key`. The defaults are those of transformers 4. llama.cpp
    knows the types of rope in `llama_cpp_ropes`. Of the families with a `norm_topk_prob`, it
    divides the chosen experts' weights by their sum in some and not in others, whatever
    `config.json` says. With `llama_cpp_sentencepiece`, its converter takes a `tokenizer.model` if
    there is one, and leaves out tokens beyond the embedding; with `llama_cpp_wants_sentencepiece`,
    it takes no other. `llama_cpp_tokens` are those that the tokenizer must have added, and
    `llama_cpp_windows` says whether it knows sliding windows there, and `llama_cpp_output_bias`
    whether it has a place for the bias of `o_proj`. The readers that `want_head` do not take the
    embedding for a head that is not stored.
    """

    count_key: str
    default_count: int | None
    default_theta: float
    llama_cpp_normalises: bool | None = None
    llama_cpp_ropes: tuple[str, ...] = ("default", "linear", "yarn")
    llama_cpp_sentencepiece: bool = False
    llama_cpp_wants_sentencepiece: bool = False
    llama_cpp_tokens: tuple[str, ...] = ()
    want_head: tuple[str, ...] = ()
    either_count_key: bool = False
    natively: tuple[str, ...] = READERS
    llama_cpp_windows: bool = False
    llama_cpp_output_bias: bool = True
    per_expert: tuple[str, ...] = READERS
    fused: tuple[str, ...] = (TRANSFORMERS_5,)
