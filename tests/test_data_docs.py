"""The commands of docs/data.md are legal, and it names every option of sampling."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from pydantic import BaseModel

from data_io.inspect import InspectOptions
from data_io.options import fields_of, parse_options
from data_io.published_options import as_key_values
from data_io.sample import SampleOptions
from data_io.verify import VerifyOptions

PAGE = (Path(__file__).resolve().parents[1] / "docs/data.md").read_text()
RECORDS: dict[str, type[BaseModel]] = {
    "sample": SampleOptions,
    "verify": VerifyOptions,
    "inspect": InspectOptions,
}
BLOCKS = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
COMMANDS = re.findall(r"python -m data_io\.(sample|verify|inspect) ([^\n>&]*)", BLOCKS)


@pytest.mark.parametrize(("module", "arguments"), COMMANDS)
def test_a_command_of_the_page_is_legal(module: str, arguments: str) -> None:
    record = RECORDS[module]
    respelled = as_key_values(shlex.split(arguments), record, by_position="folder", short={})
    parse_options(record, respelled, "")


def test_the_page_shows_each_tool() -> None:
    assert {module for module, _ in COMMANDS} == set(RECORDS)


@pytest.mark.parametrize("module", RECORDS)
def test_the_page_names_every_option(module: str) -> None:
    missing = [name for name in fields_of(RECORDS[module]) if not re.search(rf"\b{name}\b", PAGE)]
    assert not missing
