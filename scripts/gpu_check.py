"""Checks on a CUDA GPU what a CPU cannot show, and writes down what it found as JSON.

    python scripts/gpu_check.py                            # as much as 540 seconds allow
    python scripts/gpu_check.py --quick                    # the agreements alone
    python scripts/gpu_check.py --only training_speed --max-seconds 580 --out speed.json

Needs no data. Every check stands alone: one that fails is recorded, and the next one runs. It has
more than 300 lines because scripts do not import one another, and the checks share what they need.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.cuda import nccl
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.attention import (
    BACKENDS_BY_NAME,
    AttentionBackend,
    AttentionPlan,
    select_attention,
)
from models.attention.dense import DenseAttention
from models.attention.one_pass import OnePassPlan, TritonAttention
from models.attention.sdpa import SdpaAttention
from models.attention.two_pass import Segments, two_pass_plan
from models.batch import IGNORE_LABEL, PackedLayout
from models.flops import total_parameters, training_flops_per_token
from models.language_model import LanguageModel
from models.layers import Rope
from models.loss import next_token_sums
from models.transformer import Block, NetConfig
from simple_inference_engine import GREEDY, InferenceEngine, Request, Sampling
from training.adam_atan2 import AdamATan2
from training.compiling import (
    COMPILED,
    CompileMode,
    compile_model,
    compile_s,
    require_compiler,
)
from training.distributed import World, reshard, set_gradient_sync, shard_model, stop_world
from training.export_format import ARCH_ADAPTER, arch_from_reference, parameter_name_from_reference
from training.planning_activations import Kernels, Rows
from training.planning_devices import GPUS
from training.planning_memory import MemoryCase, memory_moments
from training.planning_memory import peak as plan_peak

Figures = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
DEFAULT_SECONDS = 540.0
VOCAB_SIZE, TINY_VOCAB_SIZE = 65536, 512
MAX_ERROR = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}  # relative norm
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # dense bf16, by the datasheets
STATE_BYTES = 24  # per parameter: fp32 weight, gradient, two moments, average; bf16 copy; spare
LENGTHS: dict[str, tuple[list[tuple[int, int]], int]] = {  # (prefix, causal part) each; padding
    "usual": ([(51, 68), (85, 34), (17, 102), (300, 200)], 51),
    "no padding": ([(51, 77), (85, 43)], 0),
    "only padding": ([], 119),
    "no responses": ([(51, 0), (85, 0)], 34),
    "one-token responses": ([(51, 1), (85, 1)], 34),
    "no prefixes": ([(0, 68), (0, 1), (0, 153)], 34),
    "one-token sequences": ([(1, 0), (0, 1), (1, 0)], 17),
    "an empty sequence": ([(34, 34), (0, 0), (34, 34)], 0),
    "much padding": ([(17, 17)], 1020),
    "long": ([(700, 3), (3, 700), (129, 128)], 9),
}
NETS: dict[str, dict[str, Any]] = {
    "transformer": {"name": "transformer"},
    "hrm": {"name": "hrm", "half_layers": True, "H_cycles": 2, "L_cycles": 3},
    "trm": {"name": "trm", "H_cycles": 2, "H_bp_steps": 2, "L_cycles": 1, "L_bp_steps": 1},
    "rins": {"name": "rins", "half_layers": True, "L_cycles": 7, "L_bp_cycles": 4},
    "ut": {"name": "ut", "cycles": 4, "bp_cycles": 2},
}
TINY = {"n_layers": 4, "hidden_size": 256, "num_heads": 4}


class NotHere(Exception):  # noqa: N818 -- no error: the check does not apply to this machine
    """Why a check was left out."""


class Wrong(Exception):  # noqa: N818
    """What a check found to be wrong, with everything that it measured."""

    def __init__(self, detail: str, figures: Figures) -> None:
        super().__init__(detail)
        self.figures = figures


@dataclass(frozen=True, slots=True)
class Setting:
    """Where the checks run, and how much time they have."""

    device: torch.device
    is_quick: bool
    ends_at: float  # reading of time.monotonic()

    def require_cuda(self) -> None:
        if self.device.type != "cuda":
            raise NotHere("measures a GPU")

    def require_time(self, seconds: float) -> None:
        if time.monotonic() + seconds > self.ends_at:
            raise NotHere(f"needs about {seconds:.0f} s, which are not left")


@dataclass(frozen=True, slots=True)
class Batch:
    """A packed row of random tokens; responses are scored."""

    tokens: Tensor  # [T]
    positions: Tensor
    labels: Tensor
    layout: PackedLayout
    num_scored: int
    mean_keys: float  # that a token sees

    @classmethod
    def random(cls, num_rows: int, vocab_size: int, device: torch.device, seed: int = 0) -> Batch:
        layout = packed(random_lengths(num_rows, seed), device, slots_for(num_rows))
        lens = torch.stack((layout.prefix_lens, layout.causal_lens)).cpu().long()
        seq_lens, (prefix, causal) = lens.sum(0), lens
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, vocab_size, (num_rows,), generator=generator)
        positions = torch.cat([torch.arange(int(length)) for length in seq_lens])
        is_response = positions >= prefix.repeat_interleave(seq_lens)
        labels = torch.full((num_rows,), IGNORE_LABEL)
        labels[: len(positions)][is_response] = tokens[: len(positions)][is_response]
        positions = F.pad(positions, (0, num_rows - len(positions)))
        seen = prefix**2 + causal * prefix + causal * (causal + 1) // 2
        return cls(
            tokens.int().to(device),
            positions.int().to(device),
            labels.int().to(device),
            layout,
            num_scored=int(is_response.sum()),
            mean_keys=float(seen.sum()) / num_rows,
        )


def random_lengths(num_rows: int, seed: int) -> list[tuple[int, int]]:
    """Lognormal lengths, median 130 and mean about 190, that fill a row but for a little."""
    generator = torch.Generator().manual_seed(seed)
    lengths, left = [], num_rows
    while left > 2:
        drawn = math.exp(4.87 + 0.87 * float(torch.randn((), generator=generator)))
        length = min(left, max(2, int(drawn)))
        prefix = 1 + int((length - 1) * float(torch.rand((), generator=generator)))
        lengths.append((prefix, length - prefix))
        left -= length
    return lengths


def packed(
    lengths: list[tuple[int, int]], device: torch.device, num_slots: int = 64
) -> PackedLayout:
    prefix = torch.tensor([p for p, _ in lengths], dtype=torch.int32)
    causal = torch.tensor([c for _, c in lengths], dtype=torch.int32)
    layout = PackedLayout.from_lengths(prefix, causal, num_slots)
    return layout.map_vectors(lambda vector: vector.to(device))


def slots_for(num_rows: int) -> int:
    """Enough for `random_lengths`, and the same for all rows of that size."""
    return -(-num_rows // 8192) * 64


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|; NaN stays NaN, and all zeros must be met exactly."""
    found, wanted = found.detach().float().cpu(), wanted.detach().float().cpu()
    norm = float(wanted.norm())
    return float((found - wanted).norm()) / norm if norm else float(found.norm())


def worst(errors: Iterable[float]) -> float:
    """The largest; NaN where one is NaN, which max() would pass over."""
    return float(torch.tensor(list(errors)).max())


def judge(errors: dict[str, float], limit: float, figures: Figures | None = None) -> Figures:
    """The errors as figures; `Wrong` where one is above the limit, or NaN."""
    figures = {**(figures or {}), "limit": limit, "errors": errors}
    bad = {name: error for name, error in errors.items() if not error <= limit}
    if bad:
        raise Wrong(f"errors above {limit}: {bad}", figures)
    return figures


def build(settings: dict[str, Any], setting: Setting, dtype: torch.dtype) -> LanguageModel:
    """A tiny net with seeded weights; in bf16 with whichever attention is fastest there."""
    torch.manual_seed(0)
    config = ARCH_ADAPTER.validate_python({**TINY, **settings})
    attention = SdpaAttention() if dtype == torch.float32 else fastest_attention(config, setting)
    return LanguageModel(config, TINY_VOCAB_SIZE, attention).to(setting.device)


def fastest_attention(config: NetConfig, setting: Setting) -> AttentionBackend:
    """What `attention=auto` takes in bf16."""
    head_size = config.answer_stack.head_size
    return select_attention(
        "auto", device=setting.device, dtype=torch.bfloat16, head_size=head_size
    )[0]


def loss_of(model: LanguageModel, batch: Batch, backprop_steps: int | None = None) -> Tensor:
    hidden = model(batch.tokens, batch.positions, batch.layout, backprop_steps)
    sums = next_token_sums(
        hidden, model.lm_head.weight, batch.labels, batch.layout, num_scored=batch.num_scored
    )
    return sums.loss / batch.num_scored


def train_step(
    model: LanguageModel, optimizer: AdamATan2, batch: Batch, backprop_steps: int | None = None
) -> Tensor:
    loss = loss_of(model, batch, backprop_steps)
    loss.backward()
    reshard(model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def milliseconds(function: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """The median over three rounds of `repeats` calls, after a warm-up."""
    rounds = []
    for count in (2, repeats, repeats, repeats):
        synchronize(device)
        started_at = time.perf_counter()
        for _ in range(count):
            function()
        synchronize(device)
        rounds.append((time.perf_counter() - started_at) / count * 1e3)
    return round(median(rounds[1:]), 4)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def recompute(model: torch.nn.Module, part: Any) -> None:
    """Activation checkpointing of a part of each block, or `none`."""
    for module in model.modules():
        if isinstance(module, Block):
            module.recomputed = part


# --- attention ---------------------------------------------------------------------------------


def compare_with_oracle(
    prepare: Callable[[PackedLayout, int], AttentionPlan], setting: Setting, dtype: torch.dtype
) -> dict[str, float]:
    """Largest relative error of output and gradients, by case; infinite: padding is not zero."""
    errors = {}
    for head_size in (64,) if setting.is_quick else (64, 128):
        for case, (lengths, padding) in LENGTHS.items():
            layout = packed(lengths, setting.device)
            num_tokens = sum(map(sum, lengths))
            num_rows = num_tokens + padding
            rows = torch.randn(4, num_rows, 3, head_size, device=setting.device).to(dtype)
            plan, oracle = prepare(layout, num_rows), DenseAttention().prepare(layout, num_rows)
            wanted = attention_results(oracle, attention_inputs(rows.float()))
            inputs = attention_inputs(rows)
            leave_nan_in_free_memory(setting.device)
            found = attention_results(plan, inputs)
            error = worst(map(relative_error, found, wanted))
            is_zero = not any(bool(tensor[num_tokens:].any()) for tensor in found)
            errors[f"K {head_size}, {case}"] = error if is_zero else math.inf
    return errors


def leave_nan_in_free_memory(device: torch.device) -> None:
    """Rows that a kernel leaves unwritten then hold NaN, not by chance what is right."""
    if device.type != "cuda":
        return
    for size, count in ((1 << 16, 256), (1 << 26, 1)):  # in elements: torch keeps two pools
        _ = [torch.full((size,), math.nan, device=device) for _ in range(count)]


def attention_inputs(rows: Tensor) -> list[Tensor]:
    """Query and key [T, 2, H, K], together as in a layer, value, and a gradient of the output."""
    query_key = rows[:2].transpose(0, 1).contiguous()
    return [query_key.requires_grad_(), rows[2].clone().requires_grad_(), rows[3]]


def attention_results(plan: AttentionPlan, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    query_key, value, grad = inputs
    query, key = query_key.unbind(1)
    mixed = plan.attend(query, key, value)
    return [mixed, *torch.autograd.grad(mixed, (query_key, value), grad)]


def check_attention(name: str, dtype: torch.dtype, setting: Setting) -> Figures:
    backend = BACKENDS_BY_NAME[name]
    reason = backend.why_not(setting.device, dtype, 64)
    if reason is not None:
        raise NotHere(reason)
    return judge(compare_with_oracle(backend.prepare, setting, dtype), MAX_ERROR[dtype])


def check_gated_attention(dtype: torch.dtype, setting: Setting) -> Figures:
    """Our own kernels with rotary positions and the gate in them, against the oracle in fp32."""
    backend = TritonAttention()
    reason = backend.why_not(setting.device, dtype, 64)
    if reason is not None:
        raise NotHere(reason)
    errors = {}
    for case, (lengths, padding) in LENGTHS.items():
        layout = packed(lengths, setting.device)
        num_rows = sum(map(sum, lengths)) + padding
        rows = torch.randn(num_rows, 5, 3, 64, device=setting.device).to(dtype)
        rope = Rope.at(torch.arange(num_rows, device=setting.device), 64, 10000.0)
        plan, oracle = backend.prepare(layout, num_rows), DenseAttention().prepare(layout, num_rows)

        def fused(gqkv: Tensor, plan: OnePassPlan = plan, rope: Rope = rope) -> Tensor:
            return plan.attend_gated(gqkv, rope.cos, rope.sin)

        def apart(gqkv: Tensor, plan: AttentionPlan = oracle, rope: Rope = rope) -> Tensor:
            gate, query_key, value = gqkv.split((1, 2, 1), dim=1)
            query, key = rope.rotate(query_key).unbind(1)
            mixed = plan.attend(query, key, value[:, 0])
            return gate[:, 0].sigmoid() * mixed

        wanted = gated_results(apart, rows.float())
        leave_nan_in_free_memory(setting.device)
        errors[case] = worst(map(relative_error, gated_results(fused, rows), wanted))
    return judge(errors, 2 * MAX_ERROR[dtype])  # what is rotated, and what is gated, is rounded too


def gated_results(layer: Callable[[Tensor], Tensor], rows: Tensor) -> list[Tensor]:
    """Output, and the gradient to gate, query, key and value [T, 4, H, K]."""
    gqkv = rows[:, :4].detach().requires_grad_()
    gated = layer(gqkv)
    return [gated, *torch.autograd.grad(gated, gqkv, rows[:, 4])]


def check_flash_package(module: str, setting: Setting) -> Figures:
    """The published system's kernel in the same two passes."""
    setting.require_cuda()
    try:
        function = importlib.import_module(module).flash_attn_varlen_func
    except (ImportError, OSError) as error:
        raise NotHere(f"{module}: {error}") from None

    def kernel(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
        longest = int(segments.max_q), int(segments.max_k)
        causal = segments.is_causal
        mixed = function(query, key, value, segments.cu_q, segments.cu_k, *longest, causal=causal)
        return mixed[0] if isinstance(mixed, tuple) else mixed

    def prepare(layout: PackedLayout, num_rows: int) -> AttentionPlan:
        return two_pass_plan(layout, num_rows, kernel)

    errors = compare_with_oracle(prepare, setting, torch.bfloat16)
    return judge(errors, MAX_ERROR[torch.bfloat16])


def check_attention_speed(setting: Setting) -> Figures:
    """XL's heads on a full micro-batch, by backend."""
    num_rows = 4096 if setting.is_quick else 24576
    layout = packed(random_lengths(num_rows, 0), setting.device, slots_for(num_rows))
    rows = torch.randn(4, num_rows, 12, 128, device=setting.device).to(torch.bfloat16)
    inputs = attention_inputs(rows)
    figures: Figures = {"T": num_rows, "num_seqs": int(layout.num_seqs), "num_heads": 12, "K": 128}
    for name in ("sdpa", "flex", "triton", "varlen", "flash3"):
        backend = BACKENDS_BY_NAME[name]
        reason = backend.why_not(setting.device, torch.bfloat16, 128)
        if reason is not None:
            figures[name] = f"left out: {reason}"
            continue
        plan = backend.prepare(layout, num_rows)
        with torch.no_grad():
            forward = milliseconds(lambda p=plan: p.attend(*rows[:3]), setting.device)
        figures[name] = {
            "prepare_ms": milliseconds(
                lambda b=backend: b.prepare(layout, num_rows), setting.device
            ),
            "forward_ms": forward,
            "both_ms": milliseconds(lambda p=plan: attention_results(p, inputs), setting.device),
        }
    return figures


# --- models ------------------------------------------------------------------------------------


def check_nets(setting: Setting) -> Figures:
    """Every net in fp32: this device against the CPU, hidden states, loss and gradients."""
    errors = {}
    for name, settings in NETS.items():
        results = []
        for device in (torch.device("cpu"), setting.device):
            model = build(settings, replace(setting, device=device), torch.float32)
            batch = Batch.random(512, TINY_VOCAB_SIZE, device)
            loss_of(model, batch).backward()
            with torch.no_grad():
                hidden = model(batch.tokens, batch.positions, batch.layout)
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append({"hidden": hidden, **grads})
        wanted, found = results
        assert wanted.keys() == found.keys()
        errors[name] = worst(relative_error(found[key], wanted[key]) for key in wanted)
    return judge(errors, MAX_ERROR[torch.float32])


def check_golden_nets(setting: Setting) -> Figures:
    """Logits of the original system's golden nets, in fp32."""
    errors = {}
    for path in sorted((ROOT / "tests/golden/nets").glob("*/case.json")):
        case = json.loads(path.read_text())
        settings = dict(case["config"])
        vocab_size, _ = settings.pop("vocab_size"), settings.pop("max_seq_len")
        name = case.get("model_class", case["net"])
        config = arch_from_reference({"name": name, **settings})
        model = LanguageModel(config, vocab_size, SdpaAttention())
        state = load_file(path.parent / case["files"]["state"])
        model.load_state_dict({parameter_name_from_reference(k): v for k, v in state.items()})
        model.to(setting.device)
        batch = load_file(path.parent / case["files"]["batch"], device=str(setting.device))
        lens = [batch[key][: case["scalars"]["numseqs"]] for key in ("prefix_lens", "causal_lens")]
        layout = packed(list(zip(*(part.tolist() for part in lens), strict=True)), setting.device)
        with torch.no_grad():
            logits = model.logits(model(batch["inputs"], batch["position_ids"], layout))
        wanted = load_file(path.parent / case["files"]["logits"])["logits"]
        errors[path.parent.name] = float((logits.cpu() - wanted).abs().max())
    return judge(errors, 1e-4, {"error": "largest absolute difference of a logit"})


def check_decoding(setting: Setting) -> Figures:
    """Prefill and token-by-token decoding against the whole row, in fp32."""
    model = build(NETS["hrm"], setting, torch.float32).eval()
    prompt_len, num_new = 37, 20
    tokens = torch.randint(1, TINY_VOCAB_SIZE, (prompt_len + num_new,), device=setting.device)
    positions = torch.arange(len(tokens), device=setting.device)
    cache = model.new_cache(1, len(tokens))
    rows = torch.zeros(64, dtype=torch.int64, device=setting.device)
    with torch.no_grad():
        wanted = model(tokens, positions, packed([(prompt_len, num_new)], setting.device))
        prompt = packed([(prompt_len, 0)], setting.device)
        model.prefill(tokens[:prompt_len], positions[:prompt_len], prompt, cache, rows)
        found = [model.decode(tokens[i : i + 1], cache) for i in range(prompt_len, len(tokens))]
    error = relative_error(torch.cat(found), wanted[prompt_len:])
    return judge({"hidden": error}, MAX_ERROR[torch.float32])


def answers_by_mode(
    model: LanguageModel, requests: list[Request], modes: tuple[str, ...], max_rows: int
) -> dict[str, list[tuple[int, ...]]]:
    """Token ids of all answers, in order, by how they were decoded."""
    found = {}
    for mode in modes:
        engine = InferenceEngine(model, max_context=1024, max_rows=max_rows, decode=mode)
        answers = sorted(engine.answer(requests), key=lambda answer: answer.index)
        found[mode] = [answer.token_ids for answer in answers]
    return found


def check_generation(mode: str, dtype: torch.dtype, setting: Setting) -> Figures:
    """Tokens decoded with static shapes against eager ones: greedy and sampled, rows that leave.

    In fp32 all alike; in bf16 rounding may part two answers, whose tokens then differ to the end.
    """
    setting.require_cuda()
    model = build(NETS["hrm"], setting, dtype).to(dtype).eval()
    draw = torch.Generator().manual_seed(0)
    requests = [
        Request(
            torch.randint(1, TINY_VOCAB_SIZE, (5 + 7 * number,), generator=draw).tolist(),
            max_new_tokens=20 + 9 * (number % 5),
            sampling=Sampling(0.8, top_k=50, top_p=0.95, seed=number) if number % 2 else GREEDY,
        )
        for number in range(12)
    ]
    eager, static = answers_by_mode(model, requests, ("eager", mode), max_rows=5).values()
    parted = sum(one != other for one, other in zip(eager, static, strict=True)) / len(requests)
    return judge({"answers that differ": parted}, 0.0 if dtype == torch.float32 else 0.5)


def check_generation_speed(setting: Setting) -> Figures:
    """XL in bf16, random weights: tokens per second, eager and as a CUDA graph."""
    setting.require_cuda()
    setting.require_time(120)
    config, prompt_len, num_tokens = net_of_size("XL"), 300, 66
    with torch.device(setting.device):
        model = LanguageModel(config, VOCAB_SIZE, fastest_attention(config, setting))
    model.to(torch.bfloat16).requires_grad_(False).eval()
    figures: Figures = {"attention": model.attention.name, "prompt_tokens": prompt_len}
    for mode, num_rows in ((m, r) for m in ("eager", "cuda_graph") for r in (1, 64)):
        engine = InferenceEngine(model, max_context=1024, max_rows=num_rows, decode=mode)
        seconds = {}
        for tokens in (num_tokens, 2, num_tokens):  # the first loads kernels and captures
            prompts = [Request(list(range(1, prompt_len)), max_new_tokens=tokens)] * num_rows
            synchronize(setting.device)
            started_at = time.perf_counter()
            list(engine.answer(prompts))
            seconds[tokens] = time.perf_counter() - started_at
        decoded = num_rows * (num_tokens - 2)
        figures[f"{mode}, {num_rows}"] = decoded / (seconds[num_tokens] - seconds[2])
    return figures


def check_bf16_training(setting: Setting) -> Figures:
    """Steps of a small HRM in bf16 (FSDP2 around the root, NCCL with one rank) against fp32."""
    batch = Batch.random(2048, TINY_VOCAB_SIZE, setting.device)
    world = World(rank=0, size=1, device=setting.device)
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = build(NETS["hrm"], setting, dtype)
        shard_model(model, world, dtype)
        optimizer = AdamATan2(model.parameters(), lr=1e-3, ema=0.99)
        loss_of(model, batch).backward()
        reshard(model)
        gradients.append({n: whole(p.grad) for n, p in model.named_parameters()})
        optimizer.zero_grad(set_to_none=True)
        losses.append([float(train_step(model, optimizer, batch)) for _ in range(10)])
    figures: Figures = {"fp32_losses": losses[0], "bf16_losses": losses[1]}
    errors = {
        "first loss": abs(losses[1][0] / losses[0][0] - 1),
        "last loss": abs(losses[1][-1] / losses[0][-1] - 1),
    }
    errors["1 - cosine of gradients"] = worst(
        1 - float(F.cosine_similarity(wanted, gradients[1][name], dim=0))
        for name, wanted in gradients[0].items()
    )
    return judge(errors, 3e-2, figures)


def whole(gradient: Tensor | None) -> Tensor:
    """A gradient as one flat vector, off its shards."""
    assert gradient is not None
    local = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return local.detach().float().flatten()


def check_compile(mode: CompileMode, setting: Setting) -> Figures:
    """Compiled code against eager one in bf16, and that new lengths compile nothing again."""
    setting.require_time(90)
    world = World(rank=0, size=1, device=setting.device)
    model = build(NETS["hrm"], setting, torch.bfloat16)
    require_compiler(mode, setting.device, model.attention)
    shard_model(model, world, torch.bfloat16, unit=COMPILED[mode])
    batches = [Batch.random(2048, TINY_VOCAB_SIZE, setting.device, seed) for seed in range(8)]
    eager = [loss_and_gradient(model, batch) for batch in batches]
    counters = torch._dynamo.utils.counters
    counters.clear()
    graphs, compiled = [], []
    compile_model(model, mode)
    for batch in batches:
        compiled.append(loss_and_gradient(model, batch))
        graphs.append(counters["stats"]["unique_graphs"])
    errors = {}
    for seed, (wanted, found) in enumerate(zip(eager, compiled, strict=True)):
        errors[f"loss {seed}"] = relative_error(found[0], wanted[0])
        errors[f"gradient {seed}"] = relative_error(found[1], wanted[1])
    figures = {"attention": model.attention.name, "graphs_after_each_batch": graphs}
    figures["compile_s"] = compile_s()
    judge(errors, 4e-2, figures)
    if graphs[-1] != graphs[0]:
        raise Wrong("later batches compiled again", figures | {"errors": errors})
    return figures | {"errors": errors}


def loss_and_gradient(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    loss = loss_of(model, batch)
    loss.backward()
    reshard(model)
    gradient = torch.cat([whole(p.grad) for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradient


def check_activation_checkpointing(setting: Setting) -> Figures:
    """Loss and gradients with parts computed again, in bf16; the memory that a pass takes."""
    model = build(NETS["hrm"], setting, torch.bfloat16)
    shard_model(model, World(rank=0, size=1, device=setting.device), torch.bfloat16)
    batch = Batch.random(4096, TINY_VOCAB_SIZE, setting.device)
    errors, figures = {}, {}
    wanted = loss_and_gradient(model, batch)
    for part in ("none", "attention", "block"):
        recompute(model, part)
        if setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(setting.device)
        found = loss_and_gradient(model, batch)
        if setting.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(setting.device)
            figures[f"{part}_peak_mib"] = peak / 2**20
        errors[f"{part}: loss"] = relative_error(found[0], wanted[0])
        errors[f"{part}: gradient"] = relative_error(found[1], wanted[1])
    judge(errors, 1e-2, figures)  # backward passes of flash kernels add up in any order
    if figures and not figures["block_peak_mib"] < figures["none_peak_mib"]:
        raise Wrong("computing blocks again saves no memory", figures)
    return figures | {"errors": errors}


def check_offload(setting: Setting) -> Figures:
    """Steps with optimizer state in host memory against plain ones, bit for bit; their time."""
    outcomes, figures = [], {}
    shapes = ((2048, 2048), (4096, 2048), (300,), ())
    for state_device in (None, torch.device("cpu")):
        generator = torch.Generator(setting.device).manual_seed(0)
        draw = partial(torch.randn, generator=generator, device=setting.device)
        params = [draw(shape).requires_grad_() for shape in shapes]
        optimizer = AdamATan2(params, lr=1e-3, ema=0.99, state_device=state_device)
        for _ in range(5):
            for param in params:
                param.grad = draw(param.shape)
            optimizer.step()
        states = [optimizer.state[param][kind] for param in params for kind in ("exp_avg_sq",)]
        states += [optimizer.state[param]["param_ema"] for param in params]
        tensors = [tensor.detach().cpu().flatten() for tensor in (*params, *states)]
        outcomes.append(torch.cat(tensors))
        kind = "offloaded" if state_device else "plain"
        figures[f"{kind}_step_ms"] = milliseconds(optimizer.step, setting.device, 5)
    return judge({"state": relative_error(outcomes[1], outcomes[0])}, 0.0, figures)


def check_optimizer(setting: Setting) -> Figures:
    """Five steps here against the CPU, and against the published package where it is installed."""
    shapes = [(300, 200), (64,), (1000, 40)]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(5)]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def run(device: torch.device, optimizer_class: Any, **more: Any) -> Tensor:
        params = [torch.nn.Parameter(weight.clone().to(device)) for weight in weights]
        optimizer = optimizer_class(params, **options, **more)
        for step in grads:
            for param, grad in zip(params, step, strict=True):
                param.grad = grad.to(device)
            optimizer.step()
        return torch.cat([param.detach().cpu().flatten() for param in params])

    ours = run(setting.device, AdamATan2, ema=0.999)
    errors = {"CPU": relative_error(ours, run(torch.device("cpu"), AdamATan2, ema=0.999))}
    figures: Figures = {}
    try:
        published = importlib.import_module("adam_atan2").AdamATan2
    except (ImportError, OSError) as error:
        figures["adam_atan2"] = f"left out: {error}"
    else:
        errors["adam_atan2"] = relative_error(ours, run(setting.device, published))
    return judge(errors, 1e-6, figures)


# --- speed and memory --------------------------------------------------------------------------


def check_ceilings(setting: Setting) -> Figures:
    """What this GPU reaches: bytes copied per second, and bf16 matrix products on random data."""
    setting.require_cuda()
    source = torch.randn(1 << 30, device=setting.device)
    target = torch.empty_like(source)
    copy_ms = milliseconds(lambda: target.copy_(source), setting.device)
    size = 8192
    a, b = torch.randn(2, size, size, device=setting.device).to(torch.bfloat16)
    matmul_ms = milliseconds(lambda: a @ b, setting.device)
    return {
        "copy_tb_per_s": 2 * source.nbytes / copy_ms / 1e9,
        "bf16_tflops": 2 * size**3 / matmul_ms / 1e9,
    }


def check_activation_memory(setting: Setting) -> Figures:
    """Bytes that one layer of XL's width keeps for the backward pass, per token."""
    setting.require_cuda()
    setting.require_time(90)
    num_rows, num_layers = 8192, 4
    widths = {"hidden_size": 1536, "num_heads": 12, "n_layers": num_layers}
    config = ARCH_ADAPTER.validate_python({"name": "transformer", **widths})
    model = LanguageModel(config, TINY_VOCAB_SIZE, fastest_attention(config, setting))
    model.to(setting.device, torch.bfloat16)
    batch = Batch.random(num_rows, TINY_VOCAB_SIZE, setting.device)
    figures: Figures = {"T": num_rows, "attention": model.attention.name}
    for kind in ("eager", "compiled"):
        compile_model(model, "none" if kind == "eager" else "stack")
        loss_of(model, batch).backward()
        before = torch.cuda.memory_allocated(setting.device)
        hidden = model(batch.tokens, batch.positions, batch.layout)
        kept = torch.cuda.memory_allocated(setting.device) - before
        hidden.sum().backward()
        figures[f"{kind}_bytes_per_token_and_layer"] = kept / num_rows / num_layers
    return figures


def net_of_size(size: str, **changes: Any) -> NetConfig:
    """HRM of a published size, from the recipes."""
    settings: dict[str, Any] = {}
    for name in ("size/_base", f"size/{size}", "net/hrm"):
        settings |= yaml.safe_load((ROOT / f"config/arch/{name}.yaml").read_text())
    settings.pop("defaults", None)
    return ARCH_ADAPTER.validate_python({**settings, **changes})


def check_training_speed(setting: Setting, attention_name: str | None = None) -> Figures:
    """Whole steps of the largest published size that fits, bf16, eager and compiled."""
    setting.require_cuda()
    setting.require_time(60)
    total_bytes = torch.cuda.get_device_properties(setting.device).total_memory
    for size in ("XL", "L", "B"):
        config = net_of_size(size)
        if total_parameters(config, VOCAB_SIZE) * STATE_BYTES < 0.6 * total_bytes:
            break
    else:
        raise NotHere(f"{total_bytes / 2**30:.0f} GiB are too few for any published size")
    attention = fastest_attention(config, setting)
    if attention_name is not None:
        attention = BACKENDS_BY_NAME[attention_name]
        reason = attention.why_not(setting.device, torch.bfloat16, config.answer_stack.head_size)
        if reason is not None:
            raise NotHere(reason)
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = LanguageModel(config, VOCAB_SIZE, attention)
    shard_model(model, World(rank=0, size=1, device=setting.device), torch.bfloat16)
    optimizer = AdamATan2(model.parameters(), lr=1e-5, ema=0.9999)
    figures: Figures = {"size": size, "attention": model.attention.name, "steps": []}
    num_rows = largest_row(model, optimizer, setting)
    for kind in ("eager", "compiled"):
        compile_model(model, "none" if kind == "eager" else "stack")
        for backprop_steps in (2, 5, 3, 4):
            is_first_compiled = kind == "compiled" and backprop_steps == 2
            if time.monotonic() + (240 if is_first_compiled else 20) > setting.ends_at:
                figures["stopped"] = f"no time for {kind}, bp {backprop_steps}"
                break
            measured = measure_steps(model, optimizer, num_rows, backprop_steps, setting)
            figures["steps"].append({"kind": kind, **measured})
    return figures


def check_memory_plan(setting: Setting) -> Figures:
    """The allocator's peak in a step against what the planner says, by setting; within 10 %."""
    setting.require_cuda()
    setting.require_time(120)
    figures: Figures = {}
    errors = {}
    for name, changes in MEMORY_CASES.items():
        planned, measured, moment = memory_of(MemoryTrial(**changes), setting)
        figures[name] = {"planned": planned, "measured": measured, "moment": moment}
        errors[name] = abs(planned / measured - 1)
    return judge(errors, 0.1, figures)


def check_memory_24_gb(setting: Setting) -> Figures:
    """XL trains within the memory of one card of 24 GB: accumulation, recomputation, offloading."""
    setting.require_cuda()
    setting.require_time(120)
    total_gib = torch.cuda.get_device_properties(setting.device).total_memory / 2**30
    cap_gib = GPUS["rtx4090"].memory_gib - GPUS["rtx4090"].context_gib
    if total_gib < cap_gib:
        raise NotHere(f"{total_gib:.0f} GiB are fewer than such a card has")
    trial = MemoryTrial(
        net_of_size("XL"), VOCAB_SIZE, 4096, num_micro=2, recomputed="block", offloads=True
    )
    torch.cuda.set_per_process_memory_fraction(cap_gib / total_gib, setting.device)
    try:
        planned, measured, moment = memory_of(trial, setting)
    except torch.OutOfMemoryError as error:
        raise Wrong(f"does not fit: {error}", {"cap_gib": cap_gib}) from None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, setting.device)
    return {"cap_gib": cap_gib, "planned": planned, "measured": measured, "moment": moment}


@dataclass(frozen=True, slots=True)
class MemoryTrial:
    """A net and how it is trained, as far as memory goes."""

    config: NetConfig
    vocab_size: int
    num_rows: int  # of a micro-batch
    num_micro: int = 1
    recomputed: Literal["none", "block", "attention"] = "none"
    compiled: CompileMode = "none"
    offloads: bool = False


def memory_of(trial: MemoryTrial, setting: Setting) -> tuple[int, int, str]:
    """Bytes planned and measured of a second step, and at which moment the plan has its peak."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        attention = fastest_attention(trial.config, setting)
        model = LanguageModel(trial.config, trial.vocab_size, attention)
    recompute(model, trial.recomputed)
    compile_model(model, trial.compiled)
    shard_model(model, World(rank=0, size=1, device=setting.device), torch.bfloat16)
    state_device = torch.device("cpu") if trial.offloads else None
    optimizer = AdamATan2(model.parameters(), lr=1e-5, ema=0.9999, state_device=state_device)
    batch = Batch.random(trial.num_rows, trial.vocab_size, setting.device)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(setting.device)
        for number in range(trial.num_micro):
            set_gradient_sync(model, number + 1 == trial.num_micro)
            loss_of(model, batch).backward()
        reshard(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    measured = torch.cuda.max_memory_allocated(setting.device)
    lens = (batch.layout.prefix_lens + batch.layout.causal_lens).tolist()
    case = MemoryCase(
        trial.config,
        trial.vocab_size,
        Rows.of(lens, trial.num_rows, batch.num_scored),
        trial.num_micro,
        Kernels(attention.name, 2, trial.compiled != "none", trial.recomputed),
        is_wrapped=True,
        offloads=trial.offloads,
    )
    worst_moment = plan_peak(memory_moments(case))
    return worst_moment.total, measured, worst_moment.name


def largest_row(model: LanguageModel, optimizer: AdamATan2, setting: Setting) -> int:
    """Tokens of the largest micro-batch that fits with full gradient, from two smaller ones.

    Running out of memory inside FSDP would leave it in the middle of a step.
    """
    peaks = []
    for num_rows in (4096, 8192):
        torch.cuda.reset_peak_memory_stats(setting.device)
        train_step(model, optimizer, Batch.random(num_rows, VOCAB_SIZE, setting.device), 5)
        peaks.append(torch.cuda.max_memory_allocated(setting.device))
    per_row = (peaks[1] - peaks[0]) / 4096
    room = 0.88 * torch.cuda.get_device_properties(setting.device).total_memory - peaks[1]
    fitting = [n for n in (32768, 24576, 16384, 8192) if (n - 8192) * per_row <= room]
    return max(fitting, default=4096)


def measure_steps(
    model: LanguageModel,
    optimizer: AdamATan2,
    num_rows: int,
    backprop_steps: int,
    setting: Setting,
) -> Figures:
    """Speed and memory of steps on rows of different lengths."""
    batches = [Batch.random(num_rows, VOCAB_SIZE, setting.device, seed) for seed in range(3)]
    for batch in batches[:2]:
        train_step(model, optimizer, batch, backprop_steps)
    torch.cuda.reset_peak_memory_stats(setting.device)
    torch.cuda.synchronize(setting.device)
    started_at = time.perf_counter()
    losses = [train_step(model, optimizer, batch, backprop_steps) for batch in batches]
    torch.cuda.synchronize(setting.device)
    tokens_per_s = num_rows * len(batches) / (time.perf_counter() - started_at)
    flops = training_flops_per_token(
        model.config, VOCAB_SIZE, backprop_steps=backprop_steps, mean_keys=batches[0].mean_keys
    )
    device_name = torch.cuda.get_device_name(setting.device)
    peak = next((tflops for name, tflops in PEAK_TFLOPS.items() if name in device_name), None)
    return {
        "T": num_rows,
        "bp": backprop_steps,
        "tokens_per_s": tokens_per_s,
        "tflops": tokens_per_s * flops / 1e12,
        "mfu": tokens_per_s * flops / 1e12 / peak if peak else None,
        "peak_memory_gib": torch.cuda.max_memory_allocated(setting.device) / 2**30,
        "losses": [float(loss) for loss in losses],
    }


def attention_checks(*backends: str) -> dict[str, Callable[[Setting], Figures]]:
    """Checks by name, for `backend:dtype` each."""
    checks = {}
    for backend in backends:
        name, dtype = backend.split(":")
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        checks[f"attention_{name}_{dtype}"] = partial(check_attention, name, kind)
    return checks


_FOUR_LAYERS = ARCH_ADAPTER.validate_python(
    {**NETS["hrm"], "hidden_size": 1536, "num_heads": 12, "n_layers": 4}
)
_MANY_ROWS = {"config": _FOUR_LAYERS, "vocab_size": 65536, "num_rows": 16384}
MEMORY_CASES: dict[str, dict[str, Any]] = {
    "plain": _MANY_ROWS,
    "compiled": {**_MANY_ROWS, "compiled": "stack"},
    "recomputed": {**_MANY_ROWS, "recomputed": "block"},
    "attention_recomputed": {**_MANY_ROWS, "recomputed": "attention"},
    "micro_batches": {**_MANY_ROWS, "num_rows": 4096, "num_micro": 2},
    "vocabulary": {**_MANY_ROWS, "vocab_size": 131072},
    "offloaded": {**_MANY_ROWS, "num_rows": 2048, "offloads": True},
}

# What others rest on comes first, what takes long last. FlashAttention 3 takes torch's own kernels
# over for the rest of the process, so `attention_speed` measures it last, and varlen comes before.
CHECKS: dict[str, Callable[[Setting], Figures]] = {
    **attention_checks("sdpa:fp32", "sdpa:bf16", "varlen:bf16", "varlen:fp16"),
    **attention_checks("flex:fp32", "flex:bf16", "triton:fp32", "triton:bf16"),
    "gated_attention_fp32": partial(check_gated_attention, torch.float32),
    "gated_attention_bf16": partial(check_gated_attention, torch.bfloat16),
    "nets": check_nets,
    "golden_nets": check_golden_nets,
    "decoding": check_decoding,
    "generation_fp32": partial(check_generation, "cuda_graph", torch.float32),
    "generation_bf16": partial(check_generation, "cuda_graph", torch.bfloat16),
    "generation_compiled": partial(check_generation, "compiled", torch.float32),
    "optimizer": check_optimizer,
    "flash_attn": partial(check_flash_package, "flash_attn"),
    "ceilings": check_ceilings,
    "attention_speed": check_attention_speed,
    **attention_checks("flash3:bf16", "flash3:fp16"),
    "flash_attn_interface": partial(check_flash_package, "flash_attn_interface"),
    "bf16_training": check_bf16_training,
    "offload": check_offload,
    "activation_checkpointing": check_activation_checkpointing,
    "compile": partial(check_compile, "stack"),
    "compile_block": partial(check_compile, "block"),
    "compile_step": partial(check_compile, "step"),
    "activation_memory": check_activation_memory,
    "memory_plan": check_memory_plan,
    "memory_24_gb": check_memory_24_gb,
    "generation_speed": check_generation_speed,
    "training_speed": check_training_speed,
    "training_speed_triton": partial(check_training_speed, attention_name="triton"),
}
SLOW_CHECKS = (
    *("ceilings", "attention_speed", "compile", "compile_block", "compile_step"),
    *("activation_memory", "memory_plan", "memory_24_gb"),
    *("generation_speed", "generation_compiled"),
    *("training_speed", "training_speed_triton"),
)


def run_check(name: str, setting: Setting) -> dict[str, Any]:
    """One record; `ok` is None where the check was left out."""
    started_at = time.monotonic()
    record: dict[str, Any] = {"name": name, "ok": True, "detail": "", "figures": {}}
    try:
        if started_at > setting.ends_at:
            raise NotHere("the time is used up")
        record["figures"] = CHECKS[name](setting)
    except NotHere as reason:
        record |= {"ok": None, "detail": str(reason)}
    except Wrong as wrong:
        record |= {"ok": False, "detail": str(wrong), "figures": wrong.figures}
    except Exception as error:  # whatever breaks in one check must not hide the others
        detail = f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_tb(error.__traceback__)[-4:])
        record |= {"ok": False, "detail": detail, "figures": {"traceback": trace}}
    stop_world()
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    torch._dynamo.reset()
    record["elapsed_s"] = round(time.monotonic() - started_at, 2)
    return record


def run_checks(names: list[str], setting: Setting, machine: Figures, out: Path) -> bool:
    """Runs, prints and writes them; whether nothing is wrong."""
    out.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for name in names:
        record = run_check(name, setting)
        records.append(record)
        # after each: a run that is stopped leaves what it found
        out.write_text(json.dumps({**machine, "checks": records}, indent=2))
        verdict = {True: "ok", False: "WRONG", None: "left out"}[record["ok"]]
        print(f"{verdict:9} {name:22} {record['elapsed_s']:7.1f} s  {record['detail']}", flush=True)
    print(f"written to {out}")
    return all(record["ok"] is not False for record in records)


def describe(device: torch.device) -> Figures:
    """Which machine and software the figures belong to."""
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = None
    return {
        "device": properties.name,
        "capability": list(torch.cuda.get_device_capability(device)),
        "memory_gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": str(nccl.version()),
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="a check; may be repeated")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long")
    parser.add_argument("--max-seconds", type=float, default=DEFAULT_SECONDS)
    parser.add_argument("--out", type=Path, help="default: benchmarks/<device>/gpu_check.json")
    arguments = parser.parse_args()
    unknown = set(arguments.only or ()) - set(CHECKS)
    if unknown:
        parser.error(f"--only {sorted(unknown)[0]}: there are {', '.join(CHECKS)}")
    return arguments


def main() -> int:
    """Runs the checks; 0 all right, 1 something is wrong, 2 no GPU."""
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA device here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    setting = Setting(device, arguments.quick, time.monotonic() + arguments.max_seconds)
    names = arguments.only or [n for n in CHECKS if not (arguments.quick and n in SLOW_CHECKS)]
    machine = describe(device)
    slug = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    out = arguments.out or ROOT / "benchmarks" / slug / "gpu_check.json"
    return int(not run_checks(names, setting, machine, out))


if __name__ == "__main__":
    sys.exit(main())
