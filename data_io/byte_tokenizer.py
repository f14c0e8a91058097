"""A tokenizer without training: one token per byte, after the published special tokens.

For toy data and tests. Any text encodes and decodes without loss: nothing is normalized or split.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from data_io.special_tokens import SPECIAL_TOKENS


def byte_tokenizer() -> Tokenizer:
    """Special tokens with ids from 0, then the 256 bytes: BPE that never merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def write_byte_tokenizer(folder: Path) -> Path:
    """Writes `tokenizer.json`, and the `config.json` by which transformers' AutoTokenizer reads it.

    AutoTokenizer normalizes to NFC of its own accord; text that is NFC gets the same ids. Returns
    the path of tokenizer.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}) + "\n")
    tokenizer_file = folder / "tokenizer.json"
    byte_tokenizer().save(str(tokenizer_file))
    return tokenizer_file
