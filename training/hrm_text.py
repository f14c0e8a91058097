"""The settings of `hrm_text`, a class of transformers, from ours and back.

Its facts: num_hidden_layers counts the layers of each stack; both levels share every setting; the
calls of H always carry gradient. Names of tensors are in `training.export_format`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models import HRMConfig, TRMConfig
from models.layers import swiglu_size
from models.transformer import NetConfig

NATIVE_TYPE = "hrm_text"  # `model_type` in config.json
LEVELS = ("H_module", "L_module")
# Settings of a stack that its forward pass depends on; the class has one value for both levels.
_SHARED_BY_LEVELS = (
    *("n_layers", "num_heads", "mlp_size", "norm_type", "norm_eps"),
    *("pos_emb_type", "rope_theta", "attn_type"),
)
# What the class can be set to and our nets cannot: it must be as here, or absent.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "H_cycles", "L_cycles", "max_position_embeddings"),
)


def why_not_native(arch: NetConfig) -> str | None:
    """What of a net has no place in the class; None where all has."""
    if not isinstance(arch, (HRMConfig, TRMConfig)):
        return f"{NATIVE_TYPE} has no net like {getattr(arch, 'name', type(arch).__name__)}"
    first, *others = arch.stacks().values()
    for stack in others:
        different = [k for k in _SHARED_BY_LEVELS if getattr(stack, k) != getattr(first, k)]
        if different:
            return f"{NATIVE_TYPE} has one value of {', '.join(different)} for both levels"
    if first.norm_type != "pre":
        return f"{NATIVE_TYPE} is pre-norm, this net is norm_type={first.norm_type}"
    if first.pos_emb_type != "rope":
        return f"{NATIVE_TYPE} has rotary positions, this net pos_emb_type={first.pos_emb_type}"
    return None


def to_hrm_text(arch: NetConfig) -> dict[str, Any]:
    """Every field that the class reads of a net, beside those that all models have."""
    assert isinstance(arch, (HRMConfig, TRMConfig)) and why_not_native(arch) is None
    stack = arch.stacks()["L_module"]
    return {
        "model_type": NATIVE_TYPE,
        "architectures": ["HrmTextForCausalLM"],
        "num_hidden_layers": stack.n_layers,
        "num_attention_heads": stack.num_heads,
        "num_key_value_heads": stack.num_heads,
        "head_dim": stack.head_size,
        "intermediate_size": stack.mlp_size,
        "hidden_act": "silu",
        "rms_norm_eps": stack.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": stack.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "H_cycles": arch.H_cycles,
        "L_cycles": arch.L_cycles,
        "L_bp_cycles": gradient_calls_of_L(arch),
        "prefix_lm": stack.attn_type == "prefix_lm",
        "initializer_range": arch.answer_stack.in_std,
        "use_cache": True,
    }


def gradient_calls_of_L(arch: HRMConfig | TRMConfig) -> list[int]:
    """`L_bp_cycles`: in each H cycle, the calls of L that carry gradient."""
    carries = [each.keeps_gradient for each in arch.applications() if each.writes == "z_L"]
    starts = range(0, len(carries), arch.L_cycles)
    return [sum(carries[start : start + arch.L_cycles]) for start in starts]


def from_hrm_text(config: Mapping[str, Any], layers: Mapping[str, int]) -> dict[str, Any]:
    """Our settings of a config.json whose weights have so many `layers` in each stack.

    Levels that hold the same weights stay those of an hrm: nothing in the folder says that they are
    one, and training that goes on in that class changes them apart. ValueError for what our nets
    cannot be, and where config and weights are at odds.
    """
    _require_expressible(config)
    mlp_size = config["intermediate_size"]
    is_usual = mlp_size == swiglu_size(config["hidden_size"], 4.0)
    return {
        "name": "hrm",
        "half_layers": True,
        "n_layers": 2 * _layers_per_stack(config, layers),
        "hidden_size": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "intermediate_size": None if is_usual else mlp_size,
        "H_cycles": config["H_cycles"],
        "L_cycles": config["L_cycles"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": _rope_parameters(config).get("rope_theta", 10000.0),
        "attn_type": "prefix_lm" if config.get("prefix_lm", True) else "causal",
        "bp_max_steps": _backprop_steps(config),
        **_embedding_settings(config),
    }


def _require_expressible(config: Mapping[str, Any]) -> None:
    """Refuses an `hrm_text` with parts that our nets lack."""
    missing = [key for key in _REQUIRED if not isinstance(config.get(key), int)]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)} (whole numbers)")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    checks = {
        **{key: (config.get(key, value), value) for key, value in _FIXED.items()},
        "rope_type": (_rope_parameters(config).get("rope_type", "default"), "default"),
        "num_key_value_heads": (config.get("num_key_value_heads", heads), heads),
        "head_dim * num_attention_heads": (config.get("head_dim", 128) * heads, width),
    }
    wrong = [f"{key} is {has}, not {wants}" for key, (has, wants) in checks.items() if has != wants]
    if wrong:
        raise ValueError(f"our nets cannot be that: {'; '.join(wrong)}")


def _layers_per_stack(config: Mapping[str, Any], layers: Mapping[str, int]) -> int:
    """Counted in the weights, and checked against the configuration in either of its meanings."""
    if sorted(layers) != sorted(LEVELS) or len(set(layers.values())) != 1:
        raise ValueError(
            f"the weights hold layers of {dict(layers)}, not as many of each of {', '.join(LEVELS)}"
        )
    counted = layers[LEVELS[0]]
    key = "num_layers_per_stack" if config.get("num_layers_per_stack") else "num_hidden_layers"
    if config[key] == counted:
        return counted
    known = " (the published exporter writes the total of both stacks)"
    raise ValueError(
        f"{key}={config[key]}, but each stack of the weights has {counted} layers"
        f"{known if config[key] == 2 * counted else ''}; transformers would fill the others at "
        f'random: write "num_hidden_layers": {counted} and no num_layers_per_stack there'
    )


def _rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}


def _backprop_steps(config: Mapping[str, Any]) -> int:
    """Gradient-carrying calls: all of H, and those of L that `L_bp_cycles` counts."""
    H_cycles, given = config["H_cycles"], list(config.get("L_bp_cycles") or [2])
    calls = ([1] * (H_cycles - len(given)) + given)[:H_cycles]
    return max(2, H_cycles + sum(min(each, config["L_cycles"]) for each in calls))


def _embedding_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The initialisation whose deviation makes the same embedding scale."""
    spread = float(config.get("initializer_range") or 0.02)
    scale = float(config.get("embedding_scale") or 1.0 / spread)
    if math.isclose(scale, config["hidden_size"] ** 0.5, rel_tol=1e-9):
        return {"init_type": "lecun_normal"}
    is_inverse = 1.0 / spread == scale
    return {"init_type": "fixed_normal", "init_std": spread if is_inverse else 1.0 / scale}
