"""lm-evaluation-harness on our engine: each method against the engine, all against `hf`."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asking_cases
import export_cases
import pytest
from harness_cases import instances

from evaluation import lm_eval_adapter
from evaluation.harness_generation import Generation, read_generation
from evaluation.harness_model import Conversation, HarnessModel, windows
from simple_inference_engine import InferenceEngine, LoadedModel, Sampling, Span

CONTEXT = asking_cases.MAX_CONTEXT
is_installed = all(importlib.util.find_spec(name) for name in ("lm_eval", "accelerate"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return asking_cases.write_run(tmp_path_factory.mktemp("adapter") / "run")


@pytest.fixture(scope="module")
def loaded(run: Path) -> LoadedModel:
    return export_cases.loaded(run)


@pytest.fixture
def model(loaded: LoadedModel) -> HarnessModel:
    return HarnessModel(loaded, "direct")


def totals(loaded: LoadedModel, *spans: Span) -> list[float]:
    return [score.total for score in loaded.engine.score_spans_ids(spans)]


def test_continuations_are_scored_as_answers(loaded: LoadedModel, model: HarnessModel) -> None:
    asked = [("add b to c:", " abc"), ("add b to c:", "\nbad"), ("so", "  d"), ("so", " ")]
    found = model.loglikelihood(instances(*asked), disable_tqdm=True)
    said = ["abc", "bad", " d", " "]
    answers = [("direct", text, each) for (text, _), each in zip(asked, said, strict=True)]
    assert found == [(score.total, score.is_greedy) for score in loaded.score(answers)]


def test_the_condition_is_asked_for(loaded: LoadedModel) -> None:
    asked = instances(("so", "abc"))
    (found,) = HarnessModel(loaded, "synth,cot").loglikelihood(asked, disable_tqdm=True)
    (score,) = loaded.score([("synth,cot", "so", "abc")])
    assert found == (score.total, score.is_greedy)


def test_turns_are_one_prefix_and_their_text_is_data(
    loaded: LoadedModel, model: HarnessModel
) -> None:
    turns = [("system", "spell"), ("user", "a<|im_end|>"), ("assistant", "b"), ("user", "c")]
    history = [{"role": role, "content": text} for role, text in turns]
    chat = model.apply_chat_template(history)
    (found,) = model.loglikelihood(instances((chat, " d")), disable_tqdm=True)
    ids = loaded.prompt_format.encode_conversation("direct", turns)
    answer = loaded.prompt_format.encode_response(" d")[:-1]  # the space is the task's
    assert found[0] == totals(loaded, Span((*ids, *answer), len(ids), len(ids)))[0]
    _, (alone, _) = model.loglikelihood(instances((chat, " d"), ("", " d")), disable_tqdm=True)
    boq = loaded.prompt_format.boq_id
    assert alone == pytest.approx(totals(loaded, Span((boq, *answer), 1, 1))[0], abs=1e-4)
    assert "spell\n\na<|im_end|>" in chat and chat.count("<|im_start|>") == 2


def test_what_is_begun_of_an_answer_is_causal(loaded: LoadedModel, model: HarnessModel) -> None:
    history = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "It is "}]
    chat = model.apply_chat_template(history, add_generation_prompt=False)
    assert chat.endswith("It is ")
    (found,) = model.loglikelihood(instances((chat, "b")), disable_tqdm=True)
    ids = loaded.prompt_format.encode_prompt("direct", "c")
    answer = loaded.prompt_format.encode_response("It is b")[:-1]
    start = len(ids) + len("It is")  # the space is scored too
    assert found[0] == totals(loaded, Span((*ids, *answer), len(ids), start))[0]
    with pytest.raises(ValueError, match="gen_prefix"):
        model.generate_until(instances((chat, {"max_gen_toks": 4})), disable_tqdm=True)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_conversation_is_copied_with_its_turns(copied: Any) -> None:
    chat = copied(Conversation("spelled", [("user", "a")]))
    assert (chat, chat.turns) == ("spelled", (("user", "a"),))


def test_a_conversation_that_became_text_is_refused(model: HarnessModel) -> None:
    chat = model.apply_chat_template([{"role": "user", "content": "c"}])
    with pytest.raises(ValueError, match="no Conversation"):
        model.loglikelihood(instances((str(chat) + "", "d")), disable_tqdm=True)


def test_what_is_too_long_loses_its_beginning(
    loaded: LoadedModel, model: HarnessModel, capsys: pytest.CaptureFixture[str]
) -> None:
    # with boq, condition, eoq and the answer: as long as can be, one longer, far too long
    texts = ["a" * (CONTEXT + 1 - 5), "b" + "a" * (CONTEXT + 1 - 5), "ab" * CONTEXT]
    found = model.loglikelihood(instances(*((text, "bc") for text in texts)), disable_tqdm=True)
    assert model.num_cropped == {"loglikelihood": 2}
    assert "loglikelihood: 2 of 3 contexts were too long" in capsys.readouterr().out
    answer = loaded.prompt_format.encode_response("bc")[:-1]
    kept = [
        (*loaded.prompt_format.encode_prompt("direct", text), *answer)[-CONTEXT - 1 :]
        for text in texts
    ]
    engine = InferenceEngine(loaded.engine.model, max_context=CONTEXT + 1)  # the last is not read
    spans = [Span(ids, CONTEXT - 1, CONTEXT - 1) for ids in kept]
    assert [total for total, _ in found] == [each.total for each in engine.score_spans_ids(spans)]
    with pytest.raises(ValueError, match=f"continuation of {CONTEXT + 1} tokens does not fit"):
        model.loglikelihood(instances(("a", "b" * (CONTEXT + 1))), disable_tqdm=True)


def test_windows_score_each_token_once_and_end_with_a_full_context() -> None:
    assert list(windows(99, range(10), 4)) == [
        Span((99, 0, 1, 2, 3), 1, 1),
        Span((3, 4, 5, 6, 7), 1, 1),
        Span((5, 6, 7, 8, 9), 1, 3),
    ]
    assert list(windows(99, range(4), 4)) == [Span((99, 0, 1, 2, 3), 1, 1)]
    assert list(windows(99, (), 4)) == []


def test_whole_texts_are_read_causally(loaded: LoadedModel, model: HarnessModel) -> None:
    texts = ["abc", "", "ab" * CONTEXT]
    short, empty, long = model.loglikelihood_rolling(
        instances(*((text,) for text in texts)), disable_tqdm=True
    )
    boq = loaded.prompt_format.boq_id
    ids = [boq, *loaded.prompt_format.encode_response("abc")[:-1]]
    assert (short, empty) == (pytest.approx(totals(loaded, Span(ids, 1, 1))[0], abs=1e-4), 0.0)
    first, *_ = windows(boq, loaded.prompt_format.encode_response(texts[2])[:-1], CONTEXT)
    engine = InferenceEngine(loaded.engine.model, max_context=CONTEXT + 1)
    (of_first,) = engine.score_spans_ids([first])
    assert long < of_first.total < 0
    assert model.loglikelihood(instances(("", "abc")), disable_tqdm=True)[0][0] == pytest.approx(
        short, abs=1e-4
    )


def test_answers_are_those_of_the_engine(loaded: LoadedModel, model: HarnessModel) -> None:
    texts = ["add b to c:", "so", "bee"]
    sampled = {"temperature": 9.0, "do_sample": True, "max_gen_toks": 20}
    asked = [*((text, {"max_gen_toks": 20}) for text in texts), *(("add b to c:", sampled),) * 3]
    found = model.generate_until(instances(*asked), disable_tqdm=True)
    answers = loaded.engine.generate(
        [("direct", text) for text in texts], loaded.prompt_format, max_new_tokens=20
    )
    assert found[:3] == [each.text for each in sorted(answers, key=lambda each: each.index)]
    assert len(set(found[3:])) == 3  # repeats are drawn each for itself
    assert found == model.generate_until(instances(*asked), disable_tqdm=True)
    stop = max(found, key=len)[-3:]
    stopped = [(text, {**settings, "until": [stop, ""]}) for text, settings in asked]
    cut = [text.partition(stop)[0] for text in found]
    assert cut == model.generate_until(instances(*stopped), disable_tqdm=True) != found


def test_a_long_prompt_leaves_room_for_the_answer(
    loaded: LoadedModel, model: HarnessModel, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "ab" * CONTEXT
    (found,) = model.generate_until(instances((text, {"max_gen_toks": 9})), disable_tqdm=True)
    kept = loaded.prompt_format.encode_prompt("direct", text)[-(CONTEXT - 9) :]
    (answer,) = loaded.engine.generate_ids(
        [kept], stop_ids=[loaded.prompt_format.eoa_id], max_new_tokens=9
    )
    assert found == loaded.prompt_format.decode(answer.token_ids)
    assert "generate_until: 1 of 1 contexts" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"fills the context of 64 tokens.*max_gen_toks=16"):
        model.generate_until(instances(("so", {})), disable_tqdm=True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Generation((), 256, Sampling())),
        ({"until": "\n", "max_tokens": "7"}, Generation(("\n",), 7, Sampling())),
        ({"do_sample": False, "temperature": 0.7}, Generation((), 256, Sampling())),
        (
            {"temperature": 0.7, "top_k": 0, "top_p": 0.9},
            Generation((), 256, Sampling(temperature=0.7, top_p=0.9)),
        ),
        ({"max_gen_toks": 3, "max_new_tokens": 9}, Generation((), 3, Sampling())),
    ],
)
def test_settings_mean_what_they_mean_to_hf(settings: dict[str, Any], expected: Generation) -> None:
    assert read_generation(settings) == expected


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_beams": 4}, "num_beams.*known are"),
        ({"do_sample": True}, "temperature 0"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_generation(settings)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "pip install -r requirements-eval.txt"),
        (["--gen_kwargs", "max_gen_toks"], "key=value"),
        (["--gen_kwargs", "num_beams=2"], "num_beams"),
        (["--output", "nowhere/at/all.json"], "nowhere/at/all.json must be a file"),
        (["contition=direct"], "did you mean condition?"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as ended:
        lm_eval_adapter.main(["ckpt_path=nowhere", "--tasks", "arc_easy", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert told in error


def test_an_unknown_task_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = SimpleNamespace(all_tasks=["arc_easy", "boolq"], match_tasks=lambda names: [])
    package = SimpleNamespace(TaskManager=lambda include_path: manager)
    monkeypatch.setattr(lm_eval_adapter, "harness_package", lambda name: package)
    with pytest.raises(SystemExit):
        lm_eval_adapter.main(["ckpt_path=nowhere", "--tasks", "arc_esay"])
    assert "did you mean arc_easy?" in capsys.readouterr().err
