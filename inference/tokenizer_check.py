"""Finds the tokenizer of a model, and makes sure that its ids are those of the training data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data_io.prompt_format import TOKENIZER_FILE, PromptFormat, vocabulary
from data_io.sampled_format import VOCAB_MULTIPLE, TokenizerInfo


def prompt_format_of(
    info: TokenizerInfo,
    given: Path | None,
    *,
    places: Sequence[Path],
    vocab_size: int,
    whose: Path,
) -> PromptFormat:
    """The format in which the model in the folder `whose` is asked.

    `given` overrides where the tokenizer is; else it is where the data record `info` says, or in
    one of `places`. `vocab_size` is the model's. ValueError or FileNotFoundError where it is
    missing, or has other ids than the training data.
    """
    info.require("boq", "eoq", "eoa", "condition_mapping")
    assert info.boq is not None and info.eoq is not None and info.eoa is not None
    assert info.condition_mapping is not None
    told = [] if info.tokenizer_path is None else [Path(info.tokenizer_path)]
    looked = [_file(place) for place in (*told, *places)]
    own = [file for file in dict.fromkeys(looked) if file.is_file()]
    if given is not None and not _file(given).is_file():
        raise FileNotFoundError(
            f"tokenizer_path={given}: there is no {_file(given)}; give a tokenizer.json or the "
            "folder that holds one"
        )
    if given is None and not own:
        raise FileNotFoundError(
            f"the tokenizer of {whose} is gone (looked for {', '.join(map(str, looked))}); give "
            "tokenizer_path=..., the tokenizer.json that made its training data"
        )
    taken = own[0] if given is None else _file(given)
    witnesses = [file for file in own if file != taken]
    for witness in witnesses:
        _require_same_ids(taken, witness)
    not_it = f"{taken} is not the tokenizer of {whose}"
    try:
        prompt_format = PromptFormat.load(
            taken, boq=info.boq, eoq=info.eoq, eoa=info.eoa, conditions=info.condition_mapping
        )
    except ValueError as error:
        raise ValueError(f"{not_it}: {error}") from None
    id_limit = prompt_format.id_limit
    padded = -(-id_limit // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    is_proven = bool(witnesses) or taken.parent == whose
    if id_limit > vocab_size or (padded != vocab_size and not is_proven):
        raise ValueError(
            f"{not_it}: its {id_limit} ids make a vocabulary of {padded}, the model's is "
            f"{vocab_size}; give the tokenizer.json that made the training data"
        )
    if not is_proven and given is not None:
        print(f"{taken}: ids not compared, {whose} has no tokenizer of its own", file=sys.stderr)
    return prompt_format


def _file(place: Path) -> Path:
    return place / TOKENIZER_FILE if place.is_dir() else place


def _require_same_ids(taken: Path, witness: Path) -> None:
    if taken.read_bytes() == witness.read_bytes():
        return
    here, there = _vocabulary(taken), _vocabulary(witness)
    if here != there:
        first = min(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        raise ValueError(
            f"{taken} and {witness} have other ids: id {first} is {here.get(first)!r} in the one "
            f"and {there.get(first)!r} in the other; the model needs the one that made its "
            "training data: remove the other, or give it as tokenizer_path=..."
        )


def _vocabulary(file: Path) -> dict[int, str]:
    return vocabulary(TokenizerInfo(tokenizer_path=str(file)), file.parent) or {}
