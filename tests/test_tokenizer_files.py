"""A tokenizer by its file: every kind is read or refused with the way out."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ, SPECIAL_TOKENS
from data_io.tokenizer_files import VARIABLE, load_tokenizer, next_id


def write_foreign(folder: Path, *, words: int = 0, special: tuple[str, ...] = ("<s>",)) -> Path:
    """A byte-level tokenizer of somebody else, with `words` more entries than the bytes."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"word{k}" for k in range(words))]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(name) for name in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_file_and_its_folder_are_the_same_tokenizer(tmp_path: Path) -> None:
    file = write_byte_tokenizer(tmp_path / "bytes")
    for path in (file, file.parent):
        loaded = load_tokenizer(path)
        assert (loaded.path, loaded.added) == (file, ())
        assert loaded.tokenizer.to_str() == Tokenizer.from_file(str(file)).to_str()


def test_missing_special_tokens_are_named_or_added_behind_the_others(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "foreign", special=("<s>", EOA))
    with pytest.raises(
        ValueError, match=r"no special tokens <\|im_start\|> .*ids from 258"
    ) as told:
        load_tokenizer(folder)
    assert EOA not in str(told.value)
    tokenizer, _, added = load_tokenizer(folder, add_special=True)
    assert added == tuple(token for token in SPECIAL_TOKENS if token != EOA)
    assert [tokenizer.token_to_id(token) for token in added] == [*range(258, 258 + len(added))]
    assert tokenizer.token_to_id(EOA) == 257
    prompts = PromptFormat(tokenizer, BOQ, EOQ, EOA, CONDITION_TOKENS)
    assert max(prompts.encode_response("<|im_end|><tool_call>")[:-1]) < 256


def test_tokens_of_the_callers_choice_are_checked(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "foreign")
    assert load_tokenizer(folder, needed=("<s>",)).added == ()
    with pytest.raises(ValueError, match="no special tokens <e>; add_special=true"):
        load_tokenizer(folder, needed=("<s>", "<e>"))
    assert "<e>" in load_tokenizer(folder, add_special=True, needed=("<e>",)).added


def test_a_vocabulary_above_two_bytes_keeps_its_ids(tmp_path: Path) -> None:
    folder = write_foreign(tmp_path / "large", words=70_000)
    loaded = load_tokenizer(folder, add_special=True)
    assert loaded.tokenizer.token_to_id(SPECIAL_TOKENS[0]) == 70_257
    assert next_id(loaded.tokenizer) == 70_257 + len(SPECIAL_TOKENS)


def test_the_variable_names_the_tokenizer_where_no_path_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = write_byte_tokenizer(tmp_path / "a"), write_byte_tokenizer(tmp_path / "b")
    monkeypatch.setenv(VARIABLE, str(file.parent))
    assert load_tokenizer(None).path == file
    assert load_tokenizer(other).path == other
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"\$LLAMA_TOKENIZER names .*gone, which does not exist"):
        load_tokenizer(None)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ValueError, match=r"no tokenizer is named, and \$LLAMA_TOKENIZER is not"):
        load_tokenizer(None)


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (ran,)

    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(Trap()))
    for path in (tmp_path / "tokenizer.pkl", tmp_path):
        with pytest.raises(
            ValueError, match=r"tokenizer\.pkl is a pickle.*tiktoken_ranks\.py says"
        ):
            load_tokenizer(path)
    assert not ran.exists()


def test_ranks_under_the_name_of_a_model_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ValueError, match="holds the ranks of a tiktoken encoding"):
        load_tokenizer(tmp_path)


def test_folders_and_files_without_a_tokenizer_say_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds neither tokenizer\.json nor a SentencePiece \.model"
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer at .*gone; give a tokenizer\.json"):
        load_tokenizer(tmp_path / "gone")
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match=r"a\.txt is not of a known kind; give a tokenizer\.json"):
        load_tokenizer(tmp_path / "a.txt")
    for name in ("a.model", "b.model"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"several tokenizers, a\.model, b\.model; name one"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
