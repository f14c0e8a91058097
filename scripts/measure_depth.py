"""What a trained net costs and gets right when it is run deeper or shallower than it was trained.

    python scripts/measure_depth.py ckpt_path=checkpoints/quickstart/nano-hrm
    python scripts/measure_depth.py ckpt_path=RUN H_cycles=1,2,4 L_cycles=3 input=held_out.jsonl

Answers held-out items greedily at every combination of cycles, with the same weights, and has each
task's own verifier judge them. Prints a Markdown table; writes <output>.json and <output>.png.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_io.options import parse_options
from evaluation.reasoning_tasks import score
from inference.depth import at_depth, depth_of, net_name, with_depth
from models.flops import forward_flops_per_token
from models.transformer import NetConfig
from simple_inference_engine import (
    InferenceEngine,
    LoadedModel,
    ModelOptions,
    TextAnswer,
    load_model,
)
from training.console import refuse
from training.run_records import stored_config

DEEPEST = 2  # the grid reaches so many times the cycles that were trained
WARM_UP_ITEMS = 20
ITEM_KEYS = {"task", "instruction", "response"}


class DepthOptions(BaseModel):
    """A model, its items, and the depths to try."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ckpt_path: Path = Field(description="run directory, exported folder, or published weights")
    ckpt_epoch: PositiveInt | None = Field(default=None, description="of this epoch (null: newest)")
    input: Path | None = Field(
        default=None,
        description="JSONL of make_reasoning_data.py (null: held_out.jsonl of the run's data)",
    )
    H_cycles: list[PositiveInt] | None = Field(
        default=None, description="a list (null: from 1 to twice as many as trained)"
    )
    L_cycles: list[PositiveInt] | None = Field(default=None, description="likewise")
    cycles: list[PositiveInt] | None = Field(default=None, description="likewise, of ut")
    limit: PositiveInt | None = Field(default=None, description="the first so many items alone")
    max_output_tokens: PositiveInt = Field(default=64, description="tokens of an answer")
    batch_size: PositiveInt = Field(default=64, description="answers made at a time")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="of the weights"
    )
    output: Path | None = Field(
        default=None, description="path without suffix (null: depth in ckpt_path)"
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """One depth."""

    depth: dict[str, int]  # cycles by name
    is_as_trained: bool
    applications: int  # of a stack, for each token
    mflops_per_token: float
    tokens_per_second: float  # of answers, greedy
    accuracy: float  # share of all items
    accuracy_by_task: dict[str, float]


def depths(arch: NetConfig, options: DepthOptions) -> Iterator[dict[str, int]]:
    """All combinations that are asked for; ValueError for cycles that the net does not have."""
    trained = depth_of(arch)
    if not trained:
        raise ValueError(f"the depth of a net of kind {net_name(arch)} is fixed")
    asked = {name: getattr(options, name) for name in ("H_cycles", "L_cycles", "cycles")}
    for name, values in asked.items():
        if values is not None:
            at_depth(arch, **{name: values[0]})
    grid = {
        name: asked[name] or list(range(1, DEEPEST * value + 1)) for name, value in trained.items()
    }
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def read_items(options: DepthOptions) -> list[dict[str, Any]]:
    """The items to answer."""
    path = options.input
    if path is None:
        config = stored_config(options.ckpt_path)
        if config is None:
            raise ValueError(f"{options.ckpt_path} names no data; give input=FILE.jsonl")
        path = Path(str(config.get("data", {}).get("path"))) / "held_out.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give input=FILE.jsonl")
    try:
        items = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        is_known = all(set(item) >= ITEM_KEYS for item in items)
    except (ValueError, TypeError):
        items, is_known = [], False
    if not items or not is_known:
        raise ValueError(
            f"{path} must hold lines of JSON with {', '.join(sorted(ITEM_KEYS))}, as "
            "scripts/make_reasoning_data.py writes them"
        )
    return items[: options.limit]


def measure(
    loaded: LoadedModel, arch: NetConfig, items: Sequence[dict[str, Any]], options: DepthOptions
) -> Measured:
    """Answers all items at one depth."""
    model = with_depth(loaded.engine.model, arch)
    engine = InferenceEngine(
        model,
        max_context=loaded.engine.max_context,
        max_rows=options.batch_size,
        decode=loaded.engine.decode,
    )
    prompts = [(item.get("condition", "direct"), item["instruction"]) for item in items]

    def answered(count: int) -> list[TextAnswer]:
        limit = options.max_output_tokens
        asked = prompts[:count]
        return list(engine.generate(asked, loaded.prompt_format, max_new_tokens=limit))

    answered(WARM_UP_ITEMS)
    clock = _busy_seconds if model.lm_head.weight.device.type == "cpu" else time.perf_counter
    started_at = clock()
    answers = answered(len(prompts))
    elapsed_s = clock() - started_at
    by_task: dict[str, list[bool]] = defaultdict(list)
    num_tokens = num_keys = 0
    for answer in answers:
        item = items[answer.index]
        by_task[item["task"]].append(score(item, answer.text) == 1.0)
        length = len(loaded.prompt_format.encode_response(answer.text))
        num_tokens += length
        num_keys += length * len(loaded.prompt_format.encode_prompt(*prompts[answer.index]))
    flops = forward_flops_per_token(
        arch, len(model.lm_head.weight), mean_keys=num_keys / num_tokens
    )
    return Measured(
        depth=depth_of(arch),
        is_as_trained=arch == loaded.engine.model.config,
        applications=len(list(arch.applications())),
        mflops_per_token=round(flops / 1e6, 3),
        tokens_per_second=round(num_tokens / elapsed_s),
        accuracy=round(sum(map(sum, by_task.values())) / len(items), 4),
        accuracy_by_task={task: round(sum(v) / len(v), 4) for task, v in by_task.items()},
    )


def _busy_seconds() -> float:
    """CPU time of each thread of this process: what else runs on the machine does not matter."""
    return time.process_time() / torch.get_num_threads()


def table(found: Sequence[Measured]) -> str:
    """Markdown, the depth as trained in bold."""
    names, tasks = list(found[0].depth), list(found[0].accuracy_by_task)
    heads = [*names, "applications", "MFLOPs/token", "tokens/s", "right", *tasks]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for each in found:
        cells = [
            *map(str, each.depth.values()),
            str(each.applications),
            f"{each.mflops_per_token:.2f}",
            f"{each.tokens_per_second:,.0f}",
            *(f"{share:.3f}" for share in (each.accuracy, *each.accuracy_by_task.values())),
        ]
        if each.is_as_trained:
            cells = [f"**{cell}**" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: Sequence[Measured], title: str, output: Path) -> None:
    """Share of right answers over cost, a line for each number of slow updates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    *others, last = found[0].depth
    lines: dict[tuple[int, ...], list[Measured]] = defaultdict(list)
    for each in found:
        lines[tuple(each.depth[name] for name in others)].append(each)
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for number, (values, line) in enumerate(lines.items()):
        costs, shares = zip(*((each.mflops_per_token, each.accuracy) for each in line), strict=True)
        label = ", ".join(f"{n} {v}" for n, v in zip(others, values, strict=True)) or None
        axes.plot(costs, shares, color=f"C{number}", marker="o", markersize=4, label=label)
        for each in line:
            text = str(each.depth[last])
            place = (each.mflops_per_token, each.accuracy)
            above = (0, 9 if each.is_as_trained else 5)
            axes.annotate(text, place, above, textcoords="offset points", fontsize=7, ha="center")
            if each.is_as_trained:
                axes.plot(*place, "o", markersize=11, markerfacecolor="none", color="0.2")
    axes.set_title(f"{title}: numbers are {last}; the ring is as trained", fontsize=10)
    axes.set_xlabel("MFLOPs per token")
    axes.set_ylabel("held-out answers right")
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if others:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(output, dpi=150)
    plt.close(figure)


def main() -> None:
    """Command line."""
    try:
        options = parse_options(DepthOptions, sys.argv[1:], __doc__ or "")
        shared = ("ckpt_path", "ckpt_epoch", "device", "dtype", "batch_size")
        loaded = load_model(ModelOptions(**{name: getattr(options, name) for name in shared}))
        items = read_items(options)
        trained = loaded.engine.model.config
        grid = [at_depth(trained, **depth) for depth in depths(trained, options)]
        output = options.output or options.ckpt_path / "depth"
        print(f"{loaded.description}\n{len(items)} items, {len(grid)} depths", flush=True)
        found = []
        for arch in grid:
            found.append(measure(loaded, arch, items, options))
            print(f"  {found[-1].depth}: {found[-1].accuracy:.3f}", file=sys.stderr, flush=True)
        record = {"model": loaded.description, "items": len(items)}
        record["depths"] = [asdict(each) for each in found]
        output.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        draw(found, f"{net_name(trained)}, {len(items)} items", output.with_suffix(".png"))
    except (ValueError, OSError) as error:
        refuse(str(error))
    print(table(found))
    print(output.with_suffix(".json"), output.with_suffix(".png"), sep="\n")


if __name__ == "__main__":
    main()
