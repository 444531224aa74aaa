"""A training that was stopped goes on as if nothing had happened, bit for bit, and says what it cannot do."""
import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import train
from common import ROOT, mutant
from lib import checkpoint
from lib.plugins import WEIGHTS

SHORT = ["--eval-pairs", "8", "--train-pairs", "40", "--batch-size", "4", "--accumulation", "2", "--log-every", "3",
         "--save-every", "2", "--steps", "9"]
POLICIES = {"steering": [], "jumprelu": ["--activation", "jumprelu", "--threshold-lr", "10", "--init", "0.0001"],
            "lora": ["--policy", "experiments/baselines.py:LoRA", "--policy-args", "rank=2", "blocks=4-"],
            "dpo": ["--objective", "OBJECTIVE"]}
DPO = ("from torch.nn.functional import logsigmoid\n\n\ndef dpo(chosen, rejected):\n"
       "    return -logsigmoid((chosen.sum - chosen.base_sum) - (rejected.sum - rejected.base_sum))\n")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(runs, *more):
    return train.main([*SHORT, "--runs", str(runs), *map(str, more)])


def what_is_left(folder):
    """All that a training leaves behind, but for times."""
    out = {}
    for path in sorted(folder.rglob("*.safetensors")):
        out[path.name] = {name: x.tolist() for name, x in load_file(path).items()}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return out, [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]


class Killed(BaseException):
    pass


def stopped(monkeypatch, after):
    """Training dies in the middle of this step, after its gradients."""
    real, count = torch.nn.utils.clip_grad_norm_, []

    def dying(*args):
        count.append(1)
        if len(count) > after:
            raise Killed
        return real(*args)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", dying)


@pytest.mark.parametrize("kind", POLICIES)
def test_bit_for_bit(kind, tmp_path, monkeypatch):
    """Stopped in step 6 of 9, within the second epoch and between two lines of the log."""
    (tmp_path / "dpo.py").write_text(DPO)
    how = [x.replace("OBJECTIVE", f"{tmp_path / 'dpo.py'}:dpo") for x in POLICIES[kind]]
    assert run(tmp_path, "--run", "whole", *how) == 0
    with monkeypatch.context() as m, pytest.raises(Killed):
        stopped(m, 5)
        run(tmp_path, "--run", "cut", *how)
    assert sorted(p.name for p in (tmp_path / "cut" / "checkpoint").glob("*.json")) == ["step-2.json", "step-4.json"]
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    whole, cut = what_is_left(tmp_path / "whole"), what_is_left(tmp_path / "cut")
    assert whole == cut and [row["step"] for row in cut[1]] == [0, 3, 6, 9, 9]


BROKEN = {"no optimiser": ("self.optimizer.state[p][rest[0]] = x", "pass"),
          "no window": ("window.setdefault(int(i), {})[rest[0]] =", "_ =")}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_forgotten_shows(what, tmp_path, monkeypatch):
    assert run(tmp_path, "--run", "whole") == 0
    with monkeypatch.context() as m, pytest.raises(Killed):
        stopped(m, 5)
        run(tmp_path, "--run", "cut")
    monkeypatch.setattr(train, "Checkpoint", mutant("lib.checkpoint", BROKEN[what]).Checkpoint)
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert what_is_left(tmp_path / "whole") != what_is_left(tmp_path / "cut")


def test_a_damaged_checkpoint_is_named(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, "--run", "whole") == 0
    with monkeypatch.context() as m, pytest.raises(Killed):
        stopped(m, 5)
        run(tmp_path, "--run", "cut")
    newest = tmp_path / "cut" / "checkpoint" / "step-4.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    (newest.parent / "step-6.safetensors.tmp").write_text("of a process that was killed")
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert f"{newest} is damaged; the one before is used" in capsys.readouterr().err
    assert what_is_left(tmp_path / "whole") == what_is_left(tmp_path / "cut")
    assert not list((tmp_path / "cut" / "checkpoint").glob("*.tmp"))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, "--run", "whole") == 0
    real = train.objective

    def interrupting(*args):
        if not checkpoint.STOP.asked:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    with monkeypatch.context() as m:
        m.setattr(train, "objective", interrupting)
        assert run(tmp_path, "--run", "cut") == 130
    folder = tmp_path / "cut"
    assert f"stopped after step 1; `python train.py --resume {folder}` goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and (folder / WEIGHTS).is_file()
    assert train.main(["--resume", str(folder)]) == 0
    left, right = what_is_left(tmp_path / "whole"), what_is_left(folder)
    assert left[0][WEIGHTS] == right[0][WEIGHTS] and left[1] == right[1]


def test_what_may_change_and_what_may_not(tmp_path, capsys):
    assert run(tmp_path, "--run", "a") == 0
    folder = str(tmp_path / "a")

    def refused(*more):
        assert train.main(["--resume", folder, *more]) == 2
        return capsys.readouterr().err
    assert "is finished, after 9 steps; a larger --steps goes on" in refused()
    assert "lr was 0.002 and is 0.1 now; only steps" in refused("--lr", "0.1", "--steps", "12")
    assert "is not a finished run" in refused("--resume", str(tmp_path))
    with checkpoint.Checkpoint(folder, [], None).lock:
        assert "another process is training there" in refused("--steps", "12")
    assert train.main(["--resume", folder, "--steps", "12"]) == 0
    rows = what_is_left(tmp_path / "a")[1]
    assert [row["step"] for row in rows] == [0, 3, 6, 9, 12, 12]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["steps"] == 12


# ---- killed --------------------------------------------------------------------------------------------------------

def child(arguments, threads):
    torch.set_num_threads(threads)                               # the bits depend on them
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    raise SystemExit(train.main(arguments))


def survives(tmp_path, delays):
    """Killed after so many seconds, again and again, then let go."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "tiny.judge"])
    folder = tmp_path / "cut"
    for delay in (*delays, None):
        begun = (folder / "config.json").is_file()
        arguments = ["--resume", str(folder)] if begun else [*SHORT, "--runs", str(tmp_path), "--run", "cut"]
        process = context.Process(target=child, args=(arguments, torch.get_num_threads()))
        process.start()
        if delay is None:
            process.join(120)
            return process.exitcode
        time.sleep(delay)
        process.kill()
        process.join()
        if folder.is_dir() and not (folder / "config.json").is_file():
            folder.rmdir()                                       # killed between the folder and its first file


def test_killed_twice(tmp_path):
    assert run(tmp_path, "--run", "whole") == 0
    assert survives(tmp_path, (2.0, 2.5)) in (0, 2)              # 2: it was finished before the last kill
    assert what_is_left(tmp_path / "whole") == what_is_left(tmp_path / "cut")


@pytest.mark.slow
def test_killed_fifty_times(tmp_path):
    assert run(tmp_path, "--run", "whole") == 0
    g = torch.Generator().manual_seed(0)
    for n in range(10):
        place = tmp_path / str(n)
        assert survives(place, (1 + 3 * torch.rand(5, generator=g)).tolist()) in (0, 2)
        assert what_is_left(tmp_path / "whole") == what_is_left(place / "cut")
