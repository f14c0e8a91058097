"""Runs as the original trainer writes them, made of golden nets, and what is stored of one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from commands import files_in
from net_cases import NETS, build, read_case
from safetensors.torch import load_file
from torch import Tensor

from conversion.convert_from_reference import convert
from training.checkpoint import EMA, MODEL, OPTIMIZER, Checkpoint
from training.tensor_store import read_tensors

CONFIG, METADATA = "all_config.yaml", "train_metadata.yaml"
KINDS = ("step", "exp_avg", "exp_avg_sq", "param_ema")


def stored_of(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    return {kind: read_tensors(checkpoint.path / kind) for kind in (MODEL, EMA, OPTIMIZER)}


def reference_run(folder: Path, state: Mapping[str, Tensor], arch: Mapping[str, Any]) -> Path:
    """A run as the original writes it, with made-up optimizer state for every parameter."""
    moments = {
        name: {
            "step": torch.tensor(7.0),
            **{kind: torch.rand_like(weight) for kind in KINDS[1:]},
        }
        for name, weight in state.items()
        if not name.endswith("zL_init")
    }
    folder.mkdir()
    groups = [{"lr": torch.tensor(0.1), "betas": (0.9, 0.95), "params": list(moments)}]
    optimizer = {"state": moments, "param_groups": groups}
    write_checkpoint(folder / "fsdp2_epoch_1", {"model": dict(state), "optim": optimizer})
    (folder / "carry_epoch_1.0.pt").write_bytes(b"a pickle that nobody opens")
    config = {
        "arch": dict(arch),
        "data": {"path": "nowhere"},
        "global_batch_size": 64,
        "epochs": 4,
        "lr": 1e-3,
        "lr_min_ratio": 1,
        "lr_warmup_steps": 2,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "ema": 0.999,
        "project_name": "p",
        "run_name": "r",
    }
    (folder / "all_config.yaml").write_text(yaml.safe_dump(config))
    metadata = {"max_seq_len": 32, "total_length": 100, "tokenizer_info": {}}
    metadata["vocab_size"] = len(state["lm_head.weight"])
    (folder / "train_metadata.yaml").write_text(yaml.safe_dump(metadata))
    return folder


def write_checkpoint(folder: Path, content: Mapping[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    dcp.save(dict(content), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def case_run(golden_net: Path, folder: Path) -> Path:
    case = read_case(golden_net)
    internal = ("vocab_size", "max_seq_len")
    arch = {key: value for key, value in case["config"].items() if key not in internal}
    arch |= {"name": case["model_class"], "head": "lm_head@LMHead"}
    return reference_run(folder, load_file(golden_net / case["files"]["state"]), arch)


def tiny_run(folder: Path) -> Path:
    """The run of a tiny net, to be spoiled."""
    arch = NETS["hrm"].model_dump(exclude_none=True)
    state = build(NETS["hrm"], 512).state_dict()
    renamed = {"model.z_L_init": "model.zL_init"}
    renamed["model.embed_tokens.weight"] = "embed_tokens.embedding_weight"
    for name in state:
        if "_module." in name:
            renamed[name] = name.replace("_module.", "_level.core.")
    arch["name"] = "baselines.hrm_nocarry_bp_warmup@HierarchicalReasoningModel"
    return reference_run(folder, {renamed.get(name, name): t for name, t in state.items()}, arch)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


def assert_refused(theirs: Path, told: str, epoch: int | None = None) -> None:
    """Nothing is left, and the original is as it was."""
    before = files_in(theirs)
    home = files_in(theirs.parent)
    with pytest.raises((ValueError, OSError), match=told):
        convert(theirs, theirs.parent / "run", epoch)
    assert files_in(theirs) == before
    assert files_in(theirs.parent).keys() == home.keys()
