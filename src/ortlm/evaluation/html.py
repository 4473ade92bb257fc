"""The report as one page of HTML that needs nothing else: no script, no network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ortlm._utils.formatting import readable_bytes
from ortlm.evaluation import plots
from ortlm.evaluation.domains import COLUMNS, domain_table
from ortlm.evaluation.statistics import percentile_name

_NONE = "-"
# Of the largest differences, so many are seen at once.
_SHOWN = 6

_STYLE = """
:root { color-scheme: light dark; --page: #f5f7f9; --box: #fff; --text: #1e2733; --ink: #3d4654; --quiet: #566271;
  --line: #dfe4ea; --soft: #edf0f3; --fill: #3b76c4; --mark: #b4472f; --hit: #ffe7a3; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --box: #1d232a; --text: #e4e9ef; --ink: #c3ccd6;
  --quiet: #98a5b3; --line: #37404b; --soft: #2a323b; --fill: #6ea3e8; --mark: #f0916f; --hit: #6b5516; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 36px 0 8px; }
h3 { font-size: 1rem; margin: 16px 0 6px; }
p { margin: 6px 0; max-width: 76ch; }
.quiet { color: var(--quiet); font-size: .92rem; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 18px 0; }
.figure, .box { background: var(--box); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.figure b { display: block; font-size: 1.3rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.figure span { color: var(--quiet); font-size: .85rem; }
.box > :first-child { margin-top: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 12px;
  align-items: start; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 12px;
  align-items: start; }
.wide { overflow-x: auto; }
.tall { overflow-y: auto; max-height: 330px; }
.narrow { max-width: 640px; }
svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { padding: 3px 6px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--soft); }
tr:last-child > td { border-bottom: 0; }
th { font-weight: 600; color: var(--ink); vertical-align: bottom; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.n { white-space: nowrap; }
code, .tokens { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .85rem; }
.context { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--page); border-radius: 6px;
  padding: 6px 8px; margin: 6px 0; }
mark { background: var(--hit); color: inherit; border-radius: 3px; padding: 0 2px; }
details { margin: 8px 0; } summary { cursor: pointer; } details > .plots, details > .box { margin-top: 8px; }
.hash { overflow-wrap: anywhere; min-width: 20ch; }
@media (max-width: 480px) { table { font-size: .8rem; } th, td { padding: 3px 4px; } .box { padding: 8px; } }
"""


def page(data: Mapping[str, Any]) -> str:
    """Return the whole page for a report's ``data``."""
    title = f"{data['artifact']['name']} against {data['reference']['name']}"
    body = [
        _head(data),
        _distribution(data),
        _statistics(data),
        _domains(data),
        _layers(data.get("layers")),
        _speed(data.get("speed")),
        _drift(data.get("drift")),
        _worst(data["worst"]),
        _origin(data),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(data: Mapping[str, Any]) -> str:
    made, base, text, statistics = data["artifact"], data["reference"], data["text"], data["statistics"]
    built = ", ".join(str(made[key]) for key in ("precision", "target", "recipe") if made.get(key))
    percent = statistics["kld_percentiles"]
    figures = [
        ("mean KL divergence (nats)", _value(statistics["kld"], 5), f"± {_error(statistics['kld'], 5)}"),
        ("median KL divergence", f"{percent['median']:.5f}", f"p99: {percent['p99']:.4f}"),
        (
            "top-1 agreement",
            f"{statistics['same_top']['value']:.2f} %",
            f"± {_error(statistics['same_top'], 2)}",
        ),
        ("perplexity ratio", _value(statistics["ppl_ratio"], 4), f"± {_error(statistics['ppl_ratio'], 4)}"),
        ("RMS Δp", f"{_value(statistics['delta_p_rms'], 2)} %", f"± {_error(statistics['delta_p_rms'], 2)}"),
        ("size", readable_bytes(made["bytes"]), _size_next_to(made, base)),
    ]
    cards = "".join(
        f'<div class="figure"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(more)}</span></div>'
        for name, value, more in figures
    )
    return (
        f"<h1>{escape(made['name'])} against {escape(base['name'])}</h1>"
        + (f'<p class="quiet">{escape(built)}</p>' if built else "")
        + f"<p>{text['scored_tokens']:,} tokens of {escape(text['name'])} were scored, in {text['chunks']} "
        f"chunks of {text['chunk_tokens']}. The reference is {_a_kind(base['kind'])}.</p>"
        f'<div class="figures">{cards}</div>'
    )


def _distribution(data: Mapping[str, Any]) -> str:
    figures = data["statistics"]
    percent = figures["kld_percentiles"]
    marks = {"mean": figures["kld"]["value"], "median": percent["median"]}
    names = {"maximum": "max", "minimum": "min", "median": "50"}
    points = [(names.get(key, key.removeprefix("p")), value) for key, value in reversed(percent.items())]
    drawn = [
        plots.histogram(data["histogram"], marks),
        plots.curve(
            points,
            title="Percentiles of KL divergence",
            x_label="percentile of tokens",
            y_label="KL divergence (nats)",
        ),
    ]
    if len(data["frontier"]) > 1:
        drawn.append(plots.frontier(data["frontier"]))
    return (
        "<h2>KL divergence</h2><p class='quiet'>Of the artifact's next-token distribution from the reference's: 0 "
        "where both are the same.</p>"
        f'<div class="plots">{"".join(_box(drawing) for drawing in drawn)}</div>'
    )


def _statistics(data: Mapping[str, Any]) -> str:
    figures = data["statistics"]
    perplexity = [
        ("Mean PPL(Q)", figures["ppl"]),
        ("Mean PPL(base)", figures["base_ppl"]),
        ("Cor(ln(PPL(Q)), ln(PPL(base)))", figures["correlation"]),
        ("Mean ln(PPL(Q)/PPL(base))", figures["ln_ppl_ratio"]),
        ("Mean PPL(Q)/PPL(base)", figures["ppl_ratio"]),
        ("Mean PPL(Q)-PPL(base)", figures["ppl_difference"]),
    ]
    kld = [("Mean KLD", figures["kld"]), *_percentiles(figures["kld_percentiles"], "KLD")]
    delta = [
        ("Mean Δp", figures["delta_p"]),
        *_percentiles(figures["delta_p_percentiles"], "Δp"),
        ("RMS Δp", figures["delta_p_rms"]),
        ("Same top p", figures["same_top"]),
    ]
    tables = [
        ("Perplexity", _figures(perplexity, 4)),
        ("KL divergence (nats)", _figures(kld, 6)),
        ("Token probability (%)", _figures(delta, 3)),
    ]
    boxes = "".join(_box(f"<h3>{escape(title)}</h3>{table}") for title, table in tables)
    return (
        "<h2>Statistics</h2><p class='quiet'>± is one standard error; both models process the same tokens, which "
        "the errors of ratios and differences take into account. Δp is the change in the probability of the "
        f"actual next token, Same top p the top-1 agreement.</p><div class='grid'>{boxes}</div>"
    )


def _domains(data: Mapping[str, Any]) -> str:
    rows = domain_table(data)
    return f"<h2>By domain</h2>{_box(_table(COLUMNS, rows))}" if rows else ""


def _layers(layers: Mapping[str, Any] | None) -> str:
    if layers is None:
        return ""
    snr = layers["snr"]
    names = [*(str(i) for i in range(len(snr) - 1)), "head"]
    drawing = plots.bars(
        snr,
        names,
        title="Signal-to-noise ratio by layer",
        x_label="layer",
        y_label="signal-to-noise ratio (dB)",
    )
    rows = [
        (name, "no difference" if value is None else f"{value:.2f}")
        for name, value in zip(names, snr, strict=True)
    ]
    table = _table(["input of layer", "dB"], rows)
    return (
        "<h2>Error by layer</h2><p class='quiet'>10 log₁₀(Σ ref² / Σ (ref - q)²) of the normalized hidden states "
        f"that go into each layer's attention, and into the head, on the first {layers['chunks']} chunks. Each "
        "accumulates the error of all layers before it; 6 dB less is an error twice as large.</p>"
        f"<div class='plots'>{_box(drawing)}<div class='box tall'>{table}</div></div>"
    )


def _speed(speed: Mapping[str, Any] | None) -> str:
    if speed is None:
        return ""
    measured = [("artifact", speed["artifact"]), ("reference", speed.get("reference"))]
    columns = [(name, entry) for name, entry in measured if entry]

    def row(name: str, show: Callable[[Mapping[str, Any]], str]) -> tuple[str, ...]:
        return (name, *(show(entry) for _, entry in columns))

    rows = [
        row("prefill, tokens/s", lambda f: f"{f['prefill_tokens_per_second']:,.1f}"),
        row("first token, ms", lambda f: f"{1e3 * f['first_token_seconds']:,.1f}"),
        row("decode, tokens/s", lambda f: f"{f['decode_tokens_per_second']:,.1f}"),
        row("load, s", lambda f: f"{f['load_seconds']:.2f}"),
        row("resident memory", lambda f: _bytes(f["resident_bytes"])),
        row("peak memory", lambda f: _bytes(f["peak_bytes"])),
        row("threads", lambda f: str(f["threads"])),
    ]
    table = _table(["", *(name for name, _ in columns)], rows)
    how = escape(speed["artifact"]["how"])
    return f"<h2>Speed and memory</h2>{_box(table, 'narrow')}<p class='quiet'>{how}</p>"


def _drift(drift: Mapping[str, Any] | None) -> str:
    if drift is None:
        return ""
    rows = []
    for name, change in [*drift["categories"].items(), ("all", drift["all"])]:
        parted = change["first_divergent_token"]
        rows.append(
            (
                name,
                str(change["prompts"]),
                str(change["same_answer"]),
                f"{100 * change['agreement']:.1f}",
                f"{100 * change['self_agreement']:.1f}",
                "" if parted is None else str(parted),
                f"{100 * change['same_prefix_share']:.0f}",
                f"{change['opening_ln_ratio']:.3f}",
                f"{100 * change['repetition']:.0f} / {100 * change['base_repetition']:.0f}",
                _counts(change["refusal"]),
                _counts(change.get("valid")),
                _counts(change.get("language")),
            )
        )
    titles = [
        "prompts", "number", "same answer", "agreement, %", "self-agreement, %", "first divergent token, median",
        "shared prefix, %", "first tokens, |ln ratio|", "repetition, % (ref.)", "refusals", "format kept",
        "language kept",
    ]  # fmt: skip
    table = _table(titles, rows)
    answers = "".join(_answer(answer) for answer in drift["answers"])
    left = f" {drift['left_out']} prompts do not fit into the context." if drift.get("left_out") else ""
    return (
        f"<h2>Drift</h2><p class='quiet'>{escape(drift['about'])}{left}</p>{_box(table)}"
        "<p class='quiet'>Counts: both / artifact only / reference only / neither.</p>"
        f"<details><summary>All answers</summary>{answers}</details>"
    )


def _answer(answer: Mapping[str, Any]) -> str:
    at = answer["first_divergent_token"]
    where = "the same answer" if at is None else f"diverges at token {at}"
    rest = "" if answer["base_complete"] else " (beginning)"
    return _box(
        f"<p><b>{escape(answer['category'])}</b>: {escape(answer['prompt'])} "
        f"<span class='quiet'>{where}</span></p>"
        f"<div class='context tokens'>{escape(answer['answer'])}</div>"
        + (
            ""
            if at is None
            else f"<p class='quiet'>The reference{rest}:</p>"
            f"<div class='context tokens'>{escape(answer['base_answer'])}</div>"
        )
    )


def _worst(places: Sequence[Mapping[str, Any]]) -> str:
    boxes = []
    for place in places:
        tops = "".join(
            f"<div><h3>{name}</h3>"
            + _table(
                ["token", "%"],
                [(_visible(top["token"]), f"{100 * top['p']:.2f}") for top in place[key]],
                code=True,
            )
            + "</div>"
            for name, key in (("Reference, top 5", "base_top"), ("Artifact, top 5", "top"))
        )
        boxes.append(
            _box(
                f"<p><b>{place['rank']}.</b> KL divergence {place['kld']:.4f}, Δp {place['delta_p']:+.2f} % "
                f"<span class='quiet'>{escape(place['kind'])}, chunk {place['chunk']}, position "
                f"{place['position']}</span></p><div class='context tokens'>{escape(place['context'])}"
                f"<mark>{escape(_visible(place['next']))}</mark></div><div class='pair'>{tops}</div>"
            )
        )
    first, more = boxes[:_SHOWN], boxes[_SHOWN:]
    rest = f"<details><summary>{len(more)} more</summary><div class='plots'>{''.join(more)}</div></details>"
    return (
        "<h2>Largest differences</h2><p class='quiet'>The end of the context, with the actual next token "
        "marked.</p>"
        f"<div class='plots'>{''.join(first)}</div>{rest if more else ''}"
    )


def _origin(data: Mapping[str, Any]) -> str:
    environment = [(str(key), str(value)) for key, value in data["environment"].items() if value is not None]
    text = data["text"]
    files = [
        (f"{what}: {name}", readable_bytes(entry["bytes"]), entry["sha256"])
        for what in ("artifact", "reference")
        for name, entry in data[what].get("files", {}).items()
    ]
    hashes = "".join(
        f"<tr><td>{escape(name)}</td><td class='n'>{size}</td><td class='tokens hash'>{sha}</td></tr>"
        for name, size, sha in [*files, (f"text: {text['name']}", "", text["sha256"])]
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in [text["how"], *data["notes"]])
    return (
        f"<h2>How it was measured</h2>{notes}<p class='quiet'>{escape(data['created'])}</p>"
        + _box(_table(["", ""], environment, right=False), "narrow")
        + "<h3>Files</h3>"
        + _box(f"<table><tr><th>file</th><th class='n'>size</th><th>SHA-256</th></tr>{hashes}</table>")
    )


# --- pieces -------------------------------------------------------------------------------------------------


def _box(inner: str, more: str = "") -> str:
    return f'<div class="{f"box wide {more}".strip()}">{inner}</div>'


def _table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], *, code: bool = False, right: bool = True
) -> str:
    """Return a table whose first column is text, and whose others are numbers if ``right``."""
    number = ' class="n"' if right else ""
    first = ' class="tokens"' if code else ""
    head = "".join(f"<th{number if i else ''}>{escape(title)}</th>" for i, title in enumerate(titles))
    body = "".join(
        "<tr>"
        + "".join(f"<td{number if i else first}>{escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table>{f'<tr>{head}</tr>' if any(titles) else ''}{body}</table>"


def _figures(rows: Sequence[tuple[str, Mapping[str, Any] | float | None]], digits: int) -> str:
    """Return a table of figures: value and standard error, or a value alone."""
    out = []
    for name, figure in rows:
        if isinstance(figure, Mapping):
            out.append((name, _value(figure, digits), f"± {_error(figure, digits)}"))
        else:
            out.append((name, _NONE if figure is None else f"{figure:.{digits}f}", ""))
    return _table(["", "", ""], out)


def _percentiles(levels: Mapping[str, float], what: str) -> list[tuple[str, float]]:
    return [(f"{percentile_name(key)} {what}", value) for key, value in levels.items()]


def _value(figure: Mapping[str, Any], digits: int) -> str:
    return _number(figure["value"], figure["value"], digits)


def _error(figure: Mapping[str, Any], digits: int) -> str:
    """Return a standard error with as many digits as its value has."""
    return _number(figure["standard_error"], figure["value"], digits)


def _number(number: float | None, alongside: float | None, digits: int) -> str:
    if number is None:
        return _NONE
    large = abs(alongside or 0.0)
    return f"{number:,.{1 if large >= 1000 else min(digits, 3) if large >= 10 else digits}f}"


def _counts(counts: Mapping[str, int] | None) -> str:
    if counts is None:
        return ""
    return " / ".join(str(counts[key]) for key in ("both", "model_only", "base_only", "neither"))


def _visible(token: str) -> str:
    """Return a token's text so that spaces and line ends are visible."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥") or "(nothing)"


def _bytes(count: int | None) -> str:
    return _NONE if count is None else readable_bytes(count)


def _size_next_to(made: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    if base.get("bytes"):
        return f"{made['bytes'] / base['bytes']:.0%} of the reference"
    bits = made.get("bits_per_weight")
    return f"{bits:.2f} bits per weight" if isinstance(bits, float) else ""


def _a_kind(kind: str) -> str:
    return "another artifact" if kind == "artifact" else "the checkpoint, computed in fp32"
