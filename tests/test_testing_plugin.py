"""Test the plugin from outside: start pytest as an author of another implementation would."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

pytestmark = pytest.mark.slow

pytest_plugins = ["pytester"]

# An adapter as small as one can be: three methods, logits in float32, nothing else. Two others are wrong on purpose.
ADAPTERS = """
import dataclasses
import json
import time
import numpy as np
from refgemma.testing.backends import Capabilities, NumpyBackend, Output, Unsupported

class Small:
    def __init__(self):
        self._numpy = NumpyBackend()
    def capabilities(self):
        return Capabilities(dtypes=("float32",))
    def load(self, folder, dtype):
        return self._numpy.load(folder, dtype)
    def forward(self, model, input_ids, attention_mask=None, position_ids=None, cache=None, tensors=("logits",)):
        return self._numpy.forward(model, input_ids)

class Uncapped(Small):
    def load(self, folder, dtype):
        model = super().load(folder, dtype)
        return dataclasses.replace(model, config=dataclasses.replace(model.config, attn_logit_softcapping=None))

class Tied(Small):
    def load(self, folder, dtype):
        model = super().load(folder, dtype)
        if not model.config.tie_word_embeddings or model.config.attention_bias:
            raise Unsupported("only what Gemma 2 has")
        return model

class NoneIsNoNumber(Small):
    def load(self, folder, dtype):
        config = json.loads((folder / "config.json").read_text())
        if config["attn_logit_softcapping"] * config["final_logit_softcapping"] <= 0:  # a TypeError for None
            raise ValueError("a cap must be above 0")
        return super().load(folder, dtype)

class Refusing(NoneIsNoNumber):
    def capabilities(self):
        return Capabilities(dtypes=("float32",), refuses=("no-attention-cap", "no-final-cap"))

class Pairs(Small):
    def capabilities(self):
        return Capabilities(dtypes=("float32",), refuses=("odd-groups",))
    def load(self, folder, dtype):
        model = super().load(folder, dtype)
        assert model.config.num_attention_heads // model.config.num_key_value_heads % 2 == 0
        return model

class Old(Small):
    def capabilities(self):
        return Capabilities(dtypes=("float32",), refuses=("layer_types", "rope_parameters"))
    def load(self, folder, dtype):
        config = json.loads((folder / "config.json").read_text())
        assert "rope_theta" in config and not {"layer_types", "rope_parameters"} & set(config)
        return super().load(folder, dtype)

class New(Small):
    def capabilities(self):
        return Capabilities(dtypes=("float32",), refuses=("rope_theta",))
    def load(self, folder, dtype):
        config = json.loads((folder / "config.json").read_text())
        assert "rope_theta" not in config and config["layer_types"] and config["rope_parameters"]
        return super().load(folder, dtype)

class Later(Small):
    def load(self, folder, dtype):
        raise NotImplementedError("attention is not written yet")

class Misspelt(Small):
    def capabilities(self):
        return Capabilities(refuses=("odd-heads",))

class Slow(Small):
    def forward(self, *arguments, **named):
        time.sleep(0.1)
        return super().forward(*arguments, **named)

class Crashing(Small):
    def forward(self, *arguments, **named):
        raise RuntimeError("out of cheese")
"""


@pytest.fixture
def run(pytester: pytest.Pytester):
    """Run the laws on a backend of `ADAPTERS`."""
    pytester.makepyfile(adapters=ADAPTERS)
    pytester.syspathinsert()

    def started(backend: str, *arguments: str) -> pytest.RunResult:
        return pytester.runpytest_subprocess(
            "--pyargs", "refgemma.testing", "--profile", "dev", "--backend", f"adapters:{backend}", *arguments,
            "-p", "no:cacheprovider",
        )  # fmt: skip

    return started


def test_what_a_backend_cannot_do_is_not_applicable_and_not_passed(run) -> None:
    names = "causality or chunks_change_nothing or float32_is_near_float64 or a_text_comes_back or no-caps-forward"
    result = run("Small", "-k", names)
    result.stdout.fnmatch_lines(
        [
            "refgemma: testing adapters:Small (float32; cache: False, padding: False, positions: False), profile dev",
            "conforms: 2, differs: 0, not applicable: 4",
            "its forward takes no cache: chunks_change_nothing",
            "it does not use float64 in every step: float32_is_near_float64",
            "it has no method named tokenizer: a_text_comes_back",
            "it does not use bfloat16 in every step: no-caps-forward-bf16",
            "*2 passed*4 not applicable*",
        ]
    )


def test_a_model_that_a_backend_refuses_is_refused(run) -> None:
    result = run("Tied", "-k", "an_untied_head_is_used or untied-with-biases-forward-f32 or causality")
    result.stdout.fnmatch_lines(
        [
            "conforms: 1, differs: 0, not applicable: 0, refused: 2",
            "*refused by this backend*",
            "only what Gemma 2 has: everything in an_untied_head_is_used, untied-with-biases-forward-f32",
            "*1 passed*2 refused*",
        ]
    )


CAPS = "causality or distant_caps_do_nothing or bends-forward-f32 or no-caps-forward-f32"


def test_a_backend_that_fails_without_caps_gets_advice(run) -> None:
    names = CAPS.removeprefix("causality or ")  # its few examples need not have a model without caps
    assert names != CAPS
    result = run("NoneIsNoNumber", "-k", names)
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        ["*distant_caps_do_nothing: the backend raised TypeError(*); if it refuses such models, add "
         "'no-attention-cap' or 'no-final-cap' to refuses of its Capabilities"]
    )  # fmt: skip


def test_a_backend_that_refuses_models_without_caps_is_judged_on_the_others(run) -> None:
    result = run("Refusing", "-k", CAPS)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "*positions: False; refuses no-attention-cap, no-final-cap), profile dev",
            "conforms: 2, differs: 0, not applicable: 0, refused: 2",
            "examples: 8 checked, * refused",
            # By chance, examples of causality are refused, too: the profile dev draws other ones each time.
            "no-attention-cap: everything in distant_caps_do_nothing, no-caps-forward-f32*",
            "*2 passed*2 refused*",
        ]
    )


@pytest.mark.parametrize(
    ("backend", "refused"),
    [
        ("Pairs", "odd-groups: everything in shared_key_heads_can_be_written_out, global-first-forward-f32; *"),
        ("Old", "layer_types: everything in global-first-forward-f32"),
        ("New", ""),
    ],
)
def test_a_backend_is_not_asked_for_what_it_refuses(run, backend: str, refused: str) -> None:
    """Key heads written out are groups of one head; a recorded model has full attention in layers 0 and 2."""
    result = run(backend, "-k", "causality or shared_key_heads or bends-forward-f32 or global-first-forward-f32")
    result.assert_outcomes(passed={"Pairs": 2, "Old": 3, "New": 4}[backend])
    if refused:
        result.stdout.fnmatch_lines([refused])
    else:
        assert "refused" not in result.stdout.str().partition("collected")[2]


def test_what_is_not_implemented_is_refused(run) -> None:
    result = run("Later", "-k", "causality or bends-forward-f32")
    result.stdout.fnmatch_lines(["attention is not written yet: everything in causality, bends-forward-f32"])


def test_a_budget_stops_drawing_and_says_how_many_examples_ran(run) -> None:
    names = "causality or window_locality or batch_rows or up_is_linear or the_same_twice"
    result = run("Slow", "-k", names, "--profile", "deep", "--budget", "4")
    # The 5000 examples of at least two calls would take 1000 s. Each law may check one example more than the budget.
    assert float(re.search(r"in (\d+\.\d+)s", result.stdout.str())[1]) < 500
    result.stdout.fnmatch_lines(["examples: * checked", "stopped by the budget: causality (* checked)*"])
    checked = int(re.search(r"examples: (\d+) checked", result.stdout.str())[1])
    assert 1 <= checked <= 4 / 0.2 + 5
    assert result.ret == 0


def test_a_budget_that_is_used_leaves_laws_that_are_not_run(run, pytester: pytest.Pytester) -> None:
    skips = pytester.makefile(".txt", skips="the_same_twice: it is slow\n")
    names = "causality or the_same_twice or tiny-forward-f32"
    result = run("Slow", "-k", names, "--budget", "0.01", "--skips", str(skips))
    result.stdout.fnmatch_lines(
        [
            "conforms: 1, differs: 0, not applicable: 0, not run: 2",
            "examples: 1 checked",
            "stopped by the budget: causality (1 checked)",
            "the budget of 0.01 s is used: the_same_twice, tiny-forward-f32",
            "*1 passed*2 not run*",
        ]
    )
    assert "remove this line" not in result.stdout.str()


def test_a_failure_prints_a_program_that_shows_it(run, pytester: pytest.Pytester) -> None:
    result = run("Uncapped", "-k", "vanishing_attention_cap or bends-forward-f32")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*logits, and with other query projections under an attention cap of 1e-20: at *",
                                 "*bends-forward-f32: 1 of 1 tensor differs, first calls.0.logits: *"])  # fmt: skip
    text = result.stdout.str()
    for opening, says in (
        ('"""Breaks the law a_vanishing', "logits, and with other query projections"),
        ('"""Differs from the recording bends', "bends-forward-f32: 1 of 1 tensor differs"),
    ):
        begin = text.index(opening)
        program = text[begin : text.index("\n)\n", begin) + 3]
        path = pytester.makepyfile(reproduce=program)
        shown = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False, cwd=pytester.path)
        assert shown.returncode == 1
        assert says in shown.stderr
        # With the mistake mended, the same program has nothing to show.
        mended = program.replace("adapters:Uncapped", "adapters:Small")
        path = pytester.makepyfile(reproduce=mended)
        assert subprocess.run([sys.executable, path], check=False, cwd=pytester.path).returncode == 0


def test_a_backend_that_crashes_breaks_the_law(run) -> None:
    result = run("Crashing", "-k", "causality or greedy")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*causality: the backend raised RuntimeError('out of cheese')*",
                                 "*greedy-f32: the backend raised RuntimeError('out of cheese')*"])  # fmt: skip


def test_known_failures_are_expected_and_stale_ones_reported(run, pytester: pytest.Pytester) -> None:
    skips = pytester.makefile(
        ".txt",
        skips="# of an early version\na_vanishing_attention_cap_makes_all_keys_alike: there is no cap yet\n\n"
        "causality: mended long ago\nchunks_change_nothing: no cache yet\nspelt_wrongly: nothing has this name\n",
    )
    result = run("Uncapped", "--skips", str(skips), "-k", "vanishing_attention_cap or causality or chunks_change")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        [
            "conforms: 1, differs: 1, not applicable: 1",
            "warning: *skips.txt: causality passes now; remove this line",
            "warning: *skips.txt: chunks_change_nothing is not applicable or refused; remove this line",
            "warning: *skips.txt: unknown law or recording spelt_wrongly; remove this line",
            "*1 xfailed, 1 xpassed*",
        ]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("causality\n", "*skips.txt, line 1: must have the name of a law, a colon, and the reason for the failure"),
        ("causality:\n", "*skips.txt, line 1: must have the name of a law, a colon, and the reason for the failure"),
        ("causality: a\ncausality: b\n", "*skips.txt, line 2: duplicate entry causality; remove it"),
    ],
)
def test_a_known_failure_needs_a_reason(run, pytester: pytest.Pytester, text: str, message: str) -> None:
    skips = pytester.makefile(".txt", skips=text)
    result = run("Small", "--skips", str(skips))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("Missing", "*adapters has no Missing"),
        ("ADAPTERS.x", "*adapters has no ADAPTERS.x"),
        ("np", "*lacks capabilities, forward*"),
        ("Misspelt", "*refuses has 'odd-heads'; it must be no-attention-cap, no-final-cap, odd-groups, or a key of *"),
    ],
)
def test_a_backend_that_is_none_is_a_usage_error(run, backend: str, message: str) -> None:
    result = run(backend)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])


def test_junit_says_what_was_not_applicable(run, pytester: pytest.Pytester) -> None:
    run("Small", "-k", "causality or chunks_change_nothing", "--junit-xml=report.xml")
    cases = ElementTree.parse(pytester.path / "report.xml").iter("testcase")
    skipped = {case.get("name"): case.find("skipped") for case in cases}
    assert skipped["test_law[causality]"] is None
    assert "not applicable" in skipped["test_law[chunks_change_nothing]"].get("message")


def test_other_peoples_pytest_has_no_such_options(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("def pytest_addoption(parser): parser.addoption('--backend', default='theirs')")
    pytester.makepyfile(
        "import sys\n"
        "def test_it(pytestconfig):\n"
        "    assert pytestconfig.getoption('backend') == 'theirs'\n"
        "    assert 'refgemma' not in sys.modules\n"
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=1)
