"""What tests of memory and compilation share: real packed batches, and what a net makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from net_cases import VOCAB_SIZE, build, tiny_config
from torch import Tensor

from data_io.row_planning import RowPacking
from data_io.sampled_format import EpochIndex, SampledData, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from dataset_new import PrefixLMDataset
from models.batch import PackedBatch
from models.language_model import LanguageModel
from models.transformer import Block, NetConfig
from training.compiling import CompileMode, compile_model
from training.step import accumulate_gradients

Outcome = tuple[Tensor, dict[str, Tensor]]  # loss, gradients by name
# The six nets with as few calls as show all that differs between them: tracing takes long.
SMALL_NETS = {
    "hrm": tiny_config("hrm", L_cycles=1),
    "transformer": tiny_config("transformer"),
    "trm": tiny_config("trm", n_layers=1),
    "trm_match_recurrence": tiny_config("trm_match_recurrence", L_cycles=1, L_bp_steps=1),
    "rins": tiny_config("rins", L_cycles=2, L_bp_cycles=1),
    "ut": tiny_config("ut", n_layers=1, cycles=2, bp_cycles=1),
}
BATCH_TOKENS = 96


@cache
def packed_batches() -> list[PackedBatch]:
    """More than 100 rows of one epoch, with examples of 2 to 40 random tokens."""
    generator = torch.Generator().manual_seed(0)
    lens = torch.randint(1, 21, (2, 480), generator=generator).numpy()
    ends = lens.T.ravel().cumsum()
    with TemporaryDirectory() as parent:
        folder = Path(parent) / "data"
        with SampledWriter(folder, TokenizerInfo(vocab_size=VOCAB_SIZE), max_seq_len=40) as writer:
            tokens = torch.randint(0, VOCAB_SIZE, (int(ends[-1]),), generator=generator)
            first = writer.add_tokens(tokens.numpy())
            starts = (first + ends - lens.T.ravel()).reshape(-1, 2).T
            writer.add_epoch(EpochIndex(starts[0], lens[0], starts[1], lens[1]))
        packing = RowPacking(BATCH_TOKENS, 1, drop_last_batch=False, target_only=True)
        return list(PrefixLMDataset(SampledData.open(folder), packing, num_slots=64, epoch=0))


def net_with(
    config: NetConfig,
    *,
    recomputed: Literal["none", "block", "attention"] = "none",
    compiled: CompileMode = "none",
    backend: str = "aot_eager",
) -> LanguageModel:
    """A net of those settings, with the same weights whatever the options."""
    torch.manual_seed(0)
    model = build(config)
    for module in model.modules():
        if isinstance(module, Block):
            module.recomputed = recomputed
    compile_model(model, compiled, backend=backend)
    return model


def outcome(
    model: LanguageModel, batches: Sequence[PackedBatch], backprop_steps: int | None = None
) -> Outcome:
    """The mean loss over some micro-batches, and its gradients."""
    divisor = float(sum(batch.num_scored for batch in batches))
    loss = accumulate_gradients(model, batches, divisor, backprop_steps).loss / divisor
    gradients = {
        name: param.grad for name, param in model.named_parameters() if param.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return loss, gradients
