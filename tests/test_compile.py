"""Compiled nets compute what uncompiled ones do, and are compiled once for all batches of a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
import torch._dynamo
from attention_cases import AWKWARD, packed, random_rows
from net_cases import NETS
from option_cases import SMALL_NETS, net_with, outcome, packed_batches
from run_cases import ALONE, run_config
from torch._dynamo.utils import counters

import models.linear
from models.attention import sdpa
from models.attention.flex import FlexAttention
from models.attention.sdpa import SdpaAttention
from models.linear import set_linear_kernel
from training import compiling
from training.adam_atan2 import AdamATan2
from training.building import build_model
from training.compiling import CompileError, CompileMode, compile_s, require_compiler
from training.step import train_step
from training.step_check import StepCheck

CPU = torch.device("cpu")
BACKPROP_STEPS = (2, 3, 4)  # as the schedule raises them


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No test finds what another one has compiled."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(capture_scalar_outputs=False, recompile_limit=8):
        yield
    torch._dynamo.reset()


def assert_equal_to_eager(net: str, mode: CompileMode, **options: str) -> None:
    batches = packed_batches()[:2]
    expected = outcome(net_with(SMALL_NETS[net]), batches)
    found = outcome(net_with(SMALL_NETS[net], compiled=mode, **options), batches)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(net, marks=() if net in ("hrm", "transformer") else pytest.mark.slow)
        for net in SMALL_NETS
    ],
)
def test_a_compiled_step_equals_the_plain_one(net: str) -> None:
    assert_equal_to_eager(net, "step")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "stack"])
@pytest.mark.parametrize("net", SMALL_NETS)
def test_compiled_blocks_and_stacks_equal_plain_ones(net: str, mode: CompileMode) -> None:
    assert_equal_to_eager(net, mode)


@pytest.mark.parametrize("recomputed", ["block", pytest.param("attention", marks=pytest.mark.slow)])
def test_compiled_code_computes_activations_again(recomputed: str) -> None:
    assert_equal_to_eager("hrm", "block", recomputed=recomputed)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "stack", "step"])
@pytest.mark.parametrize("net", ["hrm", "transformer"])
def test_machine_code_of_inductor_equals_the_plain_net(net: str, mode: CompileMode) -> None:
    assert_equal_to_eager(net, mode, backend="inductor")


@pytest.mark.slow
def test_machine_code_calls_onednn_where_that_is_the_linear_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models.linear, "MIN_ROWS", 8)
    monkeypatch.setattr(models.linear, "_chosen", "mkl")
    set_linear_kernel("onednn")
    assert_equal_to_eager("hrm", "block", backend="inductor")


@pytest.mark.parametrize("case", AWKWARD)
def test_attention_as_one_operator_is_the_same_bit_for_bit(case: str) -> None:
    layout, num_rows = packed(*AWKWARD[case])
    plan = SdpaAttention().prepare(layout, num_rows)
    query, key, value, grad = random_rows(num_rows, 4)
    outcomes = []
    for is_whole in (False, True):
        with patch("torch.compiler.is_compiling", return_value=is_whole):
            mixed = plan.attend(query, key, value)
        gradients = torch.autograd.grad(mixed, (query, key, value), grad.detach())
        outcomes.append((mixed, *gradients))
    torch.testing.assert_close(*outcomes, atol=0, rtol=0)


def test_the_operators_say_truly_what_they_make() -> None:
    """Shapes, types and strides as compiled code expects them, and no input changed."""
    layout, num_rows = packed(*AWKWARD["usual"])
    query, key, value, grad = (rows.detach() for rows in random_rows(num_rows, 4))
    lens = (layout.prefix_lens, layout.cu_seqlens)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(sdpa._attend_whole, (query, key, value, *lens), test_utils=checks)
    outputs = sdpa._attend_whole(query, key, value, *lens)
    inputs = ([grad, query, key, value, *outputs], *lens)
    torch.library.opcheck(sdpa._attend_whole_backward, inputs, test_utils=checks)
    matrices = (torch.randn(8, 4), torch.randn(6, 4))
    torch.library.opcheck(models.linear._product_whole, matrices, test_utils=checks)


@pytest.mark.parametrize(
    ("mode", "graphs"),
    [
        ("block", 3),
        pytest.param("stack", 3, marks=pytest.mark.slow),
        pytest.param("step", 3, marks=pytest.mark.slow),
    ],
)
def test_a_hundred_real_batches_compile_nothing_again(mode: CompileMode, graphs: int) -> None:
    """Blocks and stacks: without gradient, with, and with but not to their input (the first call
    that carries gradient). The whole recurrence: once per number of gradient-carrying calls."""
    batches = packed_batches()[:103]
    assert len(batches) == 103 and len({int(b.layout.num_seqs) for b in batches}) > 3
    model = net_with(SMALL_NETS["hrm"], compiled=mode)
    for number, backprop_steps in enumerate(BACKPROP_STEPS):
        outcome(model, batches[number : number + 1], backprop_steps)
    assert counters["stats"]["unique_graphs"] == graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number, batch in enumerate(batches[3:]):
            outcome(model, [batch], BACKPROP_STEPS[number * 3 // 100])
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("mode", ["block", "stack", "step"])
def test_compiling_keeps_the_names_of_parameters(mode: CompileMode) -> None:
    plain, compiled = (net_with(SMALL_NETS["hrm"], compiled=each) for each in ("none", mode))
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert (
        net_with(SMALL_NETS["hrm"], compiled=mode).state_dict().keys()
        == net_with(SMALL_NETS["hrm"]).state_dict().keys()
    )


def test_a_failure_to_compile_is_an_error_that_names_the_setting() -> None:
    def breaks(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> None:
        raise RuntimeError("no code for this")

    model = net_with(SMALL_NETS["transformer"], compiled="block", backend=breaks)  # type: ignore[arg-type]
    optimizer = AdamATan2(model.parameters(), lr=0.1)
    with pytest.raises(CompileError, match=r"no code for this.*compile=none trains without"):
        train_step(model, optimizer, packed_batches()[:1], 10.0, None, StepCheck(ALONE))


def test_it_knows_how_long_compiling_took() -> None:
    before = compile_s()
    outcome(net_with(SMALL_NETS["transformer"], compiled="block"), packed_batches()[:1])
    assert compile_s() > before


def test_a_machine_without_a_cpp_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    require_compiler("block", CPU, SdpaAttention())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    require_compiler("none", CPU, SdpaAttention())
    with pytest.raises(ValueError, match=r"compile=block needs a C\+\+ compiler.*compile=none"):
        require_compiler("block", CPU, SdpaAttention())


def test_what_a_gpu_cannot_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="compile=step needs triton on CUDA"):
        require_compiler("step", cuda, FlexAttention())
    monkeypatch.setattr(compiling, "find_spec", lambda name: object())
    require_compiler("step", cuda, FlexAttention())
    with pytest.raises(ValueError, match="attention=sdpa compiles on CPU alone"):
        require_compiler("stack", cuda, SdpaAttention())


def test_the_summary_says_what_is_compiled_and_that_it_was_not_before(tmp_path) -> None:
    config = run_config(tmp_path, arch=NETS["hrm"], compile="stack", device="cpu", linear="mkl")
    built = build_model(config, 256, ALONE, {})
    assert (built.chosen["compile"], built.lines["compile"]) == ("stack", "stack")
    built = build_model(config, 256, ALONE, {"compile": "none"})
    assert built.lines["compile"] == "stack; it was none: the run is no longer bit-equal"
    plain = run_config(tmp_path, device="cpu", linear="mkl")
    assert "compile" not in build_model(plain, 256, ALONE, {"compile": "none"}).lines
