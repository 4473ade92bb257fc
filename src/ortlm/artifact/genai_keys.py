"""Every key of ``genai_config.json`` (onnxruntime-genai 0.4 to 0.18): what it may be, and what ortlm makes of it.

A key is obeyed, or it changes no result and ``WITHOUT_EFFECT`` says why, or what it asks for is not supported and
``NOT_SUPPORTED`` says what that is. A key that nobody knows may mean anything, so it is an error, as in the
official runtime; only single values at the top, where none has a meaning, are ignored, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm._utils.checked_json import (
    Field,
    anything,
    check,
    flag,
    is_integer,
    is_number,
    list_of,
    number,
    object_of,
    place,
    shown,
    table,
    text,
)
from ortlm.artifact.fields import MOST_LAYERS, MOST_TOKENS, MOST_VOCABULARY
from ortlm.errors import BadArtifact

_MOST = 2**31 - 1

# Every key with its default in onnxruntime-genai 0.18; 0 for max_length is the whole context.
GENAI_SEARCH: Mapping[str, bool | int | float] = {
    "batch_size": 1,
    "blank_penalty": 0.0,
    "chunk_size": 0,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "max_length": 0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "past_present_share_buffer": False,
    "random_seed": -1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 0.0,
}
GENAI_SPECULATIVE: Mapping[str, bool | int | float] = {
    "max_draft_tokens": 4,
    "ngram_size": 0,
    "ngram_chained_lookup": False,
    "min_adaptive_k": 0,
    "cooldown": False,
}

_OTHER_TOKENS = (
    "sep_token_id decoder_start_token_id image_token_id audio_token_id boa_token_id video_token_id "
    "vision_start_token_id"
)
_MARKS = "bot_token_id eot_token_id bor_token_id eor_token_id"
_SPEECH = (
    "num_mels fft_size hop_length win_length preemph log_eps norm_eps subsampling_factor left_context "
    "conv_context pre_encode_cache_size sample_rate chunk_samples blank_id max_symbols_per_step "
    "left_context_samples right_context_samples tdt_durations"
)
_DRAFTS = "draft mtp dflash2 dspark"
_SPEECH_PARTS = "speech joiner vad moonshine depthformer audio_output"
_INPUTS = "input_ids inputs_embeds attention_mask position_ids past_key_names past_value_names past_names"
_OUTPUTS = "logits hidden_states present_key_names present_value_names present_names"
_STATES_OF_ONE_SIZE = "layers with a recurrent or convolutional state"
# What inputs and outputs of a decoder are for that no graph of ortlm has, by what they come with.
_ROLES = {
    "an encoder": "cross_past_key_names cross_past_value_names encoder_hidden_states encoder_attention_mask "
    "output_cross_qk_names cross_present_key_names cross_present_value_names",
    _STATES_OF_ONE_SIZE: "past_conv_names past_recurrent_names rnn_states_prev "
    "state_update_capture_count state_update_active present_conv_names present_recurrent_names rnn_states "
    "state_update_conv_value_names state_update_recurrent_capsule_names",
    "paged attention, which only Engine runs": "block_table block_table_windowed cumulative_sequence_lengths "
    "past_sequence_lengths attention_metadata logits_indices",
    "scales that go along with a quantized cache": "past_key_scale_names past_value_scale_names "
    "present_key_scale_names present_value_scale_names",
    "embeddings for each layer": "per_layer_inputs",
    "a head that predicts several tokens from hidden states": "hidden_states",
    "a transducer for speech": "targets targets_length lstm_hidden_state lstm_cell_state lstm_hidden_states_prev "
    "lstm_cell_states_prev outputs outputs_length",
}
# Named in many configurations for graphs that have no such input; a graph that has it says so when it runs.
_LENGTHS = "past_sequence_length current_sequence_length total_sequence_length cache_indirection"

_ENGINE = "Engine, which batches requests on its own, is left out"
WITHOUT_EFFECT: Mapping[str, str] = {
    **dict.fromkeys(
        (f"model.{name}" for name in _OTHER_TOKENS.split()),
        "such tokens stand for parts that a decoder of text does not have",
    ),
    **dict.fromkeys(
        (f"model.{name}" for name in _SPEECH.split()), "models of speech are refused by their parts"
    ),
    **dict.fromkeys(
        (f"model.{name}" for name in _DRAFTS.split()),
        "what drafts tokens changes how fast they come, not which",
    ),
    "model.decoder.hidden_size": "the graph says it",
    "model.decoder.num_attention_heads": "the graph says it",
    "model.decoder.conv_cache_size": "layers with a convolutional state have it: refused, or ortlm's own",
    "model.decoder.run_options": "how ONNX Runtime manages memory and devices in a run",
    "model.decoder.state_groups": _ENGINE,
    "model.decoder.state_update_capacity": _ENGINE,
    "model.decoder.sliding_window.pad_value": "nothing is padded to a window",
    "model.decoder.sliding_window.alignment": "nothing is padded to a window",
    "model.decoder.sliding_window.slide_inputs": "inputs are never cut to a window",
    "model.decoder.sliding_window.cache_slack": "how much larger than a window its memory is",
    **dict.fromkeys(
        (f"model.decoder.inputs.{name}" for name in _LENGTHS.split()),
        "a graph that must be given it is refused when it runs",
    ),
    "search.chunk_size": "prompts are always read in pieces, which changes no result",
    "search.past_present_share_buffer": "after loading, memory is shared as the graph allows",
    "search.diversity_penalty": "in a configuration; the official runtime has no groups of beams either",
    "search.blank_penalty": "in a configuration; only transducers for speech have blanks",
    "speculative.cooldown": "after drafts that were all wrong there are always pauses",
    "engine": _ENGINE,
    "runtime_profiles": _ENGINE,
}
NOT_SUPPORTED: Mapping[str, str] = {
    "model.encoder": "an encoder-decoder model",
    **dict.fromkeys((f"model.{name}" for name in _SPEECH_PARTS.split()), "a model of speech or sound"),
    "model.decoder.pipeline": "a model split into a pipeline of graphs",
    "model.decoder.shared_initializers": "weights that several graphs find by offsets in a file",
    **{
        f"model.decoder.{part}.{name}": why
        for part, own in (("inputs", _INPUTS), ("outputs", _OUTPUTS))
        for why, names in _ROLES.items()
        for name in names.split()
        if name not in own.split()
    },
}
# Layers as configurations name them that have keys and values and nothing else.
_ATTENTION = (
    "attention",
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "sliding_window_attention",
)


def _whole(least: int, most: int = _MOST) -> Field:
    """Return the field of a whole number, which may be written as 3.0."""
    return Field(
        lambda v: is_number(v) and float(v).is_integer() and least <= v <= most,
        f"a whole number from {least:,} to {most:,}",
        None,
    )


def _tokens() -> Field:
    return Field(
        lambda v: all(map(_is_token, v)) if isinstance(v, list) else _is_token(v),
        "a token id or a list of them",
        None,
    )


def _is_token(value: Any) -> bool:
    return is_integer(value) and 0 <= value <= MOST_VOCABULARY


def _token() -> Field:
    return Field(lambda v: is_integer(v) and -1 <= v <= MOST_VOCABULARY, "a token id", None)


_NGRAM = Field(
    lambda v: is_number(v) and float(v).is_integer() and (v == 0 or 2 <= v <= 16),
    "0 or a whole number from 2 to 16",
    None,
)
OPTION_FIELDS: Mapping[str, Field] = {
    "max_draft_tokens": _whole(1, 16), "ngram_size": _NGRAM, "min_adaptive_k": _whole(0, 16),
    # A configuration that asks for more means to take all memory; the official runtime's own limit is 32.
    "batch_size": _whole(1, 1_024), "num_beams": _whole(1, 1_024), "num_return_sequences": _whole(1, 1_024),
}  # fmt: skip


def _named(name: str, default: object) -> Field:
    """Return the field of an option, of the kind of its default."""
    if name in OPTION_FIELDS:
        return OPTION_FIELDS[name]
    if isinstance(default, bool):
        return flag(default=None)
    if isinstance(default, int):
        return _whole(-_MOST)
    return number(default=None)


def _roles(own: str) -> Field:
    known = {*own.split(), *(name for names in _ROLES.values() for name in names.split())}
    return table(dict.fromkeys(sorted(known), text(default=None)), unknown="refuse", default=None)


_WINDOW = table(
    {
        "window_size": _whole(-1),
        "pad_value": anything(default=None),
        "alignment": text(default=None),
        "slide_key_value_cache": flag(default=None),
        "slide_inputs": flag(default=None),
        "layers": list_of(_whole(0, MOST_LAYERS), most=MOST_LAYERS, default=None),
        "cache_slack": _whole(0),
    },
    unknown="refuse",
    default=None,
)
_DECODER = table(
    {
        "filename": text(default=None),
        "session_options": anything(default=None),
        "run_options": anything(default=None),
        **dict.fromkeys(
            ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_size", "conv_cache_size"),
            _whole(0),
        ),
        "num_hidden_layers": _whole(0, MOST_LAYERS),
        "layer_types": list_of(text(), most=MOST_LAYERS, default=None),
        "shared_initializers": anything(default=None),
        "pipeline": anything(default=None),
        "state_groups": anything(default=None),
        "state_update_capacity": anything(default=None),
        "sliding_window": _WINDOW,
        "inputs": _roles(f"{_INPUTS} {_LENGTHS}"),
        "outputs": _roles(_OUTPUTS),
    },
    unknown="refuse",
    default=None,
)
_PART = table(
    {
        "filename": text(default=None),
        "inputs": object_of(text(), default=None),
        "outputs": object_of(text(), default=None),
    },
    unknown="keep",
    default=None,
)
_MODEL = table(
    {
        "type": text(default=None),
        "tokenizer_dir": text(default=None),
        "context_length": Field(
            lambda v: is_number(v) and float(v).is_integer() and 0 < v <= MOST_TOKENS, "a positive integer"
        ),
        "vocab_size": _whole(0),
        "eos_token_id": _tokens(),
        **dict.fromkeys(("pad_token_id", "bos_token_id", *_MARKS.split(), *_OTHER_TOKENS.split()), _token()),
        **dict.fromkeys(_SPEECH.split(), anything(default=None)),
        **dict.fromkeys(("encoder", *_DRAFTS.split(), *_SPEECH_PARTS.split()), anything(default=None)),
        "vision": _PART,
        "embedding": _PART,
        "decoder": _DECODER,
    },
    unknown="refuse",
)
FIELDS: Mapping[str, Field] = {
    "model": _MODEL,
    "search": table(
        {key: _named(key, value) for key, value in GENAI_SEARCH.items()}, unknown="refuse", default=None
    ),
    "speculative": table(
        {key: _named(key, value) for key, value in GENAI_SPECULATIVE.items()}, unknown="refuse", default=None
    ),
    "engine": anything(default=None),
    "runtime_profiles": anything(default=None),
}


def checked_genai(found: Mapping[str, Any], path: object, *, own: bool = False) -> dict[str, Any]:
    """Return what the configuration ``found`` in the file ``path`` says, without what is null.

    ``own``: ortlm wrote the folder, so what its graphs are for is known otherwise.
    Raises BadArtifact with the key's name for keys that are not known, values of another kind and what is not
    supported.
    """
    meant = {key: value for key, value in found.items() if key in FIELDS or isinstance(value, (dict, list))}
    checked = _without_nulls(check(meant, FIELDS, file=path, error=BadArtifact, unknown="refuse"))
    for key, why in NOT_SUPPORTED.items():
        value: Any = checked
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value and not (own and why == _STATES_OF_ONE_SIZE):
            raise BadArtifact(
                f"{path} has {key}: {why}, which is not supported. ortlm runs decoders of text."
            )
    decoder = checked["model"].get("decoder")
    if decoder is None:
        raise BadArtifact(f"{path} names no model.decoder, so there is nothing that generates text.")
    for kind in decoder.get("layer_types", ()):
        if kind not in _ATTENTION and not own:
            raise BadArtifact(
                f"{path}: model.decoder.layer_types has {shown(kind)}; only layers of attention are supported."
            )
    if not decoder.get("num_hidden_layers") and not own:
        found_layers = decoder.get("num_hidden_layers", "missing")
        raise BadArtifact(
            f"{path}: model.decoder.num_hidden_layers is {found_layers}. A model without layers that keep keys "
            "and values is not supported."
        )
    return checked


def _without_nulls(found: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in found.items()
        if value is not None
    }


def keys(fields: Mapping[str, Field] = FIELDS, at: str = "") -> list[str]:
    """Return every known key with its place, such as ``model.decoder.filename``; no key of parts that are free."""
    found = []
    for key, field in fields.items():
        found += keys(field.table, place(at, key)) if field.table and field is not _PART else [place(at, key)]
    return found
