"""Calls of tools and reasoning in answers, whatever pieces they come in."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("pydantic")

from hypothesis import given
from hypothesis import strategies as st

from ortlm.runtime.generation.stream import Step
from ortlm.runtime.text.tokenizer import Tokenizer
from ortlm.server.answer import AnswerParts
from ortlm.server.tools import ToolFormat, find
from tests.runtime import tiny

HERMES = ToolFormat("<tool_call>", "</tool_call>")
MISTRAL = ToolFormat("[TOOL_CALLS]", "", several=True)
PHI = ToolFormat("<|tool_call|>", "<|/tool_call|>", several=True)
LLAMA = ToolFormat("", "", arguments="parameters")
ONE = '{"name": "f", "arguments": {"a": 1}}'


@pytest.mark.parametrize(
    ("form", "text", "before", "names"),
    [
        (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", "", ["f"]),
        (HERMES, f"So: <tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>", "So:", ["f", "f"]),
        (MISTRAL, f"[TOOL_CALLS][{ONE}, {ONE}]", "", ["f", "f"]),
        (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": 1}', "", ["f"]),
        (MISTRAL, '[TOOL_CALLS]f{"a": 1}', "", ["f"]),
        (PHI, f"<|tool_call|>[{ONE}]<|/tool_call|>", "", ["f"]),
        (LLAMA, '{"name": "f", "parameters": {"a": 1}}', "", ["f"]),
    ],
)
def test_calls_are_found(form: ToolFormat, text: str, before: str, names: list[str]) -> None:
    found = find(form, text)
    assert found is not None
    assert found[0] == before
    assert [call.name for call in found[1]] == names
    assert all(json.loads(call.arguments) == {"a": 1} for call in found[1])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, "nothing"),
        (HERMES, "<tool_call>{broken</tool_call>"),
        (HERMES, "<tool_call>" + "[" * 100_000),
        (MISTRAL, "[TOOL_CALLS]"),
        (LLAMA, '{"other": 1}'),
        (LLAMA, "[1, 2]"),
    ],
)
def test_what_is_no_call_is_text(form: ToolFormat, text: str) -> None:
    assert find(form, text) is None


@pytest.mark.parametrize(
    ("form", "text", "after"),
    [
        (HERMES, f"<tool_call>{ONE}</tool_call>\nI will wait.", "I will wait."),
        (HERMES, f'<tool_call>{ONE}</tool_call><tool_call>{{"na', '<tool_call>{"na'),
        (LLAMA, f"{ONE} So be it.", "So be it."),
    ],
)
def test_what_follows_a_call_is_not_lost(form: ToolFormat, text: str, after: str) -> None:
    found = find(form, text)
    assert found is not None
    assert (len(found[1]), found[2]) == (1, after)


def test_calls_without_marks_may_be_several() -> None:
    found = find(LLAMA, f"{ONE}; {ONE}")
    assert found is not None
    assert [call.name for call in found[1]] == ["f", "f"]


@pytest.mark.parametrize(("name", "calls"), [("f", 1), ("Ada", 0)])
def test_json_that_names_no_tool_is_content(tokenizer: Tokenizer, name: str, calls: int) -> None:
    parts = AnswerParts(tokenizer, tools=LLAMA, thinks=False, names={"f"})
    text = json.dumps({"name": name, "age": 36})
    delta = parts.push(Step(text, 5, "stop"))
    assert (len(delta.calls), delta.content) == (calls, "" if calls else text)


def test_a_mark_counts_even_if_text_comes_with_it(tokenizer: Tokenizer) -> None:
    """Such as the end of a character that never came."""
    (mark,) = sorted(tokenizer.special_ids)[:1]
    parts = AnswerParts(tokenizer, tools=None, thinks=True, begun=True)
    parts._marks = {mark: "</think>"}
    delta = parts.push(Step("\ufffd", mark))
    assert (delta.reasoning, parts.push(Step("yes", 5, "stop")).content) == ("\ufffd", "yes")


@pytest.mark.parametrize(
    ("pieces", "begun", "count"),
    [
        (["<th", "ink>", "a", "b", "</think>", "c"], False, 5),
        (["a", "</think>", "c"], True, 2),
        (["<think>a</think>c"], False, 1),
        (["c", "d"], False, 0),
        ([" ", "<thing>"], False, 0),
    ],
)
def test_tokens_of_reasoning_are_counted(
    tokenizer: Tokenizer, pieces: list[str], begun: bool, count: int
) -> None:
    parts = AnswerParts(tokenizer, tools=None, thinks=True, begun=begun)
    for piece in pieces:
        parts.push(Step(piece, 5))
    assert parts.reasoning_tokens == count


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.save(folder, tiny.byte_level())
    return Tokenizer.open(folder)


@given(data=st.data())
def test_pieces_make_no_difference(tokenizer: Tokenizer, data: st.DataObject) -> None:
    reasoning = data.draw(st.sampled_from(["", "let me <thi see </th", "x"]))
    content = data.draw(st.sampled_from(["", "a < b <tool", "Sure. "]))
    called = data.draw(st.booleans())
    around = data.draw(st.sampled_from(["", "\n", "\n\n"]))
    text = (f"<think>{around}{reasoning}{around}</think>{around}" if reasoning else "") + content
    text += f"<tool_call>{ONE}</tool_call>" if called else ""
    parts = AnswerParts(tokenizer, tools=HERMES, thinks=True)
    seen, found, calls = "", "", []
    at = 0
    while at < len(text):
        size = data.draw(st.integers(1, 9))
        delta = parts.push(Step(text[at : at + size], 5))
        seen, found = seen + delta.reasoning, found + delta.content
        at += size
    delta = parts.push(Step("", 5, "stop"))
    seen, found, calls = seen + delta.reasoning, found + delta.content, delta.calls
    assert seen == reasoning
    assert found == (content.rstrip() if called else content)
    assert [call.name for call in calls] == (["f"] if called else [])
