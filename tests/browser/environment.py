"""Where transformers.js and onnxruntime-web run: in node, and in Chromium; and what they are asked.

The packages lie in ``.runtimes`` as those of other runtimes do. What a runtime answers is compared with ONNX
Runtime on the processor, which reads the same graph.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ortlm.builder.transformers_js import DTYPES
from tests.runtimes.environments import Runtime, Unavailable, prepare

PROGRAMS = Path(__file__).parent / "programs"
TRANSFORMERS, PUPPETEER = "4.3.1", "24.43.1"
JAVASCRIPT = Runtime(
    f"transformers.js {TRANSFORMERS}",
    (f"puppeteer-core@{PUPPETEER}", f"@huggingface/transformers@{TRANSFORMERS}"),
    "node.mjs",
)
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Attention of WebGPU on Vulkan is wrong on 32 tokens and more at once: Device.most_tokens.
MOST_TOKENS = 31
TEXTS = ("def read_lines(path):", "The first thing to know about a river is", "import os")


@dataclass(frozen=True)
class Place:
    """Where models run: a driver and a device, whether that has fp16, and how many prompts it gets alone."""

    driver: str
    device: str
    fp16: bool = True
    rows: int = 3

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{self.driver} {self.device}"


def lavapipe() -> str | None:
    """Return the library of Mesa's software adapter if VK_ICD_FILENAMES names it, else None.

    It has shader-f16, which Chromium's own software adapter, SwiftShader, lacks.
    """
    for name in filter(None, os.environ.get("VK_ICD_FILENAMES", "").split(os.pathsep)):
        if "lvp" in Path(name).name:
            library: str = json.loads(Path(name).read_text(encoding="utf-8"))["ICD"]["library_path"]
            return library
    return None


PLACES = (
    Place("node", "cpu"),
    Place("node", "wasm"),
    Place("chromium", "wasm"),
    # A software adapter is slow.
    Place("chromium", "webgpu", fp16=lavapipe() is not None, rows=1),
)


@dataclass(frozen=True)
class Case:
    """A question: a graph of the folder ``model``, and who runs it. Names and meanings as in models.mjs."""

    name: str
    library: str
    model: str
    device: str
    dtype: str
    graph: str
    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    rows: int
    steps: int
    batchSteps: int  # noqa: N815 - as JavaScript reads it


def make_case(model: Path, library: str, place: Place, dtype: str, prompts: Any, steps: int) -> Case:
    """Return the question whether ``library`` runs ``dtype`` of the folder ``model`` at ``place``."""
    return Case(
        name=f"{model.name} {library} {place.name} {dtype}",
        library=library,
        model=model.name,
        device=place.device,
        dtype=dtype,
        graph=f"model{DTYPES[dtype].suffix}.onnx",
        prompts=tuple(map(tuple, prompts)),
        texts=TEXTS,
        rows=place.rows,
        steps=steps,
        batchSteps=min(8, steps),
    )


def chromium() -> str:
    """Return the browser's program. Raises Unavailable."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        raise Unavailable("there is no Chromium; install it, or name its program in CHROMIUM")
    return path


def copy_programs() -> None:
    """Copy the programs to their packages: modules are looked for next to the file that imports them."""
    for program in PROGRAMS.iterdir():
        there = JAVASCRIPT.folder / program.name
        # Another run may be using it.
        if not there.is_file() or there.read_bytes() != program.read_bytes():
            shutil.copy(program, there)


def adapter(place: Path) -> dict[str, str]:
    """Return the environment that gives Chromium the software adapter of ``lavapipe``.

    ``place`` is a folder to write to. Raises Unavailable.
    """
    library, compiled = lavapipe(), place / "lavapipe.so"
    if library is None:
        return {}
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(compiled), str(PROGRAMS / "lavapipe.c"), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Unavailable("there is no C compiler, which Mesa's software adapter needs here") from error
    return {"LD_PRELOAD": str(compiled), "LAVAPIPE": library, "VK_ICD_FILENAMES": ""}


def ask(driver: str, folder: Path, cases: Sequence[Case]) -> dict[str, Any]:
    """Return what ``driver`` ("node", "chromium") makes of ``cases``, whose models are in ``folder``, by name.

    Raises Unavailable if it cannot be had here.
    """
    browser = chromium() if driver == "chromium" else None
    prepare(JAVASCRIPT)
    copy_programs()
    with tempfile.TemporaryDirectory() as place:
        given, answers = Path(place) / "cases.json", Path(place) / "answers.json"
        asked = {
            "folder": str(folder),
            "cases": [asdict(case) for case in cases],
            "chromium": browser,
            "environment": adapter(Path(place)) if browser is not None else {},
        }
        given.write_text(json.dumps(asked))
        command = ["node", str(JAVASCRIPT.folder / f"{driver}.mjs"), str(given), str(answers)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
        if not answers.is_file():
            raise RuntimeError(f"{driver} ended with {done.returncode}: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(answers.read_text())
        return found


class Reference:
    """A graph on the processor: the logits after any tokens."""

    def __init__(self, graph: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits [S, V] after each of ``tokens``."""
        feed: dict[str, Any] = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
            "num_logits_to_keep": np.array(0),
        }
        for value in self._session.get_inputs():
            if value.name.startswith("past"):
                kind = np.float16 if "16" in value.type else np.float32
                feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), kind)
        found: NDArray[np.float32] = self._session.run(["logits"], feed)[0][0].astype(np.float32)
        return found

    def gaps(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """Return how far the logit of each of ``tokens`` is below the largest, relative to the largest magnitude.

        0 where it is the processor's own greedy choice after the ones before it.
        """
        rows = self.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        return [
            float((row.max() - row[token]) / np.abs(row).max())
            for row, token in zip(rows, tokens, strict=True)
        ]
