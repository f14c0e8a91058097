"""Depths are measured as they are asked for, and the figures end up in a table, JSON and a PNG."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from export_cases import write_run
from net_cases import NETS

from inference.depth import at_depth
from models.flops import forward_flops_per_token, training_flops_per_token
from scripts.measure_depth import DepthOptions, Measured, depths, main, table

TASK = "count_letters"


def write_items(path: Path, count: int = 3) -> Path:
    """Items of a task that is judged from the question alone, whose truth the net cannot know."""
    row = {"task": "spell_backward", "instruction": "rev ab", "response": "ba"}
    entry = {"question": "ab", "answer": "ba", "metadata": {"word": "ab"}}
    config = {"min_word_len": 3, "max_word_len": 5}
    lines = [json.dumps({**row, "config": config, "entry": entry})] * count
    path.write_text("\n".join(lines) + "\n")
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["measure_depth.py", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_every_depth_of_the_grid_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, items = write_run(tmp_path / "run"), write_items(tmp_path / "items.jsonl")
    grid = ("H_cycles=1,2", "L_cycles=3,1", "max_output_tokens=2")
    assert call(monkeypatch, f"ckpt_path={run}", f"input={items}", *grid) == 0
    printed = capsys.readouterr().out
    assert printed.count("| 1 |") == 3  # H 1 twice, L 1 in one of them that is not in bold
    assert "| **2** | **3** | **8** |" in printed
    record = json.loads((run / "depth.json").read_text())
    found = [tuple(each["depth"].values()) for each in record["depths"]]
    assert found == [(1, 3), (1, 1), (2, 3), (2, 1)]
    assert [each["applications"] for each in record["depths"]] == [4, 2, 8, 4]
    assert record["items"] == 3
    assert (run / "depth.png").read_bytes()[:4] == b"\x89PNG"


def test_the_grid_reaches_to_twice_the_depth_that_was_trained(tmp_path: Path) -> None:
    options = DepthOptions(ckpt_path=tmp_path)
    assert list(depths(NETS["ut"], options)) == [{"cycles": n} for n in range(1, 9)]
    assert len(list(depths(NETS["hrm"], options))) == 4 * 6


def test_the_depth_as_trained_stands_out() -> None:
    measured = [
        Measured({"cycles": n}, n == 2, n, 1.5 * n, 1000.0, 0.5, {TASK: 0.5}) for n in (1, 2)
    ]
    assert table(measured).splitlines() == [
        f"| cycles | applications | MFLOPs/token | tokens/s | right | {TASK} |",
        "|---|---|---|---|---|---|",
        "| 1 | 1 | 1.50 | 1,000 | 0.500 | 0.500 |",
        "| **2** | **2** | **3.00** | **1,000** | **0.500** | **0.500** |",
    ]


@pytest.mark.parametrize(
    ("net", "arguments", "told"),
    [
        ("transformer", (), "the depth of a net of kind transformer is fixed"),
        ("ut", ("L_cycles=2",), "L_cycles=2: a net of kind ut has none"),
        ("ut", ("input=nowhere.jsonl",), "nowhere.jsonl is no file; give input=FILE.jsonl"),
        ("ut", ("cycles=0",), "cycles"),
        ("ut", ("input=broken.jsonl",), "broken.jsonl must hold lines of JSON with instruction"),
        ("ut", ("depth=3",), "unknown option 'depth'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    net: str,
    arguments: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    run, items = write_run(tmp_path / "run", net), write_items(tmp_path / "items.jsonl")
    (tmp_path / "broken.jsonl").write_text("[]\n{")
    given = {"input": f"input={items}"} | {each.partition("=")[0]: each for each in arguments}
    assert call(monkeypatch, f"ckpt_path={run}", *given.values()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert told in error
    assert not list(run.glob("depth.*"))


def test_depth_costs_what_its_applications_do() -> None:
    """Attention left out: nothing else grows with depth than calls of stacks."""
    head = 2.0 * 32 * 256
    costs = [
        forward_flops_per_token(at_depth(NETS["ut"], cycles=n), 256, mean_keys=0) - head
        for n in (1, 2, 6)
    ]
    assert costs == [costs[0], 2 * costs[0], 6 * costs[0]]
    net = at_depth(NETS["rins"], L_cycles=3)
    settings = {"vocab_size": 256, "mean_keys": 7.0}
    # all calls carry gradient, so that a training step costs three passes
    assert training_flops_per_token(net, backprop_steps=None, **settings) == pytest.approx(
        3 * forward_flops_per_token(net, **settings)
    )
