"""The commands in the presets' headers."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_preset_headers_hold_commands_for_that_preset() -> None:
    files = list((ROOT / "presets").glob("*.*"))
    assert len(files) >= 12
    for path in files:
        assert path.suffix == ".toml"
        text = path.read_text()
        assert text.startswith("# ")
        assert f"unipelt train --preset {path.stem} " in text
        assert tomllib.loads(text)["method"]["name"]
