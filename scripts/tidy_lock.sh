#!/bin/sh
# Leaves out of the lock what torch's CUDA build brings: torch names those packages itself, and its CPU build
# (Windows, macOS, +cpu wheels) needs none of their gigabytes.
set -eu
lock=$1
{
    cat <<'END'
# The exact version of every package that demo, tests, lint and benchmarks install, for Python 3.10 to 3.14.
# Made by `make update-lock`, not edited by hand. Without hashes, because torch has another build on every kind of
# machine, and without the CUDA packages, which torch's CUDA build asks for itself.
END
    grep -v -E '^(#|cuda-|nvidia-|triton==)' "$lock"
} >"$lock.new"
mv "$lock.new" "$lock"
