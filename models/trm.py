"""TRM: HRM's order of updates with one stack for both levels (Tiny Recursive Model, 2510.04871)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from models.hrm import two_level_applications
from models.transformer import Application, NetConfig, StackConfig


class TRMConfig(NetConfig):
    """`trm_match_recurrence` is the same net, cycled like the HRM that it is compared with."""

    name: Literal["trm", "trm_match_recurrence"] = "trm"
    H_cycles: PositiveInt
    L_cycles: PositiveInt
    H_bp_steps: NonNegativeInt  # the last calls in the role of H that carry gradient
    L_bp_steps: NonNegativeInt  # the same in the role of L

    @model_validator(mode="after")
    def _check_gradient_calls(self) -> TRMConfig:
        H_calls, L_calls = self.H_cycles, self.H_cycles * self.L_cycles
        if self.H_bp_steps > H_calls or self.L_bp_steps > L_calls:
            raise ValueError(
                f"H_bp_steps={self.H_bp_steps}, L_bp_steps={self.L_bp_steps} exceed the "
                f"{H_calls} and {L_calls} calls that H_cycles={self.H_cycles} and "
                f"L_cycles={self.L_cycles} make; lower them to at most that"
            )
        return self

    def stacks(self) -> Mapping[str, StackConfig]:
        return {"L_module": self.stack_config()}

    def applications(self, backprop_steps: int | None = None) -> Iterator[Application]:
        return two_level_applications(
            ("L_module", "L_module"),
            (self.H_cycles, self.L_cycles),
            (self.H_bp_steps, self.L_bp_steps),
        )
