"""The table of `benchmarks/run.py`: times scaled by the machine's rate, incomplete rounds, and the newest rows."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").exists():
    pytest.skip("benchmarks/ is only in the repository", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))
import run  # noqa: E402

ROW = run.Row("9b layer, decode 512", "decode 9b", "decode 512", 0.95)
BUSY, IDLE = {"sgemm": 100.0, "read": 10.0}, {"sgemm": 200.0, "read": 20.0}


def one_round(fast: float, transformers: float | None, fast_rate: dict[str, float]) -> run.Round:
    """Return a round in which `fast` ran beside `fast_rate`, and transformers on an idle machine."""
    one = run.Round(rates=[IDLE, fast_rate, IDLE])
    one.found["fast", "decode 9b", "decode 512"], one.beside["fast", "decode 9b"] = fast, fast_rate
    if transformers is not None:
        one.found["transformers", "decode 9b", "decode 512"] = transformers
        one.beside["transformers", "decode 9b"] = IDLE
    return one


def test_a_slow_minute_is_not_held_against_an_engine() -> None:
    """At half the rate `fast` takes 2 s in place of 1 s, so both engines are equally fast."""
    report = run.summarize([ROW], [one_round(2.0, 1.0, BUSY)])
    assert report["rows"][0]["ratio"] == 1.0
    assert (report["rounds"], report["unsteady"]) == (1, 1)


def test_an_interrupted_round_counts_as_far_as_it_came() -> None:
    rounds = [one_round(1.0, 2.0, IDLE), one_round(3.0, None, IDLE)]
    assert run.summarize([ROW], rounds)["rows"][0]["ratio"] == 0.5
    assert run.summarize([ROW], rounds[1:])["rows"] == []


def test_the_newest_measurement_of_each_row_is_shown_with_the_goal_of_today(tmp_path: Path) -> None:
    def line(processor: str, **ratios: float) -> str:
        rows = [
            {"work": work, "ratio": ratio, "spread": [ratio, ratio], "goal": 9, "met": True, "medians": {}}
            for work, ratio in ratios.items()
        ]
        return json.dumps({"processor": processor, "rows": rows, "sgemm_gflops": 1.0, "read_gb_per_s": 1.0})

    share, memory = "9b decode 512, share of reading", "9b layer, 4200 tokens, extra memory"
    history = tmp_path / "history.jsonl"
    history.write_text(
        "\n".join([line("a", **{share: 0.9, memory: 0.1}), line("b", **{share: 0.5}), line("a", **{share: 0.8})])
    )
    second, first = run.last_reports(str(history))  # the newest report is the last
    assert [(row["work"], row["ratio"], row["met"]) for row in first["rows"]] == [
        (share, 0.8, False), (memory, 0.1, True),
    ]  # fmt: skip
    assert [row["met"] for row in second["rows"]] == [False]
    assert "| 0.80 | 0.85 (missed) | 0.50 | 0.85 (missed) |" in run.side_by_side([first, second])
