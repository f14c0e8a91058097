"""The architecture of a run that has weights already: its own, or those of `resume_from`.

What shapes weights, or what they compute, is read from where they are, whatever the recipe says; to
contradict it on the command line is an error. Cycles, gradient-carrying calls, the kind of
attention and rotary positions come from the command line and the recipe's own `arch` section; else
they are as trained. A group's file (arch/net, arch/size) names an architecture and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from models.transformer import NetConfig, StackConfig
from training.export_format import ARCH_ADAPTER
from training.run_names import named_path
from training.run_records import stored_config

# init_type and init_std are among them, since the embedding is scaled by 1 / its first deviation.
SHAPE_KEYS = (
    *("name", "half_layers", "n_layers", "hidden_size", "num_heads"),
    *("expansion", "intermediate_size", "norm_type", "init_type", "init_std"),
)
OVERRIDE = "H_override"
# What choosing a group's file says: the settings in which such files differ.
NAMED_BY_GROUP = {
    "arch/net@arch": ("name",),
    "arch/size@arch": ("n_layers", "hidden_size", "num_heads"),
}


@dataclass(frozen=True, slots=True)
class ChosenArch:
    """The keys of `arch` that somebody wrote down, and not a group's file."""

    command_line: frozenset[str]  # n_layers, H_override.norm_type, ...
    recipe: frozenset[str]


def chosen_arch(overrides: Iterable[str], recipe: str, folders: Sequence[Path]) -> ChosenArch:
    """What the overrides of a command and the recipe's own text say of the architecture."""
    named: set[str] = set()
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        named |= set(NAMED_BY_GROUP.get(key, ()))
        if key.startswith("arch."):
            named.add(key.removeprefix("arch."))
    return ChosenArch(frozenset(named), frozenset(_recipe_keys(recipe, folders)))


def inherit_arch(raw: Mapping[str, Any], chosen: ChosenArch) -> tuple[dict[str, Any], list[str]]:
    """A composed configuration with the architecture of the weights that the run begins with.

    As it is where there are none. ValueError for a contradiction on the command line.
    """
    source = _source_of(raw)
    if source is None:
        return dict(raw), []
    run, stored = source
    try:
        trained = ARCH_ADAPTER.validate_python(stored["arch"])
    except ValidationError as error:
        raise ValueError(f"{run} holds no architecture that is known here: {error}") from None
    asked = dict(raw.get("arch") or {})
    _require_no_contradiction(trained, asked, chosen.command_line, run)
    arch = trained.model_dump()
    fields = set(type(trained).model_fields) - {OVERRIDE, *SHAPE_KEYS}
    soft_overrides = {f"{OVERRIDE}.{key}" for key in StackConfig.model_fields} - {
        f"{OVERRIDE}.{key}" for key in SHAPE_KEYS
    }
    fields |= soft_overrides if OVERRIDE in type(trained).model_fields else set()
    by_recipe = {key for key in chosen.recipe if key in fields}
    by_command = {key for key in chosen.command_line if key.partition(".")[0] not in SHAPE_KEYS}
    for key in (by_recipe | by_command) - {OVERRIDE}:
        if key.startswith(f"{OVERRIDE}."):
            name = key.partition(".")[2]
            if name in (asked.get(OVERRIDE) or {}):
                arch[OVERRIDE] = {**arch.get(OVERRIDE, {}), name: asked[OVERRIDE][name]}
        elif key in asked:  # a key of another net is left in, for the rule that names it
            arch[key] = asked[key]
    told = [f"{key}={arch[key]}" for key in SHAPE_KEYS if key in asked and asked[key] != arch[key]]
    notes = [f"architecture as in {run}: {', '.join(told)}"] if told else []
    return {**raw, "arch": arch}, notes


def _source_of(raw: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The run whose weights are taken, and its configuration: this one's own come first."""
    given = {key: raw.get(key) for key in ("checkpoint_path", "project_name", "run_name")}
    own = named_path(data_path=str((raw.get("data") or {}).get("path")), **given)
    start = raw.get("resume_from")
    for path in (None if raw.get("new_run") else own, start and Path(str(start))):
        stored = stored_config(path) if path else None
        if path and stored:
            return path, stored
    return None


def _require_no_contradiction(
    trained: NetConfig, asked: Mapping[str, Any], keys: Iterable[str], run: Path
) -> None:
    levels = trained.stacks()
    slow_level = levels.get("H_module", next(iter(levels.values())))
    wrong = []
    for key in sorted(keys):
        if key in SHAPE_KEYS:
            there, here = getattr(trained, key, None), asked.get(key)
        elif key.startswith(f"{OVERRIDE}.") and key.partition(".")[2] in SHAPE_KEYS:
            name = key.partition(".")[2]
            there, here = getattr(slow_level, name), (asked.get(OVERRIDE) or {}).get(name)
        elif key == OVERRIDE:
            there, here = getattr(trained, OVERRIDE, {}), asked.get(OVERRIDE)
        else:
            continue
        if there != here:
            wrong.append(f"arch.{key} is {there} there, {here} here")
    if wrong:
        raise ValueError(
            f"{run} holds another architecture than the one asked for: {'; '.join(wrong)}; leave "
            "that out (the architecture is read from the run), or train from the beginning in "
            "another checkpoint_path"
        )


def _recipe_keys(recipe: str, folders: Sequence[Path]) -> set[str]:
    """Keys of the `arch` sections in a recipe's file and in the recipes that it builds on."""
    for folder in folders:
        path = folder / f"{recipe.removesuffix('.yaml')}.yaml"
        if path.is_file():
            content = yaml.safe_load(path.read_text()) or {}
            below = [each for each in content.get("defaults", ()) if isinstance(each, str)]
            arch = content.get("arch") or {}
            keys = {*arch, *(f"{OVERRIDE}.{key}" for key in arch.get(OVERRIDE) or {})}
            return keys.union(*(_recipe_keys(each, folders) for each in below))
    return set()
