"""Answers and options given as text, as the token ids that are scored."""

from __future__ import annotations

from collections.abc import Sequence

from data_io.prompt_format import PromptFormat


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
