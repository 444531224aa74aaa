"""Masking the features of a label, beside random sets of features."""
import numpy as np

from analyze import masking
from lib.blocks import Table, Text, number, percent
from lib.counts import spread_of
from lib.labels import LABELS
from lib.stats import leaves_out_zero

TITLE = "Masking"
QUESTION = ("What is lost when the features of a label no longer act, and what is left when only they "
            "act? Two controls, drawn from all steered features: random sets of the same size, and "
            "random sets that are used as much, by Σ|v||d| over all tokens.")
WAYS = {"lost": "lost when masked", "left": "left when alone"}


def as_many(rng, usage, named):
    return rng.choice(np.flatnonzero(usage), len(named), replace=False)


def as_used(rng, usage, named):
    """Features one by one, until the usage of the named ones is reached."""
    order = rng.permutation(np.flatnonzero(usage))
    reached = usage[order].cumsum()
    return order[:1 + np.searchsorted(reached, usage[named].sum())]


CONTROLS = {"as many at random": as_many, "as much used, at random": as_used}


def measure(m, options):
    """-> rows: of each label its set, then its controls; lost and left: shares of the gain of the same
    pairs. silent: why nothing was masked"""
    usage, gain, rows = m.usage(), m.full - m.base, m.part(options.draw_pairs)
    out = {"pairs": sum(len(r.index) for r in rows), "draws": options.draws, "rows": []}
    if not leaves_out_zero(m.mean(gain)):
        return out | {"silent": "The gain cannot be told from 0, so there is no share of it to lose."}
    for label in LABELS:
        labelled = (m.groups[label] & m.groups["known"]).numpy()
        named = np.flatnonzero(labelled & (usage > 0))
        if not len(named):
            continue
        lost, left = masking(m, named, rows)
        row = {"label": label, "kind": "", **size_of([named], usage)}
        out["rows"].append(row | {"lost": m.mean(lost, gain), "left": m.mean(left, gain)})
        for kind, draw in CONTROLS.items():
            rng = np.random.default_rng(0)
            drawn = [draw(rng, usage, named) for _ in range(options.draws)]
            row = {"label": label, "kind": kind, **size_of(drawn, usage)}
            moved = [masking(m, features, rows) for features in m.bar(drawn, f"{label}, {kind}")]
            for way, nats in zip(WAYS, np.stack(moved, 1)):                  # nats: (draws,P)
                there = ~np.isnan(nats[0])
                row[way] = spread_of(nats[:, there].sum(1) / gain[there].sum())
            out["rows"].append(row)
    return out


def size_of(sets, usage):
    """How many features sets have, and how much of all usage, on average."""
    count = np.mean([len(features) for features in sets])
    used = np.mean([usage[features].sum() for features in sets])
    return {"features": count, "usage": used / usage.sum()}


def describe(x, about):
    if not x["rows"]:
        return [Text(x.get("silent", "No steered feature has a label."), "missing")]
    rows, plots = [], []
    for way, words in WAYS.items():
        for row in x["rows"]:
            name, group = f"{row['label']}: {words}", row["label"]
            if row["kind"]:
                name, group = f"– {row['kind']}", "control"
            sizes = number(row["features"], ".0f"), percent(row["usage"])
            rows.append([name, *sizes, percent(row[way])])
            plots.append({"x": row[way], "group": group})
    head = ["set", "features", "of all usage", "share of the gain"]
    note = (f"On {x['pairs']} of the pairs. Controls are {x['draws']} sets each, their mean and 95 in "
            "100 of them. A set says something about its label only where it stands clear of both.")
    return [Table(head, rows, note, True, plots)]
