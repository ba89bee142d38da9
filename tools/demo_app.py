"""Try a model by hand: a page on which a picture is dropped, and what the model finds in it.

The page shows classes, boxes or a label map, as the config says, and what the prediction took. It
is served by this process, to this machine alone unless --host says otherwise.
"""

import argparse
import base64
import json
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

import _environment  # noqa: F401, before what may be missing
import cv2
import numpy as np

from groupmamba_mm.engine.cli import run_command
from groupmamba_mm.errors import DataError, LaunchError
from groupmamba_mm.inference import Predictor, find_config
from groupmamba_mm.inference.arguments import add_predictor_arguments
from groupmamba_mm.inference.sources import decode_image

#: Larger files are refused before they are read.
MAX_BYTES = 64 * 2**20

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>groupmamba-mm</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
  h1 { font-size: 1.2rem; overflow-wrap: anywhere }
  #drop { display: block; border: 2px dashed #888; border-radius: .5rem; padding: 2rem;
          text-align: center; cursor: pointer }
  #drop.over { background: #e8f0fe }
  #painted { max-width: 100%; min-width: min(100%, 20rem); image-rendering: auto; margin: 1rem 0 }
  table { border-collapse: collapse }
  td, th { padding: .1rem 1rem .1rem 0; text-align: left; font-variant-numeric: tabular-nums }
  #error { color: #b00020 }
</style>
<h1>NAME</h1>
<label id="drop">Drop a picture here, paste one, or click to choose
  <input id="file" type="file" accept="image/*" hidden></label>
<p id="speed" role="status"></p>
<p id="error" role="alert"></p>
<img id="painted" alt="" hidden>
<table id="found"></table>
<script>
const part = id => document.getElementById(id);
function row(cells, kind) {
  const line = part('found').insertRow();
  for (const text of cells) {
    line.appendChild(document.createElement(kind)).textContent = text;
  }
}
function list(result) {
  part('found').replaceChildren();
  const percent = share => (100 * share).toFixed(1) + ' %';
  if (result.top) {
    row(['class', 'score'], 'th');
    for (const entry of result.top) row([entry.label, percent(entry.score)], 'td');
  } else if (result.instances) {
    row(['object', 'score', 'box (x1, y1, x2, y2)'], 'th');
    for (const entry of result.instances)
      row([entry.label, percent(entry.score), entry.box.join(', ')], 'td');
    if (!result.instances.length) row(['nothing above the threshold', '', ''], 'td');
  } else {
    row(['class', 'share of the pixels'], 'th');
    for (const [label, share] of Object.entries(result.share)) row([label, percent(share)], 'td');
  }
}
async function predict(file) {
  part('error').textContent = '';
  part('speed').textContent = 'computing ...';
  try {
    const answer = await fetch('predict', {method: 'POST', body: file});
    const said = await answer.json();
    if (!answer.ok) throw new Error(said.error);
    part('speed').textContent = `${said.width} x ${said.height} pixels: ${said.milliseconds} ms`;
    part('painted').src = 'data:image/png;base64,' + said.painted;
    part('painted').hidden = false;
    list(said.result);
  } catch (error) {
    part('speed').textContent = '';
    part('painted').hidden = true;
    part('found').replaceChildren();
    part('error').textContent = error.message;
  }
}
part('file').onchange = event => event.target.files.length && predict(event.target.files[0]);
part('drop').ondragover = event => { event.preventDefault(); part('drop').className = 'over'; };
part('drop').ondragleave = () => { part('drop').className = ''; };
part('drop').ondrop = event => {
  event.preventDefault();
  part('drop').className = '';
  if (event.dataTransfer.files.length) predict(event.dataTransfer.files[0]);
};
document.onpaste = event =>
  event.clipboardData.files.length && predict(event.clipboardData.files[0]);
</script>
</html>
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_predictor_arguments(parser)
    parser.add_argument(
        '--host',
        default='127.0.0.1',
        help='address to listen on (default: %(default)s, this machine alone)',
    )
    parser.add_argument(
        '--port', type=int, default=7860, help='0: any free one (default: %(default)s)'
    )
    return parser.parse_args(argv)


class Demo:
    """Predicts on one picture after the other and times it.

    Args:
        predictor: The model.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.lock = Lock()  # the page may be open several times, the model is there once
        self.predictor(np.zeros((64, 64, 3), np.uint8))  # what is done once is not timed

    def answer(self, content: bytes) -> dict[str, Any]:
        """Predict.

        Args:
            content: The picture's file.

        Returns:
            What the page shows: ``result``, ``painted`` (a PNG in base64), ``milliseconds`` of
            preparing, the model and its post-processing, ``width`` and ``height`` in pixels.

        Raises:
            DataError: It is no picture.
        """
        image = decode_image(content, 'the file')
        with self.lock:
            start = time.perf_counter()
            (sample,) = self.predictor.predict_samples([image])
            result = self.predictor.describe(sample)  # reads the results, so a GPU is waited for
            milliseconds = 1000 * (time.perf_counter() - start)
            painted = self.predictor.paint(image, sample)
        return dict(
            result=result,
            painted=base64.b64encode(cv2.imencode('.png', painted)[1].tobytes()).decode(),
            milliseconds=round(milliseconds, 1),
            width=image.shape[1],
            height=image.shape[0],
        )


class Handler(BaseHTTPRequestHandler):
    """Serves the page and answers its question.

    Args:
        demo: Answers.
        page: The page.
        *args: Of the base class.
    """

    def __init__(self, demo: Demo, page: bytes, *args: Any) -> None:
        self.demo, self.page = demo, page
        super().__init__(*args)

    def do_GET(self) -> None:
        """The page."""
        if self.path == '/':
            self._send(200, 'text/html; charset=utf-8', self.page)
        else:
            self._send_json(404, dict(error=f'there is no {self.path}'))

    def do_POST(self) -> None:
        """A picture in, what was found out."""
        size = int(self.headers.get('Content-Length') or 0)
        if size > MAX_BYTES:
            self.close_connection = True  # the rest of it is not read
            self._send_json(413, dict(error=f'the file has {size} bytes, {MAX_BYTES} at most'))
            return
        content = self.rfile.read(size)
        try:
            self._send_json(200, self.demo.answer(content))
        except DataError as error:
            self._send_json(400, dict(error=str(error)))

    def log_message(self, *args: Any) -> None:
        """Say nothing of each request."""

    def _send_json(self, status: int, said: dict[str, Any]) -> None:
        self._send(status, 'application/json', json.dumps(said).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def make_server(argv: list[str] | None = None) -> ThreadingHTTPServer:
    """Load the model, and listen.

    Args:
        argv: The arguments, None for the process's own.

    Returns:
        The server; ``serve_forever`` lets it answer.

    Raises:
        LaunchError: The address cannot be listened on.
    """
    args = parse_args(argv)
    cfg = find_config(args.config, args.cfg_options)
    demo = Demo(Predictor(cfg, args.checkpoint, args.device, args.score_thr, args.top))
    page = PAGE.replace('NAME', args.config.replace('&', '&amp;').replace('<', '&lt;')).encode()
    try:
        return ThreadingHTTPServer((args.host, args.port), partial(Handler, demo, page))
    except OSError as error:
        raise LaunchError(
            f'cannot listen on {args.host}:{args.port} ({error}); give another --port'
        ) from error


def main() -> None:
    """Serve until Ctrl-C."""
    server = make_server()
    print(f'http://{server.server_address[0]}:{server.server_address[1]} (Ctrl-C ends it)')
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == '__main__':
    run_command(main)
