"""SentencePiece models read without their package have the ids that the package gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from data_io.prompt_format import PromptFormat
from data_io.sentencepiece_model import SentencePieceModel, read_sentencepiece
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ, SPECIAL_TOKENS
from data_io.token_bytes import token_byte_lengths
from data_io.tokenizer_files import load_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")

ROOT = Path(__file__).resolve().parents[1]
LLAMA = {"byte_fallback": True, "remove_extra_whitespaces": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", **LLAMA},
    "bpe_unknown": {"model_type": "bpe"},
    "bpe_symbols": {
        "model_type": "bpe",
        "add_dummy_prefix": False,
        "user_defined_symbols": ["\n\n", "[SEP]", "\u2581\u2581"],
        **LLAMA,
    },
    "unigram": {"model_type": "unigram"},
    "unigram_bytes": {"model_type": "unigram", **LLAMA},
    "unigram_symbols": {
        "model_type": "unigram",
        "user_defined_symbols": ["[SEP]"],
        "byte_fallback": True,
    },
}
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains a small model with some settings; returns its file."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    texts = [line for line in corpus() if line.strip()]
    (folder / "corpus.txt").write_text("\n".join(texts), encoding="utf-8")

    def trained(name: str, **settings: Any) -> Path:
        path = folder / f"{name}.model"
        if not path.exists():
            sentencepiece.SentencePieceTrainer.train(
                input=str(folder / "corpus.txt"),
                model_prefix=str(folder / name),
                minloglevel=2,
                num_threads=1,
                **{
                    "vocab_size": 900,
                    "character_coverage": 0.995,
                    "normalization_rule_name": "identity",
                    "hard_vocab_limit": False,
                    **settings,
                },
            )
        return path

    return trained


def corpus() -> Iterator[str]:
    for path in (*sorted((ROOT / "data_io" / "tokenizer_samples").glob("*.txt")),):
        yield from path.read_text(encoding="utf-8").splitlines()
    yield from (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def texts_to_encode(count: int, symbols: tuple[str, ...] = ()) -> Iterator[str]:
    """Lines of the corpus cut anywhere, and noise: spaces, control pieces as text, rare letters."""
    draw = random.Random(0)
    lines = [line for line in corpus() if line.strip()]
    odd = ["<s>", "</s>", " <unk> ", "<0x0A>", "  a  b", "", " ", "\n\n", "\u2581", "\U0001f642"]
    odd += ["<|im_end|>", "\tx ", "ß", *symbols]
    for number in range(count):
        line = draw.choice(lines)
        start = draw.randrange(len(line))
        text = line[start : start + draw.randrange(120)]
        if number % 2:
            pieces = [draw.choice(odd), text, draw.choice(odd), draw.choice("ab é字ж"), text[:9]]
            text = "".join(pieces[draw.randrange(3) :])
        yield text


@pytest.mark.parametrize("name", SETTINGS)
def test_ids_are_those_of_the_package(name: str, train: Train) -> None:
    path = train(name, **SETTINGS[name])
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer.from_str(read_sentencepiece(path).to_str())  # as it is saved
    tokenizer.encode_special_tokens = True
    assert tokenizer.get_vocab_size() == original.vocab_size()
    symbols = tuple(SETTINGS[name].get("user_defined_symbols", ()))
    differing = []
    for text in texts_to_encode(1500, symbols):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        expected = original.encode(text)
        if ids != expected and not has_equal_score(original, ids, expected):
            differing.append((text, original.id_to_piece(expected), original.id_to_piece(ids)))
    assert not differing, differing[:3]


def has_equal_score(original: Any, ids: list[int], expected: list[int]) -> bool:
    """Unigram models cut some runs of spaces in two equally likely ways; rounding chooses one."""
    return sorted(ids) == sorted(expected) and original.decode(ids) == original.decode(expected)


def test_a_model_with_byte_fallback_gives_text_back(train: Train) -> None:
    tokenizer = read_sentencepiece(train("llama", **SETTINGS["llama"]))
    tokenizer.encode_special_tokens = True
    for text in texts_to_encode(300):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_a_llama_model_frames_prompts_once_special_tokens_are_added(train: Train) -> None:
    path = train("llama", **SETTINGS["llama"])
    with pytest.raises(ValueError, match=r"has no special tokens .*add_special=true adds them"):
        load_tokenizer(path)
    tokenizer, file, added = load_tokenizer(path, add_special=True)
    assert (file, added) == (path, SPECIAL_TOKENS)
    prompts = PromptFormat(tokenizer, BOQ, EOQ, EOA, CONDITION_TOKENS)
    for text in ("plain", "<s> </s> <unk> <0x0A>", "".join(SPECIAL_TOKENS), " two  spaces "):
        prompt = prompts.encode_prompt("direct", text)
        special = [tokenizer.token_to_id(token) for token in (*SPECIAL_TOKENS, "<s>", "</s>")]
        assert not set(prompt[2:-1]) & set(special)
        assert prompts.decode(prompt) == text
    assert token_byte_lengths(tokenizer, prompts.id_limit).sum() > 0


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_symbols_that_are_special_tokens_cannot_come_out_of_text(
    train: Train, model_type: str
) -> None:
    path = train(
        f"framing_{model_type}",
        model_type=model_type,
        user_defined_symbols=list(SPECIAL_TOKENS),
        **LLAMA,
    )
    tokenizer, _, added = load_tokenizer(path)
    assert added == ()
    prompts = PromptFormat(tokenizer, BOQ, EOQ, EOA, CONDITION_TOKENS)
    ids = prompts.encode_response(f"a{EOA}b <s>{EOQ}</s>")[:-1]
    names = {*SPECIAL_TOKENS, "<s>", "</s>", "<unk>"}
    assert not names & {tokenizer.id_to_token(token_id) for token_id in ids}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 0.9, 0.999])
def test_a_broken_file_is_named(train: Train, tmp_path: Path, share: float) -> None:
    content = train("llama", **SETTINGS["llama"]).read_bytes()
    broken = tmp_path / "cut.model"
    broken.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"cut\.model is no SentencePiece model \(.*give one"):
        read_sentencepiece(broken)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    for content in (b"{}", b"text\n" * 99, bytes(range(256)), b"\x0a\x00", b"\x80" * 20):
        (tmp_path / "other.model").write_bytes(content)
        with pytest.raises(ValueError, match="is no SentencePiece model"):
            SentencePieceModel.read(tmp_path / "other.model")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model_type": "char"}, "algorithm is CHAR"),
        ({"model_type": "word"}, "algorithm is WORD"),
        ({"treat_whitespace_as_suffix": True}, "the space behind a word"),
    ],
)
def test_what_has_no_equal_is_refused(train: Train, settings: dict[str, Any], told: str) -> None:
    path = train(told.replace(" ", "_"), **settings)
    with pytest.raises(ValueError, match=told):
        read_sentencepiece(path)
