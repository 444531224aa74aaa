"""The README's table over seeds: `python docs/results.py` trains what docs/results.json does not hold yet, and prints.

    style, honest   the defaults on the lab's two worlds
    null            the control: the defaults on pairs whose order is a coin's (every planted weight 0; other coins for each
                    seed), loss, accuracy and margin measured on the true pairs of `style`
    paper           `style` with the paper's loss, nll_weight 0

Five seeds each, two runs at a time on one thread each, about 20 minutes on two cores. Every run is written when it is
done and is made again only if a default has changed, so this can be stopped at any time.
"""
import argparse
import contextlib
import io
import json
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
DATA, README, SEEDS = HERE / "results.json", HERE.parent / "README.md", range(5)
MARKS = "<!-- seeds -->\n", "<!-- /seeds -->"
EXPERIMENTS = {"style": {}, "honest": {"pairs": "tiny/pairs/honest"}, "null": {"pairs": "(coins)"}, "paper": {"nll_weight": 0.0}}


def settings(name, seed):
    """What decides the outcome of a run: every setting of train.py but where it lies and on what it runs."""
    import train
    config = asdict(train.TrainConfig(seed=seed, threads=1, **EXPERIMENTS[name]))
    return {k: v for k, v in config.items() if k not in ("run", "runs", "device", "dtype", "log_every", "save_every")}


def one(name, seed):
    """Trains once. -> what is kept of it: settings, metrics of base and trained, with what it was made"""
    import torch
    import fsrl
    import simpo
    import train
    from tiny import make
    with tempfile.TemporaryDirectory() as scratch:
        kept, scratch = {"settings": settings(name, seed)}, Path(scratch)
        changes = dict(kept["settings"])
        if name == "null":
            make.make_pairs(scratch, "null", dict.fromkeys(make.world.CHOICES, 0.0), make.SIZES, seed=f" null {seed}")
            changes["pairs"] = str(scratch / "pairs" / "null")
        with contextlib.redirect_stdout(io.StringIO()):
            out = train.train(train.TrainConfig(**changes, runs=str(scratch / "runs")))
        kept |= {"base": out["base"], "trained": out["trained"]}
        if name == "null":
            run = fsrl.load_run(out["run"])
            pairs, _ = simpo.encode_pairs(run.tokenizer, simpo.read_pairs(HERE.parent / "tiny/pairs/style", "test", 1000))
            for which, steering in (("base", None), ("trained", run.steering)):
                kept[which] |= simpo.evaluate(run.model, pairs, steering)
    return kept | {"made": f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, one thread, torch {torch.__version__}"}


def cell(before, after, form):
    """base → mean ± standard deviation over seeds of the trained"""
    mean = sum(after) / len(after)
    sd = (sum((v - mean) ** 2 for v in after) / max(1, len(after) - 1)) ** 0.5
    return f"{form.format(sum(before) / len(before))} → {form.format(mean)} ± {form.format(sd)}"


def table(runs):
    """The README's block: rows are measures, columns experiments."""
    some = {name: [runs[f"{name} {seed}"] for seed in SEEDS if f"{name} {seed}" in runs] for name in EXPERIMENTS}
    some = {name: found for name, found in some.items() if found}
    out = ["| | " + " | ".join(f"`{name}`, {len(found)} seeds" for name, found in some.items()) + " |", "|---|" + "---|" * len(some)]
    measures = [("SimPO loss", "loss", "{:.2f}"), ("accuracy", "accuracy", "{:.3f}"), ("margin, nats a token", "margin", "{:.3f}"),
                ("well-formed, T=1", "parse", "{:.3f}"), ("L0 a token", "l0", "{:.1f}")]
    measures += [(name, name, "{:.2f}") for name in next(iter(runs.values()))["base"]["sampled"] if name != "parse"]
    for title, key, form in measures:
        get = lambda m: m["sampled"][key] if key in m["sampled"] else m[key]      # noqa: E731, B023
        out.append(f"| {title} | " + " | ".join(cell([get(r["base"]) for r in found], [get(r["trained"]) for r in found], form) for found in some.values()) + " |")
    return "\n".join(out) + f"\n\n({'; '.join(sorted({r['made'] for r in runs.values()}))}.)\n"


def in_readme(text):
    return text.split(MARKS[0])[1].split(MARKS[1])[0]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train the lab's experiments over seeds and write the README's table.")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds [5]")
    parser.add_argument("--table", action="store_true", help="train nothing, write the table of what is there")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code
    if args.one:
        print(json.dumps(one(args.one[0], int(args.one[1]))))
        return 0
    import gemma
    from tqdm import tqdm
    runs = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    todo = [(name, seed) for seed in range(args.seeds) for name in EXPERIMENTS
            if not args.table and runs.get(f"{name} {seed}", {}).get("settings") != settings(name, seed)]

    def train_one(name, seed):
        done = subprocess.run([sys.executable, __file__, "--one", name, str(seed)], capture_output=True, text=True)
        return name, seed, done
    with ThreadPoolExecutor(2) as pool:
        for job in tqdm(as_completed([pool.submit(train_one, *job) for job in todo]), total=len(todo), desc="runs"):
            name, seed, done = job.result()
            if done.returncode:
                print(f"results.py: {name}, seed {seed} failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            runs[f"{name} {seed}"] = json.loads(done.stdout.splitlines()[-1])
            gemma.atomically(DATA, lambda path: path.write_text(json.dumps(dict(sorted(runs.items())), indent=1) + "\n", encoding="utf-8"))
    if runs:
        text = README.read_text(encoding="utf-8")
        README.write_text(text.replace(MARKS[0] + in_readme(text), MARKS[0] + table(runs)), encoding="utf-8")
        print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
