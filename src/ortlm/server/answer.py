"""The parts of an answer: reasoning, content and calls of tools, told apart while it comes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from ortlm.runtime.generation.stream import Step
from ortlm.runtime.text.tokenizer import Tokenizer
from ortlm.server.tools import Call, ToolFormat, find, may_begin

_OPEN, _CLOSE = "<think>", "</think>"


@dataclass
class Delta:
    """What came with a step: text of the ``reasoning`` and of the ``content``; at the end the ``calls``."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)


class AnswerParts:
    """Takes the steps of one answer and gives what they add to each of its parts.

    ``tools``: calls are looked for, in this form; from where one may begin the text is held back. ``thinks``: the
    model writes its reasoning between marks; ``begun``: the prompt has opened it. ``stop_ids`` end the answer.
    ``names`` are those of the tools: where a call has no mark, JSON that names none of them is content.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tools: ToolFormat | None,
        thinks: bool,
        begun: bool = False,
        stop_ids: Collection[int] = (),
        names: Collection[str] = (),
    ) -> None:
        self._tokenizer, self._tools, self._stop_ids, self._names = tokenizer, tools, stop_ids, names
        self._mark = tokenizer.token_id(tools.begin) if tools is not None and tools.special else None
        # Of calls whose marks are special tokens.
        self._ids: list[int] = []
        self._marks = {
            tokenizer.token_id(mark): mark
            for mark in (_OPEN, _CLOSE)
            if thinks and tokenizer.token_id(mark) in tokenizer.special_ids
        }
        self._thinks = thinks
        self._state = "reasoning" if begun else "unknown" if thinks else "content"
        self._reasoned = False
        self._held = ""
        self._tail = ""
        self._is_call = False
        self.calls: list[Call] = []
        # With the marks around it.
        self.reasoning_tokens = self._unknown_tokens = 0

    def push(self, step: Step) -> Delta:
        """Return what ``step`` adds; with its finish reason everything that was held back."""
        text = step.text
        # The mark itself is no text; what the step has is the end of something before it.
        text += self._marks.get(step.token_id, "") if step.token_id is not None else ""
        delta = Delta()
        before = self._state
        self._reason(text, delta)
        if step.token_id is not None and before != "content":
            self._unknown_tokens += 1
            if self._state != "unknown":
                reasons = before == "reasoning" or self._state == "reasoning" or bool(delta.reasoning)
                self.reasoning_tokens += self._unknown_tokens if reasons else 0
                self._unknown_tokens = 0
        if self._tools is not None:
            self._look_for_calls(step, delta)
        if step.finish_reason is not None:
            self._end(delta)
        return delta

    def _reason(self, text: str, delta: Delta) -> None:
        self._held += text
        if self._state == "unknown":
            begin = self._held.lstrip()
            if begin.startswith(_OPEN):
                self._held, self._state = begin[len(_OPEN) :], "reasoning"
            elif not _OPEN.startswith(begin):
                self._state = "content"
            else:
                return
        if self._state == "reasoning":
            # Line breaks next to the marks belong to neither part.
            if not self._reasoned:
                self._held = self._held.lstrip("\n")
            before, mark, after = self._held.partition(_CLOSE)
            if mark:
                delta.reasoning += before.rstrip("\n")
                self._held, self._state = after, "closed"
            else:
                keep = next((n for n in range(len(_CLOSE) - 1, 0, -1) if before.endswith(_CLOSE[:n])), 0)
                found = before[: len(before) - keep].rstrip("\n")
                delta.reasoning += found
                self._reasoned = self._reasoned or bool(found)
                self._held = before[len(found) :]
                return
        if self._state == "closed":
            self._held = self._held.lstrip("\n")
            if not self._held:
                return
            self._state = "content"
        delta.content, self._held = self._held, ""

    def _look_for_calls(self, step: Step, delta: Delta) -> None:
        tools = self._tools
        assert tools is not None
        if tools.special:
            # The mark is no text, and neither is what else the model writes around its calls, such as line breaks.
            text = self._tail + delta.content
            delta.content = text.rstrip()
            self._tail = text[len(delta.content) :]
            if self._is_call:
                delta.content = ""
                if step.token_id is not None and step.token_id not in self._stop_ids:
                    self._ids.append(step.token_id)
            self._is_call = self._is_call or step.token_id == self._mark
            if self._is_call:
                self._tail = ""
            return
        self._tail, delta.content = self._tail + delta.content, ""
        if self._is_call:
            return
        at = may_begin(tools, self._tail)
        if at is None and not tools.begin:
            # An answer that does not begin as a call is none.
            delta.content, self._tail, self._tools = self._tail, "", None
            return
        # Line breaks in front of a call are none of the content's.
        at = len(self._tail[:at].rstrip())
        delta.content, self._tail = self._tail[:at], self._tail[at:]
        self._is_call = bool(tools.begin) and self._tail.lstrip().startswith(tools.begin)

    def _end(self, delta: Delta) -> None:
        if self._state != "content":
            # Never closed: all of it was reasoning, or the beginning of a mark that was none.
            if self._state == "reasoning":
                delta.reasoning += self._held
            else:
                delta.content += self._held
            self._held = ""
        tools, text = self._tools, self._tail
        if tools is None:
            return
        if tools.special and self._is_call:
            text = tools.begin + self._tokenizer.decode_raw(self._ids, skip_special_tokens=False)
        found = find(tools, text) if text else None
        if found is not None and not tools.begin and any(call.name not in self._names for call in found[1]):
            found = None
        if found is None:
            # No call after all, so it is content as it stands.
            delta.content += text
        else:
            before, self.calls, after = found
            # Special tokens of a call are no text, and neither is what the model writes around them.
            delta.content += before if tools.special else before + after
            delta.calls = self.calls
        self._tail = ""
