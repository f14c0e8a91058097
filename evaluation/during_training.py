"""Held-out data while a run goes: scores by raw and averaged weights, and sample answers.

Brings together what `training` may not know of: packed held-out data, and generating. What is
measured is `training.validation`'s and `training.samples`' business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_io.prompt_format import PromptFormat
from data_io.row_planning import RowPacking, plan_epochs
from data_io.sampled_format import SampledData
from data_io.token_bytes import token_byte_lengths
from dataset_new import PrefixLMDataset
from models.batch import PackedBatch
from models.language_model import LanguageModel
from simple_inference_engine import InferenceEngine
from training.adam_atan2 import AdamATan2
from training.checkpoint import BEST, Progress, RunDirectory, training_state
from training.compiling import compile_error, compile_failures
from training.lowest_loss import LowestLoss
from training.prefetch import load_batches
from training.samples import SampleLog
from training.schema import ValDataConfig
from training.telemetry import MetricsLogger, read_numbers
from training.validation import Validator, require_same_tokens


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out data, checked and planned, before there is a model."""

    config: ValDataConfig
    data: SampledData
    packing: RowPacking
    num_slots: int
    prompt_format: PromptFormat | None  # None: `note` says why
    token_bytes: NDArray[np.int32] | None  # [V]; the same
    note: str  # for the summary

    @classmethod
    def open(cls, config: ValDataConfig, trained: SampledData, packing: RowPacking) -> HeldOut:
        """ValueError where it cannot be scored by a model of `trained` in rows of `packing`.

        Rows are as long as a training batch (`packing.batch_tokens`), and as many ranks share them.
        """
        data = replace(SampledData.open(config.path), limit=config.max_examples)
        require_same_tokens(data, trained)
        rows = RowPacking(
            batch_max_length=packing.batch_tokens,
            num_replicas=packing.num_replicas,
            drop_last_batch=False,
            target_only=packing.target_only,
        )
        try:
            plan = plan_epochs(data, rows, 1)
        except ValueError as error:
            raise ValueError(
                f"val_data.path={config.path} does not fit into rows as long as a training batch "
                f"({rows.batch_max_length} tokens: micro_batch_size, or a rank's share): {error}"
            ) from None
        (scored,), total = plan.examples, len(data.epoch(0))
        note = f"{config.path}, {scored:,} examples every {config.interval:,} steps"
        if scored < total:
            note += f", {total - scored} left out (fewer than ranks)"
        prompt_format, token_bytes = None, None
        try:
            prompt_format = PromptFormat.from_info(data.metadata.tokenizer_info, data.folder)
            vocab_size = data.metadata.padded_vocab_size
            token_bytes = token_byte_lengths(prompt_format.tokenizer, vocab_size)
        except ValueError as error:
            lacking = "bits per byte" if prompt_format else "bits per byte, no sample answers"
            note += f"; no {lacking}: {error}"
        return cls(config, data, rows, plan.num_slots, prompt_format, token_bytes, note)

    def batches(self, rank: int) -> Iterator[PackedBatch]:
        """One pass of one rank."""
        dataset = PrefixLMDataset(
            self.data, self.packing, num_slots=self.num_slots, epoch=0, rank=rank
        )
        return load_batches(dataset, num_workers=0)


class HeldOutWatch:
    """Scores a run now and then, and lets it answer."""

    def __init__(
        self,
        held_out: HeldOut,
        run_path: Path,
        logger: MetricsLogger,
        *,
        model: LanguageModel,
        optimizer: AdamATan2,
        start_step: int,
    ) -> None:
        self.held_out, self.logger, world = held_out, logger, logger.world
        self.model, self.optimizer = model, optimizer
        # Rank 0 has cut the file to where the run stands; the others may read it before that.
        looks = json.loads(world.broadcast(json.dumps(_looks(logger.path))))
        self._looked_at = max((line["step"] for line in looks), default=-1)
        self.lowest = LowestLoss(looks, held_out.config.patience)
        self._directory = RunDirectory(run_path, world)
        self.validator = Validator(
            model,
            optimizer,
            world=world,
            batches=lambda: held_out.batches(world.rank),
            token_bytes=held_out.token_bytes,
        )
        self.samples = None
        if held_out.prompt_format and held_out.config.num_samples:
            self.samples = SampleLog(
                run_path,
                world,
                held_out=held_out.data,
                prompt_format=held_out.prompt_format,
                num_samples=held_out.config.num_samples,
                start_step=start_step,
            )

    def is_due(self, step: int) -> bool:
        """Whether to look after this step; once. A look that gave way is due when continued."""
        is_time = step > 0 and step % self.held_out.config.interval == 0
        return is_time and step != self._looked_at

    def look(self, progress: Progress, gives_way: Callable[[], bool] = lambda: False) -> None:
        """Scores and answers with the weights as they stand, once a step; every rank calls it.

        Nothing of it is kept once `gives_way` says that the run is to stop.
        """
        config = self.held_out.config
        if progress.step == self._looked_at:
            return
        with self.logger.clock_stopped():
            try:
                scores = self.validator.scores(gives_way)
            except compile_failures() as error:
                raise compile_error(error) from None
            if not scores:
                return
            self._looked_at = progress.step
            self.logger.record(progress, scores)
            if self.lowest.add({"step": progress.step, **scores}) and config.keep_best:
                state = training_state(self.model, self.optimizer)
                self._directory.save(BEST, state, progress, self.logger.state())
            if self.samples:
                self.samples.add(
                    self.model, self.optimizer, step=progress.step, answer=self._answer
                )

    def _answer(self, prompts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        prompt_format = self.held_out.prompt_format
        assert prompt_format is not None  # or there would be no samples
        max_context = self.held_out.data.metadata.model_max_seq_len
        engine = InferenceEngine(self.model, max_context=max_context, max_rows=len(prompts))
        answers = engine.generate_ids(
            prompts,
            stop_ids=(prompt_format.eoa_id,),
            max_new_tokens=self.held_out.config.max_new_tokens,
        )
        by_index = {answer.index: answer.token_ids for answer in answers}
        return [by_index[index] for index in range(len(prompts))]


def _looks(metrics: Path) -> list[dict[str, Any]]:
    """The scores in metrics.jsonl so far."""
    lines = read_numbers(metrics) if metrics.is_file() else []
    return [line for line in lines if "val/loss" in line]
