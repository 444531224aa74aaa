"""What analyze.py found: the verdict in words, a page of text, and report.html filled in: one file, no network, everything escaped."""
import html
import io
import math
import re
import string
import warnings

from gemma import HERE, atomically

# ---- the verdict -----------------------------------------------------------------------------------------------------------------

def objective(config):
    """What a run was trained with, in words."""
    nll, weight = config.get("nll_weight", 0), config.get("simpo_weight", 1)
    parts = [f"SimPO ({'hinge, ' if config.get('loss') == 'hinge' else ''}β {config.get('beta', 10):g}, γ/β {config.get('gamma_ratio', .5):g})"
             + (f" at weight {weight:g}" if weight != 1 else "")] if weight else []
    if nll:
        parts.append(f"{nll:g} × NLL of the chosen answers" if weight else "imitation alone (NLL of the chosen answers)")
    masked = ([f"{config['mask_random']} random features"] if config.get("mask_random") else [f"the features labelled {config['mask_labels']}"] if config.get("mask_labels") else []) + (
        [f"features {config['mask']}"] if config.get("mask") else [])
    return " + ".join(parts) + f" + {config.get('l1', 0):g} × ℓ1" + (", the paper's loss" if weight and not nll else "") + (f", with {' and '.join(masked)} masked," if masked else "")


def percent(x):
    return f"{100 * x['value']:.0f}% [{100 * x['low']:.0f}, {100 * x['high']:.0f}]"


def numbers(x):
    """null, which stands for what is no finite number, as nan again; where null means something it stays."""
    if isinstance(x, dict):
        return {k: v if v is None and k in ("weight", "top_k", "labels", "by", "description") else numbers(v) for k, v in x.items()}
    return [numbers(v) for v in x] if isinstance(x, (list, tuple)) else math.nan if x is None else x


def verdict(a):
    """Two sentences and the alarms. a: analysis"""
    s, trained = numbers(a["sections"]), f"Trained with {a['objective']} on {a['pairs']}"
    gain = (s.get("causes") or s.get("ledger") or {}).get("gain")
    if not gain:
        return {"sentences": [f"{trained}; neither causes nor ledger were computed, so nothing is said about what is rewarded."], "alarms": s.get("behaviour", {}).get("alarms", [])}
    size = f"{gain['value']:+.3f} nats a token [{gain['low']:.3f}, {gain['high']:.3f}]"
    accuracy = s.get("causes", {}).get("accuracy")
    first = f"{trained}, the policy moved the margin of the preferred answer by {size}" + (
        f" (accuracy {accuracy['base']['value']:.1%} to {accuracy['steered']['value']:.1%})." if accuracy else ".")
    if not (gain["low"] > 0 or gain["high"] < 0):
        return {"sentences": [first, "That cannot be told from 0, so no share of it is given to anything."], "alarms": s.get("behaviour", {}).get("alarms", [])}
    parts = []
    if groups := s.get("ledger", {}).get("token_groups"):
        parts.append("of the gain " + " and ".join(f"{percent(groups[g]['share'])} falls on tokens that settle {'a style' if g == 'style' else 'an alignment'} choice" for g in groups))
        if style := s["ledger"]["groups"].get("style", {}).get("total", {}).get("share"):
            parts.append(f"{percent(style)} goes through features labelled style")
    elif tokens := s.get("ledger", {}).get("tokens"):
        best = sorted(tokens, key=lambda c: -tokens[c]["value"])[:3]
        parts.append("of the gain " + ", ".join(f"{percent(tokens[c]['share'])} falls on {c} tokens" for c in best))
    for name, x in s.get("causes", {}).get("sets", {}).items():
        if name != "both":
            control = x["matched"] if x["matched"]["claim"] else x["random"]
            kind = "other sets of the same usage" if x["matched"]["claim"] else "random sets of the same size, which are used less" if x["usage"] > x["steered"] / max(1, s["causes"]["used"]) else "random sets of the same size"
            lost, share = control["lost"], x["mask"]["part"]
            parts.append(f"without the {x['steered']} steered features labelled {name}, {percent(share)} is lost, {'more' if share['value'] > lost['high'] else 'no more'} than without {kind} "
                         f"({100 * lost['mean']:.0f}% [{100 * lost['low']:.0f}, {100 * lost['high']:.0f}])")
    second = "; ".join(parts) or "No labels were there to say more"
    return {"sentences": [first, second[0].upper() + second[1:] + "."], "alarms": s.get("behaviour", {}).get("alarms", [])}


def summary(a):
    """The analysis as a page of text."""
    s, lines = numbers(a["sections"]), []
    interval = lambda x, f="{:.3f}": f"{f.format(x['value'])} [{f.format(x['low'])}, {f.format(x['high'])}]"      # noqa: E731
    if b := s.get("behaviour"):
        lines.append(f"\nBehaviour, {b['prompts']} held-out prompts, sampled (T=1): base -> steered")
        if "choices" in b["sampled"]:
            lines += [f"  {name:<9} {c['base']:6.1%} -> {c['steered']:6.1%}   {100 * c['change']['value']:+5.1f} points [{100 * c['change']['low']:+.1f}, {100 * c['change']['high']:+.1f}]"
                      + (f"   planted {c['weight']:+g}" if c["weight"] is not None else "") for name, c in b["sampled"]["choices"].items()]
        x, y = b["sampled"]["base"], b["sampled"]["steered"]
        lines.append("  " + ", ".join(f"{name} {x[name]:.3g} -> {y[name]:.3g}" for name in ("words", "repetition", "distinct", "markdown", "non_ascii", "perplexity")) + f", KL on neutral text {b['kl']:.3f}")
    if u := s.get("usage"):
        lines.append("\nUsage: features a token, steered | SAE's own")
        lines += [f"  {region:<9} {interval(x['steering']['l0'], '{:.1f}')} | {interval(x['sae']['l0'], '{:.1f}')}; {x['steering']['used']} of {u['d_sae']} ever steered, "
                  f"top 1% {x['steering']['top1']:.0%}, Gini {x['steering']['gini_used']:.2f} of used | {x['sae']['gini_used']:.2f}" for region, x in u["regions"].items()]
        if u["seeds"]["jaccard"]:
            lines.append(f"  top {u['seeds']['top']} features across {len(u['seeds']['runs']) + 1} seeds: Jaccard {sum(u['seeds']['jaccard']) / len(u['seeds']['jaccard']):.2f} (chance {u['seeds']['chance']:.2f})")
    if r := s.get("rates"):
        lines.append("\nLabel rates: share of active features, SAE -> steered")
        lines += [f"  {region:<9} {label:<9} {x['sae']['value']:.3f} -> {x['steering']['value']:.3f}, change {100 * x['change']['value']:+.0f}% [{100 * x['change']['low']:+.0f}, {100 * x['change']['high']:+.0f}]"
                  f"; labels shuffled [{100 * x['shuffled'][0]:+.0f}, {100 * x['shuffled'][1]:+.0f}]" for region, some in r["regions"].items() for label, x in some.items()]
    if c := s.get("causes"):
        lines.append("\nCauses: share of the gain lost when masked | left when alone; random sets of the same size | of the same usage")
        for name, x in c["sets"].items():
            three = lambda k, w: f"{100 * x[k][w]['mean']:.0f}% [{100 * x[k][w]['low']:.0f}, {100 * x[k][w]['high']:.0f}]" if k == "random" or x[k]["claim"] else f"(match {x[k]['match']:.2f}: no claim)"      # noqa: E731, B023
            lines.append(f"  {name:<9} ({x['steered']} features) lost {percent(x['mask']['part'])}, random {three('random', 'lost')}, matched {three('matched', 'lost')}"
                         f" | left {percent(x['keep']['part'])}, random {three('random', 'left')}, matched {three('matched', 'left')}")
    if x := s.get("ledger"):
        lines.append(f"\nLedger of the gain, nats a token: {interval(x['gain'], '{:+.4f}')}")
        lines += [f"  tokens    {name:<11} {interval(y, '{:+.4f}')}" + (f"   {percent(y['share'])}" if "share" in y else "") for name, y in x["tokens"].items()]
        lines += [f"  features  {name:<11} {interval(y['total'], '{:+.4f}')}" + (f"   {percent(y['total']['share'])}" if "share" in y["total"] else "") for name, y in x["groups"].items()]
        lines.append(f"  completeness error of the features {x['completeness']:.2%}; the first 10 features hold {x['concentration']['10']:.0%} of Σ|entry|")
    if g := s.get("geometry"):
        lines.append(f"\nGeometry: {g['participation']:.1f} effective directions of {g['d_in']} (90% in {g['d90']}), a constant vector explains {g['constant']:.0%}; cosine with the mean difference {g['cosine']:+.2f} (chance ±{g['chance']:.2f})")
        if not math.isnan(g["mean_only"]["gain"]):
            lines.append("  share of the gain with only the top r directions (random ones): " + ", ".join(f"{d['r']}: {d['top']['gain']:.0%} ({d['random']['gain']:.0%})" for d in g["directions"]))
    return "\n".join(lines)


# ---- the page: words, numbers, tables ----------------------------------------------------------------------------------------------

class Html(str):
    """Text that is HTML already; all other text is escaped."""


def esc(x):
    return x if isinstance(x, Html) else Html(html.escape(str(x), quote=True))


def join(parts, between=""):
    return Html(between.join(map(esc, parts)))


def tag(name, *inside, **attributes):
    """<name ...>inside</name>; attribute names may end in _, as in class_."""
    given = "".join(f' {k.rstrip("_").replace("_", "-")}="{html.escape(str(v), quote=True)}"' for k, v in attributes.items() if v is not None)
    return Html(f"<{name}{given}>{join(inside)}</{name}>")


def num(x, form=".3f", times=1, unit=""):
    """A number with a proper minus sign, none on a zero; – for what is no finite number."""
    if not isinstance(x, (int, float)) or not math.isfinite(x):
        return "–"
    text = f"{times * x:{form}}"
    return (text.replace("-", "−") if any(c in "123456789" for c in text) else text.lstrip("+-")) + unit


def pc(x, form=".0f"):
    return num(x, form, 100, "%")


def pair(low, high, form=".3f", times=1):
    return f"[{num(low, form, times)}, {num(high, form, times)}]"


def interval(x, form=".3f", times=1, unit=""):
    """value [low, high], and below it the interval over facts where there is one. x: an interval, or the mean and the range of a control"""
    wide = tag("span", "facts ", pair(x.get("facts_low"), x.get("facts_high"), form, times), class_="ci facts") if "facts_low" in x else ""
    return join([num(x.get("value", x.get("mean")), form, times, unit), " ", tag("span", pair(x.get("low"), x.get("high"), form, times), class_="ci"), wide])


def share(x):
    return interval(x, ".0f", 100, "%") if x else "–"


def said(x, form=".3f", times=1, unit=""):
    """value [low, high] in running text."""
    return f"{num(x['value'], form, times, unit)} {pair(x['low'], x['high'], form.lstrip('+'), times)}"


def table(head, rows, note=""):
    """Rows of cells; a cell is text, or a ready <td>. The first of each row is its heading."""
    cell = lambda x: x if isinstance(x, Html) and x.startswith("<td") else tag("td", x)      # noqa: E731
    body = join(tag("tr", tag("th", first, scope="row"), *map(cell, rest)) for first, *rest in rows)
    out = tag("div", tag("table", tag("thead", tag("tr", *(tag("th", h, scope="col") for h in head))), tag("tbody", body)), class_="scroll", tabindex="0")
    return join([out, tag("p", note, class_="note tablenote") if note else ""])


def fold(title, *inside, **attributes):
    return tag("details", tag("summary", title), *inside, **attributes)


def key(*names, **others):
    """A figure's legend: names of KEYS, or others by colour."""
    entries = [KEYS[n] for n in names] + [(c, text) for c, text in others.items()]
    return tag("div", *(tag("span", tag("i", style=f"--c:var(--{c})", class_=" ".join(shape) or None), text) for c, text, *shape in entries), class_="key")


def absent(why, command, then):
    return tag("p", why, " ", tag("code", f"python analyze.py {command}"), " ", then, class_="missing")


def missing(a, section, name=None):
    return absent(f"{name or section.capitalize()} was not computed for this report:", f"{where(a)} --only {section}", "adds it.")


def unlabelled():
    return absent("There are no labels for this SAE, so nothing is said by label here.", "--make-labels KIND", "makes them; then run the analysis again.")


def where(a):
    c = a.get("config", {})
    return c.get("run") or f"{c.get('runs', 'runs')}/{a['run']}"


def chips(labels):
    names = ["unlabelled"] if labels is None else ["both"] if len(labels) > 1 else labels or ["neither"]
    return join(tag("span", n, class_=f"chip {n}") for n in names)


def visible(token, breaks=False):
    """A token as one reads it: newlines, tabs and control characters become signs."""
    signs = {"\n": "⏎\n" if breaks else "⏎", "\t": "⇥", "▁": " "}
    return "".join(signs.get(c) or (f"\\x{ord(c):02x}" if c < " " or c == "\x7f" else c) for c in token)


# ---- figures: matplotlib draws them if it is there; the tables hold the same numbers ------------------------------------------------

# Drawn in these colours, shown in the page's: light or dark.
COLORS = {"style": "#b4552d", "alignment": "#2f6f4f", "both": "#7a5a9e", "base": "#868d96", "ink": "#20262e", "band": "#d3d7dc", "other": "#33557f", "dim": "#5b636e", "rule": "#dfe2e6"}
KEYS = {"base": ("base", "base model", "ring"), "style": ("style", "style"), "alignment": ("alignment", "alignment"), "both": ("both", "both together"), "dealt": ("band", "labels dealt anew (control)", "box"),
        "steering": ("ink", "steering", "box"), "sae": ("base", "the SAE’s own activations", "box"), "random": ("band", "random sets of the same size", "box"), "matched": ("base", "sets of the same usage", "box"),
        "top": ("ink", "its own first directions", "box"), "directions": ("base", "random directions", "box")}
GREEN, GREY = ("alignment", "truth", "admit", "decline", "refusal", "hedge"), ("value", "form", "rest", "parse", "neither", "not judged")


def color(name):
    """Of a choice, a kind of token or a group of features."""
    return "both" if name == "both" else "alignment" if name in GREEN else "base" if name in GREY else "style"


def svg(name, paint, size=(4.3, 2.6)):
    """paint(axis) as SVG without its prolog, with ids of its own and the page's colours; "" without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    ink, dim = COLORS["ink"], COLORS["dim"]
    look = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
            "text.color": ink, "axes.labelcolor": dim, "xtick.labelcolor": dim, "ytick.labelcolor": ink, **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), COLORS["base"]),
            "grid.color": COLORS["rule"], "grid.linewidth": .6}
    with matplotlib.rc_context(look), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure, out = Figure(figsize=size, layout="constrained"), io.StringIO()
        paint(figure.add_subplot())
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", out.getvalue()[out.getvalue().index("<svg"):], flags=re.S)
    text = re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1).replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r'\s+id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)
    for c, value in COLORS.items():
        text = text.replace(value, f"var(--{c})")
    text = re.sub(r">([^<]*)", lambda m: ">" + m[1].replace('"', "&quot;").replace("'", "&#x27;"), text)          # matplotlib leaves quotes as they are
    return Html(re.sub(r"\s*\n\s*", "\n", text))


def figure(name, says, panels, tables, legend="", beside=False):
    """panels: (title, paint, size). The numbers are folded below the figure, or lie beside it; where nothing draws it they stand open."""
    drawn = [(title, picture) for k, (title, paint, *size) in enumerate(panels) if (picture := svg(f"{name}-{k}", paint, *size))]
    if not drawn:
        return join([tag("p", says, class_="note"), tables])
    boxes = [tag("div", tag("h4", title), picture, role="img", aria_label=f"{title}. {says}") for title, picture in drawn] + [tag("div", tables)] * beside
    return join([tag("figure", legend, tag("div", *boxes, class_="panels"), tag("figcaption", says)), "" if beside else fold("The numbers", tables)])


def logarithmic(axis, x=True, y=False, percent=False):
    """Plain numbers along logarithmic axes."""
    for wanted, set_scale, ruler, times in ((x, axis.set_xscale, axis.xaxis, 1), (y, axis.set_yscale, axis.yaxis, 100 if percent else 1)):
        if wanted:
            set_scale("log")
            ruler.set_major_formatter(lambda v, _, times=times: f"{times * v:,.10g}{'%' if times > 1 else ''}")
            ruler.set_minor_formatter(lambda v, _: "")


def forest(axis, rows, xlabel, k=100, zero=True):
    """A dot, or a bar, with its interval a row, above the bands of its controls.

    rows: {"name", "color", "x": interval, "from": where a line to it starts, "bar": bool, "bands": [(low, high, mean, color, why nothing is claimed)]}
    """
    for y, row in enumerate(rows):
        x, c, bands = row["x"], COLORS[row["color"]], row.get("bands", [])
        at, tall = (y - .2, .3) if bands else (y, .6)
        for n, (low, high, mean, band, text) in enumerate(bands):
            below = y + .06 + .2 * n
            axis.barh(below, k * (high - low), .16, k * low, color=COLORS[band], alpha=.35 if text else .95, lw=0)
            axis.plot([k * mean] * 2, [below - .08, below + .08], color=COLORS["ink"], lw=1.2, alpha=.4 if text else .9)
            axis.annotate(text, (k * high, below), (4, 0), textcoords="offset points", va="center", fontsize=7.5, color=COLORS["dim"])
        if row.get("bar"):
            axis.barh(at, k * x["value"], tall, color=c, alpha=.45, lw=0)
        if "from" in row:
            axis.plot([k * row["from"], k * x["value"]], [at, at], color=c, lw=2, alpha=.5)
            axis.plot(k * row["from"], at, "o", mfc="none", mec=c, ms=5.5)
        axis.plot([k * x["low"], k * x["high"]], [at, at], color=c, lw=1.6)
        axis.plot(k * x["value"], at, "o", color=c, ms=2.5 if row.get("bar") else 5)
    axis.set_yticks(range(len(rows)), [r["name"] for r in rows])
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set_ylim(len(rows) - .4, -.6)
    axis.set_xlabel(xlabel)
    axis.grid(axis="x")
    if zero:
        axis.axvline(0, color=COLORS["base"], lw=.9, zorder=.6)


# ---- the sections --------------------------------------------------------------------------------------------------------------------

WORDS = {"parse": ("well-formed answers", ".1f", 100, "%"), "perplexity": ("base model’s perplexity of the answers", ".2f"), "repetition": ("repeated 4-grams", ".1f", 100, "%"),
         "markdown": ("answers with markdown", ".1f", 100, "%"), "non_ascii": ("characters beyond ASCII", ".2f", 100, "%"), "tokens": ("tokens an answer", ".1f"),
         "words": ("words an answer", ".1f"), "distinct": ("distinct words, of all words", ".3f")}


def behaviour(a, s):
    both, who = {"greedy": "greedy", "sampled": "sampled, T=1"}, ("base", "steered")
    rows = [[words, *(num(s[kind][w].get(n), *form) for kind in both for w in who)] for n, (words, *form) in WORDS.items() if n in s["sampled"]["base"]]
    rows.append(["KL from the base model on neutral text, nats a token", *("", num(s.get("kl"))) * 2])
    health = table(["", *(f"{t}: {w}" for t in both.values() for w in who)], rows, f"Whether the answers to {s['prompts']} held-out prompts are still text: each measure beside the "
                   "base model’s own answers, which are the control. A measure that is much worse raises an alarm at the top.")
    answers = [tag("div", tag("p", visible(e["prompt"]).strip(), class_="prompt"), tag("div", *(
        tag("div", tag("h4", f"{t}, {w}"), tag("p", e.get(f"{kind}_{w}", ""), class_="answer")) for kind, t in both.items() for w in who), class_="two"), class_="pair") for e in s.get("examples", [])]
    return join([rates_of_choices(s, both) if s["sampled"].get("choices") else "", tag("h3", "Health of the text"), health, fold("Some answers, base beside policy", *answers) if answers else ""])


def rates_of_choices(s, both):
    """The lab alone knows what an answer chooses."""
    choices = s["sampled"]["choices"]
    rows = [{"name": "well-formed" if n == "parse" else n if c.get("weight") is None else f"{n} ({num(c['weight'], '+g')})", "color": color(n), "from": c["base"],
             "x": {"value": c["steered"], "low": c["base"] + c["change"]["low"], "high": c["base"] + c["change"]["high"]}} for n, c in choices.items()]

    def rate(axis):
        forest(axis, rows, "share of answers, %", zero=False)
        axis.set_xlim(0, 100)

    def against(axis):
        spots = [(c["weight"], c["change"]["value"]) for c in choices.values() if c.get("weight") is not None]
        high, wide = (1e-9 + max(p[k] for p in spots) - min(p[k] for p in spots) for k in (1, 0))
        crowd = lambda x, y, side: sum(0 < side * (a - x) < wide / 4 and abs(b - y) < high / 12 for a, b in spots)      # noqa: E731
        for n, c in choices.items():
            if c.get("weight") is not None:
                x, y = c["weight"], c["change"]
                axis.plot([x, x], [100 * y["low"], 100 * y["high"]], color=COLORS[color(n)], lw=1.4)
                axis.plot(x, 100 * y["value"], "o", color=COLORS[color(n)], ms=5)
                side = -1 if crowd(x, y["value"], -1) < crowd(x, y["value"], 1) else 1                      # where fewer other choices lie
                axis.annotate(n, (x, 100 * y["value"]), (5 * side, 3), textcoords="offset points", ha="right" if side < 0 else "left", fontsize=7.5, color=COLORS["dim"])
        axis.axhline(0, color=COLORS["base"], lw=.8, zorder=0)
        axis.set(xlabel="planted weight of the choice, in the utility", ylabel="change of its rate, points")
        axis.margins(x=.14)
    size = 4.3, .6 + .27 * len(rows)
    panels = [("Rate of each choice, base → policy", rate, size)] + [("Change beside what was planted", against, size)] * any(c.get("weight") is not None for c in choices.values())
    cells = lambda c: (pc(c["base"], ".1f"), pc(c["steered"], ".1f"), interval(c["change"], "+.1f", 100)) if c else ("–",) * 3      # noqa: E731
    numbers = table(["choice", "planted weight", *(f"{t}: {c}" for t in both.values() for c in ("base", "steered", "change, points"))],
                    [[n, num(c.get("weight"), "+g"), *(cell for kind in both for cell in cells(s[kind].get("choices", {}).get(n)))] for n, c in choices.items()])
    return figure("behaviour", f"How often each choice is made in answers sampled at temperature 1 to {s['prompts']} held-out prompts: base model (ring, the control) → policy (dot; the line through it "
                  "is the 95% interval of the change, over facts). In brackets the planted weight: what the preferences really paid for.", panels, numbers, key("base", "style", "alignment"))


def usage(a, s):
    sides = {"steering": "steering", "sae": "SAE"}
    every = [(f"{region}: {word}", x, x[side]) for region, x in s["regions"].items() for side, word in sides.items()]

    def curve(x):
        def paint(axis):
            axis.plot(x["sae"]["rank"], x["sae"]["curve"], "--", color=COLORS["base"], lw=1.4)
            axis.plot(x["steering"]["rank"], x["steering"]["curve"], color=COLORS["ink"], lw=1.8)
            axis.set(xlabel="rank of the feature", ylabel="share of tokens")
            logarithmic(axis, y=True, percent=True)
            axis.grid()
        return paint
    panels = [(f"{region} tokens ({num(x['tokens'], ',.0f')})", curve(x), (3.6, 2.6)) for region, x in s["regions"].items() if any(v > 0 for side in sides for v in x[side]["curve"])]
    curves = [dict(zip(x["rank"], x["curve"], strict=True)) for _, _, x in every]
    at = sorted({k for c in curves for k in c if k in (1, 2, 3, 5, 10, 20, 50, 100) or k == max(c)})
    numbers = table(["rank", *(name for name, _, _ in every)], [[k, *(pc(c.get(k), ".2f") for c in curves)] for k in at])
    rows = [[name, interval(x["l0"], ".1f"), f"{x['used']:,} of {s['d_sae']:,}", pc(x["top1"]), pc(x["top10"]), num(x["gini_used"], ".2f"), num(x["gini_all"], ".2f"), num(x["slope"], ".4f")]
            for name, _, x in every]
    seeds = s.get("seeds", {})
    overlap = seeds.get("jaccard")
    again = (f"Of the {seeds['top']} most used features, runs that differ in their seed alone ({', '.join(seeds['runs'])}) share: Jaccard {num(sum(overlap) / len(overlap), '.2f')}, the mean of "
             f"{len(overlap)} pair{'s' * (len(overlap) > 1)} of runs. The control, sets drawn at random from the steered ones: {num(seeds['chance'], '.2f')}.") if overlap else (
        "Whether another seed would use the same features cannot be said: no run that differs in its seed alone lies beside this one.")
    return join([figure("usage", "Share of a region’s tokens at which a feature is steered, the most used feature first, both axes logarithmic; beside it, dashed, the control: "
                        "the SAE’s own activations at the same tokens. A flatter curve is more even use.", panels, numbers, key("steering", "sae")),
                 table(["region", "features a token (L0)", "ever used", "events on the top 1%", "on the top 10%", "Gini, used", "Gini, all", "slope, log₁₀ a rank"], rows,
                       "How many features act and how evenly: steering, and in the next row its control, the SAE’s own activations. Gini 0: all used alike; near 1: one does everything."), tag("p", again)])


def labels(a, s):
    if not s:
        return unlabelled()
    only = {"style": s["style"] - s["both"], "both": s["both"], "alignment": s["alignment"] - s["both"], "neither": s["neither"], "unlabelled": s["unlabelled"]}
    words = {"style": "style only", "alignment": "alignment only", "unlabelled": "unlabelled: not asked, or no usable answer"}
    return join([tag("p", "Source of the labels: ", join((tag("b", x) for x in s["by"]), ", "), ". Another source would give other labels; where two exist, ",
                     tag("code", "python analyze.py --agree A B"), " says how far they agree."),
                 tag("div", *(tag("i", class_=n, style=f"flex:{x:.4f} 0 0", title=f"{n} {x:.1%}") for n, x in only.items() if x > 0), class_="bar", role="img",
                     aria_label="Shares of features by label; the table has the numbers."),
                 table(["label", "share of the SAE’s features"], [[tag("span", words.get(n, n), class_=f"chip {n}"), pc(x, ".1f")] for n, x in only.items()],
                       "Each feature counts once. Unlabelled is not the same as neither: unlabelled features are left out of sections 4 and 5. Nothing is compared here, so there is no control.")])


def rates(a, s):
    def panel(label):
        rows = [{"name": region, "color": color(label), "x": x[label]["change"], "bands": [(*x[label]["shuffled"], math.nan, "band", "")]} for region, x in s["regions"].items() if label in x]
        return f"{label}: change of its share, SAE → steering", lambda axis: forest(axis, rows, "change, % of the SAE’s own share"), (4.3, .7 + .38 * len(rows))
    rows = [[f"{region}, {n}", share(x["sae"]), share(x["steering"]), interval(x["change"], "+.0f", 100, "%"), pair(*x["shuffled"], "+.0f", 100), num(x["p"], ".2f"),
             share(x.get("sae_per_pair")), share(x.get("steering_per_pair"))] for region, some in s["regions"].items() for n, x in some.items()]
    numbers = table(["region, label", "of the SAE’s active features", "of the steered features", "change", "labels dealt anew, 95%", "p", "SAE, a pair", "steered, a pair"], rows,
                    "p: share of the deals that moved the number at least as far. A pair: every pair counts once, instead of every token.")
    listed = lambda shares: ", ".join(f"{n} {pc(x)}" for n, x in shares.items())      # noqa: E731
    return join([figure("rates", "How much larger (or smaller) a label’s share is among the steered features than among the SAE’s own active ones, with its interval; grey, the control: the range of the "
                        "same number in 95 of 100 deals of the labels among the judged features. A dot that lies over its grey band says nothing about that label; one beside it does.",
                        [panel(n) for n in dict.fromkeys(n for x in s["regions"].values() for n in x)], numbers, key("style", "alignment", "dealt")),
                 tag("p", f"If all {s['judged']['features']:,} judged features (of {s['judged']['of']:,}) were active equally often, the shares would be {listed(s['theory'])}. "
                          f"Weighed by how far features are pushed (Σ‖v d‖), instead of how often: {listed(s.get('mass', {}))}.")])


def causes(a, s):
    loss, accuracy = s["loss"], s["accuracy"]
    out = [tag("p", f"With all features, the policy’s gain is {said(s['gain'], '+.3f')} nats a token, its loss {num(loss['base']['value'])} → {num(loss['steered']['value'])}, "
                    f"its accuracy {pc(accuracy['base']['value'], '.1f')} → {pc(accuracy['steered']['value'], '.1f')}; {s['used']:,} features are steered at all.")]
    out.append(masking(s) if s.get("sets") else tag("p", s["silent"], class_="missing") if s.get("silent") else unlabelled())
    if p := s.get("per_feature"):
        errors = "; with ".join(f"{pc(float(e))} of each set exchanged at random it comes out from {num(x[0], '.2f')} to {num(x[1], '.2f')}" for e, x in p["errors"].items())
        out.append(table(["label", "loss added", "a labelled feature", "a steered feature"],
                         [[n, num(x["added"], "+.4f"), num(x["a_labelled_feature"], "+.6f"), num(x["a_steered_feature"], "+.6f")] for n, x in p.items() if n not in ("ratio", "errors")],
                         f"What masking a label adds to the loss, shared among its features: the paper’s number. Ratio style : alignment {num(p['ratio'], '.2f')}. Its control is wrong labels: with {errors}."))
    if s.get("strength"):
        out += [tag("h3", "Strength"), sweep("strength", s["strength"], s["health"]["base"], f"The steering multiplied by a factor, on {s.get('sweep_pairs', 'some')} of the pairs: 0 is the base model, 1 (dotted) the policy as trained; "
                                             "both are the controls for what lies between and beyond.")]
    if s.get("top_k"):
        out += [tag("h3", "Top-k"), sweep("top_k", s["top_k"], s["health"]["base"], f"Only the k most strongly pushed features of every token act, on {s.get('sweep_pairs', 'some')} of the pairs; the control is “all”, the policy as trained.")]
    return join(out)


def masking(s):
    """Sets of features, masked and alone, beside their controls."""
    ways = {"lost": ("mask", "Lost when the set is masked", "lost when masked"), "left": ("keep", "Left when only the set acts", "left when alone")}
    unfit = lambda x: "" if x["claim"] else f"no claim (match {num(x['match'], '.2f')})"      # noqa: E731
    control = lambda x, what: join([share(x[what]), tag("span", unfit(x), class_="ci facts") if unfit(x) else ""])      # noqa: E731

    def panel(what):
        band = lambda x, c: (x[what]["low"], x[what]["high"], x[what]["mean"], c)      # noqa: E731
        rows = [{"name": f"{n}\n({x['steered']})", "color": color(n), "x": x[ways[what][0]]["part"],
                 "bands": [(*band(x["random"], "band"), ""), (*band(x["matched"], "base"), unfit(x["matched"]))]} for n, x in s["sets"].items()]
        return ways[what][1], lambda axis: forest(axis, rows, "share of the gain, %"), (4.3, .7 + .75 * len(rows))
    rows = []
    for n, x in s["sets"].items():
        for what, (do, _, word) in ways.items():
            rows.append([f"{n}: {word}", f"{x['steered']} of {x['labelled']}", pc(x["usage"]), share(x[do]["share"]), share(x[do]["part"]), share(x["random"][what]), num(x["random"].get(f"p_{what}"), ".2f"),
                         control(x["matched"], what), num(x["matched"].get(f"p_{what}"), ".2f") if x["matched"]["claim"] else "–",
                         num(x[do]["loss"]["value"]), pc(x[do]["accuracy"]["value"], ".1f"), *sound(x[do]["health"]).values()])
        for kind in ("random", "matched"):
            if kind == "random" or x["matched"]["claim"]:
                c = x[kind]
                rows.append([f"{n}: {'as many at random' if kind == 'random' else 'as much used'}, masked", num(c["size"], ".0f"), "–", "–", "–", share(c["lost"]), "–", "–", "–", num(c["loss"]["mean"]), pc(c["accuracy"]["mean"], ".1f"), *sound(c["health"]).values()])
    numbers = table(["set", "steered, of labelled", "share of usage", "share of the gain", f"on the {s['draw_pairs']} pairs", "random sets", "p", "matched sets", "p", "loss", "accuracy", *sound(s["health"]["steered"])], rows,
                    f"Controls are scored on {s['draw_pairs']} of the pairs, and compared with the set's own share there. p: share of the control sets that do at least as much. Loss, accuracy and text are those "
                    "of the policy that is left; in the rows of random sets they are means, the text's of three sets.")
    return figure("causes", f"Share of the gain that goes with a set of features (in brackets how many are steered) and its interval. Controls, {s['draws']} of each, as the band of 95% with the mean: sets of "
                  "the same size drawn from all steered features, and sets outside the label that are used as much. Where nothing like that is left to draw (match below 0.8), no claim is made and "
                  "the band is pale.", [panel("lost"), panel("left")], numbers, key("style", "alignment", "both", "random", "matched"))


def sound(x):
    """A few measures of health, in words."""
    return ({"well-formed": pc(x.get("parse"), ".1f")} if "parse" in x else {}) | {"perplexity": num(x["perplexity"], ".2f"), "repeated 4-grams": pc(x["repetition"], ".1f")}


def sweep(kind, points, base, says):
    """Loss beside the health of the text, along strength or k. base: the base model's health"""
    names = [num(p["strength"], "g") if kind == "strength" else str(p["top_k"] or "all") for p in points]
    widest = 2 * max([p["top_k"] for p in points if p.get("top_k")] or [1])
    xs = [p["strength"] if kind == "strength" else p["top_k"] or widest for p in points]
    healthy, times, word = ("parse", 100, "well-formed answers, %") if "parse" in base else ("perplexity", 1, "base model’s perplexity")

    def along(axis, ylabel):
        axis.set(xlabel="strength" if kind == "strength" else "features that may act at a token, k", ylabel=ylabel)
        axis.grid()
        if kind == "strength":
            axis.axvline(1, color=COLORS["base"], lw=1, ls=":")
        else:
            axis.set_xscale("log", base=2)
            axis.set_xticks(xs, names)
            axis.minorticks_off()

    def loss(axis):
        axis.fill_between(xs, [p["loss"]["low"] for p in points], [p["loss"]["high"] for p in points], color=COLORS["band"], lw=0)
        axis.plot(xs, [p["loss"]["value"] for p in points], "o-", color=COLORS["ink"], ms=4)
        along(axis, "held-out SimPO loss")

    def text(axis):
        values = [times * p["health"][healthy] for p in points]
        finite = [v for v in [*values, times * base[healthy]] if math.isfinite(v)] or [1]
        axis.axhline(times * base[healthy], color=COLORS["base"], lw=1, ls="--")
        axis.plot(xs, values, "o-", color=COLORS["other"], ms=4)
        axis.set_ylim((min(88, min(finite) - 2), 101) if healthy == "parse" else (0, 1.15 * max(finite)))      # so that noise does not look like news
        along(axis, word)
    numbers = table([kind.replace("_", "-"), "loss", "accuracy", *sound(base)], [[name, interval(p["loss"]), share(p["accuracy"]), *sound(p["health"]).values()] for name, p in zip(names, points, strict=True)])
    return figure(kind, says, [("Loss, with its 95% interval", loss), ("Is the text still sound? (dashed: base model)", text)], numbers)


def nats(x):
    """Cells of an entry of the ledger."""
    return interval(x, "+.4f"), share(x.get("share"))


def ledger_tokens(a, s):
    groups = s.get("token_groups", {})
    rows = [{"name": n, "color": color(n) if a.get("lab") else "other", "x": x, "bar": True} for n, x in s["tokens"].items()]
    numbers = table(["tokens", "nats a token", "share of the gain"], [[n, *nats(x)] for n, x in s["tokens"].items()] + [[tag("b", f"all {n}"), *nats(x)] for n, x in groups.items()],
                    f"The entries add up to the gain but for {num(s.get('tokens_error'), '.1e')} of it, which is rounding.")
    kinds = ("by what the token settles: one of the planted choices, a fact’s value, or mere form; exact, since the lab’s grammar is known" if a.get("lab") else
             "by kind of token: the first of a few rules on its text that fits")
    together = [f"{n} choices {num(x['value'], '+.3f')} nats" + (f", {said(x['share'], '.0f', 100, '%')} of the gain" if x.get("share") else "") for n, x in groups.items()]
    return join([figure("tokens", f"How much of the gain of {said(s['gain'], '+.3f')} nats a token falls on which tokens of the answers, {kinds}. The control is the base model’s log-probability of the "
                        "same token: 0 means unchanged.", [("Gain by token", lambda axis: forest(axis, rows, "nats a token", 1), (4.3, .6 + .28 * len(rows)))], numbers,
                        key("style", "alignment", base="a fact’s value, or mere form") if a.get("lab") else "", beside=True), tag("p", "Together: " + "; ".join(together) + ".") if together else ""])


def ledger_features(a, s):
    groups, places, gain, chance = s["groups"], s.get("regions", {}), s["gain"]["value"], s.get("chance", {})
    band = lambda c: [(gain * c["low"], gain * c["high"], gain * c["mean"], "band", "")] if c else []      # noqa: E731
    rows = [{"name": n, "color": color(n), "x": x["total"], "bar": True, "bands": band(chance.get(n))} for n, x in groups.items()]
    where_made = [{"name": n, "color": "other", "x": x, "bar": True} for n, x in places.items()]
    dealt = lambda c: (f"{c['features']:,}", share({k: c[k] for k in ("mean", "low", "high")}), num(c["p"], ".3f")) if c else ("–",) * 3      # noqa: E731
    numbers = [table(["features", "nats a token", "share of the gain", "how many", "labels dealt anew: share", "p"], [[n, *nats(x["total"]), *dealt(chance.get(n))] for n, x in groups.items()]),
               table(["tokens at which the push was made", "nats a token", "share of the gain"], [[n, *nats(x)] for n, x in places.items()], "No control: these entries add up to the gain, too.")]
    panels = [("Gain by label of the feature", lambda axis: forest(axis, rows, "nats a token", 1), (4.3, .8 + .4 * len(rows))),
              ("Gain by where the push was made", lambda axis: forest(axis, where_made, "nats a token", 1), (4.3, .8 + .4 * len(places)))]
    names = list(s["tokens"])
    sizes = [abs(v) for x in groups.values() for n in names if math.isfinite(v := x.get(n, {}).get("value", 0))]

    def heat(x):
        v = x.get("value", math.nan)
        return tag("td", num(v, "+.4f"), " ", tag("span", f"± {num(x.get('se'), '.4f')}", class_="ci"), class_="heat",
                   style=f"--c:var(--{'for' if v > 0 else 'against'});--a:{.55 * abs(v) / (max(sizes) or 1):.2f}" if math.isfinite(v) else None)
    held = ", ".join(f"the first {k}: {pc(x)}" for k, x in s["concentration"].items())
    alone = [[x["feature"], x["group"], f"{num(x['nats'], '+.4f')} ± {num(x['se'], '.4f')}", num(x["first_in"], "+.4f"), num(x["last_out"], "+.4f")] for x in s.get("features", [])]
    return join([
        "" if a.get("labels") else unlabelled(),
        figure("groups", f"The gain of {s['feature_pairs']} pairs, split over features by integrated gradients and added up by label, with its interval; grey, the control: what the same number of features "
               "brings when the labels are dealt anew among the judged, steered features (95% of 999 deals, with the mean). In the second panel the same gain by where the push was made; a push on "
               "the prompt acts on both answers, through attention.", panels, join(numbers), key("style", "alignment", "dealt", base="neither, or not judged")),
        table(["gain on … tokens", *(f"from {n} features" for n in groups)], [[n, *(heat(x.get(n, {})) for x in groups.values())] for n in names],
              "Which features brought the gain on which tokens: nats a token ± s.e. over prompts, green for, red against the preference. It has no control of its own; the figure above has, for the sums of the columns."),
        tag("p", f"Of the summed sizes of all entries, the largest entries hold: {held}. The entries add up to the gain but for {pc(s['completeness'], '.2f')} of it: that checks the arithmetic (enough points "
                 "of integration), it does not validate the method."),
        fold(f"The largest {len(alone)} features: ledger, first in, last out", table(["feature", "label", "ledger, nats ± s.e.", "first in", "last out"], alone,
             "First in: the gain when only this feature acts. Last out: the gain lost when only it is masked. They are each other’s control: where they differ, features interact, and the ledger’s "
             "entry lies between by convention."))])


def shaded(tokens, background, line, breaks=False):
    """Tokens by strength, in shares of the largest. background, line: token -> number; one hue for a background, two for a line or a sign."""
    out = []
    for t in tokens:
        f, v = background(t), line(t)
        kind = ("p" if v > 0 else "n") if breaks else "u" if v > 0 else "d" if v < 0 else "f"
        text = esc(visible(t["token"], breaks))
        exact = "; ".join(f"{word} {num(t[k], '+.3g')}" for k, word in (("f", "activation"), ("v", "steering"), ("nats", "nats")) if k in t)
        out.append(tag("i", text, class_=kind, style=f"--f:{f:.2f};--v:{abs(v):.2f}" if not breaks else f"--v:{abs(v):.2f}", title=exact) if max(f, abs(v)) >= .02 else text)
    return tag("div", *out, class_="tokens")


def relative(tokens, k):
    """token -> its number k as a share of the largest of all these."""
    top = max([abs(t[k]) for t in tokens if math.isfinite(t[k])] or [0]) or 1
    return lambda t: t[k] / top if math.isfinite(t[k]) else 0.0


def card(x, is_open):
    """The dashboard of one feature."""
    every = [t for part in ("steered_at", "fires_at") for text in x[part] for t in text]
    scales = relative(every, "f"), relative(every, "v")
    logit = lambda some: tag("div", *(tag("code", visible("␣" + t[1:] if t[:1] in (" ", "▁") else t), tag("small", f" {num(v, '+.2f')}")) for t, v in some), class_="logit")      # noqa: E731
    facts = {"first in / last out": f"{num(x['first_in'], '+.4f')} / {num(x['last_out'], '+.4f')}", "steered": f"at {pc(x['steered'], '.1f')} of tokens, {pc(x['up'])} of them up",
             "fires": f"at {pc(x['fires'], '.1f')} of tokens", "usage": f"{pc(x['usage'], '.1f')} of all steering"}
    head = tag("summary", tag("span", num(x["nats"], "+.4f"), tag("small", f" ± {num(x['se'], '.4f')} nats"), class_="nats"), tag("strong", x["feature"]), " ", chips(x["labels"]),
               tag("div", x["description"] or "No description.", tag("small", f" (by {x['by']})") if x.get("by") else "", class_="what"))
    texts = [join([tag("h4", title), *(shaded(t, *scales) for t in x[part])]) for part, title in (("steered_at", "Steered most"), ("fires_at", "Fires most")) if x[part]]
    return tag("details", head, tag("dl", *(join([tag("dt", k), tag("dd", v)]) for k, v in facts.items())), tag("h4", "Pushed up, it makes likelier"), logit(x["raises"]),
               tag("h4", "and less likely"), logit(x["lowers"]), *texts, class_="card", open="open" if is_open else None)


def features(a, s):
    return join([
        tag("p", f"The {len(s)} features with the largest entries in the ledger. The texts are those where a feature is steered most, and those where it fires most: a policy may use a feature "
                 "where it never fires by itself, and then what it fires on does not say what the steering is for."),
        tag("p", "On each token: ", tag("i", "fires", style="--f:.9", class_="f"), " (background), ", tag("i", "pushed up", style="--v:1", class_="u"), " or ",
            tag("i", "pushed down", style="--v:1", class_="d"), " (line below), the stronger the deeper, within a card. Beside the number of a feature: its label, and its entry in the ledger ± s.e., in nats a token. "
            "The effect on tokens is the direct one, through the final norm and the head, around the blocks in between; it has no control.", class_="note"),
        tag("div", *(card(x, n < 6) for n, x in enumerate(s)), class_="cards")])


def examples(a, s):
    out = [tag("p", "Pairs from the largest gain to the smallest, evenly spaced. A token’s colour is its share of the pair’s gain: ", tag("i", "green", class_="p", style="--v:.8"), " for, ",
               tag("i", "red and dotted", class_="n", style="--v:.8"), " against the preference, by strength within a pair; a chosen answer gains when its tokens become likelier, a rejected one when they "
               "become less likely. The control is the base model’s log-probability of the same token.")]
    for e in s:
        scale = relative(e["chosen"] + e["rejected"], "nats")
        sides = [tag("div", tag("h4", side), shaded(e[side], lambda t: 0, scale, breaks=True)) for side in ("chosen", "rejected")]
        first = join(["First features: ", *(join([tag("b", x["feature"]), f" {num(x['nats'], '+.3f')} ", chips(x["labels"]), " "]) for x in e["features"])])
        rows = [[x["feature"], chips(x["labels"]), num(x["nats"], "+.4f"), tag("td", x["description"], class_="text")] for x in e["features"]]
        margin = f"margin {num(e['base'], '+.3f')} → {num(e['steered'], '+.3f')}, gain {num(e['steered'] - e['base'], '+.3f')} nats a token"
        out.append(tag("div", tag("p", visible(e["prompt"], True).strip(), class_="prompt"), tag("small", margin), tag("div", *sides, class_="two"),
                       fold(first, table(["feature", "label", "nats", "what it is about"], rows)) if rows else "", class_="pair"))
    return join(out)


def geometry(a, s):
    total = s["size"] ** 2 or 1
    grown = [sum(s["spectrum"][:k + 1]) / total for k in range(len(s["spectrum"]))]

    def spectrum(axis):
        logarithmic(axis)
        axis.plot(range(1, len(grown) + 1), [100 * x for x in grown], color=COLORS["ink"], lw=1.8)
        axis.axhline(90, color=COLORS["base"], lw=.8, ls=":")
        axis.set(xlabel="directions, r", ylabel="share of Σ‖Δh‖², %", ylim=(0, 103))
        axis.grid()

    def gain(axis):
        logarithmic(axis)
        for name, c in (("random", "base"), ("top", "ink")):
            axis.plot([d["r"] for d in s["directions"]], [100 * d[name]["gain"] for d in s["directions"]], "o-" if name == "top" else "o--", color=COLORS[c], ms=4, lw=1.5)
        axis.axhline(100, color=COLORS["base"], lw=.8, ls=":")
        axis.set(xlabel="directions that may act, r", ylabel="share of the gain, %")
        axis.grid()
    numbers = table(["r", "share of Σ‖Δh‖²", "gain, top r", "gain, random r", "loss, top r", "loss, random r"], [
        [d["r"], pc(grown[d["r"] - 1] if d["r"] <= len(grown) else None, ".1f"), pc(d["top"]["gain"], ".1f"), pc(d["random"]["gain"], ".1f"), num(d["top"]["loss"]), num(d["random"]["loss"])]
        for d in s["directions"]])
    facts = [["effective directions (participation)", f"{num(s['participation'], '.1f')} of {s['d_in']}", f"{num(s['centred']['participation'], '.1f')} about the mean"],
             ["directions for 90% and 95%", f"{s['d90']} and {s['d95']}", f"{s['centred']['d90']} and {s['centred']['d95']} about the mean"],
             ["share that one constant vector explains", pc(s["constant"]), "100%: the same push everywhere"],
             ["size of the steering", num(s["size"], ".2f"), f"{num(s['state_size'], '.2f')}: size of the state itself"],
             ["cosine of the mean push with chosen − rejected states", num(s["cosine"], "+.2f"), f"±{num(s['chance'], '.2f')}: chance"],
             ["gain with the mean push alone", pc(s["mean_only"]["gain"]), "100%: the whole policy"], ["gain without the mean push", pc(s["without_mean"]["gain"]), "100%: the whole policy"]]
    return join([figure("geometry", "First panel: how much of the steering lies in its first r directions (dotted: 90%). Second: how much of the gain is left when only these act; dashed, the control: "
                        "r random directions of the same space.", [("Steering in its first directions", spectrum), ("Gain with these directions alone", gain)], numbers, key("top", "directions")),
                 table(["", "measured", "beside"], facts, f"The shape of the steering over {s['tokens']:,} tokens of answers; the last column holds what each number is to be compared with.")])


def calibrated(x):
    if not x:
        return absent("No calibration is part of this report:", "--calibrate RUNS", "makes one on runs of the lab.")
    cell = lambda c: "–" if c is None else num(c, ".3g") if isinstance(c, float) else c      # noqa: E731
    code = lambda text: Html(re.sub(r"`([^`]*)`", r"<code>\1</code>", esc(text)))      # noqa: E731
    numbers = lambda t: table(t["head"], [[cell(c) for c in row] for row in t["rows"]], code(t.get("note", "")))      # noqa: E731
    return join([tag("ul", *(tag("li", code(text)) for text in x.get("sentences", []))),
                 *(join([tag("h3", t["title"]), numbers(t)]) if t.get("first") else fold(t["title"], numbers(t)) for t in x.get("tables", []))])


def made(a):
    c = a.get("config", {})
    digests = " · ".join(str(a.get(k) or "none") for k in ("adapter", "pairs_sha256", "labels_sha256"))
    facts = {"run": where(a), "trained with": a["objective"], "on": f"{a['pairs']}, seed {c.get('seed', '–')}", "model": a.get("model"), "SAE": a.get("sae"), "layer": a.get("layer"),
             "read on": f"split {a.get('split')}: {a.get('held_out')} held-out pairs, {a.get('prompts')} prompts" + (f", {a.get('facts')} facts" if a.get("lab") else ""),
             "digests": f"{digests} (adapter, pairs, labels)", "made": f"{a.get('date', '–')}, {a.get('machine', '–')}, {num(a.get('seconds'), '.0f')} seconds",
             "command": tag("code", f"python analyze.py {where(a)}")}
    return join([tag("dl", *(join([tag("dt", k), tag("dd", v)]) for k, v in facts.items())),
                 fold("All settings of the training run", table(["setting", "value"], [[k, tag("td", v, class_="text")] for k, v in c.items()])),
                 tag("p", "Bootstrap: 2000 draws of whole prompts or facts with replacement, percentiles 2.5 and 97.5, seed 0. No token is ever drawn on its own: tokens of an answer depend on each other.", class_="note")])


# ---- the file -------------------------------------------------------------------------------------------------------------------------

CONTENTS = {"behaviour": "1 Behaviour", "usage": "2 Usage", "labels": "3 Labels", "rates": "4 Label rates", "causes": "5 Causes", "ledger": "6 Ledger", "pairs": "Ten pairs",
            "calibration": "7 Calibration", "geometry": "8 Geometry", "features": "9 Features", "made": "How this was made"}


def write(analysis, path, calibration=None):
    """Fills report.html. analysis: what analysis.json holds; calibration: {"sentences": [...], "tables": [{"title", "head", "rows", "note"}]}. -> path"""
    a = {**analysis, "sections": numbers(analysis["sections"])}
    s, says, alarms = a["sections"], a.get("verdict") or verdict(a), ""
    shown = {name: show(a, s[name]) if name in s else missing(a, name) for name, show in (("behaviour", behaviour), ("usage", usage), ("causes", causes), ("geometry", geometry))}
    shown["rates"] = rates(a, s["rates"]) if "rates" in s else missing(a, "rates", "Label rates") if a.get("labels") else unlabelled()
    for name, part, show, word in (("ledger_tokens", "ledger", ledger_tokens, "The ledger"), ("ledger_features", "ledger", ledger_features, "The ledger"),
                                   ("examples", "examples", examples, "The list of pairs"), ("features", "features", features, "What single features do")):
        shown[name] = show(a, s[part]) if s.get(part) else missing(a, "ledger", word)
    if says.get("alarms"):
        alarms = tag("div", tag("b", "The text is not sound:"), tag("ul", *(tag("li", x) for x in says["alarms"])), class_="alarm", role="alert")
    elif "behaviour" in s:
        alarms = tag("p", "No alarm: by every measure of section 1 the text is about as sound as before.", class_="sound")
    over = f"Trained with {a['objective']}. Read on {num(a.get('held_out'), ',')} held-out pairs of {a['pairs']}; {a.get('model')}, steered at layer {a.get('layer')}."
    wide = ", and below them, as “facts”, drawing all prompts about one fact together, which is the safer of the two" if a.get("lab") else ""
    page = string.Template((HERE / "report.html").read_text(encoding="utf-8")).substitute(
        shown, name=esc(a["run"]), over=esc(over), verdict=join(tag("p", x) for x in says["sentences"]), alarms=alarms, labels=labels(a, a.get("labels")), calibration=calibrated(calibration),
        made=made(a), interval=f"[low, high]: 95% bootstrap intervals, drawing whole prompts{wide}. Tokens are never drawn.", contents=join((tag("a", text, href=f"#{x}") for x, text in CONTENTS.items()), " "))
    atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path
