"""Nodes with disks of their own: each keeps its part, all parts are the run, what lacks is named.

It has more than 300 lines: the fast and the slow cases share how runs are started and compared.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import PRETRAIN, ROOT, TINY, Done, Started, files_in, start_command, write_tiny_data
from thread_ranks import as_ranks

from inference.run_folder import open_run
from torture.tiny_runs import TIMES
from training.checkpoint import RunDirectory, read_checkpoint
from training.checkpoint_checks import verify
from training.digests import read_digests
from training.distributed import Disk, World
from training.parts import bring_records, first_sound, prune_steps, published, recover
from training.run_lock import LOCK_FILE, Holder
from training.telemetry import read_metrics
from training.tensor_store import read_tensors

POISONED = ROOT / "tests/poisoned_run.py"
FOLDERS = ("model", "ema", "optimizer")
RUN = Path("checkpoints/data/a")
HOST = socket.gethostname()
DISKS = (Disk("one", (0,)), Disk("two", (1,)))


def start_ranks(
    line: Sequence[str], nodes: Sequence[Path], command: Path = PRETRAIN, **settings: str
) -> list[Started]:
    """The processes of a run, rank by rank, each in its node's folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(len(nodes)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"LOCAL_RANK": "0", "OMP_NUM_THREADS": "1", **settings}
    begun = []
    for rank, node in enumerate(nodes):
        node.mkdir(parents=True, exist_ok=True)
        environment = {**common, "RANK": str(rank)}
        begun.append(start_command(str(command), *line, cwd=node, environment=environment))
    return begun


def run_ranks(line: Sequence[str], nodes: Sequence[Path]) -> list[Done]:
    return [each.wait() for each in start_ranks(line, nodes)]


def check_ranks(line: Sequence[str], nodes: Sequence[Path]) -> str:
    """What rank 0 said in a run that went well on all ranks."""
    said, *_ = (done.check().stdout for done in run_ranks(line, nodes))
    return said


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """30 steps."""
    place = tmp_path_factory.mktemp("source")
    data, held_out = (write_tiny_data(place / name) for name in ("data", "held_out"))
    watch = (f"val_data.path={held_out}", "val_data.interval=5", "val_data.keep_best=true")
    line = ("epochs=2", "run_name=a", "data_workers=0", "checkpoint_steps=3", "log_interval=1")
    return [*TINY, f"data.path={data}", *watch, *line]


@pytest.fixture(scope="module")
def halves(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped at step 7, on the disks of `one` and `two`."""
    place = tmp_path_factory.mktemp("halves")
    said = check_ranks([*settings, "max_steps=7"], [place / "one", place / "two"])
    disks = rf"{re.escape(HOST)} \(rank 0\), {re.escape(HOST)} \(rank 1\)"
    assert re.search(rf"^disks +{disks}: each keeps its part of every checkpoint$", said, re.M)
    return place


@pytest.fixture
def nodes(halves: Path, tmp_path: Path) -> list[Path]:
    """A copy of it."""
    for name in ("one", "two"):
        shutil.copytree(halves / name, tmp_path / name)
    return [tmp_path / "one", tmp_path / "two"]


def on_disks(nodes: Sequence[Path], act: Callable[[RunDirectory], Any]) -> list[Any]:
    """What each rank finds, each on a disk of its own."""

    def one(world: World) -> Any:
        return act(RunDirectory(nodes[world.rank] / RUN, world))

    return as_ranks(len(nodes), one, DISKS)


def joined(nodes: Sequence[Path], folder: Path) -> Path:
    """All parts of a run copied into one folder."""
    for node in reversed(nodes):
        shutil.copytree(node / RUN, folder, dirs_exist_ok=True)
    return folder


def test_each_disk_has_its_part_and_the_list_of_all(halves: Path) -> None:
    names = ["fsdp2_best", "fsdp2_step_6", "fsdp2_step_7"]
    for name in names:
        one, two = (halves / node / RUN / name for node in ("one", "two"))
        assert read_digests(one) == read_digests(two)
        assert (one / "progress.json").read_bytes() == (two / "progress.json").read_bytes()
        for folder in FOLDERS:
            assert {path.name for path in (one / folder).iterdir()} == {".metadata", "__0_0.distcp"}
            assert {path.name for path in (two / folder).iterdir()} == {".metadata", "__1_0.distcp"}
            listed = {each for each in read_digests(one) if each.startswith(f"{folder}/")}
            assert len(listed) == 3
        assert read_checkpoint(one).disks == (Disk(HOST, (0,)), Disk(HOST, (1,)))
    for node in ("one", "two"):
        there = {path.name for path in (halves / node / RUN).iterdir()}
        assert there >= {*names, "all_config.yaml", "train_metadata.yaml", "tokenizer.json"}
        assert not [name for name in there if name.startswith(".")]
        assert ("metrics.jsonl" in there) == ("environment.json" in there) == (node == "one")


def test_a_part_names_whose_files_it_lacks(
    halves: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = f"fsdp2_step_7 lacks the files that were saved on {HOST} (rank 1); copy the fsdp2_step_7"
    for load in (
        lambda: read_checkpoint(halves / "one" / RUN / "fsdp2_step_7").verify(),
        lambda: open_run(halves / "one" / RUN),
        lambda: open_run(halves / "one" / RUN, step=7),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(told)):
            load()
    assert verify(halves / "one" / RUN / "fsdp2_step_7") == 3
    assert capsys.readouterr().out.count(f"FAIL  {halves / 'one' / RUN}/{told}") == 3


def test_all_that_lacks_is_named_before_anything_is_read(nodes: list[Path]) -> None:
    drop_files(nodes[0] / RUN)
    part = read_checkpoint(nodes[0] / RUN / "fsdp2_step_7")
    with pytest.raises(ValueError, match=r"were saved on .* \(rank 0\), .* \(rank 1\); copy"):
        part.verify()


def test_all_parts_in_one_folder_are_a_checkpoint(
    nodes: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = joined(nodes, tmp_path / "joined")
    assert verify(run) == 0
    assert capsys.readouterr().out.endswith("3 checkpoints, sound\n")
    assert "fsdp2_step_7 (epoch 0, step 7, EMA weights)" in open_run(run).taken


def newest(nodes: Sequence[Path]) -> list[tuple[str | None, list[str]]]:
    """For each rank, the checkpoint that a run goes on from, and what is said of others."""

    def look(directory: RunDirectory) -> tuple[str | None, list[str]]:
        there, damaged = published(directory)
        checkpoint, reasons = first_sound(directory, reversed(there))
        return checkpoint.path.name if checkpoint else None, [*damaged, *reasons]

    return on_disks(nodes, look)


def drop_part(run: Path) -> None:
    shutil.rmtree(run / "fsdp2_step_7")


def drop_files(run: Path) -> None:
    for file in run.glob("fsdp2_step_7/*/*.distcp"):
        file.unlink()


def drop_index(run: Path) -> None:
    (run / "fsdp2_step_7/ema/.metadata").unlink()


def flip_a_bit(run: Path) -> None:
    file = run / "fsdp2_step_7/model/__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change_the_progress(run: Path) -> None:
    (run / "fsdp2_step_7/progress.json").write_text("{}")


def save_again(run: Path) -> None:
    """As if the other disk had another save of the same step."""
    file = run / "fsdp2_step_7/digests.json"
    file.write_text(file.read_text().replace('"ema', ' "ema'))


HARMS: dict[Callable[[Path], None], str] = {
    drop_part: f"fsdp2_step_7 lacks the files that were saved on {HOST} (rank 1); copy",
    drop_files: f"fsdp2_step_7 lacks the files that were saved on {HOST} (rank 1); copy",
    drop_index: "fsdp2_step_7/ema/.metadata is missing",
    flip_a_bit: "fsdp2_step_7/model/__1_0.distcp does not match its digest",
    change_the_progress: "fsdp2_step_7/progress.json does not match its digest",
    save_again: "fsdp2_step_7 is not of the same save on all of one (rank 0), two (rank 1)",
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_run_goes_on_from_what_all_disks_hold(
    nodes: list[Path], harm: Callable[[Path], None]
) -> None:
    assert newest(nodes) == [("fsdp2_step_7", [])] * 2
    harm(nodes[1] / RUN)
    for name, told in newest(nodes):
        assert name == "fsdp2_step_6"
        assert any(HARMS[harm] in each for each in told)


def test_disks_may_have_more_than_their_part(nodes: list[Path]) -> None:
    shutil.copytree(nodes[0] / RUN, nodes[1] / RUN, dirs_exist_ok=True)
    drop_files(nodes[0] / RUN)
    assert newest(nodes) == [("fsdp2_step_7", [])] * 2
    drop_part(nodes[0] / RUN)
    for node, (name, (told,)) in zip(nodes, newest(nodes), strict=True):
        assert name == "fsdp2_step_6"
        assert told.endswith(f"is not on one (rank 0); copy {node / RUN} there from another node")


def test_pruning_leaves_the_last_that_all_disks_hold(nodes: list[Path]) -> None:
    def names() -> list[list[str]]:
        found = [(node / RUN).glob("fsdp2_step_*") for node in nodes]
        return [sorted(path.name.removeprefix("fsdp2_step_") for path in each) for each in found]

    flip_a_bit(nodes[1] / RUN)
    on_disks(nodes, lambda directory: prune_steps(directory, 1))
    assert names() == [["6", "7"]] * 2  # 6 is the last good one
    drop_part(nodes[1] / RUN)
    on_disks(nodes, lambda directory: prune_steps(directory, 1))
    assert names() == [["6", "7"], ["6"]]


@pytest.mark.parametrize("published_by_all", [True, False])
def test_a_replaced_checkpoint_comes_back_unless_all_had_published(
    nodes: list[Path], *, published_by_all: bool
) -> None:
    for node in nodes:  # as it is when 7 was saved again, over 6
        (node / RUN / "fsdp2_step_6").rename(node / RUN / ".fsdp2_step_7.replaced")
    if not published_by_all:
        shutil.rmtree(nodes[1] / RUN / "fsdp2_step_7")
    on_disks(nodes, recover)
    steps = [
        json.loads((node / RUN / "fsdp2_step_7/progress.json").read_text())["step"]
        for node in nodes
    ]
    assert steps == ([7, 7] if published_by_all else [6, 6])


@pytest.mark.parametrize("replaces", [False, True])
def test_what_one_disk_has_published_the_other_publishes(nodes: list[Path], replaces: bool) -> None:
    run = nodes[1] / RUN  # killed before it renamed what it had written
    lists = [node / RUN / "fsdp2_step_7/digests.json" for node in nodes]
    (run / "fsdp2_step_7").rename(run / ".fsdp2_step_7")
    if replaces:
        shutil.copytree(run / "fsdp2_step_6", run / "fsdp2_step_7")
        (nodes[0] / RUN / "fsdp2_step_6").rename(nodes[0] / RUN / ".fsdp2_step_7.replaced")
    on_disks(nodes, recover)
    assert lists[0].read_bytes() == lists[1].read_bytes()
    assert not (run / ".fsdp2_step_7").exists()
    assert json.loads((run / "fsdp2_step_7/progress.json").read_text())["step"] == 7


def test_the_records_of_a_run_follow_rank_0(nodes: list[Path]) -> None:
    before = (nodes[0] / RUN / "metrics.jsonl").read_bytes()
    (note,) = on_disks(nodes[::-1], bring_records)[0]
    assert note.endswith("files of the run are taken from two (rank 1)")
    for name in ("environment.json", "samples.jsonl", "metrics.jsonl"):
        assert (nodes[1] / RUN / name).read_bytes() == (nodes[0] / RUN / name).read_bytes()
    assert before == (nodes[1] / RUN / "metrics.jsonl").read_bytes()
    assert on_disks(nodes[::-1], bring_records) == [[], []]


@pytest.fixture(scope="module")
def twin(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run to its end, undisturbed and in one folder."""
    node = tmp_path_factory.mktemp("twin") / "node"
    assert "disks  " not in check_ranks(settings, [node, node])
    return node / RUN


def without_times(metrics: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(metrics)]


def assert_same_end(nodes: Sequence[Path], twin: Path, folder: Path) -> None:
    """Nodes in the order of their ranks; weights, averages and optimizer state bit for bit."""
    run = joined(nodes, folder)
    assert verify(run) == 0 and not list(run.glob(".*"))
    for name in ("fsdp2_epoch_2", "fsdp2_best"):
        for kind in FOLDERS:
            ours, theirs = (read_tensors(each / name / kind) for each in (run, twin))
            torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert without_times(run / "metrics.jsonl") == without_times(twin / "metrics.jsonl")
    assert {each.name for each in run.glob("fsdp2_*")} == {
        each.name for each in twin.glob("fsdp2_*")
    }


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("mode", ["plain", "background"])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_run_goes_on_bit_for_bit_wherever_its_ranks_are(
    settings: list[str],
    nodes: list[Path],
    twin: Path,
    tmp_path: Path,
    *,
    mode: str,
    is_swapped: bool,
) -> None:
    places = nodes[::-1] if is_swapped else nodes
    said = check_ranks([*settings, f"save={mode}"], places)
    assert re.search("^continued +fsdp2_step_7, step 7$", said, re.M)
    assert ("are taken from" in said) == is_swapped
    assert_same_end(places, twin, tmp_path / "joined")


@pytest.mark.slow
@pytest.mark.dist
def test_a_part_that_is_gone_is_named_and_the_checkpoint_before_it_used(
    settings: list[str], nodes: list[Path], twin: Path, tmp_path: Path
) -> None:
    drop_part(nodes[1] / RUN)
    said = check_ranks(settings, nodes)
    skipped = f"{RUN}/fsdp2_step_7 lacks the files that were saved on {HOST} (rank 1); copy"
    assert f"skipped a checkpoint: {skipped}" in said
    assert re.search("^continued +fsdp2_step_6, step 6$", said, re.M)
    assert_same_end(nodes, twin, tmp_path / "joined")


@pytest.mark.slow
@pytest.mark.dist
def test_a_node_that_is_gone_is_named(settings: list[str], nodes: list[Path]) -> None:
    shutil.move(nodes[1], nodes[1].with_name("gone"))
    lacking = f"fsdp2_step_7 lacks the files that were saved on {HOST} (rank 1); copy the fsdp2"
    for places in ([nodes[0]], [nodes[0]] * 2, nodes, nodes[::-1]):
        for done in run_ranks(settings, places):
            assert done.code == 2 and "Traceback" not in done.stderr, done.stderr
            assert "has no checkpoint that can be continued from: " in done.stderr
            assert lacking in done.stderr
    assert not (nodes[1] / RUN).exists()
    shutil.copytree(nodes[1].with_name("gone") / RUN, nodes[0] / RUN, dirs_exist_ok=True)
    for done in run_ranks(settings, nodes):  # all parts are there, but one node has nothing
        told = f"fsdp2_step_7 is not on {HOST} (rank 1); copy {RUN} there from another node"
        assert done.code == 2 and told in done.stderr
    said = check_ranks([*settings, "max_steps=8"], [nodes[0]] * 2)
    assert re.search("^continued +fsdp2_step_7, step 7$", said, re.M)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("mode", ["plain", "background"])
def test_a_run_killed_while_it_saves_goes_on(
    settings: list[str], twin: Path, tmp_path: Path, mode: str
) -> None:
    nodes = [tmp_path / "one", tmp_path / "two"]
    line = [*settings, f"save={mode}"]
    for life, wait_s in enumerate((0.0, 0.003, 0.01, 0.03)):
        begun = start_ranks(line, nodes)
        awaited = nodes[life % 2] / RUN / f"fsdp2_step_{6 * (life + 1)}"
        while not awaited.exists() and begun[0].code is None:
            time.sleep(0.001)
        time.sleep(wait_s)
        for each in begun if life % 2 else begun[::-1]:
            each.process.kill()
        for each in begun:
            each.wait()
    check_ranks(line, nodes)
    assert_same_end(nodes, twin, tmp_path / "joined")


@pytest.mark.slow
@pytest.mark.dist
def test_replicas_on_disks_of_their_own_are_one_run(settings: list[str], tmp_path: Path) -> None:
    line = [*settings, "fsdp_replicas=2"]
    whole = tmp_path / "whole/node"
    check_ranks(line, [whole, whole])
    nodes = [tmp_path / "one", tmp_path / "two"]
    check_ranks([*line, "max_steps=7"], nodes)
    check_ranks(line, nodes[::-1])
    assert_same_end(nodes[::-1], whole / RUN, tmp_path / "joined")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("places", [(1, 0), (1, 0, 1)])
def test_a_run_of_any_ranks_starts_from_another_one_in_parts(
    settings: list[str], nodes: list[Path], tmp_path: Path, places: tuple[int, ...]
) -> None:
    line = [*settings, "checkpoint_path=other", f"resume_from={RUN}", "checkpoint_start=true"]
    wider = (f"global_batch_size={32 * len(places)}", "max_steps=1")
    said = check_ranks([*line, *wider], [nodes[place] for place in places])
    assert "fsdp2_step_7 (weights, optimizer state, EMA)" in said
    before = joined(nodes, tmp_path / "before")
    for node in nodes[::-1]:
        shutil.copytree(node / "other", tmp_path / "started", dirs_exist_ok=True)
    for kind in FOLDERS:
        ours = read_tensors(tmp_path / "started/fsdp2_step_0" / kind)
        theirs = read_tensors(before / "fsdp2_step_7" / kind)
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    for node in nodes:
        shutil.rmtree(node / "other")
    drop_files(nodes[1] / RUN)
    for done in run_ranks(line, nodes):
        assert done.code == 2, done.stderr
        assert f"fsdp2_step_7 lacks the files that were saved on {HOST} (rank 1)" in done.stderr


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_go_back_together_for_a_bad_step(settings: list[str], tmp_path: Path) -> None:
    whole = tmp_path / "whole/node"
    nodes = [tmp_path / "one", tmp_path / "two"]
    line = [*settings, "guard.policy=rewind", "guard.window=1", "keep_last=4"]
    check_ranks([*line, "max_steps=10"], [whole, whole])
    cursor = json.loads((whole / RUN / "fsdp2_step_9/progress.json").read_text())["cursor"]
    shutil.rmtree(whole)
    for places in ([whole, whole], nodes):
        begun = start_ranks(line, places, command=POISONED, POISON=f"loss@{cursor}")
        ended = [each.wait() for each in begun]
        assert [each.code for each in ended] == [0, 0], ended[1].stderr
        said = ended[0].stdout
        assert "back to fsdp2_step_6; steps 8 to 10 are passed over" in said
    assert_same_end(nodes, whole / RUN, tmp_path / "joined")


@pytest.mark.slow
@pytest.mark.dist
def test_a_dry_run_leaves_nothing_on_any_disk(settings: list[str], tmp_path: Path) -> None:
    nodes = [tmp_path / "one", tmp_path / "two"]
    said = check_ranks([*settings, "dry_run=true"], nodes)
    assert "read back as it was saved" in said
    assert [files_in(node) for node in nodes] == [{}, {}]


@pytest.mark.slow
@pytest.mark.dist
def test_what_trains_on_one_node_already_is_respected(
    settings: list[str], nodes: list[Path]
) -> None:
    (nodes[1] / RUN / LOCK_FILE).write_text(json.dumps(asdict(Holder.here())))
    before = [list(files_in(node)) for node in nodes]
    for done in run_ranks(settings, nodes):
        assert done.code == 2
        assert f"{HOST} (rank 1): process {os.getpid()} trains in {RUN} already" in done.stderr
    assert [list(files_in(node)) for node in nodes] == before


@pytest.mark.slow
@pytest.mark.dist
def test_benchmarks_whose_answers_meet_in_one_folder_are_refused(
    settings: list[str], tmp_path: Path
) -> None:
    nodes = [tmp_path / "one", tmp_path / "two"]
    for done in run_ranks([*settings, "benchmarks.run_only=[Winogrande]"], nodes):
        assert done.code == 2 and "leave benchmarks out, or give a checkpoint" in done.stderr
    assert [files_in(node) for node in nodes] == [{}, {}]
