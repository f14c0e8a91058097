"""Initial weights have the original's distribution, kind by kind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from net_cases import build, golden_config, tiny_config
from torch import Tensor

from models.language_model import LanguageModel
from models.layers import TRUNCATED_NORMAL_SCALE, truncated_normal

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
NAMES = {"embedding_weight": "embed_tokens", "lm_head": "lm_head"}


def values_of(model: LanguageModel, kind: str, num_values: int) -> Tensor:
    """All initial values of a kind as golden/init names them, e.g. `H.o_proj`."""
    if kind == "zL_init":  # a model has too few of them: as many as the original drew
        assert model.model.z_L_init.dtype == torch.bfloat16
        return truncated_normal(num_values, std=1.0, dtype=torch.bfloat16).double()
    level, _, layer = kind.rpartition(".")
    parts = [
        parameter.detach().flatten()
        for name, parameter in model.named_parameters()
        if NAMES.get(layer, layer) in name and (not level or f"{level}_module" in name)
    ]
    return torch.cat(parts).double()


def density(quantile: float) -> float:
    """Of the standard normal at that quantile."""
    normal = torch.distributions.Normal(0.0, 1.0)
    return float(normal.log_prob(normal.icdf(torch.tensor(quantile))).exp())


def standard_errors(std: float, num_values: int) -> dict[str, float]:
    """Of the estimates from so many values."""
    root = math.sqrt(num_values)
    errors = {
        "mean": std / root,
        "std": std / root / math.sqrt(2),
        "kurtosis": math.sqrt(24) / root,
    }
    for quantile in QUANTILES:
        spread = math.sqrt(quantile * (1 - quantile)) / root
        errors[f"quantile {quantile}"] = std * spread / density(quantile)
    return errors


def measured(values: Tensor) -> dict[str, float]:
    std, mean = float(values.std()), float(values.mean())
    fourth_moment = (values - mean).div_(std).square_().square_().mean()
    ranks = [round(quantile * (len(values) - 1)) for quantile in QUANTILES]
    ordered = np.partition(values.float().numpy(), ranks)
    return {"mean": mean, "std": std, "kurtosis": float(fourth_moment)} | {
        f"quantile {q}": float(ordered[rank]) for q, rank in zip(QUANTILES, ranks, strict=True)
    }


def golden_estimates(stats: Mapping[str, Any]) -> dict[str, float]:
    quantiles = stats["quantiles_1_5_25_50_75_95_99"]
    return {name: stats[name] for name in ("mean", "std", "kurtosis")} | {
        f"quantile {q}": value for q, value in zip(QUANTILES, quantiles, strict=True)
    }


def test_golden_init_has_the_original_moments_and_quantiles(golden_init: Path) -> None:
    case = json.loads(golden_init.read_text(encoding="utf-8"))
    model = build(golden_config(case), case["config"]["vocab_size"])
    assert model.model.embed_tokens.scale == pytest.approx(case["embed_scale"], rel=1e-12)
    for kind, stats in case["stats"].items():
        values = values_of(model, kind, stats["n"])
        assert len(values) == stats["n"], kind
        assert float(values.abs().max()) <= stats["std"] * 3 * TRUNCATED_NORMAL_SCALE * 1.01, kind
        ours, golden = measured(values), golden_estimates(stats)
        for name, error in standard_errors(stats["std"], stats["n"]).items():
            # Both are samples, so 3 sigma for each; a step more where values are in bf16.
            allowed = 6 * error + (abs(golden[name]) / 128 if kind == "zL_init" else 0.0)
            assert ours[name] == pytest.approx(golden[name], abs=allowed), (kind, name)


def test_values_beyond_three_sigma_wrap_around() -> None:
    values = truncated_normal(1_000_000, std=0.5) / (0.5 * TRUNCATED_NORMAL_SCALE)
    assert float(values.abs().max()) < 3
    near_zero = float((values.abs() < 0.1).double().mean())
    without_wrapping, wrapped = 0.07966, 0.07966 + 0.00076  # P(|z| < 0.1), P(3 < |z| < 3.1)
    assert abs(near_zero - wrapped) < abs(near_zero - without_wrapping)


def test_z_L_init_is_a_bf16_buffer_that_is_saved() -> None:
    model = build(tiny_config("hrm"))
    assert "model.z_L_init" in model.state_dict()
    assert "model.z_L_init" not in dict(model.named_parameters())
    assert model.model.z_L_init.dtype == torch.bfloat16
    assert "model.z_L_init" not in build(tiny_config("transformer")).state_dict()


def test_megatron_outputs_count_the_layers_of_their_own_stack() -> None:
    settings = {"init_type": "megatron", "init_std": 0.03, "n_layers": 8}
    stacks = tiny_config("hrm", H_override={"n_layers": 2}, **settings).stacks()
    assert stacks["L_module"].out_std(32) == pytest.approx(0.03 / math.sqrt(2 * 4))
    assert stacks["H_module"].out_std(32) == pytest.approx(0.03 / math.sqrt(2 * 2))


def test_embedding_and_head_take_their_scale_from_H() -> None:
    override = {"init_type": "fixed_normal", "init_std": 0.01}
    model = build(tiny_config("hrm", H_override=override), vocab_size=2048)
    assert model.model.embed_tokens.scale == 1 / 0.01
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert float(weight.detach().std()) == pytest.approx(0.01, rel=0.01)
    in_projection = model.get_parameter("model.L_module.layers.0.attn.gqkv_proj.weight")
    assert float(in_projection.detach().std()) == pytest.approx(32**-0.5, rel=0.05)
