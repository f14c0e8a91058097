"""Reads the `.metadata` of torch.distributed.checkpoint, a pickle, from files of strangers.

An unpickler that admits only the classes such a file consists of, and does nothing to these
classes; what a file claims to need in memory is held against its size.
"""

from __future__ import annotations

import functools
import io
import pickle
import pickletools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as records

# What unpickling raises for files that are cut, changed, or something else.
DAMAGED = (
    *(OSError, EOFError, pickle.UnpicklingError, AttributeError, LookupError, TypeError),
    *(MemoryError, OverflowError, RuntimeError, UnicodeDecodeError),
)
_METADATA, _FILES = records.__name__, filesystem.__name__
_CLASSES = {
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_FILES, "_StorageInfo"),
}
_BUILTIN = {("collections", "OrderedDict"), ("torch", "Size")}
_MEMO = {"PUT", "BINPUT", "LONG_BINPUT"}


def load_metadata(content: bytes) -> records.Metadata:
    """One of DAMAGED where it is none; ValueError where it asks for what no tensor needs."""
    try:
        for opcode, argument, _ in pickletools.genops(content):
            # The unpickler makes room for as many objects as the number of one says.
            if opcode.name in _MEMO and int(argument or 0) > len(content):
                raise ValueError(f"it numbers an object {argument}, more than it has bytes")
    except ValueError as error:
        raise pickle.UnpicklingError(str(error)) from None
    with _left_as_they_are():
        return _Unpickler(io.BytesIO(content)).load()


class _Unpickler(pickle.Unpickler):
    """Makes nothing but what describes tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "pathlib" and name.endswith("Path"):
            return functools.partial(_joined)  # where the folder once was: a text like any other
        if (module, name) == ("torch.serialization", "_get_layout"):
            return functools.partial(super().find_class(module, name))
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _CLASSES | _BUILTIN:
            return super().find_class(module, name)
        raise ValueError(
            f"the checkpoint's metadata asks for {module}.{name}, which no tensor needs; "
            "it may be malicious and was not loaded"
        )


def _joined(*parts: object) -> str:
    return "/".join(map(str, parts))


@contextmanager
def _left_as_they_are() -> Iterator[None]:
    """ValueError where classes were given other attributes, which a pickle can: they are undone."""
    modules = {_METADATA: records, _FILES: filesystem}
    before = {
        each: dict(vars(each))
        for each in (getattr(modules[module], name) for module, name in _CLASSES)
    }
    try:
        yield
    finally:
        for each, attributes in before.items():
            now = dict(vars(each))
            changed = [name for name in now if now[name] is not attributes.get(name)]
            for name in changed:
                if name in attributes:
                    setattr(each, name, attributes[name])
                else:
                    delattr(each, name)
            if changed:
                raise ValueError(
                    f"the checkpoint's metadata changes {each.__name__}.{changed[0]}; it may be "
                    "malicious and was not loaded"
                )
