"""Merging of settings, and what is wrong with them. Golden cases pin the merging."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.settings import (
    config_path,
    read_settings,
    require_conditions,
    require_template,
)

ENGINES = ("SimpleEngine", "VLLMEngine")
CONFIG = """
engine: SimpleEngine
generation_config: {temperature: 0.0, max_tokens: 9, condition: direct}
benchmarks:
  - {name: GSM8k}
  - {name: BoolQ, num_shots: 1, generation_config: {temperature: 0.5}}
"""


def read(*arguments: str, config: str = CONFIG):
    return read_settings(config, arguments, engines=ENGINES)


def test_the_benchmarks_own_settings_come_between_global_and_entry() -> None:
    gsm8k, boolq = read().plans
    assert gsm8k.generation == {"temperature": 0.0, "max_tokens": 9, "condition": "direct"}
    assert boolq.generation == {"temperature": 0.5, "max_tokens": 1, "condition": "direct"}


def test_text_of_the_command_line_stays_text() -> None:
    text = "[$HOME: x] {prompt} = a: 1"
    (plan,) = read(f"generation_config.prompt_template={text}", "run_only=GSM8k").plans
    assert plan.prompt_of("x") == "[$HOME: x] x = a: 1"
    assert read("ckpt_path=2024").engine_settings == {"ckpt_path": "2024"}
    assert read("generation_config.prompt_template=null").plans[0].prompt_of("x") == "x"


def test_a_prompt_may_hold_braces() -> None:
    (plan,) = read("generation_config.prompt_template=<{prompt}>", "run_only=[GSM8k]").plans
    assert plan.prompt_of("{0} {x}") == "<{0} {x}>"


@pytest.mark.parametrize(
    "template",
    ["none", "{}", "{prompt} {x}", "{prompt", "{prompt.x}", "{prompt!x}", "{prompt:>5d}", "{0}"],
)
def test_a_bad_template_is_refused_before_anything_runs(template: str) -> None:
    with pytest.raises(ValueError, match=r"must hold \{prompt\} and no other field"):
        require_template(template)
    with pytest.raises(ValueError, match=r"must hold \{prompt\}"):
        read(f"generation_config.prompt_template={template}")


def test_a_benchmark_of_run_only_that_the_file_lacks_gets_its_defaults() -> None:
    settings = read("run_only=[reasoning_gym,GSM8k]")
    assert [plan.label for plan in settings.plans] == ["GSM8k", "reasoning_gym"]
    assert settings.notes == ("reasoning_gym is not in the config; its default settings are used",)


def test_a_benchmark_listed_twice_is_kept_twice_and_named_apart() -> None:
    entries = "[{name: AIMEMajorityVoting, year: 24}, {name: AIMEMajorityVoting}, {name: GSM8k},"
    entries += " {name: GSM8k}, {name: ARC}]"
    labels = [plan.label for plan in read(f"benchmarks={entries}").plans]
    assert labels == [
        "AIMEMajorityVoting(year=24)",
        "AIMEMajorityVoting(year=25)",
        "GSM8k#1",
        "GSM8k#2",
        "ARC",
    ]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["run_only=[Math]"], "no benchmark is named 'Math'; did you mean MATH"),
        (["run_only=[]"], r"names no benchmark; write run_only=\[MATH,DROP\]"),
        (["engine=SimpelEngine"], "did you mean SimpleEngine"),
        (["engine=null"], "one of SimpleEngine, VLLMEngine"),
        (["benchmarks=[{name: BoolQ, num_shot: 1}]"], "BoolQ: num_shot is no setting.*num_shots"),
        (["benchmarks=[{name: BoolQ, num_shots: x}]"], "BoolQ: num_shots='x'"),
        (["benchmarks=[{name: DROP, num_shots: 4}]"], "DROP: num_shots=4.*less than or equal to 3"),
        (["benchmarks=[GSM8k]"], "list of entries such as"),
        (["benchmarks=[]"], "benchmarks is empty"),
        (["benchmarks.0.num_shots=1"], "unknown setting 'benchmarks.0.num_shots'"),
        (["generation_config.batch=1"], "generation_config.batch is no setting; .*batch_size"),
        (["generation_config.batch_size=0"], "batch_size=0: .*greater than 0"),
        (["generation_config.temperature=-1"], "temperature=-1"),
        (["generation_config.temperature=.nan"], "temperature=nan"),
        (["generation_config=3"], "generation_config=3 must be keys with values"),
        (["generation_config.stop=[a"], "is no YAML value; quote it"),
        (["GSM8k"], "'GSM8k' is no setting; settings are written key=value"),
    ],
)
def test_wrong_settings_are_explained(arguments: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read(*arguments)


def test_a_config_that_is_no_mapping_is_refused() -> None:
    for config, why in (("- a", "keys with values"), ("a: [", "is no YAML")):
        with pytest.raises(ValueError, match=why):
            read(config=config)


def test_conditions_are_checked_against_the_checkpoint() -> None:
    known = ("direct", "synth", "cot")
    require_conditions(read("generation_config.condition=synth, cot"), known)
    require_conditions(read("generation_config.condition=null"), known)
    with pytest.raises(ValueError, match=r"GSM8k: condition=synt,cot names synt, .*mean synth"):
        require_conditions(read("generation_config.condition=synt,cot"), known)


PUBLISHED = ["GSM8k", "MATH", "DROP", "MMLU", "ARC", "HellaSwag", "Winogrande", "BoolQ"]


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("hrm_benchmarking", PUBLISHED),
        ("vllm_benchmarking", PUBLISHED),
        (
            "hrm_maj_vote_benchmarking",
            ["AIMEMajorityVoting(year=24)", "AIMEMajorityVoting(year=25)"],
        ),
    ],
)
def test_the_published_configs(name: str, labels: list[str]) -> None:
    settings = read("ckpt_path=some/run", config=config_path(name).read_text())
    assert [plan.label for plan in settings.plans] == labels
    assert settings.engine_settings["ckpt_path"] == "some/run"
    assert Path(config_path(name)).is_file()


def test_published_generation_settings() -> None:
    plans = {
        plan.label: plan for plan in read(config=config_path("hrm_benchmarking").read_text()).plans
    }
    expected = {
        "GSM8k": ("synth,cot", 3072, None),
        "MATH": ("synth,cot", 3072, None),
        "DROP": ("direct", 3072, None),
        **dict.fromkeys(PUBLISHED[3:], ("direct", 4096, 1)),
    }
    for name, (condition, max_context, max_tokens) in expected.items():
        generation = plans[name].generation
        assert generation["condition"] == condition and generation["max_context"] == max_context
        assert generation.get("max_tokens") == max_tokens and generation["temperature"] == 0
    other = read(config=config_path("vllm_benchmarking").read_text())
    assert other.plans[2].generation == {"temperature": 0.0, "stop": "\n\n"}
    assert other.engine_settings["max_model_len"] == 3072
