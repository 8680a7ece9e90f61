from pathlib import Path

import pytest

from motkit.errors import UserError
from motkit.recipe import Recipe, load_recipe, recipe_name, recipe_path

MINIMAL = """
student: HuggingFaceTB/SmolLM2-135M-Instruct
problems: problems.jsonl
teachers:
  - {name: plain, traces: plain.jsonl}
  - {name: steps, traces: steps.jsonl}
rounds: 2
train: {max_steps: 5, learning_rate: 1e-5}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str = MINIMAL, name: str = "mine.yaml") -> Path:
        for file in ("problems.jsonl", "plain.jsonl", "steps.jsonl"):
            (tmp_path / file).touch()
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def faults(path, overrides=()) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


def test_paths_resolve_against_the_file_and_a_hub_id_stays(write, tmp_path):
    recipe = load_recipe(write())
    assert recipe.student == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert recipe.problems == str(tmp_path / "problems.jsonl")
    assert recipe.teachers[1].traces == str(tmp_path / "steps.jsonl")
    assert recipe.train["learning_rate"] == 1e-5


def test_overrides_are_typed_and_their_paths_resolve_against_the_working_folder(write, tmp_path, monkeypatch):
    path = write()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.jsonl").touch()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(
        path,
        [
            "train.max_steps=7",
            "train.learning_rate=2e-4",
            "train.packing=true",
            "teachers.1.traces=other.jsonl",
            "teachers[0].name=first",
            "precision.carry=bfloat16",
        ],
    )
    assert recipe.train == {"max_steps": 7, "learning_rate": 2e-4, "packing": True}
    assert recipe.teachers[1].traces == str(elsewhere / "other.jsonl")
    assert recipe.teachers[0].name == "first"
    assert recipe.precision.carry == "bfloat16"


@pytest.mark.parametrize("override", ["rounds", "=3", "teachers.7.name=x", "student.path=x", "train.max_steps=[1"])
def test_an_override_that_says_nothing_is_refused(write, override):
    assert override.partition("=")[0] in faults(write(), [override])[0]


def test_all_faults_are_reported_at_once_with_the_nearest_known_name(write):
    text = MINIMAL.replace("rounds: 2", "rounds: 0\nfiltr: {}\nfilter: {keep_per_problme: 2}")
    text = text.replace("max_steps: 5, learning_rate: 1e-5", "max_step: 5, learning_rate: fast, output_dir: x")
    text = text.replace("plain.jsonl", "missing.jsonl").replace("name: steps", "name: Step 1")
    found = "\n".join(faults(write(text)))
    for expected in (
        "rounds: got 0",
        "filtr: unknown key; did you mean 'filter'?",
        "filter.keep_per_problme: unknown key; did you mean 'keep_per_problem'?",
        "train.max_step: not a field of TRL's SFTConfig; did you mean 'max_steps'?",
        "train.learning_rate: got 'fast', expected float",
        "train.output_dir: motkit sets this field itself",
        "train.max_steps: missing",
        "teachers[0].traces: file not found: ",
        "teachers[1].name: got 'Step 1', expected lower-case letters",
    ):
        assert expected in found
    assert all(line.count("mine.yaml: ") == 1 for line in found.splitlines())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2]", "expected a mapping"),
        ("a: [", "not readable YAML"),
        ("rounds: 1\nrounds: 2", "not readable YAML"),
        ("x: !!python/object/apply:os.system ['true']", "not readable YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(write, text, says):
    assert says in faults(write(text))[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("evaluate: {}", "nothing to evaluate"),
        ("evaluate: {traces: plain.jsonl}", "'traces' need 'problems'"),
        ("evaluate: {problems: problems.jsonl, samples: 4}", "needs 'sampling.temperature' above 0"),
        ("seed: -1", "seed: got -1"),
        ("precision: {carry: int8}", "precision.carry: got 'int8'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(write, change, says):
    assert says in "\n".join(faults(write(MINIMAL + change)))


def test_problems_may_be_a_mapping(write, tmp_path):
    source = "problems: {path: problems.jsonl, columns: {prompt: question}, sample: {count: 200, seed: 0}}"
    recipe = load_recipe(write(MINIMAL.replace("problems: problems.jsonl", source)))
    assert recipe.problem_source.path == str(tmp_path / "problems.jsonl")
    assert recipe.problem_source.sample.count == 200
    assert load_recipe(write()).problem_source.path == str(tmp_path / "problems.jsonl")
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert load_recipe(tmp_path / "again.yaml", ["problems.sample.count=9"]).problem_source.sample.count == 9


def test_a_dataset_of_the_hub_is_no_path(write):
    text = MINIMAL.replace("plain.jsonl", "hf://open-r1/traces/math:train, columns: {id: uuid}")
    recipe = load_recipe(write(text.replace("problems: problems.jsonl", "problems: hf://a/b")))
    assert recipe.teachers[0].traces == "hf://open-r1/traces/math:train"
    assert recipe.problems == "hf://a/b"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("filter: {verifier: maths}", "filter.verifier: got 'maths', expected one of math"),
        ("filter: {verifier: python}", "filter.verifier: 'python' is not available in this version"),
        ("filter: {keep: best}", "filter.keep: got 'best'"),
        ("filter: {min_per_teacher: 0}", "filter.min_per_teacher: got 0"),
        ("evaluate: {problems: problems.jsonl, verifier: none}", "evaluate.verifier: 'none' would score every answer"),
        ("evaluate: {problems: problems.jsonl, verifier: exat}", "evaluate.verifier: got 'exat'"),
    ],
)
def test_a_filter_that_does_not_exist_is_refused(write, change, says):
    assert says in "\n".join(faults(write(MINIMAL + change)))


def test_faults_of_sources_name_their_place(write):
    text = MINIMAL.replace("problems: problems.jsonl", "problems: {path: gone.jsonl, colums: {}, columns: {promt: q}}")
    found = "\n".join(faults(write(text.replace("traces: plain.jsonl", "traces: plain.jsonl, columns: {idd: x}"))))
    for expected in (
        "problems.path: file not found: ",
        "problems.colums: unknown key; did you mean 'columns'?",
        "problems.columns: columns: unknown promt; a mapping for problems may name id",
        "teachers[0].columns: columns: unknown idd; a mapping for traces may name id",
    ):
        assert expected in found, found


def test_the_student_is_judged_like_the_teachers_unless_nothing_is_verified(write):
    path = write(MINIMAL + "filter: {verifier: choice}\nevaluate: {problems: problems.jsonl}\n")
    assert load_recipe(path).evaluation_verifier == "choice"
    assert load_recipe(path, ["filter.verifier=none"]).evaluation_verifier == "math"
    assert load_recipe(path, ["filter.verifier=null"]).filter.verifier == "none"
    assert load_recipe(path, ["evaluate.verifier=exact"]).evaluation_verifier == "exact"


def test_two_teachers_of_one_name_are_refused(write):
    assert "plain is used more than once" in "\n".join(faults(write(MINIMAL.replace("name: steps", "name: plain"))))


def test_a_resolved_recipe_survives_yaml_and_names_what_differs(write, tmp_path):
    recipe = load_recipe(write(MINIMAL + "evaluate: {problems: problems.jsonl, traces: plain.jsonl}\n"))
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe
    assert again.differences(recipe) == []
    changed = load_recipe(tmp_path / "again.yaml", ["train.max_steps=9", "filter.over_long=error"])
    assert changed.differences(recipe) == ["filter.over_long: 'drop' → 'error'", "train.max_steps: 5 → 9"]


def test_the_branches_of_a_union_are_one(write):
    recipe = load_recipe(write(), ["branches=union"])
    assert isinstance(recipe, Recipe)
    assert recipe.branch_names == ("union",)


def test_a_bare_name_is_a_bundled_recipe_and_names_the_run():
    path = recipe_path("quickstart")
    assert path.name == "recipe.yaml"
    assert recipe_name(path) == "quickstart"
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        recipe_path("quikstart")
