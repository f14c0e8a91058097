"""`python -m data_io.inspect`: true numbers, true text, nothing half-written."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tokenized_cases import Sources

from data_io import inspection
from data_io.inspect import main
from data_io.inspection import Lengths, Shelves, overview, pack
from data_io.options import parse_options
from data_io.sample import SampleOptions, sample

CONDITIONS = ["direct", "cot", "synth,cot"]
SPELLED = "say <|im_end|> & <b>\x1b[31m"


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 rows of three conditions, of which 4 are there twice, and one chat with a mask."""
    sources = Sources(tmp_path_factory.mktemp("inspect") / "tokenized")
    rows = [(CONDITIONS[row % 3], f"q{row}", "a" * (1 + row)) for row in range(26)]
    sources.add_texts("flan__a.jsonl", [*rows, *rows[:4]])
    sources.add_texts("b.jsonl", [("direct", SPELLED, "fine\nby me")])
    sources.add(
        "chat.jsonl",
        [([6, 8, 70, 7], [71, 11, 6, 72, 7, 73, 11])],
        scored=[1] * 6 + [0] * 3 + [1] * 2,
    )
    return sources.root


@pytest.fixture(scope="module")
def sampled(tokenized: Path) -> Path:
    output = tokenized.parent / "sampled"
    arguments = [f"tokenized_path={tokenized}", f"output_path={output}", "epochs=2"]
    arguments += ["prefix_config_path=null", "context_size=20"]
    sample(parse_options(SampleOptions, arguments, ""))
    return output


def printed(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_the_numbers_are_those_of_the_rows(tokenized: Path) -> None:
    shelves = Shelves.of_tokenized(tokenized)
    found = overview(shelves)
    assert len(shelves) == 32
    # boq, condition ids, text, eoq; text, eoa
    rows = [*range(26), *range(4)]
    inst = [2 + (2 if row % 3 == 2 else 1) + len(f"q{row}") for row in rows]
    inst += [3 + len(SPELLED), 4]
    resp = [1 + row + 1 for row in rows] + [len("fine\nby me") + 1, 7]
    assert found.inst_lengths.counts.tolist() == np.bincount(inst).tolist()
    assert found.resp_lengths.counts.tolist() == np.bincount(resp).tolist()
    assert found.lengths.tokens == sum(inst) + sum(resp)
    assert found.conditions == {"direct": 13, "cot": 10, "synth,cot": 9}
    assert (found.num_repeated, found.num_prompts_repeated, found.num_without_eoa) == (4, 4, 0)
    assert found.scored_share == pytest.approx(1 - 3 / sum(resp))
    assert {name: rows for name, rows, _ in found.sources} == {
        "flan__a.jsonl": 30,
        "b.jsonl": 1,
        "chat.jsonl": 1,
    }
    assert found.sources[0][0] == "flan__a.jsonl"  # the largest first


def test_the_same_question_may_have_two_answers(tmp_path: Path) -> None:
    sources = Sources(tmp_path / "tokenized")
    sources.add_texts("a", [("direct", "q", "one"), ("direct", "q", "two"), ("cot", "q", "one")])
    found = overview(Shelves.of_tokenized(sources.root))
    assert (found.num_repeated, found.num_prompts_repeated) == (0, 1)


def test_cut_rows_are_counted(sampled: Path) -> None:
    found = overview(Shelves.of_sampled(sampled, 1))
    whole = [(3 if row % 3 < 2 else 4) + len(f"q{row}") + row + 2 for row in range(26)]
    assert found.num_without_eoa == sum(length > 20 for length in whole) > 0
    assert len(found.lengths.counts) == 21


def test_quantiles_and_bins_of_lengths() -> None:
    lengths = Lengths(np.bincount([3, 3, 4, 5, 9]))
    assert [lengths.quantile(share) for share in (0.2, 0.4, 0.5, 0.6, 0.8, 1.0)] == [
        3,
        3,
        4,
        4,
        5,
        9,
    ]
    assert lengths.bins() == [(2, 3, 2, 6), (4, 7, 2, 9), (8, 15, 1, 9)]
    assert lengths.mean == 4.8


def test_large_data_is_looked_at_in_parts_and_says_so(
    tokenized: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "LOOKED_AT", 10)
    found = overview(Shelves.of_tokenized(tokenized))
    assert found.num_looked_at == 10
    assert found.lengths.counts.sum() == 32
    assert "of 10 looked at" in printed(capsys, tokenized)


def test_packing_is_that_of_training(tokenized: Path, sampled: Path) -> None:
    shelves = Shelves.of_sampled(sampled, 0)
    packing = pack(shelves, 64, 2)
    (index,) = (shelf.index for shelf in shelves.shelves)
    lengths = index.row_lengths()
    assert packing.num_rows == len(lengths)
    filled = (1 - packing.padding_share) * packing.num_batches * 64
    assert round(filled) == lengths.sum()
    assert packing.num_batches >= lengths.sum() / 64
    assert pack(Shelves.of_tokenized(tokenized), 64, 1).num_rows == 32
    with pytest.raises(ValueError, match="batch=65 is not divisible by ranks=2"):
        pack(shelves, 65, 2)


def test_a_row_that_no_batch_holds_is_told(
    tokenized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = printed(capsys, tokenized, "batch=16")
    assert re.search(r"packing: example \d+ has length \d+ and does not fit", out)
    assert "% of " in printed(capsys, tokenized, "batch=64")


def test_examples_are_shown_by_number(tokenized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, tokenized, "examples=[0,1,31]")
    shown = [line for line in out.splitlines() if line]
    assert shown[0].startswith("0: example of")
    assert "b.jsonl" not in shown[0]  # the first source needs no name
    assert [line[:9].strip() for line in shown if line.startswith("  ")].count("read") == 3
    assert "\x1b" not in out  # neither colour in a pipe nor of the text
    assert "say <|im_end|> & <b>" in out
    place = shown.index("1 (chat.jsonl, row 0): example of 4 + 7 tokens")
    assert shown[place + 1 : place + 5] == [
        "  read    <|im_start|><|object_ref_start|>H<|im_end|>",
        "  learned I<|box_end|>",
        "  passed  <|im_start|>J<|im_end|>",
        "  learned K<|box_end|>",
    ]
    assert "tokens of a row" not in out


def test_colours_are_for_terminals(
    tokenized: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[36m<|im_start|>" in printed(capsys, tokenized, "examples=1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in printed(capsys, tokenized, "examples=1")


def test_without_a_tokenizer_ids_are_shown(
    golden_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in sorted(golden_folder.glob("data_io/*/out")):
        if (folder / "epoch_0").is_dir():
            out = printed(capsys, folder, "num_examples=1")
            assert "conditions            unknown" in out
            assert re.search(r"\n  read    \d+( \d+)+\n  learned \d+", out)


class Outline(HTMLParser):
    """The text of a page, what it would load, and whether its tags are balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.loads: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "rect"):
            self.open.append(tag)
        self.loads += [f"{tag} {key}" for key, _ in attrs if key in ("src", "href", "onclick")]
        self.loads += [tag] * (tag in ("script", "link", "img", "iframe"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag == "rect"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_holds_everything_and_loads_nothing(
    tokenized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page_path, picture = tmp_path / "page.html", tmp_path / "lengths.png"
    numbers = "examples=0,1,31"
    printed(capsys, tokenized, f"html={page_path}", f"png={picture}", "batch=64", numbers)
    page = page_path.read_text(encoding="utf-8")
    outline = Outline(page)
    assert (outline.open, outline.loads) == ([], [])
    text = "".join(outline.texts)
    for told in ("32 rows of 3 sources", "synth,cot", "flan__a.jsonl", "packing", "fine\nby me"):
        assert told in text, told
    assert "say &lt;|im_end|&gt; &amp; &lt;b&gt;[U+001B][31m<b>&lt;|im_end|&gt;</b>" in page
    assert page.count('class="passed"') == 1
    assert "__" not in re.sub(r"flan__\w+", "", text)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lengths.png", "page.html"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["examples=32"], "examples=32 is not one of the 32"),
        (["examples=-1"], "greater than or equal to 0"),
        (["png=lengths.txt"], "lengths.*txt is no picture"),
        (["batch=0"], "batch=0"),
        (["exampels=3"], "did you mean examples"),
    ],
)
def test_a_wrong_option_is_named(
    tokenized: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main([str(tokenized), *arguments])
    assert not list(tmp_path.iterdir())


def test_an_epoch_that_is_not_there_is_named(sampled: Path) -> None:
    with pytest.raises(ValueError, match=r"epoch=2 is not in .*; use one from 0 to 1"):
        main([str(sampled), "epoch=2"])
