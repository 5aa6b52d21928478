"""The command `tinc` and its sub-commands."""

import math
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from visionkernels.checks import InputError
from visionkernels.cli import print_metrics, report_bench, report_fit, run_package
from visionkernels.files import finite_or_none, refuse_existing, write_json
from visionkernels.package import Package

__all__ = ["PACKAGE", "main"]

if TYPE_CHECKING:
    from tinc.volumes.description import Volume

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
    channel_axis: int | Literal["none"] | None = None,
    max_seconds: float | None = None,
    seed: int = 0,
    metadata: Literal["auto", "keep", "drop"] = "auto",
    overwrite: bool = False,
) -> None:
    """Compress a volume, a 2-D image or a series of volumes into a .tinc file, to one target.

    Ctrl-C ends the search and writes the best file so far; a second Ctrl-C ends the command.

    Args:
        source: .tif, .npy, .nii, .nii.gz, .zarr or .png
        out: the .tinc to write
        ratio: bytes of the samples / bytes of the file, at least
        bytes: bytes of the file, at most
        bpv: bits a sample, at most
        psnr: dB, at least; over the range of an integer type, or over the volume's own range for float32
        max_error: largest error of a sample
        lossless: keep every sample
        preset: fast trains no tree; balanced and best train one, and keep it where it helps
        layers: force a tree alone, a residual layer alone, or both; auto takes the best
        nan: raise an error for samples that are not finite, or fill them with the mean
        as_type: convert the samples first; values are rounded, and must be in the type's range
        channel_axis: axis of the channels, or none where the source is wrong to name one; by default that of the source
        max_seconds: time limit for the training of a tree
        seed: seed of the training
        metadata: keep or drop those of the source; auto keeps all, and for targets below 64 KiB what gives places and
            numbers their meaning: spacing, affines, slope and the like; their bytes count
        overwrite: replace an existing output
    """
    import numpy as np

    from tinc.compression import compress as to_file
    from tinc.encoding.targets import one_request
    from tinc.metrics import compare
    from tinc.volumes import essential_metadata, read_volume

    refuse_existing(out, overwrite)
    _refuse_source(source, out)
    target = one_request(ratio=ratio, bytes=bytes, bpv=bpv, psnr=psnr, max_error=max_error, lossless=lossless)
    volume = read_volume(source, as_type=as_type)
    _print_note(volume.note)
    axis = _channel_axis(volume, channel_axis)
    limit = target.size_limit(volume.array.size, volume.array.nbytes)
    kept: dict[str, Any] = {} if metadata == "drop" else volume.metadata
    left_out: list[str] = []
    if metadata == "auto" and limit is not None and limit < 1 << 16:
        kept, left_out = essential_metadata(volume.metadata, volume.array.ndim, axis, limit)
    with _progress() as callback:
        file = to_file(
            volume.array, ratio=ratio, bytes=bytes, bpv=bpv, psnr=psnr, max_error=max_error, lossless=lossless,
            preset=preset, layers=layers, nan=nan, channel_axis=axis, max_seconds=max_seconds, seed=seed,
            metadata=kept, callback=callback,
        )  # fmt: skip
    file.save(out, overwrite=overwrite)
    if left_out:
        print(f"metadata left out of a small file: {', '.join(left_out)} (--metadata keep)", file=sys.stderr)
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
    max_bytes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Decode a .tinc file, or a part of it.

    Args:
        source: the .tinc file
        out: .tif, .npy, .nii, .nii.gz, .zarr or .png
        region: a range for each axis, such as 0:8,40:56,40:56; an empty end is that of the volume
        level: number of times to halve each axis
        partial: decode the available part of a file that was cut off
        max_bytes: limit on the decoded bytes; by default 256 MiB, or 65,536 times the file where that is more
        overwrite: replace an existing output
    """
    from tinc.file import open_file
    from tinc.volumes import unstored_metadata, write_volume

    refuse_existing(out, overwrite)
    _refuse_source(source, out)
    file = open_file(source, partial=partial, max_nbytes=max_bytes)
    parts = (slice(None),) * file.ndim if region is None else _parse_region(region, file.ndim)
    try:
        array = file.decode(parts, level=level)
    except IndexError as error:
        raise InputError(f"--region {region}: {error}") from error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metadata = file.metadata_of(parts, level=level)
    for warning in caught:
        print(warning.message, file=sys.stderr)
    axis = file.info()["channel_axis"]
    write_volume(out, array, metadata=metadata, channel_axis=axis, overwrite=overwrite)
    lost = unstored_metadata(out, metadata)
    _print_note(f"{out} cannot store {', '.join(lost)}; .nii and .zarr can" if lost else None)
    print(f"{out}: {array.dtype} {' x '.join(map(str, array.shape))}")


@dataclass(frozen=True)
class Target:
    """At most one of these; without any, files are lossless."""

    ratio: float | None = None
    """bytes of the samples / bytes of a file"""
    bpv: float | None = None
    """bits a sample, at most"""
    psnr: float | None = None
    """dB, at least"""
    max_error: float | None = None
    """largest error of a sample"""

    def options(self) -> dict[str, Any]:
        """Return the given target as an option of a function."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return given if given else {"lossless": True}


def chunk(
    source: Positional[Path],
    out: Positional[Path],
    *,
    size: Sizes,
    target: Target = Target(),
    preset: Literal["fast", "balanced", "best"] = "fast",
    as_type: As = None,
    channel_axis: int | Literal["none"] | None = None,
    jobs: int = 1,
    backend: Literal["loky", "ray", "dask"] = "loky",
    overwrite: bool = False,
) -> None:
    """Compress a volume that may be larger than memory into a Zarr array, chunk by chunk.

    Rerun the same command to resume.

    Args:
        source: .npy, .tif, .nii or .zarr
        out: the .zarr folder to write
        size: sizes of a chunk by axis
        preset: fast trains no trees
        as_type: convert the samples, chunk by chunk; values are rounded, and must be in the type's range
        channel_axis: axis of the channels, or none; by default that of the source
        jobs: number of processes; -1 for one on each core
        backend: processes of this machine, or a Ray or Dask cluster
        overwrite: replace an existing output
    """
    from tinc.parallel import compress_chunks
    from tinc.volumes import open_volume

    _refuse_source(source, out)
    volume = open_volume(source, as_type=as_type)
    _print_note(volume.note)
    report = compress_chunks(
        volume.array, out, chunk=size, jobs=jobs, backend=backend, metadata=volume.metadata, overwrite=overwrite,
        preset=preset, channel_axis=_channel_axis(volume, channel_axis), **target.options(),
    )  # fmt: skip
    print(f"{out}: {report.num_chunks} chunks, {report.bytes} bytes, ratio {report.ratio:.2f}")
    print_metrics({"psnr": report.psnr})


def batch(
    sources: Positional[Annotated[tuple[Path, ...], arg(metavar="SOURCE [SOURCE ...]")]],
    *,
    out: Path,
    target: Target = Target(),
    preset: Literal["fast", "balanced", "best"] = "balanced",
    as_type: As = None,
    jobs: int = 1,
    backend: Literal["loky", "ray", "dask"] = "loky",
    overwrite: bool = False,
) -> int:
    """Compress many volumes into .tinc files. Rerun the same command to resume.

    Args:
        sources: the volumes
        out: folder of the files, and of done.jsonl
        preset: fast trains no trees
        as_type: convert the samples first; values are rounded, and must be in the type's range
        jobs: number of processes; -1 for one on each core
        backend: processes of this machine, or a Ray or Dask cluster
        overwrite: replace existing outputs
    """
    from tinc.parallel import compress_many

    if not sources:
        raise InputError("SOURCE is missing; give one or more volumes")
    report = compress_many(
        sources, out, jobs=jobs, backend=backend, as_type=as_type, done=out / "done.jsonl", overwrite=overwrite,
        preset=preset, **target.options(),
    )  # fmt: skip
    for entry in report.files:
        quality = "exact" if entry["psnr"] is None else f"PSNR {entry['psnr']:.2f} dB"
        _print_note(None if entry["note"] is None else f"{entry['path']}: {entry['note']}")
        print(f"{entry['out']}: {entry['bytes']} bytes, ratio {entry['ratio']:.2f}, {quality}")
    for path, reason in report.failures.items():
        print(f"{path}: {reason}", file=sys.stderr)
    return 1 if report.failures else 0


def info(source: Positional[Path | None] = None, *, json: Path | None = None, overwrite: bool = False) -> None:
    """Describe a .tinc file; without a file, print the version and the official configurations.

    Args:
        source: the .tinc file
        json: write the description to this file as well
        overwrite: replace an existing output
    """
    if source is None:
        from tinc.recipes import RECIPES

        print(f"{PACKAGE.distribution} {PACKAGE.version}")
        print("official configurations for `tinc train`:")
        for name, recipe in RECIPES.items():
            levels = ", ".join(
                f"{level.ratio} {level.layers} {level.activation} {level.allocation}" for level in recipe.levels
            )
            print(f"  {name}: {levels}")
        return
    from tinc.file import open_file

    refuse_existing(json, overwrite)
    contents = open_file(source).info()
    for name, value in contents.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {part}" for key, part in value.items())
        print(
            f"{name.replace('_', ' ')}: {value:.4g}"
            if isinstance(value, float)
            else f"{name.replace('_', ' ')}: {value}"
        )
    if json is not None:
        write_json(json, contents, overwrite=overwrite)


def evaluate(
    original: Positional[Path],
    compressed: Positional[Path | None] = None,
    *,
    checkpoint: Path | None = None,
    threshold: tuple[float, ...] = (),
    json: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Compare a .tinc file, or an official folder of weights, with the original volume.

    Args:
        original: the volume
        compressed: the .tinc file
        checkpoint: an official folder (models/0-0-0-0/0-W, ...) instead of a .tinc file
        threshold: samples at which to binarise both volumes for accuracy, IoU and precision
        json: write the result to this file as well
        overwrite: replace an existing output
    """
    import numpy as np

    from tinc import metrics
    from tinc.file import open_file
    from tinc.volumes import read_volume

    if (compressed is None) == (checkpoint is None):
        raise InputError("give either the .tinc file or --checkpoint FOLDER")
    refuse_existing(json, overwrite)
    volume = read_volume(original)
    _print_note(volume.note)
    if compressed is not None:
        file = open_file(compressed, max_nbytes=max(1 << 28, 2 * volume.array.nbytes))
        decoded, size = file.decode(), file.nbytes_stored
    else:
        from tinc.official.folder import decode_official

        assert checkpoint is not None
        decoded, size = decode_official(checkpoint, original)
        if decoded.size == volume.array.size:  # the official form always has an axis of channels
            decoded = decoded.reshape(volume.array.shape)
    reference = np.asarray(volume.array)
    result = metrics.compare(reference, decoded, channel_axis=volume.channel_axis)
    result |= {"ratio": reference.nbytes / size, "bits_per_sample": 8 * size / reference.size}
    for cut in threshold:
        for name, measure in (("accuracy", metrics.accuracy), ("iou", metrics.iou), ("precision", metrics.precision)):
            result[f"{name}_{cut:g}"] = measure(reference, decoded, threshold=cut)
    print_metrics(result)
    if json is not None:
        write_json(json, finite_or_none({"original": str(original), **result}), overwrite=overwrite)


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
    """Run the official procedure on one volume. Rerun the same command to resume.

    Args:
        recipe: default, multi0, multi1 or multi2
        data: the volume, .tif or .npy
        out: the run folder; official folders best/ and last/ are written into it
        config: an official YAML file instead of a recipe
        ratio: bytes of the input file / bytes of the parameters as float32
        epochs: passes over the points of a leaf
        batch_size: points of a step, summed over all leaves
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

    Rerun the same command to resume.

    Args:
        config: the YAML file (PRODUCT combines its entries, CONCAT takes one after the other)
        data: the volume
        out: folder of the runs, one for each combination, and of results.jsonl
        jobs: number of processes; -1 for one on each core
        backend: processes of this machine, or a Ray or Dask cluster
    """
    from tinc.official.sweep import run_sweep

    for name, result in run_sweep(config, data, out, jobs=jobs, backend=backend):
        print(f"{name}: PSNR {result['psnr']:.2f} dB, SSIM {result['ssim']:.3f}, ratio {result['ratio']:.1f}")


def export(checkpoint: Positional[Path], *, data: Path, out: Path, overwrite: bool = False) -> None:
    """Export an official tree, a function from indices of a leaf's points to the values of all leaves.

    Args:
        checkpoint: the official folder
        data: the original volume
        out: the .onnx or .pt2 (torch.export) file to write
        overwrite: replace an existing output
    """
    from tinc.official.export import export_tree
    from tinc.official.folder import load_official

    refuse_existing(out, overwrite)
    export_tree(load_official(checkpoint, volume=data), out, overwrite=overwrite)
    print(out)


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
    """Compare tinc with other codecs on a volume; without a volume, time decoding and training against baselines.

    Args:
        source: the volume
        ratios: one or more ratios, bytes of the samples / bytes of the file
        against: other codecs at the same bytes: hevc, jpeg2k, sperr, sz3, zfp; '' for none
        preset: preset of tinc
        full: also time two threads, with more repeats
        json: write the rows to this file as well
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


PACKAGE = Package(
    name="tinc",
    distribution="tinc-vision",
    summary="Compress volumes into small files that are read like arrays, with TINC (CVPR 2023) inside.",
    recipes=None,
    official=None,
    figures="tinc.tables:figures",
    verbs={
        "compress": compress, "decompress": decompress, "chunk": chunk, "batch": batch, "info": info, "eval": evaluate,
        "train": train, "sweep": sweep, "export": export, "bench": bench,
    },
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, by default the process's arguments; return the exit code."""
    return run_package(PACKAGE, argv)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Show stages and PSNR on stderr; the first Ctrl-C ends the search, the second one interrupts."""
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


def _refuse_source(source: Path, out: Path) -> None:
    if out.exists() and out.samefile(source):
        raise InputError(f"{out} is the source itself, which would be lost; give another name")


def _channel_axis(volume: "Volume", chosen: int | Literal["none"] | None) -> int | None:
    return volume.channel_axis if chosen is None else None if chosen == "none" else chosen


def _print_note(note: str | None) -> None:
    if note is not None:
        print(note, file=sys.stderr)


def _numbers(flag: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{flag} {text!r} must be numbers separated by commas, such as 16,64") from None


def _parse_region(text: str, axes: int) -> tuple[slice, ...]:
    parts = []
    for part in text.split(","):
        ends = part.split(":")
        if len(ends) != 2 or not all(end.strip().isdigit() or not end.strip() for end in ends):
            raise InputError(f"--region {text!r} must be a range for each axis, such as 0:8,40:56,40:56")
        parts.append(slice(*(int(end) if end.strip() else None for end in ends)))
    if len(parts) != axes:
        raise InputError(f"--region {text!r} has {len(parts)} ranges; the array has {axes} axes")
    return tuple(parts)
