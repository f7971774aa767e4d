"""Evaluation: finished runs become functions, are attacked, compared and drawn (eval.py).

Every run of a comparison is attacked on the same texts. Robust accuracy is what a recount of
attacks.jsonl gives and never exceeds clean accuracy. An evaluation that was interrupted anywhere
ends like one that was not. Intervals are the textbook's. All of it on real runs of tiny models,
made by train.main: BERT on texts of two classes, RoBERTa on pairs of three. What bad input leads to
is in test_robustness.py, that a run predicts what it did as it was trained in test_train.py.
"""
import csv
import functools
import io
import itertools
import json
import pickle
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch

import attacks
import data
import eval
import train
from tests.conftest import TABLE, save_model, write_task

METHODS = ("standard", "adv", "rift")
FILES = ("attacks.jsonl", "eval.json", "metrics.json")
BOTH = ["--attacks", "pwws", "genetic", "--population", "6", "--generations", "3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{"texts": runs of BERT on texts of two classes, "pairs": of RoBERTa on pairs of three}."""
    folder, outs = tmp_path_factory.mktemp("finished"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RIFT_CACHE", str(folder / "cache"))
        patch.setattr(data, "prepare_nltk", lambda *args, **kwargs: None)
        patch.setattr(data, "words_of", lambda text: text.lower().split())
        for name, kind, labels, methods in (
                ("texts", "bert", ("neg", "pos"), METHODS),
                ("pairs", "roberta", ("no", "so", "yes"), ("standard", "rift"))):
            task = write_task(folder / name, labels, pair=name == "pairs")
            model, outs[name] = save_model(folder / kind, kind), folder / f"{name}-runs"
            train.main(["--task", str(task), "--model", str(model), "--out", str(outs[name]),
                        "--neighbors", str(task / "neighbors.json"), "--method", *methods,
                        "--epochs", "3", "--batch-size", "9", "--max-len", "16", "--lr", "1e-2",
                        "--adv-steps", "3", "--device", "cpu"])
    return outs


@pytest.fixture
def runs(finished, tmp_path, plain_words):
    """The finished runs in a folder of this test's own."""
    return {name: shutil.copytree(out, tmp_path / name) for name, out in finished.items()}


@pytest.fixture
def run(runs):
    return runs["texts"] / "rift"


def evaluate(*arguments):
    eval.main([*map(str, arguments), "--device", "cpu"])


def lines_of(run, name="attacks.jsonl"):
    return data.read_lines(run / name)


def files_of(run):
    return {name: (run / name).read_text() for name in FILES}


def examples_of(run, split="test"):
    return getattr(data.open_task(eval.settings_of(run)[0]), split)


def swaps(run, attack):
    """What an attack changed in a run's texts: a set of (old word, new word)."""
    pairs = set()
    for line in lines_of(run):
        before, after = (data.from_text(line[key])[-1] for key in ("original", "adversarial"))
        pairs |= {pair for pair in zip(before, after) if line["attack"] == attack}
    return {(a, b) for a, b in pairs if a != b}


# ---- A run is a function -------------------------------------------------------------------------


def test_the_hull_attack_is_against_the_label(runs):
    """It takes more probability from the class that it is told than from the other one. What it
    returns are other texts, and their features."""
    run = runs["texts"] / "standard"
    victim, examples = eval.load_run(run, "cpu"), examples_of(run)
    told = [examples, [x._replace(y=1 - x.y) for x in examples]]
    found = [eval.hull_attack(victim, some, steps=3) for some in told]
    P, P_other = (victim.probabilities(S) for _, _, S in found)
    rows, y = np.arange(len(examples)), [x.y for x in examples]
    assert P[rows, y].mean() < P_other[rows, y].mean() - 0.01
    _, texts, S = found[0]
    assert torch.allclose(S, victim.features(texts), atol=1e-5)
    assert texts != [victim.vocabulary.visible(x.words) for x in examples]


def test_batches_do_not_matter(runs):
    """A text has its probabilities whatever is beside it, and in the hull noise of its own. Those
    of like length are together, so that little is padded."""
    run = runs["pairs"] / "rift"
    examples = examples_of(run)
    texts = [data.to_text(x.words) for x in examples]
    small, large = (eval.load_run(run, "cpu", batch_size=size) for size in (1, 64))
    assert np.allclose(small(texts), large(texts), atol=1e-5)
    for steps in (0, 2):                                        # 0: the noise alone
        few, all = (eval.hull_attack(victim, some, steps=steps)[1]
                    for victim, some in ((small, examples[:5]), (large, examples)))
        assert few == all[:5]
    with mock.patch.object(eval.rift, "noise", side_effect=eval.rift.noise) as noise:
        assert len(set(eval.hull_attack(large, examples[:1] * 20, steps=0)[1])) > 1
    # drawn for the longest input, not for the batch's, as in training
    assert noise.call_args.args[1] == large.vocabulary.max_len
    assert large([]).shape == (0, 3)
    in_order = [rows for rows, _ in small.batches([(("good",) * n,) for n in (3, 1, 2)])]
    assert in_order == [[1], [2], [0]]


@pytest.mark.parametrize("kind, texts, message", [
    ("texts", "a great film", "is one text, not a list of texts"),
    ("texts", [("a movie", "a film")], "the model reads a string each"),
    ("pairs", [("a", 2)], "the model reads a pair of strings each"),
])
def test_what_is_no_list_of_texts_is_an_error(runs, kind, texts, message):
    with pytest.raises(ValueError, match=message):
        eval.load_run(runs[kind] / "rift", "cpu")(texts)


def test_texts_of_one_key_are_one_text_to_the_model(runs):
    """Every word that the model sees counts, also where a premise ends; no other word does."""
    victim = eval.load_run(runs["pairs"] / "rift", "cpu")
    long = [("this movie", "good " * 16), ("this movie", "good " * 16 + "bad")]
    assert victim.key(long[0]) == victim.key(long[1]) and np.array_equal(*victim(long))
    assert victim.visible(long[0]) == 16 - 3 - 2        # not special tokens, not the premise
    different = [("this movie", "good movie"), ("this movie", "movie good"), ("this movie", "good"),
                 ("this", "movie good movie"), ("", "this movie good movie"), ("this movie", "")]
    assert len(set(map(victim.key, different))) == len(different)


def test_dropout_in_a_head_of_ones_own_is_off_also_while_it_is_trained(run):
    victim = eval.load_run(run, "cpu")
    expected = victim(["a good movie"])
    victim.model.head.append(torch.nn.Dropout(0.5))
    victim.model.train()
    assert np.array_equal(victim(["a good movie"]), expected) and victim.model.head.training


def test_a_run_in_ones_own_program_is_a_quiet_function(run, capfd):
    """Loading it leaves the random numbers as they were and prints nothing; it can be pickled."""
    before = torch.get_rng_state()
    victim = eval.load_run(run, "cpu")
    assert torch.equal(torch.get_rng_state(), before) and capfd.readouterr() == ("", "")
    texts = ["a good movie", "this bad film was dull"]
    assert np.array_equal(pickle.loads(pickle.dumps(victim))(texts), victim(texts))


# ---- Accuracy, and how certain it is -------------------------------------------------------------


@pytest.mark.parametrize("successes, n, low, high", [
    (8, 10, 0.4902, 0.9433), (0, 10, 0, 0.2775), (50, 100, 0.4038, 0.5962), (1, 1, 0.2065, 1)])
def test_wilson(successes, n, low, high):
    assert eval.wilson(successes, n) == pytest.approx((low, high), abs=2e-4)
    # rounding alone would take it below 0, and it would be printed as -0.000
    assert f"{eval.wilson(0, 15 * n)[0]:.3f}" == "0.000" and eval.wilson(15 * n, 15 * n)[1] <= 1


def difference(a, b, **more):
    """eval.bootstrap of a difference of two groups of runs, or of two single runs."""
    return eval.bootstrap(lambda x, y: x - y, np.atleast_2d(a), np.atleast_2d(b), **more)


def test_bootstrap_intervals_cover_the_truth():
    """About 95 times of 100; pairing narrows them, and equal results differ by exactly nothing."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        b = rng.random(200) < 0.6
        a = b | (rng.random(200) < 0.25)                        # truth: 0.4 * 0.25 = 0.1
        d, low, high = difference(a, b, draws=500)
        assert low <= d <= high and d == pytest.approx(a.mean() - b.mean())
        covered += low <= 0.1 <= high
    assert 180 <= covered < 200
    _, low, high = difference(a, rng.permutation(b))
    _, paired_low, paired_high = difference(a, b)
    assert high - low > 1.2 * (paired_high - paired_low)
    assert difference(a, a) == (0, 0, 0) and difference(b, a)[0] == -difference(a, b)[0]


def test_bootstrap_of_several_runs_is_as_uncertain_as_runs_and_texts():
    """Runs that agree leave the texts' uncertainty, runs that differ widen it, one says nothing.
    Of R runs R - 1 are drawn: R would understate how much runs differ."""
    rng = np.random.default_rng(0)
    good, bad = rng.random(100) < 0.75, rng.random(100) < 0.25
    texts_only = difference(good, bad)
    assert difference([good, good], [bad, bad]) == pytest.approx(texts_only, abs=1e-9)
    d, low, high = difference([good, bad], [bad, bad])
    assert d == pytest.approx((good.mean() - bad.mean()) / 2)
    assert high - low > 2 * (texts_only[2] - texts_only[1])
    mixed, both = (good.astype(float) + bad) / 2, [good, bad]
    assert difference(both, bad) == pytest.approx(difference(mixed, bad), abs=1e-9)
    one_of_four = np.eye(4)[:, :1].repeat(10, 1)                # four draws: up to 3/4
    assert difference(one_of_four, 0 * one_of_four)[1:] == pytest.approx((0, 2 / 3))


def evaluation(clean, robust, method="adv", **settings):
    """An Evaluation of 100 texts with these accuracies."""
    prints = {"data": "d", "encoder": "e", "neighbors": "n"}
    run = SimpleNamespace(method=method, **{"seed": 0, "beta": 1, "fingerprints": prints,
                                            "model": "bert"} | settings)
    right = {"clean": np.arange(100) < round(100 * clean),
             "pwws": np.arange(100) < round(100 * robust)}
    return eval.Evaluation(f"runs/{method}-{run.seed}", run, ["neg", "pos"], right,
                           {"pwws": []}, {"pwws": {"unknown": "NULL", "max_queries": None}}, [])


@pytest.fixture
def few_draws(monkeypatch):
    """Intervals that are found faster."""
    monkeypatch.setattr(eval, "bootstrap", functools.partial(eval.bootstrap, draws=500))


def test_the_gain_in_the_trade_off_is_that_over_the_interpolated_curve(few_draws):
    """0.1 above the line between two points, 0.1 above an end that is held; 0 above itself."""
    adv = {1.0: [evaluation(0.8, 0.3)], 5.0: [evaluation(0.6, 0.5)]}
    rift = {1.0: [evaluation(0.9, 0.4)], 5.0: [evaluation(0.7, 0.5)]}
    gain, low, high = eval.tradeoff_gain(adv, rift, "pwws")
    assert gain == pytest.approx(0.1) and low < gain < high
    several = {beta: [*same, *same] for beta, same in adv.items()}
    for points in (adv, several):
        assert eval.tradeoff_gain(points, points, "pwws") == (0, 0, 0)


# ---- Several runs --------------------------------------------------------------------------------


def test_runs_are_averaged_over_seeds_only():
    """Runs that differ in more are separate and say in what. A weight that the method does not use
    is no setting, and paths are none; what they hold is."""
    same = [evaluation(0.5, 0.5, seed=i, alpha=i, mixout=i, tau=i, data_dir=f"{i}",
                       model=f"{i}/toy", neighbors=f"{i}/x.json", task=f"{i}") for i in (0, 1)]
    rift = [evaluation(0.5, 0.5, "rift", alpha=alpha) for alpha in (0.1, 0.5)]
    expected = {"adv": same, "rift alpha 0.1": rift[:1], "rift alpha 0.5": rift[1:]}
    assert eval.by_settings([*same, *rift]) == expected
    assert eval.by_settings([*same, *rift], "alpha") == {"adv": same, "rift": rift}
    prints = same[0].run.fingerprints | {"encoder": "another"}
    other = evaluation(0.5, 0.5, model="0/toy", fingerprints=prints)
    assert eval.by_settings([*same, other]) == {"adv encoder 0/toy (e)": same,
                                                "adv encoder 0/toy (anothe)": [other]}


def test_the_column_head_tells_tables_apart(capsys):
    """Also two data sets of one name are."""
    x, y = evaluation(0.5, 0.25), evaluation(0.5, 0.25, "rift")
    for one, table in ((x, "abcdefgh"), (y, "ijklmnop")):
        one.settings["pwws"]["neighbors"] = table
    said = report(capsys, x, y)
    head = "pwws (unknown NULL, neighbors {})".format
    assert f"{head('abcdef')} / {head('ijklmn')}" in said
    y.settings["pwws"]["neighbors"] = "abcdefgh"
    assert "neighbors" not in report(capsys, x, y)
    x.name, x.run.task = "runs/a/adv", "task"
    y.name, y.run.task = "runs/b/adv", "task"
    eval.report([[x, x], [y, y]], eval.parse(["runs", "--attacks", "pwws"]))
    said = capsys.readouterr().out
    assert all(f"over runs, task ({name} ..)" in said for name in (x.name, y.name))


@pytest.mark.parametrize("method, setting", [
    ("own", "sparsity"), ("own", "mixout"), ("own", "tau"), ("adv", "sparsity")])
def test_runs_of_an_added_method_differ_in_its_weights_and_in_tau(monkeypatch, method, setting):
    """Its term may be a score with tau. What is a weight there stays a setting of other methods."""
    monkeypatch.setitem(eval.rift.METHODS, "own", {len: "sparsity", max: "mixout"})
    runs = [evaluation(0.5, 0.5, method, **{setting: value}) for value in (1, 2)]
    assert len(eval.by_settings(runs)) == 2


def report(capsys, *evaluations, more=()):
    eval.report([list(evaluations)], eval.parse(["runs", "--attacks", "pwws", *map(str, more)]))
    return capsys.readouterr().out


def test_the_table_recounts_the_lines_of_the_attacks(capsys, tmp_path):
    """By hand, for a text that became another class and a pair that has no word with a synonym.

    words: share of changed words where the attack succeeded; fixed: share of texts without
    synonyms; stopped: of all texts. --show prints what changed, --csv writes all texts, also one
    that was wrong before.
    """
    fooled = dict(index=3, attack="pwws", label=0, original="a good movie",
                  adversarial="a great film", success=True, prediction=1, words_changed=2,
                  queries=9, stopped=False, substitutable=2)
    survived = fooled | dict(index=5, original=("a", "b c"), adversarial=("a", "b c"), queries=2,
                             success=False, stopped=True, prediction=0, words_changed=0,
                             substitutable=0)
    wrong = dict(index=7, label=1, original="bad", adversarial="bad", prediction=0)
    x, empty = evaluation(0.5, 0.25), evaluation(0, 0, seed=1)
    x.lines["pwws"] = [fooled, survived]
    x.settings["pwws"] |= {"unknown": "my_null", "max_queries": 20}
    x.wrong.append(wrong)
    out = report(capsys, x, empty, more=["--csv", tmp_path / "texts.csv"])
    head, row, nothing = out.splitlines()[2:5]
    assert "pwws (unknown my_null, max queries 20)" in head
    assert row.split() == ["runs/adv-0", "100", "0.500", "[0.404,", "0.596]", "0.250", "[0.175,",
                           "0.343]", "1.0%", "66.7%", "6", "50.0%"]
    assert nothing.split()[4:] == ["0.037]", "0.000", "[0.000,", "0.037]", "0.0%", *"---"]
    assert "runs/adv-0, pwws: neg -> pos\n  a [good -> great] [movie -> film]\n" in out
    with open(tmp_path / "texts.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    of = {"run": "runs/adv-0", "attack": "pwws"}
    expected = [fooled | of | {"label": "neg", "prediction": "pos", "correct": True},
                survived | of | {"label": "neg", "prediction": "neg", "correct": True}
                | {"original": "a | b c", "adversarial": "a | b c"},
                dict.fromkeys(fooled, "") | wrong | of | {"label": "pos", "prediction": "neg",
                                                          "correct": False}]
    assert rows == [{key: str(value) for key, value in line.items()} for line in expected]


def test_methods_are_compared_by_mean_and_spread(capsys):
    """0.5 and 1.0 are 0.75 on average, sd 0.354. A star marks an interval over texts only. standard
    is the reference wherever it is, without one the first run is."""
    adv = [evaluation(1, x, seed=x) for x in (0.5, 1.0)]
    rift = [evaluation(1, x, "rift", seed=x) for x in (0.25, 0.75)]
    out = report(capsys, *adv, *rift, evaluation(0.9, 0, "standard"))
    rows = {tuple(line.split()[:3]): line for line in out.splitlines()}
    assert rows["adv", "2", "1.000"].split("  ")[-1] == "0.750 (sd 0.354)"
    assert rows["standard", "1", "0.900"].split() == ["standard", "1", "0.900", "0.000"]
    assert "over texts and runs; *: over texts" in out
    assert rows["rift", "-", "adv"].endswith("]") and "-0.250 [" in rows["rift", "-", "adv"]
    for method, gain in (("adv", "+0.750 ["), ("rift", "+0.500 [")):
        row = rows[method, "-", "standard"]
        assert gain in row and row.endswith("]*")
    assert "\nadv - rift " in report(capsys, *rift, *adv)


def test_several_betas_are_compared_along_the_trade_off(capsys, few_draws):
    """Within the range of adv's clean accuracy; a beta beyond it has a line of its own."""
    runs = [evaluation(1 - beta / 10, beta / 10 + 0.2 * (m == "rift"), m, beta=beta, seed=seed)
            for m in ("adv", "rift") for beta in (2, 5) for seed in (0, 1)]
    more = [evaluation(0.4, 0.8, "rift", beta=6, seed=seed) for seed in (0, 1)]
    more += [evaluation(0.9, 0.1, "standard", beta=beta) for beta in (2, 5)]
    within, beyond = [x for x in report(capsys, *runs, *more).splitlines() if " against adv" in x]
    assert within.startswith("rift against adv at the same clean accuracy, pwws, mean over the 2 "
                             "of 3 betas within adv's range: +0.200 [")
    assert "beta 6, beyond the ends of adv's curve: +0.300 [" in beyond and "]*" not in beyond
    starred, = [x for x in report(capsys, *runs[1:]).splitlines() if x.startswith("rift against")]
    assert starred.endswith("]*")                               # adv has one run with beta 2
    twice = [evaluation(0.9, 0.1, beta=beta, lr=lr) for beta in (2, 5) for lr in (1, None)]
    said = report(capsys, *twice, *more)
    assert "adv has several: adv lr 1, adv\n" in said and "at the same clean" not in said


# ---- Evaluations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["texts", "pairs"])
def test_the_figures_are_a_recount_of_the_lines(runs, kind, capsys):
    """robust = clean - successes / N for every attack; a line is what the victim says of it."""
    run = runs[kind] / "standard"
    before = data.read_json(run / "metrics.json")
    evaluate(run, *BOTH, "--attacks", "pwws", "genetic", "hull", "--num-examples", 14)
    summary, lines = data.read_json(run / "eval.json"), lines_of(run)
    victim, examples = eval.load_run(run, "cpu"), examples_of(run)
    assert set(summary) == {"clean", "pwws", "genetic", "hull", "num_examples", "settings"}
    attacked, N = {line["index"] for line in lines}, summary["num_examples"]
    assert N == 14 and summary["clean"] == len(attacked) / N
    for attack in ("pwws", "genetic", "hull"):
        mine = [line for line in lines if line["attack"] == attack]
        assert {line["index"] for line in mine} == attacked and len(mine) == len(attacked)
        fooled = sum(line["success"] for line in mine)
        assert summary[attack] == pytest.approx(summary["clean"] - fooled / N)
    if kind == "texts":         # the three-class model is near chance: it need not fall
        assert 0 < sum(line["success"] for line in lines) < len(lines)
    for line in lines:
        x = examples[line["index"]]
        *premise, old = data.from_text(line["original"])
        *kept, new = data.from_text(line["adversarial"])
        assert line["label"] == x.y and (*premise, old) == victim.vocabulary.visible(x.words)
        assert premise == kept and len(old) == len(new)
        assert line["words_changed"] == sum(a != b for a, b in zip(old, new))
        assert line["substitutable"] == sum(word in TABLE for word in old)
        assert all(b in TABLE[a] for a, b in zip(old, new) if a != b)
        assert line["prediction"] == victim([line["adversarial"]]).argmax()
        assert line["success"] == (line["prediction"] != line["label"])
    black_box = {name: summary[name] for name in ("pwws", "genetic")}
    assert data.read_json(run / "metrics.json") == before | black_box          # hull is training's
    out = capsys.readouterr().out
    assert f"{summary['pwws']:.3f} [" in out
    assert "genetic (population 6, generations 3, lm constraint none)" in out
    assert "hull (steps 3)" in out


def test_every_run_is_attacked_on_the_same_texts(runs, capsys):
    """They depend on --seed, as does what an attack draws. No attack asks for more texts than
    --max-queries; that this stopped it is said beside it."""
    folders = [*(runs["texts"] / method for method in METHODS), runs["pairs"] / "rift"]
    command = ["--attacks", "pwws", "exhaustive", "--num-examples", 6, "--max-queries", 10]
    evaluate(*folders, *command, "--seed", 3)
    table = capsys.readouterr().out.split("Accuracy on")[1].split("\n\n")[0].splitlines()[1:]
    shown = [[str(folder), "6"] for folder in folders]
    assert [row.split()[:2] for row in table[1:]] == shown       # two tasks share a table
    assert "exhaustive (max queries 10)  stopped" in table[0]
    lines = [line for folder in folders[:3] for line in lines_of(folder)]
    first = {line["index"] for line in lines}
    assert len(first) <= 6 and max(line["queries"] for line in lines) == 10
    assert "exhaustive" in {line["attack"] for line in lines if line["stopped"]}
    with (mock.patch.object(attacks, "attack", side_effect=attacks.attack) as attack,
          mock.patch.object(eval, "hull_attack", side_effect=eval.hull_attack) as hull):
        evaluate(folders[0], *command, "--seed", 4, "--overwrite", "--attacks", "pwws", "hull")
    assert attack.call_args.kwargs["seed"] == hull.call_args.kwargs["seed"] == 4
    assert {line["index"] for line in lines_of(folders[0])} - first


def stopping(after):
    """eval.run_attack, but Ctrl-C is pressed after so many results."""
    real = eval.run_attack

    def run_attack(*arguments):
        for n, result in enumerate(real(*arguments)):
            if n == after:
                raise KeyboardInterrupt
            yield result
    return mock.patch.object(eval, "run_attack", run_attack)


def test_a_text_that_another_batch_makes_wrong_is_not_robust(run, monkeypatch):
    """In bf16 the same text can be right in one batch and wrong in another."""
    answer, calls = eval.Victim.__call__, []

    def turning(victim, texts):
        calls.append(1)
        P = answer(victim, texts)
        return P if len(calls) == 1 else P[:, ::-1]         # right only when clean is measured

    monkeypatch.setattr(eval.Victim, "__call__", turning)
    evaluate(run, "--attacks", "pwws")
    scores = data.read_json(run / "eval.json")
    assert scores["clean"] > 0 and scores["pwws"] == 0


@pytest.mark.parametrize("attack", [["pwws", "genetic"], ["hull"]])
def test_an_interrupted_evaluation_ends_like_one_that_was_not(run, runs, attack, capsys):
    """Killed after any byte of attacks.jsonl, and stopped once more: the same table and files.
    Ctrl-C keeps the finished texts and says how to go on."""
    command = [run, *BOTH, "--attacks", *attack, "--num-examples", 12]
    evaluate(*command)
    out, files = capsys.readouterr().out, files_of(run)
    whole = files["attacks.jsonl"]
    end = whole.index("\n")
    for cut in [0, end, end + 1, *np.random.default_rng(0).integers(1, len(whole), size=2)]:
        (run / "attacks.jsonl").write_text(whole[:cut])
        (run / "eval.json").unlink()
        with stopping(1), suppress(SystemExit):                 # unless less was left to do
            evaluate(*command)
        capsys.readouterr()
        evaluate(*command)
        assert capsys.readouterr().out == out and files_of(run) == files, cut
    with stopping(2), pytest.raises(SystemExit) as stop:
        evaluate(*command, "--overwrite")
    assert stop.value.code == 130 and len(lines_of(run)) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "eval.py: stopped; finished texts are kept, and this goes on: python eval.py "
        f"{' '.join(map(str, command))} --device cpu "
        "(but runs that were not attacked yet still need --overwrite)")


def test_more_examples_and_attacks_go_on_from_the_finished_ones(run):
    """The chosen texts of a smaller N are the first of a larger N, and their lines serve. Attacks
    one by one are as both at once. --overwrite attacks anew what it is given, and nothing else."""
    evaluate(run, "--attacks", "pwws", "--num-examples", 6)
    before = lines_of(run)
    with mock.patch.object(attacks, "attack", side_effect=attacks.attack) as attack:
        evaluate(run, "--attacks", "pwws", "--num-examples", 10)
    asked = {i for i, _, _ in attack.call_args.args[1]}
    assert asked and before and not asked & {line["index"] for line in before}
    assert all(line in lines_of(run) for line in before)
    evaluate(run, *BOTH, "--attacks", "genetic", "--num-examples", 10)
    gone_on = files_of(run)
    evaluate(run, *BOTH, "--num-examples", 10, "--overwrite")
    at_once = files_of(run)
    assert gone_on["attacks.jsonl"] == at_once["attacks.jsonl"]
    assert all(json.loads(gone_on[name]) == json.loads(at_once[name]) for name in FILES[1:])
    with mock.patch.object(attacks, "attack", side_effect=attacks.attack) as attack:
        evaluate(run, "--attacks", "pwws", "--num-examples", 10, "--overwrite")
    assert {i for i, _, _ in attack.call_args.args[1]} >= asked and files_of(run) == at_once


def test_a_look_at_fewer_texts_keeps_what_the_attacks_found_on_them(run):
    evaluate(run, *BOTH, "--num-examples", 10)
    evaluate(run, "--num-examples", 6)
    without_attacks = files_of(run)
    evaluate(run, *BOTH, "--num-examples", 6, "--overwrite")
    attacked = files_of(run)
    assert all(json.loads(without_attacks[name]) == json.loads(attacked[name])
               for name in FILES[1:])
    assert len({line["index"] for line in lines_of(run)}) <= 6  # by older code no line is left
    evaluate(run, "--num-examples", 16)
    assert "pwws" not in data.read_json(run / "eval.json")      # six of them were not attacked


@pytest.mark.parametrize("more", [
    ["--seed", 1], ["--population", 7], ["--max-queries", 9], ["--precision", "bf16"],
    ["--neighbors", "other.json"], []], ids=str)
def test_what_was_attacked_on_other_terms_is_kept_and_not_used(run, tmp_path, monkeypatch, more):
    """Both sets of lines are in the file; eval.json and what is attacked are today's alone. On the
    old terms nothing has to be attacked again. []: of another model."""
    monkeypatch.chdir(tmp_path)
    data.write_json(Path("other.json"), {"good": ["bad"]})
    command, model = [run, *BOTH, "--num-examples", 8], run / "model.safetensors"
    evaluate(*command)
    before, files, weights = lines_of(run), files_of(run), model.read_bytes()
    if not more:
        tensors = safetensors.torch.load(weights)
        data.save_tensors(model, {name: p * 0.9 for name, p in tensors.items()})
    evaluate(*command, *more)
    both, summary = lines_of(run), data.read_json(run / "eval.json")
    changed = ["genetic"] if "--population" in more else ["pwws", "genetic"]
    kept = [line for line in before if line["attack"] in changed]
    new = [line for line in both if line not in before and line["attack"] in changed]
    assert all(line in both for line in before) and len(new) > 0
    assert not {x["made_with"] for x in kept} & {x["made_with"] for x in new}
    for name in changed:
        right = [x["prediction"] == x["label"] for x in new if x["attack"] == name]
        assert summary[name] == sum(right) / 8
    model.write_bytes(weights)
    with mock.patch.object(eval, "run_attack", side_effect=AssertionError("attacked again")):
        evaluate(*command)
    assert [json.loads(files_of(run)[x]) for x in FILES[1:]] == [
        json.loads(files[x]) for x in FILES[1:]]


def test_a_run_is_evaluated_after_everything_was_moved(runs, tmp_path, monkeypatch):
    """--task says where its own data are now."""
    run, own = runs["texts"] / "rift", Path(eval.settings_of(runs["texts"] / "rift")[0].task)
    moved = shutil.copytree(own, tmp_path / "elsewhere" / own.name)
    evaluate(run, "--attacks", "pwws", "--num-examples", 5)
    summary = data.read_json(run / "eval.json")
    monkeypatch.setattr(data, "load_task", mock.Mock(side_effect=data.load_task))
    evaluate(run, "--task", moved, "--num-examples", 5)
    assert data.load_task.call_args.args[0] == str(moved)
    assert data.read_json(run / "eval.json") == summary


def test_two_commands_on_one_run_do_not_lose_lines_in_silence(run, monkeypatch, capsys):
    def another_command(words, y, synonyms, rng):
        eval.write_lines(run / "attacks.jsonl", [], {})  # as a second one does
        yield [words]
        return words

    monkeypatch.setitem(eval.ATTACKS, "mine", another_command)
    with pytest.raises(SystemExit):
        evaluate(run, "--attacks", "mine", "--num-examples", 8)
    assert "another eval.py has replaced it" in capsys.readouterr().err


def test_dev_has_files_of_its_own(run):
    before = (run / "metrics.json").read_bytes()
    evaluate(run, "--attacks", "pwws", "--split", "dev", "--num-examples", 5)
    assert before == (run / "metrics.json").read_bytes() and not (run / "eval.json").exists()
    assert data.read_json(run / "eval-dev.json")["settings"]["clean"]["split"] == "dev"
    known = {data.to_text(x.words) for x in examples_of(run, "dev")}
    assert {line["original"] for line in lines_of(run, "attacks-dev.jsonl")} <= known


def test_what_the_terminal_cannot_show_does_not_stop_it(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    data.command(lambda argv: print("pos \N{GRINNING FACE}", flush=True))([])
    assert terminal.buffer.getvalue().strip() == b"pos ?"


def replace_all(words, y, synonyms, rng, choice=0):
    """A student's attack: a synonym of every word at once; choice: its place in the list."""
    found = tuple(others[choice] if others else w for w, others in zip(words, synonyms))
    yield [found]
    return found


def test_another_attack_is_one_function_and_one_line(runs, monkeypatch, capsys):
    """An eval.py that does not know it keeps the lines that it found."""
    run = runs["texts"] / "standard"
    monkeypatch.setitem(eval.ATTACKS, "mine", replace_all)
    evaluate(run, "--attacks", "mine")
    assert "mine (choice 0)" in capsys.readouterr().out
    lines, summary = lines_of(run), data.read_json(run / "eval.json")
    assert all(line["words_changed"] == line["substitutable"] for line in lines)
    assert max(line["queries"] for line in lines) == 2
    assert summary["settings"]["mine"]["choice"] == 0
    assert data.read_json(run / "metrics.json")["mine"] == summary["mine"]
    monkeypatch.delitem(eval.ATTACKS, "mine")
    evaluate(run, "--attacks", "pwws")
    assert [line for line in lines_of(run) if line["attack"] == "mine"] == lines
    evaluate(run, "--attacks", "pwws", "--seed", 1)             # perhaps of other texts
    assert "mine" not in data.read_json(run / "metrics.json")


# ---- Tables and constraints ----------------------------------------------------------------------


def test_neighbors_replace_the_runs_own_but_not_those_of_pwws_wordnet(run, tmp_path, monkeypatch):
    """They are looked for in --data-dir."""
    wordnet = {word: ["quite"] for word in ("the", "a", "this")}
    load_neighbors = data.load_neighbors
    monkeypatch.setattr(data, "load_neighbors", lambda source=None, *rest:
                        wordnet if source == "wordnet" else load_neighbors(source, *rest))
    other = {"movie": ["story"], "film": ["story"]}
    data.write_json(tmp_path / "mine" / "other.json", other)
    evaluate(run, "--attacks", "pwws", "hull", "pwws-wordnet", "--neighbors", "other.json",
             "--data-dir", tmp_path / "mine")
    for name, table in (("pwws-wordnet", wordnet), ("pwws", other), ("hull", other)):
        mine = swaps(run, name)
        assert mine and all(b in table[a] for a, b in mine)


def test_scores_draw_the_texts_and_filter_the_synonyms(run, tmp_path, capsys):
    """The texts are of those that the file knows, also for PWWS in a later command that names it;
    what it finds unlikely is not used."""
    rows = ["0\tA man"]
    for n, x in enumerate(examples_of(run)[:11]):
        rows.append(f"{n}\t{' '.join(x.words[-1]).title()}")
        # the words that are scored are equally likely, except these two, which are more so
        rows += [f"{n}\t{i}\t{other}\t{3 if other in ('film', 'great') else -9}"
                 for i, word in enumerate(x.words[-1]) if word in TABLE
                 for other in (word, *TABLE[word])]
    data.write_atomically(tmp_path / "lm_scores" / "texts_all.txt", "\n".join(rows))
    data.write_atomically(tmp_path / "lm_scores" / "snli_all.txt", rows[0])     # a file a task
    evaluate(run, *BOTH, "--lm-constraint", "scores", "--data-dir", tmp_path)
    out = capsys.readouterr().out
    assert "knows 11 of the 16 test texts" in out and "there are only 11 test texts" in out
    assert "lm constraint scores" in out
    assert {line["index"] for line in lines_of(run)} <= set(range(11))
    used, unlikely = swaps(run, "genetic"), {("great", "good"), ("great", "nice")}
    assert used and not used & unlikely and swaps(run, "pwws") & unlikely
    before = lines_of(run)
    evaluate(run, "--attacks", "pwws", "--lm-constraint", "scores", "--data-dir", tmp_path)
    assert lines_of(run) == before and "genetic" in data.read_json(run / "eval.json")
    # of the first 8 texts of the shuffle the file knows 7
    evaluate(run, "--lm-constraint", "scores", "--data-dir", tmp_path, "--num-examples", 8)
    assert data.read_json(run / "eval.json")["num_examples"] == 8
    evaluate(run, "--attacks", "pwws")                          # of all texts: all of them anew
    assert len({line["made_with"] for line in lines_of(run) if line["attack"] == "pwws"}) == 2


def test_a_causal_language_model_filters_the_synonyms(run, tmp_path, monkeypatch, capsys):
    """What was found with other weights of it is not used again."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"old")
    monkeypatch.setattr(data, "model_folder", lambda name: (
        tmp_path if name == "some/model" else name))
    monkeypatch.setattr(attacks, "CausalLM", lambda folder, device: lambda windows: [
        -100.0 * window.count("film") for window in windows])
    evaluate(run, *BOTH, "--lm-constraint", "some/model")
    assert "generations 3, lm constraint some/model)" in capsys.readouterr().out
    settings = data.read_json(run / "eval.json")["settings"]
    assert settings["genetic"]["lm_constraint"] == "some/model"
    used = swaps(run, "genetic")
    assert used and not any(b == "film" for _, b in used)
    weights.write_bytes(b"new")
    evaluate(run, *BOTH, "--lm-constraint", "some/model")
    made_with = {name: {line["made_with"] for line in lines_of(run) if line["attack"] == name}
                 for name in ("pwws", "genetic")}
    assert len(made_with["pwws"]) == 1 and len(made_with["genetic"]) == 2


# ---- Figures -------------------------------------------------------------------------------------


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Runs eval.py --plot and returns the panels: {title: [Axes]}."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs:
                        figures.append(self) or savefig(self, *args, **kwargs))

    def run(*arguments):
        evaluate(*arguments, "--plot", tmp_path / "figure")
        panels = {}
        for ax in figures[-1].axes:
            panels.setdefault(ax.get_title(), []).append(ax)
        return panels
    return run


def curves(ax):
    """{label: (V, 2) points} of a panel."""
    return {x.get_label(): np.array(x.lines[0].get_xydata()) for x in ax.containers}


def copies(run, scores, **values):
    """Copies of a run for each combination of these settings, with made-up accuracies.

    scores: callable, takes the settings and returns (clean, hull).
    """
    config, metrics = data.read_json(run / "config.json"), data.read_json(run / "metrics.json")
    for combination in itertools.product(*values.values()):
        settings = dict(zip(values, combination))
        copy = shutil.copytree(run, run.with_name(f"{run.name}{combination}"))
        data.write_json(copy / "config.json", config | {"settings": config["settings"] | settings})
        clean, hull = scores(settings)
        data.write_json(copy / "metrics.json", metrics | {"clean": clean, "hull": hull})
        yield copy


def test_forgetting_is_drawn_over_the_epochs(runs, draw, tmp_path, capsys):
    """Four measures, the bound for rift only; a ring marks the epoch that was kept, whose measures
    are printed. Another task has panels of its own. A file without an extension is a PNG.
    """
    found = draw(*[runs["texts"] / method for method in METHODS], runs["pairs"] / "rift")
    panels, others = found["texts, dev texts"], found["pairs, dev texts"]
    assert list(map(list, map(curves, others))) == [["rift"]] * 4
    assert list(map(list, map(curves, panels))) == [list(METHODS)] * 3 + [["rift"]]
    log = lines_of(runs["texts"] / "adv", "log.jsonl")
    expected = [[line["epoch"], line["params_l2"]] for line in log]
    assert np.allclose(curves(panels[0])["adv"], expected)
    for ax, key in ((panels[1], "dev_retained"), (panels[2], "dev_cka")):
        assert np.allclose(curves(ax)["adv"], [[line["epoch"], line[key]] for line in log])
    bound = [[line["epoch"], np.log(line["info_n"]) - line["dev_info"]]
             for line in lines_of(runs["texts"] / "rift", "log.jsonl")]
    assert np.allclose(curves(panels[3])["rift"], bound)
    kept = [data.read_json(runs["texts"] / x / "metrics.json")["best_epoch"] for x in METHODS]
    rings = [x for x in panels[0].collections if type(x).__name__ == "PathCollection"]
    assert kept == [ring.get_offsets()[0][0] for ring in rings]
    assert (tmp_path / "figure").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    log = [line for line in log if line["epoch"] == kept[list(METHODS).index("adv")]]
    cells = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    row, = [row for row in cells if row[:2] == ["adv", "1"]]
    assert row[2] == "{0:.2f} ({0:.2f} to {0:.2f})".format(log[0]["params_l2"]) and row[5] == "-"


def bar_of(ax, name, axis):
    """The ends of the first point's error bar in a curve of this name; axis: 0 for x, 1 for y."""
    container, = [x for x in ax.containers if x.get_label() == name]
    return container.lines[2][-axis].get_segments()[0][:, axis]


def test_accuracy_is_drawn_over_alpha_and_over_beta(runs, draw):
    """Seeds are averaged, the bars show their range; of a single run they are its interval. adv,
    which has no alpha, is at 0, and so is standard, which has no beta. rift with two alphas is two
    curves of the trade-off."""
    found = [*copies(runs["texts"] / "standard", lambda s: (0.6, 0), beta=[5.0]),
             *copies(runs["texts"] / "adv", lambda s: (0.5, s["beta"] / 10), beta=[5.0, 1.0]),
             *copies(runs["texts"] / "rift", lambda s: (s["alpha"], s["beta"] * s["seed"] / 30),
                     alpha=[0.2, 1.0], beta=[1.0, 5.0], seed=[1, 2, 6])]
    over_alpha, trade_off = draw(*found)["texts, test texts"]
    points = curves(over_alpha)
    assert points["adv beta 5.0, clean"].tolist() == [[0, 0.5]]
    assert np.allclose(points["rift beta 5.0, clean"], [[0.2, 0.2], [1, 1]])
    assert np.allclose(points["rift beta 5.0, hull"], [[0.2, 0.5], [1, 0.5]])
    assert np.allclose(bar_of(over_alpha, "rift beta 5.0, hull", 1), [1 / 6, 1])
    expected = {"standard": [[0.6, 0]], "adv": [[0.5, 0.1], [0.5, 0.5]],
                "rift alpha 0.2": [[0.2, 0.1], [0.2, 0.5]],
                "rift alpha 1.0": [[1.0, 0.1], [1.0, 0.5]]}
    assert curves(trade_off).keys() == expected.keys()
    assert all(np.allclose(curves(trade_off)[name], expected[name]) for name in expected)
    assert np.allclose(bar_of(trade_off, "adv", 0), eval.wilson(8, 16))
    assert [text.get_text() for text in trade_off.texts] == ["0", *["1", "5"] * 3]


def test_runs_that_were_attacked_differently_are_not_drawn_together(runs, draw, capsys):
    found = list(copies(runs["texts"] / "adv", lambda s: (0, 0), beta=[2.0, 3.0]))
    evaluate(*found, "--attacks", "pwws", "--num-examples", 5)
    draw(*found, "--plot-attack", "pwws")
    evaluate(found[1], "--attacks", "pwws", "--num-examples", 5, "--seed", 1)
    with pytest.raises(SystemExit):
        draw(*found, "--plot-attack", "pwws")
    error = capsys.readouterr().err
    assert f"{found[1]} was evaluated with {{'seed': 1}}" in error
    evaluate(found[1], "--attacks", "pwws", "--num-examples", 5)
    summary = data.read_json(found[1] / "eval.json")
    for changed, by in (("clean", {"drawn_from": "score file"}), ("pwws", {"unknown": "the"}),
                        ("pwws", {"neighbors": "of another"})):
        settings = summary["settings"] | {changed: summary["settings"][changed] | by}
        data.write_json(found[1] / "eval.json", summary | {"settings": settings})
        with pytest.raises(SystemExit):
            draw(*found, "--plot-attack", "pwws")
        assert f"{found[1]} was evaluated with {by}, but" in capsys.readouterr().err


def test_data_sets_of_one_name_have_panels_of_their_own(runs, draw):
    """And what a formula would be in TeX is drawn as it is."""
    found = list(copies(runs["texts"] / "adv", lambda s: (0, 0), beta=[2.0, 3.0],
                        task=["$x_{$"], split_seed=[0, 1]))
    for run in found[1::2]:
        config = data.read_json(run / "config.json")
        config["fingerprints"]["data"] = "of other texts"
        data.write_json(run / "config.json", config)
    panels = draw(*found)
    assert len(panels) == 2 and all("$x_{$ (" in title for title in panels)
    assert all(list(curves(ax)) == ["adv"] for axes in panels.values() for ax in axes)


def test_figures_show_attacks_and_of_dev_the_kept_epoch(run):
    """What was attacked is eval.json's; dev is never the test split's."""
    best = data.read_json(run / "metrics.json")["best_epoch"]
    kept, = [line for line in lines_of(run, "log.jsonl") if line["epoch"] == best]
    scores = eval.read_finished(run, "hull", "dev").scores
    assert scores == {"clean": kept["dev_clean"], "hull": kept["dev_hull"], "num_examples": 16}
    evaluate(run, "--attacks", "pwws", "--num-examples", 5)
    shown, summary = eval.read_finished(run, "pwws", "test"), data.read_json(run / "eval.json")
    assert shown.scores["pwws"] == summary["pwws"] and shown.n == 5
    other, = copies(run, lambda s: (0, 0), seed=[7])            # another seed of training
    assert eval.read_finished(other, "pwws", "test").how == shown.how
    assert shown.how["seed"] == 0 and shown.how["num_examples"] == 5


# ---- Encoders ------------------------------------------------------------------------------------


def test_a_cached_model_needs_no_network_and_the_hub_is_asked_for_others(tmp_path, monkeypatch):
    """Also for one that is cached in part. Without network it is one line what is wrong."""
    cached, asked = save_model(tmp_path / "cached", "bert"), []

    def snapshot_download(name, local_files_only, **files):
        asked.extend([name] * (not local_files_only))
        if name != "some/model":
            raise OSError("Network is unreachable\nand more")
        return cached

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    encoder, tokenizer = data.load_encoder("some/model")
    there, _ = data.load_encoder(cached)
    assert asked == [] and "film" in tokenizer.decode(tokenizer("film")["input_ids"])
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), there.parameters()))
    for name, missing, message in (
            ("some/other", (), "neither a folder nor a model on the hub .Network is unreachable."),
            ("some/model", ("tokenizer.json", "vocab.txt"), "tokenizer"),
            ("some/model", ("model.safetensors",), "cannot be loaded")):
        for file in missing:
            (cached / file).unlink(missing_ok=True)
        asked.clear()
        with pytest.raises(data.InputError, match=f"^model {name}: [^\n]*{message}[^\n]*$"):
            data.load_encoder(name)
        assert asked == [name]
