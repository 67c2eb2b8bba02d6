"""Pictures of gates."""

from pathlib import Path

from support.command import invoke


def test_pictures_of_every_view_are_drawn_whole(run: Path, tmp_path: Path) -> None:
    views = [["--by", "class"], ["--by", "epoch"], ["--ablate", "--rows", "4"]]
    for number, view in enumerate(views):
        picture = tmp_path / f"{number}.png"
        assert invoke("inspect-gates", run, *view, "--plot", picture)[0] == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
    missing = tmp_path / "no" / "a.png"
    code, _, stderr = invoke("inspect-gates", run, "--by", "epoch", "--plot", missing)
    assert code == 2
    assert f"error: {missing}: cannot be written (No such file or directory)" in stderr
