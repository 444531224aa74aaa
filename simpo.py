"""Preference pairs, from file to SimPO loss, exactly and without waste.

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

An answer token is predicted by the state before it; the first tokens of BOTH answers by the last prompt token. Only
these states go through the head: no logits of prompts or padding are ever made. The numbers are those of separate
sequences (tests/test_simpo.py), not an approximation of them.

    s(y)  = mean log p over y's tokens, its end token included
    loss  = -log sigmoid(beta · (s(chosen) - s(rejected) - gamma_ratio)) + nll_weight · (-s(chosen))

(SimPO, arXiv 2405.14734, eq. 6; gamma_ratio is its γ/β. nll_weight 0 is the paper's loss.)
Two answers that are equally likely give softplus(beta · gamma_ratio): 5.0067 at beta 10 and ratio 0.5.
"""
import gzip
import hashlib
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from gemma import UserError, encode_answer, encode_prompt, encode_text, fetch, generate, product, read_json, shared_positions, steerable


# ---- pairs -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Pair:
    prompt: tuple       # ids, <bos> first, up to and including "<start_of_turn>model⏎"
    chosen: tuple       # ids, its end token last
    rejected: tuple
    text: str = ""      # the last user message as it was written


def read_pairs(source, split="train", limit=None):
    """Reads preference pairs as text. -> list of {"prompt", "chosen", "rejected", "at"}

    source: a .jsonl or .parquet file, a folder that holds SPLIT.jsonl (or SPLIT-*.parquet, also under data/), or a Hub data set.
    prompt is a string or a list of messages; chosen and rejected are strings, or lists of messages that end with
    the answer and may repeat the prompt (UltraFeedback's layout). `at` says file and line, for error messages.
    """
    path = Path(source).expanduser()
    if path.is_file():
        files = [path]
    else:
        patterns = [f"{split}.jsonl", f"{split}-*.parquet", f"data/{split}-*.parquet", f"data/{split}_prefs-*.parquet"]
        folder = fetch(source, patterns, kind="dataset")
        files = next((found for found in (sorted(folder.glob(p)) for p in patterns) if found), None)
        if not files:
            raise UserError(f"{source}: no pairs of the split {split!r} there ({split}.jsonl or {split}-*.parquet)")
    records = []
    for file in files:
        for at, raw in _parquet(file) if file.suffix == ".parquet" else json_lines(file):
            if limit is not None and len(records) >= limit:
                return records
            records.append(_record(raw, at))
    if not records:
        raise UserError(f"{source}: no pairs in it")
    return records


def read_held_out(source, split="test", limit=None):
    """Held-out records of what a run was trained on: its split of a folder or data set, the last tenth of a single file."""
    if not Path(source).expanduser().is_file():
        return read_pairs(source, split, limit)
    records = read_pairs(source)
    if len(records) < 2:
        raise UserError(f"{source}: one pair is too few; one has to be held out")
    return records[-max(1, len(records) // 10):][:limit]


def json_lines(path):
    """(where, object) of each line of a .jsonl or .jsonl.gz; `where` says file and line, for error messages."""
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                at = f"{path}, line {number}"
                if line.strip():
                    try:
                        yield at, json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise UserError(f"{at}: not valid JSON ({error})") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _parquet(path):
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow (pip install pyarrow), or turn the file into JSONL") from None
    number = 0
    try:
        for group in parquet.ParquetFile(path).iter_batches(256):
            for raw in group.to_pylist():
                number += 1
                yield f"{path}, row {number}", raw
    except (OSError, ValueError) as error:         # pyarrow's own errors are ValueErrors; ours pass
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a readable parquet file ({error})") from None


def _record(raw, at):
    if not isinstance(raw, dict):
        raise UserError(f"{at}: a pair is an object with prompt, chosen and rejected, this is a {type(raw).__name__}")
    out = {"at": at}
    for side in ("chosen", "rejected"):
        value = raw.get(side)
        if isinstance(value, list):                                   # messages: the answer is the last one
            messages = _messages(value, at, side)
            if not messages or messages[-1]["role"] != "assistant":
                raise UserError(f"{at}: {side} is a list that does not end with an assistant message")
            if out.setdefault("prompt", messages[:-1]) != messages[:-1]:
                raise UserError(f"{at}: chosen and rejected answer different prompts")
            value = messages[-1]["content"]
        if not isinstance(value, str):
            raise UserError(f"{at}: {side} is missing; a pair needs prompt, chosen and rejected")
        if not value.strip():
            raise UserError(f"{at}: {side} is empty; an answer needs at least one token")
        _encodable(value, at, side)
        out[side] = value
    prompt = raw.get("prompt") or raw.get("instruction")
    if prompt is None or out.get("prompt"):
        prompt = out.get("prompt") or prompt
    if not (isinstance(prompt, str) and prompt.strip() or isinstance(prompt, list) and prompt):
        raise UserError(f"{at}: prompt is missing or empty; a pair needs prompt, chosen and rejected")
    if isinstance(prompt, list):
        prompt = _messages(prompt, at, "prompt")
    else:
        _encodable(prompt, at, "prompt")
    out["prompt"] = prompt
    return out


def _messages(value, at, side):
    for m in value:
        if not (isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)):
            raise UserError(f'{at}: {side} holds a message that is not of the form {{"role": ..., "content": text}}')
        _encodable(m["content"], at, side)
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _encodable(text, at, side):
    if any("\ud800" <= c <= "\udfff" for c in text):          # half of a UTF-16 pair: JSON can write it, no text can hold it
        raise UserError(f"{at}: {side} holds a lone surrogate, which is no character")


def encode_pairs(tokenizer, records, max_length=2048):
    """Records of `read_pairs` -> (pairs, {"cut": n, "dropped": n}).

    max_length limits the prompt plus the longer answer. What is too long loses tokens from the prompt's left first
    (<bos> and at least one more token stay), then from the answers' ends. A pair whose answers are the same after
    that says nothing and is dropped.
    """
    if max_length < 3:
        raise UserError(f"max_length is {max_length}; <bos>, one token of the prompt and one of an answer need 3")
    pairs, cut, dropped = [], 0, 0
    for record in records:
        try:
            prompt = encode_prompt(tokenizer, record["prompt"])
        except UserError as error:
            raise UserError(f"{record['at']}: {error}") from None
        chosen, rejected = (encode_answer(tokenizer, record[side]) for side in ("chosen", "rejected"))
        over = len(prompt) + max(len(chosen), len(rejected)) - max_length
        if over > 0:
            cut += 1
            prompt = prompt[:1] + prompt[-max(1, len(prompt) - 1 - over):]
            chosen, rejected = chosen[:max_length - len(prompt)], rejected[:max_length - len(prompt)]
        if chosen == rejected:
            dropped += 1
            continue
        text = record["prompt"] if isinstance(record["prompt"], str) else record["prompt"][-1]["content"]
        pairs.append(Pair(tuple(prompt), tuple(chosen), tuple(rejected), text))
    return pairs, {"cut": cut, "dropped": dropped}


# ---- rows ------------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    ids: torch.Tensor        # (B,T)
    branch: torch.Tensor     # (B,T) 0 prompt, 1 chosen, 2 rejected, -1 padding
    position: torch.Tensor   # (B,T) restarts after the prompt for both answers; -1 padding
    read: torch.Tensor       # (N,) for each answer token: flat index into (B,T) of the state that predicts it
    target: torch.Tensor     # (N,) its id
    owner: torch.Tensor      # (N,) whose it is: b chosen of pair b, B + b rejected
    lengths: torch.Tensor    # (2B,) tokens of each answer

    def to(self, device):
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def mask(self):
        """(B,T,T) bool, True = visible: the picture above, before windowing."""
        q, k = self.branch[:, :, None], self.branch[:, None, :]
        earlier = self.position[:, None, :] <= self.position[:, :, None]
        return ((k == 0) | (k == q)) & (k >= 0) & earlier

    def where(self, positions):
        """(B,T) bool: the tokens that are steered; see gemma.steerable."""
        predicts = torch.zeros_like(self.branch, dtype=torch.bool)
        predicts.view(-1)[self.read] = True
        return steerable(positions, self.position, predicts)


def digest(pairs):
    """A short name of exactly these pairs, for a run's config."""
    return hashlib.sha256(repr([(p.prompt, p.chosen, p.rejected) for p in pairs]).encode()).hexdigest()[:16]


def collate(pairs, pad_id=0):
    """Pairs -> Batch, one row each, padded on the right to the longest."""
    if empty := [p for p in pairs if not (p.prompt and p.chosen and p.rejected)]:
        raise UserError(f"a pair has an empty part: {empty[0]}")
    B, T = len(pairs), max(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    ids, branch, position = (torch.full((B, T), fill) for fill in (pad_id, -1, -1))
    read, target, owner = [], [], []
    for b, pair in enumerate(pairs):
        start, n = 0, len(pair.prompt)
        for side, tokens in enumerate((pair.prompt, pair.chosen, pair.rejected)):
            stop, first = start + len(tokens), n if side else 0
            ids[b, start:stop], branch[b, start:stop] = torch.tensor(tokens), side
            position[b, start:stop] = torch.arange(first, first + len(tokens))
            if side:
                read += [b * T + n - 1] + [b * T + t for t in range(start, stop - 1)]
                target += tokens
                owner += [b + B * (side - 1)] * len(tokens)
            start = stop
    lengths = [len(p.chosen) for p in pairs] + [len(p.rejected) for p in pairs]
    return Batch(ids, branch, position, *(torch.tensor(x) for x in (read, target, owner, lengths)))


# ---- the head --------------------------------------------------------------------------------------------------------

class _TokenLogps(torch.autograd.Function):
    """log p of the targets and, in the same pass over the vocabulary, its gradient towards the states.

    With y_j = tanh(z_j / cap), z = x W^T, logits are cap · y and the chain rule gives
        d log p_t / dx = (1 - y_t²) W_t - Σ_j p_j (1 - y_j²) W_j
    The target's own term of the sum is left out and (1 - p_t) taken instead of 1: where p_t is near 1 the two would
    cancel, and in bf16 nothing of the difference would be left. The soft-cap bounds every logit by `cap`, so e^(logit - cap) is within [e^-60, 1] and needs no running maximum.
    """

    @staticmethod
    def forward(ctx, x, W, target, cap, budget):
        wide = torch.promote_types(torch.float32, x.dtype)
        logp, slope = x.new_empty(len(x), dtype=wide), None
        if ctx.needs_input_grad[0]:
            slope = x.new_empty(x.shape, dtype=wide)
        rows = 2048
        for i in range(0, len(x), rows):
            part = x[i:i + rows]
            width = max(256, budget // len(part))                # vocabulary columns a chunk: two (rows, width) temporaries
            total = part.new_zeros(len(part), dtype=wide)
            pull = part.new_zeros(part.shape, dtype=wide)
            for j in range(0, len(W), width):
                Wj = W[j:j + width]
                y = product(part, Wj.T).div_(cap).tanh_()
                e = (y - 1).mul_(cap).exp_()
                at = target[i:i + rows] - j
                here = ((at >= 0) & (at < len(Wj))).nonzero()[:, 0]
                e[here, at[here]] = 0.0
                total += e.sum(-1)                               # of all but the target
                if slope is not None:
                    e -= y.square_().mul_(e)                     # e · (1 - y²)
                    pull += product(e.to(Wj.dtype), Wj)
            own = W[target[i:i + rows]].to(wide)
            y = torch.tanh((part.to(wide) * own).sum(-1) / cap)
            rest, total = total, total + (cap * (y - 1)).exp()
            logp[i:i + rows] = cap * (y - 1) - total.log()
            if slope is not None:
                slope[i:i + rows] = ((rest * (1 - y * y))[:, None] * own - pull) / total[:, None]
        ctx.save_for_backward(slope)
        ctx.dtype = x.dtype
        return logp

    @staticmethod
    def backward(ctx, g):
        slope, = ctx.saved_tensors
        return (g[:, None] * slope).to(ctx.dtype), None, None, None, None


def token_logps(x, W, target, cap, budget=None):
    """log softmax(cap · tanh(x W^T / cap)) at the targets, float32 or better, no (N,V) tensor.

    x (N,D) states after the final norm, W (V,D) the embedding, frozen, target (N,) -> (N,).
    budget: elements of a temporary. On a CPU 16 MB of float32: what is larger than 32 MB goes back to the system
    at every free, and getting the pages again costs more than the arithmetic.
    """
    return _TokenLogps.apply(x, W, target, cap, budget or (4 if x.device.type == "cpu" else 64) * 2**20)


# ---- log-probabilities and loss ----------------------------------------------------------------------------------------

def mean_logps(model, batch, h):
    """States after the last block (B,T,D) -> s(chosen), s(rejected) (B,), mean log p a token."""
    x = model.norm(h.flatten(0, 1)[batch.read])
    logp = token_logps(x, model.embed_tokens.weight, batch.target, model.config.final_logit_softcapping)
    total = logp.new_zeros(len(batch.lengths)).index_add(0, batch.owner, logp)
    return (total / batch.lengths).chunk(2)


def response_logps(model, batch, edits=None, *, h=None, start=0):
    """s(chosen), s(rejected), each (B,), under the model with `edits`.

    h, start: the output of block start-1 where it has been computed before (`prefix`), so that only the rest runs.
    """
    h = model.embed(batch.ids) if h is None else h
    where = batch.where(shared_positions(edits)) if edits else None
    h = model.blocks(h, start, model.config.num_hidden_layers, positions=batch.position, mask=batch.mask(), where=where, edits=edits)
    return mean_logps(model, batch, h)


@torch.no_grad()
def prefix(model, batch, layer):
    """The output of block `layer` (B,T,D), frozen: it never changes and can be kept."""
    return model.blocks(model.embed(batch.ids), 0, layer + 1, positions=batch.position, mask=batch.mask())


def steered_logps(model, batch, steering, h=None):
    """Like response_logps under `steering`, with what the penalty needs in hand.

    -> s(chosen), s(rejected), l0, l1, each (B,): l0 and l1 of the effective steering, averaged over the pair's steered tokens.
    """
    layer = steering.sae.layer
    h = prefix(model, batch, layer) if h is None else h
    where = batch.where(steering.positions)
    v = steering.features(h[where])                                            # (N,F)
    row = where.nonzero()[:, 0]
    count = where.sum(-1).clamp_min(1)
    per_pair = lambda x: x.new_zeros(len(where)).index_add(0, row, x) / count      # noqa: E731
    l1, l0 = per_pair(v.abs().sum(-1)), per_pair((v != 0).sum(-1).to(v.dtype))
    h = model.blocks(steering.add(h, where, v), layer + 1, model.config.num_hidden_layers, positions=batch.position, mask=batch.mask())
    return *mean_logps(model, batch, h), l0, l1


def simpo_loss(chosen, rejected, beta=10.0, gamma_ratio=0.5, *, kind="sigmoid", label_smoothing=0.0):
    """SimPO's loss of mean log-probabilities, (B,),(B,) -> (B,), in float32 or better.

    sigmoid: -(1 - ls) log σ(z) - ls log σ(-z), hinge: max(0, 1 - z), without smoothing; z = beta · (chosen - rejected - gamma_ratio).
    """
    wide = torch.promote_types(torch.float32, chosen.dtype)
    z = beta * (chosen.to(wide) - rejected.to(wide) - gamma_ratio)
    if kind == "hinge":
        return torch.relu(1 - z)
    if kind != "sigmoid":
        raise UserError(f"loss is {kind!r}; it has to be sigmoid or hinge")
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


# ---- evaluation --------------------------------------------------------------------------------------------------------

def batches(pairs, batch_size):
    """Pairs in batches of similar length, with their indices: little padding, every pair once."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].prompt) + len(pairs[i].chosen) + len(pairs[i].rejected))
    for i in range(0, len(order), batch_size):
        part = order[i:i + batch_size]
        yield part, collate([pairs[j] for j in part])


@torch.no_grad()
def evaluate(model, pairs, steering=None, *, beta=10.0, gamma_ratio=0.5, kind="sigmoid", label_smoothing=0.0, batch_size=32, progress=None):
    """The base model (steering None) or the steered one on held-out pairs. -> dict

    loss (the SimPO term alone) and loss_se, accuracy and accuracy_se (share of pairs with s(chosen) > s(rejected)),
    margin = mean s(chosen) - s(rejected) in nats a token, without beta, and margin_se; chosen, rejected: mean s; l0, l1.
    Means over pairs, standard errors of these means, summed in float64.
    """
    s = torch.zeros(4, len(pairs), dtype=torch.float64)
    for index, batch in batches(pairs, batch_size):
        batch = batch.to(model.device)
        if steering is None:
            chosen, rejected = response_logps(model, batch)
            rows = (chosen, rejected, chosen * 0, chosen * 0)
        else:
            rows = steered_logps(model, batch, steering)
        s[:, index] = torch.stack([row.cpu().double() for row in rows])       # mps has no float64
        if progress:
            progress(len(index))
    chosen, rejected, l0, l1 = s
    loss = simpo_loss(chosen, rejected, beta, gamma_ratio, kind=kind, label_smoothing=label_smoothing)
    right, margin = (chosen > rejected).double(), chosen - rejected
    se = lambda x: (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else float("nan")      # noqa: E731
    return {"pairs": len(pairs), "loss": loss.mean().item(), "loss_se": se(loss), "accuracy": right.mean().item(), "accuracy_se": se(right),
            "margin": margin.mean().item(), "margin_se": se(margin), "chosen": chosen.mean().item(), "rejected": rejected.mean().item(),
            "l0": l0.mean().item(), "l1": l1.mean().item()}


@torch.no_grad()
def drift(model, tokenizer, edits, texts):
    """KL(steered‖base) in nats a token on texts without a question."""
    total = tokens = 0.0
    for text in texts:
        ids = torch.tensor([[model.config.bos_token_id, *encode_text(tokenizer, text)]], device=model.device)
        h = [model(ids, edits=e)[0, 1:] for e in (edits, None)]
        for a, b in zip(*(x.split(64) for x in h)):                   # a few tokens at a time: the vocabulary may be 256,000
            steered, base = (model.logits(x).log_softmax(-1) for x in (a, b))
            total, tokens = total + (steered.exp() * (steered - base)).sum().item(), tokens + len(a)
    return total / tokens


def judge_of(source):
    """What the pairs of `source` say about themselves: (meta.json or {}, the lab's world module or None).

    Only the lab's own judge is known by name; no code is taken from a data folder.
    """
    if Path(source).is_file() or not (path := fetch(source, ["meta.json"], kind="dataset") / "meta.json").is_file():
        return {}, None
    meta = read_json(path)
    if not isinstance(meta, dict) or meta.get("judge") != "tiny.world":
        return {}, None
    if not isinstance(meta.get("weights"), dict):
        raise UserError(f"{path}: weights are missing, which the lab's judge needs")
    from tiny import world
    return meta, world


def behave(model, tokenizer, questions, world, edits=None, *, temperature=0.0, seed=0, max_new_tokens=64):
    """The lab's answers to `questions`, judged. -> (rates of world.behaviour, answers as ids)"""
    ids = generate(model, [encode_prompt(tokenizer, q.text) for q in questions], max_new_tokens=max_new_tokens, edits=edits,
                   temperature=temperature, seed=seed)
    return world.behaviour(questions, [[tokenizer.id_to_token(i) for i in answer] for answer in ids]), ids
