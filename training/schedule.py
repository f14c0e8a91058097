"""Learning rate, number of gradient-carrying calls, and number of steps, as pure functions.

Steps count from 1: the counter goes up before a step's values are computed.
"""

from __future__ import annotations

import math

from models.hrm import HRMConfig
from models.transformer import NetConfig
from training.schema import RunConfig


def lr_at(step: int, *, lr: float, min_ratio: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up to `lr`, then a cosine down to `lr * min_ratio` at `total_steps` and after."""
    if step < warmup_steps:
        return lr * min(1.0, step / warmup_steps)
    done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return lr * (min_ratio + max(0.0, (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done))))


def backprop_steps_at(step: int, total_steps: int, config: NetConfig) -> int | None:
    """HRM's number of gradient-carrying calls; None for nets that have a fixed one."""
    if not isinstance(config, HRMConfig):
        return None
    warmup_steps = total_steps * config.bp_warmup_ratio
    done = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return config.bp_min_steps + int(done * (config.bp_max_steps - config.bp_min_steps))


def scheduled(step: int, total_steps: int, config: RunConfig) -> tuple[float, int | None]:
    """Learning rate, and number of gradient-carrying calls, of a step."""
    lr = lr_at(
        step,
        lr=config.lr,
        min_ratio=config.lr_min_ratio,
        warmup_steps=config.lr_warmup_steps,
        total_steps=total_steps,
    )
    return lr, backprop_steps_at(step, total_steps, config.arch)


def check_schedule(*, warmup_steps: int, total_steps: int) -> None:
    """ValueError for a run that would end before its warm-up does."""
    if warmup_steps >= total_steps:
        raise ValueError(
            f"lr_warmup_steps={warmup_steps} is not shorter than the run of {total_steps} steps; "
            "lower it, or train longer (more epochs, or a smaller global_batch_size)"
        )


def published_total_steps(epochs: int, total_length: int, global_batch_size: int) -> int:
    """The original's estimate, from token counts: packing losses make it differ from the truth."""
    return int(epochs * total_length // global_batch_size)
