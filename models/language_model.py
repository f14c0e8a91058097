"""The language model: token embedding -> recurrent core -> head, over packed rows or a cache.

Owns the paths through the model (packed, prefill, decode), not loss, sharding or sampling.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.attention import AttentionBackend, AttentionPlan
from models.attention.interface import FusedContext, PackedContext
from models.attention.one_pass import OnePassPlan
from models.batch import PackedLayout
from models.kv_cache import DecodeStep, DecodingContext, KVCache, PrefillContext, RowKernel
from models.layers import Linear, Rope
from models.recurrence import RecurrentCore, StateTrace
from models.transformer import NetConfig

VOCAB_MULTIPLE = 256


def packed_context(plan: AttentionPlan, head_size: int) -> PackedContext | FusedContext:
    """With rotary positions and the gate in the attention's kernels where these can."""
    if isinstance(plan, OnePassPlan) and plan.can_rotate(head_size):
        return FusedContext(plan)
    return PackedContext(plan)


class LanguageModel(nn.Module):
    """A recurrent language model; parameters are named as in the export target."""

    def __init__(self, config: NetConfig, vocab_size: int, attention: AttentionBackend) -> None:
        super().__init__()
        if vocab_size < 1 or vocab_size % VOCAB_MULTIPLE:
            raise ValueError(
                f"vocab_size={vocab_size} must be a positive multiple of {VOCAB_MULTIPLE}; "
                "round the tokenizer's size up"
            )
        self.config = config
        self.attention = attention
        self._stacks = dict(config.stacks())  # making the records takes as long as a small layer
        self._stack_of_each_application = [each.stack for each in config.applications()]
        self.model = RecurrentCore(config, vocab_size)
        self.lm_head = Linear(config.hidden_size, vocab_size, std=config.answer_stack.in_std)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        layout: PackedLayout,
        backprop_steps: int | None = None,
        trace: StateTrace | None = None,
    ) -> Tensor:
        """One packed row, `tokens` and `positions` [T] -> hidden [T, D] (before the head).

        `backprop_steps` is HRM's number of gradient-carrying calls (None: `bp_max_steps`); the
        other nets have theirs in the configuration. `trace` is shown each state as it is written.
        """
        plans = self._plans(layout, len(tokens))
        contexts = [
            packed_context(plans[name], self._stacks[name].head_size)
            for name in self._stack_of_each_application
        ]
        return self.model(tokens, self._ropes(positions), contexts, backprop_steps, trace)

    def prefill(
        self,
        tokens: Tensor,
        positions: Tensor,
        layout: PackedLayout,
        cache: KVCache,
        cache_rows: Tensor,
    ) -> Tensor:
        """A packed row of prompts -> hidden [T, D]; fills the cache.

        `cache_rows` [S] is the cache row of each sequence slot (unused slots: any value). The rows
        are overwritten from their beginning, and their lengths set.
        """
        plans = self._plans(layout, len(tokens))
        where = cache.start_prefill(layout, positions, cache_rows)
        contexts = [
            PrefillContext(plans[name], cache.layers(application), where)
            for application, name in enumerate(self._stack_of_each_application)
        ]
        return self.model(tokens, self._ropes(positions), contexts)

    def decode(self, tokens: Tensor, cache: KVCache, num_columns: int | None = None) -> Tensor:
        """One more token for each of the first B cache rows, `tokens` [B] -> hidden [B, D].

        The token is causal: it sees everything before it in its row and itself. `num_columns`:
        tokens of the longest of these rows with the new one, where the caller knows it.
        """
        return self._decode(tokens, cache, cache.start_decode(len(tokens), num_columns))

    def decode_static(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The same with static shapes, for compiled code and CUDA graphs: nothing waits for the
        host, and each row is read in the cache's whole length. The caller sees that none is full.
        """
        return self._decode(tokens, cache, cache.start_static_decode(len(tokens)))

    def _decode(self, tokens: Tensor, cache: KVCache, step: DecodeStep) -> Tensor:
        contexts = [
            DecodingContext(cache.layers(application), step, cache.kernel)
            for application, _ in enumerate(self._stack_of_each_application)
        ]
        return self.model(tokens, self._ropes(step.positions), contexts)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], in fp32."""
        return self.lm_head(hidden).float()

    def new_cache(self, num_rows: int, max_length: int, kernel: RowKernel | None = None) -> KVCache:
        """An empty cache for `num_rows` sequences of at most `max_length` tokens.

        With a `kernel` it is laid out for that one, which then decodes.
        """
        return KVCache.empty(
            [self._stacks[name] for name in self._stack_of_each_application],
            num_rows,
            max_length,
            like=self.lm_head.weight,
            kernel=kernel,
        )

    def _plans(self, layout: PackedLayout, num_rows: int) -> dict[str, AttentionPlan]:
        """Attention plans by stack; stacks that attend alike share one."""
        prepared: dict[str, AttentionPlan] = {}
        plans: dict[str, AttentionPlan] = {}
        for name, stack in self._stacks.items():
            if stack.attn_type not in prepared:
                is_causal = stack.attn_type == "causal"
                seen = layout.as_causal() if is_causal else layout
                prepared[stack.attn_type] = self.attention.prepare(seen, num_rows)
            plans[name] = prepared[stack.attn_type]
        return plans

    def _ropes(self, positions: Tensor) -> dict[str, Rope | None]:
        """Rotary positions by stack; stacks that rotate alike share them."""
        made: dict[tuple[int, float], Rope] = {}
        ropes: dict[str, Rope | None] = {}
        for name, stack in self._stacks.items():
            if stack.pos_emb_type == "none":
                ropes[name] = None
                continue
            kind = (stack.head_size, stack.rope_theta)
            if kind not in made:
                made[kind] = Rope.at(positions, *kind)
            ropes[name] = made[kind]
        return ropes
