import random

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ortlm.errors import BadArtifact
from ortlm.runtime.text.tokenizer import Tokenizer
from tests.runtime import tiny

KINDS = {"byte_level": tiny.byte_level, "llama_style": tiny.llama_style}
TEXTS = [
    "hello world",
    "  two  spaces ",
    "the dog \U0001f600\U0001f1e9\U0001f1ea fox",
    "\u4f60\u597d\uff0c\u4e16\u754c the",
    "caf\u00e9 na\u00efve\n\n  indented\ttab",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
]


@pytest.fixture(params=KINDS)
def tokenizer(request, tmp_path):
    tiny.save(tmp_path, KINDS[request.param]())
    return Tokenizer.open(tmp_path)


@pytest.mark.parametrize("text", TEXTS)
def test_stream_gives_the_decoded_text(tokenizer, text):
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_stream_continues_a_prompt_without_losing_spaces(tokenizer, text):
    ids = tokenizer.encode("the fox " + text)
    for cut in range(1, len(ids)):
        if tokenizer.decode(ids[:cut]).endswith("\ufffd"):
            continue
        stream = tokenizer.stream(ids[:cut])
        made = "".join(stream.push(token) for token in ids[cut:]) + stream.flush()
        assert tokenizer.decode(ids[:cut]) + made == tokenizer.decode(ids)


def test_a_text_begins_after_a_special_token(tmp_path):
    tiny.save(tmp_path, tiny.llama_style())
    tokenizer = Tokenizer.open(tmp_path)
    prompt = [*tokenizer.encode("hello"), tokenizer.token_id("<|assistant|>")]
    stream = tokenizer.stream(prompt)
    assert "".join(stream.push(t) for t in tokenizer.encode("the fox")) == "the fox"


def test_special_tokens_within_a_stream_lose_nothing(tokenizer):
    end = tokenizer.token_id("<|end|>")
    ids = [*tokenizer.encode("the fox"), end, *tokenizer.encode("the dog")]
    stream = tokenizer.stream()
    assert "".join(stream.push(t) for t in ids) == tokenizer.decode(ids)


def test_half_a_character_is_held_and_flushed(tokenizer):
    ids = tokenizer.encode("a\U0001f600")
    stream = tokenizer.stream()
    assert "".join(stream.push(token) for token in ids[:-1]) == "a"
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


def test_any_tokens_can_be_streamed(tokenizer):
    dice = random.Random(0)
    for _ in range(50):
        stream = tokenizer.stream()
        ids = [dice.randrange(tokenizer.size) for _ in range(60)]
        # How many replacement characters stand for broken bytes is a matter of grouping, so no comparison.
        assert "".join(stream.push(token) for token in ids) + stream.flush()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("single", [None, "$A", "<s> $A", "<s> $A </s>"])
def test_encode_equals_transformers(kind, single, tmp_path):
    inner = KINDS[kind]()
    if single:
        ids = [(t, inner.token_to_id(t)) for t in ("<s>", "</s>")]
        inner.post_processor = TemplateProcessing(single=single, special_tokens=ids)
    tiny.save(tmp_path, inner)
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer = Tokenizer.open(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            got = tokenizer.encode(text, add_special_tokens=special)
            assert got == reference.encode(text, add_special_tokens=special)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("single", ["$A", "<s> $A"])
def test_the_file_alone_says_what_stands_around_a_text(kind, single, tmp_path):
    inner = KINDS[kind]()
    bos, eos = (inner.token_to_id(t) for t in ("<s>", "</s>"))
    inner.post_processor = TemplateProcessing(single=single, special_tokens=[("<s>", bos), ("</s>", eos)])
    for flags in ({}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}):
        tiny.save(tmp_path, inner, **flags)
        ids = Tokenizer.open(tmp_path).encode("the fox")
        assert ids == PreTrainedTokenizerFast.from_pretrained(tmp_path).encode("the fox")
        assert (ids[0] == bos) == ("<s>" in single)


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path):
    inner = tiny.byte_level()
    inner.enable_truncation(2)
    inner.enable_padding(length=50)
    tiny.save(tmp_path, inner)
    plain = tiny.byte_level().encode("hello world the fox").ids
    assert Tokenizer.open(tmp_path).encode("hello world the fox") == plain


def test_tokens_of_the_configuration_are_added(tmp_path):
    tiny.save(
        tmp_path,
        tiny.byte_level(),
        pad_token={"content": "<pad>"},
        added_tokens_decoder={"400": {"content": "<extra>", "special": False}},
    )
    tokenizer = Tokenizer.open(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert tokenizer.token_id("<pad>") in tokenizer.special_ids
    assert len(tokenizer.encode("<extra>")) == 1


def test_unknown_ids(tokenizer):
    size = tokenizer.size
    assert tokenizer.unknown_ids(size).tolist() == []
    assert tokenizer.unknown_ids(size + 3).tolist() == [size, size + 1, size + 2]


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(BadArtifact, match=r"tokenizer\.json is missing.*save_pretrained"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadArtifact, match="cannot be read as a tokenizer"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize(
    "runs", [[0xC3], [0x80], [0xFF], [0xE4, 0xB8], [0xC3, 0xE4], [0xF0, 0x9F, 0x41], [0x80, 0x41]]
)
def test_runs_of_broken_bytes_stream_as_they_decode(runs, tmp_path):
    tiny.save(tmp_path, tiny.llama_style())
    tokenizer = Tokenizer.open(tmp_path)
    ids = [tokenizer.token_id(f"<0x{runs[at % len(runs)]:02X}>") for at in range(600)]
    the = tokenizer.encode("the fox", add_special_tokens=False)
    for prompt in ([], the):
        for after in ([], the, [tokenizer.token_id("<|end|>"), *the]):
            stream = tokenizer.stream(prompt)
            made = "".join(map(stream.push, [*ids, *after])) + stream.flush()
            assert tokenizer.decode(prompt) + made == tokenizer.decode([*prompt, *ids, *after])


def test_the_window_of_a_stream_stays_short(tokenizer):
    """Otherwise time would grow with the square of what a model writes."""
    byte = "<0xC3>" if tokenizer.token_id("<0xC3>") is not None else "\u00c3"
    longest, decode = 0, tokenizer.decode_raw

    def counted(ids, **options):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids, **options)

    tokenizer.decode_raw = counted
    stream = tokenizer.stream()
    made = "".join(stream.push(tokenizer.token_id(byte)) for _ in range(500)) + stream.flush()
    assert longest < 100
    assert made == decode([tokenizer.token_id(byte)] * 500)


@pytest.mark.parametrize(
    "text", ["the fox , the dog . it 's", "x ' y ' z", "do n't ! ?", " . ", "we 're  .. ,", "", "a 'b c"]
)
def test_cleaned_text_streams_as_it_decodes(text, tmp_path):
    inner = tiny.llama_style()
    flag = "clean_up_tokenization_spaces"
    tiny.save(tmp_path, inner, **{flag: True, f"{flag}_for_bpe_even_though_it_will_corrupt_output": True})
    tokenizer = Tokenizer.open(tmp_path)
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    want = PreTrainedTokenizerFast.from_pretrained(tmp_path).decode(ids)
    assert tokenizer.decode(ids) == want
    assert "".join(map(stream.push, ids)) + stream.flush() == want
    # By itself the flag is for words in pieces, not for bytes and characters.
    tiny.save(tmp_path, inner, **{flag: True})
    assert Tokenizer.open(tmp_path).decode(ids) == text
