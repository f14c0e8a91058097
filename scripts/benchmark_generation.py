"""Speed of generation and of multiple choice, both sides in one run, on random weights.

    python scripts/benchmark_generation.py                              # nano on a CPU
    python scripts/benchmark_generation.py sizes=nano,wide output=generation.json
    python scripts/benchmark_generation.py device=cuda sizes=xl         # beside the bandwidth limit

On a CPU `generate` of transformers answers the same prompts with the same weights: batches of
prompts sorted by length, left-padded, with its cache, each row stopped where its answer ends, the
fastest of several batch sizes; one thread and fp32 on both sides, seconds of this process alone.
It has more than 300 lines: the two sides belong together, and scripts do not import one another.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_io.options import parse_options
from inference.packed_weights import can_be_packed, pack_weights
from models.attention import select_attention
from models.language_model import LanguageModel
from models.linear import WORTH_PACKING, packing_gain, pick_linear_kernel, set_linear_kernel
from simple_inference_engine import InferenceEngine, Request
from training.console import refuse
from training.distributed import pick_device
from training.export_format import (
    ARCH_ADAPTER,
    FramingIds,
    export_config,
    place_of_exported,
)

Figures = dict[str, Any]
HRM: dict[str, Any] = {"name": "hrm", "half_layers": True, "H_cycles": 2, "L_cycles": 3}
SIZES: dict[str, tuple[dict[str, Any], int]] = {  # settings, vocabulary
    "nano": ({**HRM, "n_layers": 4, "hidden_size": 64, "num_heads": 4}, 512),
    "wide": ({**HRM, "n_layers": 4, "hidden_size": 1024, "num_heads": 8}, 4096),
    "xl": ({**HRM, "n_layers": 32, "hidden_size": 1536, "num_heads": 12}, 65536),
}
PROMPT_TOKENS, ANSWER_TOKENS, MAX_CONTEXT = (20, 400), (5, 200), 1024
QUESTION_TOKENS, NUM_OPTIONS = (20, 120), 4
BATCH_SIZES = {"nano": (16, 32, 64, 128), "wide": (4, 8, 16)}  # that transformers is tried with
AGREEING = (4, 16)  # prompts, and tokens of each answer, that both sides make alike beforehand
DECODED_ROWS, DECODED = (1, 64), (128, 300)  # answers at a time; tokens of each, and of its prompt


class BenchmarkOptions(BaseModel):
    """What is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sizes: list[Literal["nano", "wide", "xl"]] = Field(
        default=["nano"], description="nano, wide (D 1024): against transformers; xl: on a GPU"
    )
    device: str = Field(default="cpu", description="cpu, cuda, cuda:1")
    prompts: PositiveInt = Field(default=256, description="answers to make, and questions")
    repeats: PositiveInt = Field(default=2, description="runs of each side; the fastest counts")
    batch_sizes: list[PositiveInt] = Field(
        default=[64, 128], description="answers made at a time, on our side; the fastest counts"
    )
    their_batch_sizes: list[PositiveInt] = Field(
        default=[],
        description="of transformers; the fastest counts; []: several that suit each size",
    )
    decode: Literal["auto", "eager", "compiled", "cuda_graph"] = Field(
        default="auto", description="how one token more is computed, on our side"
    )
    output: Path | None = Field(default=None, description="JSON file of all figures")
    quick: bool = Field(default=False, description="a few short prompts: a test of the script")


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts, and how long the answer to each is."""

    prompts: list[list[int]]
    answer_lens: list[int]

    @classmethod
    def random(cls, count: int, vocab_size: int, *, quick: bool) -> Work:
        """The same at every call; lengths are drawn evenly, shorter ones where it is `quick`."""
        draw = torch.Generator().manual_seed(0)
        shortest, longest = ANSWER_TOKENS
        answer_lens = random_numbers(count, (shortest, 14 if quick else longest), draw)
        shortest, longest = PROMPT_TOKENS
        lengths = (shortest, 39 if quick else longest)
        return cls(random_prompts(count, lengths, vocab_size, draw), answer_lens)


def random_numbers(count: int, bounds: tuple[int, int], draw: torch.Generator) -> list[int]:
    """From the first of `bounds` to the second."""
    return torch.randint(bounds[0], bounds[1] + 1, (count,), generator=draw).tolist()


def random_prompts(
    count: int, lengths: tuple[int, int], vocab_size: int, draw: torch.Generator
) -> list[list[int]]:
    """Of random tokens."""
    lens = random_numbers(count, lengths, draw)
    return [random_numbers(length, (1, vocab_size - 1), draw) for length in lens]


def build(size: str, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A net of that size with seeded weights, ready to be asked."""
    settings, vocab_size = SIZES[size]
    config = ARCH_ADAPTER.validate_python(settings)
    head_size = config.answer_stack.head_size
    attention, _ = select_attention("auto", device=device, dtype=dtype, head_size=head_size)
    torch.manual_seed(0)
    with torch.device(device):
        model = LanguageModel(config, vocab_size, attention)
    return model.to(dtype).requires_grad_(False).eval()


def engine_for(model: LanguageModel, options: BenchmarkOptions, max_rows: int) -> InferenceEngine:
    """Our side."""
    return InferenceEngine(model, max_context=MAX_CONTEXT, max_rows=max_rows, decode=options.decode)


def machine(device: str) -> str:
    """What the figures belong to."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "CPU"


def seconds(device: torch.device) -> float:
    """A clock; on CPUs of this process alone, whatever else the machine is doing."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def fastest(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> Figures:
    """Seconds of the fastest run of each, taken in turn: what slows one down slows all down."""
    found: dict[str, float] = {}
    for _ in range(repeats):
        for name, call in calls.items():
            started_at = seconds(device)
            call()
            elapsed_s = seconds(device) - started_at
            print(f"{name}: {elapsed_s:.1f} s", file=sys.stderr, flush=True)
            found[name] = min(found.get(name, elapsed_s), elapsed_s)
    return found


# --- transformers ------------------------------------------------------------------------------


def transformers_model(model: LanguageModel) -> Any:
    """The same weights in transformers' own class."""
    from transformers import HrmTextConfig, HrmTextForCausalLM

    settings = export_config(
        model.config,
        is_native=True,
        vocab_size=len(model.lm_head.weight),
        max_seq_len=MAX_CONTEXT,
        ids=FramingIds(boq=0, eoq=0, eoa=0, pad=None),
    )
    theirs = HrmTextForCausalLM(HrmTextConfig(**settings)).eval()
    ours = model.state_dict()
    places = {name: place_of_exported(name) for name in theirs.state_dict()}
    theirs.load_state_dict({name: at.rows(ours[at.name]) for name, at in places.items()})
    theirs.generation_config.eos_token_id = None  # answers end where they are told to
    theirs.generation_config.pad_token_id = 0
    return theirs


def their_answers(theirs: Any, work: Work, batch_size: int) -> list[list[int]]:
    """Answers by `generate`, in the order of the prompts."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class OwnLength(StoppingCriteria):
        """Ends each row where its answer does, so that a batch is done with its longest answer."""

        def __init__(self, start: int, lengths: Sequence[int]) -> None:
            self.ends = start + torch.tensor(lengths)

        def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Any:
            return input_ids.shape[1] >= self.ends

    answers: list[list[int]] = [[] for _ in work.prompts]
    order = sorted(range(len(answers)), key=lambda index: len(work.prompts[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        prompts = [torch.tensor(work.prompts[index]) for index in batch]
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
        ones = [torch.ones_like(prompt) for prompt in prompts]
        mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side="left")
        lengths = [work.answer_lens[index] for index in batch]
        width = ids.shape[1]
        rows = theirs.generate(
            input_ids=ids,
            attention_mask=mask,
            token_type_ids=mask,
            do_sample=False,
            max_new_tokens=max(lengths),
            stopping_criteria=StoppingCriteriaList([OwnLength(width, lengths)]),
        )
        for index, row in zip(batch, rows.tolist(), strict=True):
            answers[index] = row[width : width + work.answer_lens[index]]
    return answers


def our_answers(engine: InferenceEngine, work: Work) -> list[list[int]]:
    """Answers by our engine, in the order of the prompts."""
    requests = (
        Request(prompt, max_new_tokens=length)
        for prompt, length in zip(work.prompts, work.answer_lens, strict=True)
    )
    answers: list[list[int]] = [[] for _ in work.prompts]
    for answer in engine.answer(requests):
        answers[answer.index] = list(answer.token_ids)
    return answers


# --- what is measured --------------------------------------------------------------------------


def compare_generation(model: LanguageModel, size: str, options: BenchmarkOptions) -> Figures:
    """Tokens per second of both sides; ValueError where they do not say the same."""
    device = model.lm_head.weight.device
    work = Work.random(options.prompts, len(model.lm_head.weight), quick=options.quick)
    theirs = transformers_model(model)
    gain = packing_gain(model.config.hidden_size) if can_be_packed(model) else 0.0
    if is_packed := gain >= WORTH_PACKING:
        pack_weights(model)
    count, length = AGREEING
    few = Work(work.prompts[:count], [length] * len(work.prompts[:count]))
    if our_answers(engine_for(model, options, count), few) != their_answers(theirs, few, count):
        raise ValueError(f"{size}: the two sides answer differently; their times mean nothing")
    calls: dict[str, Callable[[], object]] = {}
    for batch_size in options.batch_sizes:
        engine = engine_for(model, options, batch_size)
        calls[f"ours, batch {batch_size}"] = partial(our_answers, engine, work)
    tried = options.their_batch_sizes or BATCH_SIZES[size]
    batch_sizes = sorted({min(each, options.prompts) for each in tried})
    for batch_size in batch_sizes[: 1 if options.quick else None]:
        name = f"transformers, batch {batch_size}"
        calls[name] = partial(their_answers, theirs, work, batch_size)
    elapsed_s = fastest(calls, options.repeats, device)
    best = {
        side: min(each for name, each in elapsed_s.items() if name.startswith(side))
        for side in ("ours", "transformers")
    }
    num_tokens = sum(work.answer_lens)
    return {
        "prompt_tokens": sum(map(len, work.prompts)),
        "answer_tokens": num_tokens,
        "weights_packed": is_packed,
        "packing_gain": gain,
        "tokens_per_s": {name: num_tokens / each for name, each in elapsed_s.items()},
        "ratio": best["transformers"] / best["ours"],
    }


def compare_multiple_choice(model: LanguageModel, options: BenchmarkOptions) -> Figures:
    """Questions per second: one prefill after the other, and packed."""
    device, vocab_size = model.lm_head.weight.device, len(model.lm_head.weight)
    letters = list(range(1, NUM_OPTIONS + 1))
    draw = torch.Generator().manual_seed(1)
    prompts = random_prompts(options.prompts, QUESTION_TOKENS, vocab_size, draw)
    questions = [(prompt, letters) for prompt in prompts]
    engine = engine_for(model, options, max_rows=1)
    chosen: dict[str, list[int]] = {}

    def ask(name: str, groups: list[list[tuple[list[int], list[int]]]]) -> None:
        scores = [score for group in groups for score in engine.score_options_ids(group)]
        best = [max(range(NUM_OPTIONS), key=score.logprobs.__getitem__) for score in scores]
        chosen[name] = best

    calls = {
        "one by one": lambda: ask("one by one", [[question] for question in questions]),
        "packed": lambda: ask("packed", [questions]),
    }
    elapsed_s = fastest(calls, options.repeats, device)
    return {
        "question_tokens": sum(map(len, prompts)),
        "questions_per_s": {name: len(questions) / each for name, each in elapsed_s.items()},
        "letters_agree": sum(map(int.__eq__, *chosen.values())) / len(questions),
        "ratio": elapsed_s["one by one"] / elapsed_s["packed"],
    }


def measure_decoding(model: LanguageModel, options: BenchmarkOptions) -> Figures:
    """Tokens per second of decoding beside what reading weights and cache from memory allows."""
    device = model.lm_head.weight.device
    steps, prompt_len = (4, 20) if options.quick else DECODED
    copied = torch.empty(1 << (20 if options.quick else 31), dtype=torch.uint8, device=device)
    bytes_per_s = 2 * copied.nbytes / fastest({"copy": copied.clone}, 5, device)["copy"]
    del copied
    stacks = model.config.stacks()
    applied = [stacks[each.stack] for each in model.config.applications()]
    weights = model.lm_head.weight.numel() + sum(each.num_parameters for each in applied)
    per_token = sum(2 * each.n_layers * each.hidden_size for each in applied)  # of the cache
    figures: Figures = {"bytes_per_s": bytes_per_s}
    for batch in DECODED_ROWS:
        engine = engine_for(model, options, max_rows=batch)
        prompts = [list(range(1, prompt_len + 1))] * batch
        short, long = (Work(prompts, [tokens] * batch) for tokens in (2, 2 + steps))
        our_answers(engine, long)  # compiles, captures
        calls = {"short": partial(our_answers, engine, short)}
        calls["long"] = partial(our_answers, engine, long)
        elapsed_s = fastest(calls, options.repeats, device)
        numbers = weights + batch * per_token * (prompt_len + steps / 2)  # read in a step
        limit = batch * bytes_per_s / (numbers * model.lm_head.weight.element_size())
        found = batch * steps / (elapsed_s["long"] - elapsed_s["short"])
        figures[f"batch {batch}"] = {"tokens_per_s": found, "limit": limit, "share": found / limit}
    return figures


def measure(size: str, options: BenchmarkOptions) -> Figures:
    """All that is measured at one size."""
    device = pick_device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = build(size, device, dtype)
    kernel, _ = pick_linear_kernel(device, model.config.hidden_size)
    set_linear_kernel(kernel)
    figures: Figures = {"dtype": str(dtype), "linear": kernel, "attention": model.attention.name}
    figures["decode"] = engine_for(model, options, max_rows=1).decode
    if device.type == "cpu":
        figures["generation"] = compare_generation(model, size, options)
    else:
        figures["decoding"] = measure_decoding(model, options)
    return figures | {"multiple_choice": compare_multiple_choice(model, options)}


def main() -> None:
    """Command line."""
    try:
        options = parse_options(BenchmarkOptions, sys.argv[1:], __doc__ or "")
        torch.set_num_threads(1)
        found: Figures = {"torch": torch.__version__, "machine": machine(options.device)}
        found["options"] = options.model_dump(mode="json", exclude={"output"})
        for size in options.sizes:
            found[size] = measure(size, options)
            print(f"{size}: {json.dumps(found[size], indent=2)}", flush=True)
            if options.output:  # after each: a run that is stopped leaves what it found
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        refuse(str(error))


if __name__ == "__main__":
    main()
