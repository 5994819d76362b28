"""The commands and their options, nothing else: each has a module of its own, imported when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import refusing

app = typer.Typer(
    name="convviz",
    help="Look into convolutional networks: attribution maps, and the experiments of Zeiler & Fergus.",
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
    """Pictures from a small trained network, offline, on the CPU, in about a minute."""
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
            help="Any of saliency, inputxgradient, guided, deconvnet, occlusion, integrated, smoothgrad, smoothgradsq, "
            "vargrad, cam, gradcam, gradcam++, layercam, xgradcam, hirescam, eigencam, scorecam, counterfactual, "
            "guidedgradcam, activation, gradxact, rise, extremal, ablation, excitation, contrastive, with commas "
            "between them. [default: saliency,guided,deconvnet; with --layer guided,deconvnet]"
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
    cam_layer: Annotated[
        str | None,
        typer.Option(
            help="The layer whose maps class activation maps, activation, gradxact, excitation and contrastive read. "
            "[default: the last one that has maps]",
            rich_help_panel="Methods",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Side of the square that hides a part, in pixels (occlusion, ablation). [default: a seventh of the "
            "short side]",
            rich_help_panel="Methods",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Pixels from one place of the square to the next (occlusion). [default: half its side]",
            rich_help_panel="Methods",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Points of the path (integrated). [default: 50]", rich_help_panel="Methods"),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Noisy images (smoothgrad, smoothgradsq, vargrad). [default: 25]", rich_help_panel="Methods"
        ),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Their deviation, as a part of the image's range. [default: 0.15]", rich_help_panel="Methods"
        ),
    ] = None,
    masks: Annotated[
        int | None, typer.Option(help="Masks (rise). [default: 4000]", rich_help_panel="Methods")
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(help="Steps that shape a mask (extremal). [default: 100]", rich_help_panel="Methods"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of noise and masks. [default: 0]", rich_help_panel="Methods"),
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
            options={"cam_layer": cam_layer, "window": window, "stride": stride, "steps": steps, "samples": samples,
                     "noise": noise, "masks": masks, "iterations": iterations, "seed": seed},
            resize=resize, crop=crop, mean=mean, std=std, labels=labels,
            device=device, dtype=dtype, batch_size=batch_size, overwrite=overwrite, out=out,
        )  # fmt: skip
        raise typer.Exit(run(request, images))


# -- experiments

OutFolder = Annotated[Path, typer.Option(help="Folder for pictures and JSON.")]
Images = Annotated[
    list[str] | None,
    typer.Argument(help="Image files, folders, glob patterns. [default: generated scenes, for zfnet_mini]"),
]
Model = Annotated[
    str,
    typer.Option(
        help="zfnet_mini, torchvision:NAME, package.module:callable or file.py:callable.",
        rich_help_panel="Model",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="State dict, .safetensors or .pt (weights_only).", rich_help_panel="Model"),
]
Scenes = Annotated[int, typer.Option(help="How many scenes are generated.", rich_help_panel="Pictures")]
Seed = Annotated[int, typer.Option(help="Another seed gives other scenes.", rich_help_panel="Pictures")]
Resize = Annotated[
    int, typer.Option(help="Short side in pixels; 0 keeps the size.", rich_help_panel="Pictures")
]
Crop = Annotated[int, typer.Option(help="Side of the centre crop; 0 for none.", rich_help_panel="Pictures")]
Mean = Annotated[str, typer.Option(help="Per channel, in 0..1.", rich_help_panel="Pictures")]
Std = Annotated[str, typer.Option(help="Per channel, in 0..1.", rich_help_panel="Pictures")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1...", rich_help_panel="Running")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a pass.", rich_help_panel="Running")]
IMAGENET = ("0.485,0.456,0.406", "0.229,0.224,0.225")


def _subject(images, model, weights, resize, crop, mean, std, scenes, seed, device, out, batch_size):
    from ..preprocess import Preprocess
    from .console import arguments
    from .experiments import subject
    from .request import as_device, as_numbers

    with arguments():
        preprocess = Preprocess(
            resize or None, crop or None, as_numbers("--mean", mean), as_numbers("--std", std)
        )
        where = as_device(device)
    return subject(images or [], model, weights, preprocess, scenes, seed, where, out, batch_size)


@app.command()
def features(
    out: OutFolder,
    images: Images = None,
    model: Model = "zfnet_mini",
    weights: Weights = None,
    layers: Annotated[str, typer.Option(help="Names, with commas between them.")] = "conv2,conv5",
    channels: Annotated[str, typer.Option(help="Feature maps, such as 0-11,20, or all.")] = "0-11",
    k: Annotated[int, typer.Option(help="Activations of each feature map, at most one of an image.")] = 9,
    overlap: Annotated[
        str, typer.Option(help="sum or overwrite: what overlapping pooling windows do.")
    ] = "sum",
    norm: Annotated[
        str, typer.Option(help="identity or gradient: what contrast normalisation does.")
    ] = "identity",
    scenes: Scenes = 512,
    seed: Seed = 0,
    resize: Resize = 256,
    crop: Crop = 224,
    mean: Mean = IMAGENET[0],
    std: Std = IMAGENET[1],
    device: Device = "auto",
    batch_size: BatchSize = 32,
) -> None:
    """The strongest activations of feature maps over many images, projected to pixels, beside what they see.

    Zeiler & Fergus 2013, figure 2. Broken off, the same command goes on from there.
    """
    from .experiments import features as run

    with refusing():
        shown = _subject(
            images, model, weights, resize, crop, mean, std, scenes, seed, device, out, batch_size
        )
        run(shown, layers, channels, k, overlap, norm, out, batch_size)


@app.command()
def compare(
    out: OutFolder,
    images: Images = None,
    methods: Annotated[
        str, typer.Option(help="Any of `convviz attribute --method`, with commas between them.")
    ] = "saliency,guided,integrated,gradcam,gradcam++,rise,excitation",
    model: Model = "zfnet_mini",
    weights: Weights = None,
    cam_layer: Annotated[
        str | None,
        typer.Option(help="The layer whose maps some methods read. [default: the last one that has maps]"),
    ] = None,
    masks: Annotated[int | None, typer.Option(help="Masks of rise. [default: 1000]")] = None,
    samples: Annotated[int | None, typer.Option(help="Noisy images of smoothgrad. [default: 25]")] = None,
    randomize: Annotated[
        bool, typer.Option("--randomize", help="Also: how alike maps stay as layers get random weights.")
    ] = False,
    scenes: Scenes = 24,
    seed: Seed = 0,
    resize: Resize = 256,
    crop: Crop = 224,
    mean: Mean = IMAGENET[0],
    std: Std = IMAGENET[1],
    device: Device = "auto",
    batch_size: BatchSize = 8,
) -> None:
    """One table: methods by insertion, deletion, average drop, and where the truth is known pointing and box IoU.

    Noise of single pixels, noise of blobs and a hill in the middle are the controls. Broken off, the same command goes
    on from there, and no row that is in the folder is lost.
    """
    from .compare import compare as run
    from .console import arguments
    from .methods import parse_methods
    from .request import options_of

    with refusing():
        with arguments():
            chosen = parse_methods(methods)
            able = {name for method in chosen for name in method.options}
            given = {"cam_layer": cam_layer, "masks": masks, "samples": samples}
            options = options_of(given, chosen, None)
            if masks is None and "masks" in able:
                options = options_of({**given, "masks": 1000}, chosen, None)
        shown = _subject(
            images, model, weights, resize, crop, mean, std, scenes, seed, device, out, batch_size
        )
        run(shown, chosen, options, randomize, out, batch_size)


@app.command()
def evolve(
    out: OutFolder,
    images: Images = None,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoint",
            help="A file, or a folder of them in the order of their names; give it again for more. "
            "[default: those of zfnet_mini that come along]",
        ),
    ] = None,
    model: Model = "zfnet_mini",
    layers: Annotated[
        str, typer.Option(help="Names, with commas between them.")
    ] = "conv1,conv2,conv3,conv4,conv5",
    maps: Annotated[int, typer.Option(help="Feature maps of each layer in the picture.")] = 3,
    scenes: Scenes = 192,
    seed: Seed = 0,
    resize: Resize = 256,
    crop: Crop = 224,
    mean: Mean = IMAGENET[0],
    std: Std = IMAGENET[1],
    device: Device = "auto",
    batch_size: BatchSize = 32,
) -> None:
    """How features form: the strongest activation of each feature map at every checkpoint of a training.

    Zeiler & Fergus 2013, figure 4. `python -m convviz_cuda.training --out DIR --keep-checkpoints 0,1,2,4,7,14`
    makes checkpoints of zfnet_mini.
    """
    from .experiments import evolve as run

    with refusing():
        shown = _subject(images, model, None, resize, crop, mean, std, scenes, seed, device, out, batch_size)
        run(shown, checkpoints or [], layers, maps, out, batch_size)


@app.command()
def invariance(
    out: OutFolder,
    images: Images = None,
    model: Model = "zfnet_mini",
    weights: Weights = None,
    layers: Annotated[str, typer.Option(help="Names, with commas between them.")] = "relu1,relu7",
    transforms: Annotated[
        str, typer.Option(help="Any of translate, scale, rotate, with commas between them.")
    ] = "translate,scale,rotate",
    fill: Annotated[str, typer.Option(help="Beyond the border: edge, reflect or a number.")] = "edge",
    scenes: Scenes = 5,
    seed: Seed = 0,
    resize: Resize = 256,
    crop: Crop = 224,
    mean: Mean = IMAGENET[0],
    std: Std = IMAGENET[1],
    device: Device = "auto",
    batch_size: BatchSize = 32,
) -> None:
    """How far features move, and the class's probability, when images are translated, scaled and rotated.

    Zeiler & Fergus 2013, figure 5. The class is the one that the model predicts for the original.
    """
    from .experiments import invariance as run

    with refusing():
        shown = _subject(
            images, model, weights, resize, crop, mean, std, scenes, seed, device, out, batch_size
        )
        run(shown, transforms, layers, fill, out, batch_size)


@app.command()
def correspond(
    out: OutFolder,
    of: Annotated[str, typer.Option(help="Class of the generated scenes.")] = "owl",
    layers: Annotated[str, typer.Option(help="Names, with commas between them.")] = "pool5,relu6,relu7",
    draws: Annotated[int, typer.Option(help="Random boxes for each part and scene.")] = 10,
    weights: Weights = None,
    scenes: Scenes = 12,
    seed: Seed = 0,
) -> None:
    """Whether hiding the same part of several objects moves the features of zfnet_mini alike, against random boxes.

    Zeiler & Fergus 2013, table 1. Lower is more alike.
    """
    from .experiments import correspond as run

    with refusing():
        run(of, scenes, seed, layers, draws, weights, out)


@app.command()
def probes(
    out: OutFolder,
    layers: Annotated[
        str, typer.Option(help="Names, with commas between them.")
    ] = "pool1,pool2,relu3,relu4,pool5,relu6,relu7",
    train: Annotated[int, typer.Option(help="Scenes of each class to train on.")] = 60,
    test: Annotated[int, typer.Option(help="Scenes of each class to test on.")] = 20,
    pool: Annotated[
        int, typer.Option(help="Average maps down to so many positions a side; 0: all of them.")
    ] = 5,
    folds: Annotated[int, typer.Option(help="Draws of training images.")] = 3,
    shots: Annotated[
        str, typer.Option(help="Digits of each class that the features are moved to.")
    ] = "1,5,20",
    weights: Weights = None,
    seed: Seed = 0,
) -> None:
    """Linear classifiers on the features of each layer of zfnet_mini, and what the features are worth for digits.

    Zeiler & Fergus 2013, table 7 and figure 9. An untrained network is the baseline for the digits.
    """
    from .experiments import probes as run

    with refusing():
        run(layers, train, test, pool, folds, shots, seed, weights, out)


@app.command()
def ablate(
    out: OutFolder,
    variants: Annotated[
        str, typer.Option(help="Names with commas between them (see the error of a wrong one).")
    ] = "all",
    epochs: Annotated[int | None, typer.Option(help="Of each training. [default: 8]")] = None,
    scenes: Annotated[int | None, typer.Option(help="To train on. [default: 6000]")] = None,
    seed: Seed = 0,
    workers: Annotated[int, typer.Option(help="Processes that generate scenes.")] = 2,
) -> None:
    """Train zfnet_mini with layers left out or resized, and compare the errors; about 20 minutes on two cores.

    Zeiler & Fergus 2013, table 3. Broken off, the same command goes on after the last finished epoch.
    """
    from .experiments import ablate as run

    with refusing():
        run(variants, epochs, scenes, seed, workers, out)


@app.command()
def classmodel(
    out: OutFolder,
    model: Model = "zfnet_mini",
    weights: Weights = None,
    target: Annotated[
        str | None, typer.Option(help="Classes, such as 0-11,20, or all. [default: the first 12]")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Maximise this layer instead: its channels, or all of it.")
    ] = None,
    channel: Annotated[
        str | None, typer.Option(help="Channels of the layer, such as 0-11,20, or all.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the ascent.")] = 100,
    lr: Annotated[float, typer.Option(help="Length of a step, in units of the network's input.")] = 25.0,
    l2: Annotated[float, typer.Option(help="Weight of the penalty, the squared length of the image.")] = 1e-3,
    jitter: Annotated[int, typer.Option(help="Pixels by which steps shift the image at most.")] = 16,
    blur: Annotated[int, typer.Option(help="Blur after every so many steps; 0 for never.")] = 10,
    sigma: Annotated[float, typer.Option(help="Of the blur, in pixels.")] = 0.5,
    init: Annotated[str, typer.Option(help="zero or noise.")] = "zero",
    seed: Annotated[int, typer.Option(help="Another seed shifts otherwise.")] = 0,
    size: Annotated[
        int | None,
        typer.Option(
            help="Side of the images. [default: 224; for zfnet_mini 96]", rich_help_panel="Pictures"
        ),
    ] = None,
    mean: Mean = IMAGENET[0],
    std: Std = IMAGENET[1],
    labels: Annotated[
        Path | None, typer.Option(help="Class names, one a line or JSON.", rich_help_panel="Model")
    ] = None,
    device: Device = "auto",
    batch_size: BatchSize = 32,
) -> None:
    """Images that maximise the score of a class, or the channels of a layer, from a grey start.

    Simonyan, Vedaldi & Zisserman 2013, section 2. Raw images are in images.safetensors.
    """
    from .console import arguments
    from .experiments import class_model as run
    from .request import as_device, as_numbers

    with refusing():
        with arguments():
            shown = as_numbers("--mean", mean), as_numbers("--std", std)
            where = as_device(device)
        options = {
            "steps": steps, "lr": lr, "l2": l2, "jitter": jitter, "blur_every": blur, "blur_sigma": sigma,
            "init": init, "seed": seed, "batch_size": batch_size,
        }  # fmt: skip
        run(model, weights, target, layer, channel, size, *shown, labels, where, out, options)
