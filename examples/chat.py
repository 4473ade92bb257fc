"""Chat with a model in the terminal.

Needs a model with a chat template:

    pip install ortlm
    ortlm build -m microsoft/Phi-3.5-mini-instruct -o phi -p int4 -e cpu
    python chat.py phi
"""

from __future__ import annotations

import argparse

import ortlm


def main() -> None:
    """Answer until the input ends."""
    parser = argparse.ArgumentParser(description="Chat with a model; Ctrl-C stops an answer, Ctrl-D leaves.")
    parser.add_argument("model", help="folder that `ortlm build` wrote")
    parser.add_argument("--system", help="system message")
    args = parser.parse_args()

    lm = ortlm.load(args.model)
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
        except EOFError:
            print()
            return
        try:
            stream = lm.stream(messages, max_new_tokens=256, temperature=0.7, top_p=0.9)
        except ortlm.errors.ContextFull:
            print("The conversation no longer fits into the model's context. Starting over.")
            messages = list(start)
            continue
        answer = ""
        try:
            for step in stream:
                print(step.text, end="", flush=True)
                answer += step.text
        except KeyboardInterrupt:
            stream.close()
        messages.append({"role": "assistant", "content": answer})
        # Earlier turns are not computed again: the prompt resumes from the cache of the last answer.
        t = stream.timings
        print(f"\n[{t.prompt_tokens} prompt tokens, {t.cached_tokens} of them cached;", end=" ")
        print(f"{t.new_tokens} new at {t.tokens_per_second:.0f} tokens/s]")


if __name__ == "__main__":
    main()
