"""What a policy does in the lab, measured where the grammar knows the answer: rates of answers, exact probabilities, neutral text.

Everything takes `edits` as gemma.py does ({layer: edit}; None: the base model) and judges with tiny.world.
"""
import json
import random
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import simpo  # noqa: E402
from gemma import shared_positions  # noqa: E402
from tiny import world  # noqa: E402


def decisions(tokenizer, q, ids):
    """The choices an answer settles, for each of its tokens: [(name, ids of all its first tokens, ids of those that mean "yes",
    index)]. `invented` and `tool` have no yes and are left out; so is an answer that does not parse: []."""
    choices = world.parse(q, [tokenizer.id_to_token(i) for i in ids])
    if choices is None:
        return []
    out = []
    for settled in world.settles(q, choices):
        here = []
        for name, starts, index in settled:
            yes = {tokenizer.token_to_id(s) for i, s in enumerate(starts) if world.is_on(q, name, i)}
            here.append((name, sorted({tokenizer.token_to_id(s) for s in starts if s is not None}), sorted(yes), index))
        out.append(here)
    return out


@torch.no_grad()
def choice_rates(model, tokenizer, pairs, edits=None, *, batch_size=64):
    """How often the model would make each choice where it comes up in these pairs' answers. -> {choice: mean probability}

    At the token that settles a choice: the probability of the options that mean "yes", over what the empty options before it
    have left (world.settles). Nothing is sampled, so this is far less noisy than the rates of answers; but the texts
    before the token are those of the pairs and not the policy's own.
    """
    total, count = dict.fromkeys(world.CHOICES, 0.0), dict.fromkeys(world.CHOICES, 0)
    for index, batch in simpo.batches(pairs, batch_size):
        where = batch.where(shared_positions(edits)) if edits else None
        h = model.blocks(model.embed(batch.ids), 0, model.config.num_hidden_layers, positions=batch.position, mask=batch.mask(), where=where, edits=edits)
        p = model.logits(model.norm(h.flatten(0, 1)[batch.read])).softmax(-1)
        at = 0
        for pair in (pairs[i] for i in index):
            q = world.read_prompt(pair.text)
            for answer in (pair.chosen, pair.rejected):
                for row, settled in zip(p[at:at + len(answer)], decisions(tokenizer, q, answer)):
                    mass = 1.0
                    for name, starts, yes, _ in settled:
                        if name in total:
                            total[name] += row[yes].sum().item() / mass
                            count[name] += 1
                        mass -= row[starts].sum().item()         # what is left if the empty option is taken, as it is where more follow
                at += len(answer)
    return {name: total[name] / count[name] if count[name] else float("nan") for name in total}


def neutral(texts, seed=0):
    """Neutral texts: true statements, no user, no question (world.notes)."""
    rng = random.Random(f"neutral {seed}")
    return [world.notes(rng) for _ in range(texts)]


def drift(model, tokenizer, edits, *, texts=64, seed=0):
    """KL(steered‖base) in nats a token on neutral text."""
    return simpo.drift(model, tokenizer, edits, neutral(texts, seed))


def read_probe(tokenizer, path=HERE / "pairs" / "probe.jsonl"):
    """Pairs whose two answers differ in exactly one choice, the first has it. -> {choice: [Pair]}"""
    out = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        pairs, _ = simpo.encode_pairs(tokenizer, [{**record, "at": path.name}])
        out.setdefault(record["choice"], []).extend(pairs)
    return out


def shares_of_choices(tokenizer, q, ids):
    """How the log-probability of each token of an answer splits among the choices it settles (world.settles).

    -> for each token a list of (category, ids taken off the mass before it, ids taken off after it, or None: it takes the token).
    Its share is log mass(after) - log mass(before), or log p(token) - log mass(before), with mass(S) = 1 - p(S); the shares of
    a token sum to log p(token). Categories: world.CHOICES; "value", which value was invented or which tool named; and "form", what no
    choice is about, such as the full stop, and every token of an answer that does not parse.
    """
    choices = world.parse(q, [tokenizer.id_to_token(i) for i in ids]) if q else None
    if choices is None:
        return [[("form", (), None)] for _ in ids]
    out = []
    for settled in world.settles(q, choices):
        here, gone = [], ()
        for name, starts, index in settled:
            category = name if name in world.CHOICES else "value"
            if starts[index] is None:
                after = tuple(sorted({*gone, *(tokenizer.token_to_id(s) for s in starts if s is not None)}))
                here.append((category, gone, after))
                gone = after
            else:
                here.append((category, gone, None))
        if not here or here[-1][2] is not None:          # the token itself is forced, and settles nothing more
            here.append(("form", gone, None))
        out.append(here)
    return out
