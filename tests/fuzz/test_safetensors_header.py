"""Headers of safetensors files: any bytes give weights or an error, and the weights can be read."""

from __future__ import annotations

import json
import struct

import numpy as np
from safetensors.numpy import save

from ortlm.checkpoint.safetensors import read_header
from tests.fuzz.harness import damaged_bytes, damaged_json, fuzz

VALID = save({"a": np.ones((3, 4), np.float32), "b": np.ones(5, np.float16)}, {"format": "pt"})
LENGTH = struct.unpack("<Q", VALID[:8])[0]
HEADER = json.loads(VALID[8 : 8 + LENGTH])


def read(folder, raw):
    (folder / "model.safetensors").write_bytes(raw)
    for weight in read_header(folder, "model.safetensors").values():
        if weight.shape and weight.bytes < 1 << 20:
            found = weight.rows(0, weight.shape[0])
            assert found.shape == weight.shape


@fuzz(damaged_bytes(VALID))
def test_bytes(tmp_path, raw):
    read(tmp_path, raw)


@fuzz(damaged_json(HEADER))
def test_headers(tmp_path, found):
    header = json.dumps(found).encode(errors="replace")
    read(tmp_path, struct.pack("<Q", len(header)) + header + VALID[8 + LENGTH :])
