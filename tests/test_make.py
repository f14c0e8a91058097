"""The Makefile in an empty clone: what it installs and when, and what it says when it cannot.

Nothing is installed: the Pythons that make finds are shell scripts that note how they are called.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from source_tree import ROOT

MAKE = shutil.which("make")
TOOLS = ("sh", "awk", "sed", "touch", "mkdir", "cp", "cat", "basename", "rm", "find")
TARGETS = {"setup", "quickstart", "test", "test-slow", "lint", "format", "benchmark", "clean"}

pytestmark = pytest.mark.skipif(MAKE is None, reason="needs make")

# Stands for Python. Answers what the Makefile asks, makes a .venv with itself in it, and notes what
# is installed. $STATE is what is special here: too-old, no-venv, no-network, has-torch, or nothing.
FAKE_PYTHON = r"""#!/bin/sh
case "$*" in
    --version) echo "Python 3.9.1" ;;
    *"sys.version_info"*) [ "$STATE" != too-old ] ;;
    *"import ensurepip"*) [ "$STATE" != no-venv ] ;;
    *"importlib.metadata"*) [ "$STATE" = has-torch ] ;;
    "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *" install "*)
        [ "$STATE" != no-network ] || exit 1
        for last; do :; done
        echo "$last" >> installed.txt ;;
    *) echo yes ;;
esac
"""


class Clone:
    """A folder with the Makefile and the requirements, and a PATH with fake Pythons alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "clone"
        self.bin = folder / "bin"
        self.folder.mkdir()
        self.bin.mkdir()
        for path in [ROOT / "Makefile", *ROOT.glob("requirements*.txt")]:
            shutil.copy(path, self.folder)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))

    def add_python(self, name: str = "python3") -> None:
        path = self.bin / name
        path.write_text(FAKE_PYTHON)
        path.chmod(0o755)

    def make(self, *arguments: str, state: str = "") -> subprocess.CompletedProcess[str]:
        """Runs make with its outputs together in `stdout`."""
        return subprocess.run(
            [str(MAKE), *arguments],
            cwd=self.folder,
            env={"PATH": str(self.bin), "STATE": state},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )

    def installed(self) -> list[str]:
        """What was installed so far, in order: the last word of each pip command."""
        path = self.folder / "installed.txt"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_help_is_the_default_and_lists_every_target(clone: Clone) -> None:
    result = clone.make()
    assert result.returncode == 0
    listed = {line.split()[1] for line in result.stdout.splitlines() if line.startswith("make ")}
    assert listed == TARGETS | {"help"}


def test_a_dry_run_of_setup_shows_the_steps_and_takes_none(clone: Clone) -> None:
    result = clone.make("-n", "setup")
    assert result.returncode == 0
    torch_at = result.stdout.index('install "torch==2.13.0"')
    assert torch_at < result.stdout.index("install -r requirements.txt")
    assert '"torch>=2.11,<2.14"' in result.stdout  # the range that an installed torch may have
    assert not (clone.folder / ".venv").exists()


def test_setup_installs_once(clone: Clone) -> None:
    clone.add_python()
    assert clone.make("setup").returncode == 0
    assert clone.installed() == ["torch==2.13.0", "requirements.txt"]
    second = clone.make("setup")
    assert second.returncode == 0
    assert ".venv is ready" in second.stdout
    assert clone.installed() == ["torch==2.13.0", "requirements.txt"]


def test_an_interrupted_setup_is_done_again(clone: Clone) -> None:
    clone.add_python()
    assert clone.make("setup", state="no-network").returncode != 0
    assert clone.make("setup").returncode == 0
    assert clone.installed() == ["torch==2.13.0", "requirements.txt"]


def test_a_fitting_torch_that_is_there_is_kept(clone: Clone) -> None:
    clone.add_python()
    result = clone.make("setup", state="has-torch")
    assert "keeping the torch that is installed" in result.stdout
    assert clone.installed() == ["torch>=2.11,<2.14", "requirements.txt"]  # the first as a check


def test_changed_requirements_are_installed(clone: Clone) -> None:
    clone.add_python()
    clone.make("setup")
    stamp = clone.folder / ".venv" / ".core-installed"
    later = stamp.stat().st_mtime + 5
    os.utime(clone.folder / "requirements.txt", (later, later))
    assert clone.make("setup").returncode == 0
    assert clone.installed().count("requirements.txt") == 2


def test_a_venv_whose_python_is_gone_is_made_again(clone: Clone) -> None:
    clone.add_python()
    clone.make("setup")
    (clone.folder / ".venv" / "bin" / "python").unlink()
    result = clone.make("setup")
    assert result.returncode == 0
    assert "making .venv" in result.stdout


def test_only_the_tests_and_the_linters_install_what_developing_needs(clone: Clone) -> None:
    clone.add_python()
    clone.make("quickstart")
    assert "requirements-dev.txt" not in clone.installed()
    for target in ("test", "lint"):
        assert clone.make(target).returncode == 0
    assert clone.installed() == ["torch==2.13.0", "requirements.txt", "requirements-dev.txt"]


def test_another_python_is_tried_when_the_first_is_absent(clone: Clone) -> None:
    clone.add_python("python3.12")
    assert "making .venv with python3.12" in clone.make("setup").stdout


def test_a_too_old_python_is_named_with_the_way_out(clone: Clone) -> None:
    clone.add_python()
    result = clone.make("setup", state="too-old")
    assert result.returncode != 0
    assert "Python from 3.11 to 3.14 is needed; found: python3 (Python 3.9.1)" in result.stdout
    assert "apt install python3.12" in result.stdout
    assert "PYTHON=" in result.stdout
    assert not (clone.folder / ".venv").exists()


def test_a_missing_venv_module_is_named_with_the_package_that_brings_it(clone: Clone) -> None:
    clone.add_python()
    result = clone.make("setup", state="no-venv")
    assert result.returncode != 0
    assert "no venv or ensurepip module): python3" in result.stdout
    assert "apt install python3-venv" in result.stdout


def test_no_python_at_all_is_said(clone: Clone) -> None:
    result = clone.make("setup")
    assert result.returncode != 0
    assert "found: none" in result.stdout
