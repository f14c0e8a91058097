"""Checks sampled or tokenized data whole: everything that training relies on, and what else may
surprise.

    python -m data_io.verify DIR
    python -m data_io.verify data/tokenized sources=data/cleaned

One line per check. Exit code 0: sound, 1: there are problems, 2: there is no such data.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from data_io.checks import Finding
from data_io.console import run_command
from data_io.options import parse_options
from data_io.published_options import as_key_values
from data_io.sampled_checks import check_sampled
from data_io.tokenized_checks import check_tokenized
from data_io.tokenized_format import INFO_FILE

PROBLEMS = 1  # exit code


class VerifyOptions(BaseModel):
    """The command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: Path = Field(description="sampled or tokenized data; the name may be left out")
    sources: tuple[Path, ...] = Field(
        (), description="files, folders or data sets that tokenized data must be of, as they are"
    )
    config: str | None = Field(default=None, description="of data sets of the hub")
    split: str = Field(default="train", description="of data sets of the hub")


def is_sampled(folder: Path) -> bool:
    """Sampled data has its tokens in the folder itself, tokenized data one folder below."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; name one of sampled or tokenized data")
    if any((folder / name).exists() for name in ("tokens.npy", "epoch_0", "metadata.json")):
        return True
    if (folder / INFO_FILE).exists() or any(folder.glob("*/inst_len.npy")):
        return False
    raise ValueError(
        f"{folder} is neither sampled data (metadata.json, tokens.npy, epoch_0) nor tokenized "
        f"data ({INFO_FILE} and a folder per source)"
    )


def verify(options: VerifyOptions) -> Iterator[Finding]:
    """All findings, each when it is made."""
    if not is_sampled(options.folder):
        yield from check_tokenized(options.folder, options.sources, options.config, options.split)
        return
    if options.sources:
        raise ValueError(
            f"{options.folder} is sampled data, which knows no sources; leave sources out"
        )
    yield from check_sampled(options.folder)


def main(arguments: Sequence[str]) -> None:
    options = parse_options(
        VerifyOptions,
        as_key_values(arguments, VerifyOptions, by_position="folder", short={}),
        __doc__ or "",
    )
    problems = 0
    for finding in verify(options):
        print(f"{finding.status:4}  {finding.text}", flush=True)
        problems += finding.status == "FAIL"
    print(f"{options.folder}: " + (f"{problems} problems" if problems else "sound"))
    if problems:
        sys.exit(PROBLEMS)


if __name__ == "__main__":
    run_command(main)
