"""Scores a run on held-out data: loss, accuracies, bits per byte; by raw and by averaged weights.

Changes nothing that training depends on: it draws no random number and leaves no gradient, and
weights are bit for bit what they were. Which data, and how it is packed, is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_io.prompt_format import token_differences
from data_io.sampled_format import SampledData
from models.batch import IGNORE_LABEL, PackedBatch
from models.language_model import LanguageModel
from models.loss import StepSums, next_token_sums
from training.adam_atan2 import AdamATan2
from training.distributed import World, reshard
from training.host_state import local_part


class Validator:
    """Scores a model as it stands on one pass over held-out data.

    `batches` makes this rank's batches of a pass, on the host; as many on every rank, since a
    sharded model computes on all ranks together. `token_bytes` [V] is how many bytes of text each
    token stands for (0: a special token); with it there are bits per byte.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: AdamATan2,
        *,
        world: World,
        batches: Callable[[], Iterable[PackedBatch]],
        token_bytes: NDArray[np.int32] | None = None,
    ) -> None:
        self.model, self.optimizer, self.world = model, optimizer, world
        self.batches = batches
        self.token_bytes = None if token_bytes is None else torch.from_numpy(token_bytes)

    def scores(self, gives_way: Callable[[], bool] = lambda: False) -> dict[str, float]:
        """`val/loss`, ...; where averages are kept, theirs as `val_ema/loss`, ... too.

        `gives_way` is asked before each batch, on all ranks: once true, nothing is scored.

        Over all ranks: every rank calls it, and gets the same. Bits per byte are those of tokens
        that stand for text: the loss of these, in bits, over their bytes. Special tokens, such as
        the one that ends an answer, have neither loss nor bytes in it.
        """
        try:
            found = {f"val/{name}": value for name, value in self._pass(gives_way).items()}
            if has_averages(self.optimizer):
                with averaged_weights(self.model, self.optimizer):
                    averaged = self._pass(gives_way)
                found |= {f"val_ema/{name}": value for name, value in averaged.items()}
        except _GaveWayError:
            return {}
        return found

    @torch.no_grad()
    def _pass(self, gives_way: Callable[[], bool]) -> dict[str, float]:
        sums: list[StepSums] = []
        special_losses = [torch.zeros((), device=self.world.device)]  # of tokens without bytes
        num_bytes = 0
        try:
            for batch in self.batches():
                if gives_way():
                    raise _GaveWayError
                special_labels, batch_bytes = self._split_labels(batch.labels)
                batch = batch.to(self.world.device)
                hidden = self.model(batch.tokens, batch.positions, batch.layout)
                sums.append(self._score(hidden, batch, batch.labels, batch.num_scored))
                num_bytes += batch_bytes
                if num_special := int((special_labels != IGNORE_LABEL).sum()):
                    labels = special_labels.to(self.world.device)
                    special_losses.append(self._score(hidden, batch, labels, num_special).loss)
        finally:
            reshard(self.model)
        return self._averages(sums, special_losses, num_bytes)

    def _score(
        self, hidden: Tensor, batch: PackedBatch, labels: Tensor, num_scored: int
    ) -> StepSums:
        weight = self.model.lm_head.weight
        return next_token_sums(hidden, weight, labels, batch.layout, num_scored=num_scored)

    def _split_labels(self, labels: Tensor) -> tuple[Tensor, int]:
        """Labels [T] of which those that stand for text are ignored, and the bytes of these."""
        if self.token_bytes is None:
            return torch.full_like(labels, IGNORE_LABEL), 0
        is_scored = labels != IGNORE_LABEL
        num_bytes = self.token_bytes[labels.long().clamp(min=0)] * is_scored  # [T]
        return labels.masked_fill(num_bytes > 0, IGNORE_LABEL), int(num_bytes.sum())

    def _averages(
        self, sums: list[StepSums], special_losses: list[Tensor], num_bytes: int
    ) -> dict[str, float]:
        """Divides what all ranks have added up. # sync: here, and only here."""
        parts = [
            torch.stack([each.loss for each in sums]),
            torch.stack(special_losses),
            torch.tensor([num_bytes]),
            *(torch.stack([getattr(each, name) for each in sums]) for name in _COUNTS),
        ]
        totals = self.world.sum(torch.stack([part.cpu().double().sum() for part in parts]))
        loss, special_loss, total_bytes, *counts = totals.tolist()
        correct_tokens, tokens, correct_sequences, sequences = counts
        averages = {
            "loss": loss / max(1, tokens),
            "accuracy": correct_tokens / max(1, tokens),
            "exact_accuracy": correct_sequences / max(1, sequences),
        }
        if total_bytes:
            averages["bits_per_byte"] = (loss - special_loss) / math.log(2) / total_bytes
        return averages


class _GaveWayError(Exception):
    """A pass was ended before its end."""


_COUNTS = ("correct_tokens", "scored_tokens", "correct_sequences", "scored_sequences")


def has_averages(optimizer: AdamATan2) -> bool:
    """Whether averages of the weights (EMA) are kept."""
    return any("param_ema" in state for state in optimizer.state.values())


@contextmanager
def averaged_weights(model: LanguageModel, optimizer: AdamATan2) -> Iterator[None]:
    """Inside, the weights are their averages, where these are kept; afterwards what they were.

    Weights and averages change places, so it takes the memory of one parameter: nothing may be
    saved or trained inside.
    """
    reshard(model)  # else the parameters would be compute copies
    pairs = [
        (local_part(param.detach()), local_part(optimizer.state[param]["param_ema"]))
        for param in model.parameters()
        if "param_ema" in optimizer.state.get(param, {})
    ]
    swapped: list[tuple[Tensor, Tensor]] = []
    try:
        for pair in pairs:
            _swap(*pair)
            swapped.append(pair)
        yield
    finally:
        reshard(model)
        for pair in swapped:
            _swap(*pair)


def _swap(one: Tensor, other: Tensor) -> None:
    """Exchanges the contents of two tensors, which may lie on different devices."""
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def require_same_tokens(held_out: SampledData, data: SampledData) -> None:
    """ValueError where the ids of the held-out data mean something else than those trained on."""
    infos = [(each.metadata.tokenizer_info, each.folder) for each in (held_out, data)]
    differing = token_differences(infos[0], infos[1])
    sizes = [each.metadata.id_limit for each in (held_out, data)]
    if sizes[0] != sizes[1]:
        differing.insert(0, f"vocab_size is {sizes[0]}, {sizes[1]} there")
    if differing:
        raise ValueError(
            f"val_data.path={held_out.folder} is made with another tokenizer than {data.folder}: "
            f"{'; '.join(differing)}; make both with the same one"
        )
