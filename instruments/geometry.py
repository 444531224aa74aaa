"""The shape of the steering Δh = v W_dec over answers: its size, and what the gain needs."""
import math

import numpy as np
import torch

from lib.blocks import Table, Text, percent
from lib.counts import widest
from lib.stats import leaves_out_zero

TITLE = "Geometry"
QUESTION = ("What is added to the state at a token of an answer is a vector. How many directions do "
            "these fill, and how many does the gain need? The control is as many random directions.")


def moments(m):
    """Mean (D,) and second moment (D,D) of the steering over the answers' tokens."""
    wide = widest(m.model.device)
    second, total, count = 0.0, 0.0, 0
    for r in m.bar(m.rows, "geometry"):
        added = m.delta(r)[r.branch > 0].to(wide)
        second = second + added.T @ added
        total = total + added.sum(0)
        count += len(added)
    return total / max(1, count), second / max(1, count)


@torch.no_grad()
def measure(m, options):
    """-> the spectrum; share of it in one constant vector; d90: so many directions hold 90%; share of
    the gain with r directions alone; {}: not at one layer."""
    if len(m.steerings) != 1:
        return {}
    mean, second = moments(m)
    value, vector = torch.linalg.eigh(second)              # rising
    value, vector = value.flip(0).clamp_min(0), vector.flip(1)
    D, size = len(mean), max(value.sum().item(), 1e-30)
    held = (value.cumsum(0) / size).tolist()
    out = {"spectrum": value.tolist(), "constant": mean.square().sum().item() / size}
    out["d90"] = 1 + sum(share < .9 - 1e-12 for share in held)

    # On some of the pairs, the share of the gain with a part of the steering; none of what may be 0.
    rows, gain = m.part(3 * options.draw_pairs), m.full - m.base
    part = np.concatenate([r.index for r in rows])
    whole = gain[part].mean() if leaves_out_zero(m.mean(gain)) else math.nan

    def share(change):
        moved = m.margins(change=change, rows=rows) - m.base
        return float(moved[part].mean() / whole)

    def alone(basis):
        projector = (basis @ basis.T).to(m.directions.dtype)
        return share(lambda d: d @ projector)
    noise = torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = torch.linalg.qr(noise)[0].to(value)
    out["mean_only"] = share(lambda d: mean.to(d).expand_as(d))
    out["directions"] = []
    powers = [2 ** k for k in range(11) if 2 ** k < D]
    for r in m.bar([*powers, D], "directions"):
        found = {"r": r, "size": held[r - 1]}
        found |= {"gain": alone(vector[:, :r]), "random": alone(drawn[:, :r])}
        out["directions"].append(found)
    return out


def describe(result, about):
    if not result:
        return [Text("Only steering at one layer has such a shape.", "missing")]
    rows, plots = [], []
    for x in result["directions"]:
        shares = [percent(x[key], ".1f") for key in ("size", "gain", "random")]
        rows.append([str(x["r"]), *shares])
        plots.append({"x": {"value": x["gain"]}, "start": x["size"], "group": "other"})
    head = ["directions", "of the size", "of the gain", "random ones, of the gain"]
    note = "Its own first r directions: their share of the size (ring), of the gain (dot)."
    return [Text(size_and_gain(result)), Table(head, rows, note, plots=plots)]


def size_and_gain(x):
    needed = next((d["r"] for d in x["directions"] if (d["gain"] or 0) >= .9), None)
    if needed is None:
        return "The gain cannot be told from 0, so no direction is given a share of it."
    first = next(d for d in x["directions"] if d["r"] >= x["d90"])
    r, gain, random = first["r"], percent(first["gain"]), percent(first["random"])
    return (f"{x['d90']} directions hold 90% of the steering’s size, Σ‖Δh‖². Alone, its first {r} bring "
            f"{gain} of the gain (random ones {random}), and {needed} bring 90%. They differ, since a "
            "direction counts for size by how far it pushes, for the gain by what the push does. In one "
            f"constant vector lie {percent(x['constant'])} of the size; pushed everywhere, alone, it "
            f"brings {percent(x['mean_only'])} of the gain.")
