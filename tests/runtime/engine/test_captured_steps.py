"""Steps that a device captures: the same tokens and logits, whatever happens between two of them."""

from __future__ import annotations

import numpy as np
import pytest

import ortlm
from ortlm.builder.options import BuildOptions
from ortlm.dtypes import dtype
from ortlm.errors import Cancelled, Error, NoDevice
from ortlm.runtime import loading
from ortlm.runtime.engine import captured_steps
from ortlm.runtime.engine import session as engine
from ortlm.runtime.engine.captured_steps import StatePool
from ortlm.runtime.engine.device_memory import DeviceMemory
from ortlm.runtime.engine.devices import CPU, Device
from tests.runtime.device_like import PLACE, Binding, DeviceLikeSession, Runner

TEXT = [int(token) for token in np.random.default_rng(0).integers(7, 250, 40)]
BUILDS = {
    "phi3": ("phi3", "fp32", None),
    "longrope": ("phi3-longrope", "fp32", None),
    "int4": ("gemma2", "int4", BuildOptions(recipe="fast")),
}


@pytest.fixture(params=BUILDS, ids=str)
def both(request, build, monkeypatch):
    """The same model on the CPU, and on the CPU behaving like a device that captures."""
    host = build(*BUILDS[request.param])
    monkeypatch.setattr(loading, "Session", DeviceLikeSession)
    device = ortlm.load(host.artifact.path, threads=1)
    return host, device


def captured(lm):
    return len(lm.session._captured)


def close(found, wanted):
    """Masks are wider in captured steps, so that sums may come in another order."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def steps(lm, tokens, *, start=TEXT[:9]):
    loop = lm.loop()
    loop.start()
    return loop, [loop.append([start])[0].copy(), *(loop.step([token])[0].copy() for token in tokens)]


def test_steps_are_captured_and_compute_the_same(both):
    host, device = both
    # Past the switch of a model that has one, in the same states.
    many = TEXT * 2
    close(steps(device, many)[1], steps(host, many)[1])
    assert captured(device) == 1 + (device.loop().switch_tokens is not None)


def test_rows_of_different_lengths_and_rows_that_wait(both):
    def work(lm):
        loop = lm.loop()
        loop.start(3)
        found = [loop.append([TEXT[:3], TEXT[4:20], TEXT[20:21]]).copy()]
        found += [loop.step([token, -1 if token % 2 else 9, token + 1]).copy() for token in TEXT[:20]]
        return found

    host, device = both
    close(work(device), work(host))
    assert captured(device)


def test_what_comes_between_two_steps(both):
    def work(lm):
        loop, found = steps(lm, TEXT[:6])
        loop.trim(11)
        found += [loop.step([token])[0].copy() for token in TEXT[:4]]
        found.append(loop.append([TEXT[30:34]])[0].copy())
        found += [loop.step([token])[0].copy() for token in TEXT[:4]]
        loop.select(np.array([0, 0]))
        found += [loop.step([token, token])[1].copy() for token in TEXT[:5]]
        loop.select(np.array([1]))
        found += [loop.step([token])[0].copy() for token in TEXT[:5]]
        return found

    host, device = both
    close(work(device), work(host))
    assert captured(device)


def test_a_cache_that_grows_while_steps_are_captured(build, monkeypatch):
    host = build("qwen3", "fp32")
    monkeypatch.setattr(loading, "Session", DeviceLikeSession)
    device = ortlm.load(host.artifact.path, threads=1)
    many = (TEXT * 12)[:300]
    close(steps(device, many)[1], steps(host, many)[1])
    assert captured(device) >= 1
    # Again, in the states that are there by now.
    before = captured(device)
    close(steps(device, many)[1], steps(host, many)[1])
    assert captured(device) == before


def test_two_generations_at_once(both):
    """Each step overwrites what other runs took for intermediate results, the copies of their inputs included."""

    def work(lm):
        loops = [lm.loop(), lm.loop()]
        for loop, row in zip(loops, (TEXT[:5], TEXT[5:25]), strict=True):
            loop.start()
            loop.append([row])
        found = []
        for token in TEXT[:12]:
            found += [loop.step([token + at])[0].copy() for at, loop in enumerate(loops)]
        loops[0].append([TEXT[:7]])
        found += [loop.step([3])[0].copy() for loop in loops]
        return found

    host, device = both
    close(work(device), work(host))
    assert captured(device) >= 2


def test_states_are_used_again_with_what_was_captured_on_them(both):
    _, device = both
    first = steps(device, TEXT[:8])[1]
    count = captured(device)
    for _ in range(4):
        np.testing.assert_array_equal(steps(device, TEXT[:8])[1], first)
    assert captured(device) == count


def test_captures_are_limited(build, monkeypatch):
    host = build("qwen3", "fp32")
    monkeypatch.setattr(loading, "Session", DeviceLikeSession)
    monkeypatch.setattr(captured_steps, "_MOST_CAPTURES", 1)
    device = ortlm.load(host.artifact.path, threads=1)
    loops = [steps(device, TEXT[:8])[0] for _ in range(3)]
    assert captured(device) == 1
    close(steps(device, TEXT)[1], steps(host, TEXT)[1])
    del loops


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3},
        {"logprobs": 2},
        {"temperature": 0.9, "top_k": 5, "seed": 1, "num_return_sequences": 3},
        {"num_beams": 3},
        {"min_new_tokens": 10},
        {"draft": "lookup"},
    ],
    ids=str,
)
def test_generation(both, options):
    def work(lm):
        generator = lm.generator(max_new_tokens=30, ignore_eos=True, **options)
        generator.append((TEXT[:8] * 3)[:20])
        found = []
        while not generator.done:
            generator.step()
            found.append([item and [pair[0] for pair in item.top] for item in generator.logprobs])
        return [generator.sequence(row) for row in range(options.get("num_return_sequences", 1))], found

    host, device = both
    assert work(device) == work(host)


def test_settings_that_change_between_captured_steps(both):
    def work(lm):
        generator = lm.generator(max_new_tokens=40, ignore_eos=True)
        generator.append(TEXT[:9])
        for _ in range(6):
            generator.step()
        generator.change(repetition_penalty=1.5)
        for _ in range(6):
            generator.step()
        generator.change(repetition_penalty=1.0)
        seen = []
        for _ in range(6):
            seen.append(int(generator.logits.argmax()))
            assert generator.step()[0] == seen[-1]
        changed = generator.logits.copy()
        changed[0, 17] = 1e6
        generator.logits = changed
        assert generator.step()[0] == 17
        generator.rewind(15)
        generator.step()
        return generator.sequence(), seen

    host, device = both
    assert work(device) == work(host)


def test_a_captured_step_that_is_cancelled_is_done_later(both):
    host, device = both
    loop, found = steps(device, TEXT[:6])
    loop.cancel()
    with pytest.raises(Cancelled):
        loop.step([TEXT[6]])
    found.append(loop.step([TEXT[6]])[0].copy())
    close(found, steps(host, TEXT[:7])[1])


def test_logits_that_are_no_numbers_are_an_error_on_a_device_too(both):
    _, device = both
    generator = device.generator(max_new_tokens=30, ignore_eos=True)
    generator.append(TEXT[:9])
    for _ in range(6):
        generator.step()
    step = next(iter(device.session._captured.values()))[0]
    real = device.session.memory.most_likely

    def spoiled(logits):
        assert step is not None
        device.session.memory.write(logits, np.full(logits.value.shape(), np.nan, np.float32))
        return real(logits)

    device.session.memory.most_likely = spoiled
    with pytest.raises(Error, match="NaN or infinity"):
        generator.step()


def test_states_that_are_used_again_are_bound_already(both, monkeypatch):
    host, device = both
    wanted = steps(host, TEXT[:9])[1]
    close(steps(device, TEXT[:9])[1], wanted)
    bound = []
    usual = Binding.output
    monkeypatch.setattr(
        Binding, "output", lambda *given, **more: (bound.append(given[1]), usual(*given, **more))
    )
    close(steps(device, TEXT[:9])[1], wanted)
    assert not bound


def test_what_one_loop_binds_is_not_found_by_the_next(both):
    host, device = both
    wanted = steps(host, TEXT[:3])[1]
    loop, _ = steps(device, TEXT[:3])
    # The logits of several tokens go to main memory, and are bound in a run of their own.
    close(loop.again("logits", [TEXT[:6]], [3]), host_again(host))
    apart = loop._bound
    del loop
    loop, found = steps(device, TEXT[:3])
    close(found, wanted)
    assert loop._bound is not apart


def host_again(host):
    loop, _ = steps(host, TEXT[:3])
    return loop.again("logits", [TEXT[:6]], [3])


def test_cancel_does_not_reach_who_has_the_states_now(both):
    host, device = both
    loop, _ = steps(device, TEXT[:3])
    # Another number of rows: the states go back to the pool.
    loop.start(2)
    other, found = steps(device, TEXT[:3])
    loop.cancel()
    close(found, steps(host, TEXT[:3])[1])
    other.step([TEXT[3]])
    with pytest.raises(Cancelled):
        loop.append([TEXT[:4], TEXT[:5]])
    loop.append([TEXT[:4], TEXT[:5]])


def test_a_device_without_fp16_is_named():
    error = RuntimeError("Program Expand requires f16 but the device does not support it.")
    found = engine._not_run(error, "run it", Device("webgpu", "webgpu", "WebGpuExecutionProvider"))
    assert isinstance(found, NoDevice)
    assert "use_webgpu_fp32=true" in str(found)


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_the_most_likely_token_is_found_on_the_device(kind, reads):
    memory = DeviceMemory(Runner(PLACE, CPU, reads=reads))
    array = np.random.default_rng(0).normal(size=(4, 1, 50)).astype(np.float32)
    array[1, 0, [7, 30]] = 9
    # The order of bits is another below zero, where zeros of both signs are equal.
    array[2] = -np.abs(array[2]) - 1
    array[3] = np.minimum(array[3], -1)
    array[3, 0, [5, 20]] = [-0.0, 0.0]
    found = memory.most_likely(memory.put(array.astype(dtype(kind).numpy)))
    assert found.tolist() == array.astype(dtype(kind).numpy).astype(np.float32)[:, 0].argmax(1).tolist()
    assert (found[1], found[3]) == (7, 5)
    for bad in (np.nan, np.inf, -np.inf):
        spoiled = array.copy()
        spoiled[2, 0, 3] = bad
        assert memory.most_likely(memory.put(spoiled.astype(dtype(kind).numpy))) is None


class Backend:
    captures = False

    def release(self, capture):
        pass


def test_the_pool_keeps_the_states_that_were_used_last():
    pool = StatePool(Backend())
    taken = [pool.take(1, size, lambda: [object()], most=4096) for size in (256, 512, 1024)]
    for states in taken:
        pool.give(states)
    assert pool.old(1, 256, most=4096) is taken[1]
    assert pool.old(2, 512, most=4096) is None
    assert pool.old(1, 512, most=512) is None
    # Much longer states would make every step read more.
    assert pool.old(1, 128, most=4096) is None
    assert pool.take(1, 1024, list, most=4096) is taken[2]


def test_the_pool_lets_go_of_what_waits_if_memory_is_short():
    pool = StatePool(Backend())
    pool.give(pool.take(1, 256, lambda: [object()], most=4096))
    tries = []

    def make():
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("out of memory")
        return ["made"]

    assert pool.take(4, 256, make, most=4096).tensors == ["made"]
    with pytest.raises(RuntimeError):
        pool.take(8, 256, lambda: (_ for _ in ()).throw(RuntimeError("out of memory")), most=4096)


def test_a_graph_that_cannot_be_captured_is_loaded_without(build, monkeypatch):
    """As graphs with control flow, and folders that were built before steps were captured."""
    path = build("qwen3", "fp32").artifact.path
    real, asked = engine.onnxruntime.InferenceSession, []

    def load(model, settings, **arguments):
        asked.append((arguments["provider_options"][0].get("capture"), settings.log_severity_level))
        if asked[-1][0] == "1":
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
        return real(model, settings, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(engine.onnxruntime, "InferenceSession", load)
    # On the CPU, which stands for a device here, constants are folded before that.
    monkeypatch.setattr(engine, "folded", lambda *_, **__: None)
    monkeypatch.setattr(Device, "captures", True)
    monkeypatch.setattr(
        Device,
        "session_arguments",
        lambda self, settings, capture=False: {"provider_options": [{"capture": str(int(capture))}]},
    )
    session = engine.Session(path / "model.onnx", capture=True)
    assert not session.captures
    assert [capture for capture, _ in asked] == ["1", "0"]
    assert asked[0][1] > asked[1][1]


def test_states_may_be_dropped_in_the_middle_of_a_run(build, monkeypatch):
    """Garbage collection may come anywhere, also where a run holds its lock."""
    session = engine.Session(build("qwen3", "fp32").artifact.path / "model.onnx")
    monkeypatch.setattr(session, "_captures", True)
    released, taken = [], []

    class Inner:
        def run_with_iobinding(self, io, options):
            taken.append(sorted(session._numbered))
            session.release(1)

        def release_captured_graph(self, number):
            released.append(number)

    binding = session.binding()
    monkeypatch.setattr(session, "_session", Inner())
    for number in (1, 2, 3):
        session.run(binding, capture=number)
    assert taken == [[1], [2], [2, 3]]
    assert released == [1]
