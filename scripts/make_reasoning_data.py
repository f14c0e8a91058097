"""Makes reasoning data that a small model learns in minutes: to train on, and held out.

    python scripts/make_reasoning_data.py output=data/reasoning [tasks=spell_backward,ab] [seed=0]

The folder is sampled data with its tokenizer, the same examples as text in train.jsonl, and other
ones in held_out.jsonl and validation.jsonl for `evaluation.reasoning_tasks.score`. Choices (a
learning rate, when to stop) are made on validation; validation/ holds it as sampled data too, for
val_data.path. The same options again do nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.sampled_format import EpochIndex, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ, SPECIAL_TOKENS
from evaluation.procedural_tasks import Part
from evaluation.reasoning_tasks import (
    DEFAULT_TASKS,
    TASKS,
    Example,
    Task,
    distinct_examples,
    score,
    scored_row,
    task_named,
)

CONDITION = "direct"
CONTEXT_SIZE = 257  # published meaning: one token more than the model sees


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the data, kept beside them as recipe.json."""

    tasks: tuple[str, ...]
    train_per_task: int
    held_out_per_task: int
    validation_per_task: int
    epochs: int
    seed: int
    reasoning_gym: str = version("reasoning_gym")

    def require_same(self, made: Mapping[str, Any], folder: Path) -> None:
        wanted = json.loads(json.dumps(asdict(self)))
        changed = {
            name for name in wanted.keys() | made.keys() if wanted.get(name) != made.get(name)
        }
        if changed:
            differences = ", ".join(
                f"{name}={made.get(name)} there, {wanted.get(name)} here"
                for name in sorted(changed)
            )
            raise ValueError(
                f"{folder} was made with other options ({differences}); "
                f"delete it or choose another output"
            )


def is_made(folder: Path, recipe: Recipe) -> bool:
    """Whether `folder` holds what `recipe` would make. Another recipe's data is an error."""
    recipe_file = folder / "recipe.json"
    if not recipe_file.is_file():
        return False
    recipe.require_same(json.loads(recipe_file.read_text()), folder)
    return True


def make(folder: Path, recipe: Recipe) -> None:
    """Writes the folder, aside until it is whole."""
    drawn = draw(recipe)
    with SampledWriter(folder, tokenizer_info(folder), max_seq_len=CONTEXT_SIZE) as writer:
        shuffle = np.random.Generator(np.random.Philox(seed=recipe.seed))
        orders = (shuffle.permutation(len(drawn.train)) for _ in range(recipe.epochs))
        write_sampled(writer, drawn.train, orders)
        write_jsonl(writer.staging / "train.jsonl", map(train_row, drawn.train))
        write_jsonl(writer.staging / "held_out.jsonl", drawn.held_out)
        write_jsonl(writer.staging / "validation.jsonl", drawn.validation)
        (writer.staging / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
        if drawn.validation:
            part, info = writer.staging / "validation", tokenizer_info(folder / "validation")
            examples = [Example(row["instruction"], row["response"]) for row in drawn.validation]
            with SampledWriter(part, info, max_seq_len=CONTEXT_SIZE) as validation_writer:
                write_sampled(validation_writer, examples, [np.arange(len(examples))])


def tokenizer_info(folder: Path) -> TokenizerInfo:
    """The record of the byte tokenizer that will lie in `folder`."""
    return TokenizerInfo(
        tokenizer_path=str(folder),
        boq=BOQ,
        eoq=EOQ,
        eoa=EOA,
        condition_mapping=dict(CONDITION_TOKENS),
        vocab_size=len(SPECIAL_TOKENS) + 256,
    )


def write_sampled(
    writer: SampledWriter, examples: Sequence[Example], orders: Iterable[NDArray[np.int64]]
) -> None:
    """The tokenizer, the examples' tokens, and one epoch for each order of the examples."""
    prompt_format = PromptFormat.load(
        write_byte_tokenizer(writer.staging),
        boq=BOQ,
        eoq=EOQ,
        eoa=EOA,
        conditions=CONDITION_TOKENS,
    )
    assert prompt_format.vocab_size == writer.metadata.tokenizer_info.vocab_size
    in_file_order = write_tokens(writer, prompt_format, examples)
    for order in orders:
        writer.add_epoch(EpochIndex(*(column[order] for column in in_file_order)))


@dataclass(frozen=True, slots=True)
class Drawn:
    """The parts of the data; no question is in two of them."""

    train: list[Example]
    held_out: list[dict[str, Any]]
    validation: list[dict[str, Any]]


def draw(recipe: Recipe) -> Drawn:
    """The parts of all tasks, one task after another."""
    drawn = Drawn([], [], [])
    for name in recipe.tasks:
        started_at = time.monotonic()
        task = task_named(name)
        held_out, train, validation = draw_parts(task, recipe)
        rows = [scored_row(task, example) for example in (*held_out, *validation, *train)]
        assert all(score(row, row["response"]) == 1.0 for row in rows), f"{name} rejects its truth"
        rows = [row | {"condition": CONDITION} for row in rows]
        drawn.held_out.extend(rows[: len(held_out)])
        drawn.validation.extend(rows[len(held_out) : len(held_out) + len(validation)])
        drawn.train.extend(train)
        elapsed_s = time.monotonic() - started_at
        report(
            f"{name}: {len(train)} to train on, {len(held_out)} held out, {len(validation)} for "
            f"validation ({elapsed_s:.1f} s)"
        )
    return drawn


def draw_parts(task: Task, recipe: Recipe) -> tuple[list[Example], ...]:
    """Held out, to train on, and for validation: each without the questions of those before it."""
    taken: set[str] = set()
    parts: list[list[Example]] = []
    # Validation comes last: the others are what they are without it.
    counts: dict[Part, int] = {
        "held_out": recipe.held_out_per_task,
        "train": recipe.train_per_task,
        "validation": recipe.validation_per_task,
    }
    for part, count in counts.items():
        examples = distinct_examples(task, count, seed=recipe.seed, part=part, excluded=taken)
        taken |= {example.instruction for example in examples}
        parts.append(examples)
    return tuple(parts)


def write_tokens(
    writer: SampledWriter, prompt_format: PromptFormat, examples: Sequence[Example]
) -> tuple[NDArray[np.int64], ...]:
    """Appends each prompt and response; returns inst_start, inst_len, resp_start, resp_len."""
    prompts = prompt_format.encode_prompts(
        [CONDITION] * len(examples), [example.instruction for example in examples]
    )
    responses = prompt_format.encode_responses([example.response for example in examples])
    inst_len = np.array([len(ids) for ids in prompts], np.int64)
    resp_len = np.array([len(ids) for ids in responses], np.int64)
    ends = np.cumsum(inst_len + resp_len)
    pairs = zip(prompts, responses, strict=True)
    writer.add_tokens(np.concatenate([np.array(prompt + response) for prompt, response in pairs]))
    return ends - resp_len - inst_len, inst_len, ends - resp_len, resp_len


def train_row(example: Example) -> dict[str, str]:
    return {
        "instruction": example.instruction,
        "response": example.response,
        "condition": CONDITION,
    }


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def at_least(minimum: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    return whole_number


def task_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in TASKS]
    if unknown or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(
            f"{text!r} must name some of {', '.join(TASKS)}, each once, joined by commas"
        )
    return names


def parse(arguments: Sequence[str]) -> tuple[Path, Recipe]:
    """Options are `name=value` or `--name value`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--tasks",
        type=task_names,
        default=DEFAULT_TASKS,
        help=f"some of {','.join(TASKS)} (default: {','.join(DEFAULT_TASKS)})",
    )
    for name, default, minimum in (
        ("train_per_task", 5000, 1),
        ("held_out_per_task", 200, 0),
        ("validation_per_task", 100, 0),
        ("epochs", 2, 1),
        ("seed", 0, 0),
    ):
        parser.add_argument(
            f"--{name}", type=at_least(minimum), default=default, help=f"default: {default}"
        )
    options = vars(
        parser.parse_args([re.sub(r"^(?=[a-z_]+=)", "--", argument) for argument in arguments])
    )
    return options.pop("output"), Recipe(**options)


def main() -> None:
    folder, recipe = parse(sys.argv[1:])
    try:
        if is_made(folder, recipe):
            report(f"{folder} is already made with these options; nothing to do")
            return
        make(folder, recipe)
    except ValueError as error:
        sys.exit(f"make_reasoning_data: {error}")
    report(f"{folder} is made; train on it with data=reasoning data.path={folder}")


if __name__ == "__main__":
    main()
