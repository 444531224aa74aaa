"""In which layers does a preference change live? A base model beside a tuned one, layer by layer.

After "Alignment is Localized" (arXiv 2510.16167), which has no public code; every definition is here.
The gain of a pair is its margin under the tuned model less that under the base model. A *patch* puts
what one model (the donor) holds at a site into the other (the receiver) while that runs:

    update     what a block adds: its output less its input (the steering after it included)
    resid      the residual stream after a block
    attn_out, mlp_out       what attention and the MLP add, AFTER their post-norms

at all tokens, those of the prompt, its last, or those of the answers. Base ← tuned asks what suffices
for the gain, tuned ← base what is necessary. The effect is ρ = Σ δ g / Σ g² over pairs: by least
squares, which share of the gain g the change δ of the margin recovers. Beside it stand a random
direction of the same length at each token, and what the donor's change was in another pair.

    python -m instruments.layers RUN                        # a run beside its base model
    python -m instruments.layers --base FOLDER --tuned FOLDER --pairs SOURCE     # two Gemma-2 models

*Weight patching* puts the weights of one block, its attention or its MLP into the other model.
instruments/shifts.py asks how far the states moved, and in how many directions.
"""
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

import fsrl
import simpo
from gemma import Gemma, load_gemma, load_tokenizer, shared_positions
from instruments import shifts
from lib.blocks import Table, Text, as_text, interval, percent
from lib.files import UserError
from lib.judge import judge_of
from lib.pairs import read_held_out
from lib.sections import MACHINE, save
from lib.settings import check, choose_device, command, setting
from lib.stats import FEWEST, leaves_out_zero, number_equal, ratio

TITLE = "Where the change lives"
QUESTION = ("In which layers does the change sit that training made? The controls are a random "
            "direction of the same length, and the change that another pair's states went through.")
SITES, PLACES = ("update", "resid", "attn_out", "mlp_out"), ("all", "prompt", "last prompt", "answer")
WAYS = {"base ← tuned": (0, 1), "tuned ← base": (1, 0)}                     # receiver, donor
PARTS = {
    "attention": ("input_layernorm", "self_attn", "post_attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")}
PARTS["block"] = PARTS["attention"] + PARTS["mlp"]


# ---- a forward pass that can be looked into ----------------------------------------------------------

@dataclass
class Side:
    """A model as it acts: with its edits."""
    model: Gemma
    edits: dict = None

    def how(self, batch):
        """What Gemma.blocks wants to know besides the stream."""
        where = batch.where(shared_positions(self.edits))
        return {"position_ids": batch.position_ids, "mask": batch.mask(), "where": where,
                "edits": self.edits}

    def update(self, h, layer, how):
        """What a block adds to the stream h, its edit included."""
        return self.model.blocks(h, layer, layer + 1, **how) - h

    def forward(self, batch, visit, start=0, h=None):
        """All blocks from `start` on, whose input is h. -> the stream after the last (B,T,D)

        visit(site, layer, x) -> x is shown what each site holds, and may give back something else.
        """
        model, hooks = self.model, []
        for i, block in enumerate(model.layers):
            for site, norm in (("attn_out", block.post_attention_layernorm),
                               ("mlp_out", block.post_feedforward_layernorm)):
                def hook(module, args, out, site=site, i=i):
                    return visit(site, i, out)
                hooks.append(norm.register_forward_hook(hook))
        how = self.how(batch)
        try:
            h = model.embed(batch.ids) if h is None else h
            for i in range(start, len(model.layers)):
                h = visit("resid", i, h + visit("update", i, self.update(h, i, how)))
        finally:
            for hook in hooks:
                hook.remove()
        return h

    def record(self, batch):
        """-> {(site, layer): x (B,T,D)}"""
        found = {}

        def keep(site, layer, x):
            found[site, layer] = x
            return x
        self.forward(batch, keep)
        return found

    def margins(self, batch, h):
        """(B,) float64, from the stream after the last block."""
        chosen, rejected = simpo.mean_logps(self.model, batch, h)
        return (chosen - rejected).double().cpu()


def at_place(batch, place):
    """(B,T) bool, of PLACES."""
    if place == "all":
        return batch.branch >= 0
    if place == "answer":
        return batch.branch > 0
    prompt = batch.branch == 0
    last = prompt & (batch.position_ids == prompt.sum(1, keepdim=True) - 1)
    return last if place == "last prompt" else prompt


# ---- patches -----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Patch:
    way: str = "base ← tuned"
    site: str = "update"
    place: str = "all"
    layers: tuple = (0,)
    strength: float = 1.0                  # of the way from the receiver's own to the donor's
    control: str = ""                      # or random, or other pair


def patched(receiver, own, donor, batch, patch, partner):
    """The receiver's margins (B,) with the donor's states. own, donor: what both recorded

    partner: see `another_pair`
    """
    where = at_place(batch, patch.place)[..., None]

    def visit(site, layer, x):
        if site != patch.site or layer not in patch.layers:
            return x
        value, change = donor[site, layer], donor[site, layer] - own[site, layer]
        if patch.control == "random":
            g = torch.Generator().manual_seed(layer)
            direction = normalize(torch.randn(x.shape, generator=g), dim=-1).to(x)
            value = x + direction * change.norm(dim=-1, keepdim=True)
        elif patch.control:
            value = x + shifted(change, *partner)
        return torch.where(where, x.lerp(value, patch.strength), x)
    first = min(patch.layers)
    return receiver.margins(batch, receiver.forward(batch, visit, first, below(own, first)))


def below(record, layer):
    """The recorded input of a block, where nothing has changed yet; None: the embedding."""
    return record["resid", layer - 1] if layer else None


def another_pair(batch):
    """For each token the one of the next pair at the same place: same branch, same distance from the
    answer's start. -> index (B,T) of it, whether there is one (B,T)"""
    prompt = (batch.branch == 0).sum(1, keepdim=True)
    key = (batch.branch + 1) * 100_000 + batch.position_ids - prompt           # equal for such tokens
    same = key[:, :, None] == key.roll(-1, 0)[:, None, :]                      # (B,T,T)
    there = same.any(-1) & (batch.branch >= 0)
    return same.float().argmax(-1), there


def shifted(change, index, there):
    """The next pair's change (B,T,D), at the tokens that correspond."""
    moved = change.roll(-1, 0).gather(1, index[..., None].expand_as(change))
    return moved * there[..., None]


def patches(count):
    """What is asked of a model of so many layers."""
    thirds = [tuple(part.tolist()) for part in np.array_split(np.arange(count), min(3, count))]
    out = []
    for way in WAYS:
        for site in SITES:
            for place in PLACES if site in SITES[:2] else PLACES[:1]:
                out += [Patch(way, site, place, (i,)) for i in range(count)]
        out += [Patch(way, layers=part) for part in (*thirds, tuple(range(count)))]
    for i in range(count):
        out += [Patch(layers=(i,), control=control) for control in ("random", "other pair")]
        out += [Patch(layers=(i,), strength=strength) for strength in (.25, .5, .75)]
    return out


@torch.no_grad()
def activation_patching(sides, batches, pairs, wanted, progress=True):
    """-> {patch: (P,) changes of the receiver's margin, towards the donor's}, margins (2,P), coverage of
    the other pair's tokens"""
    margins = np.zeros((2, pairs))
    moved = {patch: np.zeros(pairs) for patch in wanted}
    covered = []
    total = len(batches) * len(wanted)
    with tqdm(total=total, desc="patching", disable=not progress, mininterval=1) as bar:
        for index, batch in batches:
            records = [side.record(batch) for side in sides]
            last = ("resid", len(sides[0].model.layers) - 1)
            for side, record, row in zip(sides, records, margins):
                row[index] = side.margins(batch, record[last])
            partner = another_pair(batch)
            covered.append((partner[1].sum() / (batch.branch >= 0).sum()).item())
            for patch in wanted:
                to, of = WAYS[patch.way]
                m = patched(sides[to], records[to], records[of], batch, patch, partner)
                moved[patch][index] = (m.numpy() - margins[to][index]) * (1 if of else -1)
                bar.update()
    return moved, margins, float(np.mean(covered))


# ---- weights -----------------------------------------------------------------------------------------

def hybrid(model, other, layer, part):
    """`model` with one block's weights (PARTS) of `other`; all weights are shared, none copied."""
    out = deepcopy(model, {id(p): p for p in model.parameters()})
    for name in PARTS[part]:
        setattr(out.layers[layer], name, getattr(other.layers[layer], name))
    return out


@torch.no_grad()
def weight_patching(sides, batches, margins):
    """-> {(way, part, layer): (P,)}, as of activations; {}: the policy changes no weights"""
    models = [side.model for side in sides]
    if models[0] is models[1]:
        return {}
    mixed = {}
    for way, (to, of) in WAYS.items():
        for part in PARTS:
            for layer in range(len(models[0].layers)):
                model = hybrid(models[to], models[of], layer, part)
                mixed[way, part, layer] = Side(model, sides[to].edits)
    out = {key: np.zeros(margins.shape[1]) for key in mixed}
    for index, batch in batches:
        records = [side.record(batch) for side in sides]
        for key, side in mixed.items():
            (to, of), layer = WAYS[key[0]], key[-1]
            h = side.forward(batch, lambda site, i, x: x, layer, below(records[to], layer))
            found = side.margins(batch, h).numpy()
            out[key][index] = (found - margins[to][index]) * (1 if of else -1)
    return out


# ---- measured, described -----------------------------------------------------------------------------

def effect(change, gain, clusters, sure):
    """-> rho, ratio of means (where the gain can be told from 0), nats, as intervals"""
    out = {"nats": ratio(change, clusters=clusters)}
    if sure:
        out["rho"] = ratio(change * gain, gain * gain, clusters)
        out["ratio"] = ratio(change, gain, clusters)
    return out


def measure(sides, pairs, clusters, only, progress=True):
    """-> the section's numbers. only: parts of ("patching", "weights", "shifts")"""
    device = sides[0].model.device
    batches = [(index, batch.to(device)) for index, batch in simpo.batches(pairs, 32)]
    count = len(sides[0].model.layers)
    wanted = patches(count) if "patching" in only else []
    moved, margins, covered = activation_patching(sides, batches, len(pairs), wanted, progress)
    gain = margins[1] - margins[0]
    mean = ratio(gain, clusters=clusters)
    sure = leaves_out_zero(mean)
    out = {"pairs": len(pairs), "layers": count, "gain": mean, "coverage": covered, "patching": []}
    out["accuracy"] = [float((m > 0).mean()) for m in margins]
    for patch, change in moved.items():
        found = effect(change, gain, clusters, sure)
        out["patching"].append({**vars(patch), "layers": list(patch.layers), **found})
    if "weights" in only:
        out["weights"] = []
        for (way, part, layer), change in weight_patching(sides, batches, margins).items():
            row = {"way": way, "part": part, "layers": [layer]}
            out["weights"].append(row | effect(change, gain, clusters, sure))
    if "shifts" in only:
        out["shifts"] = shifts.measure(sides, batches, gain, clusters)
    return out


def curve(rows, **wanted):
    """The rows of single layers with these values."""
    usual = {"way": "base ← tuned", "strength": 1.0, "control": ""} | wanted
    found = [row for row in rows if all(row.get(k, v) == v for k, v in usual.items())]
    return [row for row in found if len(row["layers"]) == 1]


def describe(x, about):
    key = "rho" if any("rho" in row for row in x["patching"]) else "nats"
    show = percent if key == "rho" else interval
    blocks, asked = [], {
        "update, all tokens": {"site": "update", "place": "all"},
        "– a random direction": {"site": "update", "place": "all", "control": "random"},
        "– another pair’s": {"site": "update", "place": "all", "control": "other pair"},
        "update, all, necessary": {"site": "update", "place": "all", "way": "tuned ← base"},
        "update, prompt": {"site": "update", "place": "prompt"},
        "update, answer": {"site": "update", "place": "answer"},
        "stream, all": {"site": "resid", "place": "all"},
        "stream, last prompt token": {"site": "resid", "place": "last prompt"}}
    head = ["patched", *(f"layer {i}" for i in range(x["layers"]))]
    rows = []
    for words, wanted in asked.items():
        cells = [show(row[key]).split(" [")[0] for row in curve(x["patching"], **wanted)]
        rows += [[words, *cells]] if cells else []
    for part in PARTS if x.get("weights") else ():
        cells = [show(row[key]).split(" [")[0] for row in curve(x["weights"], part=part)]
        rows.append([f"weights of the {part}", *cells])
    note = (f"Share of the gain, ρ; base ← tuned unless it says necessary. {x['pairs']} pairs; another "
            f"pair’s tokens correspond for {percent(x['coverage'])}. Intervals: analysis/layers.json.")
    said = f"The gain is {interval(x['gain'], '+.3f')} nats a token."
    if key == "nats":
        said += " It cannot be told from 0: no shares of it, changes in nats a token."
    blocks += [Text(said), Table(head, rows, note, brief=True)]
    if "weights" in x and not x["weights"]:
        blocks.append(Text("This policy changes no weights, so there are none to patch.", "note"))
    return blocks + (shifts.describe(x["shifts"]) if "shifts" in x else [])


# ---- the command -------------------------------------------------------------------------------------

ALL = ("patching", "weights", "shifts")


@dataclass
class Options:
    run: str = setting(None, "a finished run's folder", positional=True, group="two models")
    adapter: str = setting(None, "FILE.py:Class of a run that was trained with one")
    policy: str = setting(None, "FILE.py:Class of a run that was trained with one")
    base: str = setting(None, "without a run: a Gemma-2")
    tuned: str = setting(None, "and another of the same shape and tokenizer")
    pairs: str = setting(None, "preference pairs [the run's]")
    only: str = setting(",".join(ALL), "parts, with commas", group="what")
    limit: int = setting(200, "held-out pairs", low=2)
    out: str = setting("runs/layers.json", "without a run: the file of the result")
    device: str = setting("auto", "cpu, cuda, mps, or auto: the best there is")
    quiet: bool = setting(False, "no progress bars")

    def __post_init__(self):
        check(self)
        if bool(self.run) == bool(self.base and self.tuned):
            raise UserError("name a run, or --base, --tuned and --pairs")
        if not self.run and not self.pairs:
            raise UserError("--pairs: without a run, say on which pairs")
        if unknown := set(self.only.split(",")) - set(ALL):
            raise UserError(f"--only: {min(unknown)!r} is none of {', '.join(ALL)}")


def sides_of(run):
    """A run's base model and its policy."""
    return [Side(run.model), Side(*run.policy.acting(run.model))]


def held_out(source, tokenizer, limit):
    """-> held-out pairs, and numbers (P,) that are equal for those that belong together"""
    pairs, _ = simpo.encode_pairs(tokenizer, read_held_out(source, "test", limit))
    judge = judge_of(source, tokenizer)
    clusters = number_equal([judge.cluster(pair) for pair in pairs])
    if len(set(clusters)) < FEWEST:
        raise UserError(f"{source}: {len(set(clusters))} questions are too few; at least {FEWEST}")
    return pairs, clusters


def opened(o):
    """-> the two Sides, tokenizer, source of the pairs"""
    if o.run:
        run = fsrl.load_run(o.run, adapter=o.adapter, policy=o.policy, device=o.device)
        return sides_of(run), run.tokenizer, o.pairs or run.config["pairs"]
    device, dtype = choose_device(o.device, "float32")
    models = [load_gemma(source, dtype=dtype, device=device) for source in (o.base, o.tuned)]
    words = [load_tokenizer(source) for source in (o.base, o.tuned)]
    if vars(models[0].config) != vars(models[1].config):
        raise UserError(f"{o.base} and {o.tuned} are of different shape: nothing can be exchanged")
    if words[0].get_vocab() != words[1].get_vocab():
        raise UserError(f"{o.base} and {o.tuned} have different tokenizers: their tokens differ")
    return [Side(model) for model in models], words[0], o.pairs


def run(o):
    started = time.time()
    sides, tokenizer, source = opened(o)
    pairs, clusters = held_out(source, tokenizer, o.limit)
    result = measure(sides, pairs, clusters, o.only.split(","), not o.quiet)
    print(as_text(describe(result, None)))
    path = Path(o.run) / "analysis" / "layers.json" if o.run else Path(o.out)
    made = {"section": "layers", "seconds": round(time.time() - started, 1), "machine": MACHINE}
    save(path, {**made, "date": time.strftime("%Y-%m-%d"), "result": result})
    print(f"Kept in {path}" + "; analyze.py shows it in the report." * bool(o.run))


def main(argv=None):
    return command("python -m instruments.layers", Options, run, argv, "Where does the change live?")


if __name__ == "__main__":
    sys.exit(main())
