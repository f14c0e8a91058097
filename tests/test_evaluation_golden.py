"""The benchmarks against golden prompts, verdicts and figures on invented data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evaluation.benchmarks import BENCHMARKS
from evaluation.benchmarks.protocol import (
    Benchmark,
    DataSource,
    Item,
    Loaded,
    Row,
    Split,
    Verdict,
    judge_all,
)
from evaluation.mirror import LocalMirror
from evaluation.scoring import Tally, last_box, macro_average
from evaluation.settings import BenchmarkPlan, read_settings
from evaluation.verifier_worker import MAX_SHOWN

ENGINES = ("SimpleEngine", "VLLMEngine", "FakeEngine")
# Refused by the original; here a single name is a list of one, and a template is plain text.
ACCEPTED_HERE = ("run_only=", "generation_config.prompt_template=")


Case = Mapping[str, Any]


@dataclass(frozen=True)
class Replaced:
    """A data source of which some splits hold other rows."""

    source: DataSource
    rows_by_split: Mapping[str, Sequence[Row]]

    def rows(self, split: Split, *, benchmark: str) -> Iterator[Row]:
        if str(split) in self.rows_by_split:
            return iter(self.rows_by_split[str(split)])
        return self.source.rows(split, benchmark=benchmark)


def benchmark_of(case: Case, **settings: Any) -> Benchmark:
    return BENCHMARKS[case["benchmark"]].model_validate(case["settings"] | settings)


def without_marker(case: Case, prompts: Sequence[str]) -> list[str]:
    """The mirror has no train split of DROP, so its shots, a marker in the case, are left out."""
    return [prompt.replace(case.get("marker", "\0"), "") for prompt in prompts]


def truth_of(item: Item) -> Any:
    """An item's truth as the case writes it."""
    if isinstance(item.truth, list):
        return item.truth
    if not item.letters:
        return item.truth
    truth = {"valid_set": list(item.letters), "gold": item.truth}
    return truth | ({"subject": item.category} if item.category else {})


def truths_of(case: Case, loaded: Loaded, benchmark: Benchmark) -> list[Any]:
    if case["benchmark"] == "MMLUPro":
        return [[item.truth, list(item.letters), item.category] for item in loaded.items]
    samples = getattr(benchmark, "n", 1)
    return [truth_of(item) for item in loaded.items[::samples]]


def expected_truths(case: Case) -> list[Any]:
    return [
        truth["answers"] if isinstance(truth, dict) and "answers" in truth else truth
        for truth in case["ground_truths"]
    ]


def check_prompts_and_truths(case: Case, source: DataSource) -> None:
    benchmark = benchmark_of(case)
    loaded = benchmark.load(source)
    assert [item.prompt for item in loaded.items] == without_marker(case, case["prompts"])
    assert truths_of(case, loaded, benchmark) == expected_truths(case)
    assert len({item.id for item in loaded.items}) == len(loaded.items)
    assert dict(benchmark.generation) == case["generation_overrides"]
    for other in case["other_settings"]:
        asked = BENCHMARKS[case["benchmark"]].model_validate(other["settings"])
        items = asked.load(source).items
        assert [item.prompt for item in items] == without_marker(case, other["prompts"])


def check_defaults(case: Case, source: DataSource) -> None:
    defaults = BENCHMARKS[case["benchmark"]]().model_dump(mode="json")
    assert defaults == case["constructor_defaults"]


def check_figures_and_verdicts(case: Case, source: DataSource) -> None:
    for scored in case["scored"]:
        overrides = {key: scored[key] for key in ("n", "pass_k") if key in scored}
        benchmark = benchmark_of(case, **overrides)
        items = benchmark.load(source).items
        # an engine gives one answer per prompt; the original drops what is beyond
        answers = scored["generations"][: len(items)]
        verdicts = judge_all(benchmark, items, answers)
        figures = benchmark.figures(items, verdicts)
        assert figures.published == pytest.approx(scored["metrics"], abs=1e-9), scored["name"]
        for expected, verdict in zip(scored["items"], verdicts, strict=False):
            if "per_generation" not in expected:
                require_verdict(expected, verdict, answers[expected["index"]])
        if "n" in overrides:
            require_votes(scored["items"], verdicts, overrides["n"])


def require_verdict(expected: Mapping[str, Any], verdict: Verdict, answer: str) -> None:
    assert verdict.problem is None
    found = {
        "extracted": verdict.extracted,
        "scored_text": verdict.extracted,
        "boxed": last_box(answer),
        "invalid": verdict.invalid,
        "correct": verdict.correct == 1,
        "credit": pytest.approx(verdict.correct, abs=1e-9),
        **verdict.detail,
    }
    shown = {key: value for key, value in expected.items() if key in found}
    assert len(shown) >= 3, expected
    for key in ("parsed", "gold_parsed"):
        if key in shown:
            shown[key] = [part[:MAX_SHOWN] for part in shown[key]]
    assert {key: found[key] for key in shown} == shown, answer


def require_votes(
    expected: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict], n: int
) -> None:
    for problem, poll in enumerate(expected):
        answered = verdicts[problem * n : (problem + 1) * n]
        assert len(answered) == len(poll["per_generation"])
        assert [each.extracted for each in answered if not each.invalid] == poll["votes"]
        assert sum(each.correct == 1 for each in answered) == poll["correct_count"]
        for verdict, each in zip(answered, poll["per_generation"], strict=True):
            assert verdict.extracted == each["vote"]
            assert (verdict.correct == 1) == each["pass_correct"]
            assert verdict.detail["parsed"] == [part[:MAX_SHOWN] for part in each["parsed"]]


def check_pairs_of_mathematics(case: Case, source: DataSource) -> None:
    benchmark = benchmark_of(case)
    items = benchmark.load(source).items
    for pair in case["pairs"]:
        item = items[pair["index"]]
        assert item.truth == pair["gold"]
        require_verdict(pair, benchmark.judge(item, pair["generation"]), pair["generation"])


def outcome(case: Case, odd: Mapping[str, Any], source: DataSource) -> dict[str, Any]:
    """What becomes of one odd input: prompts and truths, or figures."""
    benchmark = benchmark_of(case, **odd.get("settings", {}))
    replaced = dict(odd.get("rows_replacing_split", {}))
    if "rows" in odd:
        replaced[str(benchmark.splits()[0])] = odd["rows"]
    loaded = benchmark.load(Replaced(source, replaced))
    if odd["stage"] == "construct":
        shown = len(odd.get("prompts", ()))
        return {
            "prompts": [item.prompt for item in loaded.items[:shown]],
            "ground_truths": truths_of(case, loaded, benchmark)[:shown],
        }
    verdicts = judge_all(benchmark, loaded.items, odd["generations"])
    return {"metrics": benchmark.figures(loaded.items, verdicts).published}


def check_refusals(case: Case, source: DataSource) -> None:
    for refused in case["reference_raises"]:
        with pytest.raises(ValueError, match=r"\w+ .*\w+"):
            outcome(case, refused, source)


def check_oddities_are_the_same_or_refused(case: Case, source: DataSource) -> None:
    """What the original lets pass with figures of no meaning may be refused, not answered anew."""
    for odd in case.get("odd_but_accepted", []):
        try:
            found = outcome(case, odd, source)
        except ValueError:
            continue
        assert found == {key: odd[key] for key in found}, odd["what"]


def check_boxes(case: Case, source: DataSource) -> None:
    for pair in case["last_boxed_only_string"]:
        assert last_box(pair["in"]) == pair["out"], pair["in"]


def check_averages(case: Case, source: DataSource) -> None:
    for pair in case["compute_benchmark_micro_macro_avg"]:
        strata = {
            name: Tally((each["correct"] / max(1, each["n"]),) * each["n"], each["invalid"])
            for name, each in pair["in"].items()
        }
        assert macro_average(strata) == pytest.approx(pair["out"], abs=1e-9)


def check_merging_of_settings(case: Case, source: DataSource) -> None:
    for merged in case["cases"]:
        settings = read_settings(merged["config_yaml"], merged["cli"], engines=ENGINES)
        assert settings.engine_settings == merged["engine_kwargs"]
        built = [
            {
                "name": plan.benchmark.name,
                "constructor_kwargs": plan.benchmark.model_dump(mode="json", exclude_unset=True),
            }
            for plan in settings.plans
        ]
        assert built == merged["built"]
        for group, expected in zip(settings.groups(), merged["groups"], strict=True):
            require_group(group, expected, case, source)
        labels = [plan.label for plan in settings.plans]
        assert len(set(labels)) == len(labels)


def require_group(
    plans: Sequence[BenchmarkPlan],
    expected: Mapping[str, Any],
    case: Case,
    source: DataSource,
) -> None:
    """The prompts of a group, and the figures of the answers that its fake engine gave."""
    assert all(plan.generation == expected["generation_kwargs"] for plan in plans)
    outputs, prompts = list(expected["outputs"]), without_marker(case, expected["prompts"])
    for plan, scored in zip(plans, expected["benchmarks"], strict=True):
        items = plan.benchmark.load(source).items
        assert plan.benchmark.name == scored["name"]
        assert len(items) == scored["n_generations"]
        assert [plan.prompt_of(item.prompt) for item in items] == prompts[: len(items)]
        verdicts = judge_all(plan.benchmark, items, outputs[: len(items)])
        published = plan.benchmark.figures(items, verdicts).published
        assert published == pytest.approx(scored["metrics"], abs=1e-9)
        del outputs[: len(items)], prompts[: len(items)]
    assert not outputs


def check_settings_that_are_refused(case: Case, source: DataSource) -> None:
    for refused in case["reference_raises"]:
        last_words = [word for word in refused["cli"] if word.startswith(ACCEPTED_HERE)]
        is_text = any(word.partition("=")[2].strip("[]") for word in last_words)
        if is_text and accepted(refused):
            continue
        with pytest.raises(ValueError, match=r"\w+"):
            read_settings(refused["config_yaml"], refused["cli"], engines=ENGINES)


def accepted(refused: Mapping[str, Any]) -> bool:
    """Whether the original only stumbled over the spelling of a name or a template."""
    stumbles = ("Input should be a valid list", "'list' object has no attribute")
    return any(stumble in refused["reference_raises"] for stumble in stumbles)


# what marks a case of its sort -> what it pins
CHECKS = {
    "constructor_defaults": [check_defaults],
    "prompts": [check_prompts_and_truths],
    "scored": [check_figures_and_verdicts],
    "pairs": [check_pairs_of_mathematics],
    "ground_truths": [check_refusals, check_oddities_are_the_same_or_refused],
    "last_boxed_only_string": [check_boxes],
    "compute_benchmark_micro_macro_avg": [check_averages],
    "fake_engine_rule": [check_merging_of_settings, check_settings_that_are_refused],
}


def test_golden_cases_hold(golden_evaluation: Path) -> None:
    case = json.loads((golden_evaluation / "case.json").read_text())
    checks = [check for key, each in CHECKS.items() if key in case for check in each]
    if not checks and any("engine" in each for each in case.get("cases", [])):
        pytest.skip("what engines hand to their back ends: for the tests of the engines")
    assert checks, "a case of a sort that no check knows"
    for check in checks:
        check(case, LocalMirror(golden_evaluation.parent / "data"))
