"""The page: blocks (lib/blocks.py) as HTML, one file, nothing from the network, all text escaped.

It decides nothing: what is claimed, and in which words, stands with the section that measured it.
"""
import html
import math
import re
import string
from pathlib import Path

from lib.blocks import Answers, Card, Table, Text, Tokens, number
from lib.files import write_text

TEMPLATE = Path(__file__).with_name("page.html")


class Html(str):
    """Text that is HTML already; all other text is escaped."""


def esc(x):
    return x if isinstance(x, Html) else Html(html.escape(str(x), quote=True))


def join(parts, between=""):
    return Html(between.join(map(esc, parts)))


def tag(name, *inside, **attributes):
    """<name ...>inside</name>; attributes may end in _, as in class_; None leaves one out."""
    given = ""
    for key, value in attributes.items():
        if value is not None:
            given += f' {key.rstrip("_")}="{esc(value)}"'
    return Html(f"<{name}{given}>{join(inside)}</{name}>")


def rich(text):
    """Plain text, with `code` between backticks."""
    return Html(re.sub(r"`([^`]*)`", r"<code>\1</code>", esc(text)))


def chip(word):
    """A label of features, or a mark of an answer; page.html has the colours."""
    return tag("span", word, class_=f"chip {word}") if word else ""


def visible(text):
    """Text as one reads it: newlines, tabs and control characters become signs."""
    text = text.replace("\n", "⏎\n").replace("\t", "⇥").replace("▁", " ")
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


# ---- tables ----

def table(block):
    """In a frame that scrolls; intervals are dimmed; pictures of the rows come second."""
    rows = [[tag("th", head, scope="col") for head in block.head]]
    for first, *rest in block.rows:
        cells = [tag("th", first, scope="row")]
        for text in rest:
            dimmed = re.sub(r"(\[.*\])", r'<span class="ci">\1</span>', esc(text))
            cells.append(tag("td", Html(dimmed)))
        rows.append(cells)
    if block.plots:
        rows[0].insert(1, tag("th", scope="col"))
        for cells, picture in zip(rows[1:], pictures(block.plots), strict=True):
            cells.insert(1, picture)
    head, *body = [tag("tr", *cells) for cells in rows]
    out = tag("table", tag("thead", head), tag("tbody", *body))
    note = tag("p", rich(block.note), class_="note") if block.note else ""
    return join([tag("div", out, class_="scroll", tabindex="0"), note])


def pictures(plots):
    """A cell for each row, all on one scale, from the smallest number to the largest."""
    drawn = [marks(plot) if plot else [] for plot in plots]
    ends = [end for row in drawn for _, *span in row for end in span]
    least = min(ends, default=0)
    scale = 100 / (max(ends, default=0) - least or 1)
    for plot, row in zip(plots, drawn):
        parts = []
        for kind, *span in row:
            left, right = (scale * (end - least) for end in sorted(span))
            where = f"left:{left:.1f}%;width:{right - left:.1f}%"
            parts.append(tag("i", class_=kind, style=where))
        group = plot["group"] if plot else ""
        yield tag("td", tag("div", *parts), class_=f"plot {group}")


def marks(plot):
    """A line from its start to a dot with an interval, over a control's band: (kind, from, to)."""
    x, control = plot["x"], plot.get("control") or {}
    start, at = plot.get("start", 0), x.get("value", x.get("mean"))
    end = "ring" if "start" in plot else "zero"
    found = [("band", control.get("low"), control.get("high")), ("from", start, at)]
    found += [("ci", x.get("low"), x.get("high")), ("dot", at, at), (end, start, start)]
    return [mark for mark in found if is_finite(mark[1]) and is_finite(mark[2])]


def is_finite(x):
    return x is not None and math.isfinite(x)


# ---- texts and cards ----

def shaded(block):
    """Tokens by strength, in shares of the most: a background, and of features a line below."""
    out = []
    for word, fires, pushed in block.tokens:
        f, v = fires / (block.most[0] or 1), pushed / (block.most[1] or 1)
        word = visible(word)
        if max(f, abs(v)) >= .02:
            side = "up" if v > 0 else "down"
            shade = f"--f:{f:.2f};--v:{abs(v):.2f}"
            says = f"activation {number(fires)}; steering {number(pushed, '+.3f')}"
            if block.kind == "nats":
                says = f"{number(pushed, '+.4f')} nats"
            word = tag("i", word, class_=side, style=shade, title=says)
        out.append(word)
    return tag("div", *out, class_=f"tokens {block.kind}")


def answers(block):
    """A prompt, and its answers side by side."""
    sides = []
    for title, answer, marks in block.columns:
        chips = join(map(chip, marks), " ")
        head = tag("h4", title, " ", chips)
        said = shaded(answer) if isinstance(answer, Tokens) else tag("p", answer, class_="answer")
        sides.append(tag("div", head, said))
    prompt, says = tag("p", block.prompt, class_="prompt"), tag("small", block.says)
    both = tag("div", *sides, class_="two")
    return tag("div", prompt, says, both, class_="pair")


def text(block):
    if block.kind == "heading":
        return tag("h3", block.text)
    role = "alert" if block.kind == "alarm" else None
    return tag("p", rich(block.text), class_=block.kind or None, role=role)


def card(block):
    amount = tag("span", block.amount, class_="nats")
    what = tag("div", block.says, class_="what")
    name = tag("strong", block.title)
    head = tag("summary", amount, name, " ", chip(block.group), what)
    return tag("details", head, render(block.blocks), class_="card")


KINDS = {Table: table, Tokens: shaded, Answers: answers, Text: text}


def render(blocks):
    """Cards lie side by side, below all else."""
    cards = [card(block) for block in blocks if isinstance(block, Card)]
    others = [KINDS[type(block)](block) for block in blocks if not isinstance(block, Card)]
    return join([*others, tag("div", *cards, class_="cards") if cards else ""])


# ---- the file ----

def write(path, about, verdict, sections):
    """Fills page.html. about: what the run is; verdict: the blocks above all sections; sections: (name,
    title, question, blocks), blocks None: not computed. -> path"""
    made_of = {"command": about["command"], "held-out pairs": about["held_out"], **about["config"]}
    made = ("made", "How this was made", "", [Table(["", ""], list(made_of.items()))])
    shown, contents = [], []
    for n, section in enumerate([*sections, made], 1):
        name, title, question, blocks = section
        if blocks is None:
            hint = f"Not computed for this report: `{about['command']} --only {name}` adds it."
            blocks = [Text(hint, "missing")]
        head = tag("h2", tag("b", n), title, id=name)
        shown += [head, tag("p", rich(question)), render(blocks)]
        contents.append(tag("a", f"{n} {title}", href=f"#{name}"))
    over = (f"Trained with {about['objective']} on {about['pairs']}. Model {about['model']}; steered "
            f"layer: {about['layer']}.")
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    write_text(path, template.substitute({
        "name": esc(about["run"]), "over": esc(over), "verdict": render(verdict),
        "contents": join(contents, " "), "sections": join(shown, "\n"),
    }))
    return path
