"""What a run says about itself before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from data_io.row_planning import RowPacking, plan_epochs
from data_io.sampled_format import SampledData
from models.flops import core_parameters, total_parameters, training_flops_per_token
from models.hrm import HRMConfig
from models.transformer import NetConfig
from models.trm import TRMConfig
from training.checkpoint import Progress
from training.schedule import check_schedule, published_total_steps
from training.schema import RunConfig


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the data and its packing say about a run, known before its first step."""

    counted_steps: int
    filled_share: float  # of all rows, the part that is no padding
    mean_keys: float  # tokens that a token sees, on average over the run's data
    vocab_size: int
    total_steps: int  # of the learning-rate and bp schedules
    published_steps: int
    num_slots: int  # S: slots for examples in a row
    epoch_ends: dict[int, int]  # last step of an epoch -> epochs done then; of those left

    @classmethod
    def of(
        cls, config: RunConfig, data: SampledData, packing: RowPacking, start: Progress
    ) -> RunFacts:
        """Facts of a run that stands at `start`, counted from the packing of what is left.

        ValueError where the run would end before its warm-up does.
        """
        plan = plan_epochs(data, packing, config.epochs, epoch=start.epoch, cursor=start.cursor)
        metadata = data.metadata
        ends = [start.step + total for total in accumulate(plan.steps)]
        counted = ends[-1] if ends else start.step
        published = published_total_steps(
            config.epochs, metadata.total_length, config.global_batch_size
        )
        named = {"counted": counted, "published": published}
        total_steps = named.get(str(config.schedule_steps), config.schedule_steps)
        assert isinstance(total_steps, int)
        check_schedule(warmup_steps=config.lr_warmup_steps, total_steps=total_steps)
        return cls(
            counted_steps=counted,
            filled_share=1 - plan.padding_share,
            mean_keys=plan.mean_keys,
            vocab_size=metadata.padded_vocab_size,
            total_steps=total_steps,
            published_steps=published,
            num_slots=plan.num_slots,
            epoch_ends={end: start.epoch + done for done, end in enumerate(ends, start=1)},
        )


def summary_lines(config: RunConfig, facts: RunFacts, choices: dict[str, str]) -> list[str]:
    """The start-up summary, one `name  value` line each."""
    arch, vocab_size = config.arch, facts.vocab_size
    total = total_parameters(arch, vocab_size)
    lines = {
        "net": f"{arch.name}, {_layers(arch)}, width {arch.hidden_size}, {arch.num_heads} heads",
        "parameters": f"{total:,} ({core_parameters(arch):,} in the stacks), "
        f"vocabulary {vocab_size:,}",
        "data": f"{config.data.path}, {facts.filled_share:.1%} of the rows filled",
        "steps": f"{facts.counted_steps:,} in {config.epochs} epochs of about "
        f"{facts.counted_steps // config.epochs:,}; schedule over {facts.total_steps:,} "
        f"({config.schedule_steps}; published estimate {facts.published_steps:,})",
        "tokens": f"{config.global_batch_size:,} a step, "
        f"{facts.counted_steps * config.global_batch_size * facts.filled_share:,.0f} in all",
        "FLOPs/token": _flops(arch, vocab_size, facts.mean_keys),
        **choices,
    }
    width = max(len(name) for name in lines)
    text = [f"{name:<{width}}  {value}" for name, value in lines.items()]
    if isinstance(arch, TRMConfig) and not trains_embedding(arch):
        text.append(
            "note: no gradient reaches the token embedding, which stays as initialised "
            "(as published; H_bp_steps=2 trains it)"
        )
    return text


def trains_embedding(config: NetConfig, backprop_steps: int | None = None) -> bool:
    """Whether a gradient flows from the answer back to the embedded tokens."""
    reaches: dict[str, bool] = {"x": True}
    answer = False
    for application in config.applications(backprop_steps):
        reads_it = any(reaches.get(name, False) for name in application.reads)
        answer = application.keeps_gradient and reads_it
        reaches[application.writes] = answer
    return answer


def _layers(config: NetConfig) -> str:
    stacks = config.stacks()
    depth = sum(stacks[application.stack].n_layers for application in config.applications())
    each = " + ".join(str(stack.n_layers) for stack in stacks.values())
    return f"{each} layers applied as {depth}"


def _flops(config: NetConfig, vocab_size: int, mean_keys: float) -> str:
    def count(steps: int | None) -> str:
        flops = training_flops_per_token(
            config, vocab_size, backprop_steps=steps, mean_keys=mean_keys
        )
        return f"{flops:.3g}"

    if not isinstance(config, HRMConfig) or config.bp_min_steps == config.bp_max_steps:
        return count(None)
    if not config.bp_warmup_ratio:
        return f"{count(config.bp_max_steps)} (bp {config.bp_max_steps})"
    return (
        f"{count(config.bp_min_steps)} (bp {config.bp_min_steps}) to "
        f"{count(config.bp_max_steps)} (bp {config.bp_max_steps})"
    )
