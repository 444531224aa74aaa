"""FSRL's policy: an adapter that reads the residual stream and steers the features of a frozen SAE.

    x  (…,D)   the output of block L                                        (gemma.py)
    v  (…,F) = act(W_a x + b_a)              the policy's action: how far to move each feature   Adapter
    x' (…,D) = x + v W_dec                   additive fusion: the same as decode(f + v) + error  Steering
               x + max(v, -f) W_dec          relu fusion: no feature falls below zero

(arXiv 2509.12934, section 3; the authors' final code has relu fusion, the first two versions of the paper additive.)
Decoding is linear, so the SAE's bias and its error term cancel: only W_dec is needed, and f for relu fusion.

What counts is the EFFECTIVE steering, what is really added: v, or max(v, -f). Every penalty, L0 and share in this
project is computed on it, and over steered positions only, never over padding.

    python fsrl.py runs/style-1                      # talk to the base and the steered model, side by side
"""
import argparse
import importlib.util
import inspect
import json
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from gemma import UserError, atomically, choose_device, decode, encode_prompt, generate, load_gemma, load_tokenizer, read_json
from sae import jumprelu, load_sae

ACTIVATIONS, FUSIONS, POSITIONS = ("soft", "relu", "jumprelu"), ("additive", "relu"), ("text", "response", "all")


class Adapter(nn.Module):
    """v = act(W_a x + b_a).  x (…,D) -> v (…,F), float32 (float64 for float64 states)

        relu       v = max(p, 0)
        soft       v = sign(p) · max(|p| - θ, 0)       θ (F,) learned, kept >= 0 by `project`
        jumprelu   v = p · [p > exp(log θ)]            log θ (F,) learned through sae.jumprelu

    W_a starts uniform in ±init, not at zero: at zero relu and soft pass no gradient. Parameters carry the names of the
    authors' files. `steering_magnitude` (F,), a gate in [0, 1] on v, exists only in adapters that were loaded with one.
    """

    def __init__(self, d_in, d_sae, activation="soft", *, init=1e-6, bandwidth=0.001):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(f"activation is {activation!r}; it has to be one of {', '.join(ACTIVATIONS)}")
        self.activation, self.bandwidth, self.steering_magnitude = activation, bandwidth, None
        self.adapter_linear = nn.Linear(d_in, d_sae)
        nn.init.uniform_(self.adapter_linear.weight, -init, init)
        nn.init.zeros_(self.adapter_linear.bias)
        if activation == "soft":
            self.soft_threshold = nn.Parameter(torch.full((d_sae,), init))
        elif activation == "jumprelu":
            self.log_threshold = nn.Parameter(torch.full((d_sae,), init).log())

    def forward(self, x):
        wide = torch.promote_types(torch.float32, x.dtype)
        p = F.linear(x, self.adapter_linear.weight).to(wide) + self.adapter_linear.bias
        if self.activation == "relu":
            v = p.relu()
        elif self.activation == "soft":
            # Right for θ < 0 too: files of the authors hold such. Written with `where`, since its gradient needs only truth values kept.
            live = (p.abs() > self.soft_threshold) & (p != 0)
            v = torch.where(live, torch.where(p > 0, p - self.soft_threshold, p + self.soft_threshold), 0.0)
        else:
            v = jumprelu(p, self.log_threshold.exp(), self.bandwidth)
        return v if self.steering_magnitude is None else v * self.steering_magnitude.clamp(0, 1)

    @torch.no_grad()
    def project(self):
        """Called after each optimiser step: a soft threshold below zero would make every feature fire everywhere."""
        if self.activation == "soft":
            self.soft_threshold.clamp_(min=0)


def master_dtype(dtype):
    """The adapter's own: float32, also beside bf16 weights, where steps of lr would be rounded away."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Steering:
    """An edit (see gemma.Gemma.blocks) that adds the adapter's steering after block `sae.layer`.

    fusion     "additive" or "relu"
    positions  "text", "response" or "all": see gemma.steerable; training, evaluation and generation share it
    strength   v is multiplied by this; 0 gives the base model bit for bit
    top_k      per token only the k largest |effective v| act: an int, or a fraction of F below 1
    masked     features that may not be steered; taken out before top_k, so that they use up no budget
    """

    def __init__(self, sae, adapter, *, fusion="additive", positions="text", strength=1.0, top_k=None, masked=()):
        if fusion not in FUSIONS:
            raise UserError(f"fusion is {fusion!r}; it has to be one of {', '.join(FUSIONS)}")
        if positions not in POSITIONS:
            raise UserError(f"positions is {positions!r}; it has to be one of {', '.join(POSITIONS)}")
        if top_k is not None and not (0 < top_k < 1 or top_k == int(top_k) and 1 <= top_k <= sae.d_sae):
            raise UserError(f"top_k is {top_k}; it has to be a whole number from 1 to {sae.d_sae}, or a fraction between 0 and 1")
        if bad := [i for i in masked if not 0 <= int(i) < sae.d_sae]:
            raise UserError(f"masked feature {bad[0]} does not exist; this SAE has features 0 to {sae.d_sae - 1}")
        self.sae, self.adapter, self.fusion, self.positions, self.strength = sae, adapter, fusion, positions, strength
        self.top_k = top_k if top_k is None else max(1, int(top_k * sae.d_sae)) if top_k < 1 else int(top_k)
        self.masked = sorted({int(i) for i in masked})

    def features(self, x):
        """The effective steering at some tokens.  x (N,D) -> (N,F)"""
        half = x.dtype in (torch.bfloat16, torch.float16)       # float32 master weights, products in the model's dtype
        with torch.autocast(x.device.type, dtype=x.dtype if half else torch.bfloat16, enabled=half):
            v = self.adapter(x)
        v = v.to(torch.promote_types(torch.float32, v.dtype)) * self.strength       # sums over it would saturate in bf16
        if self.masked:
            v = v.index_fill(-1, torch.tensor(self.masked, device=v.device), 0.0)
        if self.fusion == "relu":       # below -f nothing moves, and the gradient is zero
            with torch.no_grad():
                f = self.sae.encode(x)
            v = torch.maximum(v, -f.to(v.dtype))
        if self.top_k is not None and self.top_k < v.shape[-1]:
            kept = v.abs().topk(self.top_k, -1).indices
            v = torch.zeros_like(v).scatter(-1, kept, v.gather(-1, kept))
        return v

    def add(self, h, where, v):
        """h (B,T,D) with v (N,F) decoded and added at the N tokens of `where` (B,T)."""
        delta = v.to(self.sae.W_dec.dtype) @ self.sae.W_dec
        out = h.clone()
        out[where] = h[where] + delta.to(h.dtype)
        return out

    def __call__(self, h, where):
        return self.add(h, where, self.features(h[where]))

    def edits(self):
        """{layer: edit}, what gemma.py's functions take."""
        return {self.sae.layer: self}


# ---- the authors' file format, and ours in it ---------------------------------------------------------------------------

WEIGHTS, CONFIG = "adapter_weights.safetensors", "fsrl_adapter_config.json"
THEIR_NAMES = {"soft": "soft_threshold", "relu": "relu", "jumprelu": "jump_relu"}


def save_adapter(adapter, folder, **facts):
    """Writes adapter_weights.safetensors and fsrl_adapter_config.json: the authors' files, which their loader reads for our Adapter.

    facts: more keys for the config. Theirs leaves out what decides the forward pass (fusion, positions, masked features,
    the model that was steered); `steering_facts` gives these.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ours = type(adapter) is Adapter          # a subclass has a forward of its own
    config = {"activation_type": THEIR_NAMES[adapter.activation] if ours else "custom",
              "use_steering_magnitude": ours and adapter.steering_magnitude is not None}
    if config["activation_type"] == "jump_relu":
        config["bandwidth"] = adapter.bandwidth
    if config["activation_type"] == "custom":
        config["adapter_class"] = type(adapter).__name__
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in adapter.state_dict().items()}
    atomically(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    atomically(folder / CONFIG, lambda path: path.write_text(json.dumps({**config, **facts}, indent=4) + "\n", encoding="utf-8"))


def steering_facts(steering, model_source):
    """The config keys of a Steering: the authors' first, then the ones theirs lacks."""
    sae = steering.sae
    repo, _, inside = sae.source.partition(":")
    release = repo.rstrip("/").rsplit("/", 1)[-1]
    return {"base_sae_release": release, "base_sae_id": inside, "model_name": str(model_source).rsplit("/", 1)[-1].removesuffix("-it"),
            "neuronpedia_id": f"{release}/{inside}" if inside else None, "base_model": str(model_source), "sae_source": sae.source,
            "sae_identity": sae.identity(), "d_in": sae.d_in, "d_sae": sae.d_sae, "layer": sae.layer, "fusion": steering.fusion, "positions": steering.positions,
            "strength": steering.strength, "top_k": steering.top_k, "masked": steering.masked}


def load_adapter(folder, adapter_class=None):
    """-> (adapter, facts): the module, and everything its config file says.

    Reads the authors' files, old ones included: no activation_type means relu, unless one of two older flags is set.
    A custom adapter's class has to be given: code is never imported from a run's folder.
    """
    folder = Path(folder)
    facts = read_json(folder / CONFIG)
    try:
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        raise UserError(f"{folder / WEIGHTS}: not a readable safetensors file ({error})") from None
    kind = facts.get("activation_type", "relu")
    kind = "jump_relu" if facts.get("use_jump_relu") else "soft_threshold" if facts.get("use_soft_threshold") else kind
    if kind == "custom":
        name = facts.get("adapter_class")
        if adapter_class is None:
            raise UserError(f"{folder} holds an adapter of the class {name}, written by its user: say where it is, --adapter FILE.py:{name} "
                            "(the run keeps a copy of the source to compare with)")
        if adapter_class.__name__ != name:
            raise UserError(f"{folder} holds an adapter of the class {name}, --adapter names {adapter_class.__name__}")
        if not all(isinstance(facts.get(name), int) for name in ("d_in", "d_sae")):
            raise UserError(f"{folder / CONFIG}: d_in and d_sae are missing, which a custom adapter is made with")
        adapter = adapter_class(facts["d_in"], facts["d_sae"])
    elif kind not in THEIR_NAMES.values():
        raise UserError(f"{folder / CONFIG}: activation_type is {kind!r}; known are {', '.join(THEIR_NAMES.values())}")
    else:
        weight = tensors.get("adapter_linear.weight")
        if weight is None or weight.dim() != 2:
            raise UserError(f"{folder / WEIGHTS}: tensor adapter_linear.weight (d_sae, d_in) is missing")
        activation = next(ours for ours, theirs in THEIR_NAMES.items() if theirs == kind)
        adapter = Adapter(weight.shape[1], weight.shape[0], activation, bandwidth=facts.get("bandwidth", 0.001))
        if facts.get("use_steering_magnitude"):
            adapter.steering_magnitude = nn.Parameter(torch.ones(weight.shape[0]))
    try:
        adapter.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, strict=False)
        wanted = set(adapter.state_dict()) - {"steering_magnitude"}        # missing: ones, as the authors' loader has it
        if unknown := (wanted - set(tensors)) | (set(tensors) - set(adapter.state_dict())):
            raise RuntimeError(f"missing or unknown: {', '.join(sorted(unknown))}")
    except RuntimeError as error:
        raise UserError(f"{folder / WEIGHTS} does not fit its adapter ({' '.join(str(error).split())})") from None
    return adapter, facts


def import_adapter(spec):
    """The class behind FILE.py:ClassName, an nn.Module made by ClassName(d_in, d_sae)."""
    path, _, name = str(spec).rpartition(":")
    if not path or not path.endswith(".py"):
        raise UserError(f"--adapter {spec}: write FILE.py:ClassName")
    if not Path(path).is_file():
        raise UserError(f"--adapter {spec}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location(f"adapter_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module               # dataclasses and pickles look a class's module up
    sys.path.insert(0, str(Path(path).resolve().parent))      # so that it can import a file beside it
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"--adapter {spec}: {path} cannot be imported ({type(error).__name__}: {error})") from error
    finally:
        sys.path.pop(0)
    found = getattr(module, name, None)
    if not (inspect.isclass(found) and issubclass(found, nn.Module)):
        raise UserError(f"--adapter {spec}: {path} has no torch.nn.Module of the name {name}")
    return found


def make_adapter(adapter_class, d_in, d_sae, *, spec, activation="soft", init=1e-6, bandwidth=0.001):
    """Our Adapter (adapter_class None), or a user's, tried once on four random states."""
    if adapter_class is None:
        return Adapter(d_in, d_sae, activation, init=init, bandwidth=bandwidth)
    try:
        adapter = adapter_class(d_in, d_sae)
        v = adapter(torch.randn(4, d_in))
    except Exception as error:
        raise UserError(f"--adapter {spec}: {type(error).__name__}: {error} (an adapter is made by {adapter_class.__name__}({d_in}, {d_sae}) "
                        f"and takes states of shape (N, {d_in}))") from error
    if not isinstance(v, torch.Tensor) or tuple(v.shape) != (4, d_sae):
        raise UserError(f"--adapter {spec}: forward gave {tuple(v.shape) if isinstance(v, torch.Tensor) else type(v).__name__} "
                        f"for states of shape (4, {d_in}); it has to be (4, {d_sae})")
    if not any(p.requires_grad for p in adapter.parameters()):
        raise UserError(f"--adapter {spec}: it has no parameter to train")
    return adapter


# ---- a run's folder --------------------------------------------------------------------------------------------------

@dataclass
class Run:
    model: nn.Module
    tokenizer: object
    sae: nn.Module
    steering: Steering
    config: dict
    folder: Path


def check_fit(config, sae):
    """Raises UserError unless the SAE can sit on a model of this GemmaConfig."""
    if sae.layer is None:
        raise UserError(f"SAE {sae.source}: which layer it belongs to is written neither in its path (layer_N) nor in its config")
    if sae.layer >= config.num_hidden_layers:
        raise UserError(f"SAE {sae.source} belongs to layer {sae.layer}; this model has layers 0 to {config.num_hidden_layers - 1}")
    if sae.d_in != config.hidden_size:
        raise UserError(f"SAE {sae.source} reads states of width {sae.d_in}, this model's have {config.hidden_size}")


def load_run(folder, *, adapter=None, device="auto", dtype=None):
    """Opens what train.py wrote: model, tokenizer, SAE and steering as they were trained. -> Run

    adapter: FILE.py:ClassName, needed (only) for a run that was trained with --adapter.
    dtype: of the frozen weights, by name ("bfloat16"); None: as in training.
    Raises UserError where the model or the SAE is not the one it was trained on.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a finished run: {'config.json' if not (folder / 'config.json').is_file() else CONFIG} is not there")
    config = read_json(folder / "config.json")
    if adapter is not None and (folder / SOURCE).exists():
        source = str(adapter).rpartition(":")[0]
        if Path(source).is_file() and Path(source).read_bytes() != (folder / SOURCE).read_bytes():
            print(f"note: {source} is not the source this run was trained with ({folder / SOURCE})", file=sys.stderr)
    module, facts = load_adapter(folder, import_adapter(adapter) if adapter else None)
    device, dtype = choose_device(device, dtype or config.get("dtype", "float32"))
    model = load_gemma(config["model"], dtype=dtype, device=device)
    if config.get("model_identity") not in (None, model.identity()):
        raise UserError(f"{folder} was trained on another model than {config['model']} is now (digest {config['model_identity']}, now {model.identity()})")
    sae = load_sae(config["sae"], dtype=dtype, device=device)
    check_fit(model.config, sae)
    if facts.get("sae_identity") not in (None, sae.identity()):
        raise UserError(f"{folder} was trained on another SAE than {config['sae']} is now (digest {facts['sae_identity']}, now {sae.identity()})")
    steering = Steering(sae, module.to(device, master_dtype(dtype)).eval(), **{k: facts[k] for k in ("fusion", "positions", "strength", "top_k", "masked") if k in facts})
    return Run(model, load_tokenizer(config["model"]), sae, steering, config, folder)


SOURCE = "adapter_source.py"


def keep_source(spec, folder):
    """Copies the file of a user's adapter into the run, to be read, never to be run."""
    shutil.copyfile(spec.rpartition(":")[0], Path(folder) / SOURCE)


# ---- side by side ----------------------------------------------------------------------------------------------------

def side_by_side(left, right, *, titles=("base", "steered"), width=None):
    """Two texts as two columns."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, 120)
    column = (width - 3) // 2

    def fold(text):
        return [part for line in (text or "(nothing)").split("\n") for part in textwrap.wrap(line, column, replace_whitespace=False) or [""]]
    rows, other = [titles[0], "-" * column, *fold(left)], [titles[1], "-" * column, *fold(right)]
    rows += [""] * (len(other) - len(rows))
    other += [""] * (len(rows) - len(other))
    return "\n".join(f"{a:<{column}} | {b}".rstrip() for a, b in zip(rows, other))


def answers(model, tokenizer, prompts, edits=None, **how):
    """Prompts (strings or message lists) -> the model's answers as text. `how`: see gemma.generate."""
    return [decode(tokenizer, ids) for ids in generate(model, [encode_prompt(tokenizer, p) for p in prompts], edits=edits, **how)]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Ask the base and the steered model of a run the same things, side by side.")
    parser.add_argument("run", help="a run's folder, such as runs/style-1")
    parser.add_argument("--prompt", action="append", help="ask this and leave (can be given several times); without it, ask one thing after another")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most probable token each time")
    parser.add_argument("--strength", type=float, help="multiply the steering by this (default: as trained)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer [128]")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, where the temperature is above 0")
    parser.add_argument("--adapter", help="FILE.py:ClassName of a run that was trained with one")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto: the best there is")
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code
    try:
        if not 0 <= args.temperature < float("inf"):
            raise UserError(f"--temperature is {args.temperature}; it has to be a number from 0")
        if args.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {args.max_new_tokens}; it has to be at least 1")
        if args.strength is not None and not abs(args.strength) < float("inf"):
            raise UserError(f"--strength is {args.strength}; it has to be a finite number")
        run = load_run(args.run, adapter=args.adapter, device=args.device)
        if args.strength is not None:
            run.steering.strength = args.strength
        how = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed)

        def ask(prompt):
            print(f"\n> {prompt}")
            print(side_by_side(*(answers(run.model, run.tokenizer, [prompt], edits, **how)[0] for edits in (None, run.steering.edits()))))
        for prompt in args.prompt or []:
            ask(prompt)
        while not args.prompt:
            try:
                prompt = input("\nask (empty line: leave) > ").strip()
            except EOFError:
                break
            if not prompt:
                break
            ask(prompt)
    except UserError as error:
        print(f"fsrl.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
