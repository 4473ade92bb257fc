"""``ortlm build``: checkpoint to artifact. The flags are those of onnxruntime-genai's builder, and a few more."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ortlm.cli import DONE, Subparsers, build_report, output
from ortlm.cli.output import say, tell
from ortlm.cli.progress import Bars, StatusLine
from ortlm.cli.signals import interrupting

if TYPE_CHECKING:
    from rich.console import Console

    from ortlm.builder.bit_allocation import Point
    from ortlm.builder.planning import Prepared
    from ortlm.builder.request import BuildRequest
    from ortlm.evaluation.quick_check import Check

# What a search may be asked for, by one number.
_AIMS = ("kld", "size", "bits")
_EXAMPLES = """\
examples:
  ortlm build -m microsoft/Phi-3.5-mini-instruct -o phi -p int4 -e cpu -c cache
  ortlm build -i ./my-fine-tune -o phi
  ortlm build -i ./my-fine-tune -o phi --dry-run
  ortlm build -i ./base -o phi --adapter french=./french-lora
  ortlm build -i ./my-fine-tune -o phi --kv-cache int8
  ortlm build -i ./my-fine-tune -o phi --recipe fast
  ortlm build -i ./my-fine-tune -o phi --evaluate handbook.txt --max-kld 0.05
  ortlm build -i ./my-fine-tune -o phi --calibration chats.jsonl
  ortlm build -i ./my-fine-tune -o phi -e webgpu --extra_options head_bits=8
  ortlm build -i ./my-fine-tune -o page/phi --layout transformers.js -p q4,q4f16

precisions by execution provider:
  cpu     int4 int8 fp32           dml     int4 fp16
  cuda    int4 int8 fp16 bf16      webgpu  int4 int8 fp16 fp32
  mobile  int4 int8
dtypes with --layout transformers.js:
  q4 q4f16 q8 fp16 fp32

extra options (KEY=VALUE; the official builder's names, old int4_* ones too):
  block_size=16|32|64|128|256      inputs that share a scale
  is_symmetric=true|false          no zero points, or stored ones
  accuracy_level=0..4              MatMulNBits activations: 4 is int8, 1 is fp32
  algo_config=NAME                 one algorithm for all matrices: rtn, k_quant,
                                   k_quant_mixed, rtn_last, k_quant_last,
                                   importance, awq, gptq, awq_gptq (default: by
                                   --recipe)
  rotate=true                      rotate the residual stream (Hadamard)
  bits=N                           2, 3, 4, 5, 6 or 8 bits for all matrices
  head_bits=N  embed_bits=N  vision_bits=N
                                   the same for the head, the embeddings and the
                                   vision encoder; 0 keeps them float
  nodes_to_exclude=NODE,NODE       keep these matmuls float
  matmul_mixed_precision=last_matmul:int8,mixed_layers:int8
  op_types_to_quantize=MatMul[/Gather]
  kv_cache_quant_scheme=NAME       as --kv-cache, which is shorter
  num_hidden_layers=N              build the first N layers only
  prune_lm_head=false              logits of every position
  include_hidden_states=true       one more output, for ortlm embed
  ragged_append=false              no second graph for batches that append
                                   (ONNX Runtime 1.32 and later)
  windowed_kv_cache=true           sliding-window layers cache their window only
  use_webgpu_fp32=true             -e webgpu, int4 or int8: GPUs without fp16
  filename=model.onnx  config_only=true  hf_token=TOKEN

exit codes: 0 done, 1 failed, 2 usage error, 3 above --max-kld (the new model is
in -o, with its report), 130 Ctrl-C, 143 SIGTERM. A model that cannot be checked
on this machine (another device, too little memory) is done, and stderr says so.
After 1, 2, 130 and 143 the old model is in -o, or none. Calibrated layers are
kept next to it: the same command resumes from there.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "build",
        help="turn a Hugging Face model into a quantized ONNX model",
        description="Turn a Hugging Face model into a quantized ONNX model that ortlm and\n"
        "onnxruntime-genai run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to build")
    what.add_argument(
        "-m",
        "--model_name",
        "--model-name",
        metavar="NAME",
        help="model on the Hugging Face hub, or a local folder",
    )
    what.add_argument(
        "-i",
        "--input",
        metavar="PATH",
        help="local folder with config.json, *.safetensors and tokenizer, or a .gguf file; with -m too, NAME says "
        "what it is",
    )
    what.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of -m NAME; NAME@REV says the same"
    )
    what.add_argument("--subfolder", metavar="DIR", help="where in the repository of -m NAME the model lies")
    what.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to create")
    how = parser.add_argument_group("target and quantization")
    how.add_argument(
        "-p",
        "--precision",
        metavar="P",
        type=_precision,
        help="int4 (default), int8, fp16, bf16 or fp32; with --layout transformers.js one dtype or several: q4 "
        "(default), q4f16, q8, fp16, fp32",
    )
    how.add_argument(
        "-e",
        "--execution_provider",
        "--execution-provider",
        metavar="EP",
        help="cpu (default), cuda, dml, webgpu or mobile",
    )
    how.add_argument(
        "--layout",
        metavar="L",
        help="onnxruntime-genai (default) or transformers.js: a folder for browsers, WebAssembly and WebGPU, in "
        "the dtypes of -p, such as q4,q4f16",
    )
    how.add_argument(
        "--recipe",
        metavar="R",
        help="fast: round-to-nearest, no calibration; balanced (default for int4): GPTQ; quality: more bits, more "
        "calibration; or a YAML file",
    )
    how.add_argument(
        "--target-kld",
        type=float,
        metavar="X",
        help="search which matrices need how many bits for a mean KL divergence of at most X nats",
    )
    how.add_argument(
        "--target-size",
        metavar="SIZE",
        help="search which matrices get how many bits within SIZE, such as 2.1GB or 700MB",
    )
    how.add_argument(
        "--target-bits",
        type=float,
        metavar="B",
        help="the same for B bits per weight, scales, embeddings and head included, such as 4.8",
    )
    how.add_argument(
        "--calibration",
        metavar="FILE",
        help="text, JSONL (texts, chats, token ids) or .npy to calibrate on (default: text that the model "
        "generates)",
    )
    how.add_argument(
        "--calibration-tokens",
        type=int,
        metavar="N",
        help="number of calibration tokens (default: the recipe's)",
    )
    how.add_argument(
        "--keep-quantization",
        action="store_const",
        const=True,
        help="carry over matrices that the checkpoint has quantized bit for bit, where ONNX Runtime has the same "
        "form; default where they were calibrated (GPTQ, AWQ, compressed-tensors) or trained for it (QAT in Q4_0) "
        "and have no more bits than -p",
    )
    how.add_argument(
        "--no-keep-quantization",
        dest="keep_quantization",
        action="store_const",
        const=False,
        help="quantize them again",
    )
    how.add_argument(
        "--extra_options",
        "--extra-options",
        metavar="K=V",
        nargs="+",
        default=[],
        help="options of the official builder, see below",
    )
    how.add_argument(
        "--kv-cache",
        "--kv_cache",
        metavar="S",
        help="int8: int8 KV cache, 4x smaller (cpu); also int8_per_channel, which is the same, int8_per_tensor, "
        "and none (default)",
    )
    how.add_argument(
        "--fast-prompts",
        "--fast_prompts",
        action="store_true",
        help="faster prefill on CPUs with AMX: store the decoder's matrices a second time, in 8 bits for integer "
        "matmul; makes the vision encoder faster too, with nothing stored twice (cpu)",
    )
    how.add_argument(
        "--adapter",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="add the peft LoRA adapter in folder PATH, switched at run time; may be repeated",
    )
    how.add_argument(
        "--merge-adapter",
        "--merge_adapter",
        metavar="PATH[=N]",
        action="append",
        default=[],
        help="merge the peft LoRA adapter in folder PATH into the weights, N times as strong (default: 1); may be "
        "repeated, in that order",
    )
    how.add_argument(
        "--max-length",
        "--max_length",
        type=int,
        metavar="N",
        help="search.max_length in genai_config.json (default: the context, at most 4096): onnxruntime-genai "
        "allocates a cache of that size, Foundry Local uses it as the context",
    )
    how.add_argument(
        "--threads", type=int, metavar="N", help="threads to quantize with (default: physical cores)"
    )
    good = parser.add_argument_group("evaluation")
    good.add_argument(
        "--no-check",
        action="store_true",
        help="skip the short comparison of the finished model with its checkpoint",
    )
    good.add_argument(
        "--evaluate",
        nargs="?",
        const="",
        metavar="FILE",
        help="write report.html and report.json, as `ortlm evaluate` does, on the text FILE or ortlm's corpus",
    )
    good.add_argument(
        "--max-kld",
        type=float,
        metavar="X",
        help="quality threshold: exit with 3 if the mean KL divergence is above X nats",
    )
    where = parser.add_argument_group("output")
    where.add_argument(
        "-c",
        "--cache_dir",
        "--cache-dir",
        metavar="DIR",
        help="folder for downloads (default: the Hugging Face cache)",
    )
    where.add_argument("--force", action="store_true", help="replace an existing artifact in -o")
    where.add_argument("--dry-run", action="store_true", help="show what would be built and write nothing")
    where.add_argument("--json", action="store_true", help="print the result as one JSON object")
    where.add_argument("-q", "--quiet", action="store_true", help="no progress, no closing table")


def _precision(text: str) -> str:
    """Return a precision; the official builder of vision models spells two of them shorter."""
    return {"f32": "fp32", "f16": "fp16"}.get(text, text)


def run(args: argparse.Namespace) -> int:
    """Build as ``args`` say."""
    from ortlm.builder.output_dir import identity

    out = Path(args.output)
    before = identity(out)
    try:
        # They end a build as Ctrl-C does, so that nothing half-written stays.
        with interrupting("SIGTERM", "SIGHUP", "SIGQUIT"):
            requests = _requests(args)
            return _dry_run(args, requests) if args.dry_run else _build(args, requests)
    except KeyboardInterrupt as interrupt:
        interrupt.args = (f"interrupted: {_left(out, before)}.",)
        raise


def _left(out: Path, before: tuple[int, int] | None) -> str:
    """Say what an interrupted build left; ``before`` is what was there when it began."""
    from ortlm.builder.output_dir import identity, resumable_layers

    now = identity(out)
    if now is not None and now != before:
        return f"the new model is whole, in {out}, and was checked or needed no check"
    left = "nothing was left behind" if now is None else f"{out} is as it was"
    kept = resumable_layers(out)
    if kept is None:
        return left
    return (
        f"{left}; {kept[1]} layers are calibrated and kept in {kept[0]}, from where the same command resumes"
    )


def _requests(args: argparse.Namespace) -> list[BuildRequest]:
    """Return what ``args`` ask for, once for each dtype of the layout of transformers.js.

    Raises BadOption and BadCheckpoint for what is wrong at first sight.
    """
    from ortlm._utils.limits import MOST_THREADS
    from ortlm.builder.extra_options import parse_extra_options
    from ortlm.builder.options import parse_adapters, parse_merged, with_activations, with_cache, with_recipe
    from ortlm.builder.request import BuildRequest
    from ortlm.builder.transformers_js import laid_out, with_options
    from ortlm.cli.settings import check_count
    from ortlm.errors import BadOption
    from ortlm.target import BROWSER, check_precision, find_target

    if not args.model_name and not args.input:
        raise BadOption("give -m NAME for a model on the hub, or -i PATH for a local folder or GGUF file.")
    check_count("--threads", args.threads, MOST_THREADS)
    check_count("--calibration-tokens", args.calibration_tokens, 1_000_000_000)
    if args.input and not Path(args.input).exists():
        from ortlm.errors import BadCheckpoint

        raise BadCheckpoint(
            f"-i {args.input} is neither a folder nor a GGUF file. For a model on the hub use -m NAME."
        )
    if args.max_kld is not None and not args.max_kld >= 0:
        raise BadOption(f"--max-kld must be 0 or more, in nats; got {args.max_kld}.")
    aims = [f"--target-{aim}" for aim in _AIMS if getattr(args, f"target_{aim}") is not None]
    if len(aims) > 1:
        raise BadOption(f"{' and '.join(aims)} are different aims; give one of them.")
    if args.keep_quantization and aims:
        raise BadOption(
            f"--keep-quantization and {aims[0]} contradict each other: what is kept has the bits that it has. "
            "Give one of the two."
        )
    if args.target_kld is not None and not args.target_kld > 0:
        raise BadOption(f"--target-kld must be above 0, in nats; got {args.target_kld}.")
    if args.target_bits is not None and not 0 < args.target_bits <= 32:
        raise BadOption(f"--target-bits must be above 0, and at most 32; got {args.target_bits}.")
    if args.evaluate and not Path(args.evaluate).is_file():
        raise BadOption(
            f"--evaluate {args.evaluate} is not a file; it takes a text, or nothing for ortlm's own."
        )
    request = BuildRequest(
        args.input or args.model_name,
        # With both, the weights are local and the name says what they are.
        name=args.model_name if args.input else None,
        revision=args.revision,
        subfolder=args.subfolder,
        cache=args.cache_dir,
        adapters=parse_adapters(args.adapter),
        merge_adapter=parse_merged(args.merge_adapter),
    )
    requests = laid_out(request, args.layout, args.precision, args.execution_provider)
    first = requests[0]
    if first.dtype is not None and aims:
        raise BadOption(f"{aims[0]} does not apply with --layout {args.layout}. Leave it out.")
    if len(requests) > 1 and (args.evaluate is not None or args.max_kld is not None):
        raise BadOption(
            f"--evaluate and --max-kld look at one model, and -p {args.precision} makes {len(requests)}. Build "
            "one dtype, or leave them out."
        )
    target = find_target(first.target) if first.dtype is None else BROWSER
    check_precision(first.precision, target)
    options = parse_extra_options(args.extra_options, target=target)
    options = with_cache(options, args.kv_cache, target)
    if args.fast_prompts:
        options = replace(options, fast_prompts=True)
    options = with_recipe(options, args.recipe, args.calibration, args.calibration_tokens)
    options = replace(options, max_length=args.max_length, keep_quantization=args.keep_quantization)
    if first.dtype is None:
        with_activations(target, first.precision, options)
    return with_options(requests, options)


def _dry_run(args: argparse.Namespace, requests: list[BuildRequest]) -> int:
    """Show what would be built."""
    # They import onnx-ir, which takes most of a second: usage errors have come before.
    from ortlm.builder.estimate import measure_seconds
    from ortlm.builder.planning import prepare

    outlines = []
    for request in requests:
        prepared = prepare(request)
        outlines.append(replace(prepared.outline, seconds=measure_seconds(prepared.outline, prepared.plan)))
    if args.json:
        facts = {"schema": 1, "dry_run": True, "output": str(Path(args.output)), **asdict(outlines[0])}
        if outlines[0].dtype is not None:
            facts["dtypes"] = {outline.dtype: asdict(outline) for outline in outlines}
        say(json.dumps(facts, indent=2))
    else:
        for outline in outlines:
            build_report.show_outline(output.console(), outline, Path(args.output))
    return DONE


def _build(args: argparse.Namespace, requests: list[BuildRequest]) -> int:
    """Build, check and report."""
    from ortlm._utils.formatting import readable_count
    from ortlm.builder.output_dir import check_output, recover
    from ortlm.builder.pipeline import write_folder
    from ortlm.builder.planning import prepare

    out = Path(args.output)
    console = output.console(stderr=True, quiet=args.quiet or args.json)
    recover(out)
    check_output(out, force=args.force, source=requests[0].source)
    began = time.monotonic()
    # Before a search, which takes long: what is wrong shows now.
    prepared = [prepare(request) for request in requests]
    frontier = None
    if any(getattr(args, f"target_{aim}") is not None for aim in _AIMS):
        request, frontier = _search(args, console, requests[0], out)
        prepared = [prepare(request)]
    outline = prepared[0].outline
    console.print(
        f"{outline.source}: {outline.model_type}, {readable_count(outline.parameters)} parameters, "
        f"to {build_report.made_for(one.outline for one in prepared)}",
        style="bold",
    )
    for note in () if args.json else outline.notes:
        tell(f"note: {note}")
    checks: list[Check | None] = []
    with Bars(console) as progress:

        def verify(one: Prepared, folder: Path) -> dict[str, Any]:
            progress.close()
            checked = _check(args, console, one, folder, out)
            checks.append(checked)
            facts: dict[str, Any] = {} if checked is None else {"check": checked.to_dict()}
            if frontier is not None:
                facts["frontier"] = [point.to_dict() for point in frontier]
            return facts

        artifact = write_folder(
            prepared, out, force=args.force, threads=args.threads, progress=progress, verify=verify
        )
    outlines = tuple(one.outline for one in prepared)
    result = build_report.Result(artifact, outlines, time.monotonic() - began, tuple(checks))
    if args.json:
        say(json.dumps(result.to_dict(), indent=2))
    else:
        build_report.show_result(console, result)
    return _evaluate(args, console, out)


def _search(
    args: argparse.Namespace, console: Console, request: BuildRequest, out: Path
) -> tuple[BuildRequest, tuple[Point, ...]]:
    """Find which matrices get how many bits, and show the frontier."""
    from ortlm._utils.formatting import parse_bytes
    from ortlm.builder.bit_allocation import search

    with Bars(console) as progress:
        allocation = search(
            request,
            out,
            target_kld=args.target_kld,
            target_size=parse_bytes(args.target_size, "--target-size") if args.target_size else None,
            target_bits=args.target_bits,
            threads=args.threads,
            progress=progress,
        )
    build_report.show_frontier(console, allocation.frontier, allocation.chosen)
    return allocation.request, allocation.frontier


def _check(
    args: argparse.Namespace, console: Console, prepared: Prepared, folder: Path, out: Path
) -> Check | None:
    """Compare the finished model with its checkpoint; None if nobody wants that, or it cannot be done here.

    It lies in ``folder``, and goes to ``out`` unless this raises.
    """
    if args.no_check or args.evaluate is not None or prepared.options.config_only:
        return None
    from ortlm.builder.output_dir import identity
    from ortlm.builder.verification import Unchecked, check
    from ortlm.errors import Error

    try:
        with console.status("checking the model against its checkpoint"):
            return check(prepared, folder, threads=args.threads)
    except Unchecked as reason:
        why = str(reason).removesuffix(".").replace(str(folder), str(out))
        tell(f"not checked: {why}. Evaluate it where it will run (ortlm evaluate {out}).")
        return None
    except Error as error:
        left = f"{out} is as it was" if identity(out) is not None else "Nothing was left behind"
        why = str(error).replace(str(folder), str(out)).removesuffix(".")
        raise type(error)(
            f"the new model did not pass its check: {why}. {left}; --no-check builds it all the same."
        ) from error


def _evaluate(args: argparse.Namespace, console: Console, out: Path) -> int:
    """Write the report that --evaluate and --max-kld ask for; returns the exit code."""
    if args.evaluate is None and args.max_kld is None:
        return DONE
    from ortlm.artifact import open_artifact
    from ortlm.cli.evaluate import gate
    from ortlm.errors import NoDevice
    from ortlm.evaluation.evaluate import evaluate
    from ortlm.runtime.loading import device_for

    device = None
    try:
        device_for(open_artifact(out))
    except NoDevice as error:
        device = "cpu"
        tell(f"evaluated on the CPU: {error}")
    with console.status("evaluating") as status:
        report = evaluate(
            out,
            text=args.evaluate or None,
            threads=args.threads,
            device=device,
            progress=StatusLine(status),
        )
    written = report.write()
    figures = report.statistics
    console.print(
        f"mean KL divergence {figures.kld.value:.5f} ± {figures.kld.error:.5f}, top-1 agreement "
        f"{figures.same_top.value:.2f} %; see {written[0]}",
        highlight=False,
        soft_wrap=True,
    )
    return gate(report, args.max_kld)
