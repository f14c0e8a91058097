"""Trains a byte-level BPE tokenizer on the texts of source files.

    python -m data_io.train_tokenizer SOURCE... -o OUT [-p prefix_config.yaml] [--vocab-size 65536]
    python -m data_io.train_tokenizer sources=SOURCE,... output=OUT [vocab_size=65536]

SOURCE is a folder or file of JSONL (also .gz, .zst), JSON arrays or Parquet, or hub:OWNER/NAME or
hub:FOLDER, a Hugging Face data set; in any layout that data_io.readers knows. OUT gets
tokenizer.json, and the config.json by which AutoTokenizer reads it. The same options on the same
files make the same tokenizer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm

from data_io.console import note, run_command
from data_io.mixing import Mixture
from data_io.options import parse_options
from data_io.published_options import as_key_values
from data_io.readers import AUTO, require_reader, to_record
from data_io.records import BadRowError
from data_io.source_files import SourceFile
from data_io.sources import Source, find_all_sources
from data_io.special_tokens import SPECIAL_TOKENS
from data_io.tokenizing import texts_of

# How text is cut before merges are learned: no token reaches across these borders.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = 256
MIN_FREQUENCY = 2
FILES = {"tokenizer.json", "config.json"}


class TrainOptions(BaseModel):
    """What the tokenizer is trained on, and how large it gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[Path, ...] = Field(
        description="folders, files or data sets (hub:OWNER/NAME), joined by commas", min_length=1
    )
    config: str | None = Field(default=None, description="of data sets of the hub")
    split: str = Field(default="train", description="of data sets of the hub")
    output: Path = Field(description="folder for tokenizer.json and config.json (-o)")
    prefix_config_path: Path | None = Field(
        default=None, description="mixture of data_io.sample, for its max_per_file (-p)"
    )
    vocab_size: PositiveInt = Field(
        default=65_536, description="tokens, special ones and the 256 bytes included"
    )
    tokenizer_type: Literal["bpe"] = Field(default="bpe", description="bpe is the only one")
    special_tokens: tuple[str, ...] | None = Field(
        default=None, description="get the ids from 0, in this order; null: the published ones"
    )
    truncate_len: PositiveInt = Field(
        default=10_000, description="so many characters of each text are read"
    )
    limit_mul_factor: PositiveInt = Field(
        default=10, description="of a file with max_per_file, so many times as many texts are read"
    )
    seed: NonNegativeInt = Field(default=0, description="of the choice of these texts")
    reader: str = Field(default=AUTO, description="layout of the rows (data_io.readers)")


def main(arguments: list[str]) -> None:
    """Command line."""
    usage = __doc__ or ""
    respelled = as_key_values(
        arguments,
        TrainOptions,
        by_position="sources",
        short={"-o": "output", "-p": "prefix_config_path"},
    )
    train(parse_options(TrainOptions, respelled, usage))


def train(options: TrainOptions, found: Sequence[SourceFile] = ()) -> Path:
    """Trains and publishes; returns the path of tokenizer.json. `found`: the sources, as files."""
    _require_legal(options)
    texts = TrainingTexts(options, found)
    tokenizer = train_on(texts, options.vocab_size, options.special_tokens or SPECIAL_TOKENS)
    if not texts.num_texts:
        raise ValueError(
            f"no text in {', '.join(map(str, options.sources))}: "
            f"{texts.dropped_shown() or 'the files are empty'}"
        )
    _publish(tokenizer, options.output)
    size = tokenizer.get_vocab_size()
    note(f"{texts.num_texts:,} texts, {texts.num_characters:,} characters, {size:,} tokens")
    if texts.dropped:
        note(f"rows left out: {texts.dropped_shown()}")
    if size < options.vocab_size:
        note(
            f"fewer tokens than vocab_size={options.vocab_size}: no further pair of tokens stands "
            f"side by side {MIN_FREQUENCY} times in these texts"
        )
    print(options.output / "tokenizer.json")
    return options.output / "tokenizer.json"


def train_on(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens; reads the texts once."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, seen or not
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class TrainingTexts:
    """The texts of all sources, cut to `truncate_len`, one at a time; says what was left out."""

    def __init__(self, options: TrainOptions, found: Sequence[SourceFile] = ()) -> None:
        self.options = options
        self.sources: list[Source] = list(found) or find_all_sources(
            options.sources, options.config, options.split
        )
        self.limits = _limits(self.sources, options)
        self.generator = np.random.Generator(np.random.Philox(seed=options.seed))
        self.num_texts = self.num_characters = 0
        self.dropped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[str]:
        size = sum(source.state.size for source in self.sources)
        with tqdm(total=size, desc="reading", unit="B", unit_scale=True, unit_divisor=1024) as bar:
            for source in self.sources:
                before = bar.n

                def show(position: int, before: int = before) -> None:
                    bar.update(before + position - bar.n)

                for text in self._chosen(source, show):
                    self.num_texts += 1
                    self.num_characters += len(text)
                    yield text
                show(source.state.size)
        note("learning merges")

    def dropped_shown(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.dropped.items()))

    def _chosen(self, source: Source, show: Callable[[int], None]) -> Iterator[str]:
        limit = self.limits[source.name]
        if limit is None:
            yield from self._texts(source, show, self.dropped)
            return
        num_texts = sum(1 for _ in self._texts(source, _hide, Counter()))
        if num_texts <= limit:
            yield from self._texts(source, show, self.dropped)
            return
        chosen = np.sort(self.generator.choice(num_texts, limit, replace=False, shuffle=False))
        wanted = iter([*chosen.tolist(), None])
        following = next(wanted)
        for number, text in enumerate(self._texts(source, show, self.dropped)):
            if number == following:
                following = next(wanted)
                yield text

    def _texts(
        self, source: Source, show: Callable[[int], None], dropped: Counter[str]
    ) -> Iterator[str]:
        for row in source.rows(show):
            try:
                record = to_record(row.fields, self.options.reader)
            except BadRowError as error:
                dropped[error.reason] += 1
            except ValueError as error:
                raise ValueError(f"{row.where}: {error}") from None
            else:
                for text in texts_of(record):
                    if text:
                        yield text[: self.options.truncate_len]


def _limits(sources: Sequence[Source], options: TrainOptions) -> dict[str, int | None]:
    """How many texts of each file are read; None: all."""
    if options.prefix_config_path is None:
        return {source.name: None for source in sources}
    mixture = Mixture.load(options.prefix_config_path)
    most = {source.name: mixture.rule_for(source.folder_name).max_per_file for source in sources}
    return {
        name: None if rows is None else rows * options.limit_mul_factor
        for name, rows in most.items()
    }


def _require_legal(options: TrainOptions) -> None:
    require_reader(options.reader)
    special = options.special_tokens or SPECIAL_TOKENS
    if len(set(special)) != len(special):
        twice = sorted(token for token, count in Counter(special).items() if count > 1)
        raise ValueError(f"special_tokens has {', '.join(twice)} more than once; leave one out")
    least = len(special) + BYTES
    if options.vocab_size <= least:
        raise ValueError(
            f"vocab_size={options.vocab_size} leaves no room for merges after {len(special)} "
            f"special tokens and {BYTES} bytes; use more than {least}"
        )
    if options.output.exists() and not _is_replaceable(options.output):
        raise ValueError(
            f"output={options.output} exists and holds other things than "
            f"{' and '.join(sorted(FILES))}; choose another folder"
        )


def _is_replaceable(folder: Path) -> bool:
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= FILES


def _publish(tokenizer: Tokenizer, folder: Path) -> None:
    """Puts the whole folder in place at once."""
    folder = folder.absolute()
    staging = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        (staging / "config.json").write_text(json.dumps({"model_type": "qwen3"}) + "\n")
        (staging / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        replaced = staging.with_suffix(f".replaced-{os.getpid()}")
        if folder.exists():
            folder.rename(replaced)
        staging.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _hide(_: int) -> None:
    """Shows no progress: this reading only counts."""


if __name__ == "__main__":
    run_command(main)
