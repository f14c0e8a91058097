"""CORE from bundle to figures: packed scores as one full forward pass each, figures by hand."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking_cases import MAX_CONTEXT, prompt_format, write_run
from core_cases import LM, MC, SCHEMA, encoded, write_bundle

from data_io.byte_tokenizer import byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from evaluation.benchmarks.protocol import Item
from evaluation.core.cache import PromptCache, tokenizer_fingerprint
from evaluation.core.engine import ScoringEngine
from evaluation.core.main import main, means_of
from evaluation.core.prompts import PrefixKind, cropped
from evaluation.core.task import CoreTask, measured
from inference.model_folder import ModelOptions
from inference.requests import Score, Span
from models.batch import PackedLayout
from models.language_model import LanguageModel


def judged(task: CoreTask, truth: Any, *scores: Score | None) -> tuple[Any, float, bool]:
    answer = measured(scores, is_text=task.task.icl_task_type == "language_modeling")
    verdict = task.judge(Item("x", "prompt", truth), answer)
    return verdict.extracted, verdict.correct, verdict.invalid


def test_the_lowest_mean_loss_is_chosen() -> None:
    task = CoreTask(task=MC, baseline=25, bundle=Path("x"))
    # Means of 2.0, 1.5 and 1.75: by their sums the first would win.
    scores = [
        Score(0, (-2.0,), is_greedy=False),
        Score(1, (-1.0, -2.0), is_greedy=False),
        Score(2, (-1.0, -2.5), is_greedy=True),
    ]
    assert judged(task, 1, *scores) == (1, 1.0, False)
    assert judged(task, 0, *scores) == (1, 0.0, False)
    assert judged(task, 0, None, *scores[1:]) == (1, 0.0, True)
    assert judged(task, 0, scores[0], scores[0]) == (0, 1.0, False)  # of equal ones the first
    assert task.judge(Item("x", "p", 0), "").invalid
    nan = Score(0, (float("nan"),), is_greedy=False)
    assert judged(task, 0, nan, scores[0]) == (1, 0.0, True)
    text = CoreTask(task=LM, baseline=0, bundle=Path("x"))
    assert judged(text, "likeliest", Score(0, (-0.1, -0.1), is_greedy=True))[1] == 1.0
    assert judged(text, "likeliest", Score(0, (-0.1, -0.1), is_greedy=False))[1] == 0.0


def test_figures_take_guessing_out() -> None:
    task = CoreTask(task=MC, baseline=25, bundle=Path("x"))
    items = [Item(f"{at}", "p", 0) for at in range(4)]
    right, wrong = '{"losses": [1, 2]}', '{"losses": [2, 1]}'
    verdicts = [task.judge(item, right) for item in items[:3]] + [task.judge(items[3], wrong)]
    figures = task.figures(items, verdicts)
    assert figures.published == {
        "n": 4,
        "acc": 0.75,
        "invalid": 0,
        "centred": pytest.approx(2 / 3),  # (0.75 - 0.25) / (1 - 0.25)
    }
    assert figures.standard_errors["acc"] == pytest.approx(0.25)  # sqrt(.75 * .25 / 3)
    assert figures.standard_errors["centred"] == pytest.approx(1 / 3)
    assert task.chance(items) == 0.25


def record(centred: float, error: float, benchmark: str = "CORE", **generation: Any) -> dict:
    return {
        "benchmark": benchmark,
        "published": {"centred": centred},
        "standard_errors": {"centred": error},
        "settings": {},
        "generation": generation,
    }


def test_core_is_the_mean_of_tasks_that_were_asked_alike() -> None:
    records = {
        "a": record(0.5, 0.03, prefix="bos"),
        "b": record(-0.1, 0.04, prefix="bos"),
        "c": record(0.9, 0.1, prefix="prompt", condition="direct"),
        "d": record(0.2, 0.0, "ChatMMLU", condition="direct"),
    }
    means = means_of(records)
    assert means["CORE"]["value"] == pytest.approx(0.2)
    assert means["CORE"]["standard_error"] == pytest.approx(0.025)
    assert means["CORE"]["tasks"] == ["a", "b"]
    assert "2 tasks, prefix=bos; 1 that were asked otherwise" in means["CORE"]["of"]
    assert means["chat"]["value"] == 0.2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@torch.no_grad()
def by_itself(model: LanguageModel, span: Span) -> tuple[float, bool]:
    """Mean loss and greediness of a span by one whole forward pass of nothing else."""
    tokens, prefix = torch.tensor(span.token_ids), span.num_prefix_tokens
    layout = PackedLayout.from_lengths(
        torch.tensor([prefix]), torch.tensor([len(tokens) - prefix]), num_slots=1
    )
    logits = model.logits(model(tokens, torch.arange(len(tokens)), layout))
    before, target = logits[span.start - 1 : -1], tokens[span.start :]
    loss = torch.nn.functional.cross_entropy(before, target)
    return float(loss), bool((before.argmax(-1) == target).all())


def by_hand(engine: ScoringEngine, task: CoreTask, kind: PrefixKind) -> list[tuple[list, bool]]:
    """Of each row: the loss of each option, and whether the first is greedy."""
    found = []
    for row in task.rows():
        spans = [
            cropped(span, MAX_CONTEXT, 1 if kind == "bos" else 2)
            for span in encoded(row, kind).spans
        ]
        alone = [by_itself(engine._opened.model, span) for span in spans if span]
        found.append(([loss for loss, _ in alone], alone[0][1]))
    return found


@pytest.mark.parametrize("prefix", ["bos", "prompt"])
def test_packed_rows_score_as_one_by_one(
    run: Path, bundle: Path, tmp_path: Path, prefix: PrefixKind, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results"
    arguments = [f"ckpt_path={run}", f"bundle={bundle}", f"prefix={prefix}", "device=cpu"]
    main([*arguments, f"output={output}"])
    printed = capsys.readouterr().out
    assert f"raw text is given with prefix={prefix}" in printed
    lines = [json.loads(line) for line in (output / "items.jsonl").read_text().splitlines()]
    results = json.loads((output / "results.json").read_text())
    engine = ScoringEngine(ModelOptions(ckpt_path=run, device="cpu"), {})
    centred = []
    for entry, chance in ((MC, 0.25), (SCHEMA, 0.5), (LM, 0.0)):
        task = CoreTask(task=entry, baseline=100 * chance, bundle=bundle)
        longest = max(len(span.token_ids) for row in task.rows() for span in encoded(row).spans)
        assert (longest > MAX_CONTEXT) == (entry is MC)  # these are cropped
        own = [line for line in lines if line["benchmark"] == entry.label]
        right = []
        for line, row, (losses, is_greedy) in zip(
            own, task.rows(), by_hand(engine, task, prefix), strict=True
        ):
            answer = json.loads(line["answer"])
            assert answer["losses"] == pytest.approx(losses, abs=1e-5)
            is_right = is_greedy if entry is LM else losses.index(min(losses)) == row.example.gold
            assert line["correct"] == is_right
            right.append(is_right)
        figures = results["benchmarks"][entry.label]["published"]
        assert figures["acc"] == sum(right) / len(right)
        assert figures["centred"] == pytest.approx((figures["acc"] - chance) / (1 - chance))
        centred.append(figures["centred"])
    assert results["means"]["CORE"]["value"] == pytest.approx(sum(centred) / 3)
    assert f"CORE {sum(centred) / 3:.4f}" in printed


def test_a_task_on_record_is_kept_and_prompts_are_tokenized_once(
    run: Path,
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [f"ckpt_path={run}", f"bundle={bundle}", "device=cpu"]
    main([*arguments, "tasks=[endings]", f"output={tmp_path}/one"])
    assert "its data is not here to tell" in capsys.readouterr().out
    main([*arguments, f"output={tmp_path}/one"])
    assert "endings: is on record already" in capsys.readouterr().out
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert set(results["benchmarks"]) == {"colours", "pronouns", "endings"}
    assert results["unfinished"] == []
    kept = sorted(path.name for path in (bundle / ".prompts").iterdir())
    assert len(kept) == 9
    assert all(name.endswith((".npy", ".json")) for name in kept)

    def refuse(*_: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr("evaluation.core.engine.encode_rows", refuse)
    main([*arguments, f"output={tmp_path}/two"])
    first, second = (tmp_path / name / "items.jsonl" for name in ("one", "two"))
    assert sorted(first.read_text().splitlines()) == sorted(second.read_text().splitlines())


def test_a_task_goes_on_where_it_was_stopped(
    run: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [f"ckpt_path={run}", f"bundle={bundle}", "device=cpu"]
    main([*arguments, f"output={tmp_path}/whole"])
    answer, asked = ScoringEngine.answer, list[int]()

    def stopped(self: ScoringEngine, source: Any, kind: Any) -> Any:
        for number, answered in enumerate(answer(self, source, kind)):
            if number == 7 and not asked:  # within the second task
                raise KeyboardInterrupt
            yield answered

    monkeypatch.setattr(ScoringEngine, "answer", stopped)
    with pytest.raises(SystemExit) as left:
        main([*arguments, f"output={tmp_path}/parts"])
    assert left.value.code == 130

    def counted(self: ScoringEngine, source: Any, kind: Any) -> Any:
        for answered in answer(self, source, kind):
            asked.append(answered.key)
            yield answered

    monkeypatch.setattr(ScoringEngine, "answer", counted)
    main([*arguments, f"output={tmp_path}/parts"])
    assert len(asked) == 12 - 7
    lines = [(tmp_path / name / "items.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1]


def test_the_cache_knows_tokenizer_and_task_and_survives_damage(tmp_path: Path) -> None:
    told: list[str] = []
    made: list[str] = []

    def make() -> list[array]:
        made.append("made")
        return [array("i", [1, 2, 3]), array("i", [4])]

    cache = PromptCache(tmp_path, "one", told.append)
    expected = [array("i", [1, 2, 3]), array("i", [4])]
    assert cache.prompts("a/b", {"task": 1}, make) == expected
    assert cache.prompts("a/b", {"task": 1}, make) == expected
    assert made == ["made"]
    cache.prompts("a/b", {"task": 2}, make)
    PromptCache(tmp_path, "another", told.append).prompts("a/b", {"task": 1}, make)
    assert len(made) == 3
    assert not told
    for path in tmp_path.glob("*.ids.npy"):
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)  # a pickle
    assert cache.prompts("a/b", {"task": 1}, make) == expected
    assert len(made) == 4
    assert "is not whole" in told[0]
    (tmp_path / "file").write_text("")
    assert (
        PromptCache(tmp_path / "file" / "x", "one", told.append).prompts("a", {}, make) == expected
    )
    assert "give cache_dir=DIR" in told[-1]


def test_tokenizers_have_different_fingerprints() -> None:
    one = prompt_format()
    other = PromptFormat(byte_tokenizer(), BOQ, EOA, EOQ, dict(CONDITION_TOKENS))
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(prompt_format())
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)


@pytest.mark.parametrize(("longest", "kind"), [(1, "bos"), (7, "prompt")])
def test_the_prefix_is_that_of_the_training_data(tmp_path: Path, longest: int, kind: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "epoch_0").mkdir()
    np.save(run / "epoch_0" / "inst_len.npy", np.array([1, longest, 1]))
    assert ScoringEngine(ModelOptions(ckpt_path=run, device="cpu"), {}).trained_prefix()[0] == kind


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give bundle=DIR for CORE"),
        (["bundle=nowhere"], "nowhere is no folder"),
        (["bundle=BUNDLE", "tasks=[colors]"], "'colors' is no task"),
        (["tasks=[colours]", "chat=[MMLU]"], "are of a bundle"),
        (["bundle=BUNDLE", "prefix=none"], "prefix=none"),
        (["bundle=BUNDLE", "prefix=prompt", "condition=cto"], "unknown names ['cto']"),
        (["bundle=BUNDLE", "max_per_task=1"], "colours has 1 rows"),
        (["chat=[MMUL]"], "did you mean MMLU?"),
    ],
)
def test_bad_input_is_one_line(
    run: Path, bundle: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [each.replace("BUNDLE", str(bundle)) for each in arguments]
    with pytest.raises(SystemExit) as left:
        main([f"ckpt_path={run}", "device=cpu", *given])
    assert left.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert told in message
    assert not (run / "results").exists()
