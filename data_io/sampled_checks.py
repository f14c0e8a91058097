"""Everything that training relies on in a sampled folder, looked at whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_io.checks import (
    Finding,
    FramingCheck,
    check_flags,
    check_tokenizer,
    findings,
    prompt_format,
)
from data_io.sampled_format import (
    CHUNK,
    INDEX_NAMES,
    MAKE_AGAIN,
    EpochIndex,
    SampledData,
    SampledMetadata,
)

MIXERS = tuple(
    np.uint64(odd)
    for odd in (
        0x9E3779B97F4A7C15,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0xD6E8FEB86659FD93,
    )
)


def check_sampled(folder: Path) -> Iterator[Finding]:
    """All findings about a sampled folder."""
    try:
        metadata = SampledMetadata.load(folder / "metadata.json")
    except (ValueError, OSError) as error:
        yield Finding("FAIL", str(error))
        return
    vocabulary = f"{metadata.id_limit:,} ids, model vocabulary {metadata.padded_vocab_size:,}"
    yield Finding("ok", f"metadata.json: max_seq_len {metadata.max_seq_len}, {vocabulary}")
    num_epochs = 0
    while (folder / f"epoch_{num_epochs}").is_dir():
        num_epochs += 1
    data = SampledData(folder, metadata, num_epochs)
    for check in (_check_tokens, _check_scored, _check_epochs, _check_together, _check_framing):
        yield from findings(check, data)
    yield from findings(check_tokenizer, metadata.tokenizer_info, folder)


def _check_tokens(data: SampledData) -> Iterator[Finding]:
    tokens = data.tokens()
    for at in range(0, len(tokens), CHUNK):
        data.check_ids(tokens[at : at + CHUNK], f"in tokens {at} to {at + CHUNK}")
    limit = data.metadata.id_limit - 1
    yield Finding("ok", f"tokens.npy: {len(tokens):,} ids of {tokens.dtype}, all in 0..{limit}")


def _check_scored(data: SampledData) -> Iterator[Finding]:
    scored = data.scored()
    if scored is None:
        yield Finding("ok", "scored.npy: none, whole responses are scored")
        return
    place = data.folder / "scored.npy"
    if scored.dtype != np.uint8 or len(scored) != len(data.tokens()):
        raise ValueError(
            f"{place} holds {len(scored)} values of {scored.dtype}; it must be "
            f"{len(data.tokens())} of uint8, one per token; {MAKE_AGAIN}"
        )
    check_flags(scored, place)
    share = np.count_nonzero(scored) / max(1, len(scored))
    yield Finding("ok", f"scored.npy: {share:.1%} of the tokens may be scored")


def _check_epochs(data: SampledData) -> Iterator[Finding]:
    """Each epoch by itself, and that none is out of reach."""
    data.require_epochs(1)
    reachable = {f"epoch_{number}" for number in range(data.num_epochs)}
    for path in sorted(data.folder.glob("epoch_*")):
        if path.name not in reachable:
            yield Finding(
                "FAIL",
                f"{path} is out of reach: epochs are numbered without gaps, and "
                f"epoch_{data.num_epochs} is missing",
            )
    for number in range(data.num_epochs):
        yield from findings(_check_epoch, data, number)


def _check_epoch(data: SampledData, number: int) -> Iterator[Finding]:
    index = data.epoch(number)
    lengths = index.row_lengths()
    yield Finding(
        "ok",
        f"epoch_{number}: {len(index):,} examples, "
        f"{_num_tokens(index):,} tokens, the longest takes {lengths.max():,} of a row",
    )


def _check_together(data: SampledData) -> Iterator[Finding]:
    """What the epochs are to each other, and to metadata.json."""
    epochs = [data.epoch(number) for number in range(data.num_epochs)]
    mean = sum(map(_num_tokens, epochs)) / max(1, len(epochs))
    if abs(mean - data.metadata.total_length) >= 1:
        raise ValueError(
            f"{data.folder / 'metadata.json'}: total_length={data.metadata.total_length}, but the "
            f"epochs hold {mean:,.1f} tokens on average; {MAKE_AGAIN}"
        )
    yield Finding("ok", f"total_length: {data.metadata.total_length:,}, as the epochs have it")
    if len(epochs) < 2:
        return
    prints = [_prints(index) for index in epochs]
    for number, (_, order) in enumerate(prints):
        same = [earlier for earlier in range(number) if prints[earlier][1] == order]
        if same:
            yield Finding("note", f"epoch_{number} has the rows and order of epoch_{same[0]}")
    if len({rows for rows, _ in prints}) == 1:
        yield Finding("ok", f"epochs: all {len(epochs)} are orders of the same rows")
    else:
        sizes = sorted({len(index) for index in epochs})
        told = " or ".join(f"{size:,}" for size in sizes)
        yield Finding("ok", f"epochs: drawn anew each time, {told} examples each")


def _check_framing(data: SampledData) -> Iterator[Finding]:
    form = prompt_format(data.metadata.tokenizer_info, data.folder)
    if form is None:
        yield Finding("note", "framing: not looked at, as no tokenizer tells the tokens")
        return
    tokens = data.tokens()
    check = FramingCheck(form, data.metadata.max_seq_len)
    for number in range(data.num_epochs):
        first = 0
        for part in parts_of(data.epoch(number)):
            check.add(tokens, part, f"epoch_{number}", first)
            first += len(part)
    yield from check.findings()


def parts_of(index: EpochIndex) -> Iterator[EpochIndex]:
    """The examples of an epoch, some at a time, in memory."""
    for at in range(0, len(index), CHUNK):
        columns = (getattr(index, name)[at : at + CHUNK] for name in INDEX_NAMES)
        yield EpochIndex(*(column.astype(np.int64) for column in columns))


def _num_tokens(index: EpochIndex) -> int:
    return int(index.inst_len.sum(dtype=np.int64) + index.resp_len.sum(dtype=np.int64))


def _prints(index: EpochIndex) -> tuple[int, int]:
    """Fingerprints of the rows in any order, and of the rows in this order."""
    rows = order = at = 0
    for part in parts_of(index):
        mixed = np.zeros(len(part), np.uint64)
        for name, odd in zip(INDEX_NAMES, MIXERS, strict=True):
            mixed = (mixed ^ getattr(part, name).astype(np.uint64)) * odd
            mixed ^= mixed >> np.uint64(29)
        rows += int(mixed.sum(dtype=np.uint64))
        places = 2 * np.arange(at, at + len(part), dtype=np.uint64) + np.uint64(1)
        order += int((mixed * places).sum(dtype=np.uint64))
        at += len(part)
    return rows % 2**64, order % 2**64
