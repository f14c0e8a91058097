"""Plain text behind a one-token prefix, trained as any data; contexts above 4,096 tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from commands import ROOT, TINY, run_pretrain, start_command
from net_cases import VOCAB_SIZE, build, random_row, tiny_config
from torch import Tensor

from data_io.sampled_format import SampledData
from models.attention import BACKENDS_BY_NAME
from models.attention.dense import prefix_lm_mask
from models.batch import IGNORE_LABEL
from models.language_model import LanguageModel
from models.loss import next_token_sums

LENS = (1, 2, 9, 40)  # of texts, with their prefix
LONG = 6100


def make_data(folder: Path, context_size: int) -> Path:
    """Sampled data of three documents of `LONG` bytes."""
    folder.mkdir()
    for name in "abc":
        lines = (f"{name} {number} bottles of beer on the wall\n" for number in range(LONG))
        (folder / f"{name}.txt").write_text("".join(lines)[:LONG])
    sizes = (f"context_size={context_size}", "epochs=1", "held_out=0")
    arguments = ("text=*.txt", "output=data", *sizes)
    script = str(ROOT / "scripts" / "make_text_data.py")
    start_command(script, *arguments, cwd=folder).wait().check()
    return folder / "data"


def losses_of(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["train/loss"] for line in lines]


def gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    names, params = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, params), strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "dense"])
@pytest.mark.parametrize("net", ["transformer", "hrm"])
def test_behind_one_token_prefixlm_is_causal(net: str, attention: str) -> None:
    torch.manual_seed(0)
    row = random_row([1] * len(LENS), [length - 1 for length in LENS], num_padding=3)
    num_rows = len(row.tokens)
    mask = prefix_lm_mask(row.layout, num_rows)
    assert torch.equal(mask, prefix_lm_mask(row.layout.as_causal(), num_rows))
    labels = torch.full((num_rows,), IGNORE_LABEL)
    labels[: sum(LENS)] = torch.randint(0, VOCAB_SIZE, (sum(LENS),))
    found = []
    for attn_type in ("prefix_lm", "causal"):
        torch.manual_seed(1)
        model = build(tiny_config(net, attn_type=attn_type))
        model.attention = BACKENDS_BY_NAME[attention]
        hidden = model(row.tokens, row.positions, row.layout)
        weight = model.lm_head.weight
        sums = next_token_sums(hidden, weight, labels, row.layout, num_scored=sum(LENS))
        found.append({"loss": sums.loss.detach(), **gradients(model, sums.loss)})
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_behind_two_tokens_it_is_not() -> None:
    layout = random_row([2, 1], [3, 3]).layout
    assert not torch.equal(prefix_lm_mask(layout, 9), prefix_lm_mask(layout.as_causal(), 9))


def test_a_run_with_causal_attention_has_the_same_losses(tmp_path: Path) -> None:
    data = make_data(tmp_path / "text", 33)
    common = (*TINY, f"data.path={data}", "epochs=1", "log_interval=1", "max_steps=9")
    losses = []
    for attn_type in ("prefix_lm", "causal"):
        path = tmp_path / attn_type
        run_pretrain(
            *common, f"arch.attn_type={attn_type}", f"checkpoint_path={path}", cwd=tmp_path
        ).check()
        losses.append(losses_of(path))
    assert len(losses[0]) == 9 and losses[0][-1] < losses[0][0]
    assert losses[0] == losses[1]


@torch.no_grad()
def test_sdpa_agrees_with_the_oracle_above_4096_tokens() -> None:
    torch.manual_seed(0)
    row = random_row([5, 1], [20, LONG])
    outputs = []
    for attention in ("sdpa", "dense"):
        torch.manual_seed(1)
        model = build(tiny_config("transformer", n_layers=1, num_heads=1))
        model.attention = BACKENDS_BY_NAME[attention]
        outputs.append(model(row.tokens, row.positions, row.layout))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_run_takes_a_longer_context_and_rotary_theta_than_the_run_it_starts_from(
    tmp_path: Path,
) -> None:
    path, longer = tmp_path / "first", tmp_path / "longer"
    common = (*TINY, "arch/net@arch=transformer", "epochs=1", "log_interval=1")
    first = (f"data.path={make_data(tmp_path / 'short', 33)}", "max_steps=10")
    run_pretrain(*common, *first, f"checkpoint_path={path}", cwd=tmp_path).check()

    long = make_data(tmp_path / "long", 8193)
    data = SampledData.open(long)
    assert data.metadata.model_max_seq_len == 8192
    assert data.epoch(0).row_lengths().tolist() == [LONG + 1] * 3
    second = (f"data.path={long}", "global_batch_size=8192", "lr_warmup_steps=0")
    start = (f"resume_from={path}", f"checkpoint_path={longer}", "arch.rope_theta=500000")
    run_pretrain(*common, *second, *start, "max_steps=1", cwd=tmp_path).check()
    assert yaml.safe_load((longer / "all_config.yaml").read_text())["arch"]["rope_theta"] == 5e5
    assert losses_of(longer)[0] < losses_of(path)[0] - 0.5  # it began with trained weights
