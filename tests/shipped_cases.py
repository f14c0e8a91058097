"""Exported folders with modelling code in them, written by hand from the tiny nets.

The code that transformers loads from them is copied below a folder of this test run, never into the
user's cache.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from net_cases import NETS, build
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, dynamic_module_utils

from conversion.shipped_code import ship_code
from data_io.byte_tokenizer import byte_tokenizer
from data_io.prompt_format import PromptFormat
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from models.batch import PackedLayout
from models.language_model import LanguageModel
from models.transformer import NetConfig
from simple_inference_engine import InferenceEngine

COPIED_CODE = tempfile.TemporaryDirectory(prefix="copied_code_")
dynamic_module_utils.HF_MODULES_CACHE = COPIED_CODE.name

VOCAB_SIZE, MAX_CONTEXT = 512, 96
FORMAT = PromptFormat(byte_tokenizer(), BOQ, EOQ, EOA, CONDITION_TOKENS)


@dataclass(frozen=True)
class Export:
    """A folder, and the model that it was made of."""

    folder: Path
    model: LanguageModel

    def load(self, *, trust_remote_code: bool = True, **settings: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            self.folder, trust_remote_code=trust_remote_code, dtype=torch.float32, **settings
        ).eval()

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """What our engine answers."""
        engine = InferenceEngine(self.model, max_context=MAX_CONTEXT)
        (answer,) = engine.generate_ids([prompt], stop_ids=(), max_new_tokens=num_tokens)
        return list(answer.token_ids)

    def logits(self, tokens: list[int], num_prefix: int) -> Tensor:
        """[T, V] of our model."""
        lens = torch.tensor([num_prefix]), torch.tensor([len(tokens) - num_prefix])
        with torch.no_grad():
            hidden = self.model(
                torch.tensor(tokens), torch.arange(len(tokens)), PackedLayout.from_lengths(*lens, 1)
            )
            return self.model.logits(hidden)


def write_export(folder: Path, net: str, *, is_native: bool = False, seed: int = 3) -> Export:
    """A folder as the exporter writes it, tokenizer included, with the code shipped in it."""
    torch.manual_seed(seed)
    model = build(NETS[net], VOCAB_SIZE).eval()
    folder.mkdir(parents=True)
    settings = native_settings(NETS[net]) if is_native else generic_settings(NETS[net])
    config = ship_code(folder, {**common_settings(NETS[net]), **settings}, is_native=is_native)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(),
        pad_token="<|PAD|>",
        bos_token=BOQ,
        eos_token=EOA,
        padding_side="left",
    ).save_pretrained(folder)
    return Export(folder, model)


@lru_cache
def shared_export(kind: str) -> Export:
    """The export of a net, or of "native <net>", that tests only read."""
    folder = Path(tempfile.mkdtemp(dir=COPIED_CODE.name)) / "model"
    is_native = kind.startswith("native ")
    return write_export(folder, kind.removeprefix("native "), is_native=is_native)


@lru_cache
def shared_model(kind: str) -> Any:
    """The same, loaded in transformers with its code."""
    return shared_export(kind).load()


def random_ids(length: int) -> list[int]:
    return torch.randint(31, 256, (length,)).tolist()


def prompt_of(length: int) -> list[int]:
    return [FORMAT.boq_id, *random_ids(length - 2), FORMAT.eoq_id]


def conversation() -> tuple[list[int], int]:
    """Two questions and two answers, and where the prefix ends: with the last question."""
    prompt = [*prompt_of(6), *random_ids(3), FORMAT.eoa_id, *prompt_of(7)]
    return [*prompt, *random_ids(5), FORMAT.eoa_id], len(prompt)


def common_settings(net: NetConfig) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": net.hidden_size,
        "max_position_embeddings": MAX_CONTEXT,
        "embedding_scale": 1.0 / net.answer_stack.in_std,
        "tie_word_embeddings": False,
        "bos_token_id": FORMAT.boq_id,
        "eos_token_id": None,  # nothing stops the answers here
        "pad_token_id": 0,
        "eoq_token_id": FORMAT.eoq_id,
    }


def generic_settings(net: NetConfig) -> dict[str, Any]:
    stacks = net.stacks()
    return {
        "net": net.model_dump(),
        "num_hidden_layers": sum(stacks[each.stack].n_layers for each in net.applications()),
        "stacks": {
            name: {
                **stack.model_dump(),
                "head_dim": stack.head_size,
                "intermediate_size": stack.mlp_size,
            }
            for name, stack in stacks.items()
        },
        "applications": [
            {"stack": each.stack, "reads": list(each.reads), "writes": each.writes}
            for each in net.applications()
        ],
    }


def native_settings(net: NetConfig) -> dict[str, Any]:
    stack = net.stacks()["H_module"]
    return {
        "model_type": "hrm_text",
        "architectures": ["HrmTextForCausalLM"],
        "intermediate_size": stack.mlp_size,
        "num_hidden_layers": stack.n_layers,
        "num_attention_heads": stack.num_heads,
        "head_dim": stack.head_size,
        "H_cycles": 2,
        "L_cycles": 3,
        "rms_norm_eps": stack.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": stack.rope_theta},
        "prefix_lm": stack.attn_type == "prefix_lm",
    }
