"""Every public name of onnxruntime_genai is here, or documented as left out with the reason."""

from pathlib import Path

import pytest

import ortlm
import ortlm.genai as og

theirs = pytest.importorskip("onnxruntime_genai")
DOCS = (Path(ortlm.__file__).parents[2] / "docs/genai.md").read_text()
SPECIAL = (
    "__call__",
    "__getitem__",
    "__setitem__",
    "__delitem__",
    "__contains__",
    "__len__",
    "__version__",
    "__id__",
)
NAMES = [
    name
    for name in dir(theirs)
    if (not name.startswith("_") or name in SPECIAL) and name != "onnxruntime_genai"
]
MEMBERS = [
    (kind, name)
    for kind in NAMES
    if isinstance(getattr(theirs, kind), type) and kind not in og.ABSENT
    for name in dir(getattr(theirs, kind))
    if not name.startswith("_") or name in SPECIAL
]


@pytest.mark.parametrize("name", NAMES)
def test_every_name(name):
    if name not in og.ABSENT:
        assert hasattr(og, name)
        return
    assert f"`{name}`" in DOCS
    with pytest.raises(AttributeError, match=f"has no '{name}': ."):
        getattr(og, name)


@pytest.mark.parametrize(("kind", "name"), MEMBERS)
def test_every_member(kind, name):
    found, wanted = getattr(getattr(og, kind), name), getattr(getattr(theirs, kind), name)
    assert isinstance(found, property) == isinstance(wanted, property)
    assert callable(found) == callable(wanted)


def test_nothing_is_called_absent_that_is_not_there():
    assert set(og.ABSENT) <= set(dir(theirs))
