"""What a source is: where it is published, and the function that cleans a row of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from data_io.readers import Fields
from data_io.records import Row


@dataclass(frozen=True, slots=True)
class CleanedSource:
    """One published data set, and how a row of it becomes a row to train on."""

    dataset: str  # its name on the Hugging Face hub
    clean: Callable[[Fields], Row]
    names: tuple[str | None, ...] = (None,)  # of its configurations; all are read
    split: str = "train"
