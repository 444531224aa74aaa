"""Masking the features of a label, beside random sets of features."""
from copy import copy

import numpy as np

import fsrl
from analyze import masking
from instruments.health import health, probe_prompts
from lib.blocks import Figures, Forest, Table, Text, number, percent
from lib.counts import spread_of
from lib.labels import LABELS
from lib.stats import leaves_out_zero

NAME, TITLE = "masking", "Masking"
QUESTION = ("What is lost when the features of a label no longer act, and what is left when only they "
            "act? Two controls, drawn from all steered features: random sets of the same size, and "
            "random sets that are used as much, by Σ|v||d| over all tokens.")
SAYS = ("Share of the gain, with its interval; in brackets how many features act. The bands are the "
        "controls, 95 in 100 sets and their mean: a set says something about its label only where it "
        "stands clear of both.")
WAYS = {"lost": "lost when masked", "left": "left when alone"}
KINDS = {"random": "as many at random", "usage": "as much used, at random"}


def measure(m, options):
    """-> sets: rows, lost and left as shares of the gain of all pairs and (_part) of those on which
    controls are scored; controls: rows; silent: why nothing was masked"""
    usage, rows = m.usage(), m.part(options.draw_pairs)
    used = np.flatnonzero(usage)
    out = {"used": len(used), "pairs": sum(len(r.index) for r in rows), "draws": options.draws}
    out |= {"sets": [], "controls": []}
    if not leaves_out_zero(m.mean(m.full - m.base)):
        return out | {"silent": "The gain cannot be told from 0, so there is no share of it to lose."}
    for name in LABELS:
        labelled = np.flatnonzero(m.groups[name] & m.groups["known"])
        named = np.intersect1d(labelled, used)
        if not len(named):
            continue
        row = {"name": name, "labelled": len(labelled), "steered": len(named)}
        row |= {"usage": usage[named].sum() / usage.sum(), **effect(m, named, rows, options)}
        out["sets"].append(row)

        def as_many(rng):
            return rng.choice(used, len(named), replace=False)

        def as_used(rng):
            order = rng.permutation(used)
            return order[:1 + np.searchsorted(usage[order].cumsum(), usage[named].sum())]
        for kind, draw in (("random", as_many), ("usage", as_used)):
            rng = np.random.default_rng(0)
            drawn = [draw(rng) for _ in range(options.draws)]
            found = {"name": name, "kind": kind, "size": np.mean([len(x) for x in drawn])}
            found["usage"] = np.mean([usage[x].sum() for x in drawn]) / usage.sum()
            found["overlap"] = np.mean([np.isin(named, x).mean() for x in drawn])
            drawn = m.bar(drawn, f"{name}: {KINDS[kind]}")
            out["controls"].append(found | control(m, [masking(m, x, rows) for x in drawn], row))
    return out


def effect(m, named, rows, options):
    """Of one set: its shares of the gain, and accuracy and text of the policy that remains."""
    gain, part, out = m.full - m.base, np.concatenate([r.index for r in rows]), {}
    others = np.setdiff1d(np.arange(m.d_sae), named)
    for way, moved, gone in zip(WAYS, masking(m, named), (named, others)):
        out[way] = m.mean(moved, gain)
        out[f"{way}_part"] = m.mean(m.spread(part, moved[part]), gain)
        remains = m.full - moved if way == "lost" else m.base + moved
        out[f"accuracy_{way}"] = m.mean(remains > 0)
        out[f"health_{way}"] = text_without(m, gone, options)
    return out


def control(m, found, row):
    """Of many random sets, the (lost, left) of each on a part of the pairs: the range of their shares,
    and how many do at least as much as the set of `row`."""
    out = {}
    for way, moved in zip(WAYS, zip(*found)):
        there = ~np.isnan(moved[0])
        shares = np.nansum(moved, 1) / (m.full - m.base)[there].sum()
        as_far = (shares >= row[f"{way}_part"]["value"]).sum()
        out |= {way: spread_of(shares), f"p_{way}": (1 + as_far) / (1 + len(found))}
    return out


def text_without(m, features, options):
    """The health of the text of the policy that may not steer these."""
    masked, first = [], 0
    for s in m.steerings:
        own = features[(features >= first) & (features < first + s.sae.d_sae)] - first
        masked.append(copy(s))
        masked[-1].masked = [*s.masked, *own.tolist()]
        first += s.sae.d_sae
    prompts, texts = probe_prompts(m, options.probe_answers)
    how = {"max_new_tokens": options.max_new_tokens, "batch_size": options.answer_batch}
    return health(m, fsrl.Steerings(masked), prompts, texts, temperature=1.0, **how)[0]


def describe(x, about):
    if not x["sets"]:
        return [Text(x.get("silent", "No steered feature has a label."), "missing")]
    panels, rows = {way: [] for way in WAYS}, []
    for row in x["sets"]:
        controls = [c for c in x["controls"] if c["name"] == row["name"]]
        for way in WAYS:
            bands = [{**c[way], "kind": c["kind"]} for c in controls]
            bar = {"name": f"{row['name']}\n({row['steered']})", "group": row["name"], "bands": bands}
            panels[way].append(bar | {"x": row[f"{way}_part"]})
            rows += table_rows(row, way, controls)
    head = ["set", "features", "of all usage", "of the gain", f"on {x['pairs']} pairs", "p", "accuracy",
            "text: " + ("well-formed" if "parse" in x["sets"][0]["health_lost"] else "perplexity")]
    note = (f"Controls are {x['draws']} sets each, scored on {x['pairs']} of the pairs and compared "
            "with the set’s own share there; p: the share of them that do at least as much. Accuracy "
            "and text are those of the policy that remains.")
    titles = {"lost": "Lost when the set is masked", "left": "Left when only the set acts"}
    forests = [Forest(titles[way], bars, "share of the gain, %") for way, bars in panels.items()]
    return [Figures(forests, [Table(head, rows, note, brief=True)], SAYS)]


def table_rows(row, way, controls):
    """A set, and below it its controls."""
    text, accuracy = row[f"health_{way}"], percent(row[f"accuracy_{way}"]["value"], ".1f")
    sound = percent(text["parse"], ".1f") if "parse" in text else number(text["perplexity"], ".2f")
    rows = [[f"{row['name']}: {WAYS[way]}", f"{row['steered']}", percent(row["usage"]),
             percent(row[way]), percent(row[f"{way}_part"]), "", accuracy, sound]]
    for c in controls:
        rows.append([f"– {KINDS[c['kind']]}", f"{c['size']:.0f}", percent(c["usage"]), "",
                     percent(c[way]), f"{c['p_' + way]:.2f}", "", ""])
    return rows
