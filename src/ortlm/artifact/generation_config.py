"""What a publisher wants every answer to be like: the keys of ``generation_config.json`` that a runtime obeys.

A build copies them into the manifest under Hugging Face's names, and a runtime fills in with them what a caller
does not ask for. Both check them by the same table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm._utils.checked_json import Field, check, flag, integer, is_integer, is_number, list_of, number
from ortlm.errors import Error

_MOST_IDS, _LAST_ID = 1 << 20, 2**31 - 1


def _is_bias(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], list)
        and bool(value[0])
        and all(is_integer(token) and 0 <= token <= _LAST_ID for token in value[0])
        and is_number(value[1])
    )


_ids = list_of(integer(0, _LAST_ID), most=_MOST_IDS, default=None)
GENERATION: dict[str, Field] = {
    "do_sample": flag(default=None),
    "temperature": number(0.0, 1e6, default=None),
    "top_k": integer(0, 2**31 - 1, default=None),
    "top_p": number(0.0, 1.0, default=None),
    "min_p": number(0.0, 1.0, default=None),
    "typical_p": number(0.0, 1.0, default=None),
    "repetition_penalty": number(1e-6, 1e6, default=None),
    "no_repeat_ngram_size": integer(0, 2**31 - 1, default=None),
    "min_length": integer(0, 2**31 - 1, default=None),
    "min_new_tokens": integer(0, 2**31 - 1, default=None),
    "bad_words_ids": list_of(list_of(integer(0, _LAST_ID), least=1, most=1000), most=_MOST_IDS, default=None),
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "sequence_bias": list_of(
        Field(_is_bias, "a list of token ids with the number that is added to the last one's logit"),
        most=_MOST_IDS,
        default=None,
    ),
}


def read_generation(
    found: Mapping[str, Any], *, file: object, error: type[Error], at: str = ""
) -> dict[str, Any]:
    """Return the keys of ``found`` that are obeyed and have a value.

    Raises ``error`` for a value of another type or out of range.
    """
    checked = check(found, GENERATION, file=file, error=error, at=at)
    return {key: value for key, value in checked.items() if value is not None}


# Keys that change what is generated and that a runtime does not obey, with the values under which they do nothing.
_NOT_OBEYED: dict[str, tuple[Any, ...]] = {
    "max_length": (20,),
    "max_new_tokens": (),
    "max_time": (),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "guidance_scale": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "token_healing": (False,),
}
# Bookkeeping, speed and the form in which a result comes back.
_HARMLESS = frozenset(
    {
        "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id",
        "decoder_start_token_id", "use_cache", "cache_implementation", "cache_config",
        "return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
        "output_hidden_states", "low_memory", "is_assistant", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
        "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens",
        "max_matching_ngram_size", "return_legacy_cache", "compile_config", "disable_compile",
        "continuous_batching_config", "prefill_chunk_size", "generation_kwargs", "trust_remote_code",
        "chat_format", "use_model_defaults",
    }
)  # fmt: skip


def not_obeyed(found: Mapping[str, Any]) -> list[str]:
    """Return the keys of a ``generation_config.json`` that ask for something that no runtime here does."""
    named = []
    for key, value in found.items():
        if key in GENERATION or key in _HARMLESS or key.startswith("_") or value in (None, [], {}, ""):
            continue
        if key in _NOT_OBEYED and value in _NOT_OBEYED[key]:
            continue
        named.append(key)
    return sorted(named)
