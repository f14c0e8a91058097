"""Memory of a training step on one device, by part, at the moment when it takes most.

Goes through a step as `training.step` does, and adds up what lives at each moment: nothing is
built. Weights are counted where they are held, activations as `planning_activations` says. Not
counted: what an allocator loses between its blocks, a CUDA context, validation and benchmarks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from models.loss import CHUNK_LOGITS
from models.transformer import Application, NetConfig, StackConfig
from training.adam_atan2 import BATCH_ELEMENTS
from training.planning_activations import (
    FLOAT_BYTES,
    Kernels,
    Rows,
    kept_by_block,
    kept_by_final_norm,
    shared_bytes,
)
from training.summary import trains_embedding

PARTS = (
    *("weights", "compute copy", "gradients", "moments", "averages", "activations"),
    *("loss", "FSDP buffers", "update"),
)


@dataclass(frozen=True, slots=True)
class MemoryCase:
    """What decides on the memory of a step."""

    config: NetConfig
    vocab_size: int
    rows: Rows  # of a micro-batch
    num_micro: int
    kernels: Kernels
    shards: int = 1  # devices that share one copy of the weights
    is_wrapped: bool = False  # FSDP holds the weights: several shards, or bf16
    has_momentum: bool = True  # beta1 is not 0
    has_average: bool = True
    offloads: bool = False

    @property
    def num_parameters(self) -> int:
        return sum(elements for _, elements in parameters(self.config, self.vocab_size))

    @property
    def state_bytes(self) -> int:
        """Of moments and averages, on this device or in its host's memory."""
        kinds = 1 + self.has_momentum + self.has_average
        return FLOAT_BYTES * kinds * self.num_parameters // self.shards


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment of a step, and the bytes of each part then."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def parameters(config: NetConfig, vocab_size: int) -> Iterator[tuple[str, int]]:
    """Each weight's place and number of elements, in the order of the model's."""
    for name, stack in config.stacks().items():
        for layer in range(stack.n_layers):
            for elements in _block_weights(stack):
                yield f"{name}.{layer}", elements
    yield "embedding", vocab_size * config.hidden_size
    yield "head", vocab_size * config.hidden_size


def _block_weights(stack: StackConfig) -> tuple[int, ...]:
    width, inner = stack.hidden_size, stack.mlp_size
    return 4 * width**2, width**2, 2 * width * inner, width * inner


@dataclass(frozen=True, slots=True)
class Extent:
    """The most bytes that a part ever has: those that stay for later, those in passing."""

    lasting: int
    passing: int


def memory_moments(case: MemoryCase) -> list[Moment]:
    """The parts of a step, each at its worst moment, in order of time."""
    return [Moment(name, parts) for name, parts in _gone_through(case).moments.items()]


def extents(case: MemoryCase) -> dict[str, Extent]:
    """Of each part, whenever that is in a step."""
    step = _gone_through(case)
    return {part: Extent(step.lasting[part], step.passing[part]) for part in PARTS}


def _gone_through(case: MemoryCase) -> _Step:
    step = _Step(case)
    for number in range(min(2, case.num_micro)):  # later ones are like the second
        step.forward()
        step.loss()
        step.backward(is_last=number + 1 == min(2, case.num_micro))
    step.update()
    return step


def peak(moments: list[Moment]) -> Moment:
    """The moment that takes most."""
    return max(moments, key=lambda moment: moment.total)


class _Step:
    """What lives, from one moment to the next."""

    def __init__(self, case: MemoryCase) -> None:
        self.case = case
        self.moments: dict[str, dict[str, int]] = {}
        self.live: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
        self.lasting, self.passing = Counter[str](), Counter[str]()  # the most that there was
        self.stacks = dict(case.config.stacks())  # making the records takes its time
        self.calls = list(case.config.applications())
        self.kept = {
            name: kept_by_block(stack, case.rows, case.kernels)
            for name, stack in self.stacks.items()
        }
        self.reaches_table = trains_embedding(case.config)
        self.accumulates = False  # gradients of an earlier micro-batch are there
        self.table = case.vocab_size * case.config.hidden_size  # elements of embedding, of head
        size, total = case.kernels.element_bytes, case.num_parameters
        self.live["weights"] = FLOAT_BYTES * total // case.shards
        if not case.offloads:
            kinds = {"moments": 1 + case.has_momentum, "averages": int(case.has_average)}
            for part, count in kinds.items():
                self.live[part] = FLOAT_BYTES * count * total // case.shards
        if case.is_wrapped:
            self.live["compute copy"] = size * total
        if case.shards > 1:  # the last group that was gathered stays in its buffer
            self.live["FSDP buffers"] = size * max(
                map(sum, map(_block_weights, self.stacks.values()))
            )

    def forward(self) -> None:
        """Everything that is kept, with the states of the recurrence."""
        case, rows = self.case, self.case.rows
        kept = shared_bytes(case.config, rows, case.kernels)
        for application in self._with_gradient():
            stack, block = self.stacks[application.stack], self.kept[application.stack]
            kept += stack.n_layers * block.forward + kept_by_final_norm(stack, rows)
        self.live["activations"] = kept
        states = len({application.writes for application in self.calls}) + 1
        self.note("forward", activations=states * self._row_bytes())

    def loss(self) -> None:
        """The head, chunk by chunk, its gradient made on the way."""
        rows, size = self.case.rows, self.case.kernels.element_bytes
        vocab_size = self.case.vocab_size
        self.live["activations"] += self._row_bytes()  # the answer
        scored_rows = 2 * rows.scored * self.case.config.hidden_size * size  # and their gradient
        per_chunk = max(1, CHUNK_LOGITS // vocab_size)
        first = min(rows.scored, per_chunk)
        second = min(rows.scored - first, per_chunk)
        # Logits and their exponents; the chunk before is there until it is replaced.
        chunks = FLOAT_BYTES * vocab_size * max(2 * first, first + 2 * second)
        cast = size < FLOAT_BYTES
        product = first * vocab_size * (FLOAT_BYTES + size * cast)
        product += (size + FLOAT_BYTES * cast) * self.table
        whole = scored_rows + FLOAT_BYTES * self.table
        self.note("loss", loss=whole + max(chunks, product))
        self.live["loss"] = scored_rows // 2 + FLOAT_BYTES * self.table

    def backward(self, *, is_last: bool) -> None:
        """From the head down; activations go, gradients come."""
        case, size = self.case, self._gradient_bytes()
        scaled = self.table * (FLOAT_BYTES + (size if size < FLOAT_BYTES else 0))
        self.note("backward", loss=scaled)
        self.live["loss"] = 0
        self.live["gradients"] += size * self.table
        if self.accumulates and not case.is_wrapped:
            self.live["gradients"] -= size * self.table  # added to what is there, at once
        applications = list(self._with_gradient())
        made: set[str] = set()
        for index, application in reversed(list(enumerate(applications))):
            earlier = {each.stack for each in applications[:index]}
            is_done = application.stack not in earlier
            self._application_backward(application, made, is_last=is_last, is_done=is_done)
        if self.reaches_table:
            self.live["gradients"] += size * self.table
        self.note("backward")
        self.live["activations"] = 0
        tables = self.table * (1 + self.reaches_table)
        if not case.is_wrapped:
            if self.accumulates:
                self.live["gradients"] -= size * (tables - self.table)
        elif case.shards > 1:
            self._finish(tables, is_last=is_last)
        else:
            self._finish(self._reached(), is_last=is_last)
        self.accumulates = True

    def _application_backward(
        self, application: Application, made: set[str], *, is_last: bool, is_done: bool
    ) -> None:
        """One call of a stack; `made`: stacks whose gradients have been begun."""
        case, size = self.case, self._gradient_bytes()
        stack, kept = self.stacks[application.stack], self.kept[application.stack]
        weights = _block_weights(stack)
        width_bytes = 8 + 7 * case.kernels.element_bytes  # of the norm and what comes back to it
        self.note("backward", activations=case.rows.tokens * stack.hidden_size * width_bytes)
        self.live["activations"] -= kept_by_final_norm(stack, case.rows)
        for _ in range(stack.n_layers):
            added = 0
            if application.stack in made:
                added = size * max(weights)
            else:
                self.live["gradients"] += size * sum(weights)
            self.note("backward", activations=kept.backward, gradients=added)
            self.live["activations"] -= kept.forward
            if not is_done:
                continue
            if case.is_wrapped and case.shards > 1:
                self._finish(sum(weights), is_last=is_last)
            elif self.accumulates and not case.is_wrapped:
                self.live["gradients"] -= size * sum(weights)
        made.add(application.stack)

    def _finish(self, elements: int, *, is_last: bool) -> None:
        """A group of FSDP has its gradient: it is kept whole in fp32, or summed over ranks."""
        case, size = self.case, self._gradient_bytes()
        whole = FLOAT_BYTES * elements
        if not is_last:
            if self.accumulates:
                self.live["gradients"] -= size * elements
            else:
                self.note("backward", gradients=whole if size < FLOAT_BYTES else 0)
                self.live["gradients"] += whole - size * elements
            return
        if self.accumulates:
            self.live["gradients"] -= size * elements
        source = whole if self.accumulates else size * elements
        self.note("reduction", **{"FSDP buffers": whole})
        self.live["gradients"] += whole // case.shards - source
        self.note("reduction", **{"FSDP buffers": whole})

    def update(self) -> None:
        """Weights, gradients and state alone, and what the optimizer makes for some at a time."""
        case = self.case
        self.live.update(dict.fromkeys(("compute copy", "FSDP buffers", "loss", "activations"), 0))
        self.live["gradients"] = FLOAT_BYTES * self._reached() // case.shards
        batches = _update_batches(case)
        streamed = 0
        if case.offloads:  # the batch in use, and the next one on its way
            pairs = [sum(batches[at : at + 2]) for at in range(len(batches))]
            streamed = max(pairs) * (1 + case.has_momentum + case.has_average)
        self.note("update", update=FLOAT_BYTES * (max(batches) + streamed))
        self.live["gradients"] = 0
        self.note("saving")

    def note(self, moment: str, **more: int) -> None:
        """Keeps the moment if it is the worst one of its name; `more` lives in it alone."""
        self.lasting |= self.live
        self.passing |= Counter(more)
        parts = {part: self.live[part] + more.get(part, 0) for part in PARTS}
        if sum(parts.values()) > sum(self.moments.get(moment, {}).values()):
            self.moments[moment] = parts

    def _with_gradient(self) -> Iterator[Application]:
        return (each for each in self.calls if each.keeps_gradient)

    def _row_bytes(self) -> int:
        kernels, rows = self.case.kernels, self.case.rows
        return rows.tokens * self.case.config.hidden_size * kernels.element_bytes

    def _gradient_bytes(self) -> int:
        """Of an element of a gradient as the backward pass makes it."""
        return self.case.kernels.element_bytes if self.case.is_wrapped else FLOAT_BYTES

    def _reached(self) -> int:
        """Elements of all weights that a gradient reaches."""
        stacks = {each.stack for each in self._with_gradient()}
        inside = sum(self.stacks[name].num_parameters for name in stacks)
        return inside + self.table * (1 + self.reaches_table)


def _update_batches(case: MemoryCase) -> list[int]:
    """Elements of this device that the optimizer takes at a time; see `training.adam_atan2`."""
    batches = [0]
    for _, elements in parameters(case.config, case.vocab_size):
        local = -(-elements // case.shards)
        if batches[-1] and batches[-1] + local > BATCH_ELEMENTS:
            batches.append(0)
        batches[-1] += local
    return batches
