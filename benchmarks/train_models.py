"""Train two more small models, of other architectures and widths, to measure quantization on.

    python benchmarks/train_models.py --out FOLDER --steps 700 [--only qwen3-192] [--float32]

Writes FOLDER/llama-384 (Llama, tied embeddings) and FOLDER/qwen3-192 (Qwen3, its own head), and next to them
held-out.txt and in-domain.txt: text that the models never saw, and text that they were trained on. Text,
tokenizer, seeds and training are those of ``scripts/train_tiny.py``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import train_tiny as tiny

_TEXT_CHARACTERS = 400_000


def make_models() -> dict[str, torch.nn.Module]:
    """Return the models with their first weights, by name."""
    common = {
        "vocab_size": tiny.VOCAB,
        "max_position_embeddings": tiny.WINDOW,
        "bos_token_id": tiny.END_OF_TEXT,
        "eos_token_id": tiny.END_OF_TEXT,
        "pad_token_id": tiny.END_OF_TEXT,
    }
    llama = LlamaConfig(
        **common, hidden_size=384, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    qwen3 = Qwen3Config(
        **common, hidden_size=192, intermediate_size=576, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=3, head_dim=32, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return {"llama-384": LlamaForCausalLM(llama), "qwen3-192": Qwen3ForCausalLM(qwen3)}


def main() -> int:
    """Train both models and write them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write both to")
    parser.add_argument("--steps", type=int, default=700, help="batches of 4096 tokens")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=sorted(make_models()), help="this one alone")
    parser.add_argument("--float32", action="store_true", help="for processors that compute slowly in bf16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    corpus, held, _ = tiny.read_corpora()
    tokenizer = tiny.train_tokenizer(corpus)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, texts in (("held-out", held.plain), ("in-domain", corpus.plain[:: len(corpus.plain) // 200])):
        text = "\n\n".join(texts)[:_TEXT_CHARACTERS]
        (args.out / f"{name}.txt").write_text(text, encoding="utf-8")
    streams, held_streams = tiny.encode(tokenizer, corpus, seed=1), tiny.encode(tokenizer, held, seed=2)
    for name, model in make_models().items():
        if args.only not in (None, name):
            continue
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
        tiny.train(model, streams, steps=args.steps, rate=args.rate, bf16=not args.float32)
        model.generation_config = GenerationConfig(
            bos_token_id=tiny.END_OF_TEXT,
            eos_token_id=[tiny.END_OF_TEXT, tiny.ASSISTANT, tiny.END],
            pad_token_id=tiny.END_OF_TEXT,
        )
        folder = args.out / name
        model.to(torch.bfloat16).save_pretrained(folder)
        tiny.write_tokenizer(tokenizer, folder)
        loss = tiny.measure(model.float(), held_streams[0], most=64)
        print(f"{folder}: held-out loss {loss:.3f} nats per token", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
