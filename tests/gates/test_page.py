"""The gates' page loads nothing and trusts no name."""

import json
from html.parser import HTMLParser
from pathlib import Path

from support.gates import inspected


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags:
            tag = self.tags[-1][0]
            self.texts[tag] = self.texts.get(tag, "") + data


def test_the_page_holds_all_loads_nothing_and_trusts_no_name(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "gates.html"
    found = inspected(run, "--ablate", "--rows", "20", "--html", path)
    page = Page(path.read_text(encoding="utf-8"))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"b", "i", "img", "link", "iframe", "object", "form"}
    assert not any(
        key in ("src", "onload") or "//" in (value or "")
        for _, own in page.tags
        for key, value in own.items()
    )
    policy = next(own for _, own in page.tags if own.get("http-equiv"))["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'")
    scripts = [own for tag, own in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "gates"}]
    held = json.loads(page.texts["script"])
    assert held["layers"] == found["layers"]
    assert held["ablation"] == found["ablation"]
    assert "url(" not in page.texts["style"]
    assert "\x1b" not in path.read_text(encoding="utf-8")
    sections = [own["id"] for tag, own in page.tags if tag == "section"]
    assert sections == ["class=1", "class=2", "all"]
    cells = [own for tag, own in page.tags if tag == "td"]
    assert len(cells) == 3 * 2 * 4 + 3 * 3
    assert all(own["tabindex"] == "0" for own in cells)
    assert f"mean {found['layers'][0]['prefix']['mean']:.3f} ±" in page.texts["span"]
    assert (
        f"closed: {found['ablation']['layers'][0]['lora']['lost']:.4f} accuracy lost"
        in page.texts["span"]
    )
    assert len([tag for tag, _ in page.tags if tag == "polyline"]) == 2 * 4
