"""The layer probe where the answer is known: which instruments name the layer that was changed?

LoRA is trained on one block k of the lab's model, for every k, on `style`; once more on coins, where k
is right as the place of the change and no preference may be claimed; and on blocks 1 and 4, on all, and
by steering. Every instrument of instruments/layers.py then names a layer: where it is largest. That
`local` and weight patching name k is algebra; `update` at all tokens recovers exactly 1 at k, but later
blocks, which saw the change, may recover more. All others are on trial.

    python -m experiments.planted             # docs/planted.json and the table of docs/layers.md
    python -m experiments.planted --table     # from what is there
"""
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import fsrl
from experiments import lab
from experiments.results import fill, markdown
from experiments.sweep import train_all
from instruments import layers
from lib.files import ROOT, UserError, read_json, write_json
from lib.runs import finite
from lib.settings import command, setting

DATA, RUNS = ROOT / "docs" / "planted.json", Path("runs/planted")
LORA = "experiments/baselines.py:LoRA"
BLOCKS, PAIRS = 6, 96
ALGEBRA = ("local", "weights of the block")


def plants():
    """{name: (settings of train.py, layers that were changed)}"""
    def lora(blocks, **how):
        arguments = ["rank=4", f"blocks={blocks}"]
        return {"policy": LORA, "policy_args": arguments, "lr": 2e-3, "steps": 400, **how}
    out = {f"block {k}": (lora(k), [k]) for k in range(BLOCKS)}
    coins = lab.coins(0)
    out |= {f"block {k}, coins": (lora(k, pairs=coins), [k]) for k in (1, 4)}
    out["blocks 1 and 4"] = lora("1,4"), [1, 4]
    out["all blocks"] = lora("all"), list(range(BLOCKS))
    out["steering at 3"] = {"steps": 400}, [3]
    return out


def named(x):
    """{instrument: the layer where it is largest}; x: what layers.measure found"""
    out, key = {}, "rho" if "rho" in x["patching"][0] else "nats"

    def largest(rows):
        return int(np.argmax([row[key]["value"] for row in rows]))

    def curve(**wanted):
        return layers.curve(x["patching"], **wanted)
    for place in layers.PLACES:
        words = f"update, {place}" + " tokens" * (place == "all")
        out[words] = largest(curve(site="update", place=place))
        rises = np.diff([0, *(row[key]["value"] for row in curve(site="resid", place=place))])
        out[f"rise of the stream, {place}"] = int(rises.argmax())
    for site in ("attn_out", "mlp_out"):
        out[site] = largest(curve(site=site))
    out["update, necessary"] = largest(curve(site="update", place="all", way="tuned ← base"))
    if x["weights"]:
        out["weights of the block"] = largest(layers.curve(x["weights"], part="block"))
    shifts = x["shifts"]
    for kind, cells in shifts["layers"].items():
        out[kind] = int(np.argmax([abs(cell["value"]) for cell in cells]))
        weights = np.abs(shifts["lasso"][kind]["one_se"]["weights"])
        out[f"LASSO on {kind}"] = int(weights.argmax()) if weights.any() else None
    for name in ("contraction", "transport"):
        change = np.subtract(shifts[name]["tuned"], shifts[name]["base"])
        out[f"SPINAL’s {name}"] = int(np.abs(change).argmax()) + (name == "transport")
    return out


def probed(folder, settings):
    """-> what is kept of a plant"""
    torch.set_num_threads(1)
    run = fsrl.load_run(folder, policy=settings.get("policy"))
    pairs, clusters = layers.held_out(run.config["pairs"], run.tokenizer, PAIRS)
    found = layers.measure(layers.sides_of(run), pairs, clusters, layers.ALL, progress=False)
    return {"gain": found["gain"], "claimed": "rho" in found["patching"][0], "named": named(found)}


def everything():
    data = read_json(DATA) if DATA.exists() else {"plants": {}}
    every = plants()
    jobs = {name: settings for name, (settings, _) in every.items()}
    for _ in tqdm(train_all(jobs, RUNS, 2), total=len(jobs), desc="plants"):
        pass
    todo = [name for name in jobs if name not in data["plants"]]
    with ProcessPoolExecutor(2, max_tasks_per_child=1) as pool:
        done = pool.map(probed, [RUNS / name for name in todo], [jobs[name] for name in todo])
        for name, found in tqdm(zip(todo, done), total=len(todo), desc="probes"):
            data["plants"][name] = {"changed": every[name][1], **found}
            data["made"] = f"{time.strftime('%Y-%m-%d')}, one thread, torch {torch.__version__}"
            write_json(DATA, finite(data), indent=1)


def blocks():
    """The table: what each instrument names; in bold what was changed; hits over the single blocks."""
    data = read_json(DATA)
    found, rows = data["plants"], []
    single = [name for name in found if len(found[name]["changed"]) == 1 and "coins" not in name]
    for instrument in next(iter(found.values()))["named"]:
        cells, hits = [], 0
        for name, plant in found.items():
            said = plant["named"].get(instrument)
            right = said in plant["changed"]
            cells.append("–" if said is None else f"**{said}**" if right else str(said))
            hits += right and name in single
        words = f"({instrument})" if instrument in ALGEBRA else instrument
        rows.append([words, *cells, f"{hits} of {len(single)}"])
    rows.append(["gain told from 0", *("yes" if x["claimed"] else "no" for x in found.values()), ""])
    table = markdown(["named by", *found, "hits"], rows)
    return {"planted": f"{table}\n\n({data['made']}; {PAIRS} pairs, seed 0.)\n"}


@dataclass
class PlantedConfig:
    table: bool = setting(False, "train nothing: the table of what is there", group="what")


def run(config):
    if config.table and not DATA.exists():
        raise UserError(f"{DATA} is not there; run this without --table")
    if not config.table:
        everything()
    fill(blocks())
    print(blocks()["planted"])


def main(argv=None):
    return command("python -m experiments.planted", PlantedConfig, run, argv,
                   "Which instruments name the layer that was changed?")


if __name__ == "__main__":
    sys.exit(main())
