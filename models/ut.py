"""Universal Transformer: one stack, applied a fixed number of times (arXiv 1807.03819)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator

from models.transformer import Application, NetConfig, StackConfig


class UTConfig(NetConfig):
    """z = z_L_init; `cycles` times z = L(z + x)."""

    name: Literal["ut"] = "ut"
    cycles: PositiveInt
    bp_cycles: NonNegativeInt  # the last calls that carry gradient

    @model_validator(mode="after")
    def _check_gradient_calls(self) -> UTConfig:
        if self.bp_cycles > self.cycles:
            raise ValueError(
                f"bp_cycles={self.bp_cycles} exceeds cycles={self.cycles}; "
                "at most every call carries gradient"
            )
        return self

    def stacks(self) -> Mapping[str, StackConfig]:
        return {"L_module": self.stack_config()}

    def applications(self, backprop_steps: int | None = None) -> Iterator[Application]:
        for call in range(self.cycles):
            z = "z" if call else "z_L_init"
            yield Application("L_module", (z, "x"), "z", call >= self.cycles - self.bp_cycles)
