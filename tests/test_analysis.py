"""Every figure script on a small comparison, again from its CSV files alone, and the report, also in a browser."""

import html.parser
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import numpy
import pandas
import pytest
from click.testing import CliRunner
from conftest import make_pico_checkpoint
from experiment import write_experiment

from motkit import cli
from motkit.analysis import agreement, curves, report, runs
from motkit.analysis.models import load_weights
from motkit.logits import mean_loss
from motkit.recipe import load_recipe
from motkit.rounds import run_rounds

pytestmark = pytest.mark.slow
SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[1] / "analysis").glob("*.py"))


def script(name):
    path = Path(__file__).parents[1] / "analysis" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"analysis_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Two teachers; MoT with two seeds, each other arm with one."""
    folder = tmp_path_factory.mktemp("comparison")
    recipe = write_experiment(folder / "recipe", make_pico_checkpoint)
    root, listed = folder / "mini-compare", []
    plain = f"teachers=[{{name: plain, traces: {folder / 'recipe' / 'plain.jsonl'}}}]"

    def add(arm, name, *overrides, seed=0, budget="both", teacher=None, left_out=None):
        run = f"seed_{seed}/{name}"
        lines = [f"seed={seed}", *overrides]
        run_rounds(load_recipe(recipe, lines), root / run, progress=False, say=lambda line: None)
        place = {"arm": arm, "budget": budget, "seed": seed, "teacher": teacher, "left_out": left_out, "run": run}
        listed.append(place)

    add("mot", "mot")
    add("mot", "mot", seed=1)
    add("std", "std-plain", plain, "rounds=1", "train.max_steps=8", budget="steps", teacher="plain")
    add("std", "std-plain.compute", plain, "rounds=1", "train.max_steps=16", budget="compute", teacher="plain")
    add("mtd", "mtd", "branches=union", "rounds=1", "train.max_steps=8", budget="steps")
    add("leave_out", "mot-without-wordy", plain, left_out="wordy")
    arms = ["base", "std", "mtd", "mot", "leave_out"]
    record = {"arms": arms, "seeds": [0, 1], "budgets": ["steps", "compute"], "branch_steps": 4, "rounds": 2}
    (root / "comparison.json").write_text(json.dumps({**record, "runs": listed}))
    return root


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_figure_is_the_same_from_its_csv_alone(name, comparison, tmp_path):
    if name in ("fig6_loss_landscape", "lemma1"):
        pytest.importorskip("hessian_eigenthings")
    options = {"fig6_loss_landscape": ["--quick"], "fig5_token_confidence": ["--minimum-count", "2"]}.get(name, [])
    before = {path: path.stat().st_mtime_ns for path in comparison.rglob("*")}
    ran = CliRunner().invoke(script(name), ["--run", str(comparison), "--out", str(tmp_path), *options])
    assert ran.exit_code == 0, ran.output
    assert {path: path.stat().st_mtime_ns for path in comparison.rglob("*")} == before
    tables = list((tmp_path / name).glob("*.csv"))
    assert tables
    assert all(len(pandas.read_csv(table).columns) > 1 for table in tables)
    first = {ending: (tmp_path / f"{name}{ending}").read_bytes() for ending in (".png", ".svg")}
    for points in tmp_path.glob("*.points.jsonl"):
        known = points.read_bytes()
        ran = CliRunner().invoke(script(name), ["--run", str(comparison), "--out", str(tmp_path), *options])
        assert ran.exit_code == 0, ran.output
        assert points.read_bytes() == known  # nothing is computed twice
        assert (tmp_path / f"{name}.png").read_bytes() == first[".png"]
    alone = tmp_path / "alone"
    shutil.copytree(tmp_path / name, alone / name)
    again = CliRunner().invoke(script(name), ["--redraw", "--out", str(alone)])
    assert again.exit_code == 0, again.output
    for ending, content in first.items():
        assert (alone / f"{name}{ending}").read_bytes() == content


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_help_says_what_figure_and_how_it_differs(name):
    told = CliRunner().invoke(script(name), ["--help"]).output
    assert "aper" in told
    assert "--run" in told


def test_a_script_on_no_run_is_one_line(tmp_path):
    for arguments in (["--run", str(tmp_path)], [], ["--redraw", "--out", str(tmp_path)]):
        ran = CliRunner().invoke(script("fig_cost"), arguments)
        assert ran.exit_code == 2
        assert ran.output.startswith("error: ")
        assert len(ran.output.splitlines()) == 1


def test_curves_are_the_runs_own_numbers(comparison):
    some = runs.open_runs([comparison])
    tables = curves.compute_curves(some, "mot")
    scores, training = tables["scores"], tables["training"]
    for seed in (0, 1):
        run = comparison / f"seed_{seed}" / "mot"
        for number in (1, 2):
            recorded = json.loads((run / f"round_{number:02d}" / "evaluation.json").read_text())["merged"]["scores"]
            row = scores[(scores["seed"] == seed) & (scores["kind"] == "merge") & (scores["steps"] == 4 * number)]
            assert row["heldout_loss"].item() == recorded["heldout_loss"]
            losses = []
            for branch in ("plain", "wordy"):
                lines = (run / f"round_{number:02d}/branches/{branch}/metrics.jsonl").read_text().splitlines()
                losses.append(json.loads(lines[2])["loss"])
            step = training[(training["seed"] == seed) & (training["steps"] == 4 * number - 1)]
            assert step["loss"].item() == pytest.approx(numpy.mean(losses))


def test_scores_in_between_have_their_step(comparison, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(comparison / "seed_0/std-plain", run)
    file = run / "round_01/evaluation.json"
    entries = json.loads(file.read_text())
    entries["plain@4"] = {"inputs": {}, "scores": {"accuracy": 0.25, "standard_error": 0.1, "heldout_loss": 1.5}}
    file.write_text(json.dumps(entries))
    scores = curves.compute_scores([runs.open_run(run)])
    between = scores[scores["kind"] == "between"]
    assert between[["steps", "accuracy", "heldout_loss"]].to_numpy().tolist() == [[4, 0.25, 1.5]]


def test_costs_are_counted_by_budget(comparison):
    costs = curves.compute_costs(runs.open_runs([comparison]))["costs"]
    steps = costs.groupby(["name", "budget"])["branch_steps"].mean().to_dict()
    assert steps["MoT", "both"] == 2 * 2 * 4
    assert steps["STD plain", "steps"] == 8
    assert steps["STD plain", "compute"] == 16
    assert steps["MTD", "steps"] == 8
    assert steps["MoT without wordy", "both"] == 8


def test_agreement_is_what_numpy_says(comparison, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(comparison / "seed_0/mot", copy)
    for file in copy.glob("round_*/merged/agreement.csv"):
        file.unlink()  # as in a run from before there was one
    assert runs.open_runs([comparison]).main.folder.root == (comparison / "seed_0/mot").resolve()
    run = runs.open_run(copy)
    found = agreement.compute_agreement(run)
    one, other = (load_weights(path, "float64") for path in run.branches(2).values())
    start, merged = load_weights(run.student(1), "float64"), load_weights(run.student(2), "float64")
    names = [name for name in start if ".layers.1." in name]
    for layer, chosen in (("model", list(start)), ("1", names)):
        a, b, u = (
            numpy.concatenate([(weights[name] - start[name]).flatten().numpy() for name in chosen])
            for weights in (one, other, merged)
        )
        both = (a != 0) & (b != 0)
        expected = {
            "cosine": a @ b / numpy.linalg.norm(a) / numpy.linalg.norm(b),
            "sign_agreement": (numpy.sign(a) == numpy.sign(b))[both].mean(),
            "merged_norm": numpy.linalg.norm(u),
            "survival": numpy.linalg.norm(u) * 2 / (numpy.linalg.norm(a) + numpy.linalg.norm(b)),
        }
        for metric, value in expected.items():
            row = found[(found["round"] == 2) & (found["layer"] == layer) & (found["metric"] == metric)]
            assert row["value"].item() == pytest.approx(value, rel=1e-6), (layer, metric)


def test_an_agreement_report_is_read_and_not_computed_again(comparison, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(comparison / "seed_0/mot", run)
    lines = "layer,metric,first,second,value\nmodel,cosine,plain,wordy,0.125\n0,survival,,,nan\n"
    for number in (1, 2):
        (run / f"round_0{number}/merged/agreement.csv").write_text(lines)
    found = agreement.compute_agreement(runs.open_run(run))
    assert found["value"].tolist()[0] == 0.125
    assert found["layer"].tolist() == ["model", "0"] * 2
    assert numpy.isnan(found["value"].tolist()[1])


def test_pruned_branches_leave_curves_and_costs(comparison, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(comparison / "seed_0/mot", run)
    whole = curves.compute_costs(runs.open_runs([run]))["costs"]
    for checkpoint in run.glob("round_*/branches/*/checkpoint"):
        shutil.rmtree(checkpoint)
    for file in run.glob("round_*/merged/agreement.csv"):
        file.unlink()
    some = runs.open_runs([run])
    assert some.main.branches(1) == {}
    pandas.testing.assert_frame_equal(curves.compute_costs(some)["costs"], whole)
    assert len(curves.compute_training(some.runs)) == 8
    assert agreement.compute_agreement(some.main).empty
    report.write_report(run, tmp_path / "out", with_confidence=False, progress=False)


def test_the_traces_of_a_run_are_those_of_its_evaluation(comparison):
    from motkit.analysis.models import load_model

    run = runs.open_runs([comparison]).main
    sets, what = run.traces()
    assert what == "held-out traces"
    loss, _ = mean_loss(load_model(run.final, dtype="float32", device="cpu"), sets["plain"])
    assert run.evaluation(2)["merged"]["heldout_loss_by_set"]["plain"] == pytest.approx(loss, rel=1e-6)


def test_arms_follow_from_a_recipe(comparison):
    for name, arm in (("mot", "mot"), ("std-plain", "std"), ("mtd", "mtd")):
        assert runs.open_run(comparison / "seed_0" / name).arm == arm


class Loads(html.parser.HTMLParser):
    """What a page would fetch, and its scripts."""

    def __init__(self):
        super().__init__()
        self.fetched, self.scripts, self.headings = [], 0, []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.scripts += tag == "script" or any(key.startswith("on") for key in values)
        for key in ("src", "href", "xlink:href", "data", "action"):
            target = values.get(key) or ""
            if target and not target.startswith(("#", "data:")):
                self.fetched.append(target)


@pytest.mark.parametrize("which", [".", "seed_0/mot", "seed_0/std-plain"])
def test_a_report_is_one_page_without_scripts(which, comparison, tmp_path):
    ran = CliRunner().invoke(cli.main, ["report", str(comparison / which), "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    text = Path(ran.output.strip()).read_text()
    found = Loads()
    found.feed(text)
    assert found.scripts == 0
    assert found.fetched == ["confidence.html"]  # a link, followed by hand
    assert (tmp_path / "confidence.html").is_file()
    assert str(comparison) not in text
    assert "@import" not in text
    for said in ("What it cost", "Versions", "mergekit", "max_steps", "plain"):
        assert said in text
    assert text.count("<svg") >= 2


def test_a_report_in_markdown(comparison, tmp_path):
    run = comparison / "seed_0/mot"
    arguments = ["report", str(run), "--out", str(tmp_path), "--format", "md", "--no-confidence"]
    ran = CliRunner().invoke(cli.main, arguments)
    assert ran.exit_code == 0, ran.output
    text = (tmp_path / "report.md").read_text()
    accuracy = json.loads((run / "round_02/evaluation.json").read_text())["merged"]["scores"]["accuracy"]
    assert f"| 2 | merged |  |  | {100 * accuracy:.1f} \\[" in text
    assert "![" in text
    assert (tmp_path / "training_curves.png").is_file()


def test_a_comparisons_table_has_the_intervals(comparison, tmp_path):
    root = tmp_path / "again"
    shutil.copytree(comparison, root)
    (root / "compare.csv").write_text(
        "budget,arm,teacher,left_out,seeds,accuracy,accuracy_std,difference,low,high,heldout_loss\n"
        "steps,std,plain,,1,0.25,,,,,2.5\nsteps,mot,,,2,0.5,0.125,0.25,-0.1,0.6,2.25\n"
    )
    text = report.write_report(root, tmp_path / "out", with_confidence=False, progress=False).read_text()
    assert "<td>+25.0 [-10.0, +60.0]</td>" in text
    assert "<td>50.0 ± 12.5</td>" in text


def test_a_comparison_that_motkit_made(tmp_path):
    """The real thing: its arms, another merge config, scores in between, its table."""
    from motkit.compare import run_comparison

    recipe = load_recipe(write_experiment(tmp_path / "recipe", make_pico_checkpoint), ["evaluate.every_steps=2"])
    root = tmp_path / "real"
    arms = ["base", "std", "mot", "mot/ties"]
    run_comparison(
        recipe, root, arms=arms, seeds=[0], leave_out=["wordy"], progress=False, say=lambda line: None
    )  # fmt: skip
    some = runs.open_runs([root])
    names = {"base", "STD plain", "STD wordy", "MoT", "MoT ties", "MoT without wordy"}
    assert {run.name for run in some.runs} == names
    tables = curves.compute_curves(some, "std", "mot")
    between = tables["scores"][(tables["scores"]["kind"] == "between") & (tables["scores"]["name"] == "STD plain")]
    assert {2, 4, 6} <= set(between["steps"])
    recorded = pandas.read_csv(root / "compare_runs.csv").set_index("run")
    ours = curves.compute_costs(some)["costs"]
    for run, row in zip(some.runs, ours.to_dict(orient="records"), strict=True):
        theirs = recorded.loc[run.folder.root.relative_to(root.resolve()).as_posix()]
        for column in ("accuracy", "heldout_loss", "branch_steps", "tokens", "flops"):
            assert row[column] == pytest.approx(theirs[column]), (run.name, column)
    for name in ("fig1_best_teacher", "fig3_training_curves", "fig4_leave_one_out", "fig_cost"):
        ran = CliRunner().invoke(script(name), ["--run", str(root), "--out", str(tmp_path / "out")])
        assert ran.exit_code == 0, ran.output
    text = report.write_report(root, tmp_path / "report", with_confidence=False, progress=False).read_text()
    assert "MoT ties" in text


def test_what_is_no_run_is_refused(tmp_path):
    ran = CliRunner().invoke(cli.main, ["report", str(tmp_path)])
    assert ran.exit_code == 2
    assert "neither a run directory" in ran.output


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_a_browser_shows_the_report_without_an_error_or_a_request(comparison, tmp_path):
    page = report.write_report(comparison, tmp_path, progress=False)
    log = tmp_path / "net.json"
    shown = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'p'}",
         "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0",
         f"--log-net-log={log}", "--window-size=390,1600", f"--screenshot={tmp_path / 'page.png'}", page.as_uri()],
        capture_output=True, text=True, timeout=180, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in shown.stderr
    from PIL import Image

    image = numpy.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert image.shape[1] >= 390
    assert len(numpy.unique(image.reshape(-1, 3), axis=0)) > 20  # text and figures, not a blank page
    asked = [line for line in log.read_text(errors="replace").splitlines() if '"url":"http' in line]
    own = ("google", "gstatic", "gvt1")  # the browser's own, whatever the page is
    assert [line for line in asked if not any(name in line for name in own)] == []


def test_tables_come_back_number_for_number(tmp_path):
    from motkit.analysis.tables import read_tables, write_tables

    text = ["7", "nan", "", 'a"b,\nc', " x "]
    numbers = [0.1 + 0.2, float("nan"), 1e-300, -0.0, 3.0]
    table = pandas.DataFrame({"text": text, "value": numbers, "count": [1, 2, 3, 4, 5]})
    write_tables({"t": table, "empty": pandas.DataFrame(columns=["x", "loss"])}, tmp_path)
    back = read_tables(tmp_path)
    pandas.testing.assert_frame_equal(back["t"], table, check_exact=True, check_dtype=False)
    assert back["t"]["text"].tolist() == text
    assert list(back["empty"].columns) == ["x", "loss"]
