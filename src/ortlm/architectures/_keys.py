"""Which keys of ``config.json`` a family has read, and what becomes of the others.

A key that changes what the model computes is read by its family or refused: one that is passed over would give
another model without a word. So the object that a family reads remembers what was asked of it. Of the rest, keys
that are known to be bookkeeping are fine, names that speak of a computation are refused unless their value says
that it is off, and what nobody knows is told to whoever builds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ortlm._utils.formatting import printable
from ortlm.errors import UnsupportedModel

FULL, SLIDING = "full_attention", "sliding_attention"


class Keys(Mapping[str, Any]):
    """An object of ``config.json`` that remembers which of its keys were read, in ``asked``; parts do likewise."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values
        self._parts: dict[str, Keys] = {}
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        self.asked.add(key)
        if isinstance(value, Mapping):
            return self._parts.setdefault(key, Keys(value))
        return value

    def __contains__(self, key: object) -> bool:
        # To look whether a key is there is not to read it.
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return repr(dict(self._values))

    def ignore(self, key: str) -> None:
        """Say that ``key`` is known and changes nothing, nor does anything below it."""
        self.asked.add(key)

    def unread(self) -> dict[str, Any]:
        """Return the keys that nobody has read, and their values."""
        return {key: value for key, value in self._values.items() if key not in self.asked}

    def parts(self) -> dict[str, Keys]:
        """Return the objects under keys that were read."""
        return dict(self._parts)


class WithDefaults(Mapping[str, Any]):
    """``values`` with ``defaults`` for keys that are absent or null; what is read of it is read of ``values``.

    What is ``fixed`` wins over both.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any],
        *,
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        self._values, self._defaults, self._fixed = values, defaults, fixed or {}

    def __getitem__(self, key: str) -> Any:
        if key in self._fixed:
            return self._fixed[key]
        if key in self._defaults and self._values.get(key) is None:
            return self._defaults[key]
        return self._values[key]

    def ignore(self, key: str) -> None:
        """Say that ``key`` is known and changes nothing."""
        if isinstance(self._values, Keys):
            self._values.ignore(key)

    def __contains__(self, key: object) -> bool:
        return key in self._fixed or key in self._defaults or key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter({**self._defaults, **self._values})

    def __len__(self) -> int:
        return len({**self._defaults, **self._values})


def shown(value: Any) -> str:
    """Return ``value`` of ``config.json`` as a message shows it: short, and on one line."""
    if value is None:
        return "null"
    if isinstance(value, int) and value.bit_length() > 1000:
        # Longer ones Python refuses to write.
        return f"a whole number of {value.bit_length()} bits"
    text = printable(repr(value))
    if len(text) > 60:
        text = f"{text[:50]}..."
    return f"{text} ({len(value)} entries)" if isinstance(value, list) else text


def quoted(text: str) -> str:
    """Return a name that stands in ``config.json`` as a message shows it."""
    return f'"{printable(repr(text[:100])[1:-1])}"'


def check_read(keys: Mapping[str, Any], *, windows: bool | None, at: str = "config.json") -> list[str]:
    """Return the paths of keys that nobody knows, of ``keys`` and the objects in it.

    ``windows`` says whether all layers have a sliding window (True), none has (False), or some have (None).
    Raises UnsupportedModel for a key that may change what the model computes and that its family has not read.
    """
    if not isinstance(keys, Keys):
        return []
    unknown: list[str] = []
    for key, value in keys.unread().items():
        if _harmless(key, value, keys, windows):
            continue
        name = key.lower()
        if key in _MORE or (_COMPUTES.search(name) and not _TRAINING.search(name)):
            raise UnsupportedModel(
                f"{at}: {quoted(key)} is {shown(value)}, which may change what the model computes, and is not "
                "known in this family. If the model's own code does not look at it either, remove the key from "
                "the file."
            )
        unknown.append(f"{at}: {quoted(key)[1:-1]}".removeprefix("config.json: "))
    for key, part in keys.parts().items():
        unknown += check_read(part, windows=windows, at=f'{at}: "{key}"')
    return unknown


# Words in the names of keys that speak of what is computed: nearly all keys that matter in the configuration
# classes of causal models in transformers have one of them; the others follow.
_COMPUTES = re.compile(
    r"scal(e|es|ing)|soft_?cap|multiplier|window|rope|rotary|norm(?!alizer)|attention|attn|residual|embedding|logit"
    r"|softmax|(^|_)(q|k|v|qk|qkv|bias|biases|expert|experts|moe|router|activation|act|fn|clip|alibi|embed|head|heads"
    r"|layer|layers|hidden|conv|mamba|ssm|mlp|ffn|ff|gate|gated|gating|dim|dims|chunk|rank|channels|vocab|sink|sinks"
    r"|causal|bidirectional|position|positions|width|depth|parallel|proj|projection|projector|mtp|theta|swiglu|glu"
    r"|quantization|compression|quant|sparse|mup|eps|epsilon|patch|vision|image|audio|video|pooling|interleave"
    r"|interleaved|blocks?|shared|recurrent|state|kernel|lora|decoder|encoder|factor|beta|alpha|gamma|freq"
    r"|(hidden|intermediate|patch|image|block|state|kernel|group|vocab)_size)(_|$)"
)
# Words of training and its tools: no model looks at these.
_TRAINING = re.compile(
    r"(^|_)(train|trained|training|trainer|batch|epoch|epochs|step|steps|lr|learning|warmup|optim|optimizer|wandb"
    r"|dataset|data|seed|eval|neftune|unsloth|axolotl|peft|merge|merged|mergekit|version|revision|license|author"
    r"|loss|dropout|pdrop|initializer|init|std)(_|$)"
)
_MORE = frozenset(
    {
        "d_model", "d_inner", "n_ctx", "n_embd", "n_inner", "n_group", "n_groups", "expand", "dff",
        "num_buckets", "multi_query", "new_decoder_architecture", "prefix_lm", "is_encoder_decoder",
        "mode", "pruned_heads", "add_cross_attention", "use_mrope", "topk_group", "topk_method",
        "scoring_func", "num_codebooks",
    }
)  # fmt: skip

# Bookkeeping: of training, of the library, of how a result is returned, whatever the value.
_ANY = frozenset(
    {
        "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache",
        "auto_map", "name_or_path", "torchscript", "use_bfloat16", "return_dict", "output_attentions",
        "output_hidden_states", "pretraining_tp", "id2label", "label2id", "num_labels", "problem_type",
        "task_specific_params", "finetuning_task", "tokenizer_class", "prefix",
        "keys_to_ignore_at_inference", "tf_legacy_loss", "attn_implementation",
        "experts_implementation", "use_flash_attn", "use_flash_attention", "use_flash_attention_2",
        "flash_attention", "use_sdpa", "gradient_checkpointing", "max_window_layers",
        "cache_implementation", "tie_encoder_decoder", "tie_last_hidden_states",
        "chunk_size_feed_forward", "bos_token", "eos_token", "pad_token", "unk_token", "finetuned",
        "loss_type", "output_router_logits", "model_max_length", "max_sequence_length",
        "tokenizer_padding_side", "torch_compile", "is_decoder", "cross_attention_hidden_size",
        "base_model_tp_plan", "base_model_pp_plan", "deterministic_flash_attn",
    }
)  # fmt: skip
# Settings of generation, that older libraries wrote here; generation_config.json holds them.
_GENERATION = frozenset(
    {
        "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty",
        "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
        "length_penalty", "max_length", "max_new_tokens", "min_length", "min_new_tokens",
        "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
        "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sequence_bias",
        "suppress_tokens", "temperature", "top_k", "top_p", "typical_p", "min_p", "epsilon_cutoff",
        "eta_cutoff", "penalty_alpha", "renormalize_logits", "guidance_scale", "use_cache",
    }
)  # fmt: skip
_TOKENS = re.compile(r"_token_(id|ids|index)$")
# Of training alone.
_DROPS = re.compile(r"(^|_)(dropout|pdrop|initializer)(_|$)|_(init_std|aux_loss_coef|jitter_noise)$")
# Leading underscores are the library's own: _name_or_path, _attn_implementation_autoset, _flash_attn_2_enabled.
_PRIVATE = re.compile(r"^_(?!sliding_window)")
# What keys of other families say when they change nothing; any value that is null, false, zero or empty does so
# everywhere else.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,), "causal": (True,), "use_causal_mask": (True,), "use_rope": (True,), "rope": (True,),
    "pooling": (None,), "add_pooling_layer": (None, False), "full_attn_mod": (1,), "interpolate_factor": (1,),
    "rope_type": (None, "default", "rope"), "position_embedding_type": (None, "rope", "rotary", "absolute"),
    "qk_norm": (None, False), "rotary_scaling_factor": (None, 1), "moe_layer_freq": (None, 0),
}  # fmt: skip
_ONE = re.compile(r"multiplier|scale$|scaling|_factor$|_pct$|^partial_|^rotary_pct|_parallel|tensor_parallel")


def _harmless(key: str, value: Any, keys: Keys, windows: bool | None) -> bool:
    """Whether ``key`` with this ``value`` leaves what is computed as it is."""
    if key in _ANY or key in _GENERATION or _TOKENS.search(key) or _PRIVATE.search(key) or value is None:
        return True
    if _DROPS.search(key):
        return True
    if key in _NEUTRAL:
        return any(
            value == fine and isinstance(value, bool) == isinstance(fine, bool) for fine in _NEUTRAL[key]
        )
    if _ONE.search(key):
        # What multiplies or divides is off at one; at zero it is not.
        return value is False or (not isinstance(value, bool) and value == 1) or value in ("", [], {})
    if key == "sliding_window":
        most = keys._values.get("max_position_embeddings")
        return isinstance(value, int) and isinstance(most, int) and value >= most
    if key == "layer_types":
        wanted = {True: SLIDING, False: FULL}.get(windows) if windows is not None else None
        return isinstance(value, list) and all(kind == wanted for kind in value)
    return not value
