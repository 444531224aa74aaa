"""The lab's judge: what is known about an answer there, which is everything (lib/judge.py knows less).

Training, analysis and the instruments ask a judge, never the world behind it. Below stand measures that
only the lab has: the choices that each token decides, exact rates without sampling, the probe's pairs.
"""
import random
from pathlib import Path

import torch

import simpo
from gemma import shared_positions
from lib.files import json_lines
from tiny import world

HERE = Path(__file__).resolve().parent
ASKED = dict(zip(world.KINDS, world.ALIGNMENT))      # the alignment choice of each kind of question
# what a reader is told if it was made, and if not
WORDS = {"truth": ("true", "false"), "admit": ("admits", "invents"), "decline": ("declines", "complies")}


class Lab:
    """The judge of pairs whose meta.json says "judge": "tiny.world".

    Answers are token ids, their end token included; texts are those of the last user message.
    """

    name = "tiny.world"
    groups = {"style": world.STYLE, "alignment": world.ALIGNMENT}
    # "value": which value was invented or which tool named; "form": no choice, such as the full stop
    categories = (*world.CHOICES, "value", "form")
    question = staticmethod(world.read_prompt)

    def __init__(self, tokenizer, meta):
        self.tokenizer = tokenizer
        self.weights = {choice: meta["weights"].get(choice, 0) for choice in world.CHOICES}
        self.best_accuracy = meta.get("bayes_accuracy")      # no scorer exceeds it: labels are drawn

    def cluster(self, pair):
        """Pairs about the same thing belong together."""
        q = self.question(pair.text)
        return (q.subject, q.relation) if q else pair.prompt

    def outcome(self, text, ids):
        """{"parse": 0 or 1, choice: 0 or 1} of an answer, for the choices that come up in its question.

        A malformed answer counts as not having made any. {} for a prompt of another world.
        """
        q = self.question(text)
        if q is None:
            return {}
        choices = world.parse(q, [self.tokenizer.id_to_token(i) for i in ids])
        out = {"parse": float(choices is not None)}
        for name in (*world.STYLE, ASKED[q.kind]):
            out[name] = float(bool(choices) and bool(world.is_on(q, name, choices[name])))
        return out

    def rates(self, texts, answers):
        """{"parse": share of well-formed answers, choice: mean where it comes up, else nan}"""
        found = [self.outcome(text, ids) for text, ids in zip(texts, answers)]
        out = {}
        for name in ("parse", *world.CHOICES):
            values = [o[name] for o in found if name in o]
            out[name] = sum(values) / len(values) if values else float("nan")
        return out

    def mark(self, text, ids):
        """An answer in two words for a reader, such as ["true", "well-formed"]."""
        outcome = self.outcome(text, ids)
        if not outcome:
            return []
        if not outcome["parse"]:
            return ["malformed"]
        asked = ASKED[self.question(text).kind]
        made, not_made = WORDS[asked]
        return [made if outcome[asked] else not_made, "well-formed"]

    def settles(self, text, ids):
        """How the log-probability of each token of an answer splits among what it settles.

        -> for each token a list of (category, ids taken off the mass before it, ids taken off after it,
        or None: it takes the token). With mass(S) = 1 - p(S) its share is log mass(after) - log
        mass(before), or log p(token) - log mass(before); the shares of a token sum to log p(token). (See
        world.settles.) Every token of an answer that does not parse is "form".
        """
        q = self.question(text)
        tokens = q and settled(self.tokenizer, q, ids)
        return [shares(choices) for choices in tokens or [[]] * len(ids)]

    def neutral(self, count):
        """Texts of true statements, without a user and without a question."""
        rng = random.Random("neutral 0")
        return [world.notes(rng) for _ in range(count)]


def settled(tokenizer, q, ids):
    """world.settles of an answer with ids for the first tokens; [] if it does not parse."""
    def in_ids(name, starts, index):
        return name, [start and tokenizer.token_to_id(start) for start in starts], index
    choices = world.parse(q, [tokenizer.id_to_token(i) for i in ids])
    tokens = [] if choices is None else world.settles(q, choices)
    return [[in_ids(*choice) for choice in token] for token in tokens]


def shares(choices):
    """One token's part of Lab.settles."""
    out, off = [], ()
    for name, starts, index in choices:
        category = name if name in world.CHOICES else "value"
        if starts[index] is not None:
            return [*out, (category, off, None)]      # the token was said for this choice, its last
        after = tuple(sorted({*off, *starts} - {None}))
        out.append((category, off, after))
        off = after
    return [*out, ("form", off, None)]                # the token itself settles nothing


# ---- what only the lab can measure -------------------------------------------------------------------

def decisions(tokenizer, q, ids):
    """For each token of an answer the choices it settles; [] for an answer that does not parse.
    -> [[(choice, ids that begin any of its options, those that mean "yes", index)]]"""
    def decision(name, starts, index):
        yes = {start for i, start in enumerate(starts) if world.is_on(q, name, i)}
        return name, sorted({*starts} - {None}), sorted(yes), index
    return [[decision(*choice) for choice in token] for token in settled(tokenizer, q, ids)]


@torch.no_grad()
def choice_rates(model, tokenizer, pairs, policy=None, *, batch_size=64):
    """How often each choice would be made where it comes up in these answers. -> {choice: mean chance}

    Nothing is sampled, so this is far less noisy than rates of answers; but the texts before each token
    are those of the pairs, not the policy's own.
    """
    acting, edits = policy.acting(model) if policy else (model, {})
    chances = {name: [] for name in world.CHOICES}
    for index, batch in simpo.batches(pairs, batch_size):
        batch = batch.to(model.device)
        h = acting.blocks(
            acting.embed(batch.ids), 0, acting.config.num_hidden_layers, position_ids=batch.position_ids,
            mask=batch.mask(), where=batch.where(shared_positions(edits)), edits=edits)
        p = acting.logits(acting.norm(h.flatten(0, 1)[batch.read])).softmax(-1)
        row = 0      # of p: for each pair the tokens of its chosen answer, then of its rejected one
        for pair in (pairs[i] for i in index):
            q = world.read_prompt(pair.text)
            for answer in (pair.chosen, pair.rejected):
                for token, choices in enumerate(decisions(tokenizer, q, answer)):
                    for name, chance in chances_of_yes(p[row + token], choices):
                        chances[name].append(chance)
                row += len(answer)
    return {name: sum(x) / len(x) if x else float("nan") for name, x in chances.items()}


def chances_of_yes(p, choices):
    """(choice, chance of "yes" given what the token has settled before) from its softmax p (V,)."""
    left = 1.0      # of the probability, if the empty option is taken wherever more follows
    for name, starts, yes, _ in choices:
        if name in world.CHOICES:      # not which value was invented
            yield name, p[yes].sum().item() / left
        left -= p[starts].sum().item()


def read_probe(tokenizer, path=HERE / "pairs" / "probe.jsonl"):
    """Pairs whose two answers differ in exactly one choice; the first has it. -> {choice: [Pair]}"""
    out = {}
    for where, record in json_lines(path):
        pairs, _ = simpo.encode_pairs(tokenizer, [{**record, "at": where}])
        out.setdefault(record["choice"], []).extend(pairs)
    return out
