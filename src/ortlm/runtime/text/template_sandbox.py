"""The sandbox in which chat templates run, and what it adds to jinja2's own.

A template is a stranger's program. jinja2's sandbox keeps it from files and objects; this environment also keeps
it from taking all time and memory, see ``template_budget``. Three rules bound everything that a template can do:

- Every loop step, call, filter, operator, comparison and output is a step. Steps are counted, and each looks at
  the clock.
- What can become much larger than its operands (``*``, ``**``, ``%``, ``join``, ``indent`` ...) is refused before
  it is computed.
- Whatever is made is charged with its bytes, and weighed with all that it holds.

Operators and filters are intercepted, so jinja2 cannot compute them while it compiles.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Undefined, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from ortlm.runtime.text.template_budget import (
    BUDGET,
    CONTAINERS,
    MOST_BITS,
    SECONDS,
    Budget,
    Counted,
    TemplateLimit,
    spending,
)
from ortlm.runtime.text.template_checks import FILTERS, LISTED, METHODS, Check, ask, check_percent, size_of

# The longest templates in use have some 5,000.
_TOKENS = 50_000
# Characters of a date's format.
_DATE = 1000
_NUMBERS = re.compile(r"\d+")


class _Fields:
    """Charges what ``str.format`` puts together, field by field."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        budget = BUDGET.get()
        budget.step()
        for digits in _NUMBERS.findall(format_spec):
            budget.room(4 * int(digits) if len(digits) < 10 else sys.maxsize)
        budget.room(budget.weigh(value))
        return budget.charge(super().format_field(value, format_spec))  # type: ignore[misc]

    def convert_field(self, value: Any, conversion: Any) -> Any:
        budget = BUDGET.get()
        budget.room(budget.weigh(value))
        return budget.charge(super().convert_field(value, conversion))  # type: ignore[misc]


class _Formatter(_Fields, SandboxedFormatter):
    pass


class _EscapeFormatter(_Fields, SandboxedEscapeFormatter):
    pass


# --- names that templates use ---------------------------------------------------------------------------------


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which models have never seen.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(message if isinstance(message, str) else repr(message))


def _strftime_now(form: str) -> str:
    if isinstance(form, str) and len(form) > _DATE:
        raise TemplateLimit(f"it has a date's format of {len(form):,} characters, more than {_DATE:,}")
    return datetime.now().strftime(form)


def _lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:  # noqa: A002 - jinja2's names
    from jinja2.utils import generate_lorem_ipsum

    BUDGET.get().step(10 * abs(n) * (abs(max) + 1))
    return generate_lorem_ipsum(n, html, min, max)


class _Dict:
    """``dict(...)``, without what else the class offers."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """``namespace(...)``, which can be changed: nothing that it holds is shown or reached through it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        found = dict(*rest, **kwargs)
        for name in found:
            _check_name(name)
        Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        # It may hold itself, or others many times over.
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace cannot hold {name!r}: it begins with an underscore"
        )


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is only a block."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 wants a class attribute

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        # Compiling cannot be stopped, and takes time and memory for every token.
        for number, token in enumerate(stream):
            if number >= _TOKENS:
                raise TemplateLimit(f"it has more than {_TOKENS:,} tokens")
            yield token

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


# --- the environment ------------------------------------------------------------------------------------------

# Names with a space, which no template can write.
_LOOP, _MADE, _CONCAT, _SLICE, _STEP = " loop", " made", " concat", " slice", " step"


class _Intercept(NodeTransformer):
    """Puts a filter of ours where jinja2's sandbox offers no hook."""

    def _through(self, name: str, node: Any, *args: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2's names
        self.generic_visit(node)
        node.iter = self._through(_LOOP, node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._through(_CONCAT, node.nodes[0], *node.nodes[1:])

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = self._through(_STEP, node.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        none = nodes.Const(None, lineno=node.lineno)
        ends = (node.arg.start, node.arg.stop, node.arg.step)
        return self._through(_SLICE, node.node, *(none if end is None else end for end in ends))

    def _made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node
        return self._through(_MADE, node)

    visit_List = visit_Tuple = visit_Dict = _made  # noqa: N815


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """jinja2 as transformers sets it up for chat templates, with a budget for each rendering."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    intercepted_unops = frozenset(("+", "-"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_shown,
            # Constants are computed when a template runs, which has a budget, not when it is compiled.
            optimized=False,
        )
        self.concat = _concat  # type: ignore[method-assign]
        self.filters["tojson"] = _tojson
        for name, function in list(self.filters.items()):
            self.filters[name] = _budgeted(function, FILTERS.get(name), listed=name in LISTED)
        for name in ("in", "eq", "equalto", "==", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">",
                     "greaterthan", "ge", ">="):  # fmt: skip
            if name in self.tests:
                self.tests[name] = _budgeted_test(self.tests[name])
        self.filters |= {
            _LOOP: _looped,
            _MADE: _made,
            _CONCAT: _concat_values,
            _SLICE: _sliced,
            _STEP: _stepped,
        }
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
            "lipsum": _lipsum,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        found: nodes.Template = _Intercept().visit(super()._parse(source, name, filename))
        return found

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute ``left operator right`` within the budget."""
        budget = BUDGET.get()
        budget.step()
        if isinstance(left, int) and isinstance(right, int):
            if operator == "*" and left.bit_length() + right.bit_length() > MOST_BITS:
                raise TemplateLimit(f"it makes a number of more than {MOST_BITS} bits")
            if (
                operator == "**"
                and right > 0
                and left.bit_length() * right > MOST_BITS
                and left not in (0, 1, -1)
            ):
                raise TemplateLimit(f"it makes a number of more than {MOST_BITS} bits")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, (str, bytes, list, tuple)):
                    budget.room(
                        (size_of(value) if isinstance(value, (str, bytes)) else budget.weigh(value)) * times
                    )
        elif operator == "%" and isinstance(left, (str, bytes)):
            check_percent(budget, left, right)
        elif operator == "+" and isinstance(left, (str, bytes, list, tuple)):
            budget.room(budget.weigh(left) + budget.weigh(right))
        return budget.charge(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call ``__obj`` within the budget."""
        budget = BUDGET.get()
        budget.step()
        if isinstance(__obj, LoopContext):
            args = tuple(_looped(__context, value) for value in args[:1]) + args[1:]
        elif isinstance(__obj, (BuiltinMethodType, MethodType)):
            owner, name = __obj.__self__, __obj.__name__
            if isinstance(owner, (str, bytes)):
                budget.step(len(owner) >> 8)
                if name == "join":
                    args = tuple(budget.listed(value) for value in args)
            if isinstance(owner, (str, bytes, int)) and name in METHODS:
                named = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}
                ask(METHODS[name], budget, owner, *args, **named)
        for value in args:
            budget.room(budget.weigh(value))
        for name, value in kwargs.items():
            if name not in ("_loop_vars", "_block_vars"):
                budget.room(budget.weigh(value))
        with budget.deeper():
            return budget.charge(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return what stands for the method ``str.format`` or ``str.format_map``, None for anything else."""
        if super().wrap_str_format(value) is None:
            return None
        form, mapped = value.__self__, value.__name__ == "format_map"
        formatter = (
            _EscapeFormatter(self, escape=form.escape) if isinstance(form, Markup) else _Formatter(self)
        )

        def formatted(*args: Any, **kwargs: Any) -> str:
            if mapped and (kwargs or len(args) != 1):
                raise TypeError("format_map() takes exactly one argument, which is no keyword")
            values, named = ((), args[0]) if mapped else (args, kwargs)
            found: str = type(form)(formatter.vformat(form, values, named))
            return found

        return formatted


def _budgeted(function: Callable[..., Any], check: Check | None, *, listed: bool) -> Callable[..., Any]:
    """Return the filter ``function``, with a price."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    def run(context: Context, *args: Any, **kwargs: Any) -> Any:
        budget = BUDGET.get()
        value = args[0] if args else None
        if isinstance(value, (str, bytes)):
            budget.step(1 + (len(value) >> 8))
        elif isinstance(value, (*CONTAINERS, range)):
            budget.step(1 + len(value))
        else:
            budget.step()
        if listed and args:
            args = (budget.listed(value), *args[1:])
        if check is not None:
            ask(check, budget, *args, **kwargs)
        else:
            budget.weigh(value)
        if wants == "context":
            found = function(context, *args, **kwargs)
        elif wants == "eval_context":
            found = function(context.eval_ctx, *args, **kwargs)
        elif wants == "environment":
            found = function(context.environment, *args, **kwargs)
        else:
            found = function(*args, **kwargs)
        return found if found is value else budget.charge(found)

    return run


def _budgeted_test(function: Any) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        BUDGET.get().step()
        return function(*args)

    return run


def _concat(pieces: Iterable[str]) -> str:
    return BUDGET.get().concat(pieces)


@pass_context
def _shown(context: Context, value: Any) -> Any:
    budget = BUDGET.get()
    budget.step()
    if not isinstance(value, str):
        budget.room(budget.weigh(value))
    return value


@pass_context
def _looped(context: Context, value: Any) -> Any:
    budget = BUDGET.get()
    budget.step()
    if isinstance(value, Undefined) or not hasattr(value, "__iter__"):
        return value
    return Counted(value, budget)


@pass_context
def _made(context: Context, value: Any) -> Any:
    return BUDGET.get().charge(value)


@pass_context
def _stepped(context: Context, value: Any) -> Any:
    BUDGET.get().step()
    return value


@pass_context
def _concat_values(context: Context, *values: Any) -> str:
    budget = BUDGET.get()
    budget.step()
    budget.room(sum(budget.weigh(value) for value in values))
    found = markup_join(values) if context.eval_ctx.autoescape else str_join(values)
    return str(budget.charge(found)) if not isinstance(found, Markup) else budget.charge(found)


@pass_context
def _sliced(context: Context, value: Any, start: Any, stop: Any, step: Any) -> Any:
    budget = BUDGET.get()
    budget.step()
    return budget.charge(value[start:stop:step])


def render(template: jinja2.Template, names: Mapping[str, Any], seconds: float = SECONDS) -> str:
    """Return what ``template`` makes of ``names``. Raises whatever Python knows, TemplateLimit among it."""
    budget = Budget(names.values(), seconds)
    with spending(budget):
        return template.render(names)
