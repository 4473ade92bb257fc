"""The programs of examples/, run as a user runs them: by an interpreter that knows nothing of the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
INT4 = ("-p", "int4", "--recipe", "fast")


@dataclass(frozen=True)
class User:
    """An environment with ortlm, and an empty folder in which its commands are run."""

    python: str
    folder: Path
    isolated: bool
    flags: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """The variables of its processes, which must not lead an environment of its own to the source."""
        return {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or not self.isolated}

    def run(self, *command: str | Path, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run ``command``, which has to end with exit code ``code``."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=self.folder,
            env=self.environment,
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done

    def example(self, name: str, *arguments: str | Path, stdin: str = "") -> str:
        """Return what the example ``name`` prints; it has to succeed, and warns of nothing."""
        done = self.run(self.python, *self.flags, ROOT / "examples" / name, *arguments, stdin=stdin)
        assert done.stderr == ""
        return done.stdout

    def build(self, source: Path, name: str, *options: str) -> Path:
        """Build ``source`` with the ortlm command and return the model's folder."""
        out = self.folder / name
        command = Path(self.python).with_name("ortlm")
        self.run(command, "build", "-i", source, "-o", out, *options)
        return out


@pytest.fixture(scope="session")
def user(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> User:
    """Return the environment that --python names, by default the one of the tests."""
    python = request.config.getoption("--python")
    # Of packages in other versions than the locked ones, no warning is an error.
    strict = () if request.config.getoption("--unlocked") else ("-W", "error")
    return User(
        python or sys.executable,
        tmp_path_factory.mktemp("user"),
        isolated=python is not None,
        flags=("-I", *strict) if python else strict,
    )


@pytest.fixture(scope="session")
def phi(user: User, tiny: Path) -> Path:
    """Return the model that ships with the project, built."""
    return user.build(tiny, "phi", *INT4)


@pytest.fixture(scope="session")
def phi_with_adapters(user: User, tiny: Path) -> Path:
    """Return the same with two adapters, which are random.

    It is in fp32, where a prompt that resumes from a cache is rounded as any other.
    """
    adapters = {name: save_adapter(user.folder / name, tiny, seed) for seed, name in enumerate(["a", "b"])}
    options = [text for name, path in adapters.items() for text in ("--adapter", f"{name}={path}")]
    return user.build(tiny, "phi-lora", "-p", "fp32", *options)


@pytest.fixture(scope="session")
def phi_vision(user: User) -> Path:
    """Return a tiny vision model with random weights, and next to it an image."""
    from PIL import Image

    from tests.vision import checkpoint

    checkpoint.save(user.folder / "vision-checkpoint")
    Image.linear_gradient("L").resize((400, 300)).save(user.folder / "image.png")
    return user.build(user.folder / "vision-checkpoint", "phi-vision", *INT4)


def save_adapter(folder: Path, checkpoint: Path, seed: int) -> Path:
    """Write a random LoRA adapter of the attention of the Phi-3 in ``checkpoint``, as peft does."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    random, hidden, rank = np.random.default_rng(seed), config["hidden_size"], 4
    head = hidden // config["num_attention_heads"]
    outputs = {"qkv_proj": hidden + 2 * head * config["num_key_value_heads"], "o_proj": hidden}
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, size in outputs.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            for part, shape in (("A", (rank, hidden)), ("B", (size, rank))):
                noise = random.standard_normal(shape, dtype=np.float32)
                tensors[f"{at}.lora_{part}.weight"] = noise * np.float32(0.5 / shape[1] ** 0.5)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(outputs)}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder
