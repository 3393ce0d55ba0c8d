import json
import sys

import pytest
from PIL import Image
from report import Claim, Results, changed_settings, claims, kinds_table, main, report, table
from scenes import SETS


def row(rule, ratio, right, *, seed=0, name="short", num_frames=64, **changes):
    """A hundred questions of each of two kinds; `right` percent of both are answered rightly."""
    questions = {"digit": [right, 100, 10.0], "order": [right, 100, 50.0]}
    windows = {"windows": 100, "touched": 10, "kept": 20, "kept_touched": 8}
    return {
        "rule": rule,
        "seed": seed,
        "set": name,
        "ratio": ratio,
        "num_frames": num_frames,
        "changes": changes,
        "questions": questions,
        "windows": windows,
    }


def rows():
    found = []
    right = {"stts": {0.0: 80, 0.5: 79, 0.8: 70}, "random": {0.0: 80, 0.5: 60, 0.8: 69}}
    for name in ("short", "long", "detail"):
        for seed in (0, 1):
            found.append(row("unpruned", 0.0, 80 + seed, seed=seed, name=name))
            for rule, by_ratio in right.items():
                found += [row(rule, ratio, count, seed=seed, name=name) for ratio, count in by_ratio.items()]
    more = {"name": "long", "num_frames": 128}
    found += [row("stts", 0.5, 82, **more), row("stts", 0.5, 84, **more, position_ids="compact")]
    found += [row("stts", 0.5, 10, name="short", refill=True)]
    return found


def test_a_table_by_hand():
    assert table(Results(rows()), "short").splitlines() == [
        "| short | 0% | 50% | 80% |",
        "|---|---|---|---|",
        "| unpruned | 80.5 ± 0.7 |  |  |",
        "| stts | 80.0 ± 0.0 | 79.0 ± 0.0 | 70.0 ± 0.0 |",
        "| random | 80.0 ± 0.0 | 60.0 ± 0.0 | 69.0 ± 0.0 |",
        "| chance | 30.0 | | |",
    ]


def test_kinds_by_hand():
    better = row("stts", 0.5, 80, seed=1)
    better["questions"]["order"] = [90, 100, 50.0]
    results = Results([row("unpruned", 0.0, 70), row("stts", 0.5, 70), better, row("random", 0.5, 10)])
    assert kinds_table(results, "short").splitlines() == [
        "| short, by kind | guessing | unpruned 0% | stts 50% |",
        "|---|---|---|---|",
        "| digit (100) | 10.0 | 70.0 | 75.0 |",
        "| order (100) | 50.0 | 70.0 | 80.0 |",
    ]


def test_a_rule_alone_has_a_report():
    paragraphs = list(report(Results([row("random", 0.5, 40, name=name) for name in SETS])))
    assert "| short, by kind | guessing |\n|---|---|\n| digit (100) | 10.0 |\n| order (100) | 50.0 |" in paragraphs


def test_a_model_that_only_guesses_shows_nothing():
    right = {"short": 30, "long": 80, "detail": 31}
    results = Results([row("unpruned", 0.0, count, name=name) for name, count in right.items()])
    paragraphs = list(report(results))
    guesses = [paragraph for paragraph in paragraphs if "only guesses" in paragraph]
    assert len(guesses) == 1 and guesses[0].startswith("short: ")


def test_kinds_count_equally():
    result = row("stts", 0.5, 50)
    result["questions"]["digit"] = [30, 300, 30.0]
    assert Results([result]).accuracy("stts", "short", 0.5).mean == pytest.approx((10 + 50) / 2)


def test_claims_by_hand():
    found = {claim.text: (claim.differences, claim.at_least) for claim in claims(Results(rows()))}
    assert found["short: 50 % pruned against unpruned"] == ([-1, -2], -0.7)
    assert found["short: STTS against random at 50 %"] == ([19, 19], 0.9)
    assert found["detail: STTS against random at 80 %"] == ([1, 1], 2.3)
    assert found["long: stts, 128 frames pruned to the tokens of 64, against those unpruned"] == ([2], 0.5)
    compact = "long: stts, 128 frames pruned to the tokens of 64 at compact positions, against those unpruned"
    assert found[compact] == ([4], 0.5)
    assert not any("similarity" in text or "256" in text for text in found)


def test_all_sets_count_equally():
    of_sets = [row("stts", 0.5, right, name=name) for name, right in {"short": 70, "long": 80, "detail": 60}.items()]
    of_sets += [row("unpruned", 0.0, 80, name=name) for name in ("short", "long", "detail")]
    assert Results(of_sets).mean_accuracy("stts", SETS, 0.5).by_seed == {0: 70}
    found = {claim.text: claim.differences for claim in claims(Results(of_sets))}
    assert found["all sets: 50 % pruned against unpruned"] == [-10]
    # A seed that one set has not been measured with does not count.
    of_sets.append(row("stts", 0.5, 10, seed=1))
    assert Results(of_sets).mean_accuracy("stts", SETS, 0.5).by_seed == {0: 70}
    assert Results(of_sets[1:]).mean_accuracy("stts", SETS, 0.5) is None


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([-1.5, -1.5, -1.5], "-1.50 ± 0.00 points (not as claimed: at least +0.9)"),
        ([0, 0.9, 1.8], "+0.90 ± 0.90 points (as claimed: at least +0.9)"),
        ([2.0], "+2.00 points (as claimed, but of 1 seeds only: at least +0.9)"),
    ],
)
def test_a_verdict_needs_three_seeds(differences, words):
    assert str(Claim("a", differences, 0.9)) == f"- a: {words}"


@pytest.mark.parametrize("content", ["[]", "[1]", '{"a": 1}'])
def test_other_files_are_no_results(content, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "results.json")])
    with pytest.raises(SystemExit, match="error: The results must have rows that evaluate.py wrote"):
        main()


def test_changed_settings_stand_apart():
    results = Results(rows())
    assert results.accuracy("stts", "short", 0.5).mean == 79
    assert results.accuracy("stts", "short", 0.5, changes={"refill": True}).mean == 10
    assert results.accuracy("stts", "short", 0.9) is None


def test_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text(json.dumps(rows()))
    arguments = [str(tmp_path / "results.json"), "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    main()
    printed = capsys.readouterr().out
    assert "| detail | 0% |" in printed
    kept = "long, 80 % pruned: 10 % of all windows touch a digit; of those kept by stts 40 %, random 40 %."
    assert kept in printed
    assert Image.open(tmp_path / "plot.png").size == (1300, 500)


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="error: .*none.json"):
        main()


def test_changed_settings_are_compared_with_unchanged_ones():
    found = [row("stts", 0.5, 79), row("stts", 0.5, 77, refill=True), row("stts", 0.8, 70, position_ids="compact")]
    assert changed_settings(Results(found)) == ["- short: stts at 50%, 64 frames, with refill=True: -2.00 points"]
