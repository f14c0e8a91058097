"""Tiny runs for tests of checkpoints and of what surrounds training: a net, an optimizer, a config.

Nothing here trains: steps are taken on random gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from net_cases import NETS, build
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.language_model import LanguageModel
from models.transformer import NetConfig
from training.adam_atan2 import AdamATan2
from training.checkpoint import Checkpoint, Progress, RunDirectory, training_state
from training.distributed import World
from training.export_format import parameter_name_from_reference
from training.schema import DataConfig, RunConfig

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all ranks, detached and copied."""
    with torch.no_grad():
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def whole_state(model: LanguageModel, optimizer: AdamATan2) -> dict[str, dict[str, Tensor]]:
    """`training_state` with whole tensors; every rank calls it."""
    state = training_state(model, optimizer)
    return {kind: {name: whole(t) for name, t in part.items()} for kind, part in state.items()}


def by_our_names(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Those of the original's tensors whose names begin with `prefix`, without it, by our names."""
    return {
        parameter_name_from_reference(name.removeprefix(prefix)): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def run_config(path: Path, *, arch: NetConfig = NETS["hrm"], **changes: Any) -> RunConfig:
    """The settings of a run in `path` that trains `arch`."""
    settings = {
        "arch": arch,
        "data": DataConfig(path="nowhere"),
        "global_batch_size": 64,
        "epochs": 2,
        "lr": 1e-3,
        "lr_min_ratio": 0.1,
        "lr_warmup_steps": 0,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "ema": 0.9,
        "checkpoint_path": str(path),
    }
    return RunConfig(**{**settings, **changes})


class TinyRun:
    """A net and its optimizer, and the directory that they are saved in."""

    def __init__(self, path: Path, *, net: str = "hrm", seed: int = 1, **settings: Any) -> None:
        torch.manual_seed(seed)
        self.model: LanguageModel = build(NETS[net])
        self.optimizer = AdamATan2(self.model.parameters(), lr=1e-2, **{"ema": 0.9, **settings})
        self.directory = RunDirectory(path, ALONE)
        self.config = run_config(path, arch=NETS[net])

    def create(self) -> TinyRun:
        self.directory.create(self.config.model_dump(), {"vocab_size": 256})
        return self

    def step(self) -> None:
        for param in self.model.parameters():
            param.grad = torch.randn_like(param)
        self.optimizer.step()

    def save(self, name: str, progress: Progress, log_state: dict[str, Any] | None = None) -> None:
        state = training_state(self.model, self.optimizer)
        self.directory.save(name, state, progress, log_state or {})

    def save_steps(self, *steps: int) -> list[Checkpoint]:
        """Steps and saves, so that each checkpoint is another."""
        for step in steps:
            self.step()
            self.save(f"fsdp2_step_{step}", Progress(step=step))
        return self.directory.checkpoints()


def finished_run(path: Path) -> TinyRun:
    """A run of two epochs."""
    run = TinyRun(path).create()
    for epoch in (1, 2):
        run.step()
        run.save(f"fsdp2_epoch_{epoch}", Progress(epoch, 0, 5 * epoch))
    return run
