"""Blocks of an exported recurrent language model, and what its tokens see; shipped beside weights.

Shapes: B rows, T tokens of this call, N keys (cached ones included), H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig


class View:
    """What the tokens of one call see, and where they stand; the same for every layer."""

    def __init__(
        self,
        positions: Tensor,
        *,
        prefix: Tensor | None,
        is_real: Tensor | None,
        cache: Any,
        num_cached: int,
    ) -> None:
        self.positions = positions  # [B or 1, T]
        self.prefix = prefix  # [B, T] bool; None: all of them are causal
        self.is_real = is_real  # [B, cached + T] bool; None: there is no padding
        self.cache = cache
        self.num_cached = num_cached
        self._masks: dict[tuple[int, bool], Tensor | None] = {}
        self._rotations: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    def mask(self, num_keys: int, *, is_causal: bool) -> Tensor | None:
        """[B or 1, 1, T, N] bool: which keys each token sees; None: every one of them."""
        kind = (num_keys, is_causal or self.prefix is None)
        if kind not in self._masks:
            self._masks[kind] = self._make_mask(*kind)
        return self._masks[kind]

    def _make_mask(self, num_keys: int, is_causal: bool) -> Tensor | None:
        num_tokens = self.positions.shape[1]
        if num_tokens == 1 and num_keys == self.num_cached + 1 and self.is_real is None:
            return None
        keys = torch.arange(num_keys, device=self.positions.device)
        queries = torch.arange(num_tokens, device=self.positions.device)[:, None] + self.num_cached
        seen = (keys <= queries)[None]  # [1, T, N]
        if not is_causal and self.prefix is not None:
            in_prefix = F.pad(
                self.prefix, (self.num_cached, num_keys - self.num_cached - num_tokens)
            )
            seen = seen | (self.prefix[:, :, None] & in_prefix[:, None])
        if self.is_real is not None:
            is_real = F.pad(self.is_real, (0, num_keys - self.is_real.shape[1]))
            # Padding sees itself, so that no row of the softmax is empty.
            seen = (seen & is_real[:, None]) | (keys == queries)
        return seen[:, None]

    def rotation(self, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
        """Rotary positions (arXiv 2104.09864): cosines and signed sines, [B or 1, T, 1, K] fp32."""
        kind = (head_dim, theta)
        if kind not in self._rotations:
            steps = torch.arange(0, head_dim, 2, dtype=torch.float32, device=self.positions.device)
            angles = self.positions.float()[..., None] / theta ** (steps / head_dim)
            cos, sin = angles.cos(), angles.sin()
            self._rotations[kind] = (
                torch.cat((cos, cos), -1)[:, :, None],
                torch.cat((-sin, sin), -1)[:, :, None],
            )
        return self._rotations[kind]


class StackSettings:
    """The settings of one stack, from its entry in the configuration.

    `lora`: of the adapters that each of its `num_calls` has; None: there are none.
    """

    def __init__(
        self,
        hidden_size: int,
        entry: Mapping[str, Any],
        *,
        lora: Mapping[str, Any] | None = None,
        num_calls: int = 1,
    ) -> None:
        self.lora, self.num_calls = lora, num_calls
        self.hidden_size = hidden_size
        self.num_layers: int = entry["n_layers"]
        self.num_heads: int = entry["num_heads"]
        self.head_dim: int = entry["head_dim"]
        self.intermediate_size: int = entry["intermediate_size"]
        self.norm_eps: float = entry["norm_eps"]
        self.is_pre_norm = _choice(entry, "norm_type", "pre", "post")
        self.has_rope = _choice(entry, "pos_emb_type", "rope", "none")
        self.rope_theta: float = entry["rope_theta"]
        self.is_causal = _choice(entry, "attn_type", "causal", "prefix_lm")


def _choice(entry: Mapping[str, Any], key: str, yes: str, no: str) -> bool:
    if entry[key] not in (yes, no):
        raise ValueError(f"{key}={entry[key]!r} is unknown here; it is {yes} or {no}")
    return entry[key] == yes


class CallLinear(nn.Linear):
    """A linear map whose weight is another one in each call of its stack.

    It is `weight + alpha / rank * B A` (LoRA, arXiv 2106.09685), with A and B of the call.
    """

    def __init__(
        self, in_features: int, out_features: int, lora: Mapping[str, Any], num_calls: int
    ) -> None:
        super().__init__(in_features, out_features, bias=False)
        rank: int = lora["rank"]
        self.num_calls, self.scale = num_calls, lora["alpha"] / rank
        self.lora_A = nn.Parameter(torch.zeros(num_calls * rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(num_calls * out_features, rank))

    def forward(self, x: Tensor, call: int = 0) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        lora_A, lora_B = (each.chunk(self.num_calls)[call] for each in (self.lora_A, self.lora_B))
        return super().forward(x) + self.scale * F.linear(F.linear(x, lora_A), lora_B)


def _linear(stack: StackSettings, name: str, in_features: int, out_features: int) -> nn.Linear:
    if stack.lora and name in stack.lora["targets"]:
        return CallLinear(in_features, out_features, stack.lora, stack.num_calls)
    return nn.Linear(in_features, out_features, bias=False)


def _applied(projection: nn.Module, x: Tensor, call: int) -> Tensor:
    """What a projection gives; peft may have put its own around it, which hands `call` on."""
    base = getattr(projection, "base_layer", projection)
    return projection(x, call) if isinstance(base, CallLinear) else projection(x)


class GatedAttention(nn.Module):
    """Multi-head attention whose output is gated by a sigmoid of its input."""

    def __init__(self, stack: StackSettings, config: PreTrainedConfig) -> None:
        super().__init__()
        self.stack, self.config = stack, config
        width = stack.hidden_size
        self.gqkv_proj = _linear(stack, "gqkv_proj", width, 4 * width)
        self.o_proj = _linear(stack, "o_proj", width, width)

    def forward(self, x: Tensor, view: View, slot: int, call: int) -> Tensor:
        projected = _applied(self.gqkv_proj, x, call)
        gate, query, key, value = projected.unflatten(-1, (4, self.stack.num_heads, -1)).unbind(-3)
        # each [B, T, H, K]
        if self.stack.has_rope:
            query, key = self._rotate(query, view), self._rotate(key, view)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # [B, H, T, K]
        if view.cache is not None:
            key, value = view.cache.update(key, value, slot)  # [B, H, N, K]
        mask = view.mask(key.shape[-2], is_causal=self.stack.is_causal)
        mixed = self._mix(query, key, value, mask).transpose(1, 2)  # [B, T, H, K]
        return _applied(self.o_proj, (gate.sigmoid() * mixed).flatten(-2), call)

    def _rotate(self, x: Tensor, view: View) -> Tensor:
        cos, sin = view.rotation(self.stack.head_dim, self.stack.rope_theta)
        return (x * cos + x.roll(self.stack.head_dim // 2, -1) * sin).to(x.dtype)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if self.config._attn_implementation != "eager":
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        scores = query @ key.transpose(-1, -2) * self.stack.head_dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


class SwiGLU(nn.Module):
    """`down(silu(gate) * up)` (arXiv 2002.05202)."""

    def __init__(self, stack: StackSettings) -> None:
        super().__init__()
        width, inner = stack.hidden_size, stack.intermediate_size
        self.gate_up_proj = _linear(stack, "gate_up_proj", width, 2 * inner)
        self.down_proj = _linear(stack, "down_proj", inner, width)

    def forward(self, x: Tensor, call: int) -> Tensor:
        gate, up = _applied(self.gate_up_proj, x, call).chunk(2, dim=-1)
        return _applied(self.down_proj, F.silu(gate) * up, call)


class Block(nn.Module):
    """Attention and MLP with their residuals, pre-norm or post-norm."""

    def __init__(self, stack: StackSettings, config: PreTrainedConfig) -> None:
        super().__init__()
        self.stack = stack
        self.attn = GatedAttention(stack, config)
        self.mlp = SwiGLU(stack)

    def forward(self, x: Tensor, view: View, slot: int, call: int) -> Tensor:
        eps = self.stack.norm_eps
        if self.stack.is_pre_norm:
            x = x + self.attn(_rms_norm(x, eps), view, slot, call)
            return x + self.mlp(_rms_norm(x, eps), call)
        x = _rms_norm(x + self.attn(x, view, slot, call), eps)
        return _rms_norm(x + self.mlp(x, call), eps)


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    """Without a learned weight; in fp32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


class Stack(nn.Module):
    """Blocks one after another; a final norm when they are pre-norm."""

    def __init__(self, stack: StackSettings, config: PreTrainedConfig) -> None:
        super().__init__()
        self.stack = stack
        self.layers = nn.ModuleList(Block(stack, config) for _ in range(stack.num_layers))

    def forward(self, x: Tensor, view: View, first_slot: int, call: int) -> Tensor:
        for index, block in enumerate(self.layers):
            x = block(x, view, first_slot + index, call)
        return _rms_norm(x, self.stack.norm_eps) if self.stack.is_pre_norm else x
