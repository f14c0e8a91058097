"""Time and memory of a training step with each option that trades one for the other.

    python -m scripts.benchmark_training_options                      # both nets, on one thread
    python -m scripts.benchmark_training_options --net nano --steps 20 --device cuda

Each option runs in a process of its own, in fp32, on the same random rows. `added` is the memory
that a step takes on top of weights and state; on CPUs the kernel is asked for it (Linux alone).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from models.attention import select_attention
from models.batch import PackedBatch, PackedLayout
from models.language_model import LanguageModel
from models.linear import pick_linear_kernel, set_linear_kernel
from models.transformer import Block
from training.adam_atan2 import AdamATan2
from training.compiling import compile_model, compile_s
from training.distributed import World, pick_device
from training.export_format import ARCH_ADAPTER
from training.step import train_step
from training.step_check import StepCheck

VOCAB_SIZE, SEQ_LEN, WARM_UP = 512, 64, 2
HRM = {"name": "hrm", "half_layers": True, "H_cycles": 2, "L_cycles": 3}
NETS: dict[str, tuple[dict[str, Any], int]] = {  # settings, tokens of a row
    "nano": ({**HRM, "n_layers": 4, "hidden_size": 64, "num_heads": 4}, 2048),
    "wide": ({**HRM, "n_layers": 8, "hidden_size": 512, "num_heads": 8}, 512),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation_checkpointing=attention": {"recomputed": "attention"},
    "activation_checkpointing=block": {"recomputed": "block"},
    "offload_optimizer=true": {"offloads": True},
    "compile=block": {"mode": "block"},
    "compile=stack": {"mode": "stack"},
    "compile=step": {"mode": "step"},
}


def random_batch(num_tokens: int, seed: int) -> PackedBatch:
    """A full row of examples of 2 to 64 tokens; all of them are scored."""
    generator = torch.Generator().manual_seed(seed)
    lens = []
    while sum(lens) < num_tokens:
        drawn = int(torch.randint(2, SEQ_LEN, (), generator=generator))
        lens.append(min(drawn, num_tokens - sum(lens)))
    seq_lens = torch.tensor(lens)
    layout = PackedLayout.from_lengths(seq_lens // 2, seq_lens - seq_lens // 2, num_tokens // 4)
    tokens = torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=generator).int()
    positions = torch.cat([torch.arange(length) for length in lens]).int()
    return PackedBatch(
        tokens=tokens,
        labels=tokens,
        positions=positions,
        layout=layout,
        indices=torch.arange(num_tokens // 4),
        num_scored=num_tokens,
        global_num_scored=num_tokens,
        global_num_tokens=num_tokens,
        next_cursor=0,
    )


def measure(net: str, option: str, steps: int, device: torch.device) -> dict[str, float]:
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings, num_tokens = NETS[net]
    chosen = OPTIONS[option]
    set_linear_kernel(pick_linear_kernel(device, settings["hidden_size"])[0])
    config = ARCH_ADAPTER.validate_python(settings)
    sizes = {"dtype": torch.float32, "head_size": config.answer_stack.head_size}
    attention, _ = select_attention("auto", device=device, **sizes)
    model = LanguageModel(config, VOCAB_SIZE, attention).to(device)
    for module in model.modules():
        if isinstance(module, Block):
            module.recomputed = chosen.get("recomputed", "none")
    compile_model(model, chosen.get("mode", "none"))
    state_device = torch.device("cpu") if chosen.get("offloads") else None
    optimizer = AdamATan2(model.parameters(), lr=1e-4, ema=0.999, state_device=state_device)
    world = World(rank=0, size=1, device=device)

    def timed_step(seed: int) -> float:
        batch = random_batch(num_tokens, seed).to(device)
        started_at = clock(device)
        train_step(model, optimizer, [batch], float(num_tokens), None, StepCheck(world))
        return clock(device) - started_at

    for seed in range(WARM_UP):
        timed_step(seed)
    before = memory_bytes(device, starts=True)
    elapsed_s = [timed_step(WARM_UP + number) for number in range(steps)]
    added = memory_bytes(device, starts=False) - before
    return {"step_s": median(elapsed_s), "added": added, "compile_s": compile_s()}


def clock(device: torch.device) -> float:
    """Seconds; on CPUs those of this process alone, whatever else the machine is doing."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def memory_bytes(device: torch.device, *, starts: bool) -> int:
    """In use now, from where the peak is counted on; later, the peak. 0 where nobody knows."""
    if device.type == "cuda":
        if starts:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    if starts:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide what is taken again
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is in use now
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Prints a row per option, with ratios to the plain step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--net", choices=NETS, action="append", help="default: all")
    parser.add_argument("--steps", type=int, default=5, help="measured ones (default 5)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--option", choices=OPTIONS, help="this one alone, as JSON")
    parser.add_argument("--among", choices=OPTIONS, action="append", help="beside plain (all)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    if arguments.option:
        (net,) = arguments.net
        print(json.dumps(measure(net, arguments.option, arguments.steps, device)))
        return
    rows = []
    for net in arguments.net or NETS:
        print(f"{net}: hrm, {NETS[net][1]:,} tokens a step, bp 5, {device.type}")
        plain: dict[str, float] = {}
        for option in OPTIONS:
            if option not in ("plain", *(arguments.among or OPTIONS)):
                continue
            command = [sys.executable, "-m", "scripts.benchmark_training_options", "--net", net]
            command += ["--option", option, "--steps", str(arguments.steps)]
            command += ["--device", arguments.device]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            plain = plain or found
            time_ratio = found["step_s"] / plain["step_s"]
            memory_ratio = found["added"] / plain["added"] if plain["added"] else float("nan")
            ratios = {"time_ratio": time_ratio, "memory_ratio": memory_ratio}
            rows.append({"net": net, "option": option, **found, **ratios})
            print(
                f"  {option:35} {found['step_s'] * 1e3:8.1f} ms ({time_ratio:.2f})  "
                f"{found['added'] / 2**20:7.1f} MiB added ({memory_ratio:.2f})  "
                f"compiled in {found['compile_s']:.0f} s",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
