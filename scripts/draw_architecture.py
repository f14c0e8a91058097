"""Draws docs/nets.svg (the order of every net, from its record) and docs/step.svg (one step).

    python scripts/draw_architecture.py [--output docs]

Orders, gradients, layer counts and the attention mask come from the code; words are written here.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from pydantic import TypeAdapter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from models import ArchConfig
from models.attention.dense import prefix_lm_mask
from models.batch import PackedLayout
from models.hrm import HRMConfig
from models.transformer import Application, NetConfig

INK, MUTED, FAINT, PANEL = "#1f2933", "#66717c", "#b4bdc6", "#f6f7f9"
COLORS = {  # with gradient, without
    "H stack": ("#c0591d", "#fbebdf"),
    "L stack": ("#2b659b", "#e3edf6"),
    "the only stack": ("#4a7c59", "#e6f0e8"),
}
PREFIX, RESPONSE, PADDING = ("#6d5a9c", "#e9e5f2"), ("#23857a", "#dcefec"), ("#8b949e", "#e9ebee")

NETS = ("hrm", "trm", "trm_match_recurrence", "rins", "ut", "transformer")
SIZE = "XL"
LEFT, LAYER, COLUMNS = 2.72, 4.6 / 128, (8.05, 8.62, 9.22)  # inches; LAYER: width of one
BOX, LANE, ROW = 0.27, 0.47, 0.33  # heights: a box, lane to lane, between rows

# title | file, then what happens | what goes on to the next
FLOW = """
Sampled folder | data_io/sampled_format.py
tokens.npy, epoch_<k>/*.npy, metadata.json | lengths and token ids
PrefixLMDataset + MultipackSampler | dataset_new.py, multipack_sampler.py
packs whole examples into rows of T tokens | rows made ahead (training/prefetch.py)
PackedBatch | models/batch.py
copied to the device while the step before is computed | tokens, positions, layout
LanguageModel | models/language_model.py, recurrence.py, attention/
embedding; attention plan once per batch; stacks in order | hidden [T, D]
Chunked loss | models/loss.py
cross-entropy; [T, V] logits never exist at once | loss / scored tokens
Backward | training/distributed.py
FSDP2 sums gradients over ranks | gradients
AdamATan2 + EMA | training/adam_atan2.py
weights and their average; rate from training/schedule.py | model, EMA, optimizer, progress
RunDirectory | training/checkpoint.py
checkpoints, written aside and published by rename |
"""
FLOW_LEFT, FLOW_TOP, FLOW_WIDTH, FLOW_HEIGHT, FLOW_STEP = 0.72, 0.3, 4.05, 0.66, 0.97
PREFIX_LENS, CAUSAL_LENS, ROW_TOKENS = (4, 3, 2), (4, 2, 1), 18
CELL, STRIP_LEFT, STRIP_TOP = 0.178, 6.05, 1.0


class Page:
    """A white page measured in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, size: float = 8, **style: Any) -> None:
        style = {"color": INK, "va": "center_baseline", "zorder": 4, **style}
        self.axes.text(x, y, words, size=size, **style)

    def box(self, x: float, y: float, width: float, height: float, **style: Any) -> None:
        style = {"facecolor": "white", "edgecolor": INK, "linewidth": 0.9, "zorder": 3, **style}
        rounding = "round,pad=0,rounding_size=0.05"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=rounding, **style))

    def cell(self, x: float, y: float, color: str, words: str = "") -> None:
        style = {"facecolor": color, "edgecolor": "white", "linewidth": 0.8, "zorder": 3}
        self.axes.add_patch(Rectangle((x, y), CELL, CELL, **style))
        self.text(x + CELL / 2, y + CELL / 2, words, 6.5, ha="center")

    def line(self, *points: tuple[float, float], color: str = INK, **style: Any) -> None:
        xs, ys = [x for x, _ in points], [y for _, y in points]
        self.axes.plot(xs, ys, color=color, **{"linewidth": 1, "zorder": 1, **style})

    def arrow(self, *points: tuple[float, float], color: str = INK, zorder: int = 1) -> None:
        """A line through `points` with a head at the last; its last stretch is axis-parallel."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        neck_x, neck_y, half = x - 0.07 * dx, y - 0.07 * dy, 0.034
        self.line(*points[:-1], (neck_x, neck_y), color=color, zorder=zorder)
        xs, ys = (neck_x - half * dy, neck_x + half * dy), (neck_y - half * dx, neck_y + half * dx)
        self.axes.fill([x, *xs], [y, *ys], color=color, linewidth=0, zorder=zorder)

    def save(self, path: Path) -> None:
        with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": path.name}):
            self.figure.savefig(path, metadata={"Date": None, "Creator": None})
        print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


def read_net(name: str) -> NetConfig:
    """The published setting of a net, as deep as the published model and otherwise tiny."""
    net = yaml.safe_load((ROOT / f"config/arch/net/{name}.yaml").read_text())
    size = yaml.safe_load((ROOT / f"config/arch/size/{SIZE}.yaml").read_text())
    tiny = {"n_layers": size["n_layers"], "hidden_size": 8, "num_heads": 1}
    return TypeAdapter(ArchConfig).validate_python({**net, **tiny})


def draw_nets() -> Page:
    """One row a net; two for HRM, whose gradient reaches further back as training goes on."""
    page = Page(9.65, 6.6)
    draw_legend(page)
    y = 1.55
    for config in map(read_net, NETS):
        cycles = [f"{k} {v}" for k, v in config if k.endswith("cycles") and "bp" not in k]
        variants: dict[int | None, str] = {None: ", ".join(cycles)}
        if isinstance(config, HRMConfig):
            late = f"after {config.bp_warmup_ratio:.0%} of the steps"
            start, end = config.bp_min_steps, config.bp_max_steps
            variants = {start: f"bp {start}, at the start", end: f"bp {end}, {late}"}
        for backprop_steps, caption in variants.items():
            order = list(config.applications(backprop_steps))
            page.text(0.25, y, config.name, 9, weight="bold")
            page.text(0.25, y + 0.19, caption, 7.5, color=MUTED)
            layers = [config.stacks()[application.stack].n_layers for application in order]
            stored = " + ".join(str(stack.n_layers) for stack in config.stacks().values())
            trained = sum(n for n, a in zip(layers, order, strict=True) if a.keeps_gradient)
            for x, cell in zip(COLUMNS, (stored, sum(layers), trained), strict=True):
                page.text(x, y, str(cell), 8.5, ha="center")
            y += draw_order(page, config, order, y) + BOX + ROW
    return page


def draw_legend(page: Page) -> None:
    """What colours and lines mean, and the heads of the columns."""
    for x, (words, colors) in zip((0.25, 1.45, 2.65), COLORS.items(), strict=True):
        for offset, color in zip((0, 0.21), colors, strict=True):
            page.box(x + offset, 0.22, 0.17, 0.17, facecolor=color, edgecolor=colors[0])
        page.text(x + 0.46, 0.305, words)
    page.text(4.35, 0.305, "strong: carries gradient;  pale: no gradient")


@dataclass(frozen=True, slots=True)
class State:
    """Where a state of the recurrence begins on the page."""

    y: float
    start: float
    has_gradient: bool


def draw_order(page: Page, config: NetConfig, order: list[Application], y: float) -> float:
    """Draws a net's applications, the upper lane at `y`; returns the height of its lanes.

    There are two lanes: what began as x, and what began as z_L_init. An application stands on the
    lane of the state that it refines, which it reads first; an arrow from the other lane brings
    the state that is added.
    """
    start = LEFT - 0.1
    states = {"x": State(y, start, True), "z_L_init": State(y + LANE, start, False)}
    done = LEFT
    for application in order:
        width = config.stacks()[application.stack].n_layers * LAYER
        left, right = done + 0.06, done + width - 0.06
        own = states[application.reads[0]].y
        for name in application.reads:
            state = states[name]
            flows = application.keeps_gradient and state.has_gradient
            style = {"color": INK if flows else FAINT, "zorder": 2 if flows else 1}
            points = [(state.start, state.y), (left, own)]
            if state.y != own:
                middle = (left + right) / 2
                edge = own + BOX / 2 * (1 if state.y > own else -1)
                points[1:] = [(middle, state.y), (middle, edge)]
            page.arrow(*points, **style)
        states[application.writes] = State(own, right, application.keeps_gradient)
        letter = application.stack[0] if len(config.stacks()) > 1 else ""
        strong, pale = COLORS[f"{letter} stack" if letter else "the only stack"]
        is_strong = application.keeps_gradient
        fill, ink = (strong, "white") if is_strong else (pale, strong)
        page.box(left, own - BOX / 2, right - left, BOX, facecolor=fill, edgecolor=strong)
        page.text((left + right) / 2, own, letter, 9, color=ink, ha="center", weight="bold")
        done += width
    return max(state.y for state in states.values()) - y


def draw_step() -> Page:
    """One training step from the sampled folder to the checkpoint, and a packed row."""
    page = Page(9.65, 8.3)
    lines = [[part.strip() for part in line.split("|")] for line in FLOW.strip().splitlines()]
    middle = FLOW_LEFT + 0.45
    for number, ((title, file), (words, onward)) in enumerate(
        zip(lines[::2], lines[1::2], strict=True)
    ):
        y = FLOW_TOP + number * FLOW_STEP
        page.box(FLOW_LEFT, y, FLOW_WIDTH, FLOW_HEIGHT)
        page.text(FLOW_LEFT + 0.12, y + 0.15, title, 9, weight="bold")
        page.text(FLOW_LEFT + 0.12, y + 0.34, words, 7.5)
        page.text(FLOW_LEFT + 0.12, y + 0.52, file, 7, family="DejaVu Sans Mono", color=COLORS["L stack"][0])
        if onward:
            page.arrow((middle, y + FLOW_HEIGHT), (middle, y + FLOW_STEP))
            page.text(middle + 0.12, y + (FLOW_HEIGHT + FLOW_STEP) / 2, onward, 7.5, color=MUTED)
    draw_row(page)
    return page


def draw_row(page: Page) -> None:
    """A packed row: its tokens, positions and labels, and which token sees which."""
    layout = PackedLayout.from_lengths(
        torch.tensor(PREFIX_LENS), torch.tensor(CAUSAL_LENS), len(PREFIX_LENS)
    )
    mask = prefix_lm_mask(layout, ROW_TOKENS).tolist()
    columns: list[tuple[tuple[str, str], str, str, str]] = []
    for prefix_len, causal_len in zip(PREFIX_LENS, CAUSAL_LENS, strict=True):
        words = [f"q{i + 1}" for i in range(prefix_len)] + [f"a{i + 1}" for i in range(causal_len)]
        for position, (word, label) in enumerate(zip(words, [*words[1:], "end"], strict=True)):
            is_prefix, is_scored = position < prefix_len, position >= prefix_len - 1
            kind = PREFIX if is_prefix else RESPONSE
            columns.append((kind, word, str(position), label if is_scored else "·"))
    columns += [(PADDING, "", "0", "·")] * (ROW_TOKENS - len(columns))
    for column, (kind, *words) in enumerate(columns):
        x = STRIP_LEFT + column * CELL
        for row, word in enumerate(words):
            page.cell(x, STRIP_TOP + row * CELL * 1.25, kind[1] if row == 0 else PANEL, word)
        top = STRIP_TOP + 0.8
        for query, sees in enumerate(mask):
            color = columns[query][0][0] if sees[column] else PANEL
            page.cell(x, top + query * CELL, color)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the pictures of the documentation.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder")
    output = parser.parse_args().output
    draw_nets().save(output / "nets.svg")
    draw_step().save(output / "step.svg")


if __name__ == "__main__":
    main()
