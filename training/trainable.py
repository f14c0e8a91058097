"""Which weights of a run are trained: all, all but frozen ones, or adapters alone.

Acts on a model before it is compiled and sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from models.language_model import LanguageModel
from models.lora import LoraConfig, add_adapters, calls_by_stack, is_adapter
from models.transformer import NetConfig
from training.schedule import backprop_steps_at
from training.schema import RunConfig


def choose_trained(model: LanguageModel, config: RunConfig) -> dict[str, str]:
    """Adds adapters, and takes the gradient from what is not trained; lines for the summary.

    ValueError where a pattern of `freeze` names nothing, or nothing is left to train.
    """
    if config.lora is None and not config.freeze:
        return {}
    lines = {}
    if config.lora:
        add_adapters(model, config.lora)
        lines["lora"] = _told(config.lora, config.arch)
    frozen = _frozen_names(model, config.freeze or ())
    for name, param in model.named_parameters():
        is_trained = is_adapter(name) if config.lora else name not in frozen
        param.requires_grad_(is_trained)
    _require_gradient_from_the_start(model, config)
    counts = [(param.numel(), param.requires_grad) for param in model.parameters()]
    trained, total = sum(n for n, is_trained in counts if is_trained), sum(n for n, _ in counts)
    what = f"; frozen: {', '.join(config.freeze)}" if config.freeze else ""
    return {**lines, "trains": f"{trained:,} of {total:,} parameters{what}"}


def is_named(parameter: str, pattern: str) -> bool:
    """Whether a pattern names a parameter, as a whole or by some of its parts in a row.

    `embed_tokens`, `L_module`, `H_module.layers.0`, `layers.*.attn`; a part may have wildcards.
    """
    parts, wanted = parameter.split("."), pattern.split(".")
    starts = range(len(parts) - len(wanted) + 1)
    return any(
        all(fnmatchcase(part, glob) for part, glob in zip(parts[start:], wanted, strict=False))
        for start in starts
    )


def _frozen_names(model: LanguageModel, patterns: Sequence[str]) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if is_named(name, pattern)}
        if not found:
            raise ValueError(
                f"freeze={pattern} names no weight of this net; it has {', '.join(_parts(names))}, "
                "or parts of them in a row, such as layers.0.attn"
            )
        frozen |= found
    return frozen


def _parts(names: Sequence[str]) -> list[str]:
    parts = dict.fromkeys(part for name in names for part in name.split("."))
    return [part for part in parts if not part.isdigit() and part not in ("model", "weight")]


def _require_gradient_from_the_start(model: LanguageModel, config: RunConfig) -> None:
    """ValueError where the first steps would reach nothing that is trained."""
    prefixes = _reached(config.arch, backprop_steps_at(0, 1, config.arch))
    for name, param in model.named_parameters():
        if param.requires_grad and name.startswith(tuple(prefixes)):
            return
    raise ValueError(
        f"freeze={config.freeze or []} leaves no weight that a gradient reaches in the first steps "
        f"(it reaches {', '.join(prefix.strip('.') for prefix in prefixes)}); freeze less, or let "
        "it reach further (hrm: arch.bp_warmup_ratio=0)"
    )


def _reached(arch: NetConfig, backprop_steps: int | None) -> list[str]:
    """Beginnings of the names of parameters that a gradient reaches from the answer."""
    behind: dict[str, frozenset[str]] = {"x": frozenset({"model.embed_tokens."})}
    answer: frozenset[str] = frozenset()
    for each in arch.applications(backprop_steps):
        read = (behind.get(name, frozenset()) for name in each.reads)
        reached = frozenset({f"model.{each.stack}."}).union(*read)
        answer = behind[each.writes] = reached if each.keeps_gradient else frozenset()
    return [*sorted(answer), "lm_head."]


def _told(lora: LoraConfig, arch: NetConfig) -> str:
    targets = f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}"
    if not lora.per_cycle:
        return f"{targets}; shared by all calls of a stack"
    calls = calls_by_stack(arch)
    carrying = sum(each.keeps_gradient for each in arch.applications())
    each = ", ".join(f"{count} of {stack}" for stack, count in calls.items())
    told = f"{targets}; one for each call ({each})"
    if carrying < (total := sum(calls.values())):
        told += f", of which the last {carrying} of {total} calls carry gradient and learn"
    return told
