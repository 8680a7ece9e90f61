import os
import stat
import subprocess
import sys

import pytest

from motkit import rundir
from motkit.errors import UserError


def test_publish_is_whole_or_nothing(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), rundir.publish(target) as partial:  # noqa: PT012
        (partial / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with rundir.publish(target) as partial:
        assert not target.exists()
        (partial / "whole").write_text("x")
        (partial / "whole").chmod(0o600)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((target / "whole").stat().st_mode) == 0o666 & ~umask
    with pytest.raises(UserError, match="exists already"), rundir.publish(target):
        pass


def test_what_a_killed_process_left_is_replaced(tmp_path):
    left = rundir.partial_path(tmp_path / "out")
    left.mkdir()
    (left / "stale").write_text("x")
    with rundir.publish(tmp_path / "out") as partial:
        (partial / "fresh").write_text("y")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fresh"]


def test_storage_faults_become_one_line(tmp_path):
    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"),
    ):
        with pytest.raises(UserError) as caught, rundir.storage_errors(tmp_path):
            raise error
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError), rundir.storage_errors(tmp_path):
        raise FileNotFoundError(2, "missing")


def test_a_second_process_is_refused_and_the_lock_goes_with_its_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from motkit.rundir import RunDir\n"
        "with RunDir(Path(sys.argv[1])).hold(): pass"
    )
    with rundir.RunDir(tmp_path).hold():
        second = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert f"another process holds this run (process {os.getpid()}" in second.stderr
    third = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert third.returncode == 0, third.stderr


def test_damage_is_found(tmp_path):
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "weights").write_bytes(b"12345678")
    record = rundir.write_done(stage, {"seed": 1}, cost={"steps": 2})
    assert rundir.read_done(stage) == record
    assert rundir.damage(stage, record, hashes=True) is None
    (stage / "weights").write_bytes(b"12345679")
    assert rundir.damage(stage, record, hashes=False) is None
    assert "SHA-256" in (rundir.damage(stage, record, hashes=True) or "")
    (stage / "weights").write_bytes(b"1234")
    assert "4 bytes, 8 were written" in (rundir.damage(stage, record, hashes=False) or "")
    (stage / "weights").unlink()
    assert "missing" in (rundir.damage(stage, record, hashes=False) or "")
    assert rundir.set_aside(stage).name == "stage.damaged-1"


def test_too_little_space_is_said_before_work_begins(tmp_path):
    with pytest.raises(UserError, match="GB are free"):
        rundir.require_space(tmp_path / "not" / "yet", 2**60, "this")
    rundir.require_space(tmp_path, 1, "this")


def test_a_pruned_stage_is_done_without_its_checkpoint(tmp_path):
    stage = tmp_path / "stage"
    (stage / "checkpoint").mkdir(parents=True)
    (stage / "checkpoint" / "model.safetensors").write_bytes(b"weights")
    (stage / "metrics.jsonl").write_text("{}")
    record = rundir.write_done(stage, {"seed": 1})
    digest = rundir.checkpoint_digest(record)
    assert rundir.prune_checkpoint(stage)
    assert not rundir.prune_checkpoint(stage)
    assert sorted(path.name for path in stage.iterdir()) == ["done.json", "metrics.jsonl", "pruned.json"]
    assert rundir.read_json(stage / "pruned.json") == {"pruned": True, "freed_bytes": 7}
    found = rundir.read_done(stage)
    assert found == {**record, "pruned": True}
    assert rundir.checkpoint_digest(found) == digest
    assert rundir.damage(stage, found, hashes=True) is None
    (stage / "metrics.jsonl").write_text("")
    assert "metrics.jsonl" in rundir.damage(stage, found, hashes=True)
