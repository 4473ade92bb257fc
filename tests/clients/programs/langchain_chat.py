"""Ask a server through LangChain: python langchain_chat.py URL. Prints an object with an entry per matter."""

import asyncio
import json
import sys
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

QUESTION = "What does os.path.join do?"
machine = {"base_url": f"{sys.argv[1]}/v1", "api_key": "none", "model": "tiny", "max_retries": 0}


@tool
def weather(city: Literal["Paris", "Rome"], days: Literal[1, 2, 3]) -> str:
    """Forecast the weather."""
    return f"Sun in {city} for {days} days."


class Thing(BaseModel):
    """A thing."""

    count: int = Field(ge=0, le=99)
    new: bool


chat = ChatOpenAI(**machine, temperature=0, max_tokens=12)
longer = ChatOpenAI(**machine, temperature=0, max_tokens=200)
found = {"chat": chat.invoke(QUESTION).content}
found["stream"] = "".join(chunk.content for chunk in chat.stream(QUESTION))
found["await"] = asyncio.run(chat.ainvoke(QUESTION)).content
usage = chat.invoke(QUESTION).usage_metadata
found["usage"] = {"input": usage["input_tokens"], "output": usage["output_tokens"]}
made = longer.bind_tools([weather], tool_choice="required", parallel_tool_calls=False).invoke(QUESTION)
(call,) = made.tool_calls
found["call"] = {"name": call["name"], "arguments": call["args"], "result": weather.invoke(call["args"])}
result = ToolMessage(found["call"]["result"], tool_call_id=call["id"])
again = chat.bind_tools([weather]).invoke([HumanMessage(QUESTION), made, result])
found["after"] = again.response_metadata["finish_reason"]
structured = longer.with_structured_output(Thing, method="json_schema").invoke(QUESTION)
found["structured"] = structured.model_dump()
# Texts as they are: its own tokenizer would be downloaded.
embeddings = OpenAIEmbeddings(**machine, check_embedding_ctx_length=False)
found["embeddings"] = embeddings.embed_documents(["import os", "def"])
print(json.dumps(found))
