"""What a check of data says, and the checks that tokenized and sampled data share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, ParamSpec

import numpy as np

from data_io.prompt_format import ROLES, TOKENIZER_FILE, PromptFormat, find_tokenizer
from data_io.sampled_format import CHUNK, EpochIndex, IntArray, TokenizerInfo

Arguments = ParamSpec("Arguments")
Status = Literal["ok", "note", "FAIL"]
FRAMING_FIELDS = ("tokenizer_path", *ROLES, "condition_mapping")


class Finding(NamedTuple):
    """One line. A note tells what training does not need, but somebody may."""

    status: Status
    text: str


def findings(
    check: Callable[Arguments, Iterable[Finding]],
    *arguments: Arguments.args,
    **named: Arguments.kwargs,
) -> Iterator[Finding]:
    """What a check finds; what it raises about the data is found too."""
    try:
        yield from check(*arguments, **named)
    except (ValueError, OSError) as error:
        yield Finding("FAIL", str(error))


def check_tokenizer(info: TokenizerInfo, folder: Path) -> Iterator[Finding]:
    """That the tokenizer is there, is one, and can have made ids below `vocab_size`."""
    missing = [name for name in FRAMING_FIELDS if getattr(info, name) is None]
    if missing:
        yield Finding(
            "note",
            f"tokenizer_info lacks {', '.join(missing)}: such data trains, but cannot be asked, "
            "fine-tuned or exported",
        )
    path = find_tokenizer(info, folder)
    if path is None:
        yield Finding(
            "note",
            f"no tokenizer {told_place(info)}beside the data: it trains, but cannot be asked, "
            f"fine-tuned or exported; put its {TOKENIZER_FILE} into {folder}",
        )
        return
    beside = folder / TOKENIZER_FILE
    if beside.is_file() and digest_of(beside) != digest_of(path):
        raise ValueError(
            f"{path} and {beside} differ, and the first one counts; keep the one that made the data"
        )
    if missing:
        return
    form = PromptFormat.from_info(info, folder)
    assert info.vocab_size is not None
    if form.id_limit > info.vocab_size:
        raise ValueError(
            f"{path} has ids up to {form.id_limit - 1}, but tokenizer_info.vocab_size="
            f"{info.vocab_size}; use the tokenizer that made the data, or correct vocab_size"
        )
    told = f"{form.id_limit:,} ids, sha256 {digest_of(path)[:16]}"
    yield Finding("ok", f"tokenizer {path}: {told}, frames prompts with {form.boq} {form.eoq}")


def told_place(info: TokenizerInfo) -> str:
    """Where the tokenizer is not, if the data says where it was."""
    return f"at {info.tokenizer_path} nor " if info.tokenizer_path else ""


def prompt_format(info: TokenizerInfo, folder: Path) -> PromptFormat | None:
    """The format that the data is in, as far as it is known here."""
    known = all(getattr(info, name) is not None for name in FRAMING_FIELDS)
    if not known or find_tokenizer(info, folder) is None:
        return None
    try:
        return PromptFormat.from_info(info, folder)
    except ValueError:
        return None  # `check_tokenizer` tells it


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class FramingCheck:
    """Whether rows begin and end with the tokens that frame prompts and answers."""

    form: PromptFormat
    max_seq_len: int | None = None  # a row of that length may have been cut
    num_rows: int = 0
    num_cut: int = 0  # at max_seq_len, so that they end without eoa
    num_windows: int = 0  # of documents, that end without eoa: only the last window has it
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)  # rule -> how many, the first

    def add(self, tokens: IntArray, rows: EpochIndex, place: str, first: int) -> None:
        """Looks at some more rows; the first of them is row `first` of `place`."""
        form = self.form
        inst_ends, resp_ends = rows.inst_start + rows.inst_len, rows.resp_start + rows.resp_len
        is_window = rows.inst_len == 1  # boq alone
        begins = tokens[rows.inst_start] == form.boq_id
        closes = is_window | (tokens[inst_ends - 1] == form.eoq_id)
        ends = tokens[resp_ends - 1] == form.eoa_id
        is_cut = np.zeros(len(rows), np.bool_)
        if self.max_seq_len is not None:
            is_cut = ~ends & ~is_window & (rows.inst_len + rows.resp_len == self.max_seq_len)
        self.num_cut += int(np.count_nonzero(is_cut))
        self.num_windows += int(np.count_nonzero(~ends & is_window))
        self.num_rows += len(rows)
        for rule, holds in (
            (f"an instruction begins with {form.boq}", begins),
            (f"an instruction ends with {form.eoq}", closes),
            (f"a response ends with {form.eoa}, unless it is cut", ends | is_cut | is_window),
        ):
            broken = int(np.count_nonzero(~holds))
            if broken:
                here = f"row {first + int(holds.argmin())} of {place}"
                count, example = self.faults.get(rule, (0, here))
                self.faults[rule] = count + broken, example

    def findings(self) -> Iterator[Finding]:
        for rule, (count, example) in self.faults.items():
            yield Finding("FAIL", f"{count:,} of {self.num_rows:,} rows break the rule: {rule}; "
                          f"the first is {example}; tokenize the source again")  # fmt: skip
        if not self.faults:
            yield Finding("ok", f"framing: {self.num_rows:,} rows begin and end as they should")
        if self.num_cut:
            yield Finding(
                "note",
                f"{self.num_cut:,} rows are cut at max_seq_len={self.max_seq_len} and end without "
                f"{self.form.eoa}: they teach not to stop; keep_eoa_on_truncation=true keeps it",
            )
        if self.num_windows:
            told = f"{self.num_windows:,} rows are windows in a document, and end where it goes on"
            yield Finding("note", told)


def check_flags(scored: IntArray, place: Path) -> None:
    """That scored.npy holds nothing but 0 and 1."""
    for at in range(0, len(scored), CHUNK):
        part = scored[at : at + CHUNK]
        if int(part.max(initial=0)) > 1:
            token = at + int((part > 1).argmax())
            raise ValueError(
                f"{place}: token {token} has {scored[token]}; 1 is scored, 0 is not, and nothing "
                "else is legal"
            )
