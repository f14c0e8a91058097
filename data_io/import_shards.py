"""Makes sampled data of token shards (`.bin` of the nanoGPT family, with or without masks).

    python -m data_io.import_shards source=shards output=data/shards [context_size=1025] [epochs=1]

Without masks every document is learned, in windows behind a prefix of one token, `bos_id`, which
also ends it. With masks a document is one example: the prefix ends before the first learned token,
scored.npy has the mask. Shards of `val` become DIR/validation. The tokens are copied once, as they
lie; examples point into them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from data_io.console import note, run_command
from data_io.loaded_format import LoadedFormat
from data_io.options import parse_options
from data_io.sampled_format import EpochIndex, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from data_io.token_shards import Part, Shard, ShardFolder, Tokens

CHUNK = 2**22  # tokens at a time


class ImportOptions(BaseModel):
    """The command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Path = Field(description="folder of .bin shards and their config.json")
    output: Path = Field(description="folder to make")
    context_size: int = Field(
        default=1025, ge=2, description="tokens of an example, one more than the model sees"
    )
    epochs: PositiveInt = Field(default=1, description="epochs, each in an order of its own")
    seed: NonNegativeInt = Field(default=0, description="of the orders")
    tokenizer: Path | None = Field(
        default=None, description="tokenizer of the ids, to ask, fine-tune and export later"
    )
    overwrite: bool = Field(default=False, description="replaces sampled data in the folder")


def main(arguments: list[str]) -> None:
    """Command line."""
    options = parse_options(ImportOptions, arguments, __doc__ or "")
    ShardImport(options).make()
    note(f"{options.output} is made; train on it with data.path={options.output}")


class ShardImport:
    """Shards on their way to sampled data."""

    def __init__(self, options: ImportOptions) -> None:
        self.options = options
        self.shards = ShardFolder.open(options.source)
        self.format = None if options.tokenizer is None else LoadedFormat.load(options.tokenizer)
        if self.format is not None:
            limit, vocab_size = self.format.prompt_format.id_limit, self.shards.config.vocab_size
            if limit > vocab_size:
                raise ValueError(
                    f"tokenizer={options.tokenizer} has ids up to {limit - 1}, but the shards' "
                    f"vocab_size={vocab_size}; give the tokenizer that made them"
                )

    def make(self) -> None:
        """Writes the folder, aside until it is whole."""
        options, parts = self.options, self.shards.parts
        if not parts["train"]:
            raise ValueError(f"{options.source} holds no train shard")
        generator = np.random.Generator(np.random.Philox(seed=options.seed))
        with ExitStack() as stack:
            writer = stack.enter_context(self.writer(options.output, options.output))
            if parts["val"]:
                place, final = writer.staging / "validation", options.output / "validation"
                part_writer = stack.enter_context(self.writer(place, final))
                self.write(part_writer, "val", epochs=1, generator=generator)
            self.write(writer, "train", epochs=options.epochs, generator=generator)

    def writer(self, folder: Path, final_folder: Path) -> SampledWriter:
        vocab_size = self.shards.config.vocab_size
        info = TokenizerInfo(vocab_size=vocab_size)
        if self.format is not None:
            known = self.format.info(final_folder)
            info = known.model_copy(update={"vocab_size": vocab_size})
        return SampledWriter(
            folder,
            info,
            max_seq_len=self.options.context_size,
            scored=self.shards.is_masked,
            overwrite=self.options.overwrite,
        )

    def write(
        self, writer: SampledWriter, part: Part, *, epochs: int, generator: np.random.Generator
    ) -> None:
        """The tokens of a part, and its epochs."""
        if self.format is not None:
            self.format.accompany(writer)
        shards, bos_id = self.shards.parts[part], self.shards.config.bos_id
        starts = self.copy_tokens(writer, shards)
        if self.shards.is_masked:
            index = self.masked(starts, shards)
        else:
            starts[-1] = writer.add_tokens(np.array([bos_id]))  # ends the last document
            index = self.windows(starts)
        num_examples = len(index[0])
        num_tokens = int(index[1].sum() + index[3].sum())
        note(
            f"{part}: {len(starts) - 1:,} documents, {num_examples:,} examples, {num_tokens:,} ids"
        )
        if not num_examples:
            raise ValueError(
                f"the {part} shards of {self.options.source} make no example; see above"
            )
        for _ in range(epochs):
            order = generator.permutation(num_examples)
            writer.add_epoch(EpochIndex(*(column[order] for column in index)))

    def copy_tokens(self, writer: SampledWriter, shards: list[Shard]) -> NDArray[np.int64]:
        """Appends all tokens; returns where documents begin, and where the last one ends."""
        bos_id, vocab_size = self.shards.config.bos_id, self.shards.config.vocab_size
        starts = array("q")
        end = 0
        for shard in shards:
            for at, ids, mask in _chunks(shard, is_masked=self.shards.is_masked):
                if int(ids.max()) >= vocab_size:
                    raise ValueError(
                        f"{shard.path}: id {ids.max()} within {CHUNK} tokens from {at} is not in "
                        f"0..{vocab_size - 1}; correct vocab_size in config.json, or the shard"
                    )
                scored = None if mask is None else mask.astype(np.uint8)
                offset = writer.add_tokens(ids, scored)
                starts.extend((np.flatnonzero(ids == bos_id) + offset).tolist())
                end = offset + len(ids)
            note(f"{shard.path.name}: {end:,} tokens so far")
        if not starts:
            raise ValueError(
                f"{shards[0].path}: no document begins (bos_id={bos_id} comes nowhere); correct "
                "bos_id in config.json"
            )
        if starts[0]:
            note(f"left out: {starts[0]:,} tokens before the first bos_id={bos_id}")
        starts.append(end)
        return np.array(starts, np.int64)

    def windows(self, starts: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Each document after its bos_id, up to and with the next one, in windows."""
        size = self.options.context_size - 1
        lens = np.diff(starts)  # the next bos_id takes the place of the document's own
        is_empty = lens == 1
        if is_empty.any():
            note(f"left out: {int(is_empty.sum()):,} documents of no token")
        begins, lens = starts[:-1][~is_empty] + 1, lens[~is_empty]
        counts = -(-lens // size)
        firsts = np.cumsum(counts) - counts
        within = (np.arange(counts.sum()) - np.repeat(firsts, counts)) * size
        resp_start = np.repeat(begins, counts) + within
        resp_len = np.minimum(size, np.repeat(lens, counts) - within)
        prefix = np.full(len(resp_start), starts[0], np.int64)
        return prefix, np.ones_like(prefix), resp_start, resp_len

    def masked(
        self, starts: NDArray[np.int64], shards: list[Shard]
    ) -> tuple[NDArray[np.int64], ...]:
        """A document: what comes before its first learned token, and from there to its last."""
        first, last = np.full((2, len(starts) - 1), -1, np.int64)
        offset = 0
        for shard in shards:
            for _, ids, mask in _chunks(shard, is_masked=True):
                assert mask is not None
                counts = (mask != 0) & (ids != self.shards.config.bos_id)
                learned = np.flatnonzero(counts) + offset
                learned = learned[learned >= starts[0]]
                documents = np.searchsorted(starts, learned, "right") - 1
                last[documents] = learned  # of several, the last one stays
                earlier = first[documents] >= 0
                first[documents[::-1]] = np.where(earlier, first[documents], learned)[::-1]
                offset += len(ids)
        is_learned = last >= 0
        is_short = last + 1 - starts[:-1] <= self.options.context_size
        for reason, is_out in (
            ("nothing in them is learned", ~is_learned),
            (f"longer than context_size={self.options.context_size}", is_learned & ~is_short),
        ):
            if is_out.any():
                note(f"left out: {int(is_out.sum()):,} documents, {reason}")
        kept = is_learned & is_short
        begins, first, last = starts[:-1][kept], first[kept], last[kept]
        return begins, first - begins, first, last + 1 - first


def _chunks(shard: Shard, *, is_masked: bool) -> Iterator[tuple[int, Tokens, Tokens | None]]:
    tokens, mask = shard.tokens(), shard.mask() if is_masked else None
    for at in range(0, len(tokens), CHUNK):
        part = slice(at, at + CHUNK)
        yield at, tokens[part], None if mask is None else mask[part]


if __name__ == "__main__":
    run_command(main)
