"""Draws the README's figure from a finished run on the lab: `python docs/figures.py runs/style-1` writes docs/style.png."""
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        import matplotlib
    except ImportError:
        print("figures.py: drawing needs matplotlib (pip install -r requirements-extra.txt)", file=sys.stderr)
        return 2
    if not argv or not (Path(argv[0]) / "metrics.jsonl").is_file():
        print("figures.py: name a finished run, such as runs/style-1 (and, if you like, the file to write)", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    run = Path(argv[0])
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    base, trained = (next(r for r in rows if r.get("evaluation") == which) for which in ("base", "trained"))
    weights = json.loads((Path(config["pairs"]) / "meta.json").read_text(encoding="utf-8"))["weights"]
    out = Path(argv[1]) if len(argv) > 1 else HERE / f"{Path(config['pairs']).name}.png"

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.3), gridspec_kw={"width_ratios": [1.25, 1]}, constrained_layout=True)
    names = [n for group in (("truth", "admit", "decline"), ("restate", "filler", "closer", "bullets", "opener", "bold", "heading"))
             for n in sorted(group, key=lambda n: weights.get(n, 0))]
    n = base["answers"]
    share = {"truth": .6, "admit": .2, "decline": .2}
    for y, name in enumerate(names):
        a, b = base["sampled"][name], trained["sampled"][name]
        color = "#2f6f4f" if name in share else "#b4552d"
        left.plot([a, b], [y, y], color=color, lw=2, alpha=.6)
        left.plot(a, y, "o", mfc="white", mec=color, ms=7)
        error = math.sqrt(max(b * (1 - b), 1e-9) / (n * share.get(name, 1)))
        left.errorbar(b, y, xerr=error, fmt="o", color=color, ms=7, capsize=2)
    left.set_yticks(range(len(names)), [f"{name}  ({weights.get(name, 0):+g})" for name in names])
    left.axhline(2.5, color="0.8", lw=1)
    left.text(1.0, 2.35, "alignment", color="#2f6f4f", ha="right", va="top")
    left.text(1.0, len(names) - .6, "style", color="#b4552d", ha="right", va="top")
    left.set_xlim(0, 1)
    left.set_xlabel(f"rate in sampled answers (T=1, {n} held-out prompts; ○ base, ● trained ± s.e.)")
    left.set_title("What the policy does (planted weight in brackets)", loc="left", fontsize=11)

    steps = [r for r in rows if "evaluation" not in r]
    right.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="#33557f", label="training batches")
    right.errorbar([0, trained["step"]], [base["loss"], trained["loss"]], yerr=[base["loss_se"], trained["loss_se"]], fmt="o", color="black", capsize=3, label="held-out pairs ± s.e.")
    flat = math.log1p(math.exp(min(700, config["beta"] * config["gamma_ratio"])))
    right.axhline(flat, color="0.5", ls="--", lw=1)
    right.text(trained["step"], flat, f"no preference at all: {flat:.3f}", ha="right", va="bottom", color="0.4", fontsize=9)
    right.set_ylim(0, max(flat * 1.1, base["loss"] * 1.1))
    right.set_xlabel("optimiser step")
    right.set_ylabel("SimPO loss")
    right.legend(loc="lower left", frameon=False)
    right.set_title(f"Loss; well-formed answers {base['parse_sampled']:.1%} → {trained['parse_sampled']:.1%}", loc="left", fontsize=11)
    figure.savefig(out, dpi=110, metadata={"Software": None})
    print(f"{out}: drawn from {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
