"""What the lab proves: trains what docs/results.json does not hold yet, and writes the docs' tables.

    main          the defaults on the lab's two worlds, on coins, and the paper's loss     five seeds
    controls      one vector for every token; imitation alone; a wider target margin       three seeds
    dictionary    the same adapter on a random dictionary                                  two seeds
    frontier      nll_weight x learning rate
    activations   soft, relu, jumprelu x l1

Two trainings at a time, one thread each: about 80 minutes on two cores for all. What is done is written
at once, so this can be stopped at any time; the adapters stay in runs/results/.

    python -m experiments.results --only main     # one group
    python -m experiments.results --table         # no training: the tables of what is there
"""
import json
import re
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from statistics import mean, stdev

from tqdm import tqdm

from experiments.lab import COINS, RANDOM, finished, one, pairs_say, trained
from lib.blocks import number
from lib.files import ROOT, read_json, short_digest, write_json, write_text
from lib.settings import command, one_of, setting
from tiny import world
from train import TrainConfig

DATA = ROOT / "docs" / "results.json"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# ---- the experiments: {name: settings that differ from train.py's defaults} --------------------------

HONEST, CONSTANT = "tiny/pairs/honest", "experiments/controls.py:Constant"
MAIN = {"style": {}, "honest": {"pairs": HONEST}, "null": {"pairs": COINS}, "paper": {"nll_weight": 0.0}}
FREE = {"adapter": CONSTANT, "l1": 0.0}                 # at the default l1 it never leaves 0
CONTROLS = {"constant": FREE, "constant honest": {**FREE, "pairs": HONEST},
            "imitation": {"simpo_weight": 0.0}, "wide": {"gamma_ratio": 1.0},
            "wide null": {"gamma_ratio": 1.0, "pairs": COINS}}
DICTIONARY = {"random": {"sae": RANDOM}, "random honest": {"sae": RANDOM, "pairs": HONEST}}

TERMS = {f"nll_weight {w:g}": {"nll_weight": w} for w in (0.0, 1.0, 5.0, 20.0)}
TERMS["NLL alone"] = {"simpo_weight": 0.0}
RATES = (5e-4, 2e-3, 1e-2)
FRONTIER = {f"{term}, lr {lr:g}": {**how, "lr": lr} for term, how in TERMS.items() for lr in RATES}
UNRESTRAINED = {"unrestrained": {"nll_weight": 0.0, "lr": 1e-2, "l1": .001}}

FINE, COARSE = (.003, .01, .03, .1, .3), (.003, .03, .3)                       # sweeps of l1
FASTER = {"activation": "jumprelu", "init": 1e-4, "threshold_lr": 30.0}
KINDS = {"soft": ({}, FINE), "relu": ({"activation": "relu"}, FINE),
         "jumprelu": ({"activation": "jumprelu"}, COARSE),
         "jumprelu, faster thresholds": (FASTER, COARSE)}
ACTIVATIONS = {f"{kind}, l1 {l1:g}": {**how, "l1": l1} for kind, (how, sweep) in KINDS.items()
               for l1 in sweep}

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
UNDECIDING = ("run", "runs", "device", "dtype", "threads", "log_every", "save_every", "keep_prefix",
              "eval_split", "eval_pairs")


def settings(name, seed):
    """Every setting that decides the outcome of a run."""
    config = asdict(TrainConfig(**EXPERIMENTS[name], seed=seed))
    return {k: v for k, v in config.items() if k not in UNDECIDING}


def key(name, seed):
    """The name of a run in results.json: a digest of the settings that are not the default, so that a
    setting which train.py gets later changes no name. Experiments of equal settings share one run."""
    usual = asdict(TrainConfig())
    changed = {k: v for k, v in settings(name, seed).items() if v != usual[k]}
    return short_digest(json.dumps(changed, sort_keys=True))


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


def spread(values, form):
    """mean ± standard deviation over seeds (a single run: the number alone)"""
    text = number(mean(values), form)
    return text if len(values) < 2 else f"{text} ± {number(stdev(values), form.lstrip('+'))}"


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


class Results:
    """docs/results.json, {"base": measured, "pairs": pairs_say(), "runs": {key: one}}, as tables."""

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

    def policies(self, names, titles, measures=MEASURES, base="base"):
        """A row a policy. base: what the base model is called"""
        rows, called = [], {**TITLES, "base": base}
        for name in names:
            cells = []
            for form, place in (measures[title] for title in titles):
                cells.append(spread(self.values(name, place)[0], form))
            rows.append([called.get(name, name), *cells])
        return markdown(["", *titles], rows)

    def choices(self):
        """How far every choice moved, counted in two ways, beside what was planted."""
        head, rows = ["", "base, of 2000 answers"], []
        head += [f"{w}: {x}" for w in world.WORLDS for x in ("planted", "in pairs", "answers", "exact")]
        for c in world.CHOICES:
            row = [c, number(self.base["answers"][c], ".1f", 100, "%")]
            for name in (*world.WORLDS, "null"):
                if name in self.pairs:
                    said = self.pairs[name][c]
                    row += [number(said["weight"], "+g"), number(said["difference"], "+.1f", 100)]
                row += [spread(self.points(name, kind, c), "+.1f") for kind in ("answers", "exact")]
            rows.append(row)
        return markdown([*head, "null: answers", "exact"], rows)

    def decline(self):
        """How far the target margin explains that refusals become rarer."""
        rows = []
        for names in (("style", "wide"), ("null", "wide null")):
            moved = [self.points(n, kind, "decline") for kind in ("exact", "answers") for n in names]
            rows.append([f"`{names[0]}`", *(spread(values, "+.1f") for values in moved)])
        kinds = ["exact, γ/β 0.5", "exact, γ/β 1", "answers, γ/β 0.5", "answers, γ/β 1"]
        return markdown(["change of `decline`, points", *kinds], rows)

    def probe(self):
        """The pairs that differ in one choice alone."""
        columns = [(name, i) for i in (0, 1) for name in ("base", *world.WORLDS, "null")]
        rows = []
        for c in world.CHOICES:
            cells = [[both[i] for both in self.values(name, f"probe {c}")[0]] for name, i in columns]
            rows.append([c, *(spread(values, ".3f") for values in cells)])
        return markdown(["", *(f"`{name}` {('prefers', 'margin')[i]}" for name, i in columns)], rows)

    def reached(self, name, place, what):
        """What came of an aim. -> values over seeds, and these as text"""
        word = ""
        if place.startswith("worst"):
            among = world.CHOICES[:int(place.split()[-1])]
            word = max(among, key=lambda c: abs(mean(self.points(name, "answers", c)))) + " "
            place = "answers " + word
        values, base = self.values(name, place)
        if what in ("points", "errors"):
            unit, per = ("", .01) if what == "points" else (" s.e.", self.base["style"]["accuracy_se"])
            values = [(v - base) / per for v in values]
            return values, word + spread(values, "+.1f") + unit
        if what == "ratio":
            values = [v / base for v in values]
            return values, spread(values, ".3f")
        values = [100 * v / (1024 if what == "features" else 1) for v in values]
        return values, spread(values, ".1f") + "%"

    def aims(self):
        """What the recipe was asked for, and how far it came."""
        rows = []
        for name, asked, place, what, low, high in AIMS:
            values, text = self.reached(name, place, what)
            met = "yes" if low <= mean(values) <= high else "**no**"
            rows.append([f"`{name}`", asked, text, met])
        return markdown(["world", "asked", "reached, mean ± sd over seeds", "met"], rows)

    def broken(self):
        """Answers of the policy that SimPO alone, unrestrained, arrives at."""
        asked = self.seeds("unrestrained")[0]["examples"]
        return "\n".join(f"> {q}\n\n```\n{a.replace('```', '~~~')}\n```\n" for q, a in asked)


# ---- the pages ---------------------------------------------------------------------------------------

def blocks():
    """{name: text} of what stands in the pages between <!-- name --> and <!-- /name -->."""
    r, loss, text = Results(read_json(DATA)), ["SimPO loss", "accuracy"], ["truth", "well-formed"]
    out = {name: getattr(r, name)() for name in ("aims", "choices", "decline", "probe", "broken")}
    out["made"] = "(" + "; ".join(sorted({run["made"] for run in r.runs.values()})) + ".)"
    note = "(base → trained, mean ± sd over five seeds; `null`: on coins. Rates of 2000 answers.)"
    titles = [*loss, "L0 a token", "rewarded style", *text]
    out["short"] = r.arrows(["style", "honest", "null"], titles, note)
    out["activations"] = r.policies(ACTIVATIONS, titles)
    out["main"] = r.arrows(MAIN, MEASURES, OF_WHAT)
    out["cross"] = r.policies(["base", *MAIN], CROSS, CROSS, "`base`")
    names = ["style", "random", "constant", "imitation", "wide", "null", "wide null", "honest",
             "random honest", "constant honest", "base"]
    titles = [*loss, "rewarded style", "truth", "admit", "decline", "well-formed", "L0 a token"]
    out["controls"] = r.policies(names, titles, base="base, on `style`")
    titles = [*loss, "margin, nats a token", "rewarded style", *text, "KL on neutral text, nats a token"]
    out["frontier"] = r.policies([*FRONTIER, *UNRESTRAINED, "base"], titles)
    return {name: block + "\n" for name, block in (out | calibration()).items()}


def calibration():
    """The tables of tiny/calibration.json: what to take from them, and all."""
    data = read_json(ROOT / "tiny" / "calibration.json")

    def table(t, title):
        return f"{title}\n\n{markdown(t['head'], t['rows'])}\n\n{t['note']}"
    first = [table(t, f"**{t['title']}**") for t in data["tables"] if t.get("first")]
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
    only: list = setting([], f"groups, of {', '.join(GROUPS)} (default: all)", many=True, group="what")
    table: bool = setting(False, "train nothing, write the tables of what is there")
    policies: bool = setting(False, "train again, without measuring, what runs/results/ lacks")

    def __post_init__(self):
        for group in self.only:
            one_of("--only", group, GROUPS)


def folder(name, seed):
    """Of a run in runs/results/."""
    return f"{name} {seed}".replace(" ", "-")


def still_to_do(config, results):
    """(name, seed) of what has to be trained; of experiments with equal settings the first."""
    wanted = {}
    for group in [] if config.table else config.only or GROUPS:
        experiments, count = GROUPS[group]
        for job in ((name, seed) for seed in range(count) for name in experiments):
            wanted.setdefault(key(*job), job)
    if config.policies:
        return [job for job in wanted.values() if not finished(folder(*job))]
    base = [] if results.base or config.table else [("base", 0)]
    return base + [job for job in wanted.values() if not results.run(*job)]


def keep(data, name, seed, result):
    if name == "base":
        data["base"] = result
    else:
        data["runs"][key(name, seed)] = {"name": name, **result}
    write_json(DATA, data, indent=1)


def run(config):
    """Trains, measures, keeps, writes. -> exit code"""
    data = read_json(DATA) if DATA.exists() else {"base": None, "pairs": pairs_say(), "runs": {}}
    jobs, failed, work = {}, 0, trained if config.policies else one
    with ProcessPoolExecutor(2, max_tasks_per_child=1) as pool:
        for name, seed in still_to_do(config, Results(data)):
            how = None if name == "base" else settings(name, seed)
            jobs[pool.submit(work, folder(name, seed), how)] = name, seed
        for done in tqdm(as_completed(jobs), total=len(jobs), desc="runs"):
            name, seed = jobs[done]
            if done.exception():
                failed += 1
                print(f"{name}, seed {seed} failed: {done.exception()}", file=sys.stderr)
            elif not config.policies:
                keep(data, name, seed, done.result())
    if missing := [name for name in EXPERIMENTS if not Results(data).seeds(name)]:
        print(f"no run yet of {', '.join(missing[:5])}: no table is written", file=sys.stderr)
    elif not config.policies:
        made = blocks()
        fill(made)
        print(made["main"], made["aims"], sep="\n")
    return 2 if failed else 0


def main(argv=None):
    return command("python -m experiments.results", ResultsConfig, run, argv,
                   "Train and measure the lab's experiments, and write the tables of the docs.")


if __name__ == "__main__":
    sys.exit(main())
