"""Whether an exported folder is the checkpoint: ids, logits and answers through transformers.

`expected_of` asks our model and `differences_of` the folder, one after the other, so that only one
of the two is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion.exported_tokenizer import default_condition, prompt_text
from data_io.prompt_format import PromptFormat
from models.batch import PackedLayout
from models.language_model import LanguageModel
from simple_inference_engine import InferenceEngine

TOLERANCE = 1e-4  # largest difference of logits in fp32
ANSWER_TOKENS = 16
# (prefix, rest) of random examples; the last reaches rotary positions far out.
_LENGTHS = ((5, 3), (1, 0), (12, 0), (3, 8), (1, 5), (20, 1), (7, 11), (200, 40))
_TEXTS = ("7 + 5 = ?", "rev neon", " two  words,\nand é 日本 😀 ")
_TURNS = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello. "), ("user", "2 + 2?\n"))


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence whose first `prefix_len` tokens see each other."""

    ids: tuple[int, ...]
    prefix_len: int


@dataclass(frozen=True, slots=True)
class Expected:
    """What our model makes of some examples and prompts."""

    examples: tuple[Example, ...]
    logits: tuple[Tensor, ...]  # [T, V] fp32 of each example
    conversation: tuple[int, ...] | None  # ids; None where no condition is the default
    prompts: tuple[tuple[str, tuple[int, ...]], ...]  # text with its special tokens, ids
    answers: tuple[tuple[int, ...], ...]  # greedy, with the stop token where it came
    answer_logits: tuple[Tensor, ...]  # [A, V] fp32 of each answer's tokens


@dataclass(frozen=True, slots=True)
class Differences:
    """How far the folder is from it."""

    largest: float  # of all logits, in fp32
    in_bfloat16: float | None = None  # the same, computed in bf16
    num_ties: int = 0  # answers that part where two tokens are equally likely up to `TOLERANCE`


def expected_of(model: LanguageModel, prompt_format: PromptFormat, max_context: int) -> Expected:
    """Logits of random examples, and greedy answers to a few prompts."""
    condition = default_condition(prompt_format) or next(iter(prompt_format.conditions), None)
    texts = [prompt_text(prompt_format, condition, text) for text in _TEXTS]
    prompts = [_prompt_ids(prompt_format, condition, text) for text in _TEXTS]
    fitting = [
        (text, ids) for text, ids in zip(texts, prompts, strict=True) if len(ids) < max_context
    ]
    engine = InferenceEngine(model, max_context=max_context, max_rows=len(_TEXTS))
    made = engine.generate_ids(
        [ids for _, ids in fitting],
        stop_ids=(prompt_format.eoa_id,),
        max_new_tokens=ANSWER_TOKENS,
    )
    stop = (prompt_format.eoa_id,)
    answers = [
        tuple(each.token_ids) + (stop if each.finish_reason == "stop" else ())
        for each in sorted(made, key=lambda each: each.index)
    ]
    given = [
        Example((*ids, *answer[:-1]), len(ids))
        for (_, ids), answer in zip(fitting, answers, strict=True)
    ]
    examples = list(_random_examples(prompt_format.vocab_size, max_context))
    chat_condition = default_condition(prompt_format)
    return Expected(
        examples=tuple(examples),
        logits=tuple(packed_logits(model, examples)),
        conversation=tuple(prompt_format.encode_conversation(chat_condition, _TURNS))
        if chat_condition
        else None,
        prompts=tuple((text, tuple(ids)) for text, ids in fitting),
        answers=tuple(answers),
        answer_logits=tuple(
            logits[example.prefix_len - 1 :]
            for example, logits in zip(given, packed_logits(model, given), strict=True)
        ),
    )


@torch.no_grad()
def packed_logits(model: LanguageModel, examples: Sequence[Example]) -> Iterator[Tensor]:
    """Our logits [T, V] of each example, all packed in one row; on CPU in fp32."""
    prefix_lens = torch.tensor([example.prefix_len for example in examples])
    lens = torch.tensor([len(example.ids) for example in examples])
    device = model.lm_head.weight.device
    layout = PackedLayout.from_lengths(prefix_lens, lens - prefix_lens, len(examples))
    hidden = model(
        torch.tensor([token for example in examples for token in example.ids], device=device),
        torch.cat([torch.arange(length) for length in lens.tolist()]).to(device),
        layout.map_vectors(lambda vector: vector.to(device)),
    )
    for part in hidden.split(lens.tolist()):
        yield model.logits(part).cpu()


def differences_of(
    folder: Path, expected: Expected, *, runs_code: bool, in_bfloat16: bool
) -> Differences:
    """Loads the folder as a user does; ValueError where it is not what is expected."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=runs_code
    )
    _require_same_ids(tokenizer, expected)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=runs_code,
        local_files_only=True,
        output_loading_info=True,
    )
    model, loading = loaded
    wrong = {kind: sorted(names) for kind, names in loading.items() if names}
    if wrong:
        raise ValueError(f"transformers does not find the weights that it looks for: {wrong}")
    model = model.eval()
    found = Differences(_largest(_logits_of(model, expected.examples), expected.logits))
    if not found.largest <= TOLERANCE:
        raise ValueError(
            f"logits differ by up to {found.largest:.3g} from the checkpoint's, which is more than "
            f"{TOLERANCE:g}"
        )
    found = replace(found, num_ties=_differing_ties(model, tokenizer, expected))
    if in_bfloat16:
        rounded = _logits_of(model.to(torch.bfloat16), expected.examples)
        found = replace(found, in_bfloat16=_largest(rounded, expected.logits))
    return found


def _random_examples(vocab_size: int, max_context: int) -> Iterator[Example]:
    draw = torch.Generator().manual_seed(0)
    for prefix_len, rest in _LENGTHS:
        prefix_len = min(prefix_len, max_context)
        length = min(prefix_len + rest, max_context)
        ids = torch.randint(vocab_size, (length,), generator=draw)
        yield Example(tuple(ids.tolist()), prefix_len)


def _prompt_ids(prompt_format: PromptFormat, condition: str | None, text: str) -> list[int]:
    if condition is not None:
        return prompt_format.encode_prompt(condition, text)
    text_ids = prompt_format.encode_response(text)[:-1]
    return [prompt_format.boq_id, *text_ids, prompt_format.eoq_id]


def _require_same_ids(tokenizer: Any, expected: Expected) -> None:
    for text, ids in expected.prompts:
        made = tokenizer(text)
        if tuple(made["input_ids"]) != ids or set(made["token_type_ids"]) != {1}:
            types = sorted(set(made["token_type_ids"]))
            raise ValueError(
                f"the exported tokenizer makes other ids of {text!r} than the training data has: "
                f"{made['input_ids']} of types {types}, not {list(ids)} of type 1"
            )
    if expected.conversation is not None:
        messages = [{"role": role, "content": text} for role, text in _TURNS]
        made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        if tuple(made["input_ids"]) != expected.conversation:
            raise ValueError(
                f"the exported chat template makes other ids than training: {made['input_ids']}, "
                f"not {list(expected.conversation)}"
            )


@torch.no_grad()
def _logits_of(model: Any, examples: Sequence[Example]) -> Iterator[Tensor]:
    for example in examples:
        types = [1] * example.prefix_len + [0] * (len(example.ids) - example.prefix_len)
        out = model(input_ids=torch.tensor([example.ids]), token_type_ids=torch.tensor([types]))
        yield out.logits[0].float()


def _largest(found: Iterator[Tensor], expected: Sequence[Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(found, expected, strict=True))


def _differing_ties(model: Any, tokenizer: Any, expected: Expected) -> int:
    """How many answers differ by a tie; ValueError for any other difference."""
    ties = 0
    for (text, ids), answer, logits in zip(
        expected.prompts, expected.answers, expected.answer_logits, strict=True
    ):
        inputs = tokenizer(text, return_tensors="pt")
        made = tuple(model.generate(**inputs, max_new_tokens=len(answer))[0, len(ids) :].tolist())
        if made == answer:
            continue
        at = next(i for i, pair in enumerate(zip(made, answer, strict=False)) if pair[0] != pair[1])
        if abs(logits[at, made[at]] - logits[at, answer[at]]) > 2 * TOLERANCE:
            raise ValueError(
                f"generate() answers {text!r} with {list(made)}, ours are {list(answer)}"
            )
        ties += 1
    return ties
