"""Experiment trackers: W&B, TensorBoard, trackio, or none. What they get is in metrics.jsonl too.

All are optional, imported when chosen, and kept inside the run directory. One that fails in the
middle of a run is given up in one line, and the run goes on.
"""

from __future__ import annotations

import configparser
import json
import netrc
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from tqdm import tqdm

from data_io.redaction import without_secrets
from training.distributed import World
from training.publishing import write_atomically
from training.schema import RunConfig

WANDB_FILE = "wandb_run.json"  # which W&B run this is
# Seconds at the end; what is not uploaded by then stays on disk, for `wandb sync`.
_FINISH_TIMEOUT = "WANDB_FINISH_TIMEOUT"
INSTALL = "pip install -r requirements-trackers.txt"


class Backend(Protocol):
    """One tracker's own way."""

    note: str  # where to look, for the summary

    def log(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Hands lines on to a backend, if there is one, until it fails."""

    def __init__(self, backend: Backend | None = None) -> None:
        self._backend = backend

    def log(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl: its "step" and values by name."""
        with self._given_up_on_error():
            if self._backend:
                self._backend.log(line)

    def close(self) -> None:
        """Waits until everything is written or sent."""
        with self._given_up_on_error():
            if self._backend:
                self._backend.close()
        self._backend = None

    @contextmanager
    def _given_up_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: nothing in a tracker is worth a run
            self._backend = None
            tqdm.write(f"tracker given up: {_brief(error)}; metrics.jsonl goes on")


def open_tracker(
    config: RunConfig, run_path: Path, world: World, *, step: int
) -> tuple[Tracker, str]:
    """The tracker of a run that stands at `step`, and which it is and why. Rank 0 has one alone.

    A new run whose tracker was asked for by name and does not start is refused with a ValueError.
    Under auto, and when a run is continued, it goes on without.
    """
    if not world.is_main:
        return Tracker(), "none (rank 0 has it)"
    name, reason = ("none", "a dry run") if config.dry_run else _choose(config.tracker)
    if name == "none":
        return Tracker(), f"none ({reason})"
    try:
        backend = BACKENDS[name](config, run_path, step)
    except Exception as error:  # of any kind, as above
        is_missing = isinstance(error, ImportError)
        way_out = INSTALL if is_missing else "tracker=none goes without"
        message = f"{name} did not start: {_brief(error)}; {way_out}"
        if config.tracker == "auto" or (step and not is_missing):
            return Tracker(), f"none ({message})"
        raise ValueError(f"tracker={message}") from None
    return Tracker(backend), f"{name} ({'; '.join(filter(None, (reason, backend.note)))})"


class WandB:
    """Weights & Biases: one run of theirs for one of ours, however often it is continued."""

    def __init__(self, config: RunConfig, run_path: Path, step: int) -> None:
        os.environ.setdefault(_FINISH_TIMEOUT, "300")
        import wandb

        run_id, project = _wandb_identity(run_path, str(config.project_name))
        mode, _ = wandb_mode()
        self._run = wandb.init(
            project=project,
            id=run_id,
            name=config.run_name,
            dir=str(run_path),
            config=config.model_dump(),
            mode="online" if mode == "online" else "offline",
            resume="allow",
            allow_val_change=True,  # max_steps, device: a continued run may have others
            settings=wandb.Settings(silent=True, reinit="create_new"),
        )
        # Their own step only grows, and drops what is logged again after a restart: so ours is a
        # metric like the others, and the axis of all of them.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        offline = f"offline: `wandb sync {run_path}/wandb/offline-run-*` uploads"
        self.note = str(self._run.url) if mode == "online" else offline

    def log(self, line: Mapping[str, Any]) -> None:
        self._run.log(dict(line))

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files, one more for each sitting of the run."""

    def __init__(self, config: RunConfig, run_path: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_path / "tensorboard"), purge_step=step + 1)
        self.note = f"`tensorboard --logdir {run_path.parent}` shows"

    def log(self, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """trackio's database, in TRACKIO_DIR where that is set."""

    def __init__(self, config: RunConfig, run_path: Path, step: int) -> None:
        # Read when trackio is first imported: the runs of a sweep share one folder.
        folder = os.environ.setdefault("TRACKIO_DIR", str((run_path / "trackio").absolute()))
        import trackio

        project, name = str(config.project_name), str(config.run_name)
        with redirect_stdout(StringIO()):
            self._run = trackio.init(
                project, name=name, config=config.model_dump(), resume="allow", embed=False
            )
        self.note = f"`TRACKIO_DIR={folder} trackio show` shows"

    def log(self, line: Mapping[str, Any]) -> None:
        values = {name: value for name, value in line.items() if name != "step"}
        self._run.log(values, step=line["step"])

    def close(self) -> None:
        import trackio

        with redirect_stdout(StringIO()):
            trackio.finish()


BACKENDS = {"wandb": WandB, "tensorboard": TensorBoard, "trackio": Trackio}


def wandb_mode() -> tuple[str, str]:
    """online, offline, disabled or unset, as W&B's own settings have it, and why. Asks no network.

    Without a login it is never online, since W&B would stop and ask for one.
    """
    variables = {key: value for key, value in os.environ.items() if key.startswith("WANDB_")}
    variables.pop(_FINISH_TIMEOUT, None)  # set above
    settings = _wandb_settings() | {key[6:].lower(): value for key, value in variables.items()}
    mode = settings.get("mode")
    if mode == "disabled" or settings.get("disabled", "").lower() in ("1", "true"):
        return "disabled", "disabled by W&B's own settings"
    if mode in ("offline", "dryrun"):
        return "offline", ""
    if settings.get("api_key") or settings.get("identity_token_file"):
        return "online", ""
    if _netrc_knows(urlsplit(settings.get("base_url", "https://api.wandb.ai")).netloc):
        return "online", ""
    if variables:
        return "offline", f"{min(variables)} is set, but there is no W&B login"
    return "unset", "no W&B login or WANDB_* variables found"


def _choose(wanted: str) -> tuple[str, str]:
    """Which backend, and why where it is not just what was asked for."""
    if wanted not in ("auto", "wandb"):
        return wanted, "asked for" if wanted == "none" else ""
    mode, reason = wandb_mode()
    is_off = mode == "disabled" or (mode == "unset" and wanted == "auto")
    return "none" if is_off else "wandb", reason


def _wandb_settings() -> dict[str, str]:
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([folder / "settings", Path("wandb/settings")])
    except configparser.Error:  # W&B takes a file that it cannot read for an empty one
        return {}
    return dict(parser["default"]) if parser.has_section("default") else {}


def _netrc_knows(host: str) -> bool:
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb_identity(run_path: Path, project: str) -> tuple[str, str]:
    """The id and project of the W&B run: drawn once, and kept in the run directory."""
    path = run_path / WANDB_FILE
    if not path.is_file():
        drawn = {
            "id": os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4),
            "project": os.environ.get("WANDB_PROJECT") or project,
        }
        write_atomically(path, json.dumps(drawn))
    kept = json.loads(path.read_text())
    return kept["id"], kept["project"]


def _brief(error: Exception) -> str:
    lines = without_secrets(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
