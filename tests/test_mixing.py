"""The mixture: rules as published, read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_io.mixing import EVERY_ROW_ONCE, Mixture, MixtureRule
from data_io.sample import PUBLISHED_MIXTURE

ROOT = Path(__file__).resolve().parents[1]
# formats.md: what the published mixture takes of whom
PUBLISHED = {
    "SYNTH__a": (20_000, 1),
    "flan__cot_x.jsonl": (None, 1),
    "flan__niv2.jsonl": (5_000, 1),
    "dmmath__x": (100_000, 1),
    "ampsmathematica__x": (10_000, 1),
    "tasksource__x": (10_000, 1),
    "openmathinstruct2__x": (2_000_000, 1),
    "acereason__x": (2_000_000, 1),
    "openthoughts2__x": (500_000, 1),
    "sudoku_extreme__x": (1_000_000, 1),
    "Platypus__x": (None, 10),
    "omnimath.jsonl": (None, 10),
    "gsm8k_train.jsonl": (None, 10),
    "math_train.jsonl": (None, 10),
    "webinstruct_verified.jsonl": (None, 10),
    "no_robots.jsonl": (None, 10),
    "anything_else.jsonl": (None, 1),
}


def load(tmp_path: Path, text: str) -> Mixture:
    (tmp_path / "mixture.yaml").write_text(text)
    return Mixture.load(tmp_path / "mixture.yaml")


def test_the_published_mixture_is_shipped() -> None:
    mixture = Mixture.load(ROOT / PUBLISHED_MIXTURE)
    rules = {name: mixture.rule_for(name) for name in PUBLISHED}
    assert {name: (rule.max_per_file, rule.repeat) for name, rule in rules.items()} == PUBLISHED
    assert {rule.long_context for rule in rules.values()} == {"truncate"}
    assert len(mixture.rules) == len(PUBLISHED) - 1


def test_the_first_prefix_that_fits_counts(tmp_path: Path) -> None:
    mixture = load(tmp_path, "- prefix: ab\n  repeat: 2\n- prefix: a\n- prefix: abc\n- prefix: z\n")
    assert mixture.rule_for("abc.jsonl").repeat == 2
    assert mixture.rule_for("axe").prefix == "a"
    assert mixture.rule_for("b") == EVERY_ROW_ONCE
    assert mixture.remarks(["abc.jsonl", "axe", "b"]) == [
        "more than one prefix fits, the first counts: abc.jsonl (ab before a before abc)",
        "prefixes that fit no source: z",
    ]


@pytest.mark.parametrize(
    ("limit", "repeat", "taken"), [(None, 1, 8), (None, 3, 24), (3, 1, 3), (3, 4, 12), (100, 2, 16)]
)
def test_a_limit_counts_before_repeating(limit: int | None, repeat: int, taken: int) -> None:
    rule = MixtureRule(prefix="", max_per_file=limit, repeat=repeat)
    assert rule.rows_per_epoch(8) == taken


@pytest.mark.parametrize("text", ["", "# nothing\n", "[]"])
def test_an_empty_mixture_takes_every_row_once(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == Mixture.load(None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- prefix: a\n  max_per_fil: 3\n", r"entry 1: max_per_fil=3: Extra inputs"),
        ("- prefix: a\n- repeat: 2\n", r"entry 2: prefix=.*Field required"),
        ("- prefix: a\n  repeat: 0\n", r"entry 1: repeat=0: .*greater than 0"),
        ("- prefix: a\n  max_per_file: 0\n", r"max_per_file=0"),
        ("- prefix: a\n  long_context: cut\n", r"long_context='cut'"),
        ("- prefix: 7\n", r"prefix=7"),
        ("- just words\n", r"entry 1: entry='just words'"),
        ("prefix: a\n", r"holds a dict; write a list"),
        ("- [unclosed\n", r"is no YAML"),
    ],
)
def test_a_wrong_mixture_is_named_with_its_entry(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        load(tmp_path, text)
    assert "mixture.yaml" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_mixture_says_how_to_do_without(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; .* say null"):
        Mixture.load(tmp_path / "none.yaml")
