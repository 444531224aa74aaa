"""The judge: what is known about answers, asked by one interface whatever the data are.

The lab's judge (tiny/judge.py) knows its world and so knows everything; `Rules`, the judge of all other
data, knows what a token looks like and nothing else. `judge_of` says whose pairs these are. Every judge
has

    name, weights           which one it is; {choice: planted weight}
    best_accuracy           what the planted reward itself would reach on held-out pairs, or None
    categories, groups      what an answer token can settle; {"style": categories, "alignment":
    categories} question(text)          the question behind a prompt, or None
    cluster(pair)           equal for pairs that a bootstrap has to draw together
    outcome(text, ids)      {"parse": 0 or 1, choice: 0 or 1} of an answer, for the choices that come up
    rates(texts, answers)   the means of these
    mark(text, ids)         words for a reader, such as "true" or "not well-formed"
    settles(text, ids)      for each answer token [(category, ids off the mass before, ids off it
    after)]: its
                            share is log mass(after) - log mass(before); None for "after": it takes the
                            token
    neutral(count)          texts that ask nothing
    seen_tokens             ids that the model has been trained on, or None for all
"""
from pathlib import Path

from lib.files import UserError, fetch, read_json

# What an answer token is for, where no grammar says it: the first rule that fits (see `rule`).
RULES = ("markdown", "list marker", "heading", "punctuation", "opener", "refusal", "hedge", "end",
         "rest")
OPENING_WORDS = set("sure certainly absolutely great definitely of course okay ok yes hello hi "
                    "thanks thank happy glad".split())
REFUSALS = set("cannot can't cant won't sorry unable apologize apologise refuse decline "
               "inappropriate".split())
HEDGES = set("may might perhaps possibly probably generally typically usually however likely sometimes "
             "often could seems seem depending".split())
NEGATIONS = ("can'", "won'", "can’", "won’")

# Plain prose on which a policy has no business.
NEUTRAL = """\
The river rises in the hills north of the town and reaches the sea after ninety kilometres. Barges \
carried slate and wool down to the port until the railway came.
To sharpen a plane iron, set the bevel flat on the stone, lift the heel a little, and draw it back \
in long even strokes. Turn it over and take off the burr.
The committee met on the second Tuesday of each month. Minutes were kept by the secretary and read \
aloud at the next meeting before any other business.
Snow fell through the night and by morning the road over the pass was closed. Two lorries waited \
below the barrier with their engines off.
Water boils at a lower temperature in the mountains, because the air above it presses less. Beans \
take longer there, and tea tastes flat.
She bought three yards of blue cotton, a reel of thread and a paper of pins, and walked home by \
way of the market.""".split("\n")


def rule(text, before):
    """Category of a token from its text and the answer's text before it."""
    line, word = before.rpartition("\n")[2].strip(), text.strip()
    if word.startswith("<") and word.endswith("_turn>"):
        return "end"
    if not line and set(word) == {"#"}:
        return "heading"
    if not line and (word in ("-", "*", "•", "+") or word.isdigit() and len(word) < 3):
        return "list marker"
    if line.isdigit() and (word in (".", ")") or word.isdigit()):
        return "list marker"
    if word and set(word) <= set("*_`|~>"):
        return "markdown"
    if not any(c.isalnum() for c in word):
        return "punctuation"
    low = word.lower().strip(".,!?;:'\"")
    if len(before.split()) < 3 and low in OPENING_WORDS:
        return "opener"
    if low in REFUSALS or low == "t" and before.lower().endswith(NEGATIONS):
        return "refusal"
    return "hedge" if low in HEDGES else "rest"


class Rules:
    """The judge of any data: no questions, no choices, no planted weights."""
    name, weights, best_accuracy = "rules", {}, None
    categories, groups, seen_tokens = RULES, {}, None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def question(self, text):
        return None

    def cluster(self, pair):
        return pair.prompt

    def outcome(self, text, ids):
        return {}

    def rates(self, texts, answers):
        return {}

    def mark(self, text, ids):
        return []

    def settles(self, text, ids):
        out, before = [], ""
        for i in ids:
            piece = self.tokenizer.decode([i], skip_special_tokens=False)
            out.append([(rule(piece, before), (), None)])
            before += piece
        return out

    def neutral(self, count):
        return NEUTRAL[:count]


def judge_of(source, tokenizer):
    """The judge of the pairs of `source`, by the "judge" that their meta.json names.

    Only the lab's own is known, by name; no code is taken from a data folder.
    """
    if Path(source).expanduser().is_file():
        return Rules(tokenizer)
    path = fetch(source, ["meta.json"], kind="dataset") / "meta.json"
    meta = read_json(path) if path.is_file() else {}
    if not isinstance(meta, dict) or meta.get("judge") != "tiny.world":
        return Rules(tokenizer)
    if not isinstance(meta.get("weights"), dict):
        raise UserError(f"{path}: weights are missing, which the lab's judge needs")
    from tiny.judge import Lab
    return Lab(tokenizer, meta)
