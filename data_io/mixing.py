"""How much of each source an epoch takes: prefix_config.yaml as published.

A list of rules; the first whose prefix a source's name begins with counts. A source without a rule
gives each of its rows once per epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from data_io.parsing import parse_yaml

SHOWN_NAMES = 5
SHAPE = "a list of `- prefix: NAME` with max_per_file, long_context and repeat as they are needed"


class MixtureRule(BaseModel):
    """How the rows of one source enter an epoch."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prefix: str
    max_per_file: PositiveInt | None = None  # rows of an epoch; null: all
    long_context: Literal["truncate", "drop"] = "truncate"  # what is longer than context_size
    repeat: PositiveInt = 1  # times that an epoch takes so many rows

    def rows_per_epoch(self, num_rows: int) -> int:
        """Rows that an epoch takes of a source that has `num_rows`."""
        return min(num_rows, self.max_per_file or num_rows) * self.repeat


EVERY_ROW_ONCE = MixtureRule(prefix="")


@dataclass(frozen=True, slots=True)
class Mixture:
    """The rules, in the order in which they are tried."""

    rules: tuple[MixtureRule, ...]

    @classmethod
    def load(cls, path: Path | None) -> Mixture:
        """Of a prefix_config.yaml; None: every row of every source once."""
        if path is None:
            return cls(())
        try:
            entries = parse_yaml(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no YAML ({error}); write {SHAPE}") from None
        except FileNotFoundError:
            raise ValueError(
                f"prefix_config_path={path} does not exist; write {SHAPE}, or say null for every "
                "row of every source once"
            ) from None
        if entries is None:
            return cls(())
        if not isinstance(entries, list):
            raise ValueError(f"{path} holds a {type(entries).__name__}; write {SHAPE}")
        return cls(tuple(_rule(path, number, entry) for number, entry in enumerate(entries, 1)))

    def rule_for(self, name: str) -> MixtureRule:
        """The rule for a source, by the name of its folder."""
        fitting = (rule for rule in self.rules if name.startswith(rule.prefix))
        return next(fitting, EVERY_ROW_ONCE)

    def remarks(self, names: Sequence[str]) -> list[str]:
        """What may surprise: sources that fit several prefixes, prefixes that fit no source."""
        several = [
            f"{name} ({' before '.join(fitting)})"
            for name in names
            if len(fitting := [r.prefix for r in self.rules if name.startswith(r.prefix)]) > 1
        ]
        idle = [r.prefix for r in self.rules if not any(n.startswith(r.prefix) for n in names)]
        remarks = []
        if several:
            remarks.append(f"more than one prefix fits, the first counts: {_shown(several)}")
        if idle:
            remarks.append(f"prefixes that fit no source: {_shown(idle)}")
        return remarks


def _rule(path: Path, number: int, entry: object) -> MixtureRule:
    try:
        return MixtureRule.model_validate(entry)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'entry'}={fault['input']!r:.80}: {fault['msg']}"
            for fault in error.errors()
        )
        raise ValueError(f"{path}, entry {number}: {faults}; write {SHAPE}") from None


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more:,} more" if more > 0 else "")
