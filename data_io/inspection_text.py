"""What an inspection found, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from data_io.inspection import PACKED, Lengths, Overview, Packing, Shelves

BAR = 40  # characters of the longest bar
MOST_SOURCES = 30
QUANTILES = (0.5, 0.9, 0.99)


def overview_lines(shelves: Shelves, found: Overview) -> Iterator[str]:
    """All but examples and packing."""
    yield f"{shelves.folder}: {shelves.kind} data, {shape_line(shelves)}"
    yield ""
    for name, value in facts(shelves, found):
        yield f"{name:<22}{value}"
    yield ""
    yield "tokens of a row       rows"
    most = max((rows for _, _, rows, _ in found.lengths.bins()), default=1)
    for low, high, rows, _ in found.lengths.bins():
        bar = "#" * -(-rows * BAR // most)
        yield f"{low:>8,} -{high:>8,}   {bar:<{BAR}} {rows:,}"
    if len(found.sources) > 1:
        yield ""
        yield f"{'source':<40}{'rows':>14}{'tokens':>16}"
        for name, rows, tokens in found.sources[:MOST_SOURCES]:
            yield f"{name:<40}{rows:>14,}{tokens:>16,}"
        if len(found.sources) > MOST_SOURCES:
            yield f"and {len(found.sources) - MOST_SOURCES:,} more"


def shape_line(shelves: Shelves) -> str:
    """Of how many rows of what."""
    rows = f"{len(shelves):,} rows"
    if shelves.num_epochs is None:
        return f"{rows} of {len(shelves.shelves):,} sources"
    return f"{rows} in {shelves.shelves[0].name} of {shelves.num_epochs}, at most " + (
        f"{shelves.max_seq_len:,} tokens each"
    )


def facts(shelves: Shelves, found: Overview) -> Iterator[tuple[str, str]]:
    """(name, value) of what was counted."""
    total = found.lengths.tokens
    yield "tokens", f"{total:,}"
    for name, lengths in (
        ("instruction", found.inst_lengths),
        ("response", found.resp_lengths),
        ("both", found.lengths),
    ):
        yield name, length_line(lengths, total)
    looked_at = f"of {found.num_looked_at:,}"
    if found.num_looked_at < len(shelves):
        looked_at += " looked at"
    if found.conditions is None:
        yield "conditions", "unknown: the tokenizer is not here"
    else:
        shares = (
            f"{name} {count / found.num_looked_at:.1%}"
            for name, count in found.conditions.most_common()
        )
        yield "conditions", ", ".join(shares)
    if found.num_without_eoa is not None:
        share = found.num_without_eoa / found.num_looked_at
        yield "without eoa", f"{found.num_without_eoa:,} {looked_at} ({share:.1%})"
    if found.scored_share < 1:
        yield "scored", f"{found.scored_share:.2%} of the response tokens"
    yield "repeated rows", f"{found.num_repeated:,} {looked_at}"
    yield "repeated instructions", f"{found.num_prompts_repeated:,} {looked_at}"


def length_line(lengths: Lengths, total: int) -> str:
    quantiles = ", ".join(f"{lengths.quantile(share):,} at {share:.0%}" for share in QUANTILES)
    share = lengths.tokens / max(1, total)
    longest = len(lengths.counts) - 1
    return f"{share:.0%} of the tokens; mean {lengths.mean:,.1f}, {quantiles}, longest {longest:,}"


def packing_line(packing: Packing) -> str:
    told = f"{packing.num_rows:,} rows"
    if packing.num_rows == PACKED:
        told = f"the first {told}"
    return (
        f"{1 - packing.padding_share:.2%} of {packing.num_batches:,} batches of "
        f"{packing.batch_tokens:,} tokens is filled ({told})"
    )
