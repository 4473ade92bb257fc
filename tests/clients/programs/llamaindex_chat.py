"""Ask a server through LlamaIndex: python llamaindex_chat.py URL. Prints an object with an entry per matter."""

import asyncio
import json
import sys
from typing import Literal

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

QUESTION = [ChatMessage(role="user", content="What does os.path.join do?")]
machine = {
    "model": "tiny",
    "api_base": f"{sys.argv[1]}/v1",
    "api_key": "none",
    "is_chat_model": True,
    "is_function_calling_model": True,
    "context_window": 512,
    "temperature": 0,
    "max_retries": 0,
}


def weather(city: Literal["Paris", "Rome"], days: Literal[1, 2, 3]) -> str:
    """Forecast the weather."""
    return f"Sun in {city} for {days} days."


chat, longer = OpenAILike(**machine, max_tokens=12), OpenAILike(**machine, max_tokens=200)
found = {"chat": chat.chat(QUESTION).message.content}
found["stream"] = "".join(part.delta or "" for part in chat.stream_chat(QUESTION))
found["await"] = asyncio.run(chat.achat(QUESTION)).message.content
plain = OpenAILike(**{**machine, "is_chat_model": False}, max_tokens=4)
found["complete"] = plain.complete("import os").text
tool = FunctionTool.from_defaults(weather)
made = longer.chat_with_tools(
    [tool], chat_history=QUESTION, tool_required=True, allow_parallel_tool_calls=False
)
(call,) = longer.get_tool_calls_from_response(made)[:1]
result = str(tool.call(**call.tool_kwargs))
found["call"] = {"name": call.tool_name, "arguments": call.tool_kwargs, "result": result}
answer = ChatMessage(role="tool", content=result, additional_kwargs={"tool_call_id": call.tool_id})
again = chat.chat([*QUESTION, made.message, answer])
found["after"] = again.raw.choices[0].finish_reason
print(json.dumps(found))
