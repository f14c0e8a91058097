"""Decoding with static shapes, compiled or captured, makes the tokens that eager decoding makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from net_cases import NETS, VOCAB_SIZE, build, tiny_config
from torch import Tensor

from inference import decoding, rows
from inference.decoding import pick_decode_mode, row_kernel
from inference.requests import Answer, Request, Sampling
from models.kv_cache import KVCache
from models.language_model import LanguageModel
from simple_inference_engine import InferenceEngine

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def requests() -> list[Request]:
    """Of many lengths, some sampled."""
    generator = torch.Generator().manual_seed(4)
    return [
        Request(
            torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist(),
            max_new_tokens=tokens,
            sampling=Sampling(0.9, seed=length) if length % 2 else Sampling(),
        )
        for length, tokens in ((3, 9), (17, 4), (1, 12), (8, 2), (5, 6))
    ]


def answers(engine: InferenceEngine) -> list[Answer]:
    return sorted(engine.answer(requests()), key=lambda answer: answer.index)


def same_as_eager(model: LanguageModel, mode: str) -> None:
    """In batches that grow, shrink and are taken up again."""
    expected = answers(InferenceEngine(model, max_context=64, max_rows=3))
    engine = InferenceEngine(model, max_context=64, max_rows=3, decode=mode)
    assert answers(engine) == expected
    assert answers(engine) == expected  # with what was kept


def uncompiled(function: Callable[[Tensor], Tensor], **_: Any) -> Callable[[Tensor], Tensor]:
    """In place of torch.compile."""
    return function


@pytest.mark.parametrize("net", NETS)
def test_static_decoding_equals_eager(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(rows, "FIRST_CACHE_LENGTH", 16)  # it grows once
    same_as_eager(build(NETS[net]), "compiled")


def test_compiled_decoding_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "BACKEND", "aot_eager")
    small = tiny_config("hrm", n_layers=2, H_cycles=1, L_cycles=1)
    same_as_eager(build(small), "compiled")


@pytest.mark.slow
@pytest.mark.parametrize("net", ["hrm", "transformer", "trm", "rins", "ut", "hrm post-norm"])
def test_every_net_compiles(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "BACKEND", "aot_eager")
    monkeypatch.setattr(rows, "FIRST_CACHE_LENGTH", 16)
    same_as_eager(build(NETS[net]), "compiled")


@pytest.mark.slow
def test_decoding_compiled_by_inductor_equals_eager() -> None:
    same_as_eager(build(NETS["hrm"]), "compiled")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["cuda_graph", "compiled"])
def test_static_decoding_equals_eager_on_a_gpu(mode: str, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    same_as_eager(build(NETS["hrm"]).to("cuda", dtype), mode)


def test_shapes_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    static = LanguageModel.decode_static

    def remember(self: LanguageModel, tokens: Tensor, cache: KVCache) -> Tensor:
        seen.append((len(tokens), cache.max_length))
        return static(self, tokens, cache)

    monkeypatch.setattr(LanguageModel, "decode_static", remember)
    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(rows, "FIRST_CACHE_LENGTH", 16)
    prompts = [list(range(1, length)) for length in range(2, 25)]
    engine = InferenceEngine(build(NETS["ut"]), max_context=64, max_rows=6, decode="compiled")
    list(engine.generate_ids(prompts, stop_ids=(), max_new_tokens=30))
    assert {num_rows for num_rows, _ in seen} <= {1, 2, 4, 6}
    assert {length for _, length in seen} <= {16, 32, 64}


def test_a_full_row_beside_those_in_use_does_no_harm() -> None:
    model = build(NETS["ut"])
    cache = model.new_cache(4, 16)
    cache.lengths[:] = torch.tensor([2, 16, 15, 40])  # only the first row is in use
    with torch.no_grad():
        logits = model.logits(model.decode_static(torch.tensor([3, 0, 0, 0]), cache))
    assert logits[0].isfinite().all()


def test_auto_is_what_the_device_wants() -> None:
    assert pick_decode_mode("auto", CPU) == "eager"
    assert pick_decode_mode("auto", torch.device("cuda", 0)) == "cuda_graph"
    assert pick_decode_mode("compiled", CPU) == "compiled"
    with pytest.raises(ValueError, match="decode=fast is none of auto, eager, compiled"):
        pick_decode_mode("fast", CPU)
    with pytest.raises(ValueError, match="decode=cuda_graph needs a CUDA device, not cpu"):
        InferenceEngine(build(NETS["ut"]), max_context=9, decode="cuda_graph")


def test_the_kernel_is_for_cpus_in_fp32() -> None:
    assert row_kernel(build(NETS["hrm"])) is not None
    assert row_kernel(build(NETS["hrm"]).bfloat16()) is None
