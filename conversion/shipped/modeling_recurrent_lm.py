"""Executes an exported recurrent language model in transformers; shipped beside its weights.

Shapes: B rows, T tokens of this call, P tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .blocks_recurrent_lm import Stack, StackSettings, View
from .configuration_recurrent_lm import RecurrentLMConfig
from .prefix_of_prompt import FindsPrefix, prefix_up_to_last, warn_of_labels_within


class RecurrentLMPreTrainedModel(PreTrainedModel):
    config_class = RecurrentLMConfig
    config: RecurrentLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["RecurrentLMModel"]  # its states are added: they stay on one device
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True


class RecurrentLMModel(RecurrentLMPreTrainedModel):
    """Token embedding, and the stacks applied in the order that the configuration gives."""

    def __init__(self, config: RecurrentLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        calls = Counter(application["stack"] for application in config.applications)
        self.settings = {
            name: StackSettings(
                config.hidden_size, entry, lora=config.lora, num_calls=max(1, calls[name])
            )
            for name, entry in config.stacks.items()
        }
        for name, settings in self.settings.items():
            self.add_module(name, Stack(settings, config))
        self.starts_from_vector = any("z_L_init" in each["reads"] for each in config.applications)
        if self.starts_from_vector:
            self.register_buffer("z_L_init", torch.randn(config.hidden_size, dtype=torch.bfloat16))
        self.post_init()

    @property
    def has_prefix(self) -> bool:
        """Whether any stack reads the prompt in both directions."""
        return not all(settings.is_causal for settings in self.settings.values())

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        prefix: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        token_type_ids: Tensor | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """`hidden_states`, where asked for: the embedded tokens, then what each application wrote.

        `prefix` [B, T] bool: tokens that see each other in both directions. Programs that call this
        without the head (trl's trainers) say it by `token_type_ids`, or it is looked for; `others`
        are what they pass to every model, and mean nothing here.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; it is [batch, tokens]"
            )
        is_first = past_key_values is None or not int(past_key_values.get_seq_length())
        if prefix is None and self.has_prefix and is_first:
            if token_type_ids is not None:
                prefix = token_type_ids == 1
            elif input_ids is not None and self.config.eoq_token_id is not None:
                prefix = prefix_up_to_last(self.config.eoq_token_id, input_ids, attention_mask)
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        view = self._view(embedded, attention_mask, position_ids, past_key_values, prefix)
        answer = embedded * self.config.embedding_scale
        states = {"x": answer}
        if self.starts_from_vector:
            states["z_L_init"] = self.get_buffer("z_L_init").to(answer.device)
        written, slot, with_gradient = [answer], 0, torch.is_grad_enabled()
        calls = Counter[str]()
        for application in self.config.applications:
            keeps_gradient = with_gradient and application.get("keeps_gradient", True)
            with torch.set_grad_enabled(keeps_gradient):
                first, *rest = (states[name] for name in application["reads"])
                total = sum(rest, first).to(answer.dtype)
                name = application["stack"]
                answer = self.get_submodule(name)(total, view, slot, calls[name])
            slot += self.settings[name].num_layers
            calls[name] += 1
            states[application["writes"]] = answer
            written.append(answer)
        return BaseModelOutputWithPast(
            last_hidden_state=answer,
            past_key_values=past_key_values,
            hidden_states=tuple(written) if output_hidden_states else None,
        )

    def _view(
        self,
        embedded: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        prefix: Tensor | None,
    ) -> View:
        num_tokens = embedded.shape[1]
        # A static cache returns the tensor that it will count up: its value now is wanted.
        num_cached = 0 if cache is None else int(cache.get_seq_length())
        is_real = None
        if attention_mask is not None and not attention_mask.all():
            is_real = attention_mask.to(embedded.device).bool()
            prefix = None if prefix is None else prefix & is_real
        if position_ids is None:
            position_ids = torch.arange(num_cached, num_cached + num_tokens)[None]
            if is_real is not None:
                position_ids = (is_real.cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:]
        return View(
            position_ids.to(embedded.device),
            prefix=prefix,
            is_real=is_real,
            cache=cache,
            num_cached=num_cached,
        )


class RecurrentLMForCausalLM(FindsPrefix, RecurrentLMPreTrainedModel, GenerationMixin):
    def __init__(self, config: RecurrentLMConfig) -> None:
        super().__init__(config)
        self.model = RecurrentLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._has_looked_at_labels = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        prefix_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, V], and the loss where there are `labels`.

        Tokens with `token_type_ids` 1 are the prefix; without them it is what ends with the last
        eoq of the row. Neither matters once the prompt is in the cache. Only the answer's tokens
        should have labels: those of the prefix see what they are to predict.
        """
        given = inputs_embeds if input_ids is None else input_ids
        prefix = None
        if self.model.has_prefix and given is not None:
            prefix = self.prefix_of_call(
                input_ids,
                num_tokens=given.shape[1],
                num_cached=0 if past_key_values is None else int(past_key_values.get_seq_length()),
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                prefix_mask=prefix_mask,
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            prefix=prefix,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if prefix is not None and not self._has_looked_at_labels:
                warn_of_labels_within(prefix, labels)
            self._has_looked_at_labels = True  # once: looking waits for the GPU
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return result if return_dict in (None, True) else result.to_tuple()

    @staticmethod
    def create_masks_for_generate(
        *, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor | None:
        """The mask as it is: what is seen is worked out in `forward`, for static caches too."""
        return attention_mask
