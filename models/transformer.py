"""A stack of Transformer blocks, its configuration, and the plain Transformer as the first net.

A net is a configuration record (`NetConfig`): which stacks it has and in which order they are
applied to which states. `models/recurrence.py` executes that order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import cpu_block
from models.attention.interface import PackedContext
from models.layers import (
    AttentionContext,
    GatedAttention,
    Linear,
    Rope,
    SwiGLU,
    rms_norm,
    swiglu_size,
)


class StackConfig(BaseModel):
    """Shape, variant and initialisation of one stack of blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    n_layers: PositiveInt
    hidden_size: PositiveInt
    num_heads: PositiveInt
    expansion: PositiveFloat = 4.0
    intermediate_size: PositiveInt | None = None  # width inside the MLP; None: from `expansion`
    norm_type: Literal["pre", "post"] = "pre"
    norm_eps: PositiveFloat = 1e-6
    pos_emb_type: Literal["rope", "none"] = "rope"
    rope_theta: PositiveFloat = 10000.0
    attn_type: Literal["prefix_lm", "causal"] = "prefix_lm"
    init_type: Literal["lecun_normal", "megatron", "fixed_normal"] = "lecun_normal"
    init_std: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check_heads(self) -> StackConfig:
        step = self.num_heads * (2 if self.pos_emb_type == "rope" else 1)
        if self.hidden_size % step:
            fitting = -(-self.hidden_size // step) * step
            kind = "heads of even size (rotary positions)" if step > self.num_heads else "heads"
            raise ValueError(
                f"hidden_size={self.hidden_size} does not split into num_heads={self.num_heads} "
                f"equal {kind}; use a multiple of {step}, e.g. hidden_size={fitting}"
            )
        return self

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        return self.intermediate_size or swiglu_size(self.hidden_size, self.expansion)

    @property
    def in_std(self) -> float:
        """Standard deviation of weights that read the residual stream, and of the embedding."""
        if self.init_type == "fixed_normal":
            return self.init_std or 0.02
        if self.init_type == "megatron" and self.init_std is not None:
            return self.init_std
        return self.hidden_size**-0.5

    def out_std(self, fan_in: int) -> float:
        """Standard deviation of weights that write into the residual stream."""
        if self.init_type == "fixed_normal":
            return self.in_std
        if self.init_type == "megatron":
            return self.in_std / (2 * self.n_layers) ** 0.5
        return fan_in**-0.5

    @property
    def num_parameters(self) -> int:
        """Weights of the stack: attention 5 D^2 and SwiGLU 3 D * inner a layer."""
        per_layer = 5 * self.hidden_size**2 + 3 * self.hidden_size * self.mlp_size
        return self.n_layers * per_layer


@dataclass(frozen=True, slots=True)
class Application:
    """One call of a stack: it reads the sum of some states and writes one."""

    stack: str  # name of the stack, e.g. H_module
    reads: tuple[str, ...]
    writes: str
    keeps_gradient: bool


class NetConfig(StackConfig):
    """A net: stacks, and the order in which they are applied.

    States are `x` (the embedded tokens, [T, D]), `z_L_init` (a fixed vector, [D]), and whatever an
    application has written. The answer is what the last application wrote.
    """

    half_layers: bool = False  # each stack gets half of n_layers

    @model_validator(mode="after")
    def _check_half_layers(self) -> NetConfig:
        if self.half_layers and self.n_layers % 2:
            raise ValueError(
                f"n_layers={self.n_layers} cannot be halved between two stacks (half_layers); "
                f"use an even number, e.g. n_layers={self.n_layers + 1}"
            )
        return self

    def stack_config(self) -> StackConfig:
        """The settings of one stack: those of the net, with n_layers halved where asked for."""
        settings = {name: getattr(self, name) for name in StackConfig.model_fields}
        settings["n_layers"] = self.n_layers // 2 if self.half_layers else self.n_layers
        return StackConfig(**settings)

    def stacks(self) -> Mapping[str, StackConfig]:
        """Stacks by the name under which their parameters are stored."""
        raise NotImplementedError

    def applications(self, backprop_steps: int | None = None) -> Iterator[Application]:
        """The calls of one forward pass, in order; the only place that knows this order."""
        raise NotImplementedError

    @property
    def answer_stack(self) -> StackConfig:
        """The stack whose output is the answer; its `in_std` scales embedding and head."""
        *_, last = self.applications()
        return self.stacks()[last.stack]


class TransformerConfig(NetConfig):
    """The plain Transformer: one stack, applied once."""

    name: Literal["transformer"] = "transformer"

    @model_validator(mode="after")
    def _check_one_stack(self) -> TransformerConfig:
        if self.half_layers:
            raise ValueError("half_layers=true: a transformer has one stack; leave it out")
        return self

    def stacks(self) -> Mapping[str, StackConfig]:
        return {"stack": self.stack_config()}

    def applications(self, backprop_steps: int | None = None) -> Iterator[Application]:
        yield Application("stack", reads=("x",), writes="z", keeps_gradient=True)


class Block(nn.Module):
    """Attention and MLP with their residuals; pre-norm (arXiv 2002.04745) or post-norm.

    `recomputed` (arXiv 1604.06174) is the part whose activations are not kept for the backward
    pass but computed again there: less memory for more time, and the same gradients.
    """

    recomputed: Literal["none", "block", "attention"] = "none"

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.norm_eps = config.norm_eps
        self.is_pre_norm = config.norm_type == "pre"
        self.attn = GatedAttention(
            config.hidden_size,
            config.num_heads,
            in_std=config.in_std,
            out_std=config.out_std(config.hidden_size),
        )
        self.mlp = SwiGLU(
            config.hidden_size,
            config.mlp_size,
            in_std=config.in_std,
            out_std=config.out_std(config.mlp_size),
        )

    def forward(
        self, x: Tensor, rope: Rope | None, context: AttentionContext, layer: int, call: int = 0
    ) -> Tensor:
        mixing = self._mixing(x, rope, context)

        def with_attention(x: Tensor) -> Tensor:
            if mixing is not None:
                weights = self.attn.gqkv_proj.weight, self.attn.o_proj.weight
                return cpu_block.attention_half(x, *weights, mixing)
            if self.is_pre_norm:
                return x + self.attn(rms_norm(x, self.norm_eps), rope, context, layer, call)
            return rms_norm(x + self.attn(x, rope, context, layer, call), self.norm_eps)

        def with_mlp(x: Tensor) -> Tensor:
            if mixing is not None:
                weights = self.mlp.gate_up_proj.weight, self.mlp.down_proj.weight
                return cpu_block.mlp_half(x, *weights, self.norm_eps)
            if self.is_pre_norm:
                return x + self.mlp(rms_norm(x, self.norm_eps), call)
            return rms_norm(x + self.mlp(x, call), self.norm_eps)

        if self.recomputed == "block":
            return _recomputing(lambda x: with_mlp(with_attention(x)), x)
        if self.recomputed == "attention":
            return with_mlp(_recomputing(with_attention, x))
        return with_mlp(with_attention(x))

    def _mixing(
        self, x: Tensor, rope: Rope | None, context: AttentionContext
    ) -> cpu_block.Mixing | None:
        """What `models.cpu_block` needs, where it can take the place of the layers."""
        if not self.is_pre_norm or not isinstance(context, PackedContext):
            return None
        maps = self.attn.gqkv_proj, self.attn.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj
        are_plain = all(type(each) is Linear and not each.weight.is_mkldnn for each in maps)
        plan = context.plan
        if not are_plain or not cpu_block.is_possible(plan, x):
            return None
        turns = rope and (rope.cos, rope.sin)
        return cpu_block.Mixing(plan, turns, self.attn.num_heads, self.norm_eps)


def _recomputing(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, whose activations are made again in the backward pass, if there will be one.

    No random number is drawn in it, so that no generator has to be put back.
    """
    if not torch.is_grad_enabled():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)


class Stack(nn.Module):
    """Blocks one after another, [T, D] -> [T, D]; a final norm when they are pre-norm."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))

    def forward(
        self, x: Tensor, rope: Rope | None, context: AttentionContext, call: int = 0
    ) -> Tensor:
        for index, block in enumerate(self.layers):
            x = block(x, rope, context, index, call)
        return rms_norm(x, self.config.norm_eps) if self.config.norm_type == "pre" else x
