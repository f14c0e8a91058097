"""Answers and options given as text, as the token ids that are scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from data_io.prompt_format import PromptFormat


def pairs_of(prompts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The prompts as they come; ValueError for one that is no pair of condition and text."""
    for pair in prompts:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(
                f"{pair!r:.80} is no prompt: each is a pair of condition and text, such as "
                "('direct', 'rev neon')"
            )
        yield pair


def answer_ids(prompt_format: PromptFormat, text: str, *, ends: bool) -> list[int]:
    """An answer's ids; with `ends` the token that ends it is the last of them."""
    ids = prompt_format.encode_response(text)
    return ids if ends else ids[:-1]


def option_ids(prompt_format: PromptFormat, options: Sequence[str]) -> list[int]:
    """The id of each option; ValueError for options of no token, of several, or alike."""
    ids = []
    for option in options:
        tokens = answer_ids(prompt_format, option, ends=False)
        if len(tokens) != 1:
            raise ValueError(
                f"the option {option!r} is {len(tokens)} tokens, and options are compared by one; "
                "use letters (and spell the options out in the prompt), or score them as answers"
            )
        ids += tokens
    if len(set(ids)) != len(ids):
        raise ValueError(f"the options {list(options)} are not all different")
    return ids
