"""ddpm-serve: a model → images over HTTP, as many callers' at once as there is room for."""

import click

from ddpm_deploy.cli import options
from ddpm_deploy.cli.common import command
from ddpm_deploy.cli.options import BatchSize, Option
from ddpm_deploy.serve.settings import KEY_VARIABLE
from ddpm_deploy.words import PROOFS

main = command(
    "serve",
    "Serve a model over HTTP.",
    """Serve MODEL over HTTP: an .onnx file, an engine (.plan), or a checkpoint (.pt), which runs in PyTorch.

    Each request joins the running batch at its next step, and leaves it when it is done. The server is ready when
    the model has passed its own proof on this machine. On SIGTERM or Ctrl-C it finishes what it took.""",
    examples="""
  ddpm-serve model.onnx                         a page to try it at http://127.0.0.1:8000
  ddpm-serve model.onnx --port 8080 --capacity 16
  curl -d '{"count": 4, "steps": 50, "seed": "7"}' http://127.0.0.1:8000/v1/samples -o four.png
  DDPM_SERVE_API_KEY=$(cat key) ddpm-serve model.onnx --host 0.0.0.0
  ddpm-serve model.onnx --allow-origin https://example.org
  ddpm-serve big.onnx --proof predictions       do not run whole chains before the first request
""",
    needs=("fastapi", "uvicorn", "prometheus_client"),
    extra="serve",
    interrupted="no request was taken yet",
    params=[
        options.MODEL,
        Option("--host", "Address to listen at; 0.0.0.0 is every one of this machine.", default="127.0.0.1"),
        Option("--port", "Port to listen at; 0 is any that is free.", click.IntRange(0, 65535), default=8000),
        Option("--name", "Name of the model in answers and paths.", show_default="the file's"),
        Option(
            "--capacity",
            "Rows of the batch: images in flight at the same time.",
            BatchSize,
            show_default="64, fewer for images over 16×16; for an engine, its largest",
        ),
        Option("--max-queue", "Requests that may wait for rows.", click.IntRange(1, 1 << 20), default=256),
        Option("--max-count", "Images that one request may ask for.", click.IntRange(1, 4096), default=64),
        Option(
            "--max-steps",
            "Steps that one request may ask for.",
            click.IntRange(min=1),
            show_default="all of the model's",
        ),
        Option(
            "--timeout",
            "Seconds after which a request is given up.",
            click.FloatRange(0, 1e6, min_open=True),
            default=600.0,
        ),
        Option(
            "--keep-seconds",
            "How long the images of a request that nobody waits for are kept.",
            click.FloatRange(0, 1e6, min_open=True),
            default=600.0,
        ),
        Option("--keep-mb", "How much memory such images may take.", click.IntRange(1, 1 << 20), default=256),
        Option("--max-connections", "Connections at the same time.", click.IntRange(2, 1 << 16), default=512),
        Option(
            "--drain-seconds",
            "How long what was taken may take, and wait to be fetched, after SIGTERM or Ctrl-C.",
            click.FloatRange(0, 1e5),
            default=20.0,
        ),
        Option(
            "--api-key api_keys",
            "A key that callers must show; give several to allow each. Other users of this machine can see it here: "
            "better set the variable.",
            multiple=True,
            envvar=KEY_VARIABLE,
            show_envvar=True,
        ),
        Option(
            "--allow-origin allow_origins",
            "A site whose pages may ask, as https://example.org; give several to allow each.",
            multiple=True,
        ),
        Option(
            "--allow-host allow_hosts",
            "A name by which this server may be called, as images.example.org; give several to allow each.",
            multiple=True,
            show_default="any; without keys at a local address, localhost and IP addresses alone",
        ),
        Option(
            "--proof",
            "What of the model's own proof is checked before the first request: its whole chains, its predictions "
            "alone, or nothing.",
            click.Choice(PROOFS),
            default="whole",
        ),
        *options.PLACE,
    ],
)
