"""What README.md and docs/ promise: commands run, examples train, links exist, tables and numbers are as measured."""
import importlib
import json
import re
import shlex
import sys

import pytest
import torch

import fsrl
import test_style
import train
from common import ROOT
from experiments import bench, figures, frontier, results
from lib import settings
from lib.plugins import CONFIG
from simpo import Answer
from tiny import world

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
README = PAGES["README.md"]
SMALL = ["--steps", "2", "--eval-pairs", "4", "--train-pairs", "16", "--batch-size", "4"]
KNOWN = (r"(train|fsrl|analyze|sae)\.py|-m (pytest|venv|instruments\.(labels|layers|data)|tiny\.(make|calibrate)"
         r"|experiments\.(results|figures|bench|sweep|frontier|peers|planted))")


# ---- what stands in the pages ----------------------------------------------------------------------------------------

def commands():
    """Every command of every page, one line each: of bash blocks, of indented blocks, and those between backticks."""
    found = {}
    for page, text in PAGES.items():
        text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.S).replace("\\\n", " ")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S) + re.findall(r"^    python .*$", text, re.M)
        spans = [" ".join(c.split()) for c in re.findall(r"`(python [^`]+)`", text)]
        for line in re.findall(r"\bpython [^#&;\n]+", "\n".join(blocks)) + [c for c in spans if "..." not in c]:
            found.setdefault(" ".join(line.replace("$s", "0").split()), page)
    return found


def examples():
    """{file name: source} of the python examples; each names its file in its first line."""
    blocks = [b for text in PAGES.values() for b in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)]
    return {re.match(r"# (my_\w+\.py)", block)[1]: block for block in blocks}


COMMANDS = commands()
# Of what is not here: a model of the Hub, pairs that another command makes.
TRAININGS = sorted(c for c in COMMANDS
                   if c.startswith("python train.py") and not re.search("--preset|--resume|mixed", c))


@pytest.fixture
def desk(tmp_path, monkeypatch, capsys):
    """An empty folder to work in, with the files that the pages tell a reader to write."""
    for name, source in examples().items():
        (tmp_path / name).write_text(source, encoding="utf-8")
        sys.modules.pop(name.removesuffix(".py"), None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def call(command):
    """The script's main with the command's arguments. -> exit code"""
    words = shlex.split(command)[1:]
    name, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
    return importlib.import_module(name).main(rest)


# ---- commands --------------------------------------------------------------------------------------------------------

def test_every_command_is_known():
    unknown = [f"{page}: {c}" for c, page in COMMANDS.items() if not re.match(rf"python ({KNOWN})( |$)", c)]
    assert len(COMMANDS) > 30 and not unknown


@pytest.mark.parametrize("command", sorted(c for c in COMMANDS if not re.match(r"python -m (pytest|venv)", c)))
def test_commands_are_understood(command, monkeypatch):
    """Their options exist and fit: the settings are made, and nothing is run."""
    made = []

    def parse(prog, cls, run, *rest):
        return settings.command(prog, cls, made.append, *rest)
    words = shlex.split(command)
    if "--help" in words:
        return
    module = importlib.import_module(words[2] if words[1] == "-m" else words[1].removesuffix(".py"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "command", parse)
    assert call(command) == 0 and len(made) == 1


@pytest.mark.parametrize("command", TRAININGS)
def test_training_commands_run(command, desk, capsys):
    """At reduced size: the same options, fewer steps and pairs."""
    if "--help" in command:
        assert call(command) == 0 and "--nll-weight" in capsys.readouterr().out
        return
    for pick in [c for c in COMMANDS if "instruments.labels pick" in c and ".txt" in command]:
        assert call(pick) == 0
    assert call(f"{command} {shlex.join(SMALL)}") == 0
    assert "The run lies in" in capsys.readouterr().out


def test_asking_and_analysing_commands_run(desk, capsys, monkeypatch):
    """On short runs, one of them with an adapter of one's own; who is asked for a prompt leaves."""
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    for mine in ("", "--adapter my_allowance.py:Allowance --adapter-args free=1",
                 "--policy experiments/baselines.py:LoRA"):
        assert call(f"python train.py {mine} {shlex.join(SMALL)}") == 0
    for command in [c for c in COMMANDS if c.startswith("python fsrl.py runs/")]:
        assert call(command) == 0 and ("--prompt" not in command or "base" in capsys.readouterr().out)
    command, = [c for c in COMMANDS if c.startswith("python analyze.py runs/style-1 --only")]
    assert call(f"{command} --limit 12 --ledger-pairs 4 --quiet") == 0
    assert all((desk / f"runs/style-1/analysis/{name}.json").is_file() for name in ("usage", "ledger"))
    own = fsrl.load_run("runs/style-2", adapter="my_allowance.py:Allowance").policy.adapter
    assert type(own).__name__ == "Allowance" and own.free == 1


def test_the_two_lines():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    tests = "pip install -r requirements.txt -r requirements-extra.txt && python -m pytest"
    assert "pip install -r requirements.txt && python train.py" in README and tests in README
    assert "python -m pytest" in ci and "-r requirements.txt -r requirements-extra.txt" in ci


# ---- examples --------------------------------------------------------------------------------------------------------

def test_every_example_is_trained():
    """What test_training_commands_run runs covers every file that a page shows."""
    assert len(examples()) >= 3
    assert not [name for name in examples() if not any(name in c for c in TRAININGS)]


def test_objectives_by_hand(desk):
    ours = importlib.import_module("my_objectives")
    zero = torch.zeros(1)

    def answer(total, base):
        total, base = torch.tensor([total]), torch.tensor([base])
        return Answer(mean=total / 4, length=zero + 4, base_mean=base / 4)
    same, better = answer(-8.0, -8.0), answer(-3.0, -8.0)
    assert ours.dpo(same, same).item() == pytest.approx(0.693147, abs=1e-6)
    assert ours.dpo(better, same).item() == pytest.approx(0.078889, abs=1e-5)      # log(1 + e^(-0.5 · 5))
    half = answer(-5.5, -8.0)                          # 1 / 2τ = 2.5 nats more than the base: the goal
    assert ours.ipo(same, same).item() == ours.ipo(better, same).item() == pytest.approx(6.25)
    assert ours.ipo(half, same).item() == pytest.approx(0, abs=1e-6)
    assert ours.ipo(same, better).item() == pytest.approx(56.25)


def test_penalty_by_hand(desk):
    adapter = importlib.import_module("my_allowance").Allowance(4, 3, free=2.0)
    assert adapter.penalty(torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.5, 0.0]])).tolist() == [1, 0]


def test_the_annotated_answer():
    """The README's answer makes all eight choices that come up, and is true."""
    lines = README.split("## One answer, ten choices")[1].split("##")[0]
    lines = [line[4:] for line in lines.splitlines() if line.startswith("    ") or not line]
    question = world.read_prompt(re.match(r"> (.*?)  ", "\n".join(lines).strip())[1])
    shown = [re.split(r"   +", line)[0] for line in lines if line and not line.startswith((">", " "))]
    text = "\n".join(shown[:-1]) + "\n\n" + shown[-1]
    choices = world.parse(question, (*world.pieces(text), world.END))
    assert choices and set(choices) == {*world.STYLE, "truth"}
    assert all(world.is_on(question, name, index) for name, index in choices.items())
    weights = json.loads((ROOT / "tiny/pairs/style/meta.json").read_text(encoding="utf-8"))["weights"]
    for name in world.CHOICES:
        weight = re.escape(f"{weights[name]:+g}" if weights[name] else "0")
        assert re.search(rf"\b{name}\b(\W|it)+{weight}\b", README), name


# ---- links, sizes, names ---------------------------------------------------------------------------------------------

def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]) + re.findall(r'src="([^"]+)"', PAGES[page]):
        file, _, part = target.partition("#")
        if file.startswith("http"):
            continue
        assert not file or (folder / file).exists(), target
        if part:
            text = (folder / file if file else ROOT / page).read_text(encoding="utf-8")
            assert part in {anchor(h) for h in re.findall(r"^#+ (.*)$", text, re.M)}, target


def test_the_first_page_is_short():
    assert len(README.encode()) <= 13_000
    assert not [line for line in README.splitlines() if len(line) > 110]


def test_minutes_of_the_evenings(monkeypatch):
    """About right is enough: 65 tokens of code a minute, within a third and two minutes."""
    rows = re.findall(r"^\| [12] \| (?:`(\w+\.py)`)? ?\| (`.*`) \| \d+ \| (\d+) \|$", README, re.M)
    last, read = None, {}
    for file, names, minutes in rows:
        last, names = file or last, re.findall(r"`(\w+)`", names)
        read.setdefault(last, []).extend(names)
        monkeypatch.setattr(test_style, "PATH", {last: names})
        count, said = test_style.path_tokens(), int(minutes)
        assert abs(count / 65 - said) <= 2 + said / 3, f"{last}: {count} tokens in {said} minutes"
    monkeypatch.undo()
    assert read == test_style.PATH


def test_named_tests_exist():
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    named = {name for text in PAGES.values() for name in re.findall(r"`(test_\w+)`", text)}
    assert len(named) > 15 and not {name for name in named if f"def {name}(" not in source}


def test_every_printed_column_is_explained():
    for column in "loss penalty margin acc L0 L1 lr tokens/s".split():
        assert re.search(rf"^\| `{re.escape(column)}` \|", PAGES["docs/reference.md"], re.M), column


def test_every_key_of_a_run_is_explained(lab):
    """Of metrics.jsonl and of fsrl_adapter_config.json."""
    rows = [json.loads(line) for line in (lab.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    facts = json.loads((lab.folder / CONFIG).read_text(encoding="utf-8"))
    keys = {key for row in rows for key in row} | set(facts)
    assert not [key for key in sorted(keys) if f"`{key}`" not in PAGES["docs/reference.md"]]


# ---- tables and numbers ----------------------------------------------------------------------------------------------

def test_the_tables_are_what_was_measured():
    """Every block between marks comes from docs/style.json, results.json, bench.json or tiny/calibration.json."""
    made = results.blocks() | figures.blocks() | bench.blocks() | frontier.blocks()
    used = {name for text in PAGES.values() for name in re.findall(r"<!-- (\w+) -->", text)}
    assert used == set(made)
    for page, text in PAGES.items():
        assert results.filled(text, made) == text, page


def test_the_runs_have_the_defaults_in_force():
    data = json.loads(figures.DATA.read_text(encoding="utf-8"))
    defaults = vars(train.TrainConfig())
    ours = {k: v for k, v in defaults.items() if k not in ("device", "dtype")}
    assert {k: data["config"].get(k, v) for k, v in ours.items()} == ours


def cells(name, row, column):
    """What stands in a row and column of the generated tables of a block."""
    text = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", "".join(PAGES.values()), re.S)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    head, found = [], []
    for above, line in zip(rows, rows[1:]):
        head = above if line[0] == "---" else head
        found += [dict(zip(head, line))[column]] if line[0] == row and column in head else []
    return found


NUMBERS = [        # page, what it says, then where that stands: block, row, column, how the cell begins
    ("README.md", "3.57 against 3.26", "controls", "`style`, random dictionary", "SimPO loss", "3.57"),
    ("README.md", "3.57 against 3.26", "controls", "`style`", "SimPO loss", "3.26"),
    ("README.md", "from 4.70", "controls", "base, on `style`", "SimPO loss", "4.70"),
    ("README.md", "names 8.4 of 10 choices wrongly", "calibration", "null", "rates", "0.2 / 8.4"),
    ("README.md", "correlation −0.08", "calibration", "style", "correlation", "−0.08"),
    ("README.md", "2.29 against 3.26", "frontier", "nll_weight 0, lr 0.01, l1 0.001", "SimPO loss", "2.29"),
    ("README.md", "one in eight", "frontier", "nll_weight 0, lr 0.01, l1 0.001", "well-formed", "0.12"),
    ("README.md", "loss 2.91 and 2.76 against 3.03", "policies", "LoRA", "SimPO loss", "2.91"),
    ("README.md", "loss 2.91 and 2.76 against 3.03", "policies", "Full", "SimPO loss", "2.76"),
    ("README.md", "loss 2.91 and 2.76 against 3.03", "policies", "FSRL", "SimPO loss", "3.03"),
    ("README.md", "text 0.000 and 0.003 against 0.065", "policies", "LoRA", "KL on neutral text", "0.000"),
    ("README.md", "text 0.000 and 0.003 against 0.065", "policies", "Full", "KL on neutral text", "0.003"),
    ("README.md", "text 0.000 and 0.003 against 0.065", "policies", "FSRL", "KL on neutral text", "0.065"),
    ("README.md", "a loss of 2.25 and an accuracy of 0.808", "policies", "TRL SimPO", "SimPO loss", "2.25"),
    ("README.md", "a loss of 2.25 and an accuracy of 0.808", "policies", "TRL SimPO", "accuracy", "0.808"),
    ("README.md", "34% of its answers are well-formed", "policies", "TRL SimPO", "well-formed", "0.34"),
    ("docs/lab.md", "95.8% well-formed", "policies", "TRL SimPO, cpo_alpha 5", "well-formed", "0.958"),
    ("docs/lab.md", "0.533 against 0.553", "controls", "`style`, γ/β 1", "truth", "0.533"),
    ("docs/lab.md", "0.533 against 0.553", "controls", "`style`", "truth", "0.553"),
    ("docs/lab.md", "rises by 6 points", "choices", "restate", "style: answers", "+6."),
    ("docs/lab.md", "falls by 3", "choices", "truth", "style: answers", "−3."),
    ("docs/lab.md", "and 58.7%", "choices", "truth", "base, of 2000 answers", "58.7%"),
    ("docs/calibration.md", "says 0.98 where 0.82", "calibration", "style", "tokens", "0.98"),
    ("docs/calibration.md", "says 0.98 where 0.82", "calibration", "style", "behaviour", "0.82"),
]


@pytest.mark.parametrize(("page", "says", "block", "row", "column", "cell"), NUMBERS)
def test_numbers_in_the_text(page, says, block, row, column, cell):
    assert says in " ".join(PAGES[page].split())
    assert any(text.startswith(cell) for text in cells(block, row, column))


PRINTED = [        # page, what it says, what analyze.py printed
    ("README.md", "84% [75, 101]", r"style: lost when masked +135 +73% +84% \[75, 101\]"),
    ("README.md", "costs 81% [71, 91]", r"as much used, at random +625 +75% +81% \[71, 91\]"),
    ("docs/analysis.md", "22% against 84%", r"as many at random +135 +17% +22% \["),
    ("docs/analysis.md", "has 73% [69, 78]", r"style +\+0.1453 \[\S+ \S+ +73% \[69, 78\]"),
    ("docs/analysis.md", "42% of its gain, and with eight 90%", r"first 2 bring 42% of the.*8 bring 90%"),
    ("docs/analysis.md", "Two directions hold 90%", r"\n2 directions hold 90%"),
    ("docs/lab.md", "answers 55.6% truly", r"truth +\+0.5 +576 +55.6%"),
]


@pytest.mark.parametrize(("page", "says", "printed"), PRINTED)
def test_numbers_of_the_printed_analysis(page, says, printed):
    block = re.search(r"<!-- analysis -->\n(.*?)<!-- /analysis -->", PAGES["docs/analysis.md"], re.S)[1]
    assert says in " ".join(PAGES[page].split()) and re.search(printed, block, re.S)


def test_the_fall_of_decline():
    """23.7 points at γ/β 0.5, 17.3 at γ/β 1, by the exact measure: the objective is about a quarter of it."""
    r = results.Results(json.loads(results.DATA.read_text(encoding="utf-8")))

    def fall(name, kind):
        points = r.points(name, kind, "decline")
        return -sum(points) / len(points)
    said = [fall(name, kind) for kind in ("exact", "answers") for name in ("style", "wide")]
    assert " ".join(f"{x:.1f}" for x in said) == "23.7 17.3 13.8 4.5"
    assert all(f"{x:.1f}" in PAGES["docs/lab.md"] for x in said)
    assert 0.2 < 1 - said[1] / said[0] < 0.3 and "about a quarter" in PAGES["docs/lab.md"]
