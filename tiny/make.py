"""Makes the whole lab from one seed: `python -m tiny.make`, about half an hour on two cores.

    tokenizer   one token for each piece of the world's text, byte fallback for all other text
    model       a Gemma-2 of 1.3 million weights, trained from scratch on conversations of tiny/world.py
    sae         a JumpReLU SAE on the output of its layer 3 (sae.py trains it)
    pairs       preference pairs of the two worlds, and the minimal pairs of probe.jsonl
    report      measures model and SAE: quality.json, shown in tiny/README.md
    saes        only when asked for: an SAE of every layer, in runs/, for the experiments

One stage alone: `python -m tiny.make sae`. One machine with one set of versions gives the same bytes:
every stage has its own seed, and the arithmetic runs on a fixed number of threads.
"""
import json
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import gemma
import simpo
from lib.files import ROOT, UserError
from lib.settings import check, command, key_values, setting
from lib.text import CONTROL
from sae import collect, load_sae, quality, save_sae, train_sae
from tiny import world
from tiny.judge import HERE, Lab

THREADS = 2


def save(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def save_json(path, data):
    save(path, json.dumps(data, indent=2) + "\n")


def few(usual, scale, least):
    return max(least, int(usual * scale))


def make_tokenizer(out, scale=1.0):
    """A BPE without merges: a piece in the vocabulary is one token, any other falls back to bytes."""
    rng, texts = random.Random("tokenizer"), ["user\n", "model\n"]
    for questions in world.every_question().values():
        for q in questions:
            texts += [q.text, *(world.sample(q, rng)[1] for _ in range(8))]
    found = {piece for text in texts for piece in world.pieces(text)}
    names = CONTROL + [f"<0x{byte:02X}>" for byte in range(256)] + sorted(found)
    number = {name: i for i, name in enumerate(names)}
    options = dict(unk_token="<unk>", byte_fallback=True, fuse_unk=True, ignore_merges=True)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(number, [], **options))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(world.PIECES), "isolated")
    back = [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")]
    tokenizer.decoder = decoders.Sequence(back)
    tokenizer.add_special_tokens(CONTROL)
    bos = [("<bos>", number["<bos>"])]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=bos)
    save(out / "model" / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")


# ---- model -------------------------------------------------------------------------------------------

class Rows:
    """Training rows: conversations of one speaker, no or one exchange and then a question with four
    answers side by side (branches 1 to 4, as in simpo.collate); and some neutral text."""

    def __init__(self, tokenizer, seed):
        self.tokenizer, self.rng = tokenizer, random.Random(f"rows {seed}")
        self.questions = world.every_question()

    def ask(self):
        """-> a question, and the ids of the user's turn without BOS"""
        q = world.any_question(self.rng, self.questions)
        return q, gemma.encode_prompt(self.tokenizer, q.text)[1:]

    def answer(self, q, trait):
        return gemma.encode_answer(self.tokenizer, world.sample(q, self.rng, trait)[1])

    def row(self, exchanges):
        """-> ids, branch, position, and scored: [(place of a state, the id it has to predict)]"""
        rng, bos, eos = self.rng, *map(self.tokenizer.token_to_id, ("<bos>", "<eos>"))
        if rng.random() < .15:
            ids = [bos, *gemma.encode_text(self.tokenizer, world.notes(rng)), eos]
            return ids, [0] * len(ids), list(range(len(ids))), list(enumerate(ids[1:]))
        trait, ids, scored = rng.choice(world.TRAITS), [bos], []
        for _ in range(exchanges):
            q, asked = self.ask()
            said = self.answer(q, trait)
            ids += asked
            scored += enumerate(said, len(ids) - 1)
            ids += said + gemma.encode_text(self.tokenizer, "\n")
        q, asked = self.ask()
        ids += asked
        n = len(ids)
        branch, position, firsts = [0] * n, list(range(n)), []
        for b in range(1, 5):
            said = self.answer(q, trait)
            firsts.append((n - 1, said[0]))      # all four from the last token of the prompt
            scored += enumerate(said[1:], len(ids))
            ids += said
            branch += [b] * len(said)
            position += range(n, n + len(said))
        return ids, branch, position, scored + firsts

    def batch(self, size):
        """-> simpo.Batch of so many rows, without owner and lengths"""
        exchanges = self.rng.randrange(2)      # one number a batch keeps the rows of similar length
        *columns, scored = zip(*(self.row(exchanges) for _ in range(size)))
        tensors = []
        for column, fill in zip(columns, (self.tokenizer.token_to_id("<pad>"), -1, -1)):
            rows = [torch.tensor(row) for row in column]
            tensors.append(pad_sequence(rows, batch_first=True, padding_value=fill))
        width = tensors[0].shape[1]
        read = [r * width + place for r, found in enumerate(scored) for place, _ in found]
        target = [i for found in scored for _, i in found]
        return simpo.Batch(*tensors, torch.tensor(read), torch.tensor(target), owner=None, lengths=None)


def make_model(out, scale=1.0, lr=3e-3):
    """The shape is that of tiny/model/config.json, the one file there that is written by hand."""
    config = out / "model" / "config.json"
    save(config, (HERE / "model" / "config.json").read_text(encoding="utf-8"))
    model, generator = gemma.Gemma(gemma.GemmaConfig.from_json(config)), torch.Generator().manual_seed(0)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() != 2]
    for W in matrices:      # std fan_in^-1/2: the scaled embedding and the logits have variance 1
        W.data.normal_(0, W.shape[1] ** -.5, generator=generator)
    groups = [{"params": matrices, "weight_decay": .05}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(.9, .98))
    rows, steps = Rows(gemma.load_tokenizer(out / "model"), 0), few(2400, scale, 3)
    for step in tqdm(range(steps), desc="model", unit="step"):
        # learning rate: up over 100 steps, then straight down to nothing
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (1 - step / steps)
        # loss: mean over all scored tokens of the batch
        batch = rows.batch(32)
        h = model(batch.ids, position_ids=batch.position_ids, mask=batch.mask())
        loss = torch.nn.functional.cross_entropy(model.logits(h.flatten(0, 1)[batch.read]), batch.target)
        # step
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, out / "model" / "model.safetensors", metadata={"format": "pt"})


# ---- SAE ---------------------------------------------------------------------------------------------

LAYER, WIDTH, L0 = 3, 1024, 16.0


def states(out, layer, count, seed):
    """States (N,D) after a layer, of `count` rows like the model's with one of their answers each."""
    model, tokenizer = gemma.load_gemma(out / "model"), gemma.load_tokenizer(out / "model")
    rows = Rows(tokenizer, seed)
    drawn = [rows.row(rows.rng.randrange(2)) for _ in range(count)]
    chats = [[i for i, b in zip(ids, branch) if b in (0, 1)] for ids, branch, *_ in drawn]
    return collect(model, chats, layer)


def train_layer(out, root, layer, scale, **how):
    count = few(8000, scale, 60)
    x = states(out, layer, count, "sae 0")
    unseen = states(out, layer, max(50, count // 20), "sae held out")
    sae = train_sae(x, WIDTH, l0=L0, steps=few(3000, scale, 3), seed=0, layer=layer, **how)
    folder = root / f"layer_{layer}" / "width_1k"
    shutil.rmtree(folder, ignore_errors=True)
    save_sae(sae, folder / f"average_l0_{quality(sae, unseen)['l0']:.0f}")


def make_sae(out, scale=1.0):
    train_layer(out, out / "sae", LAYER, scale)


def make_saes(out, scale=1.0):
    """For experiments, in runs/: one for every layer, and a control whose decoder stays as drawn."""
    runs = ROOT / "runs" if out == HERE else out
    print("an SAE of each layer, about 20 minutes on two cores", flush=True)
    for layer in range(gemma.load_config(out / "model").num_hidden_layers):
        if not (runs / "saes" / f"layer_{layer}").exists():
            train_layer(out, runs / "saes", layer, scale)
    if not (runs / "saes_frozen").exists():
        train_layer(out, runs / "saes_frozen", LAYER, scale, learn_decoder=False)


# ---- pairs -------------------------------------------------------------------------------------------

SIZES = {"train": 5000, "dev": 500, "label": 1000, "test": 1000}


def make_pairs(out, name, weights, seed="", scale=1.0):
    """Pairs of one world, and meta.json about them. All worlds of one seed draw the same answers.
    -> their folder"""
    folder = out / "pairs" / name
    sizes = {part: few(n, scale, 20) for part, n in SIZES.items()}
    tied, best, longer = [], [], []
    for part, size in sizes.items():
        rng, lines = random.Random(f"pairs {part}{seed}"), []
        for q in spread(world.split(part), size, rng):
            (a, better), (b, worse), gap = world.pair(q, rng, weights)
            record = {"prompt": q.text, "chosen": better, "rejected": worse, "choices": [a, b]}
            lines.append(json.dumps(record) + "\n")
            more = len(world.pieces(better)) - len(world.pieces(worse))
            tied.append(gap == 0)
            best.append(world.sigmoid(abs(gap)))
            longer.append(1.0 if more > 0 else 0.5 if more == 0 else 0.0)
        save(folder / f"{part}.jsonl", "".join(lines))
    shares = {"tie_rate": tied, "bayes_accuracy": best, "longer_accuracy": longer}
    shares = {name: round(sum(x) / len(x), 4) for name, x in shares.items()}
    meta = {"judge": "tiny.world", "weights": weights, **shares, "pairs": sizes}
    save_json(folder / "meta.json", meta)
    return str(folder)


def spread(questions, size, rng):
    """`size` questions, 60% facts, 20% unknown, 20% harm; each comes once before any comes twice."""
    out = []
    for kind, share in zip(world.KINDS, (.6, .2, .2)):
        want, drawn = round(size * share), []
        while len(drawn) < want:
            drawn += rng.sample(questions[kind], len(questions[kind]))
        out += drawn[:want]
    rng.shuffle(out)
    return out


def make_probe(out, each):
    """probe.jsonl: minimal pairs, the same for all worlds; chosen has the choice, rejected does not."""
    rng, questions, lines = random.Random("probe"), world.split("test"), []
    asked = dict(zip(world.ALIGNMENT, world.KINDS))
    for name in world.CHOICES:
        kinds = [asked[name]] if name in asked else world.KINDS
        for i in range(each):
            q = rng.choice(questions[kinds[i % len(kinds)]])
            (a, chosen), (b, rejected) = world.minimal_pair(q, rng, name)
            record = {"prompt": q.text, "chosen": chosen, "rejected": rejected, "choice": name}
            lines.append(json.dumps({**record, "choices": [a, b]}) + "\n")
    save(out / "pairs" / "probe.jsonl", "".join(lines))


def make_worlds(out, scale=1.0):
    for name, weights in world.WORLDS.items():
        make_pairs(out, name, weights, scale=scale)
    make_probe(out, few(60, scale, 4))


# ---- report ------------------------------------------------------------------------------------------

@torch.no_grad()
def surprise(model, pairs, edits=None):
    """-> -Σ log p of the chosen answers in nats, and how many tokens these are"""
    total = tokens = 0
    for _, batch in simpo.batches(pairs, 64):
        how = dict(position_ids=batch.position_ids, mask=batch.mask(), edits=edits)
        h = model.blocks(model.embed(batch.ids), 0, model.config.num_hidden_layers, **how)
        lengths = batch.lengths[:len(batch.ids)]
        total -= (simpo.mean_logps(model, batch, h)[0] * lengths).sum().item()
        tokens += lengths.sum().item()
    return total, tokens


def make_report(out, scale=1.0):
    """How good the model and the SAE are, on fresh questions of all splits."""
    count = few(4000, scale, 100)
    model, tokenizer = gemma.load_gemma(out / "model"), gemma.load_tokenizer(out / "model")
    rng, questions = random.Random("report"), world.every_question()
    asked = [world.any_question(rng, questions) for _ in range(count)]
    said = [world.sample(q, rng) for q in asked]
    # the model: its cross-entropy beside the grammar's own entropy, and what its samples are like
    prompts = [gemma.encode_prompt(tokenizer, q.text) for q in asked]
    answers = [gemma.encode_answer(tokenizer, text) for _, text in said]
    pairs = [simpo.Pair(p, a, [0]) for p, a in zip(prompts, answers)]      # nobody looks at [0]
    nats, tokens = surprise(model, pairs)
    entropy = -sum(world.log_probability(q, choices) for q, (choices, _) in zip(asked, said))
    sampled = gemma.generate(model, prompts, max_new_tokens=64, temperature=1.0, seed=1)
    rates = Lab(tokenizer, {"weights": {}}).rates([q.text for q in asked], sampled)
    of_model = {"cross_entropy": nats / tokens, "true_entropy": entropy / tokens}
    of_model |= {"ratio": nats / entropy, "samples_that_parse": rates["parse"]}
    of_model |= {c: rates[c] for c in world.ALIGNMENT}
    # the SAE: its reconstruction, also in place of the states that it reads
    sae = load_sae(out / "sae")

    def splice(h, where):
        return torch.where(where[..., None], sae.decode(sae.encode(h)), h)
    added = (surprise(model, pairs, {LAYER: splice})[0] - nats) / tokens
    of_sae = quality(sae, states(out, LAYER, count, "report"))
    of_sae |= {"width": sae.d_sae, "loss_added": added}
    save_json(out / "quality.json", {"model": of_model, "sae": of_sae})


# ---- command line ------------------------------------------------------------------------------------

STAGES = {"tokenizer": make_tokenizer, "model": make_model, "sae": make_sae, "pairs": make_worlds,
          "report": make_report}
ALONE = {"saes": make_saes}                               # what is made only when it is asked for


@dataclass
class MakeConfig:
    stage: str = setting(None, "one; default: all", positional=True, group="what",
                         choices=[*STAGES, *ALONE])
    out: str = setting("", "folder to write to; default: tiny/ itself")
    world: str = setting("", "with pairs: name of a world of your own")
    weights: str = setting("", "its utility, such as heading=2,truth=-1; the others weigh 0")
    scale: float = setting(1.0, "times the usual steps and pairs; try 0.01", above=0)

    def __post_init__(self):
        check(self)
        if bool(self.world) != bool(self.weights) or self.world and self.stage != "pairs":
            raise UserError("--world and --weights go together, with the stage pairs")


def make_own_world(out, config):
    folder = out / "pairs" / config.world
    if Path(config.world).name != config.world or folder.exists():
        raise UserError(f"--world {config.world}: {folder} exists, or is no folder's name")
    weights = key_values(config.weights.split(","), "--weights")
    if not all(c in world.CHOICES and isinstance(w, (int, float)) for c, w in weights.items()):
        raise UserError(f"--weights {config.weights}: write choice=number; a choice is one of "
                        f"{', '.join(world.CHOICES)}")
    weights = {name: float(value) for name, value in weights.items()}
    make_pairs(out, config.world, weights, scale=config.scale)


def make(config):
    out = Path(config.out or HERE)
    torch.set_num_threads(THREADS)
    if config.world:
        make_own_world(out, config)
        return
    for stage in [config.stage] if config.stage else STAGES:
        print(stage, flush=True)
        (STAGES | ALONE)[stage](out, config.scale)


def main(argv=None):
    return command("python -m tiny.make", MakeConfig, make, argv, "Make the lab, or one stage of it.")


if __name__ == "__main__":
    sys.exit(main())
