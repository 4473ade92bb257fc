"""The options that say where a command computes."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ortlm.errors import BadOption

# For --prefix-cache: more is a mistake.
MOST_MEGABYTES = 1 << 24


def without_blas_threads() -> None:
    """Let numpy, which is not imported yet, start no threads: answers need none of its products of matrices.

    A thread of OpenBLAS spins for a while after it has started, which takes the processor from what loads the
    model. What a user has set stays.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where to compute."""
    machine = parser.add_argument_group("machine")
    machine.add_argument("--threads", type=int, metavar="N", help="threads (default: physical cores)")
    add_device(machine)


def add_device(group: argparse._ActionsContainer) -> None:
    """Add the options that name a device."""
    group.add_argument(
        "--device",
        metavar="NAME",
        help="where to compute, such as cpu, cuda, cuda:1, webgpu; see ortlm devices (default: what the model was "
        "built for)",
    )
    group.add_argument(
        "--device-option",
        action="append",
        metavar="KEY=VALUE",
        help="option of the device's execution provider; may be repeated",
    )


def add_cache(group: argparse._ActionsContainer) -> None:
    """Add the options that bound the memory of requests that run together."""
    group.add_argument(
        "--cache-tokens",
        type=int,
        metavar="N",
        help="tokens of all running requests (default: a quarter of memory)",
    )
    group.add_argument(
        "--prefix-cache",
        type=int,
        metavar="MB",
        help="memory for prefixes of earlier requests (default: an eighth)",
    )


def prefix_bytes_of(args: argparse.Namespace) -> int | None:
    """Return --prefix-cache in bytes, None without it."""
    return None if args.prefix_cache is None else args.prefix_cache << 20


def add_ray(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the option that names a cluster, and return its group."""
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="use a cluster of Ray: auto, HOST:PORT, or local, which starts one; needs ortlm[ray]",
    )
    return group


def device_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return --device and --device-option as arguments of ``ortlm.load``."""
    options: dict[str, str] = {}
    for given in args.device_option or ():
        key, equals, value = given.partition("=")
        if not (key and equals):
            raise BadOption(f"--device-option takes KEY=VALUE, found {given!r}.")
        if options.setdefault(key, value) != value:
            raise BadOption(
                f"--device-option {key} is both {options[key]} and {value}. Leave one of them out."
            )
    return {"device": args.device, "device_options": options}
