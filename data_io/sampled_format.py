"""The sampled folder: what it holds, and how it is checked when it is read.

    <folder>/metadata.json  tokens.npy  [scored.npy]  epoch_<k>/{inst,resp}_{start,len}.npy

Owns the records of metadata.json and the files beside it; `data_io.sampled_writer` writes them. It
does not choose examples (`data_io.sample`) and does not pack them (`dataset_new`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

VOCAB_MULTIPLE = 256  # the model's vocabulary is rounded up to this
EAGER_TOKENS = 2**28  # so many token ids are checked on opening; of larger data, each row as read
CHUNK = 2**20
HASHED_BLOCKS, HASHED_BLOCK_BYTES = 32, 2**16
INDEX_NAMES = ("inst_start", "inst_len", "resp_start", "resp_len")
# What numpy raises for headers that are none: their text goes through Python's own tokenizer.
OF_ARRAYS = (
    *(ValueError, EOFError, TokenError, SyntaxError, TypeError),
    *(OverflowError, MemoryError, RecursionError),
)
MAKE_AGAIN = "sample the data again, or copy it again from where it is whole"

IntArray = NDArray[np.integer[Any]]


class TokenizerInfo(BaseModel):
    """Which tokenizer made the ids, and which tokens mark the parts of a prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tokenizer_path: str | None = None  # a folder or a file
    boq: str | None = None  # opens the question
    eoq: str | None = None  # closes the question
    eoa: str | None = None  # closes the answer
    condition_mapping: dict[str, str] | None = None  # condition -> its token
    vocab_size: PositiveInt | None = None  # only train_metadata.yaml leaves it out

    def require(self, *names: str) -> None:
        """Refuses data that only trains: asking, fine-tuning and export need more than ids."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"tokenizer_info lacks {', '.join(missing)}: such data can be trained on, but not "
                "asked, fine-tuned or exported; add what is missing to tokenizer_info in "
                "metadata.json (or train_metadata.yaml)"
            )


class SampledMetadata(BaseModel):
    """metadata.json. `max_seq_len` counts one token more than the model sees: the shift."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    tokenizer_info: TokenizerInfo
    vocab_size: None = None  # the published format keeps it null: tokenizer_info has it
    max_seq_len: int = Field(ge=2)
    total_length: NonNegativeInt  # mean over epochs of the sum of inst_len + resp_len
    scored: bool = False  # scored.npy says which response tokens count

    @classmethod
    def load(cls, path: Path) -> SampledMetadata:
        try:
            metadata = cls.model_validate_json(_existing(path).read_bytes())
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc'])) or 'file'}={fault['input']!r:.80}: "
                f"{fault['msg']}"
                for fault in error.errors()
            )
            raise ValueError(
                f"{path} is not a sampled folder's metadata: {faults}; correct it, or {MAKE_AGAIN}"
            ) from None
        if metadata.tokenizer_info.vocab_size is None:
            raise ValueError(
                f"{path}: tokenizer_info.vocab_size is missing; write the number of token ids there"
            )
        return metadata

    @property
    def id_limit(self) -> int:
        """Every token id is below this: the tokenizer's vocabulary."""
        assert self.tokenizer_info.vocab_size is not None  # checked by load and by the writer
        return self.tokenizer_info.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        """The model's vocabulary."""
        return -(-self.id_limit // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def model_max_seq_len(self) -> int:
        return self.max_seq_len - 1

    def train_metadata(self) -> dict[str, Any]:
        """The content of train_metadata.yaml: this record as the model sees it."""
        return {
            "max_seq_len": self.model_max_seq_len,
            "tokenizer_info": self.tokenizer_info.model_dump(
                exclude={"vocab_size"}, exclude_none=True
            ),
            "total_length": self.total_length,
            "vocab_size": self.padded_vocab_size,
        }


@dataclass(frozen=True, slots=True)
class EpochIndex:
    """Where the examples of an epoch lie in tokens.npy, in the order of training; [n] each."""

    inst_start: IntArray
    inst_len: IntArray
    resp_start: IntArray
    resp_len: IntArray

    def __len__(self) -> int:
        return len(self.inst_len)

    def row_lengths(self) -> NDArray[np.int32]:
        """[n] tokens that each example takes in a row: all but the last of its response."""
        lengths = np.empty(len(self), np.int32)
        np.add(self.inst_len, self.resp_len, out=lengths, casting="unsafe")
        lengths -= 1
        return lengths

    def check(self, place: Path, num_tokens: int, max_seq_len: int) -> None:
        """Raises ValueError for the first example that breaks a rule; memory stays flat."""
        columns = {name: getattr(self, name) for name in INDEX_NAMES}
        sizes = {name: column.shape for name, column in columns.items()}
        if len(set(sizes.values())) != 1 or not len(self):
            raise ValueError(
                f"{place}: all four arrays must hold one value per example, and at least one "
                f"example; got {sizes}; {MAKE_AGAIN}"
            )
        for at in range(0, len(self), CHUNK):
            part = {name: np.asarray(column[at : at + CHUNK]) for name, column in columns.items()}
            for name, is_broken, rule in _broken_rules(part, num_tokens, max_seq_len):
                if is_broken.any():
                    example = int(is_broken.argmax())
                    raise ValueError(
                        f"{place / name}.npy: example {at + example} has "
                        f"{name}={part[name][example]}, but {rule}; {MAKE_AGAIN}"
                    )


def _broken_rules(
    part: dict[str, IntArray], num_tokens: int, max_seq_len: int
) -> Iterator[tuple[str, NDArray[np.bool_], str]]:
    for kind in ("inst", "resp"):
        start, length = part[f"{kind}_start"], part[f"{kind}_len"]
        yield f"{kind}_len", length < 1, "every instruction and response has at least 1 token"
        rule = f"at most max_seq_len={max_seq_len} is legal"
        yield f"{kind}_len", length > max_seq_len, rule
        yield f"{kind}_start", start < 0, "offsets count from 0"
        rule = f"it must end within the {num_tokens} tokens of tokens.npy"
        yield f"{kind}_start", start > num_tokens - length.astype(np.int64), rule
    total = part["inst_len"].astype(np.int64) + part["resp_len"].astype(np.int64)
    rule = f"inst_len + resp_len must not exceed max_seq_len={max_seq_len} of metadata.json"
    yield "resp_len", total > max_seq_len, rule


@dataclass(frozen=True, slots=True)
class SampledData:
    """A sampled folder, opened and checked. Holds no file open, so it can be sent to a worker."""

    folder: Path
    metadata: SampledMetadata
    num_epochs: int  # prepared: epoch_0 to epoch_<num_epochs - 1>
    limit: int | None = None  # only so many examples of each epoch count, the first ones

    @classmethod
    def open(cls, folder: str | Path) -> SampledData:
        """Checks everything but the epochs, which are checked by `epoch`."""
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} is no folder of sampled data; make one with "
                "python -m data_io.sample, or a script such as scripts/make_reasoning_data.py"
            )
        num_epochs = 0
        while (folder / f"epoch_{num_epochs}").is_dir():
            num_epochs += 1
        data = cls(folder, SampledMetadata.load(folder / "metadata.json"), num_epochs)
        data.require_epochs(1)
        tokens, scored = data.tokens(), data.scored()
        if scored is not None and (scored.shape != tokens.shape or scored.dtype != np.uint8):
            raise ValueError(
                f"{folder / 'scored.npy'} holds {scored.dtype} of shape {scored.shape}; it must be "
                f"uint8 of shape {tokens.shape}, one value per token; {MAKE_AGAIN}"
            )
        if len(tokens) <= EAGER_TOKENS:
            for at in range(0, len(tokens), CHUNK):
                data.check_ids(tokens[at : at + CHUNK], f"in tokens {at} to {at + CHUNK}")
        return data

    def tokens(self) -> IntArray:
        return _open_array(self.folder / "tokens.npy")

    def scored(self) -> IntArray | None:
        """Per token: 0 where a response is not scored. None: all of every response is."""
        path = self.folder / "scored.npy"
        if not self.metadata.scored and path.exists():
            raise ValueError(
                f'{path} exists, but metadata.json does not say "scored": true; add that, or '
                "remove the file to score whole responses"
            )
        return _open_array(path) if self.metadata.scored else None

    def epoch(self, epoch: int) -> EpochIndex:
        """The index of one epoch, memory-mapped and checked."""
        self.require_epochs(epoch + 1)
        place = self.folder / f"epoch_{epoch}"
        index = EpochIndex(*(_open_array(place / f"{name}.npy") for name in INDEX_NAMES))
        index.check(place, len(self.tokens()), self.metadata.max_seq_len)
        return EpochIndex(*(getattr(index, name)[: self.limit] for name in INDEX_NAMES))

    def require_epochs(self, epochs: int) -> None:
        if epochs > self.num_epochs:
            raise FileNotFoundError(
                f"{self.folder} holds {self.num_epochs} prepared epochs, but epochs={epochs} are "
                f"asked for (epoch_{self.num_epochs} is missing); sample with epochs={epochs}, or "
                "train for fewer"
            )

    def check_ids(self, ids: IntArray, where: str) -> None:
        """Refuses ids outside the tokenizer's vocabulary; free where their type admits none."""
        fits = np.iinfo(ids.dtype).min == 0 and np.iinfo(ids.dtype).max < self.metadata.id_limit
        if fits or not len(ids):
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.metadata.id_limit:
            raise ValueError(
                f"{self.folder / 'tokens.npy'}: id {low if low < 0 else high} {where} is not in "
                f"0..{self.metadata.id_limit - 1} (tokenizer_info.vocab_size); use the tokenizer "
                "that made the data, or correct vocab_size"
            )

    def fingerprint(self, num_epochs: int) -> str:
        """Tells data apart for checkpoints: sizes, and up to 2 MiB of each file the run reads."""
        digest = hashlib.sha256(f"{self.metadata.id_limit} {self.metadata.max_seq_len}".encode())
        for path in self._files_read(num_epochs):
            _hash_file(digest, self.folder / path, path)
        return digest.hexdigest()[:32]

    def file_fingerprints(self, num_epochs: int) -> dict[str, str]:
        """The same of each file by itself, and of what metadata.json says of ids and lengths."""
        sizes = f"{self.metadata.id_limit} {self.metadata.max_seq_len}"
        found = {"metadata.json": sizes}
        for path in self._files_read(num_epochs):
            digest = hashlib.sha256()
            _hash_file(digest, self.folder / path, path)
            found[path] = digest.hexdigest()[:16]
        return found

    def _files_read(self, num_epochs: int) -> list[str]:
        paths = [f"epoch_{k}/{name}.npy" for k in range(num_epochs) for name in INDEX_NAMES]
        return paths + ["tokens.npy"] + ["scored.npy"] * self.metadata.scored


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the sampled folder; {MAKE_AGAIN}")
    return path


def _open_array(path: Path) -> IntArray:
    """One .npy file as a read-only memory map."""
    try:
        array = np.load(_existing(path), mmap_mode="r", allow_pickle=False)
    except OF_ARRAYS as error:
        raise ValueError(f"{path} is no whole .npy file ({error}); {MAKE_AGAIN}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        found = f"{array.dtype} of shape {array.shape}" if hasattr(array, "shape") else "an archive"
        raise ValueError(f"{path} must hold one row of integers, but is {found}; {MAKE_AGAIN}")
    return np.asarray(array)


def _hash_file(digest: hashlib._Hash, path: Path, name: str) -> None:
    """Adds a file's size and evenly spaced blocks of it; a small file is covered whole."""
    size = _existing(path).stat().st_size
    digest.update(f"\n{name} {size}\n".encode())
    last = max(0, size - HASHED_BLOCK_BYTES)
    with path.open("rb") as file:
        for offset in sorted({last * k // (HASHED_BLOCKS - 1) for k in range(HASHED_BLOCKS)}):
            file.seek(offset)
            digest.update(file.read(HASHED_BLOCK_BYTES))
