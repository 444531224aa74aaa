"""The loaders against a hub on this machine: the same readers read a folder and a repo id."""
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common import ROOT, small_gemma, small_sae
from lib.files import UserError, fetch
from sae import save_sae
from test_gemma import write_model

SHA = "0123456789abcdef0123456789abcdef01234567"


def name_of(body):
    return hashlib.sha1(body).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's protocol that huggingface_hub uses for public downloads.

    files: {(kind, repo): {path: bytes}}, None for a repo that is gated.
    """
    files, log = {}, []

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def tell(self, facts):
        self.answer(200, json.dumps(facts).encode(), Content_Type="application/json")

    def do_GET(self):
        path = self.path.split("?")[0]
        self.log.append(path)
        kind = "datasets" if "/datasets/" in path else "models"
        repo = next((repo for its, repo in self.files if its == kind and f"/{repo}/" in path + "/"), None)
        if repo is None:
            return self.answer(404 if path.startswith("/api/agent") else 401, X_Error_Code="RepoNotFound")
        files, rest = self.files[kind, repo], path.split(f"/{repo}", 1)[1]
        if files is None:
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="gated")
        if rest.startswith("/tree/"):
            return self.tell([{"type": "file", "oid": name_of(body), "size": len(body), "path": name}
                              for name, body in files.items()])
        if not rest.startswith("/resolve/"):
            names = [{"rfilename": name} for name in files]
            return self.tell({"id": repo, "sha": SHA, "private": False, "siblings": names})
        body = files.get(rest.split("/", 3)[3])
        if body is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
        self.answer(200, body, X_Repo_Commit=SHA, ETag=f'"{name_of(body)}"')

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


CLIENT = """
import json
from gemma import load_gemma, load_tokenizer
from lib.files import UserError
from lib.pairs import read_pairs
from sae import load_sae
out = {}
def tried(name, do):
    try:
        out[name] = do()
    except UserError as error:
        out[name] = str(error)
out["parameters"] = sum(p.numel() for p in load_gemma("org/model").parameters())
out["tokens"] = load_tokenizer("org/model").get_vocab_size()
s = load_sae("org/scope:layer_1/width_32/average_l0_9")
out["sae"] = [s.d_in, s.d_sae, s.layer]
out["pairs"] = len(read_pairs("org/pairs", "train"))
tried("gated", lambda: load_gemma("org/gated"))
tried("absent", lambda: load_gemma("org/absent"))
tried("no sae", lambda: load_sae("org/scope:layer_2/width_32/average_l0_9"))
tried("no split", lambda: read_pairs("org/pairs", "test"))
print(json.dumps(out))
"""


def ask(port, folder):
    """What the client finds, in a process of its own that has never seen another hub."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", CLIENT], env={**env, "OMP_NUM_THREADS": "1"}, cwd=folder,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


SAID = {"gated": "accept the licence on https://huggingface.co/org/gated", "absent": "the Hub shows no such model",
        "no sae": "neither params.npz", "no split": "no pairs of the split 'test'"}


def test_hub(tmp_path):
    model = small_gemma()
    folder = write_model(tmp_path / "model", model)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    files["tokenizer.json"] = (ROOT / "tiny" / "model" / "tokenizer.json").read_bytes()
    save_sae(small_sae(model), tmp_path / "sae")
    weights = (tmp_path / "sae" / "params.npz").read_bytes()
    scope = {f"layer_1/width_32/average_l0_{n}/params.npz": weights for n in (9, 80)}
    pair = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}).encode() + b"\n"
    Hub.files = {("models", "org/model"): {**files, "pytorch_model.bin": b"a pickle"}, ("models", "org/scope"): scope,
                 ("models", "org/gated"): None, ("datasets", "org/pairs"): {"train.jsonl": pair * 2, "huge.bin": b"x"}}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        out = ask(server.server_port, tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    assert out["parameters"] == sum(p.numel() for p in model.parameters()) and out["tokens"] > 500
    assert out["sae"] == [24, 32, 1] and out["pairs"] == 2
    assert all(words in out[name] for name, words in SAID.items()), out
    for name in ("pytorch_model.bin", "average_l0_80/", "huge.bin"):
        assert not any(name in path for path in Hub.log), "only what is needed is fetched"


def test_offline_is_one_sentence():
    with pytest.raises(UserError, match="could not be asked"):
        fetch("org/never-seen", ["config.json"])
