"""What an output should hold by its manifest: the request made again, where its models are now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_fast.checkpoint.blueprint import prepare
from moe_fast.checkpoint.convert import prepare_conversion
from moe_fast.checkpoint.header import DTYPE_CODES, Tensor
from moe_fast.checkpoint.manifest import Manifest
from moe_fast.checkpoint.moe import MoeModel
from moe_fast.checkpoint.request import ConvertRequest, ModelPath
from moe_fast.checkpoint.table import Weight
from moe_fast.config import Dtype, GateMode
from moe_fast.errors import CheckpointError
from moe_fast.wording import counted


@dataclass(frozen=True)
class Expected:
    """The tensors and files of an output, and where they come from."""

    tensors: Mapping[str, Weight]
    config: Mapping[str, Any]
    companions: Path
    """The folder that tokenizer and generation settings come from."""
    sources: Sequence[Mapping[str, Tensor]]
    num_experts: int
    """In all layers together."""


def expect(manifest: Manifest, now: Mapping[str, str]) -> Expected:
    """What the request of a manifest gives today, with its folders where they are `now`.

    Raises
    ------
    CheckpointError
        For sources that are gone, or are no longer what they were.
    """
    request = manifest.asked.moved(now)
    if isinstance(request, ConvertRequest):
        conversion = prepare_conversion(request)
        model = conversion.model
        return Expected(
            dict(conversion.tensors),
            conversion.config,
            model.path,
            [model.tensors],
            model.num_experts * len(model.layers),
        )
    digests = manifest.gate_sha256 if request.gate_mode is GateMode.HIDDEN else ()
    blueprint = prepare(request, digests)
    construction = blueprint.construction
    models = [construction.base, *(source for source, _ in construction.all_sources())]
    return Expected(
        dict(blueprint.tensors),
        blueprint.target.config(construction),
        construction.base.path,
        [model.tensors for model in models],
        len(construction.moe_layers) * construction.plan.num_experts,
    )


def network_shares(manifest: Manifest, against: Sequence[ModelPath]) -> str | None:
    """Why the folders of a manifest are not opened; `None` where they can be.

    Opening a network share would send the user's credentials to whoever wrote the manifest.
    """
    shares = [path for path in manifest.asked.folders() if path.startswith(("//", "\\\\"))]
    if not shares or against:
        return None
    return f"the manifest names network shares ({', '.join(shares)}): name them by --against"


def places(manifest: Manifest, against: Sequence[ModelPath]) -> dict[str, str]:
    """Where each folder of a manifest is now: as it says, or among `against`.

    Raises
    ------
    CheckpointError
        Where names do not tell them apart, and their numbers differ.
    """
    recorded = manifest.asked.folders()
    given = [str(Path(path).absolute()) for path in against]
    by_name = {Path(path).name: path for path in given or recorded}
    if len(by_name) == len(given) and all(Path(path).name in by_name for path in recorded):
        return {path: by_name[Path(path).name] for path in recorded}
    if len(given) in (0, len(recorded)):
        return dict(zip(recorded, given or recorded, strict=True))
    raise CheckpointError(
        f"against: {counted(len(given), 'folder')} for the {len(recorded)} that the manifest "
        f"names: {', '.join(recorded)}"
    )


def reference_of(manifest: Manifest, against: Sequence[ModelPath]) -> Path:
    """The model that an output is compared with: its base, or what it was converted from."""
    request = manifest.asked.moved(places(manifest, against))
    return Path(request.model if isinstance(request, ConvertRequest) else request.base)


def reason_to_differ(manifest: Manifest | None, reference: MoeModel) -> str | None:
    """Why a checkpoint need not compute what the model does that it was made from.

    `None` where it must: experts that are all the same FFN add up to that FFN, whatever the router
    says, because a token's weights add up to 1.
    """
    if manifest is None:
        return "there is no manifest that says how it was made"
    request = manifest.asked
    if request.dtype not in (None, Dtype.FLOAT32):  # which holds every number of the others
        dtypes = {tensor.dtype for tensor in reference.tensors.values()}
        if dtypes != {DTYPE_CODES[request.dtype]}:
            return f"weights were rounded to {request.dtype}"
    if isinstance(request, ConvertRequest):
        return None
    if request.shared_experts:
        return "shared experts add their output"
    for source in request.models:
        same_layers = source.source_layers in (None, tuple(range(len(source.source_layers or ()))))
        if source.model != request.base or not same_layers:
            return "experts come from elsewhere than the base's own layers"
        if source.noise_scale != 0 or source.residual_scale != 1:
            return "experts have noise or a scale"
    return None
