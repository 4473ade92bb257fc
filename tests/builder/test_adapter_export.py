"""LoRA adapters against peft: switched while a model runs, merged into weights, refused if they do not fit."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

import ortlm
from ortlm.artifact import Artifact
from ortlm.builder.options import BuildOptions
from ortlm.builder.planning import installed_onnxruntime, prepare
from ortlm.builder.request import BuildRequest
from ortlm.errors import BadArtifact, BadCheckpoint, BadOption, Error, UnsupportedModel
from ortlm.runtime.engine.backend import DeviceTensor
from ortlm.runtime.engine.lora import Adapters
from ortlm.runtime.engine.session import Session
from ortlm.target import TARGETS
from tests import lora, official
from tests.architectures import oracle

TOLERANCE = 1e-5
TOKENS = oracle.random_tokens(40)
ENDS = (2, 6)
Make = Callable[[str], Any]


@pytest.fixture(scope="module")
def adapter(saved: Any, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function from a row of ``lora.ADAPTERS`` to its folders, the base and the adapted model."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            row, config = lora.ADAPTERS[name]
            folder = tmp_path_factory.mktemp("adapter") / name
            model = lora.save(saved(row).model, folder, **config)
            made[name] = SimpleNamespace(
                base=saved(row).folder, folder=folder, model=model, base_model=saved(row).model
            )
        return made[name]

    return get


def open_session(built: Artifact) -> Session:
    return Session(built.graph_path(), threads=1)


def logits(
    session: Session,
    given: Mapping[str, DeviceTensor],
    *more: Mapping[str, DeviceTensor],
    tokens: Sequence[int] = TOKENS,
) -> np.ndarray:
    """Return the logits of ``tokens``, with each of the bindings after the other and the last result."""
    binding = session.binding()
    ids = np.array([tokens])
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "num_logits_to_keep": np.array(0)}
    feed["position_ids"] = np.arange(ids.shape[1])[None]
    for name, info in session.inputs.items():
        if name not in feed:
            feed[name] = np.zeros((1, info.shape[1], 0, info.shape[3]), info.dtype.numpy)
    known = {**session.inputs, **session.optional}
    for name, array in feed.items():
        if name in known:
            binding.input(name, session.tensor(array))
    for tensors in (given, *more):
        for name, tensor in tensors.items():
            binding.input(name, tensor)
        for name in session.outputs:
            binding.output(name, None)
        session.run(binding)
    return binding.result("logits").numpy()[0].astype(np.float32)


@pytest.mark.parametrize("name", lora.ADAPTERS)
def test_switched(name: str, adapter: Make, tmp_path: Path) -> None:
    """The adapted model is peft's, and without the adapter the graph is the base, bit by bit."""
    row = adapter(name)
    built = ortlm.build(row.base, tmp_path / "out", precision="fp32", adapters={"x": row.folder})
    onnx.checker.check_model(built.graph_path(), full_check=True)
    session = open_session(built)
    adapters = Adapters(session, built)
    want = oracle.prompt_logits(row.model, TOKENS)
    assert oracle.relative_error(oracle.prompt_logits(row.base_model, TOKENS), want) > 0.1
    assert oracle.relative_error(logits(session, adapters.inputs("x")), want) < TOLERANCE
    base = logits(open_session(ortlm.build(row.base, tmp_path / "base", precision="fp32")), {})
    without = logits(session, {})
    assert np.array_equal(without, logits(session, adapters.inputs("x"), adapters.defaults()))
    # A bias and the GELU after it are one operator of ONNX Runtime, unless an adapter comes between.
    assert np.array_equal(without, base) or (name, True) == (
        "parallel",
        oracle.relative_error(without, base) < 1e-6,
    )


@pytest.mark.parametrize("name", lora.ADAPTERS)
def test_merged(name: str, adapter: Make, tmp_path: Path) -> None:
    row = adapter(name)
    want = oracle.prompt_logits(row.model, TOKENS)
    for precision, bound in (("fp32", TOLERANCE), ("int8", 0.12)):
        built = ortlm.build(row.base, tmp_path / precision, precision=precision, merge_adapter=row.folder)
        got = logits(open_session(built), {})
        assert oracle.relative_error(got, want) < bound
    assert built.manifest.info["merged_adapter"] == name
    assert not built.manifest.adapters


@pytest.mark.parametrize("name", ["some-parts", "fused", "patterns"])
def test_merged_is_what_peft_merges(name: str, adapter: Make, tmp_path: Path) -> None:
    """Quantized, the two differ where a rounding of float32 tips a code over."""
    row = adapter(name)
    merged = Path(shutil.copytree(row.base, tmp_path / "merged"))
    copy.deepcopy(row.model).merge_and_unload().save_pretrained(merged)
    ours = ortlm.build(row.base, tmp_path / "ours", merge_adapter=row.folder)
    theirs = ortlm.build(merged, tmp_path / "theirs")
    one, other = (np.fromfile(b.path / "model.onnx.data", np.uint8) for b in (ours, theirs))
    assert (ours.path / "model.onnx").read_bytes() == (theirs.path / "model.onnx").read_bytes()
    assert np.mean(one != other) < 0.02
    assert oracle.relative_error(logits(open_session(ours), {}), logits(open_session(theirs), {})) < 1e-3


def test_experts_are_merged_only(saved: Any, tmp_path: Path) -> None:
    """An adapter on experts and a router becomes a part of the weights; at run time nothing could switch it."""
    row, folder = saved("phimoe"), tmp_path / "lora"
    folder.mkdir()
    generator = np.random.default_rng(0)
    block = "model.layers.0.block_sparse_moe."
    shapes = {f"{block}experts.1.w2": (64, 128), f"{block}experts.3.w1": (128, 64), f"{block}gate": (4, 64)}
    tensors, changes = {}, {}
    for module, (out, width) in shapes.items():
        a, b = (generator.standard_normal(shape).astype(np.float32) / 4 for shape in ((2, width), (out, 2)))
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
        changes[f"{module}.weight"] = b @ a
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w1", "w2", "gate"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    other = tmp_path / "other"
    shutil.copytree(row.folder, other)
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: value + changes.get(name, np.float32(0)) for name, value in weights.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    merged = ortlm.build(row.folder, tmp_path / "merged", precision="fp32", merge_adapter=folder)
    want = ortlm.build(other, tmp_path / "want", precision="fp32")
    got, same = (ortlm.load(one.path, threads=1).logits(TOKENS) for one in (merged, want))
    assert oracle.relative_error(got, same) < TOLERANCE
    with pytest.raises(UnsupportedModel, match=r"outside of the matrices .* cannot be switched .*--merge"):
        ortlm.build(row.folder, tmp_path / "no", precision="fp32", adapters={"a": folder})


def test_several_and_merged(adapter: Make, tmp_path: Path) -> None:
    """Adapters with other targets switch in one binding; one of them may lie on merged weights."""
    one, two = adapter("some-parts"), adapter("attention-out")
    built = ortlm.build(
        one.base, tmp_path / "out", precision="fp32", adapters={"one": one.folder, "two": two.folder}
    )
    session = open_session(built)
    adapters = Adapters(session, built)
    assert adapters.names == ("one", "two")
    got = logits(session, adapters.inputs("one"), adapters.inputs("two"))
    assert oracle.relative_error(got, oracle.prompt_logits(two.model, TOKENS)) < TOLERANCE
    built = ortlm.build(
        one.base,
        tmp_path / "both",
        precision="fp32",
        adapters={"two": two.folder},
        merge_adapter=one.folder,
    )
    session = open_session(built)
    merged = copy.deepcopy(one.model).merge_and_unload()
    want = lora.save(merged, tmp_path / "again", **lora.ADAPTERS["attention-out"][1])
    got = logits(session, Adapters(session, built).inputs("two"))
    assert oracle.relative_error(got, oracle.prompt_logits(want, TOKENS)) < TOLERANCE


@pytest.mark.parametrize(
    ("target", "precision"), [(t.name, p) for t in TARGETS.values() for p in t.precisions]
)
@pytest.mark.parametrize("name", ["fused", "patterns", "tied-head"])
def test_every_target(name: str, target: str, precision: str, adapter: Make, tmp_path: Path) -> None:
    row = adapter(name)
    built = ortlm.build(
        row.base, tmp_path / "out", precision=precision, target=target, adapters={"x": row.folder}
    )
    onnx.checker.check_model(built.graph_path(), full_check=True)
    if precision == "bf16":
        return  # the CPU has no bf16 kernels
    if TARGETS[target].precisions[precision] == "fp16" and installed_onnxruntime() < (1, 29):
        return  # before 1.29 optimizing fp16 for the CPU, where no user runs it, ends the process
    session = open_session(built)
    # On DirectML the context ends at the window.
    tokens = TOKENS[: built.manifest.context_tokens]
    got = logits(session, Adapters(session, built).inputs("x"), tokens=tokens)
    error = oracle.relative_error(got, oracle.prompt_logits(row.model, tokens))
    assert error < {"fp32": 1e-5, "fp16": 2e-2, "int8": 0.12, "int4": 0.9}[precision]


@pytest.mark.parametrize(
    ("name", "precision"), [("some-parts", "fp32"), ("fused", "fp32"), ("fused", "int4")]
)
def test_official_runtime(name: str, precision: str, adapter: Make, tmp_path: Path) -> None:
    """onnxruntime-genai switches to the same file and chooses the tokens that peft chooses."""
    row, steps = adapter(name), 32
    built = ortlm.build(row.base, tmp_path / "out", precision=precision, adapters={"x": row.folder})
    file = built.path / built.manifest.adapters["x"]
    prompt = TOKENS[:24]
    found = [official.greedy(built.path, prompt, steps=steps, adapter=a) for a in (file, None)]
    assert found[0] != found[1]
    if precision == "fp32":
        for got, model in zip(found, (row.model, row.base_model), strict=True):
            ids = torch.tensor([prompt])
            want = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=steps,
                min_new_tokens=steps,
                eos_token_id=list(ENDS),
                pad_token_id=0,
                do_sample=False,
            )
            assert got == want[0, len(prompt) :].tolist()


def test_generations_switch(adapter: Make, tmp_path: Path) -> None:
    """Per call, and in the middle of one; a cache that one adapter filled never serves another."""
    one, two = adapter("some-parts"), adapter("attention-out")
    built = ortlm.build(
        one.base, tmp_path / "out", precision="fp32", adapters={"one": one.folder, "two": two.folder}
    )
    lm = ortlm.load(built.path, threads=1)
    assert lm.adapters == ("one", "two")
    prompt = TOKENS[:16]
    for name, model in (("one", one.model), (None, one.base_model), ("two", two.model), ("one", one.model)):
        generator = lm.generator(adapter=name, reuse_cache=True)
        generator.append(prompt)
        assert oracle.relative_error(generator.logits[0], oracle.prompt_logits(model, prompt)[-1]) < TOLERANCE
        made = lm.generate(prompt, adapter=name, max_new_tokens=4, ignore_eos=True, logprobs=0)
        chosen = oracle.prompt_logits(model, [*prompt, *made.token_ids[:3]])[-4:]
        want = torch.log_softmax(torch.tensor(chosen), dim=1)
        for at, entry in enumerate(made.logprobs):
            assert entry.logprob == pytest.approx(float(want[at, entry.token_id]), abs=1e-4)
    generator.change(adapter=None)
    generator.rewind(0)
    generator.append(prompt)
    want = oracle.prompt_logits(one.base_model, prompt)[-1]
    assert oracle.relative_error(generator.logits[0], want) < TOLERANCE
    with pytest.raises(BadOption, match=r"no adapter 'on'.*Did you mean: one"):
        lm.generate(prompt, adapter="on")
    lm.load_adapter("again", built.path / built.manifest.adapters["one"])
    assert lm.generate(prompt, adapter="again", max_new_tokens=2).token_ids
    lm.unload_adapter("again")
    with pytest.raises(BadOption, match="no adapter 'again'"):
        lm.generate(prompt, adapter="again")


# --- the folder ---------------------------------------------------------------------------------------------


def test_folder(adapter: Make, tmp_path: Path) -> None:
    """Sizes are known before, every file is in the manifest, and the same input gives the same bytes."""
    row, out = adapter("fused"), tmp_path / "out"
    prepared = prepare(BuildRequest(row.base, adapters={"x": row.folder}))
    first = ortlm.build(row.base, out, adapters={"x": row.folder})
    file = out / "adapters" / "x.onnx_adapter"
    before = file.read_bytes(), (out / "model.onnx").read_bytes()
    assert abs(file.stat().st_size / prepared.outline.adapter_bytes["x"] - 1) < 0.2
    assert first.manifest.info["files"]["adapters/x.onnx_adapter"]["bytes"] == file.stat().st_size
    ortlm.build(row.base, out, adapters={"x": row.folder}, force=True)
    assert (file.read_bytes(), (out / "model.onnx").read_bytes()) == before
    (out / "adapters" / "mine.txt").write_text("mine")
    with pytest.raises(BadOption, match=r"'adapters/mine.txt', which no build wrote"):
        ortlm.build(row.base, out, force=True)
    file.unlink()
    with pytest.raises(BadArtifact, match=r"x.onnx_adapter is missing"):
        ortlm.open_artifact(out)


def test_first_layers_only(adapter: Make, tmp_path: Path) -> None:
    options = BuildOptions(layers=1)
    built = ortlm.build(
        adapter("biases").base, tmp_path / "out", adapters={"x": adapter("biases").folder}, options=options
    )
    session = open_session(built)
    assert all(name.startswith("layers.0.") for name in Adapters(session, built).defaults())
    with pytest.raises(BadOption, match="changes none of the layers"):
        prepare(
            BuildRequest(
                adapter("one-layer").base, adapters={"x": adapter("one-layer").folder}, options=options
            )
        )


# --- what a build refuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"peft_type": "IA3"}, UnsupportedModel, r"peft_type is 'IA3'; only 'LORA'"),
        ({"use_dora": True}, BadCheckpoint, r"has no lora_magnitude_vector, and .* says use_dora = true"),
        ({"use_dora": "yes"}, BadCheckpoint, r"use_dora is 'yes', expected true or false"),
        ({"bias": "some"}, UnsupportedModel, "bias is 'some'"),
        (
            {"modules_to_save": ["lm_head"]},
            BadCheckpoint,
            "modules_to_save names 'lm_head', of which there is no",
        ),
        ({"ensure_weight_tying": True}, UnsupportedModel, "ensure_weight_tying is True"),
        ({"trainable_token_indices": [1]}, UnsupportedModel, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, UnsupportedModel, "init_lora_weights is 'pissa'"),
        ({"of_tomorrow": 1}, UnsupportedModel, "of_tomorrow is 1"),
        ({"r": 5}, BadCheckpoint, r"gives the rank 5; expected \[5, in\]"),
        ({"r": "x"}, BadCheckpoint, "r is 'x', expected a whole number"),
        ({"r": 10**400}, BadCheckpoint, "too large"),
        ({"r": 10**12}, BadCheckpoint, "r is 1000000000000, expected"),
        ({"lora_alpha": None}, BadCheckpoint, "lora_alpha is missing"),
        ({"lora_alpha": 1e300}, BadCheckpoint, "lora_alpha is 1e.300, expected"),
        ({"lora_alpha": float("inf")}, BadCheckpoint, "no finite number"),
        ({"use_rslora": "yes"}, BadCheckpoint, "use_rslora is 'yes'"),
        ({"rank_pattern": {"(": 1}}, BadCheckpoint, "rank_pattern has '.', which cannot be used"),
        ({"rank_pattern": {r"((\w|\.)+)+!": 1}}, BadCheckpoint, "several ways"),
        ({"rank_pattern": {"q_proj": "x"}}, BadCheckpoint, "rank_pattern.q_proj is 'x'"),
        ({"alpha_pattern": {"(" * 5000: 1}}, BadCheckpoint, "characters, at most"),
        ({"alpha_pattern": 3}, BadCheckpoint, "alpha_pattern is 3"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_configurations_refused(
    changes: dict[str, Any], error: type[Error], message: str, adapter: Make, tmp_path: Path
) -> None:
    row = adapter("some-parts")
    folder = Path(shutil.copytree(row.folder, tmp_path / "odd"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(error, match=message):
        prepare(BuildRequest(row.base, merge_adapter=folder))


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
ODD = Q.replace("q_proj", "u_proj")
NORM = "base_model.model.model.layers.0.input_layernorm.lora_"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({f"{Q}A.weight": None}, BadCheckpoint, r"q_proj.lora_A.weight' is missing"),
        ({f"{Q}magnitude_vector": np.ones(64)}, BadCheckpoint, "has a lora_magnitude_vector, .* = false"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": np.ones(3)}, BadCheckpoint, "expected a matrix"),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 288))},
            BadCheckpoint,
            "lora_embedding_B' is missing",
        ),
        ({"base_model.model.lm_head.weight": np.ones((288, 64))}, BadCheckpoint, "has no modules_to_save"),
        ({f"{Q}B.bias": np.ones(64)}, UnsupportedModel, "B.bias'.* a bias"),
        ({f"{Q}A.weight": np.ones((4, 32))}, BadCheckpoint, r"\[64, 32\], but the model's .* is \[64, 64\]"),
        ({f"{Q}A.weight": np.full((4, 64), np.nan)}, BadCheckpoint, "holds nan"),
        ({f"{Q}A.weight": np.ones((4, 64), np.int64)}, BadCheckpoint, "is I64 of shape"),
        (
            {f"{ODD}A.weight": np.ones((4, 4)), f"{ODD}B.weight": np.ones((4, 4))},
            BadCheckpoint,
            r"changes 'model.layers.0.self_attn.u_proj.weight', which the model has not",
        ),
        (
            {f"{NORM}A.weight": np.ones((4, 4)), f"{NORM}B.weight": np.ones((4, 4))},
            UnsupportedModel,
            r"(which is no matrix|outside of the matrices of attention)",
        ),
    ],
)  # fmt: skip
def test_tensors_refused(
    changes: dict[str, Any], error: type[Error], message: str, adapter: Make, tmp_path: Path
) -> None:
    row = adapter("some-parts")
    folder = Path(shutil.copytree(row.folder, tmp_path / "odd"))
    tensors: dict[str, Any] = load_file(folder / "adapter_model.safetensors")
    for name, array in changes.items():
        tensors[name] = array if array is None or array.dtype != np.float64 else array.astype(np.float32)
    there = {name: array for name, array in tensors.items() if array is not None}
    save_file(there, folder / "adapter_model.safetensors")
    with pytest.raises(error, match=message):
        ortlm.build(row.base, tmp_path / "out", merge_adapter=folder)
    with pytest.raises(error, match=message):
        ortlm.build(row.base, tmp_path / "out", adapters={"x": folder})
    assert not (tmp_path / "out").exists()


def test_copies_of_the_head(adapter: Make, tmp_path: Path) -> None:
    """peft saves a head with its LoRA; another one than the checkpoint's is a change that would be lost."""
    row = adapter("head")
    folder = Path(shutil.copytree(row.folder, tmp_path / "odd"))
    tensors = load_file(folder / "adapter_model.safetensors")
    copy_of_head = "base_model.model.lm_head.base_layer.weight"
    tensors[copy_of_head] = tensors[copy_of_head] + 1
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(
        UnsupportedModel, match=r"lm_head.base_layer.weight' changes 'lm_head.weight' as a whole"
    ):
        prepare(BuildRequest(row.base, adapters={"x": folder}))


def test_paths_refused(adapter: Make, tmp_path: Path) -> None:
    row = adapter("some-parts")
    pickled = Path(shutil.copytree(row.folder, tmp_path / "pickled"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    for path, error, message in (
        (tmp_path / "x.onnx_adapter", BadOption, "loaded when a model runs"),
        (tmp_path / "nothing", BadCheckpoint, "is not a folder"),
        (row.base, BadCheckpoint, "has no adapter_config.json"),
        (pickled, BadCheckpoint, "a pickle"),
        (
            adapter("fused").folder,
            BadCheckpoint,
            r"changes 'model.layers.0.*_proj.weight', which the model has not. Did",
        ),
    ):
        with pytest.raises(error, match=message):
            prepare(BuildRequest(row.base, adapters={"x": path}))
    for names in (["../x"], ["a b"], [""], [".x"], ["x", "X"]):
        with pytest.raises(BadOption, match=r"letters, digits|differ in case"):
            prepare(BuildRequest(row.base, adapters=dict.fromkeys(names, row.folder)))


def test_beyond_fp16(adapter: Make, tmp_path: Path) -> None:
    row = adapter("some-parts")
    folder = Path(shutil.copytree(row.folder, tmp_path / "odd"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e9}))
    with pytest.raises(BadCheckpoint, match=r"lora_B has a value of .*beyond the largest of fp16"):
        ortlm.build(row.base, tmp_path / "out", precision="fp16", target="cuda", adapters={"x": folder})


# --- loading ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(adapter: Make, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("loaded") / "out"
    built = ortlm.build(adapter("some-parts").base, out, adapters={"x": adapter("some-parts").folder})
    session = open_session(built)
    return SimpleNamespace(artifact=built, session=session, file=out / "adapters" / "x.onnx_adapter")


def test_names(loaded: Any) -> None:
    adapters = Adapters(loaded.session, loaded.artifact)
    adapters.load(loaded.file, "again")
    assert adapters.names == ("x", "again")
    assert adapters.inputs("again") == adapters.inputs("again")
    assert adapters.inputs("x").keys() == adapters.defaults().keys()
    with pytest.raises(BadOption, match="there is an adapter 'x' already"):
        adapters.load(loaded.file, "x")
    adapters.unload("x")
    with pytest.raises(BadOption, match=r"no adapter 'agian'; there are again. Did you mean: again"):
        adapters.inputs("agian")
    with pytest.raises(BadOption, match="no adapter 'x'"):
        adapters.unload("x")


def test_files_refused(loaded: Any, adapter: Make, tmp_path: Path) -> None:
    adapters = Adapters(loaded.session, loaded.artifact)
    damaged = tmp_path / "damaged.onnx_adapter"
    damaged.write_bytes(loaded.file.read_bytes()[:-100])
    row = adapter("fused")
    others = [
        ortlm.build(row.base, tmp_path / p, precision=p, target=t, adapters={"x": row.folder}).path
        for p, t in (("int4", "cpu"), ("fp16", "cuda"))
    ]
    for path, message in (
        (damaged, "cannot be read as an adapter"),
        (tmp_path / "nothing", "is not a file"),
        (others[0] / "adapters" / "x.onnx_adapter", "no adapter input of .*adapter for another model"),
        (others[1] / "adapters" / "x.onnx_adapter", "no adapter input of|is fp16"),
    ):
        with pytest.raises(BadArtifact, match=message):
            adapters.load(path, "y")
    assert adapters.names == ("x",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A": (64, 2), "B": None}, "its lora_B is missing"),
        ({"A": None, "B": (2, 256)}, "without its lora_A"),
        ({"A": (64, 2), "B": (3, 256)}, r"its lora_B is \[3, 256\]"),
        ({"A": (32, 2), "B": (2, 256)}, r"takes fp32 \[64, rank\]"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit(changes: dict[str, Any], message: str, loaded: Any, tmp_path: Path) -> None:
    from ortlm.builder.adapter_export import write_adapter

    module = "layers.0.mlp.gate_up_proj"
    arrays = {f"{module}.lora_{part}": np.ones(shape, np.float32) for part, shape in changes.items() if shape}
    write_adapter(tmp_path / "odd.onnx_adapter", arrays)
    with pytest.raises(BadArtifact, match=message):
        Adapters(loaded.session, loaded.artifact).load(tmp_path / "odd.onnx_adapter", "odd")


def test_graph_without_inputs(loaded: Any, adapter: Make, tmp_path: Path) -> None:
    built = ortlm.build(adapter("some-parts").base, tmp_path / "out")
    adapters = Adapters(open_session(built), built)
    assert not adapters.names
    assert not adapters.defaults()
    with pytest.raises(BadArtifact, match=r"has no inputs for adapters.*--adapter NAME=PATH"):
        adapters.load(loaded.file, "x")
