"""Every reader of files that others may have written: a valid folder, its files, how it is read.

Longer than 300 lines: one table, and what it names.
"""

from __future__ import annotations

import base64
import gzip
import json
import shutil
import socket
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from commands import write_tiny_data
from core_cases import write_bundle
from export_cases import write_run
from fuzz_cases import Reader
from reference_cases import tiny_run
from results_cases import write_results
from run_cases import ALONE, run_config
from shipped_cases import write_export
from tokenized_cases import Sources, numbered_rows

from conversion.reference_run import read_reference_run
from data_io.byte_tokenizer import write_byte_tokenizer
from data_io.mixing import Mixture
from data_io.mixture import ChatMixture
from data_io.parsing import parse_json
from data_io.prompt_format import PromptFormat
from data_io.readers import to_record
from data_io.records import BadRowError
from data_io.sampled_format import SampledData
from data_io.source_files import find_sources
from data_io.special_tokens import BOQ, CONDITION_TOKENS, EOA, EOQ
from data_io.tiktoken_ranks import GPT4_PATTERN, ranks_tokenizer, read_ranks
from data_io.token_shards import ShardConfig, ShardFolder, ShardFolderWriter
from data_io.tokenized_checks import check_tokenized
from data_io.tokenized_format import MadeBy, TokenizedSource, read_tokenizer_info
from data_io.tokenizer_files import load_tokenizer
from evaluation.answer_log import LogWriter
from evaluation.core.bundle import Bundle
from evaluation.core.cache import FORMAT, PromptCache
from evaluation.mirror import read_rows as read_mirror_rows
from evaluation.recorded import read_results
from evaluation.records import open_results
from inference.answer_file import AnswerFile
from inference.asking import read_rows
from inference.exported_folder import read_exported
from inference.run_folder import open_run
from models.attention.sdpa import SdpaAttention
from models.language_model import LanguageModel
from training import run_lock
from training.checkpoint import DIGESTS_FILE, RunDirectory, read_checkpoint
from training.digests import digest_of
from training.environment import recorded_choices
from training.guards import GUARD_FILE
from training.inherited_arch import ChosenArch, inherit_arch
from training.run_curves import read_runs, training_seconds
from training.run_lock import LOCK_FILE, RunLock, require_unlocked
from training.run_records import tokens_of_run
from training.samples import SAMPLES_FILE
from training.starting import find_start
from training.telemetry import cut_metrics, read_metrics
from training.tensor_store import read_tensors, tensor_shapes

TEXT = "What is 7 times 6? Ä \U0001f642 <|im_end|>"


def _make_sampled(folder: Path) -> None:
    write_tiny_data(folder, examples=20, epochs=1)
    metadata = json.loads((folder / "metadata.json").read_text()) | {"scored": True}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    np.save(folder / "scored.npy", np.ones(1000, np.uint8))


def _read_sampled(folder: Path) -> None:
    data = SampledData.open(folder)
    data.fingerprint(1)
    epoch, tokens = data.epoch(0), data.tokens()
    for start, size in zip(epoch.inst_start, epoch.inst_len, strict=True):
        tokens[int(start) : int(start) + int(size)].tolist()
    data.metadata.train_metadata()


def _make_tokenized(folder: Path) -> None:
    sources = Sources(folder)
    sources.add("numbers.jsonl", numbered_rows(20))
    made = {"fingerprint": "x", "source_size": 3, "source_mtime_ns": 4, "source_rows": 20}
    made |= {"examples": 20, "tokens": 100, "dropped": {"empty response": 1}}
    (folder / "numbers.jsonl/made.json").write_text(json.dumps(made))


def _read_tokenized(folder: Path) -> None:
    list(check_tokenized(folder, []))
    read_tokenizer_info(folder)
    source = TokenizedSource.open(folder / "numbers.jsonl")
    source.check()
    MadeBy.find(folder / "numbers.jsonl")


def _make_run(folder: Path) -> None:
    write_run(folder)
    (folder / "environment.json").write_text('{"choices": {"device": "cpu", "threads": 1}}')


def _make_unfinished_run(folder: Path) -> None:
    _make_run(folder)
    config = run_config(folder, epochs=3).model_dump()
    (folder / "all_config.yaml").write_text(yaml.safe_dump(config))


def _redigest(folder: Path) -> None:
    for checkpoint in folder.glob("fsdp2_*"):
        digests = parse_json((checkpoint / DIGESTS_FILE).read_bytes())
        digests = {name: digest_of(checkpoint / name) for name in digests}
        (checkpoint / DIGESTS_FILE).write_text(json.dumps(digests))


def _read_run(folder: Path) -> None:
    """As who asks it."""
    stored = open_run(folder)
    with torch.device("meta"):
        model = LanguageModel(stored.arch, stored.vocab_size, SdpaAttention())
    stored.load_into(model.to_empty(device="cpu"))
    tokens_of_run(folder)


def _continue_run(folder: Path) -> None:
    """As the same command again."""
    config = run_config(folder, epochs=3)
    raw = {**config.model_dump(), "checkpoint_path": str(folder)}
    inherit_arch(raw, ChosenArch(frozenset(), frozenset()))
    recorded_choices(folder)
    find_start(RunDirectory(folder, ALONE), config)


def _read_checkpoint(folder: Path) -> None:
    list(read_checkpoint(folder / "fsdp2_epoch_2").checked_files())
    read_checkpoint(folder / "fsdp2_epoch_2")


def _make_part(folder: Path) -> None:
    """Of a run on two nodes, each with its own disk: the other one's files are not here."""
    _make_run(folder)
    checkpoint = folder / "fsdp2_epoch_2"
    record = json.loads((checkpoint / "progress.json").read_text())
    record["disks"] = [{"host": "one", "ranks": [0]}, {"host": "two", "ranks": [1]}]
    (checkpoint / "progress.json").write_text(json.dumps(record))
    digests = json.loads((checkpoint / DIGESTS_FILE).read_text())
    digests |= {"model/__1_0.distcp": "0" * 64}
    (checkpoint / DIGESTS_FILE).write_text(json.dumps(digests))
    _redigest_progress(folder)


def _redigest_progress(folder: Path) -> None:
    checkpoint = folder / "fsdp2_epoch_2"
    digests = parse_json((checkpoint / DIGESTS_FILE).read_bytes())
    digests["progress.json"] = digest_of(checkpoint / "progress.json")
    (checkpoint / DIGESTS_FILE).write_text(json.dumps(digests))


def _read_part(folder: Path) -> None:
    checkpoint = read_checkpoint(folder / "fsdp2_epoch_2")
    checkpoint.told_of_absent(checkpoint.absent_files())
    list(checkpoint.checked_files())


def _read_tensors(folder: Path) -> None:
    tensor_shapes(folder / "fsdp2_epoch_2/model")
    read_tensors(folder / "fsdp2_epoch_2/model")


def _make_export(folder: Path) -> None:
    write_export(folder, "hrm")
    write_byte_tokenizer(folder / "bytes").rename(folder / "tokenizer.json")
    shutil.rmtree(folder / "bytes")
    framing = {"boq": BOQ, "eoq": EOQ, "eoa": EOA, "condition_mapping": dict(CONDITION_TOKENS)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"prompt_format": framing}))


def _make_indexed_export(folder: Path) -> None:
    _make_export(folder)
    names = read_exported(folder).files["model.safetensors"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _read_export(folder: Path) -> None:
    exported = read_exported(folder)
    with torch.device("meta"):
        model = LanguageModel(exported.arch, exported.vocab_size, SdpaAttention())
    exported.load_into(model.to_empty(device="cpu"))


def _read_prompt_format(folder: Path) -> None:
    """A tokenizer is read, and used on text."""
    framing = {"boq": BOQ, "eoq": EOQ, "eoa": EOA, "conditions": dict(CONDITION_TOKENS)}
    form = PromptFormat.load(folder, **framing)
    form.decode(form.encode_prompt("direct", TEXT))


def _varint(number: int) -> bytes:
    return bytes([number | 0x80, number >> 7]) if number > 127 else bytes([number])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _make_sentencepiece(folder: Path) -> None:
    """A BPE model of a few pieces, as the package writes them."""
    folder.mkdir()
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("[S]", 0.0, 4)]
    pieces += [(text, -float(k), 1) for k, text in enumerate(["ab", "abc", *"abc\u2581de"])]
    content = b""
    for text, score, kind in pieces:
        inner = _field(1, text.encode()) + b"\x15" + np.float32(score).tobytes()
        content += _field(1, inner + b"\x18" + bytes([kind]))
    content += _field(2, b"\x18\x02") + _field(3, b"\x18\x01\x20\x00\x28\x01")
    (folder / "x.model").write_bytes(content)


def _read_sentencepiece(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "x.model", add_special=True).tokenizer
    tokenizer.decode(tokenizer.encode("abc de ab [S]").ids)


def _make_ranks(folder: Path) -> None:
    folder.mkdir()
    tokens = [*(bytes([k]) for k in range(256)), b"ab", b"abc", b" d"]
    lines = [base64.b64encode(token) + b" %d\n" % k for k, token in enumerate(tokens)]
    (folder / "x.tiktoken").write_bytes(b"".join(lines))


def _read_ranks(folder: Path) -> None:
    tokenizer = ranks_tokenizer(read_ranks(folder / "x.tiktoken"), GPT4_PATTERN, {"<|end|>": 300})
    tokenizer.decode(tokenizer.encode(TEXT).ids)


def _make_shards(folder: Path) -> None:
    config = ShardConfig(vocab_size=300, bos_id=299)
    with ShardFolderWriter(folder, config, is_masked=True) as writer:
        ids = np.array([299, 1, 2, 3, 4])
        writer.add("val", ids, np.array([0, 0, 1, 1, 1]))
        writer.add("train", ids, np.array([0, 0, 1, 1, 1]))


def _read_shards(folder: Path) -> None:
    shards = ShardFolder.open(folder)
    for shard in (*shards.parts["val"], *shards.parts["train"]):
        shard.tokens().tolist()
        shard.mask().tolist()


ROWS = [
    {"instruction": "one", "response": "1", "condition": "direct"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"system_prompt": "s", "question": "q", "response": "r"},
    {"text": "words of a document"},
]


def _make_sources(folder: Path) -> None:
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.json").write_text(json.dumps(ROWS))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (folder / "d.jsonl.zst").write_bytes(pa.compress(lines, codec="zstd", asbytes=True))
    pq.write_table(pa.Table.from_pylist([ROWS[0]] * 5), folder / "e.parquet")


def _read_sources(folder: Path) -> None:
    for source in find_sources([folder]):
        for row in source.rows():
            with suppress(BadRowError):  # counted
                to_record(row.fields)
    for name in ("a.jsonl", "e.parquet"):
        for row in read_mirror_rows(folder / name):
            assert isinstance(row, dict)


def _make_metrics(folder: Path) -> None:
    folder.mkdir()
    lines = [
        {"step": 5 * k, "epoch": 0, "tokens": 50 * k, "train/loss": 5.0, "tokens_per_second": 9.0}
        for k in range(1, 6)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "all_config.yaml").write_text("arch: {name: hrm}\nlr: 0.1\nseed: 0\n")
    for name in (GUARD_FILE, SAMPLES_FILE):
        rows = [{"step": 5 * k, "reason": "a", "prompt": TEXT} for k in range(1, 6)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_metrics(folder: Path) -> None:
    for line in read_metrics(folder / GUARD_FILE):
        json.dumps(line)
    cut_metrics(folder / SAMPLES_FILE, 15)
    (curves,) = read_runs([folder])
    training_seconds(curves.lines)
    for metric in curves.metrics():
        curves.series(metric)
    cut_metrics(folder / "metrics.jsonl", 15)
    read_metrics(folder / "metrics.jsonl")


def _make_answers(folder: Path) -> None:
    folder.mkdir()
    (folder / "q.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 3)
    answers = AnswerFile(folder / "a.jsonl", {"temperature": 0})
    for index in range(3):
        answers.add({"index": index, "answer": "x"})
    answers.in_order()


def _read_answers(folder: Path) -> None:
    list(read_rows(folder / "q.jsonl"))
    AnswerFile(folder / "a.jsonl", {"temperature": 0}).in_order()


MIXTURE = {"name": "g", "source": "openai/gsm8k", "config": "main", "repeat": 2, "limit": 10}


def _make_mixtures(folder: Path) -> None:
    folder.mkdir()
    (folder / "mixture.yaml").write_text(yaml.safe_dump({"train": [MIXTURE], "validation": []}))
    (folder / "mixing.yaml").write_text(yaml.safe_dump([{"prefix": "a", "repeat": 2}]))


def _read_mixtures(folder: Path) -> None:
    ChatMixture.load(folder / "mixture.yaml")
    Mixture.load(folder / "mixing.yaml")


def _make_lock(folder: Path) -> None:
    folder.mkdir()
    holder = {"host": socket.gethostname(), "process": 1 << 22, "begun": "a boot 1"}
    (folder / LOCK_FILE).write_text(json.dumps(holder))


def _take_lock(folder: Path) -> None:
    """As a run that begins, and ends; a lock that cannot be read is not waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lock, "_TORN_S", 0.0)
        require_unlocked(folder)
        with RunLock(folder, ALONE) as lock:
            lock.take()


def _read_bundle(folder: Path) -> None:
    bundle = Bundle.open(folder)
    for entry in bundle.chosen([]):
        bundle.examples(entry)
        bundle.digest(entry)


def _keep_prompts(folder: Path) -> None:
    """Twice: what the first time finds damaged, the second must find whole."""
    cache = PromptCache(folder, "tokenizer", lambda said: None)
    for _ in range(2):
        kept = cache.prompts("task", {"rows": 2}, lambda: [[1, 2], [3]])
        assert [each.tolist() for each in kept] == [[1, 2], [3]]


def _read_reference(folder: Path) -> None:
    run = read_reference_run(folder, folder.parent / "converted")
    str(run.config.model_dump())


def _make_results(folder: Path) -> None:
    write_results(folder, {"GSM8k": ["#### 3", "#### 18"]})
    record = json.loads((folder / "results.json").read_text())
    record["benchmarks"] = {}
    log = {"benchmark": "GSM8k", "id": "0"}
    given = {"text": "3", "finish_reason": "stop", "num_tokens": 1, "digest": "x"}
    verdict = {"extracted": "3", "correct": 1.0, "invalid": False}
    lines = [{**log, "given": given}, {**log, "verdict": verdict}]
    (folder / "answers.0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _resume_results(folder: Path) -> None:
    """As the same evaluation again, and as the report."""
    record = json.loads((folder.parent / "valid/results.json").read_text())
    header = {key: record[key] for key in ("name", "model", "engine", "settings")}
    results = open_results(folder, {**header, "seconds": 0.0, "started_at": "x"}, ["GSM8k"])
    results.add("x", {"n": 1}, [{"benchmark": "x", "id": "1"}])
    LogWriter(folder, 0).close()
    results.remove_logs()


def _read_results(folder: Path) -> None:
    for each in read_results(folder).items.values():
        assert [(item.item, item.verdict) for item in each]


CHECKPOINT = {f"fsdp2_epoch_2/{name}.json": "json" for name in ("progress", "digests")}
TENSORS = {"fsdp2_epoch_2/model/.metadata": "pickle", "fsdp2_epoch_2/model/__0_0.distcp": "bytes"}
RUN = {"all_config.yaml": "yaml", "train_metadata.yaml": "yaml", "environment.json": "json"}
EPOCH = {f"epoch_0/{part}.npy": "npy" for part in ("inst_start", "inst_len", "resp_len")}
ARRAYS = {f"numbers.jsonl/{part}.npy": "npy" for part in ("tokens", "inst_start", "resp_len")}
JSON_OF_TOKENIZED = (
    "tokenizer_info.json",
    "numbers.jsonl/metadata.json",
    "numbers.jsonl/made.json",
)
EXPORT = {"config.json": "json", "tokenizer_config.json": "json", "tokenizer.json": "json"}
SOURCES = {"a.jsonl": "jsonl", "b.json": "json"}
SOURCES |= dict.fromkeys(("c.jsonl.gz", "d.jsonl.zst", "e.parquet"), "bytes")
RESULTS = {"results.json": "json", "items.jsonl": "jsonl"}
LINES_BESIDE = dict.fromkeys((GUARD_FILE, SAMPLES_FILE), "jsonl")
BUNDLE = {"core.yaml": "yaml", "eval_meta_data.csv": "bytes"}
BUNDLE |= dict.fromkeys(("eval_data/endings.jsonl", "eval_data/world/colours.jsonl"), "jsonl")
KEPT = (
    "task-"
    + sha256(
        json.dumps({"format": FORMAT, "tokenizer": "tokenizer", "rows": 2}, sort_keys=True).encode()
    ).hexdigest()[:16]
)

READERS: dict[str, Reader] = {
    "sampled": Reader(
        _make_sampled,
        {"metadata.json": "json", "tokens.npy": "npy", "scored.npy": "npy", **EPOCH},
        _read_sampled,
    ),
    "tokenized": Reader(
        _make_tokenized, {"tokenizer_info.json": "json", **ARRAYS}, _read_tokenized
    ),
    "run": Reader(_make_run, {**RUN, "tokenizer.json": "json"}, _read_run),
    "run continued": Reader(_make_unfinished_run, RUN, _continue_run),
    "checkpoint": Reader(_make_run, CHECKPOINT, _read_checkpoint),
    "forged checkpoint": Reader(_make_run, {**CHECKPOINT, **TENSORS}, _read_run, _redigest),
    "part of a checkpoint": Reader(
        _make_part, {"fsdp2_epoch_2/progress.json": "json"}, _read_part, _redigest_progress
    ),
    "tensors": Reader(_make_run, TENSORS, _read_tensors),
    "export": Reader(_make_export, {**EXPORT, "model.safetensors": "safetensors"}, _read_export),
    "indexed export": Reader(
        _make_indexed_export, {"model.safetensors.index.json": "json"}, _read_export
    ),
    "tokenizer.json": Reader(write_byte_tokenizer, {"tokenizer.json": "json"}, _read_prompt_format),
    "SentencePiece": Reader(_make_sentencepiece, {"x.model": "bytes"}, _read_sentencepiece),
    "tiktoken": Reader(_make_ranks, {"x.tiktoken": "bytes"}, _read_ranks),
    "shards": Reader(
        _make_shards,
        {
            "config.json": "json",
            "tokens_val_000000.bin": "shard",
            "tokens_train_000001_mask.bin": "shard",
        },
        _read_shards,
    ),
    "sources": Reader(_make_sources, SOURCES, _read_sources),
    "metrics": Reader(
        _make_metrics,
        {"metrics.jsonl": "jsonl", "all_config.yaml": "yaml", **LINES_BESIDE},
        _read_metrics,
        writes=True,
    ),
    "questions": Reader(_make_answers, {"q.jsonl": "jsonl"}, _read_answers, writes=True),
    "answers": Reader(
        _make_answers,
        {"a.jsonl": "jsonl", "a.jsonl.settings.json": "json"},
        _read_answers,
        writes=True,
    ),
    "lock": Reader(_make_lock, {LOCK_FILE: "json"}, _take_lock, writes=True),
    "CORE bundle": Reader(write_bundle, BUNDLE, _read_bundle),
    "kept prompts": Reader(
        _keep_prompts,
        {f"{KEPT}.ids.npy": "npy", f"{KEPT}.ends.npy": "npy", f"{KEPT}.json": "json"},
        _keep_prompts,
        writes=True,
    ),
    "mixtures": Reader(
        _make_mixtures, {"mixture.yaml": "yaml", "mixing.yaml": "yaml"}, _read_mixtures
    ),
    "original run": Reader(
        tiny_run,
        {"all_config.yaml": "yaml", "train_metadata.yaml": "yaml"},
        _read_reference,
    ),
    "results": Reader(_make_results, RESULTS, _read_results),
    "results continued": Reader(
        _make_results, {**RESULTS, "answers.0.jsonl": "jsonl"}, _resume_results, writes=True
    ),
}
