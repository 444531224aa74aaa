"""The page and its blocks: nothing breaks on what is missing, all text is escaped, it fits on any screen."""
import re
import shutil
import subprocess
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser

import pytest

from common import mutant
from instruments import page
from lib.blocks import Answers, Card, Table, Text, Tokens, as_text, interval, number, percent

NAN = float("nan")
EVIL = """</style><script>alert("x")</script><img src=x onerror='y'>"&amp;$name`<b>`"""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
ABOUT = {"run": "style-1", "objective": "SimPO", "pairs": "tiny/pairs/style", "model": "tiny/model", "layer": 3,
         "command": "python analyze.py runs/style-1", "held_out": 12, "config": {"seed": 0, "mask": None}}


def value(x, wide=.1):
    return {"value": x, "low": x - wide, "high": x + wide, "se": wide / 2}


def row(group, x, **more):
    return {"group": group, "x": value(x), **more}


def made_up():
    """Sections that hold every kind of block, with every option."""
    rows = [["style", interval(value(.2)), "x" * 60], ["nothing", "± 0.1", "12.5%"], ["–", "1", ""]]
    plots = [row("style", .8, control={"low": .1, "high": .3}), row("other", -.2, start=.3), None]
    table = Table(["set", "gain", "what"], rows, "A `note`.", True, plots)
    controls = [{"group": "control", "x": {"mean": .5, "low": NAN, "high": None}}]
    lone = Table(["", ""], [["one", "1"]], plots=controls)
    tokens = [(" a", 0, 0.0), ("Sure", 0, -.2), ("\n", 0, .1), ("\x03", 0, .05)]
    both = [(t, abs(x), x) for t, _, x in tokens]
    columns = [("chosen", Tokens(tokens, (0, .2), "nats"), ["true", "well-formed"]), ("base", "answer", ["malformed"])]
    cards = []
    for group in ("style", "alignment", "both", "neither", "not judged", ""):
        cards.append(Card("17", group, "+0.02 nats", "about", [Tokens(both, (2, 2)), table]))
    said = [Text("Said in words."), table]
    closer = [Text("Ten pairs", "heading"), Answers("Where?", columns, "gain +1"), Text("see", "note"), *cards]
    closer += [Tokens(both, (0, 0)), Text("none", "missing")]
    return [("behaviour", "Behaviour", "What do the answers do? The `control` is the base model.", said),
            ("masking", "Masking", "What is lost?", [lone]), ("cards", "Cards", "Single tokens?", closer),
            ("usage", "Usage", "How many?", None)]


VERDICT = [Text("First.", "verdict"), Text("Second.", "verdict")]


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
    for must in ("Second.", "0.200 [0.100, 0.300]", "A note.", "⏎", "\\x03", "seed"):
        assert must in said, must
    assert "$" not in said
    ids = re.findall(r'\sid="([^"]*)"', whole)
    assert len(ids) == len(set(ids))
    assert all(f'id="{target}"' in whole for target in re.findall(r'href="#([^"]+)', whole))
    assert whole == written(tmp_path)                                         # and the same once more


def test_pictures_by_hand():
    """From -0.3 to 0.9: a tenth of that is 8.3%."""
    first, second, nothing = map(str, page.pictures([row("style", .8, control={"low": .1, "high": .3}),
                                                     row("other", -.2, start=.3), None]))
    places = re.findall(r'<i class="(\w+)" style="left:([\d.]+)%;width:([\d.]+)%"', first)
    assert places == [("band", "33.3", "16.7"), ("from", "25.0", "66.7"), ("ci", "83.3", "16.7"),
                      ("dot", "91.7", "0.0"), ("zero", "25.0", "0.0")]
    assert 'class="plot style"' in first and 'class="ring" style="left:50.0%' in second and "<i" not in nothing
    assert 'class="from" style="left:8.3%;width:41.7%"' in second


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


def test_alarms_are_red(tmp_path):
    text = written(tmp_path, verdict=[Text("well-formed answers: from 98.0% to 12.0%", "alarm")])
    assert re.search(r'class="alarm" role="alert">.*from 98.0% to 12.0%', text)


def test_shades_and_marks(whole):
    for must in ('<span class="chip malformed">malformed</span>', '<span class="chip style">style</span>',
                 '<i class="down" style="--f:0.00;--v:1.00" title="−0.2000 nats">Sure</i>',
                 'class="down" style="--f:0.10;--v:0.10" title="activation 0.200; steering −0.200"'):
        assert must in whole, must


# ---- words, and the terminal ----

def test_numbers_in_words():
    assert number(-.5) == "−0.500" and number(-.00001, "+.3f") == "0.000" and number(0, "+g") == "0"
    assert number(None) == number(NAN) == number(float("inf")) == interval(None) == "–"
    assert number(.123, ".0f", 100, "%") == percent(.123) == "12%" and percent(value(.5)) == "50% [40, 60]"
    assert interval({"mean": .2, "low": -.1, "high": .3}, ".1f") == "0.2 [−0.1, 0.3]"
    assert interval({"value": 1, "low": NAN}) == "1.000"
    assert page.visible("▁a\n\t\x07") == " a⏎\n⇥\\x07"


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
