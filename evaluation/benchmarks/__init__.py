"""The benchmarks by the names that a command line uses."""

from __future__ import annotations

import difflib

from evaluation.benchmarks.aime import AIMEMajorityVoting
from evaluation.benchmarks.arc import ARC
from evaluation.benchmarks.boolq import BoolQ
from evaluation.benchmarks.drop import DROP
from evaluation.benchmarks.gsm8k import GSM8k
from evaluation.benchmarks.hellaswag import HellaSwag
from evaluation.benchmarks.math import MATH
from evaluation.benchmarks.mmlu import MMLU
from evaluation.benchmarks.mmlu_pro import MMLUPro
from evaluation.benchmarks.protocol import Benchmark
from evaluation.benchmarks.reasoning_gym import ReasoningGym
from evaluation.benchmarks.winogrande import Winogrande

BENCHMARKS: dict[str, type[Benchmark]] = {
    benchmark.name: benchmark
    for benchmark in (
        GSM8k,
        MATH,
        DROP,
        MMLU,
        ARC,
        HellaSwag,
        Winogrande,
        BoolQ,
        MMLUPro,
        AIMEMajorityVoting,
        ReasoningGym,
    )
}


def benchmark_named(name: str) -> type[Benchmark]:
    """ValueError names the nearest where there is none of that name."""
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    folded = {known.lower().replace("_", ""): known for known in BENCHMARKS}
    wanted = name.lower().replace("_", "").replace("-", "")
    near = difflib.get_close_matches(wanted, folded, n=1, cutoff=0.5)
    hint = f"did you mean {folded[near[0]]}?" if near else f"there are {', '.join(BENCHMARKS)}"
    raise ValueError(f"no benchmark is named {name!r}; {hint}")
