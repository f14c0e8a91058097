"""Turns a run directory of the original trainer into one of ours, optimizer state included.

    python -m conversion.convert_from_reference --ckpt_path ORIGINAL --out_dir checkpoints/run

The run can be asked and exported, another run can start from it (resume_from), and where epochs are
left it can be continued on its data. No pickle is opened: carry_epoch_N.R.pt is not even looked at.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from conversion.reference_run import ReferenceRun, read_reference_run
from conversion.staging import require_empty, written_aside
from data_io.prompt_format import find_tokenizer
from models.attention.sdpa import SdpaAttention
from models.language_model import LanguageModel
from training.checkpoint import (
    DIGESTS_FILE,
    EMA,
    METADATA_FILE,
    MODEL,
    OPTIMIZER,
    Progress,
    RunDirectory,
    write_atomically,
)
from training.console import refuse
from training.distributed import World
from training.export_format import parameter_name_from_reference
from training.run_records import TOKENIZER_FILE
from training.tensor_store import METADATA_FILE as INDEX_FILE
from training.tensor_store import read_tensors_into, tensor_shapes

_CHECKPOINT = re.compile(r"fsdp2_epoch_(\d+)")
_WEIGHTS, _STATE = "model.", "optim.state."


def convert(ckpt_path: Path, out_dir: Path, ckpt_epoch: int | None = None) -> None:
    """Writes the run directory; ValueError or OSError where that cannot be, and nothing is left."""
    require_empty(out_dir)
    run = read_reference_run(ckpt_path, out_dir)
    print(*run.notes, sep="\n", end="\n" * bool(run.notes))
    epochs = _epochs_wanted(ckpt_path, ckpt_epoch)
    with torch.device("meta"):  # names, shapes and types alone
        model = LanguageModel(run.config.arch, run.metadata.vocab_size, SdpaAttention())
    info = run.metadata.tokenizer_info
    tokenizer = find_tokenizer(info, ckpt_path)
    with written_aside(out_dir) as folder:
        directory = RunDirectory(folder, World(rank=0, size=1, device=torch.device("cpu")))
        data = run.metadata.model_dump(
            exclude_none=True, exclude={"tokenizer_info": {"vocab_size"}}
        )
        directory.create(run.config.model_dump(), data)
        for epoch in epochs:
            state = StoredState(_checkpoint(ckpt_path, epoch), model, run)
            step = state.last_step()
            # The original counts no tokens: all examples of all epochs are its best estimate.
            tokens = epoch * run.metadata.total_length
            directory.save(f"fsdp2_epoch_{epoch}", state, Progress(epoch, 0, step, tokens), {})
            untrained = f"; never trained: {', '.join(state.untrained)}" if state.untrained else ""
            print(f"epoch {epoch}: step {step:,}, about {tokens:,} tokens{untrained}")
        if tokenizer is not None:
            write_atomically(folder / TOKENIZER_FILE, tokenizer.read_text())
    print(
        *_what_is_possible(run, out_dir, epochs[-1], has_tokenizer=tokenizer is not None), sep="\n"
    )


class StoredState(Mapping[str, Mapping[str, Tensor]]):
    """The state of a checkpoint by our folders and names, one folder in memory at a time.

    Each is read when it is asked for, and what was asked for before is emptied: no more than the
    moments, twice the size of the weights, are there at once.
    """

    def __init__(self, source: Path, model: LanguageModel, run: ReferenceRun) -> None:
        self._source = source
        self._newest: dict[str, Tensor] = {}
        stored = tensor_shapes(source)
        originals = {
            parameter_name_from_reference(name.removeprefix(_WEIGHTS)): name.removeprefix(_WEIGHTS)
            for name in stored
            if name.startswith(_WEIGHTS)
        }
        self._like: dict[str, Tensor] = {**dict(model.named_parameters())}
        params = list(self._like)
        self._like |= dict(model.named_buffers())
        _require_same_names(source, set(originals), set(self._like))
        kinds = ["step", *(["exp_avg"] if run.config.beta1 else []), "exp_avg_sq"]
        kinds += ["param_ema"] if run.config.ema is not None else []
        # A parameter that never had a gradient has no state; ours begins where it would have.
        self.untrained = [
            name
            for name in params
            if not any(key.startswith(f"{_STATE}{originals[name]}.") for key in stored)
        ]
        weights: dict[str, str | None] = {
            name: f"{_WEIGHTS}{original}" for name, original in originals.items()
        }
        self._names = {MODEL: weights, OPTIMIZER: dict[str, str | None]()}
        if run.config.ema is not None:
            self._names[EMA] = dict(weights)
        for name in params:
            for kind in kinds:
                is_stored = name not in self.untrained
                there = f"{_STATE}{originals[name]}.{kind}" if is_stored else None
                if kind != "param_ema":
                    self._names[OPTIMIZER][f"{kind}.{name}"] = there
                elif there:
                    self._names[EMA][name] = there

    def __getitem__(self, folder: str) -> dict[str, Tensor]:
        names = self._names[folder]
        self._newest.clear()
        self._newest = tensors = {name: self._empty(name) for name in names}
        stored = {there: tensors[name] for name, there in names.items() if there is not None}
        read_tensors_into(self._source, stored)
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def last_step(self) -> int:
        """Steps taken: the most that any parameter has; some had no gradient in some steps."""
        stored = [
            there
            for name, there in self._names[OPTIMIZER].items()
            if there is not None and name.startswith("step.")
        ]
        if not stored:
            raise ValueError(f"{self._source} has no optimizer state (optim.state.*.step)")
        steps = {there: torch.zeros(()) for there in stored}
        read_tensors_into(self._source, steps)
        return int(max(step.item() for step in steps.values()))

    def _empty(self, name: str) -> Tensor:
        """Zeros for a tensor of ours, as training has it."""
        kind, _, param = name.partition(".")
        if kind == "step":
            return torch.zeros((), dtype=torch.float32)
        like = self._like[name if name in self._like else param]
        return torch.zeros(like.shape, dtype=like.dtype)


def _require_same_names(source: Path, found: set[str], wanted: set[str]) -> None:
    if found == wanted:
        return
    missing, unknown = sorted(wanted - found), sorted(found - wanted)
    told = [f"it lacks {missing[0]} ({len(missing)} in all)"] if missing else []
    told += [f"it has {unknown[0]} ({len(unknown)} in all)"] if unknown else []
    raise ValueError(
        f"{source} holds other weights than the net in all_config.yaml has: {', '.join(told)}; "
        "the configuration belongs to another run, or the files are damaged"
    )


def _checkpoint(run: Path, epoch: int) -> Path:
    return run / f"fsdp2_epoch_{epoch}"


def _epochs_wanted(run: Path, wanted: int | None) -> list[int]:
    """The epochs to convert, the last one last; those without .metadata were not written whole."""
    found = sorted(
        int(match[1]) for path in run.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))
    )
    ours = [epoch for epoch in found if (_checkpoint(run, epoch) / DIGESTS_FILE).exists()]
    if ours:
        raise ValueError(f"{run} is a run of ours already (fsdp2_epoch_{ours[0]}/{DIGESTS_FILE})")
    whole = [epoch for epoch in found if (_checkpoint(run, epoch) / INDEX_FILE).is_file()]
    there = ", ".join(str(epoch) for epoch in whole) or "none"
    if not whole or (wanted is not None and wanted not in whole):
        asked = "" if wanted is None else f" of epoch {wanted}"
        raise FileNotFoundError(
            f"{run} has no whole checkpoint{asked} (fsdp2_epoch_N/{INDEX_FILE}); epochs: {there}"
        )
    for epoch in sorted(set(found) - set(whole)):
        print(f"epoch {epoch} is left out: it was not written whole ({INDEX_FILE} is missing)")
    return whole if wanted is None else [wanted]


def _what_is_possible(
    run: ReferenceRun, out_dir: Path, last_epoch: int, *, has_tokenizer: bool
) -> list[str]:
    lines = [f"wrote {out_dir}"]
    path = run.metadata.tokenizer_info.tokenizer_path
    if path is None:
        lines.append(
            "its data names no tokenizer: to ask it or export it, complete tokenizer_info in "
            f"{out_dir / METADATA_FILE}"
        )
    elif not has_tokenizer:
        lines.append(f"{path} is not here: to ask it or export it, put it into {out_dir}")
    lines.append(
        f"start another run from it: resume_from={out_dir} (or its EMA alone: "
        "weights_only_resume_from_ema=true)"
    )
    left = run.config.epochs - last_epoch
    lines.append(
        f"all {run.config.epochs} epochs are done"
        if left <= 0
        else f"{left} of {run.config.epochs} epochs are left: the same settings with "
        f"checkpoint_path={out_dir} schedule_steps=published continue it, on as many processes as "
        "before (they change the packing) and on its data, which cannot be checked here"
    )
    return lines


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="A run directory of the original trainer becomes one of ours."
    )
    parser.add_argument(
        "--ckpt_path", type=Path, required=True, help="folder with all_config.yaml, fsdp2_epoch_N"
    )
    parser.add_argument(
        "--out_dir", type=Path, required=True, help="run directory; must not exist or be empty"
    )
    parser.add_argument("--ckpt_epoch", type=int, help="this epoch alone (default: all of them)")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    try:
        convert(options.ckpt_path, options.out_dir, options.ckpt_epoch)
    except (ValueError, OSError) as error:
        refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
