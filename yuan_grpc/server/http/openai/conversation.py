"""The messages of a conversation in OpenAI's format."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from yuan_grpc.server.core.limits import MAX_MESSAGES
from yuan_grpc.server.core.validation import reject, validate_messages
from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.http.json_body import pop_bool
from yuan_grpc.v1 import yuan_pb2 as pb

_ROLES = {"developer": "system"}
"""OpenAI roles and the roles they map to here."""


@dataclass(frozen=True)
class Conversation:
    """The messages that have text.

    Attributes:
        continued: the beginning of the answer to generate, which was the last message; None for a new answer.
    """

    messages: Sequence[pb.Message]
    continued: str | None = None

    def text(self, engine: Engine) -> str:
        """Return the conversation in the model's format, with the beginning of the answer.

        Raises:
            InvalidRequestError: the messages before it are not a conversation.
        """
        validate_messages(self.messages)
        return engine.apply_chat_template([message.content for message in self.messages]) + (self.continued or "")


def pop_conversation(fields: dict[str, Any]) -> Conversation:
    """Remove the fields of a conversation, and return it. Messages without text are skipped.

    Raises:
        InvalidRequestError: a message is malformed, or there is none with text.
    """
    messages = [message for message in _messages(fields.pop("messages", None)) if message.content]
    is_continued = pop_bool(fields, "continue_final_message")
    if pop_bool(fields, "add_generation_prompt", default=not is_continued) == is_continued:
        reject("add_generation_prompt", f"`add_generation_prompt` must be absent or {str(not is_continued).lower()}")
    if not messages:
        reject("messages", "`messages` must have at least one message with text")
    if not is_continued:
        return Conversation(messages)
    *before, last = messages
    if last.role != "assistant":
        field = "continue_final_message"
        reject(field, f"`{field}` must be absent if the last message with text is not the assistant's")
    if not before:
        reject("messages", "`messages` must have a message before the one to continue")
    return Conversation(before, last.content.removeprefix(" "))  # tokenization adds the space that answers begin with


def _messages(messages: Any) -> list[pb.Message]:
    if not messages or not isinstance(messages, list):
        reject("messages", "`messages` must be a list of at least one message")
    if len(messages) > MAX_MESSAGES:
        reject("messages", f"`messages` must have at most {MAX_MESSAGES} messages, not {len(messages)}")
    return [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _message(field: str, message: Any) -> pb.Message:
    if not isinstance(message, dict) or not isinstance(role := message.get("role"), str):
        reject(field, f"`{field}` must be an object with a `role`")
    for name in ("tool_calls", "function_call", "audio", "tool_call_id"):
        if message.get(name):
            reject(f"{field}.{name}", f"`{field}.{name}` must be absent: it is not supported here")
    return pb.Message(role=_ROLES.get(role, role), content=_content(f"{field}.content", message.get("content")))


def _content(field: str, content: Any) -> str:
    """Return the content's text; none for null. Like vLLM, join several parts with line breaks."""
    if content is None:
        return ""
    parts = [content] if isinstance(content, str) else content
    if not isinstance(parts, list):
        reject(field, f"`{field}` must be a string, or a list of text parts")
    return "\n".join(_part_text(f"{field}[{index}]", part) for index, part in enumerate(parts))


def _part_text(field: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        reject(field, f"`{field}` must be a part of type text")
    return text
