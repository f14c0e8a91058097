"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the linear maps of a net's stacks.

A map `W` becomes `W + alpha / rank * B A`: one pair A, B for all calls of its stack, which can be
merged into W, or one for each call. Owns their shapes, formula and names; who trains what is
`training.trainable`'s business.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from models.language_model import LanguageModel
from models.layers import Linear, truncated_normal
from models.linear import linear
from models.transformer import GatedAttention, NetConfig, Stack, SwiGLU

Target = Literal["gqkv_proj", "o_proj", "gate_up_proj", "down_proj"]
ALL_TARGETS: tuple[Target, ...] = ("gqkv_proj", "o_proj", "gate_up_proj", "down_proj")
ADAPTER_NAMES = ("lora_A", "lora_B")  # beside `weight`


class LoraConfig(BaseModel):
    """Which linear maps get adapters, and of which size."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0  # the adapter's part is multiplied by alpha / rank
    targets: list[Target] = Field(default=list(ALL_TARGETS), min_length=1)
    per_cycle: bool = False  # one adapter for each call of a stack, not one for all

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class AdaptedLinear(Linear):
    """A linear map and its adapters: `x @ (weight + scale * B A).T`, B being zero at first.

    Adapters of several calls lie on top of each other.
    """

    def __init__(self, base: Linear, config: LoraConfig, num_calls: int) -> None:
        nn.Module.__init__(self)
        self.scale, self.num_calls = config.scale, num_calls
        self.weight = base.weight
        out_features, in_features = base.weight.shape
        rows = (num_calls * config.rank, in_features)
        self.lora_A = nn.Parameter(truncated_normal(*rows, std=in_features**-0.5))
        self.lora_B = nn.Parameter(torch.zeros(num_calls * out_features, config.rank))

    def forward(self, x: Tensor, call: int = 0) -> Tensor:
        lora_A, lora_B = self.lora_A, self.lora_B
        if self.num_calls > 1:
            lora_A, lora_B = (each.chunk(self.num_calls)[call] for each in (lora_A, lora_B))
        return linear(x, self.weight) + self.scale * linear(linear(x, lora_A), lora_B)


def add_adapters(model: LanguageModel, config: LoraConfig) -> None:
    """Puts adapters beside the maps that `config` names, in every stack, in place.

    Names of parameters that were there stay. What the model computes is what it was.
    """
    calls = calls_by_stack(model.config)
    for name, num_calls in calls.items():
        stack = model.model.get_submodule(name)
        assert isinstance(stack, Stack)
        for module in stack.modules():
            if not isinstance(module, (GatedAttention, SwiGLU)):
                continue
            for target in config.targets:
                if isinstance(base := getattr(module, target, None), Linear):
                    number = num_calls if config.per_cycle else 1
                    setattr(module, target, AdaptedLinear(base, config, number))
    model.model.tells_calls_apart = config.per_cycle


def calls_by_stack(arch: NetConfig) -> dict[str, int]:
    """How often a forward pass applies each stack."""
    return dict(Counter(application.stack for application in arch.applications()))


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is an adapter's."""
    return name.rpartition(".")[2] in ADAPTER_NAMES


def adapters_of(name: str) -> tuple[str, str]:
    """The names of A and B beside a weight of that name."""
    lora_A, lora_B = (f"{name.rpartition('.')[0]}.{each}" for each in ADAPTER_NAMES)
    return lora_A, lora_B


def merged(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """The one weight [out, in] that computes what a weight and its shared adapter do."""
    return weight + scale * (lora_B @ lora_A)
