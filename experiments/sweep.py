"""The two stages of the paper's tuning: at which layer, and how sparse?

    python -m tiny.make saes                              # an SAE for every layer of the lab, once
    python -m experiments.sweep                           # layers, then l1 at the best one
    python -m experiments.sweep --over l1=0.01,0.1 --fixed steps=400

Stage 1 trains one adapter at each layer that has an SAE, stage 2 every value of --over at the layer of
lowest loss, the jumprelu adapter beside the usual one. All choices are made on `dev`. What is finished
is kept, so a sweep can be stopped and started again.
"""
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from experiments.figures import drawn, panels
from experiments.lab import quietly
from experiments.results import FASTER, WHEREVER, fill, markdown
from lib.blocks import number
from lib.files import ROOT, UserError, read_json, write_json
from lib.runs import evaluations
from lib.settings import check, command, key_values, setting
from sae import load_sae
from train import TrainConfig

SAES = ROOT / "runs" / "saes"
COLUMNS = {"loss": ".3f", "accuracy": ".3f", "margin": ".3f", "l0": ".1f", "parse_sampled": ".3f"}


def saes_in(folder):
    """Every SAE below a folder of the project, named from its root."""
    return sorted(str(path.parent.relative_to(ROOT)) for path in folder.rglob("params.npz"))


# ---- many trainings --------------------------------------------------------------------------------

def outcome(folder, settings):
    """{"base": row, "trained": row} of a finished run, None of one that is not there or not finished."""
    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json")
    for name, value in asdict(TrainConfig(**settings)).items():
        if name not in WHEREVER and config.get(name) != value:
            raise UserError(f"{folder} is of other settings ({name} is {config.get(name)!r}, now "
                            f"{value!r}); name another folder, or remove it")
    rows = evaluations(folder)
    return rows if "trained" in rows else None


def train_one(folder, settings, threads=0):
    quietly(folder, settings, threads=threads)
    return outcome(folder, settings)


def train_all(jobs, folder, processes):
    """Trains what is not there yet. jobs: {name: settings} -> yields (name, its `outcome`) of all"""
    folder = Path(folder)
    done = {name: outcome(folder / name, settings) for name, settings in jobs.items()}
    yield from ((name, rows) for name, rows in done.items() if rows)
    todo = [name for name, rows in done.items() if not rows]
    if processes == 1:
        yield from ((name, train_one(folder / name, jobs[name])) for name in todo)
        return
    with ProcessPoolExecutor(processes, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(train_one, folder / name, jobs[name], 1): name for name in todo}
        for one in as_completed(waiting):
            yield waiting[one], one.result()


# ---- the sweep -------------------------------------------------------------------------------------

@dataclass
class SweepConfig:
    saes: list = setting([], "an SAE a layer [those in runs/saes]", many=True, group="what")
    over: list = setting(["l1=0.003,0.01,0.03,0.1,0.3"], "settings of train.py, name=value,value "
                         "[l1=0.003,0.01,0.03,0.1,0.3]", many=True)
    fixed: list = setting([], "settings that all runs have, name=value", many=True)
    folder: str = setting("runs/sweep", "where the runs are kept")
    processes: int = setting(2, "trainings at a time, a thread each (1: on a GPU)", low=1)
    docs: bool = setting(False, "into docs/: sweep.json, the figure, and the table in docs/lab.md")
    __post_init__ = check


def known(given, flag):
    """["l1=0.1,1"] -> {"l1": (0.1, 1)}, each a setting of train.py."""
    out = key_values(given, flag)
    if unknown := set(out) - {f.name for f in fields(TrainConfig)}:
        raise UserError(f"{flag}: train.py has no setting {min(unknown)!r}")
    if kept := set(out) & {*WHEREVER, "sae"}:
        raise UserError(f"{flag}: {min(kept)} is the sweep's own to set")
    return out


def sweep(config):
    """-> {"best": name of a run, "stages": {1 or 2: {name: its last row on dev}}}"""
    fixed = {"eval_split": "dev", **known(config.fixed, "--fixed")}
    over = {}
    for name, values in known(config.over, "--over").items():
        for value in values if isinstance(values, tuple) else [values]:
            over[f"{name}_{value}"] = {name: value}
            if name == "l1":
                over[f"jumprelu_{name}_{value}"] = {**FASTER, name: value}
    for how in over.values():
        TrainConfig(**{**fixed, **how})                   # mistakes first
    sources = config.saes or saes_in(SAES)
    if not sources:
        raise UserError("there are no SAEs in runs/saes: `python -m tiny.make saes` trains the lab's, "
                        "--saes names others")
    layers = {}
    for source in sources:
        layer = load_sae(source).layer
        if layers.setdefault(layer, source) != source or layer is None:
            raise UserError(f"{source}: layer {layer} has no SAE, or two; give one a layer")
    # stage 1
    jobs = {f"layer_{layer}": {**fixed, "sae": layers[layer]} for layer in sorted(layers)}
    rows = {1: finished(jobs, config)}
    best = min(rows[1], key=lambda name: rows[1][name]["loss"])
    print(f"stage 2: at {best}, whose loss is lowest")
    # stage 2
    rows[2] = finished({name: {**jobs[best], **how} for name, how in over.items()}, config)
    return {"best": best, "stages": rows}


def finished(jobs, config):
    """The last rows of all jobs, each printed as it is done."""
    rows = {}
    for name, both in train_all(jobs, config.folder, config.processes):
        rows[name] = both["trained"]
        said = [f"{x} {cell(rows[name], x)}" for x in COLUMNS]
        print("  ".join([f"{name:24}", *said]), flush=True)
    return {name: rows[name] for name in jobs}


def cell(row, column):
    error = f" ± {number(row[column + '_se'], COLUMNS[column])}" if column + "_se" in row else ""
    return number(row.get(column), COLUMNS[column]) + error


def table(stages):
    rows = []
    for runs in stages.values():
        rows += [[f"`{name}`", *(cell(row, x) for x in COLUMNS)] for name, row in runs.items()]
    head = ["run", "loss on `dev` (± s.e.)", "accuracy", "margin, nats a token", "L0 a token"]
    return markdown([*head, "well-formed, T=1"], rows)


def draw(stages):
    """Loss against layer, and against L0."""
    figure, (left, right) = panels(2, 9, 3.4)
    one, two = stages.values()
    layers = [int(name.removeprefix("layer_")) for name in one]
    losses, errors = ([row[x] for row in one.values()] for x in ("loss", "loss_se"))
    left.errorbar(layers, losses, errors, fmt="o-", capsize=3)
    left.set(xlabel="layer", ylabel="loss on dev", title="Stage 1: where", xticks=layers)
    for kind in sorted({name.rpartition("_")[0] for name in two}):
        some = sorted((row["l0"], row["loss"]) for name, row in two.items()
                      if name.rpartition("_")[0] == kind)
        right.plot(*zip(*some), "o-", label=kind.replace("_", ", "))
    right.set(xlabel="L0, features a token", xscale="log", title="Stage 2: how sparse")
    right.legend()
    return figure


def run(config):
    found = sweep(config)
    print(table(found["stages"]))
    folder = ROOT / "docs" if config.docs else Path(config.folder)
    write_json(folder / "sweep.json", found, indent=1)
    drawn(folder / "sweep.png", draw, found["stages"])
    if config.docs:
        fill({"sweep": f"{table(found['stages'])}\n"})


def main(argv=None):
    return command("python -m experiments.sweep", SweepConfig, run, argv, "Layer, then sparsity.")


if __name__ == "__main__":
    sys.exit(main())
