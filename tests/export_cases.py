"""Tiny runs to export, and what tests ask of an exported folder."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from net_cases import NETS, build
from run_cases import ALONE, run_config
from safetensors.torch import load_file
from shipped_cases import COPIED_CODE
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel
from torch import Tensor

from conversion import convert_to_hf, parity
from conversion.parity import Differences, Expected
from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ, SPECIAL_TOKENS
from inference import model_folder
from models.transformer import NetConfig
from simple_inference_engine import LoadedModel, ModelOptions, load_model
from training.adam_atan2 import AdamATan2
from training.checkpoint import Progress, RunDirectory, training_state

assert COPIED_CODE  # its import keeps code that transformers copies out of the user's cache
VOCAB_SIZE, MAX_SEQ_LEN = 512, 40
# As it is published; the split of words apart from spaces, digits and line ends.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_run(
    folder: Path,
    arch: NetConfig | str = "hrm",
    *,
    conditions: Mapping[str, str] = CONDITION_TOKENS,
    tokenizer: Tokenizer | None = None,
    keeps_ema: bool = True,
) -> Path:
    """A run directory whose averages are not its raw weights; the byte tokenizer by default."""
    torch.manual_seed(5)
    net = NETS[arch] if isinstance(arch, str) else arch
    model = build(net, VOCAB_SIZE)
    optimizer = AdamATan2(model.parameters(), lr=1e-2, ema=0.5 if keeps_ema else None)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    directory = RunDirectory(folder, ALONE)
    info = {"tokenizer_path": str(folder), "boq": BOQ, "eoq": EOQ, "eoa": EOA}
    metadata = {
        "max_seq_len": MAX_SEQ_LEN,
        "vocab_size": VOCAB_SIZE,
        "total_length": 900,
        "tokenizer_info": {**info, "condition_mapping": dict(conditions)},
    }
    config = {**run_config(folder, arch=net).model_dump(), "data": {"path": "sets/numbers"}}
    directory.create(config, metadata)
    write_byte_tokenizer(folder)
    (folder / "config.json").unlink()
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    directory.save("fsdp2_epoch_2", training_state(model, optimizer), Progress(2, 0, 40, 1234), {})
    return folder


def bpe_tokenizer() -> Tokenizer:
    """The published kind, of 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is seven times six then", "the answer is 42"] * 9, trainer)
    return tokenizer


@contextmanager
def quick(*, compares: bool = True) -> Iterator[None]:
    """Short answers are compared, or nothing is; the linear kernel is not looked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "ANSWER_TOKENS", 4)
        patch.setattr(model_folder, "pick_linear_kernel", lambda *_: ("mkl", ""))
        if not compares:
            nothing = Expected((), (), None, (), (), ())
            patch.setattr(convert_to_hf, "expected_of", lambda *_: nothing)
            patch.setattr(convert_to_hf, "differences_of", lambda *_, **__: Differences(0.0))
        yield


def exported(run: Path, folder: Path, *arguments: str, is_compared: bool = True) -> Path:
    """What the command makes of a run."""
    with quick(compares=is_compared):
        convert_to_hf.export(options_of(run, folder, *arguments))
    return folder


def options_of(run: Path, folder: Path, *arguments: str) -> argparse.Namespace:
    return convert_to_hf.parse(["--ckpt_path", str(run), "--out_dir", str(folder), *arguments])


def loaded(folder: Path) -> LoadedModel:
    with quick():
        return load_model(ModelOptions(ckpt_path=folder, device="cpu", dtype="float32"))


def greedy(source: LoadedModel, prompts: list[str], condition: str = "direct") -> list[list[int]]:
    """Our greedy answers, with the stop token where it came."""
    stop = source.prompt_format.eoa_id
    ids = [source.prompt_format.encode_prompt(condition, prompt) for prompt in prompts]
    answers = sorted(
        source.engine.generate_ids(ids, stop_ids=(stop,)), key=lambda answer: answer.index
    )
    return [[*each.token_ids, *[stop] * (each.finish_reason == "stop")] for each in answers]


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def hf_model(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def hf_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
