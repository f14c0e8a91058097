"""What the programs that ask a model share: settings, rows of a file, prompts, text as it comes.

Owns no terminal and no page; scripts/chat.py, scripts/answer.py and scripts/chat_web.py do.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from data_io.parsing import parse_json
from data_io.prompt_format import PromptFormat
from data_io.records import Conversation, Turn
from data_io.trm_template import to_trm_row
from inference.model_folder import ModelOptions
from inference.requests import Answer, Request, Sampling, Token

USUAL_CONDITION = "direct"
SAMPLED_VALUES = 64
BROKEN = "\ufffd"  # what bytes decode to that are no character, or not yet a whole one


class AskOptions(ModelOptions):
    """A model, and how its answers are made."""

    condition: str | None = Field(
        default=None,
        description="condition names, such as synth,cot (null: direct where the model knows it)",
    )
    max_output_tokens: PositiveInt | None = Field(
        default=None, description="tokens of an answer (null: as many as the context holds)"
    )
    temperature: float = Field(default=0.0, description="of sampling (0: the likeliest token)")
    top_k: PositiveInt | None = Field(
        default=None, description="samples among so many of the likeliest tokens (null: all)"
    )
    top_p: float = Field(
        default=1.0, description="samples among the likeliest tokens of this probability together"
    )
    seed: int = Field(default=0, description="of sampling: the same seed, the same answer")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)

    @model_validator(mode="after")
    def _can_be_sampled(self) -> Self:
        assert self.sampling  # refuses what cannot be
        return self


class Streaming(Protocol):
    """What is needed of an engine here."""

    @property
    def max_context(self) -> int: ...

    def stream(self, requests: Iterable[Request]) -> Iterator[Token | Answer]: ...


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a JSONL file: what is asked, and what is right where the file says so."""

    prompt: str
    condition: str | None = None
    response: str | None = None


Template = Literal["conversation", "trm"]  # trm: that of data_io.trm_template


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What stands around the text that is asked, in the form in which the model was taught it."""

    condition: str
    system: str = ""
    shots: str = ""  # worked examples, as `shots_text` writes them
    turns: tuple[tuple[str, str], ...] = ()  # earlier (role, text), as in `encode_conversation`
    template: Template = "conversation"

    def encode(self, prompt_format: PromptFormat, text: str) -> list[int]:
        """Ids of the prompt that asks `text`. System and shots stand before the first turn."""
        (role, first), *others = (*self.turns, ("user", text))
        turns = [(role, self.shots + first), *others]
        if self.template == "trm":
            said = (Turn("user" if who == "user" else "assistant", it, False) for who, it in turns)
            wanted = Turn("assistant", "", True)
            row = to_trm_row(Conversation(self.condition, self.system, (*said, wanted)))
            return prompt_format.encode_prompt(self.condition, row.instruction)
        if self.system:
            turns.insert(0, ("system", self.system))
        return prompt_format.encode_conversation(self.condition, turns)


def pick_condition(prompt_format: PromptFormat, condition: str | None) -> str:
    """`condition` if the model knows it; where none is given, the usual one."""
    if condition is None and USUAL_CONDITION not in prompt_format.conditions:
        raise ValueError(
            f"this model has no condition {USUAL_CONDITION!r}, so say which one is meant: "
            f"condition=..., of {sorted(prompt_format.conditions)}, several are joined by commas"
        )
    chosen = USUAL_CONDITION if condition is None else condition
    prompt_format.condition_ids(chosen)
    return chosen


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL file; blank lines are none.

    An object a line: `instruction` (or `prompt`), and optionally `condition` and `response`; other
    keys are left alone. ValueError names the line that is no such row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give a JSONL file, an object a line")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield _row(parse_json(line.decode("utf-8")))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None


def _row(values: Any) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f'{values!r:.60} is no object; write {{"instruction": ...}}')
    names = [name for name in ("instruction", "prompt") if name in values]
    if len(names) != 1:
        raise ValueError(
            f"a row has either an instruction or a prompt, this one has {names or sorted(values)}"
        )
    for name in (*names, "condition", "response"):
        is_absent = values.get(name) is None and name not in names
        if not is_absent and not isinstance(values[name], str):
            raise ValueError(f"{name}={values[name]!r:.60} is no text")
        if not is_absent and re.search("[\ud800-\udfff]", values[name]):
            raise ValueError(f"{name} holds half of a surrogate pair, which is no character")
    return Row(values[names[0]], values.get("condition"), values.get("response"))


def shots_text(path: Path, num_shots: int) -> str:
    """The first rows of a JSONL file as worked examples: each instruction with its response."""
    rows = list(islice(read_rows(path), num_shots))
    if len(rows) < num_shots:
        raise ValueError(f"{path} has {len(rows)} rows; use num_shots={len(rows)} or fewer")
    lacking = [number for number, row in enumerate(rows, 1) if row.response is None]
    if lacking:
        raise ValueError(f"{path}: rows {lacking} have no response; a worked example needs one")
    return "".join(f"{row.prompt}\n{row.response}\n\n" for row in rows)


def too_long(num_tokens: int, max_context: int) -> str:
    """The message for a prompt that leaves no room for an answer."""
    return (
        f"the prompt has {num_tokens:,} tokens, but prompt and answer share a context of "
        f"{max_context:,}; shorten the prompt"
    )


def stream_text(
    engine: Streaming, request: Request, prompt_format: PromptFormat
) -> Iterator[tuple[str, Token | Answer]]:
    """Answers one request: each token with the text that it completes, then the answer.

    The text of a token is empty until its characters are whole; the rest of it, if any, comes with
    the answer. ValueError for a prompt that fills the context.
    """
    decoder = TextDecoder(prompt_format)
    for event in engine.stream([request]):
        if isinstance(event, Token):
            yield decoder.add(event.token_id), event
        elif event.finish_reason == "prompt_too_long":
            raise ValueError(too_long(len(request.prompt_ids), engine.max_context))
        else:
            yield decoder.rest(), event


class TextDecoder:
    """Turns token ids into text as they come; a character of several tokens comes out whole."""

    def __init__(self, prompt_format: PromptFormat) -> None:
        self._decode = prompt_format.decode
        self._ids: list[int] = []
        # A token may be written otherwise at the beginning of a text (many lose a space there), so
        # those that gave the newest text are decoded again with each new one.
        self._given_from = self._given_to = 0

    def add(self, token_id: int) -> str:
        """The text that this token completes."""
        self._ids.append(token_id)
        text = self._unread()
        if text.endswith(BROKEN):
            return ""
        if text:  # else a special token, beside which the next one would lose a space again
            self._given_from = self._given_to
        self._given_to = len(self._ids)
        return text

    def rest(self) -> str:
        """What is left where the last character stays broken."""
        return self._unread()

    def _unread(self) -> str:
        given = self._decode(self._ids[self._given_from : self._given_to])
        return self._decode(self._ids[self._given_from :])[len(given) :]


def spelled(prompt_format: PromptFormat, token_id: int) -> str:
    """One token as it is shown: its text in quotes, its name where it is no text of its own."""
    text = prompt_format.tokenizer.decode([token_id], skip_special_tokens=False)
    name = prompt_format.tokenizer.id_to_token(token_id)
    return repr(name or token_id) if BROKEN in text or not text else repr(text)


def step_line(prompt_format: PromptFormat, number: int, token: Token) -> str:
    """One step of an answer: the chosen token, and the likeliest ones with probabilities."""
    likely = "  ".join(
        f"{spelled(prompt_format, token_id)} {probability:.3f}"
        for token_id, probability in token.likely
    )
    chosen = f"{spelled(prompt_format, token.token_id)} {token.probability:.3f}"
    return f"{number:>4}  {chosen:<16}| {likely}"


def was_cut(answer: Answer, limit: int | None) -> str | None:
    """A note on an answer that did not come to its end; None for a whole one."""
    if answer.finish_reason != "length":
        return None
    reason = "the context is full"
    if limit is not None and len(answer.token_ids) >= limit:
        reason = f"max_output_tokens={limit}"
    return f"cut off after {len(answer.token_ids):,} tokens: {reason}"


def weights_fingerprint(model: nn.Module) -> str:
    """Tells a model's weights from others by a few values of each tensor."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // SAMPLED_VALUES)]
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        # A copy: memory that numpy has seen cannot be given back by a sharded model.
        digest.update(sample.float().cpu().clone().numpy().tobytes())
    return digest.hexdigest()[:32]
