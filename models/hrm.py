"""HRM: a slow level H and a fast level L, two stacks that refine each other (arXiv 2605.20613)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from models.transformer import Application, NetConfig, StackConfig


class HRMConfig(NetConfig):
    """From z_H = x, z_L = z_L_init, H_cycles times:

        L_cycles times z_L = L(z_L + z_H), then z_H = H(z_H + z_L); the answer is z_H

    A number of gradient-carrying calls above those that exist means all of them.
    """

    name: Literal["hrm"] = "hrm"
    H_cycles: PositiveInt  # updates of the slow level per forward pass
    L_cycles: PositiveInt  # updates of the fast level per slow update
    H_override: dict[str, Any] = Field(default_factory=dict)  # stack settings of H alone
    bp_min_steps: PositiveInt = 2  # calls that carry gradient at the start of training ...
    bp_max_steps: PositiveInt = 5  # ... and once `bp_warmup_ratio` of the steps are done
    bp_warmup_ratio: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _check_levels(self) -> HRMConfig:
        unknown = set(self.H_override) - set(StackConfig.model_fields)
        if unknown:
            raise ValueError(
                f"H_override has no setting {sorted(unknown)}; it takes "
                f"{', '.join(StackConfig.model_fields)}"
            )
        width = self.stacks()["H_module"].hidden_size
        if width != self.hidden_size:
            raise ValueError(
                f"H_override.hidden_size={width} differs from hidden_size={self.hidden_size}, but "
                "the states of H and L are added; leave it out"
            )
        if self.bp_min_steps > self.bp_max_steps:
            raise ValueError(
                f"bp_min_steps={self.bp_min_steps} exceeds bp_max_steps={self.bp_max_steps}; "
                "the number of gradient-carrying calls grows from the first to the second"
            )
        return self

    def stacks(self) -> Mapping[str, StackConfig]:
        shared = self.stack_config()
        # H_override.n_layers counts layers of H itself: it is not halved.
        overridden = StackConfig(**{**shared.model_dump(), **self.H_override})
        return {"H_module": overridden, "L_module": shared}

    def applications(self, backprop_steps: int | None = None) -> Iterator[Application]:
        """The last min(H_cycles, bp - 1) calls of H carry gradient, the rest of bp falls to L."""
        steps = self.bp_max_steps if backprop_steps is None else backprop_steps
        H_steps = min(self.H_cycles, steps - 1)
        return two_level_applications(
            ("H_module", "L_module"), (self.H_cycles, self.L_cycles), (H_steps, steps - H_steps)
        )


def two_level_applications(
    stacks: tuple[str, str], cycles: tuple[int, int], gradient_calls: tuple[int, int]
) -> Iterator[Application]:
    """The order that HRM and TRM share; pairs are (H, L), the last calls carry gradient."""
    H_stack, L_stack = stacks
    H_cycles, L_cycles = cycles
    H_without = H_cycles - gradient_calls[0]
    L_without = H_cycles * L_cycles - gradient_calls[1]
    for h in range(H_cycles):
        z_H = "z_H" if h else "x"
        for call in range(L_cycles):
            z_L = "z_L" if h or call else "z_L_init"
            keeps_gradient = h * L_cycles + call >= L_without
            yield Application(L_stack, (z_L, z_H), "z_L", keeps_gradient)
        yield Application(H_stack, (z_H, "z_L"), "z_H", h >= H_without)
