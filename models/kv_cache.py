"""Keys and values of the tokens so far, for every application of a stack, and attention over them.

A recurrent net applies the same layers several times to different states, so each application has
keys and values of its own: HRM keeps H_cycles * (L_cycles + 1) of them.
Shapes: B cache rows (sequences), L cache length, S slots of a packed row of T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import AttentionPlan
from models.batch import PackedLayout
from models.transformer import StackConfig

GROWTH = 256  # tokens that a cache grows by at least, once it is that long


class RowKernel(Protocol):
    """A kernel for one new token a row that wants the cache laid out for itself.

    `block` tokens lie side by side: caches of one layer are [B + 1, L / block, H, K, block].
    """

    block: int

    def zeros(self, *shape: int) -> Tensor:
        """Memory for a cache."""
        ...

    def attend(
        self,
        new: tuple[Tensor, Tensor, Tensor],
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """Writes key and value of `new` = (query, key, value), each [B, H, K], at `positions` [B]
        of the first B rows, and mixes what the rows hold up to there: [B, H, K]."""
        ...


@dataclass(frozen=True, slots=True)
class LayerCaches:
    """The caches of all layers of one application."""

    # [layers, B + 1, L, H, K], or with a `RowKernel` [layers, B + 1, L / block, H, K, block];
    # the last row takes what belongs nowhere (padding)
    keys: Tensor
    values: Tensor  # the same


@dataclass(frozen=True, slots=True)
class PrefillTarget:
    """Where each token of a packed row goes in the cache of a layer."""

    index: tuple[Any, ...]  # picks [T, H, K] there


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One more token in each of the first B rows of the cache."""

    positions: Tensor  # [B] int64: where the token goes
    rows: Tensor  # [B] int64: 0, 1, ..., B - 1
    # [B, 1, 1, num_columns]: 0 where it sees, itself included, else minus infinity; a RowKernel
    # needs none
    mask: Tensor | None
    num_columns: int


class KVCache:
    """`lengths` [B] int32 tokens per row, and one `LayerCaches` per application, in order."""

    def __init__(
        self,
        lengths: Tensor,
        applications: Sequence[LayerCaches],
        kernel: RowKernel | None = None,
    ) -> None:
        self.lengths = lengths
        self.kernel = kernel
        self._block = kernel.block if kernel else 1
        self._applications = list(applications)

    @classmethod
    def empty(
        cls,
        stacks: Sequence[StackConfig],
        num_rows: int,
        max_length: int,
        *,
        like: Tensor,
        kernel: RowKernel | None = None,
    ) -> KVCache:
        """An empty cache on the device and in the type of `like`; `stacks`: one an application."""
        applications = []
        for stack in stacks:
            layer = (stack.num_heads, stack.head_size)
            if kernel:
                length = -(-max_length // kernel.block)
                shape = (stack.n_layers, num_rows + 1, length, *layer, kernel.block)
                caches = LayerCaches(kernel.zeros(*shape), kernel.zeros(*shape))
            else:
                keys = like.new_zeros((stack.n_layers, num_rows + 1, max_length, *layer))
                caches = LayerCaches(keys, torch.zeros_like(keys))
            applications.append(caches)
        lengths = torch.zeros(num_rows, dtype=torch.int32, device=like.device)
        return cls(lengths, applications, kernel)

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        return self._applications[0].keys.shape[2] * self._block

    @property
    def bytes_per_column(self) -> int:
        """Of one more token in all rows."""
        num_bytes = sum(each.keys.nbytes + each.values.nbytes for each in self._applications)
        return num_bytes // self.max_length

    def layers(self, application: int) -> LayerCaches:
        return self._applications[application]

    def reserve(self, length: int) -> bool:
        """Makes room for rows of `length` tokens, keeping what they hold; whether it had to.

        It grows by at least GROWTH tokens, or doubles, so that a cache grown token by token is
        copied but rarely: attention reads all of it with every token.
        """
        if length <= self.max_length:
            return False
        length = max(length, self.max_length + min(self.max_length, GROWTH))
        for application, layers in enumerate(self._applications):
            self._applications[application] = LayerCaches(
                self._longer(layers.keys, length), self._longer(layers.values, length)
            )
        return True

    def _longer(self, old: Tensor, length: int) -> Tensor:
        shape = (*old.shape[:2], -(-length // self._block), *old.shape[3:])
        new = self.kernel.zeros(*shape) if self.kernel else old.new_zeros(shape)
        new[:, :, : old.shape[2]] = old
        return new

    def move_rows(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Overwrites the rows `targets` with the rows `sources`; no row is in both."""
        assert not set(sources) & set(targets), (sources, targets)
        if not sources:
            return
        source = torch.tensor(sources, device=self.lengths.device)
        target = torch.tensor(targets, device=self.lengths.device)
        self.lengths[target] = self.lengths[source]
        longest = int(self.lengths[source].amax())  # sync: what lies beyond need not be copied
        longest = -(-longest // self._block)
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
        columns = positions.long()
        if self.kernel is None:
            return PrefillTarget((token_rows, columns))
        whole = slice(None)
        offsets = columns % self._block
        return PrefillTarget((token_rows, columns // self._block, whole, whole, offsets))

    def start_decode(self, num_rows: int, num_columns: int | None = None) -> DecodeStep:
        """Counts one more token in each of the first `num_rows` rows, and says where it goes.

        `num_columns` are read of each row: those of the longest with its new token. None: asks the
        device for it, and refuses rows that are full.
        """
        positions = self.lengths[:num_rows].long()
        if num_columns is None:
            num_columns = int(positions.amax()) + 1  # sync: where nobody knows it on the host
        if num_columns > self.max_length:
            raise ValueError(
                f"a row of the cache is full ({self.max_length} tokens); stop it or make the "
                "cache longer"
            )
        return self._step(positions, num_columns)

    def start_static_decode(self, num_rows: int) -> DecodeStep:
        """The same with shapes that depend on `num_rows` and `max_length` alone, without a sync.

        No row is refused: in one that is full the last token is overwritten.
        """
        positions = self.lengths[:num_rows].long().clamp(max=self.max_length - 1)
        return self._step(positions, self.max_length)

    def _step(self, positions: Tensor, num_columns: int) -> DecodeStep:
        num_rows, device = len(positions), positions.device
        self.lengths[:num_rows] += 1
        rows = torch.arange(num_rows, device=device)
        if self.kernel is not None:
            return DecodeStep(positions, rows, None, num_columns)
        unseen = torch.arange(num_columns, device=device) > positions[:, None]
        mask = torch.zeros(unseen.shape, dtype=self._applications[0].keys.dtype, device=device)
        mask = mask.masked_fill(unseen, float("-inf"))  # a boolean one would be made so each call
        return DecodeStep(positions, rows, mask[:, None, None], num_columns)


@dataclass(frozen=True, slots=True)
class PrefillContext:
    """Attention within a packed row of prompts that also fills the cache."""

    plan: AttentionPlan
    caches: LayerCaches
    target: PrefillTarget

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.caches.keys[layer][self.target.index] = key
        self.caches.values[layer][self.target.index] = value
        return self.plan.attend(query, key, value)


@dataclass(frozen=True, slots=True)
class DecodingContext:
    """Attention of one new token a row, all [B, H, K], to everything before it."""

    caches: LayerCaches
    step: DecodeStep
    kernel: RowKernel | None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.caches.keys[layer], self.caches.values[layer]
        if self.kernel is not None:
            return self.kernel.attend((query, key, value), keys, values, self.step.positions)
        where = (self.step.rows, self.step.positions)
        keys.index_put_(where, key)
        values.index_put_(where, value)
        num_rows = len(self.step.rows)
        mixed = F.scaled_dot_product_attention(
            query[:, :, None],  # [B, H, 1, K]
            keys[:num_rows, : self.step.num_columns].transpose(1, 2),  # [B, H, columns, K]
            values[:num_rows, : self.step.num_columns].transpose(1, 2),
            attn_mask=self.step.mask,
        )
        return mixed.squeeze(2)
