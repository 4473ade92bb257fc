"""lm-evaluation-harness on an artifact, with a small task of our own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

import ortlm
from ortlm import lm_eval as plugin
from ortlm.builder.options import BuildOptions
from ortlm.errors import BadOption
from tests.architectures import oracle
from tests.runtime import tiny as tiny_tokenizers

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""


@pytest.fixture(scope="module")
def model(saved: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("lm-eval") / "llama"
    ortlm.build(saved("llama").folder, out, precision="fp32")
    return plugin.harness_model()(path=str(out), batch_size=2, threads=1)


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def expected(torch_model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    logits = oracle.prompt_logits(torch_model, [*context, *continuation][:-1])[-len(continuation) :].astype(
        np.float64
    )
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logs[np.arange(len(continuation)), continuation].sum(), bool(
        (logits.argmax(-1) == continuation).all()
    )


def test_loglikelihoods_equal_transformers(model: Any, saved: Any) -> None:
    pairs = [
        ([5, 6, 7, 8], [9, 10]),
        ([5, 6, 7, 8], [11]),
        ([20, 21], [22, 23, 24]),
        ([5, 6, 9], [1, 2, 3, 4]),
    ]
    found = model._loglikelihood_tokens([(None, *pair) for pair in pairs])
    for (value, greedy), pair in zip(found, pairs, strict=True):
        want, want_greedy = expected(saved("llama").model, *pair)
        assert value == pytest.approx(want, rel=1e-4)
        assert greedy == want_greedy


def test_the_beginning_goes_if_it_is_too_long(model: Any, saved: Any) -> None:
    context, continuation = list(range(5, 60)), [7, 8]
    model.max_length, whole = 32, model.max_length
    try:
        ((value, _),) = model._loglikelihood_tokens([(None, context, continuation)])
    finally:
        model.max_length = whole
    assert value == pytest.approx(expected(saved("llama").model, context[-31:], continuation)[0], rel=1e-4)


def test_rolling_covers_every_token_once(model: Any, saved: Any) -> None:
    text = "one two three four five six seven"
    (value,) = model.loglikelihood_rolling([request(text)])
    # Where the tokenizer puts BOS before a text, the harness scores it too.
    ids = model.tok_encode(text)
    assert value == pytest.approx(expected(saved("llama").model, [model.prefix_token_id], ids)[0], rel=1e-4)


def test_generation_stops(model: Any) -> None:
    prompt = "one two three"
    whole = model.lm.generate(model.tok_encode(prompt), max_new_tokens=8, do_sample=False).text
    same, cut = model.generate_until(
        [
            request(prompt, {"max_gen_toks": 8, "until": [], "do_sample": False, "temperature": 0.0}),
            request(prompt, {"max_gen_toks": 8, "until": [whole[2:4]]}),
        ]
    )
    assert same == whole
    assert cut == whole[: whole.index(whole[2:4])]
    with pytest.raises(BadOption, match="generation_kwargs has 'num_beams'"):
        model.generate_until([request(prompt, {"num_beams": 4})])


def test_the_command(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The literal command line, with a choice and a generation task."""
    ortlm.build(tiny, tmp_path / "out", options=BuildOptions(recipe="fast"))
    rows = [{"question": f"def f{i}(x):", "choices": [" return", " zzz"], "answer": 0} for i in range(4)]
    data = tmp_path / "data.json"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    choice = "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc}]"
    answer = (
        'doc_to_target: " return"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 4}\n'
        "metric_list: [{metric: exact_match}]"
    )
    for name, kind, rest in (
        ("own_choice", "multiple_choice", choice),
        ("own_answer", "generate_until", answer),
    ):
        text = TASK.format(name=name, data=json.dumps(str(data)), kind=kind, rest=rest)
        (tasks / f"{name}.yaml").write_text(text, encoding="utf-8")
    arguments = [
        "--model",
        "ortlm",
        "--model_args",
        f"path={tmp_path / 'out'},threads=1",
        "--include_path",
        str(tasks),
    ]
    arguments += ["--tasks", "own_choice,own_answer", "--output_path", str(tmp_path / "results")]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    assert plugin.main() == 0
    (results,) = (tmp_path / "results").rglob("results*.json")
    found = json.loads(results.read_text(encoding="utf-8"))["results"]
    assert found["own_choice"]["acc,none"] == 1.0
    assert "exact_match,none" in found["own_answer"]
    assert "own_choice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs path=FOLDER"),
        ({"path": "x", "dtype": "float"}, "dtype is not known"),
    ],
)
def test_wrong_arguments(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        plugin.harness_model()(**arguments)


def test_tasks_of_the_benchmark(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = Path(__file__).parent.parent / "benchmarks" / "lm_eval_tasks"
    subprocess.run([sys.executable, str(tasks / "make.py"), str(tmp_path)], check=True)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    # The tasks name their data by its file.
    monkeypatch.chdir(tmp_path)
    names = ["last_word", "continuation", "capital"]
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=names, task_manager=manager, limit=2, bootstrap_iters=2, log_samples=False
    )
    assert [*found["results"]] == names
    assert all(found["n-samples"][name]["original"] > 70 for name in names)
    for name in names[1:]:
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text("utf-8").splitlines()]
        assert all(len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4 for row in rows)


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-genai"])
def test_the_harness_own_backends(saved: Any, tmp_path: Path, name: str) -> None:
    """They run our folders, if those give the logits of all positions, and find the same."""
    if name == "onnxruntime-genai":
        pytest.importorskip("onnxruntime_genai")
    ortlm.build(
        saved("llama").folder, tmp_path / "out", precision="fp32", options=BuildOptions(all_logits=True)
    )
    # A process of its own: registering changes the harness for good.
    code = f"""
import sys
from ortlm.lm_eval import register
register()
from lm_eval.api.registry import get_model
pairs = [(None, [5, 6, 7], [9, 10]), (None, [5, 6], [11])]
out = sys.argv[1]
theirs = get_model({name!r}).create_from_arg_string(f"pretrained={{out}}")._loglikelihood_tokens(pairs)
ours = get_model("ortlm").create_from_arg_string(f"path={{out}}")._loglikelihood_tokens(pairs)
for (a, same), (b, alike) in zip(theirs, ours, strict=True):
    assert abs(a - b) < 1e-4 and same == alike, (theirs, ours)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


# Run in a process of its own: the harness's own model of transformers, and ours, on the same questions.
SAME_NUMBERS = """
import json, sys
from types import SimpleNamespace
from ortlm.lm_eval import register
register()
from lm_eval.api.registry import get_model
folder, out = sys.argv[1:3]
def request(*args):
    return SimpleNamespace(args=args)
pairs = [("one two", " three"), ("", "four five"), ("a b ", "c"), ("<s>one", " two"), ("x\\n", "y z")]
texts = ["one two three four", " begins with a space", "caf\\u00e9 \\u4f60\\u597d", "<s>one"]
asked = [(text, {"until": ["zq"], "max_gen_toks": 12, "do_sample": False}) for text in texts]
# A stop within bytes that are no character is a matter of which bytes are looked at together.
if sys.argv[3] == "byte_level":
    asked += [("one", {"until": ["8"], "max_gen_toks": 20}), ("two", {"until": ["\\n", "5"], "max_gen_toks": 20})]
found = []
theirs = f"pretrained={folder},device=cpu,dtype=float32"
for name, arguments in (("hf", theirs), ("ortlm", f"path={out},threads=1")):
    model = get_model(name).create_from_arg_string(arguments, {"batch_size": 1})
    found.append([
        model.loglikelihood([request(*pair) for pair in pairs]),
        model.loglikelihood_rolling([request(text) for text in texts]),
        model.generate_until([request(*one) for one in asked]),
        [model.prefix_token_id, model.eot_token_id],
    ])
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "bos"), [("byte_level", False), ("byte_level", True), ("llama_style", True)]
)
def test_numbers_of_the_harness_own_model(tmp_path: Path, kind: str, bos: bool) -> None:
    folder, inner = tmp_path / "checkpoint", getattr(tiny_tokenizers, kind)()
    first = [("<s>", inner.token_to_id("<s>"))]
    if bos:
        inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=first)
    torch.manual_seed(0)
    # Every id has a token: transformers would generate others, which ortlm does not.
    config = LlamaConfig(
        vocab_size=inner.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=inner.token_to_id("<s>"),
        eos_token_id=inner.token_to_id("</s>"),
    )
    with torch.no_grad():
        model = LlamaForCausalLM(config)
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
        model.save_pretrained(folder)
    tiny_tokenizers.save(folder, inner, tokenizer_class="LlamaTokenizer", legacy=False)
    ortlm.build(folder, tmp_path / "out", precision="fp32")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SAME_NUMBERS, str(folder), str(tmp_path / "out"), kind],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, ours = json.loads(done.stdout.splitlines()[-1])
    for (value, greedy), (wanted, same) in zip(ours[0], theirs[0], strict=True):
        assert value == pytest.approx(wanted, rel=1e-4)
        assert greedy == same
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4)
    assert ours[2:] == theirs[2:]
