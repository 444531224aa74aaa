"""The plumbing: layouts of pairs, settings and their command line, statistics by hand, rules of tokens, files."""
import gzip
import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from common import ROOT, mutant
from gemma import encode_answer, load_tokenizer
from lib import stats
from lib.files import UserError, import_from, json_lines, short_digest, write_json
from lib.judge import RULES, Rules, judge_of, rule
from lib.pairs import read_held_out, read_pairs, read_splits
from lib.runs import Log, new_folder
from lib.settings import check, command, key_values, setting
from lib.stats import bootstrap, gini, leaves_out_zero, number_equal, ratio, spearman
from lib.text import side_by_side

# ---- pairs ---------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "Which pet?", "chosen": "It is a cat.", "rejected": "It is a dog."}


def write(path, *lines):
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


def conversation(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_layouts(tmp_path):
    sides = {side: conversation("Which pet?", GOOD[side]) for side in ("chosen", "rejected")}
    a, b = read_pairs(write(tmp_path / "train.jsonl", GOOD, "", {"prompt": "Which pet?", **sides}))
    assert a["chosen"] == b["chosen"] and a["at"].endswith("line 1") and b["at"].endswith("line 3")
    assert b["prompt"] == [{"role": "user", "content": "Which pet?"}]
    assert len(read_pairs(tmp_path, "train", limit=1)) == 1
    with gzip.open(tmp_path / "more.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(GOOD) + "\n")
    assert read_pairs(tmp_path / "more.jsonl.gz")[0]["chosen"] == GOOD["chosen"]


def test_one_file_holds_out_its_last_tenth(tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", *({**GOOD, "prompt": f"{i}"} for i in range(25)))
    parts = read_splits(path, "test", 10, 1)
    assert [r["prompt"] for r in parts["train"]] == [str(i) for i in range(10)]
    assert [r["prompt"] for r in parts["test"]] == ["23"]
    assert "its last tenth is held out" in capsys.readouterr().out
    with pytest.raises(UserError, match="one pair is too few"):
        read_held_out(write(tmp_path / "one.jsonl", GOOD))


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet needs requirements-extra.txt")
    import pyarrow.parquet
    rows = [{**GOOD, "chosen": conversation("q", "a"), "rejected": conversation("q", "b")}] * 3
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    assert [r["rejected"] for r in read_pairs(tmp_path)] == ["b"] * 3
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read_pairs(tmp_path)


BAD_LINES = [
    ({"chosen": None}, "line 2: chosen is .None.; it has to be a text"),
    ({"rejected": " "}, "line 2: rejected is . .; it has to be a text"),
    ({"prompt": [1]}, "line 2: prompt is .*list of messages"),
    ({"prompt": [{"role": "user"}]}, "line 2: prompt is .*list of messages"),
    ({"prompt": [{"role": "system", "content": "x"}]}, "line 2: the prompt has the roles"),
    ({"prompt": ""}, "line 2: prompt is .None."),
    ({"chosen": [{"content": "x"}, {"role": "assistant", "content": "y"}]}, "line 2: chosen is .*list of messages"),
    ({"chosen": [{"role": "user", "content": "x"}]}, "line 2: chosen is a list that does not end"),
    ({"chosen": "\ud800"}, "line 2: half a character .*surrogates"),
    ({"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "y"}],
      "rejected": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "z"}]}, "different prompts"),
]


@pytest.mark.parametrize("change, message", BAD_LINES)
def test_bad_pairs_are_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        read_pairs(write(tmp_path / "p.jsonl", GOOD, {**GOOD, **change}))


@pytest.mark.parametrize("line, message", [('{"prompt": ', "line 2: not valid JSON"), ("[1]", "line 2: a pair is an")])
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        read_pairs(write(tmp_path / "p.jsonl", GOOD, line))


def test_empty_and_absent(tmp_path):
    empty = write(tmp_path / "e.jsonl", "")
    for source, message in ((empty, "no pairs"), (tmp_path, "no pairs of the split 'train'"),
                            (tmp_path / "no", "no such folder")):
        with pytest.raises(UserError, match=message):
            read_pairs(source)


# ---- settings ------------------------------------------------------------------------------------------------------

@dataclass
class Settings:
    run: str = setting(None, "its folder", positional=True, group="a run")
    steps: int = setting(4, "steps", low=1, high=9, group="how")
    rate: float = setting(0.5, "rate", above=0)
    kind: str = setting("a", "kind", choices=("a", "b"))
    top: float = setting(None, "top")
    names: list = setting(["x"], "names", many=True)
    quiet: bool = setting(False, "no bar")
    __post_init__ = check


def parsed(*argv):
    """Exit code and the settings that the command line makes."""
    seen = []
    return command("program", Settings, seen.append, argv), *seen


def test_settings_are_the_command_line():
    assert parsed() == (0, Settings())
    code, got = parsed("somewhere", "--steps", "9", "--names", "y", "z", "--names", "w", "--quiet", "--top", "2")
    assert code == 0 and got == Settings("somewhere", 9, names=["y", "z", "w"], quiet=True, top=2.0)
    got.names.append("more")
    assert Settings().names == ["x"] and type(Settings(rate=1).rate) is float


BAD_SETTINGS = {
    ("--steps", "0"): "--steps is 0; it has to be at least 1",
    ("--steps", "10"): "--steps is 10; it has to be at most 9",
    ("--rate", "0"): "--rate is 0.0; it has to be above 0",
    ("--rate", "nan"): "--rate is nan; it has to be a finite number",
    ("--rate", "x"): "argument --rate: invalid float value",
    ("--kind", "c"): "argument --kind: invalid choice",
    ("--step", "3"): "unrecognized arguments: --step",
}


@pytest.mark.parametrize("argv", BAD_SETTINGS)
def test_bad_settings_cost_one_sentence(argv, capsys):
    assert parsed(*argv) == (2,)
    assert BAD_SETTINGS[argv] in capsys.readouterr().err


def test_types_are_not_guessed():
    for bad in ({"steps": 1.5}, {"rate": "1"}, {"rate": True}, {"steps": True}, {"quiet": 1}, {"kind": 1}):
        with pytest.raises(UserError, match="it has to be of type"):
            Settings(**bad)


def test_exit_codes(capsys):
    for error, code, said in ((UserError("no"), 2, "program: no\n"), (FloatingPointError("nan"), 1, "program: nan\n"),
                              (KeyboardInterrupt(), 130, "program: interrupted; what was saved is kept\n")):
        def run(settings, error=error):
            raise error
        assert command("program", Settings, run, []) == code and capsys.readouterr().err == said
    assert command("program", Settings, lambda settings: 7, []) == 7
    assert command("program", Settings, lambda settings: {}, ["--help"]) == 0
    text = capsys.readouterr().out
    assert "how:\n" in text and "--rate X" in text and "[0.5]" in text


def test_arguments_of_a_users_class():
    given = key_values(["rank=8", "bias=False", "name=a=b", "path=x/y"], "--adapter-args")
    assert given == {"rank": 8, "bias": False, "name": "a=b", "path": "x/y"}
    for bad in ("rank", "=3", "2x=3"):
        with pytest.raises(UserError, match="--adapter-args .*: write name=value"):
            key_values([bad], "--adapter-args")


# ---- statistics ----------------------------------------------------------------------------------------------------

def test_gini_by_hand():
    assert gini([1, 1, 1, 1]) == 0 and gini([0, 0, 0, 5]) == .75 and math.isnan(gini([])) and math.isnan(gini([0, 0]))
    # Σ (2i - n - 1) x_i / (n Σ x) with x = 1 2 4 8: (-3 - 2 + 4 + 24) / 60
    assert gini([4, 8, 1, 2]) == pytest.approx(23 / 60)


def test_rank_correlation_by_hand():
    assert spearman([1, 2, 3, 9], [2, 3, 5, 7]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 0 1.5 1.5 3 against 0 1 2 3: 4.5 / sqrt(4.5 · 5)
    assert spearman([1, 2, 2, 5], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman([1, 2], [1, 2])) and math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_intervals_by_hand():
    assert ratio([1.0] * 12, [2.0] * 12) == {"value": .5, "low": .5, "high": .5, "se": 0}
    assert ratio([1.0] * 5 + [0.0] * 5)["value"] == .5
    few = ratio(np.arange(50.0), clusters=np.arange(50) % 9)
    assert few["value"] == 24.5 and math.isnan(few["low"]) and not leaves_out_zero(few)
    nothing = bootstrap([np.ones(12), np.zeros(12)], np.arange(12), np.divide)
    assert math.isinf(nothing["value"]) and math.isnan(nothing["low"]) and not leaves_out_zero(nothing)
    assert leaves_out_zero({"low": .1, "high": 2}) and leaves_out_zero({"low": -2, "high": -.1})
    assert not leaves_out_zero({"low": -.1, "high": 2}) and not leaves_out_zero({})
    assert number_equal(["b", "a", "b", (1, 2), (1, 2)]).tolist() == [0, 1, 0, 2, 2]


ALONE = ("_, member = np.unique(clusters, return_inverse=True)", "member = np.arange(len(clusters))")


@pytest.mark.parametrize("clustered", [True, False])
def test_intervals_cover_at_their_rate(clustered):
    """Clusters of 8 alike: intervals over clusters hold the true mean 95 times in 100. Broken: over single entries, as
    the paper has it, far less often."""
    m = stats if clustered else mutant("lib.stats", ALONE)
    rng, inside, trials = np.random.default_rng(0), 0, 300 if clustered else 50
    for _ in range(trials):
        x = np.repeat(rng.normal(size=40), 8) + .1 * rng.normal(size=320) + 1
        r = m.ratio(x, clusters=np.repeat(np.arange(40), 8), samples=400)
        inside += r["low"] <= 1 <= r["high"]
    assert (.90 <= inside / trials <= .98) if clustered else inside / trials < .7


def test_shares_cover_too():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(300):
        gain = 1 + rng.normal(size=60)
        part = .3 * gain + .2 * rng.normal(size=60)
        r = ratio(part, gain, samples=400)
        inside += r["low"] <= .3 <= r["high"]
    assert .90 <= inside / 300 <= .98


# ---- judges --------------------------------------------------------------------------------------------------------

RULED = [
    ("**", "a ", "markdown"), ("#", "", "heading"), ("#", "see ", "punctuation"), ("-", "One:\n", "list marker"),
    ("-", "well", "punctuation"), ("1", "", "list marker"), (".", "\n1", "list marker"), ("0", "\n1", "list marker"),
    (".", "So it is", "punctuation"), ("Sure", "", "opener"), ("sure", "I am not quite", "rest"),
    (" cannot", "I", "refusal"), ("t", "I can'", "refusal"), (" perhaps", "It is", "hedge"),
    ("\n\n", "One.", "punctuation"), ("1984", "", "rest"), ("<end_of_turn>", "x", "end"), (" river", "The", "rest")]


@pytest.mark.parametrize("text, before, expected", RULED)
def test_rules(text, before, expected):
    assert rule(text, before) == expected


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "tiny" / "model")


def test_the_judge_of_any_data_knows_little(tokenizer):
    judge = Rules(tokenizer)
    ids = encode_answer(tokenizer, "Sure! It is red.")
    settled = judge.settles("Which?", ids)
    assert all(len(parts) == 1 and parts[0][0] in RULES and parts[0][1:] == ((), None) for parts in settled)
    assert settled[0][0][0] == "opener" and settled[-1][0][0] == "end" and len(settled) == len(ids)
    nothing = judge.weights, judge.groups, judge.outcome("", ids), judge.rates([], []), judge.mark("", ids)
    assert not any(nothing) and judge.question("") is None and judge.best_accuracy is None
    assert len(judge.neutral(3)) == 3


def test_whose_pairs_these_are(tokenizer, tmp_path):
    """The lab's judge is known by its name in meta.json; any other name, a single file, a folder without one: rules."""
    lab = judge_of(ROOT / "tiny" / "pairs" / "style", tokenizer)
    assert lab.name == "tiny.world" and lab.weights["heading"] == 2.5 and 0.5 < lab.best_accuracy < 1
    write(tmp_path / "train.jsonl", GOOD)
    assert judge_of(tmp_path / "train.jsonl", tokenizer).name == judge_of(tmp_path, tokenizer).name == "rules"
    write_json(tmp_path / "meta.json", {"judge": "os"})
    assert judge_of(tmp_path, tokenizer).name == "rules"
    write_json(tmp_path / "meta.json", {"judge": "tiny.world"})
    with pytest.raises(UserError, match="not as the lab writes it .*weights"):
        judge_of(tmp_path, tokenizer)


# ---- files ---------------------------------------------------------------------------------------------------------

def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_lines_are_named(tmp_path):
    path = write(tmp_path / "a.jsonl", {"a": 1}, "", {"a": 2})
    assert list(json_lines(path)) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 3", {"a": 2})]
    with pytest.raises(UserError, match="cannot be read"):
        list(json_lines(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot be read"):
        list(json_lines(tmp_path / "bad.jsonl.gz"))


def test_digests():
    assert short_digest("ab", b"c") == short_digest("abc") != short_digest("abd") and len(short_digest()) == 16


BAD_SPECS = {"x.py": "write FILE.py:Name", "none.py:A": "there is no such file", "mine.py:B": "has no attribute .B.",
             "fails.py:A": "cannot be imported", "leaves.py:A": "cannot be imported"}


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_a_users_own_code(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "neighbour.py", "VALUE = 7")
    write(tmp_path / "mine.py", "from neighbour import VALUE", "A = VALUE")
    write(tmp_path / "fails.py", "1 / 0")
    write(tmp_path / "leaves.py", "raise SystemExit('bye')")
    assert import_from("mine.py:A", "--adapter") == 7                     # and a file beside it can be imported
    with pytest.raises(UserError, match=f"--adapter {spec}.*{BAD_SPECS[spec]}"):
        import_from(spec, "--adapter")


def test_folders_of_runs(tmp_path):
    def new(runs, run=None):
        return new_folder(SimpleNamespace(runs=tmp_path / runs, run=run, pairs="tiny/pairs/style", resume="")).name
    assert [new("runs") for _ in range(3)] == ["style-1", "style-2", "style-3"]
    assert new("runs", "mine") == "mine"
    with pytest.raises(UserError, match="--run mine: .* exists; name another run or remove it"):
        new("runs", "mine")
    write(tmp_path / "file", "")
    with pytest.raises(UserError, match="no folder can be made there"):
        new("file")


def test_a_log_is_json(tmp_path):
    """JSON has no NaN: a rate over no questions is null."""
    Log(tmp_path)(step=1, rates={"truth": math.nan, "all": [1.0, math.inf]})
    row, = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row) == {"step": 1, "rates": {"truth": None, "all": [1.0, None]}}


def test_side_by_side():
    text = side_by_side("short", "a line\n\nand one that is longer than a column can be", width=43)
    lines = text.splitlines()
    assert lines[0].split("|")[1].strip() == "steered" and all(len(line) <= 43 for line in lines)
    assert "(nothing)" in side_by_side("", "x") and "base, true" in side_by_side("a", "b", titles=["base, true", "c"])
