"""What the lab's SAE features read and write, where the grammar says what each token is about.

    reads    on which tokens does a feature fire? Its activation on answers of the `label` split, shared
             among the choices that the token settles
    writes   what does it change? The base model's log-odds of each choice where it is decided, with the
             state moved by a fixed length along the feature's direction, up and down

A feature has a label if half of its mass lies with a choice, or with a group (style, alignment). For
`writes`, mass is what exceeds two standard deviations of the effects of random directions of the same
length. Among ten choices every third direction does so by chance; so a feature also needs a total excess
that only 1 in 100 has. How many of 256 OTHER random directions would get a label is printed.
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
CHANCE = 256             # random directions that say what chance is; as many again that try the rule
COLUMN = {name: k for k, name in enumerate(world.CHOICES)}


def label_pairs(tokenizer):
    """Pairs of the split that exists for labels: its topics are in no other."""
    return simpo.encode_pairs(tokenizer, read_pairs(HERE / "pairs" / "style", "label"))[0]


def decided(tokenizer, pair):
    """(answer, token, what it settles) for every answer token of a pair; see judge.decisions."""
    q = world.read_prompt(pair.text)
    for answer in (pair.chosen, pair.rejected):
        for token, settled in enumerate(decisions(tokenizer, q, answer)):
            yield answer, token, settled


@torch.no_grad()
def reads(model, sae, tokenizer, pairs, progress=False):
    """Activation of each feature by the choices that its token settles, which share it equally.

    -> (F, 11) float64: world.CHOICES, and tokens that settle none
    """
    mass = torch.zeros(sae.d_sae, len(COLUMN) + 1, dtype=torch.float64)
    for index, batch in tqdm(list(simpo.batches(pairs, 64)), desc="reads", disable=not progress):
        f = sae.encode(simpo.prefix(model, batch, sae.layer + 1)).double()
        about = torch.zeros(*batch.ids.shape, mass.shape[1], dtype=torch.float64)      # (B,T,11)
        about[batch.branch > 0, -1] = 1.0
        for b, pair in enumerate(pairs[i] for i in index):
            for answer, token, settled in decided(tokenizer, pair):
                columns = [COLUMN[name] for name, *_ in settled if name in COLUMN] or [-1]
                place = len(pair.prompt) + (len(pair.chosen) if answer is pair.rejected else 0) + token
                about[b, place, -1] = 0.0
                about[b, place, columns] = 1 / len(columns)
        mass += f.flatten(0, 1).T @ about.flatten(0, 1)
    return mass


# ---- writes ------------------------------------------------------------------------------------------

def deciding(tokenizer, pairs, each):
    """Where choices are decided, `each` times, on different topics where there are enough.
    -> {choice: [(ids before, ids off the mass, ids that mean yes)]}"""
    out, seen = {name: [] for name in world.CHOICES}, set()
    for only_new_topics in (True, False):
        for pair in pairs:
            q = world.read_prompt(pair.text)
            for answer, token, settled in decided(tokenizer, pair):
                off = []
                for name, starts, yes, _ in settled:
                    place, topic = (name, pair.prompt, answer), (name, q.subject, q.relation)
                    fresh = (topic if only_new_topics else place) not in seen
                    if name in out and len(out[name]) < each and fresh:
                        seen |= {topic, place}
                        out[name].append((list(pair.prompt + answer[:token]), list(off), yes))
                    off += starts
    return out


@torch.no_grad()
def log_odds(model, layer, ids, off, yes, moves, chunk=512):
    """Log-odds of a choice after `ids`, with each of moves (M,D) added to the last state of `layer`.
    One row does it: the context, then a copy of its last token for each move, at the same position,
    which sees the context and itself. So all moves of a chunk cost one pass.  -> (M,) float64
    """
    h = model.blocks(model.embed(torch.tensor([ids])), 0, layer + 1)
    n, top, odds = len(ids) - 1, model.config.num_hidden_layers, []
    for part in moves.split(chunk):
        M = len(part)
        row = torch.cat([h[:, :n], h[:, n:] + part[None]], 1)
        position_ids = torch.cat([torch.arange(n), torch.full((M,), n)])[None]
        mask = torch.ones(n + M, n + M, dtype=torch.bool).tril()
        mask[n:, n:] = torch.eye(M, dtype=torch.bool)
        row = model.blocks(row, layer + 1, top, position_ids=position_ids, mask=mask[None])
        z = model.logits(model.norm(row[0, n:])).double()      # (M,V)
        no = torch.ones(z.shape[1], dtype=torch.bool)
        no[off + yes] = False
        odds.append(z[:, yes].logsumexp(-1) - z[:, no].logsumexp(-1))
    return torch.cat(odds)


def push_of(model, sae, pairs):
    """The length of the move, in units of the state: PUSH of the median state's at answer tokens."""
    (_, batch), = simpo.batches(pairs[:64], 64)
    states = simpo.prefix(model, batch, sae.layer + 1)[batch.branch > 0]
    return PUSH * states.norm(dim=-1).median().item()


def writes(model, sae, tokenizer, pairs, progress=False, each=EACH):
    """Half of log-odds(up) - log-odds(down), in nats, mean over the positions that decide each choice.
    -> effects of the features (F, 10), and of random directions (2 * CHANCE, 10), float64
    """
    places, push = deciding(tokenizer, pairs, each), push_of(model, sae, pairs)
    # Not seed 0: the lab's SAE began as that draw, and its directions are still like it.
    random = torch.randn(2 * CHANCE, sae.d_in, generator=torch.Generator().manual_seed(2027))
    moves = normalize(torch.cat([sae.W_dec.float(), random]), dim=-1) * push
    both, n = torch.cat([moves, -moves]), len(moves)
    effect = torch.zeros(n, len(world.CHOICES), dtype=torch.float64)
    for name, k in tqdm(COLUMN.items(), desc="writes", disable=not progress):
        for ids, off, yes in places[name]:
            odds = log_odds(model, sae.layer, ids, off, yes, both)
            effect[:, k] += (odds[:n] - odds[n:]) / 2 / len(places[name])
    return effect[:sae.d_sae], effect[sae.d_sae:]


# ---- labels ------------------------------------------------------------------------------------------

def excess(effect, chance):
    """Effects (n,10) -> mass (n,11) beyond two standard deviations of `chance` (m,10), the last one 0;
    none where the total does not exceed that of 99 in 100 of `chance`."""
    def beyond(x):
        return ((x / chance.std(0)).abs() - 2).clamp_min(0)
    mass, bar = beyond(effect), beyond(chance).sum(1).quantile(.99)
    mass[mass.sum(1) <= bar] = 0
    return torch.cat([mass, mass.new_zeros(len(mass), 1)], 1)


def labelled(mass):
    """mass (11,) of choices and other -> (group labels, choices) that have half of it or more"""
    total = float(mass.sum())
    if not total > 0:
        return [], []
    share = dict(zip(world.CHOICES, (mass / total).tolist()))
    groups = [g for g, choices in Lab.groups.items() if sum(share[c] for c in choices) >= .5]
    return groups, [c for c in world.CHOICES if share[c] >= .5]


def lab_labels(model, tokenizer, sae, progress=False):
    """-> (rows by what features write, rows by what they read), for lib.labels.write_labels"""
    if tokenizer.token_to_id("▁" + world.PEOPLE[0]) is None:
        raise UserError("the lab's labels need its own model, tiny/model, whose words they are about")
    pairs = label_pairs(tokenizer)
    effect, random = writes(model, sae, tokenizer, pairs, progress)
    known, tried = random[:CHANCE], random[CHANCE:]
    if progress:
        lucky = sum(bool(labelled(mass)[0]) for mass in excess(tried, known))
        print(f"by chance: {lucky} of {CHANCE} random directions would get a label by what they write")
    masses, spread = excess(effect, known), known.std(0)
    write_rows = [write_row(i, masses[i], effect[i], spread) for i in range(sae.d_sae)]
    mass_read = reads(model, sae, tokenizer, pairs, progress)
    return write_rows, [read_row(i, mass) for i, mass in enumerate(mass_read)]


def write_row(i, mass, effect, spread):
    """mass (11,), effect (10,) in nats, spread (10,): the standard deviation of chance."""
    (groups, choices), said = labelled(mass), []
    effects = {name: round(float(x), 4) for name, x in zip(world.CHOICES, effect)}
    for k in effect.div(spread).abs().argsort(descending=True)[:2].tolist():
        sign, name = "+" if effect[k] > 0 else "−", world.CHOICES[k]
        said.append(f"{sign}{name} ({effect[k]:+.2f} nats, {effect[k] / spread[k]:+.1f} sd of chance)")
    said = "writes " + ", ".join(said)
    return dict(index=i, labels=groups, choices=choices, writes=effects, description=said)


def read_row(i, mass):
    total = float(mass.sum())
    if not total > 0:
        return dict(index=i, labels=None, choices=[], description="never fires")
    (groups, choices), most = labelled(mass), mass.argsort(descending=True)[:2].tolist()
    names = (*world.CHOICES, "no choice")
    said = "reads " + ", ".join(f"{names[k]} {mass[k] / total:.0%}" for k in most)
    return dict(index=i, labels=groups, choices=choices, description=said)
