"""Models on a device that copies what is bound and hides its memory compute what they compute on the CPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.dtypes import as_float32, dtype
from ortlm.runtime import loading
from ortlm.runtime.engine import lora
from ortlm.runtime.engine.backend import TensorInfo
from ortlm.runtime.engine.device_memory import DeviceMemory
from ortlm.runtime.engine.devices import CPU
from ortlm.runtime.engine.session import _alias
from tests.runtime.device_like import PLACE, DeviceLikeSession, Runner

TEXT = [int(token) for token in np.random.default_rng(0).integers(7, 250, 40)]
BUILDS = {
    "phi3": ("phi3", "fp32", None),
    "longrope": ("phi3-longrope", "fp32", None),
    "int4": ("gemma2", "int4", BuildOptions(recipe="fast")),
    "int8 cache": ("qwen3", "fp32", BuildOptions(kv_cache="int8")),
    "windows": ("gemma3", "fp32", BuildOptions(window_cache=True)),
}


@pytest.fixture(scope="module", params=BUILDS, ids=str)
def both(request, build, tmp_path_factory):
    """The same model on the CPU, and on the CPU behaving like a device."""
    host = build(*BUILDS[request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "Session", DeviceLikeSession)
        device = ortlm.load(host.artifact.path, threads=1)
    assert not device.session.memory.is_host
    return host, device


def same(both, work):
    found = [work(lm) for lm in both]
    if any(state.window for state in both[0].loop().states):
        # Devices have no margin after a window, so sums come in another order.
        np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-4)
    else:
        np.testing.assert_array_equal(found[0], found[1])
    assert np.isfinite(np.asarray(found[0], np.float64)).all()


def test_append_step_and_rewind(both):
    def work(lm):
        loop, found = lm.loop(), []
        loop.start()
        found.extend(loop.append([part])[0].copy() for part in (TEXT[:9], TEXT[9:20]))
        found.extend(loop.step([token])[0].copy() for token in TEXT[20:30])
        loop.trim(13)
        found.append(loop.append([TEXT[30:34]], keep=3)[0, -1].copy())
        found.append(loop.append([[]])[0].copy())
        return found

    same(both, work)


def test_a_cache_that_grows(both):
    def work(lm):
        loop = lm.loop()
        loop.start()
        loop.append([TEXT[:3]])
        loop.append([TEXT * 6])
        return loop.step([5]).copy()

    same(both, work)


def test_rows_of_different_lengths_that_change_places(both):
    def work(lm):
        loop = lm.loop()
        loop.start(3)
        found = [loop.append([TEXT[:3], TEXT[4:20], TEXT[20:21]]).copy()]
        found.append(loop.append([[5], [6, 7], [8, 9, 10]]).copy())
        loop.select(np.array([2, 0, 2]))
        found.append(loop.step([4, 5, 6]).copy())
        loop.select(np.array([1]))
        found.append(loop.step([4]).copy())
        return np.concatenate(found)

    same(both, work)


def test_states_that_are_saved_and_restored(both, tmp_path):
    path = tmp_path / "prompt"

    def work(lm):
        generator = lm.generator(max_new_tokens=8, ignore_eos=True)
        generator.append(TEXT)
        generator.step()
        generator.save(path)
        again = lm.generator(max_new_tokens=8, ignore_eos=True)
        again.restore(path)
        path.unlink()
        while not again.done:
            again.step()
        return again.sequence()

    same(both, work)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_return_sequences": 3, "temperature": 1.0, "seed": 1},
        {"draft": "lookup"},
    ],
    ids=str,
)
def test_generation(both, options):
    def work(lm):
        generator = lm.generator(max_new_tokens=20, ignore_eos=True, **options)
        generator.append((TEXT[:8] * 3)[:20])
        while not generator.done:
            generator.step()
        rows = options.get("num_return_sequences", 1)
        return [generator.sequence(row) for row in range(rows)]

    same(both, work)


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_what_is_done_to_states_equals_what_arrays_say(axis, kind):
    memory = DeviceMemory(Runner(PLACE, CPU))
    random = np.random.default_rng(0)
    shape = (2, 3, 2, 6, 4) if axis == 3 else (3, 2, 6, 4)
    arrays = [(100 * random.normal(size=shape)).astype(dtype(kind).numpy) for _ in range(3)]
    tensors = [memory.put(array) for array in arrays]

    def check(wanted):
        length = wanted[0].shape[axis]
        for got, want in zip(memory.read(tensors, 0, length, axis=axis), wanted, strict=True):
            np.testing.assert_array_equal(got, want)

    check(arrays)
    rows = np.array([2, 0, 0, 1])
    memory.take_rows(tensors, rows, filled=6, axis=axis)
    arrays = [np.take(array, rows, axis - 2) for array in arrays]
    check(arrays)
    memory.resize(tensors, 4, 9, axis=axis)
    tail = np.zeros((*arrays[0].shape[:axis], 5, 4), arrays[0].dtype)
    arrays = [np.concatenate([np.take(array, range(4), axis), tail], axis) for array in arrays]
    check(arrays)
    one = memory.read(tensors, 1, 3, row=2, axis=axis)
    for got, array in zip(one, arrays, strict=True):
        np.testing.assert_array_equal(got, np.take(np.take(array, [2], axis - 2), [1, 2], axis))
    memory.resize(tensors, 2, 2, axis=axis)
    arrays = [np.take(array, [0, 1], axis) for array in arrays]
    check(arrays)
    zeros = memory.zeros([(2, 3, 4, 5), (1, 1, 1, 1), (2, 3, 4, 5)], [dtype(kind)] * 3)
    for tensor, size in zip(zeros, (120, 1, 120), strict=True):
        (found,) = memory.read([tensor], 0, tensor.value.shape()[2])
        assert found.size == size
        assert not found.any()


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_float32_on_the_device_equals_numpy(kind, reads):
    memory = DeviceMemory(Runner(PLACE, CPU, reads=reads))
    array = np.random.default_rng(0).normal(size=(3, 1, 50)).astype(dtype(kind).numpy)
    found = memory.float32(memory.put(array))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, array.astype(np.float32))


def test_batches_whose_logits_are_converted_on_the_device(saved, tmp_path, monkeypatch):
    """More rows than one, fewer again and a run of its own for an output: each has logits of its own shape."""
    ortlm.build(saved("qwen3").folder, tmp_path / "m", precision="fp16", target="cuda")
    host = ortlm.load(tmp_path / "m", device="cpu", threads=1)
    monkeypatch.setattr(loading, "Session", DeviceLikeSession)
    device = ortlm.load(tmp_path / "m", device="cpu", threads=1)

    def work(lm):
        loop, found = lm.loop(), []
        loop.start(3)
        found.append(loop.append([TEXT[:5], TEXT[5:10], TEXT[10:15]]).copy())
        found.extend(loop.step([token, token + 1, token + 2]).copy() for token in TEXT[20:24])
        loop.select(np.array([2, 0]))
        found.extend(loop.step([token, token]).copy() for token in TEXT[24:26])
        loop.again("logits", [row[:-1] for row in loop.history], [2, 2])
        found.append(loop.step([9, 8]).copy())
        loop.select(np.array([1]))
        found.append(loop.step([7]).copy())
        return found

    for one, other in zip(work(host), work(device), strict=True):
        np.testing.assert_array_equal(one, other)


def test_adapters_are_copied_to_the_device_once(tmp_path, monkeypatch):
    """Not for every loop that uses one; what is bound there is the device's own tensor."""
    memory = DeviceMemory(Runner(PLACE, CPU))
    info = TensorInfo("m.lora_A", dtype("fp16"), (4, None)), TensorInfo("m.lora_B", dtype("fp16"), (None, 3))
    given = {i.name: (replace(i, shape=tuple(n or 2 for n in i.shape)), i) for i in info}
    arrays = {name: np.ones(found.shape, np.float16) for name, (found, _) in given.items()}
    monkeypatch.setattr(
        lora, "read_adapter", lambda path: {n: (given[n][0], _alias(array)) for n, array in arrays.items()}
    )
    session = SimpleNamespace(
        path="m.onnx",
        inputs={},
        optional={name: wanted for name, (_, wanted) in given.items()},
        memory=memory,
        tensor=_alias,
    )
    graph = SimpleNamespace(optional={}, inputs={}, states=())
    manifest = SimpleNamespace(adapters={"one": "one.onnx_adapter"}, graphs={"decoder": graph})
    adapters = lora.Adapters(session, SimpleNamespace(path=tmp_path, manifest=manifest))
    first, second = adapters.inputs("one"), adapters.inputs("one")
    for name in given:
        assert first[name] is second[name]
        assert first[name].on_device
        assert (memory.float32(first[name]) == 1).all()


def test_arrays_on_a_device_change_by_editing_only():
    memory = DeviceMemory(Runner(PLACE, CPU))
    array = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    tensors = [memory.put(array)]
    array[...] = 0
    with pytest.raises(TypeError, match="lies on a device"):
        tensors[0].numpy()

    def change(number, there):
        there[0, 0, 0] = number + 7

    assert memory.edit(tensors, change)
    (found,) = memory.read(tensors, 0, 3)
    assert found[0, 0, 0].tolist() == [7] * 4
    assert found[0, 1, 2].tolist() == [20, 21, 22, 23]


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32"])
def test_logits_in_float32(kind):
    wide = np.random.default_rng(0).normal(0, 30, (2, 999)).astype(dtype(kind).numpy)
    np.testing.assert_array_equal(as_float32(wide), wide.astype(np.float32))
    assert as_float32(wide[:, :0]).shape == (2, 0)
    assert _alias(wide).numpy() is wide


def test_every_number_of_fp16_in_float32():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = np.isfinite(every)
    np.testing.assert_array_equal(as_float32(every[finite]), every[finite].astype(np.float32))
    np.testing.assert_array_equal(as_float32(every), every.astype(np.float32))
