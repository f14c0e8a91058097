"""What is said of a model that was built is what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from run_cases import ALONE, run_config
from torch import nn

from models import cpu_kernels
from models.transformer import Block
from training.building import build_model

LORA = {"lora": {"rank": 2}, "resume_from": "another run"}


def blocks_line(tmp_path: Path, **settings: Any) -> str | None:
    config = run_config(tmp_path, device="cpu", linear="mkl", **settings)
    return build_model(config, 256, ALONE, {}).lines.get("blocks")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "kernels compiled by numba"),
        (LORA, None),
        ({"attention": "dense"}, None),
    ],
)
def test_it_says_whether_compiled_kernels_compute_blocks(
    settings: dict[str, Any], line: str | None, tmp_path: Path
) -> None:
    assert blocks_line(tmp_path, **settings) == line


def test_it_says_so_of_sharded_blocks_too(tmp_path: Path) -> None:
    class Sharded(Block):
        """What FSDP makes of a block's class."""

    def shard(model: nn.Module, *_: object, **__: object) -> None:
        for block in [each for each in model.modules() if isinstance(each, Block)]:
            block.__class__ = Sharded

    with patch("training.building.shard_model", shard):
        assert blocks_line(tmp_path) == "kernels compiled by numba"


def test_it_says_that_kernels_could_not_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_kernels, "why_not_cached", ["OSError: full"])
    assert blocks_line(tmp_path) == "kernels compiled by numba, anew at each start (OSError: full)"
