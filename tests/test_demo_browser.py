"""`medisyn demo` as a visitor sees it: a real server with a tiny model and adapter, in a real headless Chromium.

Gradio and Playwright do not go with the packages of the other tests, so they may live in an environment of their own,
named by MEDISYN_DEMO_PYTHON; without it the current interpreter is used if it has them. The visit itself is
`tests/demo_visitor.py`.

    MEDISYN_DEMO_PYTHON=venv_demo/bin/python python -m pytest tests/test_demo_browser.py
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from medisyn.demo import BANNER
from medisyn.generation.provenance import read_provenance
from medisyn.prompts import demo_prompts
from tests.components import tiny_pipeline
from tests.test_demo import write_adapter

ROOT = Path(__file__).resolve().parent.parent
PYTHON = os.environ.get("MEDISYN_DEMO_PYTHON") or sys.executable
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def needed():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    for package in ("gradio", "playwright"):
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
        if subprocess.run([PYTHON, "-c", code], check=False).returncode:
            pytest.skip(f"{PYTHON} has no {package}; name an environment that has it in MEDISYN_DEMO_PYTHON")


@pytest.fixture
def proxy():
    """Stands where requests to other machines would go, and lists them."""
    heard = []
    server = socket.create_server(("127.0.0.1", 0))

    def listen():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # closed
                return
            with connection:
                heard.append(connection.recv(1000))

    threading.Thread(target=listen, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", heard
    server.close()


@pytest.fixture
def start_demo(tmp_path, proxy):
    """Starts `medisyn demo` and waits until its page can be opened; gives the process and the address."""
    processes = []
    (tmp_path / "temporary").mkdir()

    def start(*arguments):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(tmp_path / "temporary"),
            "HF_HUB_OFFLINE": "1",
        }
        environment |= {"http_proxy": proxy[0], "https_proxy": proxy[0], "no_proxy": "127.0.0.1,localhost"}
        command = [PYTHON, "-u", "-m", "medisyn", "demo", "--port", str(port), *map(str, arguments)]
        with open(tmp_path / "server.log", "wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        processes.append(process)
        line = process.stdout.readline()
        assert line.startswith(f"http://127.0.0.1:{port}"), line + (tmp_path / "server.log").read_text()
        return process, line.split()[0]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_visitor_makes_images_and_sees_where_they_come_from(needed, start_demo, proxy, tmp_path):
    tiny_pipeline(("text", "labels")).save_pretrained(tmp_path / "tiny")
    adapter = write_adapter(tmp_path / "knee")
    process, address = start_demo("--model", tmp_path / "tiny", "--adapter", f"{adapter}=0.5")
    visitor = [PYTHON, ROOT / "tests" / "demo_visitor.py", address, tmp_path, CHROMIUM]
    visit = subprocess.run(visitor, capture_output=True, text=True, timeout=540, check=False)
    assert visit.returncode == 0, visit.stderr[-3000:]
    seen = json.loads(visit.stdout)

    # The page says what it is, wherever it is scrolled to, and what can be asked.
    assert seen["title"] == "medisyn" and BANNER in seen["banner"] and seen["banner's place after scrolling"] == 0
    assert seen["examples"] == [one.name for one in demo_prompts()]
    assert seen["examples of the adapter"] == ["knee X-ray"]
    assert "nothing to generate from; this model takes: text, labels" in seen["error"]

    # What is shown, what is downloaded, and what was asked are the same.
    record = read_provenance(tmp_path / "download.png")
    assert (record["prompt"], record["labels"], record["seed"]) == ("retina", {"gc": "1"}, 8)
    assert (record["num_inference_steps"], record["model"], record["adapter"]) == (3, "tiny", "knee=0.5")
    assert seen["download"] == "00001_retina_gc_1.png"
    shown = re.sub(r"\s+", "", seen["provenance"])
    for name in ("prompt", "seed", "model_hash", "adapter", "adapter_hash", "notice"):
        assert f'"{name}":{json.dumps(record[name])}'.replace(" ", "") in shown
    with Image.open(tmp_path / "page.png") as screenshot:
        assert screenshot.size == (1280, 800) and len(screenshot.convert("L").getcolors()) > 50

    # Nobody else was asked for anything, by the page or by the server, and nothing stays behind.
    others = {url for url in seen["asked"] if urlsplit(url).hostname not in ("127.0.0.1", None)}
    assert not others and proxy[1] == []
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=120)
    assert (process.returncode, rest) == (0, "stopped\n")
    assert list((tmp_path / "temporary").glob("medisyn-demo-*")) == []
