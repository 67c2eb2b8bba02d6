"""Whether the network is used, and how long anybody waits for it."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from unipelt_cli.system import network


def test_no_network_and_nothing_cached_is_said_in_two_lines(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": "https://hub.invalid"}
    for arguments in (["--task", "mrpc"], ["--task", "demo", "--model", "bert-base-uncased"]):
        result = subprocess.run(
            [sys.executable, "-m", "unipelt_cli", "train", *arguments, "--k", "10"],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            timeout=60,
        )
        lines = result.stderr.splitlines()
        assert (result.returncode, len(lines)) == (2, 2), result.stderr
        assert lines[0].startswith("error: ")


def test_a_probe_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver or firewall may hang: the decision falls while the probe still waits."""
    answered = threading.Event()

    def hang(*_: object) -> None:
        answered.wait(60)
        raise OSError

    monkeypatch.setattr(network.socket, "create_connection", hang)
    monkeypatch.setattr(network, "PROBE_SECONDS", 0.05)
    for switch in network.SWITCHES:
        monkeypatch.delenv(switch, raising=False)
    network.configure_network(offline=False, needed=True)
    assert not answered.is_set()
    assert [os.environ.get(switch) for switch in network.SWITCHES] == ["1", "1", "1"]
    answered.set()


@pytest.mark.parametrize(
    ("name", "is_hub"),
    [("minilm", False), ("./x", False), ("/x/y", False), ("a/b/c", False), ("bert-base", True)],
)
def test_only_a_hub_name_needs_the_network(name: str, is_hub: bool) -> None:
    assert network.names_hub(name) == is_hub


@pytest.mark.parametrize("endpoint", ["http://x:99999", "http://x:abc", "http://[::1", "x", ""])
def test_an_endpoint_that_is_no_address_means_no_network(
    monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    from unipelt_cli.system import network

    for switch in network.SWITCHES:
        monkeypatch.setenv(switch, "0")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr(network, "PROBE_SECONDS", 0.5)
    assert not network._hub_answers()


@pytest.mark.parametrize(
    ("endpoint", "proxies", "expected"),
    [
        ("https://huggingface.co", {}, ("huggingface.co", 443)),
        ("http://127.0.0.1:81/hub/", {}, ("127.0.0.1", 81)),
        ("http://mirror", {"HTTPS_PROXY": "http://proxy:3128"}, ("mirror", 80)),
        ("https://mirror", {"HTTPS_PROXY": "http://proxy:3128"}, ("proxy", 3128)),
        ("https://mirror", {"https_proxy": "proxy"}, ("proxy", 80)),
        ("https://mirror", {"ALL_PROXY": "https://proxy"}, ("proxy", 443)),
        ("https://mirror", {"HTTPS_PROXY": "http://proxy", "NO_PROXY": "mirror"}, ("mirror", 443)),
    ],
)
def test_the_probe_goes_where_the_library_will_go(
    monkeypatch: pytest.MonkeyPatch,
    endpoint: str,
    proxies: dict[str, str],
    expected: tuple[str, int],
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in {"HF_ENDPOINT": endpoint, **proxies}.items():
        monkeypatch.setenv(name, value)
    assert network._address() == expected


SETTLED = """
import sys
from unipelt_cli.cli import app
from unipelt_cli.system import network

def settle(**needs):
    print(sorted({"datasets", "huggingface_hub", "transformers"} & sys.modules.keys()))
    raise SystemExit

network.configure_network = settle
app(sys.argv[1:], standalone_mode=False)
"""


@pytest.mark.parametrize(
    "command", ["train", "prepare", "sweep", "recommend", "predict", "verify", "doctor"]
)
def test_the_network_is_settled_before_a_library_reads_the_switches(
    command: str, run: Path, bert: Path, rows_file: Path, tmp_path: Path
) -> None:
    rows = ["--train-file", str(rows_file)]
    arguments = {
        "train": [*rows, "--model", str(bert)],
        "prepare": rows,
        "sweep": [*rows, "--methods", "lora", "--model", str(bert)],
        "recommend": [*rows, "--model", str(bert)],
        "predict": [str(run), str(rows_file)],
        "verify": [str(run)],
        "doctor": [str(bert)],
    }
    result = subprocess.run(
        [sys.executable, "-c", SETTLED, command, *arguments[command]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.stdout == "[]\n", result.stderr
