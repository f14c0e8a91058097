"""Four and eight ranks, in one group and in several that hold all weights each, equal one rank.

Runs tests/scaling_worker.py, whose ranks are forked from one process.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import scaling_worker
import torch
from commands import run_ranks
from run_cases import ALONE
from safetensors.torch import load_file
from scaling_worker import LOADED, REPLICAS, SAVED, rows_of_rank, seeded_net
from source_tree import ROOT
from test_two_ranks import part, write_data
from torch import Tensor
from training_cases import train_rows
from tworank_worker import state_tensors

from training.checkpoint import RunDirectory
from training.distributed import World, shard_model

ATOL = 1e-6


@dataclass(frozen=True)
class Ranks:
    """Where so many ranks left their tensors, and what they were given."""

    size: int
    inbox: Path
    outbox: Path

    def load(self, replicas: int, rank: int) -> dict[str, Tensor]:
        return load_file(self.outbox / f"{self.size}.{replicas}/rank{rank}.safetensors")


@pytest.fixture(scope="module", params=[4, 8])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    inbox, outbox = tmp_path_factory.mktemp("inbox"), tmp_path_factory.mktemp("outbox")
    write_data(inbox / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (request.param, port, inbox / "data", outbox)
    run_ranks(scaling_worker.__file__, *map(str, arguments))
    return Ranks(request.param, inbox / "data", outbox)


@pytest.mark.slow
def test_however_weights_are_sharded_the_steps_are_those_of_one_rank(ranks: Ranks) -> None:
    """One rank takes the rows of all as micro-batches of the same global batch."""
    model, optimizer = seeded_net(ALONE)
    of_ranks = [rows_of_rank(ranks.inbox, ranks.size, rank) for rank in range(ranks.size)]
    steps = [[batch for row in rows for batch in row] for rows in zip(*of_ranks, strict=True)]
    records = train_rows(model, optimizer, steps, ALONE)
    expected = state_tensors(model, optimizer)
    for replicas in REPLICAS[ranks.size]:
        found = [ranks.load(replicas, rank) for rank in range(ranks.size)]
        for step, record in enumerate(records):
            losses = torch.stack([each[f"loss.{step}"] for each in found]).sum()
            torch.testing.assert_close(losses, record.sums.loss, atol=0, rtol=2e-6)
            # Each rank divides by the mean number of scored tokens, and gradients are summed.
            wanted = {name: ranks.size * each for name, each in record.gradients.items()}
            gradients = part(found[-1], f"gradient.{step}.")
            torch.testing.assert_close(gradients, wanted, atol=ranks.size * ATOL, rtol=0)
        for folder in ("model.", "ema.", "optimizer.step."):
            for each in (found[0], found[-1]):
                weights = part(each, folder)
                torch.testing.assert_close(weights, part(expected, folder), atol=ATOL, rtol=0)


@pytest.mark.slow
def test_norms_count_each_weight_once_however_often_it_is_held(ranks: Ranks) -> None:
    """Those that guards and `log_recurrence` tell."""
    wanted, *others = (part(ranks.load(each, 0), "figure.") for each in REPLICAS[ranks.size])
    assert wanted["grad_norm"] == pytest.approx(float(wanted["grad_norm/total"]), rel=1e-5)
    assert float(wanted["grad_norm"]) > 0
    for found in others:
        torch.testing.assert_close(found, wanted, atol=0, rtol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_does_not_show_how_weights_were_sharded(ranks: Ranks) -> None:
    saved = ranks.load(SAVED, 0)
    saved = {
        name: tensor
        for name, tensor in saved.items()
        if not name.startswith(("loss", "gradient", "figure"))
    }
    for replicas in (each for each in LOADED if each in REPLICAS[ranks.size]):
        loaded = load_file(ranks.outbox / f"loaded{ranks.size}.{replicas}.safetensors")
        torch.testing.assert_close(loaded, saved, atol=0, rtol=0)
    model, optimizer = seeded_net(ALONE)
    RunDirectory(ranks.outbox / f"run{ranks.size}", ALONE).checkpoints()[-1].restore(
        model, optimizer
    )
    torch.testing.assert_close(state_tensors(model, optimizer), saved, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("size", "replicas", "told"),
    [(8, 3, "use one of 1, 2, 4, 8"), (1, 2, "use one of 1"), (2, 4, "use one of 1, 2")],
)
def test_replicas_that_do_not_divide_the_ranks_are_refused(
    size: int, replicas: int, told: str
) -> None:
    world = World(rank=0, size=size, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"fsdp_replicas={replicas} does not divide.*{told}"):
        shard_model(torch.nn.Linear(2, 2), world, torch.float32, replicas=replicas)


@pytest.mark.slow
def test_a_step_sends_as_often_as_the_docs_say(tmp_path: Path) -> None:
    """Blocks that are called several times are reduced twice where micro-batches add up."""
    kept = tmp_path / "counts.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = ROOT / "scripts/count_collectives.py"
    done = subprocess.run(
        [*command, str(script), f"output={kept}"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(kept.read_text())
    assert found["groups"] == 5
    counts = {
        setting: (each["all-gather"], each["reduce-scatter"], each["all-reduce"])
        for setting, each in found["counts"].items()
    }
    assert counts == {
        "as it is": (5, 9, 0),
        "reshard after forward": (53, 9, 0),
        "reshard after backward": (34, 9, 0),
        "reduce every micro-batch": (5, 15, 0),
    }
