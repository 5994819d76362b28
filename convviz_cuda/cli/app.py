"""The commands and their options, nothing else: each has a module of its own, imported when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import refusing

app = typer.Typer(
    name="convviz",
    help="Look into convolutional networks: saliency, guided backprop, deconvnet and occlusion, fast and exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="markdown",  # joins the lines of a paragraph
)


def _version(value: bool) -> None:
    if value:
        from ..version import __version__

        typer.echo(f"convviz_cuda {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say which kernel serves each operation on this machine, and why one is missing.

    The exit code is 1 if CONVVIZ_BACKEND=native is asked for and cannot be had.
    """
    from .doctor import run

    raise typer.Exit(run(as_json=json))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    seed: Annotated[int, typer.Option(help="Another seed shows other scenes.")] = 3,
) -> None:
    """Pictures from a small trained network, offline, on the CPU, in seconds."""
    from .demo import run

    with refusing():
        run(out, seed)


@app.command(no_args_is_help=True)
def attribute(
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders (searched recursively), glob patterns.")
    ],
    model: Annotated[
        str,
        typer.Option(
            help="torchvision:NAME, package.module:callable or file.py:callable.", rich_help_panel="Model"
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for maps, pictures and results.jsonl.")],
    weights: Annotated[
        Path | None,
        typer.Option(help="State dict, .safetensors or .pt (weights_only).", rich_help_panel="Model"),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Any of saliency, inputxgradient, guided, deconvnet, occlusion, with commas between them. "
            "[default: saliency,guided,deconvnet; with --layer guided,deconvnet]"
        ),
    ] = None,
    target: Annotated[str, typer.Option(help="Class to explain: pred, or its index.")] = "pred",
    layer: Annotated[
        str | None,
        typer.Option(
            help="Explain the strongest activation of this layer instead of a class (guided, deconvnet)."
        ),
    ] = None,
    channel: Annotated[int | None, typer.Option(help="... of this channel of the layer.")] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Side of the square that hides a part, in pixels. [default: a seventh of the short side]",
            rich_help_panel="Occlusion",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Pixels from one place of the square to the next. [default: half its side]",
            rich_help_panel="Occlusion",
        ),
    ] = None,
    resize: Annotated[
        int, typer.Option(help="Short side in pixels; 0 keeps the size.", rich_help_panel="Pictures")
    ] = 256,
    crop: Annotated[
        int, typer.Option(help="Side of the centre crop; 0 for none.", rich_help_panel="Pictures")
    ] = 224,
    mean: Annotated[
        str, typer.Option(help="Per channel, in 0..1.", rich_help_panel="Pictures")
    ] = "0.485,0.456,0.406",
    std: Annotated[
        str, typer.Option(help="Per channel, in 0..1.", rich_help_panel="Pictures")
    ] = "0.229,0.224,0.225",
    labels: Annotated[
        Path | None,
        typer.Option(help="Class names, one a line or JSON.", rich_help_panel="Model"),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1...", rich_help_panel="Running")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16 or float64.", rich_help_panel="Running")
    ] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Images a pass.", rich_help_panel="Running")] = 8,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Compute again what is there already.", rich_help_panel="Running"),
    ] = False,
) -> None:
    """Attribution maps of images: per image and method a picture, the raw map and a row in results.jsonl.

    Started again with the same arguments, it goes on where it was stopped. The exit code is 0 if all went
    well, 1 if an image could not be used, 2 for arguments that make no sense (nothing is written then), 130
    after Ctrl-C.
    """
    from .attribute import run
    from .request import Request

    with refusing():
        request = Request.parse(
            model=model, weights=weights, method=method, target=target, layer=layer, channel=channel,
            window=window, stride=stride, resize=resize, crop=crop, mean=mean, std=std, labels=labels,
            device=device, dtype=dtype, batch_size=batch_size, overwrite=overwrite, out=out,
        )  # fmt: skip
        raise typer.Exit(run(request, images))
