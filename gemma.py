"""Gemma-2, written out: config, forward pass, strict loading, chat format, generation.

The alphabet, the same in every module of this project:

    B rows · T tokens in a row · S tokens that can be attended to · D d_model · H query heads
    K key/value heads · C head_dim · V vocabulary · F SAE features · L steered layer

What differs from a textbook decoder, each with its number (Gemma 2 report, arXiv 2408.00118, table 1
and section 2; Google's released code):

  * the embedding is multiplied by sqrt(D), rounded to the weights' dtype (bf16: 3584 -> 59.75, not 59.87);
  * RMSNorm multiplies by (1 + w), in float32, and only then casts back (Llama casts first);
  * four norms a block: before AND after attention, before AND after the MLP ("sandwich");
  * attention scores pass 50*tanh(s/50), logits 30*tanh(z/30): soft-caps, the first one before the mask;
  * scores are scaled by query_pre_attn_scalar^-0.5, which is not always head_dim^-0.5 (27B: 144, not 128);
  * even layers (0, 2, ...) see a sliding window of 4096 tokens, odd layers see everything;
  * H*C need not equal D (2B: 8*256 = 2048, D 2304);
  * the head is the embedding matrix again (tied), without the sqrt(D).

Layers are numbered as in Gemma Scope: layer L of the residual stream is the OUTPUT of block L,
which transformers calls hidden_states[L + 1].
"""
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn


HERE = Path(__file__).resolve().parent
TORCH = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])


class UserError(ValueError):
    """A mistake of the user's, told in one sentence; the scripts print it and exit with code 2."""


@dataclass(frozen=True)
class GemmaConfig:
    vocab_size: int                      # V
    hidden_size: int                     # D
    intermediate_size: int               # width of the MLP
    num_hidden_layers: int
    num_attention_heads: int             # H
    num_key_value_heads: int             # K; each serves H/K query heads in a row
    head_dim: int                        # C
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

        Raises UserError for another architecture: Gemma 1 and 3 have other norms, masks and no soft-caps.
        """
        raw = read_json(path)
        if not isinstance(raw, dict) or raw.get("model_type") != "gemma2":
            raw = raw if isinstance(raw, dict) else {}
            raise UserError(f"{path}: model_type is {raw.get('model_type')!r}; this is a Gemma-2 implementation and reads only 'gemma2'")
        rope = raw.get("rope_parameters") or {}      # newer files: {"rope_theta": ..., "rope_type": "default"}
        if rope.get("rope_type", "default") != "default" or raw.get("rope_scaling"):
            raise UserError(f"{path}: Gemma-2 has no RoPE scaling, this file asks for {raw.get('rope_scaling') or rope}")
        for name, only in (("hidden_activation", "gelu_pytorch_tanh"), ("tie_word_embeddings", True), ("attention_bias", False)):
            if raw.get(name, only) != only:
                raise UserError(f"{path}: {name} is {raw[name]!r}; Gemma-2 has {only!r}")
        fields = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        if bad := [name for name, value in fields.items() if isinstance(value, bool) or not isinstance(value, (int, float))]:
            raise UserError(f"{path}: {bad[0]} is {fields[bad[0]]!r}; a number is needed")
        fields["rope_theta"] = float(raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0)
        eos = raw.get("eos_token_id") or 1
        eos = set(eos if isinstance(eos, list) else [eos])
        if raw.get("vocab_size") == 256_000:   # the -9b-it and -27b-it files name only <eos>, yet a turn ends
            eos.add(107)                       # with <end_of_turn>, which is 107 in every Gemma-2 vocabulary
        fields["eos_token_ids"] = tuple(sorted(eos))
        try:
            config = cls(**fields)
        except TypeError as error:
            raise UserError(f"{path}: not a complete Gemma-2 config ({error})") from None
        kinds = raw.get("layer_types")
        if kinds and kinds != [("sliding_attention", "full_attention")[i % 2] for i in range(config.num_hidden_layers)]:
            raise UserError(f"{path}: layer_types does not alternate sliding, full, sliding, ... as Gemma-2 does")
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


def rope_table(positions, head_dim, theta, dtype):
    """cos and sin of every token's angles, in float32 until the end.  (B,T) -> two of (B,1,T,C)"""
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[:, None, :, None].float() * frequency
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
        self.scale, self.cap = c.query_pre_attn_scalar ** -0.5, c.attn_logit_softcapping
        self.q_proj = nn.Linear(c.hidden_size, self.H * self.C, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.K * self.C, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.K * self.C, bias=False)
        self.o_proj = nn.Linear(self.H * self.C, c.hidden_size, bias=False)

    def forward(self, x, rope, bias, remember=None):
        """x (B,T,D), bias (B,T,S): 0 where a key is visible, very negative elsewhere -> (B,T,D).

        `remember` takes this call's keys and values (B,K,T,C) and gives back all of them (B,K,S,C).
        """
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, self.H, self.C).transpose(1, 2), *rope)
        k = rotate(self.k_proj(x).view(B, T, self.K, self.C).transpose(1, 2), *rope)
        v = self.v_proj(x).view(B, T, self.K, self.C).transpose(1, 2)
        if remember is not None:
            k, v = remember(k, v)
        # Query heads j*G .. j*G+G-1 share key head j: fold the G of them into the token axis, repeat nothing.
        q = (q * (self.scale / self.cap)).reshape(B, self.K, -1, self.C)           # (B,K,G*T,C)
        score = torch.tanh(q @ k.transpose(-1, -2)).view(B, self.H, T, -1)         # (B,H,T,S)
        score = torch.add(bias[:, None], score, alpha=self.cap)                    # soft-cap first, then the mask
        weight = score.softmax(-1, dtype=torch.promote_types(torch.float32, x.dtype)).to(x.dtype)
        out = weight.view(B, self.K, -1, k.shape[2]) @ v                           # (B,K,G*T,C)
        return self.o_proj(out.view(B, self.H, T, self.C).transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """down(gelu(gate x) * up x), GELU in its tanh form.  (…, D) -> (…, D)"""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)   # AFTER attention, unlike Llama's
        self.pre_feedforward_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, rope, bias, remember=None):
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rope, bias, remember))
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
        """A short digest of the config and the norms' weights in bf16: the same model, whatever its folder and dtype."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name, p in self.named_parameters():
            if p.dim() == 1:
                digest.update(p.detach().bfloat16().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def embed(self, ids):
        """(B,T) -> (B,T,D)"""
        h = self.embed_tokens(ids)
        return h * torch.tensor(math.sqrt(self.config.hidden_size), dtype=h.dtype)   # rounded to h's dtype first

    def blocks(self, h, start, stop, *, positions=None, mask=None, where=None, edits=None, cache=None):
        """Blocks start..stop-1 on the residual stream.  (B,T,D) -> (B,T,D)

        positions  (B,T) int; negative = padding, seen by nobody. None: 0, 1, 2, ... (after what the cache holds)
        mask       (B,T,S) bool, True = visible, BEFORE windowing: local layers add the window from the positions.
                   None: every earlier token of the row and the token itself
        edits      {layer: edit}; edit(h, where) -> h replaces the residual stream after that block
        where      (B,T) bool, the tokens an edit may touch; None: what the edits' `positions` say (see `steerable`)
        cache      a Cache; keys and values of earlier calls are attended to, this call's are added
        """
        B, T, _ = h.shape
        if positions is None:
            positions = torch.arange(T, device=h.device) + (cache.length if cache else 0)
        positions = positions.expand(B, T)
        seen = cache.see(positions) if cache else positions                       # (B,S) positions of all the keys
        ago = positions[:, :, None] - seen[:, None, :]                            # (B,T,S)
        if mask is None:
            mask = (ago >= 0) & (seen >= 0)[:, None, :]
        if edits and where is None:
            where = steerable(shared_positions(edits), positions)
        # Finite, not -inf: a row of padding has nothing to see and would turn into NaN.
        hidden = torch.finfo(h.dtype).min
        bias = [h.new_zeros(visible.shape).masked_fill_(~visible, hidden) for visible in (mask & (ago < self.config.sliding_window), mask)]
        rope = rope_table(positions, self.config.head_dim, self.config.rope_theta, h.dtype)
        for i in range(start, stop):
            # even layers are local, odd ones global
            h = self.layers[i](h, rope, bias[i % 2], cache.remember(i) if cache else None)
            if edits and i in edits:
                h = edits[i](h, where)
        if cache and stop == self.config.num_hidden_layers:
            cache.length += T
        return h

    def forward(self, ids, *, positions=None, mask=None, where=None, edits=None, cache=None):
        """(B,T) ids -> (B,T,D) after the final norm; `logits` turns those into logits. Arguments as in `blocks`."""
        h = self.blocks(self.embed(ids), 0, self.config.num_hidden_layers,
                        positions=positions, mask=mask, where=where, edits=edits, cache=cache)
        return self.norm(h)

    def logits(self, hidden):
        """(…, D) after the final norm -> (…, V), soft-capped at ±30, float32 or better: bf16 rounds a logit of 20 to 1/8."""
        cap = self.config.final_logit_softcapping
        z = product(hidden.flatten(0, -2), self.embed_tokens.weight.T)
        return cap * torch.tanh(z / cap).view(*hidden.shape[:-1], -1)


def product(a, b):
    """a (N,D) @ b (D,M), summed and returned in float32 where the operands are bf16."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.is_cuda and TORCH >= (2, 8):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()        # the same numbers on a CPU or with an older torch, only slower


class Cache:
    """Keys and values of all layers, room for `length` tokens a row taken at once."""

    def __init__(self, model, rows, length):
        c, like = model.config, model.embed_tokens.weight
        self.kv = [like.new_zeros(2, rows, c.num_key_value_heads, length, c.head_dim) for _ in range(c.num_hidden_layers)]
        self.positions = torch.full((rows, length), -1, device=like.device)
        self.length = 0                                       # tokens held so far

    def see(self, positions):
        """Notes the positions of the tokens about to be added; all positions (B,S) so far."""
        stop = self.length + positions.shape[1]
        self.positions[:, self.length:stop] = positions
        return self.positions[:, :stop]

    def remember(self, layer):
        def remember(k, v):
            stop = self.length + k.shape[2]
            self.kv[layer][0, :, :, self.length:stop], self.kv[layer][1, :, :, self.length:stop] = k, v
            return self.kv[layer][0, :, :, :stop], self.kv[layer][1, :, :, :stop]
        return remember

    def keep(self, rows):
        """Forgets all rows but these."""
        self.kv, self.positions = [kv[:, rows] for kv in self.kv], self.positions[rows]


def shared_positions(edits):
    """The one `positions` setting of these edits ("text" where an edit does not say; see fsrl.Steering)."""
    kinds = {getattr(edit, "positions", "text") for edit in (edits or {}).values()} or {"text"}
    if len(kinds) > 1:
        raise UserError(f"edits used together must agree on `positions`, these say {sorted(kinds)}")
    return kinds.pop()


def steerable(kind, positions, predicts=None):
    """Which tokens an edit may touch, (B,T) bool, from their positions: 0 is BOS, negative is padding, never touched.

    "text": all but BOS. Gemma Scope SAEs never saw it, and its norm is ten times the others' ·
    "response": those of the text whose state predicts an answer token (`predicts`), the last prompt token included ·
    "all": BOS too
    """
    if kind == "response":
        if predicts is None:
            raise UserError("positions 'response' needs to be told which tokens predict an answer: give `where`")
        return (positions > 0) & predicts
    return positions >= 0 if kind == "all" else positions > 0


@torch.no_grad()
def generate(model, prompts, *, max_new_tokens, edits=None, temperature=0.0, seed=0, batch_size=256):
    """Continues one list of ids, or a list of them: the same kind out, new ids only, end token included.

    Greedy at temperature 0. Otherwise each prompt draws from a generator of its own, seeded by (seed, index
    of the prompt), so that neither the batch size nor the neighbours change what is sampled.
    Edits see prompt and new tokens alike, as far as their `positions` allow.
    """
    if prompts and isinstance(prompts[0], int):
        return generate(model, [prompts], max_new_tokens=max_new_tokens, edits=edits, temperature=temperature, seed=seed)[0]
    if not all(len(prompt) for prompt in prompts):
        raise UserError("an empty prompt cannot be continued; it needs <bos> at least")
    answers = [[] for _ in prompts]
    if max_new_tokens < 1:
        return answers
    kind, stop, device = shared_positions(edits), torch.tensor(model.config.eos_token_ids, device=model.device), model.device
    for first in range(0, len(prompts), batch_size):
        rows = list(range(first, min(first + batch_size, len(prompts))))          # which answer a row writes
        width = max(len(prompts[i]) for i in rows)
        lengths = torch.tensor([len(prompts[i]) for i in rows], device=device)
        pad = model.config.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + list(prompts[i]) for i in rows], device=device)   # left padding:
        positions = torch.arange(width, device=device) - (width - lengths[:, None])     # all rows end in the same column
        draws = None
        if temperature > 0:
            draws = torch.stack([torch.rand(max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(
                (seed * 1_000_003 + i) % 2**63)) for i in rows])                       # on the CPU: mps knows no float64
        cache = Cache(model, len(rows), width + max_new_tokens)
        for step in range(max_new_tokens):
            predicts = torch.ones_like(ids, dtype=torch.bool)
            if step == 0:
                predicts[:, :-1] = False                                            # of a prompt, only the last token does
            where = steerable(kind, positions, predicts)
            h = model(ids, positions=positions, where=where, edits=edits, cache=cache)[:, -1]
            logits = model.logits(h)
            if draws is None:
                new = logits.argmax(-1)
            else:   # the inverse of the cumulative distribution, at one uniform number a token
                heap = (logits.cpu().double() / temperature).softmax(-1).cumsum(-1)
                new = torch.searchsorted(heap, draws[:, step:step + 1] * heap[:, -1:], right=True)[:, 0]
                new = new.clamp_(max=heap.shape[-1] - 1).to(device)
            for i, token in zip(rows, new.tolist()):
                if i is not None:
                    answers[i].append(token)
            done = torch.isin(new, stop).tolist()
            rows = [None if ended else i for i, ended in zip(rows, done)]
            alive = [r for r, i in enumerate(rows) if i is not None]
            ids, positions = new[:, None], positions[:, -1:] + 1
            if not alive:
                break
            if len(alive) <= len(rows) // 2:                                        # half have ended: go on without them
                cache.keep(alive)
                rows, ids, positions = [rows[r] for r in alive], ids[alive], positions[alive]
                draws = draws if draws is None else draws[alive]
    return answers


# ---- files -------------------------------------------------------------------------------------------------------

def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {'no such file' if isinstance(error, FileNotFoundError) else f'cannot be read ({error})'}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def atomically(path, write):
    """write(temporary path), then rename: a file is there whole or not at all."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, data, indent=2):
    """The other half of read_json."""
    atomically(path, lambda temporary: temporary.write_text(json.dumps(data, indent=indent) + "\n", encoding="utf-8"))


def fetch(source, patterns, *, kind="model"):
    """A local folder for `source`: the folder itself, or what the Hub repo of that name holds under `patterns`.

    `kind` is "model" or "dataset". Raises UserError in one sentence for a folder that is not there, a repo that
    does not exist, a gated one, and a machine without network.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not path.is_absolute() and (HERE / path).is_dir():      # tiny/... from wherever the scripts are started
        return HERE / path
    if path.exists():
        raise UserError(f"{source} is a file; a folder or a Hub repo id is needed here")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise UserError(f"{source}: no such folder, and not a Hub repo id of the form name/repo")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{source}"
    try:
        return Path(snapshot_download(str(source), repo_type=kind, allow_patterns=patterns))
    except GatedRepoError:      # a subclass of RepositoryNotFoundError: it has to come first
        raise UserError(f"{source} is gated: accept its licence on {page}, "
                        "make a token on https://huggingface.co/settings/tokens, then run `hf auth login` (or set HF_TOKEN)") from None
    except RepositoryNotFoundError:
        raise UserError(f"{source}: no such folder here and no such {kind} on the Hub (or it is private: run `hf auth login`)") from None
    except Exception as error:      # no network, a proxy, a malformed name: the hub's errors have no common class
        raise UserError(f"{source}: no such folder here, and the Hub could not be asked "
                        f"({' '.join((str(error) or type(error).__name__).split())[:200]})") from None


def copy_tensor(path, name, out):
    """Reads one tensor of a safetensors file into `out` (any dtype, any device), 32 MB at a time.

    The file is opened anew for every piece: what has been read of a memory-mapped file counts as held until it is closed.
    """
    with safe_open(path, "pt") as file:
        shape = file.get_slice(name).get_shape()
        dtype = file.get_slice(name).get_dtype()
    if tuple(shape) != tuple(out.shape):
        raise UserError(f"{path}: tensor {name} has shape {tuple(shape)}, this model needs {tuple(out.shape)}")
    if dtype not in ("F32", "F16", "BF16", "F64"):
        raise UserError(f"{path}: tensor {name} has dtype {dtype}; weights are floating-point numbers here")
    rows = max(1, 2**23 // max(1, out[0].numel())) if out.dim() else 1
    with torch.no_grad():
        for i in range(0, len(out), rows):
            with safe_open(path, "pt") as file:
                out[i:i + rows].copy_(file.get_slice(name)[i:i + rows])


def weight_files(folder):
    """{tensor name: file} of a model's folder, one safetensors file or several with an index."""
    def names(path):
        try:
            with safe_open(path, "pt") as file:
                return set(file.keys())
        except Exception as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return {name: folder / "model.safetensors" for name in names(folder / "model.safetensors")}
    try:
        files = {name: folder / file for name, file in read_json(index)["weight_map"].items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: there is no weight_map in it") from None
    for path in sorted(set(files.values())):
        if lost := sorted({name for name, where in files.items() if where == path} - names(path)):
            raise UserError(f"{path}: tensor {lost[0]} is not in it, though the index says so")
    return files


def load_config(source):
    """The GemmaConfig of a local folder or a Hub repo id, without its weights."""
    return GemmaConfig.from_json(fetch(source, ["config.json"]) / "config.json")


def load_gemma(source, *, dtype=torch.float32, device="cpu"):
    """A frozen Gemma in evaluation mode from a local folder or a Hub repo id.

    Strict: every tensor must be there, with its shape, and no other one may be; UserError names the first that is not.
    Peak memory is the weights plus 32 MB.
    """
    folder = fetch(source, ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json"])
    config = GemmaConfig.from_json(folder / "config.json")
    files = weight_files(folder)
    with torch.device("meta"):
        model = Gemma(config)
    wanted = {f"model.{name}" for name, _ in model.named_parameters()}
    if missing := sorted(wanted - set(files)):
        raise UserError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} of {len(wanted)} are)")
    if extra := sorted(set(files) - wanted - {"lm_head.weight"}):     # tied head: tolerated where a tool wrote it
        raise UserError(f"{folder}: tensor {extra[0]} is not part of Gemma-2 ({len(extra)} such)")
    for name, meta in list(model.named_parameters()):
        weight = torch.empty(meta.shape, dtype=dtype, device=device)
        copy_tensor(files[f"model.{name}"], f"model.{name}", weight)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))
    return model.eval()


# ---- the chat format -----------------------------------------------------------------------------------------------
#
#   <bos><start_of_turn>user⏎ PROMPT <end_of_turn>⏎<start_of_turn>model⏎ ANSWER <end_of_turn>
#
# (Gemma's model card.) Markers are put in by id; what people wrote is always encoded as plain text, so that a
# prompt that contains "<end_of_turn>" cannot end its own turn.

CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]


def load_tokenizer(source):
    """The tokenizer.json of a local folder or a Hub repo, as a tokenizers.Tokenizer that keeps special-token
    strings in text as text."""
    path = fetch(source, ["tokenizer.json"]) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"{path}: not a readable tokenizer.json ({error})") from None
    if missing := [name for name in CONTROL if tokenizer.token_to_id(name) is None]:
        raise UserError(f"{path}: the token {missing[0]} is missing, which Gemma's chat format needs")
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()       # some files were saved with it, and would cut texts without a word
    tokenizer.no_padding()
    return tokenizer


def choose_device(device="auto", dtype="auto"):
    """Names of a device and a dtype -> (device, torch dtype); auto: the best device there is, bf16 on cuda, float32 elsewhere."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here ({str(error).splitlines()[0]})") from None
    if device.startswith("mps") and dtype == "float64":
        raise UserError("--dtype float64: mps has no float64; use cpu")
    return device, getattr(torch, dtype if dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32")


def encode_text(tokenizer, text):
    """Ids of a text as plain text: no BOS, and never the id of a control token."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not {tokenizer.token_to_id(name) for name in CONTROL if name != "<unk>"} & set(ids):
        return ids
    # A tokenizer may list its markers as ordinary added tokens, which are matched all the same: cut them in two.
    pieces = re.sub("|".join(f"(?<=({re.escape(n[0])}))(?={re.escape(n[1:])})" for n in CONTROL), "\0", text).split("\0")
    return [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids]


def encode_prompt(tokenizer, messages):
    """Ids up to and including "<start_of_turn>model⏎", exactly one BOS in front.

    messages: a string (one user turn) or a list of {"role", "content"}, roles user and assistant in turn, user last.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    one = tokenizer.token_to_id
    newline, ids = encode_text(tokenizer, "\n"), [one("<bos>")]
    for i, message in enumerate(messages):
        role = ("user", "assistant")[i % 2]
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"message {i + 1} of a prompt is not of the form {{\"role\": ..., \"content\": text}}")
        if message.get("role") != role:
            raise UserError(f"message {i + 1} of a prompt has role {message.get('role')!r}; Gemma-2 takes user and assistant in turn, user first (and no system message)")
        ids += [one("<start_of_turn>"), *encode_text(tokenizer, "model" if role == "assistant" else role), *newline]
        ids += [*encode_text(tokenizer, message["content"].strip()), one("<end_of_turn>"), *newline]
    if not messages or messages[-1]["role"] != "user":
        raise UserError("a prompt must end with a user message")
    return ids + [one("<start_of_turn>"), *encode_text(tokenizer, "model"), *newline]


def encode_answer(tokenizer, text):
    """Ids of an answer, its <end_of_turn> included: the model has to learn, and is scored on, where it ends."""
    return encode_text(tokenizer, text.strip()) + [tokenizer.token_to_id("<end_of_turn>")]


def decode(tokenizer, ids):
    """Text of an answer's ids, control tokens left out."""
    return tokenizer.decode(list(ids), skip_special_tokens=True)
