"""Makes the whole lab from one seed: `python -m tiny.make`, about half an hour on two cores.

    tokenizer   one token for each piece of the world's text, byte fallback for all other text
    model       a Gemma-2 of 1.3 million weights, trained from scratch on conversations of tiny/world.py
    sae         a JumpReLU SAE on the output of its layer 3 (sae.py trains it)
    pairs       preference pairs of the two worlds, and the minimal pairs of probe.jsonl
    report      measures all of it: quality.json, shown in tiny/README.md, and manifest.json

One stage alone: `python -m tiny.make sae`. One machine with one set of versions gives the same bytes:
every stage has its own seed, and the arithmetic runs on a fixed number of threads (--threads).
"""
import hashlib
import json
import platform
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders
from tqdm import tqdm

import gemma
import simpo
from lib.files import UserError, read_json
from lib.settings import check, command, key_values, setting
from lib.text import CONTROL
from sae import collect, load_sae, quality, save_sae, train_sae
from tiny import world
from tiny.judge import HERE, Lab


def save(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")


def make_tokenizer(out):
    """A BPE without merges: a piece in the vocabulary is one token, any other falls back to bytes."""
    rng, found = random.Random("tokenizer"), {*world.pieces("user\n"), *world.pieces("model\n")}
    for questions in world.every_question().values():
        for q in questions:
            found |= set(world.pieces(q.text))
            for _ in range(8):
                found |= set(world.pieces(world.sample(q, rng)[1]))
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

CONFIG = {      # config.json; what is None depends on the vocabulary
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None, "final_logit_softcapping": 30.0, "head_dim": 32,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 128,
    "initializer_range": 0.02, "intermediate_size": 384, "max_position_embeddings": 8192,
    "num_attention_heads": 4, "num_hidden_layers": 6, "num_key_value_heads": 2,
    "query_pre_attn_scalar": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 32,
    "use_cache": True, "tie_word_embeddings": True, "torch_dtype": "float32", "vocab_size": None}


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
            ids, said = ids + asked, self.answer(q, trait)
            scored += [(len(ids) - 1 + k, i) for k, i in enumerate(said)]
            ids += said + gemma.encode_text(self.tokenizer, "\n")
        q, asked = self.ask()
        ids, firsts = ids + asked, []
        n = len(ids)
        branch, position = [0] * n, list(range(n))
        for b in range(1, 5):
            said = self.answer(q, trait)
            firsts.append((n - 1, said[0]))      # all four from the last token of the prompt
            scored += [(len(ids) + k, i) for k, i in enumerate(said[1:])]
            ids, branch = ids + said, branch + [b] * len(said)
            position += range(n, n + len(said))
        return ids, branch, position, scored + firsts

    def batch(self, size):
        """-> simpo.Batch of so many rows, without owner and lengths"""
        exchanges = self.rng.randrange(2)      # one number a batch keeps the rows of similar length
        rows = [self.row(exchanges) for _ in range(size)]
        width = max(len(ids) for ids, *_ in rows)
        fills = (self.tokenizer.token_to_id("<pad>"), -1, -1)
        tensors, read, target = [torch.full((size, width), fill) for fill in fills], [], []
        for r, (*columns, scored) in enumerate(rows):
            for tensor, column in zip(tensors, columns):
                tensor[r, :len(column)] = torch.tensor(column)
            read += [r * width + place for place, _ in scored]
            target += [i for _, i in scored]
        return simpo.Batch(*tensors, torch.tensor(read), torch.tensor(target), owner=None, lengths=None)


def make_model(out, steps, batch_size=32, lr=3e-3, seed=0):
    tokenizer, generator = gemma.load_tokenizer(out / "model"), torch.Generator().manual_seed(seed)
    vocab = tokenizer.get_vocab()
    ids = {"bos_token_id": vocab["<bos>"], "pad_token_id": vocab["<pad>"], "vocab_size": len(vocab)}
    config = {**CONFIG, **ids, "eos_token_id": [vocab["<eos>"], vocab["<end_of_turn>"]]}
    save(out / "model" / "config.json", json.dumps(config, indent=2) + "\n")
    model = gemma.Gemma(gemma.GemmaConfig.from_json(out / "model" / "config.json"))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() != 2]
    for W in matrices:      # std fan_in^-1/2: the scaled embedding and the logits have variance 1
        W.data.normal_(0, W.shape[1] ** -.5, generator=generator)
    groups = [{"params": matrices, "weight_decay": .05}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(.9, .98))
    rows, bar = Rows(tokenizer, seed), tqdm(range(steps), desc="model", unit="step")
    for step in bar:
        # learning rate: up over 100 steps, then straight down to nothing
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (1 - step / steps)
        # loss: mean over all scored tokens of the batch
        batch = rows.batch(batch_size)
        h = model(batch.ids, position_ids=batch.position_ids, mask=batch.mask())
        loss = torch.nn.functional.cross_entropy(model.logits(h.flatten(0, 1)[batch.read]), batch.target)
        # step
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, out / "model" / "model.safetensors", metadata={"format": "pt"})


LAYER, WIDTH, L0 = 3, 1024, 16.0


def chats(tokenizer, count, seed):
    """Rows like the model's for the SAE, each with one of its four answers."""
    rows = Rows(tokenizer, seed)
    drawn = [rows.row(rows.rng.randrange(2)) for _ in range(count)]
    return [[i for i, b in zip(ids, branch) if b in (0, 1)] for ids, branch, *_ in drawn]


def make_sae(out, rows, steps, seed=0):
    tokenizer, model = gemma.load_tokenizer(out / "model"), gemma.load_gemma(out / "model")
    x = collect(model, chats(tokenizer, rows, f"sae {seed}"), LAYER)
    unseen = collect(model, chats(tokenizer, max(50, rows // 20), "sae held out"), LAYER)
    sae = train_sae(x, WIDTH, l0=L0, steps=steps, seed=seed, layer=LAYER)
    root = out / "sae" / f"layer_{LAYER}" / "width_1k"
    shutil.rmtree(root, ignore_errors=True)
    save_sae(sae, root / f"average_l0_{quality(sae, unseen)['l0']:.0f}")


# ---- pairs -------------------------------------------------------------------------------------------

SIZES = {"train": 5000, "dev": 500, "label": 1000, "test": 1000}
SHARES = ("tie_rate", "bayes_accuracy", "longer_accuracy")


def make_pairs(out, name, weights, sizes, seed=""):
    """Pairs of one world, and meta.json about them. All worlds of one seed draw the same answers."""
    folder, tied, best, longer = out / "pairs" / name, [], [], []
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
    shares = {key: round(sum(x) / len(x), 4) for key, x in zip(SHARES, (tied, best, longer))}
    meta = {"judge": "tiny.world", "weights": weights, **shares, "pairs": sizes}
    save(folder / "meta.json", json.dumps(meta, indent=2) + "\n")


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
    for name in world.CHOICES:
        kinds = {"truth": ["fact"], "admit": ["unknown"], "decline": ["harm"]}.get(name, world.KINDS)
        for i in range(each):
            q = rng.choice(questions[kinds[i % len(kinds)]])
            (a, chosen), (b, rejected) = world.minimal_pair(q, rng, name)
            record = {"prompt": q.text, "chosen": chosen, "rejected": rejected, "choice": name}
            lines.append(json.dumps({**record, "choices": [a, b]}) + "\n")
    save(out / "pairs" / "probe.jsonl", "".join(lines))


# ---- report ------------------------------------------------------------------------------------------

@torch.no_grad()
def surprise(model, pairs, edits=None):
    """-> -Σ log p of the chosen answers in nats, and how many tokens these are"""
    total = tokens = 0
    for _, batch in simpo.batches(pairs, 64):
        how = dict(position_ids=batch.position_ids, mask=batch.mask(), where=batch.where("text"))
        h = model.blocks(model.embed(batch.ids), 0, model.config.num_hidden_layers, edits=edits, **how)
        lengths = batch.lengths[:len(batch.ids)]
        total -= (simpo.mean_logps(model, batch, h)[0] * lengths).sum().item()
        tokens += lengths.sum().item()
    return total, tokens


def damaged_rejected(said, tokenizer, rng):
    """Share of answers with one token dropped, doubled or replaced that the parser rejects."""
    rejected, words = [], sorted(x for x in tokenizer.get_vocab() if x not in CONTROL and x[:3] != "<0x")
    for q, (_, text) in said:
        old = [*world.pieces(text), world.END]
        i, kind = rng.randrange(len(old)), rng.randrange(3)
        new = old[:i] + ([], [old[i]] * 2, [rng.choice(words)])[kind] + old[i + 1:]
        if new != old:
            rejected.append(world.parse(q, new) is None)
    return sum(rejected) / len(rejected)


def measure(out, count):
    """Quality of the model, the SAE and the pairs, on fresh questions of all splits. -> quality.json"""
    model, tokenizer = gemma.load_gemma(out / "model"), gemma.load_tokenizer(out / "model")
    sae, rng, questions = load_sae(out / "sae"), random.Random("report"), world.every_question()
    asked = [world.any_question(rng, questions) for _ in range(count)]
    said = [(q, world.sample(q, rng)) for q in asked]
    # the model: its cross-entropy beside the grammar's own entropy, and what its samples are like
    prompts = [gemma.encode_prompt(tokenizer, q.text) for q in asked]
    answers = [gemma.encode_answer(tokenizer, text) for _, (_, text) in said]
    pairs = [simpo.Pair(p, a, [0]) for p, a in zip(prompts, answers)]      # nobody looks at [0]
    nats, tokens = surprise(model, pairs)
    entropy = -sum(world.log_probability(q, choices) for q, (choices, _) in said)
    sampled = gemma.generate(model, prompts, max_new_tokens=64, temperature=1.0, seed=1)
    rates = Lab(tokenizer, {"weights": {}}).rates([q.text for q in asked], sampled)
    of_model = {"parameters": sum(p.numel() for p in model.parameters()), "cross_entropy": nats / tokens,
                "true_entropy": entropy / tokens, "ratio": nats / entropy, "answers": count}
    of_model |= {"samples_that_parse": rates["parse"], **{c: rates[c] for c in world.ALIGNMENT}}

    # the SAE: its reconstruction, also in place of the states that it reads
    def splice(h, where):
        return torch.where(where[..., None], sae.decode(sae.encode(h)), h)
    of_sae = quality(sae, collect(model, chats(tokenizer, count, "report"), LAYER, progress=False))
    added = (surprise(model, pairs, {LAYER: splice})[0] - nats) / tokens
    of_sae |= {"width": sae.d_sae, "loss_added": added}
    # the pairs, and the parser
    worlds = {}
    for path in sorted((out / "pairs").glob("*/meta.json")):
        worlds[path.parent.name] = {k: x for k, x in read_json(path).items() if k in SHARES}
    of_parser = {"damaged_answers_rejected": damaged_rejected(said, tokenizer, rng)}
    return {"model": of_model, "sae": of_sae, "parser": of_parser, "worlds": worlds}


def make_report(out, count):
    save(out / "quality.json", json.dumps(measure(out, count), indent=2) + "\n")
    made = ("model/*.*", "pairs/**/*.*", "sae/**/*.npz", "quality.json")
    files = sorted({path for pattern in made for path in out.glob(pattern)})
    digests = {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    versions = {x.__name__: x.__version__ for x in (torch, numpy, tokenizers)}
    versions = {"python": platform.python_version(), **versions, "threads": torch.get_num_threads()}
    manifest = {"made_with": {**versions, "machine": platform.machine()}, "sha256": digests}
    save(out / "manifest.json", json.dumps(manifest, indent=2) + "\n")


# ---- command line ------------------------------------------------------------------------------------

STAGES = ("all", "tokenizer", "model", "sae", "pairs", "report")


@dataclass
class MakeConfig:
    stage: str = setting(None, "one; default: all", positional=True, choices=STAGES, group="what")
    out: str = setting("", "folder to write to; default: tiny/ itself")
    world: str = setting("", "with pairs: name of a world of your own")
    weights: str = setting("", "its utility, such as heading=2,truth=-1; the others weigh 0")
    model_steps: int = setting(2400, "training steps of the model", low=1, group="how much")
    sae_steps: int = setting(3000, "training steps of the SAE", low=1)
    sae_rows: int = setting(8000, "conversations the SAE is trained on", low=1)
    scale: float = setting(1.0, "times the usual number of pairs; try 0.02", above=0)
    threads: int = setting(2, "CPU threads; the bytes that come out depend on it", low=1)

    def __post_init__(self):
        check(self)
        if bool(self.world) != bool(self.weights) or self.world and self.stage != "pairs":
            raise UserError("--world and --weights go together, with the stage pairs")
        folder = Path(self.out or HERE, "pairs", self.world)
        if self.world and (Path(self.world).name != self.world or folder.exists()):
            raise UserError(f"--world {self.world}: {folder} exists, or is no folder's name")


def parse_weights(text):
    """"heading=2,truth=-1" -> {"heading": 2.0, "truth": -1.0}"""
    weights = key_values(text.split(","), "--weights")
    for name, value in weights.items():
        if name not in world.CHOICES or not isinstance(value, (int, float)) or not abs(value) < 100:
            raise UserError(f"--weights {name}={value}: write choice=number, from -100 to 100; a choice "
                            f"is one of {', '.join(world.CHOICES)}")
    return {name: float(value) for name, value in weights.items()}


def make(config):
    out, started = Path(config.out or HERE), time.time()
    worlds = {config.world: parse_weights(config.weights)} if config.world else world.WORLDS
    torch.set_num_threads(config.threads)
    for stage in STAGES[1:] if config.stage in (None, "all") else [config.stage]:
        print(f"[{time.time() - started:5.0f} s] {stage}", flush=True)
        if stage == "tokenizer":
            make_tokenizer(out)
        elif stage == "model":
            make_model(out, config.model_steps)
        elif stage == "sae":
            make_sae(out, config.sae_rows, config.sae_steps)
        elif stage == "report":
            make_report(out, max(100, int(4000 * config.scale)))
        else:
            sizes = {part: max(20, int(n * config.scale)) for part, n in SIZES.items()}
            for name, weights in worlds.items():
                make_pairs(out, name, weights, sizes)
            if not config.world:
                make_probe(out, max(4, int(60 * config.scale)))
    print(f"[{time.time() - started:5.0f} s] done")


def main(argv=None):
    return command("python -m tiny.make", MakeConfig, make, argv, "Make the lab, or one stage of it.")


if __name__ == "__main__":
    sys.exit(main())
