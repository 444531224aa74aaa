"""The ledger by feature: which features brought the gain, by label, by place, and one by one."""
import numpy as np
import torch

from analyze import REGIONS, entries, feature_ledger, lack
from lib.blocks import Card, Figures, Forest, Table, Text, interval, number, percent
from lib.counts import spread_of
from lib.labels import LABELS

NAME, TITLE = "features", "The ledger by feature"
QUESTION = ("Which features brought the gain? Integrated gradients split it so that the entries add up. "
            "The control of a label is as many features, drawn at random.")
GROUPS = ("style", "alignment", "both", "neither", "not judged")
SAYS = ("Gain by label of the feature; grey: what as many features bring when the labels are dealt anew "
        "among the judged, steered ones. In the second panel by where the push was made: a push on the "
        "prompt acts on both answers, through attention.")


def group_of_features(m):
    """For each feature its place in GROUPS, (F,)."""
    if not m.groups:
        return torch.full((m.d_sae,), GROUPS.index("not judged"))
    style, alignment, known = (m.groups[name] for name in (*LABELS, "known"))
    group = torch.full((m.d_sae,), GROUPS.index("neither"))
    for name, which in zip(GROUPS, (style, alignment, style & alignment)):
        group[which] = GROUPS.index(name)
    return torch.where(known, group, GROUPS.index("not judged"))


def kinds_of_tokens(judge):
    """The judge's groups of categories and the others; each by itself if it has no groups.

    -> names, and (C,K) which categories each has
    """
    if not judge.groups:
        return judge.categories, torch.eye(len(judge.categories))
    columns = [[name in members for name in judge.categories] for members in judge.groups.values()]
    others = [not any(column) for column in zip(*columns)]
    return [*judge.groups, "other"], torch.tensor([*columns, others]).T


def measure(m, options):
    """-> regions, groups: rows of name, nats, share, and for groups how many features, and the share
    that labels dealt anew would get; table: group × kind of token; features: the largest;
    concentration: the share of Σ|entry| on the first few; completeness: what sums lack of the gain"""
    rows, group = m.part(options.ledger_pairs), group_of_features(m)
    index = np.concatenate([r.index for r in rows])
    names, kinds = kinds_of_tokens(m.judge)
    by_feature, by_region, by_group = feature_ledger(m, rows, options.steps, group, kinds)
    sums, group = by_feature.sum(0), group.numpy()
    out = {"pairs": len(index), "completeness": lack(by_region.sum(1), (m.full - m.base)[index])}
    out |= {"regions": entries(m, index, REGIONS, by_region), "table": [], "features": []}
    there = np.unique(group)
    out["groups"] = entries(m, index, [GROUPS[k] for k in there], by_group[:, there].sum(2))
    judged = np.flatnonzero((m.events("v") > 0) & (group != GROUPS.index("not judged")))
    rng = np.random.default_rng(0)
    for k, row in zip(there, out["groups"]):
        marked = group[judged] == k
        row["features"] = int(marked.sum())
        if marked.any() and "share" in row and GROUPS[k] != "neither":
            row |= dealt_anew(sums[judged], marked, sums.sum(), rng)
        for name, nats in zip(names, by_group[:, k].T):
            found = m.mean(m.spread(index, nats))
            cell = {"group": GROUPS[k], "name": name}
            out["table"].append(cell | {x: found[x] for x in ("value", "se")})
    sizes = np.sort(np.abs(sums))[::-1]
    out["concentration"] = {str(k): sizes[:k].sum() / max(sizes.sum(), 1e-30) for k in (1, 10, 30, 100)}
    first = np.argsort(-np.abs(sums), kind="stable")[:options.dashboards]
    for i in m.bar(first[sums[first] != 0].tolist(), "first in, last out"):
        row = {"feature": i, "name": m.feature_name(i), "group": GROUPS[group[i]]}
        row |= alone_and_without(m, i, rows, m.spread(index, by_feature[:, i]))
        out["features"].append(row)
    return out


def dealt_anew(sums, marked, total, rng, deals=999):
    """The share that as many features get, drawn at random: its range, how rare a share as far off."""
    dealt = [rng.choice(len(sums), marked.sum(), replace=False) for _ in range(deals)]
    shares = np.array([sums[features].sum() / total for features in dealt])
    as_far = np.abs(shares - shares.mean()) >= abs(sums[marked].sum() / total - shares.mean())
    return {"dealt": spread_of(shares), "p": (1 + as_far.sum()) / (1 + deals)}


def alone_and_without(m, i, rows, nats):
    """A feature's entry ± s.e. beside the gain when only it acts, and the gain lost without it."""
    alone, entry = 1 - m.without([i]), m.mean(nats)
    first_in = m.margins(alone, rows=rows) - m.base
    last_out = m.full - m.margins(1 - alone, rows=rows)
    return {"nats": entry["value"], "se": entry["se"],
            "first_in": np.nanmean(first_in), "last_out": np.nanmean(last_out)}


def describe(x, about):
    groups, regions, rows = [], [], []
    whole = sum(row["nats"]["value"] for row in x["regions"])
    for row in x["groups"]:
        dealt, bar = row.get("dealt"), {"name": row["name"], "group": row["name"], "bar": True}
        if dealt:
            bar["bands"] = [{"kind": "dealt", **{end: whole * dealt[end] for end in dealt}}]
        groups.append(bar | {"x": row["nats"]})
        count = f"{row['features']:,}"
        rows.append([row["name"], *nats_of(row), count, percent(dealt), number(row.get("p"))])
    for row in x["regions"]:
        regions.append({"name": row["name"], "group": "other", "x": row["nats"], "bar": True})
        rows.append([f"pushed on the {row['name']}", *nats_of(row), "", "", ""])
    head = ["features", "nats a token", "share of the gain", "how many", "dealt anew: share", "p"]
    panels = [Forest("Gain by label of the feature", groups, "nats a token", times=1),
              Forest("Gain by where the push was made", regions, "nats a token", times=1)]
    held = ", ".join(f"the first {k} {percent(share)}" for k, share in x["concentration"].items())
    lacks = percent(x["completeness"], ".2f")
    said = (f"Of the summed sizes of all entries, {held}. The entries add up to the gain of "
            f"{x['pairs']} pairs but for {lacks} of it: that checks the arithmetic, not the method.")
    return [Figures(panels, [Table(head, rows, brief=True)], SAYS), crossed(x), Text(said), largest(x)]


def nats_of(row):
    return interval(row["nats"], "+.4f"), percent(row.get("share"))


def plus_minus(value, se):
    return f"{number(value, '+.4f')} ± {number(se, '.4f')}"


def crossed(x):
    """Which features brought the gain on which tokens."""
    cells = {}
    for row in x["table"]:
        cells.setdefault(row["name"], []).append(row)
    rows = [[name, *(plus_minus(c["value"], c["se"]) for c in row)] for name, row in cells.items()]
    amounts = [[c["value"] for c in row] for row in cells.values()]
    head = ["gain on … tokens", *(f"from {row['name']} features" for row in x["groups"])]
    note = "Nats a token ± s.e.: green for, red against the preference. The figure has the controls."
    return Table(head, rows, note, amounts=amounts)


def largest(x):
    rows = []
    for row in x["features"]:
        alone = number(row["first_in"], "+.4f"), number(row["last_out"], "+.4f")
        rows.append([row["name"], row["group"], plus_minus(row["nats"], row["se"]), *alone])
    note = ("First in: the gain when only this feature acts. Last out: the gain lost without it. Where "
            "they differ features interact, and the ledger’s entry lies between by convention.")
    table = Table(["feature", "label", "ledger, nats ± s.e.", "first in", "last out"], rows, note)
    return Card(f"The largest {len(rows)} features", "", [], [table])
