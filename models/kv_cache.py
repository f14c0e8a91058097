"""Keys and values of the tokens so far, for every application of a stack, and attention over them.

A recurrent net applies the same layers several times to different states, so each application has
keys and values of its own: HRM keeps H_cycles * (L_cycles + 1) of them.
Shapes: B cache rows (sequences), L cache length, S slots of a packed row of T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import AttentionPlan
from models.batch import PackedLayout
from models.transformer import StackConfig


@dataclass(frozen=True, slots=True)
class LayerCaches:
    """The caches of all layers of one application."""

    keys: Tensor  # [layers, B + 1, L, H, K]; the last row takes what belongs nowhere (padding)
    values: Tensor  # the same


@dataclass(frozen=True, slots=True)
class PrefillTarget:
    """Where each token of a packed row goes in the cache."""

    rows: Tensor  # [T] int64
    columns: Tensor  # [T] int64


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One more token in each of the first B rows of the cache."""

    rows: Tensor  # [B] int64: 0, 1, ..., B - 1
    positions: Tensor  # [B] int64: where the token goes
    visible: Tensor  # [B, 1, 1, columns] bool: what it sees, itself included
    num_columns: int


class KVCache:
    """`lengths` [B] int32 tokens per row, and one `LayerCaches` per application, in order."""

    def __init__(self, lengths: Tensor, applications: Sequence[LayerCaches]) -> None:
        self.lengths = lengths
        self._applications = list(applications)

    @classmethod
    def empty(
        cls, stacks: Sequence[StackConfig], num_rows: int, max_length: int, *, like: Tensor
    ) -> KVCache:
        """An empty cache on the device and in the type of `like`; `stacks`: one an application."""
        applications = []
        for stack in stacks:
            shape = (stack.n_layers, num_rows + 1, max_length, stack.num_heads, stack.head_size)
            keys = torch.zeros(shape, dtype=like.dtype, device=like.device)
            applications.append(LayerCaches(keys, torch.zeros_like(keys)))
        return cls(torch.zeros(num_rows, dtype=torch.int32, device=like.device), applications)

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        return self._applications[0].keys.shape[2]

    def layers(self, application: int) -> LayerCaches:
        return self._applications[application]

    def reserve(self, length: int) -> None:
        """Makes room for rows of `length` tokens, keeping what they hold.

        It at least doubles, so that a cache grown token by token copies each but a few times.
        """
        if length <= self.max_length:
            return
        added = (0, 0, 0, 0, 0, max(length - self.max_length, self.max_length))  # K, H, L
        for application, layers in enumerate(self._applications):
            self._applications[application] = LayerCaches(
                F.pad(layers.keys, added), F.pad(layers.values, added)
            )

    def move_rows(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Overwrites the rows `targets` with the rows `sources`; no row is in both."""
        assert not set(sources) & set(targets), (sources, targets)
        if not sources:
            return
        source = torch.tensor(sources, device=self.lengths.device)
        target = torch.tensor(targets, device=self.lengths.device)
        self.lengths[target] = self.lengths[source]
        longest = int(self.lengths[source].amax())  # sync: what lies beyond need not be copied
        for layers in self._applications:
            for tensor in (layers.keys[:, :, :longest], layers.values[:, :, :longest]):
                tensor[:, target] = tensor[:, source]

    def start_prefill(self, layout: PackedLayout, positions: Tensor, rows: Tensor) -> PrefillTarget:
        """Sets the lengths of `rows` [S] to the sequences' and says where tokens go."""
        num_seqs, num_tokens = int(layout.num_seqs), int(layout.num_tokens)
        longest = int(layout.max_seq_len)
        if longest > self.max_length:
            raise ValueError(
                f"a prompt of {longest} tokens does not fit into a cache of {self.max_length}; "
                "shorten it or make the cache longer"
            )
        seq_lens = (layout.prefix_lens + layout.causal_lens)[:num_seqs]
        used_rows = rows[:num_seqs].long()
        self.lengths[used_rows] = seq_lens
        token_rows = torch.full_like(positions, self.num_rows, dtype=torch.int64)
        token_rows[:num_tokens] = used_rows.repeat_interleave(
            seq_lens.long(), output_size=num_tokens
        )
        return PrefillTarget(token_rows, positions.long())

    def start_decode(self, num_rows: int) -> DecodeStep:
        """Counts one more token in each of the first `num_rows` rows, and says where it goes."""
        positions = self.lengths[:num_rows].long()
        # sync: the longest row bounds what is read; a static bound would read the whole cache.
        num_columns = int(positions.amax()) + 1
        if num_columns > self.max_length:
            raise ValueError(
                f"a row of the cache is full ({self.max_length} tokens); stop it or make the "
                "cache longer"
            )
        self.lengths[:num_rows] += 1
        columns = torch.arange(num_columns, device=positions.device)
        return DecodeStep(
            rows=torch.arange(num_rows, device=positions.device),
            positions=positions,
            visible=(columns <= positions[:, None])[:, None, None],
            num_columns=num_columns,
        )


@dataclass(frozen=True, slots=True)
class PrefillContext:
    """Attention within a packed row of prompts that also fills the cache."""

    plan: AttentionPlan
    caches: LayerCaches
    target: PrefillTarget

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        where = (self.target.rows, self.target.columns)
        self.caches.keys[layer].index_put_(where, key)
        self.caches.values[layer].index_put_(where, value)
        return self.plan.attend(query, key, value)


@dataclass(frozen=True, slots=True)
class DecodingContext:
    """Attention of one new token a row, all [B, H, K], to everything before it."""

    caches: LayerCaches
    step: DecodeStep

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        where = (self.step.rows, self.step.positions)
        keys, values = self.caches.keys[layer], self.caches.values[layer]
        keys.index_put_(where, key)
        values.index_put_(where, value)
        num_rows = len(self.step.rows)
        mixed = F.scaled_dot_product_attention(
            query[:, :, None],  # [B, H, 1, K]
            keys[:num_rows, : self.step.num_columns].transpose(1, 2),  # [B, H, columns, K]
            values[:num_rows, : self.step.num_columns].transpose(1, 2),
            attn_mask=self.step.visible,
        )
        return mixed.squeeze(2)
