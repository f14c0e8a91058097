"""An example as a reader sees it: what is read, and what is learned of the answer."""

from __future__ import annotations

import os
import re
import sys
from itertools import groupby

from tokenizers import Tokenizer

from data_io.examples import Example

READ, LEARNED, PASSED, PLAIN = "\x1b[36m", "\x1b[32m", "\x1b[2m", "\x1b[0m"
SHOWN_CHARS = 600  # of the prefix, and of each stretch of the response


def shown(tokenizer: Tokenizer, example: Example, *, is_colored: bool | None = None) -> str:
    """Several lines: the prefix, then each stretch of the response, learned or not.

    Colours: where standard error is a terminal and NO_COLOR is not set.
    """
    if is_colored is None:
        is_colored = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    lines = [f"example of {len(example.inst_ids)} + {len(example.resp_ids)} tokens"]
    scored = example.scored or [1] * len(example.resp_ids)
    stretches = [("read   ", READ, example.inst_ids)]
    for is_learned, group in groupby(zip(scored, example.resp_ids, strict=True), lambda x: x[0]):
        name, color = ("learned", LEARNED) if is_learned else ("passed ", PASSED)
        stretches.append((name, color, [token for _, token in group]))
    for name, color, ids in stretches:
        text = _visible(tokenizer.decode(ids, skip_special_tokens=False))
        if len(text) > SHOWN_CHARS:
            half = SHOWN_CHARS // 2
            text = f"{text[:half]} ... {text[-half:]}"
        lines.append(f"  {name} {color}{text}{PLAIN}" if is_colored else f"  {name} {text}")
    return "\n".join(lines)


def _visible(text: str) -> str:
    """Control characters, which could steer a terminal, are spelled out."""
    return re.sub(r"[^ -~\xa0-\U0010ffff]", lambda match: repr(match[0])[1:-1], text)
