"""A SentencePiece `.model` as a tokenizer of the `tokenizers` package, with the same ids for text.

BPE (LLaMA) and unigram models, read without the sentencepiece package: the file is a protocol
buffer of pieces and a few settings. Control and unknown pieces become special tokens, and so do
user-defined ones that the caller names: text that spells them stays text.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from data_io.merges import merges_of

SPACE = "\u2581"  # the sign that stands for a space in pieces
Value = int | float | bytes


class Kind(IntEnum):
    """What a piece is for, as the format numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(IntEnum):
    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


class Piece(NamedTuple):
    text: str
    score: float
    kind: Kind


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What such a file says, as far as it decides ids."""

    pieces: tuple[Piece, ...] = field(repr=False)
    algorithm: Algorithm
    has_byte_fallback: bool
    character_map: bytes = field(repr=False)  # compiled by SentencePiece; b"": text is left as is
    adds_prefix: bool  # a space before each text
    strips_spaces: bool  # at both ends, and all but one within
    escapes_spaces: bool
    puts_space_behind: bool

    @classmethod
    def read(cls, path: Path) -> SentencePieceModel:
        """ValueError names a file that is none."""
        try:
            return cls._parsed(path.read_bytes())
        except (struct.error, IndexError):
            raise _refusal(path, "it ends too early") from None
        except ValueError as error:
            raise _refusal(path, str(error)) from None

    @classmethod
    def _parsed(cls, content: bytes) -> SentencePieceModel:
        pieces, trainer, normalizer = [], dict[int, Value](), dict[int, Value]()
        for number, value in _fields(content):
            if number == 1:
                pieces.append(_piece(_message(value)))
            elif number == 2:
                trainer = _message(value)
            elif number == 3:
                normalizer = _message(value)
        if not pieces or not trainer:
            raise ValueError("it has no pieces or no settings")
        character_map = normalizer.get(2, b"")
        if not isinstance(character_map, bytes):
            raise ValueError("its character map is no bytes")
        return cls(
            pieces=tuple(pieces),
            algorithm=Algorithm(trainer.get(3, Algorithm.UNIGRAM)),
            has_byte_fallback=bool(trainer.get(35, False)),
            character_map=character_map,
            adds_prefix=bool(normalizer.get(3, True)),
            strips_spaces=bool(normalizer.get(4, True)),
            escapes_spaces=bool(normalizer.get(5, True)),
            puts_space_behind=bool(trainer.get(24, False)),
        )

    def of_kind(self, *kinds: Kind) -> list[str]:
        return [piece.text for piece in self.pieces if piece.kind in kinds]


def read_sentencepiece(path: Path, special: Iterable[str] = ()) -> Tokenizer:
    """The tokenizer of a `.model`; pieces of the names in `special` are special tokens of it."""
    model = SentencePieceModel.read(path)
    _require_supported(path, model)
    wanted = set(special)
    symbols = [text for text in model.of_kind(Kind.USER_DEFINED) if text not in wanted]
    named = [text for text in model.of_kind(Kind.USER_DEFINED) if text in wanted]
    hidden = [*model.of_kind(Kind.CONTROL, Kind.UNKNOWN), *named]
    is_bpe = model.algorithm == Algorithm.BPE
    tokenizer = Tokenizer(_bpe(model, symbols) if is_bpe else _unigram(model, symbols))
    # Merges alone never lead to these; looking pieces up would.
    looked_up = [] if is_bpe and not symbols else [*hidden, *model.of_kind(Kind.BYTE)]
    try:
        tokenizer.normalizer = normalizers.Sequence(_normalizers(model))
    except Exception as error:  # the package raises nothing more specific
        raise _refusal(path, str(error)) from None
    splits = _splits(symbols, looked_up)
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    parts += [decoders.Strip(" ", 1, 0)] if model.adds_prefix else []
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in hidden])
    return tokenizer


def _bpe(model: SentencePieceModel, symbols: list[str]) -> models.BPE:
    learned = [piece for piece in model.pieces if piece.kind == Kind.NORMAL]
    order = sorted(range(len(learned)), key=lambda index: -learned[index].score)  # stable
    ranks = {learned[index].text: rank for rank, index in enumerate(order)}
    return models.BPE(
        vocab={piece.text: index for index, piece in enumerate(model.pieces)},
        merges=merges_of(ranks),
        unk_token=next(iter(model.of_kind(Kind.UNKNOWN)), None),
        fuse_unk=True,
        byte_fallback=model.has_byte_fallback,
        ignore_merges=bool(symbols),  # which no merges make
    )


def _unigram(model: SentencePieceModel, symbols: list[str]) -> models.Unigram:
    """Symbols are alone with themselves (`_splits`): any score above the sum of others will do."""
    chosen = set(symbols)
    unknown = [index for index, piece in enumerate(model.pieces) if piece.kind == Kind.UNKNOWN]
    vocab = [(piece.text, 0.0 if piece.text in chosen else piece.score) for piece in model.pieces]
    return models.Unigram(vocab, unknown[0] if unknown else None, model.has_byte_fallback)


def _normalizers(model: SentencePieceModel) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if model.character_map:
        steps.append(normalizers.Precompiled(model.character_map))
    if model.strips_spaces:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.adds_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _splits(symbols: list[str], out_of_reach: list[str]) -> list[pre_tokenizers.PreTokenizer]:
    """Cuts that isolate symbols, and cuts within pieces that text must not become."""
    splits: list[pre_tokenizers.PreTokenizer] = []
    if symbols:
        pattern = "|".join(map(re.escape, sorted(symbols, key=len, reverse=True)))
        splits.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if out_of_reach:
        cut = [f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in out_of_reach]
        splits.append(pre_tokenizers.Split(Regex("|".join(cut)), "merged_with_previous"))
    return splits


def _refusal(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is no SentencePiece model ({reason}); give one, or a tokenizer.json")


def _require_supported(path: Path, model: SentencePieceModel) -> None:
    reserved = model.of_kind(Kind.CONTROL, Kind.UNKNOWN)
    faults = {
        f"its algorithm is {model.algorithm.name}": model.algorithm > Algorithm.BPE,
        "it has unused pieces": bool(model.of_kind(Kind.UNUSED)),
        "it keeps spaces unescaped": not model.escapes_spaces,
        "it puts the space behind a word": model.puts_space_behind,
        "two of its pieces are equal": len({piece.text for piece in model.pieces})
        < len(model.pieces),
        "a special piece has one character": any(len(text) < 2 for text in reserved),
    }
    for fault, is_there in faults.items():
        if is_there:
            raise ValueError(
                f"{path}: {fault}, for which there is no equal here; use a BPE or unigram model "
                f"without that, or, where its authors give a tokenizer.json, that file"
            )


def _piece(fields: Mapping[int, Value]) -> Piece:
    text, score = fields.get(1, b""), fields.get(2, 0.0)
    if not isinstance(text, bytes) or not text or not isinstance(score, float):
        raise ValueError("a piece has no text or no score")
    kind = fields.get(3, Kind.NORMAL)
    return Piece(text.decode(), score, Kind(kind))


def _message(value: Value) -> dict[int, Value]:
    if not isinstance(value, bytes):
        raise ValueError("a number stands where a message should")
    return dict(_fields(value))


def _fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of a protocol buffer message: number and value."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(message, position)
            yield number, value
        elif wire == 1:
            yield number, struct.unpack_from("<d", message, position)[0]
            position += 8
        elif wire == 2:
            size, position = _varint(message, position)
            if position + size > len(message):
                raise ValueError("it ends too early")
            yield number, message[position : position + size]
            position += size
        elif wire == 5:
            yield number, struct.unpack_from("<f", message, position)[0]
            position += 4
        else:
            raise ValueError(f"byte {position} starts no field")


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits per byte, the lowest first, and the position behind it."""
    number = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        number |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return number, position
    raise ValueError(f"byte {position} starts no number")
