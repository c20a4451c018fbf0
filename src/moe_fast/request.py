"""What is asked for: everything that decides the bytes of an output, in plain values.

The output's manifest keeps the request as JSON. Whoever reads it back makes the same design from
it, so `check_moe` compares an output with what would be written today.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

from moe_fast.checks import as_choice, as_index, as_number, as_path_text
from moe_fast.errors import ArgumentTypeError, MoeConfigError

ModelPath = str | os.PathLike[str]
RouterMethod = Literal[
    "auto",
    "balanced", "random", "uniform", "normal", "linear",
    "cheap_embed", "hidden",
    "calibrated", "clustered", "ridge", "means",
]  # fmt: skip
ROUTER_METHODS: tuple[RouterMethod, ...] = get_args(RouterMethod)
FROM_TEXT: tuple[RouterMethod, ...] = ("calibrated", "clustered", "ridge", "means")
FROM_KINDS: tuple[RouterMethod, ...] = ("ridge", "means")
DEFAULT_LOGIT_STD = 3.0
TEXT_FILES = (".txt", ".md", ".jsonl")
DEFAULT_SHARD_SIZE = 5_000_000_000


class Request:
    """Base of the frozen dataclasses that say what one operation should do.

    An operation is a file of `moe_fast.checkpoint` that holds its request and registers how
    `design_of` makes a design from it. `operation` is the name of that file.
    """

    operation: ClassVar[str]

    @property
    def num_experts(self) -> int | None:
        """Experts in each layer of the output, if the request says how many."""
        return None

    def folders(self) -> list[str]:
        """Every model that it names, once, in order."""
        raise NotImplementedError

    def moved(self, now: Mapping[str, str]) -> Self:
        """The same request for models that are elsewhere `now`."""
        raise NotImplementedError

    def validate(self) -> None:
        """Raise `MoeConfigError` for values that cannot be together."""


@dataclass(frozen=True)
class RouterStart:
    """How the routers of a build are initialised.

    Parameters
    ----------
    method : str
        `"auto"` means `"calibrated"` if there is text, otherwise `"normal"` with a `logit_std` of
        3, and the attribute then holds that name. `"balanced"`, `"random"` and `"uniform"` are
        those of `RouterInit`.
        `"normal"` draws from the standard normal distribution, as mergekit-moe's `random` does.
        `"linear"` draws from `[-s, s]` with `s = 1 / sqrt(hidden_size)`, as `torch.nn.Linear`
        starts.
        `"cheap_embed"` and `"hidden"` make each expert's row from its prompts: from the embeddings
        of their tokens, or from the router's inputs on them, which takes a run of the base model.
        The others use the routers' inputs on texts: `"calibrated"` draws normal rows, removes the
        direction that all tokens share, and evens the load; `"clustered"` makes each row from one
        cluster of tokens (spherical k-means), and evens the load; `"ridge"` and `"means"`
        distinguish the texts of each `ExpertSource`, by ridge regression or by their mean.
    logit_std : float, optional
        How sharp the initial routers are: the standard deviation of a token's logits over the
        experts, before any are chosen, as the root mean square over tokens. The tokens are those of
        the texts, if given; those of the prompts for `"hidden"`; and otherwise standard normal
        vectors. The component that all rows share is removed, which changes no choice, and the rows
        of a layer are multiplied by one factor. By default 3 for `"auto"` and for rows made from
        texts; others keep the scale of their method.
    texts : sequence of str
        Files of text (`.txt`, `.md` or `.jsonl`) or texts themselves, from which rows are made, or
        on which `logit_std` is measured.
    tokens : str, optional
        Instead of texts: a `.npy` file of token ids, `(sequences, length)`.
    tokens_used : int, optional
        How many tokens to use, spread evenly over the texts: by default 256 per expert, at least
        8192 and at most 32,768, but never fewer than 40 per expert.
    device : str
        The device on which torch runs the model, such as `"cpu"` or `"cuda"`.

    Raises
    ------
    TypeError, MoeConfigError
        If the method is not a string or is unknown, `logit_std` is not a number above 0 or is given
        with `"uniform"`, whose rows are all equal, or both texts and tokens are given.

    Examples
    --------
    >>> from moe_fast import RouterStart
    >>> RouterStart("normal", logit_std=3).from_prompts
    False
    >>> RouterStart(texts=["Some text."]).method
    'calibrated'
    """

    method: RouterMethod = "auto"
    logit_std: float | None = None
    texts: tuple[str, ...] = ()
    tokens: str | None = None
    tokens_used: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        as_choice(self.method, ROUTER_METHODS, "routers")
        object.__setattr__(self, "texts", as_texts(self.texts))
        if self.tokens is not None:
            object.__setattr__(self, "tokens", as_path_text(self.tokens, "tokens"))
        if self.logit_std is None and self.method in ("auto", *FROM_TEXT):
            object.__setattr__(self, "logit_std", DEFAULT_LOGIT_STD)
        if self.method == "auto":
            object.__setattr__(self, "method", "calibrated" if self.has_text else "normal")
        if self.logit_std is not None:
            object.__setattr__(self, "logit_std", as_logit_std(self.logit_std, self.method))
        if self.texts and self.tokens is not None:
            raise MoeConfigError("must not be given beside tokens: one is read", argument="texts")
        if self.tokens_used is not None:
            number = as_index(self.tokens_used, "tokens_used", minimum=1)
            if not self.has_text and self.method not in FROM_TEXT:
                raise MoeConfigError(
                    "says how many tokens of texts are used; there are no texts or tokens",
                    argument="tokens_used",
                )
            object.__setattr__(self, "tokens_used", number)
        if not isinstance(self.device, str):
            raise ArgumentTypeError(f"must be a string, got {self.device!r}", argument="device")

    @property
    def has_text(self) -> bool:
        """Whether it says what the model reads."""
        return bool(self.texts) or self.tokens is not None

    @property
    def from_text(self) -> bool:
        """Whether the rows depend on what the model reads."""
        return self.method in FROM_TEXT or (self.logit_std is not None and self.has_text)

    @property
    def from_prompts(self) -> bool:
        """Whether the prompts of the experts make the rows."""
        return self.method in ("cheap_embed", "hidden")


def choose_start(
    routers: RouterMethod | RouterStart,
    said: Mapping[str, Any],
    experts: Sequence[ExpertSource] = (),
    *,
    num_rows: int = 2,
    parts: bool = False,
) -> RouterStart:
    """A start with what is `said` of it besides its method, of so many rows.

    `"auto"` takes the texts of the experts, too. It does not sharpen a single row, which has
    nothing to be told apart from, nor rows for the `parts` of one network, whose sum wants equal
    weights.
    """
    if isinstance(routers, RouterStart):
        return replace(routers, **said)
    if routers == "auto" and (parts or (num_rows < 2 and "logit_std" not in said)):
        return RouterStart("balanced", **said)
    start = RouterStart(routers, **said)
    if routers == "auto" and any(expert.texts for expert in experts):
        return replace(start, method="calibrated")
    return start


def as_logit_std(value: object, method: RouterMethod) -> float:
    """The argument `logit_std`."""
    number = as_number(value, "logit_std")
    if not 0 < number < math.inf:
        raise MoeConfigError(f"must be above 0 and finite, got {number}", argument="logit_std")
    if method == "uniform":
        raise MoeConfigError(
            "cannot be given to uniform routers, whose rows are all alike; balanced ones differ",
            argument="logit_std",
        )
    return number


def as_texts(texts: object) -> tuple[str, ...]:
    """The argument `texts`, one or several."""
    if isinstance(texts, (str, os.PathLike)):
        texts = (texts,)
    if not isinstance(texts, Iterable):
        raise ArgumentTypeError(f"must be files or strings, got {texts!r}", argument="texts")
    found = []
    for text in texts:
        found.append(as_path_text(text, "texts"))
        if isinstance(text, os.PathLike) and not found[-1].endswith(TEXT_FILES):
            raise MoeConfigError(
                f"must be files ending in {', '.join(TEXT_FILES)}, got {found[-1]}",
                argument="texts",
            )
    return tuple(found)


@dataclass(frozen=True)
class ExpertSource:
    """Where experts come from, and what happens to their weights on the way.

    Parameters
    ----------
    model : path or str
        The folder of a dense model, or the name of a repository on the Hugging Face Hub. If it is
        that of a LoRA adapter, as PEFT saves it, the model is the adapter's base.
    lora : path or str, optional
        The folder of a LoRA adapter of this model, which is merged into the weights.
    noise_scale : float
        Standard deviation of the normal noise that is added to each weight, different for every
        expert.
    residual_scale : float
        The factor of the expert's output, by which its `down_proj` is multiplied.
    source_layers : sequence of int, optional
        For each layer of the output, the layer of the model that its expert comes from; by default
        the same.
    positive_prompts, negative_prompts : sequence of str
        Prompts that the experts should get, and should not get, if routers are made from prompts.
    texts : sequence of str
        Files with texts that the experts should get, or texts themselves, if routers distinguish
        texts (`"ridge"` and `"means"`).

    Raises
    ------
    TypeError, MoeConfigError
        If a value has the wrong type or is out of range.

    Examples
    --------
    >>> from moe_fast import ExpertSource
    >>> ExpertSource("model", noise_scale=0.01).residual_scale
    1.0
    """

    model: str
    noise_scale: float = 0.0
    residual_scale: float = 1.0
    source_layers: tuple[int, ...] | None = None
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    lora: str | None = None
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", as_path_text(self.model, "model"))
        if self.lora is not None:
            object.__setattr__(self, "lora", as_path_text(self.lora, "lora"))
        for name in ("noise_scale", "residual_scale"):
            number = as_number(getattr(self, name), name)
            if not math.isfinite(number):
                raise MoeConfigError(f"must be finite, got {number}", argument=name)
            object.__setattr__(self, name, number)
        if self.noise_scale < 0:
            raise MoeConfigError(
                f"must be at least 0, got {self.noise_scale}", argument="noise_scale"
            )
        if self.source_layers is not None:
            if not isinstance(self.source_layers, Iterable):
                raise ArgumentTypeError(
                    f"must list layers, got {self.source_layers!r}", argument="source_layers"
                )
            layers = tuple(as_index(layer, "source_layers") for layer in self.source_layers)
            object.__setattr__(self, "source_layers", layers)
        for name in ("positive_prompts", "negative_prompts"):
            prompts = getattr(self, name)
            if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
                raise ArgumentTypeError(f"must list strings, got {prompts!r}", argument=name)
            object.__setattr__(self, name, tuple(prompts))
        object.__setattr__(self, "texts", as_texts(self.texts))

    @property
    def origin(self) -> str:
        """The model, with its adapter as `MODEL+ADAPTER`."""
        return self.model if self.lora is None else f"{self.model}+{self.lora}"

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that it names."""
        return (self.model,) if self.lora is None else (self.model, self.lora)

    def moved(self, now: Mapping[str, str]) -> ExpertSource:
        """The same for folders that are elsewhere `now`."""
        return replace(
            self, model=now[self.model], lora=None if self.lora is None else now[self.lora]
        )
