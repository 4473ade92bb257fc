"""Ask a question about images.

Needs a vision model:

    pip install ortlm
    ortlm build -m microsoft/Phi-3.5-vision-instruct -o phi-vision -p int4 -e cpu
    python vision.py phi-vision "What is different?" before.jpg after.jpg
"""

from __future__ import annotations

import argparse

import ortlm


def main() -> None:
    """Answer a question about one image or several."""
    parser = argparse.ArgumentParser(description="Ask a question about images.")
    parser.add_argument("model", help="folder of a vision model that `ortlm build` wrote")
    parser.add_argument("question")
    parser.add_argument("images", nargs="+", help="files or URLs")
    parser.add_argument("--num-crops", type=int, help="fewer are faster, more show details")
    args = parser.parse_args()

    lm = ortlm.load(args.model)
    # An image may also be bytes, a Pillow image or a uint8 array [H, W, 3].
    content = [{"type": "image", "image": image} for image in args.images]
    content.append({"type": "text", "text": args.question})
    try:
        stream = lm.stream(
            [{"role": "user", "content": content}], num_crops=args.num_crops, max_new_tokens=200
        )
    except ortlm.errors.BadImage as error:
        raise SystemExit(str(error)) from error
    for step in stream:
        print(step.text, end="", flush=True)
    t = stream.timings
    print(
        f"\n[{t.prompt_tokens} prompt tokens: images {t.image_seconds:.2f} s, prefill {t.prompt_seconds:.2f} s]"
    )


if __name__ == "__main__":
    main()
