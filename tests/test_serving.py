"""docs/serving.md tells what an export has, and an export has what its readers look for."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from net_cases import NETS
from source_tree import ROOT
from transformers import HrmTextConfig, PreTrainedConfig

from training.export_format import FramingIds, export_config

TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
# The class makes it of num_hidden_layers; a file that has both means something else.
DERIVED = {"num_layers_per_stack"}


def native_config(net: str) -> dict[str, Any]:
    ids = FramingIds(boq=6, eoq=7, eoa=11, pad=0)
    return export_config(NETS[net], is_native=True, vocab_size=256, max_seq_len=32, ids=ids)


@pytest.mark.parametrize("net", ["hrm", "trm", "trm_match_recurrence", "hrm causal"])
def test_the_config_has_every_field_that_the_class_reads(net: str) -> None:
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    fields = {field.name for field in dataclasses.fields(HrmTextConfig)}
    own = {name for name in fields - common if not name.startswith("_")}
    assert {"H_cycles", "prefix_lm", "embedding_scale"} <= own
    config = native_config(net)
    assert own - DERIVED <= config.keys()
    assert not DERIVED & config.keys()


def test_the_documented_fields_are_those_that_are_written() -> None:
    _, _, section = TEXT.partition("## Fields of config.json")
    _, _, listed = section.partition("what we write:")
    documented = set(re.findall(r"`(\w+)`", listed))
    assert len(documented) > 20
    config = native_config("hrm")
    assert documented <= config.keys()
    own_use = {"eoq_token_id", "use_cache", "attention_dropout"}
    assert config.keys() - documented <= own_use


def test_the_class_understands_the_documented_number_of_layers() -> None:
    config = HrmTextConfig(**native_config("hrm"))
    stacks = NETS["hrm"].stacks()
    assert config.num_layers_per_stack == stacks["H_module"].n_layers
    assert config.num_hidden_layers == sum(
        stacks[each.stack].n_layers for each in NETS["hrm"].applications()
    )
