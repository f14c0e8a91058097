"""Runs pretrain.py as a user does, in processes of its own, on tiny data; or composes its lines.

`start_command` forks from a server that has imported everything once: that saves seconds each time.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from torture.tiny_runs import VOCAB_SIZE as VOCAB_SIZE  # of the byte tokenizer
from torture.tiny_runs import write_random_bytes
from training.command_line import checked_overrides, parse_config
from training.schema import RunConfig

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN, CONFIG = ROOT / "pretrain.py", ROOT / "config"
TIMEOUT_S, RANKS_TIMEOUT_S = 120, 300
PRELOADED = ["commands", "pretrain", "torch._dynamo", "models.cpu_attention"]
TEST_PATH = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
# A net that trains a hundred steps a second. The kernel is fixed: else a probe picks it, by speed;
# and the device, since results are the same bit for bit on a CPU alone.
TINY = [
    "arch/size@arch=nano",
    *("arch.n_layers=2", "arch.hidden_size=16", "arch.num_heads=2", "arch.intermediate_size=24"),
    *("global_batch_size=64", "lr=1e-2", "lr_warmup_steps=1", "linear=mkl", "device=cpu"),
]


def write_tiny_data(folder: Path, *, examples: int = 60, epochs: int = 2) -> Path:
    """Sampled data of random bytes with the byte tokenizer beside it."""
    write_random_bytes(folder, examples=examples, epochs=epochs, tokenizer_path=str(folder))
    return folder


def composed(*arguments: str) -> dict[str, Any]:
    """What Hydra makes of these arguments of pretrain.py."""
    overrides, recipe = checked_overrides(list(arguments), CONFIG), "cfg_pretrain"
    if "--config-name" in overrides:
        at = overrides.index("--config-name")
        _, recipe = overrides[at : at + 2]
        del overrides[at : at + 2]
    with initialize_config_dir(str(CONFIG), version_base=None):
        container = OmegaConf.to_container(compose(recipe, overrides), resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def resolved(*arguments: str) -> RunConfig:
    """The record that a run with these arguments has."""
    return parse_config(composed(*arguments))[0]


@dataclass(frozen=True)
class Done:
    """A command that has ended; a negative code is the signal that ended it."""

    code: int
    stdout: str
    stderr: str

    def check(self) -> Done:
        """Fails the test where the command failed."""
        assert self.code == 0, f"exit code {self.code}\n{self.stdout}\n{self.stderr}"
        return self


@dataclass(frozen=True)
class Started:
    """A command under way; what it prints goes to files beside its folder."""

    process: BaseProcess | subprocess.Popen[bytes]
    cwd: Path
    output: Path

    @property
    def code(self) -> int | None:
        """None while it runs."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    def wait(self, *, until_exists: str | None = None) -> Done:
        """Waits for its end; or kills it as soon as a path of this pattern is in its folder."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.code is None:
            is_late = time.monotonic() > deadline
            if is_late or (until_exists and any(self.cwd.glob(until_exists))):
                self.process.kill()
                until_exists = None
            time.sleep(0.002)
        return Done(self.code, self.output.read_text(), _errors(self.output).read_text())


def run_pretrain(*arguments: str, cwd: Path) -> Done:
    """`python pretrain.py ...` in a folder, to its end."""
    return start_command(str(PRETRAIN), *arguments, cwd=cwd).wait()


def start_command(
    *command: str, cwd: Path, environment: Mapping[str, str] | None = None
) -> Started:
    """`python command...` (a file or, after -m, a module) in a process forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", TEST_PATH)
        forkserver.ensure_running()
    output = _output_of(cwd)
    process = context.Process(target=_become, args=(command, cwd, dict(environment or {}), output))
    process.start()
    return Started(process, cwd, output)


def start_interpreter(*command: str, cwd: Path) -> Started:
    """`python command...` in a new interpreter."""
    output = _output_of(cwd)
    with output.open("wb") as stdout, _errors(output).open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=cwd, stdout=stdout, stderr=stderr
        )
    return Started(process, cwd, output)


def run_ranks(*command: str) -> None:
    """`python command...`, a worker that starts ranks or is one; fails the test where it fails."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": TEST_PATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RANKS_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]


def _output_of(cwd: Path) -> Path:
    return cwd.parent / f"{cwd.name}.{time.monotonic_ns()}.out"


def _errors(output: Path) -> Path:
    return output.with_suffix(".err")


def _become(command: Sequence[str], cwd: Path, environment: dict[str, str], output: Path) -> None:
    """Runs in the forked process: from here on it is that command."""
    for stream, path in ((sys.stdout, output), (sys.stderr, _errors(output))):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(cwd)
    os.environ.update(environment)
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")


def files_in(folder: Path) -> dict[str, int]:
    """All files below a folder and when each was last written."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
    }


def assert_refused(cwd: Path, *arguments: str, told: tuple[str, ...]) -> None:
    """The command says what is wrong, once, and changes no file."""
    before = files_in(cwd)
    done = run_pretrain(*arguments, cwd=cwd)
    assert done.code == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr) < 1000
    for text in told:
        assert text in done.stderr
    assert files_in(cwd) == before


def cut(name: str) -> Callable[[Path], object]:
    """Takes the last third of a file away."""

    def breaking(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) * 2 // 3])

    return breaking
