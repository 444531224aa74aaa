"""How often style and alignment features are steered: the paper's table, with intervals and controls.

This counts how OFTEN features are steered, not what that does; for that see the ledger and masking.
"""
import numpy as np
import torch

from analyze import REGIONS, label_shares
from lib.blocks import Figures, Forest, Table, Text, interval, number, percent
from lib.labels import LABELS

NAME, TITLE = "rates", "Label rates"
QUESTION = ("Of the features that are active at a token, how many are about style, how many about "
            "alignment? Two controls: the SAE’s own active features at the same tokens, and the same "
            "labels dealt out anew.")
SAYS = ("How much larger (or smaller) a label’s share is among the steered features than among the "
        "SAE’s own active ones; grey: the same number in 95 of 100 deals of the labels. A dot over its "
        "grey band says nothing about that label.")


def measure(m, options, deals=99):
    """Each token counts once, if it has a judged feature of either kind (the paper averages steered and
    active features over tokens of their own). shuffled: the range of `change` in 95 of 100 deals; p: the
    share of the deals that moved it at least as far. -> judged, rows by region and label"""
    known = m.groups["known"]
    judged, generator = known.nonzero()[:, 0], torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(judged), generator=generator) for _ in range(deals)]
    out = {"judged": len(judged), "d_sae": m.d_sae, "rows": []}
    for label in LABELS:
        marks = torch.zeros(m.d_sae, 2 + deals)            # judged, labelled, labelled in each deal
        marks[:, 0], marks[:, 1] = known, m.groups[label] & known
        for k, order in enumerate(orders):
            marks[judged, 2 + k] = marks[judged[order], 1]
        if marks[:, 1].any():
            steered, own = sums_by_region(m, marks, label)
            for k, region in enumerate(REGIONS):
                if steered[k, :, 0].any():
                    row = {"region": region, "label": label}
                    out["rows"].append(row | change(m, steered[k].T, own[k].T))
    return out


def sums_by_region(m, marks, name):
    """For each region and pair, summed over tokens that count: [1, shares]. -> two (3,P,1+M)"""
    totals = np.zeros((2, len(REGIONS), len(m.pairs), marks.shape[1]))
    for r in m.bar(m.rows, f"rates, {name}"):
        both, shares = label_shares(r, marks)
        slots = (r.branch * len(r.index) + r.row).cpu()[both]
        for total, share in zip(totals, (shares["v"][both], shares["f"][both])):
            share = torch.cat([torch.ones(len(share), 1), share], 1)
            sums = torch.zeros(len(REGIONS) * len(r.index), share.shape[1], dtype=torch.float64)
            sums = sums.index_add_(0, slots, share).view(len(REGIONS), len(r.index), -1)
            total[:, r.index] = sums.numpy()
    return totals


def change(m, steered, own):
    """steered, own (2+deals,P): tokens that count, their shares by the true labels, by each deal."""
    def relative(a, b, c, d):
        return (a / b) / (c / d) - 1
    out = {"steering": m.mean(steered[1], steered[0]), "sae": m.mean(own[1], own[0])}
    out["change"] = m.interval(relative, steered[1], steered[0], own[1], own[0])
    after, before = (x[2:].sum(1) / x[0].sum() for x in (steered, own))
    moved = after / np.maximum(before, 1e-12) - 1
    out |= {"shuffled": np.percentile(moved, [2.5, 97.5]).tolist(), "p": np.nan}
    if np.isfinite(out["change"]["value"]):
        as_far = np.abs(moved) >= abs(out["change"]["value"])
        out["p"] = (1 + as_far.sum()) / (1 + len(moved))
    return out


def describe(result, about):
    panels, rows = {}, []
    for x in result["rows"]:
        low, high = x["shuffled"]
        band = {"low": low, "high": high, "mean": np.nan, "kind": "dealt"}
        bar = {"name": x["region"], "group": x["label"], "x": x["change"], "bands": [band]}
        panels.setdefault(x["label"], []).append(bar)
        shuffled = f"[{number(low, '+.0f', 100)}, {number(high, '+.0f', 100)}]"
        rows.append([f"{x['region']}, {x['label']}", percent(x["sae"]), percent(x["steering"]),
                     interval(x["change"], "+.0f", 100, "%"), shuffled, number(x["p"], ".2f")])
    forests = []
    for label, bars in panels.items():
        forests.append(Forest(f"{label}: change of its share, SAE → steering", bars, "change, %"))
    head = ["region, label", "of the SAE’s", "of the steered", "change", "dealt anew, 95%", "p"]
    note = (f"Judged are {result['judged']:,} of {result['d_sae']:,} features; the others are left out. "
            "p: share of the deals that moved the number at least as far.")
    return [*sources(about["labels"]), Figures(forests, [Table(head, rows, note, brief=True)], SAYS)]


def sources(labels):
    """Who labelled, and what share of the SAE's features has which label."""
    rows = [[name, percent(share, ".1f")] for name, share in labels["shares"].items()]
    note = "Unlabelled is not neither: such features were not asked about, or got no usable answer."
    return [Text(f"Labels by {', '.join(labels['by'])}. Another source would give other labels; "
                 "`python -m instruments.labels agree` compares two.", "note"),
            Table(["label", "share of the SAE’s features"], rows, note)]
