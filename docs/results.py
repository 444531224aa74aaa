"""The README's table over seeds: `python docs/results.py` trains what docs/results.json does not hold yet, and prints.

    style, honest   the defaults on the lab's two worlds
    null            the defaults on pairs whose order is a coin's (every planted weight 0), judged on the pairs of `style`
    paper           `style` with the paper's loss, nll_weight 0

Five seeds each, about 80 seconds a run on two cores; a run that is there is not made again, so it can be stopped at any time.
"""
import contextlib
import io
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
DATA, README, SEEDS = HERE / "results.json", HERE.parent / "README.md", range(5)
MARKS = "<!-- seeds -->\n", "<!-- /seeds -->"
EXPERIMENTS = {"style": {}, "honest": {"pairs": "tiny/pairs/honest"}, "null": {"pairs": None}, "paper": {"nll_weight": 0.0}}


def one(name, seed, scratch):
    """Trains once and gives back what is kept of it: the metrics of base and trained."""
    import fsrl
    import simpo
    import train
    from tiny import make
    settings = dict(EXPERIMENTS[name])
    if name == "null":
        settings["pairs"] = str(scratch / "pairs" / "null")
        if not Path(settings["pairs"]).exists():
            make.make_pairs(scratch, "null", dict.fromkeys(make.world.WORLDS["style"], 0.0), make.SIZES)
    config = train.TrainConfig(seed=seed, runs=str(scratch / "runs"), **settings)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        out = train.train(config)
    kept = {"settings": {k: v for k, v in EXPERIMENTS[name].items() if v is not None}, "base": out["base"], "trained": out["trained"]}
    if name == "null":                   # its own pairs have nothing to predict: the true ones of `style` are the question
        run = fsrl.load_run(out["run"])
        pairs, _ = simpo.encode_pairs(run.tokenizer, simpo.read_pairs(HERE.parent / "tiny/pairs/style", "test", 1000))
        for which, steering in (("base", None), ("trained", run.steering)):
            kept[which] |= simpo.evaluate(run.model, pairs, steering)
    return kept


def spread(values, form):
    """mean ± standard deviation over seeds"""
    mean = sum(values) / len(values)
    sd = (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5
    return f"{form.format(mean)} ± {form.format(sd)}"


def table(data):
    """The README's block: rows are measures, columns experiments; mean ± standard deviation over seeds."""
    runs = {name: [data["runs"][f"{name} {seed}"] for seed in SEEDS if f"{name} {seed}" in data["runs"]] for name in EXPERIMENTS}
    runs = {name: some for name, some in runs.items() if some}
    out = ["| | " + " | ".join(f"`{name}` ({len(some)} seeds)" for name, some in runs.items()) + " |", "|---|" + "---|" * len(runs)]

    def row(title, get, form, change=False):
        cells = []
        for some in runs.values():
            before = sum(get(r["base"]) for r in some) / len(some)
            cells.append(f"{form.format(before)} → {spread([get(r['trained']) for r in some], form)}")
        out.append(f"| {title} | " + " | ".join(cells) + " |")
    row("SimPO loss", lambda m: m["loss"], "{:.2f}")
    row("accuracy", lambda m: m["accuracy"], "{:.3f}")
    row("well-formed, T=1", lambda m: m["parse_sampled"], "{:.3f}")
    row("L0 a token", lambda m: m["l0"], "{:.1f}")
    for name in ("heading", "bold", "opener", "bullets", "restate", "filler", "closer", "truth", "admit", "decline"):
        row(name, lambda m: m["sampled"][name], "{:.2f}")
    made = data["made"]
    return "\n".join(out) + f"\n\n({made['date']}, {made['machine']}, torch {made['torch']}.)\n"


def in_readme(text):
    return text.split(MARKS[0])[1].split(MARKS[1])[0]


def main(argv=None):
    import torch
    data = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {"runs": {}}
    todo = [(name, seed) for seed in SEEDS for name in EXPERIMENTS if f"{name} {seed}" not in data["runs"]]
    with tempfile.TemporaryDirectory() as scratch:
        for i, (name, seed) in enumerate(todo):
            began = time.time()
            data["runs"][f"{name} {seed}"] = one(name, seed, Path(scratch))
            data["made"] = {"date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__}
            DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            print(f"{i + 1}/{len(todo)}  {name}, seed {seed}: {time.time() - began:.0f} s", flush=True)
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(MARKS[0] + in_readme(text), MARKS[0] + table(data)), encoding="utf-8")
    print(table(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
