"""Weights in PyTorch's own files (``pytorch_model.bin``), read by torch if it is installed.

Such a file is a pickle, which may run any code when it is opened in the usual way. torch opens it so that nothing
but tensors comes out (``weights_only``), and without reading it whole.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ortlm._utils.checked_json import shown
from ortlm.checkpoint import files
from ortlm.checkpoint.safetensors import Weight
from ortlm.dtypes import Array, DType, dtype
from ortlm.errors import BadCheckpoint

SINGLE_FILE, INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
# Older ones run code in spite of weights_only: CVE-2025-32434.
_OLDEST = (2, 6)
_TYPES = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64", "uint8": "uint8", "int8": "int8",
    "int16": "int16", "int32": "int32", "int64": "int64", "bool": "bool", "float8_e4m3fn": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class TorchWeight(Weight):
    """One tensor of a file that torch has opened; its bytes are read when they are asked for."""

    tensor: Any = field(kw_only=True)

    def at(self, index: int) -> Weight:
        """Return what lies at ``index`` of the first axis."""
        return replace(self, shape=self.shape[1:], tensor=self.tensor[index])

    def raw(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) in the element type of the file."""
        return self._array(self.tensor.reshape(self.shape or (1,))[start:stop])

    def raw_columns(self, start: int, stop: int) -> Array:
        """Return columns [start, stop) of a matrix, [rows, columns], in the element type of the file."""
        return self._array(self.tensor.reshape(self.shape)[:, start:stop])

    def _array(self, tensor: Any) -> Array:
        # Raises if the file has changed since it was opened.
        self.stamp.open().close()
        torch = importlib.import_module("torch")
        shape = tuple(tensor.shape)
        # A copy of its own: the file stays mapped no longer than torch has it, and numpy knows no bfloat16.
        raw = np.array(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        return raw.view(self.dtype.numpy).reshape(shape)


def read_torch_file(folder: Path, name: str) -> dict[str, Weight]:
    """Return the tensors of the file ``name`` of PyTorch's in ``folder``.

    Raises BadCheckpoint if torch is missing or too old, or if the file is damaged or holds anything but tensors.
    """
    torch = _torch(folder, name)
    path = folder / name
    with files.open_file(folder, name) as stream:
        stamp = files.Stamp.of(stream, path)
    try:
        try:
            found = torch.load(stamp.real, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            # The format from before torch 1.6 is read whole.
            found = torch.load(stamp.real, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own words advise to read the file without that protection.
        raise BadCheckpoint(
            f"{files.shown(path)} cannot be read as tensors and nothing else ({type(error).__name__}): it is "
            "truncated, or holds objects of other kinds. Download it again, or use a checkpoint in safetensors."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise BadCheckpoint(
            f"{files.shown(path)} is not a table of tensors by name, as a model's weights are. Usual cause: a "
            "file of a training run. Save the model with save_pretrained()."
        )
    return {str(key): _weight(str(key), tensor, stamp) for key, tensor in found.items()}


def _weight(name: str, tensor: Any, stamp: files.Stamp) -> TorchWeight:
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in _TYPES or tensor.layout is not importlib.import_module("torch").strided:
        raise BadCheckpoint(
            f"weight {shown(name)} in {files.shown(stamp.path)} is of the type {kind}; ortlm reads "
            f"{', '.join(_TYPES)}. Use a checkpoint in safetensors."
        )
    found: DType = dtype(_TYPES[kind])
    return TorchWeight(name, tuple(tensor.shape), found, stamp, 0, tensor=tensor.detach())


def _torch(folder: Path, name: str) -> Any:
    path = files.shown(folder / name)
    way_out = (
        "or convert it once with transformers: AutoModelForCausalLM"
        f".from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER), then build NEW_FOLDER."
    )
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise BadCheckpoint(
            f"{path} is a pickle, which ortlm reads through torch only, and torch is not installed. Install it "
            f"(pip install torch), {way_out}"
        ) from error
    version = tuple(int(n) for n in re.findall(r"\d+", str(torch.__version__))[:2])
    if version < _OLDEST:
        raise BadCheckpoint(
            f"{path} is a pickle, and torch {torch.__version__} may run code of it; {'.'.join(map(str, _OLDEST))} "
            f"and later read its tensors only. Upgrade (pip install -U torch), {way_out}"
        )
    return torch
