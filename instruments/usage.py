"""How many features are steered, and how evenly, beside the SAE's own activations at the same tokens."""
import numpy as np
import torch

from analyze import REGIONS
from lib.blocks import Curves, Figures, Table, interval, number, percent
from lib.stats import gini

NAME, TITLE = "usage", "Usage"
QUESTION = ("How many features does a token move, and how evenly are they used? The control is the SAE "
            "itself: its own active features at the same tokens.")
NOTE = ("Gini 0: all used alike; near 1: one does everything. Slope: of log₁₀ of the share of tokens, a "
        "rank. The rows of the SAE are the control.")


def measure(m, options):
    """-> rows by region, of the steering and of the SAE"""
    out = {"d_sae": m.d_sae, "rows": []}
    for branch, region in enumerate(REGIONS):
        tokens = per_pair(m, lambda r: r.row[r.branch == branch])
        if not tokens.any():
            continue
        for of, kind in (("steering", "v"), ("SAE", "f")):
            def active(r):
                s = getattr(r, kind)
                return r.row[s.token[r.branch[s.token] == branch]]
            active_features = np.where(tokens > 0, per_pair(m, active), np.nan)
            row = {"region": region, "of": of, "tokens": tokens.sum()}
            row["l0"] = m.mean(active_features / np.maximum(tokens, 1))
            out["rows"].append(row | evenness(m.events(kind, branches=(branch,)), tokens.sum()))
    return out


def per_pair(m, rows_of):
    """Counts by pair, (P,). rows_of(r): of each thing counted, the row of the batch"""
    out = np.zeros(len(m.pairs))
    for r in m.rows:
        out[r.index] = torch.bincount(rows_of(r), minlength=len(r.index)).cpu().numpy()
    return out


def evenness(count, positions):
    """count (F,): at how many of `positions` each feature is active. -> dict

    curve: share of positions of the used features, falling, at up to 200 ranks; top1, top10: share of
    all events on the most used 1% and 10% of all F; slope: of log10 of the share in percent, a rank
    """
    count = np.sort(np.asarray(count, dtype=np.float64))[::-1]
    used, total = count[count > 0], count.sum() or np.nan
    ranks = np.unique(np.geomspace(1, max(1, len(used)), 200).round().astype(int))[:len(used)]
    out = {"used": len(used), "events": count.sum(), "rank": ranks.tolist(), "slope": np.nan}
    out["curve"] = (used[ranks - 1] / max(1, positions)).tolist()
    if len(used) > 1:
        out["slope"] = np.polyfit(np.arange(len(used)), np.log10(100 * used / positions), 1)[0]
    for name, share in (("top1", .01), ("top10", .10)):
        out[name] = count[:max(1, round(share * len(count)))].sum() / total
    return out | {"gini_used": gini(used), "gini_all": gini(count)}


def describe(result, about):
    rows, panels = [], {}
    for x in result["rows"]:
        used = f"{x['used']:,} of {result['d_sae']:,}"
        shares = percent(x["top1"]), percent(x["top10"])
        even = number(x["gini_used"], ".2f"), number(x["gini_all"], ".2f"), number(x["slope"], ".4f")
        rows.append([f"{x['region']}: {x['of']}", interval(x["l0"], ".1f"), used, *shares, *even])
        line = {"name": x["of"], "kind": "main" if x["of"] == "steering" else "control"}
        line |= {"x": x["rank"], "y": [100 * share for share in x["curve"]]}
        panels.setdefault(f"{x['region']} tokens ({x['tokens']:,.0f})", []).append(line)
    axis = {"xlabel": "rank of the feature", "ylabel": "share of tokens, %", "logx": True, "logy": True}
    curves = []
    for title, lines in panels.items():
        if any(line["x"] for line in lines):
            curves.append(Curves(title, lines, **axis))
    head = ["region", "features a token (L0)", "ever used", "on the top 1%", "on the top 10%",
            "Gini, used", "Gini, all", "slope"]
    says = ("Share of a region’s tokens at which a feature is active, the most used first. A flatter "
            "curve is more even use.")
    return [Figures(curves, [Table(head, rows, NOTE, brief=True)], says)]
