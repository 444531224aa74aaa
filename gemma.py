"""Gemma-2, written out: config, forward pass, strict loading, chat format, generation.

The alphabet, the same in every module of this project:

    B rows · T tokens in a row · S tokens that can be attended to · D d_model · H query heads
    K key/value heads · C head_dim · V vocabulary · F SAE features · L steered layer

What differs from a textbook decoder (Gemma 2 report, arXiv 2408.00118, §2 and table 1; Google's code):

  * the embedding is multiplied by sqrt(D), rounded to the weights' dtype (bf16: 3584 -> 59.75, not
  59.87);
  * RMSNorm multiplies by (1 + w), in float32, and only then casts back (Llama casts first);
  * four norms a block: before AND after attention, before AND after the MLP ("sandwich");
  * attention scores pass 50*tanh(s/50), logits 30*tanh(z/30): soft-caps, the first one before the mask;
  * scores are scaled by query_pre_attn_scalar^-0.5, which is not always head_dim^-0.5 (27B: 144, not
  128);
  * even layers (0, 2, ...) see a sliding window of 4096 tokens, odd layers see everything;
  * H*C need not equal D (2B: 8*256 = 2048, D 2304);
  * the head is the embedding matrix again (tied), without the sqrt(D).

Layers are numbered as in Gemma Scope: layer L of the residual stream is the OUTPUT of block L,
which transformers calls hidden_states[L + 1].
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as nnf

from lib.files import UserError, fetch, load_tensors, read_json, short_digest, tensor_files
from lib.settings import numbers_of
from lib.text import decode, encode_text, load_tokenizer, turns     # decode: for those who look here

# What a config.json may say in words, and the only thing that Gemma-2 says.
FIXED = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "attention_bias": False,
         "rope_type": "default", "rope_scaling": None}
MM_OUT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)    # torch.mm(a, b, out_dtype=...)


@dataclass(frozen=True)
class GemmaConfig:
    vocab_size: int                          # V
    hidden_size: int                         # D
    intermediate_size: int                   # width of the MLP
    num_hidden_layers: int
    num_attention_heads: int                 # H
    num_key_value_heads: int                 # K; each serves H/K query heads in a row
    head_dim: int                            # C
    query_pre_attn_scalar: float = 256.0     # scores are multiplied by this ^ -0.5
    sliding_window: int = 4096               # keys a local layer sees, the token itself included
    attn_logit_softcapping: float = 50.0
    final_logit_softcapping: float = 30.0
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    bos_token_id: int = 2
    pad_token_id: int = 0
    eos_token_ids: tuple = (1, 107)          # generation stops at any of these

    @classmethod
    def from_json(cls, path):
        """Reads a Hugging Face config.json of model_type "gemma2", in the old and the new spelling.
        Raises UserError for Gemma 1 and 3, which have other norms and masks and no soft-caps."""
        raw = read_json(path)
        kind = raw.get("model_type") if isinstance(raw, dict) else None
        if kind != "gemma2":
            raise UserError(f"{path}: model_type is {kind!r}; only 'gemma2', Gemma-2, is read")
        rope = raw.get("rope_parameters") or {}     # newer: {"rope_theta": ..., "rope_type": "default"}
        raw["rope_type"] = rope.get("rope_type", "default")
        for name, only in FIXED.items():
            if raw.get(name, only) != only:
                raise UserError(f"{path}: {name} is {raw[name]!r}; Gemma-2 has {only!r}")
        fields = numbers_of(cls, raw, path)
        fields["rope_theta"] = float(raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0)
        eos = raw.get("eos_token_id") or 1
        eos = set(eos if isinstance(eos, list) else [eos])
        if raw.get("vocab_size") == 256_000:   # the -9b-it and -27b-it files name only <eos>, yet a turn
            eos.add(107)                       # ends with <end_of_turn>: 107 in every Gemma-2 vocabulary
        fields["eos_token_ids"] = tuple(sorted(eos))
        config = cls(**fields)
        kinds = ["sliding_attention", "full_attention"] * config.num_hidden_layers
        if raw.get("layer_types") not in (None, kinds[:config.num_hidden_layers]):
            raise UserError(f"{path}: layer_types does not alternate sliding, full, ... as Gemma-2 does")
        return config


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + w), all in float32, then back to x's dtype.  (…, D) -> (…, D)"""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x):
        y = x if x.dtype == torch.float64 else x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.to(y.dtype))).to(x.dtype)


def rope_table(position_ids, head_dim, theta, dtype):
    """cos and sin of every token's angles, in float32 until the end.  (B,T) -> two of (B,1,T,C)"""
    even = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    frequency = theta ** -(even / head_dim)
    angle = position_ids[:, None, :, None].float() * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """Half-split RoPE: dimension i is paired with i + C/2, not with i + 1.  (B,heads,T,C)"""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.H, self.K, self.C = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.scale = c.query_pre_attn_scalar ** -0.5
        self.cap = c.attn_logit_softcapping
        self.q_proj = nn.Linear(c.hidden_size, self.H * self.C, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.K * self.C, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.K * self.C, bias=False)
        self.o_proj = nn.Linear(self.H * self.C, c.hidden_size, bias=False)

    def forward(self, x, rope, bias, remember=None):
        """x (B,T,D), bias (B,T,S): 0 where a key is visible, very negative elsewhere -> (B,T,D).
        `remember` takes this call's keys and values (B,K,T,C) and gives back all of them (B,K,S,C)."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, self.C).transpose(1, 2)              # (B,H,T,C)
        k = self.k_proj(x).view(B, T, self.K, self.C).transpose(1, 2)              # (B,K,T,C)
        v = self.v_proj(x).view(B, T, self.K, self.C).transpose(1, 2)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if remember is not None:
            k, v = remember(k, v)
        # Query heads j*G .. j*G+G-1 share key head j: fold the G of them into the token axis, repeat
        # nothing.
        q = q.mul(self.scale / self.cap).reshape(B, self.K, -1, self.C)            # (B,K,G*T,C)
        # s = scale q·k, cap tanh(s / cap), + bias, softmax, values; scale / cap went into q and cap goes
        # into the sum, which saves two passes over (B,H,T,S).
        score = (q @ k.transpose(-1, -2)).view(B, self.H, T, -1)                   # s / cap
        score = score.tanh()                                                       # soft-cap, then mask
        score = torch.add(bias[:, None], score, alpha=self.cap)
        weight = score.softmax(-1, dtype=torch.promote_types(torch.float32, x.dtype)).to(x.dtype)
        out = weight.view(B, self.K, -1, k.shape[2]) @ v                           # (B,K,G*T,C)
        out = out.view(B, self.H, T, self.C).transpose(1, 2)
        return self.o_proj(out.reshape(B, T, -1))


class MLP(nn.Module):
    """down(gelu(gate x) * up x), GELU in its tanh form.  (…, D) -> (…, D)"""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nnf.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)     # AFTER attention
        self.pre_feedforward_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, rope, bias, remember=None):
        attended = self.self_attn(self.input_layernorm(x), rope, bias, remember)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma(nn.Module):
    """The names of the parameters are those of the released files, less the leading "model."."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def identity(self):
        """A digest of config and norms (in bf16): the same model, whatever its folder and dtype."""
        norms = [p.detach().bfloat16().float().cpu().numpy() for p in self.parameters() if p.dim() == 1]
        return short_digest(repr(self.config), *(norm.tobytes() for norm in norms))

    def embed(self, ids):
        """(B,T) -> (B,T,D)"""
        h = self.embed_tokens(ids)
        return h * torch.tensor(math.sqrt(self.config.hidden_size), dtype=h.dtype)     # rounded first

    def blocks(self, h, start, stop, *, position_ids=None, mask=None, where=None, edits=None,
               cache=None):
        """Blocks start..stop-1 on the residual stream.  (B,T,D) -> (B,T,D)

        position_ids  (B,T) int; negative: padding, seen by nobody. None: 0, 1, ... after the cache's
        mask          (B,T,S) bool, True = visible, before windowing, which local layers add.
                      None: every earlier token of the row and the token itself
        edits         {layer: edit}; edit(h, where) -> h replaces the residual stream after that block
        where         (B,T) bool, the tokens an edit may touch; None: what the edits' `positions` say
        cache         a Cache; keys and values of earlier calls are attended to, this call's are added
        """
        B, T, _ = h.shape
        if position_ids is None:
            before = cache.length if cache else 0
            position_ids = torch.arange(T, device=h.device) + before
        position_ids = position_ids.expand(B, T)
        # Which keys each token may see, in global and in local layers.
        keys = cache.see(position_ids) if cache else position_ids                 # (B,S) their positions
        ago = position_ids[:, :, None] - keys[:, None, :]                         # (B,T,S)
        if mask is None:
            mask = (ago >= 0) & (keys >= 0)[:, None, :]
        local = mask & (ago < self.config.sliding_window)
        # Finite, not -inf: a row of padding has nothing to see and would turn into NaN.
        hidden = torch.finfo(h.dtype).min
        bias = []
        for seen in (local, mask):
            bias.append(h.new_zeros(seen.shape).masked_fill_(~seen, hidden))
        rope = rope_table(position_ids, self.config.head_dim, self.config.rope_theta, h.dtype)
        if edits and where is None:
            where = steerable(shared_positions(edits), position_ids)
        for i in range(start, stop):
            remember = cache.remember(i) if cache else None
            h = self.layers[i](h, rope, bias[i % 2], remember)     # even layers: local, odd ones: global
            if edits and i in edits:
                h = edits[i](h, where)
        if cache and stop == self.config.num_hidden_layers:
            cache.length += T
        return h

    def forward(self, ids, **how):
        """(B,T) ids -> (B,T,D) after the final norm, for `logits`. how: see `blocks`"""
        return self.norm(self.blocks(self.embed(ids), 0, self.config.num_hidden_layers, **how))

    def logits(self, hidden):
        """(…, D) after the final norm -> (…, V), soft-capped, float32: bf16 rounds a 20 to 1/8."""
        cap = self.config.final_logit_softcapping
        z = product(hidden.flatten(0, -2), self.embed_tokens.weight.T)
        return cap * torch.tanh(z / cap).view(*hidden.shape[:-1], -1)


def product(a, b):
    """a (N,D) @ b (D,M), summed and returned in float32 where the operands are bf16."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.is_cuda and MM_OUT:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()        # the same numbers on a CPU or with an older torch, only slower


class Cache:
    """Keys and values of all layers, room for `length` tokens a row taken at once."""

    def __init__(self, model, rows, length):
        c, like = model.config, model.embed_tokens.weight
        shape = 2, rows, c.num_key_value_heads, length, c.head_dim
        self.kv = [like.new_zeros(shape) for _ in range(c.num_hidden_layers)]
        self.position_ids = torch.full((rows, length), -1, device=like.device)
        self.length = 0                                       # tokens held so far

    def see(self, position_ids):
        """Notes the positions of the next tokens. -> all so far, (B,S)"""
        stop = self.length + position_ids.shape[1]
        self.position_ids[:, self.length:stop] = position_ids
        return self.position_ids[:, :stop]

    def remember(self, layer):
        def remember(k, v):
            stop = self.length + k.shape[2]
            keys, values = self.kv[layer]
            keys[:, :, self.length:stop] = k
            values[:, :, self.length:stop] = v
            return keys[:, :, :stop], values[:, :, :stop]
        return remember

    def keep(self, rows):
        """Forgets all rows but these."""
        self.kv = [kv[:, rows] for kv in self.kv]
        self.position_ids = self.position_ids[rows]


def shared_positions(edits):
    """The one `positions` setting of these edits; "text" where an edit does not say."""
    kinds = {getattr(edit, "positions", "text") for edit in (edits or {}).values()} or {"text"}
    if len(kinds) > 1:
        raise UserError(f"edits used together must agree on `positions`, these say {sorted(kinds)}")
    return kinds.pop()


def steerable(kind, position_ids, predicts=None):
    """Which tokens an edit may touch, (B,T) bool. Position 0 is BOS; negative is padding, never touched.
    text       all but BOS: Gemma Scope SAEs never saw it, and its norm is ten times the others'
    response   those whose state predicts an answer token (`predicts`), the last prompt token included
    all        BOS too"""
    if kind != "response":
        return position_ids >= 0 if kind == "all" else position_ids > 0
    if predicts is None:
        raise UserError("positions 'response' asks which tokens predict an answer: give `where`")
    return (position_ids > 0) & predicts


# ---- generation --------------------------------------------------------------------------------------

@torch.no_grad()
def generate(model, prompts, *, max_new_tokens, edits=None, temperature=0.0, seed=0, batch_size=256):
    """Continues lists of ids. -> for each the new ids, end token included

    Greedy at temperature 0. Otherwise each prompt draws from a generator of its own, seeded by (seed,
    index of the prompt), so that neither the batch size nor the neighbours change what is sampled."""
    if not all(len(prompt) for prompt in prompts):
        raise UserError("an empty prompt cannot be continued; it needs <bos> at least")
    answers = [[] for _ in prompts]
    if max_new_tokens < 1:
        return answers
    device = model.device
    kind = shared_positions(edits)
    ends = torch.tensor(model.config.eos_token_ids, device=device)
    for first in range(0, len(prompts), batch_size):
        rows = list(range(first, min(first + batch_size, len(prompts))))   # which answer each row writes
        lengths = [len(prompts[i]) for i in rows]                          # padded on the left, so that
        width = max(lengths)                                               # all end in one column
        pad = model.config.pad_token_id
        ids = [[pad] * (width - n) + list(prompts[i]) for n, i in zip(lengths, rows)]
        ids = torch.tensor(ids, device=device)
        ahead = torch.tensor([width - n for n in lengths], device=device)
        position_ids = torch.arange(width, device=device) - ahead[:, None]
        draws = uniform(seed, rows, max_new_tokens) if temperature > 0 else None
        cache = Cache(model, len(rows), width + max_new_tokens)
        for step in range(max_new_tokens):
            # Of a prompt, only the last token predicts an answer token; afterwards, every one does.
            predicts = torch.ones_like(ids, dtype=torch.bool)
            predicts[:, :-1] = False
            where = steerable(kind, position_ids, predicts)
            h = model(ids, position_ids=position_ids, where=where, edits=edits, cache=cache)[:, -1]
            logits = model.logits(h)
            if draws is None:
                new = logits.argmax(-1)
            else:
                new = sampled(logits.cpu().double() / temperature, draws[:, step]).to(device)
            for i, token in zip(rows, new.tolist()):
                if i is not None:
                    answers[i].append(token)
            # A row that has ended writes no more; when half have, go on without them.
            rows = [None if ended else i for i, ended in zip(rows, torch.isin(new, ends).tolist())]
            alive = [r for r, i in enumerate(rows) if i is not None]
            ids, position_ids = new[:, None], position_ids[:, -1:] + 1
            if not alive:
                break
            if len(alive) <= len(rows) // 2:
                cache.keep(alive)
                rows = [rows[r] for r in alive]
                ids, position_ids = ids[alive], position_ids[alive]
                draws = draws if draws is None else draws[alive]
    return answers


def uniform(seed, prompts, count):
    """`count` numbers in [0, 1) for each prompt (its index), whatever else is sampled.  (rows,count)"""
    def numbers(i):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)
        return torch.rand(count, dtype=torch.float64, generator=generator)
    return torch.stack([numbers(i) for i in prompts])


def sampled(logits, draws):
    """Ids by the inverse of the cumulative distribution, in float64: (rows,V), (rows,) -> (rows,)"""
    heap = logits.softmax(-1).cumsum(-1)
    new = torch.searchsorted(heap, draws[:, None] * heap[:, -1:], right=True)[:, 0]
    return new.clamp_(max=heap.shape[-1] - 1)


# ---- loading --------------------------------------------------------------------------------------

def load_config(source):
    """The GemmaConfig of a local folder or a Hub repo id, without its weights."""
    return GemmaConfig.from_json(fetch(source, ["config.json"]) / "config.json")


def load_gemma(source, *, dtype=torch.float32, device="cpu"):
    """A frozen Gemma in evaluation mode, read strictly; peak memory is the weights plus 32 MB."""
    folder = fetch(source, ["config.json", "*.safetensors*", "tokenizer.json"])
    config = GemmaConfig.from_json(folder / "config.json")
    files = tensor_files(folder)
    with torch.device("meta"):                                   # shapes only
        model = Gemma(config)
    # A tied head, which some tools write as lm_head.weight, is tolerated.
    return load_tensors(model, files, "model.", dtype, device, ignore={"lm_head.weight"}).eval()


# ---- the chat format -----------------------------------------------------------------------------
#
#   <bos><start_of_turn>user⏎ PROMPT <end_of_turn>⏎<start_of_turn>model⏎ ANSWER <end_of_turn>
#
# (Gemma's model card.) Markers are put in by id; a prompt that contains "<end_of_turn>" is plain text.

def encode_prompt(tokenizer, messages):
    """Ids of messages (see lib.text.turns) up to "<start_of_turn>model⏎", exactly one BOS in front."""
    one = tokenizer.token_to_id
    newline = encode_text(tokenizer, "\n")
    ids = [one("<bos>")]
    for speaker, text in turns(messages):
        ids += [one("<start_of_turn>"), *encode_text(tokenizer, speaker), *newline]
        ids += [*encode_text(tokenizer, text.strip()), one("<end_of_turn>"), *newline]
    return ids + [one("<start_of_turn>"), *encode_text(tokenizer, "model"), *newline]


def encode_answer(tokenizer, text):
    """Ids of an answer, its <end_of_turn> included: the model has to learn, and is scored on, its
    end."""
    return encode_text(tokenizer, text.strip()) + [tokenizer.token_to_id("<end_of_turn>")]
