"""A folder in the making: what killed runs have left goes, what running ones write stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from source_tree import ROOT

from data_io.staging import Staging

HOLD = """
import sys
from pathlib import Path
from data_io.staging import Staging
staging = Staging(Path(sys.argv[1]))
(staging.path / "tokens.npy").write_text("x")
print(staging.path, flush=True)
sys.stdin.read()
"""


def test_what_a_killed_run_has_left_is_removed_and_a_running_one_kept(tmp_path: Path) -> None:
    folder = tmp_path / "data [1]"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        theirs = Path(run.stdout.readline().strip())
        ours = Staging(folder)
        assert sorted(tmp_path.iterdir()) == sorted((theirs, ours.path))
        run.kill()
        run.wait()
    ours.close()
    assert list(tmp_path.iterdir()) == [theirs]
    again = Staging(folder)
    assert list(tmp_path.iterdir()) == [again.path]
    again.close()
    assert not any(tmp_path.iterdir())


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    others = [
        tmp_path / name for name in (".database.partial-1", ".data.partial", "data.partial-1")
    ]
    for other in others:
        other.mkdir()
    (tmp_path / ".data.partial-1").write_text("a file")
    Staging(tmp_path / "data").close()
    assert len(list(tmp_path.iterdir())) == len(others) + 1
