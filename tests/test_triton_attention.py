"""Attention in one pass: its tiles here, its kernels in a process of Triton's interpreter."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from attention_cases import AWKWARD, HEAD_SIZE, HEADS, LAYOUTS, Lengths, packed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from source_tree import ROOT
from torch import Tensor
from triton_worker import AgreeCase, Target

from models.attention import BACKENDS, one_pass, select_attention, triton_launch
from models.attention.dense import prefix_lm_mask
from models.attention.interface import FusedContext, GatedPlan, PackedContext
from models.layers import AttentionContext, GatedAttention, Rope

WORKER = Path(__file__).with_name("triton_worker.py")
# In bfloat16 a row that sees two keys has gradients that nearly cancel: up to 3e-2 by rounding.
MAX_ERROR = {"float32": 2e-6, "float16": 5e-3, "bfloat16": 4e-2}
SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: pip install triton"
)

# Around the edges of blocks of 16 rows and tiles of 32, one sequence beside the other.
AROUND_EDGES = [(0, 0), (1, 0), (3, 4), (16, 16), (15, 2), (0, 17), (33, 1)]
FUSED = "rotated and gated"
QUICK = [
    AgreeCase(AROUND_EDGES, padding=5, layer=FUSED),
    AgreeCase([], padding=7),
    AgreeCase([(3, 4), (5, 0)], padding=2, head_size=24, layer="gated"),
    AgreeCase([(3, 4), (5, 0)], padding=0, dtype="bfloat16"),
]


def work(mode: str, records: list[Any], tmp_path: Path) -> list[Any]:
    """What a process of its own finds: triton decides on import whether it interprets."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TRITON_INTERPRET": str(int(mode != "compile")),
        "TRITON_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(WORKER), mode],
        input=json.dumps(records, default=asdict),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_agreement(cases: list[AgreeCase], tmp_path: Path) -> None:
    for case, found in zip(cases, work("agree", cases, tmp_path), strict=True):
        assert found["padding_is_zero"], case
        assert max(found["errors"]) <= MAX_ERROR[case.dtype], (case, found)


@needs_triton
def test_the_kernels_agree_with_the_oracle(tmp_path: Path) -> None:
    check_agreement(QUICK, tmp_path)


@pytest.mark.slow
@needs_triton
def test_the_kernels_agree_with_the_oracle_on_awkward_rows(tmp_path: Path) -> None:
    cases = [
        AgreeCase(lengths, padding, dtype=dtype, head_size=head_size, layer=layer)
        for lengths, padding in AWKWARD.values()
        for dtype, head_size, layer in (
            ("float32", 8, "attention"),
            ("bfloat16", 64, FUSED),
            ("float16", 32, "gated"),
        )
    ]
    check_agreement(cases, tmp_path)


@pytest.mark.slow
@needs_triton
def test_the_kernels_agree_with_the_oracle_on_any_row(tmp_path: Path) -> None:
    draw = random.Random(0)
    cases = []
    for _ in range(30):
        rows, others = draw.choice([(16, 16), (16, 32), (32, 16)])
        lengths = [(draw.randrange(50), draw.randrange(50)) for _ in range(draw.randrange(1, 5))]
        head_size, layer = draw.choice([(8, "gated"), (20, "attention"), (16, FUSED), (128, FUSED)])
        cases.append(
            AgreeCase(
                lengths,
                padding=draw.randrange(40),
                head_size=head_size,
                layer=layer,
                rows=rows,
                others=others,
                tile=draw.choice([32, 64]),
            )
        )
    check_agreement(cases, tmp_path)


@pytest.mark.slow
@needs_triton
def test_nets_compute_what_they_do_with_the_oracle(tmp_path: Path) -> None:
    """Rotary positions and gate are in the kernels here."""
    labels = ["hrm", "hrm without positions", "ut post-norm"]
    for label, error in zip(labels, work("nets", labels, tmp_path), strict=True):
        assert error <= 1e-5, label


@pytest.mark.slow
@needs_triton
def test_golden_cases_of_nets_hold_with_it(tmp_path: Path) -> None:
    assert work("golden", ["logits and hrm_a", "transformer_a"], tmp_path) == [0, 0]


@pytest.mark.slow
@needs_triton
def test_the_kernels_compile_for_every_gpu_within_its_shared_memory(tmp_path: Path) -> None:
    targets = [
        *(Target(capability, 128, "bf16", is_fused=True) for capability in SHARED_BYTES),
        Target(90, 128, "bf16"),
        Target(89, 64, "fp32", is_fused=True),
        Target(89, 256, "fp16", is_fused=True),
        Target(89, 256, "fp32", is_fused=True),
    ]
    for target, kernels in zip(targets, work("compile", targets, tmp_path), strict=True):
        for name, found in kernels.items():
            assert found["shared_bytes"] <= SHARED_BYTES[target.capability], (target, name, found)


@settings(max_examples=60)
@given(drawn=LAYOUTS, tile_rows=st.sampled_from([1, 4, 16]))
@example(drawn=([(300, 100), (20, 0)], 41), tile_rows=128)
@example(drawn=AWKWARD["only padding"], tile_rows=4)
def test_tiles_cover_each_row_once_and_see_what_the_oracle_sees(
    drawn: tuple[Lengths, int], tile_rows: int
) -> None:
    layout, num_rows = packed(*drawn)
    with patch.object(triton_launch, "TILE_ROWS", tile_rows):
        tiles = one_pass.sequence_tiles(layout, num_rows)
    assert len(tiles) == num_rows // tile_rows + len(layout.cu_seqlens)  # whatever the lengths
    visible = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    covered = []
    for first, stop, start, prefix_end in tiles.tolist():
        for row in range(first, min(first + tile_rows, stop)):
            covered.append(row)
            visible[row, start : max(prefix_end, row + 1)] = True
    assert sorted(covered) == list(range(num_rows))
    assert torch.equal(visible, prefix_lm_mask(layout, num_rows))


def test_one_pass_compiles_once_for_all_lengths() -> None:
    """Shapes alone: the meta device runs the operator's declaration, which needs no Triton."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    def attend(gqkv: Tensor, cos: Tensor, sin: Tensor, plan: GatedPlan) -> Tensor:
        _, query, key, value = gqkv.unbind(1)
        return plan.attend(query, key, value) + plan.attend_gated(gqkv, cos, sin)

    compiled = torch.compile(attend, backend=count, fullgraph=True, dynamic=False)
    for lengths in ([(3, 4), (5, 2)], [(20, 0)], [(1, 1), (1, 1), (2, 30)], []):
        layout, used = packed(lengths, 0, unused_slots=4 - len(lengths))
        assert used <= 40
        on_meta = layout.map_vectors(lambda vector: vector.to("meta"))
        plan = one_pass.TritonAttention().prepare(on_meta, 40)
        rows = torch.empty(40, 4, HEADS, HEAD_SIZE, device="meta", requires_grad=True)
        cos, sin = torch.empty(2, 40, 1, 1, HEAD_SIZE, device="meta").unbind()
        compiled(rows, cos, sin, plan).sum().backward()
        assert rows.grad is not None and rows.grad.shape == rows.shape
    assert len(graphs) == 1


def test_rotary_positions_and_gate_within_the_kernels_keep_less_for_the_backward_pass() -> None:
    layout, num_rows = packed([(30, 34)], 0)
    with torch.device("meta"):
        layer = GatedAttention(HEADS * 16, HEADS, in_std=1.0, out_std=1.0)
        rope = Rope.at(torch.zeros(num_rows), 16, 100.0)
    plan = one_pass.TritonAttention().prepare(
        layout.map_vectors(lambda vector: vector.to("meta")), num_rows
    )
    contexts = (PackedContext(plan), FusedContext(plan))
    apart, fused = (kept_bytes(layer, rope, context, num_rows) for context in contexts)
    row_bytes = HEADS * 16 * 4
    # Rotated query and key, and the gate's sigmoid.
    assert apart - fused == 3 * num_rows * row_bytes


def kept_bytes(layer: GatedAttention, rope: Rope, context: AttentionContext, num_rows: int) -> int:
    """Of all that the layer's backward pass reads, each memory counted once."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    x = torch.empty(num_rows, layer.o_proj.weight.shape[1], device="meta", requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, rope, context, 0)
    return sum(storage.nbytes() for storage in kept.values())


def test_it_is_chosen_by_name_alone() -> None:
    assert "triton" not in {backend.name for backend in BACKENDS}
    with pytest.raises(ValueError, match="attention=triton cannot run here: not CUDA; use"):
        select_attention(
            "triton", device=torch.device("cpu"), dtype=torch.float32, head_size=HEAD_SIZE
        )


@pytest.mark.parametrize(
    ("dtype", "head_size", "hip", "has_triton", "capability", "reason"),
    [
        (torch.float32, 256, None, True, (8, 0), None),
        (torch.bfloat16, 20, None, True, (12, 0), None),
        (torch.bfloat16, 264, None, True, (9, 0), "head size 264 is above 256"),
        (torch.float64, 64, None, True, (9, 0), "float64 is neither float32 nor half precision"),
        (torch.bfloat16, 64, None, False, (9, 0), "triton is not installed"),
        (torch.bfloat16, 64, "6.4", True, (9, 0), "a ROCm build, on which it is untested"),
        (torch.float16, 64, None, True, (7, 5), "compute capability 7.5 is below 8.0"),
    ],
)
def test_it_says_why_it_cannot_run(
    dtype: torch.dtype,
    head_size: int,
    hip: str | None,
    has_triton: bool,
    capability: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(one_pass, "find_spec", lambda name: object() if has_triton else None)
    backend = one_pass.TritonAttention()
    assert backend.why_not(torch.device("cuda"), dtype, head_size) == reason
