"""A tokenizer file as a prompt format, and as what travels with the data that it makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_io.prompt_format import TOKENIZER_FILE, PromptFormat
from data_io.sampled_format import TokenizerInfo
from data_io.sampled_writer import SampledWriter
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from data_io.tokenizer_files import LoadedTokenizer, load_tokenizer

TOKENIZER_INFO_FILE = "tokenizer_info.json"


@dataclass(frozen=True, slots=True)
class LoadedFormat:
    """What data is encoded with."""

    loaded: LoadedTokenizer
    prompt_format: PromptFormat

    @classmethod
    def load(
        cls,
        path: Path | None,
        *,
        framing: tuple[str, str, str] = (BOQ, EOQ, EOA),
        conditions: Mapping[str, str] | None = None,
        add_special: bool = False,
    ) -> LoadedFormat:
        """No `conditions`: those of the published ones whose tokens the tokenizer has."""
        needed = (*framing, *(conditions or {}).values())
        loaded = load_tokenizer(path, add_special=add_special, needed=needed)
        if not conditions:
            added = loaded.tokenizer.get_added_tokens_decoder().values()
            known = {token.content for token in added}
            conditions = {name: token for name, token in CONDITION_TOKENS.items() if token in known}
        return cls(loaded, PromptFormat(loaded.tokenizer, *framing, conditions))

    def info(self, folder: Path) -> TokenizerInfo:
        """The record in metadata.json of data that will lie in `folder`."""
        return TokenizerInfo(
            tokenizer_path=str(folder),
            boq=self.prompt_format.boq,
            eoq=self.prompt_format.eoq,
            eoa=self.prompt_format.eoa,
            condition_mapping=dict(self.prompt_format.conditions),
            vocab_size=self.prompt_format.id_limit,
        )

    def put_tokenizer(self, folder: Path) -> None:
        """The file as it was read, byte for byte, where it is a tokenizer.json to begin with."""
        copy = folder / TOKENIZER_FILE
        if self.loaded.path.suffix == ".json" and not self.loaded.added:
            shutil.copyfile(self.loaded.path, copy)
        else:
            self.loaded.tokenizer.save(str(copy))

    def accompany(self, writer: SampledWriter) -> None:
        """Puts the tokenizer and its record beside the data."""
        self.put_tokenizer(writer.staging)
        info = writer.metadata.tokenizer_info.model_dump(exclude_none=True)
        text = json.dumps(info, ensure_ascii=False)
        (writer.staging / TOKENIZER_INFO_FILE).write_text(text + "\n", encoding="utf-8")
