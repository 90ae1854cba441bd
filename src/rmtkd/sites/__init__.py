"""Sites: the widths of a network that may be narrowed, as data.

A *site* names the parameters that write a width, those that read it, where its activations are seen, and the *kind*
of algebra that the network allows there:

| kind | what lies between writer and reader | exact | cut |
|---|---|---|---|
| `linear` | nothing, or a map that acts on other axes | any change of basis | best low rank for the reader |
| `pointwise` | a pointwise non-linearity, gated or not | permutation, scaling | units; least squares into the reader |
| `bilinear` | two streams meet in a scalar product | paired change of basis | best low rank of the product |
| `heads` | as `linear`, and whole heads are the units | permutation | whole heads; least squares into the reader |

Sites that must keep one common width (query/key and value/output of a layer, so that the stock forward and the fused
attention kernel survive) carry the same `shares`.

`find_sites` knows the sites of the families' models; `parts` has the functions that describe those of any other.
"""

from rmtkd.sites.parts import attention_sites, embedding_site, embedding_sites, feed_forward_site, linear_site
from rmtkd.sites.search import (
    check_parameters,
    check_sites,
    encoder_of,
    explore,
    find_family,
    find_image_family,
    find_sites,
    is_known,
    layer_paths,
    longest_input,
    random_images,
    search,
)
from rmtkd.sites.site import (
    Absent,
    Attribute,
    Axis,
    Kind,
    Quantity,
    Site,
    Stream,
    after_cuts,
    blocks_of,
    by_width,
    share_settings,
)
from rmtkd.sites.tracing import Traced, frozen_norms, trace_sites

__all__ = [
    "Absent",
    "Attribute",
    "Axis",
    "Kind",
    "Quantity",
    "Site",
    "Stream",
    "Traced",
    "after_cuts",
    "attention_sites",
    "blocks_of",
    "by_width",
    "check_parameters",
    "check_sites",
    "embedding_site",
    "embedding_sites",
    "encoder_of",
    "explore",
    "feed_forward_site",
    "find_family",
    "find_image_family",
    "find_sites",
    "frozen_norms",
    "is_known",
    "layer_paths",
    "linear_site",
    "longest_input",
    "random_images",
    "search",
    "share_settings",
    "trace_sites",
]
