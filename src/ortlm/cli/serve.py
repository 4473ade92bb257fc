"""``ortlm serve``: built models behind OpenAI's HTTP API."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ortlm.cli import Subparsers
from ortlm.cli.machine import MOST_MEGABYTES, add_cache, add_machine, add_ray, device_of, prefix_bytes_of
from ortlm.cli.output import tell
from ortlm.cli.settings import check_count
from ortlm.cluster.connection import import_ray
from ortlm.errors import BadOption

if TYPE_CHECKING:
    from ortlm.server.run import ServeOptions

_EXAMPLES = """\
examples:
  ortlm serve phi
  ortlm serve phi base=phi-fp32 --port 9000 --api-key-file keys.txt
  ortlm serve phi --ray auto --replicas 2:8

Keys may also stand in the environment: ORTLM_API_KEY. See docs/serving.md.
"""
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def add_parser(subparsers: Subparsers) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "serve",
        help="serve models over HTTP",
        usage="ortlm serve MODEL [MODEL ...] [options]",
        description="Serve built models over HTTP, as OpenAI's API. Needs ortlm[serve].",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", metavar="MODEL", nargs="*", help="folder of a built model, or NAME=FOLDER")
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    network.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port (default: 8000; 0: a free one)"
    )
    network.add_argument(
        "--api-key", action="append", metavar="KEY", help="requests must have this key; may be repeated"
    )
    network.add_argument("--api-key-file", metavar="FILE", help="file with a key on each line")
    network.add_argument("--no-api-key", action="store_true", help="listen on any address without a key")
    network.add_argument(
        "--cors-origin", action="append", metavar="URL", help="let pages of this origin call; may be repeated"
    )
    network.add_argument(
        "--max-body", type=int, default=32, metavar="MB", help="largest body of a request (default: 32)"
    )
    network.add_argument(
        "--remote-images", action="store_true", help="fetch images by URL, from public addresses only"
    )
    network.add_argument("--no-page", action="store_true", help="no chat page at /")
    work = parser.add_argument_group("requests")
    work.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="requests that run at once (default: 8)"
    )
    work.add_argument(
        "--queue", type=int, default=64, metavar="N", help="requests that may wait (default: 64)"
    )
    work.add_argument(
        "--stall", type=float, default=0.25, metavar="S",
        help="about how long a chunk of a prompt keeps others waiting (default: 0.25 seconds)",
    )  # fmt: skip
    add_cache(work)
    work.add_argument(
        "--lookup",
        action="store_true",
        help="draft what followed the same words before, and check several tokens per step",
    )
    work.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="longest time of a request (default: 600 seconds)",
    )
    work.add_argument(
        "--drain", type=float, default=30.0, metavar="S",
        help="after SIGTERM, let running requests end for so long (default: 30 seconds)",
    )  # fmt: skip
    loading = parser.add_argument_group("loading")
    loading.add_argument(
        "--idle", type=float, metavar="S",
        help="unload a model after so long without a request; the next one loads it again (default: never)",
    )  # fmt: skip
    loading.add_argument(
        "--max-loaded", type=int, metavar="N",
        help="models that are loaded at once; the least recently used makes room (default: all)",
    )  # fmt: skip
    add_machine(parser)
    cluster = add_ray(parser)
    cluster.add_argument(
        "--replicas", metavar="N[:M]", help="on a cluster: N replicas, or N to M by load (default: 1)"
    )
    cluster.add_argument(
        "--sessions", action="store_true", help="send requests with the same x-session-id to the same replica"
    )
    cluster.add_argument(
        "--every-node",
        action="store_true",
        help="take requests on every node with a replica, not the head's only",
    )
    cluster.add_argument("--stop", action="store_true", help="end what is served on the cluster")


def run(args: argparse.Namespace) -> int:
    """Serve."""
    _check_cluster(args)
    check_count("--max-body", args.max_body, 4096)
    check_count("--prefix-cache", args.prefix_cache, MOST_MEGABYTES, least=0)
    keys = _keys(args)
    if not 0 <= args.port <= 65535:
        raise BadOption(f"--port must be from 0 to 65535, found {args.port}.")
    if not 0 <= args.drain < 1e9:
        raise BadOption(f"--drain must be 0 or more seconds, found {args.drain:g}.")
    if args.host not in _LOOPBACK and not keys and not args.no_api_key:
        raise BadOption(
            f"--host {args.host} can be reached by others, and there is no key. Add --api-key KEY or "
            "--api-key-file FILE, or --no-api-key if everybody may use it."
        )
    try:
        from ortlm.server.app import ServerOptions
        from ortlm.server.run import ServeOptions, serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "ortlm":
            raise
        raise BadOption(
            f"ortlm serve needs {error.name}, which is not installed: pip install 'ortlm[serve]'"
        ) from error
    from ortlm.serving.engine import EngineOptions

    options = ServeOptions(
        host=args.host,
        port=args.port,
        drain_seconds=args.drain,
        remote_images=args.remote_images,
        engine=EngineOptions(
            batch=args.batch_size,
            queue=args.queue,
            stall_seconds=args.stall,
            cache_tokens=args.cache_tokens,
            prefix_bytes=prefix_bytes_of(args),
            seconds=args.timeout,
            lookup=args.lookup,
        ),
        idle_seconds=args.idle,
        most_loaded=args.max_loaded,
        server=ServerOptions(
            keys=keys,
            origins=args.cors_origin or (),
            body_bytes=args.max_body << 20,
            page=not args.no_page,
        ),
    )
    if args.ray is not None:
        return _deploy(args, options)
    serve(
        args.models,
        options,
        ready=_tell_with_page if options.server.page else _tell,
        threads=args.threads,
        **device_of(args),
    )
    return 0


def _deploy(args: argparse.Namespace, options: ServeOptions) -> int:
    """Serve on a cluster."""
    import_ray("ray.serve")
    from ortlm.server.on_ray import Replicas, deploy, undeploy

    if args.stop:
        undeploy(args.ray)
        return 0
    if args.ray == "local":
        raise BadOption(
            "--ray local would end at once; start a cluster with ray start --head, or leave it out."
        )
    device = device_of(args)
    if device["device"] not in (None, "cpu") or device["device_options"]:
        raise BadOption("--ray runs on CPUs only; leave --device and --device-option out.")
    least, _, most = (args.replicas or "1").partition(":")
    try:
        replicas = Replicas(
            int(least), int(most or least), sessions=args.sessions, every_node=args.every_node
        )
    except ValueError as error:
        raise BadOption(
            f"--replicas takes N or N:M, both 1 or more, M at least N; found {args.replicas!r}."
        ) from error
    address = deploy(args.ray, args.models, options, replicas, threads=args.threads)
    tell(f"serving {', '.join(args.models)} at {address}/v1; end it with ortlm serve --ray {args.ray} --stop")
    return 0


def _check_cluster(args: argparse.Namespace) -> None:
    if args.ray is None:
        given = {
            "--replicas": args.replicas,
            "--sessions": args.sessions,
            "--every-node": args.every_node,
            "--stop": args.stop,
        }
        for name, value in given.items():
            if value:
                raise BadOption(f"{name} is for clusters only; add --ray ADDRESS, or leave it out.")
    if bool(args.models) == args.stop:
        raise BadOption("--stop takes no model." if args.stop else "give the folder of a built model.")


def _tell(address: str, names: Sequence[str]) -> None:
    tell(f"serving {', '.join(names)} at {address}/v1")


def _tell_with_page(address: str, names: Sequence[str]) -> None:
    tell(f"serving {', '.join(names)} at {address}/v1, and a page to chat with at {address}/")


def _keys(args: argparse.Namespace) -> list[str]:
    keys = list(args.api_key or ())
    if args.api_key_file is not None:
        try:
            text = Path(args.api_key_file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BadOption(f"--api-key-file {args.api_key_file} cannot be read: {error}.") from error
        keys += [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        if not keys:
            raise BadOption(f"--api-key-file {args.api_key_file} holds no key. Write one on each line.")
    if os.environ.get("ORTLM_API_KEY"):
        keys.append(os.environ["ORTLM_API_KEY"])
    if any(not key.strip() for key in keys):
        raise BadOption("--api-key must not be empty.")
    if args.no_api_key and keys:
        raise BadOption("--no-api-key does not go with keys. Leave one of them out.")
    return keys
