"""The model card of an export: README.md with the front matter that the hub reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion.run_figures import Figure
from data_io.prompt_format import PromptFormat
from models.flops import core_parameters, total_parameters
from models.hrm import HRMConfig
from models.transformer import NetConfig
from models.trm import TRMConfig
from training.checkpoint import Progress

CARD_FILE = "README.md"
PAPER = "https://arxiv.org/abs/2605.20613"
_MEANINGS = {
    "direct": "the answer at once; instruction data with short answers",
    "cot": "the answer worked out step by step",
    "noisy": "in the manner of unedited data, of mixed quality",
    "synth": "in the manner of synthetic data; with `cot` (`synth,cot`) for mathematics",
}


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the card tells."""

    name: str  # of the model
    arch: NetConfig
    vocab_size: int
    max_seq_len: int
    prompt_format: PromptFormat
    default_condition: str | None
    weights: str  # EMA or raw
    dtype: str
    progress: Progress
    config: Mapping[str, Any]  # all_config.yaml
    flops: float | None  # of the training so far; None: not known
    figures: tuple[Figure, ...]
    is_native: bool
    has_code: bool


def write_card(folder: Path, facts: CardFacts) -> None:
    """Writes README.md; its front matter is checked by the hub's own record of it."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=figure.benchmark.lower().replace(" ", "-"),
            dataset_name=figure.benchmark,
            metric_type=figure.metric,
            metric_value=figure.value,
        )
        for figure in facts.figures
    ]
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hrm_text" if facts.is_native else "custom_code", "recurrent", "prefix-lm"],
        model_name=facts.name,
        eval_results=results or None,
    )
    card = ModelCard(f"---\n{front.to_yaml()}\n---\n\n{card_text(facts)}")
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")


def card_text(facts: CardFacts) -> str:
    """The card without its front matter."""
    sections = {
        f"# {facts.name}": _opening(facts),
        "## Use": _usage(facts),
        "## Conditions": _conditions(facts),
        "## The prefix": _prefix(facts),
        "## Training": _training(facts),
        "## Results": _results(facts),
        "## Limits": _limits(),
        "## What is not in this folder": _left_out(facts),
        "## Requirements": _requirements(facts),
        "## Citation": _citation(),
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items() if text) + "\n"


def _opening(facts: CardFacts) -> str:
    arch, stacks = facts.arch, facts.arch.stacks()
    depth = sum(stacks[each.stack].n_layers for each in arch.applications())
    layers = " + ".join(str(stack.n_layers) for stack in stacks.values())
    return (
        f"A recurrent language model ({_net(arch)}) of "
        f"{total_parameters(arch, facts.vocab_size):,} parameters "
        f"({core_parameters(arch):,} in its stacks): {layers} layers applied as {depth}, width "
        f"{arch.hidden_size}, {facts.max_seq_len:,} tokens of context, vocabulary "
        f"{facts.vocab_size:,}. It answers a prompt that it reads in both directions (PrefixLM)."
    )


def _usage(facts: CardFacts) -> str:
    trust = ", trust_remote_code=True" if facts.has_code else ""
    condition = f', condition="{facts.default_condition}"' if facts.default_condition else ""
    opening = facts.prompt_format.boq + "".join(
        facts.prompt_format.conditions[name] for name in filter(None, [facts.default_condition])
    )
    return f"""\
```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{facts.name}"  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(path{trust})
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.{facts.dtype}{trust})

messages = [{{"role": "user", "content": "What is 7 times 6?"}}]
inputs = tokenizer.apply_chat_template(
    messages{condition}, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

The same prompt, spelled out: `tokenizer("{opening}What is 7 times 6?{facts.prompt_format.eoq}",
return_tensors="pt")`. An answer ends with `{facts.prompt_format.eoa}`. Special tokens in a text are
read as such; take them out of text that is not yours."""


def _conditions(facts: CardFacts) -> str:
    conditions = facts.prompt_format.conditions
    if not conditions:
        return "None: a prompt is the text between its first and last token."
    # A bar ends a cell of a table even between backticks.
    tokens = {name: token.replace("|", r"\|") for name, token in conditions.items()}
    lines = "\n".join(
        f"| `{name}` | `{token}` | {_MEANINGS.get(name, 'as in its training data')} |"
        for name, token in tokens.items()
    )
    default = (
        f"`{facts.default_condition}` is taken where none is given."
        if facts.default_condition
        else "One of them must be given."
    )
    return (
        "A prompt says what kind of answer is wanted; several are joined by commas, and their "
        f"tokens keep that order. {default}\n\n"
        f"| condition | token | asks for |\n|---|---|---|\n{lines}"
    )


def _prefix(facts: CardFacts) -> str:
    if facts.arch.answer_stack.attn_type == "causal":
        return "This model was trained with causal attention; `token_type_ids` change nothing."
    unmarked = (
        "With `trust_remote_code=True` the code in this folder takes everything up to and "
        f"including `{facts.prompt_format.eoq}` as the prompt where no `token_type_ids` are given, "
        'so that `pipeline("text-generation")` and evaluation harnesses are right too.'
        if facts.has_code
        else '**`pipeline("text-generation")`, most evaluation harnesses and '
        "`generate(use_cache=False)` drop `token_type_ids`: the model then reads its prompt "
        "causally and quietly answers worse.** Export it with code (`--with_code`) for them."
    )
    return (
        "The prompt's tokens carry `token_type_ids` of 1 and see each other; the answer's carry 0 "
        "and are causal. The tokenizer sets them by itself, and pads on the left. FlashAttention "
        f"cannot hold such a mask; sdpa, flex and eager can. {unmarked}"
    )


def _training(facts: CardFacts) -> str:
    config, progress = facts.config, facts.progress
    if "global_batch_size" not in config:
        return "Imported weights: this folder does not know how they were trained."
    data = (config.get("data") or {}).get("path")
    rows = {
        "data": f"`{Path(str(data)).name}`" if data else None,
        "steps": f"{progress.step:,}",
        "epochs done": f"{progress.epoch}",
        "tokens": f"{progress.tokens:,}",
        "FLOPs": f"{facts.flops:.3g} (without attention scores)" if facts.flops else None,
        "global batch": f"{config['global_batch_size']:,} tokens"
        if isinstance(config.get("global_batch_size"), int)
        else None,
        "learning rate": config.get("lr"),
        "weights": f"{facts.weights}, {facts.dtype}",
        "started from": f"`{Path(str(config['resume_from'])).name}`"
        if config.get("resume_from")
        else None,
    }
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    return f"| | |\n|---|---|\n{lines}"


def _results(facts: CardFacts) -> str:
    if not facts.figures:
        return "None were recorded beside the checkpoint."
    lines = "\n".join(f"| {f.benchmark} | {f.metric} | {f.value:g} |" for f in facts.figures)
    return f"| benchmark | metric | value |\n|---|---|---|\n{lines}"


def _limits() -> str:
    return (
        "It was trained to answer single prompts like those of its data, and was not aligned: "
        "no preference tuning, no refusals, no filter. It states falsehoods fluently, repeats the "
        "biases of its data, and follows whatever a prompt asks. Conversations of several turns, "
        "languages and tasks outside its data are untested. Do not put it before people, or let it "
        "decide anything about them, without tests and safeguards of your own."
    )


def _left_out(facts: CardFacts) -> str:
    arch = facts.arch
    lines = ["The optimizer's state, and the weights that are not the ones named above."]
    if isinstance(arch, (HRMConfig, TRMConfig)) and facts.is_native:
        lines.append(
            "`L_bp_cycles` says which calls of the L level carried gradient at the end of "
            "training. There the H calls always carry gradient: that the first ones did not (`bp` "
            f"below H_cycles + 1 = {arch.H_cycles + 1}, as at the start of HRM's warm-up"
            f"{', and H_bp_steps below H_cycles' if isinstance(arch, TRMConfig) else ''}) cannot "
            "be said. It concerns further training alone; answers are the same."
        )
    if isinstance(arch, TRMConfig) and facts.is_native:
        lines.append(
            "The one stack of TRM stands twice in the weights, as H and as L; training that goes "
            "on from here would change the two apart."
        )
    return "\n".join(f"- {line}" for line in lines)


def _requirements(facts: CardFacts) -> str:
    code = (
        " It has no class for this net: the modelling files in this folder are run, with "
        "`trust_remote_code=True`."
        if not facts.is_native
        else ""
    )
    return f"`transformers>=5.9.0`, `torch`, `safetensors`; `jinja2` for the chat template.{code}"


def _citation() -> str:
    return f"""\
The system that this model follows: HRM-Text: Efficient Pretraining Beyond Scaling ({PAPER}).

```bibtex
@article{{hrmtext2026,
  title={{HRM-Text: Efficient Pretraining Beyond Scaling}},
  author={{Wang, Guan and Liu, Changling and Wang, Chenyu and Zhou, Cai and Sun, Yuhao and Wu, Yifei
    and Zhen, Shuai and Scimeca, Luca and Abbasi Yadkori, Yasin}},
  journal={{arXiv preprint arXiv:2605.20613}},
  year={{2026}}
}}
```"""


def _net(arch: NetConfig) -> str:
    return str(getattr(arch, "name", type(arch).__name__))
