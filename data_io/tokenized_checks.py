"""Everything that sampling relies on in a tokenized folder, looked at whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from data_io.sampled_format import CHUNK, INDEX_NAMES, EpochIndex, TokenizerInfo
from data_io.sources import find_all_sources
from data_io.tokenized_format import (
    INFO_FILE,
    MAKE_AGAIN,
    METADATA_FILE,
    MadeBy,
    SourceMetadata,
    TokenizedSource,
    read_tokenizer_info,
    tokenized_folders,
)

MTIME_S = 1.0  # file systems and copies keep times that exactly


def check_tokenized(
    root: Path, sources: Sequence[Path], config: str | None = None, split: str = "train"
) -> Iterator[Finding]:
    """All findings about a tokenized folder; with `sources`, also whether it is of today's.

    `config` and `split`: of sources that are data sets.
    """
    try:
        info = read_tokenizer_info(root)
    except (ValueError, OSError) as error:
        yield Finding("FAIL", str(error))
        return
    yield Finding("ok", f"{INFO_FILE}: {info.vocab_size:,} ids")
    yield from findings(_check_folders, root, info)
    yield from findings(_check_made, root)
    yield from findings(check_tokenizer, info, root)
    if sources:
        yield from findings(_check_sources, root, sources, config, split)


def _check_folders(root: Path, info: TokenizerInfo) -> Iterator[Finding]:
    form = prompt_format(info, root)
    framing = FramingCheck(form) if form is not None else None
    num_rows = num_tokens = num_sources = 0
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and not (path / METADATA_FILE).is_file():
            yield Finding("FAIL", f"{path} is not whole: {METADATA_FILE} is missing; {MAKE_AGAIN}")
    for folder in tokenized_folders(root):
        try:
            source = TokenizedSource.open(folder)
            _check_source(source, info, framing)
        except (ValueError, OSError) as error:
            yield Finding("FAIL", str(error))
            continue
        num_sources += 1
        num_rows += len(source)
        num_tokens += len(source.tokens)
    if not num_sources:
        raise ValueError(
            f"{root} holds no whole source; write some with python -m data_io.tokenize"
        )
    if not num_rows:
        yield Finding("FAIL", f"sources: no row in {num_sources:,}; tokenize some that have rows")
    told = f"{num_sources:,} with {num_rows:,} rows and {num_tokens:,} tokens"
    yield Finding("ok", f"sources: {told}, all ids in 0..{(info.vocab_size or 0) - 1}")
    if framing is not None:
        yield from framing.findings()
    else:
        yield Finding("note", "framing: not looked at, as no tokenizer tells the tokens")


def _check_source(
    source: TokenizedSource, info: TokenizerInfo, framing: FramingCheck | None
) -> None:
    source.check()
    assert info.vocab_size is not None  # read_tokenizer_info requires it
    for at in range(0, len(source.tokens), CHUNK):
        part = source.tokens[at : at + CHUNK]
        highest, lowest = int(part.max()), int(part.min())
        if lowest < 0 or highest >= info.vocab_size:
            raise ValueError(
                f"{source.folder / 'tokens.npy'}: id {lowest if lowest < 0 else highest} in "
                f"tokens {at} to {at + CHUNK} is not in 0..{info.vocab_size - 1} "
                f"(vocab_size of {INFO_FILE}); {MAKE_AGAIN}"
            )
    if source.scored is not None:
        check_flags(source.scored, source.folder / "scored.npy")
    if framing is None:
        return
    for at in range(0, len(source), CHUNK):
        columns = (getattr(source, name)[at : at + CHUNK] for name in INDEX_NAMES)
        rows = EpochIndex(*(column.astype(np.int64) for column in columns))
        framing.add(source.tokens, rows, source.name, at)


def _check_made(root: Path) -> Iterator[Finding]:
    made = {folder.name: MadeBy.find(folder) for folder in tokenized_folders(root)}
    known = {name: each for name, each in made.items() if each is not None}
    if len({each.fingerprint for each in known.values()}) > 1:
        yield Finding(
            "note", "the sources were made with different tokenizers or options (made.json)"
        )
    dropped = sum(sum(each.dropped.values()) for each in known.values())
    if dropped:
        yield Finding("note", f"{dropped:,} rows of the sources were dropped when tokenized")


def _check_sources(
    root: Path, paths: Sequence[Path], config: str | None, split: str
) -> Iterator[Finding]:
    """Whether the folders are those of the sources, as these are now."""
    found = find_all_sources(paths, config, split)
    sources = {source.folder_name: source for source in found}
    folders = {folder.name: folder for folder in tokenized_folders(root)}
    again = "run python -m data_io.tokenize again"
    for name in sorted(sources.keys() - folders.keys()):
        yield Finding("FAIL", f"{sources[name].path} is not tokenized; {again}")
    for name in sorted(folders.keys() - sources.keys()):
        yield Finding("FAIL", f"{folders[name]} has no source any more; {again}")
    stale = 0
    for name in sorted(sources.keys() & folders.keys()):
        state = sources[name].state
        metadata = SourceMetadata.model_validate_json((folders[name] / METADATA_FILE).read_bytes())
        moved_s = abs(metadata.source_mtime - state.mtime_ns / 1e9)
        is_stale = metadata.source_size != state.size or moved_s > MTIME_S
        if state.identity:  # of a data set
            made = MadeBy.find(folders[name])
            is_stale = made is None or not made.is_of(state)
        if is_stale:
            stale += 1
            yield Finding(
                "FAIL",
                f"{sources[name].path} changed after it was tokenized: {metadata.source_size:,} "
                f"bytes then, {state.size:,} now; {again}",
            )
    if not stale and sources.keys() == folders.keys():
        yield Finding("ok", f"sources: all {len(sources):,} are as they were when tokenized")
