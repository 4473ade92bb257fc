"""Stream several answers at once with asyncio, as a server does.

Needs a model with a chat template:

    pip install ortlm
    ortlm build -m microsoft/Phi-3.5-mini-instruct -o phi -p int4 -e cpu
    python streaming.py phi "What is a list?" "What is a tuple?"
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib

import ortlm


async def answer(lm: ortlm.LanguageModel, number: int, question: str, seconds: float) -> str:
    """Print the answer line by line while it is made, and return why it ended."""
    line, reason = "", "timeout"

    async def consume() -> None:
        nonlocal line, reason
        messages = [{"role": "user", "content": question}]
        # The model runs in another thread, so the event loop stays free for the other answers.
        async for step in lm.astream(messages, max_new_tokens=128):
            line += step.text
            while "\n" in line:
                done, line = line.split("\n", 1)
                print(f"[{number}] {done}", flush=True)
            reason = step.finish_reason or reason

    # The time limit cancels the task, and that stops the model.
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(consume(), seconds)
    print(f"[{number}] {line}")
    return reason


async def main() -> None:
    """Answer all questions concurrently."""
    parser = argparse.ArgumentParser(description="Stream several answers at once.")
    parser.add_argument("model", help="folder that `ortlm build` wrote")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit for each answer")
    args = parser.parse_args()

    lm = ortlm.load(args.model)
    jobs = [answer(lm, number, text, args.seconds) for number, text in enumerate(args.questions, 1)]
    print("finished:", ", ".join(await asyncio.gather(*jobs)))


if __name__ == "__main__":
    asyncio.run(main())
