"""Anybody's tokenizer, by its file: tokenizer.json, a Hugging Face folder, or SentencePiece.

    tokenizer, path, added = load_tokenizer(Path("llama/tokenizer.model"), add_special=True)

Without a path it is the one that $LLAMA_TOKENIZER names. Special tokens that frame prompts must be
there, or are added on request; `PromptFormat` refuses those that text could pass for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer

from data_io.prompt_format import TOKENIZER_FILE, read_tokenizer
from data_io.sentencepiece_model import read_sentencepiece
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ, SPECIAL_TOKENS
from data_io.tiktoken_ranks import RANKS_LINE

VARIABLE = "LLAMA_TOKENIZER"
NEEDED = (BOQ, EOQ, EOA, *CONDITION_TOKENS.values())
GIVE_ONE = "give a tokenizer.json, a folder that holds one, or a SentencePiece .model"
FROM_TIKTOKEN = (
    "data_io/tiktoken_ranks.py says in its first lines how to make a tokenizer.json of it"
)


class LoadedTokenizer(NamedTuple):
    tokenizer: Tokenizer
    path: Path  # the file that was read
    added: tuple[str, ...]  # special tokens that it lacked


def load_tokenizer(
    path: Path | None, *, add_special: bool = False, needed: Sequence[str] = NEEDED
) -> LoadedTokenizer:
    """The tokenizer of a file or folder, with the special tokens `needed`.

    With `add_special` it gets those and all published ones that it lacks, with ids after its own;
    otherwise ValueError names what it lacks.
    """
    file = _tokenizer_file(_given(path))
    if file.suffix == ".model":
        tokenizer = read_sentencepiece(file, special=(*SPECIAL_TOKENS, *needed))
    else:
        tokenizer = read_tokenizer(file)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    added: tuple[str, ...] = ()
    if add_special:
        wanted = dict.fromkeys((*SPECIAL_TOKENS, *needed))
        added = tuple(token for token in wanted if token not in known)
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in added])
    elif missing := [token for token in dict.fromkeys(needed) if token not in known]:
        raise ValueError(
            f"{file} has no special tokens {' '.join(missing)}; add_special=true adds them with "
            f"ids from {next_id(tokenizer)}, or name tokens that it has"
        )
    return LoadedTokenizer(tokenizer, file, added)


def next_id(tokenizer: Tokenizer) -> int:
    """All ids of the tokenizer are below this one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _given(path: Path | None) -> Path:
    if path is not None:
        return path
    named = os.environ.get(VARIABLE, "")
    if not named:
        raise ValueError(f"no tokenizer is named, and ${VARIABLE} is not set; {GIVE_ONE}")
    if not Path(named).exists():
        raise ValueError(f"${VARIABLE} names {named}, which does not exist; {GIVE_ONE}")
    return Path(named)


def _tokenizer_file(path: Path) -> Path:
    """The file itself, or that of a folder; refuses what cannot be read as a tokenizer."""
    if path.suffix == ".pkl":
        raise _pickle_refused(path)
    if not path.exists():
        raise ValueError(f"no tokenizer at {path}; {GIVE_ONE}")
    if path.is_dir():
        return _file_in(path)
    if path.suffix not in (".json", ".model"):
        raise ValueError(f"{path} is not of a known kind; {GIVE_ONE}")
    if path.suffix == ".model" and _holds_ranks(path):
        raise ValueError(
            f"{path} holds the ranks of a tiktoken encoding, which lack its pattern and special "
            f"tokens; {FROM_TIKTOKEN}"
        )
    return path


def _file_in(folder: Path) -> Path:
    if (folder / TOKENIZER_FILE).is_file():
        return folder / TOKENIZER_FILE
    found = sorted(folder.glob("*.model"))
    if len(found) == 1:
        return _tokenizer_file(found[0])
    if found:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{folder} holds several tokenizers, {names}; name one of these files")
    pickled = sorted(folder.glob("*.pkl"))
    if pickled:
        raise _pickle_refused(pickled[0])
    raise ValueError(
        f"{folder} holds neither {TOKENIZER_FILE} nor a SentencePiece .model; where transformers "
        f"knows the tokenizer, AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) writes "
        f"a {TOKENIZER_FILE}"
    )


def _holds_ranks(path: Path) -> bool:
    with path.open("rb") as file:
        return RANKS_LINE.fullmatch(file.readline(1000)) is not None


def _pickle_refused(path: Path) -> ValueError:
    return ValueError(
        f"{path} is a pickle, and reading one runs whatever code it holds; where you trust it, "
        f"{FROM_TIKTOKEN}"
    )
