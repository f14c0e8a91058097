"""Do the processes of a run find one another, and are they alike? How fast do they exchange data?

    torchrun --nproc_per_node=2 scripts/check_distributed.py
    torchrun ... scripts/check_distributed.py data.path=DATA arch/size@arch=L check.timeout_s=120

Takes the arguments of pretrain.py, and its own, which begin with `check.` (--help). Compares
sources, packages, configuration, environment variables and data of all ranks, then times
collectives. Exit code 1: ranks differ, or one does not answer; 76: one was lost on the way.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_io.options import parse_options  # noqa: E402
from data_io.sampled_format import SampledData  # noqa: E402
from training.console import refuse, say  # noqa: E402
from training.distributed import World, start_world, stop_world  # noqa: E402
from training.watchdog import Watchdog  # noqa: E402

PREFIX = "check."
SHOWN = 3  # differences of a kind that are named
PACKAGES = ("torch", "numpy", "numba", "hydra-core", "omegaconf", "pydantic", "safetensors")
VARIABLES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "CUBLAS_", "CUDA_LAUNCH", "OMP_", "MKL_")
NOT_SOURCES = ("tests", "data", "checkpoints", "docs", "benchmarks")
POLL_S = 0.1
READING_S = 5.0  # for the others to read what all have written

Facts = dict[str, dict[str, str]]  # of one rank: kind -> name -> value


class CheckOptions(BaseModel):
    """How it is checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timeout_s: PositiveFloat = Field(
        60.0, alias="check.timeout_s", le=86_400, description="to wait for a rank"
    )
    largest_mb: PositiveInt = Field(
        64, alias="check.largest_mb", le=16_384, description="of the messages that are timed"
    )
    repeats: PositiveInt = Field(5, alias="check.repeats", description="of each; the median counts")
    device: str = Field("auto", alias="check.device", description="cuda, cpu or auto")


def main(arguments: list[str]) -> None:
    """Checks the processes that were started together."""
    own = [a for a in arguments if a.startswith((PREFIX, "-h", "--help"))]
    options = parse_options(CheckOptions, own, __doc__ or "")
    if "RANK" not in os.environ:
        raise ValueError(
            "one process has nobody to compare itself with; start it with "
            "torchrun --nproc_per_node=2 scripts/check_distributed.py"
        )
    store = meet(options.timeout_s)
    found = facts([a for a in arguments if a not in own])
    everyone = roll_call(store, found, options.timeout_s)
    if not compare(everyone):
        sys.exit(1)
    world = start_world(options.device, options.timeout_s / 60)
    say(
        world, "", f"{world.size} ranks, {dist.get_backend()}; GB/s over each link, by message size"
    )
    with Watchdog(world, options.timeout_s / 60, advice="run this check again") as watchdog:
        for num_bytes in sizes(options.largest_mb << 20):
            say(world, *table_row(num_bytes, bandwidths(world, num_bytes, options.repeats)))
            watchdog.step += 1
    stop_world()


def facts(arguments: list[str]) -> Facts:
    """What this rank would train with."""
    built_for = {"cuda": str(torch.version.cuda), "hip": str(torch.version.hip)}
    versions = {name: metadata.version(name) for name in PACKAGES}
    found: Facts = {
        "sources": sources(),
        "packages": {"python": platform.python_version(), **versions, **built_for},
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
    }
    if arguments:
        found |= configuration(arguments)
    return found


def sources() -> dict[str, str]:
    """The digest of each file of code and configuration."""
    parts = [part for part in ROOT.iterdir() if part.name[0] != "."]
    parts = [part for part in parts if part.name not in NOT_SOURCES]
    files = [path for part in parts for path in ([part] if part.is_file() else part.rglob("*"))]
    return {
        file.relative_to(ROOT).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for file in sorted(files)
        if file.suffix in (".py", ".yaml") and file.is_file()
    }


def configuration(arguments: list[str]) -> Facts:
    """What pretrain.py makes of its arguments here, and the data that they name."""
    command = [sys.executable, str(ROOT / "pretrain.py"), *arguments, "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"configuration": {"refused": done.stderr.strip().removeprefix("error: ")}}
    composed = yaml.safe_load(done.stdout)
    found: Facts = {"configuration": dict(flat(composed))}
    path, epochs = Path(composed["data"]["path"]), int(composed["epochs"])
    try:
        data = SampledData.open(path)
        found["data"] = {"fingerprint": data.fingerprint(min(epochs, data.num_epochs))}
        found["data"]["vocabulary"] = data.metadata.tokenizer_info.model_dump_json()
    except (ValueError, OSError) as error:
        found["data"] = {"refused": str(error)}
    return found


def flat(section: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """A configuration as dotted keys."""
    pairs = []
    for key, value in section.items():
        if isinstance(value, dict):
            pairs += flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", str(value)))
    return pairs


def meet(timeout_s: float) -> dist.Store:
    """The store of all ranks; where rank 0 keeps it, others reach it as long as rank 0 holds it."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(
            host,
            port,
            is_master=os.environ["RANK"] == "0" and not is_kept_by_torchrun,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,  # the process group uses it too
        )
    except RuntimeError as error:
        told = str(error).splitlines()[0]
        give_up(f"rank 0 does not answer at {host}:{port} within {timeout_s:g} s ({told})")


def roll_call(whole: dist.Store, own: Facts, timeout_s: float) -> list[tuple[str, Facts]]:
    """Host and facts of every rank; ends the process, naming them, where some do not answer."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.PrefixStore(f"check {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", whole)
    store.set(f"facts {rank}", json.dumps([platform.node(), own]))
    missing = wait_for(store, "facts", list(range(size)), timeout_s)
    there = [each for each in range(size) if each not in missing]
    everyone = [json.loads(store.get(f"facts {each}")) for each in there]
    store.set(f"read {rank}", "")
    if rank == 0:
        wait_for(store, "read", there, READING_S)  # the store may end with this process
    if missing:
        hosts = ", ".join(f"{n} ({host})" for n, (host, _) in zip(there, everyone, strict=True))
        give_up(
            f"rank {', '.join(map(str, missing))} did not answer within {timeout_s:g} s; "
            f"these did: {hosts}",
            is_speaker=rank == there[0],
        )
    return [(host, found) for host, found in everyone]


def wait_for(store: dist.Store, what: str, ranks: list[int], timeout_s: float) -> list[int]:
    """Those of the ranks that have not written it in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        ranks = [each for each in ranks if not store.check([f"{what} {each}"])]
        if not ranks or time.monotonic() > deadline:
            return ranks
        time.sleep(POLL_S)


def give_up(message: str, *, is_speaker: bool = True) -> NoReturn:
    """One message and exit code 1; the others leave later, as torchrun ends all with the first."""
    if is_speaker:
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)
    sys.exit(1)


def compare(everyone: list[tuple[str, Facts]]) -> bool:
    """Whether all ranks are alike; rank 0 says in what they are, and who is not."""
    lines, is_alike = [], True
    for kind in {kind: None for _, found in everyone for kind in found}:
        of_ranks = [found.get(kind, {}) for _, found in everyone]
        refusals = [of_rank["refused"] for of_rank in of_ranks if "refused" in of_rank]
        strange = differences(of_ranks)
        is_alike = is_alike and not strange and not refusals
        if strange:
            told = [f"rank {rank} ({everyone[rank][0]}): {what}" for rank, what in strange.items()]
            lines.append(f"{kind:<14}DIFFERENT on {'; '.join(told)}")
        elif refusals:
            lines.append(f"{kind:<14}refused on all ranks: {refusals[0]}")
        else:
            lines.append(f"{kind:<14}alike on {len(everyone)} ranks, {len(of_ranks[0])} compared")
    if os.environ["RANK"] == "0":
        print(*lines, sep="\n", flush=True)
        if not is_alike:
            print("error: this would not train as one run; see above", file=sys.stderr, flush=True)
    elif not is_alike:
        time.sleep(2)  # rank 0 says it; torchrun ends all with the first
    return is_alike


def differences(of_ranks: list[dict[str, str]]) -> dict[int, str]:
    """What is not as on most ranks, by rank; where there is no majority, rank 0 is right."""
    found: dict[int, list[str]] = {}
    for name in sorted({name for of_rank in of_ranks for name in of_rank}):
        values = [of_rank.get(name, "nothing") for of_rank in of_ranks]
        usual = Counter(values).most_common(1)[0][0]
        for rank, value in enumerate(values):
            if value != usual:
                found.setdefault(rank, []).append(f"{name} is {value}, not {usual}")
    return {
        rank: ", ".join(told[:SHOWN]) + f" and {len(told) - SHOWN} more" * (len(told) > SHOWN)
        for rank, told in found.items()
    }


def sizes(largest: int) -> list[int]:
    """Bytes of the messages: from 64 KiB, each four times the one before."""
    found = [1 << 16]
    while 4 * found[-1] <= largest:
        found.append(4 * found[-1])
    return found


def bandwidths(world: World, num_bytes: int, repeats: int) -> dict[str, float]:
    """GB/s over each link, by collective: what a ring sends, whatever the number of ranks."""
    whole = torch.ones(num_bytes // 4 // world.size * world.size, device=world.device)
    part = whole[: whole.numel() // world.size].clone()
    sent = (world.size - 1) / world.size * whole.numel() * 4
    timed: dict[str, tuple[Callable[[], object], float, Tensor]] = {
        "all-reduce": (lambda: dist.all_reduce(whole), 2 * sent, whole),
        "all-gather": (lambda: dist.all_gather_into_tensor(whole, part), sent, whole),
        "reduce-scatter": (lambda: dist.reduce_scatter_tensor(part, whole), sent, part),
    }
    found = {}
    for name, (collective, bytes_sent, result) in timed.items():
        elapsed_s = []
        for _ in range(repeats + 1):  # the first one opens connections
            whole.fill_(1)
            part.fill_(1)
            world.barrier()
            started_at = time.perf_counter()
            collective()
            if world.device.type == "cuda":
                torch.cuda.synchronize()  # sync: it has arrived
            elapsed_s.append(time.perf_counter() - started_at)
            expected = 1 if name == "all-gather" else world.size
            if bool((result != expected).any()):
                raise OSError(f"{name} of {num_bytes} bytes does not give {expected} everywhere")
        found[name] = bytes_sent / statistics.median(elapsed_s[1:]) / 1e9
    return found


def table_row(num_bytes: int, found: Mapping[str, float]) -> list[str]:
    """A line of the table; its head before the first."""
    head = [f"{'KiB':>10}" + "".join(f"{name:>16}" for name in found)]
    row = f"{num_bytes >> 10:>10,}" + "".join(f"{each:>16.3f}" for each in found.values())
    return [*(head if num_bytes == sizes(0)[0] else []), row]


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:
        refuse(str(problem))
    except dist.DistError as problem:
        give_up(f"rank 0, which keeps the store of all ranks, is gone ({problem})")
    except KeyboardInterrupt:
        sys.exit(130)
