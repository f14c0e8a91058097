"""From documents to what a language model is trained on, in one command.

    python -m data_io.prepare_corpus source=DIR output=data/corpus vocab_size=32768
    python -m data_io.prepare_corpus source=https://.../fineweb output=data/corpus num_shards=370 \\
        tok_train_shards=8 vocab_size=32768

Fetches the files (kept, resumed) or takes those of a folder, trains a tokenizer on the first ones,
compares it, and writes all documents (field `text`) as .bin shards and as sampled data. The last
file is for validation; of a single file, some documents are. The same command again goes on where
it stopped.

    OUTPUT/tokenizer/  tokenizer.json config.json token_bytes.npy comparison.md
    OUTPUT/bin/        config.json corpus_val_000000.bin corpus_train_000001.bin ...
    OUTPUT/sampled/    data.path=OUTPUT/sampled val_data.path=OUTPUT/sampled/validation
    OUTPUT/            recipe.json summary.json
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from data_io.compare_tokenizers import CompareOptions, compare, read_tokenizers, sample_texts
from data_io.console import note, run_command
from data_io.corpus_writer import CorpusShape, CorpusWriter, PartSize, Targets
from data_io.fetch_files import ADDRESSES, as_sources, fetch_all, fetch_from_hub
from data_io.loaded_format import LoadedFormat
from data_io.options import parse_options
from data_io.prompt_format import TOKENIZER_FILE
from data_io.source_files import SourceFile, find_sources
from data_io.token_bytes import token_byte_lengths
from data_io.token_shards import SHARD_TOKENS, Part
from data_io.train_tokenizer import TrainOptions, train

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
COMPARED_BYTES = 10_000_000  # of the validation file
LEFT_OUT_OF_RECIPE = {"output", "cache", "workers", "upload", "gpt2", "gpt4"}


class CorpusOptions(BaseModel):
    """The command line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        description="folder of Parquet or JSONL files with a field `text`; address of a folder of "
        "numbered files; name of a data set on the hub"
    )
    output: Path = Field(description="folder to make")
    num_shards: PositiveInt | None = Field(
        default=None, description="so many files, the first ones (null: all that a folder holds)"
    )
    shard_name: str = Field(
        default="shard_{:05d}.parquet", description="of the files at an address, by number from 0"
    )
    cache: Path | None = Field(
        default=None, description="where fetched files are kept (null: beside output, _source)"
    )
    workers: PositiveInt = Field(default=4, description="files fetched at a time")
    tokenizer: Path | None = Field(default=None, description="one to use; null: train one")
    add_special: bool = Field(
        default=False, description="adds the framing tokens to a tokenizer that lacks them"
    )
    tok_train_shards: PositiveInt = Field(default=8, description="files the tokenizer is made of")
    vocab_size: PositiveInt = Field(default=32_768, description="of the tokenizer that is trained")
    gpt2: Path | None = Field(default=None, description="GPT-2's vocabulary, to compare")
    gpt4: Path | None = Field(default=None, description="GPT-4's vocabulary, to compare")
    formats: tuple[Literal["bin", "sampled"], ...] = Field(
        default=("bin", "sampled"), min_length=1, description="what is written"
    )
    context_size: int = Field(
        default=2049, ge=3, description="of sampled data: one token more than the model sees"
    )
    epochs: PositiveInt = Field(default=1, description="of sampled data")
    bos: str = Field(default="<|endoftext|>", description="begins a document of .bin shards")
    shard_tokens: PositiveInt = Field(default=SHARD_TOKENS, description="of a .bin shard, about")
    seed: NonNegativeInt = Field(default=0, description="of the orders and of the split")
    upload: str | None = Field(
        default=None, description="OWNER/NAME of a private data set on the hub to put OUTPUT into"
    )

    @property
    def is_address(self) -> bool:
        return self.source.startswith(ADDRESSES)


def main(arguments: list[str]) -> None:
    """Command line."""
    options = parse_options(CorpusOptions, arguments, __doc__ or "")
    Preparation(options).make()


class Preparation:
    """A corpus on its way."""

    def __init__(self, options: CorpusOptions) -> None:
        self.options, self.output = options, options.output
        self.tokenizer_folder = options.output / "tokenizer"
        self.files: list[SourceFile] = self.found_files()

    def make(self) -> None:
        """Makes what is missing, and prints the summary."""
        summary = self.output / "summary.json"
        self.require_same_recipe()
        if summary.is_file():
            note(f"{self.output} is already made with these options")
        else:
            self.make_tokenizer()
            content = self.write_data()
            aside = summary.with_name(".summary.json.part")
            aside.write_text(json.dumps(content, indent=1) + "\n")
            aside.replace(summary)
        print(self.shown(json.loads(summary.read_text())))
        if self.options.upload:
            upload(self.output, self.options.upload)

    def found_files(self) -> list[SourceFile]:
        """Of the folder given, or fetched."""
        options, source = self.options, self.options.source
        cache = options.cache or options.output.with_name(f"{options.output.name}_source")
        if options.is_address:
            if options.num_shards is None:
                raise ValueError(f"source={source} is an address; num_shards says how many files")
            names = [_numbered(options.shard_name, at) for at in range(options.num_shards)]
            files = as_sources(fetch_all(source, names, cache, workers=options.workers), cache)
        elif Path(source).exists():
            files = find_sources([Path(source)])
        elif HUB_NAME.fullmatch(source):
            files = as_sources(fetch_from_hub(source, options.num_shards, cache), cache)
        else:
            raise ValueError(
                f"source={source} is no folder, no address (https://...) and no name on the hub "
                "(OWNER/NAME)"
            )
        wanted = options.num_shards or len(files)
        if len(files) < wanted:
            note(f"{source} holds {len(files)} files, fewer than num_shards={wanted}")
        return files[:wanted]

    def require_same_recipe(self) -> None:
        """What is here already must have been made with these options, of these files."""
        options = self.options.model_dump(mode="json", exclude=LEFT_OUT_OF_RECIPE)
        recipe = {**options, "files": [[file.name, file.state.size] for file in self.files]}
        path = self.output / "recipe.json"
        inside = list(self.output.iterdir()) if self.output.is_dir() else []
        if path.is_file() and len(inside) > 1:
            made = json.loads(path.read_text())
            changed = [key for key, value in recipe.items() if made.get(key) != value]
            if changed:
                raise ValueError(
                    f"{self.output} was made otherwise ({', '.join(changed)} differ, see "
                    f"{path.name} there); delete it or choose another output"
                )
            return
        if self.output.exists() and (not self.output.is_dir() or inside not in ([], [path])):
            raise ValueError(f"{self.output} exists and is not empty; choose another folder")
        self.output.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(".recipe.json.part")
        aside.write_text(json.dumps(recipe, indent=1) + "\n")
        aside.replace(path)

    def make_tokenizer(self) -> None:
        """tokenizer/ with the tokenizer, how many bytes each id is, and a comparison."""
        options, folder = self.options, self.tokenizer_folder
        if not (folder / TOKENIZER_FILE).is_file():
            if options.tokenizer is None:
                sources = self.trained_on()
                wanted = TrainOptions(
                    sources=tuple(source.path for source in sources),
                    output=folder,
                    vocab_size=options.vocab_size,
                    seed=options.seed,
                    reader="text",
                )
                with contextlib.redirect_stdout(sys.stderr):
                    train(wanted, sources)
            else:
                loaded = LoadedFormat.load(options.tokenizer, add_special=options.add_special)
                aside = folder.with_name(".tokenizer.part")
                aside.mkdir(exist_ok=True)
                loaded.put_tokenizer(aside)
                aside.rename(folder)
        if (folder / "comparison.md").is_file():
            return
        limit = LoadedFormat.load(folder).prompt_format.id_limit
        try:
            np.save(folder / "token_bytes.npy", token_byte_lengths(folder, limit))
        except ValueError as error:
            if options.tokenizer is None:
                raise
            note(f"no token_bytes.npy: {error}")
        compared = CompareOptions(
            tokenizer=[folder],
            texts=[],
            gpt2=options.gpt2,
            gpt4=options.gpt4,
            max_bytes=COMPARED_BYTES,
        )
        kinds = chain(sample_texts(), [("validation", list(self.validation_texts()))])
        comparison = compare(read_tokenizers(compared), kinds)
        (folder / "comparison.md").write_text(comparison.markdown() + "\n", encoding="utf-8")

    def trained_on(self) -> list[SourceFile]:
        """The first files, without the last of several, which is for validation."""
        files = self.files[:-1] or self.files
        return files[: self.options.tok_train_shards]

    def validation_texts(self) -> Iterator[str]:
        """Of the last file, as much as is compared."""
        num_bytes = 0
        for row in self.files[-1].rows():
            text = row.fields.get("text")
            if isinstance(text, str):
                num_bytes += len(text.encode("utf-8", "replace"))
                yield text.encode("utf-8", "replace").decode()
            if num_bytes > COMPARED_BYTES:
                return

    def write_data(self) -> dict[str, Any]:
        """The formats that are not there yet; the summary."""
        options = self.options
        shape = CorpusShape(
            options.context_size, options.epochs, options.bos, options.shard_tokens, options.seed
        )
        loaded = LoadedFormat.load(self.tokenizer_folder)
        writer = CorpusWriter(loaded, self.files, shape)
        places = {name: self.output / name for name in options.formats}
        missing = {name: place for name, place in places.items() if not place.exists()}
        sizes = writer.write(Targets(missing.get("bin"), missing.get("sampled")))
        note(*writer.tally.lines())
        return {
            "vocab_size": loaded.prompt_format.id_limit,
            "formats": list(options.formats),
            "dropped_rows": dict(writer.tally.dropped),
            **{part: _described(size) for part, size in sizes.items()},
        }

    def shown(self, summary: dict[str, Any]) -> str:
        """Markdown."""
        parts: tuple[Part, ...] = ("train", "val")
        lines = [
            "| part | documents | tokens | bytes | bytes per token |",
            "|---|---:|---:|---:|---:|",
            *(
                f"| {part} | {summary[part]['num_documents']:,} | {summary[part]['num_tokens']:,} "
                f"| {summary[part]['num_bytes']:,} | {summary[part]['bytes_per_token']:.3f} |"
                for part in parts
            ),
            "",
            (self.tokenizer_folder / "comparison.md").read_text(encoding="utf-8"),
        ]
        return "\n".join(lines)


def upload(folder: Path, name: str) -> None:
    """Puts the folder into a private data set on the hub, as whoever is logged in there."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(name, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(repo_id=name, repo_type="dataset", folder_path=folder)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        told = " ".join((str(error) or type(error).__name__).split())[:300]
        raise ValueError(
            f"upload={name} failed ({told}); {folder} is whole, run again to upload it"
        ) from None
    note(f"{folder} is uploaded to {name}")


def _numbered(pattern: str, number: int) -> str:
    try:
        name = pattern.format(number)
    except (IndexError, KeyError, ValueError) as error:
        raise ValueError(
            f"shard_name={pattern} cannot be numbered ({error!r}); write {{:05d}} for the number"
        ) from None
    if name == pattern or "/" in name:
        raise ValueError(f"shard_name={pattern} names no files by number; write {{:05d}} in it")
    return name


def _described(size: PartSize) -> dict[str, Any]:
    return {**asdict(size), "bytes_per_token": size.bytes_per_token}


if __name__ == "__main__":
    run_command(main)
