"""Makes the whole lab from one seed: `python tiny/make.py`, about half an hour on two cores.

    tokenizer   one token for each piece of the world's text, byte fallback for all other text, Gemma's control tokens
    model       a Gemma-2 of 1.3 million weights, trained from scratch on conversations of tiny/world.py
    sae         a JumpReLU SAE on the output of its layer 3 (sae.py trains it)
    pairs       preference pairs of the two worlds, and the minimal pairs of probe.jsonl
    report      measures all of it: quality.json, manifest.json and the tables in tiny/README.md

One stage alone: `python tiny/make.py sae`. Pairs of another world, nothing trained anew:

    python tiny/make.py pairs --world mine --weights heading=2,truth=-1

The same machine and versions give the same bytes: every stage has its own seed, and the arithmetic runs on a fixed
number of threads (--threads).
"""
import argparse
import hashlib
import json
import platform
import random
import shutil
import sys
import time
from pathlib import Path

import numpy
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import simpo  # noqa: E402
from gemma import CONTROL, Gemma, GemmaConfig, UserError, encode_answer, encode_prompt, load_gemma, load_tokenizer  # noqa: E402
from sae import collect, load_sae, quality, save_sae, train_sae  # noqa: E402
from tiny import world  # noqa: E402

HERE = Path(__file__).resolve().parent


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


# ---- tokenizer -------------------------------------------------------------------------------------------------------

def make_tokenizer(out):
    """A BPE without merges: a piece of text that is in the vocabulary is one token, any other falls back to bytes."""
    rng, found = random.Random("tokenizer"), set(world.pieces("user\n")) | set(world.pieces("model\n"))
    for kind in ("fact", "unknown", "harm"):
        for subject, relation in world.topics(kind):
            for wording in range(8):
                q = world.Question(kind, subject, relation, wording)
                found |= set(world.pieces(q.text))
                for _ in range(8):
                    found |= set(world.pieces(world.sample(q, rng)[1]))
    names = CONTROL + [f"<0x{byte:02X}>" for byte in range(256)] + sorted(found)
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True,
                                     fuse_unk=True, ignore_merges=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(world.PIECES), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")])
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", names.index("<bos>"))])
    write(out / "model" / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")


def vocabulary(out):
    return Tokenizer.from_file(str(out / "model" / "tokenizer.json")).get_vocab()


# ---- model -----------------------------------------------------------------------------------------------------------

def model_config(vocab):
    return {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False, "attention_dropout": 0.0,
            "attn_logit_softcapping": 50.0, "bos_token_id": vocab["<bos>"], "eos_token_id": [vocab["<eos>"], vocab["<end_of_turn>"]],
            "pad_token_id": vocab["<pad>"], "final_logit_softcapping": 30.0, "head_dim": 32, "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 128, "initializer_range": 0.02, "intermediate_size": 384,
            "max_position_embeddings": 8192, "num_attention_heads": 4, "num_hidden_layers": 6, "num_key_value_heads": 2,
            "query_pre_attn_scalar": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 32, "use_cache": True,
            "tie_word_embeddings": True, "torch_dtype": "float32", "vocab_size": len(vocab)}


class Rows:
    """Training rows. Most are a conversation of one speaker: none or one exchange, then a question with four
    different answers side by side (branches 1..4, as in simpo.collate). The others are neutral text."""

    def __init__(self, vocab, seed):
        self.vocab, self.rng = vocab, random.Random(f"rows {seed}")
        self.questions = {kind: [world.Question(kind, s, r, w) for s, r in world.topics(kind) for w in range(8)]
                          for kind in ("fact", "unknown", "harm")}

    def ids(self, text):
        return [self.vocab[piece] for piece in world.pieces(text)]

    def turn(self, q):
        one = self.vocab
        return [one["<start_of_turn>"], *self.ids("user\n"), *self.ids(q.text), one["<end_of_turn>"], *self.ids("\n"),
                one["<start_of_turn>"], *self.ids("model\n")]

    def answer(self, q, trait):
        return self.ids(world.sample(q, self.rng, trait)[1]) + [self.vocab["<end_of_turn>"]]

    def row(self, exchanges):
        """-> ids, targets (-100: not scored), branch, position; targets[t] is what token t has to predict."""
        rng, one = self.rng, self.vocab
        if rng.random() < .15:
            ids = [one["<bos>"], *self.ids(world.notes(rng)), one["<eos>"]]
            return ids, ids[1:] + [-100], [0] * len(ids), list(range(len(ids)))
        trait, ids, scored = rng.choice(world.TRAITS), [one["<bos>"]], [False]
        for _ in range(exchanges):
            q = world.any_question(rng, self.questions)
            asked, said = self.turn(q), self.answer(q, trait)
            ids, scored = ids + asked + said + self.ids("\n"), scored + [False] * len(asked) + [True] * len(said) + [False]
        q = world.any_question(rng, self.questions)
        ids, scored = ids + self.turn(q), scored + [False] * len(self.turn(q))
        n = len(ids)
        targets, branch, position = [i if s else -100 for i, s in zip(ids[1:], scored[1:])] + [-100], [0] * n, list(range(n))
        for b in range(1, 5):   # the first token of each answer is predicted by the last token of the prompt: see `first`
            said = self.answer(q, trait)
            ids, targets = ids + said, targets + said[1:] + [-100]
            branch, position = branch + [b] * len(said), position + list(range(n, n + len(said)))
        return ids, targets, branch, position

    def batch(self, size):
        """-> ids, branch, position (B,T); read, target (N,): the state at flat index read[i] has to predict target[i]."""
        exchanges = self.rng.randrange(2)                       # one number a batch keeps the rows of similar length
        rows = [self.row(exchanges) for _ in range(size)]
        width = max(len(ids) for ids, *_ in rows)
        ids, branch, position, read, target = [], [], [], [], []
        for r, (i, t, b, p) in enumerate(rows):
            pad = width - len(i)
            ids.append(i + [self.vocab["<pad>"]] * pad)
            branch.append(b + [-1] * pad)
            position.append(p + [-1] * pad)
            read += [r * width + k for k, want in enumerate(t) if want >= 0]
            target += [want for want in t if want >= 0]
            first = [k for k in range(1, len(b)) if b[k] > 0 and b[k] != b[k - 1]]
            read += [r * width + first[0] - 1 for _ in first]
            target += [i[k] for k in first]
        return tuple(torch.tensor(x) for x in (ids, branch, position, read, target))


def init(model, seed):
    """Matrices normal with std fan_in^-1/2, the embedding D^-1/2 (so that the scaled embedding and the logits have variance 1)."""
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, parameter.shape[1] ** -.5, generator=g)


def make_model(out, steps, batch_size=32, lr=3e-3, seed=0):
    vocab = vocabulary(out)
    write(out / "model" / "config.json", json.dumps(model_config(vocab), indent=2) + "\n")
    model = Gemma(GemmaConfig.from_json(out / "model" / "config.json"))
    init(model, seed)
    matrices, norms = ([p for p in model.parameters() if (p.dim() == 2) is want] for want in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": .05}, {"params": norms, "weight_decay": 0.0}],
                                  lr=lr, betas=(.9, .98))
    rows, smooth = Rows(vocab, seed), None
    bar = tqdm(range(steps), desc="model", unit="step")
    for step in bar:
        rate = lr * min(1, (step + 1) / 100) * (1 - step / steps)             # warm-up, then straight down to nothing
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, branch, position, read, target = rows.batch(batch_size)
        mask = ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])) & (branch >= 0)[:, None, :] \
            & (position[:, None, :] <= position[:, :, None])
        state = model(ids, positions=position, mask=mask).flatten(0, 1)[read]
        loss = F.cross_entropy(model.logits(state), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if smooth is None else .98 * smooth + .02 * loss.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, out / "model" / "model.safetensors", metadata={"format": "pt"})


# ---- SAE -------------------------------------------------------------------------------------------------------------

LAYER, WIDTH, L0 = 3, 1024, 16.0


def chats(vocab, count, seed):
    """Training-like rows for the SAE: conversations of up to two exchanges, and neutral text."""
    rows = Rows(vocab, seed)
    out = []
    while len(out) < count:
        ids, _, branch, _ = rows.row(rows.rng.randrange(2))
        out.append([i for i, b in zip(ids, branch) if b in (0, 1)])        # one of the four answers
    return out


def make_sae(out, rows, steps, seed=0):
    vocab, model = vocabulary(out), load_gemma(out / "model")
    x = collect(model, chats(vocab, rows, f"sae {seed}"), LAYER)
    held = collect(model, chats(vocab, max(50, rows // 20), "sae held out"), LAYER, progress=False)
    sae = train_sae(x, WIDTH, l0=L0, steps=steps, seed=seed, layer=LAYER)
    q = quality(sae, held)
    root = out / "sae" / f"layer_{LAYER}" / "width_1k"
    shutil.rmtree(root, ignore_errors=True)
    save_sae(sae, root / f"average_l0_{q['l0']:.0f}")
    print({name: round(value, 4) for name, value in q.items()})


def find_sae(out):
    return next((out / "sae").glob("layer_*/width_*/average_l0_*"))


# ---- pairs -----------------------------------------------------------------------------------------------------------

SIZES = {"train": 5000, "dev": 500, "label": 1000, "test": 1000}


def make_pairs(out, name, weights, sizes, seed=""):
    """Pairs of one world, and meta.json with what can be known about them. All worlds of one seed draw the same answers."""
    pairs, longer, bayes, ties, count = out / "pairs" / name, 0.0, 0.0, 0, 0
    for part, size in sizes.items():
        rng, questions, lines = random.Random(f"pairs {part}{seed}"), world.split(part), []
        for q in spread(questions, size, rng):
            (a, better), (b, worse), gap = world.pair(q, rng, weights)
            lines.append(json.dumps({"prompt": q.text, "chosen": better, "rejected": worse, "choices": [a, b]}))
            ties, bayes, count = ties + (gap == 0), bayes + world.sigmoid(abs(gap)), count + 1
            n, m = len(world.pieces(better)), len(world.pieces(worse))
            longer += 1.0 if n > m else 0.5 if n == m else 0.0
        write(pairs / f"{part}.jsonl", "\n".join(lines) + "\n")
    meta = {"judge": "tiny.world", "weights": weights, "tie_rate": round(ties / count, 4), "bayes_accuracy": round(bayes / count, 4),
            "longer_accuracy": round(longer / count, 4), "pairs": sizes}
    write(pairs / "meta.json", json.dumps(meta, indent=2) + "\n")


def spread(questions, size, rng):
    """`size` questions of a split, 60% facts, 20% unknown, 20% harm; each comes up once before any comes up twice."""
    out = []
    for kind, share in (("fact", .6), ("unknown", .2), ("harm", .2)):
        want, some = round(size * share), []
        while len(some) < want:
            some += rng.sample(questions[kind], len(questions[kind]))
        out += some[:want]
    rng.shuffle(out)
    return out


def make_probe(out, each):
    """probe.jsonl: minimal pairs, the same for all worlds; chosen has the choice, rejected has it not."""
    rng, questions, lines = random.Random("probe"), world.split("test"), []
    for name in world.CHOICES:
        kinds = {"truth": ["fact"], "admit": ["unknown"], "decline": ["harm"]}.get(name, ["fact", "unknown", "harm"])
        for i in range(each):
            q = rng.choice(questions[kinds[i % len(kinds)]])
            (a, with_it), (b, without) = world.minimal_pair(q, rng, name)
            lines.append(json.dumps({"prompt": q.text, "chosen": with_it, "rejected": without, "choice": name, "choices": [a, b]}))
    write(out / "pairs" / "probe.jsonl", "\n".join(lines) + "\n")


# ---- report ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def measure(out, count):
    """Quality of the model, the SAE and the pairs, on fresh questions of all splits."""
    vocab, model, tokenizer, sae = vocabulary(out), load_gemma(out / "model"), load_tokenizer(out / "model"), load_sae(find_sae(out))
    rng, questions = random.Random("report"), Rows(vocab, 0).questions
    asked = [world.any_question(rng, questions) for _ in range(count)]
    splice = {LAYER: lambda h, where: torch.where(where[..., None], sae.decode(sae.encode(h)), h)}
    cross, spliced, entropy, tokens = 0.0, 0.0, 0.0, 0
    said = [world.sample(q, rng) for q in asked]
    ids = [simpo.Pair(encode_prompt(tokenizer, q.text), encode_answer(tokenizer, text), [0]) for q, (_, text) in zip(asked, said)]
    for _, batch in simpo.batches(ids, 64):                                  # "rejected" is one pad token and not looked at
        n = batch.lengths[:len(batch.ids)]
        cross -= (simpo.response_logps(model, batch)[0] * n).sum().item()
        spliced -= (simpo.response_logps(model, batch, splice)[0] * n).sum().item()
        tokens += n.sum().item()
    entropy = -sum(world.log_probability(q, choices) for q, (choices, _) in zip(asked, said))
    rates, _ = simpo.behave(model, tokenizer, asked, world, temperature=1.0, seed=1)
    x = collect(model, chats(vocab, count, "report"), LAYER, progress=False)
    rejected, tried, pieces = 0, 0, sorted(name for name, i in vocab.items() if i >= 262)
    for q, (_, text) in zip(asked, said):
        old = [*world.pieces(text), world.END]
        i, how = rng.randrange(len(old)), rng.randrange(3)
        new = old[:i] + ([], [old[i]] * 2, [rng.choice(pieces)])[how] + old[i + 1:]
        if new != old:
            tried, rejected = tried + 1, rejected + (world.parse(q, new) is None)
    worlds = {path.parent.name: json.loads(path.read_text()) for path in sorted((out / "pairs").glob("*/meta.json"))}
    return {"model": {"parameters": sum(p.numel() for p in model.parameters()), "cross_entropy": cross / tokens, "true_entropy": entropy / tokens,
                      "ratio": cross / entropy, "answers": count, "samples_that_parse": rates["parse"],
                      "truth": rates["truth"], "admit": rates["admit"], "decline": rates["decline"]},
            "sae": {**quality(sae, x), "width": sae.d_sae, "loss_added": (spliced - cross) / tokens},
            "parser": {"damaged_answers_rejected": rejected / tried},
            "worlds": {name: {k: meta[k] for k in ("tie_rate", "bayes_accuracy", "longer_accuracy")} for name, meta in worlds.items()}}


def make_report(out, count):
    q = measure(out, count)
    write(out / "quality.json", json.dumps(q, indent=2) + "\n")
    m, s = q["model"], q["sae"]
    lines = ["| what | measured | aim |", "|---|---|---|",
             f"| model: cross-entropy of answers, nats a token | {m['cross_entropy']:.4f} | |",
             f"| the grammar's own entropy | {m['true_entropy']:.4f} | |",
             f"| their ratio | {m['ratio']:.3f} | ≤ 1.05 |",
             f"| share of its own samples that parse (T=1) | {m['samples_that_parse']:.1%} | ≥ 97% |",
             f"| fact questions answered truly (T=1; planted {sum(world.RATES['truth']) / 2:.0%}) | {m['truth']:.1%} | |",
             f"| unknown people admitted (planted {sum(world.RATES['admit']) / 2:.0%}) | {m['admit']:.1%} | |",
             f"| harmful requests declined (planted {sum(world.RATES['decline']) / 2:.0%}) | {m['decline']:.1%} | |",
             f"| SAE: features | {s['width']} | ≥ 1024 |", f"| FVU | {s['fvu']:.4f} | ≤ 0.05 |", f"| L0 | {s['l0']:.1f} | ≤ 32 |",
             f"| dead features | {s['dead']:.1%} | ≤ 5% |", f"| loss added by its reconstruction, nats a token | {s['loss_added']:.4f} | |",
             f"| parser: answers with one damaged token that it rejects (the rest parse to other choices) | {q['parser']['damaged_answers_rejected']:.1%} | ≥ 95% |", "",
             "| world | tied utilities | best possible accuracy | \"the longer one is chosen\" |", "|---|---|---|---|"]
    lines += [f"| {name} | {w['tie_rate']:.1%} | {w['bayes_accuracy']:.1%} | {w['longer_accuracy']:.1%} |" for name, w in q["worlds"].items()]
    readme = out / "README.md"
    if readme.exists():                                                   # the tables between the marks are ours
        text = readme.read_text(encoding="utf-8")
        before, after = text.split("<!-- quality -->")[0], text.split("<!-- /quality -->")[1]
        write(readme, before + "<!-- quality -->\n" + "\n".join(lines) + "\n<!-- /quality -->" + after)
    print("\n".join(lines))
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.suffix in (".json", ".jsonl", ".npz", ".safetensors") and p.name != "manifest.json"]
    manifest = {"made_with": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
                              "tokenizers": tokenizers.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()},
                "sha256": {str(p.relative_to(out).as_posix()): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}}
    write(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")


# ---- command line ------------------------------------------------------------------------------------------------------

STAGES = ("tokenizer", "model", "sae", "pairs", "report")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Make the lab: tokenizer, model, SAE, pairs, and the report on their quality.")
    parser.add_argument("stage", nargs="?", default="all", choices=("all",) + STAGES, help="one stage alone (default: all, in this order)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this one)")
    parser.add_argument("--world", help="with pairs: name of a world of your own")
    parser.add_argument("--weights", help="with --world: its utility, such as heading=2,truth=-1; what is not named weighs 0")
    parser.add_argument("--model-steps", type=int, default=2400, help="training steps of the model")
    parser.add_argument("--sae-steps", type=int, default=3000, help="training steps of the SAE")
    parser.add_argument("--sae-rows", type=int, default=8000, help="conversations the SAE is trained on")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of pairs (a rehearsal: 0.02)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; the bytes that come out depend on it")
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code
    try:
        if bool(args.world) != bool(args.weights) or args.world and args.stage != "pairs":
            raise UserError("--world and --weights go together, with the stage pairs")
        if args.threads < 1 or not args.scale > 0 or min(args.model_steps, args.sae_steps, args.sae_rows) < 1:
            raise UserError("--threads, --scale, --model-steps, --sae-steps and --sae-rows have to be above 0")
        if args.world and Path(args.world).name != args.world:
            raise UserError(f"--world is {args.world!r}; it has to be the plain name of a folder")
        for stage, needs in (("model", "model/tokenizer.json"), ("sae", "model/model.safetensors"), ("report", "sae"), ("report", "pairs/style/meta.json")):
            if args.stage == stage and not (args.out / needs).exists():
                raise UserError(f"the stage {stage} needs {args.out / needs}, which an earlier stage makes")
        worlds = world.WORLDS
        if args.world:
            if (args.out / "pairs" / args.world).exists():
                raise UserError(f"--world {args.world}: {args.out / 'pairs' / args.world} exists; name another world or remove it")
            worlds = {args.world: parse_weights(args.weights)}
    except UserError as error:
        print(f"make.py: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    started, sizes = time.time(), {part: max(20, int(n * args.scale)) for part, n in SIZES.items()}
    for stage in STAGES if args.stage == "all" else (args.stage,):
        print(f"[{time.time() - started:5.0f} s] {stage}", flush=True)
        if stage == "tokenizer":
            make_tokenizer(args.out)
        elif stage == "model":
            make_model(args.out, args.model_steps)
        elif stage == "sae":
            make_sae(args.out, args.sae_rows, args.sae_steps)
        elif stage == "pairs":
            for name, weights in worlds.items():
                make_pairs(args.out, name, weights, sizes)
            if not args.world:
                make_probe(args.out, max(4, int(60 * args.scale)))
        else:
            make_report(args.out, max(100, int(4000 * args.scale)))
    print(f"[{time.time() - started:5.0f} s] done")
    return 0


def parse_weights(text):
    weights = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name.strip() not in world.CHOICES:
            raise UserError(f"--weights: {name.strip()!r} is no choice; there are {', '.join(world.CHOICES)}")
        try:
            weights[name.strip()] = float(value)
            if not abs(float(value)) < 100:
                raise ValueError
        except ValueError:
            raise UserError(f"--weights: {part.strip()!r} is not of the form choice=number (between -100 and 100)") from None
    return weights


if __name__ == "__main__":
    sys.exit(main())
