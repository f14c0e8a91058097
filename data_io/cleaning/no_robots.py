"""No Robots: instructions and answers that people wrote, without reasoning: condition direct.

Of a longer chat the first exchange is taken, which needs none of the others. A system's message
stands before the question with a blank line between, as `PromptFormat` frames it.
"""

from __future__ import annotations

from data_io.cleaning.source import CleanedSource
from data_io.readers import Fields, to_record
from data_io.records import BadRowError, Conversation, Row


def clean(fields: Fields) -> Row:
    chat = to_record(fields, "messages")
    assert isinstance(chat, Conversation)  # this reader makes nothing else
    question, answer = (turn.text.strip() for turn in chat.turns[:2])
    if not question:
        raise BadRowError("empty question")
    if not answer:
        raise BadRowError("empty answer")
    system = chat.system.strip()
    return Row("direct", f"{system}\n\n{question}" if system else question, answer)


NO_ROBOTS = CleanedSource("HuggingFaceH4/no_robots", clean)
