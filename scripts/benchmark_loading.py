"""How much memory does loading a model take, beside its weights? And how long does it take?

    python scripts/benchmark_loading.py size=B
    python scripts/benchmark_loading.py size=L exported=false dtypes=bfloat16
    python scripts/benchmark_loading.py load=checkpoints/quickstart/nano-hrm

Writes a run directory of that size with random weights to a temporary place, and what
conversion.convert_to_hf makes of it; then loads each in a process of its own. What is compared is
the peak of that process's own memory (RssAnon) above its level before loading with the bytes of the
weights in the type that they run in. Linux alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_io.byte_tokenizer import write_byte_tokenizer  # noqa: E402
from data_io.options import parse_options  # noqa: E402
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ  # noqa: E402
from models.attention.sdpa import SdpaAttention  # noqa: E402
from models.language_model import LanguageModel  # noqa: E402
from simple_inference_engine import ModelOptions, load_model  # noqa: E402
from training.checkpoint import MODEL, Progress, RunDirectory  # noqa: E402
from training.console import refuse  # noqa: E402
from training.distributed import World  # noqa: E402
from training.export_format import ARCH_ADAPTER  # noqa: E402

STATUS = Path("/proc/self/status")
LIMIT = 1.3  # peak memory over bytes of the weights
LIMIT_FROM_MB = 200  # of weights: below, what is imported and buffers weigh more than they do
POLL_S = 0.001


class LoadingOptions(BaseModel):
    """What is loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: str = Field(default="B", description="a file of config/arch/size")
    net: str = Field(default="hrm", description="a file of config/arch/net")
    vocab_size: PositiveInt = Field(default=65_536, description="of the model")
    exported: bool = Field(default=True, description="measures the exported folder too")
    dtypes: list[str] = Field(default=["bfloat16", "float32"], description="types to load in")
    folder: Path | None = Field(default=None, description="where to write (null: temporary)")
    load: Path | None = Field(default=None, description="measures this folder, in this process")
    json_file: Path | None = Field(default=None, description="figures as JSON (null: none)")


class PeakMemory:
    """Watches this process's own memory from a thread while a block runs."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = own_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, own_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            self.peak = max(self.peak, own_bytes())


def own_bytes() -> int:
    """RssAnon of this process: memory that is not a file's."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def measure(folder: Path, dtype: str) -> dict[str, Any]:
    """Loads a folder in this process."""
    with PeakMemory() as memory:
        started_at = time.perf_counter()
        options = {"ckpt_path": folder, "dtype": dtype, "device": "cpu"}
        model = load_model(ModelOptions.model_validate(options)).engine.model
        elapsed_s = time.perf_counter() - started_at
    weight_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    return {
        "folder": folder.name,
        "dtype": dtype,
        "weight_mb": round(weight_bytes / 1e6, 1),
        "peak_over_weights": round((memory.peak - memory.before) / weight_bytes, 3),
        "seconds": round(elapsed_s, 2),
    }


def write_run(run: Path, options: LoadingOptions) -> None:
    """A run directory with random weights."""
    settings: dict[str, Any] = {}
    for name in ("size/_base", f"size/{options.size}", f"net/{options.net}"):
        path = ROOT / "config/arch" / f"{name}.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"{path.relative_to(ROOT)} is missing; name a file there")
        settings |= yaml.safe_load(path.read_text())
    settings.pop("defaults")
    arch = ARCH_ADAPTER.validate_python(settings)
    info = {"boq": BOQ, "eoq": EOQ, "eoa": EOA, "condition_mapping": dict(CONDITION_TOKENS)}
    metadata = {
        "max_seq_len": 4096,
        "vocab_size": options.vocab_size,
        "total_length": 0,
        "tokenizer_info": {**info, "tokenizer_path": "."},
    }
    directory = RunDirectory(run, World(rank=0, size=1, device=torch.device("cpu")))
    config = {"arch": arch.model_dump(), "data": {"path": "."}}
    directory.create(config, metadata)
    write_byte_tokenizer(run / "tokenizer").rename(run / "tokenizer.json")
    model = LanguageModel(arch, options.vocab_size, SdpaAttention())
    directory.save("fsdp2_epoch_1", {MODEL: model.state_dict()}, Progress(epoch=1, step=1), {})


def in_own_process(folder: Path, dtype: str) -> dict[str, Any]:
    """`measure` in a new interpreter."""
    command = [sys.executable, str(Path(__file__)), f"load={folder}", f"dtypes={dtype}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().removeprefix("error: "))
    return json.loads(done.stdout.splitlines()[0])


def measure_all(folder: Path, options: LoadingOptions) -> list[dict[str, Any]]:
    """Makes the folders and loads each in each type."""
    run, exported = folder / "run", folder / "exported"
    write_run(run, options)
    folders = [run]
    if options.exported:
        command = ["-m", "conversion.convert_to_hf", "--ckpt_path", str(run)]
        command += ["--out_dir", str(exported), "--dtype", "float32"]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=sys.stderr)
        folders.append(exported)
    return [in_own_process(each, dtype) for each in folders for dtype in options.dtypes]


def main() -> None:
    """Command line."""
    try:
        options = parse_options(LoadingOptions, sys.argv[1:], __doc__ or "")
        if not STATUS.is_file():
            raise ValueError(f"{STATUS} is not here: memory is measured on Linux alone")
        if options.load is not None:
            for dtype in options.dtypes[:1]:
                print(json.dumps(measure(options.load, dtype)))
            return
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = measure_all(Path(folder), options)
    except (ValueError, OSError) as error:
        refuse(str(error))
    except subprocess.CalledProcessError:
        refuse("the export failed; its message is above (exported=false leaves it out)")
    print(f"{'folder':<10}{'type':<10}{'weights':>12}{'peak / weights':>16}{'seconds':>9}")
    for each in found:
        print(
            f"{each['folder']:<10}{each['dtype']:<10}{each['weight_mb']:>9,.1f} MB"
            f"{each['peak_over_weights']:>16.3f}{each['seconds']:>9.1f}"
        )
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(found, indent=2) + "\n")
    large = [each for each in found if each["weight_mb"] >= LIMIT_FROM_MB]
    if any(each["peak_over_weights"] > LIMIT for each in large):
        print(f"more than {LIMIT} times the weights", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
