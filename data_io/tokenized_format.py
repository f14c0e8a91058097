"""The tokenized folder: token ids of all rows of each source, before any are chosen.

    <root>/tokenizer_info.json  tokenizer.json
    <root>/<source>/tokens.npy  {inst,resp}_{start,len}.npy  metadata.json
    <root>/<source>/[scored.npy]  [made.json]

Owns what it holds, and how it is checked when it is read; `data_io.tokenized_writer` writes it.
made.json is ours: by what a folder was made, and what became of its rows; data of the published
pipeline have none.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, ValidationError

from data_io.sampled_format import INDEX_NAMES, OF_ARRAYS, IntArray, TokenizerInfo
from data_io.source_files import SourceState

INFO_FILE, METADATA_FILE, MADE_FILE = "tokenizer_info.json", "metadata.json", "made.json"
MAKE_AGAIN = "delete the folder and tokenize again, or copy it again from where it is whole"
CHUNK = 2**20


class SourceMetadata(BaseModel):
    """metadata.json of a source's folder: by which an unchanged source is known."""

    model_config = ConfigDict(frozen=True, extra="allow")

    source_mtime: NonNegativeFloat | NonNegativeInt  # seconds
    source_size: NonNegativeInt  # bytes


class MadeBy(BaseModel):
    """made.json: by what a folder was made, and what became of the rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str  # of the tokenizer and of all options that decide ids
    source_size: NonNegativeInt  # bytes
    source_mtime_ns: int
    source_identity: str | None = ""  # of a data set; None: nothing tells if it changed
    source_rows: NonNegativeInt
    examples: NonNegativeInt
    tokens: NonNegativeInt
    dropped: dict[str, NonNegativeInt]  # reason -> rows

    def is_of(self, state: SourceState) -> bool:
        """Whether that is the source as it was; the size of a data set is not always known."""
        if state.identity:
            return self.source_identity == state.identity
        made = (self.source_size, self.source_mtime_ns, self.source_identity)
        return made == astuple(state)

    @classmethod
    def find(cls, folder: Path) -> MadeBy | None:
        """None: the folder says nothing of it, or nothing that can be read."""
        try:
            return cls.model_validate_json((folder / MADE_FILE).read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValidationError):
            return None


@dataclass(frozen=True, slots=True)
class TokenizedSource:
    """The rows of one source as memory-mapped arrays; row i is an instruction and a response."""

    folder: Path
    metadata: SourceMetadata
    tokens: IntArray
    inst_start: IntArray
    inst_len: IntArray
    resp_start: IntArray
    resp_len: IntArray
    scored: IntArray | None  # uint8; 0: a response's token is not scored. None: all are

    @classmethod
    def open(cls, folder: Path) -> TokenizedSource:
        """ValueError names the file that is not what it should be. Nothing is loaded."""
        metadata = _record(SourceMetadata, folder / METADATA_FILE)
        index = {name: _open_array(folder / f"{name}.npy") for name in INDEX_NAMES}
        sizes = {name: len(array) for name, array in index.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(
                f"{folder}: all four arrays must hold one value per row; got {sizes}; {MAKE_AGAIN}"
            )
        tokens = _open_array(folder / "tokens.npy")
        scored = None
        if (folder / "scored.npy").exists():
            scored = _open_array(folder / "scored.npy")
            if scored.dtype != np.uint8 or len(scored) != len(tokens):
                raise ValueError(
                    f"{folder / 'scored.npy'} holds {len(scored)} values of {scored.dtype}; it "
                    f"must be {len(tokens)} of uint8, one per token; {MAKE_AGAIN}"
                )
        return cls(folder, metadata, tokens, **index, scored=scored)

    @property
    def name(self) -> str:
        """The source's relative path, with `__` for `/`."""
        return self.folder.name

    def __len__(self) -> int:
        return len(self.inst_len)

    def check(self) -> None:
        """Refuses rows that reach beyond the tokens; reads the whole index, memory stays flat."""
        for kind in ("inst", "resp"):
            starts, lens = getattr(self, f"{kind}_start"), getattr(self, f"{kind}_len")
            for at in range(0, len(self), CHUNK):
                start, length = starts[at : at + CHUNK], lens[at : at + CHUNK]
                most = np.uint64(len(self.tokens))
                broken = (length < 1) | (start < 0) | (length > most)
                broken |= start.astype(np.uint64) > most - np.minimum(length, most).astype("u8")
                if broken.any():
                    row = int(broken.argmax())
                    raise ValueError(
                        f"{self.folder}: row {at + row} has {kind}_start={start[row]} and "
                        f"{kind}_len={length[row]}, but it must hold at least 1 token and lie "
                        f"within the {len(self.tokens)} of tokens.npy; {MAKE_AGAIN}"
                    )


def tokenized_folders(root: Path) -> list[Path]:
    """The folders of all sources, by name."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is no folder of tokenized data; make one with python -m data_io.tokenize"
        )
    return sorted(
        path
        for path in root.iterdir()
        if not path.name.startswith(".") and (path / METADATA_FILE).is_file()
    )


def read_tokenizer_info(root: Path) -> TokenizerInfo:
    """What tokenizer_info.json says; `vocab_size` is in it."""
    if not (root / INFO_FILE).is_file():
        raise FileNotFoundError(
            f"{root / INFO_FILE} is missing: not every source is tokenized yet; run the same "
            "python -m data_io.tokenize again, which goes on with those that are not"
        )
    info = _record(TokenizerInfo, root / INFO_FILE)
    if info.vocab_size is None:
        raise ValueError(
            f"{root / INFO_FILE} lacks vocab_size; write the number of token ids there"
        )
    return info


def write_tokenizer_info(root: Path, info: TokenizerInfo) -> None:
    """Puts the file there whole or not at all."""
    text = json.dumps(info.model_dump(exclude_none=True), ensure_ascii=False)
    aside = root / f".{INFO_FILE}.partial"
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(root / INFO_FILE)


def _record(record: type[Any], path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the tokenized data; {MAKE_AGAIN}")
    try:
        return record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"])) or "file"
        raise ValueError(f"{path}: {place}: {fault['msg']}; {MAKE_AGAIN}") from None


def _open_array(path: Path) -> IntArray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from the tokenized data; {MAKE_AGAIN}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OF_ARRAYS as error:
        raise ValueError(f"{path} is no whole .npy file ({error}); {MAKE_AGAIN}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold one row of integers; {MAKE_AGAIN}")
    return np.asarray(array)
