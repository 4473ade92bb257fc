"""What layers carry from step to step: names, shapes and element types of its tensors in a graph."""

from __future__ import annotations

from ortlm.graph.attention import cache_lengths
from ortlm.graph.builder import Builder, Shape, Value
from ortlm.spec import Attention, Mixer, MixerState, mixer_states

# As onnxruntime-genai calls them.
_TENSORS = {"key": "key", "value": "value", "conv": "conv_state", "recurrent": "recurrent_state"}


def past_name(layer: int, state: MixerState) -> str:
    """Return the name of the input that holds ``state`` of ``layer``."""
    return f"past_key_values.{layer}.{_TENSORS[state.name]}"


def present_name(layer: int, state: MixerState) -> str:
    """Return the name of the output that holds ``state`` of ``layer``."""
    return f"present.{layer}.{_TENSORS[state.name]}"


def past_states(g: Builder, layer: int, mixer: Mixer, kind: str) -> tuple[Value, ...]:
    """Declare the inputs for all states of ``layer``; keys and values are of element type ``kind``."""
    return tuple(
        g.input(past_name(layer, state), *_type(g, mixer, state, kind, 0)) for state in mixer_states(mixer)
    )


def present_states(g: Builder, layer: int, mixer: Mixer, values: tuple[Value, ...]) -> None:
    """Make ``values`` the outputs for all states of ``layer``."""
    for state, value in zip(mixer_states(mixer), values, strict=True):
        _, shape = _type(g, mixer, state, g.dtype, 1)
        g.output(value, present_name(layer, state), shape)


def _type(g: Builder, mixer: Mixer, state: MixerState, kind: str, which: int) -> tuple[str, Shape]:
    length = cache_lengths(g, mixer)[which] if isinstance(mixer, Attention) else ""
    shape = ("batch_size", *(length if size is None else size for size in state.shape))
    return (kind if state.grows else g.dtype), shape
