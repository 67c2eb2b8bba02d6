"""A grid is every combination of its axes."""

from pathlib import Path
from typing import Any

import pytest
from support.sweeps import cells_of, specification

from unipelt_cli.config.experiment import Experiment, merge_settings, resolve
from unipelt_cli.config.presets import read_preset, sweep_presets
from unipelt_cli.errors import ConfigError, UnipeltError
from unipelt_cli.sweeps import grid


def test_a_grid_holds_every_combination_with_seeds_side_by_side() -> None:
    axes = {"seeds": [1, 2], "data_seeds": [3, 4], "methods": ["lora", "head"], "k": [8, "all"]}
    cells = cells_of(axes)
    expected = [
        ("sst2", k, method, data_seed, seed)
        for k in (8, None)
        for method in ("lora", "head")
        for data_seed in (3, 4)
        for seed in (1, 2)
    ]
    assert [specification(cell) for cell in cells] == expected
    assert len({cell.name for cell in cells}) == 16
    assert cells[0].name.startswith("sst2-k8-lora-minilm-d3-s1-")
    assert [len(group) for group in grid.groups(cells, 100)] == [4, 4, 4, 4]
    assert [len(group) for group in grid.groups(cells, 3)] == [3, 1] * 4


def test_a_cell_is_called_by_all_its_settings() -> None:
    (plain,) = cells_of({})
    (same,) = cells_of({"methods": ["unipelt-apl"]})
    (other,) = cells_of({}, {"train": {"clip": 0.5}})
    assert plain.name == same.name != other.name


def test_any_setting_can_be_an_axis_and_a_method_can_bring_its_own() -> None:
    axes, rest = grid.take_axes(
        [
            "train.learning_rate=[1e-4, 5e-4]",
            "method.parts=[['adapter'], 'lora,prefix']",
            "data.k=8",
        ]
    )
    assert rest == ["data.k=8"]
    cells = cells_of(axes)
    found = [(c.experiment.train.learning_rate, c.experiment.method.parts) for c in cells]
    assert found == [
        (rate, parts) for rate in (1e-4, 5e-4) for parts in (("adapter",), ("lora", "prefix"))
    ]
    own = {"name": "lora", "train": {"learning_rate": 0.01}, "method": {"rank": 2}}
    (cell,) = cells_of({"methods": [own]})
    assert (cell.experiment.train.learning_rate, cell.experiment.method.rank) == (0.01, 2)
    (joint,) = cells_of({"tasks": ["sst2+rte"]}, {"data": {"task": None, "dev_size": 50}})
    assert joint.experiment.data.tasks == ("sst2", "rte")


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"k": [8, 8]}, r"the grid has sst2-k8-unipelt-apl-minilm-d111-s42-\w+ twice"),
        ({"methods": [3]}, r"axes.methods has 3"),
        ({"methods": ["lorra"]}, "preset 'lorra': no such file or preset"),
        ({"train.epochs": [0]}, "train.epochs = 0 is not allowed"),
        ({"seeds": list(range(400)), "data_seeds": list(range(400))}, "the grid has 160,000 cells"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(axes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnipeltError, match=message):
        cells_of(axes)


def test_shipped_grids_resolve_and_the_papers_has_its_size() -> None:
    def complete(own: Any) -> Experiment:
        return resolve([("", merge_settings(own))])

    sizes = {name: len(grid.read_grid(name).cells(complete)) for name in sweep_presets()}
    assert sizes == {"table1": 840, "table3": 56, "table4": 7, "first-look": 72}
    first = grid.read_grid("table1").cells(complete)[0].experiment
    paper = resolve([("", read_preset("paper")), ("", {"data": {"task": "sst2"}})])
    assert first.train.model_dump() | {"learning_rate": 5e-4} == paper.train.model_dump()
    for name in ("table1", "table3", "table4"):
        cells = {
            cell.experiment.method_name: cell.experiment
            for cell in grid.read_grid(name).cells(complete)
        }
        apl = cells["unipelt-apl"]
        assert (apl.model, apl.method) == (paper.model, paper.method)
        controls = [cells[other] for other in ("unipelt-ap", "ap-ungated") if other in cells]
        assert len(controls) == 1 + (name == "table3")
        assert {control.settings()["method"]["reduction"] for control in controls} == {16}


def test_a_grid_file_with_an_unknown_axis_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "grid.toml"
    path.write_text("[axes]\nmethod = ['lora']\n")
    with pytest.raises(ConfigError, match=r"axes\.method: no such axis") as refused:
        grid.read_grid(str(path))
    assert refused.value.hint.startswith("did you mean methods?")
    path.write_text("[axes]\nk = 100\n")
    with pytest.raises(ConfigError, match=r"axes\.k = 100: not a list of values"):
        grid.read_grid(str(path))


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("bitfit", "demo-k20-bitfit-minilm-d111-s42-4a8944fa"),
        ("dora", "demo-k20-dora-minilm-d111-s42-1d4b5b00"),
        ("lst", "demo-k20-lst-minilm-d111-s42-6a3789c1"),
    ],
)
def test_cells_keep_the_names_that_earlier_versions_gave_them(method: str, name: str) -> None:
    """A sweep finds its finished cells by them."""
    settings = {"data": {"task": "demo", "k": 20}, "method": {"name": method}}
    assert grid.cell_name(resolve([("", settings)])) == name
