"""Turns source files into token ids: a folder for each, which data_io.sample draws from.

    python -m data_io.tokenize SOURCE... -o OUT --tokenizer-path TOKENIZER [--conditions k=tok,...]
    python -m data_io.tokenize sources=SOURCE,... output=OUT tokenizer_path=TOKENIZER [turns=all]

SOURCE is a folder or file of JSONL (also .gz, .zst), JSON arrays or Parquet, or hub:OWNER/NAME or
hub:FOLDER, a Hugging Face data set; in any layout that data_io.readers knows. Run again, it
tokenizes what is new or changed, and removes what has no source any more. OUT has its
tokenizer_info.json when every source is done, and not before.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, PositiveInt, field_validator
from tqdm import tqdm

from data_io.console import note, run_command
from data_io.examples import Turns
from data_io.executors import ExecutorOptions, run_jobs, start_executor
from data_io.loaded_format import LoadedFormat
from data_io.options import parse_options
from data_io.prompt_format import TOKENIZER_FILE
from data_io.published_options import as_key_values
from data_io.readers import AUTO, require_reader
from data_io.records import DEFAULT_CONDITION
from data_io.sampled_writer import UINT16_VOCAB
from data_io.sources import find_all_sources, require_apart
from data_io.special_tokens import BOQ, EOA, EOQ
from data_io.tokenize_plan import TokenizePlan, TokenizeProgress
from data_io.tokenized_format import (
    INFO_FILE,
    METADATA_FILE,
    MadeBy,
    tokenized_folders,
    write_tokenizer_info,
)
from data_io.tokenized_writer import LOCK_FILE, locked, remove_folder
from data_io.tokenizing import EncodingSettings, Outcome, tokenize_source

SHOWN_FAILURES = 5


class TokenizeOptions(ExecutorOptions):
    """What is tokenized, with what, and where to."""

    sources: tuple[Path, ...] = Field(
        description="folders, files or data sets (hub:OWNER/NAME), joined by commas", min_length=1
    )
    config: str | None = Field(default=None, description="of data sets of the hub")
    split: str = Field(default="train", description="of data sets of the hub")
    output: Path = Field(description="folder of the tokenized data (-o)")
    tokenizer_path: Path | None = Field(
        default=None,
        description="tokenizer.json, its folder, or a SentencePiece .model; null: $LLAMA_TOKENIZER",
    )
    add_special: bool = Field(
        default=False, description="add the special tokens that the tokenizer lacks"
    )
    boq: str = Field(default=BOQ, description="token before a question")
    eoq: str = Field(default=EOQ, description="token after a question")
    eoa: str = Field(default=EOA, description="token after an answer")
    conditions: tuple[str, ...] = Field(
        default=(),
        description="their tokens: name=token,name=token; none: the published that are there",
    )
    reader: str = Field(default=AUTO, description="layout of the rows (data_io.readers)")
    condition: str = Field(
        default=DEFAULT_CONDITION, description="of rows that name none; several: a,b"
    )
    turns: Turns = Field(
        default="each",
        description="of a conversation: each answer is an example, the last, or all are one",
    )
    document_window: PositiveInt = Field(
        default=4096, description="so many tokens of a document are an example"
    )
    token_type: Literal["auto", "uint16", "uint32"] = Field(
        default="auto", description="of tokens.npy; auto: uint16 up to 65536 tokens, as it suffices"
    )

    @field_validator("conditions")
    @classmethod
    def _require_pairs(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        names = [pair.partition("=")[0] for pair in pairs]
        if not all(all(pair.partition("=")) for pair in pairs):
            raise ValueError("write name=token, several joined by commas")
        if len(set(names)) != len(names):
            raise ValueError("a name stands here twice; leave one out")
        return pairs

    @property
    def condition_mapping(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for pair in self.conditions)


def main(arguments: list[str]) -> None:
    """Command line."""
    respelled = as_key_values(
        arguments, TokenizeOptions, by_position="sources", short={"-o": "output"}
    )
    tokenize(parse_options(TokenizeOptions, respelled, __doc__ or ""))


def tokenize(options: TokenizeOptions) -> None:
    """Brings the output up to date and prints what it holds. ValueError: a source failed."""
    require_reader(options.reader)
    require_apart(options.output, options.sources)
    _require_free(options.output)
    sources = find_all_sources(options.sources, options.config, options.split)
    loaded = LoadedFormat.load(
        options.tokenizer_path,
        framing=(options.boq, options.eoq, options.eoa),
        conditions=options.condition_mapping,
        add_special=options.add_special,
    )
    loaded.prompt_format.condition_ids(options.condition)
    token_type = _token_type(options, loaded.prompt_format.id_limit)
    start_executor(options)  # before anything is removed
    options.output.mkdir(parents=True, exist_ok=True)
    with locked(options.output):
        staging = options.output / ".tokenizer.partial"
        staging.mkdir()
        loaded.put_tokenizer(staging)
        settings = _settings(options, loaded, staging / TOKENIZER_FILE, token_type)
        plan = TokenizePlan.make(sources, options.output, settings)
        _clear(plan, options.output)
        (staging / TOKENIZER_FILE).replace(settings.tokenizer_file)
        staging.rmdir()
        _carry_out(plan, options)
        write_tokenizer_info(options.output, loaded.info(options.output))
        _report(options.output, plan)


def _settings(
    options: TokenizeOptions, loaded: LoadedFormat, tokenizer_file: Path, token_type: str
) -> EncodingSettings:
    return EncodingSettings(
        tokenizer_file=options.output.absolute() / TOKENIZER_FILE,
        tokenizer_digest=hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
        boq=options.boq,
        eoq=options.eoq,
        eoa=options.eoa,
        conditions=dict(loaded.prompt_format.conditions),
        reader=options.reader,
        condition=options.condition,
        turns=options.turns,
        document_window=options.document_window,
        token_type=token_type,
    )


def _token_type(options: TokenizeOptions, id_limit: int) -> str:
    if options.token_type == "uint16" and id_limit > UINT16_VOCAB:
        raise ValueError(
            f"token_type=uint16 holds ids below {UINT16_VOCAB}, but the tokenizer's go up to "
            f"{id_limit - 1}; use token_type=uint32 or auto"
        )
    if options.token_type != "auto":
        return options.token_type
    return np.dtype(np.uint16 if id_limit <= UINT16_VOCAB else np.uint32).name


def _require_free(output: Path) -> None:
    """Refuses a folder whose tokenizer is of something else, such as of a model."""
    if not (output / TOKENIZER_FILE).exists():
        return
    is_tokenized = any((output / name).is_file() for name in (INFO_FILE, LOCK_FILE))
    is_sampled = (output / METADATA_FILE).exists()
    if is_sampled or not (is_tokenized or tokenized_folders(output)):
        raise ValueError(
            f"output={output} holds a {TOKENIZER_FILE} that is not of tokenized data, and this "
            "run would replace it; choose an output of its own"
        )


def _clear(plan: TokenizePlan, output: Path) -> None:
    """Removes what is out of date, so that a run that is stopped leaves none of it."""
    for reason, count in plan.remade.items():
        note(f"{count:,} sources again: {reason}")
    for folder in plan.orphans:
        note(f"removed {folder.name}: it has no source any more")
    if plan.jobs or plan.orphans:
        (output / INFO_FILE).unlink(missing_ok=True)  # until all is done
    for folder in (*plan.orphans, *(job.folder for job in plan.jobs)):
        remove_folder(folder)


def _carry_out(plan: TokenizePlan, options: TokenizeOptions) -> None:
    """Tokenizes; ValueError tells of the sources that could not be, after all others are done."""
    failures: list[str] = []
    with TokenizeProgress(plan.jobs) as progress:
        for outcome in run_jobs(tokenize_source, plan.jobs, options):
            progress.finish(outcome)
            if outcome.is_fatal:
                raise OSError(outcome.error)
            if outcome.error:
                failures.append(outcome.error)
            else:
                _remark(outcome)
    if len(failures) == 1:
        raise ValueError(failures[0])
    if failures:
        shown = "\n  ".join(sorted(failures)[:SHOWN_FAILURES])
        more = len(failures) - SHOWN_FAILURES
        raise ValueError(
            f"{len(failures):,} of {len(plan.jobs):,} sources are not tokenized, the others are:"
            f"\n  {shown}" + (f"\n  and {more:,} more" if more > 0 else "")
        )


def _remark(outcome: Outcome) -> None:
    assert outcome.made is not None
    for reason, count in outcome.made.dropped.items():
        first = outcome.firsts.get(reason, "")
        with tqdm.external_write_mode():  # the bar stays below
            note(f"{outcome.name}: {count:,} rows left out, {reason}; the first: {first}")


def _report(output: Path, plan: TokenizePlan) -> None:
    """What the folder holds now, on standard output; ValueError: nothing."""
    folders = [*plan.unchanged, *(job.folder for job in plan.jobs)]
    made = [each for each in map(MadeBy.find, folders) if each is not None]
    dropped: Counter[str] = sum((Counter(each.dropped) for each in made), Counter())
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()))
    examples = sum(each.examples for each in made)
    if not examples:
        raise ValueError(f"no row of any source makes an example; left out: {left_out or 'none'}")
    print(
        f"{output}: {examples:,} examples, {sum(each.tokens for each in made):,} tokens, of "
        f"{sum(each.source_rows for each in made):,} rows in {len(folders):,} sources "
        f"({len(plan.jobs):,} tokenized, {len(plan.unchanged):,} unchanged, "
        f"{len(plan.orphans):,} removed)"
    )
    if dropped:
        print(f"rows left out: {left_out}")


if __name__ == "__main__":
    run_command(main)
