"""Overlap of evaluation items with training data: planted items are found, others are not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_cases import GOLDEN_DATA

from data_io.byte_tokenizer import byte_tokenizer, write_byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.sampled_format import EpochIndex, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from evaluation.contamination import ContaminationOptions, check, main
from evaluation.mirror import LocalMirror
from evaluation.ngrams import NgramSet, WordHashes, hash_ngrams, hash_words, words_of
from evaluation.overlap import look_at
from evaluation.settings import config_path, read_settings

FILLER = ("the quick brown fox", "jumps over the lazy dog again and again")
Example = tuple[str, str]


def write_data(folder: Path, *epochs: Sequence[Example]) -> Path:
    """Sampled data of texts; an example of several epochs lies in tokens.npy once."""
    prompt_format = PromptFormat(byte_tokenizer(), BOQ, EOQ, EOA, dict(CONDITION_TOKENS))
    info = TokenizerInfo(
        tokenizer_path=str(folder),
        boq=BOQ,
        eoq=EOQ,
        eoa=EOA,
        condition_mapping=dict(CONDITION_TOKENS),
        vocab_size=prompt_format.vocab_size,
    )
    places: dict[Example, list[int]] = {}
    with SampledWriter(folder, info, max_seq_len=4096) as writer:
        write_byte_tokenizer(writer.staging)
        for example in dict.fromkeys(each for epoch in epochs for each in epoch):
            prompt = prompt_format.encode_prompt("direct", example[0])
            response = prompt_format.encode_response(example[1])
            starts = [int(writer.add_tokens(np.array(ids))) for ids in (prompt, response)]
            places[example] = [starts[0], len(prompt), starts[1], len(response)]
        for epoch in epochs:
            columns = np.array([places[example] for example in epoch]).T
            writer.add_epoch(EpochIndex(*columns))
    return folder


def questions(dataset: str, column: str, config: str, split: str = "test") -> list[str]:
    text = (GOLDEN_DATA / dataset / config / f"{split}.jsonl").read_text()
    return [json.loads(line)[column] for line in text.splitlines()]


def report(folder: Path, **options: Any) -> Mapping[str, Any]:
    given = {"data_path": folder, "data_dir": GOLDEN_DATA, "run_only": ("GSM8k",), **options}
    return check(ContaminationOptions.model_validate(given))


def test_planted_items_are_found_and_others_are_not(tmp_path: Path) -> None:
    asked = questions("gsm8k", "question", "main")
    first, third = asked[0], asked[2]
    spoiled = " ".join(third.split()).upper().replace(" ", "  ")  # words are what counts
    planted = [(f"Please solve. {first}", "18"), ("Recall a question.", f"It was: {spoiled}")]
    data = write_data(tmp_path / "d", [FILLER] * 3 + planted[:1], [*planted, FILLER])
    found = report(data, n=8)["benchmarks"]["GSM8k"]
    assert set(found["shares"]) == {"test/0", "test/2"}
    assert found["shares"]["test/0"] == found["shares"]["test/2"] == 1
    assert (found["overlapping"], found["mostly"], found["same_prompt"]) == (2, 2, 0)
    worst = {each["id"]: each for each in found["worst"]}
    assert "Please solve." in worst["test/0"]["text"]
    assert "Recall a question." in worst["test/2"]["text"]
    assert (worst["test/2"]["epoch"], worst["test/2"]["example"]) == (1, 1)


def test_examples_of_several_epochs_are_read_once(tmp_path: Path) -> None:
    other = ("something else", "altogether")
    data = write_data(tmp_path / "d", [FILLER, other], [other, FILLER])
    found = report(data)
    assert (found["examples"], found["repeated"]) == (2, 2)
    assert report(data, epochs=1)["examples"] == 2
    assert report(data, max_examples=1)["examples"] == 2  # another one in each epoch


def test_a_part_of_an_item_counts_by_its_ngrams(tmp_path: Path) -> None:
    words = questions("gsm8k", "question", "main")[0].split()
    data = write_data(tmp_path / "d", [(" ".join(words[:6]), "x")])
    found = report(data, n=4)["benchmarks"]["GSM8k"]
    total = len(words_of(" ".join(words))) - 4 + 1
    assert found["shares"]["test/0"] == pytest.approx(3 / total, abs=1e-3)
    assert (found["overlapping"], found["mostly"], found["ngrams_found"]) == (1, 0, 3)


def test_an_item_shorter_than_n_must_stand_there_whole(tmp_path: Path) -> None:
    asked = questions("gsm8k", "question", "main")
    short = min(asked, key=lambda text: len(words_of(text)))
    count = len(words_of(short))
    whole = write_data(tmp_path / "whole", [(f"so: {short}", "x"), (short, "y")])
    part = write_data(tmp_path / "part", [(" ".join(words_of(short)[: count - 1]), "x")])
    item = f"test/{asked.index(short)}"
    found = report(whole, n=count + 5)["benchmarks"]["GSM8k"]
    assert found["shares"] == {item: 1.0}
    assert found["same_prompt"] == 1
    assert found["short_items"] > 0
    assert report(part, n=count + 5)["benchmarks"]["GSM8k"]["shares"] == {}


def test_ngrams_do_not_reach_into_the_next_example(tmp_path: Path) -> None:
    words = questions("gsm8k", "question", "main")[0].split()
    data = write_data(tmp_path / "d", [(words[0], words[1]), (words[2], words[3])])
    assert report(data, n=3)["benchmarks"]["GSM8k"]["shares"] == {}
    whole = write_data(tmp_path / "e", [(" ".join(words[:2]), words[2])])  # prompt and response
    assert list(report(whole, n=3)["benchmarks"]["GSM8k"]["shares"]) == ["test/0"]


def test_shots_and_the_words_of_a_template_are_no_overlap() -> None:
    text = config_path("hrm_benchmarking").read_text()
    plans = read_settings(text, ["run_only=[ARC,HellaSwag]"], engines=("SimpleEngine",)).plans
    for plan in plans:
        looked = look_at(plan, LocalMirror(GOLDEN_DATA), 5)
        assert all(item.prompt.count("Answer:") == 1 for item in looked.items)
    rows = [{"question": f"w{i} x{i} y{i} Put it in a box.", "answer": "#### 1"} for i in range(12)]

    class Source:
        def rows(self, split: Any, *, benchmark: str) -> Any:
            return iter(rows)

    plan = read_settings(text, ["run_only=[GSM8k]"], engines=("SimpleEngine",)).plans[0]
    looked = look_at(plan, Source(), 4)
    assert looked.num_template == 2  # of five: `put it in a`, `it in a box`
    assert [len(each) for each in looked.ngrams] == [3] * 12


def test_words_are_compared_without_case_punctuation_and_width() -> None:
    assert words_of("The \uff21\uff22\uff23-x_1, Straße!") == ["the", "abc", "x", "1", "strasse"]
    assert words_of("ab漢字cd 한") == ["ab", "漢", "字", "cd", "한"]
    assert words_of("\ud800 ?!") == []


def test_hashes_of_ngrams_know_order_and_length() -> None:
    cache = WordHashes()
    one, other = (hash_words(text.split(), cache) for text in ("a b c d", "b a c d"))
    assert len(hash_ngrams(one, 2)) == 3
    assert hash_ngrams(one, 2)[0] != hash_ngrams(other, 2)[0]
    assert hash_ngrams(one, 2)[2] == hash_ngrams(other, 2)[2]
    assert len(hash_ngrams(one, 5)) == 0
    wanted = NgramSet.of([hash_ngrams(one, 2)], [2])
    numbers, texts = wanted.find(other, np.array([4, 4, 4, 4]))
    assert wanted.hashes[numbers].tolist() == [hash_ngrams(one, 2)[2]]
    assert texts.tolist() == [4]


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = questions("gsm8k", "question", "main")
    hostile = f"``` <script> {asked[1]}"
    data = write_data(tmp_path / "d", [(hostile, "x"), FILLER])
    output = tmp_path / "found.md"
    words = [f"data.path={data}", f"data_dir={GOLDEN_DATA}", "run_only=[GSM8k,MATH]", "n=8"]
    main([*words, f"output={output}"])
    text, shown = output.read_text(), capsys.readouterr().out
    assert "| GSM8k | 10 | 1 (10.0 %) | 1 (10.0 %) |" in text
    assert "| GSM8k | 10 | 1 (10.0 %) | 1 (10.0 %) |" in shown
    assert "````text\n``` <script>" in text
    stored = json.loads(output.with_suffix(".json").read_text())
    assert stored["benchmarks"]["GSM8k"]["shares"] == {"test/1": 1.0}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "data.path=... is required"),
        (["data.path=nowhere"], "no folder of sampled data"),
        (["data.path={data}", "run_only=[GSM9k]"], "did you mean GSM8k"),
        (["data.path={data}", "epochs=3"], "holds 1 prepared epochs"),
        (["data.path={data}", "data_dir=nowhere"], "evaluation.fetch"),
        (["data.path={data}", "output=x.txt"], "must be a .md file"),
        (["data.path={data}", "n=0"], "n=0"),
    ],
)
def test_bad_commands_are_refused(
    tmp_path: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "d", [FILLER])
    with pytest.raises(SystemExit) as ended:
        main([word.format(data=data) for word in words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
