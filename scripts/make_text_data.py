"""Makes sampled data of plain text, for language modelling: a prefix of one token, then text.

    python scripts/make_text_data.py output=data/books text=books,more.jsonl [held_out=0.05]

A document is cut into windows of context_size - 1 tokens, each behind `boq`; `eoa` ends the last.
Some documents are held out, in <output>/validation for val_data.path. The same options again do
nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_io.byte_tokenizer import byte_tokenizer, write_byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.sampled_format import EpochIndex, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from data_io.text_windows import ROWS, Piece, pieces_of, text_files, windows_of
from data_io.token_bytes import token_byte_lengths

BYTES = "bytes"  # the tokenizer that needs no training


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the data, kept beside them as recipe.json."""

    text: str
    tokenizer: str
    boq: str
    eoq: str
    eoa: str
    context_size: int
    held_out: float
    epochs: int
    seed: int
    num_files: int
    file_bytes: int
    tokenizer_digest: str | None

    def is_made(self, folder: Path) -> bool:
        """Whether `folder` holds what this recipe makes. Another recipe's data is an error."""
        recipe_file = folder / "recipe.json"
        if not recipe_file.is_file():
            return False
        made = json.loads(recipe_file.read_text())
        differences = [
            f"{name}={made.get(name)} there, {value} here"
            for name, value in asdict(self).items()
            if made.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"{folder} was made with other options ({', '.join(differences)}); "
                "delete it or choose another output"
            )
        return True


@dataclass(frozen=True, slots=True)
class Split:
    """Which documents are held out; of a single document, all from character `cut` on."""

    documents: frozenset[int]
    cut: int | None

    @classmethod
    def draw(cls, pieces: Iterable[Piece], share: float, generator: np.random.Generator) -> Split:
        """Holds out a share of the documents, at least one of them and never all."""
        num_documents = num_characters = num_empty = 0
        for piece in pieces:
            num_empty += piece.text == ""
            num_documents += piece.is_last and piece.text != ""
            num_characters += len(piece.text)
        if num_empty:
            report(f"left out: {num_empty:,} documents without text")
        if share == 0 or num_documents == 0:
            return cls(frozenset(), None)
        if num_documents == 1:
            num_held_out = max(1, round(share * num_characters))
            report(f"held out: the last {num_held_out:,} characters of the one document")
            return cls(frozenset(), num_characters - num_held_out)
        num_held_out = min(max(1, round(share * num_documents)), num_documents - 1)
        report(f"held out: {num_held_out:,} of {num_documents:,} documents")
        chosen = generator.choice(num_documents, num_held_out, replace=False)
        return cls(frozenset(chosen.tolist()), None)

    def part(self, pieces: Iterable[Piece], *, is_held_out: bool) -> Iterator[Piece]:
        """The pieces that are held out, or those that are not."""
        position = 0
        for piece in pieces:
            text, is_last = piece.text, piece.is_last
            if self.cut is not None:
                at = min(max(0, self.cut - position), len(text))
                position += len(text)
                text = text[at:] if is_held_out else text[:at]
                is_last &= is_held_out
            elif (piece.document in self.documents) is not is_held_out:
                continue
            if text:
                yield Piece(text, piece.document, is_last)


class TextData:
    """Text on its way to sampled data: its split, its tokenizer, and what is held out."""

    def __init__(self, recipe: Recipe, files: Sequence[Path]) -> None:
        self.recipe, self.files = recipe, files
        self.prompt_format = load_format(recipe)
        self.generator = np.random.Generator(np.random.Philox(seed=recipe.seed))
        self.split = Split.draw(pieces_of(files), recipe.held_out, self.generator)
        self.held_out: set[bytes] = set()  # digests of windows

    def make(self, folder: Path) -> None:
        """Writes the folder, aside until it is whole."""
        with self._writer(folder, folder) as writer:
            if self.recipe.held_out:
                final = folder / "validation"
                with self._writer(writer.staging / final.name, final) as validation_writer:
                    self._write(validation_writer, epochs=1, is_held_out=True)
            self._write(writer, epochs=self.recipe.epochs, is_held_out=False)
            recipe = json.dumps(asdict(self.recipe), indent=1)
            (writer.staging / "recipe.json").write_text(recipe + "\n")

    def _writer(self, folder: Path, final_folder: Path) -> SampledWriter:
        prompt_format = self.prompt_format
        info = TokenizerInfo(
            tokenizer_path=str(final_folder),
            boq=prompt_format.boq,
            eoq=prompt_format.eoq,
            eoa=prompt_format.eoa,
            condition_mapping=dict(prompt_format.conditions),
            vocab_size=prompt_format.vocab_size,
        )
        return SampledWriter(folder, info, max_seq_len=self.recipe.context_size)

    def _write(self, writer: SampledWriter, *, epochs: int, is_held_out: bool) -> None:
        """One side of the split: its tokenizer, each window once, and the epochs."""
        put_tokenizer(self.recipe.tokenizer, writer.staging)
        writer.add_tokens(np.array([self.prompt_format.boq_id]))  # the prefix of all windows
        starts, lens, num_left_out = array("q"), array("q"), 0
        pieces = self.split.part(pieces_of(self.files), is_held_out=is_held_out)
        for window in windows_of(pieces, self.prompt_format, self.recipe.context_size - 1):
            digest = hashlib.blake2b(window.tobytes(), digest_size=16).digest()
            if is_held_out:
                self.held_out.add(digest)
            elif digest in self.held_out:
                num_left_out += 1
                continue
            starts.append(writer.add_tokens(window))
            lens.append(len(window))
        name = "validation" if is_held_out else "training"
        report(f"{name}: {len(starts):,} windows, {sum(lens):,} tokens")
        if num_left_out:
            report(f"left out of training: {num_left_out:,} windows, equal to one held out")
        if not starts:
            raise ValueError(f"text={self.recipe.text} leaves nothing for {name}; give more text")
        resp_start, resp_len = np.array(starts), np.array(lens)
        for _ in range(epochs):
            order = self.generator.permutation(len(starts))
            prefixes = np.zeros_like(order), np.ones_like(order)
            writer.add_epoch(EpochIndex(*prefixes, resp_start[order], resp_len[order]))


def load_format(recipe: Recipe) -> PromptFormat:
    """The tokenizer, its framing tokens, and those of the published conditions that it has."""
    tokenizer = byte_tokenizer()
    if recipe.tokenizer != BYTES:
        tokenizer = Tokenizer.from_file(str(tokenizer_file(recipe.tokenizer)))
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    conditions = {name: token for name, token in CONDITION_TOKENS.items() if token in added}
    prompt_format = PromptFormat(tokenizer, recipe.boq, recipe.eoq, recipe.eoa, conditions)
    try:
        token_byte_lengths(tokenizer, max(tokenizer.get_vocab().values()) + 1)
    except ValueError as error:
        report(f"note: {error}")
    return prompt_format


def tokenizer_file(name: str) -> Path:
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}; give a tokenizer.json, its folder, or {BYTES}")
    return path


def put_tokenizer(name: str, folder: Path) -> None:
    """Data travel with their tokenizer."""
    if name == BYTES:
        write_byte_tokenizer(folder)
    else:
        shutil.copyfile(tokenizer_file(name), folder / "tokenizer.json")


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def at_least(minimum: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    return whole_number


def share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return float(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options are `name=value` or `--name value`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    meaning = f"files, folders and globs, joined by commas; of a {ROWS} file every line's text"
    parser.add_argument("--text", required=True, help=f"{meaning}, of others all is a document")
    for name, kind, default, meaning in (
        ("tokenizer", str, BYTES, f"tokenizer.json, its folder, or {BYTES}: a token per byte"),
        ("context_size", at_least(2), 1025, "tokens of an example, one more than the model sees"),
        ("held_out", share, 0.05, "share of documents for validation; of a single one, its end"),
        ("epochs", at_least(1), 4, "epochs to prepare, each in an order of its own"),
        ("seed", at_least(0), 0, "of the split and the orders"),
        ("boq", str, BOQ, "the prefix"),
        ("eoa", str, EOA, "ends a document"),
        ("eoq", str, EOQ, "not in this data; ends a question put to the model"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, default=default, help=f"{meaning} (default: {default})"
        )
    return parser.parse_args([re.sub(r"^(?=[a-z_]+=)", "--", argument) for argument in arguments])


def main() -> None:
    options = vars(parse(sys.argv[1:]))
    folder = options.pop("output")
    try:
        files, digest = text_files(options["text"]), None
        if options["tokenizer"] != BYTES:
            content = tokenizer_file(options["tokenizer"]).read_bytes()
            digest = hashlib.sha256(content).hexdigest()[:16]
        file_bytes = sum(path.stat().st_size for path in files)
        recipe = Recipe(
            **options, num_files=len(files), file_bytes=file_bytes, tokenizer_digest=digest
        )
        if recipe.is_made(folder):
            report(f"{folder} is already made with these options; nothing to do")
            return
        TextData(recipe, files).make(folder)
    except ValueError as error:
        sys.exit(f"make_text_data: {error}")
    validation = f" val_data.path={folder / 'validation'}" if recipe.held_out else ""
    report(f"{folder} is made; train on it with data.path={folder}{validation}")


if __name__ == "__main__":
    main()
