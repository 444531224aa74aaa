"""The page and its blocks: nothing breaks on what is missing, all text is escaped, it fits on any screen."""
import re
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser

import pytest

from common import mutant
from instruments import page
from lib.blocks import (Answers, Card, Curves, Dots, Figures, Forest, Table, Text, Tokens, as_text, interval, number,
                        percent)

NAN = float("nan")
EVIL = """</style><script>alert("x")</script><img src=x onerror='y'>"&amp;$name`<b>`"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
ABOUT = {"run": "style-1", "objective": "SimPO", "pairs": "tiny/pairs/style", "model": "tiny/model", "layer": 3,
         "command": "python analyze.py runs/style-1", "machine": "x86", "config": {"seed": 0, "mask": None}}


def value(x, wide=.1):
    return {"value": x, "low": x - wide, "high": x + wide, "se": wide / 2}


def row(name, group, x, **more):
    return {"name": name, "group": group, "x": value(x), **more}


def figures():
    """Every kind of panel, with every option that changes what is drawn."""
    bands = [{"low": .1, "high": .3, "mean": .2, "kind": "random"}]
    bands.append({"low": .1, "high": .4, "mean": NAN, "kind": "usage"})
    rows = [row("style\n(20)", "style", .8, bands=bands), row("both", "both", .9, bands=bands)]
    masked = Forest("Lost", rows, "share of the gain, %")
    rows = [row("heading (+2.5)", "style", .7, start=.3), row("truth", "alignment", .5, start=.5)]
    rates = Forest("Rates", rows, "share of answers, %")
    bars = Forest("Gain", [row("value", "other", -.2, bar=True)], "nats", times=1)
    points = []
    for name, x, y in (("heading", 2.5, 40.0), ("bold", 2.4, 39.0), ("opener", 1.0, 20.0)):
        points.append({"name": name, "group": "style", "x": x, "y": y, "low": y - 1, "high": y + 1})
    dots = Dots("Planted", points, "weight", "points")
    line = {"name": "its own", "kind": "main", "x": [1, 2, 4], "y": [5.0, 4.0, 4.5]}
    line |= {"low": [4, 3, 4], "high": [6, 5, 5]}
    control = {"name": "the SAE’s own", "kind": "control", "x": [1, 2, 4], "y": [5.0, NAN, 4.5]}
    marks = [("y", 4), ("x", 2)]
    curves = Curves("Loss", [line, control], "k", "loss", logx=True, ticks={1: "1", 4: "all"}, marks=marks)
    plain = Curves("Text", [{**line, "kind": "other"}], "strength", "perplexity", logy=True, ylim=(1, 10))
    return masked, rates, bars, dots, curves, plain


def made_up():
    """Sections that hold every kind of block."""
    masked, rates, bars, dots, curves, plain = figures()
    rows = [["style", interval(value(.2)), "x" * 60], ["nothing", "± 0.1", "12.5%"]]
    table = Table(["set", "gain", "what"], rows, "A `note`.", True)
    heat = Table(["tokens", "style", "neither"], [["truth", "+0.1", "−0.2"]], amounts=[[.1, -.2]])
    tokens = [(" a", 0.0), ("Sure", -.2), ("\n", .1), ("\x03", NAN)]
    both = [(t, (abs(x), x)) for t, x in tokens]
    columns = [("chosen", Tokens("", tokens), ["true", "well-formed"]), ("base", "an answer", ["malformed"])]
    texts = [Tokens("Steered most", both, "feature", (2, 2)), table]
    cards = []
    for group in ("style", "alignment", "both", "neither", "not judged", ""):
        cards.append(Card("17", group, [("usage", "1% of\tall")], texts, "about", "+0.02 nats", group == "style"))
    said = [Text("Said in words."), Figures([rates, dots], [table], "How often.")]
    closer = [Text("Ten pairs", "heading"), Answers("Where?", columns, "gain +1"), Text("see", "note"), *cards]
    closer += [Tokens("Fires most", both, "feature"), Text("none", "missing")]
    lost = [Figures([masked, curves, plain], [table]), bars, heat]
    return [("behaviour", "Behaviour", "What do the answers do? The `control` is the base model.", said),
            ("masking", "Masking", "What is lost?", lost), ("cards", "Cards", "Single tokens?", closer),
            ("usage", "Usage", "How many?", None)]


VERDICT = [Text("First.", "verdict"), Text("Second.", "verdict"), Text("No alarm: sound.", "sound")]


def written(path, module=page, about=ABOUT, verdict=VERDICT, sections=None):
    assert module.write(path / "report.html", about, verdict, sections or made_up()) == path / "report.html"
    return (path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page with everything, drawn once."""
    folder = tmp_path_factory.mktemp("whole")
    text = written(folder)
    assert [f.name for f in folder.iterdir()] == ["report.html"]
    return text


@pytest.fixture
def undrawn(monkeypatch):
    """As where matplotlib is not installed, which also is faster."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


class Elements(HTMLParser):
    """All elements of a page, and whether each is closed by its own."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


# ---- what stands on the page ----

def test_every_section_is_there(tmp_path, whole):
    said = Elements(whole).text
    for n, (name, title, question, _) in enumerate(made_up(), 1):
        assert re.search(rf'<h2 id="{name}"><b>{n}</b>{title}</h2>', whole) and question.replace("`", "") in said
    assert "Not computed for this report: python analyze.py runs/style-1 --only usage adds it." in said
    for must in ("Second.", "No alarm", "heading (+2.5)", "0.200 [0.100, 0.300]", "A note.", "⏎", "⇥", "\\x03", "x86"):
        assert must in said, must
    assert "$" not in said
    assert whole.count("<svg") == whole.count("</svg>") == 6
    ids = re.findall(r'\sid="([^"]*)"', whole)
    assert len(ids) == len(set(ids))                                          # those of the figures, too
    assert all(f'id="{target}"' in whole for target in re.findall(r'(?:href="|url\()#([^")]+)', whole))
    assert whole == written(tmp_path)                                         # and the same once more


def test_numbers_of_every_figure_are_in_tables(tmp_path, whole, undrawn):
    text = written(tmp_path)
    assert "<svg" not in text and "<figure" not in text and "<summary>The numbers" not in text
    cells = set(re.findall(r"<td[^>]*>([^<]*\d[^<]*)", text))
    assert len(cells) >= 3 and all(cell in whole for cell in cells)
    assert text.count("<table") == whole.count("<table") and "How often." in text


def test_the_legend_says_what_is_drawn(whole):
    keys = [re.sub("<[^>]*>", " ", key).split("  ") for key in re.findall(r'<div class="key">(.*?)</div>', whole)]
    said = [[word.strip() for word in key if word.strip()] for key in keys]
    assert said[0] == ["base model", "style", "alignment"]
    sets = ["random sets of the same size", "random sets of the same usage"]
    assert said[1] == ["style", *sets, "both", "its own", "the SAE’s own"]
    assert said[2] == []


def walk(x, change):
    """The same blocks with every number or string changed."""
    if is_dataclass(x):
        return replace(x, **{f.name: walk(getattr(x, f.name), change) for f in fields(x) if f.name != "kind"})
    if isinstance(x, dict):
        return {k: v if k == "kind" else walk(v, change) for k, v in x.items()}
    return type(x)(walk(v, change) for v in x) if isinstance(x, (list, tuple)) else change(x)


def test_numbers_that_are_none(tmp_path):
    """All at once is the worst case."""
    sections = [walk(s, lambda x: NAN if isinstance(x, float) else x) for s in made_up()]
    assert "nan" not in Elements(written(tmp_path, sections=sections)).text


def dangerous(text):
    """Whether text from the data has become an element, an attribute or a style of the page."""
    found = re.compile("script|img|iframe|link|object|embed")
    try:
        e = Elements(text)
    except AssertionError:
        return True
    harm = [k for k, v in e.attributes if k.startswith("on") or k == "src" or k == "href" and not v.startswith("#")]
    return any(found.fullmatch(t) for t in e.tags) or bool(harm) or text.count("</style>") != 1


def test_everything_is_escaped(tmp_path):
    def evil(x):
        return EVIL if isinstance(x, str) and x else x
    sections = [(name, *walk(rest, evil)) for name, *rest in made_up()]
    about = {**walk(ABOUT, evil), EVIL: EVIL}
    text = written(tmp_path, about=about, verdict=walk(VERDICT, evil), sections=sections)
    assert not dangerous(text) and text.count("&lt;script&gt;") > 60 and '"x"' not in text
    broken = mutant("instruments/page", ("return x if isinstance(x, Html) else Html(html.escape(str(x), quote=True))",
                                         "return x if isinstance(x, Html) else Html(x)"))
    assert dangerous(written(tmp_path, broken, about, walk(VERDICT, evil), sections))


def test_nothing_comes_from_the_network(whole):
    assert "http" not in whole and "@import" not in whole and not re.search(r'url\((?!#)|\ssrc=|<link|<script', whole)


def test_alarms_are_red(tmp_path, undrawn):
    text = written(tmp_path, verdict=[Text("well-formed answers: from 98.0% to 12.0%", "alarm")])
    assert re.search(r'class="alarm" role="alert">.*from 98.0% to 12.0%', text)


def test_shades_and_marks(whole):
    for must in ('class="heat" style="--c:var(--for);--a:0.28"', 'class="heat" style="--c:var(--against);--a:0.55"',
                 '<span class="chip unliked">malformed</span>', '<span class="chip style">style</span>',
                 '<i class="n" style="--f:0.00;--v:1.00" title="−0.2000 nats">Sure</i>',
                 'class="d" style="--f:0.10;--v:0.10" title="activation 0.200; steering −0.200"'):
        assert must in whole, must


# ---- words, and the terminal ----

def test_numbers_in_words():
    assert number(-.5) == "−0.500" and number(-.00001, "+.3f") == "0.000" and number(0, "+g") == "0"
    assert number(None) == number(NAN) == number(float("inf")) == interval(None) == "–"
    assert number(.123, ".0f", 100, "%") == percent(.123) == "12%" and percent(value(.5)) == "50% [40, 60]"
    assert interval({"mean": .2, "low": -.1, "high": .3}, ".1f") == "0.2 [−0.1, 0.3]"
    assert interval({"value": 1, "low": NAN}) == "1.000"
    assert page.visible("▁a\n\t\x07") == " a⏎⇥\\x07"


def test_the_terminal_prints_what_is_brief():
    sections = made_up()
    said = as_text([*VERDICT[:1], Text("fell", "alarm"), *sections[0][3], *sections[2][3]])
    assert said.startswith("First.\nRED: fell\nSaid in words.\n  set ") and said.endswith("\nnone")
    assert "Ten pairs" not in said and "chosen" not in said and max(map(len, said.splitlines())) <= 105
    lines = as_text([Table(["a", "b"], [["x", "1.5"], ["long name", "−10.25"]], brief=True)]).splitlines()
    assert lines == ["  a               b", "  x             1.5", "  long name  −10.25"]


# ---- in a browser ----

MEASURE = """<script>
document.querySelectorAll("details").forEach(d => d.open = true);
const outside = e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll");
const wide = [...document.querySelectorAll("main *")].filter(outside).map(e => e.tagName + "." + e.className);
const frames = [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth + 1);
const bare = frames.filter(e => getComputedStyle(e).backgroundAttachment != "local, scroll").length;
const found = [document.documentElement.scrollWidth, frames.length, bare, wide.slice(0, 3).join()].join(" ");
parent.postMessage("[" + document.title.split(":")[0] + " " + innerWidth + ": " + found + "]", "*");
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(BROWSERS)} is there to open the page with")
def test_the_page_fits_at_every_width(tmp_path):
    """Opened with everything unfolded: no wider than the screen, no error; a table that goes on has a shadow.

    A page whose tables do not scroll is found out.
    """
    def longer(x):
        return "long-words-" * 12 if x in ("style", "Sure", "about", "an answer") else x
    sections = made_up()[:2] + [walk(section, longer) for section in made_up()[2:]]
    good = written(tmp_path, about={**ABOUT, "run": "good"}, sections=sections)
    assert good.count(".scroll { overflow-x: auto;") == 1
    bad = good.replace(".scroll { overflow-x: auto;", ".scroll {").replace("<title>good", "<title>broken")
    for name, text in (("good", good), ("bad", bad)):
        (tmp_path / f"{name}.html").write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    frames = "".join(f'<iframe src="{name}.html" style="width:{width}px;height:900px;border:0"></iframe>'
                     for name, width in (("good", 400), ("good", 1400), ("bad", 400)))
    listen = "<script>onmessage = e => said.textContent += e.data</script>"
    (tmp_path / "frames.html").write_text(f"<!doctype html><p id=said></p>{listen}{frames}", encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1500,3000",
             "--virtual-time-budget=4000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [CHROMIUM, *flags, (tmp_path / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    said = re.findall(r"\[(\S+) (\d+): (\d+) (\d+) (\d+) ([^\]]*)\]", done.stdout)
    assert len(said) == 3, done.stdout[:500] + done.stderr[-500:]
    for title, width, reached, scrolled, bare, what in said:
        assert (int(reached) > int(width)) == (title == "broken"), (title, width, reached, what)
        assert bare == "0" and (scrolled != "0" or (title, width) != ("good", "400"))
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
