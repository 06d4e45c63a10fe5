"""Which pictures an OpenAI-style conversation asks about, and where `stop` ends a caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from caption_ray.serving.errors import Refusal
from caption_ray.serving.service import MAX_PICTURES

TEXT = ("text", "input_text", "output_text", "refusal")
PICTURE = ("image_url", "input_image")
"""Types of parts of a message. A captioner takes no instructions, so it ignores text."""


def picture_urls(messages: Sequence[Any]) -> list[tuple[str, str]]:
    """Where the pictures are that the conversation is about, each with the name of its field: all
    pictures of the user's last message that has any, so that "And in one word?" is about the same.

    Raises Refusal if there are none or too many, and for parts of the last message that ask for
    what a captioner cannot do (sound, video, files).
    """
    asked = [(n, message) for n, message in enumerate(messages) if message.role == "user"]
    for number, message in reversed(asked):
        field = f"messages.{number}.content"
        parts = message.content if isinstance(message.content, list) else []
        for index, part in enumerate(parts):
            kind = part.get("type")
            if kind not in (*TEXT, *PICTURE) and number == asked[-1][0]:
                raise _refused(
                    f"{field}.{index}.type",
                    f"is {str(kind)[:100]!r}: parts may be text and image_url",
                )
        found = [_url(part, f"{field}.{n}") for n, part in enumerate(parts) if _is_picture(part)]
        if len(found) > MAX_PICTURES:
            raise _refused(field, f"has {len(found)} pictures: send at most {MAX_PICTURES}")
        if found:
            return found
    field = f"messages.{asked[-1][0]}.content" if asked else "messages"
    raise _refused(field, "has no part of type image_url, and no message before has one: the user "
                   "must send a picture")  # fmt: skip


def _is_picture(part: dict[str, Any]) -> bool:
    return part.get("type") in PICTURE


def _url(part: dict[str, Any], field: str) -> tuple[str, str]:
    holder = part.get("image_url")  # in input_image the URL itself
    url = holder.get("url") if isinstance(holder, dict) else holder
    field = f"{field}.image_url.url" if isinstance(holder, dict) else f"{field}.image_url"
    if not isinstance(url, str):
        raise _refused(field, "is missing: give a URL, or data:image/...;base64,...")
    return url, field


def _refused(field: str, why: str) -> Refusal:
    return Refusal(400, "validation", f"{field} {why}", field=field)


class UpToStop:
    """Lets text through up to the first of some sequences, piece by piece."""

    def __init__(self, sequences: Sequence[str]) -> None:
        self.sequences = [sequence for sequence in sequences if sequence]
        self.stopped = False
        self._held = ""

    def feed(self, text: str) -> str:
        """What is certain to come before any of the sequences."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for sequence in self.sequences if (at := text.find(sequence)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        # the beginning of a sequence, which the next piece may complete
        beginnings = (sequence[:n] for sequence in self.sequences for n in range(1, len(sequence)))
        held = max((len(begun) for begun in beginnings if text.endswith(begun)), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, at the end of the text."""
        return self._held
