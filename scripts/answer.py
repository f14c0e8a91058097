"""Answers every question of a file, or of sampled data, with a trained model.

    python scripts/answer.py ckpt_path=RUN input=questions.jsonl output=answers.jsonl
    python scripts/answer.py ckpt_path=RUN data.path=data/reasoning split=validation output=...

A line of `input` is an object: `instruction` (or `prompt`), and optionally `condition` and
`response`, the right answer. A line of `output` has `index`, `prompt`, `condition`, `answer`,
`truth` and `finish_reason`: stop, length (cut off), or prompt_too_long (there is no answer). A run
that was stopped goes on with the same command. Exit codes: 0, 2 for bad input, 130 for Ctrl-C.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_io.options import parse_options  # noqa: E402
from inference.answer_file import AnswerFile  # noqa: E402
from inference.asking import AskOptions, weights_fingerprint  # noqa: E402
from inference.depth import depth_of  # noqa: E402
from inference.questions import FileQuestions, Questions, SampledQuestions  # noqa: E402
from simple_inference_engine import (  # noqa: E402
    LoadedModel,
    Request,
    Token,
    load_model,
)
from training.console import refuse  # noqa: E402

LISTED = 10  # over-long prompts that the summary names
# What makes an answer what it is, beside the weights and the questions.
SETTINGS = ("condition", "max_output_tokens", "temperature", "top_k", "top_p", "seed")


class AnswerOptions(AskOptions):
    """A model, how it is asked, and what it is asked."""

    input: Path | None = Field(default=None, description="JSONL file of questions")
    data_path: Path | None = Field(
        default=None, alias="data.path", description="folder of sampled data, instead of input"
    )
    split: str | None = Field(
        default=None, description="of data.path: train (its epoch 0), or the name of a folder in it"
    )
    output: Path = Field(description="JSONL file of answers; beside it FILE.settings.json")
    limit: PositiveInt | None = Field(default=None, description="answers the first so many alone")


def main() -> None:
    """Command line."""
    try:
        options = parse_options(AnswerOptions, sys.argv[1:], __doc__ or "")
        require_one_source(options)
        loaded = load_model(options)
        print(loaded.description, flush=True)
        questions = questions_of(options, loaded)
        answers = AnswerFile(options.output, settings_of(options, loaded, questions))
    except (ValueError, OSError) as error:
        refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    wanted = min(len(questions), options.limit or len(questions))
    pending = [index for index in range(wanted) if index not in answers.done]
    if len(pending) < wanted:
        print(f"{wanted - len(pending):,} of {wanted:,} are answered already", flush=True)
    started_at, num_tokens = time.monotonic(), 0
    try:
        num_tokens = answer_all(loaded, questions, pending, answers=answers, options=options)
        lines = answers.in_order()
    except KeyboardInterrupt:
        left = wanted - sum(index in answers.done for index in range(wanted))
        print(f"stopped with {left:,} to go; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk
        refuse(f"{error}; what is answered so far is kept")
    elapsed_s = time.monotonic() - started_at
    if pending:
        print(f"{num_tokens:,} tokens in {elapsed_s:.1f} s ({num_tokens / elapsed_s:,.0f}/s)")
    print("\n".join(summary(lines, loaded.engine.max_context)))
    print(f"written to {options.output}")


def require_one_source(options: AnswerOptions) -> None:
    """Refuses options that do not go together."""
    if (options.input is None) == (options.data_path is None):
        raise ValueError("give either input=FILE.jsonl or data.path=FOLDER split=NAME")
    if options.input is not None and options.split is not None:
        raise ValueError(f"split={options.split} is of data.path; a file has no splits")
    if options.data_path is not None and options.condition is not None:
        raise ValueError(
            f"condition={options.condition}: sampled prompts have theirs among their ids; leave it "
            "out, or give the questions as text (input=FILE.jsonl)"
        )
    if options.input is not None and options.input.resolve() == options.output.resolve():
        raise ValueError(f"{options.output} is the input too; give another output=")


def questions_of(options: AnswerOptions, loaded: LoadedModel) -> Questions:
    """What the options ask."""
    if options.data_path is not None:
        return SampledQuestions.open(options.data_path, options.split, loaded.prompt_format)
    assert options.input is not None
    return FileQuestions.read(options.input, loaded.prompt_format, options.condition)


def settings_of(
    options: AnswerOptions, loaded: LoadedModel, questions: Questions
) -> dict[str, Any]:
    """All that an answer depends on, to be written beside the answers."""
    source = options.input or f"{options.data_path} split={options.split}"
    return {
        "ckpt_path": str(options.ckpt_path),
        "weights": weights_fingerprint(loaded.engine.model),
        **depth_of(loaded.engine.model.config),
        "questions": str(source),
        "fingerprint": questions.fingerprint,
        **{name: getattr(options, name) for name in SETTINGS},
    }


def answer_all(
    loaded: LoadedModel,
    questions: Questions,
    pending: Sequence[int],
    *,
    answers: AnswerFile,
    options: AnswerOptions,
) -> int:
    """Answers the pending questions and writes each line as it is there; number of tokens."""
    num_tokens = 0
    stop_ids = frozenset({loaded.prompt_format.eoa_id})

    def requests() -> Iterator[Request]:
        for index in pending:
            yield Request(
                questions.prompt_ids(index),
                options.max_output_tokens,
                options.sampling.for_prompt(index),
                stop_ids,
            )

    with tqdm(
        total=len(pending),
        unit=" answers",
        smoothing=0,
        mininterval=0.1 if sys.stderr.isatty() else 10,
        disable=not pending,
    ) as progress:
        for event in loaded.engine.stream(requests()):
            if isinstance(event, Token):
                num_tokens += 1
                continue
            index = pending[event.index]
            is_answered = event.finish_reason != "prompt_too_long"
            text = loaded.prompt_format.decode(event.token_ids) if is_answered else None
            known = questions.line(index)
            answers.add(
                {
                    "index": index,
                    "prompt": known["prompt"],
                    "condition": known["condition"],
                    "answer": text,
                    "truth": known["truth"],
                    "finish_reason": event.finish_reason,
                }
            )
            progress.update()
    return num_tokens


def summary(lines: Sequence[dict[str, Any]], max_context: int) -> list[str]:
    """What came of all questions."""
    answered = [line for line in lines if line["answer"] is not None]
    cut = sum(line["finish_reason"] == "length" for line in answered)
    told = [f"{len(answered):,} of {len(lines):,} answered, {cut:,} of them cut off at their limit"]
    too_long = [line["index"] for line in lines if line["answer"] is None]
    if too_long:
        more = f" and {len(too_long) - LISTED:,} more" if len(too_long) > LISTED else ""
        told.append(
            f"{len(too_long):,} prompts leave no room in the context of {max_context:,} tokens and "
            f"have no answer: index {', '.join(map(str, too_long[:LISTED]))}{more}"
        )
    judged = [line for line in lines if line["truth"] is not None]
    if judged:
        right = sum(line["answer"] == line["truth"] for line in judged)
        told.append(
            f"{right:,} of {len(judged):,} are exactly the truth ({right / len(judged):.1%})"
        )
    return told


if __name__ == "__main__":
    main()
