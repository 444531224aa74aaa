"""What the answers do before and after: the only instrument that lets the policy speak.

Answers to held-out prompts, sampled, of the base model and of the policy. What they choose is asked of
the judge (only the lab's knows); whether they are still sound text is instruments/health.py.
"""
import numpy as np

from gemma import decode
from instruments.health import MEASURES, alarms, drift, health
from lib.blocks import Answers, Table, Text, group_of, interval, number, percent
from lib.stats import FEWEST, number_equal, ratio

TITLE = "Behaviour and health"
QUESTION = ("What do the answers to held-out prompts do, and are they still sound text? The control is "
            "the base model, answering the same prompts.")


def measure(m, options):
    """-> prompts, alarms, examples; health of base and policy; choices: rows"""
    pairs = list({pair.prompt: pair for pair in m.pairs}.values())[:options.answers]
    base, before = health(m, None, pairs, options)
    policy, after = health(m, m.policy, pairs, options)
    policy["kl"] = drift(m.model, m.tokenizer, m.policy, m.judge.neutral(24))
    examples = []
    for i in range(0, len(pairs), max(1, len(pairs) // 4))[:4]:
        text, answers = pairs[i].text, []
        for who, ids in (("base", before[i]), ("policy", after[i])):
            marks = m.judge.mark(text, ids)
            answers.append((who, decode(m.tokenizer, ids), marks))
        examples.append((text, answers))
    return {
        "prompts": len(pairs),
        "health": {"base": base, "policy": policy},
        "alarms": alarms(base, policy, len(pairs)),
        "choices": choices(m, pairs, before, after),
        "examples": examples,
    }


def choices(m, pairs, before, after):
    """Of answers (ids) to the same prompts, for each choice that the judge knows: in how many it comes
    up, its rates, and their change with its interval, over the judge's clusters."""
    old = [m.judge.outcome(pair.text, ids) for pair, ids in zip(pairs, before)]
    new = [m.judge.outcome(pair.text, ids) for pair, ids in zip(pairs, after)]
    rows = []
    for name in ("parse", *m.judge.categories):
        asked = [i for i in range(len(pairs)) if name in old[i]]
        clusters = number_equal([m.judge.cluster(pairs[i]) for i in asked])
        if len(set(clusters)) < FEWEST:
            continue
        base = np.array([old[i][name] for i in asked])
        policy = np.array([new[i][name] for i in asked])
        rows.append({
            "name": name,
            "answers": len(asked),
            "base": base.mean(),
            "policy": policy.mean(),
            "change": ratio(policy - base, clusters=clusters),
        })
    return rows


def describe(result, about):
    blocks = [choices_table(result, about)] if result["choices"] else []
    rows = []
    for name, (words, *form) in MEASURES.items():
        values = [found.get(name) for found in result["health"].values()]
        rows.append([words, *(number(x, *form) for x in values)])
    note = "A measure that is much worse than the base model’s is an alarm."
    health = Table(["", *result["health"]], rows, note, brief=True)
    blocks += [Text("Health of the text", "heading"), health, Text("Some answers", "heading")]
    return blocks + [Answers(*example) for example in result["examples"]]


def choices_table(result, about):
    rows, plots = [], []
    for x in result["choices"]:
        name, base, change = x["name"], x["base"], x["change"]
        planted = number(about["weights"].get(name), "+g")
        rates = percent(base, ".1f"), percent(x["policy"], ".1f")
        moved = interval(change, "+.1f", 100)
        rows.append([name, planted, str(x["answers"]), *rates, moved])
        policy = {end: base + change[end] for end in ("value", "low", "high")}
        group = group_of(name, about["groups"])
        plots.append({"x": policy, "start": base, "group": group})
    head = ["choice", "planted", "answers", "base", "policy", "change, points"]
    note = (f"Of one answer to each of {result['prompts']} held-out prompts, sampled at T=1 (seed 0): "
            "those in which the choice comes up. Base model (ring, the control) → policy (dot, with the "
            "interval of the change); planted: what the preferences paid for.")
    return Table(head, rows, note, True, plots)
