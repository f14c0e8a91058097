"""RINS: one stack applied again and again to its input, then a second one (arXiv 2502.07503)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from models.transformer import Application, NetConfig, StackConfig


class RINSConfig(NetConfig):
    """z = z_L_init; L_cycles times z = L(z + x); the answer is H(z)."""

    name: Literal["rins"] = "rins"
    L_cycles: PositiveInt
    L_bp_cycles: NonNegativeInt  # the last calls of L that carry gradient

    @model_validator(mode="after")
    def _check_gradient_calls(self) -> RINSConfig:
        if self.L_bp_cycles > self.L_cycles:
            raise ValueError(
                f"L_bp_cycles={self.L_bp_cycles} exceeds L_cycles={self.L_cycles}; "
                "at most every call carries gradient"
            )
        return self

    def stacks(self) -> Mapping[str, StackConfig]:
        return {"H_module": self.stack_config(), "L_module": self.stack_config()}

    def applications(self, backprop_steps: int | None = None) -> Iterator[Application]:
        for call in range(self.L_cycles):
            z = "z" if call else "z_L_init"
            keeps_gradient = call >= self.L_cycles - self.L_bp_cycles
            yield Application("L_module", (z, "x"), "z", keeps_gradient)
        yield Application("H_module", ("z",), "z", keeps_gradient=True)
