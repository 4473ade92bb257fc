"""Train the small Phi-3 checkpoint that ships in ``models/tiny-phi3``.

    python scripts/train_tiny.py --out models/tiny-phi3

The text is what every CPython installation carries: the standard library's sources and docstrings. Modules
are held out by a checksum of their name; the loss on them goes into the model card. The run has a fixed
number of steps, fixed seeds, a sorted file order and a fixed number of threads, so that the same Python,
torch, transformers and tokenizers on the same kind of CPU give the same weights.
Needs torch, transformers and tokenizers (the ``test`` extra).
"""

from __future__ import annotations

import argparse
import ast
import builtins
import contextlib
import importlib
import json
import math
import platform
import random
import re
import shutil
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

WINDOW = 512
SHORT_WINDOW = 256
SHORT_SHARE = 0.7  # of the steps run on short windows, which are a third quicker
BATCH_TOKENS = 4096
VOCAB = 2048
SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = range(5)
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and message['content'] %}"
    "{{ '<|system|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '<|user|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# --- the text ---------------------------------------------------------------------------------------------

# Tests, bundled third-party files, code tables, and files that the build writes for one machine.
_LEFT_OUT = re.compile(
    r"(^|/)(test|tests|idle_test|site-packages|dist-packages|_bundled|encodings|pydoc_data|lib2to3|distutils"
    r"|config-[^/]*|__pycache__)(/|$)|(^|/)(_sysconfigdata|sitecustomize|usercustomize)[^/]*$"
)
# Modules in C: their docstrings can only be had from the objects.
_COMPILED = (
    "builtins",
    "math",
    "cmath",
    "itertools",
    "time",
    "_functools",
    "_collections",
    "_operator",
    "posix",
)
_SPOKEN = {"_functools": "functools", "_collections": "collections", "_operator": "operator", "posix": "os"}
# People ask a demo about these, so their documentation is shown more often.
_WELL_KNOWN = frozenset(
    {
        "argparse",
        "ast",
        "asyncio",
        "base64",
        "bisect",
        "builtins",
        "calendar",
        "collections",
        "concurrent",
        "configparser",
        "contextlib",
        "copy",
        "csv",
        "dataclasses",
        "datetime",
        "decimal",
        "difflib",
        "enum",
        "fnmatch",
        "fractions",
        "functools",
        "genericpath",
        "getpass",
        "glob",
        "gzip",
        "heapq",
        "inspect",
        "io",
        "itertools",
        "json",
        "linecache",
        "logging",
        "math",
        "operator",
        "os",
        "pathlib",
        "pickle",
        "posix",
        "posixpath",
        "pprint",
        "queue",
        "random",
        "re",
        "secrets",
        "shlex",
        "shutil",
        "socket",
        "statistics",
        "string",
        "subprocess",
        "tempfile",
        "textwrap",
        "threading",
        "time",
        "timeit",
        "tokenize",
        "traceback",
        "typing",
        "unittest",
        "urllib",
        "uuid",
        "zipfile",
    }
)
_ASK = (
    "What does {name} do?",
    "What is {name}?",
    "Explain {name}.",
    "Describe {name} in Python.",
    "What does `{name}` do?",
)
_ASK_DOCSTRING = ("Write the docstring of `{signature}`", "Write a docstring for `{signature}`.")
_ASK_CODE = (
    "Write the function `{signature}`",
    "Write a Python function {short}.",
    "Show the source of {name}.",
)


@dataclass(frozen=True)
class Corpus:
    """Documents of one split: ``plain`` texts, and ``chats`` as (question, answer)."""

    plain: list[str]
    chats: list[tuple[str, str]]


def is_held_out(module: str) -> bool:
    """Say whether ``module`` is kept for measuring: about one in twenty, by a checksum of its name."""
    return zlib.crc32(module.encode()) % 20 == 7 and module.partition(".")[0] not in _WELL_KNOWN


def read_corpora() -> tuple[Corpus, Corpus, list[str]]:
    """Return the text to train on, the text held out, and the names of the held-out modules."""
    train, held, held_names = Corpus([], []), Corpus([], []), []
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        if _LEFT_OUT.search(name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            continue
        module = re.sub(r"(/__init__)?\.py$", "", name).replace("/", ".")
        into = train
        if is_held_out(module):
            into = held
            held_names.append(module)
        add_source(into, module, text, tree)
    for topic, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
        (held if is_held_out(topic) else train).plain.append(text)
    for module in _COMPILED:
        with contextlib.suppress(ImportError):
            add_compiled(train, module)
    return train, held, held_names


def add_source(into: Corpus, module: str, text: str, tree: ast.Module) -> None:
    """Add a module: its text, each of its functions, and questions about what has a docstring."""
    rng = random.Random(zlib.crc32(module.encode()))
    body = re.sub(r"\A(#[^\n]*\n|\s*\n)+", "", text)  # licence headers and interpreter lines
    into.plain.append(body)
    spoken = {"posixpath": "os.path", "genericpath": "os.path"}.get(module, module)
    times = 4 if module.partition(".")[0] in _WELL_KNOWN else 1
    _ask(into, rng, f"the {spoken} module", "", summary(ast.get_docstring(tree)), times)
    lines = text.splitlines()
    for owner, node in _definitions(tree):
        name = ".".join(filter(None, (spoken, owner, node.name)))
        doc = summary(ast.get_docstring(node))
        if isinstance(node, ast.ClassDef):
            _ask(into, rng, name, f"class {node.name}", doc, times)
            continue
        signature = f"def {node.name}({ast.unparse(node.args)})"
        public = not node.name.startswith("_")
        _ask(into, rng, name, signature, doc, times if public else 1)
        start, stop = node.lineno - 1, node.end_lineno or node.lineno
        indent = node.col_offset
        code = "\n".join(line[indent:] if not line[:indent].strip() else line for line in lines[start:stop])
        if 60 <= len(code) <= 1200 and not owner:
            into.plain.append(code + "\n")
            if public and len(code) <= 700:
                ask = rng.choice(_ASK_CODE).format(signature=signature, short=node.name, name=name)
                into.chats.append((ask, f"```python\n{code}\n```"))


def add_compiled(into: Corpus, module: str) -> None:
    """Add questions about the objects of a module that is written in C."""
    rng = random.Random(zlib.crc32(module.encode()))
    spoken = _SPOKEN.get(module, module)
    found = importlib.import_module(module)
    for name, value in sorted(vars(found).items()):
        if name.startswith("_") or not (callable(value) and isinstance(getattr(value, "__doc__", None), str)):
            continue
        full = name if found is builtins else f"{spoken}.{name}"
        _ask(into, rng, full, "", summary(value.__doc__), 4)
        if not isinstance(value, type) or issubclass(value, BaseException):
            continue
        for part, method in sorted(vars(value).items()):
            if not part.startswith("_") and callable(method) and isinstance(method.__doc__, str):
                _ask(into, rng, f"{full}.{part}", "", summary(method.__doc__), 4)


def _definitions(
    tree: ast.Module,
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield "", node
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield node.name, part


def summary(doc: str | None) -> str:
    """Return the first paragraphs of a docstring, up to 400 characters; empty if it says nothing."""
    if not doc:
        return ""
    parts = [p.strip() for p in re.split(r"\n\s*\n", doc) if p.strip()]
    # The first paragraph of many C docstrings is the signature again.
    if len(parts) > 1 and re.fullmatch(r"[\w.]+\(.*", parts[0].split("\n")[0]):
        parts = parts[1:]
    taken = parts[:1]
    for part in parts[1:]:
        if sum(map(len, taken)) + len(part) > 400:
            break
        taken.append(part)
    text = "\n\n".join(taken)
    return text if 15 <= len(text) <= 900 and text.isascii() else ""


def _ask(into: Corpus, rng: random.Random, name: str, signature: str, answer: str, times: int) -> None:
    if not answer:
        return
    asks = [ask.format(name=name) for ask in rng.sample(_ASK, k=min(times, len(_ASK)))]
    if times > 1:
        asks[0] = _ASK[0].format(name=name)
    if signature:
        asks += [ask.format(signature=signature) for ask in rng.sample(_ASK_DOCSTRING, k=1 + (times > 1))]
    into.chats.extend((ask, answer) for ask in asks)


# --- tokenizer --------------------------------------------------------------------------------------------


def train_tokenizer(corpus: Corpus) -> Tokenizer:
    """Return a byte-level BPE of VOCAB tokens; the special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    answers = (answer for _, answer in corpus.chats[::3])
    tokenizer.train_from_iterator([*corpus.plain, *answers], trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the files around it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, token in enumerate(SPECIAL)
    }
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "bos_token": SPECIAL[END_OF_TEXT],
            "chat_template": TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": SPECIAL[END_OF_TEXT],
            "model_max_length": WINDOW,
            "pad_token": SPECIAL[END_OF_TEXT],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": SPECIAL[END_OF_TEXT],
        },
    )
    names = {f"{role}_token": SPECIAL[END_OF_TEXT] for role in ("bos", "eos", "pad", "unk")}
    _write_json(folder / "special_tokens_map.json", names)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# --- batches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """Token ids of many documents one after the other, and where each document starts."""

    ids: np.ndarray
    starts: np.ndarray


def encode(tokenizer: Tokenizer, corpus: Corpus, *, seed: int) -> tuple[Stream, Stream]:
    """Return the plain and the chat documents of ``corpus`` as two shuffled streams of int32 ids."""
    plain = [[*e.ids, END_OF_TEXT] for e in tokenizer.encode_batch(corpus.plain)]
    texts = [f"<|user|>\n{q}<|end|>\n<|assistant|>\n{a}<|end|>\n" for q, a in corpus.chats]
    chats = [[*e.ids, END_OF_TEXT] for e in tokenizer.encode_batch(texts)]
    return _join(plain, seed), _join(chats, seed)


def _join(documents: list[list[int]], seed: int) -> Stream:
    order = np.random.default_rng(seed).permutation(len(documents))
    lengths = np.array([len(documents[i]) for i in order])
    return Stream(
        np.concatenate([np.asarray(documents[i], np.int32) for i in order]),
        np.concatenate([[0], np.cumsum(lengths)[:-1]]),
    )


def draw(stream: Stream, rng: np.random.Generator, rows: int, window: int, *, aligned: float) -> np.ndarray:
    """Return ``rows`` windows, int64 [rows, window + 1].

    A share ``aligned`` of them starts where a document starts, as every prompt does.
    """
    last = len(stream.ids) - window - 1
    at = rng.integers(0, last + 1, size=rows)
    before = stream.starts[np.searchsorted(stream.starts, at, side="right") - 1]
    at = np.where(rng.random(rows) < aligned, before, at)
    return np.stack([stream.ids[a : a + window + 1] for a in at]).astype(np.int64)


def measure(model: Phi3ForCausalLM, stream: Stream, *, most: int) -> float:
    """Return the mean loss in nats per token over the first ``most`` windows of ``stream``."""
    count = min((len(stream.ids) - 1) // WINDOW, most)
    rows = np.stack([stream.ids[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(count)]).astype(np.int64)
    total = 0.0
    with torch.no_grad():
        for part in torch.from_numpy(rows).split(16):
            logits = model(part[:, :-1]).logits.float()
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten()
            ).item() * len(part)
    return total / count


# --- training ---------------------------------------------------------------------------------------------


def make_model() -> Phi3ForCausalLM:
    """Return the untrained model in float32."""
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        original_max_position_embeddings=WINDOW,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_word_embeddings=False,
        attention_bias=False,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attention_dropout=0.0,
    )
    config._attn_implementation = "sdpa"
    return Phi3ForCausalLM(config).float()


def train(
    model: Phi3ForCausalLM, streams: tuple[Stream, Stream], *, steps: int, rate: float, bf16: bool
) -> None:
    """Run AdamW for ``steps`` batches of BATCH_TOKENS: a short warm-up, then a cosine down to 2 %."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    rng = np.random.default_rng(0)
    warm_up = max(1, min(100, steps // 10))
    began, mean = time.monotonic(), math.nan
    model.train()
    for step in range(steps):
        scale = min(1.0, (step + 1) / warm_up)
        scale *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        window = SHORT_WINDOW if step < SHORT_SHARE * steps else WINDOW
        rows = BATCH_TOKENS // window // 2
        parts = [draw(stream, rng, rows, window, aligned=0.5) for stream in streams]
        batch = torch.from_numpy(np.concatenate(parts))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if math.isnan(mean) else 0.95 * mean + 0.05 * loss.item()
        if step % 50 == 49 or step == steps - 1:
            spent = time.monotonic() - began
            speed = (step + 1) * BATCH_TOKENS / spent
            print(f"step {step + 1}/{steps} loss {mean:.3f} {speed:.0f} tokens/s {spent:.0f} s", flush=True)
    model.eval()


# --- the model card ---------------------------------------------------------------------------------------

CARD = """\
---
license: psf-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [phi3, tiny, test-model]
---

# tiny-phi3

A Phi-3 with {parameters:,} parameters for trying out and testing ortlm: small enough to ship with the source,
trained well enough that its text is recognisable and that a loss of quality can be measured.
It completes Python and answers questions about the standard library in the style of a docstring, often
wrongly. It is of no other use.

| | |
|---|---|
| Architecture | `Phi3ForCausalLM`, no rope scaling, no sliding window, untied head |
| Sizes | hidden 256, intermediate {intermediate}, {layers} layers, 8 heads, 2 key/value heads |
| Vocabulary | {vocab} tokens, byte-level BPE trained on the same text |
| Context | {window} tokens, which is what it was trained on |
| Weights | bfloat16 |
| Stops at | `<|end|>` (chat) or `<|endoftext|>` |

## Training

`python scripts/train_tiny.py` made it: AdamW, {steps} steps of {batch} tokens ({seen:.1f} M tokens, half plain
text, half questions with answers; the first {short_share} % in windows of {short} tokens, then of {window}), two
CPU threads, {time_class}. Seeds, file order and number of steps are fixed.

| Measured on | Loss, nats per token | Perplexity |
|---|---|---|
| training modules, plain text | {train_plain:.3f} | {train_plain_ppl:.2f} |
| training modules, chat | {train_chat:.3f} | {train_chat_ppl:.2f} |
| held-out modules, plain text | {held_plain:.3f} | {held_plain_ppl:.2f} |
| held-out modules, chat | {held_chat:.3f} | {held_chat_ppl:.2f} |

Taken from the bfloat16 weights with float32 arithmetic, over at most 256 windows of {window} tokens.
Held out, and never trained on, were {held_count} modules: {held_names};
and a twentieth of the topics of `pydoc`.

## Text and licence

The text is the standard library of CPython {python}: {characters:.1f} M characters in {documents:,} documents,
which are module sources without tests, function sources, docstrings, and the topics of `pydoc`.
CPython and its standard library are Copyright (c) Python Software Foundation and others, under the
PSF License Agreement version 2 (https://docs.python.org/3/license.html). No text is shipped, only the weights
and the vocabulary. They may reproduce passages of the text; those stay under that licence.

Made with torch {torch}, transformers {transformers}, tokenizers {tokenizers}.
"""


def time_class(seconds: float) -> str:
    """Say how long a run took in words that do not change from run to run."""
    for limit in (5, 10, 15, 20, 25, 30, 45, 60):
        if seconds < limit * 60:
            return f"under {limit} minutes"
    return "over an hour"


def main() -> None:
    """Train, measure and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "models" / "tiny-phi3")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--float32", action="store_true", help="train without bfloat16 autocast")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)

    began = time.monotonic()
    corpus, held, held_names = read_corpora()
    tokenizer = train_tokenizer(corpus)
    streams = encode(tokenizer, corpus, seed=1)
    held_streams = encode(tokenizer, held, seed=2)
    for name, stream in zip(
        ("plain", "chat", "held plain", "held chat"), streams + held_streams, strict=True
    ):
        print(f"{name}: {len(stream.starts):,} documents, {len(stream.ids):,} tokens", flush=True)
    print(f"text ready after {time.monotonic() - began:.0f} s", flush=True)

    model = make_model()
    began = time.monotonic()
    train(model, streams, steps=args.steps, rate=args.rate, bf16=not args.float32)
    spent = time.monotonic() - began

    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT,
        eos_token_id=[END_OF_TEXT, ASSISTANT, END],
        pad_token_id=END_OF_TEXT,
    )
    new = args.out.with_name(args.out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    model.save_pretrained(new)
    write_tokenizer(tokenizer, new)
    (new / "model.safetensors").chmod(0o644)

    model = model.float()
    named = {"train_plain": streams[0], "train_chat": streams[1]}
    named |= {"held_plain": held_streams[0], "held_chat": held_streams[1]}
    losses = {name: measure(model, stream, most=256) for name, stream in named.items()}
    print(losses, flush=True)
    card = CARD.format(
        **losses,
        **{f"{name}_ppl": math.exp(loss) for name, loss in losses.items()},
        parameters=sum(p.numel() for p in model.parameters()),
        layers=model.config.num_hidden_layers,
        intermediate=model.config.intermediate_size,
        vocab=VOCAB,
        window=WINDOW,
        steps=args.steps,
        batch=BATCH_TOKENS,
        short=SHORT_WINDOW,
        short_share=round(100 * SHORT_SHARE),
        seen=args.steps * BATCH_TOKENS / 1e6,
        time_class=time_class(spent),
        held_count=len(held_names),
        held_names=", ".join(f"`{name}`" for name in held_names),
        characters=(sum(map(len, corpus.plain)) + sum(len(q) + len(a) for q, a in corpus.chats)) / 1e6,
        documents=len(corpus.plain) + len(corpus.chats),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
    )
    (new / "README.md").write_text(card, encoding="utf-8")

    # Renames, so that a reader never sees half a folder.
    old = args.out.with_name(args.out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if args.out.exists():
        args.out.rename(old)
    new.rename(args.out)
    shutil.rmtree(old, ignore_errors=True)
    print(f"wrote {args.out}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
