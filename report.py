"""What analyze.py found: the verdict in words, a page of text, and report.html filled in: one file, no network, everything escaped."""
import html
import io
import math
import re
import string
import warnings
from pathlib import Path

from gemma import HERE, atomically

# ---- the verdict -----------------------------------------------------------------------------------------------------------------

def objective(config):
    """What a run was trained with, in words."""
    nll, weight = config.get("nll_weight", 0), config.get("simpo_weight", 1)
    parts = [f"SimPO ({'hinge, ' if config.get('loss') == 'hinge' else ''}β {config.get('beta', 10):g}, γ/β {config.get('gamma_ratio', .5):g})"
             + (f" at weight {weight:g}" if weight != 1 else "")] if weight else []
    if nll:
        parts.append(f"{nll:g} × NLL of the chosen answers" if weight else "imitation alone (NLL of the chosen answers)")
    return " + ".join(parts) + f" + {config.get('l1', 0):g} × ℓ1" + (", the paper's loss" if weight and not nll else "")


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
    elif tokens := s.get("ledger", {}).get("tokens"):
        best = sorted(tokens, key=lambda c: -tokens[c]["value"])[:3]
        parts.append("of the gain " + ", ".join(f"{percent(tokens[c]['share'])} falls on {c} tokens" for c in best))
    for name, x in s.get("causes", {}).get("sets", {}).items():
        if name != "both":
            control = x["matched"] if x["matched"]["claim"] else x["random"]
            kind = "of the same usage" if x["matched"]["claim"] else "of the same size; none of the same usage is left"
            parts.append(f"without the {x['steered']} steered features labelled {name}, {percent(x['mask']['share'])} is lost (random sets {kind}: {100 * control['lost']['mean']:.0f}% [{100 * control['lost']['low']:.0f}, {100 * control['lost']['high']:.0f}])")
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
            lines.append(f"  {name:<9} ({x['steered']} features) lost {percent(x['mask']['share'])}, random {three('random', 'lost')}, matched {three('matched', 'lost')}"
                         f" | left {percent(x['keep']['share'])}, random {three('random', 'left')}, matched {three('matched', 'left')}")
    if x := s.get("ledger"):
        lines.append(f"\nLedger of the gain, nats a token: {interval(x['gain'], '{:+.4f}')}")
        lines += [f"  tokens    {name:<11} {interval(y, '{:+.4f}')}" + (f"   {percent(y['share'])}" if "share" in y else "") for name, y in x["tokens"].items()]
        lines += [f"  features  {name:<11} {interval(y['total'], '{:+.4f}')}" + (f"   {percent(y['total']['share'])}" if "share" in y["total"] else "") for name, y in x["groups"].items()]
        lines.append(f"  completeness error of the features {x['completeness']:.2%}; the first 10 features hold {x['concentration']['10']:.0%} of Σ|entry|")
    if g := s.get("geometry"):
        lines.append(f"\nGeometry: {g['participation']:.1f} effective directions of {g['d_in']} (90% in {g['d90']}), a constant vector explains {g['constant']:.0%}; cosine with the mean difference {g['cosine']:+.2f} (chance ±{g['chance']:.2f})")
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
    """A number with a proper minus sign; – for what is no finite number."""
    return f"{times * x:{form}}{unit}".replace("-", "−") if isinstance(x, (int, float)) and math.isfinite(x) else "–"


def interval(x, form=".3f", times=1, unit=""):
    """value [low, high], and below it the interval over facts where there is one."""
    if x is None:
        return "–"
    pair = lambda low, high: f"[{num(x.get(low), form, times)}, {num(x.get(high), form, times)}]"      # noqa: E731
    wide = tag("span", "facts " + pair("facts_low", "facts_high"), class_="ci facts") if "facts_low" in x else ""
    return join([num(x.get("value"), form, times, unit), " ", tag("span", pair("low", "high"), class_="ci"), wide])


def share(x):
    return interval(x, ".0f", 100, "%") if x else "–"


def table(head, rows, note=""):
    """Rows of cells; a cell is text, or a ready <td>. The first of each row is its heading."""
    cell = lambda x: x if isinstance(x, Html) and x.startswith("<td") else tag("td", x)      # noqa: E731
    body = join(tag("tr", tag("th", first, scope="row"), *map(cell, rest)) for first, *rest in rows)
    out = tag("div", tag("table", tag("thead", tag("tr", *(tag("th", h, scope="col") for h in head))), tag("tbody", body)), class_="scroll", tabindex="0")
    return join([out, tag("p", note, class_="note tablenote") if note else ""])


def fold(title, *inside, **attributes):
    return tag("details", tag("summary", title), *inside, **attributes)


def key(*entries):
    """A figure's legend: (colour, text) or (colour, text, "box" or "ring")."""
    return tag("div", *(tag("span", tag("i", style=f"--c:var(--{c})", class_=" ".join(shape)), text) for c, text, *shape in entries), class_="key")


def missing(a, section, name=None):
    return tag("p", f"{name or section.capitalize()} was not computed for this report: ", tag("code", f"python analyze.py {where(a)} --only {section}"), " adds it.", class_="missing")


def unlabelled():
    return tag("p", "There are no labels for this SAE, so nothing is said by label here. ", tag("code", "python analyze.py --make-labels KIND"), " makes them; then run the analysis again.", class_="missing")


def where(a):
    c = a.get("config", {})
    return c.get("run") or f"{c.get('runs', 'runs')}/{a['run']}"


def chips(labels):
    names = ["unlabelled"] if labels is None else ["both"] if len(labels) > 1 else labels or ["neither"]
    return join(tag("span", n, class_=f"chip {n}") for n in names)


def visible(token, breaks=False):
    """A token as one reads it: newlines, tabs and control characters become signs."""
    signs = {"\n": "⏎\n" if breaks else "⏎", "\t": "⇥", "▁": " "}
    return "".join(signs.get(c) or (chr(0x2400 + ord(c)) if c < " " else c) for c in token)


# ---- figures: matplotlib draws them if it is there; the tables hold the same numbers ------------------------------------------------

# Drawn in these colours, shown in the page's: light or dark.
COLORS = {"style": "#b4552d", "alignment": "#2f6f4f", "both": "#7a5a9e", "base": "#868d96", "ink": "#20262e", "band": "#d3d7dc", "other": "#33557f", "dim": "#5b636e", "rule": "#dfe2e6"}
ALIGNMENT = ("truth", "admit", "decline", "alignment", "refusal", "hedge")


def color(name):
    """Of a choice, a kind of token or a group of features."""
    return "both" if name == "both" else "alignment" if name in ALIGNMENT else "base" if name in ("value", "form", "rest", "parse", "neither", "not judged") else "style"


def svg(name, paint, size=(4.3, 2.8)):
    """paint(axis) as SVG without its prolog, with ids of its own and the page's colours; "" without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    ink, dim = COLORS["ink"], COLORS["dim"]
    look = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "text.color": ink,
            "axes.labelcolor": dim, "axes.edgecolor": COLORS["base"], "xtick.color": COLORS["base"], "ytick.color": COLORS["base"], "xtick.labelcolor": dim, "ytick.labelcolor": ink,
            "axes.unicode_minus": True, "grid.color": COLORS["rule"], "axes.axisbelow": True}
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
    return Html(re.sub(r"\s*\n\s*", "\n", text))


def figure(name, says, panels, tables, legend=""):
    """panels: (title, paint, size). The numbers are folded below the figure, or stand open where nothing draws it."""
    drawn = [(title, svg(f"{name}-{k}", paint, size)) for k, (title, paint, size) in enumerate(panels)]
    if not panels or not drawn[0][1]:
        return join([tag("p", says, class_="note"), tables])
    boxes = tag("div", *(tag("div", tag("h4", title), picture) for title, picture in drawn), class_="panels", role="img", aria_label=says)
    return join([tag("figure", legend, boxes, tag("figcaption", says)), fold("The numbers", tables)])


def forest(axis, rows, xlabel, percent=True, zero=True):
    """A dot with its interval a row, over the bands of its controls. rows: {"name", "color", "x" (value, low, high), "bands": [(low, high, mean, color, text)], "from"}"""
    k = 100 if percent else 1
    for y, row in enumerate(rows):
        x, bands = row.get("x"), row.get("bands", [])
        for n, (low, high, mean, c, text) in enumerate(bands):
            at = y + .2 + .2 * n if row.get("below") else y
            tall = .16 if row.get("below") else .62
            axis.barh(at, k * (high - low), tall, k * low, color=COLORS[c], alpha=.35 if text else .95, lw=0)
            if mean is not None:
                axis.plot([k * mean] * 2, [at - tall / 2, at + tall / 2], color=COLORS["ink"], lw=1.2, alpha=.4 if text else .9)
            if text:
                axis.text(k * high, at, "  " + text, va="center", fontsize=7, color=COLORS["dim"])
        if row.get("bar"):
            axis.barh(y, k * x["value"], .62, color=COLORS[row["color"]], alpha=.45, lw=0)
        at = y - .12 if row.get("below") else y
        if (start := row.get("from")) is not None:
            axis.plot([k * start, k * x["value"]], [at, at], color=COLORS[row["color"]], lw=2, alpha=.5)
            axis.plot(k * start, at, "o", mfc="none", mec=COLORS[row["color"]], ms=5.5)
        axis.plot([k * x["low"], k * x["high"]], [at, at], color=COLORS[row["color"]], lw=1.6)
        axis.plot(k * x["value"], at, "o", color=COLORS[row["color"]], ms=2.5 if row.get("bar") else 5)
    axis.set_yticks(range(len(rows)), [r["name"] for r in rows])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(rows) - .4, -.6)
    axis.set_xlabel(xlabel)
    if zero:
        axis.axvline(0, color=COLORS["base"], lw=.8, zorder=0)
    axis.grid(axis="x", lw=.6)


# ---- the sections --------------------------------------------------------------------------------------------------------------------

def behaviour(a, s):
    out, both = [], [("greedy", "greedy"), ("sampled", "sampled, T=1")]
    words = {"parse": ("well-formed answers", ".1f", 100, "%"), "perplexity": ("base model’s perplexity of the answers", ".2f"), "repetition": ("repeated 4-grams", ".1f", 100, "%"),
             "markdown": ("answers with markdown", ".1f", 100, "%"), "non_ascii": ("characters beyond ASCII", ".2f", 100, "%"), "tokens": ("tokens an answer", ".1f"), "words": ("words an answer", ".1f"),
             "lines": ("lines an answer", ".1f"), "distinct": ("distinct words, of all words", ".3f")}
    if choices := s["sampled"].get("choices"):
        rows = [{"name": n if (w := c.get("weight")) is None else f"{n} ({w:+g})".replace("-", "−"), "color": color(n), "from": c["base"],
                 "x": {"value": c["steered"], "low": c["base"] + c["change"]["low"], "high": c["base"] + c["change"]["high"]}} for n, c in choices.items()]

        def against(axis):
            for n, c in choices.items():
                if c.get("weight") is not None:
                    x, y = c["weight"], c["change"]
                    axis.plot([x, x], [100 * y["low"], 100 * y["high"]], color=COLORS[color(n)], lw=1.4)
                    axis.plot(x, 100 * y["value"], "o", color=COLORS[color(n)], ms=5)
                    axis.annotate(n, (x, 100 * y["value"]), (5, 3), textcoords="offset points", fontsize=7.5, color=COLORS["dim"])
            axis.axhline(0, color=COLORS["base"], lw=.8, zorder=0)
            axis.set_xlabel("planted weight of the choice, in the utility")
            axis.set_ylabel("change of its rate, points")
            axis.margins(x=.14)
        says = (f"How often each choice is made in answers sampled at temperature 1 to {s['prompts']} held-out prompts, base model (ring, the control) → policy (dot; the line through it is the 95% interval "
                "of the change, over facts). In brackets the planted weight: what the preferences really paid for.")
        numbers = table(["choice", "planted weight", *(f"{t}: {c}" for _, t in both for c in ("base", "steered", "change, points"))],
                        [[n, num(c.get("weight"), "+g"), *(x for kind, _ in both for d in [s[kind].get("choices", {}).get(n)] for x in (
                            (num(d["base"], ".1f", 100, "%"), num(d["steered"], ".1f", 100, "%"), interval(d["change"], "+.1f", 100)) if d else ("–",) * 3))] for n, c in choices.items()])
        panels = [("Rate of each choice, base → policy", lambda axis: (forest(axis, rows, "share of answers, %", zero=False), axis.set_xlim(0, 100)), (4.3, .6 + .27 * len(rows)))]
        if any(c.get("weight") is not None for c in choices.values()):
            panels.append(("Change beside what was planted", against, (4.3, .6 + .27 * len(rows))))
        out.append(figure("behaviour", says, panels, numbers, key(("base", "base model", "ring"), ("style", "style choice"), ("alignment", "alignment choice"))))
    got = [n for n in words if n in s["sampled"]["base"]]
    rows = [[words[n][0], *(num(s[kind][who].get(n), *words[n][1:]) for kind, _ in both for who in ("base", "steered"))] for n in got]
    rows.append(["KL from the base model on neutral text, nats a token", "", num(s.get("kl")), "", num(s.get("kl"))])
    out.append(tag("h3", "Health of the text"))
    out.append(table(["", *(f"{t}: {who}" for _, t in both for who in ("base", "steered"))], rows,
                     f"Whether the answers to {s['prompts']} held-out prompts are still text: each measure beside the base model’s own answers, which are the control. A measure that is much worse raises an alarm at the top."))
    if s.get("examples"):
        out.append(fold("Some answers, base beside policy", *(tag("div", tag("p", visible(e["prompt"]).strip(), class_="prompt"), tag("div", *(
            tag("div", tag("h4", f"{t}, {who}"), tag("p", e.get(f"{kind}_{who}", ""), class_="answer")) for kind, t in both for who in ("base", "steered")), class_="two"), class_="pair") for e in s["examples"])))
    return join(out)


def usage(a, s):
    def curve(region):
        def paint(axis):
            for name, c, text in (("sae", "base", "SAE’s own"), ("steering", "ink", "steering")):
                x = s["regions"][region][name]
                axis.loglog(x["rank"], x["curve"], color=COLORS[c], lw=1.8 if name == "steering" else 1.4, ls="-" if name == "steering" else "--")
            axis.set_xlabel("rank of the feature")
            axis.set_ylabel("share of tokens")
            axis.grid(lw=.5)
        return paint
    at = sorted({k for x in s["regions"].values() for y in ("steering", "sae") for k in x[y]["rank"] if k in (1, 2, 3, 5, 10, 20, 50, 100)} | {x[y]["rank"][-1] for x in s["regions"].values() for y in ("steering", "sae") if x[y]["rank"]})
    ranked = lambda x, k: num(dict(zip(x["rank"], x["curve"])).get(k), ".2f", 100, "%")      # noqa: E731
    says = "Share of a region’s tokens at which a feature is steered, the most used feature first, both axes logarithmic; beside it, dashed, the control: the SAE’s own activations at the same tokens. A flatter curve is more even use."
    out = [figure("usage", says, [(f"{r} tokens ({x['tokens']:,.0f})", curve(r), (3.6, 2.6)) for r, x in s["regions"].items()],
                  table(["rank", *(f"{r}: {y}" for r in s["regions"] for y in ("steering", "SAE"))], [[k, *(ranked(x[y], k) for x in s["regions"].values() for y in ("steering", "sae"))] for k in at]),
                  key(("ink", "steering", "box"), ("base", "the SAE’s own activations", "box")))]
    rows = [[f"{r}: {y if y == 'steering' else 'SAE'}", interval(x[y]["l0"], ".1f"), f"{x[y]['used']:,} of {s['d_sae']:,}", num(x[y]["top1"], ".0f", 100, "%"), num(x[y]["top10"], ".0f", 100, "%"),
             num(x[y]["gini_used"], ".2f"), num(x[y]["gini_all"], ".2f"), num(x[y]["slope"], ".4f")] for r, x in s["regions"].items() for y in ("steering", "sae")]
    out.append(table(["region", "features a token (L0)", "ever used", "events on the top 1%", "on the top 10%", "Gini, used", "Gini, all", "slope, log₁₀ a rank"], rows,
                     "How many features act and how evenly: steering, and in the next row its control, the SAE’s own activations. Gini 0: all used alike; near 1: one does everything."))
    seeds = s.get("seeds", {})
    if seeds.get("jaccard"):
        out.append(tag("p", f"Of the {seeds['top']} most used features, runs that differ in their seed alone ({', '.join(seeds['runs'])}) share: Jaccard {num(sum(seeds['jaccard']) / len(seeds['jaccard']), '.2f')} on the mean of "
                            f"{len(seeds['jaccard'])} pairs of runs; control, sets drawn at random from the steered ones: {num(seeds['chance'], '.2f')}."))
    else:
        out.append(tag("p", "Whether another seed would use the same features cannot be said: no run that differs in its seed alone lies beside this one."))
    return join(out)


def labels(a, s):
    if not s:
        return unlabelled()
    only = {"style": s["style"] - s["both"], "both": s["both"], "alignment": s["alignment"] - s["both"], "neither": s["neither"], "unlabelled": s["unlabelled"]}
    words = {"style": "style only", "alignment": "alignment only", "unlabelled": "unlabelled: not asked, or no usable answer"}
    by = join((tag("b", x) for x in s["by"]), ", ")
    return join([tag("p", "Source of the labels: ", by, ". Another source would give other labels; where two exist, ", tag("code", "python analyze.py --agree"), " says how far they agree."),
                 tag("div", *(tag("i", class_=n, style=f"flex:{max(0, x):.4f} 0 0", title=f"{n} {x:.1%}") for n, x in only.items() if x > 0), class_="bar", role="img", aria_label="Shares of features by label; the table has the numbers."),
                 table(["label", "share of the SAE’s features"], [[tag("span", words.get(n, n), class_=f"chip {n}"), num(x, ".1f", 100, "%")] for n, x in only.items()],
                       "Each feature counts once. Unlabelled is not the same as neither: unlabelled features are left out of sections 4 and 5. Nothing is compared here, so there is no control.")])


def rates(a, s):
    names = list(dict.fromkeys(n for x in s["regions"].values() for n in x))

    def paint(label):
        rows = [{"name": region, "color": color(label), "x": x[label]["change"], "bands": [(*x[label]["shuffled"], None, "band", "")]} for region, x in s["regions"].items() if label in x]
        return (f"{label}: change of its share, SAE → steering", lambda axis: forest(axis, rows, "change, % of the SAE’s own share"), (4.3, .7 + .38 * len(rows)))
    head = ["region, label", "of the SAE’s active features", "of the steered features", "change", "labels dealt anew, 95%", "p", "SAE, a pair", "steered, a pair"]
    rows = [[f"{region}, {n}", share(x["sae"]), share(x["steering"]), interval(x["change"], "+.0f", 100, "%"), f"[{num(x['shuffled'][0], '+.0f', 100)}, {num(x['shuffled'][1], '+.0f', 100)}]", num(x["p"], ".2f"),
             share(x.get("sae_per_pair")), share(x.get("steering_per_pair"))] for region, some in s["regions"].items() for n, x in some.items()]
    says = ("How much larger (or smaller) a label’s share is among the steered features than among the SAE’s own active ones, with its interval; grey, the control: the range of the same number in 95 of 100 deals "
            "of the labels among the judged features. A dot inside the grey band says nothing about that label.")
    theory = ", ".join(f"{n} {num(x, '.0f', 100, '%')}" for n, x in s["theory"].items())
    mass = ", ".join(f"{n} {num(x, '.0f', 100, '%')}" for n, x in s.get("mass", {}).items())
    return join([figure("rates", says, [paint(n) for n in names], table(head, rows, "p: share of the deals that moved the number at least as far. A pair: every pair counts once, instead of every token."),
                        key(("style", "style"), ("alignment", "alignment"), ("band", "labels dealt anew (control)", "box"))),
                 tag("p", f"If all {s['judged']['features']:,} judged features (of {s['judged']['of']:,}) were active equally often, the shares would be {theory}. Weighed by how far features are pushed (Σ‖v d‖), instead of how often: {mass}.")])


def causes(a, s):
    out = [tag("p", f"With all features, the policy’s gain is {num(s['gain']['value'], '+.3f')} nats a token [{num(s['gain']['low'])}, {num(s['gain']['high'])}], its loss {num(s['loss']['base']['value'])} → {num(s['loss']['steered']['value'])}, "
                    f"its accuracy {num(s['accuracy']['base']['value'], '.1f', 100, '%')} → {num(s['accuracy']['steered']['value'], '.1f', 100, '%')}; {s['used']:,} features are steered at all.")]
    band = lambda x, what: (x[what]["low"], x[what]["high"], x[what]["mean"])      # noqa: E731
    three = lambda x, what: Html(f"{num(x[what]['mean'], '.0f', 100, '%')} <span class=\"ci\">[{num(x[what]['low'], '.0f', 100)}, {num(x[what]['high'], '.0f', 100)}]</span>")      # noqa: E731
    if s.get("sets"):
        def paint(what, do):
            rows = [{"name": f"{n}\n({x['steered']})", "color": color(n), "x": x[do]["share"], "below": True, "bands": [(*band(x["random"], what), "band", ""), (*band(x["matched"], what), "base", "" if x["matched"]["claim"] else
                     f"no claim (match {num(x['matched']['match'], '.2f')})")]} for n, x in s["sets"].items()]
            return lambda axis: forest(axis, rows, "share of the gain, %")
        panels = [("Lost when the set is masked", paint("lost", "mask"), (4.3, 2.9)), ("Left when only the set acts", paint("left", "keep"), (4.3, 2.9))]
        says = (f"Share of the gain that goes with a set of features (how many are steered in brackets) and its interval. Controls, {s['draws']} of each, as the band of 95% with the mean: sets of the same size drawn from all steered features, "
                "and sets outside the label that are used as much. Where nothing like that is left to draw (match below 0.8), no claim is made and the band is pale.")
        rows = []
        for n, x in s["sets"].items():
            for do, what, word in (("mask", "lost", "lost when masked"), ("keep", "left", "left when alone")):
                control = lambda kind: three(x[kind], what) if kind == "random" or x[kind]["claim"] else join([three(x[kind], what), tag("span", f"no claim: match {num(x[kind]['match'], '.2f')}", class_="ci facts")])      # noqa: E731, B023
                rows.append([f"{n}: {word}", f"{x['steered']} of {x['labelled']}", num(x["usage"], ".0f", 100, "%"), share(x[do]["share"]), control("random"), num(x["random"].get(f"p_{what}"), ".2f"), control("matched"),
                             num(x["matched"].get(f"p_{what}"), ".2f") if x["matched"]["claim"] else "–", num(x[do]["loss"]["value"]), num(x[do]["accuracy"]["value"], ".1f", 100, "%"), *sound(x[do]["health"])])
        numbers = table(["set", "steered, of labelled", "share of usage", "share of the gain", "random sets", "p", "matched sets", "p", "loss", "accuracy", *sound_head(s)], rows,
                        f"p: share of the control sets that do at least as much, on {s['draw_pairs']} pairs. Loss, accuracy and text are those of the policy that is left.")
        out.append(figure("causes", says, panels, numbers, key(("style", "style"), ("alignment", "alignment"), ("both", "both together"), ("band", "random sets of the same size", "box"), ("base", "sets of the same usage", "box"))))
        if p := s.get("per_feature"):
            names = [n for n in p if n not in ("ratio", "errors")]
            note = (f"What masking a label adds to the loss, shared among its features: the paper’s number. Ratio style : alignment {num(p['ratio'], '.2f')}. Its control is wrong labels: with " +
                    "; with ".join(f"{num(float(e), '.0f', 100, '%')} of each set exchanged at random it comes out from {num(x[0], '.2f')} to {num(x[1], '.2f')}" for e, x in p["errors"].items()) + ".")
            out.append(table(["label", "loss added", "a labelled feature", "a steered feature"], [[n, num(p[n]["added"], "+.4f"), num(p[n]["a_labelled_feature"], "+.6f"), num(p[n]["a_steered_feature"], "+.6f")] for n in names], note))
    else:
        out.append(unlabelled())
    for kind, title, says in (("strength", "Strength", "The steering multiplied by a factor: 0 is the base model, 1 (dotted) the policy as trained; both are the controls for what lies between and beyond."),
                              ("top_k", "Top-k", "Only the k most strongly pushed features of every token act; the control is “all”, the policy as trained.")):
        if points := s.get(kind):
            out += [tag("h3", title), sweep(kind, points, says)]
    return join(out)


def sound(x):
    return [num(x["parse"], ".1f", 100, "%")] * ("parse" in x) + [num(x["perplexity"], ".2f"), num(x["repetition"], ".1f", 100, "%")]


def sound_head(s):
    return ["well-formed"] * ("parse" in s.get("health", {}).get("steered", {})) + ["perplexity", "repeated 4-grams"]


def sweep(kind, points, says):
    """Loss beside the health of the text, along strength or k."""
    last = max([p["top_k"] for p in points if p.get("top_k")] or [1]) * 2 if kind == "top_k" else None
    xs = [p["strength"] if kind == "strength" else p["top_k"] or last for p in points]
    healthy = "parse" if "parse" in points[0]["health"] else "perplexity"

    def axes(axis, ylabel):
        axis.set_xlabel("strength" if kind == "strength" else "features that may act at a token, k")
        axis.set_ylabel(ylabel)
        axis.grid(lw=.6)
        if kind == "top_k":
            axis.set_xscale("log", base=2)
            axis.set_xticks(xs, [str(p["top_k"] or "all") for p in points])
            axis.minorticks_off()
        else:
            axis.axvline(1, color=COLORS["base"], lw=1, ls=":")

    def loss(axis):
        axis.fill_between(xs, [p["loss"]["low"] for p in points], [p["loss"]["high"] for p in points], color=COLORS["band"], lw=0)
        axis.plot(xs, [p["loss"]["value"] for p in points], "o-", color=COLORS["ink"], ms=4)
        axes(axis, "held-out SimPO loss")

    def text(axis):
        axis.plot(xs, [p["health"][healthy] * (100 if healthy == "parse" else 1) for p in points], "o-", color=COLORS["other"], ms=4)
        axes(axis, "well-formed answers, %" if healthy == "parse" else "base model’s perplexity")
    numbers = table(["strength" if kind == "strength" else "k", "loss", "accuracy", *sound_head({"health": {"steered": points[0]["health"]}})],
                    [[num(p["strength"], "g") if kind == "strength" else p["top_k"] or "all", interval(p["loss"]), share(p["accuracy"]), *sound(p["health"])] for p in points])
    return figure(kind, says, [("Loss, with its 95% interval", loss, (4.3, 2.6)), ("Is the text still sound?", text, (4.3, 2.6))], numbers)


def ledger_tokens(a, s):
    rows = [{"name": n, "color": color(n) if a.get("lab") else "other", "x": x, "bar": True} for n, x in s["tokens"].items()]
    lab = "what the token settles: one of the planted choices, a fact’s value, or mere form; exact, since the lab’s grammar is known" if a.get("lab") else "kind of token: the first of a few rules on its text that fits"
    says = (f"How much of the gain of {num(s['gain']['value'], '+.3f')} nats a token [{num(s['gain']['low'])}, {num(s['gain']['high'])}] falls on which tokens of the answers, by {lab}. "
            "The control is the base model’s log-probability of the same token: 0 means unchanged.")
    numbers = [[n, interval(x, "+.4f"), share(x.get("share"))] for n, x in s["tokens"].items()] + [[tag("b", f"all {n} choices"), interval(x, "+.4f"), share(x.get("share"))] for n, x in s.get("token_groups", {}).items()]
    legend = key(("style", "style choice"), ("alignment", "alignment choice"), ("base", "neither")) if a.get("lab") else ""
    numbers = table(["tokens", "nats a token", "share of the gain"], numbers, f"The entries add up to the gain but for {num(s.get('tokens_error'), '.1e')} of it, which is rounding.")
    groups = [f"{n} choices {num(x['value'], '+.3f')} nats" + (f", {num(x['share']['value'], '.0f', 100, '%')} of the gain [{num(x['share']['low'], '.0f', 100)}, {num(x['share']['high'], '.0f', 100)}]" if x.get("share") else "") for n, x in s.get("token_groups", {}).items()]
    return join([figure("tokens", says, [("Gain by token", lambda axis: forest(axis, rows, "nats a token", percent=False), (4.3, .6 + .24 * len(rows)))], numbers, legend), tag("p", "Together: " + "; ".join(groups) + ".") if groups else ""])


def ledger_features(a, s):
    groups, gain, chance = s["groups"], s["gain"]["value"], s.get("chance", {})
    rows = [{"name": n, "color": color(n), "x": x["total"], "bar": True, "bands": [(*(gain * chance[n][k] for k in ("low", "high", "mean")), "band", "")] if n in chance else []} for n, x in groups.items()]
    says = (f"The gain of {s['feature_pairs']} pairs, split over features by integrated gradients and added up by label, with its interval; grey, the control: what the same number of features brings when the labels are dealt anew "
            "among the judged, steered features (95% of 999 deals, with the mean).")
    numbers = table(["features", "nats a token", "share of the gain", "how many", "labels dealt anew: share", "p"], [[n, interval(x["total"], "+.4f"), share(x["total"].get("share")), *(
        (f"{c['features']:,}", f"{num(c['mean'], '.0f', 100, '%')} [{num(c['low'], '.0f', 100)}, {num(c['high'], '.0f', 100)}]", num(c["p"], ".3f")) if (c := chance.get(n)) else ("–",) * 3)] for n, x in groups.items()])
    out = [] if a.get("labels") else [unlabelled()]
    out.append(figure("groups", says, [("Gain by label of the feature", lambda axis: forest(axis, rows, "nats a token", percent=False), (4.3, .75 + .42 * len(rows)))], numbers,
                      key(("style", "style"), ("alignment", "alignment"), ("base", "neither, or not judged"), ("band", "labels dealt anew (control)", "box"))))
    names = list(s["tokens"])
    cells = {n: [x.get(c) or {} for c in names] for n, x in groups.items()}
    top = max([abs(x.get("value", 0)) for row in cells.values() for x in row if math.isfinite(x.get("value", 0))] or [1]) or 1
    heat = lambda x: tag("td", f"{num(x.get('value'), '+.4f')} ", tag("span", f"± {num(x.get('se'), '.4f')}", class_="ci"), class_="heat",      # noqa: E731
                         style=f"--c:var(--{'for' if x.get('value', 0) > 0 else 'against'});--a:{min(1, abs(x.get('value', 0)) / top) * .55 if math.isfinite(x.get('value', 0)) else 0:.2f}")
    out.append(table(["gain on … tokens", *(f"from {n} features" for n in groups)], [[c, *(heat(row[k]) for row in cells.values())] for k, c in enumerate(names)],
                     "Which features brought the gain on which tokens: nats a token ± s.e. over prompts, green for, red against the preference. It has no control of its own; the figure above has, for the sums of the columns."))
    out.append(table(["tokens at which the push was made", "nats a token", "share of the gain"], [[n, interval(x, "+.4f"), share(x.get("share"))] for n, x in s.get("regions", {}).items()],
                     "Where the steering sits that brought the gain: a push on the prompt acts on both answers, through attention. No control: the three add up to the gain."))
    held = ", ".join(f"{k} hold {num(x, '.0f', 100, '%')}" for k, x in s["concentration"].items())
    out.append(tag("p", f"Of the sum of all entries’ sizes, the largest {held}. The entries add up to the gain but for {num(s['completeness'], '.2f', 100, '%')} of it: that checks the arithmetic (enough points of integration), it does not validate the method."))
    if s.get("features"):
        out.append(fold(f"The largest {len(s['features'])} features: ledger, first in, last out", table(["feature", "label", "ledger, nats ± s.e.", "first in", "last out"], [[x["feature"], x["group"], f"{num(x['nats'], '+.4f')} ± {num(x['se'], '.4f')}",
                        num(x["first_in"], "+.4f"), num(x["last_out"], "+.4f")] for x in s["features"]], "First in: the gain when only this feature acts. Last out: the gain lost when only it is masked. They are each other’s control: where they differ, features interact, and the ledger’s entry lies between by convention.")))
    return join(out)


def shaded(tokens, top_f, top_v):
    """A context: activation as the background, steering as the line below."""
    out = []
    for t in tokens:
        f, v = (t[k] if math.isfinite(t[k]) else 0.0 for k in ("f", "v"))
        f, v = f / top_f, v / top_v
        text = visible(t["token"])
        out.append(esc(text) if max(f, abs(v)) < .02 else tag("i", text, class_="u" if v >= 0 else "d", style=f"--f:{f:.2f};--v:{abs(v):.2f}", title=f"activation {num(t['f'], '.2f')}, steering {num(t['v'], '+.2f')}"))
    return tag("div", *out, class_="tokens")


def features(a, s):
    out = [tag("p", f"The {len(s)} features with the largest entries in the ledger. The texts are those where a feature is steered most and where it fires most; that both look alike is the check that the label, which is about firing, says anything about the steering."),
           key(("up", "pushed up", "box"), ("down", "pushed down", "box"), ("other", "fires (background), both by strength within a card", "box")), ]
    logit = lambda some: tag("div", *(tag("code", visible(t), tag("small", f" {num(x, '+.2f')}")) for t, x in some), class_="logit")      # noqa: E731
    cards = []
    for n, x in enumerate(s):
        every = [t for part in (x["steered_at"], x["fires_at"]) for text in part for t in text]
        top = [max([abs(t[k]) for t in every if math.isfinite(t[k])] or [1]) or 1 for k in ("f", "v")]
        head = join([tag("strong", x["feature"]), " ", chips(x["labels"]), tag("span", f"{num(x['nats'], '+.4f')} nats", class_="nats")])
        facts = {"ledger": f"{num(x['nats'], '+.4f')} ± {num(x['se'], '.4f')} nats a token", "first in / last out": f"{num(x['first_in'], '+.4f')} / {num(x['last_out'], '+.4f')}",
                 "steered": f"at {num(x['steered'], '.1f', 100, '%')} of tokens, {num(x['up'], '.0f', 100, '%')} of them up", "fires": f"at {num(x['fires'], '.1f', 100, '%')} of tokens", "usage": f"{num(x['usage'], '.1f', 100, '%')} of all steering"}
        body = [tag("p", x["description"] or "No description.", tag("small", f" (by {x['by']})") if x.get("by") else ""), tag("dl", *(join([tag("dt", k), tag("dd", v)]) for k, v in facts.items())),
                tag("h4", "Pushed up, it makes likelier"), logit(x["raises"]), tag("h4", "and less likely"), logit(x["lowers"]),
                *(join([tag("h4", title), *(shaded(t, *top) for t in x[part])]) for part, title in (("steered_at", "Steered most"), ("fires_at", "Fires most")) if x[part])]
        cards.append(tag("details", tag("summary", head), *body, class_="card", open="open" if n < 6 else None))
    out.append(tag("div", *cards, class_="cards"))
    out.append(tag("p", "Numbers are means over held-out pairs. The effect on tokens is the direct one, through the final norm and the head, around the blocks in between; no control.", class_="note"))
    return join(out)


def examples(a, s):
    out = [tag("p", "Ten pairs, from the largest gain to the smallest, evenly spaced. A token’s colour is its share of the pair’s gain: ", tag("span", tag("i", "green", class_="p", style="--v:.8"), " for, ", tag("i", "red, dotted", class_="n", style="--v:.8"), " against the preference", class_="tokens"),
                    "; a chosen answer gains when its tokens become likelier, a rejected one when they become less likely. The control is the base model’s log-probability of the same token.")]
    for e in s:
        top = max([abs(t["nats"]) for side in ("chosen", "rejected") for t in e[side] if math.isfinite(t["nats"])] or [1]) or 1

        def line(t):
            x = t["nats"] / top if math.isfinite(t["nats"]) else 0.0      # noqa: B023
            return esc(visible(t["token"], True)) if abs(x) < .02 else tag("i", visible(t["token"], True), class_="p" if x > 0 else "n", style=f"--v:{abs(x):.2f}", title=f"{num(t['nats'], '+.4f')} nats")
        rows = [[x["feature"], chips(x["labels"]), num(x["nats"], "+.4f"), tag("td", x["description"], class_="text")] for x in e["features"]]
        out.append(tag("div", tag("p", visible(e["prompt"], True).strip(), class_="prompt"), tag("small", f"margin {num(e['base'], '+.3f')} → {num(e['steered'], '+.3f')}, gain {num(e['steered'] - e['base'], '+.3f')} nats a token"),
                       tag("div", *(tag("div", tag("h4", side), tag("div", *map(line, e[side]), class_="tokens")) for side in ("chosen", "rejected")), class_="two"),
                       fold("The first features", table(["feature", "label", "nats", "what it is about"], rows)) if rows else "", class_="pair"))
    return join(out)


def geometry(a, s):
    total = s["size"] ** 2 or 1
    grown = [sum(s["spectrum"][:k + 1]) / total for k in range(len(s["spectrum"]))]

    def spectrum(axis):
        axis.semilogx(range(1, len(grown) + 1), [100 * x for x in grown], color=COLORS["ink"], lw=1.8)
        axis.axhline(90, color=COLORS["base"], lw=.8, ls=":")
        axis.set(xlabel="directions, r", ylabel="share of Σ‖Δh‖², %", ylim=(0, 103))
        axis.grid(lw=.6)

    def gain(axis):
        for name, c in (("random", "base"), ("top", "ink")):
            axis.semilogx([d["r"] for d in s["directions"]], [100 * d[name]["gain"] for d in s["directions"]], "o-" if name == "top" else "o--", color=COLORS[c], ms=4, lw=1.5)
        axis.axhline(100, color=COLORS["base"], lw=.8, ls=":")
        axis.set(xlabel="directions that may act, r", ylabel="share of the gain, %")
        axis.grid(lw=.6)
    says = ("Left: how much of the steering lies in its first r directions (dotted: 90%). Right: how much of the gain is left when only these act; dashed, the control: r random directions of the same space.")
    numbers = table(["r", "share of Σ‖Δh‖²", "gain, top r", "gain, random r", "loss, top r", "loss, random r"], [[d["r"], num(grown[d["r"] - 1], ".1f", 100, "%") if d["r"] <= len(grown) else "–", num(d["top"]["gain"], ".1f", 100, "%"), num(d["random"]["gain"], ".1f", 100, "%"),
                    num(d["top"]["loss"]), num(d["random"]["loss"])] for d in s["directions"]])
    facts = [["effective directions (participation)", f"{num(s['participation'], '.1f')} of {s['d_in']}", f"{num(s['centred']['participation'], '.1f')} about the mean"], ["directions for 90% and 95%", f"{s['d90']} and {s['d95']}", f"{s['centred']['d90']} and {s['centred']['d95']} about the mean"],
             ["share that one constant vector explains", num(s["constant"], ".0f", 100, "%"), "100%: the same push everywhere"], ["size of the steering", num(s["size"], ".2f"), f"{num(s['state_size'], '.2f')}: size of the state itself"],
             ["cosine of the mean push with chosen − rejected states", num(s["cosine"], "+.2f"), f"±{num(s['chance'], '.2f')}: chance"], ["gain with the mean push alone", num(s["mean_only"]["gain"], ".0f", 100, "%"), "100%: the whole policy"],
             ["gain without the mean push", num(s["without_mean"]["gain"], ".0f", 100, "%"), "100%: the whole policy"]]
    return join([figure("geometry", says, [("Steering in its first directions", spectrum, (4.3, 2.6)), ("Gain with these directions alone", gain, (4.3, 2.6))], numbers, key(("ink", "its own top directions", "box"), ("base", "random directions", "box"))),
                 table(["", "measured", "beside"], facts, f"The shape of the steering over {s['tokens']:,} tokens of answers; the last column holds what each number is to be compared with.")])


def calibrated(x):
    if not x:
        return tag("p", "No calibration is part of this report: ", tag("code", "python analyze.py --calibrate RUNS"), " makes one on runs of the lab.", class_="missing")
    parts = [tag("p", text) for text in x.get("sentences", [])]
    return join(parts + [join([tag("h3", t.get("title", "")), table(t["head"], t["rows"], t.get("note", ""))]) for t in x.get("tables", [])])


def made(a):
    c = a.get("config", {})
    facts = {"run": where(a), "trained with": a["objective"], "on": f"{a['pairs']}, seed {c.get('seed', '–')}", "model": a.get("model"), "SAE": a.get("sae"), "layer": a.get("layer"), "read on": f"split {a.get('split')}: {a.get('held_out')} held-out pairs, {a.get('prompts')} prompts"
             + (f", {a.get('facts')} facts" if a.get("lab") else ""), "adapter, pairs, labels": " · ".join(str(a.get(k) or "none") for k in ("adapter", "pairs_sha256", "labels_sha256")) + " (digests)",
             "date, machine": f"{a.get('date', '–')}, {a.get('machine', '–')}, {num(a.get('seconds'), '.0f')} seconds"}
    return join([tag("dl", *(join([tag("dt", k), tag("dd", v)]) for k, v in facts.items()), tag("dt", "command"), tag("dd", tag("code", f"python analyze.py {where(a)}"))),
                 fold("All settings of the training run", table(["setting", "value"], [[k, tag("td", v, class_="text")] for k, v in c.items()])),
                 tag("p", "Bootstrap: 2000 draws of whole prompts or facts with replacement, percentiles 2.5 and 97.5, seed 0. No token is ever drawn on its own: tokens of an answer depend on each other.", class_="note")])


# ---- the file -------------------------------------------------------------------------------------------------------------------------

CONTENTS = {"behaviour": "1 Behaviour", "usage": "2 Usage", "labels": "3 Labels", "rates": "4 Label rates", "causes": "5 Causes", "ledger": "6 Ledger", "pairs": "Ten pairs", "calibration": "7 Calibration", "geometry": "8 Geometry", "features": "9 Features", "made": "How this was made"}


def write(analysis, path, calibration=None):
    """Fills report.html. analysis: what analysis.json holds; calibration: {"sentences": [...], "tables": [{"title", "head", "rows", "note"}]}. -> path"""
    a = {**analysis, "sections": numbers(analysis["sections"])}
    s, says = a["sections"], a.get("verdict") or verdict(a)
    shown = {name: show(a, s[name]) if name in s else missing(a, name) for name, show in (("behaviour", behaviour), ("usage", usage), ("causes", causes), ("geometry", geometry))}
    shown["rates"] = rates(a, s["rates"]) if "rates" in s else missing(a, "rates", "Label rates") if a.get("labels") else unlabelled()
    for name, part, show in (("ledger_tokens", "ledger", ledger_tokens), ("ledger_features", "ledger", ledger_features), ("examples", "examples", examples), ("features", "features", features)):
        shown[name] = show(a, s[part]) if s.get(part) else missing(a, "ledger", {"ledger": "The ledger", "examples": "The list of pairs", "features": "What single features do"}[part])
    if says.get("alarms"):
        shown["alarms"] = tag("div", tag("b", "The text is not sound:"), tag("ul", *(tag("li", x) for x in says["alarms"])), class_="alarm", role="alert")
    else:
        shown["alarms"] = tag("p", "No alarm: by every measure of section 1 the text is as sound as before.", class_="sound") if "behaviour" in s else ""
    over = f"Trained with {a['objective']}. Read on {a.get('held_out', '–'):,} held-out pairs of {a['pairs']}; {a.get('model')}, steered at layer {a.get('layer')}."
    interval = "[low, high]: 95% bootstrap intervals, drawing whole prompts" + (", and below them, as “facts”, drawing all prompts about one fact together, which is the safer of the two" if a.get("lab") else "") + ". Tokens are never drawn."
    page = string.Template((HERE / "report.html").read_text(encoding="utf-8")).substitute(
        shown, name=esc(a["run"]), over=esc(over), interval=esc(interval), verdict=join(tag("p", x) for x in says["sentences"]), labels=labels(a, a.get("labels")), calibration=calibrated(calibration), made=made(a),
        contents=join((tag("a", text, href=f"#{name}") for name, text in CONTENTS.items()), " "))
    atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path
