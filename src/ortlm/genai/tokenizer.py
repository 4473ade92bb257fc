"""Text to token ids and back, with the defaults of the official runtime: no special tokens are added or shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ortlm.errors import nearest
from ortlm.genai.config import Config
from ortlm.genai.errors import GenaiError, GenaiTypeError, official, text, whole
from ortlm.genai.handle import HasHandle
from ortlm.genai.tensors import Tensor
from ortlm.runtime.text import tokenizer as runtime
from ortlm.runtime.text.chat_template import ChatTemplate

# Where the configuration does not name them: what publishers call the beginning and end of calls and reasoning.
_MARKS = {
    "bot_token_id": ("<|tool_call|>", "<tool_call>"),
    "eot_token_id": ("<|/tool_call|>", "</tool_call>"),
    "bor_token_id": ("<think>",),
    "eor_token_id": ("</think>",),
}
# Classes for which the official runtime adds BOS unless the settings say otherwise.
_BEGINS_WITH_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


class Tokenizer:
    """The tokenizer of a model, of a configuration or of a folder. Raises GenaiError if there is none."""

    @official
    def __init__(self, source: HasHandle | Config | str | Path) -> None:
        if isinstance(source, HasHandle):
            handle = source._handle
            artifact, self._folder, self._facts = handle.lm.artifact, handle.folder, handle.config
            self._inner = handle.lm.tokenizer
        else:
            config = source if isinstance(source, Config) else Config(source)
            (artifact, self._folder), self._facts = config._artifact(), config._facts()
            self._inner = runtime.Tokenizer.open(artifact.tokenizer_path)
        self._artifact, self._manifest = artifact, artifact.manifest
        self._template = ChatTemplate.open(artifact.tokenizer_path, self._inner.special_tokens)
        self._options = {"add_special_tokens": False, "skip_special_tokens": True}

    @property
    def bos_token_id(self) -> int:
        """The token that a text begins with. Raises GenaiError if there is none."""
        return _known("bos_token_id", self._manifest.bos_token_id)

    @property
    def pad_token_id(self) -> int:
        """The token that fills shorter rows. Raises GenaiError if there is none."""
        return _known("pad_token_id", self._manifest.pad_token_id)

    @property
    def eos_token_ids(self) -> NDArray[np.int32]:
        """The tokens that end a text, int32."""
        return np.array(self._manifest.stop_token_ids, dtype=np.int32)

    @property
    def bot_token_id(self) -> int:
        """The token that begins a tool call. Raises GenaiError if there is none."""
        return self._mark("bot_token_id")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a tool call. Raises GenaiError if there is none."""
        return self._mark("eot_token_id")

    @property
    def bor_token_id(self) -> int:
        """The token that begins reasoning. Raises GenaiError if there is none."""
        return self._mark("bor_token_id")

    @property
    def eor_token_id(self) -> int:
        """The token that ends reasoning. Raises GenaiError if there is none."""
        return self._mark("eor_token_id")

    @official
    def update_options(self, **options: str | bool | int) -> None:
        """Set ``add_special_tokens`` (encoding) or ``skip_special_tokens`` (decoding) to "true" or "false"."""
        words = {"true": True, "1": True, "false": False, "0": False}
        checked = {}
        if not options:
            raise GenaiError(f"give at least one option: {' or '.join(self._options)}.")
        for name, value in options.items():
            if name not in self._options:
                raise GenaiError(f"a tokenizer has no option {name!r}." + nearest(name, self._options))
            if str(value).lower() not in words:
                raise GenaiError(f'{name} must be "true" or "false", found {value!r}.')
            checked[name] = words[str(value).lower()]
        self._options.update(checked)

    @official
    def encode(self, string: str | bytes) -> NDArray[np.int32]:
        """Return the token ids of the text ``string``, int32."""
        return np.array(self._ids(string), dtype=np.int32)

    @official
    def decode(self, tokens: ArrayLike) -> str:
        """Return the text of token ids of any shape."""
        return self._inner.decode(_ids(tokens), skip_special_tokens=self._options["skip_special_tokens"])

    @official
    def encode_batch(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids of texts, int32 [B, S], filled with pad_token_id on the right."""
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
            raise GenaiTypeError(f"encode_batch takes a list of texts, found {type(texts).__name__}.")
        rows = [self._ids(one) for one in texts]
        if not rows:
            raise GenaiError("encode_batch takes one text at least.")
        lengths = [len(row) for row in rows]
        fill = self.pad_token_id if len(set(lengths)) > 1 else 0
        padded = [[*row, *[fill] * (max(lengths) - len(row))] for row in rows]
        return Tensor(np.array(padded, dtype=np.int32).reshape(len(rows), -1), lengths=lengths)

    @official
    def decode_batch(self, tokens: Tensor | ArrayLike) -> list[str]:
        """Return the text of every row of ids [B, S]."""
        array = tokens.as_numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
        if array.dtype.kind == "O":
            raise GenaiTypeError(f"decode_batch takes a Tensor of ids, found {type(tokens).__name__}.")
        if array.ndim != 2:
            raise GenaiError(f"decode_batch takes ids of shape [B, S], found {list(array.shape)}.")
        return [self.decode(row) for row in array]

    @official
    def to_token_id(self, token: str) -> int:
        """Return the id of one token by its text, -1 if there is none."""
        number = self._inner.token_id(text(token, "a token"))
        return -1 if number is None else number

    @official
    def apply_chat_template(
        self,
        messages: str | Sequence[dict[str, Any]],
        *,
        template_str: str | None = None,
        tools: str | Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Return the prompt of messages, given as JSON or as a list.

        ``template_str`` replaces the model's template, ``tools`` are JSON schemas, as text or as a list;
        ``variables`` are further names that the template may use, such as ``enable_thinking``.
        """
        template = self._template
        if template_str:
            template = ChatTemplate({"default": template_str}, self._inner.special_tokens)
        if template is None:
            raise GenaiError("the model has no chat template; give one as template_str.")
        return template.render(
            _listed("messages", messages),
            tools=_listed("tools", tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )

    @official
    def create_stream(self) -> TokenizerStream:
        """Return what decodes tokens as they come."""
        # Behind other text, so that a first word keeps its space: what is streamed continues a prompt.
        before = self._inner.encode("a", add_special_tokens=False)
        skips = self._options["skip_special_tokens"]
        return TokenizerStream(self._inner.stream(before, skip_special_tokens=skips))

    def _ids(self, given: str | bytes) -> list[int]:
        if isinstance(given, bytes):
            given = given.decode("utf-8", "replace")
        special = self._options["add_special_tokens"]
        ids = self._inner.encode(text(given, "what is encoded"), add_special_tokens=special)
        if special:
            before, after = self._around
            ids = [*before, *ids, *after]
        return ids

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """The tokens that the official runtime puts before and after texts where tokenizer.json puts none."""
        plain, whole = (self._inner.encode("a", add_special_tokens=special) for special in (False, True))
        there = {"bos_token": whole[:1] != plain[:1], "eos_token": whole[-1:] != plain[-1:]}
        settings = runtime.read_settings(self._artifact.tokenizer_path / "tokenizer_config.json")
        kind = settings.get("tokenizer_class")
        begins = isinstance(kind, str) and kind.removesuffix("Fast") in _BEGINS_WITH_BOS
        wanted = {
            "bos_token": kind is None or settings.get("add_bos_token", begins),
            "eos_token": kind is None or settings.get("add_eos_token", False),
        }
        texts = {
            name: self._inner.special_tokens.get(name)
            for name, given in wanted.items()
            if given and not there[name]
        }
        ids = {name: self._inner.token_id(text) for name, text in texts.items() if text}
        bos, eos = ([id_] if (id_ := ids.get(name)) is not None else [] for name in wanted)
        return bos, eos

    def _mark(self, name: str) -> int:
        mark = self._facts.marks.get(name)
        texts = (self._inner.token_id(text) for text in _MARKS[name])
        return _known(
            name, mark if mark is not None else next((id_ for id_ in texts if id_ is not None), None)
        )


class TokenizerStream:
    """Decodes tokens one by one; made by ``Tokenizer.create_stream``."""

    def __init__(self, inner: runtime.TextStream) -> None:
        self._inner = inner

    @official
    def decode(self, token: int) -> str:
        """Take one token and return the text that is complete now: whole characters, perhaps none."""
        return self._inner.push(_ids(whole(token, "a token"))[0])


def _known(name: str, id_: int | None) -> int:
    if id_ is None:
        raise GenaiError(f"{name} is not defined for this model.")
    return id_


def _ids(tokens: ArrayLike) -> list[int]:
    array = np.asarray(tokens)
    if array.dtype.kind not in "iufb":
        raise GenaiTypeError(f"token ids are whole numbers, found {type(tokens).__name__}.")
    if array.size and (array.dtype.kind not in "iu" or int(array.min()) < 0):
        raise GenaiError(f"token ids are whole numbers, 0 or more; found {tokens!r}.")
    ids: list[int] = array.ravel().tolist()
    return ids


def _listed(name: str, given: object) -> list[Any]:
    """Return JSON, or what it stands for, as a list."""
    try:
        value = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise GenaiError(f"{name} is no JSON: {error}") from error
    if isinstance(value, (str, dict)) or not isinstance(value, Sequence):
        raise GenaiError(f"{name} must be a list, found {type(value).__name__}.")
    return list(value)
