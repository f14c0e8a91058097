"""The architecture of a run that has weights already is read from where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import CONFIG, composed
from net_cases import NETS

from training.checkpoint import CONFIG_FILE
from training.command_line import parse_config
from training.inherited_arch import chosen_arch, inherit_arch
from training.schema import RunConfig

TRAINED = {
    "hrm": {"n_layers": 6, "hidden_size": 24, "norm_type": "post", "rope_theta": 77.0},
    "transformer": {"n_layers": 3, "hidden_size": 24, "init_type": "megatron"},
    "trm": {"n_layers": 2, "hidden_size": 24, "attn_type": "causal"},
    "trm_match_recurrence": {"n_layers": 2, "hidden_size": 24},
    "rins": {"n_layers": 2, "hidden_size": 24, "L_cycles": 5},
    "ut": {"n_layers": 2, "hidden_size": 24, "cycles": 3},
}


def trained_run(folder: Path, net: str = "hrm", **changes: Any) -> Path:
    """A run directory as far as its configuration goes."""
    arch = {**NETS[net].model_dump(), "num_heads": 2, **TRAINED[net], **changes}
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(yaml.safe_dump({"arch": arch, "epochs": 1}))
    return folder


def inherited(*arguments: str) -> RunConfig:
    """The record of a command that starts from a run."""
    recipe = arguments[arguments.index("--config-name") + 1] if "--config-name" in arguments else ""
    chosen = chosen_arch(arguments, recipe or "cfg_pretrain", [CONFIG])
    raw, _ = inherit_arch(composed(*arguments), chosen)
    return parse_config(raw)[0]


@pytest.mark.parametrize("net", TRAINED)
@pytest.mark.parametrize("recipe", ["cfg_pretrain", "cfg_sft"])
def test_the_run_s_architecture_counts_whatever_the_recipe_says(
    net: str, recipe: str, tmp_path: Path
) -> None:
    run = trained_run(tmp_path / "run", net)
    config = inherited("--config-name", recipe, "data.path=x", f"resume_from={run}")
    expected = yaml.safe_load((run / CONFIG_FILE).read_text())["arch"]
    if net == "hrm" and recipe == "cfg_sft":
        expected |= {"bp_warmup_ratio": 0.0}  # the recipe's own text says so
    assert config.arch.model_dump() == expected


def test_cycles_and_the_like_come_from_the_command_line(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", H_override={"n_layers": 1})
    arch = inherited(
        f"resume_from={run}",
        *("arch.H_cycles=7", "arch.bp_max_steps=3", "arch.attn_type=causal"),
        *("arch.rope_theta=5e5", "arch.H_override.rope_theta=9.5"),
    ).arch.model_dump()
    assert (arch["H_cycles"], arch["bp_max_steps"], arch["attn_type"]) == (7, 3, "causal")
    assert (arch["rope_theta"], arch["n_layers"]) == (5e5, 6)
    assert arch["H_override"] == {"n_layers": 1, "rope_theta": 9.5}


def test_a_group_s_file_changes_nothing_that_is_no_shape(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", H_cycles=3, n_layers=4, hidden_size=64, num_heads=4)
    arch = inherited(f"resume_from={run}", "arch/net@arch=hrm", "arch/size@arch=nano").arch
    settings = arch.model_dump()
    assert (settings["H_cycles"], settings["rope_theta"]) == (3, 77.0)
    assert settings["norm_type"] == "post"  # the size's file says pre


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("arch/net@arch=ut", "arch.name is hrm there, ut here"),
        ("arch/size@arch=nano", "arch.hidden_size is 24 there, 64 here"),
        ("arch.n_layers=8", "arch.n_layers is 6 there, 8 here"),
        ("arch.half_layers=false", "arch.half_layers is True there, False here"),
        ("arch.norm_type=pre", "arch.norm_type is post there, pre here"),
        ("arch.expansion=3", "arch.expansion is 4.0 there, 3 here"),
        ("arch.init_type=megatron", "arch.init_type is lecun_normal there, megatron here"),
        ("arch.H_override.n_layers=2", "arch.H_override.n_layers is 3 there, 2 here"),
    ],
)
def test_a_contradiction_on_the_command_line_is_refused(
    argument: str, told: str, tmp_path: Path
) -> None:
    run = trained_run(tmp_path / "run", half_layers=True, intermediate_size=None, expansion=4.0)
    with pytest.raises(ValueError, match=r"holds another architecture.*leave that out") as raised:
        inherited(f"resume_from={run}", argument)
    assert told in str(raised.value)


def test_the_same_shape_said_again_is_no_contradiction(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run")
    said = ("arch/net@arch=hrm", "arch.n_layers=6", "arch.hidden_size=24", "arch.num_heads=2")
    assert inherited(f"resume_from={run}", *said).arch.n_layers == 6


def test_a_key_of_another_net_is_told(tmp_path: Path) -> None:
    run = trained_run(tmp_path / "run", "transformer")
    with pytest.raises(ValueError, match=r"arch\.H_cycles is no setting of this net"):
        inherited(f"resume_from={run}", "arch.H_cycles=3")


def test_a_run_that_is_continued_comes_before_the_one_it_started_from(tmp_path: Path) -> None:
    source = trained_run(tmp_path / "source", "ut")
    own = trained_run(tmp_path / "own", "rins")
    arguments = (f"resume_from={source}", f"checkpoint_path={own}")
    assert inherited(*arguments).arch.name == "rins"
    assert inherited(*arguments[:1], "checkpoint_path=new").arch.name == "ut"
    assert inherited(*arguments, "new_run=true").arch.name == "ut"


def test_without_a_run_the_command_is_left_alone(tmp_path: Path) -> None:
    raw = composed(f"checkpoint_path={tmp_path}")
    assert inherit_arch(raw, chosen_arch([], "cfg_pretrain", [CONFIG])) == (raw, [])
