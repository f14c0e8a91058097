"""Folders in the format of Hugging Face: our exports, the published weights, other `hrm_text`.

Reads config.json, safetensors and the tokenizer's files; code in the folder is never run. What is
written into such a folder is decided by `conversion`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_io.parsing import parse_json
from data_io.sampled_format import TokenizerInfo
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from models.attention.sdpa import SdpaAttention
from models.language_model import LanguageModel
from models.lora import LoraConfig, add_adapters
from models.transformer import NetConfig
from training.adapters import stored_lora
from training.export_format import Place, arch_from_export, layers_by_stack, place_of_exported

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
PROMPT_FORMAT_KEY = "prompt_format"  # in tokenizer_config.json: our framing tokens, by role


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """An exported folder whose weights are still on disk."""

    path: Path
    arch: NetConfig
    vocab_size: int
    max_seq_len: int
    tokenizer_info: TokenizerInfo
    files: Mapping[str, Sequence[str]]  # names of the tensors in each file
    notes: tuple[str, ...]  # what was chosen for the user, a line each
    call_adapters: LoraConfig | None = None  # one for each call of a stack

    def load_into(self, model: LanguageModel) -> None:
        """Fills parameters and buffers tensor by tensor, in the type and on the device they have.

        ValueError, naming the tensor, where one is missing, not of this net, or of another shape.
        """
        targets = _tensors_of(model)
        assert not any(target.is_meta for target in targets.values()), "nothing to copy into"
        self._require_fits(targets)
        for file, names in self.files.items():
            with _opened(self.path / file) as opened, torch.no_grad():
                for name in names:
                    place = place_of_exported(name)
                    place.rows(targets[place.name]).copy_(opened.get_tensor(name))

    def require_whole(self) -> None:
        """The same errors as `load_into`, before any memory is taken."""
        try:
            with torch.device("meta"):
                model = LanguageModel(self.arch, self.vocab_size, SdpaAttention())
                if self.call_adapters:
                    add_adapters(model, self.call_adapters)
        except (RuntimeError, TypeError):  # more elements than can be counted
            raise ValueError(
                f"{self.path / CONFIG_FILE}: a net of vocab_size={self.vocab_size} and "
                f"hidden_size={self.arch.hidden_size} is larger than any; the file is damaged"
            ) from None
        self._require_fits(_tensors_of(model))

    def _require_fits(self, targets: Mapping[str, Tensor]) -> None:
        """Compares names and shapes, which stand in the heads of the files."""
        self._require_names_of(targets)
        for file, names in self.files.items():
            with _opened(self.path / file) as opened:
                for name in names:
                    place = place_of_exported(name)
                    wanted = list(place.rows(targets[place.name]).shape)
                    shape = opened.get_slice(name).get_shape()
                    if wanted != shape:
                        raise ValueError(
                            f"{self.path / file}: {name} has shape {shape}, but the net of its "
                            f"{CONFIG_FILE} wants {wanted}"
                        )

    def _require_names_of(self, targets: Mapping[str, Tensor]) -> None:
        """Refuses folders that hold more or less than each tensor of the net once."""
        found: dict[str, list[Place]] = defaultdict(list)
        for name in (name for names in self.files.values() for name in names):
            place = place_of_exported(name)
            if place.name not in targets:
                raise ValueError(f"{self.path} holds {name}, which its net does not have")
            found[place.name].append(place)
        for name in targets:
            parts = sorted(place.part for place in found[name])
            if parts != list(range(max((place.parts for place in found[name]), default=1))):
                how = "not once" if parts else "not"
                raise ValueError(
                    f"{self.path} holds {name} {how}; the folder was written for another net or "
                    "is incomplete"
                )


def _tensors_of(model: LanguageModel) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def is_exported(path: Path) -> bool:
    """Whether a folder looks like one in the format of Hugging Face, of whatever model."""
    return (path / CONFIG_FILE).is_file()


def read_exported(path: Path) -> ExportedModel:
    """What a folder says of its model; the weights are left where they are.

    ValueError or FileNotFoundError for folders that hold no net of ours, whole.
    """
    config = read_json(path / CONFIG_FILE)
    files = _tensor_files(path)
    try:
        layers = layers_by_stack(name for names in files.values() for name in names)
        arch = arch_from_export(config, layers)
        adapters = stored_lora(config)
        vocab_size, max_seq_len = (
            int(config[key]) for key in ("vocab_size", "max_position_embeddings")
        )
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"{path / CONFIG_FILE}: {_told(error)}") from None
    info, notes = _tokenizer_info(path)
    found = ExportedModel(path, arch, vocab_size, max_seq_len, info, files, notes, adapters)
    found.require_whole()
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: the folder is no whole export") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def _tensor_files(path: Path) -> dict[str, tuple[str, ...]]:
    """Names of the tensors in each file, from the index where there is one."""
    if not (path / INDEX_FILE).is_file():
        if not (path / WEIGHTS_FILE).is_file():
            raise FileNotFoundError(
                f"{path} holds no {WEIGHTS_FILE} and no {INDEX_FILE}; weights are read from "
                "safetensors alone"
            )
        files = [WEIGHTS_FILE]
    else:
        listed = read_json(path / INDEX_FILE).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ValueError(f"{path / INDEX_FILE} has no weight_map")
        files = sorted(set(map(str, listed.values())))
    strange = [file for file in files if Path(file).name != file]
    if strange:
        raise ValueError(
            f"{path / INDEX_FILE} names {strange[0]}: files lie beside it, no path is followed"
        )
    names: dict[str, tuple[str, ...]] = {}
    for file in files:
        with _opened(path / file) as opened:
            names[file] = tuple(opened.keys())
    return names


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: the folder is no whole export") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None


def _tokenizer_info(path: Path) -> tuple[TokenizerInfo, tuple[str, ...]]:
    """The framing tokens that the exporter wrote down, else the published ones if they are there.

    Where neither is known the record is without them: asking then says what it lacks.
    """
    if not (path / TOKENIZER_FILE).is_file():
        return TokenizerInfo(), (f"no {TOKENIZER_FILE} in {path}: it cannot be asked in words",)
    place = TokenizerInfo(tokenizer_path=str(path))
    settings = path / TOKENIZER_CONFIG_FILE
    written = read_json(settings).get(PROMPT_FORMAT_KEY) if settings.is_file() else None
    if written is not None:
        try:
            return TokenizerInfo.model_validate({**written, "tokenizer_path": str(path)}), ()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{settings}: {PROMPT_FORMAT_KEY} cannot be read: {error}") from None
    published = {BOQ, EOQ, EOA, *CONDITION_TOKENS.values()}
    added = read_json(path / TOKENIZER_FILE).get("added_tokens") or ()
    if not published <= {str(token.get("content")) for token in added}:
        return place, (f"{path} does not say which tokens frame a prompt",)
    framing = {"boq": BOQ, "eoq": EOQ, "eoa": EOA, "condition_mapping": dict(CONDITION_TOKENS)}
    return place.model_copy(update=framing), (
        f"prompt tokens: the published ones ({BOQ} {EOQ} {EOA}); the folder names none",
    )


def _told(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)
