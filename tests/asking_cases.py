"""A tiny run that answers in letters, and the programs that ask it, run in this process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from net_cases import NETS, build
from run_cases import ALONE, run_config

from data_io.byte_tokenizer import byte_tokenizer, write_byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from simple_inference_engine import Answer, InferenceEngine, Request, Token
from training.adam_atan2 import AdamATan2
from training.checkpoint import Progress, RunDirectory, training_state

VOCAB_SIZE, MAX_CONTEXT = 512, 64
LETTERS = "abcdefgh"


def prompt_format() -> PromptFormat:
    return PromptFormat(byte_tokenizer(), BOQ, EOQ, EOA, dict(CONDITION_TOKENS))


def write_run(
    folder: Path, net: str = "hrm", seed: int = 3, *, max_context: int = MAX_CONTEXT
) -> Path:
    """A run directory of a random net that says letters, and sometimes ends its answer."""
    torch.manual_seed(seed)
    model = build(NETS[net], VOCAB_SIZE)
    spoken = [prompt_format().eoa_id]
    spoken += [byte_tokenizer().token_to_id(letter) for letter in LETTERS]
    with torch.no_grad():
        silent = [token for token in range(VOCAB_SIZE) if token not in spoken]
        model.lm_head.weight.mul_(20)[silent] = 0
    optimizer = AdamATan2(model.parameters(), lr=0.0)
    config = run_config(folder, arch=NETS[net]).model_dump()
    info = {"tokenizer_path": str(folder), "boq": BOQ, "eoq": EOQ, "eoa": EOA}
    metadata = {
        "max_seq_len": max_context,
        "vocab_size": VOCAB_SIZE,
        "total_length": 900,
        "tokenizer_info": {**info, "condition_mapping": dict(CONDITION_TOKENS)},
    }
    directory = RunDirectory(folder, ALONE)
    directory.create({**config, "data": {"path": str(folder)}}, metadata)
    write_byte_tokenizer(folder)
    (folder / "config.json").unlink()
    directory.save("fsdp2_epoch_2", training_state(model, optimizer), Progress(2, 0, 40, 1234), {})
    return folder


@dataclass(frozen=True)
class Done:
    """What a program printed, and how it ended."""

    code: int
    stdout: str
    stderr: str


def assert_refused(done: Done, *told: str) -> None:
    assert done.code == 2
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("error: ")
    for text in told:
        assert text in line


class Terminal(io.StringIO):
    """Lines typed at a terminal: the end of them is Ctrl-D."""

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Program:
    """A program with a `main` that reads sys.argv, asked by the tests as its user would."""

    main: Callable[[], None]
    patch: pytest.MonkeyPatch
    capture: pytest.CaptureFixture[str]
    arguments: tuple[str, ...]  # that every call begins with

    def __call__(
        self, *arguments: str, stdin: bytes | None = None, typed: Sequence[str] | None = None
    ) -> Done:
        """Standard input is a terminal with nothing typed, unless `stdin` or `typed` is given."""
        stream: Any = Terminal()
        if stdin is not None:
            stream = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
        lines = iter(typed or ())
        code = 0
        self.capture.readouterr()
        with self.patch.context() as patch:
            patch.setattr(sys, "argv", ["program", *self.arguments, *arguments])
            patch.setattr(sys, "stdin", stream)
            patch.setattr("builtins.input", lambda _: _next_line(lines))
            try:
                self.main()
            except SystemExit as end:
                code = int(end.code or 0)
        stdout, stderr = self.capture.readouterr()
        return Done(code, stdout, stderr)


def _next_line(lines: Iterator[str]) -> str:
    """The next line typed; "^C" is Ctrl-C, the end of them Ctrl-D."""
    line = next(lines, None)
    if line is None:
        raise EOFError
    if line == "^C":
        raise KeyboardInterrupt
    return line


class Scripted:
    """Takes the place of an engine's stream: says the same ids to all, and keeps the requests."""

    def __init__(self, *said: int | type[BaseException]) -> None:
        self.said = said
        self.requests: list[Request] = []

    def __call__(
        self, engine: InferenceEngine, requests: Iterable[Request]
    ) -> Iterator[Token | Answer]:
        for index, request in enumerate(requests):
            self.requests.append(request)
            if len(request.prompt_ids) >= engine.max_context:
                yield Answer(index, (), "prompt_too_long")
                continue
            for token_id in self.said:
                if isinstance(token_id, type):
                    raise token_id
                yield Token(index, token_id, 0.5, ((token_id, 0.5), (token_id + 1, 0.25)))
            yield Answer(index, tuple(each for each in self.said if isinstance(each, int)), "stop")

    @classmethod
    def saying(cls, text: str) -> Scripted:
        return cls(*prompt_format().encode_response(text)[:-1])

    def prompts(self) -> list[str]:
        """All prompts as text with their special tokens."""
        decode = byte_tokenizer().decode
        return [decode(list(each.prompt_ids), skip_special_tokens=False) for each in self.requests]
