"""A folder is opened as what it says it is, and one that holds no model says so in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import MAX_SEQ_LEN, VOCAB_SIZE, write_run
from model_cases import assert_refused, opened
from net_cases import NETS
from safetensors.torch import save_file
from torch import Tensor

from data_io.byte_tokenizer import byte_tokenizer
from scripts.benchmark_loading import LoadingOptions, in_own_process
from scripts.benchmark_loading import write_run as write_large_run
from simple_inference_engine import ModelOptions, load_model
from training.export_format import FramingIds, export_config
from training.tensor_store import read_tensors


def write_export(folder: Path) -> dict[str, Tensor]:
    """An exported folder with the weights of a run, and its tokenizer."""
    folder.mkdir()
    state = read_tensors(write_run(folder.with_name("source")) / "fsdp2_epoch_2/ema")
    ids = FramingIds(boq=6, eoq=7, eoa=10, pad=None)
    config = export_config(
        NETS["hrm"], is_native=True, vocab_size=VOCAB_SIZE, max_seq_len=40, ids=ids
    )
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return state


@pytest.mark.parametrize("net", NETS)
def test_a_run_comes_back_as_it_was_saved(net: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", net)
    found = opened(run)
    expected = read_tensors(run / "fsdp2_epoch_2/ema")
    assert found.trained == found.model.config == NETS[net]
    state = found.model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name].float(), atol=0, rtol=0)
    assert found.max_context == MAX_SEQ_LEN
    assert not any(parameter.requires_grad for parameter in found.model.parameters())


def test_one_line_says_what_was_taken(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    found = opened(run, H_cycles=3, dtype="bfloat16").description
    assert "\n" not in found
    for text in (
        f"loaded {run}/fsdp2_epoch_2 (epoch 2, step 40, EMA weights): hrm, ",
        " M parameters; cpu, bfloat16; attention sdpa, linear ",
        "1 thread; H_cycles=3 (trained with 2)",
    ):
        assert text in found
    assert "trained with" not in opened(run).description


def test_weights_are_converted_as_a_whole_copy_would_be(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    whole, halved = opened(run).model, opened(run, dtype="bfloat16").model
    for name, tensor in halved.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name].bfloat16())


def test_depth_is_set_and_checked_on_loading(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "rins")
    found = opened(run, L_cycles=2)
    assert found.model.config.model_dump()["L_cycles"] == 2
    assert found.trained == NETS["rins"]
    assert_refused(run, "H_cycles=2: a net of kind rins has none", H_cycles=2)


def test_the_kernels_of_the_run_are_taken_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    choices = {"device": "cpu", "linear": "onednn", "threads": 1}
    (run / "environment.json").write_text(json.dumps({"choices": choices}))
    assert "linear onednn, " in opened(run).description
    (run / "environment.json").write_text(json.dumps({"choices": {**choices, "linear": "mkl"}}))
    assert "linear mkl, " in opened(run).description


def test_an_exported_folder_is_opened_too(tmp_path: Path) -> None:
    state = write_export(tmp_path / "exported")
    found = opened(tmp_path / "exported")
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, state[name].float())
    assert found.max_context == 40
    assert f"loaded {tmp_path}/exported (exported): hrm, " in found.description
    assert found.prompt_format.encode_prompt("direct", "")[:2] == [6, 8]
    assert_refused(
        tmp_path / "exported", "holds one set of weights; leave ckpt_epoch", ckpt_epoch=1
    )


def test_how_one_token_more_is_computed_is_chosen_and_said(tmp_path: Path) -> None:
    options = {"ckpt_path": write_run(tmp_path / "run"), "device": "cpu"}
    loaded = load_model(ModelOptions.model_validate(options))
    assert loaded.engine.decode == "eager"
    assert loaded.description.endswith("; decode eager")
    with pytest.raises(ValueError, match="decode=cuda_graph needs a CUDA device"):
        load_model(ModelOptions.model_validate({**options, "decode": "cuda_graph"}))


def test_what_is_no_folder_of_a_model_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (empty := tmp_path / "empty").mkdir()
    assert_refused(empty, "empty holds no model: it is neither a run directory .* nor an exported")
    assert_refused(tmp_path / "nowhere", "nowhere is no folder here; ckpt_path is a run directory")
    assert_refused(run / "all_config.yaml", "all_config.yaml is a file; ckpt_path is a run")
    assert_refused(run / "fsdp2_epoch_2", f"holds no model: .*its run directory is {run}$")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"device": "gpu"}, "device=gpu is none of auto, cpu, cuda"),
        ({"device": "cuda:x"}, "device=cuda:x is none of auto"),
        ({"attention": "fast"}, "attention=fast is none of auto, flash3"),
    ],
)
def test_settings_of_this_machine_are_checked(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    assert_refused(write_run(tmp_path / "run"), told, **options)


@pytest.mark.slow
def test_loading_takes_little_memory_beside_the_weights(tmp_path: Path) -> None:
    """What is imported counts here too: 30 MB beside the 68 MB of these weights."""
    options = LoadingOptions(size="nano", vocab_size=2**18)
    write_large_run(tmp_path / "run", options)
    figures = in_own_process(tmp_path / "run", "bfloat16")
    assert figures["weight_mb"] > 60
    # 2.4 where each tensor is read whole before it is converted, 3.4 where all of them are.
    assert figures["peak_over_weights"] < 1.8
