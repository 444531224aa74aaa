"""The judge: what is known about answers, asked by one interface whatever the data are.

The lab's judge (tiny/judge.py) knows its world and so knows everything; `Rules`, the judge of all other
data, knows what a token looks like and nothing else. Every judge has

    name, weights           which one it is; {choice: planted weight}
    best_accuracy           what the planted reward itself would reach on held-out pairs, or None
    categories, groups      what an answer token can settle; {"style": some of them, "alignment": some}
    question(text)          the question behind a prompt, or None
    cluster(pair)           equal for pairs that a bootstrap has to draw together
    outcome(text, ids)      {"parse": 0 or 1, choice: 0 or 1} of an answer, for the choices that come up
    rates(texts, answers)   the means of these
    mark(text, ids)         words for a reader, such as "true" or "malformed"
    settles(text, ids)      for each answer token [(category, ids off the mass before, ids off it
                            after)]: its share is log mass(after) - log mass(before); "after" None: the
                            token alone
    neutral(count)          texts that ask nothing
"""
import re
from pathlib import Path

from lib.files import explained, fetch, read_json

# What an answer token is for, where no grammar says it: the first pattern that fits the answer so far,
# then ¦, then the token.
RULES = {
    "end": r".*¦<.*_turn>",
    "heading": r"(.*\n)? *¦#+",
    "list marker": r"(.*\n)? *(¦[-*•+]|¦\d\d?|\d+ *¦[.)]|\d+ *¦\d+)",
    "markdown": r".*¦[*_`|~>]+",
    "punctuation": r".*¦[\W_]*",
    "opener": r"\s*(\S+\s+)?(\S+\s*)?¦\W*(sure|certainly|absolutely|great|definitely|of|course|okay|ok|"
              r"yes|hello|hi|thanks?|happy|glad)\W*",
    "refusal": r".*¦\W*(cannot|can't|cant|won't|sorry|unable|apologi[sz]e|refuse|decline|inappropriate)"
               r"\W*|.*(can|won)['’]¦\W*t\W*",
    "hedge": r".*¦\W*(may|might|perhaps|possibly|probably|generally|typically|usually|however|likely|"
             r"sometimes|often|could|seems?|depending)\W*",
    "rest": ".*",
}

# Plain prose on which a policy has no business.
NEUTRAL = [
    "The river rises in the hills north of the town and reaches the sea after ninety kilometres.",
    "To sharpen a plane iron, set the bevel flat on the stone and draw it back in long even strokes.",
    "The committee met on the second Tuesday of each month, and minutes were kept by the secretary.",
    "Snow fell through the night and by morning the road over the pass was closed to all lorries.",
    "Water boils at a lower temperature in the mountains, because the air above it presses less.",
    "She bought three yards of blue cotton, a reel of thread and a paper of pins, and walked home.",
]


def rule(text, before):
    """Category of a token from its text and the answer's text before it."""
    seen = f"{before}¦{text.strip()}"
    return next(name for name, x in RULES.items() if re.fullmatch(x, seen, re.IGNORECASE | re.DOTALL))


class Rules:
    """The judge of any data: no questions, no choices, no planted weights."""
    name, weights, best_accuracy = "rules", {}, None
    categories, groups = tuple(RULES), {}

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
    with explained(path, "not as the lab writes it"):
        meta = read_json(path) if path.is_file() else {}
        if meta.get("judge") != "tiny.world":
            return Rules(tokenizer)
        from tiny.judge import Lab
        return Lab(tokenizer, meta)
