"""Exported folders run in transformers with the code shipped in them, as our own model does."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from net_cases import NETS
from shipped_cases import (
    FORMAT,
    Export,
    conversation,
    prompt_of,
    random_ids,
    shared_export,
    shared_model,
    write_export,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, HrmTextForCausalLM, pipeline

from conversion.shipped_code import SHIPPED, ship_code
from models.batch import PackedLayout

ATOL = 1e-5  # of logits; the issue asks for 1e-4
NATIVE = "native hrm"
NATIVES = (NATIVE, "native hrm causal")
KINDS = (*NETS, *NATIVES)  # with the one modelling file or the other
NUM_TOKENS = 8
# Read causally, it is answered otherwise by every net here; tests that use it show that it is not.
TELLING_TEXT = "bc3da12 12ba"
TELLING = FORMAT.encode_prompt("direct", TELLING_TEXT)
TEXTS = (TELLING_TEXT, "", "which of them is the longest word here?")


def padded(rows: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        padding = [0] * (width - len(row))
        is_left = side == "left"
        ids.append(padding + row if is_left else row + padding)
        ones = [1] * len(row)
        mask.append(padding + ones if is_left else ones + padding)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def logits_of(model: Any, **inputs: Any) -> Tensor:
    return model(**inputs).logits


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_our_model(kind: str) -> None:
    export, model = shared_export(kind), shared_model(kind)
    tokens, num_prefix = conversation()
    expected = export.logits(tokens, num_prefix)
    assert_close(logits_of(model, input_ids=torch.tensor([tokens]))[0], expected)
    types = torch.tensor([[1] * num_prefix + [0] * (len(tokens) - num_prefix)])
    marked = logits_of(model, input_ids=torch.tensor([tokens]), token_type_ids=types)
    assert_close(marked[0], expected)
    earlier = torch.tensor([[1] * 6 + [0] * (len(tokens) - 6)])  # what is given counts
    marked = logits_of(model, input_ids=torch.tensor([tokens]), token_type_ids=earlier)
    assert_close(marked[0], export.logits(tokens, 6))
    if "causal" not in kind:
        assert (marked[0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind: str, side: str) -> None:
    export, model = shared_export(kind), shared_model(kind)
    (long, num_prefix), short = conversation(), [*prompt_of(5), *random_ids(4)]
    inputs = padded([long, short], side)
    found = logits_of(model, **inputs)
    assert_close(found[0], export.logits(long, num_prefix))
    is_real = inputs["attention_mask"][1].bool()
    assert_close(found[1, is_real], export.logits(short, 5))
    if side == "right":  # evaluation harnesses pad so, and give no mask
        found = logits_of(model, input_ids=inputs["input_ids"])
        assert_close(found[1, is_real], export.logits(short, 5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        # transformers 5.9 needs a token to stop at here; this one never comes up
        {"prompt_lookup_num_tokens": 3, "eos_token_id": -1},
    ],
    ids=["cached", "uncached", "static", "assisted"],
)
def test_generate_gives_our_greedy_answer(kind: str, settings: dict[str, Any]) -> None:
    export, model = shared_export(kind), shared_model(kind)
    expected = export.greedy(TELLING, NUM_TOKENS)
    ids = torch.tensor([TELLING])
    for marks in ({}, {"token_type_ids": torch.ones_like(ids)}):
        found = model.generate(
            input_ids=ids, max_new_tokens=NUM_TOKENS, do_sample=False, **marks, **settings
        )
        assert found[0, len(TELLING) :].tolist() == expected


@pytest.mark.parametrize("kind", ["hrm", "rins", "hrm with another H", *NATIVES])
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=["cached", "uncached", "static"],
)
def test_generate_gives_our_answers_to_a_padded_batch(kind: str, settings: dict[str, Any]) -> None:
    prompts = [prompt_of(4), conversation()[0] + prompt_of(6), TELLING]
    inputs = padded(prompts)
    found = shared_model(kind).generate(
        **inputs, max_new_tokens=NUM_TOKENS, do_sample=False, **settings
    )
    answers = found[:, inputs["input_ids"].shape[1] :].tolist()
    assert answers == [shared_export(kind).greedy(prompt, NUM_TOKENS) for prompt in prompts]


@pytest.mark.parametrize("kind", ["hrm", NATIVE])
def test_continuous_batching_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="would read the prompt causally"):
        shared_model(kind).generate_batch([prompt_of(9)])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "causal" not in kind])
def test_read_causally_the_answer_would_be_another(kind: str) -> None:
    """Else nothing here would show that the prefix is found."""
    ids = torch.tensor([TELLING])
    found = shared_model(kind).generate(
        ids, max_new_tokens=NUM_TOKENS, do_sample=False, token_type_ids=torch.zeros_like(ids)
    )
    assert found[0, len(TELLING) :].tolist() != shared_export(kind).greedy(TELLING, NUM_TOKENS)


def texts_of(export: Export) -> list[str]:
    """What our engine says to TEXTS."""
    prompts = (FORMAT.encode_prompt("direct", text) for text in TEXTS)
    return [FORMAT.decode(export.greedy(prompt, NUM_TOKENS)) for prompt in prompts]


@pytest.mark.parametrize("kind", ["hrm", NATIVE])
def test_beams_are_the_same_with_and_without_cache(kind: str) -> None:
    inputs = padded([prompt_of(9), prompt_of(5)])
    found = [
        shared_model(kind).generate(
            **inputs, max_new_tokens=6, do_sample=False, num_beams=3, use_cache=uses_cache
        )
        for uses_cache in (True, False)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["hrm with another H", NATIVE])
def test_eager_attention_is_the_same(kind: str) -> None:
    model = shared_export(kind).load(attn_implementation="eager")
    long, num_prefix = conversation()
    found = logits_of(model, **padded([long, prompt_of(4)]))
    assert_close(found[0], shared_export(kind).logits(long, num_prefix))


@pytest.mark.parametrize("kind", ["hrm", NATIVE])
def test_a_prompt_is_not_read_in_parts(kind: str) -> None:
    ids = torch.tensor([prompt_of(12)])
    with pytest.raises(ValueError, match="12 tokens came in parts"):
        shared_model(kind).generate(ids, max_new_tokens=3, do_sample=False, prefill_chunk_size=4)
    cache = shared_model(kind)(ids[:, :5]).past_key_values
    with pytest.raises(ValueError, match=r"came in parts \(5 cached"):
        shared_model(kind).generate(ids, max_new_tokens=3, do_sample=False, past_key_values=cache)


@pytest.mark.parametrize("kind", ["hrm", "transformer", NATIVE])
def test_the_text_generation_pipeline_gives_our_answers(kind: str) -> None:
    export, direct = shared_export(kind), FORMAT.conditions["direct"]
    generator: Any = pipeline(
        "text-generation", model=str(export.folder), trust_remote_code=True, dtype=torch.float32
    )
    for batch_size in (1, len(TEXTS)):
        found = generator(
            [f"{FORMAT.boq}{direct}{text}{FORMAT.eoq}" for text in TEXTS],
            batch_size=batch_size,
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            return_full_text=False,
        )
        assert [each["generated_text"] for (each,) in found] == texts_of(export)


@pytest.mark.parametrize("kind", ["hrm with another H", NATIVE])
def test_what_is_saved_again_runs_as_before(tmp_path: Path, kind: str) -> None:
    ids = torch.tensor([prompt_of(8)])
    shared_model(kind).save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True, dtype=torch.float32
    )
    assert type(again).__module__.startswith("transformers_modules.")
    assert_close(logits_of(again, input_ids=ids), logits_of(shared_model(kind), input_ids=ids))


def test_a_native_folder_with_code_also_loads_without_it(
    tmp_path: Path,
) -> None:
    shared_model(NATIVE).save_pretrained(tmp_path / "again")
    prompt = prompt_of(10)
    ids = torch.tensor([prompt])
    for folder in (shared_export(NATIVE).folder, tmp_path / "again"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert type(model) is HrmTextForCausalLM
        marked = logits_of(model, input_ids=ids, token_type_ids=torch.ones_like(ids))
        assert_close(marked[0], shared_export(NATIVE).logits(prompt, len(prompt)))


def test_hidden_states_are_those_of_each_application() -> None:
    written = []

    class Trace:
        def add(self, name: str, before: Tensor | None, after: Tensor) -> None:
            written.append(after)

    prompt = prompt_of(9)
    model = shared_export("hrm").model
    layout = PackedLayout.from_lengths(torch.tensor([9]), torch.tensor([0]), 1)
    with torch.no_grad():
        model(torch.tensor(prompt), torch.arange(9), layout, trace=Trace())
        found = shared_model("hrm")(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    assert len(found) == 1 + len(written) == 9
    for state, expected in zip(found[1:], written, strict=True):
        assert_close(state[0], expected)


def test_embeddings_need_to_be_marked() -> None:
    prompt = prompt_of(7)
    model, ids = shared_model("hrm"), torch.tensor([prompt])
    embedded = model.get_input_embeddings()(ids)
    found = logits_of(model, inputs_embeds=embedded, token_type_ids=torch.ones_like(ids))
    assert_close(found[0], shared_export("hrm").logits(prompt, 7))
    with pytest.raises(ValueError, match="give token_type_ids too"):
        model(inputs_embeds=embedded)


def test_a_setting_that_is_unknown_to_the_code_is_refused(tmp_path: Path) -> None:
    export = write_export(tmp_path / "model", "hrm")
    path = export.folder / "config.json"
    config = json.loads(path.read_text())
    config["stacks"]["H_module"]["norm_type"] = "sandwich"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="norm_type='sandwich' is unknown here"):
        export.load()


def test_code_is_not_shipped_where_the_end_of_a_prompt_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eoq_token_id=None .* is no token id"):
        ship_code(tmp_path, {"eoq_token_id": None}, is_native=True)
    assert list(tmp_path.iterdir()) == []


def imported_roots(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).split(".")[0]


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.py")), ids=lambda path: path.name)
def test_what_is_shipped_needs_torch_and_transformers_alone(path: Path) -> None:
    allowed = {"torch", "transformers", "__future__", "collections", "typing", "warnings"}
    assert set(imported_roots(path.read_text())) <= allowed
