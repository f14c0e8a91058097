"""What is to be answered, by number: rows of a JSONL file, or the examples of sampled data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from data_io.prompt_format import ROLES, PromptFormat, vocabulary
from data_io.sampled_format import EpochIndex, IntArray, SampledData
from inference.asking import Row, pick_condition, read_rows

TRAIN = "train"  # the folder of sampled data itself; the name of a split is that of a folder in it


class Questions(Protocol):
    """Prompts, and what is known of each."""

    @property
    def fingerprint(self) -> str:
        """Tells other questions from these."""
        ...

    def __len__(self) -> int: ...

    def prompt_ids(self, index: int) -> Sequence[int]: ...

    def line(self, index: int) -> dict[str, str | None]:
        """`prompt`, `condition` and `truth` as text."""
        ...


@dataclass(frozen=True, slots=True)
class FileQuestions:
    """Rows of a JSONL file; all have a condition that the model knows."""

    fingerprint: str
    rows: Sequence[Row]
    prompt_format: PromptFormat

    @classmethod
    def read(cls, path: Path, prompt_format: PromptFormat, condition: str | None) -> FileQuestions:
        """A given `condition` is that of every row, whatever the row says."""
        rows = list(read_rows(path))
        if not rows:
            raise ValueError(f"{path} has no rows")
        usual = pick_condition(prompt_format, condition) if condition else None
        known: dict[str | None, str] = {}
        for number, row in enumerate(rows):
            if row.condition not in known:
                try:
                    known[row.condition] = usual or pick_condition(prompt_format, row.condition)
                except ValueError as error:
                    raise ValueError(f"row {number + 1} of {path}: {error}") from None
        rows = [replace(row, condition=known[row.condition]) for row in rows]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
        return cls(digest, rows, prompt_format)

    def __len__(self) -> int:
        return len(self.rows)

    def prompt_ids(self, index: int) -> Sequence[int]:
        row = self.rows[index]
        return self.prompt_format.encode_prompt(row.condition or "", row.prompt)

    def line(self, index: int) -> dict[str, str | None]:
        row = self.rows[index]
        return {"prompt": row.prompt, "condition": row.condition, "truth": row.response}


@dataclass(frozen=True, slots=True)
class SampledQuestions:
    """Epoch 0 of sampled data; its ids are asked as they are."""

    fingerprint: str
    tokens: IntArray
    epoch: EpochIndex
    prompt_format: PromptFormat

    @classmethod
    def open(cls, folder: Path, split: str | None, prompt_format: PromptFormat) -> SampledQuestions:
        """The split of that name: `train` is `folder` itself, others lie in it."""
        data = SampledData.open(_split_folder(folder, split))
        require_same_tokens(data, prompt_format)
        return cls(data.fingerprint(1), data.tokens(), data.epoch(0), prompt_format)

    def __len__(self) -> int:
        return len(self.epoch)

    def prompt_ids(self, index: int) -> Sequence[int]:
        start = int(self.epoch.inst_start[index])
        return self.tokens[start : start + int(self.epoch.inst_len[index])].tolist()

    def line(self, index: int) -> dict[str, str | None]:
        start = int(self.epoch.resp_start[index])
        truth = self.tokens[start : start + int(self.epoch.resp_len[index])].tolist()
        prompt = self.prompt_ids(index)
        format_ = self.prompt_format
        names = {format_.condition_ids(name)[0]: name for name in format_.conditions}
        return {
            "prompt": format_.decode(prompt),
            "condition": ",".join(names[token] for token in prompt if token in names),
            "truth": format_.decode(truth),
        }


def require_same_tokens(data: SampledData, prompt_format: PromptFormat) -> None:
    """ValueError for data whose ids mean something else to the model.

    Where the data's tokenizer is not there, its names of roles alone are compared.
    """
    info = data.metadata.tokenizer_info
    differences = [
        f"{role} is {getattr(info, role)} in the data, {getattr(prompt_format, role)} in the model"
        for role in ROLES
        if getattr(info, role) not in (None, getattr(prompt_format, role))
    ]
    theirs = vocabulary(info, data.folder)
    if theirs is not None:
        tokens = prompt_format.tokenizer.get_vocab(with_added_tokens=True)
        ours = {token_id: token for token, token_id in tokens.items()}
        first = next((each for each in sorted(theirs) if ours.get(each) != theirs[each]), None)
        if first is not None:
            differences.append(
                f"id {first} is {theirs[first]!r} in the data, {ours.get(first)!r} in the model"
            )
    if differences:
        raise ValueError(
            f"{data.folder} was made with another tokenizer: {'; '.join(differences)}; "
            "sample it with the model's, or give its questions as text (input=FILE.jsonl)"
        )


def _split_folder(folder: Path, split: str | None) -> Path:
    inside = [path.parent.name for path in sorted(folder.glob("*/metadata.json"))]
    if split == TRAIN or not folder.is_dir():
        return folder
    if split not in inside:
        raise ValueError(f"split={split} is not in {folder}; it has {', '.join((TRAIN, *inside))}")
    return folder / split
