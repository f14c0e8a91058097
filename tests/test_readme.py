"""What the README tells people to type works: targets exist, lines compose, files are there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from training.command_line import checked_overrides

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    """Words of every command line in the README's bash blocks."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        joined = block.replace("\\\n", " ")
        for line in joined.splitlines():
            words = shlex.split(re.sub(r"<\w+>", "filled_in", line), comments=True)
            if words:
                found.append(words)
    return found


def pretrain_overrides(words: list[str]) -> list[str] | None:
    """What follows pretrain.py (or the quick start, which hands it on); None: another command."""
    for script in ("pretrain.py", "scripts/quickstart.py"):
        if script in words:
            return words[words.index(script) + 1 :]
    return None


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_readme_works(words: list[str]) -> None:
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr
        return
    overrides = pretrain_overrides(words)
    assert overrides is not None, "a kind of command that this test does not know"
    if "--help" in overrides:
        done = subprocess.run([sys.executable, "pretrain.py", "--help"], cwd=ROOT)
        assert done.returncode == 0
        return
    config_name = "cfg_pretrain"
    if "--config-name" in overrides:
        config_name = overrides.pop(overrides.index("--config-name") + 1)
        overrides.remove("--config-name")
    with initialize_config_dir(str(ROOT / "config"), version_base=None):
        compose(config_name, checked_overrides(overrides, ROOT / "config"))


def test_every_file_that_the_readme_links_exists() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_path_of_the_map_exists() -> None:
    tree = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    for line in tree.group(1).splitlines():
        for name in line.split("  ")[0].split() + re.findall(r"^\S+/(?=  \S+/)|\S+/(?=  )", line):
            assert (ROOT / name).exists(), name
