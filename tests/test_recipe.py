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
        (tmp_path / "env" / "bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / "env" / "bin" / "python").touch()
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


def test_adapters_are_a_section_of_train_with_its_defaults_recorded(write, tmp_path):
    recipe = load_recipe(write(), ["train.lora={r: 4, target_modules: [q_proj, v_proj]}", "merged_adapter=true"])
    assert recipe.lora is not None
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.target_modules) == (4, 8, ("q_proj", "v_proj"))
    assert recipe.train["lora"]["dropout"] == 0.0
    assert recipe.merged_adapter is not None
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert load_recipe(write(), ["train.lora.r=2"]).lora.target_modules == "all-linear"
    assert load_recipe(write(), ["train.lora.r=2", "merged_adapter.r=5"]).merged_adapter.r == 5
    assert load_recipe(write(), ["train.lora=null"]).lora is None
    assert load_recipe(write(), ["merged_adapter=false"]).merged_adapter is None


def test_faults_of_adapters_are_reported_at_once(write):
    lora = "{r: 0, alpha: big, lora_dropout: 0.1, target_module: [q], use_dora: true, bias: all, modules_to_save: [x]}"
    found = "\n".join(faults(write(), [f"train.lora={lora}", "train.max_step=3"]))
    for expected in (
        "train.lora.r: got 0, input should be greater than or equal to 1",
        "train.lora.alpha: got 'big', input should be a valid integer",
        "train.lora.lora_dropout: here it is called 'dropout'; rename it",
        "train.lora.target_module: unknown key; did you mean 'target_modules'?",
        "train.lora.use_dora: not supported: the merge averages updates of the form scaling·B·A",
        "train.lora.bias: not supported: biases stay frozen",
        "train.lora.modules_to_save: not supported: an adapter branch trains its adapters only",
        "train.max_step: not a field",
    ):
        assert expected in found
    assert "expected a mapping" in faults(write(), ["train.lora=8"])[0]
    assert "merged_adapter: goes with 'train.lora'" in faults(write(), ["merged_adapter=true"])[0]


def test_which_branches_stay_is_no_part_of_the_experiment(write):
    one, other = load_recipe(write()), load_recipe(write(), ["keep_branches=last"])
    assert one != other
    assert one.differences(other) == []
    assert "keep_branches: got 'some'" in faults(write(), ["keep_branches=some"])[0]


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


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("no_such", "unknown target 'no_such'"),
        ("wandbb", "did you mean 'wandb'"),
        ("clearml", "clearml is not installed"),
    ],
)
def test_a_place_to_report_to_that_is_not_there_is_said_beforehand(write, target, says):
    assert says in "\n".join(faults(write(), [f"train.report_to={target}"]))


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


ASKED = """
student: some/student
problems: problems.jsonl
teachers:
  - {name: a, model: qwq, engine: openai, base_url: "http://127.0.0.1:1/v1", api_key_env: KEY, concurrency: 8}
  - {name: b, model: Qwen/QwQ-32B, engine: vllm, engine_args: {tensor_parallel_size: 2}, python: env/bin/python}
  - {name: c, model: Qwen/QwQ-32B, engine: vllm, serve: true, timeout_s: 60, engine_args: {dtype: bfloat16}}
  - {name: d, model: Qwen/QwQ-32B, engine: transformers, batch_size: 4, sampling: {n: 4, temperature: 1.0}}
  - {name: e, traces: plain.jsonl}
rounds: 1
train: {max_steps: 5}
"""


def test_teachers_that_are_models(write, tmp_path):
    recipe = load_recipe(write(ASKED))
    a, b, c, d, e = recipe.teachers
    assert (a.over_http, b.over_http, c.over_http, d.over_http, e.over_http) == (True, False, True, False, False)
    assert b.python == str(tmp_path / "env/bin/python")
    assert (b.model, d.sampling.n, e.traces) == ("Qwen/QwQ-32B", 4, str(tmp_path / "plain.jsonl"))
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert "engine" not in e.model_dump()
    assert load_recipe(write(ASKED), ["teachers.0.price_per_million_tokens=2"]).teachers[0].model_dump()[
        "price_per_million_tokens"
    ] == {"input": 2.0, "output": 2.0}


def test_where_a_teacher_is_asked_is_no_part_of_the_experiment(write):
    recipe = load_recipe(write(ASKED))
    moved = load_recipe(
        write(ASKED),
        ["teachers.0.base_url=http://127.0.0.1:2/v1", "teachers.1.engine_args.tensor_parallel_size=8"],
    )
    assert moved.differences(recipe) == []
    changed = load_recipe(write(ASKED), ["teachers.2.engine_args.dtype=float32", "teachers.0.model=other"])
    assert changed.differences(recipe) == [
        "teachers.0.model: 'qwq' → 'other'",
        "teachers.2.engine_args.dtype: 'bfloat16' → 'float32'",
    ]


def test_a_folder_of_a_model_resolves_and_an_endpoints_name_does_not(write, tmp_path):
    (tmp_path / "qwq").mkdir()
    (tmp_path / "qwq" / "config.json").touch()
    recipe = load_recipe(write(ASKED.replace("model: Qwen/QwQ-32B", "model: qwq")))
    assert recipe.teachers[0].model == "qwq"
    assert [teacher.model for teacher in recipe.teachers[1:4]] == [str(tmp_path / "qwq")] * 3


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ("{name: x}", ["give 'traces' (a file of traces) or 'model' and 'engine'"]),
        ("{name: x, traces: plain.jsonl, model: m, engine: vllm}", ["'traces' and 'model' exclude each other"]),
        ("{name: x, model: m}", ["'model' needs 'engine'"]),
        ("{name: x, model: m, engine: openai}", ["'engine: openai' needs 'base_url'"]),
        ("{name: x, traces: plain.jsonl, concurrency: 2}", ["'concurrency' goes with 'model', not with 'traces'"]),
        (
            "{name: x, model: m, engine: transformers, base_url: 'http://x', engine_args: {a: 1},"
            " sampling: {extra: {b: 1}}}",
            ["'base_url' does not go", "'engine_args' does not go", "'sampling.extra' does not go"],
        ),
        (
            "{name: x, model: m, engine: vllm, timeout_s: 3}",
            ["'timeout_s' does not go with 'engine: vllm' without 'serve"],
        ),
        ("{name: x, model: m, engine: openai, serve: true, base_url: 'http://x'}", ["remove 'base_url'"]),
        ("{name: x, model: m, engine: vllm, sampling: {n: 2, temperature: 0}}", ["'n' above 1 needs 'temperature'"]),
        ("{name: x, model: m, engine: openai, base_url: 'ftp://x'}", ["base_url: got 'ftp://x'"]),
        ("{name: x, model: m, engine: sglang}", ["engine: got 'sglang'"]),
        ("{name: x, model: m, engine: vllm, sampling: {top_k: 3}}", ["sampling.top_k: unknown key"]),
        ("{name: x, model: ./gone, engine: transformers}", ["teachers[0].model: no checkpoint (config.json) in gone"]),
    ],
)
def test_settings_of_a_teacher_that_do_not_go_together_are_all_named(write, teacher, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = MINIMAL.replace("{name: plain, traces: plain.jsonl}", teacher)
    found = faults(write(text))
    assert len(found) == len(says)
    for line, expected in zip(found, says, strict=True):
        assert expected in line
        assert line.startswith("mine.yaml: teachers[0]")
