"""A checkpoint's tensors as safetensors, one file at a time: memory stays near one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from conversion.exported_tokenizer import write_json
from inference.exported_folder import INDEX_FILE, WEIGHTS_FILE
from models.lora import LoraConfig
from training.adapters import read_merged_into
from training.tensor_store import tensor_shapes

READABLE = 0o644


def write_weights(
    folder: Path,
    source: Path,
    names: Mapping[str, str],
    *,
    dtype: torch.dtype,
    max_file_bytes: int,
    lora: LoraConfig | None = None,
) -> int:
    """Writes the tensors of a checkpoint's folder `source`; how many files they took.

    `names` are those in the export and what each is a copy of; several may be of one. Adapters
    shared by all calls of a stack (`lora`) are merged into its weights.
    """
    shapes = tensor_shapes(source)
    sizes = {name: math.prod(shapes[ours]) * dtype.itemsize for name, ours in names.items()}
    files = _files_of(sizes, max_file_bytes)
    for file, held in files.items():
        read = {names[name]: torch.empty(shapes[names[name]], dtype=dtype) for name in held}
        read_merged_into(source, read, lora)
        tensors, taken = {}, set[str]()
        for name in held:  # the format refuses two names for one piece of memory
            ours = names[name]
            tensors[name] = read[ours].clone() if ours in taken else read[ours]
            taken.add(ours)
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # it names a full disk so
            raise OSError(f"{folder / file} cannot be written: {error}") from error
        (folder / file).chmod(READABLE)  # save_file lets nobody else read it
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, held in files.items() for name in held},
        }
        write_json(folder / INDEX_FILE, index)
    return len(files)


def _files_of(sizes: Mapping[str, int], max_file_bytes: int) -> dict[str, list[str]]:
    """Names by file, in order; a tensor larger than a file has one of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(sizes):
        if groups[-1] and filled + sizes[name] > max_file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += sizes[name]
    if len(groups) == 1:
        return {WEIGHTS_FILE: groups[0]}
    stem, end = WEIGHTS_FILE.rsplit(".", 1)
    return {
        f"{stem}-{number:05}-of-{len(groups):05}.{end}": group
        for number, group in enumerate(groups, 1)
    }
