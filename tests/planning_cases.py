"""Steps on tiny nets whose memory is known: what autograd keeps, what torch allocates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from run_cases import ALONE
from torch import Tensor

from models.attention.sdpa import SdpaAttention
from models.batch import IGNORE_LABEL, PackedBatch, PackedLayout
from models.language_model import LanguageModel
from models.transformer import Block, NetConfig
from scripts.benchmark_planner import allocated_in
from training.adam_atan2 import AdamATan2
from training.distributed import shard_model
from training.export_format import ARCH_ADAPTER
from training.planning_activations import Kernels, Rows
from training.planning_memory import MemoryCase
from training.step import train_step
from training.step_check import StepCheck

NETS: dict[str, dict[str, Any]] = {
    "transformer": {"name": "transformer"},
    "hrm": {"name": "hrm", "half_layers": True, "H_cycles": 2, "L_cycles": 3},
    "trm": {"name": "trm", "H_cycles": 2, "H_bp_steps": 2, "L_cycles": 1, "L_bp_steps": 1},
    "rins": {"name": "rins", "half_layers": True, "L_cycles": 7, "L_bp_cycles": 4},
    "ut": {"name": "ut", "cycles": 4, "bp_cycles": 2},
}


def net(name: str, **changes: Any) -> NetConfig:
    sizes = {"n_layers": 2, "hidden_size": 64, "num_heads": 4}
    return ARCH_ADAPTER.validate_python({**NETS[name], **sizes, **changes})


@dataclass(frozen=True)
class Step:
    """A training step as it is taken, and as it is planned."""

    config: NetConfig
    vocab_size: int = 512
    tokens: int = 1024  # of a micro-batch
    length: int = 32  # of each example; half of it is scored
    num_micro: int = 1
    dtype: torch.dtype = torch.float32
    recomputed: str = "none"
    ema: float | None = 0.9

    @property
    def kernels(self) -> Kernels:
        return Kernels(
            "sdpa",
            self.dtype.itemsize,
            recomputed=self.recomputed,  # type: ignore[arg-type]
            on_cpu=True,
        )

    @property
    def rows(self) -> Rows:
        lengths = [self.length] * (self.tokens // self.length)
        return Rows.of(lengths, self.tokens, self.tokens // 2)

    @property
    def case(self) -> MemoryCase:
        return MemoryCase(
            self.config,
            self.vocab_size,
            self.rows,
            self.num_micro,
            self.kernels,
            is_wrapped=self.dtype != torch.float32,
            has_average=self.ema is not None,
        )

    def batch(self) -> PackedBatch:
        count = self.tokens // self.length
        lengths = torch.full((count,), self.length)
        positions = torch.arange(self.length).repeat(count).int()
        tokens = torch.randint(1, self.vocab_size, (self.tokens,)).int()
        return PackedBatch(
            tokens=tokens,
            labels=tokens.where(positions >= self.length // 2, IGNORE_LABEL),
            positions=positions,
            layout=PackedLayout.from_lengths(lengths // 2, lengths - lengths // 2, count),
            indices=torch.arange(count),
            num_scored=self.tokens // 2,
            global_num_scored=self.num_micro * self.tokens // 2,
            global_num_tokens=self.num_micro * self.tokens,
            next_cursor=0,
        )

    def model(self) -> LanguageModel:
        torch.manual_seed(0)
        model = LanguageModel(self.config, self.vocab_size, SdpaAttention())
        for module in model.modules():
            if isinstance(module, Block):
                module.recomputed = self.recomputed  # type: ignore[assignment]
        return model

    def allocated(self) -> int:
        """The most that torch has allocated at a time: state, and what a second step adds."""
        model = self.model()
        shard_model(model, ALONE, self.dtype)
        optimizer = AdamATan2(list(model.parameters()), lr=1e-4, ema=self.ema)
        batches = [self.batch() for _ in range(self.num_micro)]

        def step() -> None:
            divisor = float(batches[0].global_num_scored)
            train_step(model, optimizer, batches, divisor, None, StepCheck(ALONE))

        step()
        kinds = 3 + (self.ema is not None)
        return 4 * kinds * self.case.num_parameters + allocated_in(step)


def saved_bytes(step: Step) -> int:
    """What autograd keeps of a forward pass, weights left out; the head is not in it."""
    model, batch = step.model().to(step.dtype), step.batch()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch.tokens, batch.positions, batch.layout)
    return sum(kept.values())
