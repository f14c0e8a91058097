"""Shows what is in sampled or tokenized data: numbers, lengths, and examples as text.

    python -m data_io.inspect DIR
    python -m data_io.inspect DIR batch=16384 html=data.html png=lengths.png
    python -m data_io.inspect DIR examples=3,17 epoch=1

The instruction of an example is cyan, what is learned of its response green, the rest of it dim.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from data_io.console import note, run_command
from data_io.inspect_page import inspection_page
from data_io.inspection import Packing, Shelves, overview, pack
from data_io.inspection_text import overview_lines, packing_line
from data_io.length_plot import draw_lengths
from data_io.options import parse_options
from data_io.published_options import as_key_values
from data_io.shown_examples import shown
from data_io.verify import is_sampled

SHOWN_IDS = 40  # of each part, where no tokenizer tells the text


class InspectOptions(BaseModel):
    """The command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path = Field(description="sampled or tokenized data; the name may be left out")
    epoch: NonNegativeInt = Field(0, description="of sampled data, the epoch to look into")
    examples: tuple[NonNegativeInt, ...] = Field(
        (), description="numbers of the examples to show, and nothing else; empty: a few of all"
    )
    num_examples: NonNegativeInt = Field(5, description="how many a few are")
    seed: NonNegativeInt = Field(0, description="which ones these are")
    batch: PositiveInt | None = Field(
        None, description="global_batch_size, to see how well rows fill it"
    )
    ranks: PositiveInt = Field(1, description="that share the batch")
    html: Path | None = Field(None, description="page to write, with all that is shown")
    png: Path | None = Field(None, description="picture of the lengths to write")


def inspect(options: InspectOptions) -> None:
    """Prints what there is to see, and writes the page and the picture."""
    if is_sampled(options.folder):
        shelves = Shelves.of_sampled(options.folder, options.epoch)
    else:
        shelves = Shelves.of_tokenized(options.folder)
    numbers = options.examples or _some(len(shelves), options)
    for number in numbers:
        shelves.place_of(number)  # before anything is printed
    if options.examples and options.html is None and options.png is None:
        _print_examples(shelves, numbers)
        return
    found = overview(shelves)
    packing: Packing | str | None = None
    print(*overview_lines(shelves, found), sep="\n")
    if options.batch is not None:
        try:
            packing = pack(shelves, options.batch, options.ranks)
        except ValueError as error:
            packing = str(error)
        told = packing if isinstance(packing, str) else packing_line(packing)
        print(f"\npacking: {told}")
    _print_examples(shelves, numbers)
    if options.png is not None:
        _write_whole(options.png, lambda aside: draw_lengths(found, aside))
    if options.html is not None:
        page = inspection_page(shelves, found, packing, numbers)
        _write_whole(options.html, lambda aside: aside.write_text(page, encoding="utf-8"))


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """A file that is there whole or not at all."""
    aside = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        write(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    note(f"wrote {path}")


def _some(total: int, options: InspectOptions) -> tuple[int, ...]:
    """Numbers drawn from all over the data."""
    drawn = np.random.default_rng(options.seed).integers(0, total, options.num_examples)
    return tuple(dict.fromkeys(drawn.tolist()))


def _print_examples(shelves: Shelves, numbers: Sequence[int]) -> None:
    is_colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for number in numbers:
        shelf, row = shelves.place_of(number)
        example = shelf.example(row)
        place = f"{number}" if shelf.first == 0 else f"{number} ({shelf.name}, row {row})"
        print(f"\n{place}:", end=" ")
        if shelves.form is not None:
            print(shown(shelves.form.tokenizer, example, is_colored=is_colored))
            continue
        print(f"example of {len(example.inst_ids)} + {len(example.resp_ids)} tokens")
        for name, ids in (("read   ", example.inst_ids), ("learned", example.resp_ids)):
            more = f" and {len(ids) - SHOWN_IDS} more" if len(ids) > SHOWN_IDS else ""
            print(f"  {name} {' '.join(map(str, ids[:SHOWN_IDS]))}{more}")


def main(arguments: Sequence[str]) -> None:
    respelled = as_key_values(arguments, InspectOptions, by_position="folder", short={})
    inspect(parse_options(InspectOptions, respelled, __doc__ or ""))


if __name__ == "__main__":
    run_command(main)
