"""Write without a letter: a logits processor of your own, in a few lines of NumPy.

Needs any text model:

    pip install ortlm
    ortlm build -m microsoft/Phi-3.5-mini-instruct -o phi -p int4 -e cpu
    python logits_processor.py phi "Once upon a time" --without e
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

import ortlm


class Without:
    """Bans every token whose text contains one of some letters, and counts what it changed."""

    def __init__(self, lm: ortlm.LanguageModel, letters: str) -> None:
        texts = [lm.tokenizer.decode([token]) for token in range(lm.tokenizer.size)]
        self.banned = [i for i, text in enumerate(texts) if set(text.lower()) & set(letters.lower())]
        self.changed = 0

    def __call__(self, history: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take the tokens so far [B, T] (-1 pads shorter rows) and the logits [B, V]; return the new logits."""
        best = logits.argmax(axis=1)
        logits[:, self.banned] = -np.inf
        self.changed += int(np.sum(best != logits.argmax(axis=1)))
        return logits


def main() -> None:
    """Continue a prompt freely, and without the letters."""
    parser = argparse.ArgumentParser(description="Continue a prompt without some letters.")
    parser.add_argument("model", help="folder that `ortlm build` wrote")
    parser.add_argument("prompt")
    parser.add_argument("--without", default="e", metavar="LETTERS")
    args = parser.parse_args()

    lm = ortlm.load(args.model)
    print("freely: ", lm.generate(args.prompt, max_new_tokens=48))
    without = Without(lm, args.without)
    print(f"without {args.without}:", lm.generate(args.prompt, processors=without, max_new_tokens=48))
    print(f"{len(without.banned)} tokens banned, another one chosen {without.changed} times")


if __name__ == "__main__":
    main()
