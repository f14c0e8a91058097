"""Results on disk, read back: what the report and the comparison of evaluations are made of.

Owns reading and checking results.json and items.jsonl, which `evaluation.records` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_io.parsing import parse_json
from evaluation.benchmarks.protocol import Item, Verdict
from evaluation.records import FORMAT, ITEMS_FILE, RESULTS_FILE

KEPT_CHARACTERS = 2000  # of a prompt, from its end: shots of thousands of items fill the memory


@dataclass(frozen=True, slots=True)
class AnsweredItem:
    """One line of items.jsonl."""

    id: str
    category: str | None
    prompt: str  # its end
    prompt_characters: int  # of the whole
    answer: str
    finish_reason: str
    extracted: Any
    truth: Any
    correct: float
    invalid: bool
    robust: float | None
    problem: str | None
    detail: Mapping[str, Any]

    @property
    def item(self) -> Item:
        """As a benchmark's `figures` takes it."""
        return Item(self.id, self.prompt, self.truth, category=self.category)

    @property
    def verdict(self) -> Verdict:
        return Verdict(
            self.extracted, self.correct, self.invalid, self.robust, self.problem, self.detail
        )


@dataclass(frozen=True, slots=True)
class RecordedResults:
    """A results folder whose finished benchmarks are whole."""

    folder: Path
    record: Mapping[str, Any]  # results.json
    items: Mapping[str, list[AnsweredItem]]  # by label, of the finished benchmarks

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def model(self) -> Mapping[str, Any]:
        return self.record["model"]

    @property
    def benchmarks(self) -> Mapping[str, Mapping[str, Any]]:
        return self.record["benchmarks"]


def read_results(folder: Path) -> RecordedResults:
    """ValueError or FileNotFoundError where the folder holds no results, or broken ones."""
    record = _read_record(folder / RESULTS_FILE)
    items: dict[str, list[AnsweredItem]] = {label: [] for label in record["benchmarks"]}
    path = folder / ITEMS_FILE
    if not path.is_file() and items:
        raise FileNotFoundError(f"{path} is missing; evaluate again under another name=")
    if items:
        with path.open("rb") as lines:
            for number, content in enumerate(lines, start=1):
                label, item = _answered_item(content, f"{path}:{number}")
                if label in items:  # else left over from a benchmark that is being asked anew
                    items[label].append(item)
    lacking = [label for label, each in items.items() if not each]
    if lacking:
        raise ValueError(f"{path} has no line of {', '.join(lacking)}, which is on record")
    return RecordedResults(folder, record, items)


def find_results(folder: Path) -> Path:
    """The folder with results.json: `folder` itself, or the only one of a run's results.

    ValueError lists them where there are several.
    """
    if (folder / RESULTS_FILE).is_file():
        return folder
    found = sorted({*folder.glob(f"*/{RESULTS_FILE}"), *folder.glob(f"results/*/{RESULTS_FILE}")})
    if len(found) == 1:
        return found[0].parent
    if found:
        names = ", ".join(str(path.parent) for path in found)
        raise ValueError(f"{folder} holds several results; name one of {names}")
    raise FileNotFoundError(
        f"{folder} holds no {RESULTS_FILE}; `python -m evaluation.main ckpt_path=RUN` makes it in "
        "RUN/results/NAME"
    )


def _read_record(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the folder holds no results of an evaluation")
    try:
        record = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    needed = {"name", "model", "benchmarks"}
    if not isinstance(record, dict) or not needed <= record.keys():
        raise ValueError(f"{path} is no record of an evaluation")
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} has format {record.get('format')}; this version reads {FORMAT}")
    for name in ("model", "benchmarks"):
        if not isinstance(record[name], dict):
            raise ValueError(f"{path}: {name}={record[name]!r:.40} is no object")
    return record


def _answered_item(content: bytes, where: str) -> tuple[str, AnsweredItem]:
    try:
        line = parse_json(content)
        label, prompt = line["benchmark"], line["prompt"]
        if not isinstance(label, str):
            raise TypeError(f"benchmark={label!r:.40} is no name")
        return label, AnsweredItem(
            id=line["id"],
            category=line["category"],
            prompt=prompt[-KEPT_CHARACTERS:],
            prompt_characters=len(prompt),
            answer=line["answer"],
            finish_reason=line["finish_reason"],
            extracted=line["extracted"],
            truth=line["truth"],
            correct=line["correct"],
            invalid=line["invalid"],
            robust=line["robust"],
            problem=line["problem"],
            detail=line.get("detail") or {},
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where} is no line of answered items ({error!r})") from None
