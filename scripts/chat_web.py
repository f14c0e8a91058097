"""Asks a trained model in the browser, and shows how its answer changes from cycle to cycle.

    pip install -r requirements-chat.txt
    python scripts/chat_web.py ckpt_path=checkpoints/quickstart/nano-hrm [port=7860 host=127.0.0.1]

Nothing is sent anywhere unless share=true asks for a public address. Exit codes: 0, 2 for bad
input, 130 for Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Any

from pydantic import Field

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_io.options import parse_options  # noqa: E402
from inference.asking import (  # noqa: E402
    AskOptions,
    Surroundings,
    pick_condition,
    stream_text,
    was_cut,
)
from inference.cycle_view import MEANING, STYLE, TITLE, CycleTable, cycles_html  # noqa: E402
from inference.depth import depth_of  # noqa: E402
from simple_inference_engine import (  # noqa: E402
    Answer,
    InferenceEngine,
    LoadedModel,
    Request,
    Sampling,
    load_model,
)
from training.console import refuse  # noqa: E402

INSTALL = "python -m pip install -r requirements-chat.txt"
DEEPEST = 4  # the sliders of the depth reach so many times the cycles that were trained
PAGE_STYLE = (ROOT / "scripts" / "chat_web.css").read_text(encoding="utf-8")
EMPTY = f"""<div class="cycles"><h3>{TITLE}</h3><p class="why">{MEANING}</p>
<p class="note">Ask something: the states behind the answer will be here.</p></div>"""

# On the reader's machine: none is fetched.
FONTS: dict[str, Any] = {
    "font": ["system-ui", "sans-serif"],
    "font_mono": ["ui-monospace", "monospace"],
}
Messages = list[dict[str, Any]]  # as gradio has them: role and content


class WebOptions(AskOptions):
    """A model, how it is asked at first, and where the page is."""

    host: str = Field(default="127.0.0.1", description="address to listen at (0.0.0.0: all)")
    port: int = Field(default=7860, ge=0, le=65535, description="port to listen at (0: any free)")
    share: bool = Field(default=False, description="a public address through gradio's servers")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the controls of the page say."""

    condition: str
    sampling: Sampling
    max_output_tokens: int | None
    with_history: bool
    depth: dict[str, int]  # cycles by the names of the net's configuration


@dataclass(frozen=True, slots=True)
class Shown:
    """The page while an answer comes: its text so far, a line about it, the cycles once known."""

    text: str
    note: str
    cycles: str | None = None


def engine_at(engine: InferenceEngine, depth: dict[str, int]) -> InferenceEngine:
    """The same weights with other numbers of cycles."""
    return engine if depth == depth_of(engine.model.config) else engine.at_depth(**depth)


def respond(
    loaded: LoadedModel, settings: Settings, text: str, turns: Sequence[tuple[str, str]]
) -> Iterator[Shown]:
    """Answers `text` piece by piece; at the end the cycles of the answer. ValueError: bad input."""
    if not text.strip():
        raise ValueError("there is no question; write one")
    prompt_format = loaded.prompt_format
    condition = pick_condition(prompt_format, settings.condition)
    earlier = tuple(turns) if settings.with_history else ()
    prompt_ids = Surroundings(condition, turns=earlier).encode(prompt_format, text)
    engine = engine_at(loaded.engine, settings.depth)
    stop_ids = frozenset({prompt_format.eoa_id})
    request = Request(prompt_ids, settings.max_output_tokens, settings.sampling, stop_ids)
    whole = ""
    for piece, event in stream_text(engine, request, prompt_format):
        whole += piece
        if not isinstance(event, Answer):
            yield Shown(whole, "")
            continue
        ended = [prompt_format.eoa_id] if event.finish_reason == "stop" else []
        note = was_cut(event, settings.max_output_tokens) or f"{len(event.token_ids):,} tokens"
        answer_ids = [*event.token_ids, *ended]
        if not answer_ids:
            yield Shown(whole, note)
            return
        inspection = engine.inspect_ids(prompt_ids, answer_ids)
        yield Shown(whole, note, cycles_html(CycleTable.of(inspection, prompt_format)))


def message(role: str, text: str) -> dict[str, str]:
    """A message for the page, which would take tags in it for its own."""
    return {"role": role, "content": escape(text)}


def turns_of(messages: Messages) -> list[tuple[str, str]]:
    """The (role, text) turns of a conversation as the page gives it back, contents in parts."""
    turns = []
    for each in messages:
        content = each["content"]
        parts = content if isinstance(content, list) else [content]
        texts = (part if isinstance(part, str) else str(part.get("text", "")) for part in parts)
        turns.append((each["role"], unescape("".join(texts))))
    return turns


def settings_of(options: WebOptions, knobs: Sequence[str], values: Sequence[Any]) -> Settings:
    """What the controls say, in their order on the page."""
    condition, seed, temperature, top_p, *cycles, with_history = values
    return Settings(
        ",".join(condition),
        Sampling(float(temperature), options.top_k, float(top_p), int(seed or 0)),
        options.max_output_tokens,
        bool(with_history),
        dict(zip(knobs, map(int, cycles), strict=True)),
    )


def build_page(gradio: Any, loaded: LoadedModel, options: WebOptions) -> Any:
    """The page and what its controls do, as gradio Blocks."""
    knobs = depth_of(loaded.engine.model.config)

    def ask(text: str, messages: Messages, *values: Any) -> Iterator[tuple[Any, ...]]:
        try:
            settings = settings_of(options, list(knobs), values)
            for shown in respond(loaded, settings, text, turns_of(messages)):
                said = [*messages, message("user", text), message("assistant", shown.text)]
                yield said, "", shown.note, shown.cycles or gradio.skip()
        except ValueError as error:
            gradio.Warning(str(error))
            yield messages, text, f"error: {error}", gradio.skip()

    with gradio.Blocks(title="Ask the model", analytics_enabled=False) as page:
        gradio.HTML(f"<h1>Ask the model</h1><p>{escape(loaded.description)}</p>", elem_id="title")
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=4, min_width=380):
                chatbot, box, send, stop, clear, note = _conversation(gradio)
                controls = _controls(gradio, loaded, options)
            with gradio.Column(scale=6, min_width=480):
                cycles = gradio.HTML(EMPTY, elem_id="cycles", container=False)
        shown = [chatbot, box, note, cycles]
        asking = gradio.on(
            [box.submit, send.click],
            ask,
            [box, chatbot, *controls],
            shown,
            api_name="ask",
            show_progress="hidden",
        )
        stop.click(None, cancels=[asking], api_visibility="private")
        clear.click(
            lambda: ([], "", "", EMPTY), None, shown, cancels=[asking], api_visibility="private"
        )
    return page


def _conversation(gradio: Any) -> tuple[Any, ...]:
    """The messages, the box to write in, and its buttons."""
    chatbot = gradio.Chatbot(
        height=300,
        show_label=False,
        render_markdown=False,  # what the model says is shown as it is
        latex_delimiters=[],
        buttons=[],
        placeholder="What would you like to ask?",
        elem_id="chat",
    )
    box = gradio.Textbox(
        placeholder="A prompt; Shift-Enter begins another line",
        show_label=False,
        container=False,
        autofocus=True,
        lines=1,
        max_lines=6,
    )
    with gradio.Row():
        send = gradio.Button("Ask", variant="primary", min_width=70)
        stop = gradio.Button("Stop", min_width=70)
        clear = gradio.Button("Clear", min_width=70)
    note = gradio.Markdown("", elem_id="note")
    return chatbot, box, send, stop, clear, note


def _controls(gradio: Any, loaded: LoadedModel, options: WebOptions) -> list[Any]:
    """Condition, sampling, history, and a slider for each number of cycles."""
    names = list(loaded.prompt_format.conditions)
    chosen = pick_condition(loaded.prompt_format, options.condition).split(",")
    slider: dict[str, Any] = {"min_width": 120, "buttons": []}
    with gradio.Column(elem_id="controls"):
        with gradio.Row():
            condition = gradio.Dropdown(
                names, value=chosen, multiselect=True, label="Condition", scale=3
            )
            seed = gradio.Number(options.seed, precision=0, label="Seed", scale=1, min_width=80)
        with gradio.Row():
            temperature = gradio.Slider(
                0, 2, options.temperature, step=0.05, label="Temperature", **slider
            )
            top_p = gradio.Slider(0.05, 1, options.top_p, step=0.05, label="Top-p", **slider)
        with gradio.Row():
            cycles = [
                gradio.Slider(
                    1, max(8, DEEPEST * value), value, step=1, label=f"{name} ({value})", **slider
                )
                for name, value in depth_of(loaded.engine.model.config).items()
            ]
        with_history = gradio.Checkbox(False, label="Send the earlier turns too")
    return [condition, seed, temperature, top_p, *cycles, with_history]


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0; ValueError where the page cannot listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as listening:
            return int(listening.getsockname()[1])
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise ValueError(
            f"host={host} port={port}: {reason}; give another port (0: any free one), or another "
            "host"
        ) from None


def main() -> None:
    """Command line."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
    try:
        options = parse_options(WebOptions, sys.argv[1:], __doc__ or "")
        try:
            gradio = importlib.import_module("gradio")
        except ImportError as error:
            raise ValueError(
                f"the page needs gradio ({error}); install it with {INSTALL}"
            ) from None
        port = free_port(options.host, options.port)
        loaded = load_model(options)
        print(loaded.description, flush=True)
        page = build_page(gradio, loaded, options)
        _, address, public = page.launch(
            server_name=options.host,
            server_port=port,
            share=options.share,
            theme=gradio.themes.Soft(neutral_hue="slate", **FONTS),
            css=PAGE_STYLE + STYLE,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"open {public or address} (Ctrl-C ends)", flush=True)
        threading.Event().wait()
    except (ValueError, OSError) as error:
        refuse(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
