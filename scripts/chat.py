"""Asks a trained model in the terminal.

    python scripts/chat.py ckpt_path=checkpoints/quickstart/nano-hrm [condition=synth,cot]
    python scripts/chat.py ckpt_path=... message="rev neon"      # one answer, and nothing else
    echo "rev neon" | python scripts/chat.py ckpt_path=...       # the same

`/help` in the chat lists its commands. Ctrl-C stops an answer, Ctrl-D ends the chat. With `message`
or a prompt on standard input the answer alone goes to standard output, all else to standard error.
Exit codes: 0, 2 for bad input, 130 for Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_io.options import fields_of, parse_options, with_option  # noqa: E402
from inference.asking import (  # noqa: E402
    AskOptions,
    Surroundings,
    Template,
    pick_condition,
    shots_text,
    step_line,
    stream_text,
    was_cut,
)
from inference.depth import depth_of  # noqa: E402
from simple_inference_engine import (  # noqa: E402
    Answer,
    InferenceEngine,
    LoadedModel,
    Request,
    load_model,
)
from training.console import refuse  # noqa: E402

TOP_TOKENS = 5
HELP = """\
  /condition NAMES      how it is answered: {conditions}
  /temperature X        0: the likeliest token; above, answers are sampled
  /top_k N  /top_p X    sampled among so many tokens, among this share of the probability
  /seed N               of sampling: the same seed, the same answer
  /max_output_tokens N  an answer has no more
  /depth K=V ...        other numbers of cycles: {depth}
  /system TEXT          text before what you write, with a blank line
  /shots FILE           JSONL of worked examples before it; /num_shots N of them
  /history on|off       send the earlier turns too; /reset forgets them
  /verbose on|off       each step with its likeliest tokens
  /help  /quit
/NAME alone shows a setting, /NAME off takes it back; // begins a message that begins with /"""
SETTINGS = (
    *("condition", "temperature", "top_k", "top_p", "seed", "max_output_tokens"),
    *("system", "shots", "num_shots", "history", "verbose"),
)


class ChatOptions(AskOptions):
    """A model, how it is asked, and what it is asked."""

    message: str = Field(default="", description="a question: its answer is printed, no chat")
    system: str = Field(default="", description="text before the question, with a blank line")
    template: Template = Field(
        default="conversation", description="how turns are written (trm: of data_io.trm_template)"
    )
    shots: Path | None = Field(
        default=None, description="JSONL of worked examples (instruction, response) before it"
    )
    num_shots: PositiveInt = Field(default=4, description="so many of them, the first ones")
    history: bool = Field(default=False, description="earlier turns are sent with each question")
    verbose: bool = Field(default=False, description="each step with its likeliest tokens")


class Depth(BaseModel):
    """What /depth takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    H_cycles: PositiveInt | None = None
    L_cycles: PositiveInt | None = None
    cycles: PositiveInt | None = None


@dataclass
class Chat:
    """A model, how it is asked now, and what was said so far."""

    loaded: LoadedModel
    options: ChatOptions
    say: Callable[[str], None]  # lines about the answer
    turns: tuple[tuple[str, str], ...] = ()
    surroundings: Surroundings = field(init=False)
    engine: InferenceEngine = field(init=False)  # of `loaded`, or the same at another depth

    def __post_init__(self) -> None:
        self.surroundings = surroundings_of(self.loaded, self.options)
        self.engine = self.loaded.engine

    def request(self, text: str) -> Request:
        turns = self.turns if self.options.history else ()
        prompt_format = self.loaded.prompt_format
        return Request(
            replace(self.surroundings, turns=turns).encode(prompt_format, text),
            self.options.max_output_tokens,
            self.options.sampling,
            frozenset({prompt_format.eoa_id}),
            TOP_TOKENS if self.options.verbose else 0,
        )

    def answer(self, text: str, show: Callable[[str], None]) -> None:
        """Streams an answer to `show`; with `verbose` its steps are said, then it is shown."""
        prompt_format, whole, num_steps = self.loaded.prompt_format, "", 0
        for piece, event in stream_text(self.engine, self.request(text), prompt_format):
            whole += piece
            if not self.options.verbose:
                show(piece)
            if isinstance(event, Answer):
                if self.options.verbose:
                    if event.stopped_by is not None:
                        self.say(step_line(prompt_format, num_steps + 1, event.stopped_by))
                    show(whole)
                note = was_cut(event, self.options.max_output_tokens)
                show("\n")
                if note:
                    self.say(f"({note})")
            elif self.options.verbose:
                num_steps += 1
                self.say(step_line(prompt_format, num_steps, event))
        self.turns = (*self.turns, ("user", text), ("assistant", whole))

    def command(self, line: str) -> bool:
        """Does what a line that begins with / says; False ends the chat."""
        name, _, value = line[1:].partition(" ")
        value = value.strip()
        if name == "quit":
            return False
        if name == "help":
            known = ", ".join(self.loaded.prompt_format.conditions)
            self.say(HELP.format(conditions=known, depth=self._depth()))
        elif name == "reset":
            self.turns = ()
            self.say("earlier turns are forgotten")
        elif name == "depth":
            self._set_depth(value)
            self.say(f"depth: {self._depth()}")
        elif name in SETTINGS:
            if value:
                self._set(name, value)
            shown = self.surroundings.condition if name == "condition" else None
            self.say(f"{name}: {shown or getattr(self.options, name)}")
        else:
            raise ValueError(f"no command is called /{name}; /help lists them")
        return True

    def _set(self, name: str, value: str) -> None:
        """Changes a setting, by the name and in the spelling of the command line."""
        known = fields_of(ChatOptions)[name]
        if value == "off" and known.annotation is not bool:
            options = self.options.model_copy(update={name: known.get_default()})
        else:
            options = with_option(self.options, name, value)
        self.surroundings, self.options = surroundings_of(self.loaded, options), options

    def _set_depth(self, value: str) -> None:
        """Runs the same weights with other numbers of cycles, as `H_cycles=3 L_cycles=2` says."""
        if value == "off":
            self.engine = self.loaded.engine
        elif value:
            depth, knobs = Depth(), depth_of(self.engine.model.config)
            for key, _, number in (word.partition("=") for word in value.split()):
                if key not in Depth.model_fields:
                    known = f"depth is set by {', '.join(knobs)}" if knobs else "depth is fixed"
                    raise ValueError(f"unknown option {key!r}; this net's {known}")
                depth = with_option(depth, key, number)
            self.engine = self.engine.at_depth(**depth.model_dump())

    def _depth(self) -> str:
        knobs = depth_of(self.engine.model.config)
        return " ".join(f"{name}={value}" for name, value in knobs.items()) or "fixed in this net"


def surroundings_of(loaded: LoadedModel, options: ChatOptions) -> Surroundings:
    """What the options put around a question."""
    shots = "" if options.shots is None else shots_text(options.shots, options.num_shots)
    condition = pick_condition(loaded.prompt_format, options.condition)
    return Surroundings(condition, options.system, shots, template=options.template)


def main() -> None:
    """Command line."""
    try:
        options = parse_options(ChatOptions, sys.argv[1:], __doc__ or "")
        question = question_of(options)
        loaded = load_model(options)
        if question is None:
            print(loaded.description)
            converse(Chat(loaded, options, print))
        else:
            tell(loaded.description)
            Chat(loaded, options, tell).answer(question, show)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # whoever reads the answer has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def question_of(options: ChatOptions) -> str | None:
    """The one question of this command; None where there is to be a chat."""
    if "message" in options.model_fields_set:
        question = options.message
    elif sys.stdin.isatty():
        return None
    else:
        try:
            question = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is no UTF-8 text: {error}") from None
    if not question.strip():
        raise ValueError('there is no question; write message="..." or pipe one in')
    return question


def converse(chat: Chat) -> None:
    """Reads lines and answers them, until /quit or Ctrl-D."""
    with suppress(ImportError):  # editing and a history of lines, where the system has them
        importlib.import_module("readline")
    print(
        f"condition {chat.surroundings.condition}; "
        + (
            "earlier turns are sent along (/history off)"
            if chat.options.history
            else "each message stands alone (/history on sends the earlier turns too)"
        )
        + "; /help lists commands, Ctrl-D ends"
    )
    while True:
        try:
            line = input("\n> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            print()
            return
        try:
            if line.startswith("/") and not line.startswith("//"):
                if not chat.command(line):
                    return
            elif line:
                chat.answer(line.removeprefix("/"), lambda piece: show(visible(piece)))
        except (ValueError, OSError) as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("\n(stopped)")


def visible(text: str) -> str:
    """Text for a terminal: control characters, which could steer it, are spelled out."""
    return re.sub(r"[^\n\t -~\xa0-\U0010ffff]", lambda match: repr(match[0])[1:-1], text)


def show(piece: str) -> None:
    """A piece of an answer."""
    print(piece, end="", flush=True)


def tell(line: str) -> None:
    """A line beside the answer."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
