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
GREEN, RED, BLUE = "#2f6f4f", "#b4552d", "#33557f"           # alignment, style, anything else
COLOR = {c: GREEN if c in world.ALIGNMENT else RED for c in world.CHOICES}
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
    c, analysis = data["config"], data["analysis"]
    config = TrainConfig(**{f.name: c[f.name] for f in fields(TrainConfig) if f.name in c})
    weights, best = data["meta"]["weights"], data["meta"]["bayes_accuracy"]
    judge = SimpleNamespace(weights=weights, best_accuracy=best)
    steering = SimpleNamespace(sae=SimpleNamespace(d_sae=c["d_sae"]))
    policy = SimpleNamespace(steerings=[steering])
    table = show.closing(data["base"], data["trained"], judge, config, policy)
    made = f"seed {c['seed']}, {c['date']}, {c['machine']}, torch {c['versions']['torch']}"
    closing = f"```\n{table}\n```\n\n({data['trained']['seconds']:.0f} seconds, {made}.)\n"
    took = f"{analysis['seconds']:.0f} seconds, {analysis['made']}"
    return {"closing": closing, "analysis": f"```\n{analysis['text']}\n```\n\n({took}.)\n"}


NO_SOFTWARE = {"Software": None}       # the same numbers make the same file
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110,
         "axes.titlelocation": "left", "axes.titlesize": 10.5, "legend.frameon": False,
         "legend.fontsize": 9}


def panels(count, width, height, **how):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update(STYLE)
    return pyplot.subplots(1, count, figsize=(width, height), constrained_layout=True, **how)


def dashed(axis, y, text):
    """A line across, with words on its right end."""
    axis.axhline(y, color="0.5", ls="--", lw=1)
    axis.text(.99, y, text, transform=axis.get_yaxis_transform(), va="bottom", ha="right", color="0.4",
              fontsize=9)


def draw_style(data):
    """One run: rates before and after; its loss."""
    figure, (left, right) = panels(2, 10, 4.4, width_ratios=[1.25, 1])
    base, trained, weights = data["base"], data["trained"], data["meta"]["weights"]
    count, steps = base["answers"], data["steps"]
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

    right.plot([r["step"] for r in steps], [r["loss"] for r in steps], color=BLUE, label="training")
    held, errors = ([m[x] for m in (base, trained)] for x in ("loss", "loss_se"))
    right.errorbar([0, trained["step"]], held, yerr=errors, fmt="o", color="black", capsize=3,
                   label="held-out pairs ± s.e.")
    flat = math.log1p(math.exp(data["config"]["beta"] * data["config"]["gamma_ratio"]))
    dashed(right, flat, f"no preference at all: {flat:.3f}")
    sound = " → ".join(f"{m['parse_sampled']:.1%}" for m in (base, trained))
    right.set(ylim=(0, max(flat, base["loss"]) * 1.1), xlabel="optimiser step", ylabel="SimPO loss",
              title=f"Loss; well-formed answers {sound}")
    right.legend(loc="lower left")
    figure.savefig(DOCS / "style.png", metadata=NO_SOFTWARE)


def draw_choices(r):
    """Every choice's change, a dot for each seed: two worlds, and the control on coins."""
    figure, axes = panels(3, 11, 4.2, sharey=True)
    for axis, name in zip(axes, ("style", "honest", "null")):
        planted, weights = r.pairs.get(name), "every weight 0: coins"
        if planted:
            weights = "weights: " + " ".join(f"{planted[c]['weight']:+g}" for c in world.CHOICES)
        axis.axvline(0, color="0.6", lw=1)
        for y, choice in enumerate(world.CHOICES):
            for kind, shift, face in (("answers", -.14, COLOR[choice]), ("exact", .14, "white")):
                moved = r.points(name, kind, choice)
                axis.plot(moved, [y + shift] * len(moved), "o", mfc=face, mec=COLOR[choice], alpha=.8)
            if planted:
                axis.plot(100 * planted[choice]["difference"], y, "|k", ms=13, mew=1.5)
        axis.text(0, 1.02, weights, transform=axis.transAxes, fontsize=7.5, color="0.35")
        axis.set_title(f"{name}, {len(r.seeds(name))} seeds\n")
    axes[0].set_yticks(range(len(world.CHOICES)), world.CHOICES)
    axes[0].invert_yaxis()
    axes[2].set_xlim(-50, 50)
    axes[2].axvspan(-5, 5, color="0.93", zorder=0)
    figure.supxlabel("change of a choice's rate, points (● in sampled answers, ○ exact at the deciding "
                     "token; | chosen less rejected in the training pairs)", fontsize=9.5)
    figure.savefig(DOCS / "choices.png", metadata=NO_SOFTWARE)


def draw_frontier(r):
    """What the gain costs: a dot for each nll_weight and learning rate."""
    figure, axes = panels(3, 11, 3.8)
    shown = (("answers truth", 100, "fact questions answered truly, %"),
             ("answers parse", 100, "well-formed answers, %"),
             ("drift", 1, "KL from the base on neutral text, nats/token"))
    colors = dict(zip(results.TERMS, ("#8c2d19", "#c9762b", GREEN, BLUE, "0.55")))
    for axis, (place, times, words) in zip(axes, shown):
        for term in results.TERMS:
            points = []
            for lr in results.RATES:
                (margin,), start = r.values(f"{term}, lr {lr:g}", "style margin")
                (y,), base = r.values(f"{term}, lr {lr:g}", place)
                points.append((margin - start, times * y))
            axis.plot(*zip(*points), color=colors[term], lw=1, alpha=.6)
            axis.scatter(*zip(*points), s=(16, 42, 81), color=colors[term], label=term)
        dashed(axis, times * base, "base")
        axis.set(xlabel="margin gained over the base, nats a token", title=words)
    axes[1].set_ylim(94, 100)
    axes[1].legend(loc="lower right")
    rates = "dot size: lr " + ", ".join(f"{lr:g}" for lr in results.RATES)
    axes[1].text(.02, .95, rates, transform=axes[1].transAxes, fontsize=9, color="0.35")
    figure.savefig(DOCS / "frontier.png", metadata=NO_SOFTWARE)


def draw_l1(r):
    """Held-out loss against L0 and against truth, a curve for each activation over l1."""
    figure, (left, right) = panels(2, 10, 3.8)
    marks = zip(results.KINDS.items(), (RED, BLUE, GREEN, "#8a5fa8"), "os^v")
    for (kind, (_, sweep)), tint, mark in marks:
        runs = [r.seeds(f"{kind}, l1 {l1:g}")[0] for l1 in sweep]
        loss, truth = [m["style"]["loss"] for m in runs], [100 * m["answers"]["truth"] for m in runs]
        how = {"color": tint, "marker": mark, "ms": 6, "alpha": .85}
        left.plot([m["style"]["l0"] for m in runs], loss, label=kind, **how)
        right.plot(truth, loss, ls="", **how)
    dashed(left, r.base["style"]["loss"], "base")
    dashed(left, 5.007, "no preference at all: 5.007")
    left.set(ylim=(2.6, 5.3), xscale="log", ylabel="held-out SimPO loss",
             xlabel="L0: features moved a steered token, of 1024 (l1 .003 right ... .3 left)")
    left.legend()
    right.axvline(100 * r.base["answers"]["truth"], color="0.5", ls="--", lw=1)
    right.set(xlabel="fact questions answered truly, % (dashed: base)", ylabel="held-out SimPO loss")
    figure.savefig(DOCS / "l1.png", metadata=NO_SOFTWARE)


@dataclass
class FiguresConfig:
    run: str = setting(None, "a run, to be put into the docs", positional=True, group="what")


def run(config):
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install -r requirements-extra.txt") from None
    if config.run:
        write_json(DATA, gather(Path(config.run)), indent=1)
    draw_style(read_json(DATA))
    for draw in (draw_choices, draw_frontier, draw_l1):
        draw(results.Results(read_json(results.DATA)))
    results.fill(blocks())
    print(f"{DOCS}: the figures, drawn with matplotlib {matplotlib.__version__}, and the tables")


def main(argv=None):
    return command("python -m experiments.figures", FiguresConfig, run, argv, "Draw the docs' figures.")


if __name__ == "__main__":
    sys.exit(main())
