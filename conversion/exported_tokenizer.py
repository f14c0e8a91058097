"""The tokenizer of an export: it marks the prefix by itself, its chat template knows conditions.

Text given to it may spell special tokens, as is usual there; `PromptFormat` treats text as data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_io.prompt_format import PromptFormat
from inference.exported_folder import PROMPT_FORMAT_KEY, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from training.export_format import FramingIds

PAD = "<|PAD|>"
DEFAULT_CONDITION = "direct"
TEMPLATE_FILE = "chat_template.jinja"

# Every token of a text alone is of the prefix (type 1); of a pair, the second text is not.
_MARKS_PREFIX = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 1}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}

_TEMPLATE = """\
{%- set tokens = @CONDITIONS@ -%}
{%- set asked = condition if condition is defined and condition else @DEFAULT@ -%}
{%- set rule = "after a system message (optional), user and assistant take turns" -%}
{%- set state = namespace(opening=@BOQ@, system="", turns=0) -%}
{%- if tokens or asked -%}
  {%- for name in asked.split(",") -%}
    {%- if name.strip() not in tokens -%}
      {{- raise_exception("condition=" ~ asked ~ " is unknown; " ~ @KNOWN@) -}}
    {%- endif -%}
    {%- set state.opening = state.opening ~ tokens[name.strip()] -%}
  {%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
  {%- if loop.first and message["role"] == "system" -%}
    {%- set state.system = message["content"] -%}
  {%- else -%}
    {%- set expected = "assistant" if state.turns % 2 else "user" -%}
    {%- if message["role"] != expected -%}
      {{- raise_exception("message " ~ loop.index ~ " is of " ~ message["role"] ~ ": " ~ rule) -}}
    {%- endif -%}
    {%- if expected == "user" -%}
      {{- state.opening -}}
      {%- if state.system and not state.turns -%}
        {{- state.system ~ "\\n\\n" -}}
      {%- endif -%}
      {{- message["content"] ~ @EOQ@ -}}
    {%- else -%}
      {{- message["content"] ~ @EOA@ -}}
    {%- endif -%}
    {%- set state.turns = state.turns + 1 -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and state.turns % 2 == 0 -%}
  {{- raise_exception("there is nothing to answer: the last message must be of user") -}}
{%- endif -%}
"""


def framing_ids(prompt_format: PromptFormat) -> FramingIds:
    """The ids that configurations name; without `<|PAD|>` in the vocabulary there is no padding."""
    added = prompt_format.tokenizer.get_added_tokens_decoder()
    padding = [token_id for token_id, token in added.items() if token.content == PAD]
    return FramingIds(
        boq=prompt_format.boq_id,
        eoq=prompt_format.eoq_id,
        eoa=prompt_format.eoa_id,
        pad=padding[0] if padding else None,
    )


def write_tokenizer(folder: Path, prompt_format: PromptFormat, *, max_seq_len: int) -> None:
    """Writes the tokenizer, its settings and its chat template."""
    tokenizer = json.loads(prompt_format.tokenizer.to_str())
    before = tokenizer["post_processor"] or {}
    # Offsets of bytes are kept; what adds tokens of its own is not: a prompt spells all of them.
    kept = [each for each in before.get("processors", [before]) if each.get("type") == "ByteLevel"]
    tokenizer["post_processor"] = (
        {"type": "Sequence", "processors": [*kept, _MARKS_PREFIX]} if kept else _MARKS_PREFIX
    )
    Tokenizer.from_str(json.dumps(tokenizer)).save(str(folder / TOKENIZER_FILE))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": prompt_format.boq,
        "eos_token": prompt_format.eoa,
        "pad_token": PAD if framing_ids(prompt_format).pad is not None else None,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "model_max_length": max_seq_len,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        PROMPT_FORMAT_KEY: {
            "boq": prompt_format.boq,
            "eoq": prompt_format.eoq,
            "eoa": prompt_format.eoa,
            "condition_mapping": dict(prompt_format.conditions),
        },
    }
    write_json(folder / TOKENIZER_CONFIG_FILE, settings)
    (folder / TEMPLATE_FILE).write_text(chat_template(prompt_format), encoding="utf-8")


def chat_template(prompt_format: PromptFormat) -> str:
    """Jinja that makes the ids of `PromptFormat.encode_conversation`, given `condition`."""
    conditions = dict(prompt_format.conditions)
    known = f"known are {', '.join(sorted(conditions))}, several are joined by commas"
    fields = {
        "@CONDITIONS@": conditions,
        "@DEFAULT@": default_condition(prompt_format) or "",
        "@KNOWN@": known if conditions else "this model has no conditions",
        "@BOQ@": prompt_format.boq,
        "@EOQ@": prompt_format.eoq,
        "@EOA@": prompt_format.eoa,
    }
    template = _TEMPLATE
    for field, value in fields.items():
        template = template.replace(field, json.dumps(value))
    return template


def default_condition(prompt_format: PromptFormat) -> str | None:
    """The condition of a chat that asks for none; None where the model has none of that name."""
    return DEFAULT_CONDITION if DEFAULT_CONDITION in prompt_format.conditions else None


def prompt_text(prompt_format: PromptFormat, condition: str | None, text: str) -> str:
    """A prompt with its special tokens spelled out."""
    names = condition.split(",") if condition else []
    opening = "".join(prompt_format.conditions[name.strip()] for name in names)
    return f"{prompt_format.boq}{opening}{text}{prompt_format.eoq}"


def generation_config(ids: FramingIds, *, max_seq_len: int) -> dict[str, Any]:
    """Greedy answers up to the context's end; the library's own default is 20 tokens."""
    return {
        "bos_token_id": ids.boq,
        "eos_token_id": ids.eoa,
        "pad_token_id": ids.pad,
        "do_sample": False,
        "max_length": max_seq_len,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
