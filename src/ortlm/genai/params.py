"""How to generate, under the names and with the defaults of the official runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ortlm.artifact import GENAI_SEARCH, GENAI_SPECULATIVE
from ortlm.errors import nearest
from ortlm.genai.errors import GenaiError, instance, official, text
from ortlm.genai.model import Model
from ortlm.runtime.sampling.settings import Settings
from ortlm.runtime.structured_output.guidance import Guidance

_GUIDANCE = {
    "json_schema": Guidance.json_schema,
    "regex": Guidance.regex,
    "lark_grammar": Guidance.lark,
}
_MOST_DRAFT_TOKENS = 16


class GeneratorParams:
    """The search options of one generation: at first those of the model's configuration.

    Lengths count the prompt. Kinds are checked at once, values when a Generator is made.
    """

    @official
    def __init__(self, model: Model) -> None:
        self._model = instance(model, Model, "the model")
        handle = model._handle
        self._search: dict[str, bool | int | float] = dict(handle.config.search)
        self._speculative: dict[str, bool | int | float] = dict(handle.config.speculative)
        self._asked = set(handle.asked)
        context = handle.lm.manifest.context_tokens
        most = self._search["max_length"] or context
        if most <= handle.config.context_tokens and "max_length" not in self._asked:
            # The folder's own default means all that there is, where the graph is right for less than it says.
            most = min(most, context)
        self._search["max_length"] = most
        self._guidance: Guidance | None = None

    @official
    def set_search_options(self, **options: bool | int | float) -> None:
        """Set options by name, all of them or, after an error, none."""
        self._search.update(_checked("search option", options, GENAI_SEARCH))
        self._asked |= options.keys()

    def get_search_options(self) -> dict[str, bool | float]:
        """Return every option; numbers are floats."""
        return _shown(self._search)

    @official
    def set_speculative_options(self, **options: bool | int | float) -> None:
        """Set options of speculative decoding; ``ngram_size`` above 0 proposes what followed the same tokens."""
        self._speculative.update(_checked("speculative option", options, GENAI_SPECULATIVE))

    def get_speculative_options(self) -> dict[str, bool | float]:
        """Return every speculative option; numbers are floats."""
        return _shown(self._speculative)

    @official
    def set_guidance(self, type: str, data: str, enable_ff_tokens: bool = False) -> None:  # noqa: A002
        """Let the answer follow a "json_schema", a "regex" or a "lark_grammar".

        Two empty texts take guidance away. ``enable_ff_tokens`` changes nothing: every token is one step. Raises
        GenaiError for an unusable grammar.
        """
        if not text(type, "the kind of guidance") and not text(data, "guidance"):
            self._guidance = None
            return
        if not text(data, "guidance"):
            raise GenaiError(f"guidance of the kind {type!r} needs data, found none.")
        if type not in _GUIDANCE:
            raise GenaiError(
                f"guidance must be {', '.join(_GUIDANCE)}, found {type!r}." + nearest(type, _GUIDANCE)
            )
        self._guidance = _GUIDANCE[type](data)

    def try_graph_capture_with_max_batch_size(self, max_batch_size: int) -> None:
        """Graphs are not captured; programs for older versions ask for it."""

    def _settings(self) -> Settings:
        """Return the same wishes for ortlm's own generator; lengths are left to whoever knows the prompts."""
        search = self._search
        self._check_values()
        beams = int(search["num_beams"])
        samples = bool(search["do_sample"]) and search["top_k"] != 1 and search["temperature"] != 0
        sampling: dict[str, Any] = {"do_sample": samples}
        if samples:
            sampling["temperature"] = float(search["temperature"])
            sampling["top_k"] = int(search["top_k"])
            # Packages exist with 0, which is meant to be off.
            sampling["top_p"] = float(search["top_p"]) or 1.0
        drafts = int(self._speculative["ngram_size"]) > 0
        seed = int(search["random_seed"])
        return Settings(
            **sampling,
            repetition_penalty=float(search["repetition_penalty"]),
            no_repeat_ngram_size=int(search["no_repeat_ngram_size"]),
            num_beams=beams,
            num_return_sequences=int(search["num_return_sequences"]),
            length_penalty=float(search["length_penalty"]),
            early_stopping=bool(search["early_stopping"]) if beams > 1 else False,
            seed=None if seed < 0 else seed,
            guidance=self._guidance,
            draft="lookup" if drafts else None,
            draft_tokens=int(self._speculative["max_draft_tokens"]),
        )

    def _lookup(self) -> dict[str, Any] | None:
        """Return how drafts are looked up, None if they are not."""
        drafts = self._speculative
        if not drafts["ngram_size"]:
            return None
        return {
            "least_match": int(drafts["ngram_size"]),
            "chained": bool(drafts["ngram_chained_lookup"]),
            "least_tokens": int(drafts["min_adaptive_k"]),
        }

    def _check_values(self) -> None:
        search, context = self._search, self._model._handle.lm.manifest.context_tokens
        for name in ("batch_size", "max_length"):
            if search[name] < 1:
                raise GenaiError(f"{name} must be 1 or more, found {search[name]}.")
        if search["max_length"] > context:
            raise GenaiError(
                f"max_length ({search['max_length']}) cannot be greater than the model's context_length "
                f"({context})."
            )
        if search["min_length"] < 0:
            raise GenaiError(f"min_length must be 0 or more, found {search['min_length']}.")
        for name in ("diversity_penalty", "blank_penalty"):
            # Of a configuration they are what the model's publisher copied; the official runtime ignores both.
            if search[name] and name in self._asked:
                raise GenaiError(f"{name} has no effect on this model; leave it at 0, found {search[name]}.")
        drafts = self._speculative
        if not 1 <= drafts["max_draft_tokens"] <= _MOST_DRAFT_TOKENS:
            raise GenaiError(
                f"max_draft_tokens must be between 1 and {_MOST_DRAFT_TOKENS}, found {drafts['max_draft_tokens']}."
            )
        if drafts["ngram_size"] and not 2 <= drafts["ngram_size"] <= _MOST_DRAFT_TOKENS:
            raise GenaiError(
                f"ngram_size must be 0 or between 2 and {_MOST_DRAFT_TOKENS}, found {drafts['ngram_size']}."
            )
        if not 0 <= drafts["min_adaptive_k"] <= _MOST_DRAFT_TOKENS:
            raise GenaiError(
                f"min_adaptive_k must be between 0 and {_MOST_DRAFT_TOKENS}, found {drafts['min_adaptive_k']}."
            )
        if drafts["ngram_chained_lookup"] and not drafts["ngram_size"]:
            raise GenaiError(
                "ngram_chained_lookup needs ngram_size, by which tokens are looked up; set both."
            )


def _checked(
    what: str, options: Mapping[str, bool | int | float], known: Mapping[str, bool | int | float]
) -> dict[str, bool | int | float]:
    """Return ``options`` as Python's own numbers. Raises GenaiError for unknown names and other kinds."""
    checked: dict[str, bool | int | float] = {}
    for name, given in options.items():
        if name not in known:
            raise GenaiError(f"there is no {what} {name!r}." + nearest(name, known))
        value = given.item() if hasattr(given, "item") else given
        wanted = "True or False" if isinstance(known[name], bool) else "a number"
        fits = isinstance(value, bool if wanted != "a number" else (int, float))
        if fits and isinstance(value, bool) != isinstance(known[name], bool):
            fits = False
        if fits and wanted == "a number" and isinstance(known[name], int):
            wanted, fits = "a whole number", float(value).is_integer()
            value = int(value) if fits else value
        if not fits:
            raise GenaiError(f"{name} must be {wanted}, found {given!r}.")
        checked[name] = value
    return checked


def _shown(options: Mapping[str, bool | int | float]) -> dict[str, bool | float]:
    return {
        name: value if isinstance(value, bool) else float(value)
        for name, value in options.items()
        if name != "blank_penalty"
    }
