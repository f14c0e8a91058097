"""Lists the golden cases for the tests. Knows folders and file names, but no case by its name.

A test asks for an argument `golden_<kind>`, with a kind from KINDS, and is run once for each case
of that kind, with its Path (conftest.py does that). What a case holds is in its own description.
"""

from __future__ import annotations

from pathlib import Path

import pytest

# the folders below tests/golden; README.md there says what each of them pins
KINDS = (
    "nets",
    "optimizer",
    "train",
    "tworank",
    "schedules",
    "init",
    "sampler",
    "dataset_batches",
    "inference",
    "sft",
    "data_io",
    "checkpoint",
    "hf",
    "evaluation",
)
ARGUMENT_PREFIX = "golden_"
CASE_FILE = "case.json"


def golden_root(config: pytest.Config) -> Path:
    """The folder given by --golden."""
    return Path(str(config.getoption("--golden")))


def golden_dirs(config: pytest.Config, kind: str) -> list[Path]:
    """The folders of one kind that hold a case.json: those below it, or the kind's own folder."""
    folder = golden_root(config) / kind
    return sorted(path.parent for path in [*folder.glob(CASE_FILE), *folder.glob(f"*/{CASE_FILE}")])


def golden_files(config: pytest.Config, kind: str) -> list[Path]:
    """The cases of one kind that are single files <name>.json."""
    folder = golden_root(config) / kind
    return sorted(path for path in folder.glob("*.json") if path.name != CASE_FILE)


def golden_cases(config: pytest.Config, kind: str) -> list[Path]:
    """All cases of one kind: a folder for a case with a case.json, else its <name>.json."""
    return golden_dirs(config, kind) + golden_files(config, kind)


def parametrize_golden(metafunc: pytest.Metafunc) -> None:
    """Runs a test with an argument `golden_<kind>` once per case, with the case's Path."""
    for kind in KINDS:
        argument = ARGUMENT_PREFIX + kind
        if argument not in metafunc.fixturenames:
            continue
        cases = golden_cases(metafunc.config, kind)
        if cases:
            ids = [case.stem for case in cases]
            metafunc.parametrize(argument, cases, ids=ids, scope="module")
        else:
            reason = f"{golden_root(metafunc.config)} holds no case of kind {kind!r}"
            nothing = pytest.param(None, marks=pytest.mark.skip(reason=reason), id="no-case")
            metafunc.parametrize(argument, [nothing], scope="module")
