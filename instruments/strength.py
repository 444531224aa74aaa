"""Steering less, or harder, or with only the k strongest features of every token."""
from copy import copy

import numpy as np
import torch

import fsrl
import simpo
from instruments.health import health, probe_prompts
from lib.blocks import Curves, Figures, Table, Text, interval, number

NAME, TITLE = "strength", "Strength and top-k"
QUESTION = ("What comes of steering less, or harder, or with only the k strongest features of a token? "
            "The controls are the base model (strength 0) and the policy as trained (strength 1, all).")
ALL = 128      # stands for all features that the policy would steer
POINTS = {"strength": (0, .25, .5, .75, 1, 1.25, 1.5, 2, 3), "top_k": (1, 2, 4, 8, 16, 32, 64)}
ANSWERED = {"strength": (0, 1, 2, 3), "top_k": (1, 8)}           # answers take long: where it speaks


def changed(steerings, strength=1, top_k=None):
    """The same policy at a multiple of its strength, or with fewer features a token."""
    out = [copy(s) for s in steerings]
    for s in out:
        s.strength = s.strength * strength
        s.top_k = min(top_k, s.top_k or s.sae.d_sae) if top_k else s.top_k
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
    """-> pairs; strength, top_k: points, of which some have the health of answers"""
    rows, (prompts, texts) = m.part(3 * options.draw_pairs), probe_prompts(m, options.probe_answers)
    how = {"batch_size": options.answer_batch, "max_new_tokens": options.max_new_tokens}
    out = {"pairs": sum(len(r.index) for r in rows), "strength": [], "top_k": []}
    for name, values in POINTS.items():
        for value in m.bar(values, name):
            policy = changed(m.steerings, **{name: value})
            point = {name: value, "loss": loss(m, rows, policy)}
            if value in ANSWERED[name]:
                point["health"], _ = health(m, policy, prompts, texts, temperature=1.0, **how)
            out[name].append(point)
    out["top_k"] += [{**point, "top_k": ALL} for point in out["strength"] if point["strength"] == 1]
    return out


def describe(result, about):
    loss, few = ({p[name]: p["loss"]["value"] for p in result[name]} for name in POINTS)
    best = min(loss, key=loss.get)
    said = (f"Held-out loss: {loss[0]:.3f} without steering, {loss[1]:.3f} as trained, lowest at "
            f"strength {best}: {loss[best]:.3f}; with the 8 strongest features of a token {few[8]:.3f}.")
    return [Text(said), sweep(result, "strength", "strength"), sweep(result, "top_k", "features, k")]


def sweep(result, name, along):
    points, (kind, times, words) = result[name], ("perplexity", 1, "base model’s perplexity")
    if "parse" in points[0]["health"]:
        kind, times, words = "parse", 100, "well-formed answers, %"
    curve = {"name": "loss", "kind": "main", "x": [p[name] for p in points]}
    for key, end in (("y", "value"), ("low", "low"), ("high", "high")):
        curve[key] = [p["loss"][end] for p in points]
    text = {p[name]: times * p["health"][kind] for p in points if "health" in p}
    ylim = (min(88, min(text.values()) - 2), 101) if times == 100 else (0, 1.15 * max(text.values()))
    line = {"name": "text", "kind": "other", "x": list(text), "y": list(text.values())}
    names = {x: "all" if x == ALL else str(x) for x in curve["x"]}
    axis = {"logx": True, "ticks": names} if name == "top_k" else {"marks": [("x", 1)]}
    panels = [Curves("Loss", [curve], along, "held-out loss", **axis),
              Curves("Is the text still sound?", [line], along, words, ylim=ylim, **axis)]
    rows = [[names[p[name]], interval(p["loss"]), number(text.get(p[name]), ".4g")] for p in points]
    table = Table([along, "loss", words], rows)
    return Figures(panels, [table], f"On {result['pairs']} of the pairs.")
