"""What the command line says, checked: keys, choices, flags, and the record that comes of them.

Knows nothing of Hydra. Unknown keys are refused before a configuration is composed from them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_io.redaction import is_secret_name, secret_variable
from training.schema import GROUPS, SECTIONS, RunConfig, legal_keys, net_names, nets, tags


def parse_config(raw: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """The record of a composed configuration, and notes for the user.

    ValueError lists every rule that is broken, with the nearest legal key for an unknown one.
    """
    notes = []
    arch = dict(raw.get("arch") or {})
    if "head" in arch:
        notes.append(f"arch.head={arch.pop('head')} is ignored: there is one head")
    # Recipes for any net say so that gradients reach equally far throughout: elsewhere they do.
    if arch.get("name") != "hrm" and arch.get("bp_warmup_ratio") == 0:
        del arch["bp_warmup_ratio"]
    try:
        config = RunConfig(**{**raw, "arch": arch})
    except ValidationError as error:
        raise ValueError(explain(error)) from None
    if variable := secret_variable(config.model_dump_json()):
        raise ValueError(
            f"a setting holds the value of ${variable}, which would be written to all_config.yaml; "
            "leave it out"
        )
    return config, notes


def explain(error: ValidationError) -> str:
    """What pydantic found, one line for each key: its value and the rules that it breaks."""
    rules: dict[str, list[str]] = {}
    for finding in error.errors(include_url=False):
        subject, rule = _broken_rule(finding)
        rules.setdefault(subject, []).append(rule)
    lines = [f"{subject} {' or '.join(dict.fromkeys(broken))}" for subject, broken in rules.items()]
    return "\n".join(line.strip() for line in lines)


def _broken_rule(finding: Mapping[str, Any]) -> tuple[str, str]:
    """What a finding is about, as key=value, and the rule."""
    # Members of unions stand in the location too: arch.hrm.n_layers, schedule_steps.constrained-int
    is_nested = finding["loc"][0] in ("arch", *SECTIONS) if finding["loc"] else False
    path = [str(p) for i, p in enumerate(finding["loc"]) if not (i == 1 and p in net_names())]
    key = ".".join(path if is_nested else path[:1])
    value = finding["input"]
    match finding["type"]:
        case "extra_forbidden":
            return (_misplaced_key if key in legal_keys() else unknown_key)(key), ""
        case "missing":
            return key, f"is required and has no value; give {key}=..."
        case "value_error":
            return f"{key}:" if key else "", str(finding.get("ctx", {}).get("error"))
        case "string_pattern_mismatch":
            return f"{key}={value}", "must be a folder's plain name"
        case "union_tag_invalid" | "union_tag_not_found":
            return "arch.name", f"must be one of {', '.join(net_names())}; give arch/net@arch=..."
    if value is None:
        return key, f"is not set; give {key}=..."
    shown = str(value).lower() if isinstance(value, bool) else value
    return f"{key}={shown}", finding["msg"].replace("Input should", "must")


def _misplaced_key(key: str) -> str:
    field = key.removeprefix("arch.")
    owners = [name for net in nets() if field in net.model_fields for name in tags(net)]
    return f"{key} is no setting of this net, but of {', '.join(owners)}; leave it out"


def unknown_key(key: str, known: Iterable[str] | None = None) -> str:
    """An error text that names the nearest legal key."""
    known = [*legal_keys(), *GROUPS] if known is None else list(known)
    # What people type is often a part alone: hidden_size, size, arch.
    spellings = {_last_part(full): full for full in reversed(known)}
    spellings |= {
        "arch": "arch/net@arch or arch/size@arch",
        "batch_size": "global_batch_size or micro_batch_size",
    }
    spellings |= {full: full for full in known}
    nearest = difflib.get_close_matches(key, spellings, n=1, cutoff=0.6)
    hint = f"did you mean {spellings[nearest[0]]}?" if nearest else "see python pretrain.py --help"
    return f"unknown key {key!r}; {hint}"


def _last_part(key: str) -> str:
    return key.partition("@")[0].rpartition("/")[2].rpartition(".")[2]


def checked_overrides(arguments: list[str], config_dir: Path) -> list[str]:
    """Command-line arguments with every override checked; ValueError for one that is not legal.

    Legal keys are set whether or not a YAML file mentions them, with or without `+`. Flags may
    stand anywhere; they come last in what is returned, as Hydra wants overrides in one piece.
    """
    overrides, flags = [], []
    remaining = iter(arguments)
    # Choices from a folder of one's own are left to Hydra.
    is_ours = not _CONFIG_DIR_FLAGS & {argument.partition("=")[0] for argument in arguments}
    for argument in remaining:
        if not argument.startswith("-"):
            overrides.append(_checked_override(argument, config_dir if is_ours else None))
            continue
        name, separator, value = argument.partition("=")
        if name not in _FLAGS:
            raise ValueError(
                f"unknown flag {argument!r}; settings are written without dashes, as key=value "
                "(lr=3e-4); see python pretrain.py --help"
            )
        flags.append(argument)
        if not separator and name in _FLAGS_WITH_VALUE:
            value = next(remaining, "")
            flags.append(value)
        if name in ("--config-name", "-cn") and is_ours:
            _check_recipe(value, config_dir)
    return overrides + flags


_CONFIG_DIR_FLAGS = {"--config-path", "-cp", "--config-dir", "-cd"}
_FLAGS_WITH_VALUE = {
    *_CONFIG_DIR_FLAGS,
    *("--config-name", "-cn", "--package", "-p", "--cfg", "-c", "--info", "-i"),
    "--experimental-rerun",
}
_FLAGS = {
    *_FLAGS_WITH_VALUE,
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc"),
}


def _checked_override(argument: str, config_dir: Path | None) -> str:
    bare = argument.lstrip("+~")
    key, separator, value = bare.partition("=")
    if not separator and not argument.startswith("~"):
        raise ValueError(f"{argument!r} is no override; write key=value, e.g. lr=3e-4")
    if is_secret_name(key):
        raise ValueError(
            f"{key}=... on a command line is seen by all users of this machine, and written down; "
            "export it in the shell instead"
        )
    if key.startswith(("hydra.", "hydra/")):
        return argument
    if key in GROUPS:
        if config_dir is not None:
            _check_choice(key, value, config_dir)
        return argument
    if key not in legal_keys() and key != "arch.H_override":
        raise ValueError(unknown_key(key))
    return argument if argument.startswith("~") else f"++{bare}"


def _check_choice(group: str, value: str, config_dir: Path) -> None:
    folder = config_dir / group.partition("@")[0]
    options = sorted(path.stem for path in folder.glob("*.yaml") if path.stem[0] != "_")
    for choice in value.split(","):
        if choice not in options:
            raise ValueError(f"{group}={choice} does not exist{_one_of(choice, options)}")


def _check_recipe(name: str, config_dir: Path) -> None:
    recipes = sorted(path.stem for path in config_dir.glob("cfg_*.yaml"))
    if name.removesuffix(".yaml") not in recipes:
        raise ValueError(f"--config-name {name} does not exist{_one_of(name, recipes)}")


def _one_of(choice: str, options: list[str]) -> str:
    nearest = difflib.get_close_matches(choice, options, n=1, cutoff=0.3)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return f"{hint}; it is one of {', '.join(options)}"
