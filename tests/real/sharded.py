"""What one of several processes does: load shards from designs, compare them with builds.

    torchrun --standalone --nproc-per-node 2 sharded.py JOBS.json

`JOBS.json` lists `[way, dense, number of experts, built or null]`. Prints for each, as JSON, the
bytes that the process has read while loading and those that it holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.initialization import no_tie_weights

import moe_fast.torch
from moe_fast import MoeConfig, design_moe

# Of transformers' own: experts, then the rest by FSDP; and tensor parallelism.
CONFIGS = {"experts": {"fsdp_size": 2, "ep_size": 2}, "tensors": {"tp_size": 2}}


def shard(model: PreTrainedModel, way: str) -> None:
    if way in CONFIGS:
        config, _, meshes = model.prepare_distribute_model(DistributedConfig(**CONFIGS[way]))
        model.maybe_distribute_model(model, config, meshes)
        return

    def last_dimension(parameter):
        return Shard(parameter.ndim - 1)

    placement = last_dimension if way == "columns" else None
    for layer in model.model.layers:
        fully_shard(layer, shard_placement_fn=placement)
    fully_shard(model, shard_placement_fn=placement)


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def bytes_read() -> int:
    """By the system's own count of what this process has asked it for."""
    return int(Path("/proc/self/io").read_text().split()[1])


def compare(model: PreTrainedModel, built: str) -> None:
    expected = AutoModelForCausalLM.from_pretrained(built)
    names = dict(expected.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == names.keys()
    for name, value in found.items():
        assert value.dtype == names[name].dtype
        assert torch.equal(whole(value), names[name]), name
    buffers = dict(expected.named_buffers())
    for name, value in model.named_buffers():
        assert torch.equal(value, buffers[name]), name
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        logits = whole(model(tokens).logits)
        torch.testing.assert_close(logits, expected(tokens).logits, rtol=1e-4, atol=1e-4)


def load(job: int, way: str, dense: str, num_experts: int, built: str | None) -> None:
    design = design_moe(dense, MoeConfig(num_experts))
    config = AutoConfig.for_model(**design.config)
    # transformers shards before it ties; FSDP2 alone wants what is tied to be so before.
    with torch.device("meta"):
        if way in CONFIGS:
            with no_tie_weights():
                model = AutoModelForCausalLM.from_config(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
    shard(model, way)
    assert any(isinstance(p, DTensor) for p in model.parameters())
    before = bytes_read()
    moe_fast.torch.load_into(model, design)
    read = bytes_read() - before
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    held = sum(part.numel() * part.dtype.itemsize for part in parts)
    if built is not None:
        compare(model, built)
    printed = {"job": job, "rank": dist.get_rank(), "read": read, "held": held}
    print(json.dumps(printed), flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for job, arguments in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        load(job, *arguments)
    dist.destroy_process_group()
