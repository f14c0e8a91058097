"""Chat tasks of the nanochat family, by the names that a command line uses."""

from __future__ import annotations

import difflib

from evaluation.chat_tasks.choices import ChatARCChallenge, ChatARCEasy, ChatMMLU
from evaluation.chat_tasks.generated import ChatGSM8K, Spelling, SpellingBee
from evaluation.chat_tasks.task import ChatTask

CHAT_TASKS: dict[str, type[ChatTask]] = {
    "ARC-Easy": ChatARCEasy,
    "ARC-Challenge": ChatARCChallenge,
    "MMLU": ChatMMLU,
    "GSM8K": ChatGSM8K,
    "SpellingBee": SpellingBee,
    "Spelling": Spelling,
}


def chat_task_named(name: str) -> type[ChatTask]:
    """Also by the name on record, as ChatMMLU. ValueError names the nearest of unknown names."""
    for known, task in CHAT_TASKS.items():
        if name in (known, task.name):
            return task
    folded = {known.lower(): known for known in CHAT_TASKS}
    near = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    hint = f"did you mean {folded[near[0]]}?" if near else f"there are {', '.join(CHAT_TASKS)}"
    raise ValueError(f"no chat task is named {name[:80]!r}; {hint}")
