"""The folder that scripts/make_reasoning_data.py leaves: sampled data, text, held-out rows."""

import json
import sys
from pathlib import Path
from subprocess import run

import numpy as np
import pytest

from data_io.prompt_format import PromptFormat
from data_io.sampled_format import SampledData
from evaluation.reasoning_tasks import DEFAULT_TASKS, TASKS, score
from scripts import make_reasoning_data

ROOT = Path(__file__).parent.parent
TRAIN_PER_TASK, HELD_OUT_PER_TASK, VALIDATION_PER_TASK, EPOCHS = 60, 30, 20, 3
SIZES = [
    f"train_per_task={TRAIN_PER_TASK}",
    f"held_out_per_task={HELD_OUT_PER_TASK}",
    f"validation_per_task={VALIDATION_PER_TASK}",
    f"epochs={EPOCHS}",
]


def make(folder: Path, *options: str) -> Path:
    """Runs the script in this process, as its command line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_reasoning_data.py", f"output={folder}", *SIZES, *options])
        make_reasoning_data.main()
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("data") / "reasoning", f"tasks={','.join(TASKS)}")


def test_every_task_has_as_many_rows_as_asked(made: Path) -> None:
    train, held_out = rows_of(made / "train.jsonl"), rows_of(made / "held_out.jsonl")
    assert len(train) == TRAIN_PER_TASK * len(TASKS)
    counts = {name: sum(row["task"] == name for row in held_out) for name in TASKS}
    assert counts == dict.fromkeys(TASKS, HELD_OUT_PER_TASK)
    assert all(row.keys() == {"instruction", "response", "condition"} for row in train)


def test_no_question_is_in_two_parts(made: Path) -> None:
    parts = [
        {row["instruction"] for row in rows_of(made / f"{part}.jsonl")}
        for part in ("train", "held_out", "validation")
    ]
    sizes = (TRAIN_PER_TASK, HELD_OUT_PER_TASK, VALIDATION_PER_TASK)
    assert [len(part) for part in parts] == [size * len(TASKS) for size in sizes]
    assert len(set.union(*parts)) == sum(len(part) for part in parts)


def test_no_row_of_the_automaton_is_in_two_parts(tmp_path: Path) -> None:
    made = make(tmp_path / "data", "tasks=ca", "train_per_task=3000", "held_out_per_task=500")
    rows = [
        {row["instruction"].split(" ")[2] for row in rows_of(made / f"{part}.jsonl")}
        for part in ("train", "held_out", "validation")
    ]
    assert len(set.union(*rows)) == sum(len(part) for part in rows)


def test_validation_is_sampled_data_too(made: Path) -> None:
    data = SampledData.open(made / "validation")
    assert data.num_epochs == 1
    info = data.metadata.tokenizer_info
    assert info.tokenizer_path == str(made / "validation")
    prompt_format = PromptFormat.from_info(info)
    index, tokens = data.epoch(0), data.tokens()
    for row, start, length in zip(
        rows_of(made / "validation.jsonl"), index.resp_start, index.resp_len, strict=True
    ):
        response = prompt_format.encode_response(row["response"])
        assert tokens[start : start + length].tolist() == response


def test_validation_changes_nothing_else(tmp_path: Path) -> None:
    with_it, without = (
        files_of(make(tmp_path / number, "tasks=number_sorting", f"validation_per_task={number}"))
        for number in ("10", "0")
    )
    differing = {name for name in without if without[name] != with_it[name]}
    assert differing == {"validation.jsonl", "recipe.json", "metadata.json"}
    assert not [name for name in without if name.startswith("validation/")]


def test_held_out_answers_are_right_for_the_verifiers(made: Path) -> None:
    for part in ("held_out", "validation"):
        assert all(score(row, row["response"]) == 1.0 for row in rows_of(made / f"{part}.jsonl"))


def test_each_epoch_holds_every_training_example_in_its_own_order(made: Path) -> None:
    data = SampledData.open(made)
    assert data.num_epochs == EPOCHS
    prompt_format = PromptFormat.from_info(data.metadata.tokenizer_info)
    rows = rows_of(made / "train.jsonl")
    expected = {
        (
            *prompt_format.encode_prompt(row["condition"], row["instruction"]),
            *prompt_format.encode_response(row["response"]),
        )
        for row in rows
    }
    tokens, orders = data.tokens(), []
    assert tokens.dtype == np.uint16
    for epoch in range(EPOCHS):
        index = data.epoch(epoch)
        assert np.array_equal(index.inst_start + index.inst_len, index.resp_start)
        ends = index.resp_start + index.resp_len
        spans = zip(index.inst_start, ends, strict=True)
        assert {tuple(tokens[start:end].tolist()) for start, end in spans} == expected
        assert data.metadata.total_length == (ends - index.inst_start).sum() == len(tokens)
        orders.append(tuple(index.inst_start))
    assert len(set(orders)) == EPOCHS


def test_the_folder_may_be_moved(made: Path, tmp_path: Path) -> None:
    info = SampledData.open(made).metadata.tokenizer_info
    assert info.tokenizer_path == str(made)
    moved = info.model_copy(update={"tokenizer_path": str(tmp_path / "gone")})
    assert PromptFormat.from_info(moved, made).vocab_size == info.vocab_size


def test_the_same_options_again_do_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    make(made, f"tasks={','.join(TASKS)}")
    assert "already made with these options; nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


def test_other_options_never_replace_the_data(made: Path) -> None:
    before = files_of(made)
    with pytest.raises(SystemExit, match=r"seed=0 there, 1 here.*choose another output"):
        make(made, f"tasks={','.join(TASKS)}", "seed=1")
    assert files_of(made) == before


def test_the_seed_decides_the_data(tmp_path: Path) -> None:
    first, again, other = (
        files_of(make(tmp_path / name, "tasks=ab", seed) / "")
        for name, seed in (("first", "seed=0"), ("again", "--seed=0"), ("other", "seed=1"))
    )
    names = {name for name in first if not name.endswith("metadata.json")}  # the folder's path
    assert {name for name in names if first[name] != again[name]} == set()
    assert {"train.jsonl", "held_out.jsonl", "validation.jsonl", "tokens.npy"} < {
        name for name in names if first[name] != other[name]
    }


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ask for at most"):
        make(tmp_path / "data", "tasks=ab", "train_per_task=20000")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_others_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not empty"):
        make(tmp_path)
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("tasks=ab,nosuch", "must name some of spell_backward"),
        ("epochs=0", "0 is less than 1"),
        ("epoch=1", "unrecognized arguments: --epoch=1"),
        ("seed=x", "invalid"),
    ],
)
def test_a_bad_option_is_named(
    tmp_path: Path, option: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make(tmp_path / "data", option)
    assert complaint in capsys.readouterr().err


def test_the_script_runs_by_its_path_and_shows_its_options() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_reasoning_data.py"), "--help"]
    result = run(command, cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert all(name in result.stdout for name in (*DEFAULT_TASKS, "--held_out_per_task"))
