"""GGUF files: any bytes and any metadata give a model whose weights and tokenizer can be read, or an error."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from ortlm.builder.tokenizer_files import read_tokenizer
from ortlm.checkpoint.gguf import open_gguf
from ortlm.weights.resolution import stored_architecture
from tests.checkpoint.gguf_bytes import ARRAY, BOOL, F32, I32, STRING, U32, U64, Typed, file_of, smallest
from tests.fuzz.harness import damaged_bytes, fuzz

METADATA, TENSORS = smallest()
WHOLE = file_of(METADATA, TENSORS)
# The part of it that is no weights.
HEADER = len(WHOLE) - sum(-(-t.nbytes // 32) * 32 for t in TENSORS.values())
TEXTS = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.just("x" * 5000))
VALUES = st.one_of(
    st.builds(Typed, st.just(U32), st.sampled_from([0, 1, 2, 3, 2**31, 2**32 - 1])),
    st.builds(Typed, st.just(U64), st.sampled_from([0, 1, 2**40, 2**64 - 1])),
    st.builds(Typed, st.just(I32), st.sampled_from([-1, 0, 7, -(2**31)])),
    st.builds(Typed, st.just(F32), st.sampled_from([0.0, -1.0, 1e-40, 3e38, math.inf, math.nan])),
    st.builds(Typed, st.just(BOOL), st.booleans()),
    st.builds(Typed, st.just(STRING), TEXTS),
    st.builds(Typed, st.just(ARRAY), st.lists(TEXTS, max_size=5), st.just(STRING)),
    st.builds(Typed, st.just(ARRAY), st.lists(st.integers(-5, 5), max_size=5), st.just(I32)),
)
MORE = (
    "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scaling.original_context_length",
    "llama.attention.key_length", "llama.attention.value_length", "general.alignment", "general.license",
    "tokenizer.ggml.scores", "tokenizer.chat_template.x", "split.count", "general.sampling.temp",
)  # fmt: skip


def read(folder, raw):
    path = folder / "model.gguf"
    path.write_bytes(raw)
    checkpoint = open_gguf(path)
    stored_architecture(checkpoint)
    read_tokenizer(checkpoint.folder, checkpoint.config)
    for weight in checkpoint.weights.values():
        assert weight.rows(0, weight.shape[0]).shape == weight.shape


@fuzz(damaged_bytes(WHOLE[: HEADER + 64]))
def test_bytes(tmp_path, raw):
    read(tmp_path, raw + WHOLE[HEADER + 64 :])


@fuzz(
    st.dictionaries(st.sampled_from([*METADATA, *MORE]), st.one_of(st.none(), VALUES), min_size=1, max_size=3)
)
def test_metadata(tmp_path, changes):
    metadata = {key: value for key, value in {**METADATA, **changes}.items() if value is not None}
    read(tmp_path, file_of(metadata, TENSORS))
