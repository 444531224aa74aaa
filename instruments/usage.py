"""How many features are steered, and how evenly, beside the SAE's own activations at the same tokens."""
import numpy as np
import torch

from analyze import REGIONS
from lib.blocks import Table, interval, number, percent
from lib.stats import gini

TITLE = "Usage"
QUESTION = ("How many features does a token move, and how evenly are they used? The control is the SAE "
            "itself: its own active features at the same tokens.")
NOTE = "Gini 0: all that are ever used are used alike; near 1: one does everything."


def measure(m, options):
    """-> rows by region, of the steering and of the SAE"""
    rows = []
    for branch, region in enumerate(REGIONS):
        tokens = per_pair(m, lambda r: r.row[r.branch == branch])
        if not tokens.any():
            continue
        for of, kind in (("steering", "v"), ("SAE", "f")):
            def active(r):
                token = getattr(r, kind).token
                return r.row[token[r.branch[token] == branch]]
            active_features = np.where(tokens > 0, per_pair(m, active), np.nan)
            l0 = m.mean(active_features / np.maximum(tokens, 1))
            row = {"region": region, "of": of, "tokens": tokens.sum(), "l0": l0}
            rows.append(row | evenness(m.events(kind, branches=(branch,))))
    return {"d_sae": m.d_sae, "rows": rows}


def per_pair(m, rows_of):
    """Counts by pair, (P,). rows_of(r): of each thing counted, the row of the batch"""
    out = np.zeros(len(m.pairs))
    for r in m.rows:
        out[r.index] = torch.bincount(rows_of(r), minlength=len(r.index)).cpu().numpy()
    return out


def evenness(count):
    """count (F,): how often each feature is active -> how many ever are, the share of all on the most
    used 10%, the Gini coefficient of those that are"""
    count = np.sort(np.asarray(count, dtype=np.float64))[::-1]
    first = count[:max(1, round(.1 * len(count)))]
    used = count[count > 0]
    return {"used": len(used), "top10": first.sum() / (count.sum() or np.nan), "gini": gini(used)}


def describe(result, about):
    rows = []
    for x in result["rows"]:
        used = f"{x['used']:,} of {result['d_sae']:,}"
        even = percent(x["top10"]), number(x["gini"], ".2f")
        rows.append([f"{x['region']}: {x['of']}", interval(x["l0"], ".1f"), used, *even])
    head = ["region", "features a token (L0)", "ever used", "on the top 10%", "Gini"]
    return [Table(head, rows, NOTE, brief=True)]
