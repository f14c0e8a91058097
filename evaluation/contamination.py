"""How much of the benchmarks stands word for word in sampled training data.

    python -m evaluation.contamination data.path=DATA run_only=[GSM8k,MMLU] [data_dir=DIR] [n=13]

An item's text is its question with options, without shots. An item overlaps where n of its words
in a row stand in one training example, prompt and response taken together; a shorter item must
stand there whole. Writes contamination.md and contamination.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from data_io.options import parse_options
from data_io.prompt_format import PromptFormat
from data_io.sampled_format import SampledData
from evaluation.mirror import data_source
from evaluation.ngrams import NgramSet
from evaluation.overlap import Overlaps, example_texts, look_at, search, word_counts
from evaluation.settings import config_path, read_settings
from evaluation.shown_text import in_markdown_cell, markdown_block, shortened
from training.console import refuse
from training.publishing import write_atomically

MOSTLY = 0.8  # of an item's n-grams
SHOWN_CHARACTERS = 600  # of an item or example


class ContaminationOptions(BaseModel):
    """The command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    data_path: Path = Field(alias="data.path", description="folder of sampled training data")
    run_only: tuple[str, ...] = Field(default=(), description="benchmarks; default the published")
    data_dir: Path | None = Field(default=None, description="mirror of the benchmarks; null: hub")
    config: Path | None = Field(
        default=None, description="file with the settings of benchmarks; null: the published"
    )
    n: PositiveInt = Field(default=13, description="words in a row that make an overlap")
    epochs: PositiveInt | None = Field(default=None, description="only the first ones; null: all")
    max_examples: PositiveInt | None = Field(
        default=None, description="only the first ones of each epoch; null: all"
    )
    output: Path = Field(
        default=Path("contamination.md"), description="file to write; .json beside it"
    )


def report_of(
    overlaps: Sequence[Overlaps], data: SampledData, prompt_format: PromptFormat
) -> dict[str, Any]:
    """Per benchmark, fit for JSON."""
    return {
        each.looked.label: {
            "items": len(each.looked.items),
            "overlapping": sum(share > 0 for share in each.shares),
            "mostly": sum(share >= MOSTLY for share in each.shares),
            "same_prompt": each.num_same,
            "ngrams": each.num_ngrams,
            "ngrams_found": each.num_found,
            "short_items": each.looked.num_short,
            "template_ngrams": each.looked.num_template,
            "worst": [_worst(each, index, data, prompt_format) for index in each.worst()],
            "shares": {
                item.id: round(share, 4)
                for item, share in zip(each.looked.items, each.shares, strict=True)
                if share > 0
            },
        }
        for each in overlaps
    }


def _worst(
    each: Overlaps, index: int, data: SampledData, prompt_format: PromptFormat
) -> dict[str, Any]:
    item = each.looked.items[index]
    epoch, example = each.source(index)
    examples = np.array([example])
    (parts,) = example_texts(data, data.epoch(epoch), examples, prompt_format)
    return {
        "id": item.id,
        "share": round(each.shares[index], 4),
        "ngrams": len(each.looked.ngrams[index]),
        "item": shortened(item.prompt, SHOWN_CHARACTERS),
        "epoch": epoch,
        "example": example,
        "text": shortened("\n".join(parts), SHOWN_CHARACTERS),
    }


def markdown(report: Mapping[str, Any]) -> Iterator[str]:
    """The lines of contamination.md."""
    yield f"# Overlap with {in_markdown_cell(report['data'])}"
    yield ""
    repeated = f"; {report['repeated']:,} more were repetitions" if report["repeated"] else ""
    limited = f" (the first {report['max_examples']:,} of each)" if report["max_examples"] else ""
    yield (
        f"{report['examples']:,} examples of {report['epochs']} epochs{limited}{repeated}. "
        f"Overlap: {report['n']} words in a row, or the whole of a shorter item."
    )
    names = ("benchmark", "items", "overlapping", "mostly (80 %)", "same prompt", "n-grams found")
    yield from ("", f"| {' | '.join(names)} | shorter than {report['n']} words |")
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for label, each in report["benchmarks"].items():
        cells = (
            in_markdown_cell(label),
            f"{each['items']:,}",
            _part(each["overlapping"], each["items"]),
            _part(each["mostly"], each["items"]),
            _part(each["same_prompt"], each["items"]),
            _part(each["ngrams_found"], each["ngrams"]),
            f"{each['short_items']:,}",
        )
        yield f"| {' | '.join(cells)} |"
    for label, each in report["benchmarks"].items():
        for worst in each["worst"]:
            yield from ("", f"## {in_markdown_cell(label)}: {in_markdown_cell(worst['id'])}", "")
            yield (
                f"{worst['share']:.0%} of {worst['ngrams']} n-grams, most of them in example "
                f"{worst['example']} of epoch {worst['epoch']}"
            )
            yield from ("", markdown_block(worst["item"]), "", markdown_block(worst["text"]))


def _part(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / max(1, total):.1f} %)"


def check(options: ContaminationOptions) -> dict[str, Any]:
    """The whole report. ValueError or FileNotFoundError where something is missing."""
    data = SampledData.open(options.data_path)
    epochs = options.epochs or data.num_epochs
    data.require_epochs(epochs)
    data = SampledData(data.folder, data.metadata, data.num_epochs, options.max_examples)
    prompt_format = PromptFormat.from_info(data.metadata.tokenizer_info, data.folder)
    chosen = [f"run_only=[{','.join(options.run_only)}]"] if options.run_only else []
    settings = read_settings(_config_text(options.config), chosen, engines=("SimpleEngine",))
    source = data_source(options.data_dir)
    looked = [look_at(plan, source, options.n) for plan in settings.plans]
    hashes = [part for each in looked for part in each.ngrams]
    wanted = NgramSet.of(hashes, word_counts(looked, options.n))
    found = search(data, looked, wanted, prompt_format=prompt_format, epochs=epochs)
    overlaps = [Overlaps(each, wanted, found) for each in looked]
    return {
        "format": 1,
        "data": str(options.data_path),
        "data_fingerprint": data.fingerprint(epochs),
        "n": options.n,
        "epochs": epochs,
        "max_examples": options.max_examples,
        "examples": found.num_examples,
        "repeated": found.num_repeated,
        "benchmarks": report_of(overlaps, data, prompt_format),
    }


def _config_text(path: Path | None) -> str:
    file = config_path("hrm_benchmarking") if path is None else path
    if not file.is_file():
        raise FileNotFoundError(f"config={path} is no file")
    return file.read_text(encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    try:
        options = parse_options(ContaminationOptions, arguments, __doc__ or "")
        if options.output.suffix != ".md" or not options.output.parent.is_dir():
            raise ValueError(f"output={options.output} must be a .md file in a folder that exists")
        report = check(options)
        lines = list(markdown(report))
        write_atomically(options.output, "\n".join(lines) + "\n")
        text = json.dumps(report, indent=1, ensure_ascii=True)
        write_atomically(options.output.with_suffix(".json"), text + "\n")
    except (ValueError, OSError) as error:
        refuse(str(error))
    shown = len(report["benchmarks"]) + 6
    print("\n".join(lines[:shown]))
    print(f"written to {options.output} and {options.output.with_suffix('.json').name}")


if __name__ == "__main__":
    main(sys.argv[1:])
