"""A small mirror of the data sets that config/data/mixtures/sft.yaml names."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_word_mirror(folder: Path, words: Iterable[str]) -> Path:
    write_rows(folder / "english-words/default/words.jsonl", ({"word": word} for word in words))
    return folder


def talk(number: int) -> list[dict[str, str]]:
    """A conversation of one to three questions, some with a system prompt."""
    messages = [{"role": "system", "content": "Be kind."}] if number % 3 == 0 else []
    for turn in range(1 + number % 3):
        messages.append({"role": "user", "content": f"question {number} {turn}"})
        messages.append({"role": "assistant", "content": f"answer {number} {turn}"})
    return messages


def choice_row(number: int) -> dict[str, Any]:
    choices = [str(number + k) for k in range(4)]
    return {"question": f"{number} + 1?", "choices": choices, "answer": 1, "subject": "sums"}


def gsm8k_row(number: int) -> dict[str, str]:
    twice = 2 * number
    answer = (
        f"It is 2*{number} = <<2*{number}={twice}>>{twice} apples.\n"
        f"Then {twice}+1=<<{twice}+1={twice + 1}>>{twice + 1}.\n#### {twice + 1}"
    )
    return {"question": f"Twice {number}, and one?", "answer": answer}


def write_mirror(folder: Path) -> Path:
    """SmolTalk 40 + 10 (5 questions in both), MMLU 30 + 20, GSM8K 12 + 8, 3 of identity."""
    smoltalk = folder / "HuggingFaceTB__smol-smoltalk" / "default"
    write_rows(smoltalk / "train.jsonl", ({"messages": talk(k)} for k in range(40)))
    write_rows(smoltalk / "test.jsonl", ({"messages": talk(k)} for k in range(35, 45)))
    mmlu = folder / "cais__mmlu"
    write_rows(
        mmlu / "auxiliary_train" / "train.jsonl", ({"train": choice_row(k)} for k in range(30))
    )
    write_rows(mmlu / "all" / "test.jsonl", (choice_row(k) for k in range(100, 120)))
    gsm8k = folder / "openai__gsm8k" / "main"
    write_rows(gsm8k / "train.jsonl", (gsm8k_row(k) for k in range(12)))
    write_rows(gsm8k / "test.jsonl", (gsm8k_row(k) for k in range(50, 58)))
    write_rows(folder / "identity_conversations.jsonl", (talk(k) for k in range(300, 303)))
    draw, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
    words = ("".join(draw.choices(letters, k=draw.randint(3, 9))) for _ in range(3000))
    return write_word_mirror(folder, words)
