"""Killed runs end as their twins, and one that does not is found; what is drawn and counted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT

from torture.damage import change_data, damage_checkpoint
from torture.life import Report, Tried, live, train_twin
from torture.plan import NETS, SIGNALS, Disturbance, Life, draw_life
from torture.results import Results, Row, read_results, write_results
from torture.tiny_runs import DATA, RUN, differences, write_data

SCRIPT = ROOT / "scripts/torture.py"
KILLED = Disturbance(
    kind="killed",
    where="saving",
    step=1,
    count=20,
    rank=0,
    waits=True,
    signal="SIGKILL",
    victims=(0,),
    data_workers=0,
    share=0.5,
)
FLIPPED = replace(KILLED, kind="checkpoint bit flipped", where="logging", step=7, count=0)
LIFE = Life(0, "transformer", 1, False, False, False, (KILLED, FLIPPED))


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, float]]:
    """A run that nothing happened to, and its seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        folder = tmp_path_factory.mktemp("torture") / "twin"
        yield folder, train_twin(LIFE, folder)


def test_a_run_killed_while_saving_and_then_damaged_ends_as_its_twin(
    twin: tuple[Path, float], tmp_path: Path
) -> None:
    report = live(LIFE, tmp_path / "life", *twin)
    assert report.is_equal, report.problems
    assert [each.what for each in report.tried] == [KILLED, FLIPPED]
    assert all(each.codes == [-9] and each.has_restarted for each in report.tried)
    told = [path.read_text() for path in sorted((tmp_path / "life").glob("said.*"))]
    assert ["skipped a checkpoint" in each for each in told] == [False, False, True]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("fsdp2_epoch_2/model/__0_0.distcp", "model: "),
        ("fsdp2_epoch_2/optimizer/__0_0.distcp", "optimizer: "),
        ("fsdp2_epoch_2/progress.json", "progress.json"),
        ("metrics.jsonl", "metrics.jsonl"),
    ],
)
def test_what_differs_from_the_twin_is_named(
    twin: tuple[Path, float], tmp_path: Path, name: str, found: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(twin[0] / "work" / RUN, run)
    assert differences(run, twin[0] / "work" / RUN) == []
    content = bytearray((run / name).read_bytes())
    at = content.index(b"2") if "json" in name else len(content) // 2
    content[at] ^= 1  # of a text: 2 becomes 3
    (run / name).write_bytes(content)
    (told,) = differences(run, twin[0] / "work" / RUN)
    assert told.startswith(found)


def test_a_life_that_cannot_start_is_no_success(twin: tuple[Path, float], tmp_path: Path) -> None:
    report = live(replace(LIFE, net="none", disturbances=()), tmp_path / "life", *twin)
    assert not report.is_equal
    assert "ended by itself with [2]" in report.problems[0]


def test_lives_are_drawn_alike_and_take_turns() -> None:
    lives = [draw_life(3, number) for number in range(24)]
    assert lives == [draw_life(3, number) for number in range(24)]
    assert lives[0].disturbances != draw_life(4, 0).disturbances
    assert len({life.twin for life in lives}) == 24  # nets, ranks, accumulation
    assert {life.net for life in lives[:6]} == set(NETS)
    every = [each for number in range(200) for each in draw_life(0, number).disturbances]
    assert {each.signal for each in every} == set(SIGNALS)
    names = {each.name for each in every}
    assert {"SIGKILL while saving", "disk full", "read-only", "clock jumped"} <= names


def test_results_of_later_batches_are_added(tmp_path: Path) -> None:
    output = tmp_path / "figures" / "torture.json"
    for number in (0, 1):
        results = read_results(output)
        assert results.begin(seed=5).lives == (number, number)
        life = replace(LIFE, number=number)
        report = Report(life, [Tried(KILLED, [-9], has_restarted=True), Tried(FLIPPED, [-9])])
        report.problems += ["other weights"] * number
        results.add(report)
        write_results(results, output)
    assert results.next_life(5) == 2 and results.next_life(6) == 0
    killed = {"kind": "SIGKILL while saving", "net": "transformer", "ranks": 1}
    assert Row(**killed, tried=2, restarted=2, equal=1, codes={"-9": 2}) in results.rows
    assert results.lines()[-1].split() == ["all", "4/2/2", "4/2/2"]
    assert str(tmp_path) not in output.read_text()


def test_a_file_that_is_no_result_is_not_added_to(tmp_path: Path) -> None:
    output = tmp_path / "other.json"
    output.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"other.json cannot be added to: .*; give another file"):
        read_results(output)


def test_data_is_changed_in_one_token_and_brought_back(tmp_path: Path) -> None:
    write_data(tmp_path / DATA, LIFE)
    before = np.load(tmp_path / DATA / "tokens.npy")
    name, bring_back = change_data(tmp_path / DATA, 0.99)
    after = np.load(tmp_path / DATA / name)
    assert (before != after).sum() == 1 and after.max() < 287
    bring_back()
    assert (np.load(tmp_path / DATA / name) == before).all()


def test_nothing_is_damaged_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert damage_checkpoint(tmp_path, FLIPPED) is None


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    output = tmp_path / "torture.json"
    line = [str(SCRIPT), "kills=20", "seed=1", f"folder={tmp_path}", f"output={output}"]
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = Results.model_validate_json(output.read_text())
    (batch,) = results.batches
    assert batch.kills == 20
    assert all(row.tried == row.equal == row.restarted for row in results.rows)
    assert json.loads(output.read_text())["failures"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["torture.json"]
