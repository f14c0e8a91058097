"""Token shards of the nanoGPT family: `<name>_{val,train}_<number>.bin`, with `_mask.bin` twins.

A shard is 256 little-endian int32 (20240520, 1, number of tokens, zeros) and then the tokens as
uint16; the twin of one for fine-tuning says 1 where a token is learned. `config.json` beside them
has `vocab_size` and `bos_id`, which begins every document. Numbers run on across val and train.

Owns the files; `data_io.import_shards` makes sampled data of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from data_io.sampled_format import SampledData
from data_io.staging import Staging

MAGIC, VERSION = 20240520, 1
HEADER_INTS, HEADER_BYTES = 256, 1024
MOST_IDS = 65_536  # that uint16 tells apart
MOST_TOKENS = 2**31 - 1  # that a header counts
SHARD_TOKENS = 100_000_000
CONFIG_FILE = "config.json"
SHARD_FILE = re.compile(r"(?P<name>.*?)_?(?P<split>train|val)_(?P<number>\d+)\.bin")
MASK = "_mask"

Part = Literal["val", "train"]
Tokens = NDArray[np.uint16]


class ShardConfig(BaseModel):
    """config.json; what else others write there is left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    vocab_size: PositiveInt
    bos_id: NonNegativeInt

    @classmethod
    def load(cls, folder: Path) -> ShardConfig:
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise ValueError(
                f"{path} is missing; write vocab_size and bos_id (the token that begins every "
                'document) there: {"vocab_size": 50257, "bos_id": 50256} for GPT-2'
            )
        try:
            config = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            fault = error.errors()[0]
            name = ".".join(map(str, fault["loc"])) or "the file"
            raise ValueError(f"{path}: {name}: {fault['msg']}; correct it") from None
        config.require_fitting(str(path))
        return config

    def require_fitting(self, where: str) -> None:
        """Refuses what uint16 cannot hold."""
        if self.vocab_size > MOST_IDS:
            raise ValueError(
                f"{where}: vocab_size={self.vocab_size} is more than the {MOST_IDS} ids that .bin "
                "shards hold (uint16); use a smaller tokenizer, or sampled data"
            )
        if self.bos_id >= self.vocab_size:
            raise ValueError(
                f"{where}: bos_id={self.bos_id} is no id below vocab_size={self.vocab_size}"
            )


@dataclass(frozen=True, slots=True)
class Shard:
    """One file, checked and mapped when it is asked for."""

    path: Path

    @property
    def mask_path(self) -> Path:
        return self.path.with_name(f"{self.path.stem}{MASK}.bin")

    def tokens(self) -> Tokens:
        """[n] ids. ValueError: not such a file, or not all of it."""
        return _mapped(self.path)

    def mask(self) -> Tokens:
        """[n] 1 where a token is learned, else 0."""
        tokens = self.tokens()
        if len(tokens) and self.mask_path.stat().st_size == 2 * len(tokens):  # without a header
            mask: Tokens = np.memmap(self.mask_path, "<u2", "r")
        else:
            mask = _mapped(self.mask_path)
        if len(mask) != len(tokens):
            raise ValueError(
                f"{self.mask_path} is of {len(mask)} tokens, {self.path} has {len(tokens)}; they "
                "belong to different data"
            )
        if len(mask) and mask.max() > 1:
            raise ValueError(f"{self.mask_path} holds {mask.max()}, but a mask holds 0 and 1")
        return mask


@dataclass(frozen=True, slots=True)
class ShardFolder:
    """A folder of shards, in the order of their numbers."""

    folder: Path
    config: ShardConfig
    parts: dict[Part, list[Shard]]
    is_masked: bool

    @classmethod
    def open(cls, folder: Path) -> ShardFolder:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder of .bin shards")
        config = ShardConfig.load(folder)
        numbered: dict[int, tuple[Part, Shard]] = {}
        for path in sorted(folder.glob("*.bin")):
            match = SHARD_FILE.fullmatch(path.name)
            if match is None:
                if path.stem.endswith(MASK):
                    continue
                raise ValueError(
                    f"{path}: a shard is called NAME_train_000001.bin or NAME_val_000000.bin; "
                    "rename it or take it away"
                )
            part: Part = "val" if match["split"] == "val" else "train"
            other = numbered.setdefault(int(match["number"]), (part, Shard(path)))
            if other[1].path != path:
                raise ValueError(
                    f"{other[1].path.name} and {path.name} in {folder} have one number; numbers "
                    "run on across val and train files of one data set"
                )
        if not numbered:
            raise ValueError(f"{folder} holds no .bin shard")
        parts: dict[Part, list[Shard]] = {"val": [], "train": []}
        for _, (part, shard) in sorted(numbered.items()):
            parts[part].append(shard)
        shards = [*parts["val"], *parts["train"]]
        masked = [shard for shard in shards if shard.mask_path.is_file()]
        if masked and len(masked) < len(shards):
            lacking = next(shard for shard in shards if not shard.mask_path.is_file())
            raise ValueError(
                f"{lacking.mask_path} is missing, though {masked[0].mask_path.name} is there; all "
                "shards of a folder have a mask, or none"
            )
        return cls(folder, config, parts, bool(masked))


class ShardFolderWriter:
    """A folder of shards in the making, beside its final place until it is whole.

    Documents are whole in a shard: a new one begins where `shard_tokens` are reached. More files
    may be put into `staging`.
    """

    def __init__(
        self,
        folder: Path,
        config: ShardConfig,
        *,
        is_masked: bool,
        name: str = "tokens",
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        config.require_fitting(str(folder))
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} exists and is not empty; choose another folder, or move it")
        if not 0 < shard_tokens <= MOST_TOKENS:
            raise ValueError(f"{shard_tokens=} is not in 1..{MOST_TOKENS}, what a header counts")
        self.folder, self.config, self.is_masked = folder.absolute(), config, is_masked
        self.name, self.shard_tokens = name, shard_tokens
        self._aside = Staging(self.folder)
        self.staging = self._aside.path
        self.num_tokens: dict[Part, int] = {"val": 0, "train": 0}
        self.num_documents: dict[Part, int] = {"val": 0, "train": 0}
        self._number = 0
        self._part: Part | None = None
        self._files: list[IO[bytes]] = []
        self._in_shard = 0

    def add(self, part: Part, ids: NDArray[np.int64], mask: NDArray[np.int64] | None) -> None:
        """Appends a document, which begins with `bos_id`; all of a part come together."""
        bos_id, limit = self.config.bos_id, self.config.vocab_size
        if (mask is not None) != self.is_masked or (mask is not None and len(mask) != len(ids)):
            raise ValueError("give a mask, one value per id, exactly where the writer has masks")
        if not len(ids) or int(ids[0]) != bos_id or (ids[1:] == bos_id).any():
            raise ValueError(
                f"bos_id={bos_id} must begin a document and be nowhere else in it; choose a token "
                "that frames neither questions nor answers, such as <|endoftext|>"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= limit:
            raise ValueError(f"ids up to {ids.max()} are not all in 0..{limit - 1}")
        is_full = self._in_shard and self._in_shard + len(ids) > self.shard_tokens
        if part != self._part or is_full:
            self._begin(part)
        for file, values in zip(self._files, (ids, mask), strict=False):
            file.write(np.ascontiguousarray(values, "<u2").data)
        self._in_shard += len(ids)
        self.num_tokens[part] += len(ids)
        self.num_documents[part] += 1

    def _begin(self, part: Part) -> None:
        self._end()
        stem = f"{self.name}_{part}_{self._number:06d}"
        names = (f"{stem}.bin", f"{stem}{MASK}.bin") if self.is_masked else (f"{stem}.bin",)
        self._files = [(self.staging / name).open("wb") for name in names]
        for file in self._files:
            file.write(bytes(HEADER_BYTES))
        self._part, self._in_shard = part, 0
        self._number += 1

    def _end(self) -> None:
        header = np.zeros(HEADER_INTS, "<i4")
        header[:3] = MAGIC, VERSION, self._in_shard
        for file in self._files:
            file.seek(0)
            file.write(header.tobytes())
            file.flush()
            os.fsync(file.fileno())  # what a rename publishes must be on disk before it
            file.close()
        self._files = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._end()
            if kind is None:
                self._publish()
        finally:
            self._aside.close()

    def _publish(self) -> None:
        if not self._number:
            raise ValueError(f"{self.folder}: no document was added; add at least one")
        text = json.dumps(self.config.model_dump(), indent=1)
        (self.staging / CONFIG_FILE).write_text(text + "\n")
        if self.folder.exists():
            self.folder.rmdir()
        self.staging.rename(self.folder)


def examples_as_documents(
    data: SampledData, bos_id: int, epoch: int = 0
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Each example as a document: `bos_id`, prefix, response; and which of it is learned."""
    index, tokens, scored = data.epoch(epoch), data.tokens(), data.scored()
    columns: Sequence[Sequence[int]] = [
        column.tolist()
        for column in (index.inst_start, index.inst_len, index.resp_start, index.resp_len)
    ]
    for inst_start, inst_len, resp_start, resp_len in zip(*columns, strict=True):
        response = slice(resp_start, resp_start + resp_len)
        prefix = tokens[inst_start : inst_start + inst_len]
        begin = [] if prefix[0] == bos_id else [bos_id]
        ids = np.concatenate([begin, prefix, tokens[response]]).astype(np.int64)
        mask = np.zeros(len(ids), np.int64)
        mask[len(ids) - resp_len :] = 1 if scored is None else scored[response]
        yield ids, mask


def _mapped(path: Path) -> Tokens:
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != MAGIC or header[1] != VERSION:
        found = header[:2].tolist()
        raise ValueError(
            f"{path} begins with {found}, but a token shard begins with {MAGIC}, {VERSION}; it is "
            "of another format or version"
        )
    count = int(header[2])
    if count < 0 or size != HEADER_BYTES + 2 * count:
        raise ValueError(
            f"{path} has {size} bytes, but its header says {count} tokens, which take "
            f"{HEADER_BYTES + 2 * count}; copy it again"
        )
    if count == 0:
        return np.empty(0, np.uint16)
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (count,))
