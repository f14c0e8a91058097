"""Compares evaluations item by item: paired differences with intervals, and the items that flipped.

    python -m evaluation.compare A B [C ...] [output=FILE.md,FILE.tex] [flips=FILE.jsonl]

Each is a folder with results.json, or a run that has only one. All are compared with A. An interval
is a bootstrap over the items (within subjects, where a figure is a mean over subjects), of 95 %.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from data_io.options import parse_options
from evaluation.comparison_tables import Comparison, latex, markdown
from evaluation.paired import PairedBenchmark, compare_benchmark, shared_ids
from evaluation.recorded import RecordedResults, find_results, read_results
from training.console import refuse
from training.publishing import write_atomically

MARKDOWN, LATEX = ".md", ".tex"


class CompareOptions(BaseModel):
    """The command line beside the folders."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: tuple[Path, ...] = Field(
        default=(), description="files to write the table to, .md or .tex; else it is printed"
    )
    flips: Path | None = Field(
        default=None, description="a JSONL file for all items that flipped, with both answers"
    )
    names: tuple[str, ...] = Field(
        default=(), description="what to call them in the table, in their order"
    )
    run_only: tuple[str, ...] = Field(default=(), description="benchmarks; default all shared")
    other_prompts: bool = Field(
        default=False,
        description="pair items by id and truth where data or prompts differ (other shots)",
    )


def compare(results: Sequence[RecordedResults], options: CompareOptions) -> Comparison:
    """ValueError where nothing can be compared."""
    labels = list(dict.fromkeys(label for each in results for label in each.benchmarks))
    unknown = [name for name in options.run_only if name not in labels]
    if unknown:
        raise ValueError(f"run_only={unknown[0]} is in none of them; there are {', '.join(labels)}")
    benchmarks: dict[str, list[PairedBenchmark]] = {}
    left_out = []
    for label in options.run_only or labels:
        lacking = [str(each.folder) for each in results if label not in each.benchmarks]
        if lacking:
            left_out.append(f"{label}: not finished in {', '.join(lacking)}")
            continue
        try:
            ids = shared_ids(results, label, other_prompts=options.other_prompts)
            first, *others = results
            benchmarks[label] = [compare_benchmark(first, each, label, ids) for each in others]
        except ValueError as error:
            left_out.append(f"{label}: {error}")
    if not benchmarks:
        raise ValueError(f"nothing can be compared: {'; '.join(left_out) or 'no benchmark'}")
    return Comparison(_names(results, options.names), results, benchmarks, left_out)


def _names(results: Sequence[RecordedResults], given: Sequence[str]) -> list[str]:
    """As given; else by the first of: name, model's folder, whole path, that tells all apart."""
    if given:
        if len(given) != len(results):
            raise ValueError(f"names= has {len(given)} names for {len(results)} results")
        return list(given)
    ways = (
        [Path(str(each.model.get("path"))).name for each in results],
        [each.name for each in results],
        [str(each.folder) for each in results],
    )
    return next((way for way in ways if len(set(way)) == len(results)), ways[-1])


def flipped_lines(comparison: Comparison) -> Iterator[str]:
    """A JSON object per item that one has right and the first has wrong, or the other way round."""
    first = comparison.results[0]
    for label, row in comparison.benchmarks.items():
        before = {item.id: item for item in first.items[label]}
        for name, results, each in zip(
            comparison.names[1:], comparison.results[1:], row, strict=True
        ):
            after = {item.id: item for item in results.items[label]}
            for change, ids in (("now right", each.gained), ("now wrong", each.lost)):
                for key in ids:
                    line = {
                        "benchmark": label,
                        "id": key,
                        "model": name,
                        "change": change,
                        "prompt_end": before[key].prompt,
                        "truth": before[key].truth,
                        "answer_before": before[key].answer,
                        "answer": after[key].answer,
                    }
                    yield json.dumps(line)


def read_command(arguments: Sequence[str]) -> tuple[list[Path], CompareOptions]:
    """Folders, and options: words with `=` or a leading dash that are no folders."""
    is_option = [
        ("=" in word or word.startswith("-")) and not Path(word).is_dir() for word in arguments
    ]
    words = [word for word, is_one in zip(arguments, is_option, strict=True) if is_one]
    options = parse_options(CompareOptions, words, __doc__ or "")
    folders = [Path(word) for word, is_one in zip(arguments, is_option, strict=True) if not is_one]
    if len(folders) < 2:
        raise ValueError("two or more folders of results are compared: evaluation.compare A B")
    for path in options.output:
        if path.suffix not in (MARKDOWN, LATEX):
            raise ValueError(f"output={path} must end in {MARKDOWN} or {LATEX}")
    for path in (*options.output, *filter(None, (options.flips,))):
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent} is no folder; make it first")
    return folders, options


def main(arguments: Sequence[str]) -> None:
    try:
        folders, options = read_command(arguments)
        results = [read_results(find_results(folder)) for folder in folders]
        comparison = compare(results, options)
        writers = {MARKDOWN: markdown, LATEX: latex}
        for path in options.output:
            write_atomically(path, "\n".join(writers[path.suffix](comparison)) + "\n")
        if options.flips is not None:
            write_atomically(options.flips, "".join(f"{x}\n" for x in flipped_lines(comparison)))
    except (ValueError, OSError) as error:
        refuse(str(error))
    if not options.output:
        print("\n".join(markdown(comparison)))
    for path in (*options.output, *filter(None, (options.flips,))):
        print(f"written to {path}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
