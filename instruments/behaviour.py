"""What the answers do before and after: the only instrument that lets the policy speak.

Answers to held-out prompts, greedy and sampled, of the base model and of the policy. What they choose
is asked of the judge (only the lab's knows); whether they are still sound text is instruments/health.py.
"""
import numpy as np

from gemma import decode
from instruments.health import MEASURES, alarms, drift, health
from lib import blocks
from lib.blocks import Answers, Card, Dots, Figures, Forest, Table, Text, number, percent
from lib.stats import FEWEST, leaves_out_zero, number_equal, ratio

NAME, TITLE = "behaviour", "Behaviour and health"
QUESTION = ("What do the answers to held-out prompts do, and are they still sound text? The control is "
            "the base model, answering the same prompts.")
WHO = ("greedy base", "greedy policy", "sampled base", "sampled policy")      # sampled: at T=1, seed 0


def measure(m, options):
    """-> prompts, kl, alarms; health by WHO; examples. Of the sampled answers, by choice that the judge
    knows: rates of base and policy, their change, and the number of answers in which it comes up."""
    pairs = list({p.prompt: p for p in m.pairs}.values())[:options.answers]
    prompts, texts = [p.prompt for p in pairs], [p.text for p in pairs]
    found, ids = {}, {}
    for who in m.bar(WHO, "answers"):
        policy = m.policy if "policy" in who else None
        how = {"temperature": float("sampled" in who), "batch_size": options.answer_batch}
        how["max_new_tokens"] = options.max_new_tokens
        found[who], ids[who] = health(m, policy, prompts, texts, **how)
    kl = drift(m.model, m.tokenizer, m.policy, m.judge.neutral(24))
    out = {"prompts": len(pairs), "kl": kl, "health": found, "alarms": []}
    for kind in ("greedy", "sampled"):
        steered = found[f"{kind} policy"] | {"kl": kl}
        out["alarms"] += [f"{x} ({kind})" for x in alarms(found[f"{kind} base"], steered, len(pairs))]
    out |= change_of_choices(m, pairs, ids["sampled base"], ids["sampled policy"])
    out["examples"] = []
    for i in range(0, len(pairs), max(1, len(pairs) // 4))[:4]:
        answers = []
        for who in WHO:
            answer = ids[who][i]
            answers.append((who, decode(m.tokenizer, answer), m.judge.mark(texts[i], answer)))
        out["examples"].append((texts[i], answers))
    return out


def change_of_choices(m, pairs, before, after):
    """before, after: answers (ids) to the same prompts. Intervals: over the judge's clusters."""
    out = {"base": {}, "policy": {}, "change": {}, "answers": {}}
    old, new = ([m.judge.outcome(p.text, a) for p, a in zip(pairs, ids)] for ids in (before, after))
    for name in ("parse", *m.judge.categories):
        asked = [i for i, outcome in enumerate(old) if name in outcome]       # where the choice comes up
        clusters = number_equal([m.judge.cluster(pairs[i]) for i in asked])
        if len(set(clusters)) < FEWEST:
            continue
        base, policy = (np.array([outcome[i][name] for i in asked]) for outcome in (old, new))
        out["base"][name], out["policy"][name] = float(base.mean()), float(policy.mean())
        out["change"][name] = ratio(policy - base, clusters=clusters)
        out["answers"][name] = len(asked)
    return out


def describe(result, about):
    found, kl = result["health"], number(result["kl"])
    rows = []
    for name, (words, *form) in MEASURES.items():
        if name in found[WHO[0]]:
            rows.append([words, *(number(found[who].get(name), *form) for who in WHO)])
    rows.append(["KL from the base model on neutral text, nats", "", kl, "", kl])
    note = f"Answers to {result['prompts']} held-out prompts. A measure that is much worse is an alarm."
    health_of_text = Table(["", *WHO], rows, note, brief=True)
    examples = Card("Some answers", "", [], [Answers(*example) for example in result["examples"]])
    said = choices(result, about) if result["change"] else []
    return [*said, Text("Health of the text", "heading"), health_of_text, examples]


def choices(result, about):
    """What the answers chose, beside what was planted."""
    bars, dots, rows = [], [], []
    for name, change in result["change"].items():
        weight, group = about["weights"].get(name), blocks.group_of(name, about["groups"])
        base, policy = result["base"][name], result["policy"][name]
        words = f"{name} ({number(weight, '+g')})" if weight is not None else "well-formed"
        after = {"value": policy, "low": base + change["low"], "high": base + change["high"]}
        bars.append({"name": words, "group": group, "x": after, "start": base})
        if weight is not None:
            y, low, high = (100 * change[end] for end in ("value", "low", "high"))
            dots.append({"name": name, "group": group, "x": weight, "y": y, "low": low, "high": high})
        rates = percent(base, ".1f"), percent(policy, ".1f"), blocks.interval(change, "+.1f", 100)
        rows.append([name, number(weight, "+g"), str(result["answers"][name]), *rates])
    note = (f"Of one answer to each of {result['prompts']} held-out prompts, sampled at T=1 (seed 0): "
            "those in which the choice comes up. Tables of other prompts, or of more answers, differ in "
            "their base rates by the sampling error.")
    head = ["choice", "planted", "answers", "base", "policy", "change, points"]
    says = ("How often each choice is made: base model (ring, the control) → policy (dot, with the "
            "interval of the change). In brackets what was planted: what the preferences paid for.")
    panels = [Forest("Rate of each choice, base → policy", bars, "share of answers, %")]
    if dots:
        panels.append(Dots("Change beside what was planted", dots, "planted weight", "points"))
    table = Table(head, rows, note, brief=True)
    return [Figures(panels, [table], says), Text(moved(result["change"], about["weights"]))]


def moved(change, weights):
    """The planted choices by how they moved, in one sentence."""
    found = {}
    for name, weight in weights.items():
        x = change.get(name)
        if x and leaves_out_zero(x):
            side = "as planted" if weight * x["value"] > 0 else "against what was planted"
            words = f"{name} ({number(x['value'], '+.0f', 100)})"
            found.setdefault(side if weight else "though nothing was planted", []).append(words)
        elif x and weight:
            found.setdefault("planted, but not clear of 0", []).append(name)
    said = [f"{kind}: {', '.join(names)}" for kind, names in found.items()]
    return f"Rates that moved, in points, {'; '.join(said) or 'none'}."
