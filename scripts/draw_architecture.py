"""Draws docs/nets.svg (the order of every net) and docs/step.svg (one training step).

    python scripts/draw_architecture.py

Orders, gradients, layer counts and the attention mask come from the code; words are written here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Outline
from pydantic import TypeAdapter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import ArchConfig
from models.attention.dense import prefix_lm_mask
from models.batch import PackedLayout
from models.hrm import HRMConfig
from models.transformer import Application, NetConfig

ROOT = Path(__file__).resolve().parents[1]
NETS, SIZE = ("hrm", "trm", "trm_match_recurrence", "rins", "ut", "transformer"), "XL"
INK, MUTED, FAINT, PANEL, LINK = "#1f2933", "#66717c", "#b4bdc6", "#f5f6f8", "#2b659b"
STACKS = {"H stack": "#c0591d", "L stack": "#2b659b", "the only stack": "#4a7c59"}
PREFIX, RESPONSE, PADDING, PALE = "#6d5a9c", "#23857a", "#66717c", 0.14  # PALE: opacity
ARROW = {"arrowstyle": "-|>,head_width=0.2,head_length=0.4", "mutation_scale": 10, "linewidth": 1}
# In inches. Nets: left edge, one layer, columns; a box, lane to lane, row to row.
LEFT, LAYER, COLUMNS, BOX, LANE, ROW = 2.8, 4.6 / 128, (8.22, 8.78, 9.31), 0.26, 0.42, 0.89
FLOW_LEFT, FLOW_TOP, FLOW_WIDTH, FLOW_HEIGHT, FLOW_STEP = 0.68, 0.25, 3.9, 0.66, 0.96
PREFIX_LENS, CAUSAL_LENS, ROW_TOKENS = (4, 3, 2), (4, 2, 1), 18
CELL, STRIP_LEFT, STRIP_TOP, STRIP_STEP = 0.182, 6.0, 0.92, 0.23
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
adds sums up; metrics.jsonl, progress bar |"""


class Page:
    """A white page measured in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")

    def text(self, x: float, y: float, words: str, size: float = 8, **style: Any) -> None:
        style = {"color": INK, "va": "center_baseline", "zorder": 4, **style}
        self.axes.text(x, y, words, size=size, **style)

    def box(self, x: float, y: float, width: float, height: float, **style: Any) -> None:
        style = {"facecolor": "white", "edgecolor": INK, "linewidth": 0.9, "zorder": 2, **style}
        shape = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.05", **style)
        self.axes.add_patch(shape)

    def cells(self, xs: list[float], ys: list[float], colors: Any, words: Any = ()) -> None:
        xs, ys = [x + CELL / 2 for x in xs], [y + CELL / 2 for y in ys]
        self.axes.scatter(xs, ys, (72 * CELL - 0.8) ** 2, colors, marker="s", lw=0, zorder=3)
        for x, y, word in zip(xs, ys, words, strict=False):
            self.text(x, y, word, 6.2, ha="center")

    def arrow(self, *points: tuple[float, float], **style: Any) -> None:
        style = {**ARROW, "color": INK, "zorder": 1, **style}
        self.axes.add_patch(FancyArrowPatch(path=Outline(points), **style))

    def save(self, path: Path) -> None:
        with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": path.name}):
            self.figure.savefig(path, metadata={"Date": None, "Creator": None})
        unneeded = r"(?<=\.\d)\d+(?= 0\))|(?<=\.\d{3})\d+|(?<=\n) +| clip-path=\"[^\"]*\""
        path.write_text(re.sub(unneeded, "", path.read_text()).replace("DejaVuSans", "D"))


def draw_nets() -> Page:
    """One row a net in its published setting; two for HRM, whose gradient reaches further later."""
    page, y = Page(9.7, 7.1), 1.42
    draw_legend(page)
    n_layers = yaml.safe_load((ROOT / f"config/arch/size/{SIZE}.yaml").read_text())["n_layers"]
    for name in NETS:
        net = yaml.safe_load((ROOT / f"config/arch/net/{name}.yaml").read_text())
        net |= {"n_layers": n_layers, "hidden_size": 8, "num_heads": 1}
        config: NetConfig = TypeAdapter(ArchConfig).validate_python(net)
        cycles = [f"{k} {v}" for k, v in config if k.endswith("cycles") and "bp" not in k]
        variants: dict[int | None, str] = {None: ", ".join(cycles)}
        if isinstance(config, HRMConfig):
            start, end, share = config.bp_min_steps, config.bp_max_steps, config.bp_warmup_ratio
            variants = {start: "bp {}, at the start", end: f"bp {{}}, after {share:.0%} of steps"}
        for backprop_steps, caption in variants.items():
            order = list(config.applications(backprop_steps))
            draw_order(page, config, order, y)
            page.text(0.25, y, name, 9, weight="bold")
            page.text(0.25, y + 0.19, caption.format(backprop_steps), 7.5, color=MUTED)
            stacks = config.stacks()
            layers = [(stacks[a.stack].n_layers, a.keeps_gradient) for a in order]
            stored = " + ".join(str(stack.n_layers) for stack in stacks.values())
            counts = (stored, sum(n for n, _ in layers), sum(n for n, keeps in layers if keeps))
            for x, count in zip(COLUMNS, counts, strict=True):
                page.text(x, y, str(count), 8.5, ha="center")
            y += ROW
    return page


def draw_legend(page: Page) -> None:
    """What colours and lines mean, and the heads of the columns."""
    for x, (words, color) in zip((0.25, 1.4, 2.55), STACKS.items(), strict=True):
        page.box(x, 0.2, 0.17, 0.17, facecolor=color, edgecolor=color)
        page.box(x + 0.21, 0.2, 0.17, 0.17, facecolor=(color, PALE), edgecolor=color)
        page.text(x + 0.47, 0.285, words)
    for x, words, color in ((0.25, "gradient flows back", INK), (2.55, "it does not", FAINT)):
        page.arrow((x, 0.58), (x + 0.38, 0.58), color=color)
        page.text(x + 0.47, 0.58, words)
    page.text(4.55, 0.285, "strong: carries gradient; pale: runs without")
    page.text(4.55, 0.58, "x: the embedded tokens; init: a fixed vector")
    page.text(LEFT, 0.98, "one forward pass, left to right; width: layers", 7.5, color=MUTED)
    page.text(COLUMNS[1], 0.8, f"layers (size {SIZE})", 7.5, color=MUTED, ha="center")
    for x, words in zip(COLUMNS, ("stored", "applied", "gradient"), strict=True):
        page.text(x, 0.98, words, 7.5, color=MUTED, ha="center")
    page.arrow((0.25, 1.1), (9.55, 1.1), color=FAINT, arrowstyle="-")


def draw_order(page: Page, config: NetConfig, order: list[Application], y: float) -> None:
    """Draws a net's applications, the upper lane at `y`.

    Of the two lanes one began as x, the other as z_L_init. An application stands on the lane of
    the state that it reads first and refines; what it adds comes from the other lane.
    """
    begin, end, own = LEFT - 0.1, LEFT, y
    # of each state: the lane, where its line begins, whether it has a gradient
    states = {"x": (y, begin, True), "z_L_init": (y + LANE, begin, False)}
    drawn: dict[tuple[str, float, bool], float] = {}  # how far a state's line has come
    read: dict[float, list[str]] = {}  # states by lane
    for application in order:
        left, end = end + 0.06, end + config.stacks()[application.stack].n_layers * LAYER
        middle, right = (left + end - 0.06) / 2, end - 0.06
        own, keeps = states[application.reads[0]][0], application.keeps_gradient
        for name in application.reads:
            lane, start, has_gradient = states[name]
            line = (name, start, keeps and has_gradient)
            points = [(drawn.get(line, start), lane), (left, own)]
            if lane != own:
                edge = own + BOX / 2 * (1 if lane > own else -1)
                points[1:] = [(middle, lane), (middle, edge)]
            page.arrow(*points, color=INK if line[2] else FAINT, zorder=1 + line[2] / 2)
            drawn[line] = points[1][0]
            read.setdefault(lane, []).append(name)
        letter = application.stack[0] if len(config.stacks()) > 1 else ""
        color = STACKS[f"{letter} stack" if letter else "the only stack"]
        fill, ink = (color, "white") if keeps else ((color, PALE), color)
        page.box(left, own - BOX / 2, right - left, BOX, facecolor=fill, edgecolor=color)
        page.text(middle, own, letter, 9, color=ink, ha="center", weight="bold")
        states[application.writes] = (own, right, keeps)
    page.arrow((end - 0.06, own), (end + 0.16, own))
    page.text(end + 0.2, own, "head", 7.5, color=MUTED)
    for lane, names in read.items():
        words = " = ".join(f"${name}$" for name in reversed(dict.fromkeys(names)))
        page.text(begin - 0.09, lane, words.replace("$z_L_init$", "init"), ha="right")
        color = INK if ("x", begin, True) in drawn and lane == y else FAINT
        page.axes.plot(begin, lane, "o", markersize=5, color=color)


def draw_step() -> Page:
    """One training step from the sampled folder to the checkpoint, and a packed row."""
    page = Page(9.7, 7.9)
    lines = [[part.strip() for part in line.split("|")] for line in FLOW.strip().splitlines()]
    ys = [FLOW_TOP + number * FLOW_STEP for number in range(len(lines) // 2 - 1)]
    right, half, logger = FLOW_LEFT + FLOW_WIDTH, FLOW_HEIGHT / 2, 6.35
    places = [*((FLOW_LEFT, y, FLOW_WIDTH) for y in ys), (logger, ys[6], 9.45 - logger)]
    boxes = zip(places, lines[::2], lines[1::2], strict=True)
    for (x, y, width), (title, files), (words, onward) in boxes:
        page.box(x, y, width, FLOW_HEIGHT)
        page.text(x + 0.12, y + 0.15, title, 9, weight="bold")
        page.text(x + 0.12, y + 0.34, words, 7.5)
        page.text(x + 0.12, y + 0.52, files, 7, family="DejaVu Sans Mono", color=LINK)
        if onward:
            page.arrow((x + 0.45, y + FLOW_HEIGHT), (x + 0.45, y + FLOW_STEP))
            page.text(x + 0.57, y + (FLOW_HEIGHT + FLOW_STEP) / 2, onward, 7.5, color=MUTED)
    loss, metrics, turn = ys[4] + half, ys[6] + half, right + 0.2
    page.arrow((right, loss), (turn, loss), (turn, metrics), (logger, metrics))
    page.text((turn + logger) / 2, metrics - 0.1, "StepSums", 7.5, color=MUTED, ha="center")
    for first, last, words in ((0, 1, "one worker process"), (2, 7, "every rank: pretrain.py")):
        top, bottom = ys[first], ys[last] + FLOW_HEIGHT
        page.arrow((0.54, top), (0.48, top), (0.48, bottom), (0.54, bottom), arrowstyle="-")
        page.text(0.32, (top + bottom) / 2, words, ha="center", va="center", rotation=90)
    page.arrow((right, ys[2] + half), (5, ys[2] + half), color=MUTED, arrowstyle="-", ls=":")
    draw_row(page)
    return page


def draw_row(page: Page) -> None:
    """A packed row: its tokens, positions and labels, and the mask of its attention."""
    page.box(5, FLOW_TOP, 4.45, 5.52, edgecolor="none", facecolor=PANEL)
    page.text(5.15, FLOW_TOP + 0.22, "A packed row, and which token sees which", 9, weight="bold")
    lens, colors = torch.tensor([PREFIX_LENS, CAUSAL_LENS]), list[str]()
    strips: dict[str, list[str]] = {"tokens": [], "positions": [], "labels": []}
    for number, (prefix_len, causal_len) in enumerate(lens.T.tolist()):
        words = [f"q{i + 1}" for i in range(prefix_len)] + [f"a{i + 1}" for i in range(causal_len)]
        x = STRIP_LEFT + CELL * (len(colors) + len(words) / 2)
        page.text(x, STRIP_TOP - 0.12, f"example {number + 1}", 7, color=MUTED, ha="center")
        colors += [PREFIX] * prefix_len + [RESPONSE] * causal_len
        strips["tokens"] += words
        strips["positions"] += map(str, range(len(words)))
        strips["labels"] += [""] * (prefix_len - 1) + words[prefix_len:] + ["end"]
    page.text(STRIP_LEFT + ROW_TOKENS * CELL, STRIP_TOP - 0.12, "pad", 7, color=MUTED, ha="right")
    pale = [(color, PALE) for color in colors + [PADDING] * (ROW_TOKENS - len(colors))]
    xs = [STRIP_LEFT + at * CELL for at in range(ROW_TOKENS)]
    for row, (name, words) in enumerate(strips.items()):
        y = STRIP_TOP + row * STRIP_STEP
        page.text(STRIP_LEFT - 0.1, y + CELL / 2, name, 7, color=MUTED, ha="right")
        page.cells(xs, [y] * ROW_TOKENS, "white" if row else pale, words)
    top, side = STRIP_TOP + 3 * STRIP_STEP + 0.1, ROW_TOKENS * CELL
    ys = [top + at * CELL for at in range(ROW_TOKENS)]
    page.cells([STRIP_LEFT - 0.1 - CELL] * ROW_TOKENS, ys, pale, strips["tokens"])
    page.axes.barh(top, side, side, STRIP_LEFT, align="edge", color="white", zorder=2)
    mask = prefix_lm_mask(PackedLayout.from_lengths(*lens, num_slots=lens.shape[1]), ROW_TOKENS)
    for y, color, visible in zip(ys, colors, mask, strict=False):
        seen = visible.nonzero().flatten().tolist()
        page.cells([xs[at] for at in seen], [y] * len(seen), color)
    y = top + side + 0.18
    page.text(STRIP_LEFT, y, "prefix tokens see their whole prefix, both ways", 7.5, color=PREFIX)
    page.text(STRIP_LEFT, y + 0.2, "response tokens see their example so far", 7.5, color=RESPONSE)
    page.text(STRIP_LEFT, y + 0.4, "no label: not scored; padding sees nothing", 7.5, color=MUTED)


if __name__ == "__main__":
    draw_nets().save(ROOT / "docs/nets.svg")
    draw_step().save(ROOT / "docs/step.svg")
