"""The vocabulary of a conversion table: one row per parameter, read in both directions.

A row says which leaf of this project's parameters holds which tensor of a checkpoint, and how the axes
differ. Layers are stacked here and apart there, so ``{}`` in a tensor's name stands for the layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, overload

import numpy as np

from gaze_jax.errors import UserError

Json = Mapping[str, Any]
_Config = Any  # a DecoderConfig, VisionConfig or MLLMConfig; a conversion takes that of its part
_T = TypeVar("_T")
Layout = Literal["same", "linear", "conv"]

_TO_LEAF: Mapping[str, tuple[int, ...] | None] = {"same": None, "linear": (1, 0), "conv": (2, 3, 1, 0)}
_TO_TENSOR: Mapping[str, tuple[int, ...] | None] = {"same": None, "linear": (1, 0), "conv": (3, 2, 0, 1)}


# A strip at a time keeps both sides of a transposition in the cache: several times the speed of one .T copy.
_STRIP = 256


def copy(out: np.ndarray, values: np.ndarray) -> None:
    """``out[...] = values`` of one dtype, quick where ``values`` is a transposed view."""
    # numpy copies bfloat16, which is not its own, element by element.
    words = np.dtype(f"u{out.dtype.itemsize}")
    out, values = out.view(words), values.view(words)
    if values.ndim == 2 and not values.flags.c_contiguous:
        for start in range(0, values.shape[1], _STRIP):
            out[:, start : start + _STRIP] = values[:, start : start + _STRIP]
    else:
        out[...] = values


@dataclasses.dataclass(frozen=True)
class Rule:
    """One leaf and the tensor or tensors that fill it.

    Attributes:
      leaf: path in the parameters, such as "decoder/layers/mlp/up_proj/kernel".
      tensor: name in the checkpoint; with ``{}`` for the layer if ``layers``.
      layout: "same"; "linear", torch's [out, in] for Flax's [in, out]; "conv", OIHW for HWIO.
      layers: the leaf stacks this many tensors on its first axis; 0 if it is one tensor.
    """

    leaf: str
    tensor: str
    layout: Layout = "same"
    layers: int = 0

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors, in the order of the layers."""
        return tuple(self.tensor.format(i) for i in range(self.layers)) if self.layers else (self.tensor,)

    def to_leaf(self, tensor: np.ndarray) -> np.ndarray:
        """A view of one layer's tensor with the leaf's axes."""
        axes = _TO_LEAF[self.layout]
        return tensor if axes is None else tensor.transpose(axes)

    def to_tensor(self, leaf: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`to_leaf`, as a contiguous array."""
        axes = _TO_TENSOR[self.layout]
        if axes is None:
            return np.ascontiguousarray(leaf)
        view = leaf.transpose(axes)
        out = np.empty(view.shape, view.dtype)
        copy(out, view)
        return out

    def tensor_shape(self, leaf_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each tensor of a leaf of ``leaf_shape``."""
        shape = leaf_shape[1:] if self.layers else leaf_shape
        axes = _TO_TENSOR[self.layout]
        return shape if axes is None else tuple(shape[axis] for axis in axes)


def linear(leaf: str, tensor: str, layers: int, *, bias: bool) -> tuple[Rule, ...]:
    """The rules of a linear layer, or of one in each of ``layers``."""
    kernel = Rule(f"{leaf}/kernel", f"{tensor}.weight", "linear", layers)
    return (kernel, Rule(f"{leaf}/bias", f"{tensor}.bias", "same", layers)) if bias else (kernel,)


def layer_norm(leaf: str, tensor: str, layers: int = 0) -> tuple[Rule, ...]:
    """The rules of a LayerNorm, or of one in each of ``layers``."""
    return (
        Rule(f"{leaf}/scale", f"{tensor}.weight", "same", layers),
        Rule(f"{leaf}/bias", f"{tensor}.bias", "same", layers),
    )


Part = Literal["decoder", "vision", "model"]
"""What a directory holds: a language model, an image tower, or both with what joins them."""


@dataclasses.dataclass(frozen=True)
class Names:
    """How a whole model calls its parts.

    Attributes:
      decoder: before the names of transformers' language model, such as "language_model.".
      vision: before the names of transformers' SiglipVisionModel, such as "vision_tower.".
      projector: of its two linear layers.
      newline: of the newline embedding.
    """

    decoder: str
    vision: str
    projector: tuple[str, str]
    newline: str


@dataclasses.dataclass(frozen=True)
class Original:
    """A class of transformers that reads a whole model, and where its parts are: attribute paths with dots.

    Attributes:
      name: of the class.
      layers: of the language model.
      tower: of the image tower, a SiglipVisionModel.
      feature_layer: of the index into the tower's hidden states that the projector reads.
      projector: of the projector.
      newline: of the newline embedding.
    """

    name: str
    layers: str
    tower: str
    feature_layer: str
    projector: str
    newline: str


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How checkpoints of one ``model_type`` are read and written.

    Attributes:
      part: the subtree of the parameters that it fills, "decoder" or "vision"; "model" for all of them.
      read_config: from the checkpoint's ``config.json``; raises a UserError for what is not supported.
      rules: the table, of every parameter of the part.
      write_config: the inverse of ``read_config``, for a part that was not converted from a checkpoint. A
        whole model without a source is written as two parts, so it has none.
      aliases: (``model_type``, class in ``architectures``) that mean it too.
      writes: whether a config of the part without a source is written as this ``model_type``.
      names: of a whole model.
      tower_elsewhere: of a whole model whose ``config.json`` only names its tower. ``read_config`` takes the
        tower's VisionConfig (None: not known) as a second argument, and the file may lack the tower.
      remarks: sentences about values of ``config.json`` that the original code ignores.
      canonical: a tensor's name without the prefixes that differ between versions of transformers.
      unused: whether the tensor of that canonical name belongs to the model but takes no part in what is
        computed here; such tensors are kept beside the parameters and written back.
      left_out: pattern of canonical names -> why tensors of such names are not converted at all.
      own_config: config.json of the part alone, where the checkpoint's describes more than the part.
      implied: tensor that tied models may repeat -> the one that it must equal.
      defaults: tensors that transformers wants though nothing here computes with them, for a model without
        a source.
      original: the class of transformers that reads a whole model; None: it has none, and the original is
        put together of parts for comparison.
    """

    part: Part
    read_config: Callable[..., _Config]
    rules: Callable[[_Config], tuple[Rule, ...]]
    write_config: Callable[[_Config], dict[str, object]] | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    writes: Callable[[_Config], bool] = lambda config: False
    names: Names | None = None
    tower_elsewhere: bool = False
    remarks: Callable[[Json], tuple[str, ...]] = lambda config: ()
    canonical: Callable[[str], str] = str
    unused: Callable[[_Config, str], bool] = lambda config, name: False
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    own_config: Callable[[Json], Json] = lambda config: config
    implied: Callable[[_Config], Mapping[str, str]] = lambda config: {}
    defaults: Callable[[_Config], Mapping[str, np.ndarray]] = lambda config: {}
    original: Original | None = None


class Fields:
    """Reads a ``config.json`` field by field, strictly; ``where`` is what messages call it."""

    def __init__(self, config: Json, where: str) -> None:
        self._config, self.where = config, where

    @overload
    def get(self, name: str, kind: type[_T]) -> _T: ...

    @overload
    def get(self, name: str, kind: type[_T], default: _T) -> _T: ...

    def get(self, name: str, kind: type, default: object = dataclasses.MISSING) -> object:
        """The value of ``name``, or ``default``; None counts as absent.

        Raises:
          UserError: it is absent and has no default, or is not of type ``kind``.
        """
        value = self._config.get(name)
        if value is None:
            if default is dataclasses.MISSING:
                raise UserError(f"{self.where} lacks {name}; it does not describe a model of this family.")
            return default
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise UserError(f"{self.where} has {name}={value!r}, which should be of type {kind.__name__}.")
        return value

    def only(self, name: str, *allowed: object, required: bool = False) -> None:
        """Refuse a value that would change the computation in a way that is not implemented.

        Args:
          name: of the field.
          *allowed: values; the first is the default of an absent field.
          required: an absent field is refused too, because its default is another.
        """
        value = self._config.get(name, None if required else allowed[0])
        if value not in allowed:
            raise UserError(
                f"{self.where} has {name}={value!r}, which is not supported; only "
                f"{' or '.join(map(repr, allowed))} is."
            )
