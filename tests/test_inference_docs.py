"""The Python of docs/inference.md runs as it stands, block after block."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from export_cases import write_run

PAGE = Path(__file__).resolve().parents[1] / "docs/inference.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_every_block_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder with a run of the name that the page gives; a tiny net, so answers are others."""
    write_run(tmp_path / "checkpoints/quickstart/nano-hrm")
    monkeypatch.chdir(tmp_path)
    Path("page.py").write_text("print('---')\n".join(BLOCKS))
    names = runpy.run_path("page.py")
    printed = capsys.readouterr().out.split("---\n")
    assert len(printed) == len(BLOCKS) == 6
    assert printed[0].startswith("loaded checkpoints/quickstart/nano-hrm/fsdp2_epoch_2 (epoch 2")
    assert sorted(line[0] for line in printed[1].splitlines()) == ["0", "1"]
    assert "Answer(index=0" in printed[2].splitlines()[-1]
    assert len(printed[3].splitlines()) == 3
    assert [line[:5] for line in printed[4].splitlines()] == [
        *("z_L_1", "z_L_2", "z_L_3", "z_H_1", "z_L_4", "z_L_5", "z_L_6", "z_H_2")
    ]
    shallower, trained = names["shallower"].model.config, names["loaded"].engine.model.config
    assert (shallower.L_cycles, trained.L_cycles) == (2, 3)
    assert names["deeper"].engine.model.config.H_cycles == 3
