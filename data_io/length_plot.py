"""The lengths of rows as a picture: how many rows and how many tokens are of which length."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_io.inspection import Overview

BINS = 48
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def draw_lengths(found: Overview, path: Path) -> None:
    """Writes the picture."""
    if path.suffix not in PICTURE_SUFFIXES:
        raise ValueError(f"{path} is no picture; name a file that ends with .png, .svg or .pdf")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    by_rows, by_tokens = figure.subplots(2, 1, sharex=True)
    longest = max(2, len(found.lengths.counts) - 1)
    edges = np.unique(np.geomspace(1, longest + 1, BINS).astype(np.int64))
    for name, lengths, color in (
        ("instruction", found.inst_lengths, "C0"),
        ("response", found.resp_lengths, "C2"),
        ("both", found.lengths, "0.4"),
    ):
        sizes = np.arange(len(lengths.counts))
        for axes, weights in (
            (by_rows, lengths.counts),
            (by_tokens, lengths.counts * sizes),
        ):
            heights, _ = np.histogram(sizes, edges, weights=weights)
            axes.stairs(heights, edges, label=name, color=color, linewidth=1.6)
    by_rows.set(ylabel="rows", xscale="log")
    by_tokens.set(ylabel="tokens", xlabel="length, in tokens", xscale="log")
    by_rows.legend(frameon=False)
    figure.savefig(path, dpi=150)
