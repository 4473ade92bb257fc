"""Check what is in ``dist/``: a wheel and an sdist of this version, with the files that they need and no others.

``python scripts/check_release.py``, after ``python -m build``; ``make release`` runs it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from email.parser import HeaderParser
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MODULE = ROOT / "src" / "ortlm"
RELEASE = re.compile(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", re.MULTILINE)


def version() -> str:
    """Return the version in the package, which has to be the newest one of the changelog."""
    found = re.search(
        r'^__version__ = "(.+)"$', (MODULE / "_version.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    newest = RELEASE.search((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    if found is None or newest is None or found[1] != newest[1]:
        sys.exit(
            f"src/ortlm/_version.py has version {found and found[1]}, but the newest dated heading of "
            f"CHANGELOG.md is {newest and newest[1]}. Write the same into both."
        )
    return found[1]


def tracked(*paths: str) -> set[str]:
    """Return the files of the repository under ``paths``, relative to its root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", *paths], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(filter(None, listed.stdout.split("\0")))


def compare(archive: Path, there: set[str], wanted: set[str]) -> None:
    """End the program if ``archive`` has other files than ``wanted``."""
    for what, names in (("lacks", wanted - there), ("should not hold", there - wanted)):
        if names:
            sys.exit(
                f"{archive.name} {what} {', '.join(sorted(names)[:10])}; see tool.hatch in pyproject.toml."
            )


def only(archives: Iterable[Path], what: str) -> Path:
    """Return the one archive that there is."""
    found = list(archives)
    if len(found) != 1:
        sys.exit(f"dist/ has to hold one {what}, found {len(found)}. Empty it and run python -m build.")
    return found[0]


def main() -> None:
    """Check both archives."""
    release = version()
    wheel = only((ROOT / "dist").glob("*.whl"), "wheel")
    sdist = only((ROOT / "dist").glob("*.tar.gz"), "sdist")
    top, info = f"ortlm-{release}", f"ortlm-{release}.dist-info"
    package = {name.removeprefix("src/") for name in tracked("src/ortlm")}
    assert "ortlm/py.typed" in package
    described = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    with zipfile.ZipFile(wheel) as opened:
        compare(wheel, set(opened.namelist()), package | {f"{info}/{name}" for name in described})
        headers = HeaderParser().parsestr(opened.read(f"{info}/METADATA").decode())
    if headers["Version"] != release or "Typing :: Typed" not in headers.get_all("Classifier", []):
        sys.exit(f"{wheel.name} does not have version {release} and the classifier Typing :: Typed.")
    sources = tracked(*PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"])
    with tarfile.open(sdist) as packed:
        files = {member.name.removeprefix(f"{top}/") for member in packed if member.isfile()}
    compare(sdist, files, sources | {".gitignore", "PKG-INFO"})
    for path in (wheel, sdist):
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, as it should be")


if __name__ == "__main__":
    main()
