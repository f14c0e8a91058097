"""Chooses the rows of every epoch from tokenized data, and writes what `pretrain.py` reads.

    python -m data_io.sample tokenized_path=data/tokenized output_path=data/sampled epochs=4

Standard output gets the report (Markdown) and nothing else. The mixture (`prefix_config_path`) says
how much of each source an epoch takes; docs/data.md explains it.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from tqdm import tqdm

from data_io.checks import told_place
from data_io.console import note, run_command
from data_io.deduplicate import DuplicateFinder
from data_io.epoch_drawing import EpochDraws
from data_io.mixing import Mixture
from data_io.options import parse_options
from data_io.prompt_format import TOKENIZER_FILE, find_tokenizer, vocabulary
from data_io.row_copying import Endings, RowCopier, coverage
from data_io.row_selection import LengthRules, UsableRows, usable_chunks
from data_io.sampled_format import TokenizerInfo
from data_io.sampled_writer import SampledWriter
from data_io.sampling_report import Coverage, sampling_report
from data_io.tokenized_format import TokenizedSource, read_tokenizer_info, tokenized_folders

PUBLISHED_MIXTURE = Path("config/data/mixtures/hrm_text.yaml")
DUPLICATE = "same as an earlier row"

ItemT = TypeVar("ItemT")


class SampleOptions(BaseModel):
    """The command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output_path: Path = Field(description="folder to write, as pretrain.py reads it")
    epochs: PositiveInt = Field(description="epochs to prepare: one for each of the training")
    tokenized_path: Path = Field(
        Path("data/tokenized"), description="what python -m data_io.tokenize wrote"
    )
    prefix_config_path: Path | None = Field(
        PUBLISHED_MIXTURE,
        description="the mixture, a YAML list; null: every row of every source once per epoch",
    )
    seed: NonNegativeInt = Field(0, description="of all draws")
    context_size: int = Field(
        4097, ge=2, description="most tokens of a row: one more than the model sees"
    )
    min_resp_length: PositiveInt = Field(
        2, description="rows with fewer tokens of response, eoa included, go"
    )
    keep_eoa_on_truncation: bool = Field(
        False,
        description="end a cut response with its last token, eoa; as published it just ends",
    )
    deduplicate: Literal["none", "exact"] = Field(
        "none", description="exact: of rows that are equal in every token the first one stays"
    )
    overwrite: bool = Field(False, description="replace an earlier folder of sampled data")


def sample(options: SampleOptions) -> str:
    """Writes the folder; returns the report."""
    folders = tokenized_folders(options.tokenized_path)
    info = read_tokenizer_info(options.tokenized_path)
    mixture = Mixture.load(_found(options.prefix_config_path))
    if not folders:
        raise ValueError(
            f"{options.tokenized_path} holds no tokenized source; write some there with "
            "python -m data_io.tokenize"
        )
    for remark in mixture.remarks([folder.name for folder in folders]):
        note(remark)
    lengths = LengthRules(options.context_size, options.min_resp_length)
    sources, has_scored = [], False
    for folder in _progress(folders, "reading lengths"):
        source = TokenizedSource.open(folder)
        has_scored |= source.scored is not None
        sources.append(UsableRows.of_source(source, mixture.rule_for(folder.name), lengths))
    with SampledWriter(
        options.output_path,
        info,
        max_seq_len=options.context_size,
        scored=has_scored,
        overwrite=options.overwrite,
    ) as writer:
        if options.deduplicate == "exact":
            _leave_out_duplicates(sources, writer.staging / "duplicates")
        coverages = _write(writer, [rows for rows in sources if len(rows)], options)
        _copy_tokenizer(info, options.tokenized_path, writer.staging)
    note(*_remarks(sources, options))
    return sampling_report(coverages)


def _found(path: Path | None) -> Path | None:
    """The published mixture lies beside this package, wherever a command is run."""
    if path is not None and path == PUBLISHED_MIXTURE and not path.exists():
        return Path(__file__).resolve().parents[1] / path
    return path


def _write(
    writer: SampledWriter, sources: Sequence[UsableRows], options: SampleOptions
) -> list[Coverage]:
    """Draws all epochs, copies the rows that they use, writes the epochs."""
    if not sources:
        raise ValueError(
            f"no row of {options.tokenized_path} can be used with "
            f"context_size={options.context_size} and min_resp_length={options.min_resp_length}; "
            "raise the first or lower the second"
        )
    num_rows = [len(rows) for rows in sources]
    wanted = [rows.rule.rows_per_epoch(len(rows)) for rows in sources]
    draws = EpochDraws(num_rows, wanted, options.seed)
    keep_eoa = options.keep_eoa_on_truncation
    endings = Endings(keep_eoa, _eoa_id(options.tokenized_path) if keep_eoa else None)
    copier = RowCopier(writer, draws.num_rows, endings)
    # An epoch is written while the next one is drawn: numpy does both without the interpreter.
    with ThreadPoolExecutor(max_workers=1) as background:
        written: Future[None] | None = None
        for order in _progress(draws.epochs(options.epochs), "epochs", options.epochs):
            if written is None:
                _copy_used(copier, sources, draws, options.epochs - 1)
            else:
                written.result()
            written = background.submit(writer.add_epoch_in_parts, copier.epoch(order))
            del order  # of what is written already, nothing is kept
        assert written is not None
        written.result()
    return [
        coverage(TokenizedSource.open(rows.folder), rows, source.drawn())
        for rows, source in zip(sources, draws.sources, strict=True)
    ]


def _copy_used(
    copier: RowCopier, sources: Sequence[UsableRows], draws: EpochDraws, epochs_left: int
) -> None:
    """The first epoch begins every permutation, so it tells which rows the others will use."""
    together = list(zip(sources, draws.sources, draws.rows_per_epoch, strict=True))
    for rows, source, wanted in _progress(together, "copying tokens"):
        used = source.used_after(epochs_left * wanted)
        copier.copy(TokenizedSource.open(rows.folder), rows, used, source.first)


def _eoa_id(tokenized_path: Path) -> int | None:
    info = read_tokenizer_info(tokenized_path)
    vocab = vocabulary(info, tokenized_path) or {}
    return next((token_id for token_id, token in vocab.items() if token == info.eoa), None)


def _leave_out_duplicates(sources: Sequence[UsableRows], scratch: Path) -> None:
    with DuplicateFinder(scratch) as finder:
        for rows in _progress(sources, "looking for duplicates"):
            source = TokenizedSource.open(rows.folder)
            for chunk in usable_chunks(source, rows):
                finder.add(source, chunk)
        is_repeated = finder.repeated()
    first = 0
    for rows in sources:
        count = len(rows)
        rows.leave_out(is_repeated[first : first + count], DUPLICATE)
        first += count


def _copy_tokenizer(info: TokenizerInfo, tokenized_path: Path, folder: Path) -> None:
    path = find_tokenizer(info, tokenized_path)
    if path is None:
        note(
            f"no tokenizer {told_place(info)}in {tokenized_path}: the data trains, but asking and "
            f"fine-tuning need {TOKENIZER_FILE} beside it"
        )
        return
    shutil.copyfile(path, folder / TOKENIZER_FILE)


def _remarks(sources: Sequence[UsableRows], options: SampleOptions) -> list[str]:
    """What became of rows that are not as they were."""
    dropped = sum((rows.dropped for rows in sources), Counter[str]())
    total = sum(rows.num_file_rows for rows in sources)
    remarks = [
        f"dropped {count:,} of {total:,} rows: {reason}" for reason, count in dropped.most_common()
    ]
    num_cut = sum(rows.num_cut for rows in sources)
    if num_cut:
        ending = "eoa kept" if options.keep_eoa_on_truncation else "no eoa at their end"
        remarks.append(f"cut {num_cut:,} rows to context_size={options.context_size}: {ending}")
    empty = [rows.name for rows in sources if not len(rows)]
    if empty:
        remarks.append(f"{len(empty):,} sources have no row left, such as {empty[0]}")
    return [*remarks, f"wrote {options.output_path}"]


def _progress(items: Iterable[ItemT], what: str, total: int | None = None) -> Iterable[ItemT]:
    """A bar on standard error, where that is a terminal."""
    return tqdm(items, desc=what, total=total, disable=None, leave=False)


def main(arguments: Sequence[str]) -> None:
    options = parse_options(SampleOptions, arguments, __doc__ or "")
    try:
        report = sample(options)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise  # it says itself what is wrong
        raise ValueError(
            f"{options.output_path} cannot be written ({error.strerror}); make room, or choose "
            "another output_path; nothing is left of it"
        ) from None
    print(report, end="")


if __name__ == "__main__":
    run_command(main)
