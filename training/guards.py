"""What follows on a bad step: the run stops, skips it, or goes back and passes over what led to it.

Every step has its number and its batch, whether or not it is taken, so that schedules and the end
of a run stay where they are. All that is decided here follows from the steps alone, and is the same
on all ranks and however often the run is interrupted. What makes a step bad is in `step_check`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from training.checkpoint import Checkpoint, Progress, RunDirectory
from training.console import say
from training.parts import first_sound, published, remove
from training.publishing import write_atomically
from training.schema import RunConfig
from training.starting import Start
from training.step_check import BadStepError, StepCheck
from training.telemetry import read_metrics

GUARD_FILE = "guard.jsonl"
STATE_KEY = "guard"  # beside the logger's sums, in progress.json
SHOWN_EXAMPLES = 20  # of a bad step, in messages; the file has them all


class Guard:
    """Watches over the steps of a run; `check` is for `train_step`."""

    def __init__(
        self, config: RunConfig, directory: RunDirectory, checkpoint: Checkpoint | None
    ) -> None:
        state = (checkpoint.log_state.get(STATE_KEY) if checkpoint else None) or {}
        self.policy = "stop" if config.dry_run else config.guard.policy
        self.config, self.directory = config, directory
        losses = state.get("losses", [])
        self.check = StepCheck(directory.world, config.guard.spike_score, losses)
        self.num_bad: int = state.get("num_bad", 0)
        self.passed: list[list[int]] = state.get("passed", [])  # first and last steps
        self._bad: BadStepError | None = None  # for which it goes back

    @property
    def is_rewinding(self) -> bool:
        """Whether the run is to be built anew, from `rewound`."""
        return self._bad is not None

    @property
    def needs_start(self) -> bool:
        """Whether the weights before the first step are to be kept, to go back to."""
        return self.policy == "rewind"

    def state(self) -> dict[str, Any]:
        """For progress.json: nothing unless steps were bad, or spikes are looked for."""
        state = {
            "num_bad": self.num_bad,
            "passed": self.passed,
            "losses": self.check.history.losses,
        }
        return {STATE_KEY: state} if any(state.values()) else {}

    def passes_over(self, step: int) -> bool:
        """Whether a step is not taken, since the run went back for a bad one near it."""
        return any(first <= step <= last for first, last in self.passed)

    @contextmanager
    def watching(self, progress: Progress) -> Iterator[None]:
        """The step to `progress` is taken inside; a bad one ends it, by the policy.

        stop: BadStepError, with all that is known of it. skip, rewind: what is left of the inside
        is not done, and for rewind `is_rewinding` is true from then on.
        """
        try:
            yield
        except BadStepError as error:
            action = self.policy
            if self.num_bad >= self.config.guard.limit and action != "stop":
                action = "stop"
                limit = f"; it is one more than guard.limit={self.config.guard.limit} allows"
            else:
                limit = ""
            self.num_bad += 1
            span = self._span(progress.step) if action == "rewind" else None
            told = self._record(error, progress, action, span)
            if action == "stop":
                raise self._with_text(error, f"{told}{limit}") from None
            say(self.directory.world, f"{action}: {told}")
            if span:
                self.passed = [*self.passed, span]
                self._bad = self._with_text(error, told)

    def rewound(self) -> Start:
        """Where the run goes back to: its newest good checkpoint before what is passed over.

        Later ones are removed, since the run does not come by them again. Every rank calls it;
        BadStepError where no checkpoint is left.
        """
        assert self._bad is not None
        first, last = self.passed[-1]
        checkpoint = self._go_back(first, last)
        if checkpoint is None:
            raise self._with_text(self._bad, f"{self._bad}; no good checkpoint is left before it")
        say(
            self.directory.world,
            f"back to {checkpoint.path.name}; steps {first:,} to {last:,} are passed over",
        )
        then = dict(checkpoint.log_state.get(STATE_KEY) or {})
        now = {**then, "num_bad": self.num_bad, "passed": self.passed}
        log_state = {**checkpoint.log_state, STATE_KEY: now}
        return Start(
            checkpoint=replace(checkpoint, log_state=log_state),
            source=None,
            is_finished=False,
            notes=(),
        )

    def _span(self, step: int) -> list[int]:
        window = self.config.guard.window
        return [max(1, step - window), step + window]

    def _go_back(self, first: int, last: int) -> Checkpoint | None:
        """Removes checkpoints past the one to go back to, the newest first; that one."""
        # From any of those before `first` the run comes to it with the same weights.
        bad_step = last - self.config.guard.window
        there, _ = published(self.directory)
        found = [each for each in there if each.step < bad_step]
        before = [each for each in found if each.step < first]
        candidates = [*reversed(before), *found[len(before) :]]
        checkpoint, _ = first_sound(self.directory, candidates)
        if checkpoint:
            later = (each for each in reversed(there) if each.step > checkpoint.progress.step)
            remove(self.directory, [each.name for each in later])
        return checkpoint

    def _record(
        self, error: BadStepError, progress: Progress, action: str, span: list[int] | None
    ) -> str:
        """Adds the step to guard.jsonl; what to say of it."""
        folder, epoch = shlex.quote(self.config.data.path), progress.epoch
        examples = [index for rank in error.examples for index in rank]
        listed = ",".join(map(str, examples[:SHOWN_EXAMPLES]))
        shown = f"python -m data_io.inspect {folder} 'examples=[{listed}]' epoch={epoch}"
        line = {
            "step": progress.step,
            "epoch": epoch,
            "action": action,
            "reason": str(error),
            "loss": error.loss,
            "grad_norm": error.grad_norm,
            "examples_of_ranks": error.examples,
            "passed": span,
            "inspect": shown,
        }
        path = self.directory.path / GUARD_FILE
        if self.directory.world.is_main:
            lines = read_metrics(path) if path.exists() else []
            if line not in lines:  # a run that was killed since comes by the same step again
                texts = [json.dumps(each) for each in (*lines, line)]
                write_atomically(path, "\n".join(texts) + "\n")
        more = f" and {len(examples) - SHOWN_EXAMPLES} more" * (len(examples) > SHOWN_EXAMPLES)
        return (
            f"step {progress.step}: {error}, on examples [{listed}]{more} of epoch {epoch}; "
            f"`{shown}` shows them, {path} lists all"
        )

    @staticmethod
    def _with_text(error: BadStepError, text: str) -> BadStepError:
        return BadStepError(
            text, loss=error.loss, grad_norm=error.grad_norm, examples=error.examples
        )


def sums_of_logger(log_state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a checkpoint's `log_state` is the logger's own."""
    return {name: value for name, value in log_state.items() if name != STATE_KEY}
