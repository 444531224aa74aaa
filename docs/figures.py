"""Draws the README's figure and writes the README's table, from a finished run on the lab.

    python train.py && python docs/figures.py runs/style-1     # docs/style.json, docs/style.png, the table in README.md
    python docs/figures.py                                     # the same again from docs/style.json
"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
DATA, FIGURE, README = HERE / "style.json", HERE / "style.png", HERE.parent / "README.md"
MARKS = "<!-- closing -->\n", "<!-- /closing -->"


def gather(run):
    """What the figure and the table show, out of a run's folder."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    text = (run / "metrics.jsonl").read_text(encoding="utf-8").replace(": null", ": NaN")
    rows = [json.loads(line) for line in text.splitlines()]
    base, trained = (next(r for r in rows if r.get("evaluation") == which) for which in ("base", "trained"))
    meta = json.loads((HERE.parent / config["pairs"] / "meta.json").read_text(encoding="utf-8"))
    return {"config": config, "meta": meta, "base": base, "trained": trained, "steps": [r for r in rows if "penalty" in r]}


def table(data):
    """The README's block: train.py's closing table, and what it was measured with."""
    import train
    c = data["config"]
    return (f"```\n{train.closing(data['base'], data['trained'], data['meta'], SimpleNamespace(**c), c['d_sae'])}\n```\n\n"
            f"({data['trained']['seconds']:.0f} seconds, seed {c['seed']}, {c['date']}, {c['machine']}, torch {c['versions']['torch']}.)\n")


def in_readme(text):
    return text.split(MARKS[0])[1].split(MARKS[1])[0]


def draw(data, out):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    weights, base, trained, n = data["meta"]["weights"], data["base"], data["trained"], data["base"]["answers"]
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), gridspec_kw={"width_ratios": [1.25, 1]}, constrained_layout=True)
    share = {"truth": .6, "admit": .2, "decline": .2}                       # of the prompts in which the choice comes up
    names = sorted(weights, key=lambda name: (name not in share, weights[name]))
    for y, name in enumerate(names):
        a, b = base["sampled"][name], trained["sampled"][name]
        color = "#2f6f4f" if name in share else "#b4552d"
        left.plot([a, b], [y, y], color=color, lw=2, alpha=.6)
        left.plot(a, y, "o", mfc="white", mec=color, ms=7)
        left.errorbar(b, y, xerr=(b * (1 - b) / (n * share.get(name, 1))) ** .5, fmt="o", color=color, ms=7, capsize=2)
    left.set_yticks(range(len(names)), [f"{name}  ({weights[name]:+g})" for name in names])
    left.axhline(len(share) - .5, color="0.8", lw=1)
    left.text(1.0, len(share) - .65, "alignment", color="#2f6f4f", ha="right", va="top")
    left.text(1.0, len(names) - .6, "style", color="#b4552d", ha="right", va="top")
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
        DATA.write_text(json.dumps(gather(run), indent=1) + "\n", encoding="utf-8")
    data = json.loads(DATA.read_text(encoding="utf-8"))
    draw(data, FIGURE)
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(MARKS[0] + in_readme(text), MARKS[0] + table(data)), encoding="utf-8")
    print(f"{FIGURE} and the table in {README.name}, from {argv[0] if argv else DATA}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
