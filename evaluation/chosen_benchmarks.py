"""Benchmarks that a run is to be asked while it trains: loaded and checked before it begins.

When they are asked, and of which weights, is `evaluation.benchmark_watch`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from data_io.prompt_format import PromptFormat
from data_io.sampled_format import SampledData
from evaluation.benchmarks import AIMEMajorityVoting
from evaluation.command_line import config_file, planned
from evaluation.engines import Engine, OwnEngine
from evaluation.loading import Planned, Ready, make_ready
from evaluation.mirror import data_source
from evaluation.running import in_streams
from evaluation.settings import read_settings, require_conditions
from models.batch import PackedLayout
from models.language_model import LanguageModel
from training.adam_atan2 import AdamATan2
from training.distributed import unsharded
from training.schema import BenchmarksConfig
from training.validation import averaged_weights


class TrainedEngine(OwnEngine):
    """A model while it is trained; until `asked` gives it one, it can prepare prompts alone."""

    description = "the model in training"

    def __init__(self, prompt_format: PromptFormat, max_context: int) -> None:
        super().__init__(prompt_format, max_context, decode="eager")  # the weights do not stay
        self._model: LanguageModel | None = None
        self._where: dict[str, Any] = {}

    @property
    def model(self) -> LanguageModel:
        assert self._model is not None
        return self._model

    @property
    def identity(self) -> dict[str, Any]:
        return self._identity(self._where)

    @contextmanager
    def asked(
        self, model: LanguageModel, optimizer: AdamATan2, where: dict[str, Any]
    ) -> Iterator[None]:
        """Inside, it answers with the averaged weights, or the raw ones where none are kept.

        All ranks enter it together; inside, each may ask what it likes.
        """
        with averaged_weights(model, optimizer), torch.compiler.set_stance("force_eager"):
            _pass_once(model)
            with unsharded(model):
                self._model, self._where = model, where
                try:
                    yield
                finally:
                    self._model = None


@torch.no_grad()
def _pass_once(model: LanguageModel) -> None:
    """Two tokens: a sharded model is not ready to be unsharded before its first pass."""
    layout = PackedLayout.from_lengths(torch.tensor([1]), torch.tensor([1]), 1)
    device = model.lm_head.weight.device
    ids = torch.zeros(2, dtype=torch.int32, device=device)
    layout = layout.map_vectors(lambda vector: vector.to(device))
    model(ids, torch.arange(2, device=device), layout)


@dataclass(frozen=True, slots=True)
class ChosenBenchmarks:
    """Benchmarks, loaded and checked, before there is a model."""

    config: BenchmarksConfig
    engine: TrainedEngine
    streams: Sequence[Sequence[Planned]]
    ready: Sequence[Ready]  # in the order of the streams
    notes: Sequence[str]  # for the user

    @classmethod
    def open(cls, config: BenchmarksConfig, trained: SampledData) -> ChosenBenchmarks:
        """ValueError or FileNotFoundError where a model of `trained` cannot be asked them."""
        words = [
            f"run_only=[{','.join(config.run_only)}]",
            f"generation_config.batch_size={config.batch_size}",
        ]
        text = config_file(config.config).read_text(encoding="utf-8")
        settings = read_settings(text, words, engines=("SimpleEngine",))
        metadata = trained.metadata
        try:
            prompt_format = PromptFormat.from_info(metadata.tokenizer_info, trained.folder)
        except ValueError as error:
            raise ValueError(f"benchmarks cannot be asked without a tokenizer: {error}") from None
        require_conditions(settings, prompt_format.conditions)
        engine = TrainedEngine(prompt_format, metadata.model_max_seq_len)
        chosen = [replace(each, limit=config.limit) for each in planned(settings)]
        for each in chosen:
            if config.limit and isinstance(each.plan.benchmark, AIMEMajorityVoting):
                raise ValueError(
                    f"benchmarks.limit={config.limit} would take single samples of the problems of "
                    f"{each.plan.label}; leave it out, or give fewer samples (n) in a file: "
                    "benchmarks.config=FILE"
                )
        streams = in_streams(engine.stream_of, chosen)
        at_hand: Future[Engine] = Future()
        at_hand.set_result(engine)
        source = data_source(Path(config.data_dir) if config.data_dir else None)
        ready = [make_ready(each, source, at_hand) for each in chain(*streams)]
        for each in ready:
            _require_room(each)
        notes = [f"{each.label}: {note}" for each in ready for note in each.notes]
        return cls(config, engine, streams, ready, (*settings.notes, *notes))

    @property
    def line(self) -> str:
        """For the summary."""
        counts = ", ".join(f"{each.label} {len(each.items):,}" for each in self.ready)
        interval, epochs = self.config.interval, self.config.epochs
        whens = [f"every {interval:,} steps"] if interval else []
        whens += ([f"every {epochs} epochs"] if epochs > 1 else ["every epoch"]) if epochs else []
        return f"{counts} items, {', '.join((*whens, 'at the end'))}"


def _require_room(ready: Ready) -> None:
    if len(ready.too_long) == len(ready.items):
        reason = next(note for note in ready.notes if note.startswith("none of the"))
        raise ValueError(
            f"{ready.label}: {reason.partition(':')[0]}; leave it out of benchmarks.run_only, ask "
            "with fewer shots in a file (benchmarks.config=FILE), or train with a longer context"
        )
