"""Answers to some held-out prompts as a run goes on: samples.jsonl, beside metrics.jsonl.

Owns which prompts, and what is written of them; how an answer is generated is given to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from data_io.prompt_format import PromptFormat
from data_io.sampled_format import SampledData
from models.language_model import LanguageModel
from training.adam_atan2 import AdamATan2
from training.distributed import World, unsharded
from training.telemetry import cut_metrics
from training.validation import averaged_weights, has_averages

SAMPLES_FILE = "samples.jsonl"

# Prompts of token ids -> the ids of an answer each, without the token that ends it.
Answerer = Callable[[Sequence[Sequence[int]]], Sequence[Sequence[int]]]


class SampleLog:
    """Writes a line for each of `num_samples` held-out prompts, always the same, at every `add`.

    `step`, `weights` (ema where averages are kept, else raw), `prompt`, `answer`, `truth`; special
    tokens are left out of prompt and truth, but not of what the model says.
    """

    def __init__(
        self,
        run_path: Path,
        world: World,
        *,
        held_out: SampledData,
        prompt_format: PromptFormat,
        num_samples: int,
        start_step: int,
    ) -> None:
        self.path = run_path / SAMPLES_FILE
        self.world = world
        self.prompt_format = prompt_format
        self.examples = spread_examples(held_out, num_samples)
        if world.is_main:
            cut_metrics(self.path, start_step)

    def add(
        self, model: LanguageModel, optimizer: AdamATan2, *, step: int, answer: Answerer
    ) -> None:
        """Answers the prompts with the weights as they stand; every rank calls it.

        All ranks generate, and rank 0 writes: passes of one rank alone would leave a sharded model
        in another state there. Compiled parts run eagerly, since each length would compile anew.
        """
        with (
            averaged_weights(model, optimizer),
            unsharded(model),
            torch.compiler.set_stance("force_eager"),
        ):
            answers = answer([prompt for prompt, _ in self.examples])
        if not self.world.is_main:
            return
        weights = "ema" if has_averages(optimizer) else "raw"
        read, spell = self.prompt_format.decode, self.prompt_format.tokenizer.decode
        with self.path.open("a") as file:
            for (prompt, truth), ids in zip(self.examples, answers, strict=True):
                line = {
                    "step": step,
                    "weights": weights,
                    "prompt": read(prompt),
                    "answer": spell(list(ids), skip_special_tokens=False),
                    "truth": read(truth),
                }
                file.write(json.dumps(line) + "\n")


def spread_examples(data: SampledData, count: int) -> list[tuple[list[int], list[int]]]:
    """Ids of prompt and response of `count` examples all over epoch 0, no prompt twice.

    Windows of plain text all have the same prompt, so of these there is one.
    """
    index, tokens = data.epoch(0), data.tokens()
    found: dict[tuple[int, ...], list[int]] = {}
    for example in (len(index) * number // count for number in range(count)):
        inst, resp = index.inst_start[example], index.resp_start[example]
        prompt = tuple(tokens[inst : inst + index.inst_len[example]].tolist())
        found.setdefault(prompt, tokens[resp : resp + index.resp_len[example]].tolist())
    return [(list(prompt), truth) for prompt, truth in found.items()]
