"""The recipes of docs/cluster.md: a killed worker under torchrun, and the SLURM script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, TINY, write_tiny_data

from training.tensor_store import read_tensors

WORKER = str(ROOT / "tests/hanging_worker.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
SRUN = """#!/bin/bash
for id in 0 1; do
  SLURM_PROCID=$id SLURM_LOCALID=$id SLURM_NTASKS=2 setsid "$@" & pids="$pids $!"
done
echo $pids > "$STAND_IN/pids"
worst=0
for pid in $pids; do wait $pid; code=$?; [ $code -gt $worst ] && worst=$code; done
exit $worst
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" >> "$STAND_IN/asked"; fi
"""


def same(run: Path, other: Path) -> bool:
    for kind in ("model", "ema", "optimizer"):
        ours, theirs = (read_tensors(each / "fsdp2_epoch_2" / kind) for each in (run, other))
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[k], theirs[k]) for k in ours):
            return False
    return True


def arguments(tmp_path: Path) -> list[str]:
    data = write_tiny_data(tmp_path / "data")
    return [*TINY, f"data.path={data}", "epochs=2", "run_name=a"]


@pytest.mark.slow
def test_torchrun_starts_a_killed_worker_again_and_the_run_ends_as_its_twin(tmp_path: Path) -> None:
    line = [*arguments(tmp_path), "checkpoint_steps=3"]
    runs = []
    for name, mischief in (("twin", "none:9:9"), ("killed", "kill:1:8")):
        folder = tmp_path / name
        folder.mkdir()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "MISCHIEF": f"{mischief}:{folder / 'killed'}",
        }
        port = f"--master_port={20000 + (os.getpid() * 7 + len(runs)) % 9000}"
        command = [*TORCHRUN, port, WORKER, *line]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert (folder / "killed").exists() == ("continued" in done.stdout) == (name == "killed")
        runs.append(folder / "checkpoints/data/a")
    assert same(*runs)


def slurm_script() -> str:
    """The one in the docs, as it stands there."""
    text = (ROOT / "docs/cluster.md").read_text().partition("## SLURM\n\n```bash\n")[2]
    return text.partition("```")[0]


@pytest.mark.slow
def test_the_slurm_script_saves_requeues_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "job.sbatch").write_text(slurm_script())
    path = os.pathsep.join((str(tmp_path / "bin"), str(Path(sys.executable).parent)))
    environment = {
        **os.environ,
        "PATH": f"{path}{os.pathsep}{os.environ['PATH']}",
        "STAND_IN": str(tmp_path),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CPUS_PER_TASK": "1",
    }
    run = tmp_path / "run"
    line = [*arguments(tmp_path), f"checkpoint_path={run}", "checkpoint_start=true"]
    command = ["bash", str(tmp_path / "job.sbatch"), *line]
    output = tmp_path / "output"
    with output.open("w") as file:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        while not (run / "fsdp2_step_0").exists():
            assert job.poll() is None, output.read_text()
            time.sleep(0.02)
        for pid in (tmp_path / "pids").read_text().split():
            os.killpg(int(pid), signal.SIGUSR1)
        assert job.wait() == 75, output.read_text()
    assert (tmp_path / "asked").read_text() == f"requeue {os.getpid()}\n"
    again = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert "continued    fsdp2_step_" in again.stdout and "done: " in again.stdout
    assert (tmp_path / "asked").read_text().count("requeue") == 1
