"""Compiled kernels are the formulas of the layers in fp64, and their bits are always the same."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from unittest.mock import patch

import numba
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import cpu_kernels
from models.cpu_kernels import EXACT, exp, floats, in_parts, int64, kernel
from models.layers import Rope

ROWS, WIDTH, HEADS = 37, 48, 3
TOLERANCE = 1e-6  # relative, of norms


@kernel(2, int64, fastmath=EXACT)
def powers(addresses: tuple[int, ...], numbers: tuple[int], first: int, end: int) -> None:
    x, into = floats(addresses[0], (end,)), floats(addresses[1], (end,))
    for index in range(first, end):
        into[index] = exp(x[index])


def powers_of(x: Tensor) -> Tensor:
    found = torch.empty_like(x)
    in_parts(powers, (x, found), (1,), len(x), max_parts=1)
    return found


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(shape) for shape in shapes]


def check(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < TOLERANCE


def gradients(formula: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    """What the formula gives in fp64, and its gradients."""
    exact = [each.double().requires_grad_() for each in inputs]
    result = formula(*exact)
    return [result.detach(), *torch.autograd.grad(result, exact, grad.double())]


def test_the_exponential_is_exact_to_two_in_ten_million_wherever_it_is_a_normal_number() -> None:
    x = torch.linspace(-87.3, 88.7, 1_000_003)
    exact = x.double().exp()
    assert float(((powers_of(x) - exact) / exact).abs().max()) < 2e-7


def test_the_exponential_of_what_is_no_number_zero_or_out_of_range_is_that_of_torch() -> None:
    inf = float("inf")
    x = torch.tensor([float("nan"), inf, -inf, 0.0, -0.0, 1e-40, -1e-40, 88.8, 3e38, -105.0, -3e38])
    torch.testing.assert_close(powers_of(x), x.exp(), rtol=0, atol=0, equal_nan=True)


def test_norm_and_its_gradient_are_those_of_the_layers() -> None:
    x, grad, grad_normed = drawn(*[(ROWS, WIDTH)] * 3)
    normed, scale = cpu_kernels.norm(x, 1e-6)
    expected, through = gradients(lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-6), grad_normed, x)
    check(normed, expected)
    check(cpu_kernels.norm_backward(grad, grad_normed, normed, scale), grad + through)


def test_swiglu_and_its_gradient_are_those_of_the_layers() -> None:
    gate_up, grad = drawn((ROWS, 2 * WIDTH), (ROWS, WIDTH))
    expected = gradients(lambda x: F.silu(x[:, :WIDTH]) * x[:, WIDTH:], grad, gate_up)
    check(cpu_kernels.swiglu(gate_up), expected[0])
    found, inner = cpu_kernels.swiglu_backward(gate_up, grad)
    check(inner, expected[0])
    check(found, expected[1])


def test_the_gate_and_its_gradient_are_those_of_the_layers() -> None:
    gqkv, mixed, grad = drawn((ROWS, 4 * WIDTH), (ROWS, WIDTH), (ROWS, WIDTH))
    formula = lambda gqkv, mixed: gqkv[:, :WIDTH].sigmoid() * mixed  # noqa: E731
    expected, of_gqkv, of_mixed = gradients(formula, grad, gqkv, mixed)
    check(cpu_kernels.gated(gqkv, mixed), expected)
    found = torch.zeros_like(gqkv)
    check(cpu_kernels.gated_backward(gqkv, mixed, grad, found), expected)
    check(found, of_gqkv)
    check(grad, of_mixed)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_rotation_is_that_of_the_layers_and_can_be_taken_back(heads: int) -> None:
    (gqkv,) = drawn((ROWS, 4 * WIDTH))
    rope = Rope.at(torch.arange(ROWS), WIDTH // heads, 1e4)
    turns = rope.cos, rope.sin
    rotated = gqkv.clone()
    cpu_kernels.rotate(rotated, turns)
    gate, query_key, value = gqkv.view(ROWS, 4, heads, -1).split((1, 2, 1), dim=1)
    expected = torch.cat((gate, rope.rotate(query_key), value), dim=1).flatten(1)
    check(rotated, expected.double())
    cpu_kernels.rotate(rotated, turns, back=True)
    check(rotated, gqkv.double())


def test_rotation_refuses_positions_of_other_rows() -> None:
    (gqkv,) = drawn((ROWS, 4 * WIDTH))
    rope = Rope.at(torch.arange(ROWS - 1), WIDTH, 1e4)
    with pytest.raises(AssertionError):
        cpu_kernels.rotate(gqkv, (rope.cos, rope.sin))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_stays_visible(number: float) -> None:
    x, grad = drawn((3, 2 * WIDTH), (3, WIDTH))
    x[1, 5] = number
    normed, scale = cpu_kernels.norm(x, 1e-6)
    assert not normed[1].isfinite().all()
    assert not cpu_kernels.norm_backward(x, x.clone(), normed, scale)[1].isfinite().all()
    assert not cpu_kernels.swiglu(x)[1].isfinite().all()
    assert not cpu_kernels.swiglu_backward(x, grad)[0][1].isfinite().all()
    for each in (normed, cpu_kernels.swiglu(x)):
        assert each[[0, 2]].isfinite().all()


def test_bits_depend_neither_on_the_place_in_memory_nor_on_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (x,) = drawn((ROWS, 2 * WIDTH))
    expected = cpu_kernels.norm(x, 1e-6)[0], cpu_kernels.swiglu(x)
    monkeypatch.setattr(cpu_kernels, "GRAIN", 64)
    for offset, threads in ((1, 1), (3, 2), (5, 4)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        moved = torch.empty(x.numel() + offset)[offset:].view_as(x).copy_(x)
        assert torch.equal(cpu_kernels.norm(moved, 1e-6)[0], expected[0])
        assert torch.equal(cpu_kernels.swiglu(moved), expected[1])


def compiled_anew() -> Callable[..., None]:
    @kernel(1, int64, fastmath=EXACT)
    def fills(addresses: tuple[int, ...], numbers: tuple[int], first: int, end: int) -> None:
        into = floats(addresses[0], (end,))
        for index in range(first, end):
            into[index] = numbers[0]

    return fills


@pytest.mark.parametrize("damaged", [b"", b"what is no pickle", b"cno_module\nname\n."])
def test_a_damaged_cache_is_no_obstacle(
    damaged: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cpu_kernels, "why_not_cached", told := [])
    compiled_anew()
    assert told == []
    (index,) = tmp_path.rglob("*.nbi")
    index.write_bytes(damaged)
    filled = torch.zeros(3)
    in_parts(compiled_anew(), (filled,), (7,), 3, max_parts=1)
    assert filled.tolist() == [7, 7, 7] and len(told) == 1


def test_a_kernel_owns_its_tensors_though_nobody_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    were_there: SimpleQueue[bool] = SimpleQueue()
    is_left, tensor = Event(), torch.zeros(2)
    reference = weakref.ref(tensor)

    def function(*_: object) -> None:
        is_left.wait(5)
        were_there.put(reference() is not None)

    with (
        patch.object(Future, "result", side_effect=KeyboardInterrupt),
        suppress(KeyboardInterrupt),
    ):
        in_parts(function, (tensor,), (), 2, max_parts=2)
    del tensor
    is_left.set()
    assert [were_there.get(timeout=5), were_there.get(timeout=5)] == [True, True]


@pytest.mark.slow
def test_it_needs_no_place_to_keep_compiled_code(tmp_path: Path) -> None:
    code = (
        "import numba.core.caching as caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import torch\n"
        "from models import cpu_attention, cpu_kernels\n"
        "print(cpu_kernels.swiglu(torch.ones(2, 4)).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "torch.Size([2, 2])" in done.stdout, done.stderr
