"""Steering less, or harder, or with only the k strongest features of every token."""
from copy import copy

import numpy as np
import torch

import fsrl
import simpo
from lib.blocks import Table, Text, interval

TITLE = "Strength and top-k"
QUESTION = ("What comes of steering less, or harder, or with only the k strongest features of a token? "
            "The controls are the base model (strength 0) and the policy as trained (strength 1, all).")
POINTS = {"strength": (0, .25, .5, .75, 1, 1.25, 1.5, 2, 3), "top_k": (1, 2, 4, 8, 16, 32, 64)}


def changed(steerings, strength=1, top_k=None):
    """The same policy at a multiple of its strength, or with fewer features a token."""
    out = [copy(s) for s in steerings]
    for s in out:
        s.strength = s.strength * strength
        if top_k:
            s.top_k = min(top_k, s.top_k or s.sae.d_sae)
    return out[0] if len(out) == 1 else fsrl.Steerings(out)


@torch.no_grad()
def loss(m, rows, policy):
    """The run's objective on some of the pairs. -> interval"""
    scores = np.full((len(m.pairs), 2), np.nan)
    for r in rows:
        found = simpo.score(m.model, r.batch, policy, r.h)
        both = torch.stack([found.chosen.mean, found.rejected.mean], 1)
        scores[r.index] = both.cpu().double().numpy()
    return m.mean(m.loss(scores))


def measure(m, options):
    """-> pairs; strength, top_k: points with the loss there"""
    rows = m.part(3 * options.draw_pairs)
    out = {"pairs": sum(len(r.index) for r in rows)}
    for name, values in POINTS.items():
        out[name] = []
        for value in m.bar(values, name):
            policy = changed(m.steerings, **{name: value})
            out[name].append({name: value, "loss": loss(m, rows, policy)})
    return out


def describe(result, about):
    rows, plots = [], []
    base = result["strength"][0]["loss"]["value"]
    for name, words in (("strength", "strength"), ("top_k", "strongest features a token:")):
        for point in result[name]:
            rows.append([f"{words} {point[name]}", interval(point["loss"])])
            plots.append({"x": point["loss"], "start": base, "group": "other"})
    loss, few = ({p[name]: p["loss"]["value"] for p in result[name]} for name in POINTS)
    best = min(loss, key=loss.get)
    said = (f"Held-out loss: {loss[0]:.3f} without steering, {loss[1]:.3f} as trained, lowest at "
            f"strength {best}: {loss[best]:.3f}; with the 8 strongest features of a token {few[8]:.3f}.")
    note = f"On {result['pairs']} of the pairs; the ring is the base model."
    return [Text(said), Table(["policy", "loss"], rows, note, plots=plots)]
