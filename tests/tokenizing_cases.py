"""Sources, a tokenizer of bytes, and what data_io.tokenize makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.tokenize import main
from data_io.tokenized_format import TokenizedSource, tokenized_folders

ROWS = [
    {"condition": "direct", "instruction": "1+1?", "response": "2"},
    {"condition": "synth,cot", "instruction": "é€😀 <|im_end|>", "response": "<|box_end|>\n"},
]


class Place:
    """Sources, a tokenizer, and where the tokenized data go."""

    def __init__(self, root: Path) -> None:
        self.root, self.data, self.out = root, root / "data", root / "out"
        self.data.mkdir()
        self.tokenizer = write_byte_tokenizer(root / "tok").parent

    def write(self, name: str, rows: list[dict[str, Any]]) -> Path:
        path = self.data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    @property
    def arguments(self) -> list[str]:
        return [str(self.data), "-o", str(self.out), "--tokenizer-path", str(self.tokenizer)]

    def run(self, *more: str) -> None:
        main([*self.arguments, *(more or ("workers=1",))])

    def names(self) -> list[str]:
        return [folder.name for folder in tokenized_folders(self.out)]

    def examples(self, name: str) -> list[tuple[list[int], list[int]]]:
        source = TokenizedSource.open(self.out / name)
        source.check()
        columns = (source.inst_start, source.inst_len, source.resp_start, source.resp_len)
        return [
            (source.tokens[a : a + n].tolist(), source.tokens[b : b + m].tolist())
            for a, n, b, m in zip(*columns, strict=True)
        ]
