"""How a run is watched while it goes: held-out data, benchmarks, both, or neither."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from data_io.row_planning import RowPacking
from data_io.sampled_format import SampledData
from evaluation.benchmark_watch import BenchmarkWatch
from evaluation.chosen_benchmarks import ChosenBenchmarks
from evaluation.during_training import HeldOut, HeldOutWatch
from models.language_model import LanguageModel
from training.adam_atan2 import AdamATan2
from training.checkpoint import Progress
from training.interrupts import StopRequests
from training.schema import RunConfig
from training.summary import RunFacts
from training.telemetry import MetricsLogger


@dataclass(frozen=True, slots=True)
class WatchPlan:
    """What a run is watched with, checked before there is a model."""

    held_out: HeldOut | None
    benchmarks: ChosenBenchmarks | None

    @classmethod
    def open(cls, config: RunConfig, data: SampledData, packing: RowPacking) -> WatchPlan:
        """ValueError or FileNotFoundError where a model of `data` cannot be watched like that."""
        return cls(
            HeldOut.open(config.val_data, data, packing) if config.val_data else None,
            ChosenBenchmarks.open(config.benchmarks, data) if config.benchmarks else None,
        )

    @property
    def lines(self) -> dict[str, str]:
        """For the summary."""
        lines = {"held out": self.held_out.note} if self.held_out else {}
        return lines | ({"benchmarks": self.benchmarks.line} if self.benchmarks else {})

    @property
    def notes(self) -> tuple[str, ...]:
        """For the user."""
        return tuple(self.benchmarks.notes) if self.benchmarks else ()

    def begin(
        self,
        run_path: Path,
        logger: MetricsLogger,
        *,
        model: LanguageModel,
        optimizer: AdamATan2,
        start: Progress,
        facts: RunFacts,
    ) -> Watch:
        """The watch over a run that stands at `start`."""
        held_out, benchmarks = None, None
        if self.held_out:
            held_out = HeldOutWatch(
                self.held_out,
                run_path,
                logger,
                model=model,
                optimizer=optimizer,
                start_step=start.step,
            )
        if self.benchmarks:
            benchmarks = BenchmarkWatch(
                self.benchmarks,
                run_path,
                logger,
                model=model,
                optimizer=optimizer,
                start=start,
                epoch_ends=facts.epoch_ends,
            )
        return Watch(held_out, benchmarks)


@dataclass(frozen=True, slots=True)
class Watch:
    """Looks at a run; every rank calls each method."""

    held_out: HeldOutWatch | None
    benchmarks: BenchmarkWatch | None

    def spent(self) -> str | None:
        """Why nothing better is hoped for, the same on all ranks; None: it is."""
        return self.held_out.lowest.spent() if self.held_out else None

    def look_if_due(self, progress: Progress, requests: StopRequests) -> None:
        """Whatever is due after this step, with the weights as they stand.

        Gives way to a request to stop: what it was about to find is due when the run is continued.
        """
        # Held-out data last: once it says that nothing better comes, everything gives way.
        if self.benchmarks and self.benchmarks.is_due(progress.step):
            self.benchmarks.look(progress, requests)
        if self.held_out and self.held_out.is_due(progress.step):
            self.held_out.look(progress, requests.is_wanted)

    def look_at_end(self, progress: Progress) -> None:
        """What is always done when a run is done. Benchmarks are due at its last step."""
        if self.held_out:
            self.held_out.look(progress)

    def rehearse(
        self, progress: Progress, timed: Callable[[str], AbstractContextManager[None]]
    ) -> None:
        """One look, of benchmarks at the longest prompts alone; `timed` measures each part."""
        if self.held_out:
            with timed("validation"):
                self.held_out.look(progress)
        if self.benchmarks:
            with timed("benchmarks (the longest prompts)"):
                self.benchmarks.rehearse(progress)
