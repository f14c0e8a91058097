"""Imports point one way: who may import whom, as a table of rules held against every source file.

An import counts as eager when it runs on importing the file, as lazy inside a function or under
TYPE_CHECKING. Imports of this project must follow the direction either way; of other packages, the
heavy ones and those that need a GPU may be imported lazily only.

Longer than 300 lines: one table, the walk through the sources, and made-up violations of it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from source_tree import ROOT, product_files

LIBRARY = {
    "models",
    "training",
    "data_io",
    "inference",
    "dataset_new",
    "multipack_sampler",
    "simple_inference_engine",
}
PROJECT = LIBRARY | {"pretrain", "evaluation", "conversion", "scripts", "torture"}
# Nobody imports these. `python -m training.x` and `data_io.x` have their main in the module itself.
ENTRY_POINTS = {
    *("pretrain", "evaluation.main", "evaluation.core.main", "scripts"),
    *(f"conversion.convert_{which}" for which in ("to_hf", "from_hf", "from_reference")),
}
GPU_PACKAGES = {"flash_attn", "flash_attn_interface", "adam_atan2", "triton"}
TOKENIZERS = {
    "transformers.AutoTokenizer",
    "transformers.PreTrainedTokenizerBase",
    "transformers.PreTrainedTokenizerFast",
}
TRACKERS = {"wandb", "tensorboard", "torch.utils.tensorboard", "trackio"}
NO_RANKS = frozenset({"torch.distributed"})


def required_packages() -> set[str]:
    """The import names of what requirements.txt installs."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    names = re.findall(r"^([A-Za-z][\w-]*)", text, flags=re.MULTILINE)
    renamed = {"hydra-core": "hydra", "pyyaml": "yaml"}
    return {renamed.get(str(name), str(name)) for name in names}


REQUIRED = required_packages() - {"hydra"}  # pretrain.py alone knows Hydra


@dataclass(frozen=True)
class Rule:
    """What the modules at or below `module` may import; a name stands for all that is below it."""

    module: str
    project: set[str]
    eager: set[str]
    lazy: set[str] | None = None  # in addition to eager; None: any package but Hydra
    never: frozenset[str] = frozenset()  # overrides the others


# The first rule that fits a module binds it.
RULES = [
    Rule("models.attention", {"models"}, {"torch", "pydantic"}, GPU_PACKAGES, NO_RANKS),
    *(
        Rule(f"models.{name}", {"models"}, {"torch", "numpy", "numba", "llvmlite"}, set(), NO_RANKS)
        for name in ("cpu_kernels", "cpu_attention")
    ),
    Rule("models.cpu_block", {"models"}, {"torch"}, {"numba"}, NO_RANKS),
    Rule("models", {"models"}, {"torch", "pydantic"}, set(), NO_RANKS),
    Rule("multipack_sampler", project=set(), eager={"numpy", "numba"}, lazy=set()),
    Rule(
        "data_io",
        project={"data_io", "multipack_sampler"},
        eager={"numpy", "tokenizers", "pyarrow", "pydantic", "yaml", "tqdm"},
        lazy={*("datasets", "huggingface_hub", "sentencepiece", "ray", "zstandard", "matplotlib")},
    ),
    *(
        Rule(
            module,
            project={
                "models",
                "training",
                "data_io.parsing",
                "data_io.redaction",
                "data_io.sampled_format",
                "data_io.prompt_format",
                "data_io.row_planning",
            },
            eager={"torch", "numpy", "pydantic", "omegaconf", "yaml", "safetensors", "tqdm"},
            lazy=lazy,
            never=frozenset(TRACKERS - lazy),
        )
        for module, lazy in (
            ("training.trackers", TRACKERS),
            ("training.plot", {"matplotlib"}),
            ("training", set[str]()),
        )
    ),
    Rule(
        "dataset_new",
        project={
            "models.batch",
            "data_io.row_planning",
            "data_io.sampled_format",
            "multipack_sampler",
        },
        eager={"torch", "numpy"},
        lazy=set(),
    ),
    Rule(
        "inference",
        project={
            "models",
            "inference",
            "training.adapters",
            "training.building",
            "training.checkpoint",
            "training.distributed",
            "training.export_format",
            "training.run_records",
            "training.tensor_store",
            "training.environment",
            "data_io.parsing",
            "data_io.prompt_format",
            "data_io.records",
            "data_io.sampled_format",
            "data_io.special_tokens",
            "data_io.trm_template",
        },
        eager={"torch", "numpy", "numba", "pydantic", "tokenizers", "safetensors", *TOKENIZERS},
        lazy=set(),
    ),
    Rule(
        "simple_inference_engine",
        project={
            "models",
            "inference",
            "training.building",
            "training.checkpoint",
            "training.distributed",
            "training.export_format",
            "training.run_records",
            "data_io.prompt_format",
        },
        eager={"torch", "numpy", "tokenizers", *TOKENIZERS},
        lazy=set(),
    ),
    Rule("evaluation", project=LIBRARY | {"evaluation"}, eager=REQUIRED),
    Rule("conversion", project=LIBRARY | {"conversion"}, eager=REQUIRED),
    Rule("scripts", project=LIBRARY | {"evaluation", "torture"}, eager=REQUIRED),
    Rule("torture", project=LIBRARY | {"torture"}, eager=REQUIRED),
    Rule("pretrain", project=LIBRARY | {"evaluation"}, eager=REQUIRED | {"hydra"}),
]


@dataclass(frozen=True)
class Import:
    """One imported name in full: `from models import batch` is `models.batch`."""

    name: str
    line: int
    is_eager: bool


def is_below(name: str, modules: set[str] | frozenset[str]) -> bool:
    """Whether `name` is one of `modules`, or belongs to one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def imports_of(path: str, source: str) -> list[Import]:
    """All imports of a source text; its path is what relative imports start from."""
    package = ".".join(Path(path).parts[:-1])

    def visit(node: ast.AST, is_eager: bool) -> Iterator[Import]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            is_eager = False
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            is_eager = False
        for name in imported_names(node, package):
            yield Import(name, getattr(node, "lineno", 0), is_eager)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, is_eager)

    return list(visit(ast.parse(source, path), is_eager=True))


def imported_names(node: ast.AST, package: str) -> list[str]:
    """The full names that this one node imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
        origin = [*(parents if node.level else []), *([node.module] if node.module else [])]
        return [".".join([*origin, alias.name]) for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        is_dynamic = ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
        return [str(node.args[0].value)] if is_dynamic else []
    if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
        return ["torch.distributed"]  # reached without an import of its own
    return []


def module_name(path: Path) -> str:
    """`models/hrm.py` -> `models.hrm`, `models/__init__.py` -> `models`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def complaint(module: str, found: Import, rule: Rule) -> str | None:
    """Why `module` may not import `found`, or None."""
    root = found.name.split(".")[0]
    if root in sys.stdlib_module_names:
        return None
    if is_below(found.name, rule.never):
        return "is not for this file"
    if root in PROJECT:
        if is_below(found.name, ENTRY_POINTS - {module}):
            return "is an entry point, which nobody imports"
        allowed = is_below(found.name, rule.project | {module})
        return None if allowed else f"is not among {sorted(rule.project)}"
    lazy = rule.lazy or set()
    if is_below(found.name, rule.eager) and not is_below(found.name, lazy):
        return None
    may_be_lazy = is_below(found.name, lazy) or (rule.lazy is None and root != "hydra")
    if not may_be_lazy:
        return f"is not among {sorted(rule.eager | lazy)}"
    return "is imported eagerly; import it in the function" if found.is_eager else None


def violations(sources: dict[str, str]) -> list[str]:
    """All imports against the rules in sources by path, as `path:line: why`."""
    imports = {path: imports_of(path, source) for path, source in sources.items()}
    kernels = kernel_modules(imports)
    problems = []
    for path, found_imports in imports.items():
        module = module_name(Path(path))
        rule = next((rule for rule in RULES if is_below(module, {rule.module})), None)
        if rule is None:
            problems.append(f"{path}: no rule says what this may import; add one to RULES")
            continue
        for found in found_imports:
            is_kernel_import = module in kernels and is_below(found.name, GPU_PACKAGES)
            why = None if is_kernel_import else complaint(module, found, rule)
            may_be_kernel = found.is_eager and module not in kernels
            if why is None and may_be_kernel and is_below(found.name, kernels):
                why = "needs a GPU package on import; import it in the function"
            if why is not None:
                problems.append(f"{path}:{found.line}: {found.name} {why}")
    return problems


def kernel_modules(imports: dict[str, list[Import]]) -> set[str]:
    """Files of models/attention/ that are a kernel: they need a GPU package on import, as
    decorators of Triton do, and so must themselves be imported lazily."""
    return {
        module_name(Path(path))
        for path, found_imports in imports.items()
        if path.startswith("models/attention/") and not path.endswith("__init__.py")
        if any(found.is_eager and is_below(found.name, GPU_PACKAGES) for found in found_imports)
    }


def test_every_file_imports_only_what_its_layer_may() -> None:
    sources = {
        path.as_posix(): (ROOT / path).read_text(encoding="utf-8") for path in product_files()
    }
    problems = violations(sources)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("path", "source", "blamed"),
    [
        ("models/hrm.py", "import training.schedule", "training.schedule"),
        ("models/hrm.py", "def f():\n    from training import schedule", "training.schedule"),
        ("models/hrm.py", "from ..training import schedule", "training.schedule"),
        ("models/hrm.py", "import numpy as np", "numpy"),
        ("models/hrm.py", "import torch.distributed as dist", "torch.distributed"),
        ("models/hrm.py", "import torch\nrank = torch.distributed.get_rank()", "torch.distributed"),
        ("models/hrm.py", "def f():\n    import flash_attn", "flash_attn"),
        ("models/attention/__init__.py", "import flash_attn_interface", "flash_attn_interface"),
        ("multipack_sampler.py", "import torch", "torch"),
        ("data_io/readers.py", "import datasets", "datasets"),
        ("data_io/sample.py", "from models.batch import PackedBatch", "models.batch.PackedBatch"),
        ("training/checkpoint.py", "import wandb", "wandb"),
        ("training/checkpoint.py", "def f():\n    import wandb", "wandb"),
        ("training/telemetry.py", "def f():\n    import wandb", "wandb"),
        ("training/trackers.py", "import trackio", "trackio"),
        ("training/trackers.py", "from torch.utils import tensorboard", "torch.utils.tensorb"),
        ("training/loop.py", "from data_io.sample import main", "data_io.sample.main"),
        ("training/loop.py", "import hydra", "hydra"),
        ("dataset_new.py", "from models import ArchConfig", "models.ArchConfig"),
        ("simple_inference_engine.py", "from transformers import AutoModel", "transformers"),
        ("simple_inference_engine.py", "from training import telemetry", "training.telemetry"),
        ("evaluation/scoring.py", "from evaluation.main import run", "evaluation.main"),
        ("evaluation/scoring.py", "import importlib\nimportlib.import_module('pretrain')", "pret"),
        ("evaluation/engines.py", "def f():\n    import hydra", "hydra"),
        ("scripts/chat.py", "from pretrain import main", "pretrain"),
        ("scripts/chat.py", "from scripts.answer import main", "scripts.answer"),
        ("scripts/gpu_check.py", "try:\n    import flash_attn\nexcept ImportError: ...", "flash"),
        ("pretrain.py", "from conversion.convert_to_hf import export", "conversion"),
        ("pretrain.py", "import evaluation.main", "evaluation.main"),
    ],
)
def test_a_made_up_violation_is_caught(path: str, source: str, blamed: str) -> None:
    (problem,) = violations({path: source})
    assert problem.startswith(f"{path}:") and f": {blamed}" in problem


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/hrm.py", "import math\nimport torch\nfrom models.layers import Rope"),
        ("models/hrm.py", "from .layers import Rope"),
        ("models/attention/flash3.py", "def attend():\n    import flash_attn_interface"),
        ("data_io/readers.py", "def rows():\n    import datasets"),
        ("training/trackers.py", "def start():\n    import wandb"),
        ("training/plot.py", "def draw():\n    import matplotlib.pyplot as plt"),
        ("dataset_new.py", "from models.batch import PackedBatch\nimport numpy as np"),
        ("simple_inference_engine.py", "from transformers import AutoTokenizer"),
        ("evaluation/main.py", "from evaluation.engines import Engine\nimport datasets"),
        ("evaluation/engines.py", "def other_engine():\n    import vllm"),
        ("pretrain.py", "import hydra\nfrom evaluation.scoring import score"),
    ],
)
def test_what_the_table_allows_passes(path: str, source: str) -> None:
    assert violations({path: source}) == []


def test_a_kernel_file_is_imported_lazily_only() -> None:
    kernel = {"models/attention/triton_kernel.py": "import triton"}
    lazily = "def backend():\n    from models.attention import triton_kernel"
    eagerly = "from models.attention.triton_kernel import attend"
    assert violations(kernel | {"models/attention/__init__.py": lazily}) == []
    (problem,) = violations(kernel | {"models/attention/__init__.py": eagerly})
    assert "needs a GPU package on import" in problem


def test_a_file_without_a_rule_is_reported() -> None:
    (problem,) = violations({"helpers.py": "import os"})
    assert problem.startswith("helpers.py: no rule")
