"""Make a checkpoint with random weights from any ``config.json``, without holding it in memory.

    python benchmarks/make_checkpoint.py CONFIG.json OUT --layers 8

Names and shapes come from transformers on the meta device, so they are those of the published files; the
weights are written as a stream of small blocks. Time and memory of a build do not depend on what the numbers
are, so such a checkpoint measures them as the real one would. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

Shapes = dict[str, tuple[int, ...]]

_BLOCK = 1 << 22  # values: 8 MiB of bfloat16
_PER_LAYER_COUNT = ("num_hidden_layers", "n_layer", "num_layers")
_TOKENIZER = Path(__file__).parent.parent / "models" / "tiny-phi3"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def with_layers(config: Mapping[str, Any], layers: int | None) -> dict[str, Any]:
    """Return ``config`` with ``layers`` layers and every list that has one entry per layer cut or repeated.

    Keys that point to remote code or to somebody's folder are left out, since no tool can follow them here.
    """
    out = {key: value for key, value in config.items() if key not in ("auto_map", "_name_or_path")}
    count = next((key for key in _PER_LAYER_COUNT if isinstance(out.get(key), int)), None)
    if layers is not None and count is not None:
        old = out[count]
        out[count] = layers
        for key, value in out.items():
            if isinstance(value, list) and len(value) == old and "layer" in key:
                out[key] = [value[i % old] for i in range(layers)]
    if isinstance(out.get("text_config"), dict):
        out["text_config"] = with_layers(out["text_config"], layers)
    return out


def shapes_of(config_file: Path) -> tuple[Shapes, float]:
    """Return every tensor that ``save_pretrained`` would write, and the standard deviation of its weights."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(config_file.parent)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # transformers computes with stacked experts, while published files hold one tensor for each.
    found = revert_weight_conversion(model, dict(model.state_dict()))
    tied = model.all_tied_weights_keys or {}
    shapes = {name: tuple(value.shape) for name, value in found.items() if name not in tied}
    text = config.get_text_config()
    return shapes, float(getattr(text, "initializer_range", None) or 0.02)


class Noise:
    """Random bfloat16 values about as fast as memory can be copied.

    Normal values are drawn once. Each chunk reads them from a random place, and flips signs by a pattern that
    is read from another random place, so that two chunks share nothing but the distribution.
    """

    def __init__(self, std: float, seed: int) -> None:
        self._rng = np.random.Generator(np.random.SFC64(seed))
        values = self._rng.standard_normal(_BLOCK, dtype=np.float32) * np.float32(std)
        signs = self._rng.integers(0, 2, _BLOCK, dtype=np.uint16) << np.uint16(15)
        # Twice in a row, so that any window of at most _BLOCK values is contiguous.
        self._values = np.tile(to_bfloat16(values), 2)
        self._signs = np.tile(signs, 2)
        self._out = np.empty(_BLOCK, np.uint16)

    def chunks(self, size: int) -> Iterator[NDArray[np.uint16]]:
        """Yield ``size`` values in chunks; each is overwritten by the next."""
        while size > 0:
            count = min(size, _BLOCK)
            value, sign = (int(i) for i in self._rng.integers(0, _BLOCK, 2))
            out = self._out[:count]
            np.bitwise_xor(self._values[value : value + count], self._signs[sign : sign + count], out=out)
            yield out
            size -= count

    def around_one(self, size: int) -> NDArray[np.uint16]:
        """Return the weights of a norm: 1 with a little noise."""
        return to_bfloat16(1 + 0.05 * self._rng.standard_normal(size, dtype=np.float32))


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 values to bfloat16, to nearest even, and return their bits."""
    bits = values.astype("<f4").view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def into_shards(shapes: Shapes, limit: float) -> list[Shapes]:
    """Split ``shapes`` in their order into parts of at most ``limit`` bytes; a larger tensor gets its own."""
    shards: list[Shapes] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if shards[-1] and used + size > limit:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    return shards


def write_shard(path: Path, shapes: Shapes, noise: Noise | None) -> int:
    """Write one safetensors file and return the number of bytes of its tensors.

    Without ``noise`` the file is a hole of that size, which takes no space.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if noise is None:
            file.truncate(8 + len(text) + end)
        else:
            for name, shape in shapes.items():
                write_tensor(file, name, shape, noise)
    return end


def write_tensor(file: BinaryIO, name: str, shape: tuple[int, ...], noise: Noise) -> None:
    """Write the values of one tensor."""
    if len(shape) == 1 and name.endswith("weight"):
        file.write(noise.around_one(shape[0]).data)
        return
    for chunk in noise.chunks(math.prod(shape)):
        file.write(chunk.data)


def open_tensor(path: Path, name: str, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """Map the bits of one bfloat16 tensor of a safetensors file for reading and writing."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        start = json.loads(file.read(size))[name]["data_offsets"][0]
    return np.memmap(path, np.uint16, "r+", 8 + size + start, shape)


def make_chain(folder: Path, where: Mapping[str, str], shapes: Shapes, length: int) -> None:
    """Make the model answer every token with its successor, in circles of ``length`` tokens.

    The head's row of a token becomes the embedding of the one before it, and what layers add to the residual
    stream is made small. Greedy decoding then repeats a prompt of ``length`` tokens word by word, as a model does
    that is asked to copy or to edit a text.
    """
    table = open_tensor(
        folder / where["model.embed_tokens.weight"],
        "model.embed_tokens.weight",
        shapes["model.embed_tokens.weight"],
    )
    head = open_tensor(folder / where["lm_head.weight"], "lm_head.weight", shapes["lm_head.weight"])
    for start in range(0, len(table), length):
        circle = np.arange(start, min(start + length, len(table)))
        head[np.roll(circle, -1)] = table[circle]
    for name, shape in shapes.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            bits = open_tensor(folder / where[name], name, shape)
            # Seven less in the exponent is a division by 128; what is smaller than that becomes 0.
            bits[...] = np.where(bits & 0x7F80 > 7 << 7, bits - (7 << 7), 0)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy what there is of the tokenizer files of the folder ``source``."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def main() -> int:
    """Write the checkpoint and report its size, the time and the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, help="a published config.json")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--layers", type=int, help="number of layers, by default what the config says")
    parser.add_argument("--shard-gb", type=float, default=2.0, help="largest shard in 1e9 bytes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, default=_TOKENIZER, help="folder to copy a tokenizer from")
    parser.add_argument(
        "--chain",
        type=int,
        metavar="N",
        help="make a model that repeats: token i is followed by i + 1, in circles of N tokens",
    )
    parser.add_argument(
        "--hollow", action="store_true", help="files without weights, which take no space: for --dry-run"
    )
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)

    args.out.mkdir(parents=True, exist_ok=True)
    config = with_layers(json.loads(args.config.read_text(encoding="utf-8")), args.layers)
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shapes, std = shapes_of(args.out / "config.json")
    for old in args.out.glob("model*.safetensors*"):
        old.unlink()

    began = time.perf_counter()
    noise = None if args.hollow else Noise(std, args.seed)
    shards = into_shards(shapes, args.shard_gb * 1e9)
    total, where = 0, {}
    for number, shard in enumerate(shards, 1):
        name = (
            "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        total += write_shard(args.out / name, shard, noise)
        where.update(dict.fromkeys(shard, name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (args.out / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    if args.chain:
        make_chain(args.out, where, shapes, args.chain)
    copy_tokenizer(args.tokenizer, args.out)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{args.out}: {len(shapes)} tensors, {total / 1e9:.2f} GB in {len(shards)} files, "
        f"{time.perf_counter() - began:.1f} s, peak memory {peak:.0f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
