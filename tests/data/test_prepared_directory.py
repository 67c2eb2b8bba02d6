"""A prepared directory comes back unchanged, or not at all."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from support.data_files import glue, own_file, prepare_glue, prepare_own

from unipelt_cli.config.sections import DataSettings
from unipelt_cli.data import preparation
from unipelt_cli.data.prepared_directory import load_prepared, save_prepared
from unipelt_cli.errors import DataError, RunError

# The prepared directory


@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_a_prepared_directory_comes_back_unchanged(tmp_path, task):
    prepared = prepare_glue(glue(tmp_path / "glue", task), task, k=20, dev_size=10)
    save_prepared(prepared, tmp_path / "deep/in/one")
    loaded = load_prepared(tmp_path / "deep/in/one")
    assert loaded.task == prepared.task
    assert loaded.manifest == prepared.manifest
    for name, rows in prepared.splits.items():
        assert loaded.splits[name][:] == rows[:]
        assert loaded.splits[name].features == rows.features
    save_prepared(loaded, tmp_path / "two")
    for path in (tmp_path / "two").iterdir():
        assert path.read_bytes() == (tmp_path / "deep/in/one" / path.name).read_bytes()
    assert Dataset.from_file(str(tmp_path / "two/dev.arrow"))[:] == prepared.splits["dev"][:]


def test_a_prepared_directory_is_a_source(tmp_path):
    prepared = prepare_glue(glue(tmp_path / "glue", "rte"), "rte", k=20, data_seed=5)
    save_prepared(prepared, tmp_path / "ready")
    for settings in (
        DataSettings(prepared=str(tmp_path / "ready")),
        DataSettings(prepared=str(tmp_path / "ready"), task="rte", k=20, data_seed=5),
        DataSettings(source=str(tmp_path / "ready"), task="rte", k=20),
    ):
        assert preparation.prepare(settings).manifest == prepared.manifest
    changed = preparation.prepare(DataSettings(prepared=str(tmp_path / "ready"), metric="f1"))
    assert (changed.task.metric, changed.task.also) == ("f1", ("accuracy",))
    save_prepared(changed, tmp_path / "changed")
    assert load_prepared(tmp_path / "changed").task == changed.task


def test_own_rows_come_back_too(tmp_path):
    prepared = prepare_own(own_file(tmp_path, labels=("ä", "☃", "\x7f")), task="mrpc")
    save_prepared(prepared, tmp_path / "ready")
    assert load_prepared(tmp_path / "ready").task == prepared.task


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "cola"}, "data.task = 'cola': {} was prepared with 'rte'"),
        ({"k": 30}, "data.k = 30: {} was prepared with 20"),
        ({"data_seed": 111}, "data.data_seed = 111: {} was prepared with 5"),
        ({"metric": "mse"}, "data.metric = 'mse': rte is classification"),
    ],
)
def test_a_prepared_directory_must_be_what_is_asked_for(tmp_path, settings, message):
    glue(tmp_path / "glue", "rte")
    ready = tmp_path / "ready"
    save_prepared(prepare_glue(tmp_path / "glue", "rte", k=20, data_seed=5), ready)
    with pytest.raises(DataError) as caught:
        preparation.prepare(DataSettings(prepared=str(ready), **settings))
    assert caught.value.message == message.format(ready)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    place = content.index(b"message number")
    content[place] ^= 1
    path.write_bytes(content)


def break_unicode(path):
    path.write_bytes(path.read_bytes().replace(b"message number", b"\xffessage number", 1))


def edit(change):
    def damage(path):
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return damage


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("manifest.json", Path.unlink, "not a prepared directory (no manifest.json)"),
        ("manifest.json", truncate, "damaged (manifest.json: "),
        ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe"), "damaged (manifest.json: "),
        ("manifest.json", lambda path: path.write_text("[" * 100_000), "damaged (manifest.json: "),
        ("manifest.json", lambda path: path.write_text("[]"), "its manifest.json is not one of"),
        ("manifest.json", lambda path: path.write_text("{}"), "its manifest.json is not one of"),
        ("manifest.json", edit(lambda m: m.update(format=2)), "format 2, but this version reads"),
        ("manifest.json", edit(lambda m: m.update(k=7)), "damaged (manifest.json was changed)"),
        ("manifest.json", edit(lambda m: m.pop("task")), "damaged (manifest.json was changed)"),
        ("train.arrow", Path.unlink, "No such file or directory"),
        ("train.arrow", truncate, "damaged (train.arrow: "),
        ("train.arrow", lambda path: path.write_bytes(b""), "damaged (train.arrow: "),
        ("train.arrow", break_unicode, "damaged (train.arrow: "),
        ("dev.arrow", flip, "damaged (dev.arrow does not hold the rows of manifest.json)"),
    ],
)
def test_a_damaged_directory_is_told(tmp_path, name, damage, message):
    ready = tmp_path / "ready"
    save_prepared(prepare_own(own_file(tmp_path)), ready)
    damage(ready / name)
    with pytest.raises(DataError) as caught:
        load_prepared(ready)
    assert caught.value.message.startswith(str(ready))
    assert message in caught.value.message


def test_swapped_splits_are_told(tmp_path):
    ready = tmp_path / "ready"
    save_prepared(prepare_own(own_file(tmp_path)), ready)
    (ready / "test.arrow").rename(ready / "kept")
    (ready / "dev.arrow").rename(ready / "test.arrow")
    (ready / "kept").rename(ready / "dev.arrow")
    with pytest.raises(DataError, match="does not hold the rows"):
        load_prepared(ready)


def test_saving_never_overwrites(tmp_path):
    prepared = prepare_own(own_file(tmp_path))
    (tmp_path / "there").mkdir()
    for name in ("there", "own.csv"):
        with pytest.raises(RunError) as caught:
            save_prepared(prepared, tmp_path / name)
        assert caught.value.message == f"{tmp_path / name}: exists already"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_saving_is_whole_or_nothing(tmp_path, monkeypatch, failure):
    prepared = prepare_own(own_file(tmp_path / "in"))

    def fail(*_arguments):
        raise failure

    monkeypatch.setattr(preparation.Path, "write_bytes", fail)
    with pytest.raises((RunError, KeyboardInterrupt)) as caught:
        save_prepared(prepared, tmp_path / "out/ready")
    if isinstance(failure, OSError):
        expected = f"{tmp_path / 'out/ready'}: cannot be written (No space left on device)"
        assert str(caught.value) == expected
    assert list((tmp_path / "out").iterdir()) == []
