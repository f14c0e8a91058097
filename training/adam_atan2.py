"""Adam-atan2 (arXiv 2407.05872) with an exponential moving average of the weights.

Scale-free: multiplying all gradients by a constant changes nothing, so no clipping is needed and
gradients may be summed over ranks. Works on local shards, batched over parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

BATCH_ELEMENTS = 1 << 26  # parameters updated at a time: bounds the temporaries (256 MiB in fp32)


class AdamATan2(torch.optim.Optimizer):
    """Per parameter with a gradient, at its own step t from 1:

        p *= 1 - lr * weight_decay;  m = lerp(m, g, 1 - beta1);  v = beta2 v + (1 - beta2) g^2
        p -= lr / (1 - beta1^t) * atan2(m, sqrt(v / (1 - beta2^t)));  ema = lerp(ema, p, 1 - decay)

    Parameters without a gradient are skipped whole: no decay, no average, no step. State per
    parameter: `exp_avg` (absent when beta1 is 0), `exp_avg_sq`, `param_ema` (absent when `ema` is
    None), `step` (fp32 scalar on CPU). It exists from the start, so that it can be loaded.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        ema: float | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "ema": ema}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = _initial_state(param, group)

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
            for batch in self._batches(params):
                self._update(batch, group)
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

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[param] for param in params]
        for state in states:
            state["step"] += 1
        step = int(states[0]["step"].item())
        beta1, beta2 = group["betas"]
        weights = [_local(param) for param in params]
        grads = [_local(param.grad) for param in params]
        variances = [_local(state["exp_avg_sq"]) for state in states]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        means = grads
        if beta1:
            means = [_local(state["exp_avg"]) for state in states]
            torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(variances, beta2)
        torch._foreach_addcmul_(variances, grads, grads, 1 - beta2)
        updates = torch._foreach_sqrt(variances)
        torch._foreach_div_(updates, (1 - beta2**step) ** 0.5)
        for mean, update in zip(means, updates, strict=True):
            torch.atan2(mean, update, out=update)
        torch._foreach_add_(weights, updates, alpha=-group["lr"] / (1 - beta1**step))
        if group["ema"] is not None:
            averages = [_local(state["param_ema"]) for state in states]
            torch._foreach_lerp_(averages, weights, 1 - group["ema"])


def _initial_state(param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    state = {"step": torch.zeros((), dtype=torch.float32)}
    if group["betas"][0]:
        state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    if group["ema"] is not None:
        state["param_ema"] = param.detach().clone()
    return state


def _local(tensor: Tensor | None) -> Tensor:
    """This rank's shard: DTensor arithmetic is slower and leaks (torchtitan#3790)."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
