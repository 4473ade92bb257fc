"""Serve a page that runs a model in the browser, on WebGPU or WebAssembly.

Needs npm, once, for the libraries of the page, and a model that was built for browsers:

    pip install ortlm
    ortlm build -m HuggingFaceTB/SmolLM2-135M-Instruct -o phi --layout transformers.js -p q4,q4f16
    npm install --ignore-scripts
    python serve.py phi
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "node_modules" / "@huggingface" / "transformers"


class Handler(SimpleHTTPRequestHandler):
    """Serves the page from this folder, and the model as ``/model``."""

    def __init__(self, *args: object, model: Path, **kwargs: object) -> None:
        self.model = model
        super().__init__(*args, directory=str(HERE), **kwargs)  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        """Return the file for a path of the page."""
        parts = unquote(urlsplit(path).path).split("/")
        if parts[1:2] != ["model"]:
            return super().translate_path(path)
        file = self.model.joinpath(*parts[2:]).resolve()
        return str(file if file.is_relative_to(self.model) else self.model / "missing")

    def end_headers(self) -> None:
        """Add what lets WebAssembly use several threads, and keeps browsers from showing an old model."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve a page that runs a model in the browser.")
    parser.add_argument("model", type=Path, help="folder that `ortlm build --layout transformers.js` wrote")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if not (args.model / "onnx").is_dir():
        sys.exit(
            f"{args.model} was not built for browsers. Build it with: ortlm build --layout transformers.js ..."
        )
    if not LIBRARY.is_dir():
        sys.exit(
            f"The libraries of the page are missing. Install them: cd {HERE} && npm install --ignore-scripts"
        )
    # Of this machine only: browsers give WebGPU and threads to localhost and to HTTPS.
    server = ThreadingHTTPServer(("127.0.0.1", args.port), partial(Handler, model=args.model.resolve()))
    print(f"http://localhost:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
