"""OpenVINO's quantized forms of a checkpoint, made by NNCF and run by OpenVINO, and what each loses.

    python openvino_quality.py CHECKPOINT WORK --rows rows.npy --logits reference.npy --types int4_64 \
        --calibration rows.npy

A type is ``int8``, or ``int4_G`` for groups of G, asymmetric; ``int4_G_awq`` adds AWQ and scale estimation on the
rows of ``--calibration``. Run in an environment with optimum-intel and nncf, such as ``peers.py`` makes. Inference
is as it comes, but in fp32 where bf16 is the default, since the other runtimes have fp32 around their matmuls.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from quality_figures import Logits, main


def make(source: Path, work: Path, name: str, args: argparse.Namespace) -> tuple[int, Logits]:
    """Compress the checkpoint folder ``source`` as the type ``name`` says and compile it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import nncf
    import openvino as ov
    from optimum.intel import OVModelForCausalLM

    plain = work / "openvino-fp32"
    if not (plain / "openvino_model.xml").is_file():
        exported = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, load_in_8bit=False)
        exported.save_pretrained(plain)
    core = ov.Core()
    model = core.read_model(plain / "openvino_model.xml")
    names = {port.get_any_name() for port in model.inputs}

    def inputs(row: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
        ids = row[None]
        given = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(len(row), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return {key: value for key, value in given.items() if key in names}

    kind, _, rest = name.partition("_")
    if kind == "int8":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    else:
        group, _, calibrated = rest.partition("_")
        more = {}
        if calibrated:
            rows = np.load(args.calibration)
            more = {
                "dataset": nncf.Dataset([inputs(row) for row in rows]),
                "awq": True,
                "scale_estimation": True,
            }
        mode = nncf.CompressWeightsMode.INT4_ASYM
        model = nncf.compress_weights(model, mode=mode, group_size=int(group), ratio=1.0, **more)
    out = work / "openvino-out" / "model.xml"
    out.parent.mkdir(exist_ok=True)
    ov.save_model(model, out)
    size = sum(f.stat().st_size for f in out.parent.iterdir())
    compiled = core.compile_model(out, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()

    def logits(row: NDArray[np.int64]) -> NDArray[np.float32]:
        request.reset_state()
        return np.array(request.infer(inputs(row))["logits"][0], np.float32)

    return size, logits


if __name__ == "__main__":
    main(make, __doc__ or "")
