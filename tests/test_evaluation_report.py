"""The report of an evaluation: its figures, its examples, and that hostile answers stay text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from results_cases import write_results

from evaluation.benchmarks.reasoning_gym import ReasoningGym
from evaluation.charts import Bar, bar_chart
from evaluation.published import departures
from evaluation.recorded import find_results, read_results
from evaluation.report import MARKDOWN_FILE, PAGE_FILE, main, write_report
from evaluation.report_content import filled_columns, summaries
from evaluation.shown_text import in_html, in_latex, in_markdown_cell, markdown_block, visible

HOSTILE = (
    "</pre></details><script>alert(1)</script><img src=x onerror=y> __MAIN__ __HEADER__ "
    "\x00\x1b[31m\u202e \ud800 ```\n```\n| a | b |" + "e" + "\u0301" * 40
)


class Elements(HTMLParser):
    """The elements of a page, and whether each is closed where it should be."""

    VOID = ("meta", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "published"
    answers = {
        "GSM8k": ["\\boxed{5000}", "\\boxed{5000}", "\\boxed{-18}", HOSTILE],
        "DROP": ["3"],
        "MMLU": ["A", "B.", "B"],
        "BoolQ": ["A", "(A)"],
    }
    return write_results(path, answers)


@pytest.fixture(scope="module")
def written(folder: Path) -> tuple[str, str]:
    write_report(folder)
    return (folder / MARKDOWN_FILE).read_text(), (folder / PAGE_FILE).read_text()


def test_all_benchmarks_stand_beside_published_figures_and_chance(
    folder: Path, written: tuple[str, str]
) -> None:
    text, page = written
    record = json.loads((folder / "results.json").read_text())["benchmarks"]["MMLU"]
    figure = f"{100 * record['published']['acc']:.1f}"
    error = f"{100 * record['standard_errors']['acc']:.1f}"
    robust = f"{100 * record['robust']['acc_robust']:.1f}"
    row = next(line for line in text.splitlines() if line.startswith("| MMLU | 10 "))
    assert f"| acc | {figure} ± {error} | {robust} ± " in row
    assert "| 25.0 | 56.6 | 60.7 |" in row
    assert f"<b>{figure}" in page
    assert "| HRM | 60.7 | 84.5 | 56.2 |" in text
    assert "GSM8k was asked otherwise than for the published figure: 10 items instead of" in text


def test_what_the_robust_rule_does_otherwise_is_told(written: tuple[str, str]) -> None:
    assert all("8.99 is 8" in each for each in written)
    assert "judged otherwise by the robust rule" in written[0]


def test_categories_are_broken_down(folder: Path) -> None:
    found = {each.label: each for each in summaries(read_results(folder))}
    counts = json.loads((folder / "results.json").read_text())["benchmarks"]["MMLU"]["categories"]
    shown = {each.name: each for each in found["MMLU"].categories}
    assert shown.keys() == counts.keys()
    for name, each in shown.items():
        assert each.accuracy.value == pytest.approx(counts[name]["correct"] / counts[name]["n"])
    assert not any(key.startswith("acc_") for key in found["MMLU"].other_figures)
    assert "em" in found["DROP"].other_figures


def test_hostile_answers_stay_text(written: tuple[str, str]) -> None:
    text, page = written
    elements = Elements()
    elements.feed(page)
    assert elements.open == []
    assert not {"script", "img", "link", "iframe"} & set(elements.names)
    assert not any(name.startswith("on") or name in ("href", "src") for name in elements.attributes)
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("__MAIN__") > 0  # what the model wrote; the template's own are filled
    assert page.count("<main>") == page.count("<header>") == 1
    for each in written:
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]", each)
        assert "[40 marks]" in each
    blocks = re.findall(r"^(`{3,})text$", text, re.MULTILINE)
    assert max(map(len, blocks)) == 4  # longer than the fences within


def test_the_page_loads_nothing(written: tuple[str, str]) -> None:
    page = written[1]
    assert "default-src 'none'" in page
    assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)\w+\.", page.split("<main>")[0])
    assert "url(" not in page
    assert "@import" not in page


def test_a_puzzle_has_a_curve_over_difficulty(tmp_path: Path) -> None:
    items = ReasoningGym(n=4, tasks=("spell_backward",)).load(None).items  # type: ignore[arg-type]
    answers = [item.truth["response"] if item.truth["level"] == 0 else "no" for item in items]
    spec = "benchmarks=[{name: reasoning_gym, n: 4, tasks: [spell_backward]}]"
    folder = write_results(tmp_path / "rg", {"reasoning_gym": answers}, arguments=[spec])
    write_report(folder)
    (summary,) = summaries(read_results(folder))
    by_difficulty = {point.difficulty: point.accuracy for point in summary.curve}
    assert by_difficulty[6] == by_difficulty[7] == 0
    assert by_difficulty[5] == 1
    page = (folder / PAGE_FILE).read_text()
    assert '<polyline class="curve"' in page
    assert ">letters</text>" in page
    assert "| spell_backward | 6 letters | 4 | 0.0 ± 0.0 |" in (folder / MARKDOWN_FILE).read_text()


def test_another_figure_is_shown_where_the_usual_one_was_not_asked_for(tmp_path: Path) -> None:
    spec = "benchmarks=[{name: AIMEMajorityVoting, n: 2, pass_k: [2]}]"
    folder = write_results(tmp_path / "r", {"AIMEMajorityVoting": ["55"]}, arguments=[spec])
    write_report(folder)
    assert "| maj_pass@2 |" in (folder / MARKDOWN_FILE).read_text()


def test_means_over_tasks_are_shown(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "r", {"BoolQ": ["A"]})
    path = folder / "results.json"
    mean = {
        "value": 0.2218,
        "standard_error": 0.004,
        "of": "22 tasks, prefix=bos",
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"means": {"CORE": mean}}))
    write_report(folder)
    text, page = ((folder / name).read_text() for name in (MARKDOWN_FILE, PAGE_FILE))
    assert "| CORE | 22.2 ± 0.4 | 22 tasks, prefix=bos |" in text
    assert re.search(r"<th>CORE</th><td><b>22.2 .*± 0.4.*22 tasks, prefix=bos</td>", page)


def test_an_unfinished_evaluation_says_so(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "r", {"BoolQ": ["A"]})
    path = folder / "results.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"benchmarks": {}, "unfinished": ["BoolQ"]}))
    write_report(folder)
    assert "Not finished yet: BoolQ" in (folder / MARKDOWN_FILE).read_text()
    assert "Not finished yet: BoolQ" in (folder / PAGE_FILE).read_text()


def test_published_settings_depart_in_nothing_but_what_is_changed() -> None:
    generation = {"batch_size": 8, "max_context": 3072, "temperature": 0.0}
    record = {"benchmark": "GSM8k", "generation": generation | {"condition": "synth,cot"}}
    assert departures(record, 1319) == []
    assert departures(record | {"generation": {"condition": "direct"}}, 1319) == [
        "condition=direct instead of synth,cot"
    ]
    assert departures(record, 1319, 256) == []  # all of it fitted
    for count in ("over_long", "cut_off"):
        told = departures(record | {count: 1}, 1319, 256)
        assert told == ["max_context=256 instead of 3072"]
        assert departures(record | {count: 1}, 1319, 4096) == []
    notes = ["asked without its 3 published shots: DROP needs a file", "2 answers: stopped"]
    assert departures({"benchmark": "DROP", "notes": notes}, 9536) == [
        "asked without its 3 published shots"
    ]
    assert departures({"benchmark": "reasoning_gym", "generation": {}}, 3) == []


def test_bars_and_whiskers_stay_within_the_chart() -> None:
    chart = bar_chart([Bar("a", 0.98, 0.2, 0.25, {"XL": 0.8}), Bar("b<", 0.0, 0.0)])
    lefts = [float(x) for x in re.findall(r'x[12]="([\d.]+)"', chart)]
    assert min(lefts) >= 130
    assert max(lefts) <= 640 - 54
    assert "b&lt;" in chart


def test_text_is_escaped_for_each_format() -> None:
    assert visible("a\x07b\u200e\n\t") == "a\u2407b[U+200E]\n\t"
    assert in_html("<\x00&\"'") == "&lt;\u2400&amp;&quot;&#x27;"
    assert in_markdown_cell("a|b `c` [d](e) <f> g_h _i_\nj") == (
        "a\\|b \\`c\\` \\[d](e) \\<f> g_h \\_i\\_ j".replace("<f>", "<f\\>")
    )
    assert in_latex("50% of_a\\b {c}") == r"50\% of\_a\textbackslash{}b \{c\}"
    assert markdown_block("x ```` y").startswith("`````text\n")


def test_empty_columns_are_left_out() -> None:
    assert filled_columns(("a", "b"), [("1", ""), ("2", "")]) == (["a"], [["1"], ["2"]])


def test_bad_folders_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(path)])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "holds no results.json" in refused(tmp_path)
    for number, content in enumerate(("{", '{"format": 1}', "[]")):
        broken = tmp_path / f"broken_{number}"
        broken.mkdir()
        (broken / "results.json").write_text(content)
        assert "results.json is no" in refused(broken)
    other = tmp_path / "other"
    other.mkdir()
    (other / "results.json").write_bytes((folder / "results.json").read_bytes())
    assert "items.jsonl is missing" in refused(other)
    (other / "items.jsonl").write_text('{"benchmark": "MMLU"}\n')
    assert "items.jsonl:1 is no line" in refused(other)
    assert not (other / PAGE_FILE).exists()


def test_the_only_results_of_a_run_are_found(folder: Path, tmp_path: Path) -> None:
    results = tmp_path / "run" / "results"
    results.mkdir(parents=True)
    (results / "a").symlink_to(folder)
    assert find_results(tmp_path / "run") == results / "a"
    (results / "b").symlink_to(folder)
    with pytest.raises(ValueError, match="several results"):
        find_results(tmp_path / "run")
