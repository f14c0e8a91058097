"""The runs that are disturbed: tiny nets on data made here, and what they are told to compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.sampled_format import EpochIndex, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from torture.plan import CHECKPOINT_STEPS, STEPS, Life
from training.telemetry import read_metrics
from training.tensor_store import read_tensors

EPOCHS = 2
LAST = f"fsdp2_epoch_{EPOCHS}"
RUN, DATA = Path("checkpoints/run"), Path("data")  # in the folder that a run works in
VOCAB_SIZE, MAX_SEQ_LEN = 287, 33  # of the byte tokenizer; of an example
MICRO_TOKENS = 64  # that a rank computes at a time
EXAMPLES_PER_ROW = 5  # fewer fit into one: the run is a little longer than STEPS
TIMES = ("tokens_per_second",)  # what metrics say of the clock
TENSORS = ("model", "ema", "optimizer")


def arguments_of(life: Life) -> list[str]:
    """Of pretrain.py. Device and kernel are fixed: else they are chosen by speed."""
    sizes = ("n_layers=2", "hidden_size=16", "num_heads=2", "intermediate_size=24")
    micro = [f"micro_batch_size={MICRO_TOKENS}"] if life.accumulates else []
    return [
        *("arch/size@arch=nano", f"arch/net@arch={life.net}"),
        *(f"arch.{size}" for size in sizes),
        *("lr=1e-2", "lr_warmup_steps=1", "linear=mkl", "device=cpu", f"epochs={EPOCHS}"),
        *(f"global_batch_size={_global_tokens(life)}", *micro),
        *(f"data.path={DATA}", f"checkpoint_path={RUN}", "log_interval=2"),
        *(f"checkpoint_steps={CHECKPOINT_STEPS}", "keep_last=2"),
        f"save={'background' if life.saves_beside else 'plain'}",
    ]


def write_data(folder: Path, life: Life) -> None:
    """What a life trains on."""
    examples = STEPS // EPOCHS * EXAMPLES_PER_ROW * _global_tokens(life) // MICRO_TOKENS
    write_random_bytes(folder, examples=examples, epochs=EPOCHS)


def write_random_bytes(
    folder: Path, *, examples: int, epochs: int, tokenizer_path: str = ""
) -> None:
    """Sampled data of random bytes, with the byte tokenizer."""
    draw = np.random.default_rng(0)
    info = TokenizerInfo(
        tokenizer_path=tokenizer_path,
        boq=BOQ,
        eoq=EOQ,
        eoa=EOA,
        condition_mapping=dict(CONDITION_TOKENS),
        vocab_size=VOCAB_SIZE,
    )
    with SampledWriter(folder, info, max_seq_len=MAX_SEQ_LEN) as writer:
        write_byte_tokenizer(writer.staging)
        writer.add_tokens(draw.integers(0, VOCAB_SIZE, 1000))
        for _ in range(epochs):
            starts, lens = draw.integers(0, 980, (2, examples)), draw.integers(1, 14, (2, examples))
            writer.add_epoch(EpochIndex(starts[0], lens[0], starts[1], lens[1]))


def differences(run: Path, twin: Path) -> list[str]:
    """What a finished run has otherwise than its twin, bit for bit; empty: nothing."""
    found = []
    for kind in TENSORS:
        ours, theirs = (read_tensors(each / LAST / kind) for each in (run, twin))
        names = sorted(ours.keys() | theirs.keys())
        other = [
            name
            for name in names
            if name not in ours or name not in theirs or _bytes(ours[name]) != _bytes(theirs[name])
        ]
        found += [
            f"{kind}: {len(other)} of {len(names)} tensors, first {each}" for each in other[:1]
        ]
    if _lines(run) != _lines(twin):
        found.append("metrics.jsonl")
    records = [json.loads((each / LAST / "progress.json").read_text()) for each in (run, twin)]
    return found + ["progress.json"] * (records[0] != records[1])


def _bytes(tensor: Tensor) -> tuple[object, bytes]:
    """Equal numbers may differ in bits: 0.0 and -0.0."""
    bits = tensor.contiguous().reshape(-1).view(torch.uint8)
    return (tensor.dtype, tensor.shape), bits.numpy().tobytes()


def _lines(run: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def _global_tokens(life: Life) -> int:
    return MICRO_TOKENS * life.ranks * (2 if life.accumulates else 1)
