"""Batches decoded by NVIDIA DALI, on the GPU where there is one, else on the CPU.

Python threads read the files ahead (reading is waiting, not computing), look into each one's header
and work out windows and flips by the same functions that the torchvision loader uses; DALI gets
encoded images and numbers, and does everything that touches a pixel, but for scaling on the CPU.
Rare kinds of files, of which DALI makes something else than Pillow or nothing at all, are decoded
by Pillow in the threads that read, and handed to DALI as uncompressed images.
"""

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, pipeline_def
from nvidia.dali.data_node import DataNode
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType

from data_pipelines.images.batch import (
    Batch,
    LoaderSettings,
    Request,
    check_image,
    decode_with_pil,
)
from data_pipelines.images.header import is_common
from data_pipelines.images.order import Float64s, Int64s
from data_pipelines.images.source import Bytes, Fetched, ImageSource, rows_of
from data_pipelines.loading.augment import (
    ImageTransform,
    color_jitter_factors,
    erasing_boxes,
    rand_augment_choices,
    trivial_augment_choices,
)
from data_pipelines.loading.dali_augment import (
    color_jitter,
    erase,
    rand_augment,
    trivial_augment,
)
from data_pipelines.loading.draws import UNIFORMS
from data_pipelines.loading.scaling import scale

# Threads that read files. On a network file system each one mostly waits.
_READERS = 16
# Batches whose files are read before DALI asks for them.
_READ_AHEAD = 4
_Sized = tuple[Bytes, tuple[int, int]]
_INTERPOLATIONS = {
    "bilinear": DALIInterpType.INTERP_LINEAR,
    "bicubic": DALIInterpType.INTERP_CUBIC,
}


def dali_batches(
    source: ImageSource,
    requests: Iterator[Request],
    transform: ImageTransform,
    batch_size: int,
    settings: LoaderSettings,
) -> Generator[Batch, None, None]:
    """Make the batches of ``requests``, in order; none may be larger than ``batch_size``.

    On a GPU, JPEGs are decoded by nvJPEG, whose pixels may differ by rounding from the CPU's.

    Raises:
        UserError: an image cannot be read and may not be skipped; raised when the batch's turn
            comes.
    """
    refused: set[int] = set()
    while True:
        feed = _Feed(source, requests, transform, refused)
        scaler = None if settings.device.type == "cuda" else _Scaler(settings.threads, transform)
        pipeline = _pipeline(feed, scaler, transform, batch_size, settings)
        iterator = DALIGenericIterator(
            [pipeline], ["images", "labels"], auto_reset=False, prepare_first_batch=False
        )
        try:
            while True:
                try:
                    (made,) = next(iterator)
                except StopIteration:
                    if feed.error is not None:
                        raise feed.error from None
                    return
                except RuntimeError as error:
                    _settle(source, feed, transform, settings.device, error)
                    break
                feed.delivered()
                images, labels = made["images"], made["labels"]
                yield images.permute(0, 3, 1, 2) if settings.channels_last else images, labels
        finally:
            # DALI's graph refers to itself in circles: without this, its threads and buffers would
            # stay until Python's garbage collector comes round.
            pipeline._shutdown()
            if scaler is not None:
                scaler.close()
            feed.close()
        # After an error a pipeline is of no more use. What it had taken is read anew: without the
        # images that are now known to be bad, and with Pillow those that DALI alone refuses.
        requests = chain(feed.unfinished, requests)


class _Scaler:
    """Scales images on the CPU in threads of its own, to Pillow's pixels.

    DALI's own kernel took half of the whole pipeline's time.
    """

    def __init__(self, threads: int, transform: ImageTransform) -> None:
        self._threads, self._mode = max(threads, 1), transform.interpolation
        self._pool = ThreadPoolExecutor(self._threads, "scale")

    def __call__(self, images: list[Bytes], sizes: list[NDArray[np.float32]]) -> list[Bytes]:
        """Scale images (h, w, c) to heights and widths (2,)."""
        # Few large tasks: handing each image over by itself would cost a tenth of the time.
        length = -(-len(images) // self._threads)
        parts = [slice(start, start + length) for start in range(0, len(images), length)]

        def scaled(part: slice) -> list[Bytes]:
            pairs = zip(images[part], sizes[part], strict=True)
            return [scale(image, (int(h), int(w)), self._mode) for image, (h, w) in pairs]

        return [image for part in self._pool.map(scaled, parts) for image in part]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _pipeline(
    feed: "_Feed",
    scaler: _Scaler | None,
    transform: ImageTransform,
    batch_size: int,
    settings: LoaderSettings,
) -> Pipeline:
    # With conditionals DALI rewrites the function; only these need them.
    augment = transform.augment
    chosen = augment.rand_augment is not None or augment.trivial_augment
    define = pipeline_def(enable_conditionals=chosen)
    return define(_graph)(
        feed,
        scaler,
        transform,
        settings,
        batch_size=batch_size,
        num_threads=max(settings.threads, 1),
        device_id=_device_number(settings.device) if settings.device.type == "cuda" else None,
        prefetch_queue_depth=settings.prefetch,
        # The dynamic executor's outputs become torch tensors without a copy, and stay valid.
        exec_dynamic=True,
    )


def _graph(
    feed: "_Feed", scaler: _Scaler | None, transform: ImageTransform, settings: LoaderSettings
) -> tuple[DataNode, DataNode]:
    """Images and labels, as DALI makes them of what the feed gives it."""
    on_gpu = settings.device.type == "cuda"
    names = _inputs(transform)
    sources = fn.external_source(
        feed,
        num_outputs=len(names),
        dtype=[_TYPES[name][0] for name in names],
        ndim=[_TYPES[name][1] for name in names],
        no_copy=True,
    )
    # DALI's rewriting knows no zip(strict=True).
    given = {name: cast(list[DataNode], sources)[k] for k, name in enumerate(names)}
    images = _decoded(given, transform.channels, on_gpu=on_gpu)
    if "size" in given:
        images = _scaled(images, given["size"], scaler, transform)
    if "corner" in given:
        images = fn.slice(
            images,
            start=given["corner"],
            shape=(transform.image_size, transform.image_size),
            axes=(0, 1),
            out_of_bounds_policy="pad",
            fill_values=0,
        )
    if transform.augment.rand_augment is not None:
        images = rand_augment(
            images, given["operations"], given["turned"], transform.augment.rand_augment
        )
    if transform.augment.trivial_augment:
        images = trivial_augment(images, given["choice"])
    if transform.augment.color_jitter is not None:
        images = color_jitter(images, given["factors"])
    images = fn.crop_mirror_normalize(
        images,
        dtype=DALIDataType.FLOAT16 if settings.dtype == torch.float16 else DALIDataType.FLOAT,
        output_layout="HWC" if settings.channels_last else "CHW",
        mean=[255 * mean for mean in transform.mean],
        std=[255 * std for std in transform.std],
        mirror=given["mirror"],
    )
    if transform.augment.random_erasing:
        images = erase(images, given["boxes"])
    labels = given["labels"]
    return images, labels.gpu() if on_gpu else labels


def _decoded(given: Mapping[str, Any], channels: int, *, on_gpu: bool) -> DataNode:
    """Decode the encoded images given, or the window given of each."""
    decoding: dict[str, Any] = {
        "device": "mixed" if on_gpu else "cpu",
        "output_type": DALIImageType.GRAY if channels == 1 else DALIImageType.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }
    if "start" not in given:
        return cast(DataNode, fn.decoders.image(given["encoded"], **decoding))
    images = fn.decoders.image_slice(
        given["encoded"], start=given["start"], shape=given["shape"], axes=(0, 1), **decoding
    )
    return cast(DataNode, images)


def _scaled(
    images: DataNode, sizes: DataNode, scaler: _Scaler | None, transform: ImageTransform
) -> DataNode:
    """Scale images, HWC, to height and width, antialiased; without a scaler by DALI."""
    if scaler is None:
        kind = _INTERPOLATIONS[transform.interpolation]
        return cast(DataNode, fn.resize(images, size=sizes, antialias=True, interp_type=kind))
    return fn.python_function(
        images, sizes, function=scaler, batch_processing=True, output_layouts="HWC"
    )


# What DALI may be handed per sample: type and number of dimensions.
_TYPES = {
    "encoded": (DALIDataType.UINT8, 1),
    "labels": (DALIDataType.INT64, 0),
    "start": (DALIDataType.INT32, 1),
    "shape": (DALIDataType.INT32, 1),
    "size": (DALIDataType.FLOAT, 1),
    "corner": (DALIDataType.INT32, 1),
    "mirror": (DALIDataType.INT32, 0),
    "operations": (DALIDataType.INT32, 1),
    "turned": (DALIDataType.INT32, 1),
    "choice": (DALIDataType.INT32, 1),
    "factors": (DALIDataType.FLOAT, 1),
    "boxes": (DALIDataType.FLOAT, 1),
}


def _inputs(transform: ImageTransform) -> list[str]:
    """What of it a transform needs; DALI would complain of the rest."""
    one = np.ones((1, 2), np.int64), np.zeros((1, UNIFORMS))
    return ["encoded", "labels", *_numbers(transform, *one, transform.image_size)]


def _numbers(
    transform: ImageTransform, sizes: Int64s, uniforms: Float64s, side: int
) -> dict[str, NDArray[Any]]:
    """The numbers among the inputs, each of shape (b,) or (b, ...), in DALI's types."""
    cuts = transform.recipe.cuts(sizes, uniforms, side, transform.resize)
    numbers: dict[str, NDArray[Any]] = {"mirror": cuts.mirrored}
    if cuts.window is not None:
        numbers["start"], numbers["shape"] = np.split(cuts.window, 2, axis=1)
    if cuts.size is not None:
        numbers["size"] = cuts.size
    if cuts.corner is not None:
        numbers["corner"] = cuts.corner
    if transform.augment.rand_augment:
        numbers["operations"], numbers["turned"] = rand_augment_choices(
            uniforms, transform.augment.rand_augment
        )
    if transform.augment.trivial_augment:
        numbers["choice"] = trivial_augment_choices(uniforms)
    if transform.augment.color_jitter:
        numbers["factors"] = color_jitter_factors(uniforms, transform.augment.color_jitter)
    if transform.augment.random_erasing:
        numbers["boxes"] = erasing_boxes(uniforms, side, transform.augment.random_erasing)
    types = {DALIDataType.INT32: np.int32, DALIDataType.FLOAT: np.float32}
    return {
        name: np.ascontiguousarray(array, types[_TYPES[name][0]]) for name, array in numbers.items()
    }


@dataclass(frozen=True, eq=False)
class _Fed:
    """A request as it went to DALI."""

    request: Request
    images: list[int]
    given: tuple[Any, ...]


class _Feed:
    """Reads requests ahead; as an iterator, what DALI's external source takes.

    Attributes:
        fed: what DALI has been given and has not delivered yet. It is not copied: these arrays
            must live until then.
        error: why the requests ended early.
        refused: images that DALI has failed to decode, which Pillow decodes.
    """

    def __init__(
        self,
        source: ImageSource,
        requests: Iterator[Request],
        transform: ImageTransform,
        refused: set[int],
    ) -> None:
        self._source, self._requests, self._transform = source, requests, transform
        self.refused = refused
        self._taken: deque[Request] = deque()
        self.fed: deque[_Fed] = deque()
        self.error: Exception | None = None
        self._readers = ThreadPoolExecutor(_READERS, "read")
        # One thread takes the requests, in order, and does the arithmetic: the training loop's
        # own thread finds them ready.
        self._conductor = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: deque[Future[_Fed | None]] = deque()

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> tuple[Any, ...]:
        if not self._ahead:
            self._read_ahead()
        made = self._ahead.popleft().result()
        if made is None:
            raise StopIteration
        self.fed.append(made)
        return made.given

    def delivered(self) -> None:
        """The oldest batch has come out of DALI."""
        request = self.fed.popleft().request
        while self._taken.popleft() is not request:
            pass  # of these no image was left
        # Now, and not while DALI is being given the next one: the threads would get into the way
        # of the loop, which is waiting for that.
        self._read_ahead()

    def _read_ahead(self) -> None:
        while len(self._ahead) < _READ_AHEAD:
            self._ahead.append(self._conductor.submit(self._make))

    @property
    def unfinished(self) -> list[Request]:
        """The requests taken of which no batch has been delivered."""
        return list(self._taken)

    def close(self) -> None:
        """End the threads; what they were about to read is dropped."""
        self._conductor.shutdown(cancel_futures=True)
        self._readers.shutdown()

    def _make(self) -> _Fed | None:
        try:
            return self._next_batch() if self.error is None else None
        except Exception as error:
            # Told when the batches before it have been delivered.
            self.error = error
            return None

    def _next_batch(self) -> _Fed | None:
        while True:
            request = next(self._requests, None)
            if request is None:
                return None
            self._taken.append(request)
            reads = [
                self._readers.submit(self._source.fetch, request, rows, self._take)
                for rows in rows_of(request.images, _READERS)
            ]
            fetched = [read.result() for read in reads]
            if any(part.rows for part in fetched):
                return self._assemble(request, fetched)

    def _take(self, image: int, data: Bytes) -> _Sized:
        """What DALI is given of an image, and its size; ValueError where it is of no use."""
        taken, (height, width) = self._sized(image, data)
        self._transform.check_size(height, width)
        return taken, (height, width)

    def _sized(self, image: int, data: Bytes) -> _Sized:
        header, channels = check_image(data), self._transform.channels
        # DALI cuts off the grey of a colour PNG, where Pillow rounds it.
        cut_off = channels == 1 and header.format == "png" and header.channels > 2
        if image in self.refused or cut_off or not is_common(data):
            return _pixels(data, channels)
        return data, (header.height, header.width)

    def _assemble(self, request: Request, parts: list[Fetched[_Sized]]) -> _Fed:
        rows = np.concatenate([np.array(part.rows, dtype=np.int64) for part in parts])
        order = np.argsort(rows)
        images = [image for part in parts for image in part.images]
        items = [item for part in parts for item in part.items]
        images, items = [images[k] for k in order], [items[k] for k in order]
        encoded = [data for data, _ in items]
        sizes = np.array([size for _, size in items], dtype=np.int64)
        numbers = {
            "labels": self._source.index.labels[images],
            **_numbers(self._transform, sizes, request.uniforms[rows[order]], request.side),
        }
        given = (encoded, *(numbers[name] for name in _inputs(self._transform)[1:]))
        return _Fed(request, images, given)


def _pixels(data: Bytes, channels: int) -> _Sized:
    """An image as Pillow decodes it: uncompressed, as a PPM or PGM, with its height and width.

    Raises:
        ValueError: it cannot be decoded.
    """
    image = decode_with_pil(data, channels)
    head = b"P%d %d %d 255\n" % (5 if channels == 1 else 6, image.width, image.height)
    return np.frombuffer(head + image.tobytes(), np.uint8), (image.height, image.width)


def _settle(
    source: ImageSource,
    feed: _Feed,
    transform: ImageTransform,
    device: torch.device,
    error: RuntimeError,
) -> None:
    """Find the images behind DALI's error, which does not name them.

    Those that Pillow decodes are refused, to be decoded by it from now on: so both loaders leave
    out the same images. The others are bad.

    Raises:
        UserError: there is a bad one, and it may not be skipped.
        RuntimeError: it was no image's fault; a note names the batch's files.
    """
    names = _inputs(transform)
    suspects = {
        image: data
        for fed in feed.fed
        for image, *data in zip(fed.images, *fed.given, strict=True)
        if not _decodes(dict(zip(names, data, strict=True)), transform.channels, device)
    }
    if not suspects:
        files = [source.index.name(image) for image in feed.fed[0].images] if feed.fed else []
        error.add_note("the batch's images: " + ", ".join(files))
        raise error
    for image, (data, *_) in sorted(suspects.items()):
        # What Pillow made of it came here as PPM or PGM; there is no third way.
        if image in feed.refused:
            source.bad.add(image, "DALI cannot take it, though Pillow decodes it")
            continue
        try:
            _pixels(data, transform.channels)
            feed.refused.add(image)
        except ValueError as said:
            source.bad.add(image, str(said))


def _decodes(given: Mapping[str, Any], channels: int, device: torch.device) -> bool:
    """Whether DALI decodes one image as the pipeline does: the same window, in the same colours."""
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=1,
        num_threads=1,
        device_id=_device_number(device) if on_gpu else None,
        prefetch_queue_depth=1,  # else it takes no inputs by name
    )
    with pipeline:
        inputs = {
            name: fn.external_source(dtype=_TYPES[name][0], ndim=_TYPES[name][1], name=name)
            for name in ("encoded", "start", "shape")
            if name in given
        }
        pipeline.set_outputs(_decoded(inputs, channels, on_gpu=on_gpu))
    try:
        pipeline.run(**{name: [given[name]] for name in inputs})
    except RuntimeError:
        return False
    finally:
        pipeline._shutdown()
    return True


def _device_number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
