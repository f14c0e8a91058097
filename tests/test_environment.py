"""The environment record says what a run was computed with; sources that git lacks go with it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import training.environment
from training.environment import (
    CODE_FILE,
    ENVIRONMENT_FILE,
    check_floors,
    record_environment,
    recorded_choices,
)

CHOICES = {"threads": 2, "attention": "sdpa", "device": "cpu"}
SETTINGS = ("user.name=t", "user.email=t@example.org", "commit.gpgsign=false")


def git(folder: Path, *arguments: str) -> str:
    options = [part for setting in SETTINGS for part in ("-c", setting)]
    command = ["git", *options, *arguments]
    return subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of its own in place of this one, clean at its first commit."""
    root = tmp_path / "sources"
    for name, text in {
        "pretrain.py": "print(1)\n",
        "config/cfg.yaml": "lr: 1\n",
        "picture.svg": "<svg/>\n",
        "tests/golden/case.py": "large\n",
        ".gitignore": "data/\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    monkeypatch.setattr(training.environment, "SOURCE_ROOT", root)
    return root


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


def zipped(run_path: Path) -> dict[str, str]:
    with zipfile.ZipFile(run_path / CODE_FILE) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_the_record_says_where_and_with_what(
    sources: Path, run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "/somewhere/pretrain.py", "lr=1e-3", "seed=2"])
    record_environment(run_path, CHOICES)
    record = json.loads((run_path / ENVIRONMENT_FILE).read_text())
    assert record["choices"] == CHOICES
    assert record["python"] == platform.python_version()
    assert record["packages"]["torch"] == torch.__version__
    assert record["cuda"] == torch.version.cuda
    assert record["command"] == ["pretrain.py", "lr=1e-3", "seed=2"]
    assert record["git_commit"] == git(sources, "rev-parse", "HEAD")
    assert record["git_clean"] is True
    assert all(record["packages"].values())


def test_a_clean_commit_needs_no_copy_of_the_sources(sources: Path, run_path: Path) -> None:
    record_environment(run_path, {})
    assert [path.name for path in run_path.iterdir()] == [ENVIRONMENT_FILE]


def test_changed_and_new_sources_go_with_the_run(sources: Path, run_path: Path) -> None:
    (sources / "pretrain.py").write_text("print(2)\n")
    (sources / "models").mkdir()
    (sources / "models/new_idea.py").write_text("idea\n")
    (sources / "data").mkdir()
    (sources / "data/secret.txt").write_text("ignored by git\n")
    record_environment(run_path, {})
    assert json.loads((run_path / ENVIRONMENT_FILE).read_text())["git_clean"] is False
    assert zipped(run_path) == {
        "config/cfg.yaml": "lr: 1\n",
        "models/new_idea.py": "idea\n",
        "pretrain.py": "print(2)\n",
    }


def test_a_new_file_alone_makes_the_tree_unclean(sources: Path, run_path: Path) -> None:
    (sources / "idea.py").write_text("")
    (sources / "api_key.txt").write_text("may be secret\n")
    record_environment(run_path, {})
    assert "idea.py" in zipped(run_path) and "api_key.txt" not in zipped(run_path)


def test_earlier_sittings_of_a_run_stay_on_record(sources: Path, run_path: Path) -> None:
    (sources / "idea.py").write_text("1")
    for text in ("2", "3"):
        record_environment(run_path, {"threads": int(text)})
        (sources / "idea.py").write_text(text)
    record = json.loads((run_path / ENVIRONMENT_FILE).read_text())
    (earlier,) = record["earlier"]
    assert (earlier["choices"], earlier["code"]) == ({"threads": 2}, CODE_FILE)
    assert (record["choices"], record["code"]) == ({"threads": 3}, "code_2.zip")
    assert recorded_choices(run_path) == {"threads": 3}
    assert zipped(run_path)["idea.py"] == "1"


def test_a_deleted_source_is_no_error(sources: Path, run_path: Path) -> None:
    (sources / "pretrain.py").unlink()
    record_environment(run_path, {})
    assert zipped(run_path).keys() == {"config/cfg.yaml"}


def test_without_git_the_sources_go_with_the_run(
    sources: Path, run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.environment, "_git", lambda *_: None)
    for folder in (".venv", "data", "checkpoints", "config/data"):
        (sources / folder).mkdir(parents=True)
        (sources / folder / "of_any.yaml").touch()
    record_environment(run_path, {})
    record = json.loads((run_path / ENVIRONMENT_FILE).read_text())
    assert (record["git_commit"], record["git_clean"]) == (None, False)
    assert zipped(run_path).keys() == {"config/cfg.yaml", "config/data/of_any.yaml", "pretrain.py"}


def test_choices_are_found_again_when_the_run_is_continued(sources: Path, run_path: Path) -> None:
    assert recorded_choices(run_path) == {}
    record_environment(run_path, CHOICES)
    assert recorded_choices(run_path) == CHOICES


@pytest.mark.parametrize("text", ["", "{", "{}", '{"choices": 3}', "[]"])
def test_a_record_that_cannot_be_read_is_named(run_path: Path, text: str) -> None:
    (run_path / ENVIRONMENT_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"environment.json cannot be read .*delete it"):
        recorded_choices(run_path)


def test_packages_below_their_floors_are_named(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("torch>=1.0  # new enough\nnumpy>=999.1\nno-such-thing>=2\npyyaml\n")
    with pytest.raises(ValueError, match=r"numpy .*needs 999.1.*no-such-thing is not installed"):
        check_floors(requirements)
    requirements.write_text(f"torch>={torch.__version__.split('+')[0]}\n")
    check_floors(requirements)
    check_floors(tmp_path / "absent.txt")
    check_floors()


def test_the_record_holds_what_differs_from_the_commit(
    sources: Path, run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_environment(run_path, CHOICES)
    assert json.loads((run_path / ENVIRONMENT_FILE).read_text())["git_diff"] is None
    (sources / "pretrain.py").write_text("print(2)\n")
    (sources / "tests/golden/case.py").write_text("larger\n")
    record_environment(run_path, CHOICES)
    diff = json.loads((run_path / ENVIRONMENT_FILE).read_text())["git_diff"]
    assert "-print(1)\n+print(2)\n" in diff and "golden" not in diff
    monkeypatch.setattr(training.environment, "DIFF_CHARACTERS", 20)
    record_environment(run_path, CHOICES)
    diff = json.loads((run_path / ENVIRONMENT_FILE).read_text())["git_diff"]
    assert diff.endswith("... cut after 20 characters; see the sources")
