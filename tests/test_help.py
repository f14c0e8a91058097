"""`pretrain.py --help` and `--cfg job`: complete, true, and without a trace in the folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from commands import CONFIG, composed, resolved, run_pretrain

from models.transformer import StackConfig
from training.command_line import parse_config
from training.schema import GROUPS, SECTIONS, RunConfig, legal_keys

SECTION = re.compile(r"^([A-Z]{3,}.*)\n((?:(?:  .*)?\n)+)", re.MULTILINE)


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The parts of the help text by their titles."""
    folder = tmp_path_factory.mktemp("help")
    done = run_pretrain("--help", cwd=folder).check()
    assert done.stderr == ""
    assert not list(folder.iterdir())
    assert max(map(len, done.stdout.splitlines())) <= 100
    head, _, configuration = done.stdout.partition("CONFIGURATION OF THIS COMMAND\n")
    return dict(SECTION.findall(head)) | {"CONFIGURATION": configuration}


def entries(text: str) -> dict[str, str]:
    """`  name, name   meaning` lines as name -> meaning, over continuation lines."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        if entry := re.match(r"  ([^\s,]+(?:, [^\s,]+)*) +(\S.*)", line):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def described_keys(sections: dict[str, str]) -> dict[str, str]:
    texts = [text for title, text in sections.items() if title.startswith("KEYS")]
    return {key: meaning for text in texts for key, meaning in entries(text).items()}


def test_help_tells_the_meaning_of_every_key(sections: dict[str, str]) -> None:
    override_keys = {f"arch.H_override.{key}" for key in StackConfig.model_fields}
    assert set(described_keys(sections)) == set(legal_keys()) - override_keys | {"arch.H_override"}


def test_help_lists_every_choice_and_recipe(sections: dict[str, str]) -> None:
    groups = entries(sections["GROUPS"])
    assert list(groups) == list(GROUPS)
    for group, choices in groups.items():
        files = (CONFIG / group.partition("@")[0]).glob("[!_]*.yaml")
        assert sorted(choices.split()) == sorted(path.stem for path in files)
    recipes = sorted(path.stem for path in CONFIG.glob("cfg_*.yaml"))
    assert sorted(entries(sections["RECIPES"])) == recipes


def test_help_gives_the_default_of_keys_that_no_file_sets(sections: dict[str, str]) -> None:
    shown = composed()
    for key, meaning in described_keys(sections).items():
        default = re.search(r"\[([\w.]+)\]$", meaning)
        if key in RunConfig.model_fields:
            assert bool(default) == (key not in shown), key
            field_default = RunConfig.model_fields[key].default
        elif (section := key.partition(".")[0]) in SECTIONS and section != "data":
            field = SECTIONS[section].model_fields[key.partition(".")[2]]
            field_default = None if field.is_required() else field.default  # of the whole section
        else:
            name = key.removeprefix("arch.")
            field = StackConfig.model_fields.get(name)
            assert bool(default) == (field is not None and name not in shown["arch"]), key
            field_default = field.default if field else None
        if default:
            assert yaml.safe_load(default[1]) == field_default, key


def test_help_shows_the_configuration_of_its_command(
    sections: dict[str, str], tmp_path: Path
) -> None:
    assert yaml.safe_load(sections["CONFIGURATION"]) == composed()
    done = run_pretrain("--help", "--config-name", "cfg_quickstart", cwd=tmp_path).check()
    assert "global_batch_size: 512\n" in done.stdout


def test_cfg_job_prints_a_configuration_that_runs(tmp_path: Path) -> None:
    arguments = ("--config-name", "cfg_sft", "data.path=x", "checkpoint_steps=9")
    done = run_pretrain(*arguments, "--cfg", "job", cwd=tmp_path).check()
    assert parse_config(yaml.safe_load(done.stdout))[0] == resolved(*arguments)
    assert not list(tmp_path.iterdir())
