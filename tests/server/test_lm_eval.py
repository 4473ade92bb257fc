"""lm-evaluation-harness over HTTP gives the figures of the model itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ortlm
from tests.server.conftest import Running

pytest.importorskip("fastapi")
pytest.importorskip("lm_eval")
# What the harness needs to ask a server, beside what it always needs.
pytest.importorskip("tenacity")
TASKS = Path(__file__).parents[2] / "benchmarks" / "lm_eval_tasks"
# A process of its own: registering changes the harness for good.
PROGRAM = """
import json, sys
from types import SimpleNamespace
from ortlm.lm_eval import register
register()
import lm_eval
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
folder, url, tasks = sys.argv[1:]
def request(*args):
    return SimpleNamespace(args=args)
pairs = [("def read", "_lines(path):"), ("", "import os"), ("import os\\n", "import sys"), ("a b ", "c")]
texts = ["def read_lines(path):\\n    return None\\n" * 4, "The first thing to know.", "caf\\u00e9 \\u4f60\\u597d"]
asked = [(text, {"until": ["\\n\\n", "zq"], "max_gen_toks": 12, "do_sample": False}) for text in texts]
found = []
served = f"model=tiny,base_url={url}/v1/completions,tokenizer_backend=remote,max_length=512"
for name, arguments in (("ortlm", f"path={folder},threads=1"), ("local-completions", served)):
    model = get_model(name).create_from_arg_string(arguments, {"batch_size": 4})
    manager = TaskManager(include_path=tasks, include_defaults=False)
    names = ["last_word", "continuation", "capital"]
    results = lm_eval.simple_evaluate(
        model=model, tasks=names, limit=16, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    figures = {
        f"{task} {metric}": value
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }
    found.append([
        model.loglikelihood([request(*pair) for pair in pairs]),
        model.loglikelihood_rolling([request(text) for text in texts]),
        model.generate_until([request(*one) for one in asked]),
        figures,
    ])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_figures_of_the_model_itself(live: Running, trained: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(TASKS / "make.py"), str(tmp_path)], check=True)
    source = str(Path(ortlm.__file__).parents[1])
    around = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    around |= {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join([source, *sys.path[1:]])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(trained), live.url, str(tmp_path)],
        # The tasks name their data by its file.
        cwd=tmp_path, env=around, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = json.loads(done.stdout.splitlines()[-1])
    for (value, greedy), (wanted, same) in zip(theirs[0], ours[0], strict=True):
        assert value == pytest.approx(wanted, rel=1e-4)
        assert greedy == same
    assert theirs[1] == pytest.approx(ours[1], rel=1e-4)
    assert theirs[2] == ours[2]
    assert {name.split()[0] for name in ours[3]} == {"last_word", "continuation", "capital"}
    assert theirs[3] == pytest.approx(ours[3], rel=1e-4)
