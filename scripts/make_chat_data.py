"""Makes conversations in ShareGPT form, as SlimOrca has them, on words: data to try fine-tuning on.

    python scripts/make_chat_data.py output=data/chat/chat.jsonl [rows=4000] [seed=0]

Each line is an object `conversations`: a system prompt, then one to three questions and answers,
with a weight for each turn (1: learned, 0: not). Four tasks: `cap nebo` -> `NEBO`, `twice nebo` ->
`nebonebo`, `ends nebo` -> `no`, and `rev nebo` -> `oben`, which the quick start teaches too.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_io.console import note, run_command  # noqa: E402
from data_io.options import parse_options  # noqa: E402

SYSTEM_PROMPTS = ("", "You work on words.", "Answer briefly.")
TASKS: Mapping[str, Callable[[str], str]] = {
    "cap": str.upper,
    "twice": lambda word: word + word,
    "ends": lambda word: word[0] + word[-1],
    "rev": lambda word: word[::-1],
}
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
MAX_TURNS = 3


class ChatDataOptions(BaseModel):
    """The command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: Path = Field(description="JSONL file to write; it must not exist")
    rows: PositiveInt = Field(default=4000, description="conversations")
    seed: NonNegativeInt = Field(default=0, description="the same seed, the same file")


def conversation(draw: random.Random) -> dict[str, Any]:
    """One row, with one to three questions and their answers."""
    system = draw.choice(SYSTEM_PROMPTS)
    turns: list[dict[str, Any]] = []
    if system:
        turns.append({"from": "system", "value": system, "weight": None})
    for _ in range(draw.randint(1, MAX_TURNS)):
        task = draw.choice(sorted(TASKS))
        word = _word(draw)
        turns.append({"from": "human", "value": f"{task} {word}", "weight": 0})
        turns.append({"from": "gpt", "value": TASKS[task](word), "weight": 1})
    return {"conversations": turns}


def _word(draw: random.Random) -> str:
    """Three to six letters that can be said."""
    sounds = (CONSONANTS, VOWELS) if draw.random() < 0.5 else (VOWELS, CONSONANTS)
    return "".join(draw.choice(sounds[at % 2]) for at in range(draw.randint(3, 6)))


def main(arguments: list[str]) -> None:
    """Command line."""
    options = parse_options(ChatDataOptions, arguments, __doc__ or "")
    if options.output.exists():
        raise ValueError(f"output={options.output} exists already; give another file, or remove it")
    draw = random.Random(options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    aside = options.output.with_name(f".{options.output.name}.writing")
    with aside.open("w", encoding="utf-8") as file:
        for _ in range(options.rows):
            file.write(json.dumps(conversation(draw)) + "\n")
    aside.rename(options.output)
    note(f"{options.output}: {options.rows:,} conversations")


if __name__ == "__main__":
    run_command(main)
