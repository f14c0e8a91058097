"""Training a tokenizer: as published, the same every time, and of no more text than asked."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_io.prompt_format import PromptFormat
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ, SPECIAL_TOKENS
from data_io.train_tokenizer import TrainingTexts, TrainOptions, main

WORDS = (
    "the counting of 1234 apples",
    "isn't hard,",
    "naïve Zoë says:",
    "über-fast\tcafé!\n\n",
    "x += 1",
)
TRICKY = "Don't 12345 ÅÅ e\u0301 \u00e9  \n\n\t<|im_end|> 你好 😀\u0000 \u2028 ﬁ"


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [
        {"instruction": " ".join(rng.choices(WORDS, k=4)), "response": f"{k} " * 3}
        for k in range(count)
    ]


def write(path: Path, content: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write(folder / "data" / "a.jsonl", rows(200))
    main([str(folder / "data"), "-o", str(folder / "tok"), "--vocab-size", "340"])
    return folder / "tok"


def test_the_tokenizer_is_built_as_published(trained: Path) -> None:
    made = json.loads((trained / "tokenizer.json").read_text())
    assert [(t["id"], t["content"]) for t in made["added_tokens"]] == list(
        enumerate(SPECIAL_TOKENS)
    )
    assert all(token["special"] for token in made["added_tokens"])
    assert made["normalizer"] == {"type": "NFC"}
    split, byte_level = made["pre_tokenizer"]["pretokenizers"]
    assert split["type"] == "Split" and split["behavior"] == "Isolated" and not split["invert"]
    assert byte_level["type"] == "ByteLevel"
    assert not byte_level["add_prefix_space"] and not byte_level["use_regex"]
    assert made["decoder"]["type"] == made["post_processor"]["type"] == "ByteLevel"
    assert len(made["model"]["vocab"]) == 340
    assert json.loads((trained / "config.json").read_text()) == {"model_type": "qwen3"}
    assert sorted(path.name for path in trained.iterdir()) == ["config.json", "tokenizer.json"]


def test_every_byte_survives(trained: Path) -> None:
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    for text in (*map(chr, range(0x250)), "\U0010ffff", "plain", "  two  spaces\r\n"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == tokenizer.normalizer.normalize_str(text)
    assert [len(tokenizer.encode(text).ids) for text in ("5", "57", "578")] == [1, 2, 3]


def test_transformers_and_prompts_read_it(trained: Path) -> None:
    prompts = PromptFormat.load(trained, boq=BOQ, eoq=EOQ, eoa=EOA, conditions=CONDITION_TOKENS)
    theirs = AutoTokenizer.from_pretrained(trained)
    ours = prompts.encode_texts([TRICKY])[0]
    assert max(ours) >= len(SPECIAL_TOKENS) <= min(ours)
    assert theirs.encode(TRICKY, add_special_tokens=False, split_special_tokens=True) == ours
    assert [theirs.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(31))


def test_the_same_texts_make_the_same_file(trained: Path, tmp_path: Path) -> None:
    data = trained.parent / "data"
    main([f"sources={data}", f"output={tmp_path / 'again'}", "vocab_size=340"])
    again = (tmp_path / "again" / "tokenizer.json").read_bytes()
    assert again == (trained / "tokenizer.json").read_bytes()
    main([f"sources={data}", f"output={tmp_path / 'again'}", "vocab_size=320"])
    assert Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json")).get_vocab_size() == 320
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def texts(tmp_path: Path, **options: object) -> list[str]:
    values = {"sources": (tmp_path / "data",), "output": tmp_path, **options}
    return list(TrainingTexts(TrainOptions.model_validate(values)))


def test_texts_are_cut_and_those_of_limited_files_are_drawn(tmp_path: Path) -> None:
    write(tmp_path / "data" / "big" / "a.jsonl", rows(50))
    write(tmp_path / "data" / "small.jsonl", rows(3, seed=1))
    config = tmp_path / "prefix_config.yaml"
    config.write_text("- prefix: big__\n  max_per_file: 6\n")
    everything = texts(tmp_path)
    assert len(everything) == 2 * 53
    drawn = texts(tmp_path, prefix_config_path=config, limit_mul_factor=2)
    assert drawn[12:] == everything[100:] and len(drawn) == 18
    places = [everything.index(text) for text in drawn[:12]]
    assert places == sorted(set(places)) and places != list(range(12))
    again = texts(tmp_path, prefix_config_path=config, limit_mul_factor=2)
    other = texts(tmp_path, prefix_config_path=config, limit_mul_factor=2, seed=1)
    assert again == drawn != other
    assert texts(tmp_path, prefix_config_path=config, limit_mul_factor=17) == everything
    assert max(map(len, texts(tmp_path, truncate_len=5))) == 5


def test_every_layout_is_read_and_bad_rows_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    path = tmp_path / "data" / "a.jsonl"
    path.parent.mkdir()
    bad = {"instruction": 3, "response": "x"}
    path.write_text("\n".join(map(json.dumps, [chat, {"text": "document"}, bad])))
    assert texts(tmp_path) == ["hi", "ho", "document"]
    main([str(path.parent), "-o", str(tmp_path / "tok")])
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'tok' / 'tokenizer.json'}\n"
    assert "rows left out: 1 field is no text" in told.err
    assert "fewer tokens than vocab_size=65536" in told.err


def test_a_broken_source_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is no JSON"):
        main([str(path), "-o", str(tmp_path / "tok")])
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["vocab_size=287"], "vocab_size=287 leaves no room for merges .* use more than 287"),
        (["special_tokens=<a>,<b>,<a>"], "special_tokens has <a> more than once"),
        (["tokenizer_type=unigram"], "tokenizer_type=unigram: Input should be 'bpe'"),
        (["reader=chat"], "reader='chat' is none of"),
        (["-p", "absent.yaml"], "prefix_config_path=absent.yaml does not exist"),
        (["output=."], "exists and holds other things than config.json and tokenizer.json"),
        ([], "no text in .*: 1 missing field"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, options: list[str], fault: str) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "and no answer"}])
    given = [] if "output=." in options else [f"output={tmp_path / 'tok'}"]
    with pytest.raises(ValueError, match=fault):
        main([str(path), *given, *options])
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
