"""The base class of every weight format."""

from __future__ import annotations

import abc
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from hijack.errors import CheckpointError, HijackError, SchemeError
from hijack.formats.claim import Certainty, Claim
from hijack.formats.dialect import Dialect
from hijack.hooks import hookimpl
from hijack.safetensors_io.header import Header, TensorInfo, join

if TYPE_CHECKING:
    from hijack.registry import Registry

NATIVE = Dialect()


class Scheme(abc.ABC):
    """How one weight format works.

    A subclass gives ``name``, ``quantize`` and ``dequantize``; everything else has a
    default that follows from those two. A scheme holds no per-layer state: options are
    arguments of ``quantize``, and whatever ``dequantize`` needs is in the tensors.

    Attributes:
        name: unique among registered schemes; letters, digits and underscores.
        targets: module types whose ``weight`` this scheme may quantize.
        dialects: spellings of the scheme in files; the first one is written by default.
        native: the dialect whose keys are the scheme's own names.
        origin: where the scheme was registered from; set by the registry.
    """

    name: ClassVar[str]
    targets: tuple[type[nn.Module], ...] = (nn.Linear,)
    dialects: tuple[Dialect, ...] = ()
    native: Dialect = NATIVE
    origin: str = ""

    @abc.abstractmethod
    def quantize(
        self, weight: Tensor, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Turn a dense weight into codes and the tensors to decode them with.

        Args:
            weight: (N, ...) floating point, any device; may be a meta tensor, of which
                only shapes and dtypes are asked.
            **options: the scheme's own, such as ``block_size``.

        Returns:
            ``(qdata, params)``: the codes, and name to tensor. Names become buffers
            beside ``weight`` and keys in files.
        """

    @abc.abstractmethod
    def dequantize(
        self, qdata: Tensor, params: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Turn codes back into a dense weight.

        Args:
            qdata: as `quantize` gave it.
            params: as `quantize` gave them; every scale multiplies.
            dtype: dtype of the result.

        Returns:
            A tensor of the weight's original shape, on ``qdata``'s device.
        """

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
        try:
            dense = torch.empty(shape, dtype=dtype, device="meta")
            qdata, params = self.quantize(dense, **options)
        except HijackError:
            raise
        except Exception as error:
            self._check_options(options)
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

    def _check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse options that `quantize` does not have."""
        signature = inspect.signature(self.quantize)
        try:
            signature.bind(None, **options)
        except TypeError as error:
            known = ", ".join(list(signature.parameters)[1:]) or "none"
            raise SchemeError(
                f"{self.name}: quantize {error}; expected options among {known}"
            ) from error

    def validate(self, qdata: Tensor, params: Mapping[str, Tensor], where: str) -> None:
        """Refuse tensors of a file that do not fit each other.

        Args:
            qdata: the codes.
            params: the scheme's other tensors.
            where: the layer, for messages.

        Raises:
            HijackError: of a fitting kind. The default accepts everything.
        """
        return None

    def options_like(self, dtype: torch.dtype) -> dict[str, Any] | None:
        """Options that give any weight the parameters of one of a certain dtype.

        A weight with a LoRA in it is float32; its file shall hold what it would hold
        without. None, the default, has such weights cast to that dtype first.

        Args:
            dtype: floating dtype of the weight in the source.
        """
        return None

    def block_size(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> tuple[int, int] | None:
        """The (rows, cols) of the weight that share a scale; None if there are none.

        Args:
            qdata: the codes; may be on the meta device.
            params: the scheme's other tensors.
        """
        return None

    def reblock(
        self,
        qdata: Tensor,
        params: Mapping[str, Tensor],
        block_size: tuple[int, int],
    ) -> dict[str, Tensor] | None:
        """The parameters of the same codes in blocks of another size.

        `convert_file` asks when a dialect cannot spell the blocks there are. The
        default knows no other blocks.

        Args:
            qdata: the codes.
            params: the scheme's other tensors.
            block_size: (rows, cols) asked for.

        Returns:
            Parameters that decode to the same weight bit for bit, or None.
        """
        return None

    def bind_forward(self, module: nn.Module) -> Callable[..., Tensor] | None:
        """Choose a forward for a module that is being wrapped.

        Called once per module. Return a plain function whose first argument is the
        module, the same object for every module that can share it; None takes the
        default, which dequantizes and runs the module's own forward.
        """
        return None

    def match(self, header: Header) -> Iterable[Claim]:
        """Claim the layers of a checkpoint that this scheme can read.

        Of a layer that may be read in several ways, all of which are guesses, every
        one is claimed.
        """
        named = {d: dict.fromkeys(d.layers(header)) for d in self.all_dialects()}
        known: dict[Hashable, list[Callable[[str], Claim]]] = {}
        for layer in dict.fromkeys(itertools.chain.from_iterable(named.values())):
            kind = self.likeness(header, layer)
            if kind in known:
                for same in known[kind]:
                    yield same(layer)
                continue
            asked = [dialect for dialect in named if layer in named[dialect]]
            claims = self._best_claims(header, layer, asked)
            if kind is not None and all(_is_general(claim) for claim in claims):
                known[kind] = [claim.namesake() for claim in claims]
            yield from claims

    def likeness(self, header: Header, layer: str) -> Hashable | None:
        """All that the claims to a layer depend on, but for its name.

        Layers with equal answers are recognised once, which makes large files fast.
        None, as here, has every layer recognised for itself.
        """
        return None

    # -- services ----------------------------------------------------------------------

    def recognise(self, header: Header, layer: str) -> Claim | None:
        """The best founded claim of any of the scheme's dialects to one layer.

        A layer that can only be guessed at is not claimed.
        """
        claims = self._best_claims(header, layer, self.all_dialects())
        if not claims or claims[0].certainty is Certainty.GUESS:
            return None
        return claims[0]

    def _best_claims(
        self, header: Header, layer: str, dialects: Iterable[Dialect]
    ) -> list[Claim]:
        """The best founded claim; all there are if they are guesses."""
        claims: list[Claim] = []
        for claim in (c for d in dialects for c in d.readings(self, header, layer)):
            if claim.certainty is Certainty.MARKED:
                return [claim]  # none is better, and the first of equals is taken
            claims.append(claim)
        best = max(claims, key=lambda claim: claim.certainty, default=None)
        guessed = best is not None and best.certainty is Certainty.GUESS
        return claims if guessed or best is None else [best]

    def all_dialects(self) -> tuple[Dialect, ...]:
        """The declared dialects, and the native one last."""
        return (*self.dialects, self.native)

    def dialect(self, name: str | None = None) -> Dialect:
        """The dialect of that name; without a name, the one written by default."""
        known = {dialect.name: dialect for dialect in self.all_dialects()}
        if name is None:
            return next(iter(known.values()))
        if name not in known:
            raise CheckpointError(
                f"{self.name}: unknown dialect {name!r}; "
                f"expected one of {', '.join(sorted(known))}"
            )
        return known[name]

    def written(self, name: str | None = None) -> Dialect:
        """The dialect of that name, to write in; as `dialect`.

        Raises:
            CheckpointError: if there is none, or it is only read.
        """
        able = [one for one in self.all_dialects() if one.writes]
        known = {one.name for one in self.all_dialects()}
        names = ", ".join(sorted(one.name for one in able))
        if name is not None and name not in known:
            raise CheckpointError(
                f"{self.name}: unknown dialect {name!r}; expected one of {names}"
            )
        found = self.dialect(name)
        if not found.writes:
            raise CheckpointError(
                f"dialect {found.name}: is read, and never written; expected one of "
                f"{names}"
            )
        return found

    def written_as(
        self,
        name: str | None,
        qdata: Tensor,
        params: Mapping[str, Tensor],
        options: Mapping[str, Any],
    ) -> Dialect:
        """The dialect of that name if it can spell these tensors, else one that can.

        Others are the one written by default and the native one, which spells all.

        Args:
            name: of the dialect the layer came in, or None.
            qdata: the codes.
            params: the scheme's other tensors.
            options: as for `Dialect.encode`.
        """
        asked: tuple[Dialect, ...] = () if name is None else (self.dialect(name),)
        meta = {key: tensor.to("meta") for key, tensor in params.items()}
        for dialect in (*asked, self.dialect()):
            try:
                dialect.encode(qdata.to("meta"), meta, options)
            except CheckpointError:
                continue
            return dialect
        return self.native

    def decode(
        self, claim: Claim, state_dict: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take a claimed layer's tensors out of a state dict, checked.

        Args:
            claim: a claim of this scheme.
            state_dict: full key to tensor.

        Returns:
            ``(qdata, params)``, views of the state dict's tensors where possible.

        Raises:
            HijackError: if the tensors do not fit each other.
        """
        tensors = {role: state_dict[key] for role, key in claim.keys.items()}
        qdata, params = self.dialect(claim.dialect).decode(claim, tensors)
        self.validate(qdata, params, claim.layer or "weight")
        return qdata, params

    def fitting_params(
        self, header: Header, layer: str, weight: TensorInfo
    ) -> tuple[str, ...] | None:
        """Names of the scheme's parameters if the layer's tensors fit, else None.

        They fit if they have the dtypes and shapes that `quantize` gives by default for
        a dense weight of the stored shape. A format without parameters never fits: any
        plain tensor would.
        """
        asked = (self, weight.shape)  # layers of a model have few shapes
        if asked not in header.memo:
            header.memo[asked] = self._default_params(weight.shape)
        made: dict[str, Tensor] = header.memo[asked]
        if len(made) < 2 or not _same(weight, made["weight"]):
            return None
        for name, tensor in made.items():
            info = header.tensors.get(join(layer, name))
            if info is None or not _same(info, tensor):
                return None
        return tuple(made)[1:]

    def _default_params(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """What a dense weight of a shape would become, on meta; nothing if refused."""
        try:
            qdata, params = self.create_params(shape, torch.float32, "meta")
        except HijackError:
            return {}
        return {"weight": qdata, **params}

    def __deepcopy__(self, memo: object) -> Scheme:
        return self

    def __repr__(self) -> str:
        return f"<scheme {self.name}>"

    # -- a scheme is its own plugin ----------------------------------------------------

    @hookimpl
    def hijack_register_schemes(self, registry: Registry) -> None:
        """A registered scheme has nothing more to register."""
        return None

    @hookimpl
    def hijack_identify(self, header: Header) -> list[Claim]:
        return list(self.match(header))

    @hookimpl
    def hijack_select_scheme(
        self, module: nn.Module, prefix: str, state_dict: Mapping[str, Tensor]
    ) -> Claim | None:
        if not isinstance(module, self.targets):
            return None
        return self.recognise(Header.from_state_dict(state_dict), prefix[:-1])

    @hookimpl
    def hijack_create_params(
        self,
        module: nn.Module,
        scheme: Scheme,
        prefix: str,
        state_dict: Mapping[str, Tensor] | None,
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        if scheme is not self or state_dict is None:
            return None
        claim = self.recognise(Header.from_state_dict(state_dict), prefix[:-1])
        return None if claim is None else self.decode(claim, state_dict)

    @hookimpl
    def hijack_bind_forward(
        self, module: nn.Module, scheme: Scheme
    ) -> Callable[..., Tensor] | None:
        return self.bind_forward(module) if scheme is self else None


def _is_general(claim: Claim) -> bool:
    """Whether nothing but the layer's name is peculiar in a claim."""
    start = f"{claim.layer}." if claim.layer else ""
    own = all(key.startswith(start) for key in claim.keys.values())
    return own and not claim.contradiction  # which names the layer


def _same(info: TensorInfo, tensor: Tensor) -> bool:
    return info.shape == tuple(tensor.shape) and info.torch_dtype == tensor.dtype
