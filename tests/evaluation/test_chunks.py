"""A text becomes chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from ortlm.calibration import texts as calibration
from ortlm.errors import BadOption
from ortlm.evaluation.chunks import Text, chunk_size, make_chunks, read_text
from ortlm.evaluation.corpus import TEXTS
from ortlm.runtime.text.tokenizer import Tokenizer
from tests.runtime import tiny as tokenizers


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    inner = tokenizers.byte_level()
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizers.save(tmp_path, inner)
    return Tokenizer.open(tmp_path)


def test_every_chunk_begins_with_bos_and_no_token_is_lost(tokenizer: Tokenizer) -> None:
    text = Text("fox", (("text", "the quick brown fox " * 80),))
    chunks = make_chunks(text, tokenizer, size=32)
    plain = tokenizer.encode(text.parts[0][1], add_special_tokens=False)
    assert chunks.prefix == (tokenizer.token_id("<s>"),)
    assert {len(chunk) for chunk in chunks.tokens} == {32}
    read = [token for chunk in chunks.tokens for token in chunk[1:].tolist()]
    assert read == plain[: len(read)]
    assert len(plain) - len(read) == chunks.left_out < 31


@pytest.mark.parametrize("lengths", [(200, 160), (200, 20, 90), (170, 40, 3, 80), (7, 9, 300)])
def test_every_domain_is_scored_each_token_once(tokenizer: Tokenizer, lengths: tuple[int, ...]) -> None:
    parts = tuple((f"part {i}", "the" + " fox" * count) for i, count in enumerate(lengths))
    chunks = make_chunks(Text("parts", parts), tokenizer, size=33)
    counts = [len(tokenizer.encode(part, add_special_tokens=False)) for _, part in parts]
    scored = [kind for own in chunks.kinds for kind in own[chunks.first + 1 :].tolist()]
    assert len(scored) == chunks.scored
    for number, count in enumerate(counts):
        assert scored.count(number) <= count
        if count >= 16 and (number or count >= 32):
            assert scored.count(number) >= count // 4, (number, count)
    assert scored == sorted(scored)


def test_fewer_tokens_are_of_all_domains(tokenizer: Tokenizer) -> None:
    parts = tuple((f"part {i}", "the quick brown fox " * 60) for i in range(4))
    chunks = make_chunks(Text("parts", parts), tokenizer, size=65, tokens=64 * 8)
    assert len(chunks.tokens) == 8
    assert {kind for own in chunks.kinds for kind in own[chunks.first + 1 :].tolist()} == {0, 1, 2, 3}


def test_tokens_limit(tokenizer: Tokenizer) -> None:
    text = Text("fox", (("text", "the quick brown fox " * 200),))
    assert len(make_chunks(text, tokenizer, size=65, tokens=400).tokens) == 400 // 64


@pytest.mark.parametrize("tokens", [None, 150])
def test_too_little_says_what_to_do(tokenizer: Tokenizer, tokens: int | None) -> None:
    text = Text("fox.txt", (("text", "the fox " * (20 if tokens is None else 900)),))
    with pytest.raises(BadOption, match=r"fox.txt has .* fewer than 100 say nothing\. Give a longer --text"):
        make_chunks(text, tokenizer, size=64, tokens=tokens)


def test_chunk_size() -> None:
    assert chunk_size(None, 4096) == 512
    assert chunk_size(None, 128) == 128
    assert chunk_size(1024, 4096) == 1024
    with pytest.raises(BadOption, match="--chunk must be 8 to 128"):
        chunk_size(512, 128)


def test_unreadable_texts(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, why in (("latin", "no UTF-8 text"), ("nowhere", "No such file")):
        with pytest.raises(BadOption, match=why):
            read_text(tmp_path / name)


def test_corpus_is_of_many_kinds_and_not_what_calibration_reads() -> None:
    assert 15_000 < sum(len(text.encode()) for text in TEXTS.values()) < 30_000
    assert {"prose", "Python", "chat", "German", "Chinese"} < {*TEXTS}
    known = {line for text in calibration.TEXTS for line in text.splitlines() if len(line) > 40}
    assert not known & {line for text in TEXTS.values() for line in text.splitlines()}
