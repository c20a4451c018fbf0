"""What is said of config.json's keys is what the installed transformers says of them.

Version 5 is asked here; version 4 in the environment whose Python MOE_FAST_TRANSFORMERS4 names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from typing import Any

import pytest
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from families import make_model
from folders import edit_config
from moe_fast import MoeConfig, build_moe, check_moe
from moe_fast.families.key_types import FLOAT_KEYS, ROPE_FLOAT_KEYS, has_type
from moe_fast.families.moe import REQUIRED
from moe_fast.families.registry import dense_families, expert_axes, moe_families
from test_readers import FAMILIES

NATIVE = [name for name, f in moe_families().items() if "transformers 5" in f.rules.natively]
# What every configuration of transformers has, whatever the model.
OF_ALL = {field.name for field in dataclasses.fields(transformers.PretrainedConfig)}
OF_ALL |= {"rope_parameters"}


def fields_of(name: str) -> dict[str, tuple[str, Any]]:
    """The type and the default of each key of a family, as transformers annotates them."""
    found = {}
    for field in dataclasses.fields(CONFIG_MAPPING[name]):
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
        kind = str(field.type) if kind in ("", "Union", "UnionType") else kind
        if field.default is not dataclasses.MISSING:
            found[field.name] = (kind, field.default)
    return found


@pytest.mark.parametrize("name", NATIVE)
def test_keys_defaults_and_types_are_those_of_transformers_5(name):
    assert transformers.__version__.startswith("5.")
    family, fields = moe_families()[name], fields_of(name)
    own = {key: value for key, value in fields.items() if key not in OF_ALL}
    assert set(own) <= {*family.defaults, *family.count_keys, *REQUIRED}
    assert {key: family.defaults[key] for key in own if key not in REQUIRED} == {
        key: default for key, (_, default) in own.items() if key not in REQUIRED
    }
    # head_dim is read of any config.json that has it.
    assert set(family.defaults) - set(own) <= {"head_dim"}
    assert {key: family.key_types()[key] for key in own} == {key: t for key, (t, _) in own.items()}
    assert CONFIG_MAPPING[name].default_theta == family.rules.default_theta
    assert fields[family.rules.count_key][1] == family.rules.default_count


def test_defaults_are_those_of_transformers_4():
    python = os.environ.get("MOE_FAST_TRANSFORMERS4")
    assert python, "MOE_FAST_TRANSFORMERS4 must name a Python with torch and transformers 4"
    script = (
        "import inspect, json, sys\n"
        "from transformers import CONFIG_MAPPING\n"
        "found = {n: inspect.signature(CONFIG_MAPPING[n].__init__) for n in sys.argv[1:]}\n"
        "found = {n: {k: p.default for k, p in s.parameters.items() if p.default is not p.empty}\n"
        "         for n, s in found.items()}\n"
        "print(json.dumps(found))"
    )
    names = [n for n in NATIVE if "transformers 4" in moe_families()[n].rules.natively]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, "-c", script, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for name, defaults in json.loads(done.stdout.splitlines()[-1]).items():
        family = moe_families()[name]
        ours = {"rope_theta": family.rules.default_theta, **family.defaults}
        common = (defaults.keys() & ours.keys()) - set(REQUIRED)
        assert len(common) > 10
        assert {key: ours[key] for key in common} == {key: defaults[key] for key in common}


def test_floats_are_those_of_transformers_5():
    """Of all its families: a key that must be a float in one is an integer in none."""
    known = {*expert_axes(), *moe_families()}
    checked = 0
    for name in CONFIG_MAPPING:
        for key, (kind, _) in fields_of(name).items():
            scalar = kind.replace("list[float | int]", "list").replace("list[float]", "list")
            if key in FLOAT_KEYS and key != "partial_rotary_factor":
                assert "float" in kind, (name, key, kind)
                checked += 1
            if name in known and "float" in scalar and "tuple" not in kind and "int" not in kind:
                assert key in FLOAT_KEYS, (name, key, kind)
    assert checked > 1000
    rope = transformers.modeling_rope_utils.RopeParameters.__annotations__
    assert {key for key, kind in rope.items() if "float" in str(kind)} == set(ROPE_FLOAT_KEYS)


LOOKED_AT = ("layer_types", "mlp_layer_types", "head_dim", "use_bidirectional_attention")


@pytest.mark.parametrize("name", NATIVE)
def test_transformers_5_refuses_what_is_said_to_be_refused(tmp_path, name):
    """Each key of the family, with a value of every type."""
    make_model(tmp_path / "dense", FAMILIES[name])
    build_moe(tmp_path / "dense", tmp_path / "moe", MoeConfig(4, 2), target=name)
    original = (tmp_path / "moe" / "config.json").read_text()
    outcomes = set()
    for key, kind in moe_families()[name].key_types().items():
        if key in (*LOOKED_AT, *REQUIRED):
            continue  # whose values are looked at as well
        for value in (None, True, 1, 1.0, "silu", [1], ["full_attention"], []):
            (tmp_path / "moe" / "config.json").write_text(original)
            edit_config(tmp_path / "moe", **{key: value})
            try:
                AutoConfig.from_pretrained(tmp_path / "moe")
            except Exception as error:
                refused = "Validation" in type(error).__name__ and key in str(error)
            else:
                refused = False
            assert refused == (not has_type(value, kind)), (key, value, kind)
            outcomes.add(refused)
    assert outcomes == {True, False}


@pytest.mark.parametrize("name", NATIVE)
def test_whole_numbers_in_the_source_load_in_transformers_5(tmp_path, name):
    whole = {"attention_dropout": 0, "initializer_range": 1, "rope_theta": 10000}
    make_model(tmp_path / "dense", FAMILIES[name], **whole)
    build_moe(tmp_path / "dense", tmp_path / "moe", MoeConfig(4, 2), target=name)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").config.model_type == name


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("pad", [96, 95, -96, -97])
def test_transformers_5_takes_no_padding_beyond_the_vocabulary(tmp_path, name, pad):
    make_model(tmp_path / "dense", FAMILIES[name], pad_token_id=pad)
    build_moe(tmp_path / "dense", tmp_path / "moe", MoeConfig(4, 2), target=name)
    loads = {reader.name: reader.loads for reader in check_moe(tmp_path / "moe").readers}
    try:
        AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    except AssertionError:
        assert not loads["transformers 5"]
    else:
        assert loads["transformers 5"]


# What transformers makes of its own defaults as it reads a config.json.
READ_AS = {
    ("cwm", "eos_token_id"): [128001, 128008, 128009],
    ("glm", "eos_token_id"): [151329, 151336, 151338],
}
# Keys that change nothing that a model computes, or that a source's config.json always has.
OF_TRAINING = ("use_cache", "pretraining_tp", "resid_pdrop", "embd_pdrop", "residual_dropout")
OF_TRAINING += ("time_step_limit",)
# Keys that other readers or older versions have, or that say nothing of a dense model.
NOT_OF_ALL = {"rope_theta", "rope_parameters", "partial_rotary_factor", "max_window_layers"}


@pytest.mark.parametrize("name", dense_families())
def test_defaults_of_dense_families_are_those_of_transformers_5(name):
    """Whatever a config.json leaves out, of all that decides what the model computes."""
    family, fields = dense_families()[name], fields_of(name)
    for key, default in family.defaults.items():
        if key in fields and key not in NOT_OF_ALL:
            assert default == READ_AS.get((name, key), fields[key][1]), key
    theta = family.defaults.get("rope_theta", CONFIG_MAPPING[name].default_theta)
    if name not in ("cwm", "ministral3"):  # which have more than a base
        assert theta == CONFIG_MAPPING[name].default_theta
    own = {key: default for key, (_, default) in fields.items() if key not in OF_ALL}
    left_out = own.keys() - family.defaults.keys() - {*REQUIRED, "intermediate_size", *OF_TRAINING}
    left_out -= {key for key in own if family.aliases.get(key) in family.defaults}
    if name in moe_families():  # one class for both
        left_out -= moe_families()[name].defaults.keys()
    assert all(own[key] is None for key in left_out)
