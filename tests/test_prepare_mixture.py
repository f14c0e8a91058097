"""The shipped chat mixture on a small mirror: what lands in sampled data and in shards."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from mixture_cases import write_mirror
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel

from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.import_shards import main as import_shards
from data_io.prepare_mixture import drawn, main
from data_io.prompt_format import PromptFormat
from data_io.records import Row
from data_io.sampled_format import SampledData

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "config" / "data" / "mixtures" / "sft.yaml"


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mirror(tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped one with few made rows, and few drawn ones."""
    content = yaml.safe_load(SHIPPED.read_text())
    for part, name, limit in (
        *(("train", name, 50) for name in ("simple_spelling", "spelling_bee")),
        *(("validation", name, 5) for name in ("mmlu", "gsm8k")),
    ):
        (source,) = (each for each in content[part] if each["name"] == name)
        assert source["limit"] > limit
        source["limit"] = limit
    path = tmp_path_factory.mktemp("mixture") / "chat.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def texts_of(folder: Path) -> list[tuple[str, str]]:
    """Prefix and response of each example of epoch 0, special tokens spelled, sorted."""
    data = SampledData.open(folder)
    index, tokens = data.epoch(0), data.tokens()
    tokenizer = PromptFormat.from_info(data.metadata.tokenizer_info, folder).tokenizer
    found = []
    for at in range(len(index)):
        parts = (
            tokens[start : start + size].tolist()
            for start, size in (
                (index.inst_start[at], index.inst_len[at]),
                (index.resp_start[at], index.resp_len[at]),
            )
        )
        prefix, response = (tokenizer.decode(ids, skip_special_tokens=False) for ids in parts)
        found.append((prefix, response))
    return sorted(found)


@pytest.fixture(scope="module")
def made(
    mixture: Path, mirror: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("made") / "chat"
    main([f"mixture={mixture}", f"data_dir={mirror}", f"tokenizer={tokenizer}",
          f"output={output}", "epochs=2"])  # fmt: skip
    return output


def test_each_source_comes_as_often_as_the_mixture_says(made: Path) -> None:
    texts = texts_of(made)
    for pattern, count in (
        (
            r">question \d+ 0<.*>question \d+ 1<.*>question \d+ 2<",
            13,
        ),  # 2, 5, ... 32, and 302 twice
        ("Multiple Choice question", 30),
        ("Twice 4, and one", 2),
        ("question 301 1", 2),  # of identity
        ("Spell the word", 50),
        ("How many ", 50),
    ):
        assert sum(bool(re.search(pattern, prefix)) for prefix, _ in texts) == count, pattern
    answers = [response for prefix, response in texts if "Twice 4, and one" in prefix]
    assert answers == 2 * [
        "It is 2*4 = <tool_call>2*4</tool_call><tool_response>8</tool_response>8 apples.\n"
        "Then 8+1=<tool_call>8+1</tool_call><tool_response>9</tool_response>9.\n#### 9<|box_end|>"
    ]


def test_epochs_hold_the_same_in_other_orders(made: Path) -> None:
    data = SampledData.open(made)
    first, second = (data.epoch(number).resp_start.tolist() for number in range(2))
    assert first != second and sorted(first) == sorted(second)


def test_the_validation_part_is_drawn_and_kept_out_of_training(made: Path) -> None:
    held_out, train = texts_of(made / "validation"), texts_of(made)
    counts = [sum(word in prefix for prefix, _ in held_out) for word in ("Multiple", "Twice")]
    assert counts == [5, 5] and len(held_out) == 5 + 5 + 21
    asked = {re.search(r"question (\d+) 0", prefix) for prefix, _ in held_out}
    numbers = {match[1] for match in asked if match}
    assert numbers == {str(number) for number in range(35, 45)}
    assert not any(f"question {number} 0<" in prefix for prefix, _ in train for number in numbers)


def test_results_of_tools_are_masked(made: Path) -> None:
    data = SampledData.open(made)
    tokens, scored = data.tokens(), data.scored()
    assert scored is not None
    prompt_format = PromptFormat.from_info(data.metadata.tokenizer_info, made)
    passed = prompt_format.tokenizer.decode(tokens[scored == 0].tolist(), skip_special_tokens=False)
    assert re.fullmatch(r"(<tool_response>\d+</tool_response>)+", passed)


def test_shards_hold_the_same_with_masks(
    made: Path, mixture: Path, mirror: Path, tokenizer: Path, tmp_path: Path
) -> None:
    main([f"mixture={mixture}", f"data_dir={mirror}", f"tokenizer={tokenizer}",
          f"output={tmp_path / 'bin'}", "format=bin", "shard_tokens=4000"])  # fmt: skip
    names = sorted(path.name for path in (tmp_path / "bin").iterdir())
    assert names[:2] == ["chat_train_000001.bin", "chat_train_000001_mask.bin"]
    assert names[-4:] == ["chat_val_000000.bin", "chat_val_000000_mask.bin", "config.json",
                          "tokenizer.json"]  # fmt: skip
    import_shards([f"source={tmp_path / 'bin'}", f"output={tmp_path / 'back'}",
                   "context_size=2050", f"tokenizer={tokenizer}"])  # fmt: skip
    for part in ("", "validation"):
        back = texts_of(tmp_path / "back" / part)
        expected = [(f"<|endoftext|>{prefix}", text) for prefix, text in texts_of(made / part)]
        assert back == expected
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["back", "bin"]


def test_a_missing_optional_source_is_reported(
    mixture: Path, mirror: Path, tokenizer: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for folder in mirror.iterdir():
        if folder.is_dir() and folder.name != "english-words":
            (tmp_path / folder.name).symlink_to(folder)
    main([f"mixture={mixture}", f"data_dir={tmp_path}", f"tokenizer={tokenizer}",
          f"output={tmp_path / 'out'}"])  # fmt: skip
    out, err = capsys.readouterr()
    for name in ("identity", "simple_spelling", "spelling_bee"):
        assert f"| {name} | not there |" in out and f"left out: {name}: there is no" in err
    assert "mark the source as optional" not in err
    places = err.partition("(looked for ")[2].partition(")")[0].split(", ")
    assert places == [
        str(tmp_path / "identity_conversations.jsonl"),
        "identity_conversations.jsonl",
    ]
    assert "| gsm8k | 12 | 0 | 12 x 2 |" in out


def test_a_missing_source_that_is_needed_ends_it(
    mixture: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="smoltalk: there is no test part"):
        main([f"mixture={mixture}", f"data_dir={tmp_path}", f"tokenizer={tokenizer}",
              f"output={tmp_path / 'out'}"])  # fmt: skip
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("bos=<|begin|>", "is no token of the tokenizer"),
        ("bos=<|im_start|>", "nowhere else in it"),
    ],
)
def test_a_bos_that_would_not_do_is_refused(
    mixture: Path, mirror: Path, tokenizer: Path, tmp_path: Path, option: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        main([f"mixture={mixture}", f"data_dir={mirror}", f"tokenizer={tokenizer}",
              f"output={tmp_path / 'out'}", "format=bin", option])  # fmt: skip
    assert not any(tmp_path.iterdir())


def test_a_condition_without_token_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "mixture.yaml"
    path.write_text("train: [{name: own, source: rows.jsonl, condition: polite}]")
    with pytest.raises(ValueError, match=r"mixture\.yaml: own: condition='polite'"):
        main([f"mixture={path}", f"tokenizer={tokenizer}", f"output={tmp_path / 'out'}"])


def test_records_are_drawn_evenly() -> None:
    hits = np.zeros(10)
    for seed in range(400):
        placed = ((str(number), Row("direct", "q", str(number))) for number in range(10))
        found = [int(where) for where, _ in drawn(placed, 3, random.Random(seed))]
        assert found == sorted(set(found)) and len(found) == 3
        hits[found] += 1
    assert hits.min() > 80 and hits.max() < 160  # 120 expected, deviation 9


def test_a_tokenizer_without_special_tokens_gets_them_on_request(
    mixture: Path, mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Tokenizer(models.BPE({letter: k for k, letter in enumerate(ByteLevel.alphabet())}, []))
    bare.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bare.save(str(tmp_path / "bare.json"))
    arguments = [f"mixture={mixture}", f"data_dir={mirror}", f"tokenizer={tmp_path}/bare.json",
                 f"output={tmp_path / 'out'}", "format=bin"]  # fmt: skip
    with pytest.raises(ValueError, match=r"has no special tokens .* add_special=true"):
        main(arguments)
    main([*arguments, "add_special=true"])
    assert capsys.readouterr().err.endswith(f"{tmp_path / 'out'} is made\n")
    made = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert (made.token_to_id("<|PAD|>"), made.token_to_id("</think>")) == (256, 286)
