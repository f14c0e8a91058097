"""Generation settings as lm-evaluation-harness writes them, for our engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inference.requests import Sampling

USUAL_MAX_NEW_TOKENS = 256  # as for lm-eval's `hf`
MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
KNOWN_SETTINGS = {*MAX_NEW_TOKENS, "until", "do_sample", "temperature", "top_k", "top_p"}


@dataclass(frozen=True, slots=True)
class Generation:
    """How an answer is made and ended."""

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: Sampling


def read_generation(settings: Mapping[str, Any], seed: int = 0) -> Generation:
    """The settings of a task, or of --gen_kwargs.

    ValueError for those that the engine does not have, such as beams: their answers are others.
    """
    unknown = sorted(settings.keys() - KNOWN_SETTINGS)
    if unknown:
        raise ValueError(
            f"generation settings {unknown} are unknown here; known are {sorted(KNOWN_SETTINGS)}"
        )
    until = settings.get("until") or []
    temperature = float(settings.get("temperature") or 0.0)
    do_sample = settings.get("do_sample")
    if do_sample and not temperature:
        raise ValueError("do_sample=True at temperature 0 draws nothing; give a temperature")
    given = (settings[name] for name in MAX_NEW_TOKENS if settings.get(name) is not None)
    max_new_tokens = int(next(given, USUAL_MAX_NEW_TOKENS))
    if max_new_tokens < 1:
        raise ValueError(f"max_gen_toks={max_new_tokens} generates nothing; use 1 or more")
    top_k = int(settings.get("top_k") or 0)  # 0, as in transformers: all
    return Generation(
        tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        max_new_tokens,
        Sampling(
            0.0 if do_sample is False else temperature,
            top_k=top_k if top_k > 0 else None,
            top_p=float(settings.get("top_p") or 1.0),
            seed=seed,
        ),
    )
