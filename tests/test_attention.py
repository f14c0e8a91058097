"""Every attention backend against the dense oracle, and the oracle against its definition.

The two passes that CUDA backends make run here with a slow kernel in place of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from attention_cases import AWKWARD, HEAD_SIZE, HEADS, LAYOUTS, Lengths, packed, random_rows
from hypothesis import example, given, settings
from torch import Tensor

from models.attention import BACKENDS_BY_NAME, AttentionPlan, flex, sdpa, select_attention, varlen
from models.attention.dense import DenseAttention
from models.attention.two_pass import Segments, two_pass_plan
from models.batch import PackedLayout

CPU = torch.device("cpu")


def forward_and_gradients(plan: AttentionPlan, num_rows: int) -> list[Tensor]:
    """The output, and the gradients of query, key and value under a random one of the output."""
    query, key, value, grad = random_rows(num_rows, 4)
    mixed = plan.attend(query, key, value)
    return [mixed, *torch.autograd.grad(mixed, (query, key, value), grad.detach())]


def segment_by_segment(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """What a variable-length kernel computes, and what it asks of its caller."""
    q_edges, k_edges = segments.cu_q.tolist(), segments.cu_k.tolist()
    for edges, longest in ((q_edges, segments.max_q), (k_edges, segments.max_k)):
        lens = [end - start for start, end in pairwise(edges)]
        # Rows outside all segments are left unwritten, and so are those beyond the longest.
        assert edges[0] == 0 and edges[-1] == len(query)
        assert min(lens) >= 0 and max(lens) <= int(longest) and int(longest) > 0
    parts = []
    for i in range(len(q_edges) - 1):
        q = query[q_edges[i] : q_edges[i + 1]]
        k, v = (rows[k_edges[i] : k_edges[i + 1]] for rows in (key, value))
        if len(k) == 0:
            parts.append(torch.zeros_like(q))
            continue
        scores = torch.einsum("ihk,jhk->hij", q, k) * HEAD_SIZE**-0.5
        if segments.is_causal:
            hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
            scores = scores.masked_fill(hidden, -math.inf)
        parts.append(torch.einsum("hij,jhk->ihk", scores.softmax(-1), v))
    return torch.cat(parts)


def sdpa_plan(layout: PackedLayout, num_rows: int) -> AttentionPlan:
    return sdpa.SdpaAttention().prepare(layout, num_rows)


def sdpa_plan_with_long_sequences(layout: PackedLayout, num_rows: int) -> AttentionPlan:
    with patch.multiple(sdpa, ALONE_FROM=24, COARSE_FROM=9, COARSE_WIDTH=8, FINE_WIDTH=4):
        plan = sdpa.SdpaAttention().prepare(layout, num_rows)
        assert plan.buckets is not None  # they are made when first asked for
        return plan


def two_passes(layout: PackedLayout, num_rows: int) -> AttentionPlan:
    return two_pass_plan(layout, num_rows, slow_varlen_kernel)


def slow_varlen_kernel(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """The backend's own kernel, but what it calls of torch is replaced."""
    with patch("torch.nn.attention.varlen.varlen_attn", slow_varlen_attn):
        return varlen.varlen_kernel(query, key, value, segments)


def slow_varlen_attn(*args: Any, window_size: tuple[int, int]) -> Tensor:
    query, key, value, cu_q, cu_k, max_q, max_k = args
    assert window_size in ((-1, -1), (-1, 0))
    longest = torch.tensor(max_q), torch.tensor(max_k)
    segments = Segments(cu_q, cu_k, *longest, is_causal=window_size == (-1, 0))
    return segment_by_segment(query, key, value, segments)


PLANNERS = [sdpa_plan, sdpa_plan_with_long_sequences, two_passes]
Planner = Callable[[PackedLayout, int], AttentionPlan]


def check_against_oracle(planner: Planner, lengths: Lengths, padding: int) -> None:
    layout, num_rows = packed(lengths, padding)
    found = forward_and_gradients(planner(layout, num_rows), num_rows)
    wanted = forward_and_gradients(DenseAttention().prepare(layout, num_rows), num_rows)
    for ours, oracles in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, oracles, atol=2e-6, rtol=1e-5)
        assert not ours[int(layout.num_tokens) :].any()  # padding: exactly zero


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("case", AWKWARD)
def test_it_agrees_with_the_oracle_on_awkward_rows(planner: Planner, case: str) -> None:
    check_against_oracle(planner, *AWKWARD[case])


@pytest.mark.parametrize("planner", PLANNERS)
@settings(max_examples=60)
@given(drawn=LAYOUTS)
def test_it_agrees_with_the_oracle_on_any_row(planner: Planner, drawn: tuple[Lengths, int]) -> None:
    check_against_oracle(planner, *drawn)


@pytest.mark.parametrize("planner", PLANNERS)
def test_it_agrees_with_the_oracle_when_prefixes_are_made_causal(planner: Planner) -> None:
    layout, num_rows = packed([(3, 4), (5, 0), (1, 9)], 3)
    causal = layout.as_causal()
    found = forward_and_gradients(planner(causal, num_rows), num_rows)
    wanted = forward_and_gradients(DenseAttention().prepare(causal, num_rows), num_rows)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


@settings(max_examples=25)
@given(drawn=LAYOUTS)
@example(drawn=AWKWARD["usual"])
def test_oracle_does_what_the_definition_says_token_by_token(drawn: tuple[Lengths, int]) -> None:
    lengths, padding = drawn
    layout, num_rows = packed(lengths, padding)
    query, key, value = (rows.detach() for rows in random_rows(num_rows, 3))
    wanted = torch.zeros(num_rows, HEADS, HEAD_SIZE)
    start = 0
    for prefix, causal in lengths:
        for i in range(prefix + causal):
            seen = range(start, start + (prefix if i < prefix else i + 1))
            for head in range(HEADS):
                scores = key[seen, head] @ query[start + i, head] / math.sqrt(HEAD_SIZE)
                weights = scores.exp() / scores.exp().sum()
                wanted[start + i, head] = weights @ value[seen, head]
        start += prefix + causal
    found = DenseAttention().prepare(layout, num_rows).attend(query, key, value)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("planner", PLANNERS)
def test_a_sequence_packed_alone_gets_what_it_gets_among_neighbours(planner: Planner) -> None:
    layout, num_rows = packed([(4, 3), (6, 5), (2, 9)], 4)
    query, key, value = random_rows(num_rows, 3)
    among = planner(layout, num_rows).attend(query, key, value)
    alone_layout, alone_rows = packed([(6, 5)], 0)
    rows = slice(7, 18)
    alone = planner(alone_layout, alone_rows).attend(query[rows], key[rows], value[rows])
    torch.testing.assert_close(among[rows], alone, atol=1e-6, rtol=1e-5)


def test_sdpa_never_puts_a_long_sequence_into_a_bucket() -> None:
    layout, num_rows = packed([(10, 20), (10, 21), (3, 4)], 0)
    plan = sdpa_plan_with_long_sequences(layout, num_rows)
    assert isinstance(plan, sdpa.BucketPlan)
    assert [bucket.width for bucket in plan.buckets] == [8, 30, 31]


@pytest.mark.parametrize(
    ("lengths", "calls"), [([(3, 2)], 2), ([(3, 0)], 2), ([(0, 5), (0, 1)], 1), ([], 2)]
)
def test_two_passes_leave_out_the_prefixes_where_a_row_has_sequences_but_none(
    lengths: Lengths, calls: int
) -> None:
    plan = two_pass_plan(*packed(lengths, 2), segment_by_segment)
    assert sum(segments is not None for segments in (plan.prefix, plan.response)) == calls


def test_two_passes_on_torchs_kernel_compile_once_for_all_lengths() -> None:
    """Shapes alone: the meta device runs the kernel's declaration, which needs no GPU."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
        return plan.attend(query, key, value)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(attend, backend=count, fullgraph=True, dynamic=False)
        for lengths in ([(3, 4), (5, 2)], [(20, 0)], [(1, 1), (1, 1), (2, 30)], []):
            layout, used = packed(lengths, 0, unused_slots=4 - len(lengths))
            assert used <= 40
            on_meta = layout.map_vectors(lambda vector: vector.to("meta"))
            plan = two_pass_plan(on_meta, 40, varlen.varlen_kernel)
            rows = torch.empty(40, 3, HEADS, HEAD_SIZE, device="meta", requires_grad=True)
            query, key, value = rows.unbind(1)
            compiled(query, key, value, plan).sum().backward()
            assert rows.grad is not None and rows.grad.shape == rows.shape
    assert len(graphs) == 1


def choose(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[str, str]:
    backend, reason = select_attention(name, device=device, dtype=dtype, head_size=head_size)
    return backend.name, reason


def test_selection_on_a_cpu_takes_sdpa_and_says_what_speaks_against_the_others() -> None:
    name, reason = choose("auto", CPU, torch.float32, 32)
    assert name == "sdpa"
    assert reason == "flash3: not CUDA; varlen: not CUDA; flex: not CUDA"
    assert choose("dense", CPU, torch.float32, 32) == ("dense", "asked for")


def test_selection_refuses_unknown_names_and_backends_that_cannot_run() -> None:
    with pytest.raises(ValueError, match=r"attention=flash2 is none of auto, flash3, varlen"):
        choose("flash2", CPU, torch.float32, 32)
    with pytest.raises(ValueError, match="attention=varlen cannot run here: not CUDA; use"):
        choose("varlen", CPU, torch.float32, 32)


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "head_size", "reason"),
    [
        ("varlen", (8, 0), torch.bfloat16, 256, None),
        ("varlen", (12, 0), torch.float16, 128, None),
        ("varlen", (7, 5), torch.float16, 64, "compute capability 7.5 is below 8.0"),
        ("varlen", (9, 0), torch.float32, 64, "float32 is not half precision"),
        ("varlen", (9, 0), torch.bfloat16, 20, "head size 20 is not a multiple of 8 up to 256"),
        ("varlen", (8, 9), torch.bfloat16, 256, "head size 256 has no backward pass on this GPU"),
        ("flash3", (8, 0), torch.bfloat16, 64, "not a Hopper GPU"),
        ("flash3", (9, 0), torch.bfloat16, 64, "No module named 'no_such"),
        ("flex", (9, 0), torch.float32, 8, "head size 8 is below 16"),
    ],
)
def test_a_cuda_backend_says_why_it_cannot_run(
    name: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_size: int,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("models.attention.flash3.PACKAGE", "no_such_flash_attn_3")
    monkeypatch.setattr(flex, "find_spec", lambda name: object())
    found = BACKENDS_BY_NAME[name].why_not(torch.device("cuda"), dtype, head_size)
    assert (found is None) if reason is None else (found is not None and reason in found)


@pytest.mark.gpu
@pytest.mark.parametrize("case", AWKWARD)
@pytest.mark.parametrize("name", ["flash3", "varlen", "flex", "triton", "sdpa"])
def test_a_cuda_backend_agrees_with_the_oracle_in_bf16(name: str, case: str) -> None:
    device, head_size = torch.device("cuda"), 64
    backend = BACKENDS_BY_NAME[name]
    reason = backend.why_not(device, torch.bfloat16, head_size)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    lengths, padding = AWKWARD[case]
    layout, num_rows = packed([(17 * p, 17 * r) for p, r in lengths], 17 * padding)
    layout = layout.map_vectors(lambda vector: vector.to(device))
    rows = torch.randn(4, num_rows, HEADS, head_size, device=device, dtype=torch.bfloat16)
    results = []
    for chosen, dtype in ((backend, torch.bfloat16), (DenseAttention(), torch.float32)):
        query, key, value, grad = rows.to(dtype).unbind()
        inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        mixed = chosen.prepare(layout, num_rows).attend(*inputs)
        results.append([mixed, *torch.autograd.grad(mixed, inputs, grad)])
    for found, wanted in zip(*results, strict=True):
        error = (found.float() - wanted).norm()
        assert error < 1e-2 * wanted.norm() + 1e-3  # where one key is seen, gradients are zero
        assert not found[int(layout.num_tokens) :].any()
