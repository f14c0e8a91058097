"""How the next tokens are chosen from their logits."""

from __future__ import annotations

from torch import Tensor


def next_tokens(logits: Tensor) -> Tensor:
    """The token that follows in each row, [B, V] -> [B]: the most likely one."""
    return logits.argmax(-1)
