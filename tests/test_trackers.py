"""Each tracker, for real and offline, keeps what metrics.jsonl has; none of them can end a run."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import start_command
from run_cases import ALONE, run_config
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

from training import trackers
from training.checkpoint import Progress
from training.distributed import World
from training.telemetry import MetricsLogger, read_metrics
from training.trackers import Tracker, open_tracker, wandb_mode

WORKER = Path(__file__).with_name("tracker_worker.py")
KEY = "0123456789abcdef" * 2 + "01234567"  # the shape of an API key
NOTHING = ("unset", "no W&B login or WANDB_* variables found")


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without logins and settings; returns it."""
    for name in os.environ:
        if name.startswith(("WANDB_", "TRACKIO_", "NETRC")):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return home


def sit(tmp_path: Path, tracker: str, first: int, last: int, **environment: str) -> str:
    """A sitting of the run in tmp_path/run; what it printed."""
    cwd = tmp_path / "work"
    cwd.mkdir(exist_ok=True)
    arguments = (str(tmp_path / "run"), tracker, str(first), str(last))
    offline = {"WANDB_MODE": "offline", "HOME": str(tmp_path / "home"), **environment}
    return (
        start_command(str(WORKER), *arguments, cwd=cwd, environment=offline).wait().check().stdout
    )


def wandb_records(path: Path) -> Iterator[Record]:
    """What a .wandb file holds: a LevelDB log after 7 bytes of its own."""
    data, offset, parts = path.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:  # no header fits into the rest of a block
            offset += 32768 - offset % 32768
            continue
        length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def wandb_lines(path: Path) -> list[dict[str, Any]]:
    """The logged lines, without W&B's own values."""
    histories = [r.history for r in wandb_records(path) if r.HasField("history")]
    rows = [
        {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in h.item} for h in histories
    ]
    return [{name: value for name, value in row.items() if name[0] != "_"} for row in rows]


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run of 12 steps was continued from its tenth."""
    folder = tmp_path_factory.mktemp("wandb")
    said = sit(folder, "wandb", 0, 12, WANDB_API_KEY=KEY)
    assert f"tracker  wandb (offline: `wandb sync {folder}/run/wandb/offline-run-*`" in said
    (folder / "first.jsonl").write_text((folder / "run" / "metrics.jsonl").read_text())
    sit(folder, "auto", 10, 15, WANDB_API_KEY=KEY)  # found by WANDB_MODE
    return folder


def wandb_files(folder: Path) -> list[Path]:
    """One for each sitting."""
    return sorted((folder / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_gets_every_line(wandb_run: Path) -> None:
    first, second = wandb_files(wandb_run)
    assert wandb_lines(first) == read_metrics(wandb_run / "first.jsonl")
    lines = read_metrics(wandb_run / "run" / "metrics.jsonl")
    assert wandb_lines(second) == [line for line in lines if line["step"] > 10]


def test_wandb_goes_on_in_the_same_run(wandb_run: Path) -> None:
    first, second = (
        next(record.run for record in wandb_records(file) if record.HasField("run"))
        for file in wandb_files(wandb_run)
    )
    assert first.run_id == second.run_id
    assert (first.project, first.display_name) == ("project", "some-run")
    config = {item.key: json.loads(item.value_json) for item in first.config.update}
    assert config["arch"]["name"] == "hrm" and config["lr"] == 1e-3


def test_wandb_draws_over_our_steps(wandb_run: Path) -> None:
    """Theirs only grow: what is logged again after a restart would be dropped."""
    for file in wandb_files(wandb_run):
        metrics = [record.metric for record in wandb_records(file) if record.HasField("metric")]
        assert ("*", "step") in {(each.glob_name, each.step_metric) for each in metrics}


def test_no_key_is_written_anywhere(wandb_run: Path) -> None:
    files = [path for path in wandb_run.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_tensorboard_shows_every_step_once_after_a_restart(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="requirements-trackers.txt is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert "tensorboard --logdir" in sit(tmp_path, "tensorboard", 0, 12)
    sit(tmp_path, "tensorboard", 9, 15)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(step, float(step)) for step in range(1, 16)]
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [
        (5, 5.5),
        (10, 10.5),
        (15, 15.5),
    ]
    written = {name for line in read_metrics(tmp_path / "run" / "metrics.jsonl") for name in line}
    assert set(events.Tags()["scalars"]) == written - {"step"}


def test_trackio_gets_every_line_and_goes_on_in_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="requirements-trackers.txt is not installed")
    folder = tmp_path / "run" / "trackio"
    assert f"TRACKIO_DIR={folder} trackio show" in sit(tmp_path, "trackio", 0, 6)
    sit(tmp_path, "trackio", 6, 10)
    with sqlite3.connect(folder / "project.db") as database:
        rows = database.execute("select run_id, run_name, step, metrics from metrics").fetchall()
    assert len({run_id for run_id, *_ in rows}) == 1 and {row[1] for row in rows} == {"some-run"}
    kept = [{"step": step, **json.loads(metrics)} for *_, step, metrics in rows]
    assert kept == read_metrics(tmp_path / "run" / "metrics.jsonl")


def open_for(
    tmp_path: Path, tracker: str, *, step: int = 0, world: World = ALONE
) -> tuple[Tracker, str]:
    config = run_config(tmp_path, tracker=tracker, project_name="project", run_name="run")
    return open_tracker(config, tmp_path, world, step=step)


def test_auto_is_none_on_a_bare_machine_and_says_why(tmp_path: Path) -> None:
    assert open_for(tmp_path, "auto")[1] == "none (no W&B login or WANDB_* variables found)"
    assert open_for(tmp_path, "none")[1] == "none (asked for)"
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, NOTHING),
        ({"WANDB_API_KEY": KEY}, ("online", "")),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, ("offline", "")),
        (
            {"WANDB_MODE": "disabled", "WANDB_API_KEY": KEY},
            ("disabled", "disabled by W&B's own settings"),
        ),
        ({"WANDB_DISABLED": "true"}, ("disabled", "disabled by W&B's own settings")),
        ({"WANDB_PROJECT": "p"}, ("offline", "WANDB_PROJECT is set, but there is no W&B login")),
    ],
)
def test_variables_of_wandb_are_heeded(
    variables: Mapping[str, str], expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode() == expected


def test_a_login_is_found_where_wandb_keeps_it(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    login = bare_machine / ".netrc"
    login.write_text(f"machine example.org login user password {KEY}\n")
    login.chmod(0o600)
    assert wandb_mode() == NOTHING
    settings = bare_machine / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = https://example.org\n")
    assert wandb_mode() == ("online", "")
    settings.write_text("[default]\nmode = offline\n")
    assert wandb_mode() == ("offline", "")
    settings.write_text("no settings")
    assert wandb_mode() == NOTHING
    monkeypatch.setenv("WANDB_BASE_URL", "https://example.org")
    assert wandb_mode() == ("online", "")


@pytest.mark.parametrize(
    ("tracker", "package"),
    [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")],
)
def test_a_missing_package_is_an_error_that_says_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    for step in (0, 7):
        with pytest.raises(ValueError, match=rf"tracker={tracker} .*requirements-trackers.txt"):
            open_for(tmp_path, tracker, step=step)


def test_under_auto_a_missing_package_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker, note = open_for(tmp_path, "auto")
    assert note.startswith("none (wandb did not start")
    tracker.log({"step": 1})


class Broken:
    """A backend that starts, and then fails."""

    note = ""
    calls = 0

    def log(self, line: Mapping[str, Any]) -> None:
        Broken.calls += 1
        raise OSError("no space left on device\nand more")

    def close(self) -> None:
        raise AssertionError("it has been given up")


def test_a_tracker_that_fails_is_given_up_in_one_line_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Broken, "calls", 0)
    logger = MetricsLogger(
        tmp_path, ALONE, log_interval=1, total_steps=9, start=Progress(), tracker=Tracker(Broken())
    )
    for step in (1, 2, 3):
        logger.record(Progress(step=step), {"val/loss": 1.0})
    logger.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3 and Broken.calls == 1
    said = "tracker given up: OSError: no space left on device; metrics.jsonl goes on\n"
    assert capsys.readouterr().out == said


def test_what_does_not_start_refuses_a_new_run_but_not_one_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("the network is down")

    monkeypatch.setitem(trackers.BACKENDS, "trackio", fails)
    with pytest.raises(ValueError, match=r"trackio did not start.*network is down; tracker=none"):
        open_for(tmp_path, "trackio")
    tracker, note = open_for(tmp_path, "trackio", step=5)
    assert "the network is down" in note
    tracker.log({"step": 6})


def test_other_ranks_track_nothing(tmp_path: Path) -> None:
    open_for(tmp_path, "wandb", world=World(rank=1, size=2, device=ALONE.device))
    assert list(tmp_path.iterdir()) == [tmp_path / "home"]
