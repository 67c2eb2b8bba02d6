"""Every command has help."""

from support.command import invoke


def test_every_command_has_help_with_an_example() -> None:
    code, stdout, _ = invoke("--help")
    assert code == 0
    names = ("prepare", "train", "eval", "predict", "inspect-gates", "export", "compare", "list")
    for command in names:
        assert command in stdout
        code, text, _ = invoke(command, "--help")
        assert code == 0
        assert "Example: " in text
