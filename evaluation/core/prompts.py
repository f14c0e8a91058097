"""CORE's rows as token sequences: shots, rendering, and where the options of a row differ.

Raw text stands behind a prefix of one token (`boq`), as raw text is trained on, and is causal; or
it is asked as a prompt, as models are that were trained on instructions, and answered:

    prefix=bos       boq | shots, context, delimiter, continuation
    prefix=prompt    boq, condition, shots, context, delimiter, eoq | continuation
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Literal

from data_io.prompt_format import PromptFormat
from evaluation.core.bundle import Example, TaskEntry, TaskType
from inference.requests import Span

ORDER_SEED, SHOTS_SEED = 1337, 1234
ENCODED_TOGETHER = 256  # rows
PrefixKind = Literal["bos", "prompt"]


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """One row with its shots."""

    shots: str  # ends in a blank line where there are any
    delimiter: str
    example: Example
    kind: TaskType

    def before(self, context: str) -> str:
        """All that stands before the continuation."""
        return f"{self.shots}{_context(context, self.kind)}{self.delimiter}"

    @property
    def shown(self) -> str:
        """For people: what differs between the options stands in braces."""
        contexts, continuations = self.example.contexts, self.example.continuations
        parts = [" | ".join(contexts), " | ".join(continuations)]
        scored = 0 if self.kind == "schema" else 1
        parts[scored] = f"{{{parts[scored]}}}"
        return f"{self.shots}{parts[0]}{self.delimiter}{parts[1]}"


def in_core_order(examples: Sequence[Example], max_rows: int | None) -> list[Example]:
    """Shuffled, then cut; shots come from what is left."""
    shuffled = list(examples)
    random.Random(ORDER_SEED).shuffle(shuffled)
    return shuffled[:max_rows]


def rendered(examples: Sequence[Example], entry: TaskEntry) -> Iterator[RenderedRow]:
    """Each row after shots of its own. ValueError where there are too few rows for the shots."""
    if entry.num_fewshot >= len(examples):
        raise ValueError(
            f"{entry.label} has {len(examples)} rows, of which a row takes {entry.num_fewshot} "
            "others as shots; raise max_per_task, or leave the task out with tasks=[...]"
        )
    kind, delimiter = entry.icl_task_type, entry.continuation_delimiter
    for index, example in enumerate(examples):
        # Of the others by their position among them: sampling depends on their number alone.
        chosen = random.Random(SHOTS_SEED + index).sample(
            range(len(examples) - 1), entry.num_fewshot
        )
        others = (at + (at >= index) for at in chosen)
        shots = "".join(_shot(examples[other], kind, delimiter) for other in others)
        yield RenderedRow(shots, delimiter, example, kind)


def _shot(example: Example, kind: TaskType, delimiter: str) -> str:
    context, continuation = example.options[example.gold]
    return f"{_context(context, kind)}{delimiter}{continuation}\n\n"


def _context(text: str, kind: TaskType) -> str:
    return text.strip() if kind == "language_modeling" else text


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """The token sequences of a row's options."""

    spans: tuple[Span, ...]
    is_moved: bool = False  # the span could not be where the rule puts it; see `encode_rows`

    def packed(self) -> array[int]:
        """One array: what all options begin with is in it once."""
        sequences = [span.token_ids for span in self.spans]
        common = common_prefix(sequences)
        packed = array("i", (len(self.spans), common, self.is_moved))
        for span in self.spans:
            packed.extend((span.num_prefix_tokens, span.start, len(span.token_ids) - common))
        packed.extend(sequences[0][:common])
        for sequence in sequences:
            packed.extend(sequence[common:])
        return packed

    @classmethod
    def unpacked(cls, packed: Sequence[int]) -> EncodedRow:
        num_spans, common, is_moved = packed[:3]
        heads = [packed[at : at + 3] for at in range(3, 3 + 3 * num_spans, 3)]
        at = 3 + 3 * num_spans + common
        shared = [*packed[at - common : at]]
        spans = []
        for num_prefix_tokens, start, rest in heads:
            spans.append(Span([*shared, *packed[at : at + rest]], num_prefix_tokens, start))
            at += rest
        return cls(tuple(spans), bool(is_moved))


def encode_rows(
    rows: Iterable[RenderedRow], prompt_format: PromptFormat, kind: PrefixKind, condition: str
) -> Iterator[EncodedRow]:
    """The scored span: multiple_choice: from the first token at which the options differ;
    schema: the tokens that all options end with; language_modeling: the continuation.

    A span lies after the prefix and has a token or more. `is_moved`: the tokenizer merges across
    the continuation's border (the span then begins with the merged token), or the rule leaves an
    option nothing (the last token is then scored).
    """
    rows = iter(rows)
    while some := list(islice(rows, ENCODED_TOGETHER)):
        encode = _plain if kind == "bos" else _asked
        yield from encode(some, prompt_format, condition)


def _plain(
    rows: Sequence[RenderedRow], prompt_format: PromptFormat, condition: str
) -> Iterator[EncodedRow]:
    texts: list[str] = []
    for row in rows:
        if row.kind == "language_modeling":
            texts.append(row.before(row.example.contexts[0]).strip())
        texts += [row.before(context) + each for context, each in row.example.options]
    encoded = iter(_encode(prompt_format, texts))
    for row in rows:
        border = None
        if row.kind == "language_modeling":
            border = [prompt_format.boq_id, *next(encoded)]
        num_options = len(row.example.options)
        sequences = [[prompt_format.boq_id, *next(encoded)] for _ in range(num_options)]
        yield _with_spans(row.kind, sequences, [1] * num_options, border)


def _asked(
    rows: Sequence[RenderedRow], prompt_format: PromptFormat, condition: str
) -> Iterator[EncodedRow]:
    prompts = [row.before(context).strip() for row in rows for context, _ in row.example.options]
    answers = [each.strip() for row in rows for _, each in row.example.options]
    asked = iter(prompt_format.encode_prompts([condition] * len(prompts), prompts))
    answered = iter(_encode(prompt_format, answers))
    for row in rows:
        sequences, prefixes = [], []
        for _ in row.example.options:
            prompt = next(asked)
            sequences.append([*prompt, *next(answered)])
            prefixes.append(len(prompt))
        border = sequences[0][: prefixes[0]] if row.kind == "language_modeling" else None
        yield _with_spans(row.kind, sequences, prefixes, border)


def _with_spans(
    kind: TaskType,
    sequences: Sequence[Sequence[int]],
    prefixes: Sequence[int],
    border: Sequence[int] | None,
) -> EncodedRow:
    """`border`: the sequence without its continuation, of language modelling."""
    if kind == "schema":
        suffix = common_prefix([sequence[::-1] for sequence in sequences])
        wanted = [len(sequence) - suffix for sequence in sequences]
    elif border is not None:
        wanted = [common_prefix([border, sequences[0]])]
    else:
        wanted = [common_prefix(sequences)] * len(sequences)
    if any(len(each) <= prefix for each, prefix in zip(sequences, prefixes, strict=True)):
        raise ValueError("the tokenizer makes no token of an option's text, so it has no score")
    spans, is_moved = [], border is not None and wanted != [len(border)]
    for sequence, prefix, start in zip(sequences, prefixes, wanted, strict=True):
        is_moved |= start >= len(sequence)
        spans.append(Span(sequence, prefix, max(prefix, min(start, len(sequence) - 1))))
    return EncodedRow(tuple(spans), is_moved)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))


def _encode(prompt_format: PromptFormat, texts: Sequence[str]) -> list[list[int]]:
    return [ids[:-1] for ids in prompt_format.encode_responses(texts)]


def cropped(span: Span, max_context: int, kept: int) -> Span | None:
    """The sequence without as many of its tokens as the context has no room for.

    They are taken out after the first `kept` (what every prefix begins with), before the span; of a
    prompt only its text goes. None: that does not suffice.
    """
    excess = len(span.token_ids) - max_context
    if excess <= 0:
        return span
    is_plain = span.num_prefix_tokens == kept  # a prompt ends in eoq, which stays
    ends = span.start if is_plain else span.num_prefix_tokens - 1
    if kept + excess > ends:
        return None
    token_ids = [*span.token_ids[:kept], *span.token_ids[kept + excess :]]
    prefix = span.num_prefix_tokens - (0 if is_plain else excess)
    return Span(token_ids, prefix, span.start - excess)
