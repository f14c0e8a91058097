"""Comparing evaluations: paired differences, flips, tables, and what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from results_cases import MODEL, lines, write_results

from evaluation.compare import main
from evaluation.paired import compare_benchmark, mean_difference, shared_ids
from evaluation.recorded import AnsweredItem, RecordedResults, read_results


def item(key: str, correct: float, *, category: str | None = None, **others: Any) -> AnsweredItem:
    values: dict[str, Any] = {
        "prompt": "p",
        "prompt_characters": 1,
        "answer": "a",
        "finish_reason": "stop",
        "extracted": "a",
        "truth": "t",
        "invalid": False,
        "robust": None,
        "problem": None,
        "detail": {},
    }
    return AnsweredItem(id=key, category=category, correct=correct, **values | others)


def results(
    benchmark: str, items: Sequence[AnsweredItem], figure: float = 0.0, **record: Any
) -> RecordedResults:
    each = {
        "benchmark": benchmark,
        "headline": "acc",
        "published": {"acc": figure},
        "data_fingerprint": "0" * 64,
        **record,
    }
    whole = {"name": "n", "model": {"path": "m"}, "benchmarks": {benchmark: each}}
    return RecordedResults(Path("r"), whole, {benchmark: list(items)})


def compared(first: RecordedResults, second: RecordedResults, label: str) -> Any:
    ids = shared_ids((first, second), label, other_prompts=False)
    return compare_benchmark(first, second, label, ids)


def test_the_interval_is_that_of_the_paired_differences() -> None:
    draw = np.random.default_rng(1)
    before = draw.integers(0, 2, 400).astype(float)
    after = np.where(draw.random(400) < 0.1, 1 - before, before)
    one, other = (
        results("GSM8k", [item(str(i), c) for i, c in enumerate(credits.tolist())])
        for credits in (before, after)
    )
    found = compared(one, other, "GSM8k")
    differences = after - before
    error = differences.std(ddof=1) / np.sqrt(400)
    assert found.difference.value == pytest.approx(differences.mean())
    width = found.difference.high - found.difference.low
    assert width == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert len(found.gained) == (differences == 1).sum()
    assert len(found.lost) == (differences == -1).sum()


def test_a_mean_over_subjects_is_drawn_within_subjects() -> None:
    """All of the difference lies between subjects, none within: nothing is unsure."""
    subjects = [("large", 90, 0.0), ("small", 10, 1.0)]
    one, other = (
        results(
            "MMLU",
            [
                item(f"{name}/{i}", gain * step, category=name)
                for name, count, gain in subjects
                for i in range(count)
            ],
        )
        for step in (0, 1)
    )
    found = compared(one, other, "MMLU")
    assert found.difference.value == found.difference.low == found.difference.high == 0.5
    assert found.is_clear(found.difference)


def test_one_item_of_a_subject_makes_no_difference_clear() -> None:
    one, other = (
        results("MMLU", [item("a", step, category="a"), item("b", step, category="b")])
        for step in (0, 1)
    )
    found = compared(one, other, "MMLU")
    assert found.difference.excludes_zero
    assert not found.is_clear(found.difference)
    assert "2 categories of one item" in " ".join(found.notes)


def test_drop_is_compared_by_f1() -> None:
    one = results("DROP", [item("a", 0, detail={"f1": 0.5}), item("b", 0, detail={"f1": 0})])
    other = results("DROP", [item("a", 0, detail={"f1": 0.9}), item("b", 0, detail={"f1": 0})])
    assert compared(one, other, "DROP").difference.value == pytest.approx(0.2)


def test_a_vote_counts_once_per_problem() -> None:
    def poll(votes: Mapping[str, list[int]]) -> RecordedResults:
        items = [
            item(
                f"{problem}#{index}", float(vote == 7), category=problem, truth=7,
                extracted=vote, detail={"robust_vote": vote},
            )
            for problem, each in votes.items()
            for index, vote in enumerate(each)
        ]  # fmt: skip
        settings = {"n": 3, "pass_k": [1]}
        record = {"headline": "maj_pass@1", "published": {"maj_pass@1": 0}, "settings": settings}
        return results("AIMEMajorityVoting", items, **record)

    one = poll({"0": [7, 5, 5], "1": [7, 7, 5]})
    other = poll({"0": [7, 7, 5], "1": [7, 7, 7]})
    found = compared(one, other, "AIMEMajorityVoting")
    assert (found.num_units, found.first, found.second) == (2, 0.5, 1.0)
    assert found.robust_difference.value == 0.5


def test_an_aime_without_its_headline_is_refused() -> None:
    one = results("AIMEMajorityVoting", [item("a", 1)], headline="maj_pass@1")
    with pytest.raises(ValueError, match="no figure maj_pass@1"):
        compared(one, one, "AIMEMajorityVoting")


def test_the_mean_weighs_benchmarks_equally() -> None:
    right = results("GSM8k", [item("a", 1)])
    pairs = [compared(results("GSM8k", [item("a", c)]), right, "GSM8k") for c in (0, 1)]
    assert mean_difference(pairs).value == 0.5


def test_items_that_do_not_make_the_recorded_figure_are_told() -> None:
    one = results("GSM8k", [item("a", 1)], figure=0.25)
    found = compared(one, results("GSM8k", [item("a", 1)], figure=1.0), "GSM8k")
    assert any("0.2500 on record, but its items make 1.0000" in note for note in found.notes)


def test_other_data_is_refused_unless_asked_for() -> None:
    one = results("GSM8k", [item("a", 1), item("b", 1)])
    items = [item("a", 0), item("b", 0, truth="other"), item("c", 0)]
    other = results("GSM8k", items, data_fingerprint="1" * 64)
    with pytest.raises(ValueError, match="other_prompts=true"):
        shared_ids((one, other), "GSM8k", other_prompts=False)
    assert shared_ids((one, other), "GSM8k", other_prompts=True) == {"a"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("compare")
    one = write_results(root / "one", {"BoolQ": ["A"], "ARC": ["A"], "GSM8k": ["\\boxed{9}"]})
    other = write_results(
        root / "two",
        {"BoolQ": ["B"], "ARC": ["A"]},
        arguments=["benchmarks=[{name: BoolQ},{name: ARC}]"],
        model=MODEL | {"path": "runs/other_50%"},
    )
    return one, other


def test_the_tables_are_fit_for_a_paper(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, paper, flips = tmp_path / "t.md", tmp_path / "t.tex", tmp_path / "f.jsonl"
    main([*map(str, folders), f"output={table},{paper}", f"flips={flips}"])
    text = table.read_text()
    published = [
        json.loads((each / "results.json").read_text())["benchmarks"]["BoolQ"]["published"]["acc"]
        for each in folders
    ]
    row = next(line for line in text.splitlines() if line.startswith("| BoolQ (acc) | 7 |"))
    difference = f"{100 * (published[1] - published[0]):+.1f} ["
    assert f"| {100 * published[0]:.1f} | {100 * published[1]:.1f} | " in row
    assert difference in row.replace("**", "")
    assert "| ARC (acc) | 9 |" in text
    assert "+0.0 [+0.0, +0.0]" in text
    assert "| mean |" in text
    assert "GSM8k: not finished in" in text
    assert "max_context: 4096, then 3072" in text
    latex = paper.read_text()
    assert latex.startswith("\\begin{tabular}{lrrrl}\n\\toprule\n")
    assert "other\\_50\\%" in latex
    columns = {line.count(" & ") for line in latex.splitlines() if line.endswith(r"\\")}
    assert columns == {4}
    changes = lines(flips)
    assert {each["change"] for each in changes} == {"now right", "now wrong"}
    assert all((each["answer_before"], each["answer"]) == ("A", "B") for each in changes)
    assert capsys.readouterr().out == ""


def test_it_prints_markdown_where_no_file_is_named(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*map(str, folders), "run_only=BoolQ", "names=old,new"])
    shown = capsys.readouterr().out
    assert "| benchmark | n | old | new | new - old [95 %] |" in shown
    assert "ARC" not in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{one}"], "two or more folders"),
        (["{one}", "nowhere"], "holds no results.json"),
        (["{one}", "{two}", "outptu=x.md"], "did you mean output"),
        (["{one}", "{two}", "output=x.pdf"], "must end in .md or .tex"),
        (["{one}", "{two}", "output=nowhere/x.md"], "is no folder"),
        (["{one}", "{two}", "names=a"], "1 names for 2"),
        (["{one}", "{two}", "run_only=MATH"], "run_only=MATH is in none"),
        (["{one}", "{two}", "run_only=GSM8k"], "nothing can be compared"),
    ],
)
def test_bad_commands_are_refused(
    folders: tuple[Path, Path],
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = folders
    with pytest.raises(SystemExit) as ended:
        main([word.format(one=one, two=two) for word in words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error


def test_results_of_the_same_model_differ_in_nothing(folders: tuple[Path, Path]) -> None:
    one = read_results(folders[0])
    for label in one.benchmarks:
        found = compared(one, one, label)
        assert found.difference.low == found.difference.high == 0
        assert not found.gained
        assert not [note for note in found.notes if "one item" not in note]
