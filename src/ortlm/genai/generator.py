"""The generation loop of the official Python API, over ortlm's own Generator."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ortlm.errors import Cancelled, Error, nearest
from ortlm.genai.adapters import Adapters
from ortlm.genai.errors import GenaiError, GenaiTypeError, instance, official, text, whole
from ortlm.genai.grid import Grid, Int32Ids
from ortlm.genai.log import log, log_values, logs
from ortlm.genai.model import Model
from ortlm.genai.params import GeneratorParams
from ortlm.genai.processor import images_of
from ortlm.genai.prompts import Prompts, as_prompts
from ortlm.genai.speculation import CountedLookup, Rounds
from ortlm.genai.tensors import NamedTensors, Tensor
from ortlm.runtime.engine.backend import DeviceTensor
from ortlm.runtime.engine.types import Logits
from ortlm.runtime.generation.generator import Generator as Inner
from ortlm.runtime.sampling.settings import Settings

_T = TypeVar("_T")
_FED = ("input_ids", "attention_mask", "position_ids")


class Generator:
    """Generates for one prompt or a batch of them, one token per row and call.

    Lengths count prompts and their padding, so all rows are equally long. For one thread at a time, but for
    ``set_runtime_option``. Raises GenaiError for search options that cannot be used.
    """

    @official
    def __init__(self, model: Model, params: GeneratorParams) -> None:
        if instance(params, GeneratorParams, "params")._model is not instance(model, Model, "the model"):
            raise GenaiError("the GeneratorParams were made for another model.")
        self._model, self._lm = model, model._handle.lm
        self._search = dict(params._search)
        self._lookup, self._speculative = params._lookup(), dict(params._speculative)
        self._rounds = Rounds()
        self._inner = self._new(params._settings())
        self._beams = int(self._search["num_beams"]) > 1
        self._grid = Grid(0)
        # Rows that end a batch together do so with a stop token that is not shown.
        self._hidden = 0
        self._prompt_width = 0
        self._steps = 0
        self._chosen: Int32Ids | None = None
        # How many columns the model read last, and whether none has come since.
        self._read = 0
        self._fresh = False
        self._extra: dict[str, DeviceTensor] = {}
        self._lock = threading.Lock()
        self._running = False
        self._terminated = False

    # --- tokens -----------------------------------------------------------------------------------------

    @official
    def append_tokens(self, tokens: ArrayLike | Tensor) -> None:
        """Take prompts, or what the conversation continues with, and feed them to the model at once.

        A batch comes as [B, S] or flat, shorter rows filled on the right with pad_token_id; a Tensor of
        ``Tokenizer.encode_batch`` knows where a row ends even if it ends with that token.
        Raises GenaiError if the tokens do not fit; nothing has changed then.
        """
        if self._beams and self._grid.width:
            raise GenaiError("beams end with their answers and cannot be continued; make a new Generator.")
        self._take(as_prompts(tokens, self._batch, self._lm.manifest.pad_token_id))

    def _take(self, given: Prompts) -> None:
        width, most = self._width + given.width, int(self._search["max_length"])
        if width > most:
            raise GenaiError(
                f"input_ids size ({given.width}) + current sequence length ({self._width}) exceeds max length "
                f"({most})."
            )
        self._run(lambda: self._append(given, width))
        if not self._grid.width:
            self._grid = Grid(self._batch)
            self._grid.put(given.tokens, given.real)
            if not self._beams:
                self._grid.repeat(self._inner.rows // self._batch)
        else:
            times = self._inner.rows // self._batch
            self._grid.put(np.repeat(given.tokens, times, axis=0), np.repeat(given.real, times, axis=0))
        self._hidden, self._prompt_width = 0, width
        self._chosen, self._read, self._fresh = None, given.width, True
        log("append_next_tokens", " ".join(map(str, given.tokens.ravel())))
        log_values("model_input_values", "input_ids", given.tokens.astype(np.int64))

    @official
    def generate_next_token(self) -> None:
        """Choose the next token of every row.

        Does nothing once every row has ended by a stop token. Raises GenaiError at max_length, and before the
        first tokens.
        """
        if self._is_full:
            raise GenaiError(
                f"generate_next_token was called with the sequence length at max_length ({self._width}). Ask "
                "is_done() before, or set a larger max_length."
            )
        if self._hidden or self._inner.done:
            self._chosen = np.full(self._inner.rows, self._pad, dtype=np.int32)
            return
        self._log_run()
        if not self._fresh:
            self._read = 1
        began = time.perf_counter()
        tokens = self._run(self._inner.step)
        self._rounds.step(self._inner, time.perf_counter() - began)
        self._fresh = False
        self._chosen = np.where(tokens < 0, self._pad, tokens).astype(np.int32)
        self._steps += 1
        if not self._beams:
            self._grid.put(self._chosen[:, None], tokens[:, None] >= 0)
            if all(reason == "stop" for reason in self._inner.finish_reasons):
                self._hidden = 1
        self._log_step()

    def is_done(self) -> bool:
        """Whether every row has ended, by a stop token or at max_length."""
        return self._is_full or bool(self._hidden) or self._inner.done

    def token_count(self) -> int:
        """Return the length of all rows, padding included and without a stop token that ends them together."""
        return self._width - self._hidden

    @official
    def get_next_tokens(self) -> NDArray[np.int32]:
        """Return the tokens of the last call of ``generate_next_token``, int32 [rows].

        pad_token_id for rows that ended before. Without such a call since, each row's last token.
        """
        if self._chosen is not None:
            return self._chosen.copy()
        if not self._grid.width:
            raise GenaiError("there are no tokens yet; append some first.")
        return self._grid.column(self.token_count() - 1)

    @official
    def get_sequence(self, index: int) -> NDArray[np.int32]:
        """Return all tokens of a row, int32: its prompt, padding included, and what was generated.

        With beams, of the answer ``index`` of batch_size · num_return_sequences, without its stop token.
        Raises GenaiError if there is no such row.
        """
        index, each = whole(index, "a sequence's number"), int(self._search["num_return_sequences"])
        if not 0 <= index < self._batch * each:
            raise GenaiError(f"there is no sequence {index}; there are {self._batch * each}.")
        if not self._grid.width:
            return np.zeros(0, dtype=np.int32)
        if not self._beams:
            return self._grid.row(index, self.token_count())
        prompt = self._grid.row(index // each, self._prompt_width)
        answer = self._inner.answers()[index // each][index % each]
        kept = answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids
        return np.concatenate([prompt, np.array(kept, dtype=np.int32)])

    @official
    def rewind_to(self, new_length: int) -> None:
        """Rewind to so many tokens in every row. Raises GenaiError for more than there are, and for beams."""
        if whole(new_length, "a length") < 0:
            raise GenaiTypeError(f"a length is 0 or more, found {new_length}.")
        if self._beams:
            raise GenaiError("beams have no single past to rewind to; make a new Generator.")
        if not 0 <= new_length <= self.token_count():
            raise GenaiError(f"cannot rewind to {new_length} tokens; there are {self.token_count()}.")
        if not self._grid.width:
            return
        self._inner.rewind(self._grid.lengths(new_length))
        self._grid.cut(new_length)
        self._hidden, self._chosen, self._fresh = 0, None, False
        self._read = min(1, new_length)
        self._prompt_width = min(self._prompt_width, new_length)
        self._inner.change(min_new_tokens=self._least_new(self._prompt_width))

    def snapshot_state(self) -> None:
        """Do nothing: every state that ortlm runs can rewind."""

    # --- logits and other tensors -----------------------------------------------------------------------

    @official
    def get_logits(self) -> NDArray[np.float32]:
        """Return the model's logits for the next tokens, float32 [rows, 1, V]; the model runs if need be."""
        return self._logits()[:, None].copy()

    @official
    def set_logits(self, logits: ArrayLike) -> None:
        """Let the next token be chosen by these logits, of the size that ``get_logits`` returns."""
        there = self._logits()
        values = np.asarray(logits, dtype=np.float32)
        if values.size != there.size:
            raise GenaiError(
                f"logits have {values.size} elements, but must have {there.size}: {list(there.shape)}."
            )
        self._inner.logits = values.reshape(there.shape)

    @official
    def get_input(self, name: str) -> NDArray[Any]:
        """Return what the model was given last, by the input's name, in the graph's element type.

        Token ids, mask, positions, the cache, and what ``set_model_input`` gave.
        """
        name = text(name, "an input's name")
        graph = self._lm.manifest.graphs["decoder"]
        roles = {graph.inputs[role]: role for role in _FED if role in graph.inputs}
        known = {*roles, *(state.past for state in graph.states), *self._extra}
        if name not in known or self._beams or not self._grid.width:
            raise _no_tensor("input", name, () if self._beams or not self._grid.width else known)
        if name in self._extra:
            return self._extra[name].numpy().copy()
        if name not in roles:
            place = next(i for i, state in enumerate(graph.states) if state.past == name)
            return self._state(place, after=self._read)
        end, kind = self._read_end, self._lm.session.inputs[name].dtype.numpy
        real = self._grid.real(end)
        if roles[name] == "attention_mask":
            return real.astype(kind)
        if roles[name] == "input_ids":
            return self._grid.tokens(end)[:, end - self._read :].astype(kind)
        places = np.maximum(np.cumsum(real, axis=1) - 1, 0)[:, end - self._read :].astype(kind)
        return (
            np.broadcast_to(places, (3, *places.shape))
            if len(self._lm.session.inputs[name].shape) == 3
            else places
        )

    @official
    def get_output(self, name: str) -> NDArray[Any]:
        """Return what the model gave last, by the name of any of the graph's outputs.

        The model runs once more on what it was given last, but for the cache, and for logits with beams.
        """
        graph, session = self._lm.manifest.graphs["decoder"], self._lm.session
        name = text(name, "an output's name")
        if name not in session.outputs or not self._grid.width:
            raise _no_tensor("output", name, session.outputs if self._grid.width else ())
        place = next((i for i, state in enumerate(graph.states) if state.present == name), None)
        if self._beams:
            if name != graph.outputs["logits"]:
                raise GenaiError(f"{name} cannot be had of beams.")
            return self.get_logits()
        if place is not None:
            return self._state(place, after=0)
        texts, counts = self._last_read()
        output = self._run(lambda: self._inner.loop.again(name, texts, counts))
        # numpy alone does not know bfloat16.
        return output.astype(np.float32) if output.dtype.name == "bfloat16" else output

    @official
    def set_inputs(self, inputs: NamedTensors) -> None:
        """Take what a MultiModalProcessor made of a prompt with images, and feed it to the model at once.

        Another prompt with other images may follow later. Raises GenaiError if tokens and images do not fit,
        and for models of text.
        """
        encoder = self._lm.vision_encoder
        if encoder is None:
            raise GenaiError(
                f"a {self._model.type} model takes tokens; use append_tokens instead of set_inputs."
            )
        if self._beams and self._grid.width:
            raise GenaiError("beams end with their answers and cannot be continued; make a new Generator.")
        given = as_prompts(inputs["input_ids"], self._batch, self._lm.manifest.pad_token_id)
        seen = [token for image in images_of(inputs, encoder) for token in image.ids]
        places = int((given.tokens < 0).sum())
        if places != len(seen):
            raise GenaiError(f"input_ids have {places} places for images, whose tokens are {len(seen)}.")
        left = iter(seen)
        fed = [[next(left) if token < 0 else token for token in row] for row in given.rows]
        self._take(replace(given, fed=fed))

    @official
    def set_model_input(self, name: str, value: ArrayLike) -> None:
        """Give the model a further input from now on. Raises GenaiError if it has none of that name and type."""
        graph = self._lm.manifest.graphs["decoder"]
        own = {*graph.inputs.values(), *graph.optional.values(), *(state.past for state in graph.states)}
        known = {
            n: i for n, i in {**self._lm.session.inputs, **self._lm.session.optional}.items() if n not in own
        }
        if name not in known:
            raise _no_tensor("input", name, known)
        array, wanted = np.ascontiguousarray(value), known[name].dtype.numpy
        if array.dtype != wanted:
            raise GenaiError(f"input {name!r} must be {np.dtype(wanted).name}, found {array.dtype.name}.")
        self._extra[name] = self._lm.session.tensor(array.copy())
        self._inner.loop.use(self._extra, group="program")

    def set_hidden_states(self, hidden_states: ArrayLike) -> None:
        """Heads that predict several tokens are not supported: raises GenaiError."""
        raise GenaiError("heads that read hidden states (multi-token prediction) are not supported.")

    # --- the rest ---------------------------------------------------------------------------------------

    @official
    def set_active_adapter(self, adapters: Adapters, adapter_name: str) -> None:
        """Use an adapter from the next run of the model on."""
        known = instance(adapters, Adapters, "adapters")
        self._inner.change(adapter=known._use(text(adapter_name, "an adapter's name"), self._model, self))

    @official
    def set_runtime_option(self, key: str, value: str) -> None:
        """``terminate_session`` "1" ends what another thread is doing here, and all that follows until "0"."""
        text(key, "an option's name")
        text(value, "an option's value")
        if key == "enable_profiling" and value == "0":
            return
        if key != "terminate_session":
            raise GenaiError(f"there is no run-time option {key}={value}; there is terminate_session.")
        if value not in ("0", "1"):
            raise GenaiError(f'terminate_session must be "0" or "1", found {value!r}.')
        with self._lock:
            self._terminated = value == "1"
            if self._terminated and self._running:
                self._inner.cancel()

    def get_speculative_stats(self) -> dict[str, Any]:
        """Return what became of drafts, under every name of the official runtime's; see docs/genai.md."""
        lookup = self._inner.proposer
        counted = lookup if isinstance(lookup, CountedLookup) else None
        return self._rounds.statistics(self._inner, counted, self._speculative)

    # --- inside -----------------------------------------------------------------------------------------

    @property
    def _batch(self) -> int:
        return int(self._search["batch_size"])

    @property
    def _width(self) -> int:
        """Columns so far, what is not shown included."""
        return self._grid.width + (self._steps if self._beams else 0)

    @property
    def _is_full(self) -> bool:
        return self._width >= int(self._search["max_length"])

    @property
    def _pad(self) -> int:
        pad = self._lm.manifest.pad_token_id
        return 0 if pad is None else pad

    @property
    def _read_end(self) -> int:
        """The column after the last one that the model has read."""
        return self._grid.width if self._fresh else max(self._read, self._grid.width - 1)

    def _logits(self) -> Logits:
        logits = self._run(lambda: self._inner.logits)
        if not self._fresh:
            self._read, self._fresh = 1, True
        return logits

    def _last_read(self) -> tuple[list[list[int]], list[int]]:
        """Return the tokens of each row as far as the model read them, and how many of them it read last."""
        end = self._read_end
        real = self._grid.real(end)
        texts = [self._inner.sequence(row)[: int(n)] for row, n in enumerate(real.sum(axis=1))]
        return texts, [max(1, int(n)) for n in real[:, end - self._read :].sum(axis=1)]

    def _state(self, place: int, *, after: int) -> NDArray[Any]:
        """Return a cache tensor, without its last ``after`` positions unless it is memory that is shared."""
        graph, loop = self._lm.manifest.graphs["decoder"], self._inner.loop
        state = graph.states[place]
        texts, _ = self._last_read()
        # Drafts that were fed along are not part of the text yet.
        loop.trim([min(len(old), len(text)) for old, text in zip(loop.history, texts, strict=True)])
        filled = self._run(loop.filled)[place]
        if state.kind == "grow":
            # The official runtime has room for max_length at once.
            room = np.zeros(
                (*filled.shape[:2], int(self._search["max_length"]), filled.shape[3]), filled.dtype
            )
            room[:, :, : filled.shape[2]] = filled
            return room
        kept = filled[:, :, : max(0, filled.shape[2] - after)] if state.kind == "append" else filled
        if state.axis == 3:
            return kept.reshape(len(kept), 2, -1, *kept.shape[2:]).swapaxes(0, 1).copy()
        return kept.copy()

    def _least_new(self, width: int) -> int:
        return max(0, int(self._search["min_length"]) - width)

    def _append(self, given: Prompts, width: int) -> None:
        """Append rows of ``given``, after which all are ``width`` long; undo what an error leaves behind."""
        before, inner = self._inner.lengths, self._inner
        times = inner.rows // self._batch if inner.rows else 1
        inner.change(min_new_tokens=self._least_new(width))
        if self._beams:
            inner.change(max_new_tokens=int(self._search["max_length"]) - width)
        try:
            inner.append([row for row in given.fed or given.rows for _ in range(times)])
        except Error:
            if before:
                inner.rewind(before)
            else:
                self._inner = self._new(inner.settings)
                self._inner.loop.use(self._extra, group="program")
            raise

    def _new(self, settings: Settings) -> Inner:
        made = self._lm.generator(settings)
        if self._lookup is not None:
            made.proposer = CountedLookup(**self._lookup)
        return made

    def _run(self, action: Callable[[], _T]) -> _T:
        """Do what runs the model, unless or until it is terminated."""
        with self._lock:
            if self._terminated:
                raise _terminated()
            self._running = True
        try:
            return action()
        except Cancelled as error:
            if self._terminated:
                raise _terminated() from error
            # It came too late for the run that it was meant for, and was taken back since.
            return action()
        finally:
            with self._lock:
                self._running = False

    def _log_run(self) -> None:
        if self._chosen is not None:
            log_values("model_input_values", "input_ids", self._chosen.astype(np.int64)[:, None])
        kinds = ("model_logits", "model_output_values", "model_output_shapes")
        if any(map(logs, kinds)):
            logits = self.get_logits()
            for kind in kinds:
                log_values(kind, "logits", logits, only_shape=kind == "model_output_shapes")
        search = self._search
        if logs("generate_next_token"):
            names = ("do_sample", "top_k", "top_p", "temperature")
            listed = " ".join(f"{name}: {float(search[name]):g}" for name in names)
            log("generate_next_token", f"{listed} sequence length: {self.token_count()}")

    def _log_step(self) -> None:
        if logs("append_next_tokens"):
            log("append_next_tokens", " ".join(map(str, self.get_next_tokens())))
        if self._hidden:
            log("hit_eos", str(self.get_next_tokens()[0]))
        elif self._is_full:
            log("hit_max_length", str(self._search["max_length"]))


def _no_tensor(kind: str, name: str, known: Collection[str]) -> GenaiError:
    there = f"there is {', '.join(known)}" if known else "there is none now"
    return GenaiError(f"{kind} {name!r} was not found; {there}." + nearest(name, known))


def _terminated() -> GenaiError:
    return GenaiError(
        "the session was terminated; set_runtime_option('terminate_session', '0') lets it continue."
    )
