"""The ledger by feature: which features brought the gain, by label, by place, and one by one."""
import numpy as np
import torch

from analyze import REGIONS, entries, feature_ledger, lack
from lib.blocks import Table, Text, interval, percent
from lib.counts import spread_of
from lib.labels import LABELS

TITLE = "The ledger by feature"
QUESTION = ("Which features brought the gain? Integrated gradients split it so that the entries add up. "
            "The control of a label is as many features, drawn at random.")
GROUPS = ("style", "alignment", "both", "neither", "not judged")
NOTE = ("Gain by label of the feature; grey: what as many features bring when the labels are dealt anew "
        "among the judged, steered ones. Then by where the push was made: a push on the prompt acts on "
        "both answers, through attention.")


def group_of_features(m):
    """For each feature its place in GROUPS, (F,)."""
    if not m.groups:
        return np.full(m.d_sae, GROUPS.index("not judged"))
    style, alignment = (m.groups[name].long() for name in LABELS)
    place = torch.tensor([[3, 1], [0, 2]])[style, alignment]
    return place.where(m.groups["known"], GROUPS.index("not judged")).numpy()


def measure(m, options):
    """-> regions, groups: rows of name, nats, share, and for groups how many features, and the share
    that labels dealt anew would get; features: the largest; completeness: what sums lack of the gain"""
    rows, group = m.part(options.ledger_pairs), group_of_features(m)
    index = np.concatenate([r.index for r in rows])
    by_feature, by_region = feature_ledger(m, rows, options.steps)
    there = np.unique(group)
    by_group = np.stack([by_feature[:, group == k].sum(1) for k in there], 1)
    groups = entries(m, index, [GROUPS[k] for k in there], by_group)

    # The labels dealt anew among the features that could have one.
    sums = by_feature.sum(0)
    steered = m.events("v") > 0
    judged = np.flatnonzero(steered & (group < GROUPS.index("not judged")))
    rng = np.random.default_rng(0)
    for k, row in zip(there, groups):
        row["features"] = count = int((steered & (group == k)).sum())
        if count and "share" in row and row["name"] not in ("neither", "not judged"):
            dealt = [rng.choice(judged, count, replace=False) for _ in range(999)]
            shares = [sums[features].sum() / sums.sum() for features in dealt]
            row["dealt"] = spread_of(shares)

    largest = []
    first = np.argsort(-np.abs(sums), kind="stable")
    for i in first[:options.dashboards].tolist():
        if sums[i]:
            entry = m.mean(m.spread(index, by_feature[:, i]))
            row = {"feature": i, "name": m.feature_name(i), "group": GROUPS[group[i]]}
            largest.append(row | {"nats": entry["value"], "se": entry["se"]})
    gain = (m.full - m.base)[index]
    return {
        "pairs": len(index),
        "completeness": lack(by_region.sum(1), gain),
        "groups": groups,
        "regions": entries(m, index, REGIONS, by_region),
        "features": largest,
    }


def describe(x, about):
    rows, plots = [], []
    whole = sum(row["nats"]["value"] for row in x["regions"])
    for row in (*x["groups"], *x["regions"]):
        name, count = f"pushed on the {row['name']}", ""
        if "features" in row:
            name, count = row["name"], str(row["features"])
        nats, share = interval(row["nats"], "+.4f"), percent(row.get("share"))
        dealt = row.get("dealt") or {}
        rows.append([name, nats, share, count, percent(dealt) if dealt else ""])
        control = {end: whole * share for end, share in dealt.items()}
        plots.append({"x": row["nats"], "group": row["name"], "control": control})
    head = ["features", "nats a token", "share of the gain", "how many", "dealt anew: share"]
    said = (f"The entries add up to the gain of {x['pairs']} pairs but for "
            f"{percent(x['completeness'], '.2f')} of it: that checks the arithmetic, not the method.")
    return [Table(head, rows, NOTE, True, plots), Text(said)]
