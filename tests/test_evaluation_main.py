"""`python -m evaluation.main` from its command line to its folder, on a tiny run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from asking_cases import write_run
from benchmark_cases import GOLDEN_DATA
from commands import start_command
from evaluation_cases import items, recorded, vllm_stub
from export_cases import exported
from source_tree import ROOT

from evaluation.benchmarks import BENCHMARKS
from evaluation.command_line import read_command
from evaluation.main import main
from evaluation.records import only_writer
from evaluation.settings import GenerationSettings
from inference.model_folder import ModelOptions

SMALL = "benchmarks=[{name: GSM8k}, {name: DROP, num_shots: 0}, {name: MMLU, num_shots: 0},"
SMALL += " {name: BoolQ}, {name: Winogrande, num_shots: 0}]"
SMALL_LABELS = ["GSM8k", "DROP", "MMLU", "BoolQ", "Winogrande"]
SAMPLED = "benchmarks=[{name: AIMEMajorityVoting, n: 12, pass_k: [1, 10]}, {name: ARC}]"
MAX_CONTEXT = 300
Told = Callable[[], str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("trained"), seed=1)
    metadata = run / "train_metadata.yaml"
    stored = yaml.safe_load(metadata.read_text())
    metadata.write_text(yaml.safe_dump({**stored, "max_seq_len": MAX_CONTEXT}))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run without results."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def words(folder: Path, *more: str, benchmarks: str = SMALL, limit: int = 6) -> list[str]:
    settings = [f"ckpt_path={folder}", f"data_dir={GOLDEN_DATA}", benchmarks]
    return [*settings, f"generation_config.max_tokens={limit}", *more]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a refused command says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    (line,) = (line for line in error.splitlines() if line.startswith("error: "))
    assert "Traceback" not in error and len(line) < 1000
    return line


def test_an_evaluation_ends_in_a_table_and_a_folder(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(words(run))
    told = capsys.readouterr()
    folder = run / "results/published"
    files = sorted(path.name for path in folder.iterdir())
    assert files == ["items.jsonl", "report.html", "report.md", "results.json"]
    results = recorded(folder)
    assert list(results["benchmarks"]) == SMALL_LABELS and results["unfinished"] == []
    assert results["model"]["step"] == 40 and results["model"]["weights"] == "raw"
    lines = items(folder)
    for label, record in results["benchmarks"].items():
        own = [line for line in lines if line["benchmark"] == label]
        assert [record["n"], record["invalid"]] == [len(own), sum(each["invalid"] for each in own)]
        assert re.search(rf"^{label} +{len(own)} +{record['headline']} ", told.out, re.MULTILINE)
        assert sum(each["n"] for each in record["categories"].values()) in (0, len(own))
    boolq = results["benchmarks"]["BoolQ"]
    assert boolq["over_long"] == sum(line["finish_reason"] == "prompt_too_long" for line in lines)
    assert boolq["chance"] == 0.5 and boolq["over_long"] > 0
    assert "BoolQ: none of the 7 prompts fits the context of 300 tokens" in told.out
    assert "loaded " in told.out and "answers/s" in told.err
    assert any(line["answer"] for line in lines)


def test_a_finished_evaluation_is_not_run_again(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(words(run))
    before = (run / "results/published/items.jsonl").read_bytes()
    capsys.readouterr()
    main(words(run, "generation_config.batch_size=3"))  # changes no answer
    told = capsys.readouterr().out
    assert told.count("is on record already") == len(SMALL_LABELS)
    assert (run / "results/published/items.jsonl").read_bytes() == before
    main(words(run, limit=5))
    assert "now 5 (GSM8k, DROP)): starting anew" in capsys.readouterr().out
    assert len(list((run / "results").glob("[!.]*"))) == 2


def test_the_batch_size_changes_no_answer(run: Path) -> None:
    main(words(run, "name=one", "generation_config.batch_size=1"))
    main(words(run, "name=many", "generation_config.batch_size=50"))
    one, many = (items(run / "results" / name) for name in ("one", "many"))
    assert one == many


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(run: Path) -> None:
    """Sampled answers too: each prompt has a seed of its own."""
    command = words(run, "generation_config.temperature=40", benchmarks=SAMPLED, limit=100)
    main([*command, "name=whole"])
    killed = [*command, "name=killed"]
    started = start_command("-m", "evaluation.main", *killed, cwd=run)
    log = run / "results/killed/answers.0.jsonl"
    while started.code is None:
        if log.is_file() and log.read_bytes().count(b"given") > 5:
            started.process.kill()
        time.sleep(0.002)
    done = started.wait()
    assert done.code == -9, done.stderr
    assert 5 < log.read_bytes().count(b"given") < 12 * 6
    main(killed)
    whole, resumed = (run / "results" / name for name in ("whole", "killed"))
    assert items(resumed) == items(whole)
    assert recorded(resumed) == recorded(whole)
    assert len({line["answer"] for line in items(whole)}) > 20
    assert not log.exists()


def test_an_exported_folder_gives_the_results_of_its_run(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "exported")
    main(words(run))
    main(words(folder))
    assert items(folder / "results/published") == items(run / "results/published")
    assert recorded(folder / "results/published")["model"]["weights"] == "exported"


def test_another_model_is_measured_through_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "vllm", vllm_stub(log))
    monkeypatch.chdir(tmp_path)
    command = ["config=vllm_benchmarking", "ckpt_path=org/model", f"data_dir={GOLDEN_DATA}"]
    main([*command, "max_model_len=410", "run_only=[GSM8k,Winogrande,reasoning_gym]"])
    asked = [call["generate"]["sampling_params"] for call in log if "generate" in call]
    assert asked == [
        {"temperature": 0.0, "max_tokens": None, "stop": None},
        {"temperature": 0.0, "max_tokens": 1, "stop": None},
    ]
    results = recorded(tmp_path / "results/org__model/vllm_benchmarking")["benchmarks"]
    assert 0 < results["Winogrande"]["over_long"] < results["Winogrande"]["n"]
    assert results["GSM8k"]["over_long"] == 0
    assert results["reasoning_gym"]["notes"] == ["VLLMEngine has no condition; asked without"]
    other = refused(capsys, *command, "generation_config.condition=direct")
    assert "condition=direct is no setting of VLLMEngine" in other


def test_a_prompt_template_is_text(run: Path) -> None:
    template = "Q=${{oc.env:HOME}}: [a, {{b}}] = {prompt} #"
    main(words(run, f"generation_config.prompt_template={template}", "run_only=[Winogrande]"))
    prompts = [line["prompt"] for line in items(run / "results/published")]
    assert prompts and all(text.startswith("Q=${oc.env:HOME}: [a, {b}] = ") for text in prompts)
    assert all(text.endswith("Answer: #") for text in prompts)


def test_the_folder_is_named_by_the_file_the_name_or_the_place(tmp_path: Path) -> None:
    def folder(*more: str) -> Path:
        return read_command([f"ckpt_path={tmp_path}", *more]).folder

    file = tmp_path / "mine.yaml"
    file.write_text("engine: SimpleEngine\nname: of_file\nbenchmarks: [{name: GSM8k}]\n")
    assert folder() == tmp_path / "results/published"
    assert folder("config=hrm_maj_vote_benchmarking").name == "hrm_maj_vote_benchmarking"
    assert folder(f"config={file}").name == "of_file"
    assert folder(f"config={file}", "name=2024").name == "2024"
    assert folder("results_dir=there") == Path("there/published")
    vllm = read_command(["config=vllm_benchmarking", "ckpt_path=org/model"])
    assert vllm.folder == Path("results/org__model/vllm_benchmarking")
    assert vllm.settings.engine_settings == {"ckpt_path": "org/model", "max_model_len": 3072}


BAD_INPUT = [
    (["run_only=[Math]"], ["no benchmark is named 'Math'", "did you mean MATH?"]),
    (["benchmarks=[{name: BoolQ, split: nowhere}]"], ["BoolQ needs /", "nowhere.jsonl", "fetch"]),
    (["generation_config.condition=synth,cto"], ["condition=synth,cto", "did you mean cot?"]),
    (["ckpt_epoch=7"], ["fsdp2_epoch_7", "it has fsdp2_epoch_2"]),
    (["batch_size=3"], ["batch_size=3 is no setting", "generation_config.batch_size?"]),
    (["generation_config.stop=x"], ["generation_config.stop=x is no setting of SimpleEngine"]),
    (["config=hrm_benchmark"], ["config=hrm_benchmark is no file", "hrm_benchmarking"]),
    (["name=a/b"], ["name='a/b'"]),
    (["seed=x"], ["seed=x"]),
    (["ckpt_path=gpt2"], ["ckpt_path=gpt2 is no folder", "vllm_benchmarking.yaml"]),
    (["ckpt_path=null"], ["ckpt_path=... is required"]),
    (["generation_config.prompt_template=x"], ["must hold {prompt}"]),
    (["config=vllm_benchmarking"], ["pip install -r requirements-eval.txt"]),
]


@pytest.mark.parametrize(("more", "told"), BAD_INPUT, ids=lambda value: str(value[0])[:30])
def test_bad_input_is_told_in_one_line_and_leaves_no_folder(
    run: Path, capsys: pytest.CaptureFixture[str], more: Sequence[str], told: Sequence[str]
) -> None:
    line = refused(capsys, *words(run), *more)
    for text in told:
        assert text in line
    assert not (run / "results").exists()


def test_without_a_network_the_ways_out_are_named(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    line = refused(capsys, f"ckpt_path={run}")
    for text in ("GSM8k", "data_dir=DIR", "evaluation.fetch", "run_only=[reasoning_gym]"):
        assert text in line
    assert not (run / "results").exists()
    chosen = refused(capsys, f"ckpt_path={run}", "run_only=[GSM8k]")
    assert "evaluation.fetch" in chosen and "reasoning_gym" not in chosen


def test_two_evaluations_do_not_share_a_folder(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with only_writer(run / "results/published"):
        assert "is being written by another" in refused(capsys, *words(run, "run_only=[BoolQ]"))
        main(words(run, "run_only=[BoolQ]", "name=other"))
    assert not (run / "results/published").exists()
    main(words(run, "run_only=[BoolQ]"))


def test_results_of_another_checkpoint_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(words(run, f"results_dir={tmp_path / 'there'}", "run_only=[BoolQ]"))
    other = write_run(tmp_path / "other", seed=2)
    line = refused(capsys, *words(other, f"results_dir={tmp_path / 'there'}"))
    assert "holds results of another checkpoint" in line and "Give name=" in line


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    names = {*GenerationSettings.model_fields, *ModelOptions.model_fields, "run_only", "data_dir"}
    missing = [name for name in names if not re.search(rf"^  {name} +\w", text, re.MULTILINE)]
    assert not missing
    assert all(name in text for name in BENCHMARKS)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_find_what_one_finds(run: Path) -> None:
    command = words(run, "generation_config.temperature=40", benchmarks=SAMPLED, limit=60)
    for name, benchmarks in (("one", SAMPLED), ("one_small", SMALL)):
        main([*command[:2], benchmarks, *command[3:], f"name={name}"])
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, benchmarks in (("two", SAMPLED), ("two_small", SMALL)):
        arguments = [*command[:2], benchmarks, *command[3:], f"name={name}"]
        subprocess.run(
            [sys.executable, *launch, "-m", "evaluation.main", *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            timeout=600,
        )
        one, two = (run / "results" / each for each in (name.replace("two", "one"), name))
        assert items(two) == items(one)
        assert recorded(two)["benchmarks"] == recorded(one)["benchmarks"]
