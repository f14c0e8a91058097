"""Streams of prompts: memory that runs out, stops at any point, shares of several processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from benchmark_cases import golden_mirror
from evaluation_cases import FakeEngine, at_hand
from run_cases import ALONE

from evaluation.answer_log import LogWriter, read_logs
from evaluation.benchmarks import BENCHMARKS
from evaluation.benchmarks.protocol import Item, Verdict
from evaluation.engines import Asked, StreamKind
from evaluation.judging import Judge, Sheet
from evaluation.loading import Loader, Planned, make_ready, too_long_notes
from evaluation.running import Runner, answer_all, in_streams, is_out_of_memory, seed_of
from evaluation.settings import BenchmarkPlan
from training.distributed import World

CPU_ALLOCATOR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 1000 bytes. Error code 12 (Cannot allocate memory)"
)
OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), CPU_ALLOCATOR]
OUT_OF_MEMORY += [MemoryError()]
PROMPTS = [Asked(key, "x" * key, {}) for key in range(40)]


def plan(name: str, **settings: object) -> Planned:
    return Planned(BenchmarkPlan(name, BENCHMARKS[name].model_validate(settings), {}), {})


def failing_above(size: int, error: Exception, after: int = 3) -> Callable[..., None]:
    """Fails at every `after`-th prompt while more than `size` are asked at a time."""
    seen = []

    def before(asked: Asked, kind: StreamKind) -> None:
        seen.append(asked)
        if kind.size > size and len(seen) % after == 0:
            raise error

    return before


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_batch_and_goes_on_with_what_is_unanswered(
    error: Exception,
) -> None:
    engine, told = FakeEngine(failing_above(3, error)), list[str]()
    kind = StreamKind("answers", 16, "prompts")
    answered = list(answer_all(engine, iter(PROMPTS), kind, tell=told.append))
    assert sorted(each.key for each in answered) == list(range(40))
    assert {each.key: each.text for each in answered} == {key: str(key % 3) for key in range(40)}
    assert [each.size for each in engine.kinds] == [16, 8, 4, 2]
    assert len(engine.taken) == 40  # nothing that was answered is asked again
    assert told[0].startswith("out of memory with 16 prompts at a time: going on with 8")
    assert len(told) == 3 and all("\n" not in line for line in told)


def test_memory_that_does_not_hold_one_prompt_is_an_error() -> None:
    engine = FakeEngine(failing_above(0, MemoryError(), after=1))
    with pytest.raises(ValueError, match="out of memory with 1 prompts at a time"):
        list(answer_all(engine, PROMPTS, StreamKind("answers", 4, "prompts"), tell=print))


def test_an_error_that_is_not_about_memory_stays_what_it_is() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not is_out_of_memory(error)
    engine = FakeEngine(failing_above(0, error))
    with pytest.raises(RuntimeError, match="mat1"):
        list(answer_all(engine, PROMPTS, StreamKind("answers", 4, "prompts"), tell=print))


def runner(
    folder: Path,
    engine: FakeEngine,
    sheets: list[Sheet],
    planned: Sequence[Planned],
    world: World = ALONE,
) -> Runner:
    loader = Loader(planned, golden_mirror(), at_hand(engine))
    return Runner(engine, loader, folder, sheets.append, world)


BENCHES = [plan("GSM8k"), plan("BoolQ", num_shots=1), plan("Winogrande")]


def texts(sheets: Sequence[Sheet]) -> dict[str, list[str]]:
    return {
        each.ready.label: [each.given[index].text for index in range(len(each.ready.items))]
        for each in sheets
    }


def test_a_run_stopped_at_any_point_goes_on_where_it_was(tmp_path: Path) -> None:
    undisturbed: list[Sheet] = []
    (tmp_path / "whole").mkdir()
    whole = FakeEngine()
    runner(tmp_path / "whole", whole, undisturbed, BENCHES).run([BENCHES])
    asked: list[str] = []
    sheets: list[Sheet] = []
    for _ in range(20):
        sheets.clear()
        engine = FakeEngine(stopping_after(5))
        try:
            runner(tmp_path, engine, sheets, BENCHES).run([BENCHES])
        except KeyboardInterrupt:
            asked += map(str, engine.taken)
            continue
        asked += map(str, engine.taken)
        break
    assert texts(sheets) == texts(undisturbed) and len(sheets) == 3
    assert by_label(sheets) == by_label(undisturbed)
    assert sorted(asked) == sorted(map(str, whole.taken))  # none twice


def by_label(sheets: Sequence[Sheet]) -> dict[str, dict[int, Verdict]]:
    return {each.ready.label: each.verdicts for each in sheets}


def stopping_after(count: int) -> Callable[..., None]:
    left = [count]

    def before(asked: Asked, kind: StreamKind) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    return before


def test_a_torn_last_line_costs_that_answer_alone(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path, FakeEngine(stopping_after(5)), [], BENCHES).run([BENCHES])
    (log,) = tmp_path.glob("answers.*.jsonl")
    before = read_logs(tmp_path)
    log.write_bytes(log.read_bytes() + b'{"benchmark": "GSM8k", "id": "te')
    assert read_logs(tmp_path) == before
    sheets: list[Sheet] = []
    runner(tmp_path, FakeEngine(), sheets, BENCHES).run([BENCHES])
    assert len(sheets) == 3
    assert len(read_logs(tmp_path).answers) == sum(len(each.ready.items) for each in sheets)
    log.write_bytes(b"{}\n" + log.read_bytes())
    with pytest.raises(ValueError, match=r"answers\.0\.jsonl:1 is no line of answers"):
        read_logs(tmp_path)


def test_an_answer_to_another_prompt_is_asked_anew(tmp_path: Path) -> None:
    first = [plan("BoolQ", num_shots=1)]
    runner(tmp_path, FakeEngine(), [], first).run([first])
    other, engine = [plan("BoolQ", num_shots=0)], FakeEngine()
    runner(tmp_path, engine, [], other).run([other])
    assert len(engine.taken) == 7
    runner(tmp_path, engine, [], other).run([other])
    assert len(engine.taken) == 7


class Meeting:
    """The world of one of two ranks that are threads here."""

    def __init__(self, rank: int, barrier: threading.Barrier) -> None:
        self.rank, self.size, self.is_main = rank, 2, rank == 0
        self.barrier = lambda: barrier.wait(60)


def test_two_ranks_share_the_prompts_and_find_what_one_finds(tmp_path: Path) -> None:
    alone: list[Sheet] = []
    (tmp_path / "alone").mkdir()
    runner(tmp_path / "alone", FakeEngine(), alone, BENCHES).run([BENCHES])
    sheets: list[Sheet] = []
    engines, barrier = [FakeEngine(), FakeEngine()], threading.Barrier(2)
    runners = [
        runner(tmp_path, engine, sheets, BENCHES, Meeting(rank, barrier))  # type: ignore[arg-type]
        for rank, engine in enumerate(engines)
    ]
    other = threading.Thread(target=runners[1].run, args=([BENCHES],), daemon=True)
    other.start()
    runners[0].run([BENCHES])
    other.join(60)
    assert texts(sheets) == texts(alone)
    shares = [len(engine.taken) for engine in engines]
    assert sum(shares) == sum(len(each.ready.items) for each in alone)
    assert abs(shares[0] - shares[1]) <= len(BENCHES)
    assert not set(map(str, engines[0].taken)) & set(map(str, engines[1].taken))


def test_one_stream_takes_all_benchmarks_of_equal_kind() -> None:
    sizes = {"GSM8k": 4, "BoolQ": 2, "Winogrande": 4}
    planned = [
        Planned(BenchmarkPlan(name, BENCHMARKS[name](), {}), {"batch_size": size})
        for name, size in sizes.items()
    ]
    streams = in_streams(FakeEngine.stream_of, planned)
    assert [[each.plan.label for each in stream] for stream in streams] == [
        ["GSM8k", "Winogrande"],
        ["BoolQ"],
    ]


def test_the_next_benchmark_is_loaded_while_the_engine_answers(tmp_path: Path) -> None:
    """The first answer is given only when the last benchmark is loaded."""
    loaded = threading.Event()

    class Watching:
        def rows(self, split: object, *, benchmark: str) -> Iterator[object]:
            if benchmark == "Winogrande":
                loaded.set()
            return golden_mirror().rows(split, benchmark=benchmark)  # type: ignore[arg-type]

    engine = FakeEngine(lambda asked, kind: None if loaded.wait(60) else pytest.fail("waited"))
    loader = Loader(BENCHES, Watching(), at_hand(engine))  # type: ignore[arg-type]
    sheets: list[Sheet] = []
    Runner(engine, loader, tmp_path, sheets.append, ALONE).run([BENCHES])
    assert len(sheets) == 3


def test_missing_data_of_a_later_benchmark_stops_the_run_at_once(tmp_path: Path) -> None:
    planned = [plan("GSM8k"), plan("BoolQ", split="nowhere")]
    engine = FakeEngine()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl.*evaluation\.fetch"):
        runner(tmp_path, engine, [], planned).run([planned])


def test_a_judge_that_fails_is_no_silence(tmp_path: Path) -> None:
    def fail(sheet: Sheet) -> None:
        raise OSError("the disk is full")

    judge = Judge(LogWriter(tmp_path, 0), fail)
    empty = make_ready(plan("GSM8k"), golden_mirror(), at_hand(FakeEngine()))
    sheet = Sheet(empty, verdicts=dict.fromkeys(range(len(empty.items))))  # type: ignore[arg-type]
    judge.put(sheet, ())
    with pytest.raises(OSError, match="disk is full"):
        judge.wait()


def test_quiet_answers_leave_nothing_in_a_log_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned, sheets = [plan("GSM8k")], list[Sheet]()
    asking = runner(tmp_path, FakeEngine(), sheets, planned)
    asking.is_quiet = True
    asking.run([planned])
    assert capsys.readouterr() == ("", "") and len(sheets) == 1


def test_too_long_prompts_have_an_empty_answer_without_being_asked(tmp_path: Path) -> None:
    planned, sheets = [plan("BoolQ", num_shots=0)], list[Sheet]()
    ready = make_ready(planned[0], golden_mirror(), at_hand(FakeEngine()))
    lengths = [len(text) for text in ready.texts]
    context = sorted(lengths)[3]  # filled to the last token by one of them
    engine = FakeEngine(context=context)
    runner(tmp_path, engine, sheets, planned).run([planned])
    (sheet,) = sheets
    reasons = [sheet.given[index].finish_reason for index in range(len(lengths))]
    assert reasons == ["prompt_too_long" if each >= context else "stop" for each in lengths]
    assert 0 < reasons.count("prompt_too_long") < len(reasons)
    assert len(engine.taken) == reasons.count("stop")
    assert any(f"fill the context of {context} tokens" in note for note in sheet.ready.notes)


def test_notes_say_for_which_subjects_the_context_is_too_small() -> None:
    items = [Item(str(n), "", "", category=name) for n, name in enumerate("aabbc")]
    notes = list(too_long_notes(items, frozenset({0, 1, 2}), [9, 8, 8, 1, 1], 8, advice="; fewer"))
    assert notes == [
        "3 of 5 prompts fill the context of 8 tokens (the longest has 9) and have an empty answer"
        "; fewer",
        "the context is too small for all prompts of a (2)",
        "the context is too small for some prompts of b (1 of 2)",
    ]
    (note,) = too_long_notes(items, frozenset(range(5)), [9, 8, 8, 9, 9], 8)
    assert note.startswith("none of the 5 prompts fits the context of 8 tokens")
    assert "the figures say nothing about the model" in note


def test_the_seed_of_a_prompt_depends_on_nothing_but_the_prompt() -> None:
    seeds = {seed_of(0, label, str(n)) for label in ("AIME", "GSM8k") for n in range(100)}
    assert len(seeds) == 200 and min(seeds) >= 0
    assert seed_of(0, "AIME", "test/3#7") == seed_of(0, "AIME", "test/3#7")
    assert seed_of(1, "AIME", "test/3#7") != seed_of(0, "AIME", "test/3#7")
