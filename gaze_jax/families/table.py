"""The vocabulary of a conversion table: one row per parameter, read in both directions.

A row says which leaf of this project's parameters corresponds to which tensor of a checkpoint, and how their
axes differ. Leaves stack the layers and checkpoints do not, so ``{}`` in a tensor's name is the layer.
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


# Transposing in strips keeps source and target in the CPU cache: several times as fast as one .T copy.
_STRIP = 256


def copy(out: np.ndarray, values: np.ndarray) -> None:
    """``out[...] = values`` for equal dtypes, fast if ``values`` is a transposed view."""
    # numpy copies bfloat16, which is not a built-in dtype, element by element.
    words = np.dtype(f"u{out.dtype.itemsize}")
    out, values = out.view(words), values.view(words)
    if values.ndim == 2 and not values.flags.c_contiguous:
        for start in range(0, values.shape[1], _STRIP):
            out[:, start : start + _STRIP] = values[:, start : start + _STRIP]
    else:
        out[...] = values


@dataclasses.dataclass(frozen=True)
class Rule:
    """One leaf and the tensors that fill it.

    Attributes:
      leaf: path in the parameters, such as "decoder/layers/mlp/up_proj/kernel".
      tensor: name in the checkpoint; contains ``{}`` for the layer if ``layers`` is not 0.
      layout: "same"; "linear", torch's [out, in] for Flax's [in, out]; "conv", OIHW for HWIO.
      layers: number of tensors stacked on the leaf's first axis; 0 if the leaf is one tensor.
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
        """Shape of each tensor, for a leaf of ``leaf_shape``."""
        shape = leaf_shape[1:] if self.layers else leaf_shape
        axes = _TO_TENSOR[self.layout]
        return shape if axes is None else tuple(shape[axis] for axis in axes)


def linear(leaf: str, tensor: str, layers: int, *, bias: bool) -> tuple[Rule, ...]:
    """The rules of a linear layer, or of one per layer if ``layers`` is not 0."""
    kernel = Rule(f"{leaf}/kernel", f"{tensor}.weight", "linear", layers)
    return (kernel, Rule(f"{leaf}/bias", f"{tensor}.bias", "same", layers)) if bias else (kernel,)


def layer_norm(leaf: str, tensor: str, layers: int = 0) -> tuple[Rule, ...]:
    """The rules of a LayerNorm, or of one per layer if ``layers`` is not 0."""
    return (
        Rule(f"{leaf}/scale", f"{tensor}.weight", "same", layers),
        Rule(f"{leaf}/bias", f"{tensor}.bias", "same", layers),
    )


Part = Literal["decoder", "vision", "model"]
"""What a directory contains: a language model, an image tower, or a multimodal model."""


@dataclasses.dataclass(frozen=True)
class Names:
    """Tensor names of the parts of a multimodal model.

    Attributes:
      decoder: prefix of the names of transformers' language model, such as "language_model.".
      vision: prefix of the names of transformers' SiglipVisionModel, such as "vision_tower.".
      projector: names of the projector's two linear layers.
      newline: name of the newline embedding.
    """

    decoder: str
    vision: str
    projector: tuple[str, str]
    newline: str


@dataclasses.dataclass(frozen=True)
class Original:
    """A class of transformers that loads a multimodal model, and dotted attribute paths of its parts.

    Attributes:
      name: name of the class.
      layers: path of the language model's layers.
      tower: path of the image tower, a SiglipVisionModel.
      feature_layer: path of the index into the tower's hidden states that the projector reads.
      projector: path of the projector.
      newline: path of the newline embedding.
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
      read_config: reads the checkpoint's ``config.json``; raises a UserError for unsupported values.
      rules: rules for every parameter of the part.
      write_config: the inverse of ``read_config``, for a part that was not converted from a checkpoint. A
        multimodal model without a source is written as two parts, so it has none.
      aliases: other (``model_type``, class in ``architectures``) pairs that this conversion handles.
      writes: whether a config of the part without a source is written as this ``model_type``.
      names: tensor names of a multimodal model.
      tower_elsewhere: True for a multimodal model whose ``config.json`` only names its tower. ``read_config``
        then takes the tower's VisionConfig (None: not known) as a second argument, and the file may lack the
        tower.
      remarks: sentences about values of ``config.json`` that the original code ignores.
      canonical: removes the prefixes that differ between versions of transformers from a tensor's name.
      unused: whether the tensor of a canonical name belongs to the model but is not used here; such tensors
        are kept beside the parameters and written back.
      left_out: pattern of canonical names -> why such tensors are not converted at all.
      own_config: config.json of the part alone, if the checkpoint's describes more than the part.
      implied: tensor that tied models may repeat -> the tensor that it must equal.
      defaults: tensors that transformers requires but that are not used here, for a model without a source.
      original: the class of transformers that loads a multimodal model; None: there is none, and the original
        is assembled from its parts for comparison.
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
    """Reads a ``config.json`` field by field, strictly; ``where`` is its name in error messages."""

    def __init__(self, config: Json, where: str) -> None:
        self._config, self.where = config, where

    @overload
    def get(self, name: str, kind: type[_T]) -> _T: ...

    @overload
    def get(self, name: str, kind: type[_T], default: _T) -> _T: ...

    def get(self, name: str, kind: type, default: object = dataclasses.MISSING) -> object:
        """The value of ``name``, or ``default``; None counts as absent.

        Raises:
          UserError: the field is absent and has no default, or is not of type ``kind``.
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
          name: name of the field.
          *allowed: supported values; the first is the default of an absent field.
          required: refuse an absent field too, because its default is a different value.
        """
        value = self._config.get(name, None if required else allowed[0])
        if value not in allowed:
            raise UserError(
                f"{self.where} has {name}={value!r}, which is not supported; only "
                f"{' or '.join(map(repr, allowed))} is."
            )
