"""What a row of anybody's data says, before it is token ids.

Readers (`data_io.readers`) make these of the fields of a row; `data_io.examples` encodes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DEFAULT_CONDITION = "direct"

Role = Literal["user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Row:
    """One question and its answer, as the published pipeline has them."""

    condition: str  # comma-separated names
    instruction: str
    response: str


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation; only those of the assistant can be scored."""

    role: Role
    text: str
    is_scored: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """A user's turn comes first; after the assistant's may come what a tool gave back."""

    condition: str
    system: str  # "" where there is none
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """Text without a question: all of it is learned."""

    text: str


Record = Row | Conversation | Document


class BadRowError(ValueError):
    """A row that cannot be used. `reason` is short and countable, `detail` says what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail
