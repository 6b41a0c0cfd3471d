"""Sites in a model, and the vector spaces at these sites."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

from xmodel_steer.core.arguments import require_type
from xmodel_steer.core.errors import SpaceMismatchError

STREAMS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")


@dataclass(frozen=True, order=True)
class Site:
    """A place in a model: a stream of one block.

    Args:
        layer: Block index, counted from 0.
        stream: One of ``resid_pre``, ``resid_mid``, ``resid_post``, ``attn_out``, ``mlp_out``; or ``z``, the outputs of
            the attention heads before the output projection, joined: head h has dimensions h · d_head and following.

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
    def members(self) -> tuple["Site", ...]:
        """The site alone; a `Stack` has several."""
        return (self,)

    @property
    def key(self) -> str:
        """The site's name within a file."""
        return f"{self.layer}.{self.stream}"

    @property
    def hook_name(self) -> str:
        """TransformerLens' name of the hook point."""
        return f"blocks.{self.layer}.{'attn.' if self.stream == 'z' else ''}hook_{self.stream}"

    def __str__(self) -> str:
        return f"{self.stream}[{self.layer}]"


@dataclass(frozen=True, init=False)
class Stack(Site):
    """Several sites of one model, read as one space: their activations joined, the shallowest site first.

    A direction is worked out over several blocks. A map that reads them together carries more of it than a map from
    one. Every function that reads activations takes a stack; ``layer`` is its deepest.

    Args:
        sites: Sites or layers, two or more.

    Raises:
        TypeError: A value is neither a site nor a number.
        ValueError: There are fewer than two sites, or ``z`` and another stream.

    Example:
        >>> str(Stack([18, 9]))
        'resid_post[9+18]'
    """

    sites: tuple[Site, ...]

    def __init__(self, sites: "Sequence[Site | int]") -> None:
        members = tuple(sorted({member for site in sites for member in as_site(site).members}))
        if len(members) < 2:
            raise ValueError(f"Stack: joins two sites or more, got {', '.join(map(str, members)) or 'none'}")
        if len({site.stream == "z" for site in members}) > 1:
            raise ValueError("Stack: z has another width than the residual stream; join it with z of other layers")
        object.__setattr__(self, "sites", members)
        object.__setattr__(self, "layer", members[-1].layer)
        object.__setattr__(self, "stream", "+".join(dict.fromkeys(site.stream for site in members)))

    @property
    def members(self) -> tuple[Site, ...]:
        """The sites."""
        return self.sites

    @property
    def key(self) -> str:
        """The stack's name within a file."""
        return "+".join(site.key for site in self.sites)

    @property
    def hook_name(self) -> str:
        """TransformerLens' names of the hook points, joined."""
        return "+".join(site.hook_name for site in self.sites)

    def __repr__(self) -> str:
        return f"Stack({[site.layer if site.stream == 'resid_post' else site for site in self.sites]})"

    def __str__(self) -> str:
        if "+" in self.stream:
            return "+".join(map(str, self.sites))
        return f"{self.stream}[{'+'.join(str(site.layer) for site in self.sites)}]"


if TYPE_CHECKING:
    SiteLike = Site | int | Sequence[Site | int]
    Sites = Site | int | Sequence[SiteLike]
else:
    SiteLike = Sites = Any  # `as_sites` refuses other values with its own message


def as_site(value: SiteLike) -> Site:
    """Make a site of a site, of a layer's number, or of several.

    10 is ``Site(10)``, and [10, 14] is ``Stack([10, 14])``.

    Raises:
        TypeError: The value is none of these.
    """
    if isinstance(value, Site):
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return Site(int(value))
    if isinstance(value, list | tuple | range):
        return Stack(value)
    raise TypeError(f"sites takes Site or int, such as 10 or xs.Site(10), got {value!r}")


def as_sites(values: Sites) -> tuple[Site, ...]:
    """Make sites from one site or layer, or from several.

    A list within the list is a `Stack`.

    Raises:
        TypeError: A value is no site.
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
        site: The place in the model; of a `Stack`, the space joins those of its members.
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
        if self.width % len(self.site.members):
            raise ValueError(f"Space: {len(self.site.members)} sites of one model cannot join to width {self.width}")

    @property
    def members(self) -> "dict[Space, slice]":
        """The space of each member of a stack, with its dimensions; of a plain site, the space itself."""
        width = self.width // len(self.site.members)
        parts = enumerate(self.site.members)
        return {replace(self, site=site, width=width): slice(i * width, (i + 1) * width) for i, site in parts}

    def __str__(self) -> str:
        processed = "" if self.processing == "none" else f", {self.processing}"
        return f"{self.model} {self.site} (width {self.width}{processed}, weights {self.fingerprint})"

    def to_dict(self) -> dict[str, object]:
        """Return the fields as JSON values, which `from_dict` reads."""
        return {
            "model": self.model,
            "layer": self.site.layer,
            "stream": self.site.stream,
            **(
                {"stack": [[site.layer, site.stream] for site in self.site.members]}
                if isinstance(self.site, Stack)
                else {}
            ),
            "width": self.width,
            "fingerprint": self.fingerprint,
            "processing": self.processing,
        }

    @classmethod
    def from_dict(cls, record: dict) -> "Space":
        """Make a space from the fields that `to_dict` returned."""
        stack = record.get("stack")
        site = Stack([Site(*member) for member in stack]) if stack else Site(record["layer"], record["stream"])
        return cls(record["model"], site, record["width"], record["fingerprint"], record["processing"])


def stacked(site: Site, members: Sequence[Space]) -> Space:
    """Return the space that joins those of a site's members."""
    return replace(members[0], site=site, width=sum(space.width for space in members))


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
