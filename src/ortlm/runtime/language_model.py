"""The language model: an artifact, loaded, that turns prompts into text.

lm = load("phi")
print(lm.generate("The capital of France is", max_new_tokens=16))
for step in lm.stream([{"role": "user", "content": "Hello"}], temperature=0.7):
    print(step.text, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ortlm.artifact import GRID, Artifact, graph_named, open_artifact, runnable, settled
from ortlm.errors import BadArtifact, BadOption, ContextFull, nearest
from ortlm.runtime.embeddings import Pooling, embed
from ortlm.runtime.engine.attention_check import check_attention
from ortlm.runtime.engine.backend import DeviceTensor
from ortlm.runtime.engine.captured_steps import StatePool
from ortlm.runtime.engine.contract import check_decoder
from ortlm.runtime.engine.decode_loop import ACCELERATOR_CHUNK_TOKENS, CHUNK_TOKENS, Loop
from ortlm.runtime.engine.devices import DeviceRequest, onnxruntime_version
from ortlm.runtime.engine.kv_cache import state_shapes
from ortlm.runtime.engine.lora import Adapters
from ortlm.runtime.engine.prefix_cache import PrefixCaches
from ortlm.runtime.engine.prompt_cache import fingerprint, restore, save
from ortlm.runtime.engine.session import Session
from ortlm.runtime.engine.states import FIXED_KINDS, Shapes, bytes_per_token
from ortlm.runtime.engine.token_ids import FIRST_IMAGE_TOKEN, has_images
from ortlm.runtime.engine.types import Logits
from ortlm.runtime.generation.generator import Generator
from ortlm.runtime.generation.rules import Rules
from ortlm.runtime.generation.speculative import DraftModel, Lookup, Proposer
from ortlm.runtime.generation.stream import Generation, Step, Stream, Timings, astream, in_thread
from ortlm.runtime.loading import device_for, open_embedding, open_session
from ortlm.runtime.multimodal.addresses import Allow
from ortlm.runtime.multimodal.image_loading import ImageSource
from ortlm.runtime.multimodal.vision_encoder import Embedder, VisionEncoder
from ortlm.runtime.prompts import Prompt, Prompts, TokenizerReader
from ortlm.runtime.sampling.logprobs import TokenLogprob, token_logprob
from ortlm.runtime.sampling.settings import Options, Settings
from ortlm.runtime.structured_output.guidance import Guidance
from ortlm.runtime.structured_output.matcher import Guide, Vocabulary
from ortlm.runtime.text.tokenizer import Tokenizer
from ortlm.runtime.text.types import Message

if TYPE_CHECKING:
    from typing import Unpack

    from ortlm.runtime.text.chat_template import ChatTemplate

# Bounds the memory for the logits of a long prompt.
_LOGPROB_CHUNK = 64


class LanguageModel:
    """An artifact that is loaded and ready to generate; ``load`` makes one, and describes the arguments.

    May be used by several threads: every generation has a cache of its own. ``prefix_caches`` of them are kept
    for calls that begin with the same tokens. With ``read_early`` the tokenizer is read while the graph is loaded,
    else when it is first needed.

    ``artifact`` is the folder that was opened, ``manifest`` what it says of the graphs that run here, ``session``
    the decoder in ONNX Runtime, ``vocab_size`` the width V of its logits. ``vision_encoder`` turns images into
    tokens, None for a text model. ``device`` is where it runs.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        device: DeviceRequest | str | None = None,
        prefix_caches: int = 1,
        allow_address: Allow | None = None,
        read_early: bool = False,
    ) -> None:
        self.artifact = artifact
        self.device = device_for(artifact, device)
        self.manifest = runnable(
            artifact.manifest, onnxruntime=onnxruntime_version(), provider=self.device.provider
        )
        check_attention(
            artifact.path / graph_named(self.manifest, "decoder").file,
            self.device,
            self.manifest.context_tokens,
        )
        tokenizer = TokenizerReader(artifact.tokenizer_path)
        self.session = open_session(
            artifact,
            "decoder",
            threads,
            self.device,
            self.manifest,
            meanwhile=tokenizer.begin if read_early else None,
        )
        # Main memory is quickly made.
        self._pool = None if self.session.memory.is_host else StatePool(self.session)
        there = {**self.session.inputs, **self.session.optional}
        decoder = graph_named(self.manifest, "decoder")
        if self.device.constant_defaults:
            decoder = replace(decoder, optional={})
        self._graph = settled(decoder, there, self.session.outputs)
        self.manifest = replace(self.manifest, graphs={**self.manifest.graphs, "decoder": self._graph})
        self._check_tensors()
        self._embedding: Session | None = None
        self.vision_encoder: VisionEncoder | None = None
        if "inputs_embeds" in self._graph.inputs:
            self._embedding, self.vision_encoder = open_embedding(
                artifact, threads, self.device, allow_address
            )
        elif "input_ids" not in self._graph.inputs:
            raise BadArtifact(f"{artifact.path} names no input for token ids.")
        if "attention_mask" not in self._graph.inputs:
            raise BadArtifact(f"{artifact.path} names no input for the attention mask.")
        check_decoder(self.session, self._graph, self.manifest)
        logits = self._graph.outputs.get("logits", "")
        if logits not in self.session.outputs:
            raise BadArtifact(f"{self.session.path} has no output for logits.")
        self.vocab_size = self.session.outputs[logits].shape[2] or self.manifest.vocab_size
        self._last_logits_only = (
            self.session.outputs[logits].shape[1] == 1 and "logits_to_keep" not in self._graph.optional
        )
        self._kept = PrefixCaches(prefix_caches)
        self._prompts = Prompts(artifact.tokenizer_path, self.vision_encoder, tokenizer)
        # Once, since the folder may be gone later.
        self._has_tokenizer = (artifact.tokenizer_path / "tokenizer.json").is_file()

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer. Raises BadArtifact if it has none."""
        return self._prompts.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The artifact's chat template, or None."""
        return self._prompts.chat_template

    @cached_property
    def _forbidden(self) -> NDArray[np.bool_] | None:
        if not self._has_tokenizer:
            return None
        unknown = self.tokenizer.unknown_ids(self.vocab_size)
        if not len(unknown):
            return None
        forbidden = np.zeros(self.vocab_size, dtype=np.bool_)
        forbidden[unknown] = True
        return forbidden

    @cached_property
    def _shapes(self) -> Shapes:
        return state_shapes(self.session, self._graph)

    @property
    def cache_bytes_per_token(self) -> int:
        """How many bytes of cache one token takes, in layers that keep a window only until that is full."""
        return bytes_per_token(self.session, self._graph.states, self._shapes)

    @property
    def fixed_states(self) -> tuple[int, ...]:
        """Places, among the states of a loop, of those that have one size and cannot be rewound."""
        return tuple(place for place, state in enumerate(self._graph.states) if state.kind in FIXED_KINDS)

    def loop(self, *, as_answers: bool = False, adapter: str | None = None) -> Loop:
        """Return a new decode loop over raw token ids.

        ``as_answers``: prompts too are computed with the weights that answers are, where there are others for
        them. ``adapter``: the LoRA adapter to compute with. Raises BadOption if there is none of that name.
        """
        few = self.manifest.prompt_tokens if as_answers else None
        chunk = CHUNK_TOKENS if self.session.memory.is_host else ACCELERATOR_CHUNK_TOKENS
        loop = Loop(
            self.session,
            self._graph,
            context_tokens=self.manifest.context_tokens,
            switch_tokens=self.manifest.rope_switch_tokens,
            shapes=self._shapes,
            embedder=self._embedder(),
            by_grid=self.manifest.images is not None and self.manifest.images.positions == GRID,
            chunk_tokens=chunk if few is None else few - 1,
            appends_one=self.device.appends_one,
            most_tokens=self.device.most_tokens,
            pool=self._pool,
        )
        if adapter is not None:
            loop.use(self._adapter_inputs(adapter))
        return loop

    def _embedder(self) -> Embedder | None:
        if self._embedding is None or self.vision_encoder is None:
            return None
        return Embedder(self._embedding, graph_named(self.manifest, "embedding"), self.vision_encoder)

    def encode(
        self,
        prompt: Prompt,
        *,
        images: Sequence[ImageSource] | None = None,
        num_crops: int | None = None,
    ) -> list[int]:
        """Return the token ids of ``prompt``: a text, chat messages, or ids themselves.

        A content of messages may be a list of parts, {"type": "text", "text": …} and {"type": "image",
        "image": …}; a text has a tag where each of ``images`` belongs, see docs/vision.md. An image is a path, a
        URL (data:, http:, https:), the bytes of a file, a Pillow image or uint8 [H, W, 3]. ``num_crops`` is how
        many crops each is cut into at most, by default what the model says. Tokens of images are numbers above
        the vocabulary.

        Raises BadOption for an empty prompt, ids outside the vocabulary, messages without a template, or tags that
        do not fit the images; BadImage for an image that cannot be read.
        """
        ids = self._prompts.encode(prompt, images, num_crops)
        self._check_ids(ids)
        return ids

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the prompt that the chat template makes of ``messages``.

        With ``add_generation_prompt`` it ends where the assistant's answer begins. Raises BadOption if the model
        has no chat template, BadArtifact if the template fails.
        """
        return self._prompts.render(messages, add_generation_prompt=add_generation_prompt)

    def generate(
        self,
        prompt: Prompt,
        *,
        images: Sequence[ImageSource] | None = None,
        num_crops: int | None = None,
        settings: Settings | None = None,
        reuse_cache: bool = True,
        **options: Unpack[Options],
    ) -> Generation:
        """Continue ``prompt`` and return the whole answer.

        ``prompt`` is a text, a list of chat messages, or a list of token ids; ``images`` and ``num_crops`` are as
        for ``encode``. ``options`` are the fields of Settings and win over ``settings``. With ``reuse_cache`` the
        call begins from what an earlier one left in the cache, as far as the prompts agree; results may then
        differ from a fresh start in the last digits.
        Raises ContextFull if the prompt alone is longer than the context, BadOption for unusable values.
        """
        stream = self.stream(
            prompt,
            images=images,
            num_crops=num_crops,
            settings=settings,
            reuse_cache=reuse_cache,
            **options,
        )
        return stream.generations()[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        images: Sequence[Sequence[ImageSource] | None] | None = None,
        num_crops: int | None = None,
        settings: Settings | None = None,
        **options: Unpack[Options],
    ) -> list[Generation]:
        """Continue several ``prompts`` at once and return the answer to each; see ``generate`` for the options.

        ``images`` has those of each prompt, where they are not in the messages. Faster than one after the other,
        because every step reads the weights once for all of them.
        Raises BadOption as ``generate`` does, and if there is no prompt or not one entry of ``images`` for each.
        """
        if isinstance(prompts, (str, bytes)) or not len(prompts):
            raise BadOption("generate_batch takes a list of prompts, at least one.")
        alongside = [None] * len(prompts) if images is None else images
        if len(alongside) != len(prompts):
            raise BadOption(f"there are {len(prompts)} prompts, but images for {len(alongside)}.")
        rows = [
            self.encode(prompt, images=own, num_crops=num_crops)
            for prompt, own in zip(prompts, alongside, strict=True)
        ]
        wanted = Settings.of(settings, options)
        if self._images_adapter is None or wanted.adapter is not None:
            return self._stream(rows, wanted, {}).generations()
        # Rows with images are computed with an adapter, and others without.
        made: dict[int, Generation] = {}
        for with_images in (False, True):
            places = [place for place, ids in enumerate(rows) if has_images(ids) == with_images]
            if places:
                found = self._stream([rows[place] for place in places], wanted, {}).generations()
                made |= zip(places, found, strict=True)
        return [made[place] for place in sorted(made)]

    def stream(
        self,
        prompt: Prompt,
        *,
        images: Sequence[ImageSource] | None = None,
        num_crops: int | None = None,
        settings: Settings | None = None,
        reuse_cache: bool = True,
        timings: Timings | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """Continue ``prompt``; the Stream returned yields a Step per token. Options as for ``generate``.

        ``timings`` is filled while the stream runs. Bad values are reported at once, not at the first step.
        """
        timings = Timings() if timings is None else timings
        began = time.perf_counter()
        ids = self.encode(prompt, images=images, num_crops=num_crops)
        timings.image_seconds = time.perf_counter() - began if has_images(ids) else 0.0
        return self._stream([ids], settings, options, reuse_cache=reuse_cache, timings=timings)

    def astream(
        self,
        prompt: Prompt,
        *,
        images: Sequence[ImageSource] | None = None,
        num_crops: int | None = None,
        settings: Settings | None = None,
        reuse_cache: bool = True,
        timings: Timings | None = None,
        **options: Unpack[Options],
    ) -> AsyncIterator[Step]:
        """Continue ``prompt`` for ``async for``: the model runs in another thread, the event loop continues.

        Arguments and errors are as for ``stream``; bad values are reported by the call itself. A task that is
        cancelled stops the model within a fraction of a step.
        """
        return astream(
            self.stream(
                prompt,
                images=images,
                num_crops=num_crops,
                settings=settings,
                reuse_cache=reuse_cache,
                timings=timings,
                **options,
            )
        )

    async def agenerate(
        self,
        prompt: Prompt,
        *,
        images: Sequence[ImageSource] | None = None,
        num_crops: int | None = None,
        settings: Settings | None = None,
        reuse_cache: bool = True,
        **options: Unpack[Options],
    ) -> Generation:
        """Continue ``prompt`` and return the whole answer, without blocking the event loop; see ``generate``.

        A task that is cancelled stops the model within a fraction of a step.
        """
        stream = self.stream(
            prompt,
            images=images,
            num_crops=num_crops,
            settings=settings,
            reuse_cache=reuse_cache,
            **options,
        )
        return (await in_thread(stream, stream.generations))[0]

    def generator(
        self, settings: Settings | None = None, *, reuse_cache: bool = False, **options: Unpack[Options]
    ) -> Generator:
        """Return a Generator: the loop, token by token, over ids. See its class for what can be done.

        ``options`` are the fields of Settings and win over ``settings``. With ``reuse_cache`` it begins with the
        cache of the last call, and computes of its first prompt only what is new.
        """
        wanted = Settings.of(settings, options)
        loop = self._take_loop((), wanted.adapter) if reuse_cache else self.loop()
        return Generator(loop, self.rules, wanted)

    @property
    def _images_adapter(self) -> str | None:
        return None if self.manifest.images is None else self.manifest.images.adapter

    def adapter_for(self, ids: Sequence[int], adapter: str | None) -> str | None:
        """Return the LoRA adapter that the prompt ``ids`` is computed with if a caller asks for ``adapter``.

        Images may need one of their own. Raises BadOption if another one is asked for with them.
        """
        needed = self._images_adapter
        if needed is None or not has_images(ids):
            return adapter
        if adapter not in (None, needed):
            raise BadOption(
                f"adapter {adapter!r} is asked for, but this model computes prompts with images with its adapter "
                f"{needed!r}, and one at a time. Leave images or adapter out."
            )
        return needed

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRA adapters that can be asked for: the artifact's own, and those that were loaded."""
        return self._adapters.names

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Read the ``.onnx_adapter`` file ``path`` and call it ``name``.

        Raises BadOption if the name is taken, BadArtifact if the file is damaged or made for another model.
        """
        self._adapters.load(path, name)

    def unload_adapter(self, name: str) -> None:
        """Forget the adapter ``name``. Raises BadOption if there is none."""
        self._adapters.unload(name)
        self._kept.forget(name)

    def save_cache(self, path: str | Path, *, adapter: str | None = None) -> None:
        """Write what the last call with ``adapter`` has computed to the file ``path``, for ``load_cache``.

        Raises BadOption if nothing is kept: no call yet that reuses caches, or one with several answers.
        """
        kept = self._kept.latest(adapter)
        if kept is None:
            raise BadOption("there is no cache to save: no call with a single answer was made yet.")
        save(kept, Path(path), model=self._fingerprint(adapter))

    def load_cache(self, path: str | Path, *, adapter: str | None = None) -> None:
        """Let the next call whose prompt begins alike resume from the file ``path`` that ``save_cache`` wrote.

        Raises BadArtifact if another model wrote it, or with another ``adapter``, or if it is damaged; BadOption
        if it holds more than one row.
        """
        loop = self.loop(adapter=adapter)
        restore(loop, Path(path), model=self._fingerprint(adapter))
        if len(loop.history) != 1:
            raise BadOption(f"{path} holds {len(loop.history)} rows; only a Generator can resume from those.")
        self._kept.keep(adapter, loop)

    def prompt_logprobs(
        self, prompt: Prompt, *, top: int = 0, adapter: str | None = None
    ) -> list[TokenLogprob | None]:
        """Return the log-probability of every token of ``prompt`` after those before it, one entry per token.

        The first token has none, nor have tokens of images. ``top``: that many of the most likely tokens with
        each. ``adapter``: the LoRA adapter to compute with.
        """
        ids = self.encode(prompt)
        loop = self.loop(adapter=self.adapter_for(ids, adapter))
        loop.start()
        return self._prompt_logprobs(loop, ids, top)

    def hidden_states(self, prompt: Prompt) -> NDArray[np.float32]:
        """Return the last layer's states after every token of ``prompt``, normalized, float32 [S, H].

        Raises BadArtifact unless the model was built with include_hidden_states.
        """
        ids = self.encode(prompt)
        loop = self.loop(adapter=self.adapter_for(ids, None))
        loop.start()
        states: NDArray[np.float32] = loop.hidden_states([ids])[0]
        return states

    def embed(
        self, prompts: Sequence[Prompt], *, pooling: Pooling = "mean", normalize: bool = True, batch: int = 8
    ) -> NDArray[np.float32]:
        """Return an embedding for each of ``prompts``, float32 [N, H].

        ``pooling``: the "mean" of the hidden states of all tokens, or those of the "last" or the "first" one.
        ``normalize`` scales to length 1, so that products are cosines. ``batch`` prompts run at once.
        Raises BadArtifact unless the model was built with include_hidden_states, BadOption for a single text.
        """
        if isinstance(prompts, (str, bytes)):
            raise BadOption("embed takes a list of prompts; put a single one into a list.")
        rows = [self.encode(prompt) for prompt in prompts]
        return embed(self.loop(), rows, pooling=pooling, normalize=normalize, batch=batch)

    def logits(self, ids: Sequence[int], *, as_answers: bool = False) -> Logits:
        """Return the logits after every token of ``ids``, float32 [S, V]; ``as_answers`` as for ``loop``."""
        tokens = self.encode(ids)
        loop = self.loop(as_answers=as_answers)
        loop.start()
        logits: Logits = loop.append([tokens], keep=len(tokens))[0]
        return logits

    def logits_batch(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]] | None = None
    ) -> Logits:
        """Return logits of several rows, float32 [B, 1 + N, V], for checks against other implementations.

        The ``prompts`` may differ in length. The first logits follow each prompt's last token; then the N tokens
        of each row of ``continuations`` are fed one at a time.
        Raises BadOption if there is not one continuation for each prompt, all of the same length.
        """
        rows = [self.encode(prompt) for prompt in prompts]
        more = [list(row) for row in continuations or [[] for _ in rows]]
        if len(more) != len(rows) or len({len(row) for row in more}) > 1:
            raise BadOption("continuations must have one row per prompt, all of the same length.")
        for row in more:
            self._check_ids(row)
        loop = self.loop()
        loop.start(len(rows))
        steps = [loop.append(rows).copy()]
        steps += [loop.step(tokens).copy() for tokens in zip(*more, strict=True)]
        return np.stack(steps, axis=1)

    def _check_tensors(self) -> None:
        """Raise BadArtifact if the configuration names a tensor that the graph has not."""
        graph, session = self._graph, self.session
        inputs = {**session.inputs, **session.optional}
        for what, named, there in (
            ("input", graph.inputs, inputs),
            ("output", graph.outputs, session.outputs),
            ("optional input", graph.optional, inputs),
        ):
            for role, name in named.items():
                if name not in there:
                    raise BadArtifact(
                        f"{graph.file} has no {what} {name!r}, which the artifact's configuration names as {role}."
                        + nearest(name, there)
                    )

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not self.vocab_size:
            return
        for at, token in enumerate(ids):
            if not 0 <= token < self.vocab_size and not (self.vision_encoder and token >= FIRST_IMAGE_TOKEN):
                raise BadOption(
                    f"token id {token} at index {at} is outside the vocabulary 0 … {self.vocab_size - 1}."
                )

    # --- inside -----------------------------------------------------------------------------------------

    @cached_property
    def rules(self) -> Rules:
        """What the model prescribes to every generation."""
        manifest = self.manifest
        return Rules(
            context_tokens=manifest.context_tokens,
            vocab_size=self.vocab_size,
            stop_token_ids=frozenset(manifest.stop_token_ids),
            published=manifest.generation,
            forbidden=self._forbidden,
            guide=self._guide,
            words=self._word_ids,
            proposer=self._proposer,
            adapter=self._adapter_inputs,
            fingerprint=self._fingerprint,
            images=self.vision_encoder is not None,
            images_adapter=self._images_adapter,
        )

    def _stream(
        self,
        prompts: list[list[int]],
        settings: Settings | None,
        options: Options,
        *,
        reuse_cache: bool = False,
        timings: Timings | None = None,
    ) -> Stream:
        wanted = Settings.of(settings, options)
        self._check_lengths(prompts, wanted)
        for ids in prompts:
            if wanted.adapter != (needed := self.adapter_for(ids, wanted.adapter)):
                wanted = replace(wanted, adapter=needed)
        loop = self._take_loop(prompts[0], wanted.adapter) if reuse_cache else self.loop()
        at_end = self._keep if reuse_cache else _forget
        stream = self.stream_on(loop, prompts, wanted, timings=timings, at_end=at_end)
        if wanted.prompt_logprobs is not None:
            for ids in prompts:
                # A single prompt's cache then serves the generation.
                own = loop if len(prompts) == 1 else self.loop()
                if wanted.adapter is not None:
                    own.use(self._adapter_inputs(wanted.adapter))
                own.start()
                stream.prompt_logprobs.append(self._prompt_logprobs(own, ids, wanted.prompt_logprobs))
        return stream

    def stream_on(
        self,
        loop: Loop,
        prompts: list[list[int]],
        settings: Settings,
        *,
        timings: Timings | None = None,
        at_end: Callable[[Generator], None] | None = None,
    ) -> Stream:
        """Return the Stream that continues ``prompts``, as token ids, on ``loop`` as ``settings`` ask.

        ``timings`` is filled while it runs; ``at_end`` gets its generator when it has ended. Log-probabilities of
        prompts are the caller's to compute.
        Raises BadOption as ``generate`` does.
        """
        generator = Generator(loop, self.rules, settings)
        timings = Timings() if timings is None else timings
        timings.prompt_tokens = sum(map(len, prompts))
        return Stream(
            generator,
            prompts,
            generator.settings,
            self._text_tokenizer(settings),
            timings=timings,
            at_end=at_end or _forget,
        )

    def _check_lengths(self, prompts: list[list[int]], wanted: Settings) -> None:
        for ids in prompts:
            self._check_length(ids)
        if isinstance(wanted.draft, LanguageModel) and any(map(has_images, prompts)):
            raise BadOption(
                'the draft model cannot see the prompt\'s images. Use draft="lookup", or no draft.'
            )

    def _prompt_logprobs(self, loop: Loop, ids: list[int], top: int) -> list[TokenLogprob | None]:
        logprobs: list[TokenLogprob | None] = [None]
        switch = self.manifest.rope_switch_tokens
        # All positions are rotated by the table of the whole length, from the first chunk on.
        first = switch + 1 if switch is not None and len(ids) > switch else 0
        at = 0
        while at < len(ids):
            part = ids[at : at + max(_LOGPROB_CHUNK, first - at)]
            logits = loop.append([part], keep=len(part))[0]
            for row, token in zip(logits, ids[at + 1 : at + len(part) + 1], strict=False):
                # An image's tokens are no words that the model could have chosen.
                logprobs.append(token_logprob(row, token, top) if token < FIRST_IMAGE_TOKEN else None)
            at += len(part)
        return logprobs

    def _take_loop(self, ids: Sequence[int], adapter: str | None) -> Loop:
        """Return the kept loop that agrees most with ``ids``, or a new one."""
        return self._kept.take(ids, adapter) or self.loop()

    def _keep(self, generator: Generator) -> None:
        """Keep what a generation has computed for the next one that begins alike."""
        proposer = generator.proposer
        if isinstance(proposer, DraftModel) and len(proposer.loop.history) == 1:
            draft = generator.settings.draft
            if isinstance(draft, LanguageModel):
                draft._kept.keep(None, proposer.loop)
        if len(generator.loop.history) == 1 and not generator.mixed:
            self._kept.keep(generator.settings.adapter, generator.loop)

    @cached_property
    def _adapters(self) -> Adapters:
        return Adapters(self.session, self.artifact)

    def _adapter_inputs(self, name: str | None) -> Mapping[str, DeviceTensor]:
        return self._adapters.defaults() if name is None else self._adapters.inputs(name)

    @cached_property
    def _model_fingerprint(self) -> str:
        path = self.artifact.graph_path("decoder")
        return fingerprint(sorted(path.parent.glob(f"{path.name}*")))

    def _fingerprint(self, adapter: str | None) -> str:
        if adapter is None:
            return self._model_fingerprint
        return f"{self._model_fingerprint} {fingerprint([self._adapters.file(adapter)])}"

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer, self.vocab_size)

    def _guide(self, guidance: Guidance, stop_ids: Collection[int], prompt: Sequence[int]) -> Guide:
        return self._vocabulary.guide(guidance, stop_ids=stop_ids, prompt=prompt)

    def _word_ids(self, word: str) -> list[tuple[int, ...]]:
        """Return the token sequences that write ``word``: at a text's beginning, after a space, within a word."""
        encode = self.tokenizer.encode
        spellings = {tuple(encode(text, add_special_tokens=False)) for text in (word, f" {word}")}
        before = encode("\n", add_special_tokens=False)
        after = encode(f"\n{word}", add_special_tokens=False)
        if after[: len(before)] == before:
            spellings.add(tuple(after[len(before) :]))
        return sorted(ids for ids in spellings if ids)

    def _proposer(self, settings: Settings) -> Proposer | None:
        if settings.draft is None:
            return None
        if self._last_logits_only:
            raise BadOption(
                f"{self.session.path} gives the logits of the last token only, so it cannot "
                "check drafts. Build it with ortlm, or without prune_lm_head."
            )
        if settings.draft == "lookup":
            return Lookup()
        draft = settings.draft
        if not isinstance(draft, LanguageModel):
            raise BadOption(f'draft must be "lookup" or a loaded model, found {draft!r}.')
        if not self.tokenizer.same_as(draft.tokenizer):
            raise BadOption(
                f"{draft.artifact.path} cannot draft for {self.artifact.path}: their tokenizers differ, and both "
                "models must read the same tokens."
            )
        return DraftModel(draft._take_loop((), None), settings, vocab_size=self.vocab_size)

    def _text_tokenizer(self, settings: Settings) -> Tokenizer | None:
        """Return the tokenizer, None if the artifact has none and nothing asked for needs it."""
        if settings.stop or self._has_tokenizer:
            return self.tokenizer
        return None

    def _check_length(self, ids: Sequence[int]) -> None:
        context = self.manifest.context_tokens
        if len(ids) > context:
            raise ContextFull(f"the prompt has {len(ids)} tokens, but the model's context holds {context}.")


def _forget(generator: Generator) -> None:
    """Keep nothing."""


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    device: str | None = None,
    device_options: Mapping[str, Any] | None = None,
    prefix_caches: int = 1,
    allow_address: Allow | None = None,
) -> LanguageModel:
    """Load the artifact in ``path``, ours or one made for onnxruntime-genai.

    ``threads``: for one operator; by default the physical cores. ``device``: where to compute, such as "cpu",
    "cuda", "cuda:1" or "webgpu"; by default what the artifact was built for. ``device_options``: options of its
    execution provider. ``prefix_caches``: how many caches are kept for later calls that begin with the same
    tokens, 0 for none. ``allow_address``: for a server that opens its users' URLs of images, says of each address
    whether they may lead there, as ``ortlm.public_address`` does; then a text is never an image's path either.
    Raises BadArtifact if the folder is no artifact or is damaged, NoDevice if this machine lacks the device,
    BadOption for a device or an option that does not exist.
    """
    return LanguageModel(
        open_artifact(path),
        threads=threads,
        device=DeviceRequest(device, device_options or {}),
        prefix_caches=prefix_caches,
        allow_address=allow_address,
        read_early=True,
    )
