"""The `scaleprog shards` command: builds shards, checks them, and indexes shards made elsewhere."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from scaleprog.errors import DataError
from scaleprog.files.atomic import read_text
from scaleprog.files.display import as_text, table
from scaleprog.recipe.numbers import MOST_PIXELS

app = typer.Typer(no_args_is_help=True, help="Build WebDataset shards, check them, and index shards made elsewhere.")

Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the shards and their manifest.json.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the order of the samples.")]
SamplesPerShard = Annotated[int, typer.Option(min=1, max=10**6, help="The most samples in a shard.")]
ShorterSide = Annotated[
    int | None,
    typer.Option(
        min=1, max=MOST_PIXELS, help="Reduce images to this shorter side, in pixels; smaller ones keep their bytes."
    ),
]
Quality = Annotated[int | None, typer.Option(min=1, max=100, help="JPEG quality of reduced images; default: 92.")]
Workers = Annotated[int | None, typer.Option(min=1, max=256, help="Number of processes; default: one per CPU.")]


@app.command("fashion-mnist")
def fashion_mnist(
    out: Out,
    source: Annotated[Path | None, typer.Option(help="Folder with the four original idx.gz files.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="The most samples in each split, for smoke runs.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Build shards of Fashion-MNIST (60,000 + 10,000 images of 28 x 28, 10 classes)."""
    from scaleprog.shards.fashion_mnist import build

    build(out, source, limit=limit, seed=seed)


@app.command("digits")
def digits(out: Out, seed: Seed = 0) -> None:
    """Build shards of scikit-learn's handwritten digits (897 + 900 images of 32 x 32, 10 classes)."""
    from scaleprog.shards.digits import build

    build(out, seed=seed)


@app.command("cifar")
def cifar(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder of the extracted binary version, e.g. cifar-10-batches-bin.")
    ],
    out: Out,
    seed: Seed = 0,
) -> None:
    """Build shards of CIFAR-10 or CIFAR-100 (50,000 + 10,000 color images of 32 x 32, 10 or 100 classes)."""
    from scaleprog.shards.cifar import build

    build(src, out, seed=seed)


@app.command("image-folder")
def image_folder(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder with train/CLASS/ and val/CLASS/ (ImageNet), or with CLASS/.")
    ],
    out: Out,
    samples_per_shard: SamplesPerShard = 1000,
    val_fraction: Annotated[float, typer.Option(help="Fraction to split off if SRC has no val/.")] = 0.1,
    seed: Seed = 0,
    shorter_side: ShorterSide = None,
    quality: Quality = None,
    workers: Workers = None,
) -> None:
    """Build shards from a tree of class folders, such as an extracted ImageNet."""
    from scaleprog.shards.image_folder import build
    from scaleprog.shards.reduction import Reduction

    build(
        src,
        out,
        samples_per_shard=samples_per_shard,
        val_fraction=val_fraction,
        seed=seed,
        reduction=Reduction.of(shorter_side, quality),
        workers=workers,
    )


@app.command("imagenet")
def imagenet(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder with the tars of ILSVRC2012, or with train/ and val/.")
    ],
    out: Out,
    val_labels: Annotated[
        Path | None,
        typer.Option(help="WordNet IDs of the validation images, one per line; default: the development kit in SRC."),
    ] = None,
    samples_per_shard: SamplesPerShard = 1000,
    seed: Seed = 0,
    shorter_side: ShorterSide = None,
    quality: Quality = None,
    workers: Workers = None,
) -> None:
    """Build shards of ImageNet from its tars, without extracting them."""
    from scaleprog.shards.imagenet import build
    from scaleprog.shards.reduction import Reduction

    build(
        src,
        out,
        val_labels=val_labels,
        samples_per_shard=samples_per_shard,
        seed=seed,
        reduction=Reduction.of(shorter_side, quality),
        workers=workers,
    )


@app.command("csv")
def csv(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", help="CSV file with the columns path, label, and optionally split.")
    ],
    out: Out,
    samples_per_shard: SamplesPerShard = 1000,
    val_fraction: Annotated[float, typer.Option(help="Fraction to split off if SRC has no column split.")] = 0.1,
    seed: Seed = 0,
    shorter_side: ShorterSide = None,
    quality: Quality = None,
    workers: Workers = None,
) -> None:
    """Build shards from the images that a CSV file names."""
    from scaleprog.shards.csv_file import build
    from scaleprog.shards.reduction import Reduction

    build(
        src,
        out,
        samples_per_shard=samples_per_shard,
        val_fraction=val_fraction,
        seed=seed,
        reduction=Reduction.of(shorter_side, quality),
        workers=workers,
    )


@app.command("pack")
def pack(
    shards: Annotated[
        Path, typer.Argument(metavar="SHARDS", help="Folder of the shards whose images are to be packed.")
    ],
    out: Out,
    shorter_side: Annotated[
        int, typer.Option(min=1, max=MOST_PIXELS, help="Reduce larger images to this shorter side in pixels.")
    ] = 256,
    workers: Workers = None,
) -> None:
    """Store the images of shards decoded, so that training reads pixels instead of decoding (ImageNet: 340 GB)."""
    from scaleprog.shards.pack import build

    build(shards, out, shorter_side=shorter_side, workers=workers)


@app.command("token-labels")
def token_labels(
    shards: Annotated[
        Path, typer.Argument(metavar="SHARDS", help="Folder of the shards whose training images get labels.")
    ],
    out: Out,
    teacher: Annotated[str, typer.Option(help="timm's name of a convolutional model, such as dm_nfnet_f6.")],
    weights: Annotated[
        Path | None, typer.Option(help="File of the teacher's weights; default: timm's pretrained ones.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Side of the teacher's images in pixels; default: timm's.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=100, help="Logits to keep of each place.")] = 5,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Images that the teacher sees at a time.")] = 32,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Number of processes; default: one per GPU, or one.")
    ] = None,
) -> None:
    """Label every place of the training images with a teacher's logits, for VOLO's dense head (data.token_labels)."""
    from scaleprog.shards.token_labels import build

    build(shards, out, teacher, weights, resolution, top, batch, workers)


@app.command("check")
def check(
    out: Annotated[str, typer.Argument(metavar="SHARDS", help="Folder of the shards, a path or URL.")],
    write_manifest: Annotated[bool, typer.Option("--write-manifest", help="Index the shards in the folder.")] = False,
    manifest: Annotated[
        str | None, typer.Option(help="Local file of the manifest; default: manifest.json in the folder.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="With --write-manifest: file of class names, one per line.")
    ] = None,
    keep_damaged: Annotated[
        bool,
        typer.Option(
            "--keep-damaged",
            help="With --write-manifest: keep training images that cannot be decoded (data.damaged).",
        ),
    ] = False,
    workers: Workers = None,
) -> None:
    """Read every shard and check its size, checksum, number of samples, and labels; list the problems."""
    from scaleprog.shards import check as shards_check

    if classes is not None and not write_manifest:
        raise DataError("--classes works only with --write-manifest; add it, or leave --classes out")
    if keep_damaged and not write_manifest:
        raise DataError("--keep-damaged works only with --write-manifest; add it, or leave --keep-damaged out")
    if write_manifest:
        names = _lines(classes) if classes else None
        report = shards_check.write_manifest(out, names, manifest=manifest, keep_damaged=keep_damaged, workers=workers)
    else:
        report = shards_check.check(out, manifest=manifest, workers=workers)
    print(as_text(f"{out}: {report}", lines=True))


@app.command("speed")
def speed(
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Folder of the shards; the first ones are measured.")],
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Whose augmentation and sizes are measured.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    images: Annotated[int, typer.Option(min=1, max=10**6, help="Images in one measurement.")] = 256,
    turns: Annotated[int, typer.Option(min=1, max=1000, help="Measurements of each kind; the median counts.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure how many images a second one core prepares for a recipe, at each size of its run; stores nothing."""
    from scaleprog.recipe import Recipe
    from scaleprog.shards.speed import measure

    loaded = Recipe.load(recipe, [*(overrides or ()), f"data.path={json.dumps(shards)}"])
    found = measure(loaded, images, turns)
    if as_json:
        print(json.dumps(found.as_json()))
        return
    rates = table("px", "images/s of a core", "without augmentation", "of that", "copies of ready batches", words=0)
    for size, whole in found.whole.items():
        decoded, copied = found.decoded[size], found.copied[size]
        rates.add_row(str(size), f"{whole:.0f}", f"{decoded:.0f}", f"{whole / decoded:.0%}", f"{copied:.0f}")
    console = Console()
    console.print(rates)
    console.print(f"medians of {turns} measurements of {images} images, in CPU seconds of one thread", highlight=False)


def _lines(path: Path) -> list[str]:
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return [line.strip() for line in lines if line.strip()]
