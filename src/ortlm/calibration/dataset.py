"""What a model reads while it is calibrated: a file's tokens, or what the model writes itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ortlm._utils.checked_json import parse
from ortlm._utils.formatting import printable
from ortlm.artifact import Artifact
from ortlm.calibration.openings import OPENINGS
from ortlm.calibration.writing import rows_at_once
from ortlm.errors import BadOption
from ortlm.runtime.language_model import LanguageModel
from ortlm.runtime.text.chat_template import ChatTemplate
from ortlm.runtime.text.tokenizer import Tokenizer

Row = NDArray[np.int64]

# Of a larger text, pieces from all over it are read: so many bytes for each token that is wanted.
_BYTES_PER_TOKEN = 16
# Probabilities that are added up at once when a token is drawn.
_STRETCH = 256
# So much of an opening is given, and so long it is then with what the model writes.
_OPENING_TOKENS, _CONTINUED = 64, 128
_LONGEST_LINE = 1 << 26
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Reader:
    """Turns documents into token ids: a tokenizer, a template for chats if there is one, the vocabulary."""

    tokenizer: Tokenizer
    template: ChatTemplate | None
    vocab: int

    @classmethod
    def open(cls, folder: Path, vocab: int) -> Reader:
        """Open the tokenizer files in ``folder``."""
        tokenizer = Tokenizer.open(folder)
        return cls(tokenizer, ChatTemplate.open(folder, tokenizer.special_tokens), vocab)


def read_rows(path: Path, reader: Reader, *, count: int, length: int) -> list[Row]:
    """Return ``count`` rows of ``length`` ids, int64, from all over the file ``path``; fewer if it is short.

    A ``.jsonl`` file has a document in each line: a text, a list of token ids, a list of chat messages, or an
    object with ``text``, ``messages``, ``input_ids`` or ``tokens``. An ``.npy`` file has token ids. Any other file
    is text.
    Raises BadOption if it is something else, or too short for a single row.
    """
    if not path.is_file():
        raise BadOption(f"--calibration {path} is not a file; give one of text, JSONL or token ids (.npy).")
    if path.suffix == ".npy":
        stream = _saved_ids(path, reader.vocab)
    elif path.suffix in (".jsonl", ".ndjson"):
        stream = [token for document in _documents(path, reader) for token in document]
    else:
        stream = _text_ids(path, reader, count, length)
    count = min(len(stream) // length, count)
    if not count:
        raise BadOption(
            f"{path} has {len(stream)} tokens, and calibration reads rows of {length}. Give a longer file, or "
            "leave --calibration out: the model then writes the text itself."
        )
    starts = np.linspace(0, len(stream) - length, count).astype(int)
    return [np.array(stream[a : a + length], np.int64) for a in starts]


def _saved_ids(path: Path, vocab: int) -> list[int]:
    try:
        ids = np.load(path, allow_pickle=False, mmap_mode="r")
    except (ValueError, OSError, EOFError, MemoryError, RecursionError, SyntaxError, BadZipFile) as error:
        raise BadOption(f"{path} is not an array that numpy saved: {printable(str(error))}") from error
    if not isinstance(ids, np.ndarray):
        raise BadOption(f"{path} holds several arrays; give one, as numpy.save writes it.")
    if not np.issubdtype(ids.dtype, np.integer):
        raise BadOption(f"{path} holds {ids.dtype}, expected whole numbers, the ids of tokens.")
    return _known(ids.reshape(-1).tolist(), vocab, str(path))


def _known(ids: list[object], vocab: int, where: str) -> list[int]:
    known = []
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab:
            raise BadOption(f"{where} has {token!r}, which is no token id: those are 0 to {vocab - 1}.")
        known.append(token)
    return known


def _text_ids(path: Path, reader: Reader, count: int, length: int) -> list[int]:
    size, enough = path.stat().st_size, count * length * _BYTES_PER_TOKEN
    with path.open("rb") as stream:
        if size <= enough:
            pieces = [stream.read()]
        else:
            pieces = []
            for at in np.linspace(0, size - enough // count, count).astype(int):
                stream.seek(int(at))
                pieces.append(stream.read(enough // count))
    texts = []
    for piece in pieces:
        try:
            # A piece may begin or end inside a character.
            texts.append(piece.decode("utf-8", errors="strict" if len(pieces) == 1 else "ignore"))
        except UnicodeDecodeError as error:
            raise BadOption(f"{path} is not text in UTF-8: {error}.") from error
    all_ids = []
    for text in texts:
        if text.strip():
            ids = reader.tokenizer.encode(text)
            # Each piece gives as much as the others, whatever it tokenizes to.
            all_ids += ids if len(texts) == 1 else ids[:length]
    return all_ids


def _documents(path: Path, reader: Reader) -> Iterator[list[int]]:
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(iter(lambda: lines.readline(_LONGEST_LINE + 1), ""), 1):
                if len(line) > _LONGEST_LINE:
                    raise BadOption(f"{path}, line {number} has more than {_LONGEST_LINE:,} characters.")
                if line.strip():
                    yield _document(line, reader, f"{path}, line {number}")
        except UnicodeDecodeError as error:
            raise BadOption(f"{path} is not text in UTF-8: {error}.") from error


def _document(line: str, reader: Reader, where: str) -> list[int]:
    value = parse(line, where=where, error=BadOption)
    if isinstance(value, Mapping):
        keys = [k for k in ("messages", "text", "input_ids", "tokens") if k in value]
        if not keys:
            raise BadOption(
                f"{where} has none of messages, text, input_ids and tokens, but {', '.join(value)}."
            )
        value = value[keys[0]]
    if isinstance(value, str):
        return reader.tokenizer.encode(value)
    if not isinstance(value, list) or not value:
        raise BadOption(f"{where} is neither a text, nor token ids, nor chat messages.")
    if isinstance(value[0], Mapping):
        if reader.template is None:
            raise BadOption(f"{where} has chat messages, but the model has no chat template; give texts.")
        text = reader.template.render(value, add_generation_prompt=False)
        return reader.tokenizer.encode(text, add_special_tokens=False)
    return _known(value, reader.vocab, where)


# --- what the model writes itself ---------------------------------------------------------------------------


def write_rows(
    artifact: Artifact,
    *,
    count: int,
    length: int,
    seed: int,
    threads: int | None,
    advance: Callable[[int], None],
) -> list[Row]:
    """Return ``count`` rows of ``length`` ids, int64, that a model writes: drawn from its own probabilities.

    Every other row continues openings of many kinds and languages, another one every 128 tokens. The rest are
    chats in which the model writes both sides, or without a template texts that it begins itself. Where it ends
    one, another begins. ``advance`` is told the tokens that have been written.
    Source of the idea: Liu et al. 2023 (LLM-QAT); Xu et al. 2024 (Magpie) for the user's side of chats.
    """
    # Threads that wait in a loop between small operators take as much of the processor as those that compute.
    options = {**artifact.manifest.session_options, "session.intra_op.allow_spinning": "0"}
    # The cache has room for the context if that is shorter than what it would have room for.
    context = min(artifact.manifest.context_tokens, length)
    manifest = replace(artifact.manifest, session_options=options, context_tokens=context)
    quiet = replace(artifact, manifest=manifest)
    lm = LanguageModel(quiet, threads=threads, prefix_caches=0)
    at_once = rows_at_once(lm.cache_bytes_per_token * length, lm.vocab_size)
    writer = _Writer(lm)
    rows: list[Row] = []
    while len(rows) < count:
        numbers = range(len(rows), min(count, len(rows) + at_once))
        rows += writer.write(numbers, length, seed, advance)
    return rows


class _Writer:
    """Lets a model write several rows at once, feeding it what begins a text or a turn."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._stops = set(lm.manifest.stop_token_ids)
        unknown = lm.tokenizer.unknown_ids(lm.vocab_size)
        self._known = np.setdiff1d(np.arange(lm.vocab_size), unknown)
        self._barred = unknown[unknown < lm.vocab_size]
        self._turns = self._chat_turns()

    def _chat_turns(self) -> list[list[int]] | None:
        """Return what stands before a user's words, and between those and an answer; None without a template."""
        if self._lm.chat_template is None:
            return None
        try:
            text = self._lm.render([{"role": "user", "content": _MARK}])
        except Exception:
            return None
        before, mark, after = text.partition(_MARK)
        if not mark:
            return None
        encode = self._lm.tokenizer.encode
        turns = [encode(part, add_special_tokens=False) for part in (before, after)]
        return turns if all(turns) else None

    def _opening(self, number: int) -> list[int]:
        """Return the ids of an opening; those after the last one are the first again."""
        ids = self._lm.tokenizer.encode(OPENINGS[number % len(OPENINGS)], add_special_tokens=False)
        return [token for token in ids if token < self._lm.vocab_size][:_OPENING_TOKENS]

    def write(self, numbers: range, length: int, seed: int, advance: Callable[[int], None]) -> list[Row]:
        random = np.random.default_rng([seed, numbers.start])
        rows: list[list[int]] = [[] for _ in numbers]
        forced: list[list[int]] = [[] for _ in numbers]
        continued = [i for i, number in enumerate(numbers) if number % 2 == 0]
        openings = itertools.count(seed + numbers.start)
        users = [False] * len(numbers)

        def begin(i: int) -> None:
            bos = self._lm.manifest.bos_token_id
            if numbers[i] % 2 and self._turns is not None:
                users[i], forced[i] = True, list(self._turns[0])
                return
            forced[i] = [] if bos is None else [bos]
            if numbers[i] % 2 == 0:
                forced[i] += self._opening(next(openings))
            if not forced[i]:
                forced[i] = [int(random.choice(self._known))]

        for i in range(len(numbers)):
            begin(i)
        loop = self._lm.loop()
        loop.start(len(numbers))
        tokens = np.array([queue.pop(0) for queue in forced], np.int64)
        while True:
            for row, token in zip(rows, tokens, strict=True):
                row.append(int(token))
            advance(len(numbers))
            if len(rows[0]) % _CONTINUED == 0:
                for i in continued:
                    begin(i)
            if len(rows[0]) == length:
                return [np.array(row, np.int64) for row in rows]
            logits = loop.step(tokens) if len(rows[0]) > 1 else loop.append([[int(t)] for t in tokens])
            logits = np.array(logits)
            logits[:, self._barred] = -np.inf
            for i, token in enumerate(_draw(logits, random)):
                if forced[i]:
                    tokens[i] = forced[i].pop(0)
                    continue
                tokens[i] = token
                if int(token) in self._stops:
                    if users[i] and self._turns is not None:
                        # The template has its own way to end a turn; the model's stop is the first token of it.
                        users[i] = False
                        after = self._turns[1]
                        forced[i] = list(after[1:] if after[0] == token else after)
                    else:
                        begin(i)


def _draw(logits: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.int64]:
    """Draw a token of every row of ``logits`` [B, V] by its probability, all rows at once.

    ``logits`` are overwritten. A row's probabilities are added up in stretches, then those of one stretch.
    """
    count, vocab = logits.shape
    logits -= logits.max(axis=1, keepdims=True)
    weights = np.exp(logits, out=logits)
    starts = np.arange(0, vocab, _STRETCH)
    reached = np.add.reduceat(weights, starts, axis=1).cumsum(axis=1, dtype=np.float64)
    aim = random.random(count) * reached[:, -1]
    stretch = np.minimum((reached <= aim[:, None]).sum(axis=1), len(starts) - 1)
    drawn = np.empty(count, np.int64)
    for i, at in enumerate(stretch):
        inside = weights[i, starts[at] : starts[at] + _STRETCH].cumsum(dtype=np.float64)
        # The sum of the stretch was rounded otherwise: what is left of the aim may be a trace more than all of it.
        left = aim[i] - (reached[i, at - 1] if at else 0.0)
        found = min(int(np.searchsorted(inside, left, side="right")), len(inside) - 1)
        while not weights[i, starts[at] + found]:
            found -= 1  # one that is not possible, at the end of a stretch
        drawn[i] = starts[at] + found
    return drawn
