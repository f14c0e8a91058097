"""Exported folders can be trained on in transformers, with the code shipped in them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from shipped_cases import conversation, prompt_of, random_ids, shared_export, write_export
from torch.nn import functional as F

NATIVE = "native hrm"


@pytest.mark.parametrize("kind", ["rins", NATIVE])
def test_it_can_be_trained_on(kind: str) -> None:
    model = shared_export(kind).load().train()
    tokens, num_prefix = conversation()
    ids = torch.tensor([tokens])
    labels = torch.where(torch.arange(len(tokens)) < num_prefix, -100, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = model(input_ids=ids, labels=labels).loss
    logits = shared_export(kind).logits(tokens, num_prefix)[num_prefix - 1 : -1]
    torch.testing.assert_close(loss, F.cross_entropy(logits, ids[0, num_prefix:]))
    loss.backward()
    without = [name for name, param in model.named_parameters() if param.grad is None]
    assert set(without) <= {"model.z_L_init"}  # a buffer here, a parameter in the native class
    with torch.no_grad():
        for param in (each for each in model.parameters() if each.grad is not None):
            param -= 1e-3 * param.grad
    assert model(input_ids=ids, labels=labels).loss < loss


def test_calls_without_gradient_are_those_of_the_net(tmp_path: Path) -> None:
    export = write_export(tmp_path / "model", "ut")
    config = json.loads((export.folder / "config.json").read_text())
    for application in config["applications"]:
        application["keeps_gradient"] = False
    (export.folder / "config.json").write_text(json.dumps(config))
    model, ids = export.load(), torch.tensor([prompt_of(9)])
    model(input_ids=ids, labels=ids, token_type_ids=torch.zeros_like(ids)).loss.backward()
    assert [name for name, param in model.named_parameters() if param.grad is not None] == [
        "lm_head.weight"
    ]


@pytest.mark.parametrize("kind", ["hrm", NATIVE])
def test_labels_of_tokens_that_are_seen_are_warned_of(kind: str) -> None:
    ids = torch.tensor([prompt_of(6) + random_ids(3)])
    with pytest.warns(UserWarning, match="what is to be predicted there is seen"):
        shared_export(kind).load()(input_ids=ids, labels=ids)
