"""Scores of lm-evaluation-harness, offline: fp32, ortlm's default, the official default and llama.cpp's Q4_K_M.

    python benchmarks/compare_lm_eval.py --name SmolLM2-135M-Instruct --work FOLDER \
        fp32=ortlm:FP32 default=ortlm:BUILT official=ortlm:OFFICIAL Q4_K_M=llama:MODEL.gguf \
        --tokenizer BUILT --llama ENV/bin/python

All are built from the same checkpoint before. The tasks are in ``lm_eval_tasks``: the last word of a sentence,
which of four sentences comes next, capitals. ``ortlm:`` folders are run by ONNX Runtime, ``llama:`` files by
llama.cpp, on the tokens of the tokenizer in ``--tokenizer``. Writes ``benchmarks/results/lm_eval-NAME.json``,
which keeps what earlier calls found of other models.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "lm_eval_tasks"))
import make

from ortlm.lm_eval import harness_model

_RESULTS = Path(__file__).parent / "results"
_SCRIPT = Path(__file__).parent / "peers" / "llama_scores.py"
_CONTEXT = 512


def llama_model(python: str, path: Path, tokenizer: Path) -> Any:
    """Return the GGUF file ``path``, run by llama.cpp, as a model of the harness."""

    class Llama(harness_model()):  # type: ignore[misc]
        """What tokens ortlm makes of a text, scored by another process."""

        def _loglikelihood_tokens(
            self,
            requests: Sequence[tuple[object, list[int], list[int]]],
            disable_tqdm: bool = False,
            **_: Any,
        ) -> list[tuple[float, bool]]:
            found = []
            command = [python, str(_SCRIPT), str(path), str(_CONTEXT)]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            ) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                for _key, context, continuation in requests:
                    line = json.dumps([[*context, *continuation][-_CONTEXT:], len(continuation)])
                    process.stdin.write(line + "\n")
                    process.stdin.flush()
                    total, greedy = json.loads(process.stdout.readline())
                    found.append((total, greedy))
                process.stdin.close()
            return found

    return Llama(path=str(tokenizer), batch_size=1)


def main() -> int:
    """Score each model and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="NAME=KIND:PATH")
    parser.add_argument("--name", required=True, help="of the checkpoint, in the results")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder that ortlm built")
    parser.add_argument("--llama", help="Python of an environment with llama-cpp-python")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    os.environ["HF_HOME"] = str(args.work / "huggingface")
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = args.work.resolve() / "tasks"
    tasks = make.write(folder)
    # The tasks name their data by its file.
    results = (_RESULTS / f"lm_eval-{args.name}.json").resolve()
    models = [text.partition("=")[::2] for text in args.models]
    given = [(name, *what.partition(":")[::2]) for name, what in models]
    found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    tokenizer = args.tokenizer.resolve()
    paths = {name: Path(path).resolve() for name, _, path in given}
    os.chdir(folder)
    for name, kind, _ in given:
        if kind == "llama":
            model = llama_model(args.llama, paths[name], tokenizer)
        else:
            model = harness_model()(path=str(paths[name]), batch_size=1)
        out = lm_eval.simple_evaluate(
            model=model, tasks=tasks, bootstrap_iters=1000, log_samples=False,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        )  # fmt: skip
        found[name] = {
            task: {
                key.removesuffix(",none"): value
                for key, value in figures.items()
                if key != "alias" and isinstance(value, float)
            }
            | {"samples": out["n-samples"][task]["effective"]}
            for task, figures in out["results"].items()
        }
        print(name, json.dumps(found[name]), flush=True)
        results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
