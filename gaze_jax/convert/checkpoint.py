"""Write and load converted checkpoints: Orbax, one leaf at a time, with the manifest's checksums."""

import collections
import concurrent.futures
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from jax.sharding import Mesh
from jaxtyping import PyTree

from gaze_jax.convert import manifest as manifests
from gaze_jax.convert import shards
from gaze_jax.convert.manifest import PARAMS, Leaf, Manifest, Source, chunk_path, crc_hex
from gaze_jax.convert.tokenizer_files import read_tokenizer
from gaze_jax.errors import UserError
from gaze_jax.models.config import MLLMConfig, VisionConfig
from gaze_jax.models.parameters import abstract_params
from gaze_jax.writing import file_crc, full_disk

Config = MLLMConfig | VisionConfig


def numpy_dtype(name: str) -> np.dtype:
    """The dtype with this NumPy name; knows bfloat16."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def flat_leaves(tree: PyTree) -> dict[str, Any]:
    """Flatten a tree of parameters to "a/b/c" -> leaf."""
    return flax.traverse_util.flatten_dict(tree, sep="/")


@dataclasses.dataclass(frozen=True)
class Pending:
    """A leaf that is not yet in memory.

    Attributes:
      leaf: dtype, shape and layers in which it will be stored.
      fill: writes the values of one layer (of the whole leaf if it is not stacked) into a given array.
    """

    leaf: Leaf
    fill: Callable[[np.ndarray, int], None]

    # Orbax adds these up for its log.
    @property
    def nbytes(self) -> int:
        """Size of the leaf in bytes."""
        return int(np.prod(self.leaf.shape, dtype=np.int64)) * numpy_dtype(self.leaf.dtype).itemsize


def pending_array(values: np.ndarray | jax.Array, layers: int = 0) -> Pending:
    """Wrap an existing NumPy or JAX array."""

    def fill(out: np.ndarray, layer: int) -> None:
        out[...] = values[layer] if layers else values

    return Pending(Leaf(str(values.dtype), tuple(values.shape), layers), fill)


# Checksums detect a file that did not reach the disk, so there is no need to sync each one.
_CONTEXT = tensorstore.Context({"file_io_sync": False})


class _Streaming(ocp.type_handlers.NumpyHandler):
    """Makes, checksums and writes one leaf after another; Orbax would hold all of them in memory.

    The next leaf is made while the previous one is written, if both fit into ``memory`` bytes.
    """

    def __init__(self, memory: int, done: Callable[[str, Leaf, Sequence[str]], None]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._memory, self._done = memory, done

    def memory_size(self, values: Sequence[Pending]) -> Sequence[tuple[int, int]]:
        return [(value.nbytes, value.nbytes) for value in values]

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        under_way: collections.deque[tuple[int, Callable[[], None]]] = collections.deque()
        try:
            for value, info, arg in zip(values, infos, args, strict=True):
                while under_way and sum(size for size, _ in under_way) + value.nbytes > self._memory:
                    under_way.popleft()[1]()
                array, checksums = materialise(value)
                futures = await super().serialize([array], [info.replace(ts_context=_CONTEXT)], [arg])
                del array  # the future keeps it alive while it is needed
                name = info.name.replace(".", "/")
                finish_leaf = functools.partial(self._finish, futures, name, value.leaf, checksums)
                under_way.append((value.nbytes, finish_leaf))
            while under_way:
                under_way.popleft()[1]()
        finally:
            # After an error, nothing may still write into the directory, which is being removed.
            for _, wait in under_way:
                with suppress(Exception):
                    wait()
        return []

    def _finish(
        self, futures: Sequence[ocp.future.Future], name: str, leaf: Leaf, checksums: Sequence[str]
    ) -> None:
        for future in futures:
            future.result()
        self._done(name, leaf, checksums)


# Shared by all leaves, so that its threads reuse their memory.
_pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="convert")


def materialise(pending: Pending) -> tuple[np.ndarray, list[str]]:
    """Return the values of a leaf and the checksums of its files."""
    leaf = pending.leaf
    array = np.empty(leaf.shape, numpy_dtype(leaf.dtype))

    def one(layer: int) -> str:
        part = array[layer, ...] if leaf.layers else array  # a view, also of a vector
        pending.fill(part, layer)
        return crc_hex(part.reshape(-1).view(np.uint8).data)

    return array, list(_pool.map(one, range(leaf.layers or 1)))


def _save_params(
    directory: Path, leaves: Mapping[str, Pending], memory: int, progress: Callable[[int], None]
) -> dict[str, str]:
    """Write ``directory/params``; return the checksum of every file."""
    files: dict[str, str] = {}

    def done(name: str, leaf: Leaf, checksums: Sequence[str]) -> None:
        for layer, checksum in enumerate(checksums):
            files[chunk_path(name, leaf, layer if leaf.layers else None)] = checksum
        progress(leaves[name].nbytes)

    tree = flax.traverse_util.unflatten_dict(dict(leaves), sep="/")
    save_args = jax.tree.map(
        lambda pending: ocp.SaveArgs(shard_axes=(0,) if pending.leaf.layers else ()),
        tree,
        is_leaf=lambda node: isinstance(node, Pending),
    )
    with _quiet():
        registry = ocp.type_handlers.create_type_handler_registry((Pending, _Streaming(memory, done)))
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_compression=False, type_handler_registry=registry
        )
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(directory / PARAMS, args=ocp.args.PyTreeSave(tree, save_args=save_args))
    for path in sorted((directory / PARAMS).rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name not in files:  # Orbax's own metadata
            files[name] = file_crc(path)
    return files


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Orbax's warnings about what is intended: no OCDBT to merge, no jax.Array leaves."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Create a directory that gets its name only when it is complete.

    Raises:
      UserError: the directory exists and is not empty, or cannot be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists already; name a new directory in --to.")
    target = directory.resolve()  # tensorstore takes no path with ".."
    partial = target.with_name(f"{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except Exception as error:
        reason = full_disk(error) or (str(error) if isinstance(error, OSError) else None)
        if reason is None or isinstance(error, UserError):
            raise
        raise UserError(f"{directory} cannot be written ({reason}); free space or choose another.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write(
    directory: Path,
    config: Config,
    leaves: Mapping[str, Pending],
    *,
    sources: Mapping[str, Source] | None = None,
    new: Sequence[str] = (),
    memory: int = 0,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write parameters and manifest into a directory, which may already hold files of the parts.

    Args:
      directory: see :func:`new_directory`.
      config: the model's config.
      leaves: all parameters, by name.
      sources: the source of each part, by name of the part.
      new: names of the leaves that were initialised, not converted.
      memory: bytes of leaves that may be in memory at once; a larger leaf is held alone.
      progress: called with the number of bytes of every written leaf.
    """
    files = {
        path.relative_to(directory).as_posix(): file_crc(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    files |= _save_params(directory, leaves, memory, progress)
    described = {name: pending.leaf for name, pending in leaves.items()}
    manifests.write(directory, Manifest(config, described, sources or {}, tuple(new), files))


def _read_file(directory: Path, manifest: Manifest, path: str, out: np.ndarray, check: bool) -> bool:
    """Fill a contiguous array from a raw file; return whether its checksum is correct (if ``check``)."""
    file = directory / path
    try:
        if file.stat().st_size != out.nbytes:
            return False
        shards.read_into(shards.Tensor(file, "", out.shape, 0, out.nbytes), out)
    except (OSError, UserError):
        return False
    return not check or crc_hex(out.reshape(-1).view(np.uint8).data) == manifest.files[path]


def read_layer(directory: Path, manifest: Manifest, name: str, layer: int | None) -> np.ndarray:
    """Read and check one file of a leaf: a layer of a stacked leaf, or (None) a whole unstacked one.

    Raises:
      UserError: the file is damaged.
    """
    leaf = manifest.leaves[name]
    out = np.empty(leaf.shape if layer is None else leaf.shape[1:], numpy_dtype(leaf.dtype))
    if not _read_file(directory, manifest, chunk_path(name, leaf, layer), out, check=True):
        manifests.refuse_damage(directory, [manifests.label(name, layer)])
    return out


def _read_leaf(directory: Path, manifest: Manifest, name: str, check: bool) -> tuple[np.ndarray, list[str]]:
    """Read a leaf; also return names of its damaged files."""
    leaf = manifest.leaves[name]
    array = np.empty(leaf.shape, numpy_dtype(leaf.dtype))
    layers: Sequence[int | None] = range(leaf.layers) if leaf.layers else (None,)

    def problem(layer: int | None) -> str | None:
        part = array if layer is None else array[layer, ...]
        right = _read_file(directory, manifest, chunk_path(name, leaf, layer), part, check)
        return None if right else manifests.label(name, layer)

    return array, [found for found in _pool.map(problem, layers) if found]


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted checkpoint in memory.

    Attributes:
      config: the model's config, or that of a single image tower.
      params: the tree that ``MLLM(config).apply({"params": params}, ...)`` takes; for a single tower,
        ``{"vision": ...}``.
      tokenizer: content of tokenizer.json; None if the checkpoint has none.
      files: the directory with the other files of the language model, if any (tokenizer, chat template,
        processor settings); None for a run on digit scenes and for a single tower.
    """

    config: Config
    params: PyTree
    tokenizer: str | None
    files: Path | None = None


def text_part(parts: Collection[str]) -> str | None:
    """The part that holds the language model, and so the tokenizer; None for a single tower."""
    return next((part for part in ("model", "decoder") if part in parts), None)


def _check_names(directory: Path, manifest: Manifest, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    problems = []
    for name in sorted({*manifest.leaves, *abstract}):
        leaf, want = manifest.leaves.get(name), abstract.get(name)
        if leaf is None or want is None:
            problems.append(f"{name} is {'missing' if leaf is None else 'unknown'}")
        elif leaf.shape != want.shape:
            problems.append(f"{name} is {list(leaf.shape)}, the model wants {list(want.shape)}")
    if problems:
        raise UserError(f"{directory} does not hold the model that it describes: {'; '.join(problems)}.")


def load(directory: Path, mesh: Mesh, *, check: bool = True) -> Converted:
    """Load a converted checkpoint onto a mesh; every leaf keeps its dtype.

    Host memory holds one leaf at a time besides those already placed. Orbax could restore ``params`` too, but
    would not detect damaged values, and a separate check would read every file twice.

    Args:
      directory: a directory that convert.py wrote.
      mesh: the mesh to put the parameters on.
      check: verify the checksum of every file (docs/converting.md gives its cost).

    Raises:
      UserError: the directory is not a converted checkpoint, or it is damaged; all damaged leaves are named.
    """
    manifest = manifests.read(directory)
    abstract = flat_leaves(abstract_params(manifest.model, mesh))
    _check_names(directory, manifest, abstract)
    others = set(manifest.files) - manifests.leaf_files(manifest) if check else set()
    damaged = manifests.damaged_files(directory, manifest, sorted(others))
    placed = {}
    for name, target in abstract.items():
        values, problems = _read_leaf(directory, manifest, name, check)
        damaged += problems
        if not damaged:
            placed[name] = jax.make_array_from_callback(values.shape, target.sharding, values.__getitem__)
    manifests.refuse_damage(directory, damaged)
    params = flax.traverse_util.unflatten_dict(placed, sep="/")
    part = text_part(manifest.sources)
    files = None if part is None else directory / part
    return Converted(
        manifest.model, params, None if files is None else read_tokenizer(files, manifest.model), files
    )
