"""Two ranks compute what one does on the same global batch, and what the original's two computed.

One run of tests/tworank_worker.py under torchrun computes everything; the tests compare.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tworank_worker
from commands import run_ranks
from golden_cases import golden_dirs
from net_cases import NETS, read_case
from run_cases import ALONE, by_our_names
from safetensors.torch import load_file
from torch import Tensor
from training_cases import BACKPROP_STEPS, train_rows
from tworank_worker import MICRO_NETS, OPTIONS, Options, rows_of, seeded_net, state_tensors

from data_io.sampled_format import EpochIndex, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from models.batch import PackedBatch, PackedLayout
from models.hrm import HRMConfig
from training.checkpoint import RunDirectory
from training.distributed import stop_world

pytestmark = pytest.mark.dist
ATOL = 1e-6


@dataclass(frozen=True)
class TwoRanks:
    """Where the two ranks left their tensors, and what they were given."""

    inbox: Path
    outbox: Path

    def load(self, name: str) -> dict[str, Tensor]:
        return load_file(self.outbox / f"{name}.safetensors")

    def merged_rows(self) -> list[list[PackedBatch]]:
        """The rows of one rank that hold the same global batches."""
        ranks = [rows_of(self.inbox / "data", rank) for rank in range(2)]
        return [[merge(one, other)] for (one,), (other,) in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[TwoRanks]:
    inbox, outbox = tmp_path_factory.mktemp("inbox"), tmp_path_factory.mktemp("outbox")
    write_data(inbox / "data")
    model, optimizer = seeded_net(tworank_worker.SAVED_NET, ALONE)
    done = TwoRanks(inbox, outbox)
    train_rows(model, optimizer, done.merged_rows(), ALONE)
    tworank_worker.save(inbox / "run", model, optimizer, ALONE)
    run_worker("eager", inbox, outbox, *golden_dirs(pytestconfig, "tworank"))
    yield done
    stop_world()


@pytest.fixture(scope="module")
def compiled_ranks(two_ranks: TwoRanks, tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    outbox = tmp_path_factory.mktemp("compiled")
    run_worker("compiled", two_ranks.inbox, outbox)
    return TwoRanks(two_ranks.inbox, outbox)


def run_worker(part: str, inbox: Path, outbox: Path, *golden: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run_ranks(*launch, tworank_worker.__file__, part, *map(str, (inbox, outbox, *golden)))


def write_data(folder: Path) -> None:
    draw = np.random.default_rng(5)
    inst_len, resp_len = draw.integers(1, 12, 300), draw.integers(1, 10, 300)
    starts = draw.integers(0, 380, (2, 300))
    with SampledWriter(folder, TokenizerInfo(vocab_size=250), max_seq_len=24) as writer:
        writer.add_tokens(draw.integers(0, 250, 400))
        writer.add_epoch(EpochIndex(starts[0], inst_len, starts[1], resp_len))


def merge(*rows: PackedBatch) -> PackedBatch:
    """The rows of all ranks as one row, their padding left out."""
    used = [(row, int(row.layout.num_tokens), int(row.layout.num_seqs)) for row in rows]
    layout = PackedLayout.from_lengths(
        torch.cat([row.layout.prefix_lens[:count] for row, _, count in used]),
        torch.cat([row.layout.causal_lens[:count] for row, _, count in used]),
        len(rows) * tworank_worker.NUM_SLOTS,
    )
    return replace(
        rows[0],
        tokens=torch.cat([row.tokens[:length] for row, length, _ in used]),
        labels=torch.cat([row.labels[:length] for row, length, _ in used]),
        positions=torch.cat([row.positions[:length] for row, length, _ in used]),
        layout=layout,
        indices=torch.cat([row.indices[:count] for row, _, count in used]),
        num_scored=sum(row.num_scored for row in rows),
    )


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


@pytest.mark.parametrize(
    ("net", "kind"),
    [(net, "torch.float32") for net in NETS]
    + [(net, "micro") for net in MICRO_NETS]
    + [tuple(kind.split(".")) for kind, how in OPTIONS.items() if how.compiled == "none"],
)
def test_two_ranks_equal_one_on_the_same_global_batch(
    two_ranks: TwoRanks, net: str, kind: str
) -> None:
    require_equal_steps(two_ranks, net, kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "kind"),
    [tuple(kind.split(".")) for kind, how in OPTIONS.items() if how.compiled != "none"],
)
def test_two_ranks_that_compile_equal_one_that_does_not(
    compiled_ranks: TwoRanks, net: str, kind: str
) -> None:
    require_equal_steps(compiled_ranks, net, kind)


def require_equal_steps(two_ranks: TwoRanks, net: str, kind: str) -> None:
    options = OPTIONS.get(f"{net}.{kind}", Options())
    trained = Options(lora=options.lora, frozen=options.frozen)
    model, optimizer = seeded_net(net, ALONE, options=trained)
    records = train_rows(model, optimizer, two_ranks.merged_rows(), ALONE)
    ranks = [two_ranks.load(f"{net}.{kind}.rank{rank}") for rank in range(2)]
    for step, record in enumerate(records):
        losses = sum(rank[f"loss.{step}"] for rank in ranks)
        torch.testing.assert_close(losses, record.sums.loss, atol=0, rtol=2e-6)
        # Each rank divides by the mean number of scored tokens, and gradients are summed.
        expected = {name: 2 * gradient for name, gradient in record.gradients.items()}
        for rank in ranks:
            found = part(rank, f"gradient.{step}.")
            torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    expected = state_tensors(model, optimizer)
    for folder in ("model.", "ema.", "optimizer.step."):
        for rank in ranks:
            found = part(rank, folder)
            torch.testing.assert_close(found, part(expected, folder), atol=ATOL, rtol=0)


def test_the_micro_batches_compared_here_are_several_and_one_only_pads(
    two_ranks: TwoRanks,
) -> None:
    data = two_ranks.inbox / "data"
    ranks = [rows_of(data, rank, tworank_worker.MICRO_PACKING) for rank in range(2)]
    for one, other in zip(*ranks, strict=True):
        assert len(one) == len(other) >= 4
    assert any(batch.num_scored == 0 for rank in ranks for row in rank for batch in row)


@pytest.mark.parametrize("net", [net for net in NETS if isinstance(NETS[net], HRMConfig)])
def test_two_ranks_skip_what_has_no_gradient(two_ranks: TwoRanks, net: str) -> None:
    found = two_ranks.load(f"{net}.torch.float32.rank0")
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    reached = [part(found, f"gradient.{step}.").keys() for step in range(len(BACKPROP_STEPS))]
    assert reached[0] == {head}
    assert embedding not in reached[1] and len(reached[1]) > 1
    assert embedding in reached[2]
    assert found[f"optimizer.step.{embedding}"] == 1
    assert found[f"optimizer.step.{head}"] == 3


@pytest.mark.parametrize("net", tworank_worker.BFLOAT16_NETS)
def test_two_ranks_lose_as_one_does_in_bfloat16(two_ranks: TwoRanks, net: str) -> None:
    model, optimizer = seeded_net(net, ALONE, torch.bfloat16)
    rows = two_ranks.merged_rows()
    records = train_rows(model, optimizer, rows, ALONE)
    ranks = [two_ranks.load(f"{net}.torch.bfloat16.rank{rank}") for rank in range(2)]
    for step, record in enumerate(records):
        scored = rows[step][0].global_num_scored
        loss = sum(rank[f"loss.{step}"] for rank in ranks) / scored
        torch.testing.assert_close(loss, record.sums.loss / scored, atol=1e-3, rtol=0)
    assert {tensor.dtype for tensor in part(ranks[0], "ema.").values()} <= {
        torch.float32,
        torch.bfloat16,  # z_L_init
    }
    assert part(ranks[0], "ema.")["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_loads_what_two_ranks_saved(two_ranks: TwoRanks, dtype: torch.dtype) -> None:
    net = tworank_worker.SAVED_NET
    model, optimizer = seeded_net(net, ALONE, dtype)
    (checkpoint,) = RunDirectory(two_ranks.outbox / "run", ALONE).checkpoints()
    checkpoint.restore(model, optimizer)
    saved = two_ranks.load(f"{net}.torch.float32.rank0")
    saved = {
        name: tensor for name, tensor in saved.items() if not name.startswith(("loss", "gradient"))
    }
    torch.testing.assert_close(state_tensors(model, optimizer), saved, atol=0, rtol=0)
    weights = checkpoint.load_weights(use_ema=True)
    torch.testing.assert_close(weights, part(saved, "ema."), atol=0, rtol=0)


def test_two_ranks_load_what_one_process_saved(two_ranks: TwoRanks) -> None:
    model, optimizer = seeded_net(tworank_worker.SAVED_NET, ALONE)
    RunDirectory(two_ranks.inbox / "run", ALONE).checkpoints()[-1].restore(model, optimizer)
    expected = state_tensors(model, optimizer)
    torch.testing.assert_close(two_ranks.load("loaded"), expected, atol=0, rtol=0)


def test_two_ranks_talk_to_each_other(two_ranks: TwoRanks) -> None:
    for rank in range(2):
        text = (two_ranks.outbox / f"world.rank{rank}.txt").read_text()
        assert ast.literal_eval(text) == ([2, 10], tworank_worker.GREETING, "")


def golden_ranks(two_ranks: TwoRanks, folder: Path) -> tuple[dict[str, Any], list[dict]]:
    ranks = [two_ranks.load(f"golden/{folder.name}/rank{rank}") for rank in range(2)]
    return read_case(folder), ranks


def test_golden_two_ranks_see_the_original_batches(
    two_ranks: TwoRanks, golden_tworank: Path
) -> None:
    case, ranks = golden_ranks(two_ranks, golden_tworank)
    assert case["world_size"] == len(ranks)
    for step, log in enumerate(case["log"]):
        for found, expected in zip(ranks, log["ranks"], strict=True):
            for name, values in expected["batch"].items():
                assert found[f"{name}.{step}"].tolist() == values
            count = int(found[f"numseqs.{step}"])
            assert count == expected["scalars"]["numseqs"]
            for name in ("prefix_lens", "causal_lens"):
                assert found[f"{name}.{step}"][:count].tolist() == expected[name]


def test_golden_two_ranks_have_the_original_losses(
    two_ranks: TwoRanks, golden_tworank: Path
) -> None:
    case, ranks = golden_ranks(two_ranks, golden_tworank)
    assert float(ranks[0]["divisor.0"]) == case["mean_valid_step1"]
    for step, log in enumerate(case["log"]):
        for found, expected in zip(ranks, log["ranks"], strict=True):
            metrics = expected["metrics"]
            loss, divisor = float(found[f"loss.{step}"]), float(found[f"divisor.{step}"])
            assert loss == pytest.approx(metrics["loss"][0], rel=2e-6)
            assert loss / divisor == pytest.approx(expected["loss_returned"], rel=2e-6)
            assert float(found[f"lr.{step}"]) == pytest.approx(log["lr"], rel=0, abs=1e-12)
            counts = [*metrics["accuracy"], *metrics["exact_accuracy"]]
            assert found[f"counts.{step}"].tolist() == counts


def test_golden_two_ranks_reduce_gradients_as_the_original(
    two_ranks: TwoRanks, golden_tworank: Path
) -> None:
    _, ranks = golden_ranks(two_ranks, golden_tworank)
    expected = by_our_names(load_file(golden_tworank / "tensors.safetensors"), "step1.grad.")
    for found in ranks:
        torch.testing.assert_close(part(found, "gradient.0."), expected, atol=ATOL, rtol=0)


def test_golden_two_ranks_end_with_the_original_weights(
    two_ranks: TwoRanks, golden_tworank: Path
) -> None:
    _, ranks = golden_ranks(two_ranks, golden_tworank)
    expected = by_our_names(load_file(golden_tworank / "tensors.safetensors"), "final.")
    for found in ranks:
        torch.testing.assert_close(part(found, "model."), expected, atol=ATOL, rtol=0)
