"""The command `tinc`: what each sub-command reads, calls and prints."""

import importlib.metadata
import math
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from visionkernels.cli import ReportOptions, print_metrics, report_bench, report_fit, run
from visionkernels.files import finite_or_none, refuse_existing, write_json

__all__ = ["main"]

DISTRIBUTION = "tinc-vision"
VERSION = importlib.metadata.version(DISTRIBUTION)

As = Annotated[Literal["uint8", "uint16", "int16", "float32"] | None, arg(name="as")]
Sizes = Annotated[tuple[int, ...], arg(metavar="N [N ...]")]


def compress(
    source: Positional[Path],
    out: Positional[Path],
    *,
    ratio: float | None = None,
    bytes: int | None = None,
    bpv: float | None = None,
    psnr: float | None = None,
    max_error: float | None = None,
    lossless: bool = False,
    preset: Literal["fast", "balanced", "best"] = "balanced",
    layers: Literal["auto", "tree", "residual", "both"] = "auto",
    nan: Literal["raise", "fill"] = "raise",
    as_type: As = None,
    channel_axis: int | None = None,
    max_seconds: float | None = None,
    seed: int = 0,
    metadata: Literal["auto", "keep", "drop"] = "auto",
    overwrite: bool = False,
) -> None:
    """Compress a volume, a picture or a series of volumes into a .tinc file, to one target.

    Ctrl-C ends the search with the best that is there; a second one ends the command.

    Args:
        source: .tif, .npy, .nii, .nii.gz, .zarr or .png
        out: the .tinc to write
        ratio: bytes of the samples / bytes of the file
        bytes: of the file, at most
        bpv: bits a sample, at most
        psnr: in dB, at least; over the range of an integer type, over the volume's own for float32
        max_error: by which no sample moves more
        lossless: keep every sample
        preset: fast has no tree; balanced and best train one, and keep it where it helps
        layers: tree or residual layer alone, or both, instead of the best of them
        nan: raise an error for samples that are not finite, or fill them with the mean
        as_type: convert the samples first; values are rounded, and must be in the type's range
        channel_axis: axis of the channels; default: what the source says
        max_seconds: end the training of the tree then
        seed: of the training
        metadata: keep what the source says of spacing, units and axes; auto drops it from files below 64 KiB
        overwrite: replace an existing output
    """
    import numpy as np

    from tinc.compression import compress as to_file
    from tinc.encoding.targets import one_request
    from tinc.metrics import compare
    from tinc.volumes import read_volume

    refuse_existing(out, overwrite)
    target = one_request(ratio=ratio, bytes=bytes, bpv=bpv, psnr=psnr, max_error=max_error, lossless=lossless)
    volume = read_volume(source, as_type=as_type)
    if volume.note is not None:
        print(volume.note, file=sys.stderr)
    axis = volume.channel_axis if channel_axis is None else channel_axis
    limit = target.size_limit(volume.array.size, volume.array.nbytes)
    keeps = metadata == "keep" or (metadata == "auto" and (limit is None or limit >= 1 << 16))
    with _progress() as callback:
        file = to_file(
            volume.array, ratio=ratio, bytes=bytes, bpv=bpv, psnr=psnr, max_error=max_error, lossless=lossless,
            preset=preset, layers=layers, nan=nan, channel_axis=axis, max_seconds=max_seconds, seed=seed,
            metadata=volume.metadata if keeps else None, callback=callback,
        )  # fmt: skip
    file.save(out, overwrite=overwrite)
    if volume.metadata and not keeps:
        print(f"left out of so small a file: {', '.join(volume.metadata)} (--metadata keep)", file=sys.stderr)
    quality = compare(np.asarray(volume.array), file.decode(), channel_axis=axis)
    bits = 8 * file.nbytes_stored / file.size
    print(f"{out}: {file.nbytes_stored} bytes, ratio {file.ratio:.2f}, {bits:.3f} bits a sample")
    print_metrics(quality)


def decompress(
    source: Positional[Path],
    out: Positional[Path],
    *,
    region: str | None = None,
    level: int = 0,
    partial: bool = False,
    overwrite: bool = False,
) -> None:
    """Decode a .tinc file, or a part of it.

    Args:
        source: the .tinc file
        out: .tif, .npy, .nii, .nii.gz, .zarr or .png
        region: a range for each axis, such as 0:8,40:56,40:56; an empty end is the volume's
        level: halve each axis so many times
        partial: take a file that was cut off, and decode what is there
        overwrite: replace an existing output
    """
    from tinc.file import open_file
    from tinc.volumes import write_volume

    refuse_existing(out, overwrite)
    file = open_file(source, partial=partial)
    try:
        array = file.decode(None if region is None else _parse_region(region, file.ndim), level=level)
    except IndexError as error:
        raise ValueError(f"--region {region}: {error}") from error
    axis = file.info()["channel_axis"]
    write_volume(out, array, metadata=file.metadata, channel_axis=axis, overwrite=overwrite)
    print(f"{out}: {array.dtype} {' x '.join(map(str, array.shape))}")


@dataclass(frozen=True)
class Target:
    """One of these; without one, no loss."""

    ratio: float | None = None
    """bytes of the samples / bytes of a file"""
    bpv: float | None = None
    """bits a sample, at most"""
    psnr: float | None = None
    """in dB, at least"""
    max_error: float | None = None
    """by which no sample moves more"""

    def options(self) -> dict[str, Any]:
        """Return what was given, as options of a function."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return given if given else {"lossless": True}


def chunk(
    source: Positional[Path],
    out: Positional[Path],
    *,
    size: Sizes,
    target: Target = Target(),
    preset: Literal["fast", "balanced", "best"] = "fast",
    jobs: int = 1,
    backend: Literal["loky", "ray", "dask"] = "loky",
    overwrite: bool = False,
) -> None:
    """Compress a volume that may be larger than memory into a Zarr array, chunk by chunk.

    The same command goes on where it stopped.

    Args:
        source: .npy, .tif, .nii or .zarr
        out: the .zarr folder to write
        size: of a chunk, by axis
        preset: fast has no trees
        jobs: processes; -1: one a core
        backend: processes of this machine, or a Ray or Dask cluster
        overwrite: replace an existing output
    """
    from tinc.parallel import compress_chunks
    from tinc.volumes import read_volume

    volume = read_volume(source)
    report = compress_chunks(
        volume.array, out, chunk=size, jobs=jobs, backend=backend, metadata=volume.metadata, overwrite=overwrite,
        preset=preset, channel_axis=volume.channel_axis, **target.options(),
    )  # fmt: skip
    print(f"{out}: {report.num_chunks} chunks, {report.bytes} bytes, ratio {report.ratio:.2f}")
    print_metrics({"psnr": report.psnr})


def batch(
    sources: Positional[Annotated[tuple[Path, ...], arg(metavar="SOURCE [SOURCE ...]")]],
    *,
    out: Path,
    target: Target = Target(),
    preset: Literal["fast", "balanced", "best"] = "balanced",
    jobs: int = 1,
    backend: Literal["loky", "ray", "dask"] = "loky",
    overwrite: bool = False,
) -> int:
    """Compress many volumes, each into a .tinc file; the same command goes on where it stopped.

    Args:
        sources: the volumes
        out: folder of the files, and of done.jsonl
        preset: fast has no trees
        jobs: processes; -1: one a core
        backend: processes of this machine, or a Ray or Dask cluster
        overwrite: replace existing outputs
    """
    from tinc.parallel import compress_many

    if not sources:
        raise ValueError("SOURCE is missing; give one or more volumes")
    report = compress_many(
        sources, out, jobs=jobs, backend=backend, done=out / "done.jsonl", overwrite=overwrite, preset=preset,
        **target.options(),
    )  # fmt: skip
    for each in report.files:
        quality = "exact" if each["psnr"] is None else f"PSNR {each['psnr']:.2f} dB"
        print(f"{each['out']}: {each['bytes']} bytes, ratio {each['ratio']:.2f}, {quality}")
    for path, reason in report.failures.items():
        print(f"{path}: {reason}", file=sys.stderr)
    return 1 if report.failures else 0


def info(source: Positional[Path | None] = None, *, json: Path | None = None, overwrite: bool = False) -> None:
    """Print what a .tinc file holds; without a file, the version and the official configurations.

    Args:
        source: the .tinc file
        json: write it here as well
        overwrite: replace an existing output
    """
    if source is None:
        from tinc.recipes import RECIPES

        print(f"{DISTRIBUTION} {VERSION}")
        print("official configurations for `tinc train`:")
        for name, recipe in RECIPES.items():
            levels = ", ".join(
                f"{level.ratio} {level.layers} {level.activation} {level.allocation}" for level in recipe.levels
            )
            print(f"  {name}: {levels}")
        return
    from tinc.file import open_file

    refuse_existing(json, overwrite)
    found = open_file(source).info()
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {each}" for key, each in value.items())
        print(
            f"{name.replace('_', ' ')}: {value:.4g}"
            if isinstance(value, float)
            else f"{name.replace('_', ' ')}: {value}"
        )
    if json is not None:
        write_json(json, found, overwrite=overwrite)


def evaluate(
    original: Positional[Path],
    compressed: Positional[Path | None] = None,
    *,
    checkpoint: Path | None = None,
    threshold: tuple[float, ...] = (),
    json: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Compare a .tinc file, or an official folder of weights, with the volume that it stands for.

    Args:
        original: the volume
        compressed: the .tinc file
        checkpoint: an official folder (models/0-0-0-0/0-W, ...) instead
        threshold: also accuracy, IoU and precision of the volumes cut at these samples
        json: write the result here as well
        overwrite: replace an existing output
    """
    import numpy as np

    from tinc import metrics
    from tinc.file import open_file
    from tinc.volumes import read_volume

    if (compressed is None) == (checkpoint is None):
        raise ValueError("give the .tinc file, or --checkpoint FOLDER, and not both")
    refuse_existing(json, overwrite)
    volume = read_volume(original)
    if compressed is not None:
        file = open_file(compressed)
        decoded, size = file.decode(), file.nbytes_stored
    else:
        from tinc.official.folder import decode_official

        assert checkpoint is not None
        decoded, size = decode_official(checkpoint, original)
        if decoded.size == volume.array.size:  # the official form has an axis of channels always
            decoded = decoded.reshape(volume.array.shape)
    reference = np.asarray(volume.array)
    found = metrics.compare(reference, decoded, channel_axis=volume.channel_axis)
    found |= {"ratio": reference.nbytes / size, "bits_per_sample": 8 * size / reference.size}
    for cut in threshold:
        for name, measure in (("accuracy", metrics.accuracy), ("iou", metrics.iou), ("precision", metrics.precision)):
            found[f"{name}_{cut:g}"] = measure(reference, decoded, threshold=cut)
    print_metrics(found)
    if json is not None:
        write_json(json, finite_or_none({"original": str(original), **found}), overwrite=overwrite)


def train(
    recipe: Positional[str] = "default",
    *,
    data: Path,
    out: Path,
    config: Path | None = None,
    ratio: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    device: Literal["auto", "cpu"] = "auto",
    precision: Literal["no", "bf16"] = "no",
) -> None:
    """Run the official procedure on one volume; the same command goes on where a run stopped.

    Args:
        recipe: default, multi0, multi1 or multi2
        data: the volume, .tif or .npy
        out: folder of the run; it gets the official folders best/ and last/
        config: an official YAML file instead of a recipe
        ratio: bytes of the input file / bytes of the parameters as float32
        epochs: passes over a leaf's points
        batch_size: points a step, over all leaves
        device: auto or cpu
        precision: bf16 computes the tree in bfloat16
    """
    from dataclasses import replace

    from tinc.official.training import train as fit
    from tinc.recipes import find_recipe, read_yaml

    chosen = find_recipe(recipe) if config is None else read_yaml(config)
    changes: dict[str, Any] = {"ratio": ratio, "epochs": epochs, "batch_size": batch_size}
    chosen = replace(chosen, **{name: value for name, value in changes.items() if value is not None})
    result = fit(chosen, data, out, device=device, precision=precision)
    metrics = {"psnr": result.psnr, "ssim": result.ssim, "best_psnr": result.best_psnr, "ratio": result.ratio}
    report_fit(metrics, result.last)


def sweep(
    config: Positional[Path],
    *,
    data: Path,
    out: Path,
    jobs: int = 1,
    backend: Literal["loky", "ray", "dask"] = "loky",
) -> None:
    """Run the official procedure for every combination of a YAML file with Static and Dynamic options.

    Args:
        config: the YAML file (PRODUCT: every combination, CONCAT: one after the other)
        data: the volume
        out: folder with a run for each combination, and results.jsonl
        jobs: processes; -1: one a core
        backend: processes of this machine, or a Ray or Dask cluster
    """
    from tinc.official.sweep import run_sweep

    for name, result in run_sweep(config, data, out, jobs=jobs, backend=backend):
        print(f"{name}: PSNR {result['psnr']:.2f} dB, SSIM {result['ssim']:.3f}, ratio {result['ratio']:.1f}")


def export(checkpoint: Positional[Path], *, data: Path, out: Path, overwrite: bool = False) -> None:
    """Write an official tree for other runtimes: indices of a leaf's points to the values of all leaves.

    Args:
        checkpoint: the official folder
        data: the volume that it stands for
        out: the .onnx, or .pt2 (torch.export), to write
        overwrite: replace an existing output
    """
    from tinc.official.export import export_tree
    from tinc.official.folder import load_official

    refuse_existing(out, overwrite)
    export_tree(load_official(checkpoint, volume=data).model, out, overwrite=overwrite)
    print(out)


def reproduce(*, report: ReportOptions = ReportOptions()) -> int:
    """Measure the tables: what this machine can, and for the rest what it would take."""
    from tinc.tables import figures, tables

    return report.measure(DISTRIBUTION, tables(), figures())


def bench(
    source: Positional[Path | None] = None,
    *,
    ratios: str = "16,64,128,256",
    against: str = "hevc,jpeg2k,sperr,sz3",
    preset: Literal["fast", "balanced", "best"] = "balanced",
    full: bool = False,
    json: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Compress a volume beside other codecs; without a volume, time decoding and training beside plain ones.

    Args:
        source: the volume
        ratios: bytes of the samples / bytes of the file, one or more
        against: other codecs at the same bytes: hevc, jpeg2k, sperr, sz3, zfp; '' for none
        preset: of tinc
        full: without a volume: also two threads, and more repeats
        json: write the rows here as well
        overwrite: replace an existing output
    """
    if source is None:
        from tinc.bench import measure

        report_bench(measure(full=full), json=json, overwrite=overwrite)
        return
    from tinc.rivals import compare, rivalry_table

    refuse_existing(json, overwrite)
    rows = []
    rivals = [] if against == "" else against.split(",")
    for row in compare(source, _numbers("--ratios", ratios), rivals, preset=preset):
        print(f"{row['codec']} at {row['asked']:g}x: {row['psnr']:.2f} dB", file=sys.stderr)
        rows.append(row)
    print(rivalry_table(rows))
    if json is not None:
        write_json(json, finite_or_none(rows), overwrite=overwrite)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, by default the process's arguments; returns the exit code."""
    commands: dict[str, Any] = {
        "compress": compress,
        "decompress": decompress,
        "chunk": chunk,
        "batch": batch,
        "info": info,
        "eval": evaluate,
        "train": train,
        "sweep": sweep,
        "export": export,
        "reproduce": reproduce,
        "bench": bench,
    }
    return run(
        "tinc",
        commands,
        description="Compress volumes into small files that are read like arrays, with TINC (CVPR 2023) inside.",
        version=VERSION,
        argv=argv,
    )


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Show stages and quality on stderr; the first Ctrl-C asks to finish, the second one interrupts."""
    from tqdm import tqdm

    bar = tqdm(bar_format="{desc} [{elapsed}]", disable=None, leave=False)
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    def callback(stage: str, quality: float) -> None:
        bar.set_description_str(stage if math.isnan(quality) else f"{stage}: {quality:.2f} dB")
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield callback
    finally:
        signal.signal(signal.SIGINT, before)
        bar.close()


def _numbers(flag: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text} must be numbers with commas between them, such as 16,64") from None


def _parse_region(text: str, axes: int) -> tuple[slice, ...]:
    parts = []
    for part in text.split(","):
        ends = part.split(":")
        if len(ends) != 2 or not all(end.strip().isdigit() or not end.strip() for end in ends):
            raise ValueError(f"--region {text} must give a range for each axis, such as 0:8,40:56,40:56")
        parts.append(slice(*(int(end) if end.strip() else None for end in ends)))
    if len(parts) != axes:
        raise ValueError(f"--region {text} has {len(parts)} ranges; the array has {axes} axes")
    return tuple(parts)
