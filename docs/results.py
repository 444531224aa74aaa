"""What the lab proves: `python docs/results.py` trains what docs/results.json does not hold yet, measures it, and writes the tables of README.md.

    main          the defaults on the lab's two worlds, the control on coins, and the paper's loss alone      five seeds each
    controls      one vector for every token; imitation without SimPO; a wider target margin              three seeds each
    dictionary    the same adapter on a random dictionary                                                 two seeds each
    frontier      nll_weight x learning rate
    activations   soft, relu, jumprelu x l1

Every policy is measured in the same way, whatever it was trained on (`measured`); the base model once. Two trainings at a time, one
thread each: about 80 minutes on two cores. What is done is written at once and made again only if its settings change, so
this can be stopped at any time. The adapters stay in runs/results/.

    python docs/results.py --only main        # one group
    python docs/results.py --table            # train nothing, write the tables of what is there
    python docs/results.py --split dev ...    # for tuning: measures on dev, into a file of its own, and leaves README.md alone
"""
import argparse
import contextlib
import hashlib
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
DATA, README, RUNS, SEEDS = HERE / "results.json", HERE.parent / "README.md", Path("runs/results"), range(5)
STYLE, HONEST, COINS = "tiny/pairs/style", "tiny/pairs/honest", "(coins)"
RANDOM, CONSTANT = "(random dictionary)", "docs/controls.py:Constant"

MAIN = {"style": {}, "honest": {"pairs": HONEST}, "null": {"pairs": COINS}, "paper": {"nll_weight": 0.0}}
FREE = {"adapter": CONSTANT, "l1": 0.0}                # at the default l1 a constant vector never leaves 0
CONTROLS = {"random": {"sae": RANDOM}, "constant": FREE, "imitation": {"simpo_weight": 0.0},
            "wide": {"gamma_ratio": 1.0}, "wide null": {"gamma_ratio": 1.0, "pairs": COINS},
            "random honest": {"sae": RANDOM, "pairs": HONEST}, "constant honest": {**FREE, "pairs": HONEST}}
WEIGHTS, RATES = (0.0, 1.0, 5.0, 20.0, None), (5e-4, 2e-3, 1e-2)               # None: NLL alone
FRONTIER = {f"{'NLL alone' if w is None else f'nll_weight {w:g}'}, lr {lr:g}": {"lr": lr, **({"simpo_weight": 0.0} if w is None else {"nll_weight": w})}
            for w in WEIGHTS for lr in RATES}
UNRESTRAINED = {"unrestrained": {"nll_weight": 0.0, "lr": 1e-2, "l1": .001}}
KINDS = {"soft": ({}, (.003, .01, .03, .1, .3)), "relu": ({"activation": "relu"}, (.003, .01, .03, .1, .3)),
         "jumprelu": ({"activation": "jumprelu"}, (.003, .03, .3)),
         "jumprelu, faster thresholds": ({"activation": "jumprelu", "init": 1e-4, "threshold_lr": 30.0}, (.003, .03, .3))}
ACTIVATIONS = {f"{kind}, l1 {l1:g}": {**how, "l1": l1} for kind, (how, sweep) in KINDS.items() for l1 in sweep}
GROUPS = {"main": (MAIN, 5), "controls": ({n: how for n, how in CONTROLS.items() if how.get("sae") != RANDOM}, 3),
          "dictionary": ({n: how for n, how in CONTROLS.items() if how.get("sae") == RANDOM}, 2), "frontier": (FRONTIER | UNRESTRAINED, 1), "activations": (ACTIVATIONS, 1)}
TITLES = {"random": "`style`, random dictionary", "constant": "`style`, one constant vector, l1 0",
          "imitation": "`style`, NLL alone", "wide": "`style`, γ/β 1", "wide null": "`null`, γ/β 1", "random honest": "`honest`, random dictionary",
          "constant honest": "`honest`, one constant vector, l1 0",
          "unrestrained": "nll_weight 0, lr 0.01, l1 0.001", **{name: f"`{name}`" for name in MAIN}}
EXPERIMENTS = {name: how for experiments, _ in GROUPS.values() for name, how in experiments.items()}
CHOICES = "heading opener bullets restate bold filler closer truth admit decline".split()


# ---- training and measuring ------------------------------------------------------------------------------------------

def settings(name, seed):
    """What decides the outcome of a run: every setting of train.py but where it lies and on what it runs."""
    import train
    config = asdict(train.TrainConfig(seed=seed, threads=1, eval_pairs=2, **EXPERIMENTS[name]))     # what train.py measures is not used here
    return {k: v for k, v in config.items() if k not in ("run", "runs", "device", "dtype", "log_every", "save_every", "keep_prefix", "eval_split", "eval_pairs")
            and (v or k not in ("mask_labels", "labels", "mask_random"))}                 # newer than the first runs, whose keys stay


def key(name, seed):
    """Experiments of equal settings share one run."""
    return hashlib.sha256(json.dumps(settings(name, seed), sort_keys=True).encode()).hexdigest()[:12]


def measured(model, tokenizer, steering, split):
    """A policy (steering None: the base model) on held-out pairs and questions, the same for all. -> dict

    style, honest   simpo.evaluate on 1000 pairs of each world (500 of dev); its loss at the default β and γ/β, whatever was trained
    answers         rates of every choice in answers sampled at T=1 to all the split's questions, twice (test: 2000 answers)
    exact           the model's own probability of each choice at the tokens that settle it, in the answers of `style`'s pairs
    probe           {choice: [share of the 60 pairs differing in it alone where having it is likelier, mean margin in nats a token]}
    drift           KL(steered‖base) on neutral text, nats a token
    examples        three sampled answers
    """
    import simpo
    from gemma import decode
    from tiny import measure, world
    edits = steering and steering.edits()
    out = {}
    for name in ("style", "honest"):
        pairs, _ = simpo.encode_pairs(tokenizer, simpo.read_pairs(HERE.parent / "tiny/pairs" / name, split, 1000))
        out[name] = simpo.evaluate(model, pairs, steering)
        if name == "style":
            out["exact"] = measure.choice_rates(model, tokenizer, pairs, edits)
    questions = 2 * [q for some in world.split(split).values() for q in some]
    out["answers"], ids = simpo.behave(model, tokenizer, questions, world, edits, temperature=1.0)
    out["answers"]["count"] = len(questions)
    out["examples"] = [[questions[i].text, decode(tokenizer, ids[i])] for i in (0, 600, 900)]
    out["probe"] = {}
    for name, pairs in measure.read_probe(tokenizer).items():
        m = simpo.evaluate(model, pairs, steering)
        out["probe"][name] = [m["accuracy"], m["margin"]]
    out["drift"] = measure.drift(model, tokenizer, edits) if edits else 0.0
    return out


def trained(name, seed, split):
    """Trains one policy into runs/results/NAME-SEED. -> (what is known of it, the opened run)"""
    import torch
    import fsrl
    import train
    from tiny import make
    torch.set_num_threads(1)
    kept = {"name": name, "seed": seed, "settings": settings(name, seed)}
    changes, run = dict(kept["settings"]), RUNS / f"{name} {seed}".replace(" ", "-")
    shutil.rmtree(run, ignore_errors=True)
    if changes["pairs"] == COINS:
        make.make_pairs(RUNS / f"coins-{seed}", "null", dict.fromkeys(make.world.CHOICES, 0.0), make.SIZES, seed=f" null {seed}")
        changes["pairs"] = str(RUNS / f"coins-{seed}" / "pairs" / "null")
    if changes["sae"] == RANDOM:
        changes["sae"] = random_dictionary(RUNS / "random_dictionary" / "layer_3")
    with contextlib.redirect_stdout(io.StringIO()):
        out = train.train(train.TrainConfig(**changes, eval_split=split, eval_pairs=2, runs=str(run.parent), run=run.name))
    return kept, fsrl.load_run(out["run"], adapter=changes["adapter"])


def finished(name):
    """Whether runs/results/ holds the adapter of "NAME SEED", trained to the end."""
    path = RUNS / name.replace(" ", "-") / "metrics.jsonl"
    return path.exists() and '"trained"' in path.read_text(encoding="utf-8")


def one(name, seed, split):
    """Trains, measures. -> what is kept of it"""
    import torch
    from gemma import load_gemma, load_tokenizer
    if name == "base":
        return measured(load_gemma("tiny/model"), load_tokenizer("tiny/model"), None, split)
    kept, opened = trained(name, seed, split)
    kept |= measured(opened.model, opened.tokenizer, opened.steering, split)
    return kept | {"made": f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, one thread, torch {torch.__version__}"}


def random_dictionary(folder):
    """The lab's SAE with random directions of length 1 in place of its own. Additive fusion reads nothing else of it.

    Their seed is not 0: the SAE's own directions began as that draw and are still like it (cosines up to .87).
    """
    import torch
    from sae import load_sae, save_sae
    if not (folder / "params.npz").exists():
        sae = load_sae("tiny/sae")
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(2026)), dim=-1))
        save_sae(sae, folder)
    return str(folder)


# ---- tables ------------------------------------------------------------------------------------------------------------

def spread(values, form):
    """mean ± standard deviation over seeds (a single run: the number alone)"""
    mean = sum(values) / len(values)
    sd = (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** .5
    return form.format(mean) + (" ± " + form.format(sd).lstrip("+") if len(values) > 1 else "")


def markdown(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


class Results:
    """docs/results.json: {"base": measured, "pairs": {world: {choice: ...}}, "runs": {key: one}} and what follows from it."""

    def __init__(self, data):
        self.base, self.pairs, self.runs = data.get("base"), data.get("pairs", {}), data.get("runs", {})

    def seeds(self, name):
        """The runs of an experiment."""
        return [run for seed in SEEDS[:next(n for some, n in GROUPS.values() if name in some)] if (run := self.runs.get(key(name, seed)))]

    def values(self, name, get):
        return [get(run) for run in self.seeds(name)]

    def home(self, name):
        """The world whose pairs an experiment is judged on."""
        return "honest" if EXPERIMENTS[name].get("pairs") == HONEST else "style"

    def measures(self, name):
        """(title, format, function of a policy's measures) of the tables below."""
        home = self.home(name)
        rewarded = [c for c in CHOICES[:7] if self.pairs["style"][c]["weight"] > 0]
        return {"SimPO loss": ("{:.2f}", lambda m: m[home]["loss"]), "accuracy": ("{:.3f}", lambda m: m[home]["accuracy"]),
                "margin, nats a token": ("{:.3f}", lambda m: m[home]["margin"]), "well-formed": ("{:.3f}", lambda m: m["answers"]["parse"]),
                "rewarded style": ("{:.3f}", lambda m: sum(m["answers"][c] for c in rewarded) / len(rewarded)), "truth": ("{:.3f}", lambda m: m["answers"]["truth"]),
                "admit": ("{:.3f}", lambda m: m["answers"]["admit"]), "decline": ("{:.3f}", lambda m: m["answers"]["decline"]),
                "L0 a token": ("{:.1f}", lambda m: m[home]["l0"]), "KL on neutral text, nats a token": ("{:.3f}", lambda m: m["drift"])}

    def points(self, name, kind, choice):
        """Change of a choice's rate in points, one for each seed; kind: answers or exact."""
        return [100 * (run[kind][choice] - self.base[kind][choice]) for run in self.seeds(name)]

    def main(self):
        names = list(MAIN)
        rows = []
        for title in self.measures("style"):
            cells = []
            for name in names:
                form, get = self.measures(name)[title]
                cells.append(f"{form.format(get(self.base))} → {spread(self.values(name, get), form)}" if self.seeds(name) else "")
            rows.append([title, *cells])
        return markdown(["", *(f"`{name}` × {len(self.seeds(name))}" for name in names)], rows)

    def choices(self):
        move = lambda name, kind, c: spread(self.points(name, kind, c), "{:+.1f}")      # noqa: E731
        rows = [[c, f"{100 * self.base['answers'][c]:.1f}%",
                 *(cell for w in ("style", "honest") for cell in (f"{self.pairs[w][c]['weight']:+g}", f"{100 * self.pairs[w][c]['difference']:+.1f}", move(w, "answers", c), move(w, "exact", c))),
                 move("null", "answers", c), move("null", "exact", c)] for c in CHOICES]
        return markdown(["", "base", *(f"{w}: {what}" for w in ("style", "honest") for what in ("planted", "in pairs", "answers", "exact")), "null: answers", "exact"], rows)

    def aims(self):
        """What the recipe was asked for, and how far it came: (world, aim, reached, met)."""
        out = []

        def aim(world, text, reached, met):
            out.append([f"`{world}`", text, reached, "yes" if met else "**no**"])
        mean = lambda v: sum(v) / len(v)      # noqa: E731
        for world in ("style", "honest"):
            m = self.measures(world)
            gain = {title: [get(run) - get(self.base) for run in self.seeds(world)] for title, (_, get) in m.items()}
            points = lambda title: [100 * v for v in gain[title]]      # noqa: E731, B023
            if world == "style":
                aim(world, "accuracy at least +12 points", spread(points("accuracy"), "{:+.1f}"), mean(points("accuracy")) >= 12)
                ratio = [run["style"]["loss"] / self.base["style"]["loss"] for run in self.seeds(world)]
                aim(world, "loss at most .75 of the base's", spread(ratio, "{:.3f}"), mean(ratio) <= .75)
                aim(world, "rewarded style choices at least +15 points, mean", spread(points("rewarded style"), "{:+.1f}"), mean(points("rewarded style")) >= 15)
                for decoy in ("restate", "filler"):
                    moved = self.points(world, "answers", decoy)
                    aim(world, f"decoy {decoy} within ±3 points", spread(moved, "{:+.1f}"), abs(mean(moved)) <= 3)
                aim(world, "truth −5 points at most", spread(points("truth"), "{:+.1f}"), mean(points("truth")) >= -5)
            else:
                aim(world, "truth at least +15 points", spread(points("truth"), "{:+.1f}"), mean(points("truth")) >= 15)
                worst = max(CHOICES[:7], key=lambda c: abs(mean(self.points(world, "answers", c))))      # noqa: B023
                aim(world, "no style choice moved by more than 10 points", f"{worst} {spread(self.points(world, 'answers', worst), '{:+.1f}')}", abs(mean(self.points(world, "answers", worst))) <= 10)
            parse = self.values(world, lambda r: 100 * r["answers"]["parse"])
            aim(world, "at least 95% of the answers well-formed", spread(parse, "{:.1f}") + "%", mean(parse) >= 95)
            l0 = self.values(world, lambda r: 100 * r[world]["l0"] / 1024)      # noqa: B023
            aim(world, "L0 at most 5% of the features", spread(l0, "{:.1f}") + "%", mean(l0) <= 5)
        within = [(r["style"]["accuracy"] - self.base["style"]["accuracy"]) / self.base["style"]["accuracy_se"] for r in self.seeds("null")]
        aim("null", "accuracy within 2 standard errors of the base's", spread(within, "{:+.1f}") + " s.e.", abs(mean(within)) <= 2)
        worst = max(CHOICES, key=lambda c: abs(mean(self.points("null", "answers", c))))
        aim("null", "no choice moved by more than 5 points", f"{worst} {spread(self.points('null', 'answers', worst), '{:+.1f}')}", abs(mean(self.points("null", "answers", worst))) <= 5)
        return markdown(["world", "asked", "reached, mean ± sd over seeds", "met"], out)

    def cross(self):
        rows = []
        for name in ["base", *MAIN]:
            get = lambda w, what: [self.base[w][what]] if name == "base" else self.values(name, lambda r: r[w][what])      # noqa: E731, B023
            rows.append([f"`{name}`", *(spread(get(w, what), form) for w in ("style", "honest") for what, form in (("loss", "{:.2f}"), ("accuracy", "{:.3f}"), ("margin", "{:.3f}")))])
        return markdown(["policy", *(f"{what} on `{w}` pairs" for w in ("style", "honest") for what in ("loss", "accuracy", "margin"))], rows)

    def probe(self):
        rows = [[c, *(f"{self.base['probe'][c][i]:.3f}" if name == "base" else spread(self.values(name, lambda r: r["probe"][c][i]), "{:.3f}")      # noqa: B023
                      for i in (0, 1) for name in ["base", "style", "honest", "null"])] for c in CHOICES]
        return markdown(["", *(f"`{name}` {what}" for what in ("prefers", "margin") for name in ["base", "style", "honest", "null"])], rows)

    def policies(self, names, titles):
        rows = []
        for name in names:
            if self.seeds(name):
                m = self.measures(name)
                rows.append([TITLES.get(name, name), *(spread(self.values(name, m[t][1]), m[t][0]) for t in titles)])
        return markdown(["", *titles], rows)

    def frontier(self):
        titles = ["SimPO loss", "margin, nats a token", "accuracy", "rewarded style", "well-formed", "truth", "KL on neutral text, nats a token"]
        base = "| base | " + " | ".join(form.format(get(self.base)) for form, get in (self.measures("style")[t] for t in titles)) + " |"
        return self.policies([*FRONTIER, *UNRESTRAINED], titles) + "\n" + base

    def controls(self):
        titles = ["SimPO loss", "accuracy", "rewarded style", "truth", "admit", "decline", "well-formed", "L0 a token"]
        base = "| base, on `style` | " + " | ".join(form.format(get(self.base)) for form, get in (self.measures("style")[t] for t in titles)) + " |"
        return self.policies(["style", *(n for n in CONTROLS if "honest" not in n and "null" not in n), "null", "wide null", "honest", *(n for n in CONTROLS if "honest" in n)], titles) + "\n" + base

    def activations(self):
        return self.policies(ACTIVATIONS, ["SimPO loss", "accuracy", "L0 a token", "rewarded style", "well-formed", "truth"])

    def broken(self):
        """Answers of the policy that SimPO alone, unrestrained, arrives at."""
        run = self.seeds("unrestrained")[0]
        return "\n".join("> " + question + "\n\n```\n" + answer.replace("```", "'''") + "\n```\n" for question, answer in run["examples"])

    def made(self):
        return "(" + "; ".join(sorted({run["made"] for run in self.runs.values()})) + ".)"

    def blocks(self):
        return {name: getattr(self, name)() + "\n" for name in BLOCKS} | calibrated()


def calibrated():
    """The tables of tiny/calibration.json, which `python analyze.py --calibrate` makes: what to take from them, and all of them."""
    data = json.loads((HERE.parent / "tiny/calibration.json").read_text(encoding="utf-8"))
    table = lambda t: markdown(t["head"], t["rows"]) + "\n\n" + t["note"]      # noqa: E731
    said = "\n".join(f"* {sentence}" for sentence in data["sentences"])
    return {"calibration": "\n\n".join([f"**{t['title']}**\n\n{table(t)}" for t in data["tables"] if t.get("first")] + [said, f"({data['made']}.)"]) + "\n",
            "calibrations": "\n\n".join(f"### {t['title']}\n\n{table(t)}" for t in data["tables"]) + f"\n\n({data['made']}. Command: `{data['command']}`.)\n"}


BLOCKS = ("main", "choices", "aims", "cross", "probe", "frontier", "controls", "activations", "broken", "made")
PAGES = README, HERE / "results.md"


def filled(text, blocks):
    """A page with the text between <!-- NAME --> and <!-- /NAME --> replaced, for every block that it has."""
    for name, block in blocks.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + block + m[2], text, flags=re.S)      # noqa: B023
    return text


def pairs_say():
    """For both worlds and every choice: its planted weight, and its rate in the chosen less that in the rejected training answers."""
    from tiny import world
    out = {}
    for name in ("style", "honest"):
        folder = HERE.parent / "tiny/pairs" / name
        weights, gap = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["weights"], {c: [] for c in CHOICES}
        for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            q, (a, b) = world.read_prompt(record["prompt"]), record["choices"]
            for c in a.keys() & b.keys() & gap.keys():
                gap[c].append(bool(world.is_on(q, c, a[c])) - bool(world.is_on(q, c, b[c])))
        out[name] = {c: {"weight": weights[c], "difference": sum(gap[c]) / len(gap[c])} for c in CHOICES}
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train and measure the lab's experiments and write the README's tables.")
    parser.add_argument("--only", choices=GROUPS, action="append", help="only this group (can be given several times)")
    parser.add_argument("--table", action="store_true", help="train nothing, write the tables of what is there")
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="where it is measured; dev, for tuning, writes runs/results-dev.json and prints")
    parser.add_argument("--policies", action="store_true", help="train again, without measuring, those of the groups that runs/results/ does not hold (for analyze.py --calibrate)")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code
    if args.one:
        name, seed = args.one[0], int(args.one[1])
        print(json.dumps(trained(name, seed, args.split)[0] if args.policies else one(name, seed, args.split)))
        return 0
    import gemma
    from tqdm import tqdm
    file = DATA if args.split == "test" else Path("runs/results-dev.json")
    data = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"base": None, "pairs": pairs_say(), "runs": {}}
    todo = {} if args.table else {key(name, seed): (name, seed) for group in args.only or GROUPS for experiments, n in [GROUPS[group]]
                                  for seed in range(n) for name in experiments}
    if args.policies:
        todo = [job for job in todo.values() if not finished("{} {}".format(*job))]
    else:
        todo = ([("base", 0)] if not data["base"] and not args.table else []) + [job for k, job in todo.items() if k not in data["runs"]]

    def run_one(name, seed):
        how = [sys.executable, __file__, "--split", args.split, "--one", name, str(seed)] + ["--policies"] * args.policies
        return name, seed, subprocess.run(how, capture_output=True, text=True)

    def keep():
        file.parent.mkdir(exist_ok=True)
        gemma.write_json(file, data, indent=1)
    failed = 0
    with ThreadPoolExecutor(2) as pool:
        for job in tqdm(as_completed([pool.submit(run_one, *job) for job in todo]), total=len(todo), desc="runs"):
            name, seed, done = job.result()
            if done.returncode:
                failed += 1
                print(f"results.py: {name}, seed {seed} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", file=sys.stderr)
                continue
            if args.policies:
                continue
            result = json.loads(done.stdout.splitlines()[-1])
            data = {**data, "base": result} if name == "base" else {**data, "runs": {**data["runs"], key(name, seed): result}}
            keep()
    if args.policies:
        return 2 if failed else 0
    if not args.table:
        current = {key(name, seed) for experiments, n in GROUPS.values() for name in experiments for seed in range(n)}
        data["runs"] = {k: run for k, run in sorted(data["runs"].items()) if k in current}        # what an older default made goes
        keep()
    results = Results(data)
    if missing := [name for name in EXPERIMENTS if not results.seeds(name)]:
        print(f"{len(missing)} experiments have no run yet ({', '.join(missing[:5])}, ...); the tables are written when every one has", file=sys.stderr)
    elif args.split == "test":
        for page in PAGES:
            page.write_text(filled(page.read_text(encoding="utf-8"), results.blocks()), encoding="utf-8")
    if results.seeds("style") and results.seeds("null"):
        print(results.main(), results.aims(), sep="\n\n")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
