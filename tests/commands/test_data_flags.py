"""The data options, declared once: four commands take them, and all of them are settings."""

import dataclasses

import pytest
import typer.main

from unipelt_cli.cli import app
from unipelt_cli.commands.shared.data_flags import DataFlags, takes_data
from unipelt_cli.config.sections import DataSettings

OPTIONS = {field.name for field in dataclasses.fields(DataFlags)}


def test_every_data_option_but_several_seeds_is_a_setting() -> None:
    settings = DataFlags(data_seeds="1,2", k=5).settings()
    assert settings["data"].keys() == OPTIONS - {"data_seeds"}
    assert settings["data"].keys() <= DataSettings.model_fields.keys()
    assert settings["data"]["k"] == 5


@pytest.mark.parametrize(
    ("command", "left_out"),
    [
        ("train", set()),
        ("prepare", {"tasks", "data_seeds", "prepared"}),
        ("recommend", {"tasks", "data_seeds"}),
        ("sweep", {"task", "data_seed"}),  # its own --tasks, --k and --data-seeds are axes
    ],
)
def test_commands_take_the_data_options(command: str, left_out: set[str]) -> None:
    commands = typer.main.get_group(app).commands
    taken = [option.name for option in commands[command].params]
    assert OPTIONS - {*taken} == left_out
    assert len({*taken}) == len(taken)


def test_a_name_that_is_no_data_option_is_refused() -> None:
    with pytest.raises(TypeError, match="no data options: dev_sizes, epochs"):
        takes_data("task", "epochs", "dev_sizes")
