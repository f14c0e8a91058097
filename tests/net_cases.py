"""The nets that tests build: one tiny net of each kind and variant, and those of golden cases."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.attention.sdpa import SdpaAttention
from models.batch import PackedLayout
from models.language_model import LanguageModel
from models.transformer import NetConfig
from training.export_format import ARCH_ADAPTER, arch_from_reference, parameter_name_from_reference

VOCAB_SIZE = 256
_SHAPE = {"n_layers": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
_HRM = {"name": "hrm", "half_layers": True, "H_cycles": 2, "L_cycles": 3}
_TRM = {"H_cycles": 2, "H_bp_steps": 2}
_SETTINGS: dict[str, dict[str, Any]] = {
    "hrm": _HRM,
    "transformer": {"name": "transformer"},
    "trm": {"name": "trm", "L_cycles": 1, "L_bp_steps": 1, **_TRM},
    "trm_match_recurrence": {
        "name": "trm_match_recurrence",
        "half_layers": True,
        "L_cycles": 3,
        "L_bp_steps": 3,
        **_TRM,
    },
    "rins": {"name": "rins", "half_layers": True, "L_cycles": 7, "L_bp_cycles": 4},
    "ut": {"name": "ut", "cycles": 4, "bp_cycles": 2},
    "hrm post-norm": {**_HRM, "norm_type": "post"},
    "hrm causal": {**_HRM, "attn_type": "causal"},
    "hrm without positions": {**_HRM, "pos_emb_type": "none"},
    "hrm with another H": {
        **_HRM,
        "H_override": {
            "n_layers": 3,
            "num_heads": 4,
            "norm_type": "post",
            "attn_type": "causal",
            "rope_theta": 500.0,
            "intermediate_size": 64,
        },
    },
    "ut post-norm": {"name": "ut", "cycles": 4, "bp_cycles": 2, "norm_type": "post"},
}
NETS: dict[str, NetConfig] = {
    label: ARCH_ADAPTER.validate_python({**_SHAPE, **settings})
    for label, settings in _SETTINGS.items()
}


def tiny_config(label: str, **changes: Any) -> NetConfig:
    """The tiny net of that label with other settings."""
    return ARCH_ADAPTER.validate_python({**_SHAPE, **_SETTINGS[label], **changes})


def build(config: NetConfig, vocab_size: int = VOCAB_SIZE) -> LanguageModel:
    return LanguageModel(config, vocab_size, SdpaAttention())


@dataclass(frozen=True)
class Row:
    """A packed row of random tokens."""

    tokens: Tensor  # [T]
    positions: Tensor  # [T]
    layout: PackedLayout

    def sequence(self, index: int) -> slice:
        start, end = self.layout.cu_seqlens[index : index + 2].tolist()
        return slice(start, end)

    def alone(self, index: int) -> Row:
        """One sequence of the row as a row of its own."""
        where, slot = self.sequence(index), slice(index, index + 1)
        layout = PackedLayout.from_lengths(
            self.layout.prefix_lens[slot], self.layout.causal_lens[slot], 1
        )
        return Row(self.tokens[where], self.positions[where], layout)


def random_row(
    prefix_lens: Sequence[int], causal_lens: Sequence[int], *, num_padding: int = 0
) -> Row:
    seq_lens = [prefix + causal for prefix, causal in zip(prefix_lens, causal_lens, strict=True)]
    positions = [torch.arange(length) for length in (*seq_lens,)]
    padding = torch.zeros(num_padding, dtype=torch.int64)
    layout = PackedLayout.from_lengths(
        torch.tensor(prefix_lens), torch.tensor(causal_lens), len(seq_lens) + 2
    )
    tokens = torch.randint(1, VOCAB_SIZE, (sum(seq_lens),))
    return Row(torch.cat((tokens, padding)), torch.cat((*positions, padding)), layout)


def read_case(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "case.json").read_text(encoding="utf-8"))


def golden_config(case: dict[str, Any]) -> NetConfig:
    """Our record of the settings in a golden case."""
    settings = dict(case["config"])
    for internal in ("vocab_size", "max_seq_len"):
        settings.pop(internal, None)
    return arch_from_reference({"name": case.get("model_class", case["net"]), **settings})


def golden_net(folder: Path) -> LanguageModel:
    """The model of a folder of golden/nets, with its weights."""
    case = read_case(folder)
    model = build(golden_config(case), case["config"]["vocab_size"])
    state = load_file(folder / case["files"]["state"])
    model.load_state_dict(
        {parameter_name_from_reference(name): tensor for name, tensor in state.items()}
    )
    return model
