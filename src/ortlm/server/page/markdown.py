"""Markdown of answers as HTML that a page may show: with highlighted code, and without anything active."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from html import escape
from typing import Any

import nh3
from markdown_it import MarkdownIt
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Error, Generic, Keyword, Name, Number, Operator, Punctuation, String

# Longer texts would keep others waiting; the page shows them as they are.
MOST_CHARACTERS = 100_000
# Some lexers take quadratic time: what is left after so much of a core's is shown without colors.
_MOST_SECONDS = 1.0
# Lexers are programs of regular expressions, of very different quality, so these and no others.
LANGUAGES = frozenset(
    (
        "bash", "c", "cpp", "csharp", "css", "diff", "docker", "go", "graphql", "haskell", "html", "http",
        "ini", "java", "javascript", "json", "julia", "kotlin", "lua", "make", "matlab", "nix", "objective-c",
        "ocaml", "perl", "php", "powershell", "python", "r", "ruby", "rust", "scala", "sql", "swift", "toml",
        "typescript", "xml", "yaml", "zig",
    )
)  # fmt: skip
_ALSO = {
    "c#": "csharp", "c++": "cpp", "cs": "csharp", "dockerfile": "docker", "golang": "go", "hs": "haskell",
    "js": "javascript", "jsx": "javascript", "kt": "kotlin", "makefile": "make", "node": "javascript",
    "objc": "objective-c", "patch": "diff", "ps1": "powershell", "py": "python", "python3": "python",
    "rb": "ruby", "rs": "rust", "sh": "bash", "shell": "bash", "svg": "xml", "ts": "typescript",
    "tsx": "typescript", "yml": "yaml", "zsh": "bash",
}  # fmt: skip
# The first that a token's type belongs to is its class.
_KINDS = (
    (Comment, "comment"),
    (Keyword, "keyword"),
    (String, "string"),
    (Number, "number"),
    (Name.Function, "function"),
    (Name.Class, "type"),
    (Name.Builtin, "builtin"),
    (Name.Decorator, "function"),
    (Name.Tag, "keyword"),
    (Name.Attribute, "type"),
    (Operator.Word, "keyword"),
    (Generic.Deleted, "deleted"),
    (Generic.Inserted, "inserted"),
    (Generic.Heading, "comment"),
    (Generic.Subheading, "comment"),
)
# The libraries make their tables at first use, and two threads at once may see half of one. It costs no time: what
# renders has the interpreter's lock.
_LOCK = threading.Lock()
_UNTIL = "highlighted until"
# Addresses without a scheme would lead to this server.
_LINK = re.compile(r"(https?|mailto):", re.IGNORECASE)
_PLAIN = (Operator, Punctuation, Error)
_TAGS = frozenset(
    (
        "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p",
        "pre", "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
    )
)  # fmt: skip


def render(text: str) -> str:
    """Return ``text`` as HTML. HTML in it is shown as text, and an image as a link to it.

    No attribute of it holds a style, an id or a script; links lead to http, https and mailto, in a page of their
    own that is not told where they were clicked. Classes are ``language-NAME``, and ``tok-KIND`` in code.
    """
    with _LOCK:
        made: str = _markdown().render(text, {_UNTIL: time.thread_time() + _MOST_SECONDS})
    return nh3.clean(
        made,
        tags=set(_TAGS),
        attributes={"a": {"href", "title"}, "ol": {"start"}},
        tag_attribute_values={cell: {"align": {"left", "center", "right"}} for cell in ("td", "th")},
        set_tag_attribute_values={"a": {"target": "_blank"}},
        allowed_classes={
            "code": {f"language-{name}" for name in LANGUAGES},
            "span": {f"tok-{kind}" for _, kind in _KINDS},
        },
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
    )


def _known(language: str) -> str | None:
    asked = language.strip().lower()
    name = _ALSO.get(asked, asked)
    return name if name in LANGUAGES else None


def _parts(lexer: Lexer, code: str, until: float) -> Iterator[tuple[str, str]]:
    """Yield the code's parts with their kinds; after the time ``until`` the rest as one of no kind."""
    # As the lexer sees it, so that positions are those of this text.
    code = code.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    before, held, end = "", "", 0
    for token, part in lexer.get_tokens(code):
        if time.thread_time() > until:
            yield before, held
            yield "", code[end:]
            return
        end += len(part)
        kind = "" if token in _PLAIN else next((kind for type_, kind in _KINDS if token in type_), "")
        if kind != before and held:
            yield before, held
            held = ""
        before, held = kind, held + part
    if held:
        yield before, held


@cache
def _lexer(name: str) -> Lexer:
    return get_lexer_by_name(name, stripnl=False, ensurenl=False)


@cache
def _markdown() -> MarkdownIt:
    found = MarkdownIt("commonmark", {"html": False})
    found.enable(["table", "strikethrough"])
    # That of an instance, which is meant to be replaced.
    setattr(found, "validateLink", lambda url: _LINK.match(url) is not None)  # noqa: B010
    found.add_render_rule("image", _image)
    found.add_render_rule("fence", _fence)
    for cell in ("td_open", "th_open"):
        found.add_render_rule(cell, _cell)
    return found


# markdown-it calls these as methods of its renderer.
def _fence(_: Any, tokens: Sequence[Any], index: int, __: Any, env: Mapping[str, float]) -> str:
    code: str = tokens[index].content
    name = _known(tokens[index].info.partition(" ")[0])
    if name is None:
        return f"<pre><code>{escape(code)}</code></pre>"
    shown = "".join(
        f'<span class="tok-{kind}">{escape(part)}</span>' if kind else escape(part)
        for kind, part in _parts(_lexer(name), code, env[_UNTIL])
    )
    return f'<pre><code class="language-{name}">{shown}</code></pre>'


def _image(_: Any, tokens: Sequence[Any], index: int, *__: Any) -> str:
    # A page that loads what an answer names tells its host everything that the address holds.
    address = escape(str(tokens[index].attrs.get("src", "")))
    return f'<a href="{address}">{escape(tokens[index].content or "image")}</a>'


def _cell(_: Any, tokens: Sequence[Any], index: int, *__: Any) -> str:
    # Styles are not allowed on the page, the attribute is.
    token = tokens[index]
    side = str(token.attrs.get("style", "")).rpartition(":")[2]
    return f'<{token.tag} align="{side}">' if side else f"<{token.tag}>"
