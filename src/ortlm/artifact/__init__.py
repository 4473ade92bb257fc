"""The artifact: a folder that onnxruntime-genai loads as it is, plus ``ortlm.json``.

This package alone knows the keys of ``genai_config.json`` and ``ortlm.json``; both halves of ortlm meet here.
It imports nothing heavy: reading an artifact must be quick.
"""

from __future__ import annotations

from ortlm.artifact.genai_config import from_genai, processor_config, settled, to_genai
from ortlm.artifact.genai_keys import GENAI_SEARCH, GENAI_SPECULATIVE
from ortlm.artifact.genai_overlay import (
    GenaiFacts,
    genai_artifact,
    genai_facts,
    overlay_genai,
    read_genai,
    with_genai_providers,
)
from ortlm.artifact.json_values import inside, read_json
from ortlm.artifact.manifest import (
    ADAPTER_FOLDER,
    FORMAT,
    GENAI_FILE,
    GRID,
    MANIFEST_FILE,
    MOST_CROPS,
    PROCESSOR_FILE,
    REPORT_FILE,
    TEXT,
    TOKENIZER_FILES,
    Artifact,
    Graph,
    Images,
    Manifest,
    PanAndScan,
    Patches,
    State,
    Variant,
    graph_named,
    portable,
    runnable,
)
from ortlm.artifact.reader import open_artifact
from ortlm.artifact.templates import NAMED_TEMPLATES, TEMPLATE_FOLDER, named_templates, read_templates

__all__ = [
    "ADAPTER_FOLDER",
    "FORMAT",
    "GENAI_FILE",
    "GENAI_SEARCH",
    "GENAI_SPECULATIVE",
    "GRID",
    "MANIFEST_FILE",
    "MOST_CROPS",
    "NAMED_TEMPLATES",
    "PROCESSOR_FILE",
    "REPORT_FILE",
    "TEMPLATE_FOLDER",
    "TEXT",
    "TOKENIZER_FILES",
    "Artifact",
    "GenaiFacts",
    "Graph",
    "Images",
    "Manifest",
    "PanAndScan",
    "Patches",
    "State",
    "Variant",
    "from_genai",
    "genai_artifact",
    "genai_facts",
    "graph_named",
    "inside",
    "named_templates",
    "open_artifact",
    "overlay_genai",
    "portable",
    "processor_config",
    "read_genai",
    "read_json",
    "read_templates",
    "runnable",
    "settled",
    "to_genai",
    "with_genai_providers",
]  # fmt: skip
