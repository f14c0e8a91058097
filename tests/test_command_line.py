"""What the command line may say: keys, choices, flags and values, and the messages about others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import CONFIG, composed, resolved

from models.hrm import HRMConfig
from training.command_line import checked_overrides, parse_config
from training.schema import legal_keys

PUBLISHED_KEYS = """
arch.name arch.head arch.half_layers arch.n_layers arch.hidden_size arch.num_heads arch.expansion
arch.norm_type arch.norm_eps arch.rope_theta arch.pos_emb_type arch.attn_type arch.init_type
arch.init_std arch.H_cycles arch.L_cycles arch.H_override arch.bp_warmup_ratio arch.bp_min_steps
arch.bp_max_steps arch.H_bp_steps arch.L_bp_steps arch.L_bp_cycles arch.cycles arch.bp_cycles
arch.intermediate_size data.path data.target_only global_batch_size epochs lr lr_min_ratio
lr_warmup_steps weight_decay beta1 beta2 ema fwd_bwd_dtype project_name run_name checkpoint_path
resume_from resume_epoch weights_only_resume_from_ema seed checkpoint_interval log_interval
"""


def test_every_published_key_is_legal() -> None:
    assert set(PUBLISHED_KEYS.split()) <= set(legal_keys())


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lrr=3", "unknown key 'lrr'; did you mean lr?"),
        ("+lrr=3", "unknown key 'lrr'; did you mean lr?"),
        ("++lrr=3", "unknown key 'lrr'; did you mean lr?"),
        ("~lrr", "unknown key 'lrr'; did you mean lr?"),
        ("warmup_steps=3", "did you mean lr_warmup_steps?"),
        ("batch_size=64", "did you mean global_batch_size or micro_batch_size?"),
        ("hidden_size=64", "did you mean arch.hidden_size?"),
        ("arch.hiden_size=64", "did you mean arch.hidden_size?"),
        ("n_layers=2", "did you mean arch.n_layers?"),
        ("arch.H_override.nlayers=3", "did you mean arch.H_override.n_layers?"),
        ("+arch.H_override.xx=3", "unknown key 'arch.H_override.xx'"),
        ("data.paths=x", "did you mean data.path?"),
        ("path=x", "did you mean data.path?"),
        ("data.path.more=x", "did you mean data.path?"),
        ("quite_different=3", "see python pretrain.py --help"),
        ("size=L", "did you mean arch/size@arch?"),
        ("arch/size=L", "did you mean arch/size@arch?"),
        ("arch/net@data=hrm", "did you mean arch/net@arch?"),
        ("arch=L", "did you mean arch/net@arch or arch/size@arch?"),
        ("arch/net@arch=hrn", "(did you mean hrm?); it is one of hrm, rins, transformer, trm,"),
        ("arch/size@arch=XXXL", "(did you mean XXL?); it is one of B, L, XL, XXL, XXL_wide, nano"),
        ("arch/size@arch=_base", "arch/size@arch=_base does not exist"),
        ("arch/size@arch=L,M", "arch/size@arch=M does not exist"),
        ("data=resoning", "did you mean reasoning?"),
        ("lr", "'lr' is no override; write key=value"),
        ("--lr=3e-4", "settings are written without dashes"),
        ("-lr", "settings are written without dashes"),
        ("--config-name=cfg_stf", "(did you mean cfg_sft?); it is one of cfg_instruct,"),
    ],
)
def test_what_is_not_legal_is_refused_by_name(argument: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        checked_overrides([argument], CONFIG)
    assert message in str(refused.value)


def test_a_key_is_set_with_or_without_plus_whether_or_not_a_file_mentions_it() -> None:
    for prefix in ("", "+", "++"):
        config = resolved(
            f"{prefix}lr=1e-3", f"{prefix}checkpoint_steps=7", f"{prefix}checkpoint_path=runs/a"
        )
        assert (config.lr, config.checkpoint_steps, config.checkpoint_path) == (1e-3, 7, "runs/a")


def test_nested_settings_reach_the_record() -> None:
    arch = resolved("arch.H_override.norm_type=post", "+arch.H_override={n_layers: 3}").arch
    assert isinstance(arch, HRMConfig)
    assert arch.H_override == {"norm_type": "post", "n_layers": 3}
    assert arch.stacks()["H_module"].n_layers == 3


def test_a_choice_may_be_given_with_plus() -> None:
    assert checked_overrides(["+data=sft"], CONFIG) == ["+data=sft"]


def test_flags_may_stand_anywhere_and_keep_their_values() -> None:
    arguments = ["lr=1e-3", "--config-name", "cfg_sft", "-m", "seed=1,2", "--cfg", "job"]
    expected = ["++lr=1e-3", "++seed=1,2", "--config-name", "cfg_sft", "-m", "--cfg", "job"]
    assert checked_overrides(arguments, CONFIG) == expected


def test_settings_of_hydra_itself_are_left_to_it() -> None:
    arguments = ["hydra.verbose=true", "hydra/launcher=basic", "+hydra.job.name=x"]
    assert checked_overrides(arguments, CONFIG) == arguments


def test_choices_from_a_folder_of_ones_own_are_left_to_hydra(tmp_path: Path) -> None:
    arguments = ["data=mine", "--config-name", "mine", "--config-dir", str(tmp_path)]
    assert checked_overrides(arguments, CONFIG) == arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lr=abc"], "lr=abc must be a valid number"),
        (["lr=0"], "lr=0 must be greater than 0"),
        (["lr='1e-3'"], "lr=1e-3 must be a valid number"),
        (["epochs=1.5"], "epochs=1.5 must be a valid integer"),
        (["epochs=null"], "epochs is not set; give epochs=..."),
        (["~epochs"], "epochs is required and has no value; give epochs=..."),
        (["seed=true"], "seed=true must be a valid integer"),
        (["new_run=1"], "new_run=1 must be a valid boolean"),
        (["ema=1.0"], "ema=1.0 must be less than 1"),
        (["run_name=''"], "run_name= must be a folder's plain name"),
        (["data_workers=2"], "data_workers=2 must be 0 or 1"),
        (["fwd_bwd_dtype=float16"], "fwd_bwd_dtype=float16 must be 'auto', 'bfloat16' or"),
        (
            ["schedule_steps=count"],
            "schedule_steps=count must be 'counted' or 'published' or must be a valid integer",
        ),
        (["data=sft"], "data.path is not set; give data.path=..."),
        (["data.target_only=3"], "data.target_only=3 must be a valid boolean"),
        (["arch.norm_type=middle"], "arch.norm_type=middle must be 'pre' or 'post'"),
        (["arch.hidden_size=100", "arch.num_heads=3"], "use a multiple of 6, e.g. hidden_size=102"),
        (
            ["arch.H_override={layers: 3}"],
            "H_override has no setting ['layers']; it takes n_layers",
        ),
        (["arch.H_override.num_heads=5"], "does not split into num_heads=5"),
        (["arch.name=hrn"], "arch.name must be one of hrm, transformer, trm,"),
        (["~arch.name"], "arch.name must be one of hrm, transformer, trm,"),
        (["resume_epoch=2"], "resume_from, which is not given; give it or leave them out"),
        (
            ["arch/net@arch=ut", "arch.H_override.n_layers=2"],
            "arch.H_override is no setting of this net, but of hrm; leave it out",
        ),
        (
            ["arch/net@arch=transformer", "arch.L_cycles=2"],
            "arch.L_cycles is no setting of this net, but of hrm, trm, trm_match_recur",
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_rule(
    arguments: list[str], message: str
) -> None:
    raw = composed(*arguments)
    with pytest.raises(ValueError) as refused:
        parse_config(raw)
    assert message in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_every_broken_rule_is_listed_on_a_line() -> None:
    with pytest.raises(ValueError) as refused:
        parse_config(composed("lr=-1", "epochs=0", "arch.expansion=wide"))
    keys = [line.split("=")[0] for line in str(refused.value).splitlines()]
    assert sorted(keys) == ["arch.expansion", "epochs", "lr"]


def test_an_unknown_key_in_a_file_is_refused_too() -> None:
    raw = composed()
    raw["lrr"] = 1.0
    raw["arch"] |= {"n_layer": 2}
    raw["data"] |= {"paths": "x"}
    with pytest.raises(ValueError) as refused:
        parse_config(raw)
    for key in ("arch.n_layers", "data.path", "lr"):
        assert f"did you mean {key}?" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 3


def test_the_published_head_is_ignored_with_a_note() -> None:
    config, notes = parse_config(composed("arch.head=lm_head"))
    assert config == resolved()
    assert notes == ["arch.head=lm_head is ignored: there is one head"]


def test_a_net_without_schedule_ignores_that_there_is_none() -> None:
    arguments = ("arch/net@arch=rins", "arch.bp_warmup_ratio=0")
    assert resolved(*arguments) == resolved("arch/net@arch=rins")
    with pytest.raises(
        ValueError, match=r"arch.bp_warmup_ratio is no setting of this net, but of hrm"
    ):
        resolved("arch/net@arch=rins", "arch.bp_warmup_ratio=0.1")


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("run_name=123", "run_name", "123"),
        ("lr=1", "lr", 1.0),
        ("ema=null", "ema", None),
        ("schedule_steps=500", "schedule_steps", 500),
        ("schedule_steps=published", "schedule_steps", "published"),
        ("resume_from='runs/with space'", "resume_from", "runs/with space"),
    ],
)
def test_a_value_is_read_as_what_it_is(argument: str, key: str, value: Any) -> None:
    assert getattr(resolved(argument), key) == value
