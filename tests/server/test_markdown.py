"""What becomes HTML of the page: nothing that acts, and nothing that loads."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest

pytest.importorskip("nh3")

from hypothesis import given
from hypothesis import strategies as st
from pygments.lexers import get_lexer_by_name

from ortlm.server.page.markdown import _ALSO, LANGUAGES, render

TAGS = {
    "a", "blockquote", "br", "code", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s",
    "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
ATTRIBUTES = {"href", "title", "target", "rel", "class", "align", "start"}


class Checker(HTMLParser):
    """Fails on everything that the page may not hold."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for name, value in attrs:
            assert name in ATTRIBUTES, (tag, name)
            if name == "href":
                assert urlsplit(value or "").scheme.lower() in ("http", "https", "mailto"), value
            if name == "class":
                assert re.fullmatch(r"(language-|tok-)[a-z-]+|", value or ""), value
        if tag == "a" and dict(attrs).get("href"):
            assert dict(attrs)["rel"] == "noopener noreferrer nofollow"
            assert dict(attrs)["target"] == "_blank"


def checked(text: str) -> str:
    """Return ``text`` rendered, which holds nothing but what it may."""
    found = render(text)
    Checker().feed(found)
    return found


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<iframe src=javascript:alert(1)></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "<style>*{display:none}</style>",
    "<form action=/v1/models><button>x</button></form>",
    "<math><mtext></p><style><img src=x onerror=alert(1)></style>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\nscript:alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](vbscript:msgbox)",
    "[x](file:///etc/passwd)",
    "[x](/v1/models)",
    "[x](//evil.example/y)",
    "[x](#main)",
    "<javascript:alert(1)>",
    '[x](https://a.example/"onmouseover="alert(1))',
    '[x](https://a.example "title" onclick="alert(1)")',
    "![x](javascript:alert(1))",
    "![x](data:image/svg+xml;base64,PHN2Zz4=)",
    '![x"onerror="alert(1)](https://a.example/i.png)',
    "[x]: javascript:alert(1)\n\n[x]",
    '```python"onclick="alert(1)\nx\n```',
    "```html\n<script>alert(1)</script>\n```",
    '```" onload="x\n</code></pre><script>alert(1)</script>\n```',
    "    </code></pre><script>alert(1)</script>",
    "`</code><script>alert(1)</script>`",
    "| a |\n|:-:|\n| <script>alert(1)</script> |",
    "<!--><script>alert(1)</script>-->",
    "\x00<\x00script>alert(1)</script>",
]


@pytest.mark.parametrize("text", ATTACKS)
def test_nothing_acts(text: str) -> None:
    assert "<script" not in checked(text)


@given(st.text(alphabet=st.sampled_from("<>\"'`[]()!*_~#|:-/\\&;= \n\tax1é\u2028"), max_size=60))
def test_nothing_acts_in_any_text(text: str) -> None:
    checked(text)


@given(st.lists(st.sampled_from([*ATTACKS, "\n", "```", "> ", "- ", "**", "|", "](", '"', ">"]), max_size=6))
def test_nothing_acts_in_any_mixture(parts: list[str]) -> None:
    checked("".join(parts))


def test_images_are_links() -> None:
    """A page that loads what an answer names tells a stranger what the answer wants to tell."""
    found = checked("![a chart](https://a.example/i.png?said=secret)")
    assert "<img" not in found
    assert '<a href="https://a.example/i.png?said=secret"' in found
    assert ">a chart</a>" in found


def test_what_markdown_has() -> None:
    table = "| a | b |\n|--:|---|\n| 1 | 2 |\n"
    found = checked(f"# One\n\ntwo **three** ~~four~~ `five`\n\n3. seven\n\n> eight\n\n{table}\n---\n")
    for part in (
        "<h1>One</h1>",
        "<strong>three</strong>",
        "<s>four</s>",
        "<code>five</code>",
        '<ol start="3">',
        "<blockquote>",
        '<th align="right">a</th>',
        "<td>2</td>",
        "<hr>",
    ):
        assert part in found


def test_code_is_highlighted() -> None:
    found = checked('```py\ndef f(x):\n    return "<b>" + str(1)  # done\n```')
    assert '<pre><code class="language-python"><span class="tok-keyword">def</span>' in found
    assert '<span class="tok-string">"&lt;b&gt;"</span>' in found
    assert '<span class="tok-comment"># done</span>' in found


def test_first_use_in_many_threads() -> None:
    """What the libraries make at first use is not seen half made."""
    program = (
        "import sys, threading\n"
        "from ortlm.server.page.markdown import render\n"
        "sys.setswitchinterval(1e-5)\n"
        "found = []\n"
        "text = '**x**\\n```python\\ndef f(): pass\\n```\\n```html\\n<b>\\n```'\n"
        "threads = [threading.Thread(target=lambda: found.append(render(text))) for _ in range(8)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "assert len(found) == 8 and len(set(found)) == 1, found\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("language", [*sorted(LANGUAGES), *sorted(_ALSO)])
def test_languages(language: str) -> None:
    """Each has a lexer of exactly this name, and loses nothing of the code."""
    get_lexer_by_name(_ALSO.get(language, language))
    code = "\n\n  <a b='c'>\tint x = 1; # é\r\nend\n\n"
    found = checked(f"~~~{language}\n{code}~~~")
    text = re.sub(r"<[^>]*>", "", found)
    assert text.replace("&lt;", "<").replace("&gt;", ">").replace("&nbsp;", "\xa0") == code.replace(
        "\r\n", "\n"
    )
    assert f'class="language-{_ALSO.get(language, language)}"' in found


def test_unknown_languages_are_plain() -> None:
    assert checked("```nothing\nx < y\n```") == "<pre><code>x &lt; y\n</code></pre>"


@pytest.mark.parametrize(
    "text",
    [
        "```java\n" + "a " * 9000,
        "```perl\n" + "s{" * 8000,
        "[" * 30_000,
        "![" * 20_000,
        "*a " * 33_000,
        "|a|b|\n|-|-|\n" + "|x|y|\n" * 10_000,
        ">" * 50_000,
        "".join("  " * depth + "- a\n" for depth in range(300)),
    ],
    ids=["java", "perl", "brackets", "images", "stars", "table", "quotes", "lists"],
)
def test_hostile_texts_end(text: str) -> None:
    """Some lexers would take minutes for them."""
    began = time.process_time()
    checked(text)
    assert time.process_time() - began < 20
