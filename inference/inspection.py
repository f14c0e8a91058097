"""What a net holds after each application of a stack, for one prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.batch import PackedLayout
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

    @property
    def label(self) -> str:
        """The state and its write in one word: z_H_2."""
        return f"{self.name}_{self.write}"


@dataclass(frozen=True, slots=True)
class Inspection:
    """All states of one prompt, in the order in which they were written; the last is the answer."""

    token_ids: tuple[int, ...]  # prompt and answer, [T]
    num_prompt_tokens: int
    states: tuple[CycleState, ...]

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The tokens of the given answer, [A]."""
        return self.token_ids[self.num_prompt_tokens :]


@torch.no_grad()
def inspect_prompt(
    model: LanguageModel,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int] = (),
    *,
    max_context: int,
) -> Inspection:
    """Runs the prompt, and an answer to it where one is given, and keeps every state.

    One forward pass. ValueError where there is no prompt, an id is none of the model's, or both
    together exceed `max_context` tokens.
    """
    token_ids = (*prompt_ids, *answer_ids)
    vocab_size = len(model.lm_head.weight)
    if not prompt_ids or min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise ValueError(
            f"a prompt is one or more token ids from 0 to {vocab_size - 1}, and so is an answer "
            f"where one is given; these are {list(prompt_ids)[:16]} and {list(answer_ids)[:16]}"
        )
    if len(token_ids) > max_context:
        raise ValueError(
            f"{len(prompt_ids)} tokens of prompt and {len(answer_ids)} of answer exceed the "
            f"context of {max_context}; shorten them"
        )
    layout = PackedLayout.from_lengths(
        torch.tensor([len(prompt_ids)]), torch.tensor([len(answer_ids)]), num_slots=1
    )
    device = model.lm_head.weight.device
    trace = _KeptStates(model, first_predicting=len(prompt_ids) - 1)
    model(
        torch.tensor(token_ids, device=device),
        torch.arange(len(token_ids), device=device),
        layout.map_vectors(lambda vector: vector.to(device)),
        trace=trace,
    )
    return Inspection(token_ids, len(prompt_ids), tuple(trace.states))


def answer_probabilities(inspection: Inspection) -> Tensor:
    """How likely each state makes each token of the given answer, [states, A].

    Token i given the prompt and the tokens before it, as the head would say if it were given that
    state; the last row is what the model says.
    """
    answer_ids = torch.tensor(inspection.answer_ids, dtype=torch.int64)
    rows = torch.arange(len(answer_ids))
    return torch.stack(
        [state.logits[:-1].softmax(-1)[rows, answer_ids] for state in inspection.states]
    )


def likeliest(inspection: Inspection, k: int) -> tuple[Tensor, Tensor]:
    """The k tokens that each state makes likeliest, the likeliest first.

    Token ids and their probabilities, [states, A + 1, k] each: for each token of the given answer,
    and for the one that would follow it.
    """
    vocab_size = inspection.states[-1].logits.shape[-1]
    if not 1 <= k <= vocab_size:
        raise ValueError(f"{k=} must be 1 to {vocab_size}, the size of the vocabulary")
    probabilities, token_ids = zip(
        *(state.logits.softmax(-1).topk(k) for state in inspection.states), strict=True
    )
    return torch.stack(token_ids), torch.stack(probabilities)


class _KeptStates:
    """Keeps each state that it is shown (`models.recurrence.StateTrace`)."""

    def __init__(self, model: LanguageModel, first_predicting: int) -> None:
        self.states: list[CycleState] = []
        self._model = model
        self._stacks = [each.stack for each in model.config.applications()]
        self._first_predicting = first_predicting
        self._writes: Counter[str] = Counter()

    def add(self, name: str, before: Tensor | None, after: Tensor) -> None:
        application = len(self.states)
        self._writes[name] += 1
        state = CycleState(
            application,
            self._stacks[application],
            name,
            self._writes[name],
            after.float().cpu().clone(),
            self._model.logits(after[self._first_predicting :]).cpu(),
        )
        self.states.append(state)
