"""The one map between our parameter names and settings and those of other programs.

The original trainer's names are translated here; the export target's names are ours (design.md,
section 5), which is why nothing is needed for them but the plain Transformer's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from models import ArchConfig, TransformerConfig
from models.transformer import NetConfig

ARCH_ADAPTER: TypeAdapter[NetConfig] = TypeAdapter(ArchConfig)

# `arch.name` as the original writes it -> our net. The class of TRM serves both of its recipes.
REFERENCE_NETS = {
    "baselines.hrm_nocarry_bp_warmup@HierarchicalReasoningModel": "hrm",
    "baselines.transformer_wrapper@TransformerWrapper": "transformer",
    "baselines.trm_nocarry@TinyRecursiveModel": "trm",
    "baselines.rins_nocarry@RINS": "rins",
    "baselines.ut_nocarry@UniversalTransformer": "ut",
}

_REFERENCE_NAMES = (
    (re.compile(r"^model\.(H|L)_level\.(?:core\.)?"), r"model.\1_module."),
    (re.compile(r"^model\.layers\."), "model.stack.layers."),
    (re.compile(r"^model\.zL_init$"), "model.z_L_init"),
    (re.compile(r"^embed_tokens\.embedding_weight$"), "model.embed_tokens.weight"),
)


def parameter_name_from_reference(name: str) -> str:
    """Our name of a parameter or buffer of the original trainer's model."""
    for pattern, ours in _REFERENCE_NAMES:
        name, count = pattern.subn(ours, name)
        if count:
            break
    return name


def arch_from_reference(settings: Mapping[str, Any]) -> NetConfig:
    """Our record of the original's `arch` section; ValueError where it has no place here."""
    ours = {key: value for key, value in settings.items() if key != "head"}
    name = ours.pop("name", None)
    net = REFERENCE_NETS.get(str(name), name)
    if net == "trm" and ours.get("half_layers"):
        net = "trm_match_recurrence"
    if net == TransformerConfig.model_fields["name"].default:
        ours.pop("half_layers", None)
    return ARCH_ADAPTER.validate_python({**ours, "name": net})
