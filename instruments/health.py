"""Is the text still sound? Statistics of answers, the base model's perplexity of them, KL.

`health` lets any policy answer; `alarms` says what is worse than the base model's own answers.
"""
import math
import re

import torch

import simpo
from gemma import decode, encode_text, generate
from lib.blocks import number

# How far a measure may worsen before the report turns red: shares in points, perplexity and length as
# factors (length either way), KL in nats a token.
LIMITS = {"parse": .03, "repetition": .05, "non_ascii": .02, "perplexity": 1.5, "words": 2.5, "kl": .5}
MARKDOWN = re.compile(r"\*\*|```|^\s*(#{1,6} |[-*+] |\d+[.)] |\|)", re.M)
MEASURES = {
    "parse": ("well-formed answers", ".1f", 100, "%"),
    "perplexity": ("base model’s perplexity of the answers", ".2f"),
    "repetition": ("repeated 4-grams", ".1f", 100, "%"),
    "markdown": ("answers with markdown", ".1f", 100, "%"),
    "non_ascii": ("characters beyond ASCII", ".2f", 100, "%"),
    "tokens": ("tokens an answer", ".1f"),
    "words": ("words an answer", ".1f"),
    "distinct": ("distinct words, of all words", ".3f"),
}


def text_statistics(answers):
    """Words an answer, and shares: 4-grams of words that an answer repeats, distinct words, answers with
    markdown, characters beyond ASCII."""
    words = [a.split() for a in answers]
    grams = [[tuple(w[i:i + 4]) for i in range(len(w) - 3)] for w in words]
    repeated = sum(len(g) - len(set(g)) for g in grams)
    n, total, text = max(1, len(answers)), max(1, sum(map(len, words))), "".join(answers)
    out = {"words": sum(map(len, words)) / n, "repetition": repeated / max(1, sum(map(len, grams)))}
    out["distinct"] = len({x for w in words for x in w}) / total
    out["markdown"] = sum(bool(MARKDOWN.search(a)) for a in answers) / n
    return out | {"non_ascii": sum(c > "\x7f" for c in text) / max(1, len(text))}


@torch.no_grad()
def perplexity(model, prompts, answers, batch_size=32):
    """exp of the mean -log p a token of these answers (ids) under the model without steering."""
    pairs = [simpo.Pair(tuple(p), tuple(a), tuple(a[-1:])) for p, a in zip(prompts, answers) if a]
    total = tokens = 0.0
    for _, batch in simpo.batches(pairs, batch_size):
        chosen = simpo.score(model, batch.to(model.device)).chosen
        total, tokens = total + chosen.sum.sum().item(), tokens + chosen.length.sum().item()
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
        total, tokens = total + (p.exp() * (p - q)).sum().item(), tokens + len(p)
    return total / tokens


def health(m, policy, prompts, texts, *, temperature, seed=0, max_new_tokens=64, batch_size=256):
    """Answers of a policy (None: the base model) to prompts (ids; texts: what they ask), and whether
    they are sound text. -> (dict, answers as ids)"""
    acting, edits = policy.acting(m.model) if policy else (m.model, None)
    ids = generate(acting, prompts, max_new_tokens=max_new_tokens, edits=edits, temperature=temperature,
                   seed=seed, batch_size=batch_size)
    out = text_statistics([decode(m.tokenizer, a) for a in ids])
    out["tokens"] = sum(map(len, ids)) / len(ids)
    out["perplexity"] = perplexity(m.model, prompts, ids, min(batch_size, 32))
    rates = m.judge.rates(texts, ids)
    return out | ({"parse": rates["parse"]} if rates else {}), ids


def probe_prompts(m, count):
    """A few held-out prompts (ids) and what they ask, evenly spaced: for the health of many policies."""
    first = {p.prompt: p.text for p in m.pairs}
    prompts = list(first)[::max(1, len(first) // count)][:count]
    return prompts, [first[p] for p in prompts]


def alarms(base, steered, n=math.inf):
    """What worsened, in words; [] for a healthy policy. The share of n answers that are well-formed has
    to fall by more than two standard errors, too."""
    worse = [x for x in ("repetition", "non_ascii") if steered[x] > base[x] + LIMITS[x]]
    if "parse" in base:
        noise = 2 * math.sqrt(sum(x["parse"] * (1 - x["parse"]) + 1 / n for x in (base, steered)) / n)
        if base["parse"] - steered["parse"] > max(LIMITS["parse"], noise):
            worse.insert(0, "parse")
    if steered["perplexity"] > base["perplexity"] * LIMITS["perplexity"]:
        worse.append("perplexity")
    if not 1 / LIMITS["words"] <= steered["words"] / max(1e-9, base["words"]) <= LIMITS["words"]:
        worse.append("words")
    out = []
    for name in worse:
        words, *form = MEASURES[name]
        out.append(f"{words}: from {number(base[name], *form)} to {number(steered[name], *form)}")
    if steered.get("kl", 0) > LIMITS["kl"]:
        out.append(f"KL from the base model on neutral text: {steered['kl']:.2f} nats a token")
    return out
