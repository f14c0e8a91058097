"""A tiny run that is watched while it trains, in one process or on two ranks.

python tests/sight_cases.py DATA OUTBOX     # one rank, with what torchrun sets around it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from net_cases import NETS, build
from run_cases import whole_state
from safetensors.torch import save_file
from torch import Tensor

from data_io.prompt_format import PromptFormat
from data_io.row_planning import RowPacking
from data_io.sampled_format import SampledData
from data_io.special_tokens import SPECIAL_TOKENS
from dataset_new import PrefixLMDataset
from models.batch import PackedBatch
from simple_inference_engine import InferenceEngine
from training.adam_atan2 import AdamATan2
from training.diagnostics import watched
from training.distributed import World, shard_model, start_world, stop_world
from training.samples import SampleLog
from training.step import train_step
from training.step_check import StepCheck
from training.validation import Validator

VOCAB_SIZE = 512  # of the byte tokenizer, 287, padded
GLOBAL_TOKENS = 1024  # all examples of the data that tests write: one global batch an epoch
STEPS = 3
TOKEN_BYTES = np.arange(VOCAB_SIZE, dtype=np.int32) % 3 + 1  # made up, to tell tokens apart
TOKEN_BYTES[1 : len(SPECIAL_TOKENS)] = 0
TOKEN_BYTES[len(SPECIAL_TOKENS) + 256 :] = 0


class WatchedRun:
    """A seeded net, and the data that it is trained and scored on."""

    def __init__(
        self,
        data: Path,
        world: World,
        *,
        net: str = "hrm",
        dtype: torch.dtype = torch.float32,
        ema: float | None = 0.5,
    ) -> None:
        self.data, self.world = SampledData.open(data), world
        torch.manual_seed(1)
        self.model = build(NETS[net], VOCAB_SIZE)
        shard_model(self.model, world, dtype)
        self.optimizer = AdamATan2(self.model.parameters(), lr=1e-2, ema=ema)
        self.validator = Validator(
            self.model,
            self.optimizer,
            world=world,
            batches=lambda: self.batches(256, drop_last_batch=False),
            token_bytes=TOKEN_BYTES,
        )

    def batches(self, global_tokens: int, *, drop_last_batch: bool = True) -> list[PackedBatch]:
        """This rank's rows of epoch 0."""
        width = global_tokens // self.world.size
        packing = RowPacking(width, self.world.size, drop_last_batch, target_only=True)
        dataset = PrefixLMDataset(self.data, packing, num_slots=64, epoch=0, rank=self.world.rank)
        return list(dataset)

    def step(self, *, backprop_steps: int | None = None) -> None:
        """One step on all the data."""
        (batch,) = self.batches(GLOBAL_TOKENS, drop_last_batch=False)
        divisor = batch.global_num_scored / self.world.size
        check = StepCheck(self.world)
        train_step(self.model, self.optimizer, [batch], divisor, backprop_steps, check)

    def train_watched(self, folder: Path) -> list[dict[str, float]]:
        """Steps with everything that can be watched; the figures of each."""
        samples = self.sample_log(folder)
        batches = self.batches(GLOBAL_TOKENS, drop_last_batch=False)
        found = []
        for step in range(1, STEPS + 1):
            with watched(self.model, self.optimizer, batches, self.world, True) as figures:
                self.step()
            found.append(figures | self.validator.scores())
            samples.add(self.model, self.optimizer, step=step, answer=self.answer)
        return found

    def sample_log(self, folder: Path, start_step: int = 0) -> SampleLog:
        """Of two examples."""
        prompt_format = PromptFormat.from_info(self.data.metadata.tokenizer_info, self.data.folder)
        return SampleLog(
            folder,
            self.world,
            held_out=self.data,
            prompt_format=prompt_format,
            num_samples=2,
            start_step=start_step,
        )

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """Greedy answers of at most four tokens."""
        engine = InferenceEngine(self.model, max_context=32)
        answers = engine.generate_ids(prompts, stop_ids=(), max_new_tokens=4)
        return [answer.token_ids for answer in sorted(answers, key=lambda answer: answer.index)]

    def state(self) -> dict[str, Tensor]:
        """All tensors of the run, whole."""
        return {
            f"{kind}.{name}": tensor
            for kind, part in whole_state(self.model, self.optimizer).items()
            for name, tensor in part.items()
        }


def main() -> None:
    data, outbox = map(Path, sys.argv[1:])
    world = start_world("cpu")
    for kind, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        plain = WatchedRun(data, world, dtype=dtype)
        for _ in range(STEPS):
            plain.step()
        watched = WatchedRun(data, world, dtype=dtype)
        folder = outbox / f"{kind}.{world.rank}"
        folder.mkdir()
        figures = watched.train_watched(folder)
        (folder / "figures.json").write_text(json.dumps(figures))
        save_file(plain.state(), folder / "plain.safetensors")
        save_file(watched.state(), folder / "watched.safetensors")
    stop_world()


if __name__ == "__main__":
    main()
