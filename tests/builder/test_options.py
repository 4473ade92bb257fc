"""Every option of the official builder is taken, or refused by its name and with the reason."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import ortlm
from ortlm.builder.extra_options import parse_extra_options
from ortlm.builder.options import BuildOptions
from ortlm.cli import main
from ortlm.errors import BadOption
from ortlm.target import TARGETS, check_precision
from tests.architectures import oracle

CPU = TARGETS["cpu"]
# A value for each option of onnxruntime-genai 0.18, and what becomes of it: a field and its value, None for an
# option that changes nothing here, or words of the reason why it is refused.
ROWS: list[tuple[str, str, Any]] = [
    ("accuracy_level=2", "accuracy_level", 2),
    ("block_size=64", "block_size", 64),
    ("is_symmetric=false", "symmetric", False),
    ("op_types_to_quantize=MatMul", "embed_bits", 0),
    ("nodes_to_exclude=/a,/b", "excluded_nodes", ("/a", "/b")),
    ("algo_config=rtn_last", "bits8_roles", ("head",)),
    ("matmul_mixed_precision=last_matmul:int8", "head_bits", 8),
    ("num_hidden_layers=3", "layers", 3),
    ("filename=a.onnx", "filename", "a.onnx"),
    ("config_only=true", "config_only", True),
    ("hf_token=false", "token", False),
    ("prune_lm_head=false", "all_logits", True),
    ("include_hidden_states=1", "hidden_states", True),
    ("windowed_kv_cache=true", "window_cache", True),
    ("kv_cache_quant_scheme=int8_per_tensor", "kv_cache", "int8_per_tensor"),
    ("fuse_qkv=false", "fuse_qkv", False),
    ("disable_qkv_fusion=true", "fuse_qkv", False),
    ("disable_qkv_fusion=false", "fuse_qkv", True),
    ("fuse_mlp_gate_up=false", "fuse_gate_up", False),
    (
        "use_device_allocator_for_initializers=true",
        "session_options",
        (("session.use_device_allocator_for_initializers", "1"),),
    ),
    ("use_device_allocator_for_initializers=false", "session_options", ()),
    ("enable_cuda_fpa_intb_gemm=true", "refused", "it is for -e cuda"),
    ("shared_embeddings=true", "", None),
    ("qmoe_block_size=64", "expert_block", 64),
    ("moe_quant_type=int8", "expert_bits", 8),
    ("use_8bits_moe=true", "expert_bits", 8),
    ("use_8bits_moe=false", "expert_bits", None),
    ("exclude_mtp=true", "", None),
    ("exclude_mtp=false", "", None),
    ("hf_remote=false", "", None),
    ("hf_remote=true", "refused", "never runs code"),
    ("matmulnbits_weights_prepacked=0", "", None),
    ("matmulnbits_weights_prepacked=1", "refused", "one kind of GPU"),
    ("qmoe_weights_prepacked=-1", "", None),
    ("qmoe_weights_prepacked=1", "refused", "as QMoE on CPU takes them"),
    ("enable_cuda_graph=false", "", None),
    ("enable_cuda_graph=true", "refused", "capture"),
    ("enable_dml_graph=false", "", None),
    ("enable_dml_graph=true", "refused", "capture"),
    ("enable_webgpu_graph=true", "refused", "capture"),
    ("use_qdq=true", "refused", "MatMulNBits"),
    ("use_cuda_bf16=true", "refused", "-p bf16"),
    ("exclude_embeds=true", "refused", "not built yet"),
    ("exclude_lm_head=true", "refused", "not built yet"),
    ("fuse_qk_norm_gqa=true", "refused", "normalized before attention"),
    ("use_paged_attention=true", "refused", "not built"),
    ("paged_block_size=256", "refused", "paged attention"),
    ("paged_chunk_size=256", "refused", "paged attention"),
    ("gpu_utilization_factor=0.5", "refused", "paged attention"),
    ("max_batch_size=4", "refused", "paged attention"),
    ("max_scheduled_tokens=4", "refused", "paged attention"),
    ("num_blocks=4", "refused", "paged attention"),
    ("kv_cache_rotation=none", "", None),
    ("kv_cache_rotation=hadamard", "refused", "paged attention"),
    ("kv_cache_scale_file=x.json", "refused", "the build itself measures"),
    ("adapter_path=x", "refused", "--merge-adapter"),
    ("aux_hidden_state_layers=1,2", "refused", "draft"),
    ("dflash2_path=x", "refused", "draft"),
    ("dflash2_num_draft_tokens=4", "refused", "draft"),
    ("dflash2_fuse_gate_up=true", "refused", "draft"),
    ("dflash2_fuse_qkv=true", "refused", "draft"),
    ("dflash2_precision=bf16", "refused", "draft"),
    ("dspark_path=x", "refused", "draft"),
    ("dspark_num_draft_tokens=4", "refused", "draft"),
    ("dspark_top_k=4", "refused", "draft"),
    ("max_draft_tokens=4", "refused", "draft"),
    ("mtp_quant_config={}", "refused", "no model that is built here"),
    ("linear_attn_op=linear_attention", "", None),
    ("linear_attn_op=gated_delta_net", "refused", "recurrent"),
    ("state_update_capacity=0", "", None),
    ("state_window=3", "refused", "recurrent"),
]
# Options with tests of their own, by who has them.
ELSEWHERE = {"use_webgpu_fp32"}
WIDE_HEAD = "matmul_mixed_precision=last_matmul:int8"


def official_names() -> set[str]:
    builder = pytest.importorskip("onnxruntime_genai.models.builder")
    found = inspect.getsource(builder)
    text = found[found.index('"--extra_options"') :]
    text = text[: text.index("\n    )\n")]
    return set(re.findall(r"^ {16}([a-z][a-z0-9_]+) = ", text, re.MULTILINE))


def test_every_official_option_has_a_row() -> None:
    names = official_names()
    assert len(names) > 40
    assert names - ELSEWHERE <= {pair.partition("=")[0] for pair, _, _ in ROWS}


@pytest.mark.parametrize(("pair", "field", "value"), ROWS, ids=[row[0] for row in ROWS])
def test_official_options(pair: str, field: str, value: Any) -> None:
    if field == "refused":
        with pytest.raises(BadOption, match=re.escape(pair.partition("=")[0])) as caught:
            parse_extra_options([pair], target=CPU)
        assert value in str(caught.value)
        return
    found = parse_extra_options([pair], target=CPU)
    if field:
        assert getattr(found, field) == value
    else:
        assert found == BuildOptions()


@pytest.mark.parametrize(
    "pair",
    [
        "qmoe_block_size=x",
        "moe_quant_type=int5",
        "moe_quant_type=mxfp4",
        "use_8bits_moe=maybe",
        "exclude_mtp=2",
    ],
)
def test_values_are_looked_at_where_they_change_nothing(pair: str) -> None:
    with pytest.raises(BadOption, match=pair.partition("=")[0]):
        parse_extra_options([pair], target=CPU)


def test_contradictions_are_refused() -> None:
    with pytest.raises(BadOption, match="contradict"):
        parse_extra_options(["fuse_qkv=true", "disable_qkv_fusion=true"], target=CPU)
    for one, other in (("embed_bits=8", "op_types_to_quantize=MatMul"), ("head_bits=4", WIDE_HEAD)):
        with pytest.raises(BadOption, match=f"{re.escape(other)} and {one} contradict each other"):
            parse_extra_options([one, other], target=CPU)
    assert parse_extra_options(["head_bits=8", WIDE_HEAD], target=CPU).head_bits == 8
    with pytest.raises(BadOption, match="separate products"):
        parse_extra_options(["fuse_qkv=true"], target=TARGETS["dml"])


def test_fp32_on_cuda_says_why() -> None:
    with pytest.raises(BadOption, match="GroupQueryAttention computes in fp16 and bf16 only"):
        check_precision("fp32", TARGETS["cuda"])


@pytest.mark.parametrize("fused", ["fuse_qkv", "fuse_gate_up"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "qwen3"])
def test_separate_products_compute_the_same(name: str, fused: str, saved: Any, build: Any) -> None:
    tokens = oracle.random_tokens(40)
    lm = build(name, "fp32", BuildOptions(**{fused: False}))
    assert oracle.relative_error(lm.logits(tokens), oracle.prompt_logits(saved(name).model, tokens)) < 1e-4
    apart = {"fuse_qkv": "q_proj", "fuse_gate_up": "gate_proj"}[fused]
    graph = (lm.artifact.path / "model.onnx").read_bytes()
    assert apart.encode() in graph


def test_session_options_reach_both_runtimes(saved: Any, tmp_path: Path) -> None:
    options = parse_extra_options(["use_device_allocator_for_initializers=true"], target=CPU)
    ortlm.build(saved("llama").folder, tmp_path / "out", precision="fp32", options=options)
    key = "session.use_device_allocator_for_initializers"
    assert ortlm.load(tmp_path / "out", threads=1).manifest.session_options == {key: "1"}
    official = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert official["model"]["decoder"]["session_options"][key] == "1"


def test_builder_module_takes_them_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = main(
        ["build", "-m", "x/y", "-o", str(tmp_path / "out"), "-p", "int4", "-e", "cpu", "-c", str(tmp_path),
         "--extra_options", "use_qdq=true"]
    )  # fmt: skip
    assert code == 2
    assert "use_qdq=true does not apply" in capsys.readouterr().err
