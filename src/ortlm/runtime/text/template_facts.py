"""What a chat template reads of messages, found in its syntax tree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jinja2 import nodes

# Filters through which a list of parts stays one, and those that only lists of parts are put through.
_ITEM_FILTERS = ("map", "selectattr", "rejectattr")


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """``names`` are the fields and variables that a template reads, ``kinds`` the texts that it compares with.

    ``variables`` are those of the names that are no fields. ``iterates_content`` says whether it looks at the
    parts of a message's content one by one.
    """

    names: frozenset[str]
    variables: frozenset[str]
    kinds: frozenset[str]
    iterates_content: bool


def template_facts(tree: nodes.Template) -> TemplateFacts:
    """Return what the template ``tree`` reads."""
    variables = {node.name for node in tree.find_all(nodes.Name)}
    names = variables | {node.attr for node in tree.find_all(nodes.Getattr)}
    kinds: set[str] = set()
    for node in tree.find_all(nodes.Getitem):
        names |= set(_texts(node.arg))
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr == "get" and call.args:
            names |= set(_texts(call.args[0]))
    for compare in tree.find_all(nodes.Compare):
        sides = [_bare(compare.expr), *(_bare(op.expr) for op in compare.ops)]
        if any(op.op in ("in", "notin") for op in compare.ops):
            names |= {text for side in sides[:1] for text in _texts(side)}
            kinds |= {text for side in sides[1:] for text in _texts(side)}
        else:
            kinds |= {text for side in sides for text in _texts(side)}
    return TemplateFacts(frozenset(names), frozenset(variables), frozenset(kinds), _iterates(tree))


def _texts(node: nodes.Node) -> Iterator[str]:
    """Return the text that ``node`` is, or those of the list that it is."""
    node = _bare(node)
    if isinstance(node, nodes.Const) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, (nodes.List, nodes.Tuple)):
        for item in node.items:
            yield from _texts(item)


def _bare(node: nodes.Node) -> nodes.Node:
    """Return ``node`` without the filters that the sandbox puts around it, which have a space in their names."""
    while isinstance(node, nodes.Filter) and node.name.startswith(" ") and node.node is not None:
        node = node.node
    return node


def _iterates(tree: nodes.Template) -> bool:
    aliases = _aliases(tree)
    for loop in tree.find_all(nodes.For):
        if _is_content(loop.iter, aliases):
            return True
    for call in tree.find_all(nodes.Filter):
        if call.name in _ITEM_FILTERS and call.node is not None and _is_content(call.node, aliases):
            return True
    found: list[nodes.Getattr | nodes.Getitem] = [
        *tree.find_all(nodes.Getattr),
        *tree.find_all(nodes.Getitem),
    ]
    for part in found:
        field = part.attr if isinstance(part, nodes.Getattr) else next(_texts(part.arg), "")
        item = _bare(part.node)
        if field in ("type", "text") and isinstance(item, nodes.Getitem) and _is_content(item.node, aliases):
            index = _bare(item.arg)
            if isinstance(index, nodes.Const) and isinstance(index.value, int):
                return True
    return False


def _aliases(tree: nodes.Template) -> set[str]:
    """Return the variables and macro arguments that may hold a message's content."""
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    found: set[str] = set()
    size = -1
    while size != len(found):
        size = len(found)
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node, found):
                found.add(assign.target.name)
        for call in tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is None:
                continue
            for given, argument in zip(call.args, macro.args, strict=False):
                if _is_content(given, found):
                    found.add(argument.name)
            found |= {pair.key for pair in call.kwargs if _is_content(pair.value, found)}
    return found


def _is_content(node: nodes.Node | None, aliases: set[str]) -> bool:
    if isinstance(node, nodes.Filter):
        return _is_content(node.node, aliases)
    if isinstance(node, nodes.Name):
        return node.name in aliases
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return "content" in _texts(node.arg) or (
            isinstance(node.arg, nodes.Slice) and _is_content(node.node, aliases)
        )
    if isinstance(node, nodes.CondExpr):
        return _is_content(node.expr1, aliases) or _is_content(node.expr2, aliases)
    if isinstance(node, (nodes.Or, nodes.And)):
        return _is_content(node.left, aliases) or _is_content(node.right, aliases)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr == "get":
        return any("content" in _texts(given) for given in node.args[:1])
    return False
