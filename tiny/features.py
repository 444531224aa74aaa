"""What the lab's SAE features read and write, where the grammar says what a token is about. Called by `python analyze.py --make-labels lab`.

    reads    on which tokens does it fire? Its activation on the `label` split's answers, split among the choices that the token settles
    writes   what does it change? The base model's log-odds of each choice at its deciding positions, with the state moved by a fixed
             length along the feature's direction, up and down

A feature has a label if half of its mass lies there: a choice, or a group (style, alignment). For `writes`, mass is what
exceeds chance: effects are divided by the standard deviation of those of random directions of the same length, and the first
two standard deviations of each count as nothing. Among ten choices, one is beyond two by chance for every third direction; so a feature
needs a total excess that only 1 of 100 random directions has, too. How many of 256 OTHER random directions would get a label is printed.
"""
import sys
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import simpo  # noqa: E402
from gemma import UserError, encode_text  # noqa: E402
from tiny import measure, world  # noqa: E402

PUSH = 0.25              # length of the move, as a share of the median state's
EACH = 24                # deciding positions of each choice
CHANCE = 256             # random directions that say what chance is; as many again that try the rule
GROUPS = {"style": world.STYLE, "alignment": world.ALIGNMENT}


def label_pairs(tokenizer):
    """Pairs of the split that exists for labels: its topics are in no other."""
    return simpo.encode_pairs(tokenizer, simpo.read_pairs(HERE / "pairs" / "style", "label"))[0]


@torch.no_grad()
def reads(model, sae, tokenizer, pairs, progress=False):
    """Activation of each feature by the choice that its token settles; several share equally. -> (F, 11): world.CHOICES, and other tokens"""
    names = {name: i for i, name in enumerate(world.CHOICES)}
    mass = torch.zeros(sae.d_sae, len(names) + 1, dtype=torch.float64)
    for index, batch in tqdm(list(simpo.batches(pairs, 64)), desc="reads", disable=not progress):
        f = sae.encode(simpo.prefix(model, batch, sae.layer)).double()
        about = torch.zeros(*batch.ids.shape, mass.shape[1], dtype=torch.float64)
        about[batch.branch > 0, -1] = 1.0
        for b, i in enumerate(index):
            pair, start = pairs[i], len(pairs[i].prompt)
            for answer in (pair.chosen, pair.rejected):
                q = world.read_prompt(pair.text)
                for t, settled in enumerate(measure.decisions(tokenizer, q, answer)):
                    here = [names[name] for name, *_ in settled if name in names]
                    if here:
                        about[b, start + t, -1] = 0.0
                        about[b, start + t, here] = 1 / len(here)
                start += len(answer)
        mass += f.flatten(0, 1).T @ about.flatten(0, 1)
    return mass


def deciding(tokenizer, pairs, each):
    """Positions at which choices are decided: {choice: [(ids before, ids off the mass, ids that mean yes)]}, `each` of them, no topic twice
    for a choice where there are enough."""
    out, seen = {name: [] for name in world.CHOICES}, set()
    for fresh in (True, False):
        for pair in pairs:
            q = world.read_prompt(pair.text)
            for answer in (pair.chosen, pair.rejected):
                for t, settled in enumerate(measure.decisions(tokenizer, q, answer)):
                    gone = []
                    for name, starts, yes, _ in settled:
                        place = (name, q.subject, q.relation) if fresh else (name, pair.prompt, answer)
                        if name in out and len(out[name]) < each and place not in seen:
                            seen |= {place, (name, pair.prompt, answer)}
                            out[name].append((list(pair.prompt + answer[:t]), list(gone), yes))
                        gone += starts
        if all(len(places) == each for places in out.values()):
            break
    return out


@torch.no_grad()
def log_odds(model, layer, ids, gone, yes, moves, chunk=512):
    """log-odds of a choice at the end of `ids`, with the last state at the output of `layer` moved by each of moves (M,D). -> (M,) float64

    One row does it: the context, and then a copy of its last token for each move, at the same position, which sees the context and
    itself. So all moves of a chunk cost one pass, as the two answers of a pair do in simpo.py.
    """
    h = model.blocks(model.embed(torch.tensor([ids])), 0, layer + 1)
    n, out = len(ids) - 1, []
    for part in moves.split(chunk):
        M = len(part)
        row = torch.cat([h[:, :n], h[:, n:] + part[None]], 1)
        position = torch.cat([torch.arange(n), torch.full((M,), n)])[None]
        mask = torch.ones(n + M, n + M, dtype=torch.bool).tril()
        mask[n:, n:] = torch.eye(M, dtype=torch.bool)
        z = model.logits(model.norm(model.blocks(row, layer + 1, model.config.num_hidden_layers, positions=position, mask=mask[None])[0, n:])).double()
        no = torch.ones(z.shape[1], dtype=torch.bool)
        no[gone + yes] = False
        out.append(z[:, yes].logsumexp(-1) - z[:, no].logsumexp(-1))
    return torch.cat(out)


def writes(model, sae, tokenizer, pairs, progress=False, each=EACH):
    """-> effect (F, 10) of moving the state by `push_of` along each feature: half of log-odds(up) - log-odds(down), in nats, mean over deciding
    positions; and the same of 2 * CHANCE random directions"""
    places, push = deciding(tokenizer, pairs, each), push_of(model, sae, pairs)
    # Not seed 0: the lab's SAE began as that draw, and its directions are still like it.
    random = torch.randn(2 * CHANCE, sae.d_in, generator=torch.Generator().manual_seed(2027))
    unit = torch.nn.functional.normalize(torch.cat([sae.W_dec.float(), random]), dim=-1) * push
    effect = torch.zeros(len(unit), len(world.CHOICES), dtype=torch.float64)
    with tqdm(total=sum(map(len, places.values())), desc="writes", disable=not progress) as bar:
        for k, name in enumerate(world.CHOICES):
            for ids, gone, yes in places[name]:
                odds = log_odds(model, sae.layer, ids, gone, yes, torch.cat([unit, -unit]))
                effect[:, k] += (odds[:len(unit)] - odds[len(unit):]) / 2 / len(places[name])
                bar.update()
    return effect[:sae.d_sae], effect[sae.d_sae:]


def push_of(model, sae, pairs):
    """The length of the move, in units of the state: PUSH of the median state's at answer tokens."""
    states = torch.cat([simpo.prefix(model, batch, sae.layer)[batch.branch > 0] for _, batch in simpo.batches(pairs[:64], 64)])
    return PUSH * states.norm(dim=-1).median().item()


def excess(effect, chance):
    """Effects (n,10) -> mass (n,11) beyond two standard deviations of `chance` (m,10), other last: all of it for a total that 1 of 100 of chance has"""
    over = lambda x: ((x / chance.std(0)).abs() - 2).clamp_min(0)      # noqa: E731
    mass, bar = over(effect), over(chance).sum(1).quantile(.99)
    mass[mass.sum(1) <= bar] = 0
    return torch.cat([mass, mass.new_zeros(len(mass), 1)], 1)


def labelled(mass):
    """mass (11,) of choices and other -> (group labels, choices) that hold half of it or more"""
    total = float(mass.sum())
    if not total > 0:
        return [], []
    share = dict(zip(world.CHOICES, (mass / total).tolist()))
    groups = [g for g, some in GROUPS.items() if sum(share[c] for c in some) >= .5]
    return groups, [c for c in world.CHOICES if share[c] >= .5]


def lab_labels(model, tokenizer, sae, progress=False):
    """-> (rows by what features write, rows by what they read), for labels.write_labels"""
    if tokenizer.token_to_id("▁Kalor") is None and len(encode_text(tokenizer, " ".join(world.PEOPLE[:20]))) > 40:
        raise UserError("--make-labels lab needs the lab's own model (tiny/model), whose words it knows")
    pairs = label_pairs(tokenizer)
    read = reads(model, sae, tokenizer, pairs, progress)
    effect, random = writes(model, sae, tokenizer, pairs, progress)
    mass, tried = excess(effect, random[:CHANCE]), excess(random[CHANCE:], random[:CHANCE])
    chance = random[:CHANCE].std(0)
    if progress:
        print(f"labels by chance: {sum(bool(labelled(x)[0]) for x in tried)} of {CHANCE} random directions would get one by what they write")
    write_rows, read_rows = [], []
    for i in range(sae.d_sae):
        groups, choices = labelled(mass[i])
        order = effect[i].div(chance).abs().argsort(descending=True)[:2].tolist()
        write_rows.append({"index": i, "labels": groups, "choices": choices, "writes": {c: round(float(x), 4) for c, x in zip(world.CHOICES, effect[i])},
                           "description": "writes " + ", ".join(f"{'+' if effect[i, k] > 0 else '−'}{world.CHOICES[k]} ({effect[i, k]:+.2f} nats, {effect[i, k] / chance[k]:+.1f} sd of chance)" for k in order)})
        groups, choices = labelled(read[i])
        total = float(read[i].sum())
        order = read[i].argsort(descending=True)[:2].tolist()
        names = [*world.CHOICES, "no choice"]
        read_rows.append({"index": i, "labels": groups if total > 0 else None, "choices": choices,
                          "description": "reads " + ", ".join(f"{names[k]} {read[i, k] / total:.0%}" for k in order) if total > 0 else "never fires"})
    return write_rows, read_rows
