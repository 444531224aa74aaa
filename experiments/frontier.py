"""What does each way of changing the model cost, and what does it buy? One figure.

Preference (margin gained, accuracy) against damage (KL on neutral text, answers that are no longer
well-formed, truth), a curve a policy over its strength, the base model in the corner:

    FSRL            this project's adapter; on two layers; on random directions; on an SAE whose decoder
                    was never trained (2602.14111's control)
    Constant, MeanDifference, ConditionalMap, LoRA, Full           experiments/baselines.py
    TRL             what a user would pick instead: one rate, one seed        experiments/peers.py

Each of ours gets four trials on `dev`, one seed, for its learning rate and its own knob (what is
measured has its strength alone); what wins is trained with three seeds. All is kept as it is done.

    python -m experiments.frontier              # docs/policies.json, a table of docs/lab.md, a figure
    python -m experiments.frontier --table      # from what is there
"""
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fsrl
import simpo
from experiments import lab
from experiments.figures import drawn, panels
from experiments.results import REWARDED, fill, markdown, spread
from experiments.sweep import SAES, saes_in, train_all
from gemma import load_gemma, load_tokenizer
from instruments.health import drift
from lib.blocks import number
from lib.files import ROOT, UserError, read_json, write_json
from lib.judge import judge_of
from lib.pairs import read_pairs
from lib.settings import command, setting
from train import trainable

DATA = ROOT / "docs" / "policies.json"
RUNS = Path("runs/frontier")
OWN = "experiments/baselines.py:"
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
WEAKER = 0.03              # a trial whose answers are less often well-formed by this is not chosen


def sae_of(layer, folder=SAES):
    if found := saes_in(folder / f"layer_{layer}"):
        return found[0]
    raise UserError(f"{folder}: no SAE of layer {layer}; `python -m tiny.make saes` trains them")


def trials(fixed, **choices):
    """Every combination of the choices. -> settings of train.py"""
    fixed = {"eval_split": "dev", "seed": 0, **fixed}
    return [{**fixed, **dict(zip(choices, values))} for values in product(*choices.values())]


def own(name, argument, values, **choices):
    """The same for a class of baselines.py and one of its arguments."""
    out = []
    for value in values:
        how = {"policy": OWN + name, "policy_args": [f"{argument}={value}"] if argument else []}
        out += trials(how, **choices)
    return out


def policies():
    """{name: four trials}"""
    steering = {"lr": (2e-3, 5e-3), "l1": (0.01, 0.03)}
    out = {"FSRL": trials({}, **steering)}
    out["FSRL, two layers"] = trials({"sae": [sae_of(2), sae_of(4)]}, **steering)
    out["FSRL, random directions"] = trials({"sae": lab.random_dictionary()}, **steering)
    out["FSRL, frozen decoder"] = trials({"sae": sae_of(3, SAES.parent / "saes_frozen")}, **steering)
    out["Constant"] = own("Constant", "layer", (2, 3), lr=(2e-3, 1e-2))
    out["LoRA"] = own("LoRA", "rank", (2, 8), lr=(5e-4, 2e-3))
    out["Full"] = own("Full", None, (None,), lr=(1e-4, 2e-4, 5e-4, 1e-3))
    out["MeanDifference"] = own("MeanDifference", "strength", (2, 4, 8, 16))
    out["ConditionalMap"] = own("ConditionalMap", "strength", (1, 2, 4, 8))
    return out


# ---- measuring -------------------------------------------------------------------------------------

def measured(model, tokenizer, policy=None):
    """On `test`: 1000 pairs, an answer to each of 1000 questions at T=1, 64 neutral texts. -> dict"""
    judge = judge_of("tiny/pairs/style", tokenizer)
    pairs, _ = simpo.encode_pairs(tokenizer, read_pairs("tiny/pairs/style", "test", 1000))
    m = simpo.evaluate(model, pairs, policy)
    rates = lab.rates_of_answers(model, tokenizer, policy, judge, 1)
    out = {name: m[name] for name in ("loss", "accuracy", "margin", "l0")}
    out |= {"well-formed": rates["parse"], "truth": rates["truth"]}
    out["rewarded"] = mean(rates[c] for c in REWARDED)
    return out | {"kl": drift(model, tokenizer, policy, judge.neutral(64)) if policy else 0.0}


def cost(model, tokenizer, policy):
    """Trainable numbers, and FLOPs of a step of 32 pairs: forward, backward, the frozen blocks too."""
    pairs, _ = simpo.encode_pairs(tokenizer, read_pairs("tiny/pairs/style", "train", 32))
    parameters = trainable(policy)
    with FlopCounterMode(display=False) as counter:
        s = simpo.score(model, simpo.collate(pairs), policy)
        if parameters:
            (s.chosen.mean - s.rejected.mean).sum().backward()
    return {"trainable": sum(p.numel() for p in parameters), "flops": counter.get_total_flops()}


def curve(folder, spec):
    """A finished policy at every strength. -> {"strength": measured, ..., "cost": cost}"""
    torch.set_num_threads(1)
    run = fsrl.load_run(folder, policy=spec)
    model, tokenizer = run.model, run.tokenizer
    out = {"cost": cost(model, tokenizer, run.policy.train())}
    run.policy.eval()
    parts = getattr(run.policy, "steerings", [run.policy])
    trained = [s.strength for s in parts]
    for strength in STRENGTHS:
        for s, full in zip(parts, trained):
            s.strength = strength * full
        out[str(strength)] = measured(model, tokenizer, run.policy)
    return out


# ---- choosing, training, measuring -------------------------------------------------------------------

def chosen(trials):
    """The index of the trial of largest margin among those whose text stayed whole. trials: [rows]"""
    def worth(i):
        base, trained = trials[i]["base"], trials[i]["trained"]
        whole = trained["parse_sampled"] > base["parse_sampled"] - WEAKER
        return whole, trained["margin"] if whole else trained["parse_sampled"]
    return max(range(len(trials)), key=worth)


def everything(config):
    """Trains and measures what docs/policies.json does not hold yet."""
    every = policies()
    tried = {run_of(name, how): how for name, trials in every.items() for how in trials}
    found = dict(tqdm(train_all(tried, RUNS, 2), total=len(tried), desc="trials"))
    # more seeds of the best; what is measured has none
    jobs, owner = {}, {}
    for name, trials in every.items():
        rows = [found[run_of(name, how)] for how in trials]
        how = trials[chosen(rows)]
        for seed in range(config.seeds) if "lr" in how else [0]:
            run = run_of(name, {**how, "seed": seed})
            jobs[run], owner[run] = {**how, "seed": seed}, name
    found |= dict(tqdm(train_all(jobs, RUNS, 2), total=len(jobs), desc="seeds"))
    # the curves
    data = kept()
    if "base" not in data:
        data["base"] = measured(load_gemma("tiny/model"), load_tokenizer("tiny/model"))
    old = {}
    for policy in data["policies"].values():
        old |= policy["curves"]
    for name, trials in every.items():
        rows = [{**how, **on_dev(found[run_of(name, how)])} for how in trials]
        curves = {run: old[run] for run in jobs if owner[run] == name and run in old}
        data["policies"][name] = {"trials": rows, "curves": curves}
    todo = [run for run in jobs if run not in old]
    with ProcessPoolExecutor(2, max_tasks_per_child=1) as pool:
        done = pool.map(curve, [RUNS / run for run in todo], [jobs[run].get("policy") for run in todo])
        for run, points in tqdm(zip(todo, done), total=len(todo), desc="curves"):
            data["policies"][owner[run]]["curves"][run] = points
            data["made"] = f"{time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}"
            write_json(DATA, data, indent=1)


def run_of(name, how):
    """The name of a run, which says its settings."""
    words = [name]
    for key, value in how.items():
        if key in ("lr", "l1", "policy_args"):
            words.append(f"{key} {value}" if key != "policy_args" else " ".join(value))
    return ", ".join([*filter(None, words), f"seed {how['seed']}"])


def kept():
    return read_json(DATA) if DATA.exists() else {"policies": {}}


def on_dev(rows):
    """What a trial said."""
    return {f"dev {x}": rows["trained"][x] for x in ("loss", "margin", "accuracy", "parse_sampled")}


# ---- table and figure --------------------------------------------------------------------------------

COLUMNS = {"accuracy": ".3f", "margin": ".3f", "loss": ".2f", "rewarded": ".3f", "truth": ".3f",
           "well-formed": ".3f", "kl": ".3f"}


def at(data, name, strength, column):
    """Over seeds. -> list"""
    return [c[str(strength)][column] for c in data["policies"][name]["curves"].values()]


def blocks():
    """The table of docs/lab.md, every policy at strength 1."""
    data, rows = kept(), []
    rows.append(["base", *(number(data["base"][x], form) for x, form in COLUMNS.items()), "", ""])
    for name, policy in data["policies"].items():
        cells = []
        for column, form in COLUMNS.items():
            cells.append(spread(at(data, name, 1.0, column), form))
        first = next(iter(policy["curves"].values()))
        size, flops = first["cost"]["trainable"], first["cost"]["flops"] / 1e9
        rows.append([name, *cells, f"{size:,}", f"{flops:.1f}"])
    head = ["", "accuracy", "margin, nats a token", "SimPO loss", "rewarded style", "truth",
            "well-formed", "KL on neutral text", "trainable", "GFLOP a step"]
    return {"policies": markdown(head, rows) + f"\n\n({data['made']}.)\n"}


def draw(data):
    """Rows: preference; columns: damage; a curve a policy."""
    base = data["base"]
    gained = {"margin gained, nats a token": "margin", "accuracy": "accuracy"}
    damage = {"KL on neutral text": "kl", "well-formed answers": "well-formed", "truth": "truth"}
    figure, axes = panels(3, 12, 7, rows=2, sharey="row")
    for (title, y), row in zip(gained.items(), axes):
        for (words, x), axis in zip(damage.items(), row):
            less = base["margin"] if y == "margin" else 0
            for k, name in enumerate(data["policies"]):
                points = [(base[x], base[y] - less)]
                for strength in STRENGTHS:
                    points.append((mean(at(data, name, strength, x)),
                                   mean(at(data, name, strength, y)) - less))
                style = {"color": f"C{k % 10}", "ls": "-" if k < 10 else "--", "marker": ".", "ms": 4}
                axis.plot(*zip(*points), label=name, **style)
                axis.plot(*points[1 + STRENGTHS.index(1.0)], "o", color=f"C{k % 10}", ms=7)
            axis.plot(base[x], base[y] - less, "k*", ms=12)
            axis.set(xlabel=words, ylabel=title if axis is row[0] else "")
            if x == "kl":
                axis.set_xscale("symlog", linthresh=0.01)
            else:
                axis.invert_xaxis()
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=5)
    return figure


@dataclass
class FrontierConfig:
    table: bool = setting(False, "train nothing: table and figure from what is there", group="what")
    seeds: int = setting(3, "of each policy that is trained", low=1)


def run(config):
    if not config.table:
        everything(config)
    if "base" not in kept():
        raise UserError(f"{DATA} has no policies yet; run this without --table")
    fill(blocks())
    drawn(ROOT / "docs" / "policies.png", draw, kept())
    print(blocks()["policies"])


def main(argv=None):
    return command("python -m experiments.frontier", FrontierConfig, run, argv,
                   "What each way of changing the model costs and buys.")


if __name__ == "__main__":
    sys.exit(main())
