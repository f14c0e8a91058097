"""Every folder of golden cases is picked up by a test, or waits for a named issue.

Which tests pick up a kind is read from the sources of tests/, so that it also holds when only a
part of the suite runs. A test claims a kind by an argument `golden_<kind>` (conftest.py), or by
naming the kind as a string in a module that reads --golden or imports golden_cases.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from golden_cases import ARGUMENT_PREFIX, CASE_FILE, KINDS, golden_cases

TESTS = Path(__file__).parent
# kinds whose tests are still to be written, and with which issue they come
AWAITING: dict[str, str] = {}


def functions_of(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def golden_arguments(function: ast.FunctionDef) -> set[str]:
    """The kinds whose cases a test or fixture asks for."""
    names = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
    return {kind for kind in KINDS if ARGUMENT_PREFIX + kind in names}


def kinds_claimed(source: str) -> set[str]:
    """The kinds of golden cases that a test module's source picks up."""
    tree = ast.parse(source)
    claimed = {kind for function in functions_of(tree) for kind in golden_arguments(function)}
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    imports = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    if "--golden" in strings or "golden_cases" in imports:
        claimed |= {kind for kind in KINDS if kind in strings}
    return claimed


def sources_of_tests() -> dict[str, str]:
    """The sources of the other test modules, by file name."""
    paths = [path for path in TESTS.glob("test_*.py") if path != Path(__file__)]
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def folder_problems(folders: set[str], claimed: set[str], awaiting: dict[str, str]) -> list[str]:
    """What is wrong with the folders of a golden folder, one message each."""
    problems = []
    for folder in sorted(folders):
        if folder not in KINDS:
            problems.append(
                f"{folder}: no test knows this kind; add it to KINDS in tests/golden_cases.py and "
                f"write a test with an argument {ARGUMENT_PREFIX}{folder}"
            )
        elif folder not in claimed and folder not in awaiting:
            problems.append(
                f"{folder}: no test picks up its cases; write one with an argument "
                f"{ARGUMENT_PREFIX}{folder}"
            )
    for folder in sorted(claimed & awaiting.keys()):
        problems.append(f"{folder}: is tested now; take it out of AWAITING")
    return problems


def test_every_folder_of_golden_cases_is_picked_up(golden_folder: Path) -> None:
    folders = {path.name for path in golden_folder.iterdir() if path.is_dir()}
    claimed = {kind for source in sources_of_tests().values() for kind in kinds_claimed(source)}
    problems = folder_problems(folders - {"__pycache__"}, claimed, AWAITING)
    assert not problems, "\n".join(problems)


def test_every_golden_case_is_in_the_list_of_its_kind(
    golden_folder: Path, pytestconfig: pytest.Config
) -> None:
    listed = {case for kind in KINDS for case in golden_cases(pytestconfig, kind)}
    unlisted = {path.parent for path in golden_folder.rglob(CASE_FILE)} - listed
    assert not unlisted, f"{CASE_FILE} where golden_cases.py does not look: {sorted(unlisted)}"


def test_the_golden_tests_have_golden_in_their_names() -> None:
    misnamed = [
        f"{file_name}::{function.name}"
        for file_name, source in sources_of_tests().items()
        for function in functions_of(ast.parse(source))
        if function.name.startswith("test_")
        and golden_arguments(function)
        and "golden" not in function.name
    ]
    assert not misnamed, f"`pytest -k golden` would leave these out: {misnamed}"


def test_a_claim_is_an_argument_or_a_kind_named_beside_the_option() -> None:
    assert kinds_claimed("def test_golden_net(golden_nets): ...") == {"nets"}
    assert kinds_claimed("def f(config): return config.getoption('--golden') + 'sampler'") == {
        "sampler"
    }
    assert kinds_claimed("from golden_cases import golden_dirs\nKIND = 'sft'") == {"sft"}
    assert kinds_claimed("KIND = 'sft'") == set()


def test_a_folder_that_is_unknown_unclaimed_or_no_longer_awaited_is_reported() -> None:
    folders = {"nets", "train", "sft", "novel"}
    novel, train, sft = folder_problems(folders, {"nets", "sft"}, {"sft": "issue 6"})
    assert novel.startswith("novel: no test knows this kind")
    assert train.startswith("train: no test picks up its cases")
    assert sft.startswith("sft: is tested now")
