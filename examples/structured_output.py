"""Get an answer as data: JSON that always follows a schema.

Needs a model with a chat template:

    pip install ortlm
    ortlm build -m microsoft/Phi-3.5-mini-instruct -o phi -p int4 -e cpu
    python structured_output.py phi "The library opens at nine and lends books for four weeks."
"""

from __future__ import annotations

import argparse
import json

import ortlm

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 60},
        "category": {"enum": ["news", "instructions", "story", "other"]},
        "keywords": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
        "confidence": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["title", "category", "keywords", "confidence"],
    "additionalProperties": False,
}


def main() -> None:
    """Describe a text as an object of the schema."""
    parser = argparse.ArgumentParser(description="Describe a text as JSON.")
    parser.add_argument("model", help="folder that `ortlm build` wrote")
    parser.add_argument("text")
    args = parser.parse_args()

    lm = ortlm.load(args.model)
    # The schema decides which tokens are allowed. Only the prompt tells the model what they mean.
    question = f"Describe this text as JSON with title, category, keywords and confidence:\n\n{args.text}"
    made = lm.generate(
        [{"role": "user", "content": question}],
        guidance=ortlm.Guidance.json_schema(SCHEMA),
        max_new_tokens=256,
    )
    if made.finish_reason != "stop":
        raise SystemExit("The answer is incomplete: allow more tokens with max_new_tokens.")
    described = json.loads(made.text)
    for name, value in described.items():
        print(f"{name:11} {value}")


if __name__ == "__main__":
    main()
