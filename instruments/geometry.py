"""The shape of the steering Δh = v W_dec over answers: its size, and what the gain needs."""
import math

import numpy as np
import torch

from lib.blocks import Curves, Figures, Table, Text, number, percent
from lib.stats import leaves_out_zero

NAME, TITLE = "geometry", "Geometry"
QUESTION = ("What is added to the state at a token of an answer is a vector. How many directions do "
            "these fill, and how many does the gain need? The control is as many random directions.")


def directions(second_moment):
    """Eigenvalues λ (falling) and eigenvectors (columns) of a symmetric matrix, and how many it fills.

    participation: (Σλ)² / Σλ², so many equal directions would look like this · d90: so many hold 90%
    """
    value, vector = torch.linalg.eigh(second_moment)
    value, vector = value.flip(0).clamp_min(0), vector.flip(1)
    total = value.sum()
    if total <= 0:
        return value, vector, {"participation": 0.0, "d90": 0}
    below = value.cumsum(0) / total < .9 - 1e-12
    participation = (total ** 2 / value.square().sum()).item()
    return value, vector, {"participation": participation, "d90": 1 + int(below.sum())}


def moments(m):
    """Over the answers' tokens: mean and second moment of the steering, mean square of the state, and
    the difference of the mean states, chosen less rejected."""
    D, device = m.directions.shape[1], m.model.device
    wide = torch.float32 if device.type == "mps" else torch.float64
    second, total, energy = torch.zeros(D, D, dtype=wide, device=device), 0.0, 0.0
    state, count = [0.0, 0.0, 0.0], [0, 0, 0]
    for r in m.bar(m.rows, "geometry"):
        added, h = m.delta(r).to(wide), r.h[r.where].to(wide)
        for side in (1, 2):
            d, x = added[r.branch == side], h[r.branch == side]
            second, total = second + d.T @ d, total + d.sum(0)
            state[side], count[side] = state[side] + x.sum(0), count[side] + len(x)
            energy += x.square().sum().item()
    n = max(1, sum(count))
    difference = state[1] / max(1, count[1]) - state[2] / max(1, count[2])
    return n, total / n, second / n, energy / n, difference


@torch.no_grad()
def measure(m, options):
    """-> sizes, the spectrum, the share of the gain with r directions alone; {}: not at one layer."""
    if len(m.steerings) != 1:
        return {}
    n, mean, second, energy, difference = moments(m)
    value, vector, filled = directions(second)
    D, size = len(mean), math.sqrt(value.sum().item())
    cosine = torch.nn.functional.cosine_similarity(mean, difference, 0, 1e-30).item()
    out = {"d_in": D, "tokens": n, "spectrum": value[:200].tolist(), **filled, "directions": []}
    out |= {"size": size, "state_size": math.sqrt(energy), "cosine": cosine, "chance": 2 / math.sqrt(D)}
    out["constant"] = mean.square().sum().item() / max(size ** 2, 1e-30)

    # On some of the pairs, the share of the gain with a part of the steering; none of what may be 0.
    rows, gain = m.part(3 * options.draw_pairs), m.full - m.base
    part = np.concatenate([r.index for r in rows])
    whole = gain[part].mean() if leaves_out_zero(m.mean(gain)) else math.nan

    def scored(change):
        scores = m.scores(change=change, rows=rows)[part]
        return float((scores[:, 0] - scores[:, 1] - m.base[part]).mean() / whole)

    def only(basis):
        basis = basis.to(m.directions.dtype)
        return scored(lambda d: (d @ basis) @ basis.T)
    noise = torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = torch.linalg.qr(noise)[0].to(value)
    for r in m.bar([2 ** k for k in range(11) if 2 ** k < D] + [D], "directions"):
        out["directions"].append({"r": r, "top": only(vector[:, :r]), "random": only(drawn[:, :r])})
    out["mean_only"] = scored(lambda d: mean.to(d).expand_as(d))
    out["without_mean"] = scored(lambda d: d - mean.to(d))
    return out


def describe(result, about):
    if not result:
        return [Text("Only steering at one layer has such a shape.", "missing")]
    parts, grown = result["directions"], np.cumsum(result["spectrum"]) / (result["size"] ** 2 or 1)
    ranks, rows = [d["r"] for d in parts], []
    for d in parts:
        size = float(grown[d["r"] - 1]) if d["r"] <= len(grown) else None
        rows.append([str(d["r"]), *(percent(x, ".1f") for x in (size, d["top"], d["random"]))])
    top, random = (100 * np.array([d[key] for d in parts], dtype=float) for key in ("top", "random"))
    lines = [{"name": "its own first r", "kind": "main", "x": ranks, "y": top},
             {"name": "r random ones", "kind": "control", "x": ranks, "y": random}]
    size = {"name": "size", "kind": "main", "x": list(range(1, len(grown) + 1)), "y": 100 * grown}
    axis = {"xlabel": "directions, r", "logx": True, "ticks": {r: str(r) for r in ranks}}
    panels = [Curves("Size in its first r", [size], ylabel="share of Σ‖Δh‖², %", ylim=(0, 103), **axis),
              Curves("Gain with r directions alone", lines, ylabel="share of the gain, %", **axis)]
    table = Table(["r", "share of the size", "gain, its own first r", "gain, r random ones"], rows)
    return [Text(size_and_gain(result)), Figures(panels, [table]), facts(result)]


def size_and_gain(x):
    needed = next((d["r"] for d in x["directions"] if (d["top"] or 0) >= .9), None)
    if needed is None:
        return "The gain cannot be told from 0, so no direction is given a share of it."
    first = next(d for d in x["directions"] if d["r"] >= x["d90"])
    r, top, random = first["r"], percent(first["top"]), percent(first["random"])
    return (f"{x['d90']} directions hold 90% of the steering’s size, Σ‖Δh‖². Alone, its first {r} bring "
            f"{top} of the gain (random ones {random}), and {needed} bring 90%. They differ, since a "
            "direction counts for size by how far it pushes, for the gain by what the push does.")


def facts(x):
    size, constant, cosine = f"{x['size']:.2f}", percent(x["constant"]), number(x["cosine"], "+.2f")
    rows = [["size of the steering", size, f"{x['state_size']:.2f}: the state itself"],
            ["share of it in one constant vector", constant, "100%: the same push everywhere"],
            ["cosine, mean push with chosen − rejected", cosine, f"±{x['chance']:.2f}: chance"]]
    for key, words in (("mean_only", "with the mean push alone"), ("without_mean", "without it")):
        rows.append([f"gain {words}", percent(x[key]), "100%: the whole policy"])
    return Table(["", "measured", "to compare"], rows, f"Over {x['tokens']:,} tokens.", brief=True)
