"""What every test runs under: seeds, one thread, no network, and the golden cases of --golden."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

# Before torch and the Hugging Face packages are imported; processes that a test starts inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "disabled"  # tracker=auto finds none; test_trackers.py sets its own

import numpy as np
import pytest
import torch
from golden_cases import golden_root, parametrize_golden

try:
    import hypothesis
except ModuleNotFoundError:  # a GPU machine without requirements-dev.txt runs the rest
    hypothesis = None

SEED = 20260520
STARTED_AT = time.monotonic()


def absolute_folder(value: str) -> str:
    """The value of --golden as tests read it: absolute, so it holds in any working directory."""
    return str(Path(value).expanduser().resolve())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        type=absolute_folder,
        default=absolute_folder(f"{Path(__file__).parent}/golden"),
        # Before this file is read, pytest takes a word of its own for a folder of tests: without a
        # test path, write --golden=DIR.
        help="folder of golden cases (default: tests/golden): pytest --golden=DIR",
    )
    parser.addoption(
        "--time-budget",
        metavar="SECONDS",
        type=float,
        default=float("inf"),
        help="skip the tests that have not begun after this many seconds",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not golden_root(config).is_dir():
        raise pytest.UsageError(f"--golden {golden_root(config)}: there is no such folder")
    torch.set_num_threads(1)
    if hypothesis is not None:
        # the same examples in every run, and no failure because a shared machine was slow
        hypothesis.settings.register_profile("reproducible", derandomize=True, deadline=None)
        hypothesis.settings.load_profile("reproducible")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_golden(metafunc)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    needs_cuda = pytest.mark.skip(reason="needs a CUDA device, and torch finds none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(needs_cuda)


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget_s = float(str(item.config.getoption("--time-budget")))
    if time.monotonic() - STARTED_AT > budget_s:
        pytest.skip(f"the time budget of {budget_s:.0f} s is used up")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test draws the same numbers, whichever tests ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 -- libraries under test may draw from the global generator
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def golden_folder(pytestconfig: pytest.Config) -> Path:
    """The folder of golden cases, for tests that need more of it than one case."""
    return golden_root(pytestconfig)
