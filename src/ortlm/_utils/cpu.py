"""The processor of this machine: its name, what it can do, and how many threads a model should compute with."""

from __future__ import annotations

import math
import os
import platform
import sys
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")
# Instructions that decide which int8 kernels ONNX Runtime has.
_INT8_FLAGS = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")

# ONNX Runtime's option that lets x86 processors without VNNI multiply integers exactly, where they would overflow.
INTEGERS_DO_NOT_OVERFLOW = "session.x64quantprecision"


def cpu_name() -> str:
    """Return the processor's name as its maker writes it, as far as the system tells."""
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        import subprocess

        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Return which of the instructions for int8 the processor has, as far as the system tells."""
    lines = (_read(Path("/proc/cpuinfo")) or "").splitlines()
    flags = next(
        (line.split(":", 1)[1].split() for line in lines if line.startswith(("flags", "Features"))), []
    )
    return [flag for flag in _INT8_FLAGS if flag in flags]


def integers_overflow() -> bool:
    """Return whether ONNX Runtime's usual integer matmuls overflow here: on x86 without VNNI."""
    found = instruction_sets()
    return "avx2" in found and not any("vnni" in flag for flag in found)


def fast_integer_matmul() -> bool:
    """Return whether integer matmuls of many rows are several times as fast here as those in fp32."""
    return "amx_int8" in instruction_sets()


def memory_bytes() -> int | None:
    """Return the size of the main memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def physical_cores() -> int:
    """Return the number of physical cores that this process may use.

    Affinity and cgroup quota are respected on Linux. 0 elsewhere: ONNX Runtime then counts by itself.
    """
    if not sys.platform.startswith("linux"):
        return 0
    usable = sorted(os.sched_getaffinity(0))
    cores = len({_siblings(cpu) for cpu in usable})
    quota = _cgroup_quota()
    if quota is not None:
        cores = min(cores, math.ceil(quota))
    return max(1, cores)


def _siblings(cpu: int) -> str:
    """Return a name for the core that logical processor ``cpu`` belongs to."""
    for name in ("core_cpus_list", "thread_siblings_list"):
        found = _read(_CPUS / f"cpu{cpu}" / "topology" / name)
        if found:
            return found
    return str(cpu)


def _cgroup_quota() -> float | None:
    """Return the number of processors the tightest enclosing cgroup grants; None if there is no limit."""
    limits = []
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, inner = line.split(":", 2)
        if not controllers:
            limits += [_v2_limit(folder) for folder in _upwards(_CGROUP, inner)]
        elif "cpu" in controllers.split(","):
            limits += [_v1_limit(folder) for folder in _upwards(_CGROUP / "cpu", inner)]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _upwards(root: Path, inner: str) -> list[Path]:
    at = root / inner.lstrip("/")
    return [folder for folder in (at, *at.parents) if folder == root or root in folder.parents]


def _v2_limit(folder: Path) -> float | None:
    quota, _, period = (_read(folder / "cpu.max") or "max").partition(" ")
    return None if quota == "max" else int(quota) / int(period or 100_000)


def _v1_limit(folder: Path) -> float | None:
    quota = int(_read(folder / "cpu.cfs_quota_us") or -1)
    period = int(_read(folder / "cpu.cfs_period_us") or 0)
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
