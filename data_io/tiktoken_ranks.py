"""Vocabularies of tiktoken encodings (the GPT and nanoGPT families): bytes with ranks, no pickles.

An encoding in memory becomes a tokenizer with the same ids, which `save` writes as tokenizer.json:

    import pickle
    from data_io.tiktoken_ranks import ranks_tokenizer
    encoding = pickle.load(open("tokenizer.pkl", "rb"))  # runs the code in it: only what you trust
    ranks_tokenizer(
        encoding._mergeable_ranks, encoding._pat_str, encoding._special_tokens
    ).save("tokenizer.json")
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from data_io.merges import merges_of

# Of GPT-4's encoding, cl100k_base
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RANKS_LINE = re.compile(rb"(?P<token>[A-Za-z0-9+/]+={0,2}) (?P<rank>[0-9]+)\s*")


def read_ranks(path: Path) -> dict[bytes, int]:
    """A `.tiktoken` file: on each line a token in base 64, a space, its rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        match = RANKS_LINE.fullmatch(line)
        try:
            assert match is not None
            ranks[base64.b64decode(match["token"], validate=True)] = int(match["rank"])
        except (AssertionError, binascii.Error):
            raise ValueError(
                f"{path}, line {number}: {line[:40]!r} is no token in base 64 with its rank; give "
                "a file as tiktoken publishes it"
            ) from None
    if not ranks:
        raise ValueError(f"{path} holds no tokens; give a file as tiktoken publishes it")
    return ranks


def ranks_tokenizer(
    ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int] | None = None
) -> Tokenizer:
    """Byte-level BPE with the ids of the ranks; `pattern` cuts text, `special` are its tokens."""
    special = special or {}
    as_text = byte_characters()
    tokens = {"".join(as_text[byte] for byte in token): rank for token, rank in ranks.items()}
    missing = [byte for byte in range(256) if as_text[byte] not in tokens]
    if missing:
        raise ValueError(f"the ranks lack the bytes {missing[:8]}; every byte must be a token")
    model = models.BPE(vocab={**tokens, **special}, merges=merges_of(tokens), ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_in_oniguruma(pattern)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in sorted(special, key=special.__getitem__)]
    )
    return tokenizer


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: a visible one itself,
    the others in order from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def _in_oniguruma(pattern: str) -> str:
    """What tiktoken's patterns mean, for the engine of `tokenizers`: there `$` ends lines too, and
    `{1,3}+` repeats once more instead of being possessive."""
    pattern = re.sub(r"((?:\\p\{\w+\}|\[[^\]]*\]|\\?\w)\{\d+,\d*\})\+", r"(?>\1)", pattern)
    return pattern.replace("$", r"\z")
