"""The page: blocks (lib/blocks.py) as HTML and SVG, one file, nothing from the network, all escaped.

It decides nothing: what is claimed, and in which words, stands with the section that measured it.
matplotlib draws the figures if it is there; where it is not, their numbers stand open.
"""
import html
import io
import math
import re
import string
import warnings
from pathlib import Path

from lib.blocks import Answers, Card, Curves, Dots, Figures, Forest, Table, Text, Tokens, number
from lib.files import write_text

TEMPLATE = Path(__file__).with_name("page.html")
# Drawn in these colours, shown in those of the style sheet: light or dark.
COLORS = {
    "style": "#b4552d", "alignment": "#2f6f4f", "both": "#7a5a9e", "base": "#868d96", "ink": "#20262e",
    "band": "#d3d7dc", "other": "#33557f", "dim": "#5b636e", "rule": "#dfe2e6",
}
LABELS = ("style", "alignment", "both", "neither", "not judged", "unlabelled")
UNLIKED = ("false", "invents", "complies", "malformed")               # marks of an answer that are red
BANDS = {"random": ("band", "random sets of the same size"),
         "usage": ("base", "random sets of the same usage"),
         "dealt": ("band", "labels dealt anew (control)")}
LINES = {"main": ("ink", "-"), "control": ("base", "--"), "other": ("other", "-")}
LOOK = {
    "font.size": 9, "svg.fonttype": "none", "text.parse_math": False, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#dfe2e6", "grid.linewidth": .6,
    "text.color": "#20262e", "ytick.labelcolor": "#20262e", "xtick.labelcolor": "#5b636e",
    "axes.labelcolor": "#5b636e", "axes.edgecolor": "#868d96", "xtick.color": "#868d96",
    "ytick.color": "#868d96",
}


# ---- words ----

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
            given += f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
    return Html(f"<{name}{given}>{join(inside)}</{name}>")


def rich(text):
    """Plain text, with `code` between backticks."""
    return Html(re.sub(r"`([^`]*)`", r"<code>\1</code>", esc(text)))


def chip(word):
    """A label of features, or a mark of an answer."""
    kind = word if word in LABELS else "unliked" if word in UNLIKED else ""
    return tag("span", word, class_=f"chip {kind}") if word else ""


def visible(token, breaks=False):
    """A token as one reads it: newlines, tabs and control characters become signs."""
    signs = {"\n": "⏎\n" if breaks else "⏎", "\t": "⇥", "▁": " "}
    return "".join(signs.get(c) or (f"\\x{ord(c):02x}" if c < " " or c == "\x7f" else c) for c in token)


def cell(text):
    """A label's name becomes a chip; brackets and ± are dimmed."""
    if text in LABELS:
        return chip(text)
    return Html(re.sub(r"(\[[^\[\]]*\]|± \S+)", r'<span class="ci">\1</span>', esc(text)))


def table(block):
    """In a frame that scrolls; columns of long text may wrap; amounts shade the cells."""
    wraps = [any(len(str(x)) > 40 for x in column) for column in zip(*block.rows)]
    most = max([abs(x) for row in block.amounts or () for x in row if x and x == x] or [1])
    body = []
    for n, (first, *rest) in enumerate(block.rows):
        amounts = block.amounts[n] if block.amounts else [None] * len(rest)
        cells = []
        for text, amount, wrap in zip(rest, amounts, wraps[1:], strict=True):
            kind, shade = "text" if wrap else None, None
            if amount and math.isfinite(amount):
                kind, sign = "heat", "for" if amount > 0 else "against"
                shade = f"--c:var(--{sign});--a:{.55 * abs(amount) / most:.2f}"
            cells.append(tag("td", cell(text), class_=kind, style=shade))
        body.append(tag("tr", tag("th", cell(first), scope="row"), *cells))
    head = tag("thead", tag("tr", *(tag("th", h, scope="col") for h in block.head)))
    out = tag("div", tag("table", head, tag("tbody", *body)), class_="scroll", tabindex="0")
    return join([out, tag("p", rich(block.note), class_="note tablenote") if block.note else ""])


# ---- figures ----

def svg(name, paint, tall):
    """paint(axis) as SVG, tall inches high; "" where matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    with matplotlib.rc_context({**LOOK, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure, out = Figure(figsize=(4.3, tall), layout="constrained"), io.StringIO()
        paint(figure.add_subplot())
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    # a part of the page: no prolog, ids of its own (only those that are used), the page's colours
    text = out.getvalue()[out.getvalue().index("<svg"):].replace("xlink:href", "href")
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r'\s+id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)
    for color, value in COLORS.items():
        text = text.replace(value, f"var(--{color})")
    quotes = {ord('"'): "&quot;", ord("'"): "&#x27;"}       # matplotlib leaves them as they are
    return Html(re.sub(r">([^<]*)", lambda m: ">" + m[1].translate(quotes), text))


def known(x):
    """None, which stands for what is no finite number, as nan again."""
    return math.nan if x is None else x


def color(group):
    grey = group in LABELS[3:]
    return COLORS["base" if grey else group if group in COLORS else "other"]


def forest(axis, block):
    k = block.times
    for y, row in enumerate(block.rows):
        value, low, high = (k * known(row["x"][end]) for end in ("value", "low", "high"))
        c, bands, is_bar = color(row["group"]), row.get("bands", ()), row.get("bar")
        line, tall = (y - .2, .3) if bands else (y, .6)
        for n, band in enumerate(bands):
            start, end, mean = (k * known(band.get(x)) for x in ("low", "high", "mean"))
            below, grey = y + .06 + .2 * n, COLORS[BANDS[band["kind"]][0]]
            axis.barh(below, end - start, .16, start, color=grey, alpha=.95, lw=0)
            axis.plot([mean, mean], [below - .08, below + .08], color=COLORS["ink"], lw=1.2, alpha=.9)
        if is_bar:
            axis.barh(line, value, tall, color=c, alpha=.45, lw=0)
        if "start" in row:
            axis.plot([k * row["start"], value], [line, line], color=c, lw=2, alpha=.5)
            axis.plot(k * row["start"], line, "o", mfc="none", mec=c, ms=5.5)
        axis.plot([low, high], [line, line], color=c, lw=1.6)
        axis.plot(value, line, "o", color=c, ms=2.5 if is_bar else 5)
    axis.set_yticks(range(len(block.rows)), [row["name"] for row in block.rows])
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set(ylim=(len(block.rows) - .4, -.6), xlabel=block.xlabel)
    axis.grid(axis="x")
    if any("start" in row for row in block.rows):         # rates, from 0 to all
        axis.set_xlim(0, k)
    else:
        axis.axvline(0, color=COLORS["base"], lw=.9, zorder=.6)


def curves(axis, block):
    for line in block.lines:
        x, (name, dashes) = line["x"], LINES[line["kind"]]
        y, low, high = ([known(v) for v in line.get(key, ())] for key in ("y", "low", "high"))
        if low:
            axis.fill_between(x, low, high, color=COLORS["band"], lw=0)
        axis.plot(x, y, ("o" if len(x) < 15 else "") + dashes, color=COLORS[name], ms=4, lw=1.6)
    for way, value in block.marks:
        (axis.axvline if way == "x" else axis.axhline)(value, color=COLORS["base"], lw=1, ls=":")
    axes = ((block.logx, axis.set_xscale, axis.xaxis), (block.logy, axis.set_yscale, axis.yaxis))
    for logarithmic, scale, ruler in axes:
        if logarithmic:                                   # with plain numbers
            scale("log")
            ruler.set_major_formatter(lambda v, _: f"{v:,.10g}")
            ruler.set_minor_formatter(lambda v, _: "")
    if block.ticks:
        axis.set_xticks(list(block.ticks), list(block.ticks.values()))
        axis.minorticks_off()
    axis.set(xlabel=block.xlabel, ylabel=block.ylabel, ylim=block.ylim)
    axis.grid()


def dots(axis, block):
    xs, ys = ([known(p[key]) for p in block.points] for key in ("x", "y"))
    width, height = (1e-9 + max(v) - min(v) for v in (xs, ys))
    for n, p in enumerate(block.points):
        x, y, c = xs[n], ys[n], color(p["group"])
        axis.plot([x, x], [known(p["low"]), known(p["high"])], color=c, lw=1.4)
        axis.plot(x, y, "o", color=c, ms=5)
        # the name stands on the side where fewer other points lie; of two at one place, one on each
        near = [k for k, b in enumerate(ys) if abs(xs[k] - x) < width / 4 and abs(b - y) < height / 12]
        left = sum((xs[k], k) < (x, n) for k in near)
        side = -1 if left < len(near) - 1 - left else 1
        how = {"textcoords": "offset points", "fontsize": 7.5, "ha": "right" if side < 0 else "left"}
        axis.annotate(p["name"], (x, y), (5 * side, 3), color=COLORS["dim"], **how)
    axis.axhline(0, color=COLORS["base"], lw=.8, zorder=0)
    axis.set(xlabel=block.xlabel, ylabel=block.ylabel, xmargin=.14)


PANELS = {Forest: forest, Curves: curves, Dots: dots}


def legend(panels):
    """What the colours of these panels mean: (colour, shape) by words."""
    found = {}
    for panel in panels:
        rows, lines = getattr(panel, "rows", getattr(panel, "points", [])), getattr(panel, "lines", [])
        for row in rows:
            if "start" in row:
                found["base model"] = ("base", "ring")
            if row["group"] in LABELS[:3]:
                found[row["group"]] = (row["group"], None)
            found |= {BANDS[b["kind"]][1]: (BANDS[b["kind"]][0], "box") for b in row.get("bands", ())}
        found |= {x["name"]: (LINES[x["kind"]][0], "box") for x in lines if len(lines) > 1}
    keys = []
    for words, (name, shape) in found.items():
        keys.append(tag("span", tag("i", style=f"--c:var(--{name})", class_=shape), words))
    return tag("div", *keys, class_="key")


def figure(block, name):
    """Panels, with their numbers beside a single one, folded below several, open where nothing draws."""
    says = rich(" ".join(x.says for x in (block, *block.panels) if x.says))
    tables, boxes = join(map(table, block.tables)), []
    for n, panel in enumerate(block.panels):
        rows = getattr(panel, "rows", [])
        tall = .7 + sum(.28 + .2 * len(row.get("bands", ())) for row in rows) if rows else 2.8
        picture = svg(f"{name}-{n}", lambda axis, panel=panel: PANELS[type(panel)](axis, panel), tall)
        if not picture:
            return join([tag("p", says, class_="note"), tables])
        words = f"{panel.title}. {block.says or panel.says}"
        boxes.append(tag("div", tag("h4", panel.title), picture, role="img", aria_label=words))
    beside = [tag("div", tables)] if len(boxes) == 1 else []
    panels = tag("div", *boxes, *beside, class_="panels")
    folded = tag("details", tag("summary", "The numbers"), tables) if tables and not beside else ""
    return join([tag("figure", legend(block.panels), panels, tag("figcaption", says)), folded])


def shaded(block, breaks=False):
    """Tokens by strength, in shares of the largest: a background, and of features a line below."""
    is_feature, out = block.kind == "feature", []
    tokens = [(word, [known(a) for a in (x if is_feature else (0.0, x))]) for word, x in block.tokens]
    given = block.top if is_feature and block.top else (None, block.top)
    most = [top or max([abs(x[k]) for _, x in tokens] or [0]) or 1 for k, top in enumerate(given)]
    for word, amounts in tokens:
        shown = visible(word, breaks)
        fires, push = (x / top if math.isfinite(x) else 0.0 for x, top in zip(amounts, most))
        if max(fires, abs(push)) >= .02:
            kind, exact = "p" if push > 0 else "n", f"{number(amounts[1], '+.4f')} nats"
            if is_feature:
                kind = "u" if push > 0 else "d" if push < 0 else "f"
                exact = f"activation {number(amounts[0])}; steering {number(amounts[1], '+.3f')}"
            shade = f"--f:{fires:.2f};--v:{abs(push):.2f}"
            shown = tag("i", shown, class_=kind, style=shade, title=exact)
        out.append(shown)
    return tag("div", *out, class_="tokens")


def answers(block):
    """A prompt, and its answers side by side."""
    sides = []
    for title, answer, marks in block.columns:
        plain = tag("p", answer, class_="answer") if isinstance(answer, str) else shaded(answer, True)
        sides.append(tag("div", tag("h4", title, " ", join(map(chip, marks), " ")), plain))
    prompt = tag("p", visible(block.prompt, True).strip(), class_="prompt")
    return tag("div", prompt, tag("small", block.says), tag("div", *sides, class_="two"), class_="pair")


def card(block, name):
    head = [tag("span", block.amount, class_="nats"), tag("strong", block.title), " ", chip(block.group)]
    summary = tag("summary", *head, tag("div", block.says, class_="what"))
    lines = tag("dl", *(tag(t, visible(x)) for line in block.lines for t, x in zip(("dt", "dd"), line)))
    is_open = "open" if block.is_open else None
    return tag("details", summary, lines, render(block.blocks, name), class_="card", open=is_open)


# ---- the file ----

def render(blocks, name):
    """name: of the section, for ids of figures. Cards that follow each other lie side by side."""
    out, cards = [], []
    for n, block in enumerate([*blocks, None]):
        if isinstance(block, Card):
            cards.append(card(block, f"{name}-{n}"))
            continue
        if cards:
            out.append(tag("div", *cards, class_="cards"))
            cards = []
        if isinstance(block, (Figures, *PANELS)):
            figures = block if isinstance(block, Figures) else Figures([block], [])
            out.append(figure(figures, f"{name}-{n}"))
        elif isinstance(block, Text):
            kind, role = block.kind or None, "alert" if block.kind == "alarm" else None
            out.append(tag("h3" if kind == "heading" else "p", rich(block.text), class_=kind, role=role))
        elif isinstance(block, Tokens):
            out.append(join([tag("h4", block.title) if block.title else "", shaded(block)]))
        elif block is not None:
            out.append({Table: table, Answers: answers}[type(block)](block))
    return join(out)


def write(path, about, verdict, sections):
    """Fills page.html. about: what the run is; verdict: the blocks above all sections; sections: (name,
    title, question, blocks), blocks None: not computed. -> path"""
    facts = [(k.replace("_", " "), str(x)) for k, x in about.items() if isinstance(x, (str, int, float))]
    settings = [(k, str(x)) for k, x in about.get("config", {}).items()]
    made = [Card("This report", "", facts, [], is_open=True), Card("Its settings", "", settings, [])]
    shown, contents = [], []
    for n, section in enumerate([*sections, ("made", "How this was made", "", made)], 1):
        name, title, question, blocks = section
        hint = f"Not computed for this report: `{about['command']} --only {name}` adds it."
        inside = render([Text(hint, "missing")] if blocks is None else blocks, name)
        shown.append(join([tag("h2", tag("b", n), title, id=name), tag("p", rich(question)), inside]))
        contents.append(tag("a", f"{n} {title}", href=f"#{name}"))
    over = (f"Trained with {about['objective']} on {about['pairs']}. Model {about['model']}; steered "
            f"layer: {about['layer']}.")
    filled = {"name": esc(about["run"]), "over": esc(over), "verdict": render(verdict, "verdict")}
    filled |= {"contents": join(contents, " "), "sections": join(shown, "\n")}
    write_text(path, string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(filled))
    return path
