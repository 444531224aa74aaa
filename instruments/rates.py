"""How often style and alignment features are steered: the paper's table, with intervals and controls.

This counts how OFTEN features are steered, not what that does; for that see the ledger and masking.
"""
import numpy as np
import torch

from analyze import REGIONS, label_shares
from lib.blocks import Table, Text, percent
from lib.counts import spread_of
from lib.labels import LABELS

TITLE = "Label rates"
QUESTION = ("Of the features that are active at a token, how many are about style, how many about "
            "alignment? Two controls: the SAE’s own active features at the same tokens, and the same "
            "labels dealt out anew.")
DEALS = 99


def measure(m, options):
    """Each token counts once, if it has a judged feature of either kind (the paper averages steered and
    active features over tokens of their own). dealt: `change` in 95 of 100 deals of the labels.
    -> judged, rows by region and label"""
    known = m.groups["known"]
    judged = known.nonzero()[:, 0]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(judged), generator=generator) for _ in range(DEALS)]
    rows = []
    for label in LABELS:
        mark = (m.groups[label] & known).float()
        if not mark.any():
            continue
        dealt = torch.zeros(DEALS, m.d_sae)
        for k, order in enumerate(orders):
            dealt[k, judged] = mark[judged[order]]
        marks = torch.stack([known.float(), mark, *dealt], 1)
        steered, own = sums_by_region(m, marks, label)
        for region, v, f in zip(REGIONS, steered, own):
            if v[0].any():
                row = {"region": region, "label": label}
                rows.append(row | change(m, v, f))
    return {"judged": len(judged), "d_sae": m.d_sae, "rows": rows}


def sums_by_region(m, marks, name):
    """Over the tokens that count, Σ of [1, shares], by region and pair. -> two (3,1+M,P)"""
    totals = np.zeros((2, len(REGIONS), len(m.pairs), marks.shape[1]))
    for r in m.bar(m.rows, f"rates, {name}"):
        both, shares = label_shares(r, marks)
        slots = (r.branch * len(r.index) + r.row).cpu()[both]
        for total, kind in zip(totals, ("v", "f")):
            share = shares[kind][both]
            counted = torch.cat([torch.ones(len(share), 1), share], 1)
            sums = torch.zeros(len(REGIONS) * len(r.index), counted.shape[1]).double()
            sums.index_add_(0, slots, counted)
            total[:, r.index] = sums.view(len(REGIONS), len(r.index), -1).numpy()
    return totals.swapaxes(2, 3)


def change(m, steered, own):
    """steered, own (2+DEALS,P): tokens that count, their shares by the true labels, by each deal."""
    def relative(a, b, c, d):
        return (a / b) / (c / d) - 1
    after = steered[2:].sum(1) / steered[0].sum()
    before = own[2:].sum(1) / own[0].sum()
    dealt = spread_of(after / np.maximum(before, 1e-12) - 1)
    moved = m.interval(relative, steered[1], steered[0], own[1], own[0])
    shares = {"steering": m.mean(steered[1], steered[0])}
    shares["sae"] = m.mean(own[1], own[0])
    return shares | {"change": moved, "dealt": dealt}


def describe(result, about):
    if not result["rows"]:
        return [Text("No feature that is steered here has a label.", "missing")]
    rows, plots = [], []
    for x in result["rows"]:
        name = f"{x['region']}, {x['label']}"
        shares = percent(x["sae"]), percent(x["steering"])
        change, dealt = percent(x["change"], "+.0f"), percent(x["dealt"], "+.0f")
        rows.append([name, *shares, change, dealt])
        plots.append({"x": x["change"], "group": x["label"], "control": x["dealt"]})
    head = ["region, label", "of the SAE’s", "of the steered", "change", "dealt anew"]
    note = (f"Labels by {about['labels']}. Judged are {result['judged']} of {result['d_sae']} features; "
            "the others are left out. The band: the change in 95 of 100 deals of the labels. A dot over "
            "its band says nothing about that label.")
    return [Table(head, rows, note, True, plots)]
