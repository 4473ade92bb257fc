"""Switch LoRA adapters from one request to the next; the base model is loaded once.

Needs a model built with adapters of peft:

    pip install ortlm
    ortlm build -m microsoft/Phi-3.5-mini-instruct -o phi -p int4 -e cpu --adapter poet=./poet-lora
    python lora_switching.py phi "Describe the sea."
"""

from __future__ import annotations

import argparse

import ortlm


def main() -> None:
    """Answer without an adapter, with each of them, and without again."""
    parser = argparse.ArgumentParser(description="Answer with each adapter of a model.")
    parser.add_argument("model", help="folder that `ortlm build --adapter NAME=PATH` wrote")
    parser.add_argument("prompt")
    args = parser.parse_args()

    # Each adapter needs a cache of its own, so keep several: switching back then resumes from it.
    lm = ortlm.load(args.model, prefix_caches=4)
    # lm.load_adapter(name, file) adds the .onnx_adapter files of other builds of the same checkpoint.
    if not lm.adapters:
        raise SystemExit(f"{args.model} has no adapters. Build it with --adapter NAME=PATH.")

    for adapter in (None, *lm.adapters, None):
        made = lm.generate(args.prompt, adapter=adapter, max_new_tokens=48)
        print(f"--- {adapter or 'no adapter'} ({made.timings.cached_tokens} prompt tokens cached)\n{made}")


if __name__ == "__main__":
    main()
