"""scripts/chat_web.py: what the page shows, without gradio; and the page itself where it is."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from asking_cases import MAX_CONTEXT, Program, Scripted, prompt_format, write_run

from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from inference.cycle_view import (
    DAY,
    END,
    MEANING,
    SHOWN_TOKENS,
    STYLE,
    CycleTable,
    colours,
    cycles_html,
    token_text,
)
from inference.depth import depth_of
from scripts import chat_web
from scripts.chat_web import Settings, engine_at, respond
from simple_inference_engine import InferenceEngine, LoadedModel, ModelOptions, Sampling, load_model

ROOT = Path(__file__).parent.parent
NEEDS_GRADIO = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None,
    reason="gradio is not installed (requirements-chat.txt)",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def loaded(run: Path) -> LoadedModel:
    return load_model(ModelOptions(ckpt_path=run))


def settings(**changes: Any) -> Settings:
    usual = Settings("direct", Sampling(), 12, False, {"H_cycles": 2, "L_cycles": 3})
    return replace(usual, **changes)


def test_an_answer_grows_and_ends_with_its_cycles(loaded: LoadedModel) -> None:
    shown = list(respond(loaded, settings(), "abc", []))
    (expected,) = loaded.engine.generate(
        [("direct", "abc")], loaded.prompt_format, max_new_tokens=12
    )
    texts = [each.text for each in shown]
    assert texts[:-1] == [expected.text[: at + 1] for at in range(len(expected.text))]
    assert texts[-1] == expected.text
    assert [each.cycles is None for each in shown] == [True] * (len(shown) - 1) + [False]
    assert shown[-1].cycles is not None and MEANING in shown[-1].cycles


def test_each_control_reaches_the_request(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, engines = Scripted.saying("ok"), list[InferenceEngine]()

    def stream(engine: InferenceEngine, requests: Any) -> Iterator[Any]:
        engines.append(engine)
        return said(engine, requests)

    monkeypatch.setattr(InferenceEngine, "stream", stream)
    options = chat_web.WebOptions(ckpt_path=Path("run"), max_output_tokens=9, top_k=4)
    values = (["synth", "cot"], 7, 0.5, 0.9, 1, 2, True)
    chosen = chat_web.settings_of(options, ["H_cycles", "L_cycles"], values)
    turns = [("user", "a"), ("assistant", "b")]
    list(respond(loaded, chosen, "c", turns))
    list(respond(loaded, replace(chosen, with_history=False), "c", turns))
    (request, _), (engine, _) = said.requests, engines
    assert request.sampling == Sampling(0.5, 4, 0.9, 7) and request.max_new_tokens == 9
    assert depth_of(engine.model.config) == {"H_cycles": 1, "L_cycles": 2}
    conditions = CONDITION_TOKENS["synth"] + CONDITION_TOKENS["cot"]
    alone = f"{BOQ}{conditions}c{EOQ}"
    assert said.prompts() == [f"{BOQ}{conditions}a{EOQ}b{EOA}{alone}", alone]


def test_another_depth_shares_the_weights(loaded: LoadedModel) -> None:
    assert engine_at(loaded.engine, {"H_cycles": 2, "L_cycles": 3}) is loaded.engine
    other = engine_at(loaded.engine, {"H_cycles": 3, "L_cycles": 3})
    assert other.max_context == loaded.engine.max_context
    here, there = other.model.lm_head.weight, loaded.engine.model.lm_head.weight
    assert here.data_ptr() == there.data_ptr()


@pytest.mark.parametrize(
    ("text", "changes", "told"),
    [
        ("x" * MAX_CONTEXT, {}, "shorten the prompt"),
        (" ", {}, "there is no question"),
        ("a", {"condition": ""}, "unknown names"),
        ("a", {"depth": {"H_cycles": 0}}, "H_cycles=0"),
    ],
)
def test_bad_input_is_refused(
    loaded: LoadedModel, text: str, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        list(respond(loaded, settings(**changes), text, []))


def test_messages_keep_text_that_looks_like_tags() -> None:
    text = "<b>&amp; \n<|im_end|> 'x'"
    written = chat_web.message("user", text)
    assert "<" not in written["content"]
    in_parts = {"role": "user", "content": [{"type": "text", "text": written["content"]}]}
    assert chat_web.turns_of([written, in_parts]) == [("user", text)] * 2


def table_of(loaded: LoadedModel, text: str, answer: str) -> CycleTable:
    form = loaded.prompt_format
    prompt_ids = form.encode_prompt("direct", text)
    inspection = loaded.engine.inspect_ids(prompt_ids, form.encode_response(answer))
    return CycleTable.of(inspection, form)


def test_the_table_holds_the_probabilities_of_the_model(loaded: LoadedModel) -> None:
    table = table_of(loaded, "abc", "de ")
    assert table.tokens == ("d", "e", "\u2423", END)
    assert [state for state in table.states if state[0] == "z_H"] == [("z_H", 1), ("z_H", 2)]
    assert len(table.states) == len(table.probabilities) == len(table.likely) == 8
    form = loaded.prompt_format
    pair = (form.encode_prompt("direct", "abc"), form.encode_response("de "))
    (score,) = loaded.engine.score_ids([pair])
    expected = torch.tensor(score.logprobs).exp()
    torch.testing.assert_close(torch.tensor(table.probabilities[-1]), expected)
    for chosen, likely in zip(table.probabilities, table.likely, strict=True):
        for token, probability, top in zip(table.tokens, chosen, likely, strict=True):
            assert [each for _, each in top] == sorted((each for _, each in top), reverse=True)
            assert dict(top).get(token, probability) == pytest.approx(probability)
            assert probability <= top[0][1] + 1e-6


def test_the_least_certain_token_is_shown_first() -> None:
    likely = [[[("a", 0.5)]] * 3] * 2
    table = CycleTable(
        ("a", "b", "c"), (("z", 1), ("z", 2)), [[0.9, 0.2, 1], [1, 0.9, 1]], likely, 0
    )
    assert table.least_certain() == 1
    assert re.findall(r'id="token-(\d)" checked', cycles_html(table)) == ["1"]
    assert table.mean(0) == pytest.approx(0.7)


def test_the_page_has_a_cell_for_each_token_and_state(loaded: LoadedModel) -> None:
    html = cycles_html(table_of(loaded, "abc", "de"))
    assert html.count('class="cell') == 8 * 3
    assert html.count('class="panel ') == 3
    assert html.count("z_H_2<") == 1 + 3
    for tag in ("div", "span", "label", "p", "h3", "h4", "i"):
        assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>"), tag


def test_what_a_model_says_is_no_markup() -> None:
    evil = "<img src=x onerror=alert(1)>\"'"
    html = cycles_html(CycleTable((evil,), ((evil, 1),), [[0.5]], [[[(evil, 0.5)]]], 0))
    assert "<img" not in html and "&lt;img" in html


def test_a_long_answer_is_cut_and_said_to_be(loaded: LoadedModel) -> None:
    table = table_of(loaded, "a", "b" * (SHOWN_TOKENS + 5))
    assert (len(table.tokens), table.num_left_out) == (SHOWN_TOKENS, 6)
    assert "6 more tokens are not shown" in cycles_html(table)
    inspection = loaded.engine.inspect_ids([1, 2])
    with pytest.raises(ValueError, match="no answer to look at"):
        CycleTable.of(inspection, loaded.prompt_format)


def test_tokens_are_shown_in_a_narrow_cell() -> None:
    form = prompt_format()
    shown = [token_text(form, token_id) for token_id in form.encode_response("a \n\té")]
    assert shown == ["a", "\u2423", "\u21b5", "\u21e5", "Ã", "©", END]
    assert token_text(form, form.boq_id) == BOQ
    assert token_text(form, 500) == "#500"


def test_colours_go_from_one_end_of_the_scale_to_the_other() -> None:
    for probability, colour in ((0.0, DAY[0]), (1.0, DAY[-1]), (0.25, DAY[1]), (1.1, DAY[-1])):
        assert f"--day: rgb{colour};" in colours(probability)
    assert ".cycles .cell {background: var(--day)" in STYLE


def test_without_gradio_the_command_that_installs_it_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = Program(chat_web.main, monkeypatch, capsys, (f"ckpt_path={run}",))()
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and chat_web.INSTALL in done.stderr


@pytest.fixture
def address(run: Path, tmp_path: Path) -> Iterator[str]:
    """Where a page of the tiny run is served."""
    command = [sys.executable, str(ROOT / "scripts/chat_web.py"), f"ckpt_path={run}", "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=tmp_path, text=True) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        found = next((line.split()[1] for line in lines if line.startswith("open http")), None)
        try:
            assert found is not None
            yield found
        finally:
            process.kill()


@pytest.mark.slow
@NEEDS_GRADIO
def test_the_page_answers(address: str, loaded: LoadedModel) -> None:
    from gradio_client import Client

    client = Client(address, verbose=False)
    controls = (["direct"], 0, 0, 1, 2, 3, False)
    messages, text, note, cycles = client.predict("abc", [], *controls, api_name="/ask")
    (expected,) = loaded.engine.generate([("direct", "abc")], loaded.prompt_format)
    assert chat_web.turns_of(messages) == [("user", "abc"), ("assistant", expected.text)]
    assert text == "" and "error" not in note and 'class="cell' in str(cycles)
    _, text, note, _ = client.predict("x" * MAX_CONTEXT, [], *controls, api_name="/ask")
    assert text == "x" * MAX_CONTEXT and "shorten the prompt" in note
