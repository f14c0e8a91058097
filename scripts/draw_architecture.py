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

INK, MUTED, FAINT, PANEL, LINK = "#1f2933", "#66717c", "#b4bdc6", "#f5f6f8", "#2b659b"
COLORS = {  # with gradient, without
    "H stack": ("#c0591d", "#fbebdf"),
    "L stack": ("#2b659b", "#e3edf6"),
    "the only stack": ("#4a7c59", "#e6f0e8"),
}
PREFIX, RESPONSE, PADDING = ("#6d5a9c", "#e9e5f2"), ("#23857a", "#dcefec"), ("#8b949e", "#e9ebee")

NETS = ("hrm", "trm", "trm_match_recurrence", "rins", "ut", "transformer")
SIZE = "XL"
LEFT, LAYER, COLUMNS = 2.8, 4.6 / 128, (8.25, 8.82, 9.4)  # inches; LAYER: width of one
BOX, LANE, ROW = 0.27, 0.46, 0.3  # heights: a box, lane to lane, between rows

# title | files, then what happens | what goes on to the next
FLOW = """
Sampled folder | data_io/sampled_format.py
tokens.npy, epoch_<k>/*.npy, metadata.json | lengths, token ids
PrefixLMDataset + MultipackSampler | dataset_new.py, multipack_sampler.py
packs whole examples into rows of T tokens | rows made ahead (training/prefetch.py)
PackedBatch | models/batch.py
copied to the device during the step before | tokens, positions, layout
LanguageModel | models/language_model.py, recurrence.py, attention/
embedding; attention plan once per batch; stacks in order | hidden [T, D]
Chunked loss | models/loss.py
cross-entropy; the [T, V] logits never exist at once | summed loss / scored tokens
Backward | training/distributed.py
FSDP2 sums gradients over ranks | gradients
AdamATan2 + EMA | training/adam_atan2.py, schedule.py
updates weights and their moving average | now and then: model, EMA, optimizer, progress
RunDirectory | training/checkpoint.py
a checkpoint, written aside and published by rename |
MetricsLogger | training/telemetry.py
adds sums up; metrics.jsonl, progress bar |
"""
FLOW_LEFT, FLOW_TOP, FLOW_WIDTH, FLOW_HEIGHT, FLOW_STEP = 0.72, 0.25, 4.0, 0.66, 0.96
PREFIX_LENS, CAUSAL_LENS, ROW_TOKENS = (4, 3, 2), (4, 3, 2), 20
CELL, STRIP_LEFT, STRIP_TOP = 0.155, 6.12, 0.98


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
        self.text(x + CELL / 2, y + CELL / 2, words, 6, ha="center")

    def dot(self, x: float, y: float, *, is_full: bool) -> None:
        fill, edge = (INK, INK) if is_full else ("white", FAINT)
        self.axes.plot(x, y, "o", markersize=5, color=fill, markeredgecolor=edge, zorder=5)

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
    page = Page(9.8, 6.75)
    draw_legend(page)
    y = 1.45
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
            y = draw_order(page, config, order, y) + BOX + ROW
    return page


def draw_legend(page: Page) -> None:
    """What colours and lines mean, and the heads of the columns."""
    for x, (words, colors) in zip((0.25, 1.4, 2.55), COLORS.items(), strict=True):
        for offset, color in zip((0, 0.21), colors, strict=True):
            page.box(x + offset, 0.2, 0.17, 0.17, facecolor=color, edgecolor=colors[0])
        page.text(x + 0.47, 0.285, words)
    page.text(4.3, 0.285, "strong: carries gradient, pale: does not")
    for x, words, color in ((0.25, "gradient flows back", INK), (2.0, "it does not", FAINT)):
        page.arrow((x, 0.58), (x + 0.38, 0.58), color=color)
        page.text(x + 0.47, 0.58, words)
    for x, words, is_full in ((4.3, "gradient reaches x", True), (5.9, "it does not", False)):
        page.dot(x + 0.05, 0.58, is_full=is_full)
        page.text(x + 0.17, 0.58, words)
    page.text(LEFT, 1.0, "one forward pass, left to right; width: layers", 7.5, color=MUTED)
    page.text(COLUMNS[1], 0.83, f"layers, size {SIZE}", 7.5, color=MUTED, ha="center")
    for x, words in zip(COLUMNS, ("stored", "applied", "gradient"), strict=True):
        page.text(x, 1.0, words, 7.5, color=MUTED, ha="center")
    page.line((0.25, 1.13), (9.6, 1.13), color=FAINT, linewidth=0.6)


@dataclass(frozen=True, slots=True)
class State:
    """Where a state of the recurrence begins on the page."""

    y: float
    start: float
    has_gradient: bool


def draw_order(page: Page, config: NetConfig, order: list[Application], y: float) -> float:
    """Draws a net's applications, the upper lane at `y`; returns where its lowest lane is.

    There are two lanes: what began as x, and what began as z_L_init. An application stands on the
    lane of the state that it refines, which it reads first; an arrow from the other lane brings
    the state that is added.
    """
    begin = LEFT - 0.1
    states = {"x": State(y, begin, True), "z_L_init": State(y + LANE, begin, False)}
    names: dict[float, list[str]] = {}  # of the states that are read, by lane
    reaches_x, done, right = False, LEFT, LEFT
    for application in order:
        width = config.stacks()[application.stack].n_layers * LAYER
        left, right = done + 0.06, done + width - 0.06
        own = states[application.reads[0]].y
        for name in application.reads:
            state = states[name]
            flows = application.keeps_gradient and state.has_gradient
            reaches_x |= flows and name == "x"
            points = [(state.start, state.y), (left, own)]
            if state.y != own:
                middle, edge = (left + right) / 2, own + BOX / 2 * (1 if state.y > own else -1)
                points[1:] = [(middle, state.y), (middle, edge)]
            page.arrow(*points, color=INK if flows else FAINT, zorder=2 if flows else 1)
            names.setdefault(state.y, []).append(name)
        states[application.writes] = State(own, right, application.keeps_gradient)
        draw_box(page, config, application, (left, right, own))
        done += width
    page.arrow((right, states[order[-1].writes].y), (done + 0.16, states[order[-1].writes].y))
    page.text(done + 0.2, states[order[-1].writes].y, "head", 7.5, color=MUTED)
    for lane, read in names.items():
        words = " = ".join(f"${name}$" for name in reversed(dict.fromkeys(read)))
        page.text(begin - 0.09, lane, words.replace("$z_L_init$", "init"), 8, ha="right")
        page.dot(begin, lane, is_full=lane == y and reaches_x)
    return max(names)


def draw_box(
    page: Page, config: NetConfig, application: Application, place: tuple[float, float, float]
) -> None:
    left, right, y = place
    letter = application.stack[0] if len(config.stacks()) > 1 else ""
    strong, pale = COLORS[f"{letter} stack" if letter else "the only stack"]
    fill, ink = (strong, "white") if application.keeps_gradient else (pale, strong)
    page.box(left, y - BOX / 2, right - left, BOX, facecolor=fill, edgecolor=strong)
    page.text((left + right) / 2, y, letter, 9, color=ink, ha="center", weight="bold")


def draw_step() -> Page:
    """One training step from the sampled folder to the checkpoint, and a packed row."""
    page = Page(9.8, 8.15)
    lines = [[part.strip() for part in line.split("|")] for line in FLOW.strip().splitlines()]
    *flow, logger = zip(lines[::2], lines[1::2], strict=True)
    ys = [FLOW_TOP + number * FLOW_STEP for number in range(len(flow))]
    middle, right = FLOW_LEFT + 0.45, FLOW_LEFT + FLOW_WIDTH
    places = [*((FLOW_LEFT, y, FLOW_WIDTH) for y in ys), (6.5, ys[6], 3.05)]
    for (x, y, width), ((title, files), (words, onward)) in zip(
        places, [*flow, logger], strict=True
    ):
        page.box(x, y, width, FLOW_HEIGHT)
        page.text(x + 0.12, y + 0.15, title, 9, weight="bold")
        page.text(x + 0.12, y + 0.34, words, 7.5)
        page.text(x + 0.12, y + 0.52, files, 7, family="DejaVu Sans Mono", color=LINK)
        if onward:
            page.arrow((middle, y + FLOW_HEIGHT), (middle, y + FLOW_STEP))
            page.text(middle + 0.12, y + (FLOW_HEIGHT + FLOW_STEP) / 2, onward, 7.5, color=MUTED)
    half = FLOW_HEIGHT / 2
    page.arrow(
        (right, ys[4] + half), (4.97, ys[4] + half), (4.97, ys[6] + half), (6.5, ys[6] + half)
    )
    page.text(5.74, ys[6] + half - 0.11, "StepSums", 7.5, color=MUTED, ha="center")
    for first, last, words in ((0, 1, "one worker process"), (2, 7, "every rank: pretrain.py")):
        top, bottom = ys[first], ys[last] + FLOW_HEIGHT
        page.line((0.58, top), (0.52, top), (0.52, bottom), (0.58, bottom), color=MUTED)
        page.text(0.34, (top + bottom) / 2, words, 8, ha="center", va="center", rotation=90)
    page.line((right, ys[2] + half), (5.2, ys[2] + half), color=MUTED, linestyle=":")
    draw_row(page)
    return page


def draw_row(page: Page) -> None:
    """A packed row: its tokens, positions and labels, and which token sees which."""
    page.box(5.2, FLOW_TOP, 4.35, 5.25, edgecolor="none", facecolor=PANEL)
    page.text(5.35, 0.45, "A packed row, and which token sees which", 9, weight="bold")
    lens = list(zip(PREFIX_LENS, CAUSAL_LENS, strict=True))
    layout = PackedLayout.from_lengths(*torch.tensor(lens).T, num_slots=len(lens))
    columns: list[tuple[tuple[str, str], str, str, str]] = []  # colours, token, position, label
    for number, (prefix_len, causal_len) in enumerate(lens):
        words = [f"q{i + 1}" for i in range(prefix_len)] + [f"a{i + 1}" for i in range(causal_len)]
        x = STRIP_LEFT + CELL * (len(columns) + len(words) / 2)
        page.text(x, STRIP_TOP - 0.13, f"example {number + 1}", 7, color=MUTED, ha="center")
        for position, (word, label) in enumerate(zip(words, [*words[1:], "end"], strict=True)):
            kind = PREFIX if position < prefix_len else RESPONSE
            columns.append(
                (kind, word, str(position), label if position >= prefix_len - 1 else "·")
            )
    columns += [(PADDING, "", "0", "·")] * (ROW_TOKENS - len(columns))
    mask_top = STRIP_TOP + 0.75
    for row, words in enumerate(("tokens", "positions", "labels")):
        y = STRIP_TOP + row * 0.21 + CELL / 2
        page.text(STRIP_LEFT - 0.08, y, words, 7, color=MUTED, ha="right")
    for at, (kind, *words) in enumerate(columns):
        for row, word in enumerate(words):
            color = "white" if row else kind[1]
            page.cell(STRIP_LEFT + at * CELL, STRIP_TOP + row * 0.21, color, word)
        page.cell(STRIP_LEFT - 1.4 * CELL, mask_top + at * CELL, kind[1], words[0])
    side = ROW_TOKENS * CELL
    page.axes.add_patch(Rectangle((STRIP_LEFT, mask_top), side, side, facecolor="white"))
    for (at, sees), (kind, *_) in zip(
        enumerate(prefix_lm_mask(layout, ROW_TOKENS).tolist()), columns, strict=True
    ):
        if any(sees):
            x, y = STRIP_LEFT + sees.index(True) * CELL, mask_top + at * CELL
            page.axes.add_patch(
                Rectangle((x, y), sum(sees) * CELL, CELL, facecolor=kind[0], zorder=2)
            )
    for at in range(ROW_TOKENS + 1):
        x, y, style = STRIP_LEFT + at * CELL, mask_top + at * CELL, {"color": PANEL, "zorder": 3}
        page.line((x, mask_top), (x, mask_top + side), **style)
        page.line((STRIP_LEFT, y), (STRIP_LEFT + side, y), **style)
    for row, (kind, words) in enumerate(
        (
            (PREFIX, "prefix: sees the whole prefix, in both directions"),
            (RESPONSE, "response: sees the prefix and what came before"),
        )
    ):
        page.cell(STRIP_LEFT, mask_top + side + 0.12 + row * 0.2, kind[0])
        page.text(STRIP_LEFT + 0.25, mask_top + side + 0.12 + row * 0.2 + CELL / 2, words, 7)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the pictures of the documentation.")
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder")
    output = parser.parse_args().output
    draw_nets().save(output / "nets.svg")
    draw_step().save(output / "step.svg")


if __name__ == "__main__":
    main()
