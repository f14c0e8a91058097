"""Every net in every size is a legal record; every net trains and decodes; published lines hold."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import CONFIG, ROOT, TINY, composed, resolved, run_pretrain, write_tiny_data
from source_tree import product_files

from models.flops import total_parameters
from models.hrm import HRMConfig
from simple_inference_engine import ModelOptions, load_model
from training.schedule import backprop_steps_at
from training.schema import DataConfig, RunConfig, legal_keys
from training.telemetry import read_metrics


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG / group).glob("*.yaml") if path.stem[0] != "_")


NETS = options("arch/net")
HALVED = {"hrm", "rins", "trm_match_recurrence"}  # each stack has half of the layers
SIZES = {"nano": 4, "B": 12, "L": 24, "XL": 32, "XXL": 72, "XXL_wide": 32}  # layers
PUBLISHED_VOCAB = 65_536
# the XL reference run of the paper
XL = {
    "data": DataConfig(path="/dev/shm/sampled", target_only=True),
    "global_batch_size": 196_608,
    "epochs": 4,
    "lr": 2.2e-4,
    "lr_min_ratio": 1.0,
    "lr_warmup_steps": 2000,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "ema": 0.9999,
    "log_interval": 5,
    "checkpoint_interval": 1,
    "schedule_steps": "counted",
    "resume_from": None,
    "checkpoint_path": None,
}
SFT = XL | {
    "data": DataConfig(path="sft_data", target_only=True),
    "global_batch_size": 32_768,
    "epochs": 5,
    "lr": 3e-5,
    "lr_min_ratio": 0.1,
    "lr_warmup_steps": 0,
    "ema": 0.999,
    "resume_from": "checkpoints/XL",
    "checkpoint_path": "checkpoints/XL_sft",
    "weights_only_resume_from_ema": True,
}
XL_PARAMETERS, L_PARAMETERS = 1_182_793_728, 694_681_600
TORCHRUN = "torchrun --nproc_per_node=8 pretrain.py "
TWO_NODES = (
    "OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 torchrun --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 "
    "--master_port=29500 --nproc_per_node=8 pretrain.py"
)
# line, net, weights, what differs from the XL run
PUBLISHED_LINES: list[tuple[str, str, int, dict[str, Any]]] = [
    ("python pretrain.py", "hrm", XL_PARAMETERS, XL),
    (TWO_NODES, "hrm", XL_PARAMETERS, XL),
    (
        TORCHRUN + "arch/size@arch=L lr=2.5e-4 global_batch_size=172032",
        "hrm",
        L_PARAMETERS,
        XL | {"lr": 2.5e-4, "global_batch_size": 172_032},
    ),
    (TORCHRUN + "arch/net@arch=transformer arch/size@arch=L", "transformer", L_PARAMETERS, XL),
    (
        TORCHRUN + "--config-name cfg_sft arch/size@arch=XL data.path=sft_data "
        "resume_from=checkpoints/XL +checkpoint_path=checkpoints/XL_sft "
        "weights_only_resume_from_ema=true",
        "hrm",
        XL_PARAMETERS,
        SFT,
    ),
]


@pytest.mark.parametrize(("line", "net", "weights", "settings"), PUBLISHED_LINES)
def test_a_published_line_is_the_published_run(
    line: str, net: str, weights: int, settings: dict[str, Any]
) -> None:
    words = shlex.split(line)
    config = resolved(*words[words.index("pretrain.py") + 1 :])
    assert {key: getattr(config, key) for key in settings} == settings
    assert config.arch.name == net
    assert total_parameters(config.arch, PUBLISHED_VOCAB) == weights
    head_sizes = {stack.head_size for stack in config.arch.stacks().values()}
    assert head_sizes == {128}


def test_the_published_run_backpropagates_through_2_to_5_calls() -> None:
    arch = resolved().arch
    assert isinstance(arch, HRMConfig)
    assert (arch.H_cycles, arch.L_cycles, arch.bp_warmup_ratio) == (2, 3, 0.2)
    steps = [0, 66, 67, 133, 134, 199, 200, 1000]
    reach = [backprop_steps_at(step, 1000, arch) for step in steps]
    assert reach == [2, 2, 3, 3, 4, 4, 5, 5]


def test_fine_tuning_backpropagates_through_5_calls_from_the_start() -> None:
    arch = resolved("--config-name", "cfg_sft", "data.path=x").arch
    assert backprop_steps_at(1, 1000, arch) == 5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("net", NETS)
def test_every_net_comes_in_every_size(net: str, size: str) -> None:
    config = resolved(f"arch/net@arch={net}", f"arch/size@arch={size}")
    assert config.arch.name == net
    layers = [stack.n_layers for stack in config.arch.stacks().values()]
    assert layers == [SIZES[size] // (2 if net in HALVED else 1)] * len(layers)


@pytest.mark.parametrize("recipe", [path.stem for path in CONFIG.glob("cfg_*.yaml")])
@pytest.mark.parametrize("net", NETS)
def test_every_recipe_takes_every_net(recipe: str, net: str) -> None:
    arguments = ("--config-name", recipe, f"arch/net@arch={net}", "data.path=x")
    assert resolved(*arguments).arch.name == net


def test_a_size_file_holds_only_what_differs() -> None:
    shared = yaml.safe_load((CONFIG / "arch/size/_base.yaml").read_text())
    assert options("arch/size") == sorted(SIZES)
    for size in SIZES:
        own = yaml.safe_load((CONFIG / f"arch/size/{size}.yaml").read_text())
        assert own.pop("defaults") == ["_base@_here_", "_self_"]
        assert set(own) == {"n_layers", "hidden_size", "num_heads"}, size
        assert not set(own) & set(shared)


def test_every_key_of_every_file_is_legal() -> None:
    for path in CONFIG.rglob("*.yaml"):
        if path.parent.name == "mixtures":  # of data_io, checked in its own tests
            continue
        prefix = {"arch": "arch.", "data": "data."}.get(path.relative_to(CONFIG).parts[0], "")
        content = yaml.safe_load(path.read_text())
        content.pop("defaults", None)
        content.pop("hydra", None)
        unread = set(dotted(content, prefix)) - set(legal_keys())
        assert not unread, f"{path}: {unread}"


def dotted(content: dict[str, Any], prefix: str) -> list[str]:
    """All keys of a nested mapping as the command line writes them."""
    keys = []
    for key, value in content.items():
        nested = dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else []
        keys += nested or [f"{prefix}{key}"]
    return keys


def test_every_key_of_the_record_has_a_reader() -> None:
    code = "\n".join(
        (ROOT / path).read_text()
        for path in product_files()
        if path.as_posix() not in ("training/schema.py", "training/summary.py")
    )
    keys = [key for key in RunConfig.model_fields if key not in ("arch", "data")]
    keys += [f"data.{key}" for key in DataConfig.model_fields]
    unread = [key for key in keys if not re.search(rf"config\.{re.escape(key)}\b", code)]
    assert not unread


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one sweep has trained each net for three steps."""
    data = write_tiny_data(tmp_path_factory.mktemp("source") / "data", examples=18, epochs=1)
    folder = tmp_path_factory.mktemp("matrix")
    nets = f"arch/net@arch={','.join(NETS)}"
    steps = ("epochs=1", "log_interval=1", "run_name=net")
    run_pretrain("-m", f"data.path={data}", nets, *steps, *TINY, cwd=folder).check()
    return folder


@pytest.mark.parametrize("net", NETS)
def test_every_net_trains_three_steps_and_decodes(trained: Path, net: str) -> None:
    run = trained / "checkpoints" / "data" / f"net-{NETS.index(net)}"
    assert yaml.safe_load((run / "all_config.yaml").read_text())["arch"]["name"] == net
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(0 < line["train/loss"] < 10 for line in lines)
    loaded = load_model(ModelOptions(ckpt_path=run))
    prompts = [("direct", "rev neon"), ("cot", "2+2")]
    answers = list(loaded.engine.generate(prompts, loaded.prompt_format, max_new_tokens=3))
    assert sorted(answer.index for answer in answers) == [0, 1]


@pytest.mark.slow
def test_a_run_of_another_sweep_is_not_continued(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "source/data")
    (tmp_path / "work").mkdir()
    line = ("-m", f"data.path={data}", "epochs=1", "run_name=net", *TINY)
    run_pretrain(*line, "max_steps=1", "lr=3e-3,4e-3", cwd=tmp_path / "work").check()
    run_pretrain(*line, "max_steps=2", "lr=3e-3,4e-3", cwd=tmp_path / "work").check()
    done = run_pretrain(*line, "max_steps=3", "lr=4e-3,3e-3", cwd=tmp_path / "work")
    assert done.code == 2 and "net-0 is of another sweep; give another run_name" in done.stderr


def test_a_sweep_leaves_nothing_but_its_runs(trained: Path) -> None:
    assert [path.name for path in trained.iterdir()] == ["checkpoints"]
    runs = sorted(path.relative_to(trained).as_posix() for path in trained.glob("*/*/*"))
    assert runs == [f"checkpoints/data/net-{number}" for number in range(len(NETS))]


def test_an_override_beats_its_file_and_says_nothing_of_others() -> None:
    plain, changed = composed(), composed("lr=1e-3", "arch.H_override.n_layers=4")
    assert changed.pop("lr") == 1e-3 and plain.pop("lr") == 2.2e-4
    assert changed["arch"].pop("H_override") == {"n_layers": 4}
    assert plain["arch"].pop("H_override") == {}
    assert changed == plain
