"""Puts modelling code beside exported weights, for `trust_remote_code=True`.

The files in `shipped/` are data of this package: nothing here imports them, and nothing here runs
code from a checkpoint.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).parent / "shipped"
PREFIX_FILE = "prefix_of_prompt.py"
GENERIC_FILES = (
    "configuration_recurrent_lm.py",
    "modeling_recurrent_lm.py",
    "blocks_recurrent_lm.py",
    PREFIX_FILE,
)
NATIVE_FILES = ("modeling_hrm_text_prefix.py", PREFIX_FILE)
GENERIC_MAP = {
    "AutoConfig": "configuration_recurrent_lm.RecurrentLMConfig",
    "AutoModelForCausalLM": "modeling_recurrent_lm.RecurrentLMForCausalLM",
}
NATIVE_MAP = {"AutoModelForCausalLM": "modeling_hrm_text_prefix.HrmTextForCausalLM"}


def ship_code(folder: Path, config: dict[str, Any], *, is_native: bool) -> dict[str, Any]:
    """Copies the files that execute a net into `folder`; returns `config` naming them.

    A native net keeps its model_type, so that it also loads without the files. ValueError where
    `config` lacks `eoq_token_id`, by which they find where a prompt ends.
    """
    eoq_token_id = config.get("eoq_token_id")
    if not isinstance(eoq_token_id, int):
        raise ValueError(
            f"eoq_token_id={eoq_token_id!r} in the config is no token id, but the shipped code "
            "finds the end of a prompt by it; export with the tokenizer of the training data"
        )
    for name in NATIVE_FILES if is_native else GENERIC_FILES:
        shutil.copyfile(SHIPPED / name, folder / name)
    if is_native:
        return {**config, "auto_map": NATIVE_MAP}
    return {
        **config,
        "model_type": "recurrent_lm",
        "architectures": ["RecurrentLMForCausalLM"],
        "auto_map": GENERIC_MAP,
        "tie_word_embeddings": False,
    }
