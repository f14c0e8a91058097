"""The whole way on one machine: make data, train a nano HRM, and ask it before and after.

    make quickstart            # or: python scripts/quickstart.py [seed=1 run_name=second ...]

Settings are passed on to pretrain.py (recipe: config/cfg_quickstart.yaml). Run again, it makes
nothing anew and shows what there is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evaluation.reasoning_tasks import score  # noqa: E402
from simple_inference_engine import ModelOptions, load_model  # noqa: E402
from training.command_line import checked_overrides  # noqa: E402
from training.console import refuse  # noqa: E402
from training.distributed import set_threads  # noqa: E402
from training.plot import draw_curves  # noqa: E402
from training.run_curves import metrics_of, training_seconds  # noqa: E402
from training.run_records import choose_checkpoint, stored_config  # noqa: E402

DATA = Path("data/reasoning")
RUN_NAME, PROJECT = "nano-hrm", "quickstart"
RESULT_FILE, CURVES_FILE = "quickstart.json", "curves.png"
SHOWN_ITEMS = 6


@dataclass(frozen=True, slots=True)
class Answered:
    """One held-out item and what the model said."""

    item: dict[str, Any]
    text: str
    is_right: bool


def main() -> None:
    """Command line."""
    started_at = time.monotonic()
    overrides = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in overrides):
        print(__doc__)
        return
    run = run_of(overrides)
    if (run / RESULT_FILE).is_file():
        result = json.loads((run / RESULT_FILE).read_text())
        if result["settings"] != overrides:
            refuse(
                f"{run} was made with {' '.join(result['settings']) or 'no settings of its own'}; "
                "give another run_name, or remove that folder"
            )
        print("This quick start is done already; nothing is made again.\n")
        show_result(run, result)
        say_what_next(run)
        return
    step("data", "scripts/make_reasoning_data.py", f"output={DATA}")
    step("training", "pretrain.py", "--config-name", "cfg_quickstart", *overrides)
    config = stored_config(run)
    assert config is not None
    if choose_checkpoint(run).progress.epoch < config["epochs"]:
        print("\ntraining was stopped; the same command goes on with it")
        sys.exit(1)
    set_threads(config["num_threads"], {}, 1)
    print("\n== answering held-out items before and after training", flush=True)
    before, after = answer(run, step=0), answer(run)
    result = {
        "accuracy_before": accuracy(before),
        "accuracy_after": accuracy(after),
        "items": len(after),
        "settings": overrides,
        **speed(run),
        "total_seconds": round(time.monotonic() - started_at, 1),
    }
    draw_curves([run], run / CURVES_FILE)
    (run / RESULT_FILE).write_text(json.dumps(result, indent=2))
    show_result(run, result)
    show_answers(after)
    say_what_next(run)


def run_of(overrides: list[str]) -> Path:
    """The run directory of these settings; ends with code 2 where one is out of place here."""
    for override in overrides:
        key = override.partition("=")[0]
        if override[0] in "-+~" or key in ("project_name", "checkpoint_path", "data", "data.path"):
            refuse(f"{override!r} is not for the quick start; use pretrain.py itself")
    try:
        checked_overrides(overrides, ROOT / "config")
    except ValueError as error:
        refuse(str(error))
    names = [value.removeprefix("run_name=") for value in overrides if value[:9] == "run_name="]
    return Path("checkpoints") / PROJECT / (names[-1] if names else RUN_NAME)


def step(title: str, *command: str) -> None:
    """Runs one of the project's commands as a user would, and stops where it fails."""
    print(f"\n== {title}: python {' '.join(command)}", flush=True)
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]])
    if done.returncode:
        sys.exit(done.returncode)


def answer(run: Path, *, step: int | None = None) -> list[Answered]:
    """Greedy answers to all held-out items, judged by each task's own verifier."""
    config = stored_config(run)
    assert config is not None
    held_out = Path(config["data"]["path"]) / "held_out.jsonl"
    items = [json.loads(line) for line in held_out.read_text().splitlines()]
    loaded = load_model(ModelOptions(ckpt_path=run, ckpt_step=step))
    print(loaded.description, flush=True)
    prompts = [(item.get("condition", "direct"), item["instruction"]) for item in items]
    answers = loaded.engine.generate(prompts, loaded.prompt_format, max_new_tokens=64)
    texts = {given.index: given.text for given in answers}
    return [
        Answered(item, texts[index], score(item, texts[index]) == 1.0)
        for index, item in enumerate(items)
    ]


def accuracy(answered: list[Answered]) -> dict[str, float]:
    """The share of right answers by task, and the mean over tasks."""
    by_task: dict[str, list[bool]] = defaultdict(list)
    for given in answered:
        by_task[given.item["task"]].append(given.is_right)
    shares = {task: sum(right) / len(right) for task, right in by_task.items()}
    return {**shares, "mean": sum(shares.values()) / len(shares)}


def speed(run: Path) -> dict[str, float]:
    """Seconds spent in training steps and tokens a second, over all sittings of the run."""
    lines = metrics_of(run)
    seconds, tokens = training_seconds(lines)[-1], lines[-1]["tokens"]
    return {"train_seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds, 1)}


def show_result(run: Path, result: dict[str, Any]) -> None:
    """The table of accuracies."""
    before, after = result["accuracy_before"], result["accuracy_after"]
    print(f"\n{'held-out answers right':<24}{'before':>8}{'after':>8}")
    for task in after:
        print(f"{task:<24}{before[task]:>8.3f}{after[task]:>8.3f}")
    print(
        f"\n{result['items']} items; training {result['train_seconds']:.0f} s at "
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['total_seconds']:.0f} s in all"
    )


def show_answers(answered: list[Answered]) -> None:
    """A few questions, spread over the tasks, and what came."""
    by_task: dict[str, list[Answered]] = defaultdict(list)
    for given in answered:
        by_task[given.item["task"]].append(given)
    per_task = -(-SHOWN_ITEMS // len(by_task))
    shown = [given for items in by_task.values() for given in items[:per_task]][:SHOWN_ITEMS]
    print("\nsome of them:")
    for given in shown:
        mark = "right" if given.is_right else f"wrong, it is {given.item['response']}"
        print(f"  {given.item['instruction']:<28} -> {given.text}  ({mark})")


def say_what_next(run: Path) -> None:
    """Where everything lies, and what to try."""
    print(
        f"""
in {run}/
  {RESULT_FILE:<18} these figures
  {CURVES_FILE:<18} loss and accuracy while training
  metrics.jsonl      the same, a line every few steps
  fsdp2_epoch_N/     checkpoints
  all_config.yaml    every setting
{DATA}/  training data and held-out items (JSONL)

try next
  another net      python scripts/quickstart.py arch/net@arch=transformer run_name=nano-transformer
  another seed     python scripts/quickstart.py seed=1 run_name=nano-hrm-seed1
  compare          python -m training.plot {run} checkpoints/{PROJECT}/nano-transformer
  anew             rm -r {run}   (data: rm -r {DATA}), then make quickstart
  all settings     python pretrain.py --help"""
    )


if __name__ == "__main__":
    main()
