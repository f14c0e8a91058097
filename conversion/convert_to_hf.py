"""Exports a checkpoint to a folder that transformers loads, and compares the two.

    python -m conversion.convert_to_hf --ckpt_path checkpoints/quickstart/nano-hrm --out_dir out

Written aside and renamed at the end: where logits, ids or answers differ, nothing is left.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from conversion.exported_tokenizer import (
    PAD,
    default_condition,
    framing_ids,
    generation_config,
    write_json,
    write_tokenizer,
)
from conversion.exported_weights import write_weights
from conversion.model_card import CardFacts, write_card
from conversion.parity import TOLERANCE, Differences, Expected, differences_of, expected_of
from conversion.run_figures import evaluation_figures, training_flops
from conversion.shipped_code import ship_code
from conversion.staging import require_empty, written_aside
from data_io.prompt_format import PromptFormat
from inference.exported_folder import CONFIG_FILE
from inference.model_folder import ModelOptions, open_model
from inference.run_folder import StoredModel, open_run
from models.language_model import LanguageModel
from models.lora import is_adapter
from training.checkpoint import EMA, read_checkpoint
from training.console import refuse
from training.export_format import export_config, exported_names, why_not_native
from training.run_records import stored_config
from training.telemetry import METRICS_FILE
from training.tensor_store import tensor_shapes

GIB = 2**30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(options: argparse.Namespace) -> None:
    """Writes the folder; ValueError or OSError where that cannot be, and nothing is left then."""
    require_empty(options.out_dir)
    if sum((options.ckpt_epoch is not None, options.ckpt_step is not None, options.ckpt_best)) > 1:
        raise ValueError(
            "--ckpt_epoch, --ckpt_step and --ckpt_best name two checkpoints; give one of them"
        )
    stored = open_run(
        options.ckpt_path,
        epoch=options.ckpt_epoch,
        step=options.ckpt_step,
        best=options.ckpt_best,
        use_ema=options.ckpt_use_ema,
    )
    reason = _why_not_native(stored)
    if reason and options.native_only:
        raise ValueError(f"--native_only: {reason}; leave it out to ship a modelling file with it")
    _say("from", "; ".join((stored.taken, *stored.notes)))
    _say("format", _format_line(reason, options.with_code))
    model, prompt_format = _our_model(stored, options)
    expected = expected_of(model, prompt_format, stored.max_seq_len)
    del model
    with written_aside(options.out_dir) as folder:
        _write_folder(folder, stored, prompt_format, options)
        for runs_code in [False] * (reason is None) + [True] * bool(reason or options.with_code):
            found = differences_of(
                folder, expected, runs_code=runs_code, in_bfloat16=options.dtype == "bfloat16"
            )
            _say("compared", _told(found, expected) + " (with the code in it)" * runs_code)
    _say("wrote", str(options.out_dir))


def _our_model(
    stored: StoredModel, options: argparse.Namespace
) -> tuple[LanguageModel, PromptFormat]:
    """The checkpoint's model in fp32, with the weights that the export will hold."""
    kind, _, number = stored.weights.parent.name.removeprefix("fsdp2_").partition("_")
    opened = open_model(
        ModelOptions(
            ckpt_path=stored.run,
            ckpt_epoch=int(number) if kind == "epoch" else None,
            ckpt_step=int(number) if kind == "step" else None,
            ckpt_best=kind == "best" or None,
            ckpt_use_ema=stored.weights.name == EMA,
            tokenizer_path=options.tokenizer_path,
            device="cpu",
            dtype="float32",
        )
    )
    if options.dtype == "bfloat16":
        with torch.no_grad():
            for tensor in (*opened.model.parameters(), *opened.model.buffers()):
                tensor.copy_(tensor.to(torch.bfloat16))
    return opened.model, opened.prompt_format


def _write_folder(
    folder: Path, stored: StoredModel, prompt_format: PromptFormat, options: argparse.Namespace
) -> None:
    is_native = _why_not_native(stored) is None
    has_code = options.with_code or not is_native
    ids, max_seq_len = framing_ids(prompt_format), stored.max_seq_len
    num_files = write_weights(
        folder,
        stored.weights,
        exported_names(stored.arch, _names(stored), is_native=is_native),
        dtype=DTYPES[options.dtype],
        max_file_bytes=int(options.max_file_gib * GIB),
        lora=None if stored.call_adapters else stored.lora,
    )
    _say("weights", f"{options.dtype}, {num_files} file{'s' * (num_files > 1)}")
    config = export_config(
        stored.arch,
        is_native=is_native,
        vocab_size=stored.vocab_size,
        max_seq_len=max_seq_len,
        ids=ids,
    )
    config["dtype"] = options.dtype
    if stored.call_adapters:
        config["lora"] = stored.call_adapters.model_dump()
    if has_code:
        config = ship_code(folder, config, is_native=is_native)
    write_json(folder / CONFIG_FILE, config)
    write_json(folder / "generation_config.json", generation_config(ids, max_seq_len=max_seq_len))
    write_tokenizer(folder, prompt_format, max_seq_len=max_seq_len)
    if ids.pad is None:
        _say("tokenizer", f"has no {PAD}: prompts of different lengths go one by one")
    facts = CardFacts(
        name=options.out_dir.absolute().name,
        arch=stored.arch,
        vocab_size=stored.vocab_size,
        max_seq_len=max_seq_len,
        prompt_format=prompt_format,
        default_condition=default_condition(prompt_format),
        weights="EMA" if stored.weights.name == EMA else "raw",
        dtype=options.dtype,
        progress=read_checkpoint(stored.weights.parent).progress,
        config=stored_config(stored.run) or {},
        flops=training_flops(stored.run / METRICS_FILE, stored.arch, stored.vocab_size),
        figures=evaluation_figures(stored.run),
        is_native=is_native,
        has_code=has_code,
    )
    write_card(folder, facts)


def _why_not_native(stored: StoredModel) -> str | None:
    if stored.call_adapters:
        return "its adapters are one for each call of a stack (lora.per_cycle)"
    return why_not_native(stored.arch)


def _names(stored: StoredModel) -> list[str]:
    """The tensors that are exported: adapters too where they cannot be merged."""
    names = tensor_shapes(stored.weights)
    return [name for name in names if stored.call_adapters or not is_adapter(name)]


def _say(what: str, told: str) -> None:
    print(f"{what:<10}{told}", flush=True)


def _told(found: Differences, expected: Expected) -> str:
    ties = f", {found.num_ties} of them up to a tie" * bool(found.num_ties)
    rounded = found.in_bfloat16
    return (
        f"largest difference of logits {found.largest:.2e} in float32 (tolerance {TOLERANCE:g})"
        f"{'' if rounded is None else f', {rounded:.2e} computed in bfloat16'} over "
        f"{len(expected.examples)} examples; ids of {len(expected.prompts)} prompts the same, "
        f"their greedy answers too{ties}"
    )


def _format_line(reason: str | None, with_code: bool) -> str:
    if reason:
        return f"a modelling file in the folder (trust_remote_code=True): {reason}"
    return "hrm_text of transformers" + ", and code that marks the prefix itself" * with_code


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="A checkpoint becomes a folder that transformers loads; the two are compared."
    )
    add = parser.add_argument
    add("--ckpt_path", type=Path, required=True, help="run directory")
    add(
        "--out_dir", type=Path, required=True, help="folder to write; it must not exist or be empty"
    )
    add(
        "--ckpt_epoch", type=int, help="checkpoint of this epoch (default: the newest complete one)"
    )
    add("--ckpt_step", type=int, help="checkpoint of this step")
    add("--ckpt_best", action="store_true", help="checkpoint of the lowest held-out loss")
    add(
        "--ckpt_use_ema",
        type=_truth,
        metavar="true|false",
        help="averaged weights (default: where they were kept)",
    )
    add("--tokenizer_path", type=Path, help="tokenizer.json or its folder (default: the run's)")
    add("--dtype", choices=sorted(DTYPES), default="float32", help="of the weights (%(default)s)")
    add("--with_code", action="store_true", help="ship code that marks the prefix without type ids")
    add("--native_only", action="store_true", help="refuse nets that need shipped code")
    add("--max_file_gib", type=float, default=4.0, help="weights are split beyond (%(default)s)")
    return parser.parse_args(arguments)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def main() -> None:
    options = parse()
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        export(options)
    except (ValueError, OSError) as error:
        refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
