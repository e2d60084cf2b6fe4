"""The base class of every weight format: numerics, and nothing of files or hosts."""

from __future__ import annotations

import abc
import functools
import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hijack.errors import HijackError, SchemeError, ShapeError
from hijack.options import Option
from hijack.text import did_you_mean

if TYPE_CHECKING:
    from hijack.claim import Claim
    from hijack.formats.dialect import Dialect
    from hijack.kernels import Choice, KernelTable
    from hijack.quantized import QuantizedTensor, WeightView
    from hijack.safetensors_io.header import Header

#: What `Scheme.quantize` gives: quantized data and the tensors to decode it with.
Quantized = tuple[Tensor, dict[str, Tensor]]


class Scheme(abc.ABC):
    """How one weight format works.

    A subclass gives ``name``, ``quantize`` and ``dequantize``; everything else has a
    default that follows from those two. A scheme holds no per-layer state: options are
    arguments of ``quantize``, and whatever ``dequantize`` needs is in the tensors.

    Attributes:
        name: unique among registered schemes; letters, digits and underscores.
        targets: module types whose ``weight`` this scheme may quantize.
        options: the scheme's options; None reads them off the keyword arguments of
            ``quantize``.
        dialects: spellings of the scheme in files; the first one is written by default.
        native: the dialect whose keys are the scheme's own names; None is hijack's.
        claims_unmarked: whether layers of a file that nothing marks are claimed when
            their names, dtypes and shapes are those that ``quantize`` gives. Off by
            default, because formats look alike.
        refuses_non_finite: whether `quantize` raises NonFiniteError itself for a weight
            with inf or NaN, also one that is inf as float32. Nobody looks for them then
            before it is called, which is one pass over the weight.
        is_default: whether it quantizes where nobody names a scheme.
        kernels: what its forward of a Linear chooses from, for reports; None if it has
            one way to compute.
        origin: where the scheme was registered from; set by the registry.
    """

    name: ClassVar[str]
    targets: tuple[type[nn.Module], ...] = (nn.Linear,)
    options: tuple[Option, ...] | None = None
    dialects: tuple[Dialect, ...] = ()
    native: Dialect | None = None
    claims_unmarked: bool = False
    refuses_non_finite: bool = False
    is_default: bool = False
    kernels: KernelTable | None = None
    origin: str = ""

    @abc.abstractmethod
    def quantize(
        self, weight: Tensor, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Turn a dense weight into quantized data and the tensors to decode it with.

        Args:
            weight: (N, ...) floating point, any device; may be a meta tensor, of which
                only shapes and dtypes are asked.
            **options: the scheme's own, such as ``block_size``.

        Returns:
            ``(qdata, params)``: the quantized data, and name to tensor. Names become
            keys beside ``weight`` in state dicts and files.
        """

    @abc.abstractmethod
    def dequantize(
        self, qdata: Tensor, params: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Turn quantized data back into a dense weight.

        Args:
            qdata: as `quantize` gave it.
            params: as `quantize` gave them; every scale multiplies.
            dtype: dtype of the result.

        Returns:
            A tensor of the weight's original shape, on ``qdata``'s device.
        """

    # -- what a scheme may say of itself -----------------------------------------------

    @property
    def summary(self) -> str:
        """What it is, in a line: the first of the docstring of its class."""
        return (inspect.getdoc(type(self)) or "").partition("\n")[0]

    def declared_options(self) -> tuple[Option, ...]:
        """The options of `quantize`, for files, command line, nodes and messages."""
        if self.options is not None:
            return self.options
        return _options_in_signature(type(self))

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options the scheme does not have, and values out of range.

        Raises:
            SchemeError: naming the options there are.
        """
        declared = {option.name: option for option in self.declared_options()}
        for name, value in options.items():
            if name in declared:
                declared[name].check(value, self.name)
            elif not _takes_any_option(type(self)):
                known = ", ".join(declared) or "none"
                raise SchemeError(
                    f"{self.name}: has no option {name!r}; expected options among "
                    f"{known}{did_you_mean(name, declared)}"
                )

    def declines(self, shape: tuple[int, ...], **options: Any) -> str | None:
        """Say why a weight cannot or should not be quantized, or None.

        `wrap_model`, `building`, `quantize_file` and hosts leave such a layer dense and
        report the reason.

        Args:
            shape: (N, ...) of the dense weight.
            **options: as for `quantize`.
        """
        return None

    def row_step(self, shape: tuple[int, ...], **options: Any) -> int | None:
        """How many rows of a weight can be quantized without the others, or None.

        Answer a number n if `quantize` of the rows from one multiple of n to another,
        or to the end, gives bit for bit the rows of what it gives for the whole weight:
        of the quantized data, and of every parameter with elements, which all are cut
        along their first dimension. `quantize_file` then needs little memory for a
        large layer, and uses all cores for it. None, as here, has weights quantized
        whole: where they have one scale, or rounding draws random numbers.

        Args:
            shape: (N, ...) of the dense weight.
            **options: as for `quantize`.
        """
        return None

    def bind_forward(self, module: nn.Module) -> Callable[..., Tensor] | None:
        """Choose a forward for a module that becomes quantized.

        Called once per module, in every host. Return a plain function
        ``forward(module, input, weight, bias)``, the same object for every module that
        can share it; ``weight`` is a `QuantizedTensor`. None takes the default, which
        computes with ``weight.dense(input.dtype)``. A module whose class has a forward
        of its own runs that one, and is not asked for.
        """
        return None

    def explain_forward(
        self, weight: QuantizedTensor | WeightView, dtype: torch.dtype, rows: int
    ) -> Choice | None:
        """Say what would compute a Linear now, and why nothing faster; for reports.

        Args:
            weight: of the layer, where it is computed with.
            dtype: of the input.
            rows: of the input.

        Returns:
            None if the forward that `bind_forward` returns has one way to compute.
        """
        return None

    # -- defaults a scheme may replace -------------------------------------------------

    def create_params(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        /,  # a scheme may have options of these names
        **options: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Make zeroed ``(qdata, params)`` for a weight that does not exist yet.

        The default runs `quantize` on a meta tensor, so no dense weight is allocated.

        Args:
            shape: shape of the dense weight.
            dtype: floating dtype of the dense weight.
            device: where the result is allocated; None is torch's default device.
            **options: as for `quantize`.

        Raises:
            SchemeError: if `quantize` needs real data; the scheme must then override
                this method.
        """
        self.check_options(options)
        try:
            dense = torch.empty(shape, dtype=dtype, device="meta")
            qdata, params = self.quantize(dense, **options)
        except HijackError:
            raise
        except Exception as error:
            raise SchemeError(
                f"{self.name}: quantize cannot run on a meta tensor of shape "
                f"{tuple(shape)} ({type(error).__name__}: {error}); override "
                "create_params to say which tensors the layer has"
            ) from error
        device = torch.empty(0).device if device is None else torch.device(device)
        if device.type == "meta":  # zeros there cost torch seconds of imports
            return qdata, params
        return (
            torch.zeros_like(qdata, device=device),
            {name: torch.zeros_like(t, device=device) for name, t in params.items()},
        )

    def dense_shape(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> tuple[int, ...]:
        """Shape of the weight that quantized tensors decode to.

        Asked where nothing else tells, such as when a file is opened. The default
        decodes once without data, which is slow; a scheme whose quantized data has the
        weight's shape returns ``tuple(qdata.shape)``.

        Args:
            qdata: the quantized data; may be on the meta device.
            params: the scheme's other tensors.
        """
        try:
            metas = {name: tensor.to("meta") for name, tensor in params.items()}
            dense = self.dequantize(qdata.to("meta"), metas, torch.float32)
        except Exception:  # it must see its data
            if qdata.is_meta:
                raise
            dense = self.dequantize(qdata, params, torch.float32)
        return tuple(dense.shape)

    def dequantize_weight(
        self, weight: QuantizedTensor | WeightView, dtype: torch.dtype
    ) -> Tensor:
        """Decode one layer, of which the dense shape and the options are known.

        The default runs `dequantize` and, where the format pads or flattens, brings the
        result into the weight's shape. A scheme that needs shape or options to decode
        overrides this method.

        Args:
            weight: has ``qdata``, ``params``, ``shape`` and ``options``.
            dtype: dtype of the result.

        Returns:
            A tensor of ``weight.shape``.

        Raises:
            ShapeError: if the result has fewer elements than the weight.
        """
        dense = self.dequantize(weight.qdata, weight.params, dtype)
        if dense.shape == weight.shape:
            return dense
        if dense.numel() == weight.numel():
            return dense.reshape(weight.shape)
        if may_be_cut(dense.shape, weight.shape):
            return dense[tuple(slice(size) for size in weight.shape)]
        raise ShapeError(
            f"{self.name}: dequantize gave a weight of shape {tuple(dense.shape)}, "
            f"expected {tuple(weight.shape)} or one padded from it"
        )

    def requantize(
        self,
        weight: Tensor,
        old: QuantizedTensor,
        *,
        seed: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize a changed weight the way a layer was quantized before.

        Args:
            weight: (N, ...) dense, of any floating dtype.
            old: the layer as it was, with its ``options``.
            seed: other than 0 asks for stochastic rounding from this seed, where the
                scheme has it; the default rounds as `quantize` does.
        """
        return self.quantize(weight, **old.options)

    def options_of(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Any]:
        """Options that quantize a weight to tensors like these, as far as they tell.

        Args:
            qdata: the quantized data; may be on the meta device.
            params: the scheme's other tensors.
        """
        return {}

    def options_like(self, dtype: torch.dtype) -> dict[str, Any] | None:
        """Options that give any weight the parameters of one of a certain dtype.

        A weight with a LoRA in it is float32; its file shall hold what it would hold
        without. None, the default, has such weights cast to that dtype first.

        Args:
            dtype: floating dtype of the weight in the source.
        """
        return None

    def validate(self, qdata: Tensor, params: Mapping[str, Tensor], where: str) -> None:
        """Refuse tensors of a file that do not fit each other.

        Args:
            qdata: the quantized data.
            params: the scheme's other tensors.
            where: the layer, for messages.

        Raises:
            HijackError: of a fitting kind. The default accepts everything.
        """
        return None

    def block_size(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> tuple[int, int] | None:
        """The (rows, cols) of the weight that share a scale; None if there are none.

        Args:
            qdata: the quantized data; may be on the meta device.
            params: the scheme's other tensors.
        """
        return None

    def reblock(
        self,
        qdata: Tensor,
        params: Mapping[str, Tensor],
        block_size: tuple[int, int],
    ) -> dict[str, Tensor] | None:
        """The parameters of the same quantized data in blocks of another size.

        `convert_file` asks when a dialect cannot spell the blocks there are. The
        default knows no other blocks.

        Args:
            qdata: the quantized data.
            params: the scheme's other tensors.
            block_size: (rows, cols) asked for.

        Returns:
            Parameters that decode to the same weight bit for bit, or None.
        """
        return None

    def params_of_part(
        self,
        params: Mapping[str, Tensor],
        shape: tuple[int, ...],
        part: tuple[slice, ...],
    ) -> dict[str, Tensor] | None:
        """The parameters that decode a part of the quantized data by itself.

        Tensor parallelism asks, which leaves each process a part of every weight; it
        cuts the quantized data as it would cut the dense weight.

        Args:
            params: of the whole weight.
            shape: of the whole weight.
            part: first and last element in each dimension.

        Returns:
            Parameters of the part; None, as here, if parts cannot be decoded alone.
        """
        return None

    def match(self, header: Header) -> Iterable[Claim] | None:
        """Claim the layers of a checkpoint that this scheme can read.

        None, as here, leaves it to the dialects. Of a layer that may be read in several
        ways, all of which are guesses, every one is claimed.
        """
        return None

    def likeness(self, header: Header, layer: str) -> Hashable | None:
        """All that the claims to a layer depend on, but for its name.

        Layers with equal answers are recognised once, which makes large files fast.
        None, as here, has every layer recognised for itself.
        """
        return None

    def is_like(self, other: Scheme) -> bool:
        """Whether another instance decodes as this one does.

        The default holds class, name and attributes against each other.
        """
        mine, theirs = ({**vars(s), "origin": ""} for s in (self, other))
        try:
            same = bool(mine == theirs)
        except (RuntimeError, ValueError):  # tensors and arrays do not compare so
            return self is other
        return same and type(self) is type(other) and self.name == other.name

    def __deepcopy__(self, memo: object) -> Scheme:
        return self

    def __repr__(self) -> str:
        return f"<scheme {self.name}>"


@functools.cache
def _options_in_signature(kind: type[Scheme]) -> tuple[Option, ...]:
    """The named arguments of ``quantize`` after the weight, as options."""
    parameters = list(inspect.signature(kind.quantize).parameters.values())[2:]
    return tuple(
        Option.from_default(
            p.name, None if p.default is inspect.Parameter.empty else p.default
        )
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    )


@functools.cache
def _takes_any_option(kind: type[Scheme]) -> bool:
    """Whether ``quantize`` has ``**options``, which takes whatever is given."""
    parameters = inspect.signature(kind.quantize).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


# -- what a scheme or a plugin gave ----------------------------------------------------


def checked(quantized: Any, where: str) -> Quantized:
    """Refuse what is not ``(Tensor, {str: Tensor})``, before it is in a module.

    Args:
        quantized: what a scheme or plugin gave.
        where: who gave it, for the message.

    Raises:
        SchemeError: saying what was given.
    """
    good = (
        isinstance(quantized, tuple)
        and len(quantized) == 2
        and isinstance(quantized[0], Tensor)
        and isinstance(quantized[1], Mapping)
        and all(
            isinstance(name, str) and name not in ("", "weight") and name[0] != "."
            for name in quantized[1]
        )
        and all(isinstance(tensor, Tensor) for tensor in quantized[1].values())
    )
    if not good:
        raise SchemeError(
            f"{where} gave {type(quantized).__name__}, expected "
            "(tensor, {name: tensor}) with names other than weight"
        )
    qdata, params = quantized
    return qdata.detach(), {name: t.detach() for name, t in params.items()}


def may_be_cut(shape: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether what decodes to one shape can be brought into another.

    Args:
        shape: of what `Scheme.dequantize` gives; flat or padded, or as expected.
        expected: of the weight.
    """
    if math.prod(shape) == math.prod(expected):
        return True
    return len(shape) == len(expected) and all(
        has >= needs for has, needs in zip(shape, expected, strict=True)
    )
