"""Speed of a training step on one CPU thread, beside transformers' own class, in one run.

    python scripts/benchmark_training.py                                  # nano and wide
    python scripts/benchmark_training.py sizes=wide rounds=5 output=training.json
    python scripts/benchmark_training.py profile=true rounds=1            # where our time goes

A step is all that a run does with a global batch: its rows are made, forward, backward, the check
of the gradients (there: clipping), the optimizer. Both sides have the same weights, train on the
same examples in as many steps, with the same gradient-carrying calls, and are seen to have the same
loss and gradients before any time counts. Theirs: examples sorted by length over all steps, no
tokens but inputs, fused AdamW, each of several batch sizes; ours: Adam-atan2 without an average,
rows packed as in a run, split into each of several micro-batches. The sides take turns; a round
compares the fastest of each, and the median of rounds is the result. Seconds are those that this
process had. It has more than 300 lines: the two sides belong together.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_io.options import parse_options
from data_io.row_planning import RowPacking, plan_epochs
from data_io.sampled_format import EpochIndex, SampledData, TokenizerInfo
from data_io.sampled_writer import SampledWriter
from dataset_new import PrefixLMDataset
from models.attention import select_attention
from models.batch import IGNORE_LABEL, PackedBatch
from models.language_model import LanguageModel
from models.linear import pick_linear_kernel, set_linear_kernel
from training.adam_atan2 import AdamATan2
from training.console import refuse
from training.distributed import World, shard_model, start_world, stop_world
from training.export_format import ARCH_ADAPTER, FramingIds, export_config, place_of_exported
from training.prefetch import load_global_batches
from training.step import accumulate_gradients, train_step
from training.step_check import StepCheck

Figures = dict[str, Any]
HRM: dict[str, Any] = {"name": "hrm", "half_layers": True, "H_cycles": 2, "L_cycles": 3}
BACKPROP_STEPS, LR, CLIPPED_AT, TOLERANCE = 5, 1e-4, 1.0, 1e-4
MAKER = Path(__file__).parent / "make_reasoning_data.py"
QUICK_START = Path("data/reasoning")  # where `make quickstart` keeps its examples


@dataclass(frozen=True, slots=True)
class Size:
    """A net, its global batches, and what both sides are tried with."""

    settings: dict[str, Any]
    vocab_size: int
    global_batch_size: int  # tokens
    steps: int  # of one turn
    micro_batch_sizes: tuple[int, ...]  # tokens, ours
    batch_sizes: tuple[int, ...]  # examples, theirs
    mean_length: float | None  # of made examples; None: those of the quick start


SIZES = {
    "nano": Size(
        {**HRM, "n_layers": 4, "hidden_size": 64, "num_heads": 4},
        *(512, 512, 20, (256, 512), (4, 8, 16, 32), None),
    ),
    "wide": Size(
        {**HRM, "n_layers": 8, "hidden_size": 512, "num_heads": 8},
        *(4096, 4096, 1, (1024, 2048, 4096), (1, 2, 4, 8), 250.0),
    ),
}
KINDS = {  # of work, and names of the operators that do it
    "matmul": ("aten::mm", "aten::addmm", "mkldnn::", "aten::bmm"),
    "blocks between products": ("_Attention", "_MLP"),  # ours, attention included
    "attention": ("scaled_dot_product", "ScaledDot", "Buckets", "create_causal_mask"),
    "loss": ("CrossEntropy", "log_softmax", "LogSoftmax", "nll_loss", "NllLoss"),
    "optimizer": ("Optimizer.step", "Optimizer.zero_grad", "aten::_foreach_norm"),
}
SPREAD, LENGTHS, PROMPT_SHARE = 0.6, (16, 1024), (0.2, 0.6)  # of made examples


class BenchmarkOptions(BaseModel):
    """What is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sizes: list[Literal["nano", "wide"]] = Field(
        default=["nano", "wide"], description="nano: the quick start's net; wide: D 512, 8 layers"
    )
    rounds: PositiveInt = Field(default=3, description="turns of each candidate of each side")
    steps: PositiveInt | None = Field(default=None, description="of one turn; null: by size")
    global_batch_size: PositiveInt | None = Field(
        default=None, description="tokens of a step; null: by size"
    )
    micro_batch_sizes: list[PositiveInt] | None = Field(
        default=None, description="tokens of a micro-batch on our side; null: by size"
    )
    batch_sizes: list[PositiveInt] | None = Field(
        default=None, description="examples of a batch of transformers; null: by size"
    )
    linear: Literal["auto", "mkl", "onednn"] = Field(
        default="auto", description="kernel of our products; auto: by a probe"
    )
    bfloat16: bool = Field(default=False, description="ours with fwd_bwd_dtype=bfloat16 beside")
    profile: bool = Field(default=False, description="say where our time goes")
    output: Path | None = Field(default=None, description="JSON file of all figures")


# --- examples ----------------------------------------------------------------------------------


def quick_start_examples() -> SampledData:
    """Those that `make quickstart` trains on; made where they are not there."""
    command = [sys.executable, str(MAKER), f"output={QUICK_START}"]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise ValueError(f"{QUICK_START} could not be made: exit code {done.returncode}")
    return SampledData.open(QUICK_START)


def made_examples(folder: Path, size: Size, num_tokens: int) -> SampledData:
    """Random tokens; lengths are lognormal, the share of the prompt in each is drawn evenly."""
    draw, (shortest, longest) = np.random.default_rng(0), LENGTHS
    assert size.mean_length is not None
    count = int(2 * (num_tokens + 8 * LENGTHS[1]) / size.mean_length)  # more than are trained on
    center = math.log(size.mean_length) - SPREAD**2 / 2
    lens = np.exp(draw.normal(center, SPREAD, count)).round().clip(shortest, longest).astype(int)
    prompt_lens = (lens * draw.uniform(*PROMPT_SHARE, count)).astype(int).clip(min=1)
    starts = np.cumsum(lens) - lens
    index = EpochIndex(starts, prompt_lens, starts + prompt_lens, lens - prompt_lens)
    info = TokenizerInfo(vocab_size=size.vocab_size)
    with SampledWriter(folder, info, max_seq_len=longest + 1) as writer:
        writer.add_tokens(draw.integers(0, size.vocab_size, lens.sum()))
        writer.add_epoch(index)
    return SampledData.open(folder)


@dataclass(frozen=True, slots=True)
class Work:
    """The examples of a few steps."""

    data: SampledData
    global_batch_size: int
    steps: int

    def packing(self, micro_batch_size: int) -> RowPacking:
        micro = min(micro_batch_size, self.global_batch_size)
        return RowPacking.of_training(self.global_batch_size, 1, target_only=True, micro=micro)

    def global_batches(self, micro_batch_size: int) -> Iterator[list[PackedBatch]]:
        """The micro-batches of each step, made as they are asked for."""
        packing = self.packing(micro_batch_size)
        num_slots = plan_epochs(self.data, packing, 1).num_slots
        dataset = PrefixLMDataset(self.data, packing, num_slots=num_slots, epoch=0)
        batches = load_global_batches(dataset, torch.device("cpu"), num_workers=0)
        for _, micro_batches in zip(range(self.steps), batches, strict=False):
            yield micro_batches

    def examples(self) -> list[Example]:
        """The same examples one by one, shortest first."""
        rows = [batch for part in self.global_batches(self.global_batch_size) for batch in part]
        if len(rows) < self.steps:
            raise ValueError(f"steps={self.steps}: the examples give {len(rows)} steps; ask fewer")
        used = torch.cat([batch.indices[batch.indices >= 0] for batch in rows]).tolist()
        index, tokens = self.data.epoch(0), self.data.tokens()
        found = []
        for each in used:
            prompt_len = int(index.inst_len[each])
            parts = (index.inst_start, index.inst_len), (index.resp_start, index.resp_len)
            ids = [tokens[start[each] : start[each] + count[each]] for start, count in parts]
            whole = torch.from_numpy(np.concatenate(ids).astype(np.int64))
            labels = whole[1:].clone()
            labels[: prompt_len - 1] = IGNORE_LABEL
            found.append(Example(whole[:-1], labels, prompt_len))
        return sorted(found, key=lambda example: len(example.inputs))


def work_of(size: Size, options: BenchmarkOptions, folder: Path) -> Work:
    """What is trained on at this size; `folder` is where examples are made that are not there."""
    steps = options.steps or size.steps
    tokens = options.global_batch_size or size.global_batch_size
    is_made = size.mean_length is not None
    data = made_examples(folder, size, steps * tokens) if is_made else quick_start_examples()
    return Work(data, tokens, steps)


@dataclass(frozen=True, slots=True)
class Example:
    """What a net reads of an example and what it is to say; the prompt is read as a whole."""

    inputs: Tensor
    labels: Tensor
    prompt_len: int


# --- the two sides -----------------------------------------------------------------------------


class Ours:
    """Our model, trained as `pretrain.py` does."""

    def __init__(self, size: Size, world: World, dtype: torch.dtype = torch.float32) -> None:
        config = ARCH_ADAPTER.validate_python(size.settings)
        chosen = {"dtype": dtype, "head_size": config.answer_stack.head_size}
        attention, _ = select_attention("auto", device=world.device, **chosen)
        torch.manual_seed(0)
        self.model = LanguageModel(config, size.vocab_size, attention)
        shard_model(self.model, world, dtype)
        self.optimizer = AdamATan2(self.model.parameters(), lr=LR)
        self.check = StepCheck(world)

    def train(self, work: Work, micro_batch_size: int) -> None:
        for micro_batches in work.global_batches(micro_batch_size):
            divisor = float(micro_batches[0].global_num_scored)
            train_step(
                self.model, self.optimizer, micro_batches, divisor, BACKPROP_STEPS, self.check
            )

    def gradients(self, work: Work, micro_batch_size: int) -> tuple[float, dict[str, Tensor]]:
        """Mean loss of the first step, and the gradients of its sum over scored tokens."""
        micro_batches = next(work.global_batches(micro_batch_size))
        sums = accumulate_gradients(self.model, micro_batches, 1.0, BACKPROP_STEPS)
        found = {name: weight.grad for name, weight in self.model.named_parameters()}
        self.model.zero_grad()
        loss = float(sums.loss) / micro_batches[0].global_num_scored
        return loss, {name: grad for name, grad in found.items() if grad is not None}


class Theirs:
    """The same weights in transformers' class, with its optimizer of choice."""

    def __init__(self, ours: LanguageModel) -> None:
        from transformers import HrmTextConfig, HrmTextForCausalLM

        settings = export_config(
            ours.config,
            is_native=True,
            vocab_size=len(ours.lm_head.weight),
            max_seq_len=LENGTHS[1],
            ids=FramingIds(boq=0, eoq=0, eoa=0, pad=None),
        )
        H_calls = ours.config.model_dump()["H_cycles"]
        calls_of_L = [0] * (H_calls - 1) + [BACKPROP_STEPS - H_calls]  # all of H carry gradient
        self.model = HrmTextForCausalLM(HrmTextConfig(**{**settings, "L_bp_cycles": calls_of_L}))
        weights = ours.state_dict()
        self.places = {name: place_of_exported(name) for name in self.model.state_dict()}
        self.model.load_state_dict(
            {name: place.rows(weights[place.name]) for name, place in self.places.items()}
        )
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)

    def train(self, examples: Sequence[Example], steps: int, batch_size: int) -> None:
        for step in range(steps):
            share = slice(step * len(examples) // steps, (step + 1) * len(examples) // steps)
            self._accumulate(examples[share], batch_size)
            clip_grad_norm_(self.model.parameters(), CLIPPED_AT)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _accumulate(self, examples: Sequence[Example], batch_size: int) -> float:
        num_scored = sum(int((each.labels != IGNORE_LABEL).sum()) for each in examples)
        total = 0.0
        for start in range(0, len(examples), batch_size):
            loss = self._loss(examples[start : start + batch_size], num_scored)
            loss.backward()
            total += loss.item()
        return total

    def _loss(self, examples: Sequence[Example], num_scored: int) -> Tensor:
        ids = pad_sequence([each.inputs for each in examples], batch_first=True)
        labels = [each.labels for each in examples]
        position = torch.arange(ids.shape[1])
        lens = torch.tensor([len(each.inputs) for each in examples])
        prompt_lens = torch.tensor([each.prompt_len for each in examples])
        logits = self.model(
            input_ids=ids,
            attention_mask=(position < lens[:, None]).long(),
            token_type_ids=(position < prompt_lens[:, None]).long(),
            use_cache=False,
        ).logits
        return self.model.loss_function(
            logits=logits,
            labels=None,
            shift_labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE_LABEL),
            vocab_size=self.model.config.vocab_size,
            num_items_in_batch=num_scored,
        )

    def gradients(
        self, examples: Sequence[Example], batch_size: int
    ) -> tuple[float, dict[str, Tensor]]:
        """As `Ours.gradients`, by the names that are ours."""
        num_scored = sum(int((each.labels != IGNORE_LABEL).sum()) for each in examples)
        loss = self._accumulate(examples, batch_size)
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        for name, weight in self.model.named_parameters():
            place = self.places[name]
            if weight.grad is not None:
                parts.setdefault(place.name, []).append((place.part, weight.grad * num_scored))
        self.model.zero_grad()
        by_part = {name: sorted(found, key=lambda at: at[0]) for name, found in parts.items()}
        return loss, {name: torch.cat([g for _, g in found]) for name, found in by_part.items()}


def require_agreement(ours: Ours, theirs: Theirs, work: Work, examples: list[Example]) -> Figures:
    """ValueError unless loss and every gradient agree: else times mean nothing."""
    first = Work(work.data, work.global_batch_size, steps=1)
    examples = first.examples() if work.steps > 1 else examples
    our_loss, our_grads = ours.gradients(first, work.global_batch_size)
    their_loss, their_grads = theirs.gradients(examples, batch_size=4)
    if set(our_grads) != set(their_grads):
        raise ValueError(f"gradients of other weights: {set(our_grads) ^ set(their_grads)}")
    worst = max(
        float((grad - their_grads[name]).norm() / grad.norm()) for name, grad in our_grads.items()
    )
    apart = max(worst, abs(our_loss - their_loss) / their_loss)
    if not apart <= TOLERANCE:
        raise ValueError(f"the two sides differ by {apart:.1e}, more than {TOLERANCE:.0e}")
    return {"loss": our_loss, "largest_relative_difference": apart}


# --- what is measured --------------------------------------------------------------------------


def rounds_of(calls: dict[str, Callable[[], object]], rounds: int) -> list[dict[str, float]]:
    """Seconds of each call in each round; every call is made once before, and not counted."""
    found = []
    for number in range(rounds + 1):
        elapsed_s = {}
        for name, call in calls.items():
            started_at = time.process_time()
            call()
            elapsed_s[name] = time.process_time() - started_at
            label = f"round {number}" if number else "warm-up"
            print(f"{label}: {name}: {elapsed_s[name]:.2f} s", file=sys.stderr, flush=True)
        found.append(elapsed_s)
    return found[1:]


def fastest_of(side: str, elapsed_s: dict[str, float]) -> float:
    return min(value for name, value in elapsed_s.items() if name.split(",")[0] == side)


def measure(name: str, work: Work, world: World, options: BenchmarkOptions) -> Figures:
    """All that is measured at one size."""
    size, examples = SIZES[name], work.examples()
    kernel, reason = options.linear, "asked for"
    if kernel == "auto":
        kernel, reason = pick_linear_kernel(world.device, size.settings["hidden_size"])
    set_linear_kernel(kernel)
    ours = Ours(size, world)
    theirs = Theirs(ours.model)
    figures: Figures = {"linear": f"{kernel} ({reason})", "attention": ours.model.attention.name}
    figures["agreement"] = require_agreement(ours, theirs, work, examples)
    calls: dict[str, Callable[[], object]] = {}
    micro_sizes = options.micro_batch_sizes or size.micro_batch_sizes
    in_bfloat16 = Ours(size, world, torch.bfloat16) if options.bfloat16 else None
    for tokens in micro_sizes:
        calls[f"ours, {tokens} tokens"] = partial(ours.train, work, tokens)
        if in_bfloat16:
            calls[f"ours in bfloat16, {tokens} tokens"] = partial(in_bfloat16.train, work, tokens)
    for batch_size in options.batch_sizes or size.batch_sizes:
        call = partial(theirs.train, examples, work.steps, batch_size)
        calls[f"transformers, batch {batch_size}"] = call
    found = rounds_of(calls, options.rounds)
    lens = [len(each.inputs) for each in examples]
    num_scored = sum(int((each.labels != IGNORE_LABEL).sum()) for each in examples)
    ratios = [fastest_of("transformers", each) / fastest_of("ours", each) for each in found]
    figures |= {
        "tokens": sum(lens),
        "examples": len(lens),
        "mean_length": sum(lens) / len(lens),
        "scored_share": num_scored / sum(lens),
        "tokens_per_s": {at: sum(lens) / median(each[at] for each in found) for at in calls},
        "ratios": ratios,
        "ratio": median(ratios),
    }
    if in_bfloat16:
        beside = [fastest_of("ours", each) / fastest_of("ours in bfloat16", each) for each in found]
        figures["bfloat16_ratio_to_ours"] = median(beside)
    if options.profile:
        for side in ("ours", "transformers"):
            last = {at: value for at, value in found[-1].items() if at.split(",")[0] == side}
            figures[f"shares, {side}"] = shares(calls[min(last, key=last.__getitem__)])
    return figures


def shares(call: Callable[[], object]) -> dict[str, float]:
    """Of the seconds of a call: what each kind of work takes by itself."""
    started_at = time.process_time()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
        elapsed_s = time.process_time() - started_at
    spent_s = dict.fromkeys((*KINDS, "elementwise"), 0.0)
    for event in profiled.events() or ():
        spent_s[kind_of(event)] += event.self_cpu_time_total / 1e6
    spent_s["python"] = max(0.0, elapsed_s - sum(spent_s.values()))
    return {kind: value / sum(spent_s.values()) for kind, value in spent_s.items()}


def kind_of(event: Any) -> str:
    """By the name of the operator or of one that it is part of; products come first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    if any(part in names[0] for part in KINDS["matmul"]):
        return "matmul"
    found = (kind for kind, parts in KINDS.items() if any(p in n for n in names for p in parts))
    return next(found, "elementwise")


def main() -> None:
    """Command line."""
    try:
        options = parse_options(BenchmarkOptions, sys.argv[1:], __doc__ or "")
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        world = start_world("cpu")
        found: Figures = {"torch": torch.__version__, "machine": platform.processor() or "CPU"}
        found["options"] = options.model_dump(mode="json", exclude={"output"})
        for name in options.sizes:
            with tempfile.TemporaryDirectory() as folder:
                work = work_of(SIZES[name], options, Path(folder) / "examples")
                found[name] = measure(name, work, world, options)
            print(f"{name}: {json.dumps(found[name], indent=2)}", flush=True)
            if options.output:  # after each: a run that is stopped leaves what it found
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        refuse(str(error))
    finally:
        stop_world()


if __name__ == "__main__":
    main()
