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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from statistics import mean, stdev

from tqdm import tqdm

from experiments import lab
from experiments.lab import COINS, RANDOM
from lib.blocks import number
from lib.files import ROOT, UserError, read_json, short_digest, write_json, write_text
from lib.settings import command, one_of, setting
from tiny import world
from train import TrainConfig

DATA = ROOT / "docs" / "results.json"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# ---- the experiments: {name: settings that differ from train.py's defaults} --------------------------

HONEST = {"pairs": "tiny/pairs/honest"}
MAIN = {"style": {}, "honest": HONEST, "null": {"pairs": COINS}, "paper": {"nll_weight": 0.0}}

FREE = {"adapter": "experiments/controls.py:Constant", "l1": 0.0}
CONTROLS = {
    "constant": FREE,                                   # at the default l1 it never leaves 0
    "constant honest": FREE | HONEST,
    "imitation": {"simpo_weight": 0.0},
    "wide": {"gamma_ratio": 1.0},
    "wide null": {"gamma_ratio": 1.0, "pairs": COINS}}
DICTIONARY = {"random": {"sae": RANDOM}, "random honest": {"sae": RANDOM, **HONEST}}

TERMS = {f"nll_weight {w:g}": {"nll_weight": w} for w in (0.0, 1.0, 5.0, 20.0)}
TERMS["NLL alone"] = {"simpo_weight": 0.0}
RATES = (5e-4, 2e-3, 1e-2)
FRONTIER = {f"{term}, lr {lr:g}": {**how, "lr": lr} for term, how in TERMS.items() for lr in RATES}
FRONTIER["nll_weight 0, lr 0.01, l1 0.001"] = {"nll_weight": 0.0, "lr": 1e-2, "l1": .001}

FINE, COARSE = (.003, .01, .03, .1, .3), (.003, .03, .3)                       # sweeps of l1
FASTER = {"activation": "jumprelu", "init": 1e-4, "threshold_lr": 30.0}
KINDS = {"soft": ({}, FINE), "relu": ({"activation": "relu"}, FINE),
         "jumprelu": ({"activation": "jumprelu"}, COARSE),
         "jumprelu, faster thresholds": (FASTER, COARSE)}
ACTIVATIONS = {f"{kind}, l1 {l1:g}": {**how, "l1": l1}
               for kind, (how, sweep) in KINDS.items() for l1 in sweep}

GROUPS = {"main": (MAIN, 5), "controls": (CONTROLS, 3), "dictionary": (DICTIONARY, 2),
          "frontier": (FRONTIER, 1), "activations": (ACTIVATIONS, 1)}
EXPERIMENTS = {name: how for group, _ in GROUPS.values() for name, how in group.items()}
SEEDS = {name: count for group, count in GROUPS.values() for name in group}

# Settings of train.py that do not decide what comes out: where it runs, what is measured at the end.
WHEREVER = ("run", "runs", "resume", "device", "dtype", "threads", "log_every", "save_every",
            "keep_prefix")
UNDECIDING = (*WHEREVER, "eval_split", "eval_pairs")


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

# {title: (format, where it stands in what `lab.measured` gives)}; home: on the pairs of its own world
MEASURES = {
    "SimPO loss": (".2f", "home loss"),
    "accuracy": (".3f", "home accuracy"),
    "margin, nats a token": (".3f", "home margin"),
    "well-formed": (".3f", "answers parse"),
    "rewarded style": (".3f", "rewarded"),
    "truth": (".3f", "answers truth"),
    "admit": (".3f", "answers admit"),
    "decline": (".3f", "answers decline"),
    "L0 a token": (".1f", "home l0"),
    "KL on neutral text, nats a token": (".3f", "drift")}
REWARDED = [c for c in world.STYLE if world.WORLDS["style"][c] > 0]
TITLES = {
    **{name: f"`{name}`" for name in MAIN},
    "random": "`style`, random dictionary", "random honest": "`honest`, random dictionary",
    "constant": "`style`, one constant vector, l1 0",
    "constant honest": "`honest`, one constant vector, l1 0",
    "imitation": "`style`, NLL alone", "wide": "`style`, γ/β 1", "wide null": "`null`, γ/β 1",
    "base": "base, on `style`", "base honest": "base, on `honest`"}


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
        """What was measured of each run of an experiment."""
        if name.startswith("base"):
            return [self.base]
        return [run for seed in range(SEEDS[name]) if (run := self.run(name, seed))]

    def values(self, name, place):
        """What stands at a place of MEASURES, one for each seed."""
        words = place.replace("home", "honest" if "honest" in name else "style").split()

        def look(m):
            if place == "rewarded":
                return mean(m["answers"][c] for c in REWARDED)
            for word in words:
                m = m[word]
            return m
        return [look(m) for m in self.seeds(name)]

    def points(self, name, kind, choice):
        """Change of a choice's rate in points, one for each seed; kind: answers or exact."""
        base, = self.values("base", f"{kind} {choice}")
        return [100 * (v - base) for v in self.values(name, f"{kind} {choice}")]

    def table(self, names, titles):
        """A row a policy, a column a measure."""
        rows = []
        for name in names:
            places = [MEASURES[title] for title in titles]
            cells = [spread(self.values(name, place), form) for form, place in places]
            rows.append([TITLES.get(name, name), *cells])
        return markdown(["", *titles], rows)

    def choices(self):
        """How far every choice moved, counted in two ways, beside what was planted."""
        parts = ("planted", "in pairs", "answers", "exact")
        worlds = [f"{w}: {part}" for w in world.WORLDS for part in parts]
        rows = []
        for c in world.CHOICES:
            row = [c, number(self.base["answers"][c], ".1f", 100, "%")]
            for name in (*world.WORLDS, "null"):
                if name in self.pairs:
                    said = self.pairs[name][c]
                    row += [number(said["weight"], "+g"), number(said["difference"], "+.1f", 100)]
                row += [spread(self.points(name, kind, c), "+.1f") for kind in ("answers", "exact")]
            rows.append(row)
        return markdown(["", "base, of 2000 answers", *worlds, "null: answers", "exact"], rows)

    def decline(self):
        """How far the target margin explains that refusals become rarer."""
        rows = []
        for names in (("style", "wide"), ("null", "wide null")):
            moved = [self.points(n, kind, "decline") for kind in ("exact", "answers") for n in names]
            rows.append([f"`{names[0]}`", *(spread(values, "+.1f") for values in moved)])
        kinds = ["exact, γ/β 0.5", "exact, γ/β 1", "answers, γ/β 0.5", "answers, γ/β 1"]
        return markdown(["change of `decline`, points", *kinds], rows)


# ---- the pages ---------------------------------------------------------------------------------------

SHORT = ["SimPO loss", "accuracy", "L0 a token", "rewarded style", "truth", "well-formed"]
COST = [*SHORT, "margin, nats a token", "KL on neutral text, nats a token"]
FIRST = ["base", "style", "paper", "null", "base honest", "honest"]
COMPARED = ["base", "style", "random", "constant", "imitation", "wide", "null", "wide null",
            "base honest", "honest", "random honest", "constant honest"]


def blocks():
    """{name: text} of what stands in the pages between <!-- name --> and <!-- /name -->."""
    r, out = Results(read_json(DATA)), calibration()
    out["made"] = "(" + "; ".join(sorted({run["made"] for run in r.runs.values()})) + ".)"
    out["short"] = r.table([name for name in FIRST if name != "paper"], SHORT)
    out["main"] = r.table(FIRST, MEASURES)
    out["choices"] = r.choices()
    out["decline"] = r.decline()
    out["frontier"] = r.table(["base", *FRONTIER], COST)
    out["controls"] = r.table(COMPARED, [*SHORT, "admit", "decline"])
    out["activations"] = r.table(ACTIVATIONS, SHORT)
    return {name: block + "\n" for name, block in out.items()}


def calibration():
    """The tables and sentences of tiny/calibration.json."""
    data, out = read_json(ROOT / "tiny" / "calibration.json"), []
    for t in data["tables"]:
        out += [f"**{t['title']}**", markdown(t["head"], t["rows"]), t["note"]]
    said = "\n".join(f"* {sentence}" for sentence in data["sentences"])
    return {"calibration": "\n\n".join([*out, said, f"({data['made']}.)"])}


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


def folder(name, seed):
    """Of a run in runs/results/."""
    return f"{name} {seed}".replace(" ", "-")


def still_to_do(config, results):
    """(name, seed) of what has to be trained; of experiments with equal settings the first."""
    wanted = {}
    for group in config.only or GROUPS:
        one_of("--only", group, GROUPS)
        experiments, count = GROUPS[group]
        for job in ((name, seed) for seed in range(count) for name in experiments):
            wanted.setdefault(key(*job), job)
    if config.policies:
        return [job for job in wanted.values() if not lab.finished(folder(*job))]
    return [job for job in wanted.values() if not results.run(*job)]


def run(config):
    """Trains, measures, keeps, writes."""
    data = read_json(DATA) if DATA.exists() else lab.nothing_trained()
    results = Results(data)
    jobs = [] if config.table else still_to_do(config, results)
    work = lab.trained if config.policies else lab.one
    with ProcessPoolExecutor(2, max_tasks_per_child=1) as pool:
        done = pool.map(work, [folder(*job) for job in jobs], [settings(*job) for job in jobs])
        for job, result in zip(jobs, tqdm(done, total=len(jobs), desc="runs")):
            if not config.policies:
                data["runs"][key(*job)] = {"name": job[0], **result}
                write_json(DATA, data, indent=1)
    if missing := [name for name in EXPERIMENTS if not results.seeds(name)]:
        raise UserError(f"no run yet of {', '.join(missing[:5])}: no table is written")
    fill(blocks())


def main(argv=None):
    return command("python -m experiments.results", ResultsConfig, run, argv,
                   "Train and measure the lab's experiments, and write the tables of the docs.")


if __name__ == "__main__":
    sys.exit(main())
