"""Is the text still sound? Statistics of answers, the base model's perplexity of them, KL.

`health` lets any policy answer; `alarms` says what is worse than the base model's own answers.
"""
import math
import re

import torch

import simpo
from gemma import decode, encode_text, generate
from lib.blocks import number

MARKDOWN = re.compile(r"\*\*|```|^\s*(#{1,6} |[-*+] |\d+[.)] |\|)", re.M)
MEASURES = {      # in words, and the form of its number
    "parse": ("well-formed answers", ".1f", 100, "%"),
    "perplexity": ("base model’s perplexity of the answers", ".2f"),
    "repetition": ("repeated 4-grams", ".1f", 100, "%"),
    "markdown": ("answers with markdown", ".1f", 100, "%"),
    "words": ("words an answer", ".1f"),
    "kl": ("KL from the base model on neutral text, nats a token", ".3f"),
}
# How far a measure may worsen before the report turns red: shares in points, perplexity and length as
# factors (length either way), KL in nats a token.
LIMITS = {"parse": .03, "repetition": .05, "perplexity": 1.5, "words": 2.5, "kl": .5}


def text_statistics(answers):
    """Words an answer; the share of 4-grams that an answer repeats, and of answers with markdown."""
    words = grams = repeated = markdown = 0
    for answer in answers:
        said = answer.split()
        mine = list(zip(said, said[1:], said[2:], said[3:]))
        words += len(said)
        grams += len(mine)
        repeated += len(mine) - len(set(mine))
        markdown += bool(MARKDOWN.search(answer))
    n, repetition = max(1, len(answers)), repeated / max(1, grams)
    return {"words": words / n, "repetition": repetition, "markdown": markdown / n}


@torch.no_grad()
def perplexity(model, prompts, answers, batch_size=32):
    """exp of the mean -log p a token of these answers (ids) under the model without steering."""
    pairs = [simpo.Pair(tuple(p), tuple(a), tuple(a[-1:])) for p, a in zip(prompts, answers) if a]
    total = tokens = 0.0
    for _, batch in simpo.batches(pairs, batch_size):
        chosen = simpo.score(model, batch.to(model.device)).chosen
        total += chosen.sum.sum().item()
        tokens += chosen.length.sum().item()
    return math.exp(min(50.0, -total / max(1.0, tokens)))


@torch.no_grad()
def drift(model, tokenizer, policy, texts):
    """KL(policy‖base) in nats a token on texts that ask nothing: how far it has moved unasked."""
    acting, edits = policy.acting(model)
    total = tokens = 0.0
    for text in texts:
        ids = [model.config.bos_token_id, *encode_text(tokenizer, text)]
        ids = torch.tensor([ids], device=model.device)
        p = acting.logits(acting(ids, edits=edits)[0, 1:]).log_softmax(-1)
        q = model.logits(model(ids)[0, 1:]).log_softmax(-1)
        total += (p.exp() * (p - q)).sum().item()
        tokens += len(p)
    return total / tokens


def health(m, policy, pairs, options):
    """Answers of a policy (None: the base model) to the prompts of pairs, one each, sampled at T=1,
    seed 0, and whether they are sound text. -> (dict, answers as ids)"""
    acting, edits = policy.acting(m.model) if policy else (m.model, None)
    prompts = [pair.prompt for pair in pairs]
    ids = generate(acting, prompts, max_new_tokens=options.max_new_tokens, edits=edits,
                   temperature=1.0, seed=0, batch_size=options.answer_batch)
    out = text_statistics([decode(m.tokenizer, answer) for answer in ids])
    out["perplexity"] = perplexity(m.model, prompts, ids, min(options.answer_batch, 32))
    if rates := m.judge.rates([pair.text for pair in pairs], ids):
        out["parse"] = rates["parse"]
    return out, ids


def alarms(base, steered, n=math.inf):
    """What worsened, in words; [] for a healthy policy. The share of n answers that are well-formed has
    to fall by more than two standard errors, too."""
    factor = steered["words"] / max(1e-9, base["words"])
    worse = {
        "repetition": steered["repetition"] - base["repetition"],
        "perplexity": steered["perplexity"] / base["perplexity"],
        "words": max(factor, 1 / max(1e-9, factor)),
        "kl": steered.get("kl", 0),
    }
    if "parse" in base:
        variance = sum(x["parse"] * (1 - x["parse"]) + 1 / n for x in (base, steered)) / n
        fell = base["parse"] - steered["parse"]
        worse["parse"] = fell if fell > 2 * math.sqrt(variance) else 0
    out = []
    for name, (words, *form) in MEASURES.items():
        if worse.get(name, 0) > LIMITS.get(name, math.inf):
            before, after = (number(x.get(name, 0), *form) for x in (base, steered))
            out.append(f"{words}: from {before} to {after}")
    return out
