"""Bytes per token of several tokenizers, by kind of text, as a Markdown table.

    python -m data_io.compare_tokenizers tokenizer=A,B [texts=DIR] [gpt2=FILE] [gpt4=FILE]

More bytes per token is a shorter sequence for the same text. Kinds are the small samples that come
with the project (`data_io/tokenizer_samples/`) and, of `texts`, each file or folder under its name.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from data_io.console import note, run_command
from data_io.options import parse_options
from data_io.prompt_format import TOKENIZER_FILE
from data_io.text_windows import IN_FOLDERS, pieces_of, text_files
from data_io.tiktoken_ranks import GPT4_PATTERN, ranks_tokenizer, read_ranks
from data_io.tokenizer_files import load_tokenizer

SAMPLES = Path(__file__).with_name("tokenizer_samples")
SAMPLE_ORDER = ("prose", "code", "maths", "european")  # then the other scripts, by name
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
GPT4_END = {"<|endoftext|>": 100257}
ENCODED_TOGETHER = 32


class CompareOptions(BaseModel):
    """What the command line may say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer: list[Path] = Field(
        min_length=1, description="tokenizer.json, folders that hold one, SentencePiece .model"
    )
    texts: list[Path] = Field(
        [], description="folders or files (.txt, .jsonl) of text; each entry is one kind"
    )
    gpt2: Path | None = Field(
        None, description="GPT-2's tokenizer.json, or a folder of its vocab.json and merges.txt"
    )
    gpt4: Path | None = Field(None, description="GPT-4's cl100k_base.tiktoken or tokenizer.json")
    max_bytes: PositiveInt = Field(10_000_000, description="most text of each kind that is read")


@dataclass(slots=True)
class Measured:
    """Sums over the texts of one kind."""

    num_bytes: int = 0
    num_tokens: dict[str, int] = field(default_factory=dict)  # by tokenizer


@dataclass(slots=True)
class Comparison:
    """What some tokenizers make of some kinds of text."""

    vocab_sizes: dict[str, int]
    kinds: dict[str, Measured] = field(default_factory=dict)
    losing: dict[str, int] = field(default_factory=dict)  # texts that did not come back, by name

    def markdown(self) -> str:
        names = list(self.vocab_sizes)
        whole = Measured(sum(each.num_bytes for each in self.kinds.values()))
        for name in names:
            whole.num_tokens[name] = sum(each.num_tokens[name] for each in self.kinds.values())
        rows = [
            ["bytes per token", "bytes", *(name.replace("|", "\\|") for name in names)],
            ["---", *["---:"] * (len(names) + 1)],
            ["vocabulary", "", *(f"{size:,}" for size in self.vocab_sizes.values())],
            ["text comes back", "", *("no" if self.losing.get(name) else "yes" for name in names)],
        ]
        for kind, measured in {**self.kinds, "all": whole}.items():
            figures = [_ratio(measured.num_bytes, measured.num_tokens[name]) for name in names]
            rows.append([kind, f"{measured.num_bytes:,}", *figures])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def compare(
    tokenizers: Mapping[str, Tokenizer], kinds: Iterable[tuple[str, Iterable[str]]]
) -> Comparison:
    """Encodes each text of each kind with each tokenizer; text that spells special tokens is text.

    Texts are NFC for this, as many tokenizers make them.
    """
    for tokenizer in tokenizers.values():
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
    sizes = {name: each.get_vocab_size() for name, each in tokenizers.items()}
    comparison = Comparison(sizes)
    for kind, texts in kinds:
        measured = Measured(num_tokens=dict.fromkeys(tokenizers, 0))
        comparison.kinds[kind] = measured
        for batch in _batches(unicodedata.normalize("NFC", text) for text in texts):
            measured.num_bytes += sum(len(text.encode()) for text in batch)
            for name, tokenizer in tokenizers.items():
                encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
                measured.num_tokens[name] += sum(len(encoding.ids) for encoding in encodings)
                decoded = tokenizer.decode_batch(
                    [encoding.ids for encoding in encodings], skip_special_tokens=False
                )
                lost = sum(one != other for one, other in zip(batch, decoded, strict=True))
                comparison.losing[name] = comparison.losing.get(name, 0) + lost
    return comparison


def sample_texts() -> Iterator[tuple[str, list[str]]]:
    """The kinds that come with the project."""
    files = {path.stem: path for path in sorted(SAMPLES.glob("*.txt"))}
    for kind in dict.fromkeys((*SAMPLE_ORDER, *files)):
        yield kind, [files[kind].read_text(encoding="utf-8")]


def texts_in(paths: Sequence[Path], max_bytes: int) -> Iterator[tuple[str, Iterator[str]]]:
    """One kind for each file named, and for each file or folder in a folder named."""
    entries: list[Path] = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [each for each in inside if each == path or _has_text(each)]
        if not found:
            raise ValueError(f"{path} holds no {' or '.join(IN_FOLDERS)} file; name another")
        entries += found
    kinds = [entry.name if entry.is_dir() else entry.stem for entry in entries]
    taken = {*SAMPLE_ORDER, *(path.stem for path in SAMPLES.glob("*.txt")), "all"}
    for entry, kind in zip(entries, kinds, strict=True):
        is_unclear = kind in taken or kinds.count(kind) > 1
        yield (str(entry) if is_unclear else kind), _limited(entry, max_bytes)


def _has_text(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return any(each.suffix in IN_FOLDERS for each in path.rglob("*"))
    return path.suffix in IN_FOLDERS


def _limited(entry: Path, max_bytes: int) -> Iterator[str]:
    for piece in pieces_of(text_files(str(entry))):
        if piece.text:
            yield piece.text
            max_bytes -= len(piece.text.encode())
        if max_bytes <= 0:
            return


def read_gpt2(path: Path) -> Tokenizer:
    """GPT-2's vocabulary as its tokenizer.json, or as a folder of vocabulary and merges."""
    for vocab, merges in GPT2_FILES:
        if (path / vocab).is_file() and (path / merges).is_file():
            tokenizer = Tokenizer(models.BPE.from_file(str(path / vocab), str(path / merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            return tokenizer
    return load_tokenizer(path, needed=()).tokenizer


def read_gpt4(path: Path) -> Tokenizer:
    """GPT-4's vocabulary as tiktoken publishes it, or as a tokenizer.json."""
    if path.suffix == ".tiktoken":
        return ranks_tokenizer(read_ranks(path), GPT4_PATTERN, GPT4_END)
    return load_tokenizer(path, needed=()).tokenizer


def read_tokenizers(options: CompareOptions) -> dict[str, Tokenizer]:
    """All tokenizers by the name of their column."""
    given = [load_tokenizer(path, needed=()) for path in options.tokenizer]
    short = [
        each.path.parent.name if each.path.name == TOKENIZER_FILE else each.path.name
        for each in given
    ]
    tokenizers = {
        name if name and short.count(name) == 1 else str(each.path): each.tokenizer
        for name, each in zip(short, given, strict=True)
    }
    for name, path, read in (
        ("GPT-2", options.gpt2, read_gpt2),
        ("GPT-4", options.gpt4, read_gpt4),
    ):
        if path is None:
            note(f"no column for {name}: {name.replace('-', '').lower()}=FILE names its vocabulary")
        else:
            tokenizers[name] = read(path)
    return tokenizers


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, ENCODED_TOGETHER)):
        yield batch


def _ratio(num_bytes: int, num_tokens: int) -> str:
    return f"{num_bytes / num_tokens:.2f}" if num_tokens else ""


def main(arguments: list[str]) -> None:
    options = parse_options(CompareOptions, arguments, __doc__ or "")
    tokenizers = read_tokenizers(options)
    kinds = itertools.chain(sample_texts(), texts_in(options.texts, options.max_bytes))
    comparison = compare(tokenizers, kinds)
    print(comparison.markdown())
    for name, count in comparison.losing.items():
        if count:
            note(
                f"{name}: {count:,} texts do not come back from its ids, so its figures flatter it"
            )


if __name__ == "__main__":
    run_command(main)
