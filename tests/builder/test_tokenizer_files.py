"""What an artifact's tokenizer files say is what transformers' AutoTokenizer makes of the checkpoint's."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.builder.tokenizer_files import read_tokenizer
from ortlm.errors import BadCheckpoint
from ortlm.runtime.text import tokenizer as runtime
from tests.runtime import tiny as tinies

TEXTS = [
    "", " ", "the", " the  fox ", "<s>the fox<|end|>the", "<|end|> \n\n the <|user|>  <|user|>", "x<|im|> \n y",
    "caf\u00e9 e\u0301 12345 it's\n\n\t \u4f60\u597d \U0001f468\u200d\U0001f469\u200d\U0001f467 \ufdfa",
    "<mask><pad><unk></s><bos><eos><|endoftext|>", "a<|extra|> b", "\u2581the \u2581 the", "\x00\x07\u202e\u0e01",
    "x" * 300, "\r\n\r\n \t", "hell", " dog<|im|>dog <|im|> dog",
]  # fmt: skip


def unigram() -> Tokenizer:
    """As T5 and some Llamas: pieces with probabilities."""
    letters = sorted({c for text in tinies.TEXT for c in text} - {" "} | {"\u2581", "1"})
    vocab = [("<unk>", 0.0), *((t, 0.0) for t in tinies.SPECIAL), *((c, -5.0) for c in letters)]
    found = Tokenizer(models.Unigram([*vocab, ("\u2581the", -1.0), ("fox", -2.0)], unk_id=0))
    found.normalizer = normalizers.NFKC()
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.decoder = decoders.Metaspace()
    found.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tinies.SPECIAL])
    return found


def digits() -> Tokenizer:
    """Bytes as letters, every digit by itself."""
    found = tinies.byte_level()
    steps = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    found.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return found


KINDS = {"bytes": tinies.byte_level, "pieces": tinies.llama_style, "unigram": unigram, "digits": digits}
CONFIG_NAMES = {"llama": "LlamaForCausalLM", "gemma2": "Gemma2ForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def save(folder: Path, inner: Tokenizer, model_type: str = "llama", **files: Any) -> dict[str, Any]:
    """Write a checkpoint's tokenizer; ``files`` are JSON by name without ending. Returns config.json."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    inner.save(str(folder / "tokenizer.json"))
    config = {"model_type": model_type, "architectures": [CONFIG_NAMES.get(model_type, "LlamaForCausalLM")]}
    for name, found in ({"tokenizer_config": {}} | files | {"config": config}).items():
        (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    return config


def in_artifact(folder: Path, config: dict[str, Any]) -> runtime.Tokenizer:
    """Return the tokenizer of an artifact made from the checkpoint in ``folder``."""
    found = read_tokenizer(folder, config)
    out = Path(shutil.copytree(folder, folder.parent / "artifact", dirs_exist_ok=True))
    (out / "config.json").unlink()
    for name, text in found.texts.items():
        (out / name).write_text(text, encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(found.settings), encoding="utf-8")
    return runtime.Tokenizer.open(out)


def check_same(ours: runtime.Tokenizer, theirs: Any, texts: list[str]) -> None:
    assert ours.special_tokens == theirs.special_tokens_map
    for text, special in itertools.product(texts, (True, False)):
        ids = theirs.encode(text, add_special_tokens=special)
        assert ours.encode(text, add_special_tokens=special) == ids, text
        for skip in (True, False):
            decoded = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == decoded
            stream = ours.stream(skip_special_tokens=skip)
            streamed = "".join(map(stream.push, ids)) + stream.flush()
            assert streamed == decoded or "\ufffd" in decoded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("model_type", "declared"),
    [
        ("llama", None), ("llama", "LlamaTokenizerFast"), ("llama", "PreTrainedTokenizerFast"),
        ("llama", "TokenizersBackend"), ("llama", "GPT2Tokenizer"), ("mistral", "LlamaTokenizer"),
        ("gemma2", None), ("gemma3_text", "GemmaTokenizerFast"), ("gemma2", "PreTrainedTokenizerFast"),
        ("qwen2", "LlamaTokenizerFast"),
        ("qwen2", None), ("qwen3", "Qwen2Tokenizer"), ("phi", "CodeGenTokenizer"), ("phi3", "LlamaTokenizer"),
        ("granite", "GPT2Tokenizer"), ("olmo2", "GPT2Tokenizer"), ("smollm3", "PreTrainedTokenizerFast"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("single", ["$A", "<s> $A"])
def test_families(kind: str, model_type: str, declared: str | None, single: str, tmp_path: Path) -> None:
    inner = KINDS[kind]()
    inner.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    named = {"tokenizer_class": declared} if declared else {}
    settings_ = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, **named}
    if single == "$A":
        settings_["legacy"] = True
    config = save(tmp_path / "checkpoint", inner, model_type, tokenizer_config=settings_)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    ours = in_artifact(tmp_path / "checkpoint", config)
    pieces = type(theirs).__name__ in ("LlamaTokenizer", "GemmaTokenizer")
    if type(theirs).__name__ != "TokenizersBackend" and (kind == "unigram" or pieces != (kind == "pieces")):
        # A class for the other kind of vocabulary loses spaces or whole texts: the file is taken as it is.
        assert (
            ours.encode("the fox", add_special_tokens=False)
            == inner.encode("the fox", add_special_tokens=False).ids
        )
        return
    check_same(ours, theirs, TEXTS)


@pytest.mark.parametrize("kind", ["bytes", "pieces", "unigram"])
@pytest.mark.parametrize("flags", [{"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True},
                                   {"normalized": True}, {"single_word": True}, {"special": False}])  # fmt: skip
def test_flags_that_the_settings_restate(kind: str, flags: dict[str, bool], tmp_path: Path) -> None:
    inner = KINDS[kind]()
    at = inner.token_to_id("<|end|>")
    entry = {
        "content": "<|end|>",
        "special": True,
        **dict.fromkeys(("lstrip", "rstrip", "single_word"), False),
    }
    added = {str(at): entry | flags}
    config = save(tmp_path / "checkpoint", inner, tokenizer_config={"added_tokens_decoder": added})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    check_same(in_artifact(tmp_path / "checkpoint", config), theirs, TEXTS)
    # Folders of others have the settings only.
    check_same(runtime.Tokenizer.open(tmp_path / "checkpoint"), theirs, TEXTS)


def plain_entry() -> Tokenizer:
    """Return a tokenizer whose turn end is an entry of its vocabulary like any other."""
    found = json.loads(tinies.byte_level().to_str())
    found["model"]["vocab"]["<|im|>"] = len(found["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(found))


IM = {"content": "<|im|>", "lstrip": False, "rstrip": True, "normalized": False, "single_word": False}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<|im|>"}},
        {"tokenizer_config": {"eos_token": {"__type": "AddedToken", **IM, "special": True}}},
        {"tokenizer_config": {"pad_token": "<|im|>", "bos_token": "<|new|>"}},
        {"tokenizer_config": {"additional_special_tokens": ["<|im|>", "<|new|>"]}},
        {"tokenizer_config": {"extra_special_tokens": ["<|im|>"]}},
        {"tokenizer_config": {"extra_special_tokens": {"image_token": "<|im|>"}}},
        {"tokenizer_config": {"image_token": "<|im|>"}},
        {"special_tokens_map": {"eos_token": "<|im|>"}},
        {"special_tokens_map": {"eos_token": IM}},
        {"special_tokens_map": {"additional_special_tokens": ["<|im|>"]}},
        {"added_tokens": {"<|im|>": 330}},
        {"added_tokens": {"<|im|>": 330}, "tokenizer_config": {"eos_token": "<|im|>"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("in_vocabulary", [True, False])
def test_special_tokens_outside_tokenizer_json(
    files: dict[str, Any], in_vocabulary: bool, tmp_path: Path
) -> None:
    inner = plain_entry() if in_vocabulary else tinies.byte_level()
    config = save(tmp_path / "checkpoint", inner, **files)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    ours = in_artifact(tmp_path / "checkpoint", config)
    assert len(ours.encode("<|im|>")) == 1
    check_same(ours, theirs, TEXTS)
    check_same(runtime.Tokenizer.open(tmp_path / "checkpoint"), theirs, TEXTS)


FLAGS = st.fixed_dictionaries({}, optional=dict.fromkeys(
    ("lstrip", "rstrip", "single_word", "normalized", "special"), st.booleans()))  # fmt: skip
WORDS = st.sampled_from(["<|end|>", "<|user|>", "<|im|>", "<|new|>", "fox", "</s>"])
PIECES = st.sampled_from(["<|end|>", "<|user|>", "<|im|>", "<|new|>", "fox", " ", "\n", "\t", "the", "\u00e9",
                          "e\u0301", "\u4f60", "\U0001f600", "x", "</s>"])  # fmt: skip


@given(
    kind=st.sampled_from(["bytes", "pieces"]),
    declared=st.sampled_from([None, "PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer"]),
    restated=st.dictionaries(st.sampled_from([2, 3, 4, 400, 401]), st.tuples(WORDS, FLAGS), max_size=3),
    listed=st.booleans(),
    names=st.dictionaries(st.sampled_from(["eos_token", "pad_token", "image_token"]), WORDS, max_size=2),
    extra=st.lists(WORDS, max_size=2),
    texts=st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=3, max_size=3),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_settings(
    tmp_path: Path, kind: str, declared: str | None, restated: dict[int, Any], listed: bool, names: dict[str, str],
    extra: list[str], texts: list[str],
) -> None:  # fmt: skip
    found: dict[str, Any] = {**names, "additional_special_tokens": extra}
    found |= {"tokenizer_class": declared} if declared else {}
    if listed:
        tokens = {str(at): {"content": word, **flags} for at, (word, flags) in restated.items()}
        found["added_tokens_decoder"] = tokens
    config = save(tmp_path / "checkpoint", KINDS[kind](), tokenizer_config=found)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    if declared == "GPT2Tokenizer" and kind == "pieces":
        return
    check_same(in_artifact(tmp_path / "checkpoint", config), theirs, texts)


def test_a_file_that_says_all_is_copied(tmp_path: Path) -> None:
    config = save(tmp_path / "checkpoint", tinies.byte_level(), tokenizer_config={"bos_token": "<s>"})
    assert read_tokenizer(tmp_path / "checkpoint", config).texts == {}


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match=r"no tokenizer\.json.*vocab\.json: convert it"):
        read_tokenizer(tmp_path, {})


@pytest.mark.parametrize("flags", [{"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_the_official_runtime_reads_the_same(flags: dict[str, bool], tiny: Path, tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    folder = Path(shutil.copytree(tiny, tmp_path / "checkpoint"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    added = Tokenizer.from_file(str(folder / "tokenizer.json")).get_added_tokens_decoder()
    ids = {token.content: at for at, token in added.items()}
    off = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    config["added_tokens_decoder"] = {
        str(at): {"content": text, **off, "special": True, **flags} for text, at in ids.items()
    }
    config["additional_special_tokens"] = ["def"]
    path.write_text(json.dumps(config), encoding="utf-8")
    ortlm.build(folder, tmp_path / "out", options=BuildOptions(recipe="fast"))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    official = og.Tokenizer(og.Config(str(tmp_path / "out")))
    ours = ortlm.load(tmp_path / "out", threads=1).tokenizer
    for text in ("<|user|> \n user<|end|>  x", "a <|end|>", "<|end|><|end|> \n<|user|>", "def def x"):
        wanted = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == wanted
        # It knows no lstrip.
        assert official.encode(text).tolist() == wanted or "lstrip" in flags
    assert len(ours.encode("def", add_special_tokens=False)) == 1
