"""transformers' HrmTextForCausalLM that finds the prefix by itself; shipped beside its weights.

Loaded with `trust_remote_code=True` alone. The class keeps its name, so that what it saves loads
without this file too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import HrmTextForCausalLM as NativeHrmTextForCausalLM

from .prefix_of_prompt import FindsPrefix, warn_of_labels_within


class HrmTextForCausalLM(FindsPrefix, NativeHrmTextForCausalLM):
    _auto_class = "AutoModelForCausalLM"  # so that saving copies this file too
    _has_looked_at_labels = False

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, prefix_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Masks of static caches are made from `token_type_ids`, before `forward` is called."""
        if prefix_mask is not None and self.config.prefix_lm:
            kwargs["token_type_ids"] = _grown(prefix_mask, input_ids.shape[1])
        parent: Any = super()
        prepared = parent.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        return {**prepared, "prefix_mask": prefix_mask}

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] -- one argument more
        self,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        token_type_ids: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        *,
        prefix_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the class that it extends; `prefix_mask` [B, P] bool names the prefix too."""
        given: Tensor = inputs_embeds if input_ids is None else input_ids
        prefix = None
        if self.config.prefix_lm:
            prefix = self.prefix_of_call(
                input_ids,
                num_tokens=given.shape[1],
                num_cached=0 if past_key_values is None else int(past_key_values.get_seq_length()),
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                prefix_mask=prefix_mask,
            )
        if prefix is not None and labels is not None and not self._has_looked_at_labels:
            warn_of_labels_within(prefix, labels)
            self._has_looked_at_labels = True  # once: looking waits for the GPU
        marks: Any = None if prefix is None else prefix.long()
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            token_type_ids=marks,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **kwargs,
        )


def _grown(prefix: Tensor, length: int) -> Tensor:
    """`token_type_ids` of `length` tokens: what follows the prompt is none of the prefix."""
    return pad(prefix, (0, length - prefix.shape[1])).long()
