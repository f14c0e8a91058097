"""oneDNN's product is the same map as the plain one, and is used only where it may be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from models import linear as linear_module
from models.linear import MIN_ROWS, linear, pick_linear_kernel, product, set_linear_kernel

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


@pytest.fixture
def onednn() -> Iterator[None]:
    set_linear_kernel("onednn")
    yield
    set_linear_kernel("mkl")


@needs_onednn
@pytest.mark.parametrize("shape", [(MIN_ROWS, 16, 24), (200, 64, 256), (513, 33, 7)])
def test_product_and_gradients_equal_the_plain_ones(
    onednn: None, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows, width_in, width_out = shape
    x = torch.randn(num_rows, width_in, requires_grad=True)
    weight = torch.randn(width_out, width_in, requires_grad=True)
    grad = torch.randn(num_rows, width_out)
    calls = []
    real = linear_module._product
    monkeypatch.setattr(linear_module, "_product", lambda *a: calls.append(a) or real(*a))
    ours = torch.autograd.grad(linear(x, weight), (x, weight), grad)
    assert len(calls) == 3, "forward and both gradients go through oneDNN"
    plain = torch.autograd.grad(F.linear(x, weight), (x, weight), grad)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(product(x, weight), x @ weight.T, atol=2e-5, rtol=1e-5)


@needs_onednn
def test_a_gradient_that_nobody_wants_is_not_computed(onednn: None) -> None:
    x, weight = torch.randn(100, 8), torch.randn(8, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None and weight.grad is not None


@needs_onednn
@pytest.mark.parametrize("rows, dtype", [(MIN_ROWS - 1, torch.float32), (100, torch.bfloat16)])
def test_few_rows_and_other_types_take_the_plain_way(
    onednn: None, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_module, "_product", None)
    x, weight = torch.randn(rows, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="linear=blas is none of auto, mkl, onednn"):
        set_linear_kernel("blas")


def test_the_probe_chooses_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([[2.0, 1.0], [1.0, 1.0]])
    monkeypatch.setattr(linear_module, "_fastest", lambda *calls: next(seconds))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert pick_linear_kernel(torch.device("cpu"), 8)[0] == "onednn"
    assert pick_linear_kernel(torch.device("cpu"), 8)[0] == "mkl"
    assert pick_linear_kernel(torch.device("cuda"), 8)[0] == "mkl"
