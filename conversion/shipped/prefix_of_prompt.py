"""Which tokens of a prompt are its prefix, and how `generate` keeps them while the answer grows.

Shipped beside exported weights. A prompt ends with the token eoq, and its tokens see each other in
both directions; what follows is the answer and is causal. Programs that pass `input_ids` and
`attention_mask` alone do not say where the prompt ends, so it is looked for here.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor


def prefix_up_to_last(
    eoq_token_id: int, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """[B, T] bool: True up to and including the last eoq of each row, padding left out.

    A row without eoq has no prefix: it is read causally.
    """
    is_real = torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask is not None:
        is_real = attention_mask[:, -input_ids.shape[1] :].bool()
    num_eoq_from_here = ((input_ids == eoq_token_id) & is_real).flip(-1).cumsum(-1).flip(-1)
    return (num_eoq_from_here > 0) & is_real


def warn_of_labels_within(prefix: Tensor, labels: Tensor) -> None:
    """Says it where tokens are to be predicted that the model already sees."""
    if (prefix[:, 1:] & (labels[:, 1:] != -100)).any():
        warnings.warn(
            "tokens of the prompt have labels, but the prompt is read in both directions: what is "
            "to be predicted there is seen. Score the last answer alone (completion only: labels "
            "-100 elsewhere), or give token_type_ids that end the prefix earlier",
            stacklevel=3,
        )


def _prefix_in_call(prefix: Tensor, num_tokens: int, num_cached: int) -> Tensor | None:
    prompt_length = prefix.shape[1]
    if num_cached >= prompt_length:
        return None
    if num_cached or num_tokens < prompt_length:
        raise ValueError(
            f"a prompt of {prompt_length} tokens came in parts ({num_cached} cached, {num_tokens} "
            "given), but its tokens see each other in both directions; leave prefill_chunk_size "
            "out, and give no past_key_values that hold its beginning"
        )
    return torch.nn.functional.pad(prefix, (0, num_tokens - prompt_length))


class FindsPrefix:
    """For causal language models whose config has `eoq_token_id`.

    `prefix_mask` [B, P] bool names the prefix of a prompt of P tokens. Unlike `token_type_ids`,
    which transformers continues with their last value, it does not grow with the answer.
    """

    config: Any

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """`transformers.GenerationMixin.generate` for a prompt that is one prefix."""
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        prefix = self.find_prefix(
            input_ids,
            kwargs.get("attention_mask"),
            kwargs.pop("token_type_ids", None),
            kwargs.pop("prefix_mask", None),
        )
        if prefix is not None:
            kwargs["prefix_mask"] = prefix
        return super().generate(inputs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """ValueError: transformers' continuous batching reads every prompt causally."""
        raise ValueError(
            "continuous batching would read the prompt causally, and its answers would be others; "
            "use generate on a left-padded batch"
        )

    def find_prefix(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        prefix_mask: Tensor | None,
    ) -> Tensor | None:
        """[B, P] bool, by whichever of these says it; None where nothing does."""
        if prefix_mask is not None:
            return prefix_mask.bool()
        if token_type_ids is not None:
            return token_type_ids == 1
        if input_ids is None:
            return None
        if attention_mask is not None and attention_mask.ndim != 2:
            attention_mask = None
        return prefix_up_to_last(self.config.eoq_token_id, input_ids, attention_mask)

    def prefix_of_call(
        self,
        input_ids: Tensor | None,
        *,
        num_tokens: int,
        num_cached: int,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        prefix_mask: Tensor | None,
    ) -> Tensor | None:
        """The prefix among the T tokens of one call, [B, T] bool; None where it is in the cache.

        ValueError where nothing says what it is, and where the call has a part of it alone: its
        tokens would not see the others.
        """
        if num_cached and prefix_mask is None:
            return None
        prefix = self.find_prefix(input_ids, attention_mask, token_type_ids, prefix_mask)
        if prefix is None:
            raise ValueError(
                "inputs_embeds do not show where the prompt ends; give token_type_ids too (1 for "
                "the prompt, 0 for the answer)"
            )
        return _prefix_in_call(prefix, num_tokens, num_cached)
