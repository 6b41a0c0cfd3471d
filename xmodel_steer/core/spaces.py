"""Sites in a model, and the vector spaces at these sites."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import TYPE_CHECKING, Any

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.errors import SpaceMismatchError

STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True, order=True)
class Site:
    """A place in a model: a stream of one block.

    Args:
        layer: Block index, counted from 0.
        stream: One of ``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out``, ``mlp_out``.

    Raises:
        TypeError: The layer is not a whole number.
        ValueError: The layer is negative or the stream is not one of these.

    Example:
        >>> Site(10).hook_name
        'blocks.10.hook_resid_post'
    """

    layer: int
    stream: str = "resid_post"

    def __post_init__(self) -> None:
        require_type("Site.layer", Integral, self.layer, takes="a block's index such as 10")
        if self.layer < 0:
            raise ValueError(
                f"Site: layer counts blocks from 0, got {self.layer}; name the last block by its own index"
            )
        if self.stream not in STREAMS:
            raise ValueError(f"Site: stream must be one of {', '.join(STREAMS)}; got {self.stream!r}")

    @property
    def hook_name(self) -> str:
        """TransformerLens' name of the hook point."""
        return f"blocks.{self.layer}.hook_{self.stream}"

    def __str__(self) -> str:
        return f"{self.stream}[{self.layer}]"


if TYPE_CHECKING:
    SiteLike = Site | int
    Sites = SiteLike | Sequence[SiteLike]
else:
    SiteLike = Sites = Any  # `as_sites` refuses other values with its own message


def as_site(value: SiteLike) -> Site:
    """Make a site from a site or a layer's number: 10 is ``Site(10)``.

    Raises:
        TypeError: The value is neither.
    """
    if isinstance(value, Site):
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return Site(int(value))
    raise TypeError(f"sites takes Site or int, such as 10 or xs.Site(10), got {value!r}")


def as_sites(values: Sites) -> tuple[Site, ...]:
    """Make sites from one site or layer, or from several.

    Raises:
        TypeError: A value is neither a site nor a number.
    """
    several = isinstance(values, Iterable) and not isinstance(values, str)
    return tuple(map(as_site, values if several else [values]))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Space:
    """The vector space of one site of one model.

    Two spaces are equal when weights, site, width and processing are equal. The model's name is a
    label and is not compared.

    Args:
        model: Name of the model, for messages and results.
        site: The place in the model.
        width: Number of dimensions.
        fingerprint: Short hash of the model's weights.
        processing: Changes of the weights that change residual coordinates (``"none"``,
            ``"fold_ln"``, ``"center_writing_weights"``, ``"compatibility_mode"``, joined by ``+``).
    """

    model: str = field(compare=False)
    site: Site
    width: int
    fingerprint: str
    processing: str = "none"

    def __post_init__(self) -> None:
        require_type("Space.site", Site, self.site)
        require_type("Space.width", Integral, self.width, takes="a number of dimensions")
        require_type("Space: model, fingerprint and processing", str, self.model, self.fingerprint, self.processing)
        if self.width < 1:
            raise ValueError(f"Space: width counts dimensions, got {self.width}")

    def __str__(self) -> str:
        processed = "" if self.processing == "none" else f", {self.processing}"
        return f"{self.model} {self.site} (width {self.width}{processed}, weights {self.fingerprint})"

    def to_dict(self) -> dict[str, object]:
        """Return the fields as JSON values, which `from_dict` reads."""
        return {
            "model": self.model,
            "layer": self.site.layer,
            "stream": self.site.stream,
            "width": self.width,
            "fingerprint": self.fingerprint,
            "processing": self.processing,
        }

    @classmethod
    def from_dict(cls, record: dict) -> "Space":
        """Make a space from the fields that `to_dict` returned."""
        site = Site(record["layer"], record["stream"])
        return cls(record["model"], site, record["width"], record["fingerprint"], record["processing"])


def arrow(source: Space, target: Space) -> str:
    """Name the models and sites of both ends of a map."""
    return f"{source.model} {source.site} → {target.model} {target.site}"


def require_same_space(required: Space, given: Space, what: str) -> None:
    """Refuse a tensor of another space.

    Args:
        required: The operation's space.
        given: The tensor's space.
        what: The operation, for the message.

    Raises:
        SpaceMismatchError: The spaces differ.
    """
    if required != given:
        raise SpaceMismatchError(
            f"{what}: needs {required}, got {given}. "
            "A vector of one model or layer means nothing in another: carry it over with "
            "a map (mapping.transport(vector)), or load the model it was made in."
        )
