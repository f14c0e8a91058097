"""Finds the n-grams of benchmarks' items in sampled training data, read as a stream.

Owns what counts as an item's text and as an example's; `evaluation.ngrams` owns words and hashes,
`evaluation.contamination` the command and its report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_io.prompt_format import PromptFormat
from data_io.sampled_format import EpochIndex, SampledData
from evaluation.benchmarks.aime import AIMEMajorityVoting
from evaluation.benchmarks.protocol import Benchmark, DataSource, Item
from evaluation.ngrams import (
    Hashes,
    Int64s,
    NgramSet,
    WordHashes,
    hash_ngrams,
    hash_whole,
    hash_words,
    words_of,
)
from evaluation.settings import BenchmarkPlan

BATCH_EXAMPLES = 1024  # decoded at a time
WORST = 5
TEMPLATE_SHARE, TEMPLATE_ITEMS = 0.5, 10  # an n-gram of so many items is the benchmark's own words


@dataclass(frozen=True, slots=True)
class Looked:
    """A benchmark whose items are looked for."""

    label: str
    items: Sequence[Item]
    ngrams: Sequence[Hashes]  # of each item
    whole: Hashes  # [items], of all words of each
    num_short: int  # items with fewer than n words
    num_template: int  # n-grams that are the benchmark's own words


@dataclass(frozen=True, slots=True)
class Found:
    """What the training data holds, by number of the n-gram."""

    is_found: NDArray[np.bool_]  # [k]
    epoch: NDArray[np.int16]  # [k], of the first example that holds it
    example: Int64s  # [k]
    prompts: Hashes  # of the prompts looked for: those that are the whole prompt of an example
    num_examples: int  # read, each once
    num_repeated: int  # passed by as read in an earlier epoch


def look_at(plan: BenchmarkPlan, source: DataSource, n: int) -> Looked:
    """Hashes the n-grams of a benchmark's items."""
    items = without_shots(plan.benchmark).load(source).items
    cache = WordHashes()
    ngrams, whole, num_short = [], [], 0
    for item in items:
        texts = words_of(item.prompt)
        words = hash_words(texts, cache)
        whole.append(hash_whole(texts))
        num_short += len(words) < n
        ngrams.append(np.unique(hash_ngrams(words, min(n, max(1, len(words))))))
    template = np.empty(0, np.uint64)
    if len(items) >= TEMPLATE_ITEMS:
        unique, counts = np.unique(np.concatenate(ngrams), return_counts=True)
        template = unique[counts > TEMPLATE_SHARE * len(items)]
        ngrams = [np.setdiff1d(each, template, assume_unique=True) for each in ngrams]
    wholes = np.array(whole, np.uint64)
    return Looked(plan.label, items, ngrams, wholes, num_short, len(template))


def without_shots(benchmark: Benchmark) -> Benchmark:
    """The benchmark with each question once and alone."""
    alone: dict[str, Any] = {"num_shots": 0, "special_shots": None}
    if isinstance(benchmark, AIMEMajorityVoting):
        alone["n"] = 1
    fields = type(benchmark).model_fields
    return benchmark.model_copy(update={k: v for k, v in alone.items() if k in fields})


def word_counts(looked: Sequence[Looked], n: int) -> set[int]:
    """How many words the n-grams have: n, and fewer for short items."""
    lengths = {len(words_of(item.prompt)) for each in looked for item in each.items}
    return {min(n, max(1, length)) for length in lengths}


def search(
    data: SampledData,
    looked: Sequence[Looked],
    wanted: NgramSet,
    *,
    prompt_format: PromptFormat,
    epochs: int,
) -> Found:
    """Reads every example that an epoch uses, once, a thousand at a time.

    Memory: the n-grams looked for, and 8 bytes for each example of earlier epochs.
    """
    count = len(wanted.hashes)
    is_found, epoch_of = np.zeros(count, np.bool_), np.zeros(count, np.int16)
    example_of = np.zeros(count, np.int64)
    wholes = np.unique(np.concatenate([each.whole for each in looked]))
    seen, same = np.empty(0, np.uint64), np.empty(0, np.uint64)
    num_examples, num_repeated, cache = 0, 0, WordHashes()
    for epoch in range(epochs):
        index = data.epoch(epoch)
        keys = _example_keys(index)
        fresh = np.flatnonzero(~np.isin(keys, seen))
        fresh = fresh[np.argsort(index.inst_start[fresh], kind="stable")]  # as they lie on disk
        num_repeated += len(keys) - len(fresh)
        num_examples += len(fresh)
        with tqdm(total=len(fresh), desc=f"epoch {epoch}", unit=" examples") as bar:
            for start in range(0, len(fresh), BATCH_EXAMPLES):
                examples = fresh[start : start + BATCH_EXAMPLES]
                texts = example_texts(data, index, examples, prompt_format)
                words, owners, prompts = _hashes_of(texts, cache)
                same = np.union1d(same, np.intersect1d(prompts, wholes))
                numbers, texts_found = wanted.find(words, owners)
                is_new = ~is_found[numbers]
                is_found[numbers] = True
                epoch_of[numbers[is_new]] = epoch
                example_of[numbers[is_new]] = examples[texts_found[is_new]]
                bar.update(len(examples))
        if epoch + 1 < epochs:
            seen = np.union1d(seen, keys)
    return Found(is_found, epoch_of, example_of, same, num_examples, num_repeated)


def _example_keys(index: EpochIndex) -> Hashes:
    """Tells examples apart by where they lie."""
    columns = (index.inst_start, index.inst_len, index.resp_start, index.resp_len)
    stacked = [np.asarray(column).astype(np.uint64) for column in columns]
    total = np.zeros(len(index), np.uint64)
    for column in stacked:
        total = (total ^ column) * np.uint64(0xBF58476D1CE4E5B9)
        total ^= total >> np.uint64(31)
    return total


def _hashes_of(
    texts: Sequence[tuple[str, str]], cache: WordHashes
) -> tuple[Hashes, Int64s, Hashes]:
    """Words of prompt and response in a row, whose they are, and each prompt as a whole."""
    prompts = [words_of(prompt) for prompt, _ in texts]
    words = [
        prompt + words_of(response) for prompt, (_, response) in zip(prompts, texts, strict=True)
    ]
    hashes = hash_words([word for each in words for word in each], cache)
    owners = np.repeat(np.arange(len(words)), [len(each) for each in words])
    return hashes, owners, np.array([hash_whole(each) for each in prompts], np.uint64)


def example_texts(
    data: SampledData, index: EpochIndex, examples: Int64s, prompt_format: PromptFormat
) -> list[tuple[str, str]]:
    """Prompt and response of each."""
    tokens = data.tokens()
    parts = []
    for start, length in ((index.inst_start, index.inst_len), (index.resp_start, index.resp_len)):
        spans = zip(start[examples].tolist(), length[examples].tolist(), strict=True)
        ids = [tokens[at : at + size].tolist() for at, size in spans]
        parts.append(prompt_format.tokenizer.decode_batch(ids, skip_special_tokens=True))
    return list(zip(*parts, strict=True))


class Overlaps:
    """What was found of one benchmark."""

    def __init__(self, looked: Looked, wanted: NgramSet, found: Found) -> None:
        self.looked = looked
        self._numbers = [wanted.numbers(each) for each in looked.ngrams]
        self._found = found
        hits = [int(found.is_found[each].sum()) for each in self._numbers]
        sizes = [len(each) for each in self._numbers]
        self.shares = [hit / size if size else 0.0 for hit, size in zip(hits, sizes, strict=True)]
        self.num_same = int(np.isin(looked.whole, found.prompts).sum())
        self.num_ngrams, self.num_found = sum(sizes), sum(hits)

    def source(self, index: int) -> tuple[int, int]:
        """Epoch and example in which most of an item's n-grams were found first."""
        numbers = self._numbers[index]
        numbers = numbers[self._found.is_found[numbers]]
        places = np.stack([self._found.epoch[numbers], self._found.example[numbers]])
        unique, counts = np.unique(places, axis=1, return_counts=True)
        epoch, example = unique[:, counts.argmax()]
        return int(epoch), int(example)

    def worst(self) -> list[int]:
        """Items by the share of their n-grams, then by how many these are."""
        order = sorted(
            range(len(self.shares)), key=lambda i: (-self.shares[i], -len(self._numbers[i]))
        )
        return [index for index in order[:WORST] if self.shares[index] > 0]
