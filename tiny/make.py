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
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gemma import CONTROL, Gemma, GemmaConfig, UserError  # noqa: E402
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
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
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


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    make_tokenizer(Path(sys.argv[1]))
    t = time.time()
    make_model(Path(sys.argv[1]), int(sys.argv[3]))
    print(time.time() - t)
