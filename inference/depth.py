"""The depth of a net at inference: how often it applies its stacks, other than it was trained."""

from __future__ import annotations

import torch

from models.hrm import HRMConfig
from models.language_model import LanguageModel
from models.rins import RINSConfig
from models.transformer import NetConfig
from models.trm import TRMConfig
from models.ut import UTConfig

# What sets the number of applications, by kind of net. A transformer has nothing of the kind.
_KNOBS: dict[type[NetConfig], tuple[str, ...]] = {
    HRMConfig: ("H_cycles", "L_cycles"),
    TRMConfig: ("H_cycles", "L_cycles"),
    RINSConfig: ("L_cycles",),
    UTConfig: ("cycles",),
}


def depth_knobs(arch: NetConfig) -> tuple[str, ...]:
    """The settings of this net that `at_depth` changes; none for a transformer."""
    return _KNOBS.get(type(arch), ())


def depth_of(arch: NetConfig) -> dict[str, int]:
    """The depth of a net: the values of its knobs."""
    return {name: getattr(arch, name) for name in depth_knobs(arch)}


def at_depth(
    arch: NetConfig,
    *,
    H_cycles: int | None = None,
    L_cycles: int | None = None,
    cycles: int | None = None,
) -> NetConfig:
    """The same net with other numbers of cycles (None: as they are).

    Settings that say which calls carry gradient are lowered where fewer calls are left. ValueError
    for a number below 1, or one that this net does not have.
    """
    wanted = {"H_cycles": H_cycles, "L_cycles": L_cycles, "cycles": cycles}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    knobs = depth_knobs(arch)
    for name, value in wanted.items():
        if name not in knobs:
            others = f"its depth is set by {', '.join(knobs)}" if knobs else "its depth is fixed"
            raise ValueError(f"{name}={value}: a net of kind {net_name(arch)} has none; {others}")
        if value < 1:
            raise ValueError(f"{name}={value} applies nothing; use 1 or more")
    if not wanted:
        return arch
    settings = {**arch.model_dump(), **wanted}
    for name, calls in _calls(settings).items():
        if name in settings:
            settings[name] = min(settings[name], calls)
    return type(arch).model_validate(settings)


def with_depth(model: LanguageModel, arch: NetConfig) -> LanguageModel:
    """A model that runs `arch`, which must differ from the model's in depth alone.

    It shares the weights of `model`: it costs no memory, and both may be used. ValueError where
    these are of a certain depth.
    """
    if model.model.tells_calls_apart:
        raise ValueError(
            "the model has adapters for each of its calls (lora.per_cycle), so its depth is fixed"
        )
    vocab_size = len(model.lm_head.weight)
    with torch.device("meta"):
        other = LanguageModel(arch, vocab_size, model.attention)
    other.load_state_dict(model.state_dict(), assign=True)
    for parameter in other.parameters():
        parameter.requires_grad_(False)
    return other.train(model.training)


def net_name(arch: NetConfig) -> str:
    """The name under which a configuration file knows this kind of net."""
    return str(arch.model_dump().get("name", type(arch).__name__))


def _calls(settings: dict[str, int]) -> dict[str, int]:
    """How many calls there are for each setting that counts those with gradient."""
    H_calls, L_calls = settings.get("H_cycles", 1), settings.get("L_cycles", 1)
    return {
        "H_bp_steps": H_calls,
        "L_bp_steps": H_calls * L_calls,
        "L_bp_cycles": L_calls,
        "bp_cycles": settings.get("cycles", 1),
    }
