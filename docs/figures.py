"""Draws the README's figures and writes its first table and the summary of an analysis.

    python train.py && python analyze.py runs/style-1 && python docs/figures.py runs/style-1     # style.json and style.png of that run, its table and its analysis in README.md, docs/report.html
    python docs/figures.py                                     # and from what is there: style.png from style.json; choices, frontier and l1.png from results.json
"""
import json
import shutil
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
DATA, FIGURE, README = HERE / "style.json", HERE / "style.png", HERE.parent / "README.md"
GREEN, RED = "#2f6f4f", "#b4552d"                        # alignment, style
CHOICES = "heading opener bullets restate bold filler closer truth admit decline".split()
MARKS = {name: (f"<!-- {name} -->\n", f"<!-- /{name} -->") for name in ("closing", "analysis")}


def gather(run):
    """What the figure and the table show, out of a run's folder."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    text = (run / "metrics.jsonl").read_text(encoding="utf-8").replace(": null", ": NaN")
    rows = [json.loads(line) for line in text.splitlines()]
    base, trained = (next(r for r in rows if r.get("evaluation") == which) for which in ("base", "trained"))
    meta = json.loads((HERE.parent / config["pairs"] / "meta.json").read_text(encoding="utf-8"))
    a = json.loads((run / "analysis.json").read_text(encoding="utf-8"))
    import report
    said = {"text": report.summary(a).strip() + "\n\n" + "\n".join(textwrap.fill(x, 150) for x in a["verdict"]["sentences"]), "seconds": a["seconds"], "made": f"{a['date']}, {a['machine']}"}
    return {"config": config, "meta": meta, "base": base, "trained": trained, "steps": [r for r in rows if "penalty" in r], "analysis": said}


def table(data):
    """The README's block: train.py's closing table, and what it was measured with."""
    import train
    c = data["config"]
    return (f"```\n{train.closing(data['base'], data['trained'], data['meta'], SimpleNamespace(**c), c['d_sae'])}\n```\n\n"
            f"({data['trained']['seconds']:.0f} seconds, seed {c['seed']}, {c['date']}, {c['machine']}, torch {c['versions']['torch']}.)\n")


def analysis(data):
    """The README's block: what analyze.py printed."""
    a = data["analysis"]
    return "```\n" + a["text"] + f"\n```\n\n({a['seconds']:.0f} seconds, {a['made']}.)\n"


def in_readme(text, name="closing"):
    return text.split(MARKS[name][0])[1].split(MARKS[name][1])[0]


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def draw(data, out):
    plt = pyplot()
    weights, base, trained, n = data["meta"]["weights"], data["base"], data["trained"], data["base"]["answers"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), gridspec_kw={"width_ratios": [1.25, 1]}, constrained_layout=True)
    share = {"truth": .6, "admit": .2, "decline": .2}                       # of the prompts in which the choice comes up
    names = sorted(weights, key=lambda name: (name not in share, weights[name]))
    for y, name in enumerate(names):
        a, b = base["sampled"][name], trained["sampled"][name]
        color = GREEN if name in share else RED
        left.plot([a, b], [y, y], color=color, lw=2, alpha=.6)
        left.plot(a, y, "o", mfc="white", mec=color, ms=7)
        left.errorbar(b, y, xerr=(b * (1 - b) / (n * share.get(name, 1))) ** .5, fmt="o", color=color, ms=7, capsize=2)
    left.set_yticks(range(len(names)), [f"{name}  ({weights[name]:+g})" for name in names])
    left.axhline(len(share) - .5, color="0.8", lw=1)
    left.text(1.0, len(share) - .65, "alignment", color=GREEN, ha="right", va="top")
    left.text(1.0, len(names) - .6, "style", color=RED, ha="right", va="top")
    left.set_xlim(0, 1)
    left.set_xlabel(f"rate in sampled answers to {n} held-out prompts\n(○ base, ● trained ± s.e.)")
    left.set_title("What the policy does (planted weight in brackets)", loc="left", fontsize=11)

    right.plot([r["step"] for r in data["steps"]], [r["loss"] for r in data["steps"]], color="#33557f", label="training batches")
    right.errorbar([0, trained["step"]], [base["loss"], trained["loss"]], yerr=[base["loss_se"], trained["loss_se"]], fmt="o", color="black",
                   capsize=3, label="held-out pairs ± s.e.")
    import torch
    import simpo
    flat = simpo.simpo_loss(torch.zeros(1), torch.zeros(1), data["config"]["beta"], data["config"]["gamma_ratio"]).item()
    right.axhline(flat, color="0.5", ls="--", lw=1)
    right.text(trained["step"], flat, f"no preference at all: {flat:.3f}", ha="right", va="bottom", color="0.4", fontsize=9)
    right.set_ylim(0, max(flat, base["loss"]) * 1.1)
    right.set_xlabel("optimiser step")
    right.set_ylabel("SimPO loss")
    right.legend(loc="lower left", frameon=False)
    right.set_title(f"Loss; well-formed answers {base['parse_sampled']:.1%} → {trained['parse_sampled']:.1%}", loc="left", fontsize=11)
    figure.savefig(out, dpi=110, metadata={"Software": None})


def points(results, out):
    """Every choice's change, one dot for each seed: two worlds and the control on coins."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), sharey=True, constrained_layout=True)
    for axis, name in zip(axes, ("style", "honest", "null")):
        axis.axvline(0, color="0.6", lw=1)
        for y, choice in enumerate(reversed(CHOICES)):
            color = GREEN if choice in ("truth", "admit", "decline") else RED
            for kind, dy, face in (("answers", .14, color), ("exact", -.14, "white")):
                moved = results.points(name, kind, choice)
                axis.plot(moved, [y + dy] * len(moved), "o", mfc=face, mec=color, ms=5, alpha=.8)
            if name != "null":
                axis.plot(100 * results.pairs[name][choice]["difference"], y, "|", color="black", ms=13, mew=1.5)
        weights = "every weight 0: coins" if name == "null" else "weights, top down: " + " ".join(f"{results.pairs[name][c]['weight']:+g}" for c in CHOICES)
        axis.set_title(f"{name}, {len(results.seeds(name))} seeds\n", loc="left", fontsize=11)
        axis.text(0, 1.02, weights, transform=axis.transAxes, fontsize=7.5, color="0.35")
    axes[0].set_yticks(range(len(CHOICES)), reversed(CHOICES))
    axes[2].set_xlim(-50, 50)
    axes[2].axvspan(-5, 5, color="0.93", zorder=0)
    figure.supxlabel("change of a choice's rate, points (● in sampled answers, ○ exact at the deciding token; | chosen less rejected in the training pairs)", fontsize=9.5)
    figure.savefig(out, dpi=110, metadata={"Software": None})


def frontier(results, out):
    """What the gain costs: one dot for each nll_weight and learning rate."""
    from results import FRONTIER, RATES, WEIGHTS
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), constrained_layout=True)
    shown = (("truth", lambda m: 100 * m["answers"]["truth"], "fact questions answered truly, %"), ("parse", lambda m: 100 * m["answers"]["parse"], "well-formed answers, %"),
             ("drift", lambda m: m["drift"], "KL from the base on neutral text, nats/token"))
    colors = dict(zip(WEIGHTS, ("#8c2d19", "#c9762b", "#2f6f4f", "#33557f", "0.55")))
    for axis, (_, get, label) in zip(axes, shown):
        for w in WEIGHTS:
            runs = [results.seeds(name)[0] for name, how in FRONTIER.items()
                    if (w is None) == ("simpo_weight" in how) and (w is None or how["nll_weight"] == w)]
            axis.plot([run["style"]["margin"] - results.base["style"]["margin"] for run in runs], [get(run) for run in runs], "-", color=colors[w], lw=1, alpha=.6)
            for run, size in zip(runs, (4, 6.5, 9)):
                axis.plot(run["style"]["margin"] - results.base["style"]["margin"], get(run), "o", color=colors[w], ms=size,
                          label=("NLL alone" if w is None else f"nll_weight {w:g}") if size == 6.5 else None)
        axis.axhline(get(results.base), color="0.5", ls="--", lw=1)
        axis.text(.99, get(results.base), "base", transform=axis.get_yaxis_transform(), ha="right", va="bottom", color="0.4", fontsize=9)
        axis.set_xlabel("margin gained over the base, nats a token")
        axis.set_title(label, loc="left", fontsize=10.5)
    axes[1].set_ylim(94, 100)
    axes[1].legend(frameon=False, fontsize=9, loc="lower right")
    axes[1].text(.02, .06, "dot size: lr " + ", ".join(f"{lr:g}" for lr in RATES), transform=axes[1].transAxes, fontsize=9, color="0.35")
    figure.savefig(out, dpi=110, metadata={"Software": None})


def activations(results, out):
    """Held-out loss against L0, a curve for each activation over l1."""
    from results import KINDS
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for (kind, (_, sweep)), color, mark in zip(KINDS.items(), ("#b4552d", "#33557f", "#2f6f4f", "#8a5fa8"), "os^v"):
        runs = [results.seeds(f"{kind}, l1 {l1:g}")[0] for l1 in sweep]
        left.plot([r["style"]["l0"] for r in runs], [r["style"]["loss"] for r in runs], mark + "-", color=color, ms=6, label=kind, alpha=.85)
        right.plot([100 * r["answers"]["truth"] for r in runs], [r["style"]["loss"] for r in runs], mark, color=color, ms=7, alpha=.85)
    left.axhline(results.base["style"]["loss"], color="0.5", ls="--", lw=1)
    left.text(130, results.base["style"]["loss"], "base", ha="right", va="bottom", color="0.4", fontsize=9)
    left.axhline(5.007, color="0.5", ls=":", lw=1)
    left.text(130, 5.007, "no preference at all: 5.007", ha="right", va="bottom", color="0.4", fontsize=9)
    left.set_ylim(2.6, 5.3)
    left.set_xscale("log")
    left.set_xlabel("L0: features moved a steered token, of 1024 (l1 .003 right ... .3 left)")
    left.set_ylabel("held-out SimPO loss")
    left.legend(frameon=False, fontsize=9)
    right.axvline(100 * results.base["answers"]["truth"], color="0.5", ls="--", lw=1)
    right.set_xlabel("fact questions answered truly, % (dashed: base)")
    right.set_ylabel("held-out SimPO loss")
    figure.savefig(out, dpi=110, metadata={"Software": None})


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("figures.py: drawing needs matplotlib (pip install -r requirements-extra.txt)", file=sys.stderr)
        return 2
    if argv:
        run = Path(argv[0])
        text = (run / "metrics.jsonl").read_text(encoding="utf-8") if (run / "metrics.jsonl").is_file() else ""
        if '"seconds"' not in text or '"parse_sampled"' not in text:
            print(f"figures.py: {run} is not a finished run on the lab; run `python train.py` first and name the folder that it prints", file=sys.stderr)
            return 2
        if not (run / "analysis.json").exists():
            print(f"figures.py: {run} has no analysis.json; `python analyze.py {run}` makes it", file=sys.stderr)
            return 2
        DATA.write_text(json.dumps(gather(run), indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(run / "report.html", HERE / "report.html")
    data = json.loads(DATA.read_text(encoding="utf-8"))
    draw(data, FIGURE)
    import results as measured
    results = measured.Results(json.loads(measured.DATA.read_text(encoding="utf-8")))
    for name, make in (("choices", points), ("frontier", frontier), ("l1", activations)):
        make(results, HERE / f"{name}.png")
    text = README.read_text(encoding="utf-8")
    for name, block in (("closing", table(data)), ("analysis", analysis(data))):
        text = text.replace(MARKS[name][0] + in_readme(text, name), MARKS[name][0] + block)
    README.write_text(text, encoding="utf-8")
    print(f"{FIGURE} and the tables in {README.name}, from {argv[0] if argv else DATA}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
