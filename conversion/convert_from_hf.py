"""Turns a folder in the format of Hugging Face into a run directory.

    python -m conversion.convert_from_hf --hf_path HRM-Text-1B --out_dir checkpoints/hrm-text-1b

Takes the published weights, any other `hrm_text`, and our own exports. The run can be evaluated,
asked and fine-tuned (resume_from=RUN weights_only_resume_from_ema=true); it has no optimizer state.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from conversion.staging import require_empty, written_aside
from inference.exported_folder import TOKENIZER_FILE, ExportedModel, is_exported, read_exported
from inference.tokenizer_check import prompt_format_of
from models.attention.sdpa import SdpaAttention
from models.flops import total_parameters
from models.language_model import LanguageModel
from training.checkpoint import CONFIG_FILE, EMA, MODEL, Progress, RunDirectory
from training.console import refuse
from training.distributed import World

CHECKPOINT = "fsdp2_epoch_1"


def convert(hf_path: Path, out_dir: Path) -> None:
    """Writes the run directory; ValueError or OSError where that cannot be, and nothing is left."""
    require_empty(out_dir)
    if (hf_path / CONFIG_FILE).is_file():
        raise ValueError(
            f"--hf_path {hf_path} is a run directory already, which can be asked, evaluated and "
            "trained on as it is; conversion.convert_to_hf turns one into a folder for transformers"
        )
    if not is_exported(hf_path):
        raise FileNotFoundError(
            f"{hf_path} is no folder with a config.json; download it first, e.g. "
            "hf download sapientinc/HRM-Text-1B --local-dir HRM-Text-1B"
        )
    exported = read_exported(hf_path)
    print(*exported.notes, sep="\n", end="\n" * bool(exported.notes))
    info = exported.tokenizer_info
    if info.boq is not None:  # refuses a tokenizer that is not the model's
        size, places = exported.vocab_size, [hf_path]
        prompt_format_of(info, None, places=places, vocab_size=size, whose=hf_path)
    tensors = _tensors_of(exported)
    with written_aside(out_dir) as folder:
        alone = World(rank=0, size=1, device=torch.device("cpu"))
        directory = RunDirectory(folder, alone)
        directory.create(*_records(exported, out_dir))
        directory.save(CHECKPOINT, {MODEL: tensors, EMA: tensors}, Progress(epoch=1), {})
        _store_once(folder / CHECKPOINT)
        if (hf_path / TOKENIZER_FILE).is_file():
            shutil.copyfile(hf_path / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    parameters = total_parameters(exported.arch, exported.vocab_size)
    print(f"wrote {out_dir}: {getattr(exported.arch, 'name', 'net')}, {parameters:,} parameters")


def _tensors_of(exported: ExportedModel) -> dict[str, Tensor]:
    """All tensors by our names, in fp32 as training keeps them; the fixed vector in bf16."""
    with torch.device("meta"):  # shapes alone: initial values would be overwritten
        model = LanguageModel(exported.arch, exported.vocab_size, SdpaAttention())
    model = model.to(torch.float32).to_empty(device="cpu")
    exported.load_into(model)
    tensors: dict[str, Tensor] = {name: param.detach() for name, param in model.named_parameters()}
    for name, buffer in model.named_buffers():
        rounded = buffer.to(torch.bfloat16)
        is_exact = torch.equal(rounded.float(), buffer)
        tensors[name] = rounded if is_exact else buffer
        if not is_exact:
            print(f"{name} is finer than bfloat16: it is kept, but training on would round it")
    return tensors


def _records(exported: ExportedModel, out_dir: Path) -> tuple[dict[str, object], dict[str, object]]:
    """Content of all_config.yaml and train_metadata.yaml, as far as weights know it."""
    home = str(out_dir.absolute())
    info = exported.tokenizer_info.model_dump(exclude={"vocab_size"}, exclude_none=True)
    if "tokenizer_path" in info:
        info["tokenizer_path"] = home
    config: dict[str, object] = {
        "arch": exported.arch.model_dump(),
        "data": {"path": home},
        "checkpoint_path": str(out_dir),
        "project_name": "imported",
        "run_name": out_dir.name,
    }
    metadata: dict[str, object] = {
        "max_seq_len": exported.max_seq_len,
        "vocab_size": exported.vocab_size,
        "total_length": 0,
        "tokenizer_info": info,
    }
    return config, metadata


def _store_once(checkpoint: Path) -> None:
    """EMA and weights are the same here: one file under two names where the disk allows it."""
    for file in (checkpoint / EMA).iterdir():
        twin = checkpoint / MODEL / file.name
        if filecmp.cmp(file, twin, shallow=False):
            aside = file.with_name(f".{file.name}.link")
            try:
                aside.hardlink_to(twin)
            except OSError:
                return  # two copies then
            aside.replace(file)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="An hrm_text folder, or an export of ours, becomes a run directory."
    )
    parser.add_argument("--hf_path", type=Path, required=True, help="folder with config.json")
    parser.add_argument(
        "--out_dir", type=Path, required=True, help="run directory; must not exist or be empty"
    )
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    try:
        convert(options.hf_path, options.out_dir)
    except (ValueError, OSError) as error:
        refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
