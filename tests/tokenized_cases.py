"""Small tokenized folders, and what a sampled folder holds, row by row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_io.byte_tokenizer import byte_tokenizer, write_byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.sampled_format import SampledData, TokenizerInfo
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from data_io.tokenized_format import write_tokenizer_info

VOCAB_SIZE = 287  # of the byte tokenizer


class TokenRow(NamedTuple):
    inst: tuple[int, ...]
    resp: tuple[int, ...]


class Sources:
    """A tokenized folder as the published pipeline writes it."""

    def __init__(self, root: Path, *, tokenizer: bool = True) -> None:
        self.root = root
        root.mkdir()
        self.info = TokenizerInfo(
            tokenizer_path="tok",
            boq=BOQ,
            eoq=EOQ,
            eoa=EOA,
            condition_mapping=dict(CONDITION_TOKENS),
            vocab_size=VOCAB_SIZE,
        )
        write_tokenizer_info(root, self.info)
        if tokenizer:
            write_byte_tokenizer(root)

    def add(
        self,
        name: str,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        scored: Sequence[int] | None = None,
        gap: int = 0,
    ) -> Path:
        """Rows of ids one after another, `gap` tokens between all parts."""
        folder = self.root / name
        folder.mkdir()
        tokens: list[int] = []
        starts: list[list[int]] = []
        for row in rows:
            starts.append([])
            for part in row:
                tokens += [0] * gap
                starts[-1].append(len(tokens))
                tokens += part
        lens = [[len(part) for part in row] for row in rows]
        for column, kind in enumerate(("inst", "resp")):
            for values, what in ((starts, "start"), (lens, "len")):
                array = np.array([row[column] for row in values], np.uint64)
                np.save(folder / f"{kind}_{what}.npy", array)
        np.save(folder / "tokens.npy", np.array(tokens, np.uint32))
        if scored is not None:
            np.save(folder / "scored.npy", np.array(scored, np.uint8))
        (folder / "metadata.json").write_text(json.dumps({"source_mtime": 1, "source_size": 1}))
        return folder

    def add_texts(self, name: str, rows: Sequence[tuple[str, str, str]]) -> Path:
        """Rows of condition, instruction and response, encoded as bytes."""
        mapping = dict(CONDITION_TOKENS)
        form = PromptFormat(byte_tokenizer(), BOQ, EOQ, EOA, mapping)
        return self.add(
            name,
            [
                (form.encode_prompt(condition, question), form.encode_response(answer))
                for condition, question, answer in rows
            ],
        )


def numbered_rows(count: int, *, first: int = 40) -> list[tuple[list[int], list[int]]]:
    """Rows that all differ: 2 to 4 tokens of instruction, 2 or 3 of response."""
    return [
        ([first + row] * (2 + row % 3), [first + row] * (1 + row % 2) + [11])
        for row in range(count)
    ]


def rows_of(folder: Path) -> list[list[TokenRow]]:
    """The examples of every epoch of a sampled folder."""
    data = SampledData.open(folder)
    tokens = data.tokens()
    epochs = []
    for number in range(data.num_epochs):
        index = data.epoch(number)
        columns = (index.inst_start, index.inst_len, index.resp_start, index.resp_len)
        epochs.append(
            [
                TokenRow(
                    tuple(tokens[inst : inst + inst_len].tolist()),
                    tuple(tokens[resp : resp + resp_len].tolist()),
                )
                for inst, inst_len, resp, resp_len in zip(*columns, strict=True)
            ]
        )
    return epochs
