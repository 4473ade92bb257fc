"""The manifest of a build, and the tokens that end an answer."""

from __future__ import annotations

from dataclasses import asdict

from ortlm._version import __version__
from ortlm.artifact import Graph, Manifest, State
from ortlm.card import public_name
from ortlm.checkpoint.open import Checkpoint
from ortlm.errors import BadCheckpoint
from ortlm.graph.decoder import CACHE_NAMES, Emitted
from ortlm.outline import Outline
from ortlm.spec import Decoder

# Tokens that end an assistant's turn in common chat templates. A template that writes one of them means it as
# a stop, whether or not config.json says so (several published ones do not).
_TURN_ENDS = ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_text|>", "<|end_of_turn|>")


def make_manifest(
    checkpoint: Checkpoint, spec: Decoder, emitted: Emitted, outline: Outline, *, filename: str
) -> Manifest:
    """Return the manifest of what is about to be written, the graph in file ``filename``."""
    defaults = checkpoint.json("generation_config.json")
    states = tuple(
        State(past % i, present % i)
        for i in range(len(spec.layers))
        for past, present in ((CACHE_NAMES[0], CACHE_NAMES[2]), (CACHE_NAMES[1], CACHE_NAMES[3]))
    )
    stop = stop_tokens(checkpoint)
    switches = {
        layer.mixer.rope.switch_tokens
        for layer in spec.layers
        if layer.mixer.rope is not None and layer.mixer.rope.switch_tokens is not None
    }
    pad = checkpoint.config.get("pad_token_id", defaults.get("pad_token_id"))
    bos = checkpoint.config.get("bos_token_id", defaults.get("bos_token_id"))
    return Manifest(
        graphs={
            "decoder": Graph(
                file=filename,
                inputs=emitted.inputs,
                outputs=emitted.outputs,
                states=states,
                optional=emitted.optional,
            )
        },
        context_tokens=spec.max_tokens,
        vocab_size=spec.vocab,
        stop_token_ids=stop,
        pad_token_id=pad if isinstance(pad, int) and pad >= 0 else stop[0],
        bos_token_id=bos if isinstance(bos, int) else None,
        rope_switch_tokens=min(switches) if switches else None,
        generation={
            key: defaults[key]
            for key in (
                "do_sample",
                "temperature",
                "top_k",
                "top_p",
                "min_p",
                "typical_p",
                "repetition_penalty",
            )
            if defaults.get(key) is not None
        },
        info={
            "built_with": f"ortlm {__version__}",
            **asdict(outline),
            # A path on the builder's machine says nothing to others.
            "source": public_name(checkpoint.source),
            "revision": checkpoint.revision,
            "activations": emitted.builder.dtype,
        },
    )


def stop_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return every token that ends an answer: of config, generation defaults, tokenizer and chat template."""
    found: list[int] = []
    for holder in (checkpoint.json("generation_config.json"), checkpoint.config):
        ids = holder.get("eos_token_id")
        found += [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
    tokenizer = checkpoint.json("tokenizer.json")
    settings = checkpoint.json("tokenizer_config.json")
    ids_by_text = {
        t["content"]: t["id"]
        for t in tokenizer.get("added_tokens", [])
        if isinstance(t, dict) and "content" in t
    }
    template_file = checkpoint.folder / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else ""
    template += str(settings.get("chat_template") or "")
    eos = settings.get("eos_token")
    words = [eos.get("content") if isinstance(eos, dict) else eos]
    words += [word for word in _TURN_ENDS if word in template]
    found += [ids_by_text[word] for word in words if word in ids_by_text]
    unique = tuple(dict.fromkeys(found))
    if not unique:
        raise BadCheckpoint(
            f"{checkpoint.folder}: neither config.json nor generation_config.json nor the tokenizer names a token "
            'that ends an answer. Set "eos_token_id" in config.json.'
        )
    return unique
