"""Fine-tuning an exported model with peft and trl: the prompt stays a prefix there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import exported, greedy, loaded, write_run
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.collator import PrefixCollator

PAD = 7
ROWS = [
    {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, 4, 5]},
    {"input_ids": [1, 2, 9], "completion_mask": [0, 0, 1]},
    {"input_ids": [1, 2, 8, 3, 9], "assistant_masks": [0, 0, 1, 0, 1]},
]


def test_what_comes_before_the_first_answer_is_the_prefix() -> None:
    batch = PrefixCollator(PAD)(ROWS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 9, PAD, PAD], [1, 2, 8, 3, 9]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1] * 5]
    assert batch["token_type_ids"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, 4, 5],
        [-100, -100, 9, -100, -100],
        [-100, -100, 8, -100, 9],
    ]


def test_types_that_a_row_has_are_kept() -> None:
    row = {"input_ids": [1, 2, 3, 4], "labels": [-100] * 3 + [4], "token_type_ids": [1, 1, 0, 0]}
    assert PrefixCollator(PAD)([row])["token_type_ids"].tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"input_ids": [1, 2]}, "does not say what is scored"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "nothing of a row is scored"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "a row has no prompt"),
        ({"input_ids": [1, 2], "labels": [-100]}, "2 input_ids and 1 labels"),
        (
            {"input_ids": [1, 2], "labels": [-100, 2], "token_type_ids": [1, 1]},
            "mark scored tokens as prefix",
        ),
    ],
)
def test_rows_that_teach_nothing_are_refused(row: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PrefixCollator(PAD)([row])


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="a row of 5 tokens is longer than max_length=4"):
        PrefixCollator(PAD, max_length=4)(ROWS)
    with pytest.raises(ValueError, match="no padding token"):
        PrefixCollator(None)(ROWS)
    assert PrefixCollator(None)(ROWS[:1])["input_ids"].shape == (1, 5)


def sums(top: int) -> list[dict[str, Any]]:
    """Sums as conversations of a question and its answer."""
    return [
        {
            "prompt": [{"role": "user", "content": f"{a} plus {b}"}],
            "completion": [{"role": "assistant", "content": str(a + b)}],
        }
        for a in range(top)
        for b in range(top)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("net", ["hrm", "rins"])
def test_trl_trains_adapters_of_peft_on_an_export(net: str, tmp_path: Path) -> None:
    """Its loss is that of a prefix-LM, the adapters learn, and what is merged is asked by us."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from datasets import Dataset

    folder = exported(write_run(tmp_path / "run", net), tmp_path / "hf", is_compared=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    )
    projection = "q_proj" if net == "hrm" else "gqkv_proj"
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=30,
        per_device_train_batch_size=9,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        model,
        args=settings,
        train_dataset=Dataset.from_list(sums(3)),
        processing_class=tokenizer,
        data_collator=PrefixCollator(tokenizer.pad_token_id),
        peft_config=peft.LoraConfig(r=4, lora_alpha=8, target_modules=[projection, "o_proj"]),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    before = float(trainer.compute_loss(trainer.model, dict(batch)))
    assert before == pytest.approx(our_loss(folder, batch), rel=1e-4)
    trainer.train()
    after = float(trainer.compute_loss(trainer.model, dict(batch)))
    assert after < 0.7 * before
    trainer.model.merge_and_unload().save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    assert our_loss(tmp_path / "tuned", batch) == pytest.approx(after, rel=1e-4)
    assert greedy(loaded(tmp_path / "tuned"), ["1 plus 1"])


def our_loss(folder: Path, batch: dict[str, Any]) -> float:
    """The mean loss of the scored tokens of a batch, by our model and packed as in training."""
    from models.batch import PackedLayout

    model = loaded(folder).engine.model
    total, count = 0.0, 0
    for ids, mask, labels, types in zip(
        *(batch[k] for k in ("input_ids", "attention_mask", "labels", "token_type_ids")),
        strict=True,
    ):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        prefix = int(types.sum())
        layout = PackedLayout.from_lengths(
            torch.tensor([prefix]), torch.tensor([len(ids) - prefix]), 1
        )
        with torch.no_grad():
            logits = model.logits(model(ids, torch.arange(len(ids)), layout))[:-1]
        wanted = labels[1:]
        total += float(F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum"))
        count += int((wanted != -100).sum())
    return total / count
