"""Bytes of each token: they add up to the text, or the tokenizer is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from data_io.byte_tokenizer import byte_tokenizer, write_byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.special_tokens import BOQ, EOQ, SPECIAL_TOKENS
from data_io.token_bytes import PROBE, token_byte_lengths

GOLDEN = Path(__file__).parent / "golden" / "sft" / "edge" / "tokenizer.json"
CORPUS = [
    "the  theory of the thing\n\tthen thaws",
    "über Größe: naïve café, 東京 東京 🙂🙂",
    "a a a",
]
texts = st.text(max_size=40) | st.lists(st.sampled_from(CORPUS)).map(" ".join)


def trained_byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def sentencepiece_style(**options: bool) -> Tokenizer:
    """Characters and merges with the sign for a space, and bytes for everything else."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"thexü", "th", "the"]
    vocab = {piece: index for index, piece in enumerate((*pieces, "▁the", "é"))}
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, **options)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return tokenizer


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    vocab = tokenizer.get_vocab()
    return [vocab[token] for token in tokens]


TOKENIZERS = {
    "trained byte level": trained_byte_level(),
    "bytes": byte_tokenizer(),
    "sentencepiece style": sentencepiece_style(byte_fallback=True),
}
LENGTHS = {name: token_byte_lengths(made, 512) for name, made in TOKENIZERS.items()}


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(derandomize=True, deadline=None)
@given(text=texts)
def test_lengths_add_up_to_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    normalized = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    assert LENGTHS[name][ids].sum() == len(normalized.replace("▁", " ").encode())


def test_long_tokens_count_all_their_bytes() -> None:
    tokenizer, lengths = TOKENIZERS["trained byte level"], LENGTHS["trained byte level"]
    assert lengths.max() > 4
    assert lengths[tokenizer.encode(" the").ids].tolist() == [4]
    assert lengths[TOKENIZERS["bytes"].encode("🙂").ids].tolist()[-4:] == [1] * 4


def test_special_tokens_and_padding_stand_for_nothing() -> None:
    lengths = LENGTHS["bytes"]
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [0] * len(SPECIAL_TOKENS) + [1] * 256 + [0] * 225


def test_spaces_and_fallback_bytes_count_one() -> None:
    tokenizer, lengths = TOKENIZERS["sentencepiece style"], LENGTHS["sentencepiece style"]
    ids = ids_of(tokenizer, "▁", "▁the", "ü", "<0x0A>", "<0xE6>")
    assert lengths[ids].tolist() == [1, 4, 2, 1, 1]


def test_it_takes_a_file_or_its_folder(tmp_path: Path) -> None:
    tokenizer_file = write_byte_tokenizer(tmp_path)
    for path in (tokenizer_file, tmp_path):
        assert np.array_equal(token_byte_lengths(path, 512), LENGTHS["bytes"])
    assert token_byte_lengths(GOLDEN, 2048).sum() > 0
    with pytest.raises(ValueError, match=r"no tokenizer at .*nowhere; give a tokenizer.json or"):
        token_byte_lengths(tmp_path / "nowhere", 512)


def test_added_tokens_count_as_their_text_unless_they_frame_prompts() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<call>", "<turn>"])
    ids = ids_of(tokenizer, "<call>", "<turn>")
    assert token_byte_lengths(tokenizer, 512)[ids].tolist() == [6, 6]
    framed = PromptFormat(tokenizer, BOQ, EOQ, "<turn>", {}).tokenizer
    assert token_byte_lengths(framed, 512)[ids].tolist() == [6, 0]


def test_the_probe_has_every_byte_of_utf8() -> None:
    assert set(PROBE.encode()) == set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


def without_alphabet() -> Tokenizer:
    """Bytes that it was not trained on vanish."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def splitting_at_white_space() -> Tokenizer:
    tokenizer = byte_tokenizer()
    split, to_bytes = pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        pytest.param(without_alphabet(), id="bytes vanish"),
        pytest.param(splitting_at_white_space(), id="white space vanishes"),
        pytest.param(sentencepiece_style(byte_fallback=False), id="unknown characters"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"loses characters or white space.*use a byte-level"):
        token_byte_lengths(tokenizer, 512)


def test_an_added_token_that_takes_white_space_along_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<call>", rstrip=True)])
    with pytest.raises(ValueError, match=r"'<call>' takes white space along"):
        token_byte_lengths(tokenizer, 512)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=256 leaves out ids.*up to 286"):
        token_byte_lengths(byte_tokenizer(), 256)
