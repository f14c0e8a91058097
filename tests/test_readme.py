"""What the README tells people to type works: targets exist, lines compose, files are there."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import pytest
from commands import run_pretrain
from hydra import compose, initialize_config_dir

from training.command_line import checked_overrides

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


DOCS = sorted((ROOT / "docs").glob("*.md"))


def commands(text: str = README) -> list[list[str]]:
    """Words of every command line in the bash blocks of a page."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        joined = block.replace("\\\n", " ")
        for line in joined.splitlines():
            words = shlex.split(re.sub(r"<\w+>", "filled_in", line), comments=True)
            while "&&" in words:
                found.append(words[: words.index("&&")])
                words = words[words.index("&&") + 1 :]
            if words:
                found.append(words)
    return found


def pretrain_overrides(words: list[str]) -> list[str] | None:
    """What follows pretrain.py (or of what takes the same arguments); None: another command."""
    for script in ("pretrain.py", "scripts/quickstart.py", "scripts/check_distributed.py"):
        if script in words:
            return words[words.index(script) + 1 :]
    return None


@lru_cache
def help_of(*command: str) -> str:
    """What one of our commands says of its options."""
    is_module, name = command[0] == "-m", command[-1]
    said = io.StringIO()
    quiet, patched = warnings.catch_warnings(), pytest.MonkeyPatch.context()
    with quiet, patched as patch, contextlib.redirect_stdout(said):
        warnings.simplefilter("ignore", RuntimeWarning)  # some modules are imported already
        patch.setattr(sys, "argv", [name, "--help"])
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        with pytest.raises(SystemExit) as ended:  # in this process: torch is imported once
            if is_module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / name), run_name="__main__")
    assert ended.value.code in (0, None)
    return said.getvalue()


def require_known_options(words: list[str]) -> None:
    """Every `key=` and `--flag` of a command stands in its help."""
    start = words.index("python") + 1 if "python" in words else 0
    if words[0] == "torchrun":
        start = next(at for at, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    size = 2 if words[start] == "-m" else 1
    command, arguments = words[start : start + size], words[start + size :]
    known = {name.strip("-.") for name in re.findall(r"[-\w.]+", help_of(*command))}
    for argument in arguments:
        if argument[:1] in "><|":  # what follows belongs to the shell
            return
        option = argument.partition("=")[0] if "=" in argument else argument
        assert option.strip("-") in known or not re.match(r"--|[\w.]+=", argument), (
            argument,
            command,
        )


def is_ours(words: list[str]) -> bool:
    """Whether it is a command of this project that says its options itself, not pretrain.py."""
    program = next((word for word in words if word.endswith(".py")), "")
    if "-m" in words:
        program = words[words.index("-m") + 1].replace(".", "/") + ".py"
    is_pretrain = pretrain_overrides(words) is not None or "make" in words[:1]
    return not is_pretrain and "/" in program and (ROOT / program).is_file()


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_readme_works(words: list[str], tmp_path: Path) -> None:
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr
        return
    if is_ours(words):
        require_known_options(words)
        return
    overrides = pretrain_overrides(words)
    assert overrides is not None, "a kind of command that this test does not know"
    if "--help" in overrides:
        run_pretrain("--help", cwd=tmp_path).check()
        return
    config_name = "cfg_pretrain"
    if "--config-name" in overrides:
        config_name = overrides.pop(overrides.index("--config-name") + 1)
        overrides.remove("--config-name")
    with initialize_config_dir(str(ROOT / "config"), version_base=None):
        compose(config_name, checked_overrides(overrides, ROOT / "config"))


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_what_the_docs_tell_to_type_is_there(page: Path) -> None:
    for words in commands(page.read_text()):
        overrides = pretrain_overrides(words)
        if overrides is not None:
            plain = [word for word in overrides if not word.startswith("$")]
            checked_overrides(plain, ROOT / "config")
        elif is_ours(words):
            require_known_options(words)
        elif "-m" in words:
            module = words[words.index("-m") + 1].replace(".", "/")
            assert (ROOT / f"{module}.py").is_file() or module == "torch/distributed/run", words
        else:
            scripts = [word for word in words if word.endswith(".py") and "=" not in word]
            assert all((ROOT / script).is_file() for script in scripts), words


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_every_file_that_a_page_links_exists(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_path_of_the_map_exists() -> None:
    tree = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert tree is not None
    for line in tree.group(1).splitlines():
        for name in line.split("  ")[0].split() + re.findall(r"^\S+/(?=  \S+/)|\S+/(?=  )", line):
            assert (ROOT / name).exists(), name
