"""Adam-atan2 (arXiv 2407.05872) with an exponential moving average of the weights.

Scale-free: multiplying all gradients by a constant changes nothing, so no clipping is needed and
gradients may be summed over ranks. Works on local shards, batched over parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from training.host_state import State, copy_on, local_part, streamed

BATCH_ELEMENTS = 1 << 26  # parameters updated at a time: bounds the temporaries (256 MiB in fp32)


class UpdateWatch(Protocol):
    """Looks on while weights are updated, some parameters at a time."""

    def add(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        before: Sequence[Tensor],
        after: Sequence[Tensor],
    ) -> None:
        """This rank's parts of gradients, and of weights before and after the step."""
        ...


class AdamATan2(torch.optim.Optimizer):
    """Per parameter with a gradient, at its own step t from 1:

        p *= 1 - lr * weight_decay;  m = lerp(m, g, 1 - beta1);  v = beta2 v + (1 - beta2) g^2
        p -= lr / (1 - beta1^t) * atan2(m, sqrt(v / (1 - beta2^t)));  ema = lerp(ema, p, 1 - decay)

    Parameters without a gradient are skipped whole: no decay, no average, no step. State per
    parameter: `exp_avg` (absent when beta1 is 0), `exp_avg_sq`, `param_ema` (absent when `ema` is
    None), `step` (fp32 scalar on CPU). It exists from the start, so that it can be loaded. With a
    `state_device` it lies there, and visits the device of the weights for each update.
    While `watch` is set, it sees every update; weights are copied for it, a batch at a time.
    """

    watch: UpdateWatch | None = None

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        ema: float | None = None,
        state_device: torch.device | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "ema": ema}
        super().__init__(params, defaults)
        self._state_device = state_device
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = _initial_state(param, group, state_device or param.device)

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of the next step."""
        for group in self.param_groups:
            group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient; at least one must have one."""
        updated = 0
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            updated += len(params)
            batches = list(self._batches(params))
            for batch, states in zip(batches, self._states(batches), strict=True):
                self._update(batch, states, group)
        # FSDP leaves gradients on unsharded copies unless it is told to reshard: none is a bug.
        assert updated, "no parameter has a gradient; was reshard() called after the backward pass?"

    def _batches(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters that have taken the same number of steps, not too many at a time."""
        by_step: dict[float, list[Tensor]] = {}
        for param in params:
            by_step.setdefault(self.state[param]["step"].item(), []).append(param)
        for same_step in by_step.values():
            batch: list[Tensor] = []
            for param in same_step:
                if batch and sum(p.numel() for p in batch) + param.numel() > BATCH_ELEMENTS:
                    yield batch
                    batch = []
                batch.append(param)
            yield batch

    def _states(self, batches: list[list[Tensor]]) -> Iterator[list[State]]:
        """This rank's part of the state of each batch, where its weights are; without `step`."""
        states = [[_vectors(self.state[param]) for param in batch] for batch in batches]
        if self._state_device is None or not batches:
            return iter(states)
        return streamed(states, batches[0][0].device)

    def _update(self, params: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
        for param in params:
            self.state[param]["step"] += 1
        step = int(self.state[params[0]]["step"].item())
        beta1, beta2 = group["betas"]
        weights = [local_part(param) for param in params]
        grads = [local_part(param.grad) for param in params]
        variances = [state["exp_avg_sq"] for state in states]
        before = [weight.clone() for weight in weights] if self.watch else []
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        means = grads
        if beta1:
            means = [state["exp_avg"] for state in states]
            torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(variances, beta2)
        torch._foreach_addcmul_(variances, grads, grads, 1 - beta2)
        updates = torch._foreach_sqrt(variances)
        torch._foreach_div_(updates, (1 - beta2**step) ** 0.5)
        for mean, update in zip(means, updates, strict=True):
            torch.atan2(mean, update, out=update)
        torch._foreach_add_(weights, updates, alpha=-group["lr"] / (1 - beta1**step))
        if self.watch:
            self.watch.add(params, grads, before, weights)
        if group["ema"] is not None:
            averages = [state["param_ema"] for state in states]
            torch._foreach_lerp_(averages, weights, 1 - group["ema"])


def _initial_state(param: Tensor, group: dict[str, Any], device: torch.device) -> State:
    state = {"step": torch.zeros((), dtype=torch.float32)}
    kinds = ("exp_avg",) * bool(group["betas"][0]) + ("exp_avg_sq",)
    for kind in kinds:
        state[kind] = copy_on(param, device).zero_()
    if group["ema"] is not None:
        state["param_ema"] = copy_on(param, device)
    return state


def _vectors(state: State) -> State:
    return {kind: local_part(tensor) for kind, tensor in state.items() if kind != "step"}
