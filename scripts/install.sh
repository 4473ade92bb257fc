#!/bin/sh
# Installs into a virtual environment, which is made first if need be: sh scripts/install.sh VENV ARGUMENTS-OF-PIP
# What goes wrong is said in one line; pip's own words are in VENV/pip.log.
set -eu

venv=$1
shift
python=${PYTHON:-python3}
lock=requirements/lock.txt

fail() {
    echo "make: $1" >&2
    exit 1
}

if [ ! -x "$venv/bin/python" ]; then
    another='Name another one: make PYTHON=/path/to/python3.12'
    command -v "$python" >/dev/null || fail "there is no $python here; ortlm needs Python 3.10 to 3.14. $another"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python does not start. $another"
    case $version in
    3.1[0-4]) ;;
    *) fail "$python is Python $version; the locked packages are for 3.10 to 3.14. $another" ;;
    esac
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments. Install its venv module (Debian and Ubuntu: apt install python$version-venv)."
    "$python" -m venv --clear "$venv" || fail "no virtual environment could be made in $venv."
fi

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --progress-bar off "$@" >>"$log" 2>&1 && return
    if grep -q -E 'NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|unreachable' "$log"; then
        fail "the package index cannot be reached, so $venv is not complete. Check the network, or name a mirror in PIP_INDEX_URL (pip's words: $log)."
    fi
    reason=$(grep -m 1 '^ERROR: ' "$log" || tail -n 1 "$log")
    fail "pip could not install into $venv: ${reason#ERROR: } (all of its words: $log)"
}

log=$venv/pip.log
: >"$log"
echo "Installing into $venv (log: $log)"
# The pip that came with Python may be too old to know the constraints of builds.
pip -c $lock pip
pip --build-constraint $lock "$@"
