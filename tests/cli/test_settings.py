"""Every flag of a generation reaches its setting, and usage errors are told in the words of the command line."""

import argparse
from dataclasses import fields

import pytest

from ortlm.cli.settings import add_settings, settings_of
from ortlm.errors import BadOption
from ortlm.runtime.sampling.settings import Settings


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_settings(parser)
    return settings_of(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["-n", "5"], "max_new_tokens", 5),
        (["--max-length", "9"], "max_length", 9),
        (["--min-tokens", "2"], "min_new_tokens", 2),
        (["--min-length", "3"], "min_length", 3),
        (["--stop", "a", "--stop", "b"], "stop", ("a", "b")),
        (["--stop-token", "7"], "stop_token_ids", (7,)),
        (["--ignore-eos"], "ignore_eos", True),
        (["--sample"], "do_sample", True),
        (["--temp", "0.5"], "temperature", 0.5),
        (["--temperature", "0"], "temperature", 0.0),
        (["--top-k", "0"], "top_k", 0),
        (["--top-p", "0.9"], "top_p", 0.9),
        (["--min-p", "0.1"], "min_p", 0.1),
        (["--typical-p", "0.2"], "typical_p", 0.2),
        (["--seed", "4"], "seed", 4),
        (["--repetition-penalty", "1.2"], "repetition_penalty", 1.2),
        (["--presence-penalty", "-1"], "presence_penalty", -1.0),
        (["--frequency-penalty", "0.3"], "frequency_penalty", 0.3),
        (["--no-repeat-ngram", "3"], "no_repeat_ngram_size", 3),
        (["--logit-bias", "5=-2.5", "--logit-bias", "6=1"], "logit_bias", {5: -2.5, 6: 1.0}),
        (["--bad-word", "x"], "bad_words", ("x",)),
        (["--n", "2", "--sample"], "num_return_sequences", 2),
        (["--beams", "3"], "num_beams", 3),
        (["--beams", "2", "--length-penalty", "0.5"], "length_penalty", 0.5),
        (["--beams", "2", "--early-stopping", "never"], "early_stopping", "never"),
        (["--beams", "4", "--beam-groups", "2"], "num_beam_groups", 2),
        (["--logprobs"], "logprobs", 0),
        (["--prompt-logprobs", "3"], "prompt_logprobs", 3),
        (["--lookup"], "draft", "lookup"),
        (["--lookup", "--draft-tokens", "4"], "draft_tokens", 4),
        (["--beams", "2", "--beam-groups", "2", "--diversity-penalty", "1"], "diversity_penalty", 1.0),
        (["--adapter", "french=some.onnx_adapter"], "adapter", "french"),
    ],
)
def test_flags_reach_settings(arguments, field, value):
    assert getattr(parsed(*arguments), field) == value


def test_forms(tmp_path):
    (tmp_path / "s.json").write_text('{"type": "integer"}')
    (tmp_path / "g.lark").write_text('start: "a" | "b"')
    inline = parsed("--json-schema", '{"type": "integer"}').guidance
    assert parsed("--json-schema", str(tmp_path / "s.json")).guidance == inline
    for arguments in (
        ["--json-object"], ["--regex", "[a-z]+"], ["--choice", "a", "--choice", "b"],
        ["--grammar", str(tmp_path / "g.lark")],
    ):  # fmt: skip
        assert parsed(*arguments).guidance is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--logit-bias", "five"], "takes ID=X"),
        (["--json-schema", "/nowhere.json"], "--json-schema /nowhere.json cannot be read"),
        (["--json-schema", "{broken"], "it is no JSON"),
        (["--regex", "("], "regex"),
        (["--grammar", "/nowhere"], "--grammar /nowhere cannot be read: No such file"),
        (["--n", "3", "--beams", "2"], "more than --beams"),
        (["--n", "2"], "greedy decoding has one answer only"),
        (["--sample", "--temp", "0"], "--sample asks for sampling, but --temp 0 is greedy"),
        (["--top-k", "-1"], "--top-k must be"),
        (["--no-repeat-ngram", "-1"], "--no-repeat-ngram must be"),
        (["--beams", "3", "--beam-groups", "2"], r"--beams \(3\) must be a multiple of --beam-groups"),
        (["--length-penalty", "2"], "for beam search only"),
        (["--early-stopping", "never"], "for beam search only"),
        (["--draft-tokens", "4"], "for drafts only"),
        (["--beams", "2", "--draft", "small"], "--beams does not go with --draft"),
        (["--adapter", "=file"], "takes NAME or NAME=FILE"),
        (["--bad-word", ""], "none of them empty"),
    ],
)
def test_wrong_use(arguments, message):
    with pytest.raises(BadOption, match=message):
        parsed(*arguments)


def test_every_setting_has_a_flag():
    """But for functions, which only a program can give."""
    parser = argparse.ArgumentParser()
    add_settings(parser)
    # What reaches a field under another name, or as one of several flags.
    others = {
        "do_sample": "sample",
        "stop_token_ids": "stop_token",
        "bad_words": "bad_word",
        "suppress_tokens": "suppress_token",
        "begin_suppress_tokens": "begin_suppress_token",
        "guidance": "json_schema",
    }
    there = {action.dest for action in parser._actions}
    wanted = {others.get(entry.name, entry.name) for entry in fields(Settings)} - {"processors"}
    assert wanted <= there
