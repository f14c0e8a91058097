"""The model card: what it tells, and that the hub reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from export_cases import exported, greedy, loaded, write_run
from huggingface_hub import ModelCard
from net_cases import NETS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("hf") / "run")


@pytest.fixture(scope="module")
def folder(run: Path) -> Path:
    """Its export, for tests that only read it."""
    return exported(run, run.parent / "out", is_compared=False)


def test_the_model_card_is_one_that_the_hub_reads(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    results = copy / "results" / "one"
    results.mkdir(parents=True)
    (results / "results.json").write_text(json.dumps({"results": {"GSM8k": {"acc": 0.5}}}))
    (copy / "results" / "broken").mkdir()
    (copy / "results" / "broken" / "results.json").write_text("{")
    (copy / "metrics.jsonl").write_text(
        '{"step": 5, "tokens": 1000, "train/loss": 1.0, "bp_steps": 2}\n'
        '{"step": 9, "tokens": 3000, "train/loss": 1.0, "bp_steps": 5}\n{"step'
    )
    card = ModelCard.load(exported(copy, tmp_path / "my model", is_compared=False) / "README.md")
    front: Any = card.data
    assert front.library_name == "transformers"
    assert front.pipeline_tag == "text-generation"
    (result,) = front.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("GSM8k", "acc", 0.5)
    net, head = NETS["hrm"], 6 * 32 * 512
    stack = net.stacks()["L_module"].num_parameters
    flops = 1000 * (head + stack * (16 + 4 * 2)) + 2000 * (head + stack * (16 + 4 * 5))
    for text in (
        *("# my model", "| GSM8k | acc | 0.5 |", "| steps | 40 |", "| tokens | 1,234 |"),
        *("| weights | EMA, float32 |", "`numbers`", f"| FLOPs | {flops:.3g} "),
        *("not aligned", "`token_type_ids`", "transformers>=5.9.0", "arXiv:2605.20613"),
        *(r"| `cot` | `<\|object_ref_end\|>` |", "cannot be said"),
    ):
        assert text in card.text, text


def test_the_snippet_of_the_card_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder.parent)
    exec(compile(snippet, "README.md", "exec"), {})  # noqa: S102 -- what a reader would run
    source = loaded(folder)
    (answer,) = greedy(source, ["What is 7 times 6?"])
    assert capsys.readouterr().out == source.prompt_format.decode(answer) + "\n"
