"""Chat tasks: prompts and verdicts by hand, letters as one prompt at a time gives them."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from asking_cases import prompt_format, write_run

from evaluation.benchmarks.protocol import Item, Row, Split
from evaluation.chat_tasks import CHAT_TASKS, chat_task_named
from evaluation.chat_tasks.choices import ChatARCEasy, ChatMMLU
from evaluation.chat_tasks.generated import WORDS, ChatGSM8K, Spelling, SpellingBee
from evaluation.core.main import main
from evaluation.fetch import main as fetch_main
from evaluation.fetch import wanted_splits
from evaluation.mirror import Hub, LocalMirror, folder_of
from inference.model_folder import ModelOptions, open_model
from models.batch import PackedLayout

ARC_ROWS = [
    {
        "question": "Hot?",
        "choices": {"label": ["A", "B", "C"], "text": ["sun", "ice", "fog"]},
        "answerKey": "A",
    },
    {
        "question": "Wet?",
        "choices": {"label": ["1", "2", "3", "4"], "text": ["sand", "rock", "rain", "ash"]},
        "answerKey": "3",
    },
]
MMLU_ROWS = [
    {"question": f"{at}?", "choices": ["w", "x", "y", "z"], "answer": at % 4, "subject": "law"}
    for at in range(6)
]
GSM_ROWS = [{"question": "2 + 3?", "answer": "2 + 3 = 5\n#### 5"}]
ARC_PROMPT = """Multiple Choice question: Hot?
- sun=A
- ice=B
- fog=C

Respond only with the letter of the correct answer."""


def write_split(data_dir: Path, split: Split, rows: list[Any]) -> None:
    folder = folder_of(data_dir, split)
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split.split}.jsonl").write_text(text)


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    write_split(tmp_path, ChatARCEasy().splits()[0], ARC_ROWS)
    write_split(tmp_path, ChatMMLU().splits()[0], MMLU_ROWS)
    write_split(tmp_path, ChatGSM8K().splits()[0], GSM_ROWS)
    write_split(tmp_path, WORDS, [{"word": word} for word in ("banana", "cherry", "don't", "fig")])
    return tmp_path


def test_choices_are_asked_with_the_letter_behind_each(mirror: Path) -> None:
    first, second = ChatARCEasy().load(LocalMirror(mirror)).items
    assert first == Item("test/0", ARC_PROMPT, "A", ("A", "B", "C"))
    assert (second.truth, second.letters) == ("3", ("1", "2", "3", "4"))
    assert "\n- rain=3\n" in second.prompt
    item = ChatMMLU().load(LocalMirror(mirror)).items[1]
    assert item.prompt.startswith("Multiple Choice question: 1?\n- w=A\n- x=B\n")
    assert (item.truth, item.category) == ("B", "law")


def test_the_likeliest_letter_of_the_item_counts() -> None:
    item = Item("x", "p", "B", ("A", "B", "C"))
    task = ChatARCEasy()
    verdict = task.judge(item, json.dumps({"A": -3, "B": -2, "C": -4, "D": -1, "1": -0.5}))
    assert (verdict.extracted, verdict.correct, verdict.invalid) == ("B", 1.0, False)
    assert task.judge(item, json.dumps({"A": -1, "B": -2, "C": -4})).correct == 0
    assert task.judge(item, "").invalid  # the prompt was too long
    right = task.judge(item, '{"B": -1}')
    figures = task.figures([item] * 2, [right, task.judge(item, '{"A": -1}')])
    assert figures.published["centred"] == pytest.approx((0.5 - 0.25) / 0.75)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({**ARC_ROWS[0], "answerKey": "D"}, "answerKey='D'"),
        ({**ARC_ROWS[0], "choices": {"label": ["A", "Z"], "text": ["a", "b"]}}, "labels"),
        ({**ARC_ROWS[0], "choices": {"label": ["A"], "text": ["a", "b"]}}, "of 2 texts"),
    ],
)
def test_a_row_that_is_no_question_is_named(mirror: Path, row: Row, told: str) -> None:
    write_split(mirror, ChatARCEasy().splits()[0], [row])
    with pytest.raises(ValueError, match=r"test row 0: ") as refused:
        ChatARCEasy().load(LocalMirror(mirror))
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("5", True),
        ("2 + 3 = 5", True),
        ("It is 5.0.", True),
        ("#### 5", True),
        ("5 apples, not 6", False),
        ("1,005", False),
        ("\\boxed{5} and 7 more", True),
        ("none", False),
        ("", False),
        ("9" * 5000, False),
    ],
)
def test_the_last_number_is_the_answer(mirror: Path, answer: str, is_right: bool) -> None:
    (item,) = ChatGSM8K().load(LocalMirror(mirror)).items
    assert item.truth == 5
    verdict = ChatGSM8K().judge(item, answer)
    assert verdict.correct == is_right
    assert verdict.extracted is None or Decimal(str(verdict.extracted)).is_finite()


def test_words_are_drawn_the_same_everywhere(mirror: Path) -> None:
    bee = SpellingBee(max_items=40)
    items = bee.load(LocalMirror(mirror)).items
    assert items == bee.load(LocalMirror(mirror)).items
    assert len(items) == 40
    assert len(SpellingBee().load(LocalMirror(mirror)).items) == 1000
    for item in items:
        _, _, letter, *_, word = item.prompt.rstrip("?").split()
        assert word in ("banana", "cherry", "fig")  # the one with an apostrophe is no word here
        assert item.truth == word.count(letter)
        assert bee.judge(item, f"There are {item.truth}.").correct == 1
        assert bee.judge(item, f"There are {item.truth + 1}.").correct == 0


@pytest.mark.parametrize(
    ("answer", "correct", "robust"),
    [
        ("fig:f,i,g", 1, 1),
        (" fig:f,i,g\n", 1, 1),
        ("F-I-G", 0, 1),
        ("f i g", 0, 1),
        ("fig:f,i,j", 0, 0),
        ("fig", 0, 0),
        ("", 0, 0),
    ],
)
def test_words_are_spelled_letter_by_letter(answer: str, correct: int, robust: int) -> None:
    verdict = Spelling().judge(Item("x", "Spell the word: fig", "fig:f,i,g"), answer)
    assert (verdict.correct, verdict.robust) == (correct, robust)


def test_names_are_found_and_near_ones_told() -> None:
    assert chat_task_named("GSM8K") is chat_task_named("ChatGSM8K") is ChatGSM8K
    with pytest.raises(ValueError, match="did you mean ARC-Easy"):
        chat_task_named("arc-eazy")
    names = [task.name for task in CHAT_TASKS.values()]
    assert len(set(names)) == len(names)


def test_fetch_knows_chat_tasks_and_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(wanted_splits(["ARC-Easy", "ChatMMLU", "SpellingBee"])) == {
        *ChatARCEasy().splits(),
        *ChatMMLU().splits(),
        WORDS,
    }
    words = tmp_path / "words.txt"
    words.write_text("fig\nplum\n")
    fetch_main([f"data_dir={tmp_path}", "run_only=[Spelling]", f"words_from={words}"])
    assert "2 words" in capsys.readouterr().out
    assert [row["word"] for row in LocalMirror(tmp_path).rows(WORDS, benchmark="x")] == [
        "fig",
        "plum",
    ]
    with pytest.raises(FileNotFoundError, match=r"run_only=\[Spelling\]"):
        Spelling().load(Hub())


@torch.no_grad()
def letter_alone(run: Path, item_prompt: str, letters: tuple[str, ...]) -> str:
    """The likeliest of the letters after a prompt that runs by itself."""
    model = open_model(ModelOptions(ckpt_path=run, device="cpu")).model
    ids = prompt_format().encode_prompt("direct", item_prompt)
    layout = PackedLayout.from_lengths(torch.tensor([len(ids)]), torch.tensor([0]), num_slots=1)
    hidden = model(torch.tensor(ids), torch.arange(len(ids)), layout)
    logits = model.logits(hidden)[-1]
    tokens = [prompt_format().encode_response(letter)[0] for letter in letters]
    return letters[int(logits[tokens].argmax())]


def test_chat_tasks_run_from_a_mirror(
    mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", max_context=256)
    chosen = ["chat=[MMLU,ARC-Easy,GSM8K,Spelling]", "max_per_task=5", "max_output_tokens=4"]
    main([f"ckpt_path={run}", f"data_dir={mirror}", "device=cpu", *chosen])
    printed = capsys.readouterr().out
    folder = run / "results" / "core"
    results = json.loads((folder / "results.json").read_text())
    counts = {label: each["n"] for label, each in results["benchmarks"].items()}
    assert counts == {"ChatMMLU": 5, "ChatARC-Easy": 2, "ChatGSM8K": 1, "Spelling": 5}
    assert "chat tasks are asked with condition=direct" in printed
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    chosen = {line["id"]: line for line in lines if line["benchmark"] == "ChatMMLU"}
    items = {item.id: item for item in ChatMMLU().load(LocalMirror(mirror)).items}
    for item_id, line in chosen.items():
        alone = letter_alone(run, items[item_id].prompt, items[item_id].letters)
        assert line["extracted"] == alone
    assert (mirror / ".prompts").is_dir()
