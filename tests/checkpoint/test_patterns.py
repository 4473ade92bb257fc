"""Patterns of adapters match as peft's do, and none takes long."""

from __future__ import annotations

import pytest
from peft.utils.other import get_pattern_key

from ortlm.checkpoint.patterns import Unbounded, matches

NAMES = [
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "lm_head",
    "model.layers.20.mlp.gate_up_proj",
    "xq_proj",
    "q_proj",
]


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "self_attn.q_proj",
        r"layers\.1\.mlp\.down_proj",
        "layers.1.mlp.down_proj",
        r".*\.1\..*",
        "^lm_head",
        r"model\.layers\.(1[0-9]|2[0-7])\.mlp\.down_proj",
        r"(q|k|v)_proj",
        r"layers\.\d+\.self_attn\.[qkv]_proj",
        r"layers\.\d{1,2}\.mlp\..*_proj",
        r"(?:model\.)?layers\.1\.mlp\.down_proj",
        r"model.layers.1.self_attn.q_proj$",
        "",
        "proj",
        r".*q_proj",
        r"x?q_proj",
        r"layers\.([5-9]|1\d)\..*",
        r"model\.layers\.\d+?\.mlp\.down_proj",
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_matches_as_peft_does(pattern: str, name: str) -> None:
    # peft gives the name back where no pattern matches.
    wanted = get_pattern_key([pattern], name) == pattern if pattern != name else True
    assert matches(pattern, name) == wanted


@pytest.mark.parametrize(
    "pattern",
    [
        r"((\w|\.)+)+!",
        "(a+)+b",
        "(a|a)*b",
        "(a|aa)+$",
        r"(.*a){20}",
        "(" * 2000 + ")" * 2000,
        "a{99999999999}",
        "(",
        "[",
        r"(\w+)\1+x",
        r"(?=.*a)(?=.*b).*c",
        ".*" * 12 + "x",
        "a?" * 40 + "a" * 40,
        "(a|a)" * 40 + "b",
        "x" * 5000,
        r"(?:(?:(?:a*)*)*)*b",
        "(" * 150 + "a" + ")" * 150 + "*" + ".*" * 8,
        r"(?i:(\w+\.)+)+x",
        "\\",
        "(?P<x>a)(?P=x)",
        r"(\w+\w+)+x",
    ],
    ids=lambda p: p[:20],
)
def test_what_may_never_end_is_refused(pattern: str) -> None:
    with pytest.raises(Unbounded) as caught:
        matches(pattern, "model.layers.10.self_attn.q_proj" + "a" * 60)
    assert len(str(caught.value)) < 200
