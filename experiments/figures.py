"""Draws the docs' figures, and writes what a training and an analysis of it print.

    python -m experiments.figures runs/style-1   # docs/style.json and style.png of that run, its tables
    python -m experiments.figures                # all figures, from docs/style.json and results.json
"""
import contextlib
import io
import json
import math
import re
import shutil
import sys
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import analyze
from experiments import results
from lib import show
from lib.files import ROOT, UserError, read_json, write_json
from lib.settings import command, setting
from tiny import world
from train import TrainConfig

DOCS = ROOT / "docs"
DATA = DOCS / "style.json"
GREEN, RED, BLUE = "#2f6f4f", "#b4552d", "#33557f"
COLOR = {c: GREEN if c in world.ALIGNMENT else RED for c in world.CHOICES}
NO_PREFERENCE = math.log1p(math.exp(5))                      # the loss of equal likelihoods
SHARE = {"truth": .6, "admit": .2, "decline": .2}            # of prompts in which they come up


def gather(run):
    """What style.png and the two blocks show, out of a finished run's folder. Analyses what is not."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    rows = [json.loads(line.replace(": null", ": NaN")) for line in lines]
    found = {row["evaluation"]: row for row in rows if "evaluation" in row}
    if "parse_sampled" not in found.get("trained", {}):
        raise UserError(f"{run} is not a finished run on the lab; run `python train.py` first and name "
                        "the folder that it prints")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if analyze.main([str(run)]):
            raise UserError(f"`python analyze.py {run}` failed")
    shutil.copyfile(run / "report.html", DOCS / "report.html")
    sections = [read_json(path) for path in (run / "analysis").glob("*.json")]
    text = re.sub(r"^(\w+: kept|Look at .*)$\n?", "", said.getvalue(), flags=re.M).strip()
    made = f"{sections[0]['date']}, {sections[0]['machine']}"
    analysis = {"text": text, "seconds": sum(x["seconds"] for x in sections), "made": made}
    config = read_json(run / "config.json")
    meta = read_json(ROOT / config["pairs"] / "meta.json")
    steps = [row for row in rows if "penalty" in row]
    return {"config": config, "meta": meta, "steps": steps, "analysis": analysis, **found}


def blocks():
    """What train.py and analyze.py print at their end, for the pages."""
    data = read_json(DATA)
    c, meta, analysis = data["config"], data["meta"], data["analysis"]
    config = TrainConfig(**{f.name: c[f.name] for f in fields(TrainConfig) if f.name in c})
    judge = SimpleNamespace(weights=meta["weights"], best_accuracy=meta["bayes_accuracy"])
    steering = SimpleNamespace(sae=SimpleNamespace(d_sae=c["d_sae"]))
    policy = SimpleNamespace(steerings=[steering])
    table = show.closing(data["base"], data["trained"], judge, config, policy)
    made = f"seed {c['seed']}, {c['date']}, {c['machine']}, torch {c['versions']['torch']}"

    def block(text, seconds, made):
        return f"```\n{text}\n```\n\n({seconds:.0f} seconds, {made}.)\n"
    return {"closing": block(table, data["trained"]["seconds"], made), "analysis": block(**analysis)}


# ---- figures -----------------------------------------------------------------------------------------

STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110,
         "axes.titlelocation": "left", "axes.titlesize": 10.5, "legend.frameon": False,
         "legend.fontsize": 9}


def panels(count, width, height, rows=1, **how):
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    rcParams.update(STYLE)
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, count, **how)


def drawn(path, draw, *data):
    """Saves draw(*data); without matplotlib, which is an extra, there is no figure.
    Without a version in it the same numbers make the same file."""
    if not find_spec("matplotlib"):
        print("no figure: it needs matplotlib (pip install -r requirements-extra.txt)")
        return
    draw(*data).savefig(path, metadata={"Software": None})


def dashed(axis, y, text):
    """A line across, with words on its right end."""
    axis.axhline(y, color="0.5", ls="--", lw=1)
    axis.text(.99, y, text, transform=axis.get_yaxis_transform(), va="bottom", ha="right", color="0.4",
              fontsize=9)


def draw_style(data):
    """One run: rates before and after; its loss."""
    figure, (left, right) = panels(2, 10, 4.4, width_ratios=[1.25, 1])
    base, trained = data["base"], data["trained"]
    weights, count = data["meta"]["weights"], base["answers"]
    names = sorted(weights, key=lambda c: (c not in SHARE, weights[c]))
    for y, name in enumerate(names):
        a, b = base["sampled"][name], trained["sampled"][name]
        error = (b * (1 - b) / (count * SHARE.get(name, 1))) ** .5
        left.plot([a, b], [y, y], color=COLOR[name], lw=2, alpha=.6)
        left.plot(a, y, "o", mfc="white", mec=COLOR[name], ms=7)
        left.errorbar(b, y, xerr=error, fmt="o", color=COLOR[name], ms=7, capsize=2)
    left.set_yticks(range(len(names)), [f"{name}  ({weights[name]:+g})" for name in names])
    left.axhline(len(SHARE) - .5, color="0.8", lw=1)
    left.text(1, len(SHARE) - .65, "alignment", color=GREEN, ha="right", va="top")
    left.text(1, len(names) - .6, "style", color=RED, ha="right", va="top")
    under = f"rate in sampled answers to {count} held-out prompts\n(○ base, ● trained ± s.e.)"
    left.set(xlim=(0, 1), xlabel=under, title="What the policy does (planted weight in brackets)")

    steps, losses = ([row[x] for row in data["steps"]] for x in ("step", "loss"))
    right.plot(steps, losses, color=BLUE, label="training")
    held, errors = ([m[x] for m in (base, trained)] for x in ("loss", "loss_se"))
    right.errorbar([0, trained["step"]], held, yerr=errors, fmt="o", color="black", capsize=3,
                   label="held-out pairs ± s.e.")
    dashed(right, NO_PREFERENCE, "no preference at all: 5.007")
    sound = " → ".join(f"{m['parse_sampled']:.1%}" for m in (base, trained))
    right.set(ylim=(0, 5.5), xlabel="optimiser step", ylabel="SimPO loss",
              title=f"Loss; well-formed answers {sound}")
    right.legend(loc="lower left")
    return figure


def draw_choices(r):
    """Every choice's change, a dot for each seed: two worlds, and the control on coins."""
    figure, axes = panels(3, 11, 4.2, sharey=True)
    for axis, name in zip(axes, ("style", "honest", "null")):
        axis.axvline(0, color="0.6", lw=1)
        axis.set_title(f"{name}, {len(r.seeds(name))} seeds")
        for y, choice in enumerate(world.CHOICES):
            for kind, shift, face in (("answers", -.14, COLOR[choice]), ("exact", .14, "white")):
                moved = r.points(name, kind, choice)
                axis.plot(moved, [y + shift] * len(moved), "o", mfc=face, mec=COLOR[choice], alpha=.8)
            if name in r.pairs:
                axis.plot(100 * r.pairs[name][choice]["difference"], y, "|k", ms=13, mew=1.5)
    axes[0].set_yticks(range(len(world.CHOICES)), world.CHOICES)
    axes[0].invert_yaxis()
    axes[2].set_xlim(-50, 50)
    figure.supxlabel("change of a choice's rate, points (● in sampled answers, ○ exact at the deciding "
                     "token; | chosen less rejected in the training pairs)", fontsize=9.5)
    return figure


def curves(axis, r, experiments, x, y):
    """One curve for each {label: experiments}; x, y: places of results.MEASURES."""
    for (label, names), color in zip(experiments.items(), (RED, BLUE, GREEN, "#8a5fa8", "0.6")):
        points = [[r.values(name, place)[0] for name in names] for place in (x, y)]
        axis.plot(*points, "o-", color=color, alpha=.85, label=label)
    dashed(axis, r.values("base", y)[0], "base")


def draw_frontier(r):
    """What the gain costs: a curve for each nll_weight, a dot for each learning rate."""
    figure, (left, right) = panels(2, 10, 3.8)
    terms = {term: [f"{term}, lr {lr:g}" for lr in results.RATES] for term in results.TERMS}
    margin = "margin on held-out pairs, nats a token"
    curves(left, r, terms, "style margin", "answers truth")
    left.set(xlabel=margin, title="fact questions answered truly")
    curves(right, r, terms, "style margin", "drift")
    right.set(xlabel=margin, title="KL from the base on neutral text, nats a token")
    right.legend(title="upwards: lr " + ", ".join(f"{lr:g}" for lr in results.RATES))
    return figure


def draw_l1(r):
    """Held-out loss against L0, a curve for each activation over l1."""
    figure, axis = panels(1, 7, 3.8)
    kinds = {kind: [f"{kind}, l1 {l1:g}" for l1 in sweep] for kind, (_, sweep) in results.KINDS.items()}
    curves(axis, r, kinds, "style l0", "style loss")
    dashed(axis, NO_PREFERENCE, "no preference at all: 5.007")
    axis.set(ylim=(2.6, 5.3), xscale="log", ylabel="held-out SimPO loss",
             xlabel="L0: features moved a steered token, of 1024 (l1 .003 right ... .3 left)")
    axis.legend()
    return figure


@dataclass
class FiguresConfig:
    run: str = setting(None, "a run, to be put into the docs", positional=True, group="what")


def run(config):
    if not find_spec("matplotlib"):
        raise UserError("matplotlib is missing: pip install -r requirements-extra.txt")
    if config.run:
        write_json(DATA, gather(Path(config.run)), indent=1)
    drawn(DOCS / "style.png", draw_style, read_json(DATA))
    r = results.Results(read_json(results.DATA))
    for name, draw in {"choices": draw_choices, "frontier": draw_frontier, "l1": draw_l1}.items():
        drawn(DOCS / f"{name}.png", draw, r)
    results.fill(blocks())


def main(argv=None):
    return command("python -m experiments.figures", FiguresConfig, run, argv, "Draw the docs' figures.")


if __name__ == "__main__":
    sys.exit(main())
