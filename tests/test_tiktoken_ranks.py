"""Byte-level ranks make a tokenizer with the ids that merging lowest ranks first gives."""

from __future__ import annotations

import base64
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from tokenizers import Tokenizer

from data_io.tiktoken_ranks import GPT4_PATTERN, ranks_tokenizer, read_ranks

SAMPLES = Path(__file__).resolve().parents[1] / "data_io" / "tokenizer_samples"
PATTERNS = {
    "gpt4": GPT4_PATTERN,
    "two_digits": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"""
    r"""| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+""",
    "possessive": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"""
    r"""| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
}


def texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(SAMPLES.glob("*.txt"))]


def learned_ranks(count: int) -> dict[bytes, int]:
    """Ranks as byte pair encoding learns them: the most frequent pair becomes the next token."""
    words = Counter(word.encode() for text in texts() for word in regex.findall(r"\s?\w+", text))
    parts = {word: [bytes([byte]) for byte in word] for word in words}
    ranks = {bytes([byte]): byte for byte in range(256)}
    for _ in range(count):
        pairs = Counter[tuple[bytes, bytes]]()
        for word, pieces in parts.items():
            for pair in pairwise(pieces):
                pairs[pair] += words[word]
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[b"".join(best)] = len(ranks)
        parts = {word: merged(pieces, best) for word, pieces in parts.items()}
    return ranks


def merged(pieces: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    result: list[bytes] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return result


def reference_ids(text: str, ranks: dict[bytes, int], pattern: str) -> list[int]:
    """The definition: within each match, again and again the adjacent pair of lowest rank."""
    ids = []
    for word in regex.findall(pattern, text):
        pieces = [bytes([byte]) for byte in word.encode()]
        while word.encode() not in ranks and len(pieces) > 1:
            joined = [one + other for one, other in pairwise(pieces)]
            first = min(range(len(joined)), key=lambda k: ranks.get(joined[k], len(ranks)))
            if joined[first] not in ranks:
                break
            pieces[first : first + 2] = [joined[first]]
        ids += [ranks[word.encode()]] if word.encode() in ranks else [ranks[p] for p in pieces]
    return ids


RANKS = learned_ranks(150)
for token in (b"12", b"34", b"1234", b"ab", b"qzx"):  # no merges lead to the last
    RANKS.setdefault(token, len(RANKS))


@pytest.mark.parametrize("name", PATTERNS)
def test_ids_are_those_of_the_definition(name: str) -> None:
    special = {"<|end|>": len(RANKS), "<|far|>": len(RANKS) + 9}
    made = ranks_tokenizer(RANKS, PATTERNS[name], special)
    tokenizer = Tokenizer.from_str(made.to_str())  # as it is saved
    tokenizer.encode_special_tokens = True
    assert {token: tokenizer.token_to_id(token) for token in special} == special
    draw = random.Random(0)
    whole = "".join(texts())
    for number in range(400):
        start = draw.randrange(len(whole))
        text = whole[start : start + draw.randrange(60)]
        text += "".join(draw.choice("a1234567 \n\r\té'sS🙂<|end|>") for _ in range(number % 9))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == reference_ids(text, RANKS, PATTERNS[name]), text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("12341234", r"\p{N}{1,3}+"),  # three digits at a time
        ("12341234", r"[0-9]{1,3}+|."),
        ("ab\nab", r"ab$|a|b|\n"),  # the end of the text, not of a line
        ("qzx qzxa", r"\w+|\s"),  # a whole word that is a token is that token
    ],
)
def test_what_engines_read_differently_is_as_defined(text: str, pattern: str) -> None:
    ids = ranks_tokenizer(RANKS, pattern).encode(text).ids
    assert ids == reference_ids(text, RANKS, pattern)


def test_a_file_of_ranks_is_read(tmp_path: Path) -> None:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in RANKS.items()]
    (tmp_path / "a.tiktoken").write_text("\n".join(lines) + "\n")
    assert read_ranks(tmp_path / "a.tiktoken") == RANKS


@pytest.mark.parametrize("line", ["IQ==", "IQ== x", "I 3", "!!!! 3", "{}", "IQ== 1 2"])
def test_a_line_that_is_no_rank_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.tiktoken").write_text(f"IQ== 0\n{line}\n")
    with pytest.raises(ValueError, match=r"a\.tiktoken, line 2: .* is no token in base 64"):
        read_ranks(tmp_path / "a.tiktoken")


def test_an_empty_file_and_missing_bytes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tiktoken").write_text("")
    with pytest.raises(ValueError, match="holds no tokens"):
        read_ranks(tmp_path / "a.tiktoken")
    with pytest.raises(ValueError, match=r"lack the bytes \[0, 1, 2"):
        ranks_tokenizer({b"a": 0}, GPT4_PATTERN)
