"""``python -m ortlm.models.builder`` takes the flags of ``python -m onnxruntime_genai.models.builder``.

``create_model`` and ``parse_extra_options`` take the same arguments as that module's:

    options = parse_extra_options(name, path, out, "int4", "cpu", cache, ["block_size=32"])
    create_model(name, path, out, "int4", "cpu", cache, **options)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortlm.builder.extra_options import parse_extra_options as parse_options
from ortlm.cli import main
from ortlm.errors import BadOption
from ortlm.target import check_precision, find_target

if TYPE_CHECKING:
    from ortlm.artifact import Artifact

_STRUCTURED = (
    "builder_config_version",
    "target_options",
    "drafter_options",
    "speculative_options",
    "runtime_config",
    "search",
)


def parse_extra_options(
    model_name: str | None,
    input_path: str | Path | None,
    output_dir: str | Path,
    precision: str | None,
    execution_provider: str,
    cache_dir: str | Path | None,
    extra_options: Sequence[str] | None,
    builder_config_version: Any = None,
    target_options: Any = None,
    drafter_options: Any = None,
    speculative_options: Any = None,
    runtime_config: Any = None,
    search: Any = None,
) -> dict[str, Any]:
    """Return ``["KEY=VALUE", ...]`` by key, for ``create_model``.

    Nothing is downloaded, and the paths are not looked at. Raises BadOption, by name, for options that are not
    known or do not fit, and for the structured options, from ``builder_config_version`` on, which are not
    supported.
    """
    given = (
        builder_config_version,
        target_options,
        drafter_options,
        speculative_options,
        runtime_config,
        search,
    )
    for name, value in zip(_STRUCTURED, given, strict=True):
        if value is not None:
            raise _not_supported(name)
    pairs = list(extra_options or ())
    check_precision(precision or "int4", find_target(execution_provider))
    parse_options(pairs, target=find_target(execution_provider))
    return {key.strip(): value.strip() for key, _, value in (pair.partition("=") for pair in pairs)}


def create_model(
    model_name: str | None,
    input_path: str | Path | None,
    output_dir: str | Path,
    precision: str | None,
    execution_provider: str,
    cache_dir: str | Path | None,
    **extra_options: Any,
) -> Artifact:
    """Build a model into the folder ``output_dir`` and return it; a model that is there is replaced.

    ``input_path`` is a folder or a GGUF file, "" or None for the model ``model_name`` of the hub, which is
    downloaded to ``cache_dir``. ``precision`` None is int4. ``extra_options`` are those of ``--extra_options`` as
    texts, numbers or truth values, whether ``parse_extra_options`` has seen them or not.
    Raises BadOption, UnsupportedModel, BadCheckpoint and NotEnoughSpace.
    """
    # The parser needs only the tables.
    from ortlm._utils.progress import NullProgress
    from ortlm.builder.output_dir import check_output
    from ortlm.builder.pipeline import write
    from ortlm.builder.planning import prepare
    from ortlm.builder.request import BuildRequest

    for name in _STRUCTURED:
        if extra_options.pop(name, None) is not None:
            raise _not_supported(name)
    pairs = [f"{key}={_text(value)}" for key, value in extra_options.items() if value is not None]
    options = parse_options(pairs, target=find_target(execution_provider))
    source = input_path or model_name
    if not source:
        raise BadOption(
            "give model_name, a model on the Hugging Face hub, or input_path, a folder or a GGUF file."
        )
    out = Path(output_dir)
    check_output(out, force=True, source=source)
    prepared = prepare(
        BuildRequest(
            source,
            name=model_name if input_path else None,
            precision=precision or "int4",
            target=execution_provider,
            cache=cache_dir or None,
            options=options,
        )
    )
    return write(prepared, out, force=True, threads=None, progress=NullProgress())


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _not_supported(name: str) -> BadOption:
    return BadOption(f"{name} is not supported; give extra_options KEY=VALUE, and a recipe to `ortlm build`.")


if __name__ == "__main__":
    sys.exit(main(["build", *sys.argv[1:]]))
