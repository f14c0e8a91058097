"""The one map between our parameter names and settings and those of other programs.

The original trainer's names and settings are translated here, and those of exported folders:
`hrm_text`, a class of transformers, and `recurrent_lm`, the modelling file that is shipped with
nets which have no place in that class. Reads and writes no files; `training.hrm_text` has the
settings of that class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from models import ArchConfig, TransformerConfig, TRMConfig
from models.transformer import NetConfig, StackConfig
from training.hrm_text import LEVELS, NATIVE_TYPE, from_hrm_text, to_hrm_text, why_not_native

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

SHIPPED_TYPE = "recurrent_lm"  # `model_type` in config.json; NATIVE_TYPE is the other
_LAYER = re.compile(r"^model\.(?P<stack>\w+)\.layers\.(?P<layer>\d+)\.")
_PROJECTION = re.compile(r"\.(?:self_)?(attn|mlp)\.(\w+)_proj\.weight$")
# Projections that transformers splits, in the order in which ours lie on top of each other.
_FUSED = {
    "attn": ("gqkv", ("gate", "q", "k", "v")),
    "mlp": ("gate_up", ("gate", "up")),
}


@dataclass(frozen=True, slots=True)
class FramingIds:
    """Token ids that the export's configuration names."""

    boq: int
    eoq: int
    eoa: int
    pad: int | None  # never 0 for want of a better one: that row would count as padding


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of an export lies here: one of `parts` equal blocks of a parameter's rows."""

    name: str
    part: int = 0
    parts: int = 1

    def rows(self, parameter: Tensor) -> Tensor:
        """The part of our parameter, as a view."""
        return parameter.chunk(self.parts)[self.part] if self.parts > 1 else parameter


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


def export_config(
    arch: NetConfig, *, is_native: bool, vocab_size: int, max_seq_len: int, ids: FramingIds
) -> dict[str, Any]:
    """config.json of an export: for `hrm_text`, else for the modelling file in the folder."""
    return {
        **(to_hrm_text(arch) if is_native else _shipped(arch)),
        "vocab_size": vocab_size,
        "hidden_size": arch.hidden_size,
        "max_position_embeddings": max_seq_len,
        "embedding_scale": 1.0 / arch.answer_stack.in_std,
        "tie_word_embeddings": False,
        "bos_token_id": ids.boq,
        "eos_token_id": ids.eoa,
        "eoq_token_id": ids.eoq,  # where a prompt ends: the shipped code looks for it
        "pad_token_id": ids.pad,
    }


def exported_names(arch: NetConfig, names: Iterable[str], *, is_native: bool) -> dict[str, str]:
    """Names in the export -> ours that each is a copy of. TRM's one stack becomes both levels."""
    slow, fast = (f"model.{level}." for level in LEVELS)
    exported = {name: name for name in names}
    if is_native and isinstance(arch, TRMConfig):
        shared = [name for name in exported if name.startswith(fast)]
        exported |= {name.replace(fast, slow, 1): name for name in shared}
    return exported


def place_of_exported(name: str) -> Place:
    """Where a tensor of an exported folder lies here, whether its projections are split or not."""
    found = _PROJECTION.search(name)
    if found is None:
        return Place(name)
    block, projection = found.groups()
    stem = f"{name[: found.start()]}.{block}"
    fused, parts = _FUSED[block]
    if projection in parts:
        return Place(f"{stem}.{fused}_proj.weight", parts.index(projection), len(parts))
    return Place(f"{stem}.{projection}_proj.weight")


def layers_by_stack(names: Iterable[str]) -> dict[str, int]:
    """How many layers each stack has in the tensors of an exported folder."""
    layers: dict[str, int] = {}
    for found in filter(None, map(_LAYER.match, names)):
        stack, layer = found["stack"], int(found["layer"])
        layers[stack] = max(layers.get(stack, 0), layer + 1)
    return layers


def arch_from_export(config: Mapping[str, Any], layers: Mapping[str, int]) -> NetConfig:
    """Our record of an exported folder's config.json and the layers that its weights have.

    ValueError for what our nets cannot be, and where config and weights are at odds.
    """
    if config.get("model_type") == SHIPPED_TYPE:
        arch = _validated(config.get("net"))
        wanted = {name: stack.n_layers for name, stack in arch.stacks().items()}
        if layers != wanted:
            raise ValueError(f"the net has layers {wanted}, but the weights hold {dict(layers)}")
        return arch
    if config.get("model_type") != NATIVE_TYPE:
        raise ValueError(
            f"model_type={config.get('model_type')!r} is not known here; {NATIVE_TYPE} and "
            f"{SHIPPED_TYPE} are"
        )
    return _validated(from_hrm_text(config, layers))


def _shipped(arch: NetConfig) -> dict[str, Any]:
    """A net spelled out, so that the modelling file need know none by name."""
    stacks, applications = arch.stacks(), list(arch.applications())
    return {
        "model_type": SHIPPED_TYPE,
        "architectures": ["RecurrentLMForCausalLM"],
        # slots of the cache: every application of a stack has keys and values of its own
        "num_hidden_layers": sum(stacks[each.stack].n_layers for each in applications),
        "stacks": {
            name: {
                **stack.model_dump(include=set(StackConfig.model_fields)),
                "head_dim": stack.head_size,
                "intermediate_size": stack.mlp_size,
            }
            for name, stack in stacks.items()
        },
        "applications": [
            {"stack": each.stack, "reads": list(each.reads), "writes": each.writes}
            for each in applications
        ],
        "net": arch.model_dump(mode="json"),
    }


def _validated(settings: Any) -> NetConfig:
    try:
        return ARCH_ADAPTER.validate_python(settings)
    except ValidationError as error:
        reasons = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'net'}: {each['msg']}" for each in error.errors()
        )
        raise ValueError(f"no architecture that is known here: {reasons}") from None


__all__ = [
    "ARCH_ADAPTER",
    "NATIVE_TYPE",
    "SHIPPED_TYPE",
    "FramingIds",
    "Place",
    "arch_from_export",
    "arch_from_reference",
    "export_config",
    "exported_names",
    "layers_by_stack",
    "parameter_name_from_reference",
    "place_of_exported",
    "why_not_native",
]
