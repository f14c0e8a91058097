"""What tests of loading share: a folder opened here, and refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from inference.model_folder import ModelOptions, OpenedModel, open_model

QUIET = {"device": "cpu", "dtype": "float32"}


def opened(folder: Path, **options: Any) -> OpenedModel:
    return open_model(ModelOptions.model_validate({**QUIET, "ckpt_path": folder, **options}))


def assert_refused(folder: Path, told: str, **options: Any) -> None:
    """One line that says it."""
    with pytest.raises((ValueError, FileNotFoundError), match=told) as caught:
        opened(folder, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))
