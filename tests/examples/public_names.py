"""A program with every public name, for mypy --strict: what a user sees of the types. It is never run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from ipaddress import IPv4Address

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_type

import ortlm
from ortlm import Artifact, BuildOptions, Generation, Guidance, LanguageModel, Settings


def processor(history: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return logits


def built() -> Artifact:
    options = BuildOptions(recipe="fast", layers=2)
    made = ortlm.build("checkpoint", "phi", precision="int4", target="cpu", options=options, force=True)
    assert_type(made, Artifact)
    assert_type(ortlm.open_artifact("phi"), Artifact)
    return made


def generated(lm: LanguageModel) -> str:
    settings = Settings(temperature=0.7, top_k=40, stop=["\n"], logprobs=2, processors=[processor])
    made = lm.generate([{"role": "user", "content": "Hello"}], settings=settings, max_new_tokens=8)
    assert_type(made, Generation)
    assert_type(made.timings, ortlm.Timings)
    assert_type(made.logprobs, tuple[ortlm.TokenLogprob, ...])
    assert_type(lm.generate_batch(["a", [1, 2]], guidance=Guidance.regex("[0-9]+")), list[Generation])
    stream = lm.stream("a", processors=processor, seed=1)
    assert_type(stream, ortlm.Stream)
    for step in stream:
        assert_type(step, ortlm.Step)
        assert_type(step.token_id, int | None)
    assert_type(lm.embed(["a", "b"], pooling="last"), NDArray[np.float32])
    return made.text


def by_token(lm: LanguageModel, prompt: Sequence[int]) -> list[int]:
    generator = lm.generator(temperature=0.7)
    assert_type(generator, ortlm.Generator)
    generator.append(prompt)
    while not generator.done:
        assert_type(generator.step(), NDArray[np.int64])
        generator.change(temperature=0.2)
    return generator.sequence()


async def streamed(lm: LanguageModel) -> Generation:
    steps = lm.astream("a", max_new_tokens=4)
    assert_type(steps, AsyncIterator[ortlm.Step])
    async for step in steps:
        print(step.text, step.finish_reason)
    return await lm.agenerate("a", max_new_tokens=4)


def main() -> None:
    built()
    lm = ortlm.load("phi", threads=1, allow_address=ortlm.public_address)
    assert_type(lm, LanguageModel)
    try:
        print(ortlm.__version__, generated(lm), by_token(lm, lm.encode("a")), asyncio.run(streamed(lm)))
    except (ortlm.errors.ContextFull, ortlm.errors.BadOption) as error:
        print(error)
    assert_type(ortlm.public_address(IPv4Address("127.0.0.1")), bool)


def wrong(lm: LanguageModel) -> None:
    """Each of these is an error, or mypy warns of the comment that is not needed."""
    lm.generate("a", max_new_token=8)  # type: ignore[call-arg]
    lm.generate("a", temperature="hot")  # type: ignore[arg-type]
    lm.generate({"role": "user"})  # type: ignore[arg-type]
    ortlm.build("checkpoint")  # type: ignore[call-arg]
    print(ortlm.nonsense)  # type: ignore[attr-defined]
