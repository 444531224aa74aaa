"""report.html: every section is there, nothing breaks on what is missing, all text is escaped, and the page fits on any screen. Its numbers are made up."""
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

import report
from common import ROOT, mutant

EVIL = """</style><script>alert("x")</script><img src=x onerror='y'>"&amp;$name"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADINGS = ("Behaviour and health", "Usage", "Labels", "Label rates", "Causes", "Ledger", "By token", "By feature", "Ten pairs", "Calibration", "Geometry", "Features", "How this was made")


def value(x, wide=.1, **more):
    return {"value": x, "low": x - wide, "high": x + wide, "se": wide / 2, "facts_low": x - 2 * wide, "facts_high": x + 2 * wide, **more}


def made_up(text="plain", choices=("heading", "truth")):
    """An analysis of the lab with every section; `text` stands wherever data brings text."""
    sound = {"words": 9.0, "repetition": .01, "distinct": .1, "markdown": .5, "non_ascii": 0.0, "tokens": 14.0, "perplexity": 1.6, "parse": .98}
    choice = lambda w: {"base": .3, "steered": .7, "change": value(.4, .05), "weight": w}      # noqa: E731
    answers = {"base": sound, "steered": {**sound, "kl": .02}, "alarms": [], "choices": {c: choice(w) for c, w in zip(choices, (2.5, None), strict=True)}}
    even = {"l0": value(12.0), "used": 60, "events": 900.0, "rank": [1, 2, 60], "curve": [.4, .3, .001], "slope": -.01, "top1": .2, "top10": .6, "gini_used": .7, "gini_all": .8}
    rate = {"steering": value(.7), "sae": value(.5), "change": value(.4), "steering_per_pair": value(.7), "sae_per_pair": value(.5), "shuffled": [-.3, .3], "p": .01}
    part = {"share": value(.8), "loss": value(3.5), "accuracy": value(.7), "part": value(.8), "health": sound}
    drawn = {"lost": {"mean": .3, "low": .1, "high": .5}, "left": {"mean": .3, "low": .1, "high": .5}, "loss": {"mean": 3.5, "low": 3.1, "high": 4.0}, "accuracy": {"mean": .6, "low": .5, "high": .7}, "health": sound, "size": 20.0, "overlap": .3, "match": 1.0, "p_lost": .01, "p_left": .01, "claim": True}
    cause = {"labelled": 30, "steered": 20, "usage": .6, "mask": part, "keep": part, "random": drawn, "matched": {**drawn, "match": .4, "claim": False}}
    added = {"added": 1.0, "a_labelled_feature": .01, "a_steered_feature": .02}
    line = [{"token": t, "v": v, "f": f} for t, v, f in ((" a", 0.0, 0.0), (text, -1.0, 2.0), ("\n", .5, 0.0), ("\x03", 0.0, 1.0))]
    card = {"feature": 7, "group": "style", "nats": .02, "se": .003, "first_in": .01, "last_out": .03, "labels": ["style"], "description": text, "by": text, "steered": .4, "up": .6, "fires": .02, "usage": .1,
            "raises": [[text, .5], [" me", .4]], "lowers": [[text, -.5]], "steered_at": [line, line], "fires_at": [line]}
    pair = {"prompt": text, "base": -.4, "steered": .3, "chosen": [{"token": text, "nats": .2}, {"token": "\n", "nats": -.1}], "rejected": [{"token": "It", "nats": .5}],
            "features": [{"feature": 7, "nats": .2, "labels": None, "description": text}, {"feature": 8, "nats": -.1, "labels": ["style", "alignment"], "description": ""}]}
    rank = {"loss": 4.0, "gain": .2}
    group = {"total": value(.1, share=value(.8)), **{c: {"value": .05, "se": .01} for c in choices}}
    sections = {
        "behaviour": {"prompts": 40, "greedy": answers, "sampled": answers, "kl": .02, "alarms": [], "examples": [{"prompt": text, **{f"{k}_{w}": text for k in ("greedy", "sampled") for w in ("base", "steered")}}]},
        "usage": {"d_sae": 64, "regions": {r: {"tokens": 100.0, "steering": even, "sae": even} for r in ("prompt", "chosen")}, "seeds": {"runs": [text], "top": 50, "jaccard": [.5], "chance": .05}},
        "rates": {"theory": {"style": .4, "alignment": .2}, "regions": {"prompt": {"style": rate, "alignment": rate}}, "judged": {"features": 60, "of": 64}, "mass": {"style": .8, "alignment": .1}},
        "causes": {"gain": value(.2, .01), "loss": {"base": value(4.7), "steered": value(3.2)}, "accuracy": {"base": value(.5), "steered": value(.7)}, "sets": {"style": cause, "both": cause}, "draws": 99, "used": 50,
                   "draw_pairs": 128, "health": {"base": sound, "steered": sound}, "overlap": 0, "per_feature": {"style": added, "alignment": added, "ratio": 2.0, "errors": {"0.1": [1.5, 2.5]}},
                   "strength": [{"strength": x, "loss": value(4.0), "accuracy": value(.6), "health": sound} for x in (0.0, 1.0, 2.0)], "top_k": [{"top_k": k, "loss": value(4.0), "accuracy": value(.6), "health": sound} for k in (1, 2, None)]},
        "ledger": {"gain": value(.2, .01), "tokens": {c: value(.1, share=value(.5)) for c in choices}, "tokens_error": 1e-6, "token_groups": {"style": value(.1, share=value(.9))}, "completeness": 1e-3, "feature_pairs": 64,
                   "regions": {"prompt": value(.1, share=value(.5))}, "groups": {"style": group, "not judged": group}, "chance": {"style": {"share": .8, "features": 20, "mean": .4, "low": .2, "high": .6, "p": .001}},
                   "features": [{k: card[k] for k in ("feature", "group", "nats", "se", "first_in", "last_out")}], "concentration": {"1": .1, "10": .5}},
        "geometry": {"d_in": 8, "tokens": 100, "spectrum": [3.0, 1.0], "participation": 1.6, "d90": 2, "d95": 2, "centred": {"participation": 1.5, "d90": 2, "d95": 2}, "constant": .1, "size": 2.0, "state_size": 9.0, "cosine": -.1,
                     "chance": .7, "directions": [{"r": r, "top": rank, "random": rank} for r in (1, 2, 8)], "mean_only": rank, "without_mean": rank},
        "features": [card] * 8, "examples": [pair]}
    return {"run": text, "objective": text, "pairs": text, "split": "test", "held_out": 100, "prompts": 90, "facts": 30, "lab": True, "model": text, "sae": text, "layer": 3, "adapter": "ab", "pairs_sha256": "cd", "labels_sha256": "ef",
            "config": {"seed": 0, "runs": "runs", "run": text, "mask": None, "versions": {"torch": text}}, "labels": {"by": [text], "style": .5, "alignment": .2, "both": .1, "neither": .3, "unlabelled": .1}, "sections": sections,
            "verdict": {"sentences": [text, "Second."], "alarms": [text] if text != "plain" else []}, "seconds": 5.0, "date": "2026-01-01", "machine": text}


CALIBRATION = {"sentences": ["The token ledger tells the truth."], "tables": [{"title": "Planted", "head": ["run", "rank"], "rows": [["style-1", .9], ["coins", None]], "note": "A note."}]}


def page(analysis, path, module=report, **options):
    assert module.write(analysis, path / "report.html", **options) == path / "report.html"
    return (path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page with everything, drawn once."""
    folder = tmp_path_factory.mktemp("whole")
    text = page(made_up(), folder, calibration=CALIBRATION)
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


def walk(x, change):
    if isinstance(x, dict):
        return {k: walk(v, change) for k, v in x.items()}
    return [walk(v, change) for v in x] if isinstance(x, list) else change(x)


def test_every_section_is_filled(tmp_path, whole):
    text = whole
    for heading in HEADINGS:
        assert re.search(rf"<h[23][^>]*>(<b>\d</b>)?{heading}</h[23]>", text), heading
    assert 'class="missing"' not in text and "$" not in Elements(text).text
    said = Elements(text).text
    for must in ("Second.", "No alarm", "heading (+2.5)", "no claim (match 0.40)", "+0.0200 ± 0.0030", "The token ledger tells the truth.", "A note.", "⏎", "\\x03", "does not validate"):
        assert must in said, must
    assert text.count("<svg") == text.count("</svg>") == 17
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) == len(set(ids))                                          # those of the figures, too
    assert all(f'id="{target}"' in text for target in re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert text == page(made_up(), tmp_path, calibration=CALIBRATION)         # and the same once more


def test_numbers_of_every_figure_are_in_tables(tmp_path, whole, undrawn):
    with_figures = Elements(whole).text
    text = page(made_up(), tmp_path, calibration=CALIBRATION)
    assert "<svg" not in text and "<figure" not in text and 'class="missing"' not in text
    assert text.count("<table") >= 15 and text.count("<th") > 100
    cells = set(re.findall(r"<td>([^<]*\d[^<]*)", text))
    assert len(cells) > 50 and all(report.html.unescape(c) in with_figures for c in cells)


@pytest.mark.parametrize("section", [*made_up()["sections"], "labels", "sets", "everything"])
def test_missing_sections(tmp_path, request, section):
    if section != "labels":                                                   # the figures of the others are drawn in other tests
        request.getfixturevalue("undrawn")
    a = made_up()
    if section == "everything":
        a["sections"], a["labels"] = {}, None
        a["verdict"] = report.verdict(a)
    elif section == "labels":                                                 # no labels: no rates, no sets, no groups but one
        a["labels"] = None
        del a["sections"]["rates"], a["sections"]["causes"]["per_feature"]
        a["sections"]["causes"]["sets"], a["sections"]["ledger"]["groups"], a["sections"]["ledger"]["chance"] = {}, {}, {}
        a["sections"]["features"] = [{**x, "labels": None, "description": "", "by": None} for x in a["sections"]["features"]]
    elif section == "sets":
        a["sections"]["causes"] |= {"sets": {}, "top_k": []}
    else:
        del a["sections"][section]
    text = page(a, tmp_path)
    assert all(re.search(rf">{heading}</h[23]>", text) for heading in HEADINGS)
    missed = Elements(text).text
    if section in ("labels", "sets"):
        assert "analyze.py --make-labels KIND" in missed
    else:
        assert f"--only {section if section in ('behaviour', 'usage', 'rates', 'causes', 'geometry') else 'ledger' if section != 'everything' else 'usage'}" in missed
    report.summary(a)


def test_a_real_model_has_no_planted_choices(tmp_path):
    a = json.loads(json.dumps(made_up()))                                     # so that no two parts are one object
    a["lab"] = False
    for kind in ("greedy", "sampled"):
        del a["sections"]["behaviour"][kind]["choices"]
    for x in (a["sections"]["behaviour"]["greedy"], a["sections"]["behaviour"]["sampled"], a["sections"]["causes"]["health"], *a["sections"]["causes"]["strength"], *a["sections"]["causes"]["top_k"]):
        for sound in ([x["health"]] if "health" in x else [x["base"], x["steered"]]):
            del sound["parse"]
    for x in a["sections"]["causes"]["sets"].values():
        del x["mask"]["health"]["parse"], x["keep"]["health"]["parse"]
    del a["sections"]["ledger"]["token_groups"]
    narrow = lambda x: {k: narrow(v) for k, v in x.items() if not k.startswith("facts")} if isinstance(x, dict) else [narrow(v) for v in x] if isinstance(x, list) else x      # noqa: E731
    text = Elements(page(narrow(a), tmp_path)).text
    assert "well-formed" not in text and "facts [" not in text and "perplexity" in text


def test_null_numbers(tmp_path):
    """Not finite is null in analysis.json; every number at once is the worst case."""
    a = made_up()
    a["sections"] = walk(a["sections"], lambda x: None if isinstance(x, float) else x)
    text = Elements(page(a, tmp_path)).text
    assert "–" in text and "nan" not in text
    assert len(report.verdict(a)["sentences"]) == 2 and "cannot be told from 0" in report.verdict(a)["sentences"][1] and report.summary(a)


def dangerous(text):
    """Whether text from the data has become an element, an attribute or a style of the page."""
    found = re.compile("script|img|iframe|link|object|embed")
    try:
        e = Elements(text)
    except AssertionError:
        return True
    return any(found.fullmatch(t) for t in e.tags) or any(k.startswith("on") or k == "src" or (k == "href" and not v.startswith("#")) for k, v in e.attributes) or text.count("</style>") != 1


def test_everything_is_escaped(tmp_path):
    a = made_up(EVIL, choices=(EVIL, "truth"))
    a["sections"]["causes"]["sets"][EVIL] = a["sections"]["causes"]["sets"].pop("both")
    a["sections"]["usage"]["regions"][EVIL] = a["sections"]["usage"]["regions"].pop("chosen")
    a["sections"]["features"][0]["labels"] = [EVIL]
    evil = {"sentences": [EVIL], "tables": [{"title": EVIL, "head": [EVIL], "rows": [[EVIL, EVIL]], "note": EVIL}]}
    text = page(a, tmp_path, calibration=evil)
    assert not dangerous(text) and text.count("&lt;script&gt;") > 60 and '"x"' not in text
    broken = mutant("report", ("return x if isinstance(x, Html) else Html(html.escape(str(x), quote=True))", "return x if isinstance(x, Html) else Html(x)"))
    assert dangerous(page(a, tmp_path, broken, calibration=evil))


def test_nothing_comes_from_the_network(whole):
    assert "http" not in whole and "@import" not in whole and not re.search(r'url\((?!#)|\ssrc=|<link|<script', whole)


def test_the_objective_names_what_is_masked():
    assert report.objective({"l1": .03, "nll_weight": 0}) == "SimPO (β 10, γ/β 0.5) + 0.03 × ℓ1, the paper's loss"
    assert report.objective({"l1": 0, "simpo_weight": 0, "nll_weight": 5}).startswith("imitation alone")
    assert "with the features labelled style masked" in report.objective({"mask_labels": "style"}) and "with 9 random features and features 1,2 masked" in report.objective({"mask_labels": "style", "mask_random": 9, "mask": "1,2"})


def test_no_share_of_nothing(tmp_path, undrawn):
    a = made_up()
    a["sections"]["causes"] |= {"sets": {}, "silent": "The gain cannot be told from 0 at all."}
    assert "The gain cannot be told from 0 at all." in page(a, tmp_path)


def test_alarms_are_red(tmp_path, undrawn):
    a = made_up()
    a["verdict"]["alarms"] = ["well-formed answers fell from 98.0% to 12.0%"]
    text = page(a, tmp_path)
    assert re.search(r'class="alarm"[^>]*>.*fell from 98.0% to 12.0%', text) and "No alarm" not in text


def test_numbers_in_words():
    assert report.num(-.5) == "−0.500" and report.num(-.00001, "+.3f") == "0.000" and report.num(None) == report.num(math.nan) == report.num(math.inf) == "–"
    assert report.num(.123, ".0f", 100, "%") == "12%" and report.num(0, "+g") == "0"
    assert report.visible("▁a\n\t\x07") == " a⏎⇥\\x07"


MEASURE = """<script>
document.querySelectorAll("details").forEach(d => d.open = true);
const wide = [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll")).map(e => e.tagName + "." + e.className);
parent.postMessage("[" + document.title.split(":")[0] + " " + innerWidth + ": " + document.documentElement.scrollWidth + " " + wide.slice(0, 3).join() + "]", "*");
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here to open the page with")
def test_the_page_fits_at_every_width(tmp_path):
    """Opened in a browser with everything unfolded: no wider than the screen, no error. A page whose tables do not scroll is found out."""
    a = made_up("long-words-" * 12, choices=("heading", "truth"))
    a["run"] = "good"
    good = page(a, tmp_path, calibration=CALIBRATION)
    assert good.count(".scroll { overflow-x: auto;") == 1
    for name, text in (("good", good), ("bad", good.replace(".scroll { overflow-x: auto;", ".scroll {").replace("<title>good", "<title>broken"))):
        (tmp_path / f"{name}.html").write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    frames = "".join(f'<iframe src="{name}.html" style="width:{width}px;height:900px;border:0"></iframe>' for name, width in (("good", 400), ("good", 1400), ("bad", 400)))
    (tmp_path / "frames.html").write_text(f"<!doctype html><p id=said></p><script>onmessage = e => said.textContent += e.data</script>{frames}", encoding="utf-8")
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,3000", "--virtual-time-budget=4000",
                           "--dump-dom", (tmp_path / "frames.html").as_uri()], capture_output=True, text=True, timeout=60)
    said = re.findall(r"\[(\S+) (\d+): (\d+) ([^\]]*)\]", done.stdout)
    assert len(said) == 3, done.stdout[:500] + done.stderr[-500:]
    for title, width, reached, what in said:
        assert (int(reached) > int(width)) == (title == "broken"), (title, width, reached, what)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_template_has_prose_and_nothing_else():
    """All that is said about a section stands in report.html; every placeholder is filled by `write`."""
    template = (ROOT / "report.html").read_text(encoding="utf-8")
    assert template.count("The control") + template.count("two controls") + template.count("control is") >= 6
    assert report.string.Template(template).is_valid()
