"""What a net holds after each application of a stack, for one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.language_model import LanguageModel


@dataclass(frozen=True, slots=True)
class CycleState:
    """One state as an application of a stack left it."""

    application: int  # from 0, in order
    stack: str  # the stack that was applied, e.g. H_module
    name: str  # the state that it wrote, e.g. z_H
    write: int  # which write of that state this is, from 1
    hidden: Tensor  # [T, D] on CPU, fp32
    # [A + 1, V] on CPU, fp32: what the head makes of it where the answer's tokens are predicted,
    # from the prompt's last token on; A tokens of the answer were given.
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Inspection:
    """All states of one prompt, in the order in which they were written; the last is the answer."""

    token_ids: tuple[int, ...]  # prompt and answer, [T]
    num_prompt_tokens: int
    states: tuple[CycleState, ...]


def inspect_prompt(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int] = (),
    *,
    max_context: int,
) -> Inspection:
    """Runs the prompt, and an answer to it where one is given, and keeps every state."""
    raise NotImplementedError
