"""What the lab's SAE features read and write, where the grammar says what each token is about.

    reads    on which tokens does a feature fire? Its activation on answers of the `label` split, shared
             among the choices that the token settles
    writes   what does it change? The base model's log-odds of each choice where it is decided, with the
             state moved by a fixed length along the feature's direction, up and down

A feature has a label if half of its mass lies with a choice, or with a group (style, alignment). For
`writes`, mass is what exceeds two standard deviations of the effects of random directions of the same
length. Among ten choices every third direction does so by chance; so a feature also needs a total excess
that only 1 in 100 has.
"""
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

import simpo
from lib.files import UserError
from lib.pairs import read_pairs
from tiny import world
from tiny.judge import HERE, Lab, decisions

PUSH = 0.25              # length of the move, as a share of the median state's
EACH = 24                # deciding positions of each choice
CHANCE = 256             # random directions that say what chance is
NAMES = (*world.CHOICES, "no choice")


def label_pairs(tokenizer):
    """Pairs of the split that exists for labels: its topics are in no other."""
    return simpo.encode_pairs(tokenizer, read_pairs(HERE / "pairs" / "style", "label"))[0]


def answers(tokenizer, pairs):
    """-> (question, ids of the prompt, ids of an answer, what each of its tokens settles)"""
    for pair in pairs:
        q = world.read_prompt(pair.text)
        for answer in (pair.chosen, pair.rejected):
            yield q, pair.prompt, answer, decisions(tokenizer, q, answer)


@torch.no_grad()
def reads(model, sae, tokenizer, pairs):
    """Activation of each feature by the choices that its token settles, which share it equally.

    -> (F, 11) float64: of NAMES
    """
    mass = torch.zeros(sae.d_sae, len(NAMES), dtype=torch.float64)
    for _, prompt, answer, settled in answers(tokenizer, pairs):
        h = model.embed(torch.tensor([prompt + answer]))
        x = model.blocks(h, 0, sae.layer + 1)[0, len(prompt):]
        f = sae.encode(x).double()      # (T,F)
        for token, choices in enumerate(settled):
            columns = [NAMES.index(name) for name, *_ in choices if name in NAMES] or [-1]
            mass[:, columns] += f[token, :, None] / len(columns)
    return mass


# ---- writes ------------------------------------------------------------------------------------------

def deciding(tokenizer, pairs, each):
    """Where choices are decided, `each` times, on different topics where there are enough.
    -> {choice: [(ids before, ids off the mass, ids that mean yes)]}"""
    first = {name: [] for name in world.CHOICES}
    more = {name: [] for name in world.CHOICES}
    seen = set()
    for q, prompt, answer, settled in answers(tokenizer, pairs):
        for token, choices in enumerate(settled):
            off = []
            for name, starts, yes, _ in choices:
                topic = name, q.subject, q.relation
                if name in first:
                    places = more if topic in seen else first
                    places[name].append((list(prompt + answer[:token]), list(off), yes))
                seen.add(topic)
                off += starts
    return {name: (first[name] + more[name])[:each] for name in first}


@torch.no_grad()
def log_odds(model, layer, ids, off, yes, moves):
    """Log-odds of a choice after `ids`, with each of moves (M,D) added to the last state of `layer`.
    One row does it: the context, then a copy of its last token for each move, at the same position,
    which sees the context and itself. So all moves cost one pass.  -> (M,) float64
    """
    h = model.blocks(model.embed(torch.tensor([ids])), 0, layer + 1)[0]      # (T,D)
    n = len(ids) - 1
    M = len(moves)
    mask = torch.ones(n + M, n + M, dtype=torch.bool).tril()
    mask[n:, n:] = torch.eye(M, dtype=torch.bool)
    position_ids = torch.arange(n + M).clamp_max(n)
    how = {"position_ids": position_ids[None], "mask": mask[None]}
    row = torch.cat([h[:n], h[n] + moves])[None]
    row = model.blocks(row, layer + 1, model.config.num_hidden_layers, **how)
    p = model.logits(model.norm(row[0, n:])).double().softmax(-1)            # (M,V)
    p_yes = p[:, yes].sum(-1)
    p_no = 1 - p[:, off].sum(-1) - p_yes
    return (p_yes / p_no).log()


def push_of(model, sae, pairs):
    """The length of the move, in units of the state: PUSH of the median state's at answer tokens."""
    (_, batch), = simpo.batches(pairs[:64], 64)
    states = simpo.prefix(model, batch, sae.layer + 1)[batch.branch > 0]
    return PUSH * states.norm(dim=-1).median().item()


def writes(model, sae, tokenizer, pairs):
    """Half of log-odds(up) - log-odds(down), in nats, mean over the positions that decide each choice.
    -> effects of the features (F, 10), and of random directions (CHANCE, 10), float64
    """
    # Not seed 0: the lab's SAE began as that draw, and its directions are still like it.
    random = torch.randn(CHANCE, sae.d_in, generator=torch.Generator().manual_seed(2027))
    directions = normalize(torch.cat([sae.W_dec.float(), random]), dim=-1)
    moves = push_of(model, sae, pairs) * directions
    effects = []
    for name, places in tqdm(deciding(tokenizer, pairs, EACH).items(), "writes", disable=None):
        effect = 0.0
        for place in places:
            up = log_odds(model, sae.layer, *place, moves)
            down = log_odds(model, sae.layer, *place, -moves)
            effect += (up - down) / 2 / len(places)
        effects.append(effect)
    return torch.stack(effects, 1).split([sae.d_sae, CHANCE])


# ---- labels ------------------------------------------------------------------------------------------

def excess(effect, chance):
    """Effects (n,10) -> mass (n,10) beyond two standard deviations of `chance` (m,10); none where the
    total does not exceed that of 99 in 100 of `chance`."""
    def beyond(x):
        return ((x / chance.std(0)).abs() - 2).clamp_min(0)
    mass = beyond(effect)
    bar = beyond(chance).sum(1).quantile(.99)
    mass[mass.sum(1) <= bar] = 0
    return mass


def labelled(mass):
    """mass (10,) of the choices, or (11,) with other -> (group labels, choices) with half of it"""
    half = mass.sum() / 2
    of = dict(zip(world.CHOICES, mass))
    if not half > 0:
        return [], []
    groups = [name for name, members in Lab.groups.items() if sum(of[c] for c in members) >= half]
    return groups, [name for name in world.CHOICES if of[name] >= half]


def lab_labels(model, tokenizer, sae):
    """-> (rows by what features write, rows by what they read), for lib.labels.write_labels"""
    if tokenizer.token_to_id("▁" + world.PEOPLE[0]) is None:
        raise UserError("the lab's labels need its own model, tiny/model, whose words they are about")
    pairs = label_pairs(tokenizer)

    effects, chance = writes(model, sae, tokenizer, pairs)
    sizes = effects / chance.std(0)
    written = []
    for i, mass in enumerate(excess(effects, chance)):
        said = []
        for k in most(sizes[i].abs()):
            sign = "+" if effects[i, k] > 0 else "−"
            nats = f"({effects[i, k]:+.2f} nats, {sizes[i, k]:+.1f} sd of chance)"
            said.append(f"{sign}{world.CHOICES[k]} {nats}")
        nats = {name: round(x, 4) for name, x in zip(world.CHOICES, effects[i].tolist())}
        written.append(row(i, mass, "writes " + ", ".join(said)) | {"writes": nats})

    read = []
    for i, mass in enumerate(reads(model, sae, tokenizer, pairs)):
        said = ", ".join(f"{NAMES[k]} {mass[k] / mass.sum():.0%}" for k in most(mass))
        read.append(row(i, mass, f"reads {said}"))
        if not mass.any():
            read[-1] |= {"labels": None, "description": "never fires"}
    return written, read


def most(values):
    """The places of the two largest."""
    return values.argsort(descending=True)[:2].tolist()


def row(i, mass, description):
    groups, choices = labelled(mass)
    return {"index": i, "labels": groups, "choices": choices, "description": description}
