"""Configuration of an exported recurrent language model; shipped beside its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig


class RecurrentLMConfig(PreTrainedConfig):
    """A net as stacks of blocks, and the order in which they are applied to which states.

    `stacks`: name -> n_layers, num_heads, head_dim, intermediate_size, norm_type (pre, post),
    norm_eps, pos_emb_type (rope, none), rope_theta, attn_type (prefix_lm, causal).
    `applications`: stack, reads (states that are added), writes (the state that it makes), and
    where it is false keeps_gradient; states are x (the embedded tokens), z_L_init, and what was
    written; the last one written is the answer. `num_hidden_layers` counts layers over all
    applications: each has keys and values of its own. `lora`: rank, alpha and targets of adapters
    that every application of a stack has for itself, where there are any.
    """

    model_type = "recurrent_lm"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        *,
        vocab_size: int = 256,
        hidden_size: int = 64,
        max_position_embeddings: int = 2048,
        embedding_scale: float = 1.0,
        eoq_token_id: int | None = None,
        use_cache: bool = True,
        stacks: Mapping[str, Mapping[str, Any]] | None = None,
        applications: Sequence[Mapping[str, Any]] = (),
        lora: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.embedding_scale = embedding_scale
        self.eoq_token_id = eoq_token_id
        self.use_cache = use_cache
        self.stacks = {name: dict(stack) for name, stack in (stacks or {}).items()}
        self.applications = [dict(application) for application in applications]
        self.lora = None if lora is None else dict(lora)
        names = [application["stack"] for application in self.applications]
        unknown = sorted(set(names) - set(self.stacks))
        if unknown:
            raise ValueError(f"applications of stacks that are not there: {', '.join(unknown)}")
        self.num_hidden_layers = sum(self.stacks[name]["n_layers"] for name in names)
        if names:  # what other programs ask a configuration for
            self.num_attention_heads = self.stacks[names[-1]]["num_heads"]
            self.head_dim = self.stacks[names[-1]]["head_dim"]
        derived = ("num_hidden_layers", "num_attention_heads", "head_dim")
        others = {key: value for key, value in others.items() if key not in derived}
        others.setdefault("initializer_range", 1.0 / embedding_scale)
        others.setdefault("tie_word_embeddings", False)
        super().__init__(**others)
