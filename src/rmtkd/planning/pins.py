"""Widths that are the user's: `exclude` keeps a site whole, `keep` gives it a number. Planning leaves them alone.

And `uniform`, which leaves to planning only what a stock configuration can say.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from rmtkd.errors import OptionError, PlanError
from rmtkd.planning.review import nearest
from rmtkd.sites import Site, by_width, share_settings


def parse_keep(words: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Read `SITE=WIDTH`, several times.

    Raises:
        OptionError: naming everything that is not of this form.
    """
    pairs, wrong = [], []
    for word in words:
        name, _, width = word.rpartition("=")
        if name.strip() and width.strip().isdecimal():
            pairs.append((name.strip(), int(width)))
        else:
            wrong.append(repr(word))
    if wrong:
        raise OptionError(f"--keep must be SITE=WIDTH, such as layer.3.ffn=160. Got {', '.join(wrong)}.")
    return tuple(pairs)


def uniform_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites with one width for all that one entry of a stock configuration gives, named after the entry.

    Raises:
        OptionError: if no site has such an entry.
        PlanError: if sites of one entry are unequally wide.
    """
    names = [site.name for site in sites]
    if all(site.setting is None for site in sites):
        raise OptionError(
            "with --uniform an entry of a stock configuration must give the width of some site. None of "
            f"{', '.join(names[:8])}{', …' * (len(names) > 8)} has such an entry. Leave --uniform out; nothing was "
            "changed."
        )
    shared = share_settings(sites)
    for setting, group in by_width(shared).items():
        if len({site.width for site in group}) > 1:
            raise PlanError(
                f"with --uniform all layers must have one {setting} to begin with. Got "
                f"{', '.join(f'{site.width} in {site.name}' for site in group)}. Begin with a model that was not "
                "narrowed layer by layer before, or leave --uniform out; nothing was changed."
            )
    return shared


def fixed_widths(
    sites: Sequence[Site], exclude: Iterable[str], keep: Iterable[tuple[str, int]], *, uniform: bool = False
) -> dict[str, int]:
    """What `exclude`, `keep` and `uniform` ask for, by name of the shared width.

    Args:
        sites: the sites of the model.
        exclude: names of sites or of shared widths, or shell-style patterns such as `layer.*.ffn`.
        keep: the same with a width each.
        uniform: whether sites stay whole whose width no entry of a stock configuration gives.

    Raises:
        PlanError: naming at once all names that no site has, widths out of range, and sites that were given two widths.
    """
    problems: list[str] = []
    asked: dict[str, dict[int, str]] = {}
    for pattern, width in (*((pattern, None) for pattern in exclude), *keep):
        option = f"--exclude {pattern}" if width is None else f"--keep {pattern}={width}"
        matched = [site for site in sites if any(fnmatchcase(name, pattern) for name in (site.name, site.shares))]
        if not matched:
            names = dict.fromkeys(name for site in sites for name in (site.name, site.shares))
            problems.append(f"{option}: some site must have this name. None has.{nearest(pattern, names)}")
        for site in matched:
            kept = site.width if width is None else width
            if uniform and site.setting is None and kept != site.width:
                problems.append(f"{option}: with --uniform {site.name} must keep {site.width}. Got {kept}.")
            elif site.least <= kept <= site.width:
                asked.setdefault(site.shares, {}).setdefault(kept, option)
            else:
                problems.append(f"{option}: {site.name} must keep from {site.least} to {site.width}. Got {kept}.")
    for shares, widths in asked.items():
        if len(widths) > 1:
            given = " and ".join(f"{width} ({option})" for width, option in widths.items())
            problems.append(f"{shares}: there must be one width for all sites that share it. Got {given}.")
    if problems:
        raise PlanError(
            "\n".join(("widths that are asked for must be possible:", *problems)) + "\nNothing was changed."
        )
    whole = {site.shares: site.width for site in sites if uniform and site.setting is None}
    return whole | {shares: width for shares, (width,) in asked.items()}
