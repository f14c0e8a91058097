"""A folder is opened as what it says it is, and one that holds no model says so in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from export_cases import write_run
from net_cases import NETS
from run_cases import ALONE
from safetensors.torch import save_file
from torch import Tensor

from data_io.byte_tokenizer import byte_tokenizer
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from inference.model_folder import ModelOptions, OpenedModel, open_model
from scripts.benchmark_loading import LoadingOptions, in_own_process
from scripts.benchmark_loading import write_run as write_large_run
from training.checkpoint import Progress, RunDirectory
from training.export_format import FramingIds, export_config
from training.tensor_store import read_tensors

QUIET = {"device": "cpu", "dtype": "float32"}


def opened(folder: Path, **options: Any) -> OpenedModel:
    return open_model(ModelOptions.model_validate({**QUIET, "ckpt_path": folder, **options}))


def assert_refused(folder: Path, told: str, **options: Any) -> None:
    """One line that says it."""
    with pytest.raises((ValueError, FileNotFoundError), match=told) as caught:
        opened(folder, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def save_again(run: Path, epoch: int, factor: float) -> dict[str, dict[str, Tensor]]:
    """A further epoch's checkpoint whose averaged weights are those of epoch 2 times `factor`."""
    state = {
        "model": read_tensors(run / "fsdp2_epoch_2/model"),
        "ema": {k: t * factor for k, t in read_tensors(run / "fsdp2_epoch_2/ema").items()},
        "optimizer": {"moment": torch.ones(3)},
    }
    RunDirectory(run, ALONE).save(f"fsdp2_epoch_{epoch}", state, Progress(epoch, 0, 20 * epoch), {})
    return state


def write_export(folder: Path) -> dict[str, Tensor]:
    """An exported folder with the weights of a run, and its tokenizer."""
    folder.mkdir()
    state = read_tensors(write_run(folder.with_name("source")) / "fsdp2_epoch_2/ema")
    ids = FramingIds(boq=6, eoq=7, eoa=10, pad=None)
    config = export_config(NETS["hrm"], is_native=True, vocab_size=512, max_seq_len=48, ids=ids)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors"
    )
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return state


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


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
    assert found.max_context == 64
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


def test_averaged_weights_are_taken_where_they_are_and_raw_ones_when_asked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    state = save_again(run, 3, factor=0.5)
    name = "lm_head.weight"
    for options, kind in (({}, "ema"), ({"ckpt_use_ema": True}, "ema")):
        found = opened(run, **options)
        assert torch.equal(found.model.state_dict()[name], state[kind][name])
    raw = opened(run, ckpt_use_ema=False)
    assert torch.equal(raw.model.state_dict()[name], state["model"][name])
    assert "raw weights" in raw.description
    RunDirectory(run, ALONE).save(
        "fsdp2_epoch_4", {"model": state["model"]}, Progress(4, 0, 80), {}
    )
    assert "fsdp2_epoch_4 (epoch 4, step 80, raw weights)" in opened(run).description
    assert_refused(run, "fsdp2_epoch_4 holds no EMA weights.*leave ckpt_use_ema", ckpt_use_ema=True)


def test_a_checkpoint_is_named_by_epoch_or_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    save_again(run, 3, factor=0.5)
    (run / "fsdp2_epoch_2").rename(run / "fsdp2_step_40")
    assert "fsdp2_epoch_3 " in opened(run).description
    assert "fsdp2_step_40 " in opened(run, ckpt_step=40).description
    there = "it has fsdp2_epoch_3, fsdp2_step_40"
    assert_refused(run, f"has no fsdp2_epoch_2; {there}", ckpt_epoch=2)
    assert_refused(run, f"has no fsdp2_step_3; {there}", ckpt_step=3)
    with pytest.raises(ValueError, match="ckpt_epoch=2 and ckpt_step=3 name two checkpoints"):
        ModelOptions(ckpt_path=run, ckpt_epoch=2, ckpt_step=3)


def test_only_the_weights_that_are_wanted_are_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for kind in ("model", "optimizer"):
        for file in (run / "fsdp2_epoch_2" / kind).iterdir():
            file.write_bytes(b"")
    assert opened(run).model.lm_head.weight.any()
    assert_refused(run, "model/.* does not match its digest", ckpt_use_ema=False, ckpt_epoch=2)


def cut_weights(checkpoint: Path) -> None:
    (file,) = (checkpoint / "ema").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-100])


def unpublish(checkpoint: Path) -> None:
    (checkpoint / "digests.json").unlink()


@pytest.mark.parametrize(
    ("damage", "told"),
    [(cut_weights, "does not match its digest"), (unpublish, "is no complete checkpoint")],
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_named(
    tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    run = write_run(tmp_path / "run")
    save_again(run, 3, factor=0.5)
    damage(run / "fsdp2_epoch_3")
    description = opened(run).description
    assert "fsdp2_epoch_2 (epoch 2, " in description
    assert "; passed over: " in description and "fsdp2_epoch_3" in description
    assert told in description
    assert_refused(run, told, ckpt_epoch=3)
    damage(run / "fsdp2_epoch_2")
    assert_refused(run, f"holds no complete checkpoint .*{told}.*{told}")


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
    assert found.max_context == 48
    assert f"loaded {tmp_path}/exported (exported): hrm, " in found.description
    assert found.prompt_format.encode_prompt("direct", "")[:2] == [6, 8]
    assert_refused(
        tmp_path / "exported", "holds one set of weights; leave ckpt_epoch", ckpt_epoch=1
    )


def test_the_run_keeps_its_tokenizer_and_an_other_place_overrides_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert opened(run).prompt_format.eoa == EOA
    shutil.copytree(run, elsewhere := tmp_path / "moved")
    (run / "tokenizer.json").unlink()
    assert_refused(run, "the tokenizer of .*run is gone .*tokenizer.json.*give tokenizer_path")
    assert opened(run, tokenizer_path=elsewhere).prompt_format.eoa == EOA
    assert opened(run, tokenizer_path=elsewhere / "tokenizer.json").prompt_format.eoa == EOA
    assert_refused(
        run, "tokenizer_path=.*nowhere: there is no", tokenizer_path=tmp_path / "nowhere"
    )


def other_tokenizer(folder: Path, *, added: int = 0, swapped: bool = False) -> Path:
    folder.mkdir()
    tokenizer = byte_tokenizer()
    if added:
        tokenizer.add_tokens([f"word{number}" for number in range(added)])
    text = json.loads(tokenizer.to_str())
    if swapped:
        vocab = text["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(text))
    return folder


def test_a_tokenizer_with_other_ids_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    swapped = other_tokenizer(tmp_path / "swapped", swapped=True)
    assert_refused(run, "have other ids: id .* is 'b' in the one and 'a'", tokenizer_path=swapped)
    larger = other_tokenizer(tmp_path / "larger", added=300)
    assert_refused(run, "have other ids: id 287 is 'word0' in .* None", tokenizer_path=larger)
    (run / "tokenizer.json").unlink()  # nothing left to compare with but the model's size
    assert_refused(
        run, "its 587 ids make a vocabulary of 768, the model's is 512", tokenizer_path=larger
    )
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    assert_refused(run, "broken.json is not the tokenizer of", tokenizer_path=broken)


def test_a_tokenizer_without_the_tokens_that_frame_prompts_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    info = {"tokenizer_path": str(run), "boq": BOQ, "eoq": EOQ, "eoa": "<|end|>"}
    info |= {"condition_mapping": dict(CONDITION_TOKENS)}
    edit(run / "train_metadata.yaml", lambda content: content.update(tokenizer_info=info))
    assert_refused(run, "not special tokens of the tokenizer: {'eoa': '<|end|>'}")
    edit(run / "train_metadata.yaml", lambda content: content.update(tokenizer_info={}))
    assert_refused(run, "tokenizer_info lacks boq, eoq, eoa, condition_mapping")


def test_two_tokenizers_of_one_run_that_differ_are_refused(tmp_path: Path) -> None:
    """A run without a copy of its own: that of the data record, and that beside the data."""
    run = write_run(tmp_path / "run")
    one = tmp_path / "one"
    one.mkdir()
    (run / "tokenizer.json").rename(one / "tokenizer.json")
    beside = other_tokenizer(tmp_path / "data", swapped=True)
    edit(run / "all_config.yaml", lambda content: content.update(data={"path": str(beside)}))
    edit(
        run / "train_metadata.yaml",
        lambda content: content["tokenizer_info"].update(tokenizer_path=str(one)),
    )
    assert_refused(run, "have other ids: .*remove the other, or give it as tokenizer_path")


def rename_net(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        edit(run / "all_config.yaml", lambda content: content["arch"].update(name=name))

    return change


def wrong_arch(**settings: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        edit(run / "all_config.yaml", lambda content: content["arch"].update(settings))

    return change


def other_net(run: Path) -> None:
    arch = NETS["transformer"].model_dump()
    edit(run / "all_config.yaml", lambda content: content.update(arch=arch))


def larger_vocabulary(run: Path) -> None:
    edit(run / "train_metadata.yaml", lambda content: content.update(vocab_size=1024))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (rename_net("mamba"), "arch.name='mamba' is no architecture of this version; it knows hrm"),
        (
            rename_net("baselines.ut_nocarry@UniversalTransformer"),
            "by the original trainer .*python -m conversion.convert_from_reference",
        ),
        (wrong_arch(future=1), "no architecture of this version: arch.future=1: Extra inputs"),
        (wrong_arch(num_heads=3), "describes no architecture.*num_heads=3"),
        (wrong_arch(n_layers=4), "has no tensor 'model.H_module.layers.1"),
        (wrong_arch(hidden_size=64), r"has shape \[32\], the model wants \[64\]; the architecture"),
        (other_net, "ema holds 'model.H_module.layers.0.* which the net .* does not have"),
        (larger_vocabulary, r"has shape \[512, 32\], the model wants \[1024, 32\]"),
        (lambda run: (run / "all_config.yaml").unlink(), "run holds no model: it is neither a run"),
        (lambda run: (run / "train_metadata.yaml").unlink(), "train_metadata.yaml is missing"),
        (
            lambda run: shutil.rmtree(run / "fsdp2_epoch_2"),
            "holds no complete checkpoint .*train it",
        ),
        (lambda run: (run / "all_config.yaml").write_text("[]"), "holds no run's configuration"),
        (lambda run: (run / "environment.json").write_text("["), "environment.json cannot be read"),
    ],
)
def test_a_run_that_holds_no_model_of_ours_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    damage(run := write_run(tmp_path / "run"))
    assert_refused(run, told)


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


def test_loading_takes_little_memory_beside_the_weights(tmp_path: Path) -> None:
    """What is imported counts here too: 30 MB beside the 68 MB of these weights."""
    options = LoadingOptions(size="nano", vocab_size=2**18)
    write_large_run(tmp_path / "run", options)
    figures = in_own_process(tmp_path / "run", "bfloat16")
    assert figures["weight_mb"] > 60
    # 2.4 where each tensor is read whole before it is converted, 3.4 where all of them are.
    assert figures["peak_over_weights"] < 1.8
