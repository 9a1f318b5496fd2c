"""`medisyn demo`: the model in the browser.

- Gradio is an extra: without it the command says so before a model is loaded.
- Listens to this machine alone unless `--host` says otherwise. Images and uploads are deleted at the end.

    medisyn demo --adapter adapters/knee-osteoarthritis
"""

import os
import signal
import socket
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .arguments import AdapterOption, ModelOption, check_names, load_model, model_name, parse_adapters

HostOption = Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 means all of this machine.")]
PortOption = Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    model: ModelOption = None, adapter: AdapterOption = None, host: HostOption = "127.0.0.1", port: PortOption = 7860
) -> None:
    """Show a model in the browser, to this machine alone unless --host says otherwise."""
    check_names(model=model, host=host)
    adapters = parse_adapters(adapter)
    if find_spec("gradio") is None:
        raise ImportError("the web demo needs Gradio: pip install medisyn[demo]")
    _check_free(host, port)
    from ..demo import Studio

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder is deleted then as well
    try:
        with tempfile.TemporaryDirectory(prefix="medisyn-demo-") as folder:
            os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "page")  # read when its components are made
            studio = Studio(load_model(model), model_name(model), adapters, Path(folder) / "images")
            from ..demo_page import serve

            serve(studio, host, port, lambda address: typer.echo(f"{address} (Ctrl-C stops)"))
    except KeyboardInterrupt:  # while the model was loading
        pass
    typer.echo("stopped")


def _check_free(host: str, port: int) -> None:
    """Raise before a model is loaded for nothing."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = f"cannot listen at {host}:{port} ({error.strerror})"
        raise ValueError(f"{reason}; choose another --host or --port") from None
