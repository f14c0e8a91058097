"""A run of several ranks begins only where all of them see the folder that it saves into."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from commands import PRETRAIN, TINY, files_in, start_command, write_tiny_data
from run_cases import ALONE

from training.shared_folder import require_shared


def test_one_process_looks_nowhere() -> None:
    require_shared(Path("/nowhere/at/all"), ALONE)


@pytest.mark.slow
def test_a_rank_that_saves_elsewhere_is_named_before_anything_is_written(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in ("0", "1"):
        disk = tmp_path / f"node_{rank}"
        disk.mkdir()
        environment = {**common, "RANK": rank, "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
        line = [*TINY, f"data.path={data}", "epochs=1", "run_name=a"]
        started.append(start_command(str(PRETRAIN), *line, cwd=disk, environment=environment))
    for rank, ended in enumerate(each.wait() for each in started):
        assert ended.code == 2, ended.stderr
        assert "rank 1 does not see what rank 0 writes in" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert files_in(tmp_path / f"node_{rank}") == {}
