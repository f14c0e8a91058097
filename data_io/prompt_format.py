"""The one place that turns (condition, instruction, response) into token ids, and ids into text.

A prompt is `boq, condition ids..., text ids..., eoq`, an answer is `text ids..., eoa`. Text is
data: a special token spelled inside it is encoded as ordinary characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from data_io.sampled_format import TokenizerInfo

ROLES = ("boq", "eoq", "eoa")
TOKENIZER_FILE = "tokenizer.json"
ENCODED_CHARS = 2**20  # of one call of the tokenizer, and one more text
SampledTokens = tuple[TokenizerInfo, Path]  # what metadata.json says of them, and its folder


@dataclass(frozen=True)
class PromptFormat:
    """A tokenizer and the tokens that frame its prompts and answers.

    It takes the tokenizer over: text spelling special tokens stays text in it from here on.
    """

    tokenizer: Tokenizer = field(repr=False)
    boq: str  # begin of question
    eoq: str  # end of question
    eoa: str  # end of answer
    conditions: Mapping[str, str]  # name -> token

    def __post_init__(self) -> None:
        roles = {f"condition {name}": token for name, token in self.conditions.items()}
        roles |= {role: getattr(self, role) for role in ROLES}
        _require_added(self.tokenizer, roles)
        tokens = sorted(set(roles.values()))
        # Some tokenizers hold such tokens as added but not special: those are found in text.
        self.tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        _require_out_of_reach(self.tokenizer, tokens)

    @classmethod
    def load(
        cls, tokenizer_path: Path, *, boq: str, eoq: str, eoa: str, conditions: Mapping[str, str]
    ) -> PromptFormat:
        """`tokenizer_path` is a tokenizer.json or the folder that holds one."""
        return cls(read_tokenizer(tokenizer_path), boq, eoq, eoa, dict(conditions))

    @classmethod
    def from_info(cls, info: TokenizerInfo, data_folder: Path | None = None) -> PromptFormat:
        """The format that sampled data was written in.

        A `tokenizer_path` that does not exist here is looked for beside the data in `data_folder`.
        """
        info.require("tokenizer_path", "boq", "eoq", "eoa", "condition_mapping")
        assert info.tokenizer_path is not None and info.condition_mapping is not None
        assert info.boq is not None and info.eoq is not None and info.eoa is not None
        tokenizer_path = Path(info.tokenizer_path)
        if data_folder is not None and not _tokenizer_file(tokenizer_path).is_file():
            tokenizer_path = data_folder
        return cls.load(
            tokenizer_path,
            boq=info.boq,
            eoq=info.eoq,
            eoa=info.eoa,
            conditions=info.condition_mapping,
        )

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer, special ones included."""
        return self.tokenizer.get_vocab_size()

    @cached_property
    def id_limit(self) -> int:
        """All ids of the tokenizer are below this one."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def boq_id(self) -> int:
        return self._id_of(self.boq)

    @cached_property
    def eoq_id(self) -> int:
        return self._id_of(self.eoq)

    @cached_property
    def eoa_id(self) -> int:
        """Where generation stops."""
        return self._id_of(self.eoa)

    def condition_ids(self, condition: str) -> list[int]:
        """Ids of comma-separated condition names such as `synth,cot`, in the order given."""
        names = [name.strip() for name in condition.split(",")]
        unknown = [name for name in names if name not in self.conditions]
        if unknown:
            raise ValueError(
                f"{condition=} has unknown names {unknown}; "
                f"known are {sorted(self.conditions)}, several are joined by commas"
            )
        return [self._id_of(self.conditions[name]) for name in names]

    def encode_prompt(self, condition: str, text: str) -> list[int]:
        return self.encode_prompts([condition], [text])[0]

    def encode_prompts(self, conditions: Iterable[str], texts: Sequence[str]) -> list[list[int]]:
        """One prompt per text; the conditions pair with them."""
        return [
            [self.boq_id, *self.condition_ids(condition), *text_ids, self.eoq_id]
            for condition, text_ids in zip(conditions, self.encode_texts(texts), strict=True)
        ]

    def encode_conversation(self, condition: str, turns: Sequence[tuple[str, str]]) -> list[int]:
        """A prompt of several (role, text) turns, that the model is to answer.

        Every user turn is framed as a prompt, every assistant turn as a response. A system turn,
        legal at the beginning, stands before the first user's text with a blank line between.
        """
        system, others = "", list(turns)
        if others and others[0][0] == "system":
            system = others.pop(0)[1]
        roles = [role for role, _ in others]
        expected = ["user", "assistant"] * (len(roles) // 2) + ["user"]
        if roles != expected:
            raise ValueError(
                f"the turns {[role for role, _ in turns]} are no conversation to answer: after a "
                "system turn (optional) user and assistant take turns, and the last is the user's"
            )
        texts = [text for _, text in others]
        if system:
            texts[0] = f"{system}\n\n{texts[0]}"
        ids: list[int] = []
        for role, text in zip(roles, texts, strict=True):
            is_question = role == "user"
            ids += (
                self.encode_prompt(condition, text) if is_question else self.encode_response(text)
            )
        return ids

    def encode_response(self, text: str) -> list[int]:
        return self.encode_responses([text])[0]

    def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*text_ids, self.eoa_id] for text_ids in self.encode_texts(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without their special tokens; nothing else is cut or stripped."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of the texts alone, encoded together on all cores."""
        ids: list[list[int]] = []
        for group in _groups(texts):
            try:
                encodings = self.tokenizer.encode_batch_fast(group, add_special_tokens=False)
            except TypeError:
                _require_whole_characters(group)
                raise
            ids += [encoding.ids for encoding in encodings]
        return ids

    def _id_of(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        assert token_id is not None  # checked when the format was made
        return token_id


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cuts a batch where it gets long: encoded text takes a hundred times its memory."""
    start = num_chars = 0
    for at, text in enumerate(texts):
        num_chars += len(text)
        if num_chars > ENCODED_CHARS:
            yield texts[start : at + 1]
            start, num_chars = at + 1, 0
    if start < len(texts):
        yield texts[start:]


def token_differences(one: SampledTokens, other: SampledTokens) -> list[str]:
    """What the ids of one mean otherwise than those of the other, as far as it can be known."""
    (info, folder), (other_info, other_folder) = one, other
    differences = [
        f"{role} is {getattr(info, role)}, {getattr(other_info, role)} there"
        for role in ROLES
        if getattr(info, role) != getattr(other_info, role)
    ]
    conditions, others = info.condition_mapping or {}, other_info.condition_mapping or {}
    differences += [
        f"condition {name} is {conditions[name]}, {others[name]} there"
        for name in conditions.keys() & others.keys()
        if conditions[name] != others[name]
    ]
    here, there = vocabulary(info, folder), vocabulary(other_info, other_folder)
    if here is not None and there is not None and here != there:
        first = min(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        differences.append(f"id {first} is {here.get(first)!r}, {there.get(first)!r} there")
    return differences


def vocabulary(info: TokenizerInfo, data_folder: Path) -> dict[int, str] | None:
    """The token of each id, of the tokenizer that made the data; None where it is not here."""
    path = find_tokenizer(info, data_folder)
    if path is None:
        return None
    tokens = read_tokenizer(path).get_vocab(with_added_tokens=True)
    return {token_id: token for token, token_id in tokens.items()}


def find_tokenizer(info: TokenizerInfo, data_folder: Path) -> Path | None:
    """The tokenizer.json that made the data, where it said or beside the data; None: not here."""
    given = [] if info.tokenizer_path is None else [Path(info.tokenizer_path)]
    files = (_tokenizer_file(path) for path in (*given, data_folder))
    return next((file for file in files if file.is_file()), None)


def _tokenizer_file(path: Path) -> Path:
    return path / TOKENIZER_FILE if path.is_dir() else path


def read_tokenizer(path: Path) -> Tokenizer:
    """`path` is a tokenizer.json or the folder that holds one."""
    tokenizer_file = _tokenizer_file(path)
    if not tokenizer_file.is_file():
        raise ValueError(
            f"no tokenizer at {tokenizer_file}; tokenizer_path is a tokenizer.json or its folder"
        )
    try:
        return Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # the package raises nothing more specific
        raise ValueError(f"{tokenizer_file} cannot be read as a tokenizer: {error}") from None


def _require_added(tokenizer: Tokenizer, roles: Mapping[str, str]) -> None:
    """An ordinary token of the vocabulary would also come out of text."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    unfit = {role: token for role, token in roles.items() if token not in added}
    if unfit:
        raise ValueError(
            f"not special tokens of the tokenizer: {unfit}; "
            f"name some that it has ({_shorten(sorted(added))}) or add these to it"
        )


def _require_out_of_reach(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Models that look whole words up in the vocabulary find special tokens there too."""
    for token in tokens:
        if tokenizer.token_to_id(token) in tokenizer.encode(token, add_special_tokens=False).ids:
            raise ValueError(
                f"the text {token!r} encodes to the special token of that name, so text could "
                f"pass for it; use a tokenizer that splits or merges it differently"
            )


def _require_whole_characters(texts: Sequence[str]) -> None:
    broken = [index for index, text in enumerate(texts) if re.search("[\ud800-\udfff]", text)]
    if broken:
        raise ValueError(
            f"texts {broken[:5]} of this batch hold half of a surrogate pair, which is no "
            f"character; repair or drop them"
        )


def _shorten(names: Sequence[str], shown: int = 12) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return " ".join(names[:shown]) + more
