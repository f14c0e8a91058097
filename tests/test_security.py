"""Folders of strangers make us import and run nothing; keys never reach what a run writes."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import TINY, resolved, start_command, write_tiny_data
from export_cases import write_run
from fuzz_cases import watched
from reader_cases import READERS
from source_tree import ROOT, product_files

import training.environment
from data_io.fetch_files import fetch_all
from data_io.safe_paths import require_inside
from data_io.source_files import find_sources
from inference.exported_folder import read_exported
from inference.run_folder import open_run
from training.command_line import checked_overrides, parse_config
from training.environment import record_environment
from training.inherited_arch import ChosenArch, inherit_arch
from training.run_records import stored_config

KEY = "not-a-real-key-0123456789"
# (file, what) -> why it may stand there
REASONS = {
    ("conversion/parity.py", "trust_remote_code"): (
        "loads the folder that this very command has just written, with the code it has put there"
    ),
    ("evaluation/lm_eval_adapter.py", "import_module"): "the harness, by a name in that file",
    ("scripts/chat.py", "import_module"): "readline, by a name in that file",
    ("scripts/chat_web.py", "import_module"): "gradio, by a name in that file",
    ("scripts/gpu_check.py", "import_module"): "kernels, by names in that file",
    ("models/attention/flash3.py", "import_module"): "the kernel, by a name in that file",
    ("torture/child.py", "runpy.run_path"): "pretrain.py, with what befalls it put in first",
    ("torture/writer.py", "runpy.run_module"): "the checkpoint writer, likewise",
}


def risky(source: str) -> set[str]:
    """What of a source text could run what it reads, as far as calls show it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name.endswith(("os.system", "os.popen", "__import__", "run_path", "run_module")):
            found.add(name)
        if name.endswith("import_module"):
            found.add("import_module")
        if name.endswith(("extractall", ".extract")):
            found.add("extract")
        for keyword in node.keywords:
            value = ast.unparse(keyword.value)
            if keyword.arg in ("shell", "trust_remote_code") and value != "False":
                found.add(keyword.arg)
    return found


def test_nothing_here_runs_what_it_reads() -> None:
    """Pickles, eval and unsafe YAML: tests/test_tree_hygiene.py."""
    found = {
        (path.as_posix(), what)
        for path in product_files()
        for what in risky((ROOT / path).read_text(encoding="utf-8"))
    }
    assert found == REASONS.keys()


def test_made_up_risks_are_found() -> None:
    source = "os.system(x)\nf(trust_remote_code=True)\nrun(a, shell=True)\nz.extractall(p)\n"
    assert risky(source) == {"os.system", "trust_remote_code", "shell", "extract"}
    assert not risky("f(trust_remote_code=False)\nrun(['ls'])\nextract_terms(x)\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def forge(path: Path, **changes: Any) -> None:
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, **changes}))


def test_the_configuration_of_a_stranger_s_run_is_data(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_SECRET", KEY)
    forge(
        run / "all_config.yaml",
        checkpoint_path=str(tmp_path / "elsewhere"),
        run_name="../../out",
        data={"path": "${oc.env:SOME_SECRET}"},
        hydra={"job": {"env_set": {"X": "1"}}},
        _target_="os.system",
        resume_from="${oc.env:SOME_SECRET}",
    )
    forge(run / "train_metadata.yaml", _target_="os.system")
    before, modules = sorted(tmp_path.rglob("*")), set(sys.modules)
    with watched(tmp_path / "nowhere"):
        stored = open_run(run)
        arch, _ = inherit_arch(
            {"data": {"path": "d"}, "resume_from": str(run)}, ChosenArch(frozenset(), frozenset())
        )
    assert sorted(tmp_path.rglob("*")) == before and set(sys.modules) == modules
    assert str(stored.data_folder) == "${oc.env:SOME_SECRET}"  # a text, not its value
    assert KEY not in json.dumps([arch, stored_config(run)])


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"name": "os.system"}, "is no architecture of this version"),
        ({"name": "${oc.env:HOME}"}, "is no architecture of this version"),
        ({"name": "hrm", "_target_": "os.system"}, "_target_"),
    ],
)
def test_a_net_is_one_of_ours_or_none(section: dict[str, Any], told: str, run: Path) -> None:
    arch = yaml.safe_load((run / "all_config.yaml").read_text())["arch"]
    forge(run / "all_config.yaml", arch={**arch, **section})
    with pytest.raises(ValueError, match=told):
        open_run(run)


def test_the_code_of_an_export_is_not_run(tmp_path: Path) -> None:
    folder, marker = tmp_path / "export", tmp_path / "marker"
    READERS["export"].make(folder)
    code = f"open({str(marker)!r}, 'w')\n"
    for name in ("hostile.py", "__init__.py", "modeling_recurrent_lm.py", "tokenization.py"):
        (folder / name).write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "hostile.Model", "AutoConfig": "hostile.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["hostile.T", None]}, "tokenizer_class": "hostile.T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    modules = set(sys.modules)
    with watched(tmp_path / "nowhere"):
        read_exported(folder)
    assert not marker.exists() and set(sys.modules) == modules


def test_a_run_is_written_inside_its_folder_alone() -> None:
    for name in ("../x", "a/b", "/x", "..", ".hidden", "a\\b"):
        raw = {"run_name": name, "arch": {"name": "hrm"}}
        with pytest.raises(ValueError, match="must be a folder's plain name"):
            parse_config(raw)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\..\\x"])
def test_fetched_files_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    require_inside(["a/b.parquet"])
    with pytest.raises(ValueError, match="leads out of its folder"):
        fetch_all("https://example.org", [name], tmp_path / "cache", workers=1)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_links_to_itself_is_searched_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder, other in (("a", "b"), ("b", "a")):
        (tmp_path / folder / "x.jsonl").write_text("{}")
        (tmp_path / folder / "loop").symlink_to(tmp_path / other)
    (tmp_path / "a" / "self").symlink_to(tmp_path)
    names = [source.name for source in find_sources([tmp_path])]
    assert names == ["a/loop/x.jsonl", "a/x.jsonl", "b/loop/x.jsonl", "b/x.jsonl"]


@pytest.mark.parametrize("key", ["hydra.job.env_set.WANDB_API_KEY", "tracker.api_key", "hf_token"])
def test_a_key_on_the_command_line_is_refused_and_not_told(key: str) -> None:
    with pytest.raises(ValueError, match="export it in the shell") as caught:
        checked_overrides([f"{key}={KEY}"], ROOT / "config")
    assert KEY not in str(caught.value)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in which somebody has just written a key down, in place of this one."""
    root = tmp_path / "sources"
    root.mkdir()
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=no")
    (root / "a.py").write_text("x = 1\n")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "first")):
        subprocess.run([*git, *command], cwd=root, check=True, capture_output=True)
    (root / "a.py").write_text(f"x = '{KEY}'\ny = 'hf_{'a' * 34}'\n")
    monkeypatch.setattr(training.environment, "SOURCE_ROOT", root)
    return root


def test_keys_in_sources_and_commands_are_not_recorded(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.setattr(sys, "orig_argv", ["python", "pretrain.py", "x=https://me:pass1@h/", KEY])
    run = tmp_path / "run"
    run.mkdir()
    record_environment(run, {})
    told = (run / "environment.json").read_text()
    with zipfile.ZipFile(run / "code.zip") as archive:
        told += archive.read("a.py").decode()
    assert KEY not in told and "hf_aaaa" not in told and "pass1" not in told
    assert "x = '***'" in told and "https://***@h/" in told
    assert KEY in (sources / "a.py").read_text()  # the sources themselves are left alone


def test_a_setting_with_the_value_of_a_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", KEY)
    with pytest.raises(ValueError, match=r"a setting holds the value of \$HF_TOKEN") as caught:
        resolved("data.path=x", f"project_name={KEY}")
    assert KEY not in str(caught.value)


@pytest.mark.slow
def test_keys_of_the_environment_reach_no_file_of_a_run(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data", examples=30, epochs=1)
    work = tmp_path / "work"
    work.mkdir()
    keys = {"WANDB_API_KEY": KEY, "HF_TOKEN": KEY, "AWS_SECRET_ACCESS_KEY": KEY}
    line = (*TINY, f"data.path={data}", "epochs=1", "run_name=a", "max_steps=3", "tracker=none")
    command = (str(ROOT / "pretrain.py"), *line)
    done = start_command(*command, cwd=work, environment=keys).wait().check()
    files = [path for path in work.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in done.stdout + done.stderr
    refused = start_command(*command, f"project_name={KEY}", cwd=work, environment=keys).wait()
    assert refused.code == 2 and "holds the value of $" in refused.stderr
    assert KEY not in refused.stderr
