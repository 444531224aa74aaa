"""A preference pair as one row, its log-probabilities, and SimPO's loss: exact, and without waste.

Chosen and rejected answer the same prompt, so a pair is ONE row and its prompt is computed once:

    token     p0 p1 p2 c0 c1 r0 r1          may attend (query down, key across)
    branch     0  0  0  1  1  2  2            p p p c c r r
    position   0  1  2  3  4  3  4          p x
                                            p x x
    key k is visible to query q when        p x x x
      branch[k] in {0, branch[q]}           c x x x x
      position[k] <= position[q]            c x x x x x
      position[q] - position[k] < window    r x x x . . x
      (window: local layers only)           r x x x . . x x

An answer token is predicted by the state before it; the first tokens of BOTH answers by the last prompt
token. Only these states go through the head: no logits of prompts or padding are ever made.

    s(y)  = mean log p over y's tokens, its end token included
    loss  = -log sigmoid(beta · (s(chosen) - s(rejected) - gamma_ratio))     gamma_ratio: the paper's γ/β

(SimPO, arXiv 2405.14734, eq. 6; equally likely answers give softplus(beta · gamma_ratio) = 5.0067.)
"""
from dataclasses import dataclass, fields, replace

import torch
from torch.nn import functional as nnf

from gemma import encode_answer, encode_prompt, product, shared_positions, steerable
from lib.files import UserError, short_digest
from lib.pairs import fitted
from lib.stats import mean_and_error


@dataclass(frozen=True)
class Pair:
    prompt: tuple       # ids, <bos> first, up to and including "<start_of_turn>model⏎"
    chosen: tuple       # ids, its end token last
    rejected: tuple
    text: str = ""      # the last user message as it was written


# ---- by the book -----------------------------------------------------------------------------------

def by_the_book(model, pair, policy=None):
    """s(chosen), s(rejected) of one Pair from two plain sequences with all their logits: two scalars.

    Everything below has to equal this. It takes the prompt twice and V logits for each of its tokens:
    twice the time of a row, and gigabytes with a vocabulary of 256,000."""
    model, edits = policy.acting(model) if policy else (model, None)
    out = []
    for answer in (pair.chosen, pair.rejected):
        n = len(pair.prompt)
        ids = torch.tensor([pair.prompt + answer], device=model.device)
        place = torch.arange(ids.shape[1], device=model.device)[None]
        where = steerable(shared_positions(edits), place, place >= n - 1)
        states = model(ids, where=where, edits=edits)[0]
        logp = model.logits(states).log_softmax(-1)                                # (T,V)
        own = logp[n - 1:-1].gather(1, ids[0, n:, None])       # each answer token by the state before it
        out.append(own.mean())
    return out


def dense_logps(x, W, target, cap):
    """log softmax(cap · tanh(x W^T / cap)) at the targets.  x (N,D), W (V,D), target (N,) -> (N,)"""
    logits = cap * torch.tanh(product(x, W.T) / cap)
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


# ---- rows ------------------------------------------------------------------------------------------

@dataclass
class Batch:
    ids: torch.Tensor           # (B,T)
    branch: torch.Tensor        # (B,T) 0 prompt, 1 chosen, 2 rejected, -1 padding
    position_ids: torch.Tensor  # (B,T) goes on from the prompt for both answers; -1 padding
    read: torch.Tensor          # (N,) for each answer token: flat index into (B,T) of the one before it
    target: torch.Tensor        # (N,) its id
    owner: torch.Tensor         # (N,) whose it is: b chosen of pair b, B + b rejected
    lengths: torch.Tensor       # (2B,) tokens of each answer

    def to(self, device):
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def mask(self):
        """(B,T,T) bool, True = visible: the picture above, before windowing."""
        query, key = self.branch[:, :, None], self.branch[:, None, :]
        earlier = self.position_ids[:, None, :] <= self.position_ids[:, :, None]
        return ((key == 0) | (key == query)) & (key >= 0) & earlier

    def where(self, positions):
        """(B,T) bool: the tokens that are steered; see gemma.steerable."""
        predicts = torch.zeros_like(self.branch, dtype=torch.bool)
        predicts.view(-1)[self.read] = True
        return steerable(positions, self.position_ids, predicts)


def collate(pairs, pad_id=0):
    """Pairs -> Batch, one row each, padded on the right to the longest."""
    if empty := [p for p in pairs if not (p.prompt and p.chosen and p.rejected)]:
        raise UserError(f"a pair has an empty part: {empty[0]}")
    B, T = len(pairs), max(map(tokens, pairs))
    ids, branch, position_ids = (torch.full((B, T), fill) for fill in (pad_id, -1, -1))
    read, target, owner = [], [], []
    for b, pair in enumerate(pairs):
        start, n = 0, len(pair.prompt)
        for side, part in enumerate((pair.prompt, pair.chosen, pair.rejected)):
            stop, first = start + len(part), n if side else 0
            ids[b, start:stop] = torch.tensor(part)
            branch[b, start:stop] = side
            position_ids[b, start:stop] = torch.arange(first, first + len(part))
            if side:
                read += [b * T + n - 1]                             # the last token of the prompt
                read += [b * T + t for t in range(start, stop - 1)]
                target += part
                owner += [b + B * (side - 1)] * len(part)
            start = stop
    lengths = [len(p.chosen) for p in pairs] + [len(p.rejected) for p in pairs]
    numbers = (torch.tensor(x) for x in (read, target, owner, lengths))
    return Batch(ids, branch, position_ids, *numbers)


def tokens(pair):
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def batches(pairs, batch_size):
    """Pairs in batches of similar length, with their indices: little padding."""
    order = sorted(range(len(pairs)), key=lambda i: tokens(pairs[i]))
    for i in range(0, len(order), batch_size):
        index = order[i:i + batch_size]
        yield index, collate([pairs[j] for j in index])


# ---- scores and loss -------------------------------------------------------------------------------

@dataclass
class Answer:
    """What a loss may look at, for B answers; sum and base_sum are log p of whole answers."""
    mean: torch.Tensor                   # (B,) s(y), nats a token
    length: torch.Tensor                 # (B,) tokens
    base_mean: torch.Tensor = None       # (B,) under the base model, where an objective may ask

    @property
    def sum(self):
        return self.mean * self.length

    @property
    def base_sum(self):
        return self.base_mean * self.length


@dataclass
class Score:
    chosen: Answer
    rejected: Answer
    penalty: torch.Tensor                # (B,) what the policy's actions cost
    shown: dict                          # {name: (B,)} for the log, such as l0 and l1


@torch.no_grad()
def prefix(model, batch, count):
    """The output of the `count` lowest blocks (B,T,D), frozen: it never changes and can be kept."""
    how = {"position_ids": batch.position_ids, "mask": batch.mask()}
    return model.blocks(model.embed(batch.ids), 0, count, **how)


def score(model, batch, policy=None, h=None):
    """Both answers of B pairs under the policy, or (None) the base model. -> Score
    h: the output of the policy's frozen blocks, if it has been computed before."""
    penalty, shown = torch.zeros(len(batch.ids), device=batch.ids.device), {}
    if policy is None:
        h = prefix(model, batch, model.config.num_hidden_layers)
    else:
        if h is None and policy.frozen is not None:
            h = prefix(model, batch, policy.frozen)
        h, penalty, shown = policy.run(model, h, batch)
        model, _ = policy.acting(model)
    means = mean_logps(model, batch, h)
    chosen, rejected = map(Answer, means, batch.lengths.to(means[0].dtype).chunk(2))
    return Score(chosen, rejected, penalty, shown)


def mean_logps(model, batch, h):
    """States after the last block (B,T,D) -> s(chosen), s(rejected) (B,), mean log p a token."""
    x = model.norm(h.flatten(0, 1)[batch.read])
    W = model.embed_tokens.weight
    cap = model.config.final_logit_softcapping
    learning = W.requires_grad and torch.is_grad_enabled()             # the fast one leaves W alone
    log_probs = dense_logps if learning else token_logps
    logp = log_probs(x, W, batch.target, cap)
    total = logp.new_zeros(len(batch.lengths))
    total = total.index_add(0, batch.owner, logp)                      # over each answer's tokens
    return (total / batch.lengths).chunk(2)


def simpo_loss(chosen, rejected, beta=10.0, gamma_ratio=0.5, *, kind="sigmoid", label_smoothing=0.0):
    """SimPO's loss of mean log-probabilities, (B,),(B,) -> (B,). With z = beta · (margin - gamma_ratio):
    sigmoid -(1 - ls) log σ(z) - ls log σ(-z), hinge max(0, 1 - z), without smoothing."""
    wide = torch.promote_types(torch.float32, chosen.dtype)
    z = beta * (chosen.to(wide) - rejected.to(wide) - gamma_ratio)
    if kind == "hinge":
        return torch.relu(1 - z)
    return -(1 - label_smoothing) * nnf.logsigmoid(z) - label_smoothing * nnf.logsigmoid(-z)


def preference_loss(chosen, rejected, config, objective=None):
    """What a run's settings (a dict) ask of two Answers: SimPO, or a user's own function. -> (B,)"""
    if objective:
        return objective(chosen, rejected)
    settings = {"beta", "gamma_ratio", "label_smoothing"} & set(config)
    given = {name: config[name] for name in settings}
    return simpo_loss(chosen.mean, rejected.mean, kind=config.get("loss", "sigmoid"), **given)


@torch.no_grad()
def base_means(model, batch):
    """What an objective may ask of the base model: s(chosen), s(rejected). -> (2,B)"""
    return torch.stack([*mean_logps(model, batch, prefix(model, batch, len(model.layers)))])


def with_base(scored, base):
    """The Score with the base model's numbers (see `base_means`) in its answers."""
    chosen = replace(scored.chosen, base_mean=base[0])
    rejected = replace(scored.rejected, base_mean=base[1])
    return replace(scored, chosen=chosen, rejected=rejected)


# ---- evaluation ------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, pairs, policy=None, *, config=None, objective=None, batch_size=32, progress=None):
    """The base model (policy None) or the policy on held-out pairs. -> dict of means over pairs

    loss (of the preference alone), accuracy (share with s(chosen) > s(rejected)), margin (nats a token),
    each with its standard error (loss_se, ...); chosen, rejected: mean s; l0, l1. In float64."""
    columns = torch.zeros(5, len(pairs), dtype=torch.float64)
    for index, batch in batches(pairs, batch_size):
        batch = batch.to(model.device)
        s = score(model, batch, policy)
        if objective:
            s = with_base(s, base_means(model, batch))
        chosen, rejected = double(s.chosen), double(s.rejected)
        loss = preference_loss(chosen, rejected, config or {}, objective)
        nothing = torch.zeros_like(s.penalty)
        l0, l1 = (s.shown.get(name, nothing).cpu() for name in ("l0", "l1"))
        columns[:, index] = torch.stack([chosen.mean, rejected.mean, loss, l0, l1])
        if progress:
            progress(len(index))
    chosen, rejected, loss, l0, l1 = columns
    margin, out = chosen - rejected, {"pairs": len(pairs)}
    for name, x in (("loss", loss), ("accuracy", (margin > 0).double()), ("margin", margin)):
        out[name], out[name + "_se"] = mean_and_error(x)
    means = {"chosen": chosen, "rejected": rejected, "l0": l0, "l1": l1}
    return out | {name: x.mean().item() for name, x in means.items()}


def double(answer):
    """An Answer in float64, on the CPU: mps has none."""
    numbers = answer.mean, answer.length, answer.base_mean
    return Answer(*(x if x is None else x.cpu().double() for x in numbers))


def encode_pairs(tokenizer, records, max_length=2048):
    """Records of lib.pairs.read_pairs, cut to max_length; equal answers say nothing and are dropped.
    -> (pairs, {"cut": n, "dropped": n})"""
    pairs, cut, dropped = [], 0, 0
    for record in records:
        try:
            prompt = encode_prompt(tokenizer, record["prompt"])
        except UserError as error:
            raise UserError(f"{record['at']}: {error}") from None
        chosen, rejected = (encode_answer(tokenizer, record[side]) for side in ("chosen", "rejected"))
        whole = prompt, chosen, rejected
        prompt, chosen, rejected = fitted(*whole, max_length)
        cut += whole != (prompt, chosen, rejected)
        if chosen == rejected:
            dropped += 1
            continue
        text = record["prompt"] if isinstance(record["prompt"], str) else record["prompt"][-1]["content"]
        pairs.append(Pair(tuple(prompt), tuple(chosen), tuple(rejected), text))
    return pairs, {"cut": cut, "dropped": dropped}


def digest(pairs):
    """A short name of exactly these pairs, for a run's config."""
    return short_digest(repr([(p.prompt, p.chosen, p.rejected) for p in pairs]))


# ---- the head again: faster, the same numbers ------------------------------------------------------

class TokenLogps(torch.autograd.Function):
    """log p of the targets and, in the same pass over V, its gradient towards x.
    With y_j = tanh(z_j / cap), z = x W^T, logits are cap · y and the chain rule gives
        d log p_t / dx = (1 - y_t²) W_t - Σ_j p_j (1 - y_j²) W_j
    The target's own term of the sum is left out and (1 - p_t) taken instead of 1: where p_t is near 1
    they would cancel, in bf16 to nothing. Logits are at most `cap`, so no running maximum is needed."""

    @staticmethod
    def forward(ctx, x, W, target, cap, budget):
        wide = torch.promote_types(torch.float32, x.dtype)
        logp = x.new_empty(len(x), dtype=wide)
        slope = x.new_empty(x.shape, dtype=wide) if ctx.needs_input_grad[0] else None
        rows = 2048
        for i in range(0, len(x), rows):
            part, wanted = x[i:i + rows], target[i:i + rows]
            width = max(256, budget // len(part))          # columns a chunk: two temporaries so wide
            total = part.new_zeros(len(part), dtype=wide)  # Σ_j e^(logit_j - cap), all but the target
            pull = part.new_zeros(part.shape, dtype=wide)  # the same of e^(logit_j - cap) (1 - y_j²) W_j
            for j in range(0, len(W), width):
                Wj = W[j:j + width]
                y = product(part, Wj.T).div_(cap).tanh_()
                e = (y - 1).mul_(cap).exp_()
                column = wanted - j
                inside = ((column >= 0) & (column < len(Wj))).nonzero()[:, 0]
                e[inside, column[inside]] = 0.0
                total += e.sum(-1)
                if slope is not None:
                    e -= y.square_().mul_(e)
                    pull += product(e.to(Wj.dtype), Wj)
            # The target by itself.
            own = W[wanted].to(wide)
            y = torch.tanh((part.to(wide) * own).sum(-1) / cap)
            others, total = total, total + (cap * (y - 1)).exp()
            logp[i:i + rows] = cap * (y - 1) - total.log()
            if slope is not None:
                slope[i:i + rows] = ((others * (1 - y * y))[:, None] * own - pull) / total[:, None]
        ctx.save_for_backward(slope)
        ctx.dtype = x.dtype
        return logp

    @staticmethod
    def backward(ctx, g):
        slope, = ctx.saved_tensors
        return (g[:, None] * slope).to(ctx.dtype), None, None, None, None


def token_logps(x, W, target, cap, budget=None):
    """dense_logps for a frozen W (no gradient reaches it), in float32 or better, no (N,V) tensor.
    budget: elements of a temporary; on a CPU, pages of more than 32 MB would be got anew every time."""
    return TokenLogps.apply(x, W, target, cap, budget or (4 if x.is_cpu else 64) * 2**20)
