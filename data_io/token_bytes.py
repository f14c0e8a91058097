"""How many bytes of text each token id stands for: what turns a loss per token into bits per byte.

Special tokens stand for none. A space that a tokenizer puts before a text of its own accord counts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders

FALLBACK_BYTE = re.compile("<0x[0-9A-F]{2}>")
# Every byte that UTF-8 has, each length of character, and white space alone, doubled and at the end
PROBE = (
    "  two  spaces\n\n\ttab\r\n "
    + "".join(map(chr, range(0x100)))
    + "".join(chr(lead << 6) for lead in range(0x04, 0x20))  # of characters of two bytes
    + "".join(chr(lead << 12 | 0xFC0) for lead in range(0x10) if lead != 0xD)  # three
    + "\ud7ff\U0001f600\U00050000\U00090000\U000d0000\U00100000 \n"  # 0xD again, and four
)


def token_byte_lengths(tokenizer: Tokenizer | Path, vocab_size: int) -> NDArray[np.int32]:
    """[vocab_size] bytes of each id; 0 for special tokens and for ids that the tokenizer lacks.

    Over the ids of a text they add up to the UTF-8 length of what the tokenizer's normalizer makes
    of it. A path is a tokenizer.json or its folder. Tokenizers that lose part of a text are
    refused.
    """
    if isinstance(tokenizer, Path):
        tokenizer = _read_tokenizer(tokenizer)
    vocab = tokenizer.get_vocab()
    last_id = max(vocab.values())
    if last_id >= vocab_size:
        raise ValueError(
            f"{vocab_size=} leaves out ids of the tokenizer, which go up to {last_id}; give the "
            "vocabulary of the model, padding included"
        )
    settings = json.loads(tokenizer.to_str())
    kinds = _kinds(settings["decoder"]) | _kinds(settings["pre_tokenizer"])
    lengths = np.zeros(vocab_size, np.int32)
    if "ByteLevel" in kinds:
        for token, token_id in vocab.items():
            lengths[token_id] = len(token)  # of a byte each
    else:
        decoder, has_bytes = tokenizer.decoder, settings["model"].get("byte_fallback", False)
        for token, token_id in vocab.items():
            is_byte = has_bytes and FALLBACK_BYTE.fullmatch(token)
            lengths[token_id] = 1 if is_byte else _decoded_length(decoder, token)
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        lengths[token_id] = _added_length(token)
    _require_lossless(tokenizer, lengths)
    return lengths


def _read_tokenizer(path: Path) -> Tokenizer:
    tokenizer_file = path / "tokenizer.json" if path.is_dir() else path
    if not tokenizer_file.is_file():
        raise ValueError(f"no tokenizer at {tokenizer_file}; give a tokenizer.json or its folder")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _kinds(part: object) -> set[str]:
    """The types of a part of tokenizer.json and of the parts of a sequence in it."""
    if isinstance(part, list):
        return set[str]().union(*map(_kinds, part))
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))}.union(*map(_kinds, part.values()))


def _decoded_length(decoder: decoders.Decoder | None, token: str) -> int:
    """Bytes of a token within a text: decoders strip a leading space at its start alone."""
    if decoder is None:
        return len(token.encode())
    return len(decoder.decode(["a", token]).encode()) - 1


def _added_length(token: AddedToken) -> int:
    if token.special:
        return 0
    if token.lstrip or token.rstrip:
        raise ValueError(
            f"the added token {token.content!r} takes white space along (lstrip, rstrip), so its "
            "bytes cannot be counted; make it special, or strip nothing"
        )
    return len(token.content.encode())


def _require_lossless(tokenizer: Tokenizer, lengths: NDArray[np.int32]) -> None:
    """Holds the promise of `token_byte_lengths` against a text that has every byte."""
    normalizer = tokenizer.normalizer
    text = normalizer.normalize_str(PROBE) if normalizer is not None else PROBE
    expected = len(text.replace("\u2581", " ").encode())  # sentencepiece's sign for a space
    counted = int(lengths[tokenizer.encode(PROBE, add_special_tokens=False).ids].sum())
    if counted != expected:
        raise ValueError(
            f"the tokenizer's tokens stand for {counted} bytes of a text of {expected}: it loses "
            "characters or white space, so there are no bits per byte; use a byte-level tokenizer "
            "with the whole byte alphabet, or one with byte fallback"
        )
