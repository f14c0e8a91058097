"""One sitting of a run that only logs: tracker_worker.py RUN TRACKER FIRST_STEP LAST_STEP."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from run_cases import ALONE, run_config

from models.loss import StepSums
from training.checkpoint import Progress
from training.telemetry import MetricsLogger
from training.trackers import open_tracker


def main() -> None:
    """Logs a line a step, its loss equal to the step, and a val/loss at each fifth."""
    run, tracker_name, first, last = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
    run.mkdir(parents=True, exist_ok=True)
    config = run_config(run, project_name="project", run_name="some-run", tracker=tracker_name)
    tracker, note = open_tracker(config, run, ALONE, step=first)
    print(f"tracker  {note}")
    logger = MetricsLogger(
        run,
        ALONE,
        log_interval=1,
        total_steps=100,
        start=Progress(step=first),
        tracker=tracker,
    )
    one = torch.tensor(1)
    for step in range(first + 1, last + 1):
        progress = Progress(step=step, tokens=10 * step)
        logger.add(StepSums(torch.tensor(float(step)), one, one, one, one), progress, {})
        if step % 5 == 0:
            logger.record(progress, {"val/loss": step + 0.5})
    logger.close()


if __name__ == "__main__":
    main()
