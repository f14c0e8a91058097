"""Weights in the layout that oneDNN computes in, for models on CPUs that are asked and not trained.

Where a probe finds it faster (from a width of about 256 on), each weight is packed in place, one
after the other: no second copy of the model is ever in memory.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from inference.model_folder import ModelOptions, OpenedModel, open_model
from models.language_model import LanguageModel
from models.layers import Linear
from models.linear import WORTH_PACKING, packed, packing_gain


def open_for_answers(options: ModelOptions) -> OpenedModel:
    """`open_model`, its weights packed where that is faster; the description says so.

    Such weights only serve `models.linear`: what reads or writes numbers takes `open_model`.
    """
    opened = open_model(options)
    if options.decode == "compiled" or not can_be_packed(opened.model):
        return opened
    gain = packing_gain(opened.model.config.hidden_size)
    if gain < WORTH_PACKING:
        return opened
    pack_weights(opened.model)
    note = f"{opened.description}; weights packed for oneDNN ({gain:.1f} times faster)"
    return replace(opened, description=note)


def can_be_packed(model: LanguageModel) -> bool:
    """Whether the stacks' weights are fp32, on a CPU, and stay as they are."""
    weights = [module.weight for module in _linears(model)]
    return all(
        weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad
        for weight in weights
    )


def pack_weights(model: LanguageModel) -> None:
    """Packs the weights of all stacks in place; the head, which scoring takes apart, stays."""
    for module in _linears(model):
        module.weight = nn.Parameter(packed(module.weight), requires_grad=False)


def _linears(model: LanguageModel) -> list[Linear]:
    return [module for module in model.model.modules() if isinstance(module, Linear)]
