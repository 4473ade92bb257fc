"""lm-evaluation-harness on artifacts: ``lm_eval --model ortlm --model_args path=FOLDER --tasks …``.

The harness finds models in a registry of its own and reads no entry points, so the ``lm_eval`` command that comes
with ortlm registers this one and then is the harness's own. Programs call ``register`` instead.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ortlm.errors import BadOption, ContextFull
from ortlm.runtime.engine.token_ids import common_prefix_length

if TYPE_CHECKING:
    from ortlm.runtime.engine.decode_loop import Loop
    from ortlm.runtime.engine.types import Logits

_log = logging.getLogger(__name__)

NAME = "ortlm"
_MISSING = "lm-evaluation-harness is not installed. Install it with: pip install 'ortlm[eval]'"
_DEFAULT_NEW_TOKENS = 256
# What the harness names to every model unless somebody says --device.
_HARNESS_DEVICE = "cuda:0"


def main() -> int:
    """Run the harness's command line, with ``--model ortlm`` among its models."""
    # Its library of datasets counts uses, of local files too, by asking a server of its maker.
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        print(_MISSING, file=sys.stderr)
        return 1
    register()
    cli_evaluate()
    return 0


def register() -> None:
    """Make the harness know ``--model ortlm``."""
    # The harness fills its registry only as long as that is empty, so its own models come first.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=harness_model())


def harness_model() -> type[ArtifactModel]:
    """Return the class of models that the harness creates. Raises BadOption if there is no harness."""
    try:
        from lm_eval.api.model import TemplateLM
    except ModuleNotFoundError as error:
        raise BadOption(_MISSING) from error

    class OrtlmLM(ArtifactModel, TemplateLM):  # type: ignore[misc]
        """An artifact as a model of the harness, which tells models by their base class."""

    return OrtlmLM


class CacheHook(Protocol):
    """Where the harness keeps answers."""

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Keep the answer ``res`` to the request ``req`` of the kind ``attr``."""


class Request(Protocol):
    """One question of the harness."""

    @property
    def args(self) -> tuple[Any, ...]:
        """What is asked: a text, a prompt and a continuation, or a prompt and ``generation_kwargs``."""


class ArtifactModel:
    """What the harness asks of a model, answered by an artifact: its own base class only has to stand after this.

    ``path`` (or ``pretrained``) is the artifact's folder; ``batch_size`` prompts are answered at once;
    ``max_length`` tokens at most, by default the model's context; ``threads``, by default the physical cores;
    ``device``, by default the one that the artifact was built for. The harness's --device counts too, but for
    "cuda:0", which it names to every model when nobody asked for one; its ``max_batch_size`` means nothing here.
    Raises BadOption for anything else, BadArtifact if the folder holds no artifact.
    """

    # The harness sets it, to keep answers between its runs.
    cache_hook: CacheHook

    def __init__(
        self,
        path: str = "",
        pretrained: str = "",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        threads: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise BadOption(
                f"--model_args {sorted(unknown)[0]} is not known; there are path, batch_size, max_length, "
                "threads and device."
            )
        if not (path or pretrained):
            raise BadOption("--model_args needs path=FOLDER, the folder of an artifact.")
        from ortlm.runtime.language_model import load

        self.lm = load(path or pretrained, threads=threads, device=device)
        _log.info("%s runs on %s", self.lm.artifact.path, self.lm.device.name)
        context = self.lm.manifest.context_tokens
        self.max_length = min(int(max_length or context), context)
        self.batch_size = 1 if batch_size in ("auto", None) else int(str(batch_size).split(":")[0])

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: Any = None) -> ArtifactModel:
        """Return a model of --model_args and of what the harness adds."""
        more = {key: value for key, value in (additional_config or {}).items() if value is not None}
        if more.get("device") == _HARNESS_DEVICE or "device" in arg_dict:
            more.pop("device", None)
        return cls(**arg_dict, **more)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> ArtifactModel:
        """Return a model of --model_args as the command line writes them."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos = self._named("eos_token")
        return self.lm.manifest.stop_token_ids[0] if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        bos = self._named("bos_token")
        return self.eot_token_id if bos is None else bos

    def _named(self, name: str) -> int | None:
        text = self.lm.tokenizer.special_tokens.get(name)
        return None if text is None else self.lm.tokenizer.token_id(text)

    @property
    def tokenizer_name(self) -> str:
        """What tells the chat template's results in the harness's cache from others."""
        return self.lm.artifact.path.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of ``string``; ``add_special_tokens`` None adds them where none is written."""
        if add_special_tokens is None:
            # A chat template may have written the first token already.
            first = self.lm.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not string.startswith(first)
        return self.lm.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return ``chat_history`` as the prompt that the model's chat template makes of it."""
        return self.lm.render(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the chat template of that name, "" if none is wanted or there is none."""
        template = self.lm.chat_template
        if not chat_template or template is None:
            return ""
        name = chat_template if isinstance(chat_template, str) else "default"
        return template.templates.get(name, next(iter(template.templates.values())))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Questions with the same context in a row share what was computed of it.
        order = sorted(range(len(requests)), key=lambda i: (requests[i][1], len(requests[i][2])))
        loop = self.lm.loop()
        for i in order:
            key, context, continuation = requests[i]
            scores[i] = self._score(loop, context, continuation)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, scores[i])
        return scores

    def _score(self, loop: Loop, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        if not continuation:
            return 0.0, True
        # As the harness does: what is too long loses its beginning.
        tokens = [*context, *continuation][-(self.max_length + 1) :][:-1]
        count = min(len(continuation), len(tokens))
        targets = np.asarray(continuation[-count:], np.int64)
        logits = _last_logits(loop, tokens, count).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        chosen = logs[np.arange(count), targets]
        return float(chosen.sum()), bool((logits.argmax(axis=1) == targets).all())

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows as long as the context."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals = []
        for (text,) in [request.args for request in requests]:
            # As the harness's own backend: where the tokenizer puts BOS before a text, it is scored too.
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, 1
            )
            pieces = [(None, *pair) for pair in map(make_disjoint_window, windows)]
            total = sum(value for value, _ in self._loglikelihood_tokens(pieces))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals.append(total)
        return totals

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to the prompt of each request, by its ``generation_kwargs``.

        Raises BadOption for one of those that is not known.
        """
        pairs = [request.args for request in requests]
        asked = []
        for text, given in pairs:
            options = _options(dict(given))
            new = options["max_new_tokens"] = min(options["max_new_tokens"], self.max_length - 1)
            asked.append((self.tok_encode(text)[-(self.max_length - new) :], options))
        # On a device the rows of a group stay together: each that joins alone would be copied there and back.
        made = self._served(asked) if self.lm.session.memory.is_host else self._grouped(asked)
        answers = []
        for pair, (_, options), tokens in zip(pairs, asked, made, strict=True):
            answers.append(self._answer(tokens, options.get("stop", [])))
            self.cache_hook.add_partial("generate_until", pair, answers[-1])
        return answers

    def _served(self, asked: Sequence[tuple[list[int], dict[str, Any]]]) -> Iterator[Sequence[int]]:
        """Yield the tokens of each answer; when one has ended, the next takes its place."""
        from ortlm.serving.engine import Engine, EngineOptions

        # Tokens of answers round in another way than prompts: answers must not depend on the order.
        options = EngineOptions(batch=self.batch_size, queue=len(asked), reuse_answers=False)
        with Engine(self.lm, options) as engine:
            running = [engine.submit(prompt, **wanted) for prompt, wanted in asked]
            for request in running:
                yield request.result().token_ids

    def _grouped(self, asked: Sequence[tuple[list[int], dict[str, Any]]]) -> Iterator[Sequence[int]]:
        """Yield the tokens of each answer, computed in groups of the same options and like lengths."""
        found: dict[int, Sequence[int]] = {}
        for group in self._batches([(prompt, wanted) for prompt, wanted in asked]):
            prompts = [asked[i][0] for i in group]
            for i, made in zip(group, self.lm.generate_batch(prompts, **asked[group[0]][1]), strict=True):
                found[i] = made.token_ids
        yield from (found[i] for i in range(len(asked)))

    def _batches(self, pairs: Sequence[tuple[Any, ...]]) -> list[list[int]]:
        """Return the numbers of ``pairs`` of prompt and options in groups of the same options, by length."""
        order = sorted(range(len(pairs)), key=lambda i: (str(pairs[i][1]), len(pairs[i][0])))
        groups: list[list[int]] = []
        for i in order:
            if groups and len(groups[-1]) < self.batch_size and pairs[groups[-1][0]][1] == pairs[i][1]:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    def _answer(self, tokens: Sequence[int], stops: Sequence[str]) -> str:
        """Return the text of ``tokens`` as a text of its own, which begins without a space, up to a stop."""
        ended = bool(tokens) and tokens[-1] in self.lm.manifest.stop_token_ids
        text = self.lm.tokenizer.decode(tokens[:-1] if ended else tokens)
        for stop in stops:
            text = text.split(stop)[0]
        return text


def _last_logits(loop: Loop, tokens: Sequence[int], count: int) -> Logits:
    """Return the logits after the last ``count`` of ``tokens``, [count, V]; ``loop`` keeps what it computed."""
    history = loop.history[0] if loop.history else []
    same = min(common_prefix_length(history, tokens), len(tokens) - count)
    try:
        if same:
            loop.trim(same)
        else:
            loop.start()
        logits: Logits = loop.append([tokens[same:]], keep=count)[0]
    except ContextFull as error:  # pragma: no cover - max_length is within the context
        raise BadOption(str(error)) from error
    return logits


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the harness's ``generation_kwargs`` as ours. Raises BadOption for one that is not known."""
    until = given.pop("until", None)
    options: dict[str, Any] = {"max_new_tokens": _DEFAULT_NEW_TOKENS}
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        if given.get(name) is not None:
            options["max_new_tokens"] = int(given[name])
        given.pop(name, None)
    stops = [until] if isinstance(until, str) else list(until or ())
    if any(stops):
        options["stop"] = [stop for stop in stops if stop]
    sampled = given.pop("do_sample", None)
    temperature = given.pop("temperature", None)
    if sampled is False or (sampled is None and not temperature):
        options["do_sample"] = False
        for name in ("top_p", "top_k", "min_p"):
            given.pop(name, None)
    else:
        options["do_sample"] = True
        if temperature is not None:
            options["temperature"] = float(temperature)
    known = ("top_p", "top_k", "min_p", "repetition_penalty", "seed")
    options |= {name: given.pop(name) for name in known if given.get(name) is not None}
    if given:
        raise BadOption(
            f"generation_kwargs has {sorted(given)[0]!r}; there are until, max_gen_toks, do_sample, temperature, "
            f"{', '.join(known)}."
        )
    return options
