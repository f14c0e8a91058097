"""Our adapter against lm-eval's own `hf` model on the same weights, exported with code."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import asking_cases
import export_cases
import pytest
from harness_cases import write_tasks

from evaluation import lm_eval_adapter
from evaluation.lm_eval_adapter import AdapterOptions, harness_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("lm_eval", "accelerate")),
        reason="lm-eval with its hf model is not installed (requirements-eval.txt)",
    ),
]
TASKS = ["mine_choice", "mine_begun", "mine_answer", "mine_text"]


def bytes_run(folder: Path) -> Path:
    """Its answers are letters, and end."""
    return asking_cases.write_run(folder)


def words_run(folder: Path) -> Path:
    """Spaces belong to the words after them."""
    return export_cases.write_run(folder, tokenizer=export_cases.bpe_tokenizer())


def samples(model: Any, tasks: Path, **settings: Any) -> dict[str, list[Any]]:
    """What the model said, by task: in the order of the items."""
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    results = lm_eval.simple_evaluate(
        model=model,
        tasks=TASKS,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **settings,
    )
    return {
        name: [
            said
            for each in sorted(items, key=lambda each: each["doc_id"])
            for said, *_ in each["resps"]
        ]
        for name, items in results["samples"].items()
    }


@pytest.mark.parametrize("write_run", [bytes_run, words_run])
def test_numbers_are_those_of_hf(write_run: Any, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    run = write_run(tmp_path / "run")
    folder = export_cases.exported(run, tmp_path / "out", "--with_code", is_compared=False)
    loaded = export_cases.loaded(run)
    ours = harness_model(loaded, "direct", AdapterOptions(ckpt_path=run))
    theirs = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", batch_size=4)
    tasks = write_tasks(tmp_path, loaded.engine.max_context)
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    for settings in ({**chat, "num_fewshot": 0}, {**chat, "num_fewshot": 1}):
        found, expected = samples(ours, tasks, **settings), samples(theirs, tasks, **settings)
        assert_same(found, expected)
    assert ours.num_cropped["loglikelihood"] > 0 < ours.num_cropped["generate_until"]
    plain = samples(ours, tasks, num_fewshot=0)  # a prompt of ours is framed without a template too
    expected = samples(theirs, tasks, **chat, num_fewshot=0)
    plain["mine_begun"] = expected["mine_begun"]  # here the beginning is part of the prompt
    assert_same(plain, expected)


def assert_same(found: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    for name in ("mine_choice", "mine_begun"):
        for (ours, ours_greedy), (theirs, theirs_greedy) in zip(
            found[name], expected[name], strict=True
        ):
            assert ours == pytest.approx(theirs, rel=0, abs=1e-4)
            assert ours_greedy == theirs_greedy
    assert found["mine_answer"] == expected["mine_answer"]
    assert any(found["mine_answer"])
    # Sums over hundreds of tokens, in float32 there.
    assert found["mine_text"] == pytest.approx(expected["mine_text"], rel=1e-6)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = bytes_run(tmp_path / "run")
    tasks = write_tasks(tmp_path, asking_cases.MAX_CONTEXT)
    arguments = ["--tasks", "mine_choice,mine_ans*", "--include_path", str(tasks), "--limit", "3"]
    output = tmp_path / "results.json"
    with export_cases.quick():
        lm_eval_adapter.main(
            [f"ckpt_path={run}", "device=cpu", *arguments, "--output", str(output)]
        )
    printed = capsys.readouterr().out
    assert "mine_choice" in printed and "exact_match" in printed and f"wrote {output}" in printed
    record = json.loads(output.read_text())
    assert record["condition"] == "direct" and record["n-samples"]["mine_choice"]["effective"] == 3
    assert set(record["results"]) == {"mine_choice", "mine_answer"}
