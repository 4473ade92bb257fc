"""A manifest's values: types, ranges, and whether the graph agrees."""

from __future__ import annotations

import json
from pathlib import Path, PureWindowsPath

import pytest

import ortlm
from ortlm.artifact import open_artifact
from ortlm.artifact.json_values import inside
from ortlm.cli import main
from ortlm.errors import BadArtifact

STATE = "graphs/decoder/states/0"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (f"{STATE}/kind", ["grow"], r"states\[0\]\.kind is \['grow'\], expected one of"),
        (f"{STATE}/kind", "rolling", r"states\[0\]\.kind is 'rolling'"),
        (f"{STATE}/axis", 7, r"states\[0\]\.axis is 7, expected a whole number from 2 to 3"),
        (f"{STATE}/heads", 0, r"states\[0\]\.heads"),
        (f"{STATE}/head_dim", 10**18, r"states\[0\]\.head_dim"),
        (f"{STATE}/window", 10**15, r"states\[0\]\.window"),
        (f"{STATE}/window", 16, "belongs to states of kind window"),
        (f"{STATE}/more", 1, r"states\[0\]\.more is not allowed"),
        ("stop_token_ids", [10**30], r"stop_token_ids\[0\] is 1e\+30"),
        ("stop_token_ids", ["0"], r"stop_token_ids\[0\] is '0'"),
        ("stop_token_ids", [10**6], "names token 1000000, but the vocabulary has"),
        ("stop_token_ids", 5, "stop_token_ids is 5, expected a list"),
        ("stop_token_ids", [-1], r"stop_token_ids\[0\] is -1"),
        ("stop_token_ids", [True], r"stop_token_ids\[0\] is True"),
        ("context_tokens", "512", "context_tokens is '512'"),
        ("context_tokens", 0, "context_tokens is 0"),
        ("context_tokens", 10**18, "context_tokens"),
        ("context_tokens", 512.0, "context_tokens is 512.0"),
        ("vocab_size", -1, "vocab_size is -1"),
        ("vocab_size", 10**9, "vocab_size"),
        ("rope_switch_tokens", 0, "rope_switch_tokens is 0"),
        ("prompt_tokens", "x", "prompt_tokens is 'x'"),
        ("adapters", {"a": 5}, "adapters.a is 5"),
        ("adapters", {"a": "../x.onnx_adapter"}, "lies outside"),
        ("graphs", {}, "no graph|graphs"),
        ("graphs/decoder/inputs", {"input_ids": ["x"]}, r"inputs\.input_ids"),
        ("graphs/decoder/file", "C:\\Windows\\x", "lies outside"),
        ("images", {"side": 336}, "images.mean is missing"),
        ("images", {"side": 0, "mean": [0, 0, 0], "std": [1, 1, 1], "tag": ""}, "images.side is 0"),
        (
            "images",
            {"side": 8, "mean": [0, 0, 0], "std": [0, 1, 1], "tag": "", "crops": 1},
            r"images\.std\[0\]",
        ),
    ],
)
def test_values(changed, place, value, message):
    with pytest.raises(BadArtifact, match=message) as caught:
        ortlm.load(changed("ortlm.json", {place: value}), threads=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({f"{STATE}/past": "past_key_values.9.key"}, "no cache tensor 'past_key_values.9.key'.*Did you mean"),
        ({f"{STATE}/present": "nothing"}, "no cache tensor 'nothing'"),
        ({f"{STATE}/present": "logits"}, "'logits' is named as logits and as a cache tensor"),
        ({f"{STATE}/past": "input_ids"}, "'input_ids' is named as input_ids and as a cache tensor"),
        ({f"{STATE}/past": "past_key_values.1.key"}, "twice"),
        ({f"{STATE}/heads": 77}, "do not agree"),
        ({f"{STATE}/head_dim": 77}, "do not agree"),
        ({"graphs/decoder/outputs/logits": "present.0.key"}, "cannot be logits"),
        ({"graphs/decoder/inputs/attention_mask": "past_key_values.0.key"}, "cannot be attention_mask"),
        ({"vocab_size": 9_999}, "says that the vocabulary has 9,999 tokens"),
    ],
)
def test_what_the_graph_has(changed, values, message):
    with pytest.raises(BadArtifact, match=message):
        ortlm.load(changed("ortlm.json", values), threads=1)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("model/context_length", 10**18),
        ("model/context_length", "4096"),
        ("model/vocab_size", -5),
        ("model/eos_token_id", 10**6),
        ("model/decoder/num_hidden_layers", 0),
        ("model/decoder/head_size", "64"),
    ],
)
def test_values_of_genai(changed, place, value):
    with pytest.raises(BadArtifact, match=place.rsplit("/", 1)[-1]):
        open_artifact(changed("genai_config.json", {place: value}))


def test_more_heads_than_the_graph_has(changed):
    with pytest.raises(BadArtifact, match="do not agree"):
        ortlm.load(changed("genai_config.json", {"model/decoder/num_key_value_heads": 10**9}), threads=1)


def test_more_layers_than_the_graph_has(changed):
    with pytest.raises(BadArtifact, match="no cache tensor"):
        ortlm.load(changed("genai_config.json", {"model/decoder/num_hidden_layers": 9_000}), threads=1)


INFO = [
    "parameters", "checkpoint_bytes", "bits_per_weight", "layers", "recipe", "activations", "kv_cache", "source",
    "model_type", "precision", "target", "revision", "built_with", "merged_adapter", "cache_bytes_per_token",
]  # fmt: skip


@pytest.mark.parametrize("value", [None, "x\x1b[2J", [1], {"a": 1}, -1, 0, 1e308, True, 10**400])
def test_inspect_with_any_info(changed, capsys, value):
    folder = changed("ortlm.json", {f"info/{key}": value for key in INFO})
    code = main(["inspect", str(folder)])
    found = capsys.readouterr()
    if value == 10**400:
        assert code == 1
        assert "too large" in found.err
        return
    assert code == 0
    assert "\x1b" not in found.out
    assert "context: 512 tokens" in found.out
    assert main(["inspect", str(folder), "--json"]) == 0
    json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("key", INFO)
def test_inspect_without_some_info(changed, capsys, key):
    folder = changed("ortlm.json", {"format": 1})
    found = json.loads((folder / "ortlm.json").read_text())
    found["info"].pop(key, None)
    (folder / "ortlm.json").write_text(json.dumps(found))
    assert main(["inspect", str(folder)]) == 0


BAD = [
    "/x", "\\x", "//server/share/x", "\\\\server\\share\\x", "C:/x", "C:\\x", "C:x", "D:x", "../x", "..\\x",
    "a/../../x", "a\\..\\..\\x", "a/..\\x", "..", "", ".", "a\0b", "\\\\?\\C:\\x", "/Windows/x",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_names_that_leave_the_folder_on_some_system(tmp_path, name):
    with pytest.raises(BadArtifact, match=r"lies outside|cannot be read"):
        inside(name, tmp_path / "ortlm.json")


@pytest.mark.parametrize(
    "name", ["model.onnx", "adapters/a.onnx_adapter", "a b.onnx", "é.onnx", "..x", "a..b"]
)
def test_names_that_stay(tmp_path, name):
    assert inside(name, tmp_path / "ortlm.json") == name
    joined = PureWindowsPath("C:/models/phi") / name
    assert joined.is_relative_to("C:/models/phi")


def test_a_link_within_the_folder_stays(tmp_path):
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert inside("link", tmp_path / "ortlm.json") == "link"
    linked = tmp_path / "elsewhere"
    linked.symlink_to(tmp_path)
    assert inside("link", Path(linked) / "ortlm.json") == "link"


@pytest.mark.parametrize("name", ["model.onnx\n", "a\x1b[2J.onnx", "m" * 300, "x/" + "m" * 300])
def test_names_that_no_file_has(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadArtifact, match="can be printed") as refused:
        inside(name, tmp_path / "ortlm.json")
    assert str(refused.value).isprintable()
