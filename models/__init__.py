"""Recurrent language models in plain PyTorch: no Hydra, ranks, files, or steps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from models.hrm import HRMConfig
from models.rins import RINSConfig
from models.transformer import TransformerConfig
from models.trm import TRMConfig
from models.ut import UTConfig

# All nets there are: a new one is a record beside these, added to this union.
ArchConfig = Annotated[
    HRMConfig | TransformerConfig | TRMConfig | RINSConfig | UTConfig,
    Field(discriminator="name"),
]

__all__ = ["ArchConfig", "HRMConfig", "RINSConfig", "TRMConfig", "TransformerConfig", "UTConfig"]
