"""What the lab proves: trains what docs/results.json does not hold yet, measures it, writes the tables.

    main          the defaults on the lab's two worlds, on coins, and the paper's loss     five seeds
    controls      one vector for every token; imitation alone; a wider target margin       three seeds
    dictionary    the same adapter on a random dictionary                                  two seeds
    frontier      nll_weight x learning rate
    activations   soft, relu, jumprelu x l1

Every policy is measured in the same way, whatever it was trained on (`measured`). Two trainings at a
time, one thread each: about 80 minutes on two cores for all. What is done is written at once, under a
name of the settings that make it (`key`), so this can be stopped at any time. The adapters stay in
runs/results/.

    python -m experiments.results --only main     # one group
    python -m experiments.results --table         # no training: the tables of what is there
    python -m experiments.results --split dev     # for tuning: runs/results-dev.json, and no tables
"""
import contextlib
import io
import json
import multiprocessing
import platform
import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import fsrl
import simpo
import train
from gemma import decode, encode_prompt, generate, load_gemma, load_tokenizer
from instruments.health import drift
from lib.blocks import number
from lib.files import ROOT, read_json, short_digest, write_json, write_text
from lib.judge import judge_of
from lib.pairs import read_pairs
from lib.settings import check, command, one_of, setting
from sae import load_sae, save_sae
from tiny import make, world
from tiny.judge import choice_rates, read_probe

DATA, RUNS = ROOT / "docs" / "results.json", Path("runs/results")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HONEST, COINS = "tiny/pairs/honest", "(coins)"          # names in brackets stand for what is made here
RANDOM, CONSTANT = "(random dictionary)", "experiments/controls.py:Constant"

# ---- the experiments: {name: settings that differ from train.py's defaults} --------------------------

MAIN = {"style": {}, "honest": {"pairs": HONEST}, "null": {"pairs": COINS}, "paper": {"nll_weight": 0.0}}
FREE = {"adapter": CONSTANT, "l1": 0.0}                 # at the default l1 it never leaves 0
CONTROLS = {"constant": FREE, "imitation": {"simpo_weight": 0.0}, "wide": {"gamma_ratio": 1.0},
            "wide null": {"gamma_ratio": 1.0, "pairs": COINS},
            "constant honest": {**FREE, "pairs": HONEST}}
DICTIONARY = {"random": {"sae": RANDOM}, "random honest": {"sae": RANDOM, "pairs": HONEST}}

TERMS = {f"nll_weight {w:g}": {"nll_weight": w} for w in (0.0, 1.0, 5.0, 20.0)}
TERMS["NLL alone"] = {"simpo_weight": 0.0}
RATES = (5e-4, 2e-3, 1e-2)
FRONTIER = {f"{term}, lr {lr:g}": {**how, "lr": lr} for term, how in TERMS.items() for lr in RATES}
UNRESTRAINED = {"unrestrained": {"nll_weight": 0.0, "lr": 1e-2, "l1": .001}}

SLOW = {"activation": "jumprelu"}
KINDS = {"soft": ({}, (.003, .01, .03, .1, .3)),
         "relu": ({"activation": "relu"}, (.003, .01, .03, .1, .3)),
         "jumprelu": (SLOW, (.003, .03, .3)),
         "jumprelu, faster thresholds": ({**SLOW, "init": 1e-4, "threshold_lr": 30.0}, (.003, .03, .3))}
ACTIVATIONS = {f"{kind}, l1 {l1:g}": {**how, "l1": l1} for kind, (how, all_l1) in KINDS.items()
               for l1 in all_l1}

GROUPS = {"main": (MAIN, 5), "controls": (CONTROLS, 3), "dictionary": (DICTIONARY, 2),
          "frontier": (FRONTIER | UNRESTRAINED, 1), "activations": (ACTIVATIONS, 1)}
EXPERIMENTS = {name: how for group, _ in GROUPS.values() for name, how in group.items()}
SEEDS = {name: count for group, count in GROUPS.values() for name in group}

TITLES = {"random": "`style`, random dictionary", "random honest": "`honest`, random dictionary",
          "constant": "`style`, one constant vector, l1 0", "wide": "`style`, γ/β 1",
          "constant honest": "`honest`, one constant vector, l1 0", "wide null": "`null`, γ/β 1",
          "imitation": "`style`, NLL alone", "unrestrained": "nll_weight 0, lr 0.01, l1 0.001",
          **{name: f"`{name}`" for name in MAIN}}

# Settings of train.py that do not decide what comes out.
UNDECIDING = {"run", "runs", "device", "dtype", "threads", "log_every", "save_every", "keep_prefix",
              "eval_split", "eval_pairs"}


def settings(name, seed):
    """Every setting that decides the outcome of a run."""
    config = asdict(train.TrainConfig(**EXPERIMENTS[name], seed=seed))
    return {k: v for k, v in config.items() if k not in UNDECIDING}


def key(name, seed):
    """The name of a run in results.json: a digest of the settings that are not the default, so that a
    setting which train.py gets later changes no name. Experiments of equal settings share one run."""
    usual = asdict(train.TrainConfig())
    changed = {k: v for k, v in settings(name, seed).items() if v != usual[k]}
    return short_digest(json.dumps(changed, sort_keys=True))


# ---- training and measuring --------------------------------------------------------------------------

def measured(model, tokenizer, policy, split):
    """A policy (None: the base model) on held-out pairs and questions, the same for all. -> dict

    style, honest   simpo.evaluate on 1000 pairs of each world (500 of dev), at the default β and γ/β
    answers         rates in answers sampled at T=1 to all the split's questions, twice (test: 2000)
    exact           chance of each choice at the token that settles it, in the answers of style's pairs
    probe           {choice: [share of the 60 pairs that differ in it alone where having it is
                    likelier, mean margin in nats a token]}
    drift           KL from the base model on neutral text, nats a token
    examples        three sampled answers
    """
    out, judge = {}, judge_of("tiny/pairs/style", tokenizer)
    acting, edits = policy.acting(model) if policy else (model, None)
    for name in world.WORLDS:
        pairs, _ = simpo.encode_pairs(tokenizer, read_pairs(f"tiny/pairs/{name}", split, 1000))
        out[name] = simpo.evaluate(model, pairs, policy)
        if name == "style":
            out["exact"] = choice_rates(model, tokenizer, pairs, policy)
    texts = 2 * [q.text for questions in world.split(split).values() for q in questions]
    ids = generate(acting, [encode_prompt(tokenizer, text) for text in texts], max_new_tokens=64,
                   edits=edits, temperature=1.0)
    out["answers"] = judge.rates(texts, ids) | {"count": len(texts)}
    out["examples"] = [[texts[i], decode(tokenizer, ids[i])] for i in (0, 600, 900)]
    probes = {name: simpo.evaluate(model, pairs, policy) for name, pairs in read_probe(tokenizer).items()}
    out["probe"] = {name: [m["accuracy"], m["margin"]] for name, m in probes.items()}
    out["drift"] = drift(model, tokenizer, policy, judge.neutral(64)) if policy else 0.0
    return out


def folder(name, seed):
    return RUNS / f"{name} {seed}".replace(" ", "-")


def finished(name, seed):
    """Whether runs/results/ holds the adapter, trained to the end."""
    path = folder(name, seed) / "metrics.jsonl"
    return path.exists() and '"trained"' in path.read_text(encoding="utf-8")


def random_dictionary(out):
    """The lab's SAE with random directions of length 1: additive fusion reads nothing else of it.

    Their seed is not 0: the SAE's own directions began as that draw and are like it (cosines to .87).
    """
    if not (out / "params.npz").exists():
        sae, g = load_sae("tiny/sae"), torch.Generator().manual_seed(2026)
        W_dec = torch.randn(sae.W_dec.shape, generator=g)
        sae.W_dec.copy_(torch.nn.functional.normalize(W_dec, dim=-1))
        save_sae(sae, out)
    return str(out)


def trained(name, seed, split="test"):
    """Trains one policy into runs/results/NAME-SEED. -> that folder"""
    how, run = dict(EXPERIMENTS[name]), folder(name, seed)
    if how.get("pairs") == COINS:
        weights, out = dict.fromkeys(world.CHOICES, 0.0), RUNS / f"coins-{seed}"
        make.make_pairs(out, "null", weights, make.SIZES, seed=f" null {seed}")
        how["pairs"] = str(out / "pairs" / "null")
    if how.get("sae") == RANDOM:
        how["sae"] = random_dictionary(RUNS / "random_dictionary" / "layer_3")
    shutil.rmtree(run, ignore_errors=True)
    where = {"runs": str(RUNS), "run": run.name, "threads": 1, "eval_split": split, "eval_pairs": 2}
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        train.train(train.TrainConfig(**how, **where, seed=seed))
    return run


def one(name, seed, split):
    """Trains, measures. -> what is kept of it"""
    torch.set_num_threads(1)
    if name == "base":
        return measured(load_gemma("tiny/model"), load_tokenizer("tiny/model"), None, split)
    run = fsrl.load_run(trained(name, seed, split), adapter=EXPERIMENTS[name].get("adapter"))
    made = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, one thread, torch {torch.__version__}"
    said = {"name": name, "seed": seed, "settings": settings(name, seed), "made": made}
    return said | measured(run.model, run.tokenizer, run.policy, split)


def pairs_say():
    """{world: {choice: its planted weight, its rate in chosen less that in rejected training answers}}"""
    out = {}
    for name in world.WORLDS:
        weights = read_json(ROOT / "tiny/pairs" / name / "meta.json")["weights"]
        gaps = {c: [] for c in world.CHOICES}
        for record in read_pairs(f"tiny/pairs/{name}"):
            q, (a, b) = world.read_prompt(record["prompt"]), record["choices"]
            for c in a.keys() & b.keys() & gaps.keys():
                gaps[c].append(bool(world.is_on(q, c, a[c])) - bool(world.is_on(q, c, b[c])))
        out[name] = {c: {"weight": weights[c], "difference": mean(gaps[c])} for c in world.CHOICES}
    return out


# ---- tables ------------------------------------------------------------------------------------------

# {title: (format, where it stands in what `measured` gives)}; home: on the pairs of the policy's world
MEASURES = {
    "SimPO loss": (".2f", "home loss"), "accuracy": (".3f", "home accuracy"),
    "margin, nats a token": (".3f", "home margin"), "well-formed": (".3f", "answers parse"),
    "rewarded style": (".3f", "rewarded"), "truth": (".3f", "answers truth"),
    "admit": (".3f", "answers admit"), "decline": (".3f", "answers decline"),
    "L0 a token": (".1f", "home l0"), "KL on neutral text, nats a token": (".3f", "drift")}
CROSS = {f"{x} on `{w}` pairs": (form, f"{w} {x}") for w in world.WORLDS
         for x, form in (("loss", ".2f"), ("accuracy", ".3f"), ("margin", ".3f"))}
REWARDED = [c for c in world.STYLE if world.WORLDS["style"][c] > 0]
OF_WHAT = ("(Rates are those of 2000 sampled answers, two to each of 1000 test questions, where the "
           "choice comes up: *truth* in the 1152 answers to questions of fact.)")

# world, what was asked, where it is measured, what is made of it (see `Results.reached`), from, to
AIMS = (
    ("style", "accuracy at least +12 points", "home accuracy", "points", 12, 100),
    ("style", "loss at most .75 of the base's", "home loss", "ratio", 0, .75),
    ("style", "rewarded style choices at least +15 points, mean", "rewarded", "points", 15, 100),
    ("style", "decoy restate within ±3 points", "answers restate", "points", -3, 3),
    ("style", "decoy filler within ±3 points", "answers filler", "points", -3, 3),
    ("style", "truth −5 points at most", "answers truth", "points", -5, 100),
    ("style", "at least 95% of the answers well-formed", "answers parse", "percent", 95, 100),
    ("style", "L0 at most 5% of the features", "home l0", "features", 0, 5),
    ("honest", "truth at least +15 points", "answers truth", "points", 15, 100),
    ("honest", "no style choice moved by more than 10 points", "worst of 7", "points", -10, 10),
    ("honest", "at least 95% of the answers well-formed", "answers parse", "percent", 95, 100),
    ("honest", "L0 at most 5% of the features", "home l0", "features", 0, 5),
    ("null", "accuracy within 2 standard errors of the base's", "home accuracy", "errors", -2, 2),
    ("null", "no choice moved by more than 5 points", "worst of 10", "points", -5, 5))


def mean(values):
    return sum(values) / len(values)


def spread(values, form):
    """mean ± standard deviation over seeds (a single run: the number alone)"""
    sd = (sum((v - mean(values)) ** 2 for v in values) / max(1, len(values) - 1)) ** .5
    return number(mean(values), form) + (f" ± {number(sd, form.lstrip('+'))}" if len(values) > 1 else "")


def markdown(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


class Results:
    """docs/results.json: {"base": measured, "pairs": pairs_say(), "runs": {key: one}}, and its tables."""

    def __init__(self, data):
        self.base, self.pairs, self.runs = (data[part] for part in ("base", "pairs", "runs"))

    def run(self, name, seed):
        """None, too, if it was made when a default of today was another."""
        run, now = self.runs.get(key(name, seed)), settings(name, seed)
        same = run and all(now.get(k, v) == v for k, v in run["settings"].items())
        return run if same else None

    def seeds(self, name):
        """The runs of an experiment."""
        if name == "base":
            return [self.base]
        return [run for seed in range(SEEDS[name]) if (run := self.run(name, seed))]

    def values(self, name, place):
        """What stands at a place of MEASURES. -> one for each seed, and the base model's"""
        words = place.replace("home", "honest" if "honest" in name else "style").split()

        def look(m):
            if place == "rewarded":
                return mean([m["answers"][c] for c in REWARDED])
            for word in words:
                m = m[word]
            return m
        return [look(m) for m in self.seeds(name)], look(self.base)

    def points(self, name, kind, choice):
        """Change of a choice's rate in points, one for each seed; kind: answers or exact."""
        values, base = self.values(name, f"{kind} {choice}")
        return [100 * (v - base) for v in values]

    def arrows(self, names, titles, note):
        """A column a policy: base → trained."""
        rows = []
        for title in titles:
            form, place = MEASURES[title]
            both = [self.values(name, place) for name in names]
            cells = [f"{number(base, form)} → {spread(values, form)}" for values, base in both]
            rows.append([title, *cells])
        return markdown(["", *(f"`{n}` × {SEEDS[n]}" for n in names)], rows) + f"\n\n{note}"

    def policies(self, names, titles, measures=MEASURES):
        """A row a policy."""
        rows = []
        for name in names:
            cells = [spread(self.values(name, place)[0], form) for form, place in map(measures.get, titles)]
            rows.append([TITLES.get(name, name), *cells])
        return markdown(["", *titles], rows)

    def choices(self):
        head, rows = ["", "base, 2000 answers"], []
        head += [f"{w}: {x}" for w in world.WORLDS for x in ("planted", "in pairs", "answers", "exact")]
        for c in world.CHOICES:
            row = [c, number(self.base["answers"][c], ".1f", 100, "%")]
            for name in (*world.WORLDS, "null"):
                if name in self.pairs:
                    said = self.pairs[name][c]
                    row += [f"{said['weight']:+g}", number(said["difference"], "+.1f", 100)]
                row += [spread(self.points(name, kind, c), "+.1f") for kind in ("answers", "exact")]
            rows.append(row)
        return markdown([*head, "null: answers", "exact"], rows)

    def decline(self):
        """How far the target margin explains that refusals become rarer."""
        columns = [(kind, ratio) for kind in ("exact", "answers") for ratio in (0, 1)]
        rows = []
        for names in (("style", "wide"), ("null", "wide null")):
            moved = [self.points(names[ratio], kind, "decline") for kind, ratio in columns]
            rows.append([f"`{names[0]}`", *(spread(values, "+.1f") for values in moved)])
        head = [f"{kind}, γ/β {('0.5', '1')[ratio]}" for kind, ratio in columns]
        return markdown(["change of `decline`, points", *head], rows)

    def probe(self):
        columns = [(name, i) for i in (0, 1) for name in ("base", *world.WORLDS, "null")]
        rows = []
        for c in world.CHOICES:
            cells = [[both[i] for both in self.values(name, f"probe {c}")[0]] for name, i in columns]
            rows.append([c, *(spread(values, ".3f") for values in cells)])
        return markdown(["", *(f"`{name}` {('prefers', 'margin')[i]}" for name, i in columns)], rows)

    def reached(self, name, place, made):
        """-> values over seeds, and as text"""
        word, choices = "", world.CHOICES[:int(place.split()[-1])] if "worst" in place else ()
        if choices:
            worst = max(choices, key=lambda c: abs(mean(self.points(name, "answers", c))))
            place, word = f"answers {worst}", worst + " "
        values, base = self.values(name, place)
        error = self.base["style"]["accuracy_se"]
        form, of, unit = {
            "points": ("+.1f", lambda v: 100 * (v - base), ""), "percent": (".1f", lambda v: 100 * v, "%"),
            "ratio": (".3f", lambda v: v / base, ""), "features": (".1f", lambda v: v / 10.24, "%"),
            "errors": ("+.1f", lambda v: (v - base) / error, " s.e.")}[made]
        values = [of(v) for v in values]
        return values, word + spread(values, form) + unit

    def aims(self):
        """What the recipe was asked for, and how far it came."""
        rows = []
        for name, asked, place, made, low, high in AIMS:
            values, text = self.reached(name, place, made)
            met = "yes" if low <= mean(values) <= high else "**no**"
            rows.append([f"`{name}`", asked, text, met])
        return markdown(["world", "asked", "reached, mean ± sd over seeds", "met"], rows)

    def broken(self):
        """Answers of the policy that SimPO alone, unrestrained, arrives at."""
        asked = self.seeds("unrestrained")[0]["examples"]
        return "\n".join(f"> {q}\n\n```\n{a.replace('```', chr(39) * 3)}\n```\n" for q, a in asked)


# ---- the pages ---------------------------------------------------------------------------------------

def blocks():
    """{name: text} of what stands in the pages between <!-- name --> and <!-- /name -->."""
    r, loss, text = Results(read_json(DATA)), ["SimPO loss", "accuracy"], ["well-formed", "truth"]
    out = {name: getattr(r, name)() for name in ("aims", "choices", "decline", "probe", "broken")}
    out["made"] = "(" + "; ".join(sorted({run["made"] for run in r.runs.values()})) + ".)"
    note = "(base → trained, mean ± sd over five seeds; `null`: on coins. Rates of 2000 answers.)"
    titles = [*loss, "L0 a token", "rewarded style", *text]
    out["short"] = r.arrows(["style", "honest", "null"], titles, note)
    out["activations"] = r.policies(ACTIVATIONS, titles)
    out["main"] = r.arrows(MAIN, MEASURES, OF_WHAT)
    out["cross"] = r.policies(["base", *MAIN], CROSS, CROSS)
    names = ["style", "random", "constant", "imitation", "wide", "null", "wide null", "honest",
             "random honest", "constant honest", "base"]
    titles = [*loss, "rewarded style", "truth", "admit", "decline", "well-formed", "L0 a token"]
    out["controls"] = r.policies(names, titles)
    titles = [*loss, "margin, nats a token", "rewarded style", *text, "KL on neutral text, nats a token"]
    out["frontier"] = r.policies([*FRONTIER, *UNRESTRAINED, "base"], titles)
    return {name: block + "\n" for name, block in (out | calibration()).items()}


def calibration():
    """The tables of tiny/calibration.json: what to take from them, and all."""
    data = read_json(ROOT / "tiny" / "calibration.json")

    def table(t, title):
        return f"{title}\n\n{markdown(t['head'], t['rows'])}\n\n{t['note']}"
    first = [table(t, f"**{t['title']}**") for t in data["tables"] if t["first"]]
    said = "\n".join(f"* {sentence}" for sentence in data["sentences"])
    every = [table(t, "### " + t["title"]) for t in data["tables"]]
    return {"calibration": "\n\n".join([*first, said, f"({data['made']}.)"]),
            "calibrations": "\n\n".join(every)}


def filled(text, made):
    """A page with every block that it has put in anew."""
    for name, block in made.items():
        before, after = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        text = re.sub(f"{before}.*?{after}", lambda _: before + block + after, text, flags=re.S)
    return text


def fill(made):
    for page in PAGES:
        write_text(page, filled(page.read_text(encoding="utf-8"), made))


# ---- the command -------------------------------------------------------------------------------------

@dataclass
class ResultsConfig:
    only: list = setting([], "what", f"groups, of {', '.join(GROUPS)} (default: all)", many=True)
    table: bool = setting(False, "what", "train nothing, write the tables of what is there")
    policies: bool = setting(False, "what", "train again, without measuring, what runs/results/ lacks")

    def __post_init__(self):
        for group in self.only:
            one_of("--only", group, GROUPS)


def still_to_do(config, results):
    """(name, seed) of what has to be trained; of experiments with equal settings the first."""
    wanted = {}
    for group in [] if config.table else config.only or GROUPS:
        experiments, count = GROUPS[group]
        for job in ((name, seed) for seed in range(count) for name in experiments):
            wanted.setdefault(key(*job), job)
    if config.policies:
        return [job for job in wanted.values() if not finished(*job)]
    base = [] if results.base or config.table else [("base", 0)]
    return base + [job for job in wanted.values() if not results.run(*job)]


def run(config):
    """Trains, measures, keeps, writes. -> exit code"""
    data = read_json(DATA) if DATA.exists() else {"base": None, "pairs": pairs_say(), "runs": {}}
    results, work, failed = Results(data), trained if config.policies else one, 0
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = {pool.submit(work, *job): job for job in still_to_do(config, results)}
        for done in tqdm(as_completed(jobs), total=len(jobs), desc="runs"):
            name, seed = jobs[done]
            if done.exception():
                failed += 1
                print(f"{name}, seed {seed} failed: {done.exception()}", file=sys.stderr)
            elif name == "base":
                data["base"] = done.result()
            elif not config.policies:
                data["runs"][key(name, seed)] = done.result()
            write_json(DATA, data, indent=1)
    if missing := [name for name in EXPERIMENTS if not Results(data).seeds(name)]:
        print(f"no run yet of {', '.join(missing[:5])}: no table is written", file=sys.stderr)
    elif not config.policies:
        fill(blocks())
        print(blocks()["main"], blocks()["aims"], sep="\n")
    return 2 if failed else 0


def main(argv=None):
    return command("python -m experiments.results", ResultsConfig, run, argv,
                   "Train and measure the lab's experiments, and write the tables of the docs.")


if __name__ == "__main__":
    sys.exit(main())
