"""How far did a layer's states move, does that explain the gain, and in how many directions?

    distance   ‖u' - u‖ / ‖u‖ of a block's update u (its output less its input), mean over answer tokens
    local      the same with the tuned block on the BASE model's own stream: what the block itself does
               differently, not what follows from the blocks below
    stream     of the residual stream after the block: it piles up
    signed     the chosen answer's mean u' - u less the rejected one's, along its mean over the other
               half of the pairs: only a number with a sign can explain the sign of a gain

(Definitions are this project's: arXiv 2510.16167 gives none.) LASSO then asks which layers' numbers
explain the gain of a pair. Few layers say little: with six columns a choice of two is no discovery.
"""
import numpy as np
import torch

from lib.blocks import Table, Text, number, percent
from lib.counts import answer_means
from lib.lasso import cross_validated, selected
from lib.stats import ratio

KINDS = ("distance", "local", "stream", "signed")
RANKS = (1, 2, 4, 8, 16, 32)


def relative(new, old, tokens):
    """Mean over a row's tokens of ‖new - old‖ / ‖old‖.  (B,T,D), (B,T) -> (B,)"""
    far = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(1e-12)
    return (far * tokens).sum(1) / tokens.sum(1)


@torch.no_grad()
def collected(sides, batches, half):
    """-> {kind: (P,L)} but for "signed"; differences (P,L,D): chosen less rejected, of the update's
    change; of each layer's change of the stream, and each half of the pairs, the sums over pairs of its
    mean over answer tokens (2,L,D) and of its second moment (2,L,D,D)"""
    count, D = len(sides[0].model.layers), sides[0].model.config.hidden_size
    pairs = len(half)
    out = {kind: np.zeros((pairs, count)) for kind in KINDS[:3]}
    differences = np.zeros((pairs, count, D))
    means, seconds = np.zeros((2, count, D)), np.zeros((2, count, D, D))
    for index, batch in batches:
        base, tuned = (side.record(batch) for side in sides)
        answer, how = (batch.branch > 0).float(), sides[1].how(batch)
        below = sides[0].model.embed(batch.ids)
        for layer in range(count):
            u, v = base["update", layer], tuned["update", layer]
            h, g = base["resid", layer], tuned["resid", layer]
            local, below = sides[1].update(below, layer, how), h        # on the base model's stream
            for kind, new, old in (("distance", v, u), ("local", local, u), ("stream", g, h)):
                out[kind][index, layer] = relative(new, old, answer).cpu().numpy()
            chosen, rejected = answer_means(batch, v - u)
            differences[index, layer] = (chosen - rejected).cpu().double().numpy()
            weight = answer / answer.sum(1, keepdim=True)               # every pair counts alike
            for k, mine in enumerate((half[index], ~half[index])):
                tokens = (batch.branch > 0) & torch.tensor(mine, device=answer.device)[:, None]
                moved = (g - h)[tokens].cpu().double().numpy()
                w = weight[tokens].cpu().double().numpy()[:, None]
                means[k, layer] += (w * moved).sum(0)
                seconds[k, layer] += (w * moved).T @ moved
    return out, differences, means, seconds


def signed(differences, half):
    """(P,L): each pair's difference along the mean direction of the OTHER half of the pairs."""
    out = np.zeros(differences.shape[:2])
    for mine in (half, ~half):
        direction = differences[~mine].mean(0)                                        # (L,D)
        direction = direction / np.maximum(np.linalg.norm(direction, axis=-1, keepdims=True), 1e-12)
        out[mine] = (differences[mine] * direction).sum(-1)
    return out


def explained(X, y, clusters):
    """LASSO of the gain on one number a layer, and what it finds in a target that is shuffled."""
    found = cross_validated(X, y, clusters)
    found["often"] = selected(X, y, found["one_se"]["alpha"], clusters).tolist()
    shuffled = cross_validated(X, np.random.default_rng(0).permutation(y), clusters)
    found["shuffled"] = {"kept": int(np.count_nonzero(shuffled["one_se"]["weights"])),
                         "r2": shuffled["r2"]}
    return found


# ---- rank --------------------------------------------------------------------------------------------

def spectrum(second):
    """Of a second moment (D,D): shares of the directions, falling, and how many there are in effect."""
    value = np.clip(np.linalg.eigvalsh(second)[::-1], 0, None)
    share = value / max(value.sum(), 1e-30)
    out = {f"d{q}": int(1 + (share.cumsum() < q / 100 - 1e-12).sum()) for q in (50, 90, 95)}
    some = share[share > 0]
    out["participation"] = float(1 / max((share ** 2).sum(), 1e-30))
    out["entropy"] = float(np.exp(-(some * np.log(some)).sum()))
    return out | {"stable": float(1 / max(share[0], 1e-30)), "first": share[:8].tolist()}


@torch.no_grad()
def only_directions(sides, batches, layer, bases, tested, gain):
    """Shares of the gain of the pairs in `tested` (P,) when base ← tuned is patched along each basis
    (D,k) of the stream after a layer. -> list"""
    moved = np.zeros((len(bases), len(gain)))
    side, last = sides[0], ("resid", len(sides[0].model.layers) - 1)
    for index, batch in batches:
        base, tuned = (s.record(batch) for s in sides)
        h, own = base["resid", layer], side.margins(batch, base[last])
        change = tuned["resid", layer] - h
        for row, basis in zip(moved, bases):
            patched = h + (change @ basis) @ basis.T
            after = side.forward(batch, lambda site, i, x: x, layer + 1, patched)
            row[index] = (side.margins(batch, after) - own).numpy()
    return ((moved * gain)[:, tested].sum(1) / np.square(gain[tested]).sum()).tolist()


def ranks(sides, batches, layer, second, gain, half):
    """Directions of one half of the pairs (second: its second moment (D,D)), tested on the other: the
    first k by size, by what each does alone on the first half, and random ones."""
    like = sides[0].model.norm.weight
    D = len(like)
    vectors = np.linalg.eigh(second)[1][:, ::-1].copy()
    basis = torch.tensor(vectors).to(like)
    single = basis[:, :min(max(RANKS), D)].T[..., None]                  # one by one, each (D,1)
    alone = only_directions(sides, batches, layer, single, half, gain)
    order = np.argsort(-np.array(alone))
    noise = torch.randn(D, D, generator=torch.Generator().manual_seed(0))
    random = torch.linalg.qr(noise)[0].to(like)
    kinds = {"size": basis, "effect": basis[:, order.copy()], "random": random}
    some = [k for k in RANKS if k <= D]
    bases = [B[:, :k] for k in some for B in kinds.values()]
    shares = iter(only_directions(sides, batches, layer, bases, ~half, gain))
    return [{"k": k, **{name: next(shares) for name in kinds}} for k in some]


# ---- what others would say ---------------------------------------------------------------------------

@torch.no_grad()
def spinal(side, batches):
    """SPINAL's two traces (arXiv 2601.06238) at answer tokens. -> contraction (L,), transport (L-1,)

    contraction   minus the slope of log σ_k over log k, in the lower half of the stream's singular
                  values (where "the tail" begins is not said)
    transport     2 arccos Σ sqrt(p q) of what adjacent layers predict through the final norm and head
    """
    model = side.model
    count = len(model.layers)
    seconds, lengths, tokens = [0.0] * count, np.zeros(count - 1), 0
    for _, batch in batches:
        record, before = side.record(batch), None
        tokens += len(batch.read)
        for layer in range(count):
            h = record["resid", layer].flatten(0, 1)[batch.read]
            seconds[layer] = seconds[layer] + h.double().T @ h.double()
            p = model.logits(model.norm(h)).softmax(-1).sqrt()
            if layer:
                overlap = (p * before).sum(-1).clamp(0, 1)
                lengths[layer - 1] += 2 * torch.arccos(overlap).sum().item()
            before = p
    slopes = []
    for second in seconds:
        value = torch.linalg.eigvalsh(second).flip(0).clamp_min(1e-30).cpu().numpy() ** .5
        k = np.arange(len(value) // 2, len(value))
        slopes.append(-np.polyfit(np.log(k + 1), np.log(value[k]), 1)[0])
    return [float(x) for x in slopes], (lengths / tokens).tolist()


def measure(sides, batches, gain, clusters):
    half = np.isin(clusters, np.unique(clusters)[::2])                 # whole questions
    numbers, differences, means, seconds = collected(sides, batches, half)
    numbers["signed"] = signed(differences, half)
    out = {"layers": {}, "lasso": {}}
    for kind, X in numbers.items():
        out["layers"][kind] = [ratio(x, clusters=clusters) for x in X.T]
        out["lasso"][kind] = explained(X, gain, clusters)
    whole, mean = seconds.sum(0) / len(gain), means.sum(0) / len(gain)
    out["rank"] = [spectrum(second) for second in whole]
    out["rank_centred"] = [spectrum(second - np.outer(m, m)) for m, second in zip(mean, whole)]
    traces = [spinal(side, batches) for side in sides]
    for name, (base, tuned) in zip(("contraction", "transport"), zip(*traces)):
        out[name] = {"base": base, "tuned": tuned}
    out["at"] = at = int(numbers["local"].mean(0).argmax())
    out["causal"] = ranks(sides, batches, at, seconds[0, at], gain, half) if gain.any() else []
    return out


def describe(x):
    rows = []
    for kind, cells in x["layers"].items():
        rows.append([kind, *(number(cell["value"]) for cell in cells)])
    for kind, found in x["lasso"].items():
        chosen = [number(w, "+.2f") if w else "0" for w in found["one_se"]["weights"]]
        rows.append([f"LASSO on {kind}", *chosen])
        rows.append(["– chosen in so many resamplings", *(percent(o) for o in found["often"])])
    for name in ("participation", "d90"):
        rows.append([f"rank of the stream’s change: {name}",
                     *(number(s[name], ".3g") for s in x["rank"])])
    for name in ("contraction", "transport"):
        both = zip(x[name]["base"], x[name]["tuned"])
        cells = [f"{number(b, '.2f')} → {number(t, '.2f')}" for b, t in both]
        rows.append([f"SPINAL’s {name}", *cells, *[""] * (len(x["rank"]) - len(cells))])
    head = ["", *(f"layer {i}" for i in range(len(x["rank"])))]
    fits = [f"{kind} {found['r2']:.2f} (shuffled {found['shuffled']['r2']:.2f})"
            for kind, found in x["lasso"].items()]
    note = (f"LASSO: standardised weights at the 1-SE penalty. Held-out R²: {', '.join(fits)}. "
            "With this few layers a choice among them is weak evidence.")
    causal = [[str(row["k"]), *(percent(row[name]) for name in ("size", "effect", "random"))]
              for row in x["causal"]]
    words = ["directions patched", "the largest", "those that do most alone", "random"]
    said = (f"Share of the gain when only some directions of the stream’s change after layer {x['at']} "
            "(where the block itself changed most) are patched; found on half of the questions, "
            "tested on the others:")
    return [Table(head, rows, note, brief=True), Text(said), Table(words, causal, brief=True)]
