"""The columns of instruction tuning: prompts and their responses, or chats.

A row is a conversation: messages with a role and a content. The last one is the assistant's, and is the response; all
before it are the prompt. The columns `data.prompt` and `data.response` give a conversation of two messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayfed.config.task import Data
from rayfed.tasks.data.columns import column, is_unicode
from rayfed.tasks.data.table import Table

Conversation = tuple[dict[str, str], ...]


def conversations(table: Table, settings: Data) -> list[Conversation]:
    """The rows of the table. UserError for a prompt or response that is missing, blank, no string or no valid Unicode,
    or for a chat that does not end with a response."""
    if settings.messages is not None:
        name, what = settings.messages, "a chat is a list of 2 or more {role, content}, the last with role assistant"
        chats = column(table, name, "data.messages", _is_chat, what)
        return [tuple({key: message[key] for key in ("role", "content")} for message in chat) for chat in chats]
    found = []
    for field in ("prompt", "response"):
        name = getattr(settings, field)
        column(table, name, f"data.{field}", lambda text: isinstance(text, str), f"a {field} is a string")
        column(table, name, f"data.{field}", lambda text: bool(text.strip()), f"a {field} has words")
        found.append(column(table, name, f"data.{field}", is_unicode, f"a {field} is valid Unicode"))
    return [
        ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})
        for prompt, response in zip(*found, strict=True)
    ]


def _is_chat(chat: Any) -> bool:
    """Whether the value is a list of messages with role and content, the last one a response that is not blank."""
    if not isinstance(chat, list | tuple) or len(chat) < 2:
        return False
    for message in chat:
        texts = [message.get("role"), message.get("content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(text, str) and is_unicode(text) for text in texts):
            return False
    return chat[-1]["role"] == "assistant" and bool(chat[-1]["content"].strip())
