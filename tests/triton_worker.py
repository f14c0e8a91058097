"""Triton's kernels on a CPU, for tests/test_triton_attention.py: interpreted, or compiled for GPUs.

    TRITON_INTERPRET=1 python tests/triton_worker.py agree < CASES   # against the oracle
    TRITON_INTERPRET=1 python tests/triton_worker.py nets < LABELS   # whole nets against it
    TRITON_INTERPRET=1 python tests/triton_worker.py golden < WHICH  # the tests of golden nets
    python tests/triton_worker.py compile < TARGETS                  # no GPU is needed

Each reads a JSON list (of `AgreeCase`, `Target`, or names), and prints one of what it found.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import net_cases
import numpy as np
import pytest
import torch
from attention_cases import packed
from torch import Tensor

from models.attention import one_pass, triton_launch
from models.attention.dense import DenseAttention
from models.layers import Rope

HEADS = 2
KERNELS = ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")
ROWS_ARGUMENTS = (
    *("query", "key", "value", "mixed", "grad", "rotated_query", "rotated_key"),
    *("grad_query", "grad_key", "grad_value"),
)
FUSED_ARGUMENTS = ("gate", "gated", "cos", "sin", "grad_gate", "grad_mixed")


@dataclass(frozen=True)
class AgreeCase:
    """A packed row, and what the kernels work on at a time."""

    lengths: list[tuple[int, int]]  # (prefix, causal part) of each sequence
    padding: int
    head_size: int = 16
    dtype: str = "float32"
    rows: int = 16
    others: int = 16
    tile: int = 32
    layer: str = "attention"  # or gated, or rotated and gated


@dataclass(frozen=True)
class Target:
    """A GPU by its compute capability (90 is 9.0), and what the kernels are compiled for."""

    capability: int
    head_size: int
    dtype: str  # fp32, fp16 or bf16
    is_fused: bool = False  # with rotary positions and the gate


def agree(case: AgreeCase) -> dict[str, Any]:
    """Relative errors of output and gradients, and whether those of padding are zero."""
    layout, num_rows = packed(case.lengths, case.padding)
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, 5, HEADS, case.head_size, generator=generator).to(dtype)
    positions = torch.cat([torch.arange(sum(each)) for each in [*case.lengths, (case.padding, 0)]])
    rope = Rope.at(positions, case.head_size, 100.0) if "rotated" in case.layer else None
    blocks = triton_launch.Blocks(case.rows, case.others, num_warps=4, num_stages=1)
    changes = {"TILE_ROWS": case.tile, "blocks_of": lambda *_, **__: blocks}
    with patch.multiple(triton_launch, **changes):
        plan = one_pass.TritonAttention().prepare(layout, num_rows)

        def fused(gqkv: Tensor) -> Tensor:
            angles = (rope.cos, rope.sin) if rope else (None, None)
            return plan.attend_gated(gqkv, *angles)

        is_gated = "gated" in case.layer
        ours = fused if is_gated else lambda gqkv: plan.attend(*gqkv.unbind(1)[1:])
        found = output_and_gradients(ours, rows)
    oracle = DenseAttention().prepare(layout, num_rows)

    def written_out(gqkv: Tensor) -> Tensor:
        gate, query_key, value = gqkv.split((1, 2, 1), dim=1)
        query, key = (rope.rotate(query_key) if rope else query_key).unbind(1)
        mixed = oracle.attend(query, key, value[:, 0])
        return gate[:, 0].sigmoid() * mixed if is_gated else mixed

    wanted = output_and_gradients(written_out, rows.float())
    num_tokens = int(layout.num_tokens)
    return {
        "errors": [relative_error(*pair) for pair in zip(found, wanted, strict=True)],
        "padding_is_zero": not any(bool(each[num_tokens:].any()) for each in found),
    }


def output_and_gradients(layer: Callable[[Tensor], Tensor], rows: Tensor) -> list[Tensor]:
    """The output, and the gradients of gate, query, key and value: [T, H, K] each."""
    gqkv = rows[:, :4].detach().requires_grad_()
    mixed = layer(gqkv)
    (of_gqkv,) = torch.autograd.grad(mixed, gqkv, rows[:, 4])
    return [mixed.detach(), *of_gqkv.unbind(1)]


def compare_net(label: str) -> float:
    """The largest relative error of what a net computes, and of its gradients."""
    model = net_cases.build(net_cases.NETS[label])
    row = net_cases.random_row((5, 1, 0, 9), (4, 0, 3, 20), num_padding=6)
    results = []
    for attention in (one_pass.TritonAttention(), DenseAttention()):
        model.attention = attention
        model.zero_grad()
        hidden = model(row.tokens, row.positions, row.layout)
        hidden.backward(torch.linspace(0.0, 99.0, hidden.numel()).sin().view(hidden.shape))
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        results.append([hidden.detach(), *grads])
    return max(relative_error(*pair) for pair in zip(*results, strict=True))


def run_golden(which: str) -> int:
    """The exit status of pytest on tests of golden nets (`pytest -k`), with this attention in."""
    tests = str(Path(__file__).with_name("test_nets.py"))
    replaced = patch.object(net_cases, "SdpaAttention", one_pass.TritonAttention)
    with replaced, redirect_stdout(sys.stderr):  # what pytest prints is no result
        return int(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", tests, "-k", which]))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| against |wanted|, or against 1e-3 of a value each where that is more."""
    norm = max(float(wanted.norm()), 1e-3 * wanted.numel() ** 0.5)
    return float((found.float() - wanted).norm()) / norm


def multiply_bfloat16() -> None:
    """Triton's interpreter keeps bfloat16 as bits, and multiplies those; so it is told how."""
    from triton.runtime import interpreter

    def numbers(handle: Any) -> np.ndarray:
        if handle.dtype != interpreter.tl.bfloat16:
            return handle.data
        return (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def create_dot(self: object, a: Any, b: Any, d: Any, *_: object) -> Any:
        product = np.matmul(numbers(a), numbers(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def compile_kernels(target: Target) -> dict[str, Any]:
    """Shared memory [bytes], and bytes of registers that were spilled, of each kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.attention import triton_kernels, triton_rows

    element_bytes = 4 if target.dtype == "fp32" else 2
    found = {}
    for name in (*KERNELS, "rotate_kernel") if target.is_fused else KERNELS:
        kernel: Any = getattr(triton_kernels, name, None) or getattr(triton_rows, name)
        is_backward = "gradient" in name
        blocks = triton_launch.blocks_of(target.head_size, element_bytes, is_backward=is_backward)
        constants: dict[str, int | None] = {**triton_launch.constants_of(target.head_size, blocks)}
        if name == "rotate_kernel":
            constants = {"HEAD": target.head_size, "ROWS": triton_launch.ROTATED_ROWS}
        elif not target.is_fused:
            constants |= {name: None for name in FUSED_ARGUMENTS if name in kernel.arg_names}
        source = ASTSource(kernel, *signature_of(kernel, f"*{target.dtype}", constants))
        options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
        gpu = GPUTarget("cuda", target.capability, 32)
        binary: Any = triton.compile(source, target=gpu, options=options)
        tools = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"
        found[name] = {
            "shared_bytes": binary.metadata.shared,
            "spilled_bytes": spilled_bytes(binary.asm["cubin"], tools / "cuobjdump"),
        }
    return found


def signature_of(
    kernel: Any, pointer: str, constants: dict[str, int | None]
) -> tuple[dict, dict, dict]:
    """Types, constants and alignments of a kernel's arguments, as a launch would find them."""
    from models.attention.triton_rows import Rows

    aligned = [["tt.divisibility", 16]]
    types: dict[str, Any] = {}
    alignments = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name in (*ROWS_ARGUMENTS, *FUSED_ARGUMENTS):
            is_angle = name in ("cos", "sin")
            types[name] = Rows("*fp32" if is_angle else pointer, "i32", "i32")
            alignments |= {(index, part): aligned for part in range(3)}
        elif name == "scale":
            types[name] = "fp32"
        else:
            types[name] = {"tiles": "*i32", "num_rows": "i32"}.get(name, "*fp32")
            alignments[(index,)] = aligned
    by_index = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return types, by_index, alignments


def spilled_bytes(cubin: bytes, cuobjdump: Path) -> int:
    """What a thread keeps in local memory."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(cuobjdump), "--dump-resource-usage", str(path)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", told)
    return int(stack)


MODES: dict[str, Callable[[Any], Any]] = {
    "agree": lambda record: agree(AgreeCase(**record)),
    "nets": compare_net,
    "golden": run_golden,
    "compile": lambda record: compile_kernels(Target(**record)),
}


def main() -> None:
    mode = sys.argv[1]
    if mode != "compile":
        multiply_bfloat16()
        # What is allocated holds NaN: rows that a kernel leaves unwritten are seen.
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(0)
    print(json.dumps([MODES[mode](record) for record in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
