"""Extract the names from the Transformers documentation page of Gemma 2.

The names, by section, are parameters with their defaults, returned fields, and names that the examples call.

The first command writes `tests/documentation_page.json` from the page, the second ``docs/documentation-page.md`` from
that:

    python tools/documentation_page.py PAGE > tests/documentation_page.json
    python tools/documentation_page.py > docs/documentation-page.md
"""

import json
import re
import sys
from pathlib import Path

RECORDED = Path(__file__).parents[1] / "tests" / "documentation_page.json"
NAMES = "tests/parity/test_documented_names.py"
DOCTEST = "refgemma/modeling/classes.py::refgemma.modeling.classes.Gemma2ForCausalLM"

INTRODUCTION = """\
# The documentation page, name by name

The [Transformers documentation of Gemma 2](https://huggingface.co/docs/transformers/model_doc/gemma2) was the
specification of this package: in its examples, you can replace `transformers` by `refgemma` and `torch` by `numpy`.
The table lists each name (class, argument or field) on that page with the test that compares it with transformers. A
test sets the name to a value that has an effect. Both libraries must give the same result, and this result must differ
from the result without the name. `tests/parity/test_modeling_parity.py` tests random combinations of all names, and
`tests/parity/test_generation_parity.py` tests generated texts.

    pip install -e ".[test,record]" && pytest {names}

`python tools/documentation_page.py` writes the page that you are reading. `tests/test_documentation_page.py` checks
that it is complete and that its tests exist.

If the documentation and the code of transformers 5.23 differ, this package follows the code:

- `GemmaForCausalLM` in the documentation's second example is the class of Gemma 1, which computes wrong results from a
  Gemma 2 checkpoint. In refgemma, this name gives `Gemma2ForCausalLM`, with a warning.
- `past_key_values`: the model returns a `Cache`. You can use it like the tuple of pairs that the documentation calls
  the legacy format. If you pass plain tuples, you get plain tuples back.
- `Gemma2ForSequenceClassification` without a `pad_token_id` "takes the last value in each row of the batch", says the
  documentation. The code refuses a batch of several rows in this case.
- `inputs_embeds` are not scaled by the square root of `hidden_size`.

refgemma differs from transformers 5.23 in two ways:

- If you do not pass `dtype`, `from_pretrained` computes in float32. transformers uses the precision that the
  configuration names, as `dtype="auto"` does in both libraries.
- In a boolean mask with four axes, true means visible, and a warning says so. transformers adds true and false to the
  scores of Gemma 2 as 1 and 0, so the mask hides nothing.

| section | name | default on the page | test |
| --- | --- | --- | --- |
"""

SIGNATURE = re.compile(r"(\*\*\w+|\w+)(?:: \w+)?(?: = (\S+))?")  # name: Type = default
BULLET = re.compile(r"(?:- |Args — )(\w+) \($")  # the description of a parameter
RETURNED = re.compile(r"^(\w+) \($")  # the description of a returned field
CALLED = re.compile(r"import (.+)|(\w+)(?=\(|=[^=])")  # names in a line of an example


def names_of(page: str) -> dict[str, dict[str, str | None]]:
    """Return the documented names by section of the page, each with its default or None."""
    found: dict[str, dict[str, str | None]] = {"examples": {}}
    section = ""
    for line in map(str.strip, page.splitlines()):
        if re.fullmatch(r"Gemma2\w+", line):
            section = line
        elif line in ("forward", "Returns"):
            section = f"{section.split('.')[0]}.{line.lower()}"
        if section:
            names = found.setdefault(section, {})
            if line.startswith("< source >("):
                signature = line.removeprefix("< source >(").split(") →")[0].rstrip(" )")
                names |= {name: default or None for name, default in SIGNATURE.findall(signature)}
            elif bullet := (RETURNED if section.endswith(".returns") else BULLET).search(line):
                names.setdefault(bullet[1], None)
        if line.startswith(">>> ") and not line.startswith(">>> #"):
            for imported, called in CALLED.findall(line.split('"')[0]):
                found["examples"] |= dict.fromkeys([called] if called else imported.split(", "))
            found["examples"] |= dict.fromkeys(re.findall(r"(\w+)=", line))
    return found


# More names that code for transformers uses. The page only mentions these features ("resizing the input embeddings",
# "the generic methods"), or the names belong to the same calls.
STRANGERS = "tests/strangers/test_classes.py"
BESIDE = {
    "AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, "
    "AutoModelForTokenClassification": "test_the_auto_classes_give_the_documented_ones",
    "resize_token_embeddings": "test_resize_token_embeddings",
    "DynamicCache": "test_a_value_stays_a_value_and_an_object_is_filled",
    "StaticCache": "test_a_static_cache_that_is_full",
    "cache": "test_the_name_of_transformers_5_24",
    "torch_dtype": "test_a_precision_under_either_name[torch_dtype]",
    "cache_dir": "test_a_cache_folder_that_is_named",
    "config": "test_fewer_layers_than_the_folder_has[configuration]",
    "ignore_mismatched_sizes": "test_a_head_of_another_size",
    "to, cpu, cuda, device, eval": "test_a_device_changes_nothing",
    "half, bfloat16, float, double, dtype": "test_another_precision_is_that_of_from_pretrained[half-float16-False]",
    "parameters, named_parameters": "test_what_is_changed_in_place_changes_the_model",
    "state_dict, load_state_dict": "test_load_state_dict",
    "get_input_embeddings, get_output_embeddings, lm_head, model, layers, norm, num_parameters, "
    "get_memory_footprint": "test_weights_by_their_names_and_modules",
    "push_to_hub": "test_nothing_is_uploaded",
    "pipeline": "test_a_pipeline",
}


def test_of(section: str, name: str) -> str:
    """Return the pytest id of the test for a name."""
    cls = section.split(".")[0]
    if section == "examples":
        config = name in ("Gemma2Model", "Gemma2Config")
        wrong = "tests/test_documentation_page.py::test_the_class_that_the_page_names"
        return "refgemma/modeling/classes.py::refgemma.modeling.classes.Gemma2Model" if config else (
            wrong if name == "GemmaForCausalLM" else DOCTEST
        )  # fmt: skip
    if section == "Gemma2Config":
        return f"{NAMES}::test_config_field[{name}]"
    if section.endswith(".returns"):
        return f"{NAMES}::test_returned[{name}]"
    return f"{NAMES}::test_argument[{name}-{cls}]" if section.endswith(".forward") else f"{NAMES}::test_class[{cls}]"


def table_of(names: dict[str, dict[str, str | None]]) -> str:
    """Return the text of ``docs/documentation-page.md``."""
    rows = [
        f"| {section} | `{name}` | {'' if default is None else f'`{default}`'} | `{test_of(section, name)}` |"
        for section, documented in names.items()
        for name, default in documented.items()
    ]
    rows += [f"| beside the page | `{name}` |  | `{STRANGERS}::{test}` |" for name, test in BESIDE.items()]
    return INTRODUCTION.format(names=NAMES) + "\n".join(rows) + "\n"


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(names_of(Path(sys.argv[1]).read_text(encoding="utf-8")), indent=1))
    else:
        print(table_of(json.loads(RECORDED.read_text(encoding="utf-8"))), end="")
