"""What the arguments of a mixer's forward mean, whatever they are called and in whatever order they come.

Projects rename them: the cache of a transformers mixer was ``cache_params`` and is ``cache``. A
call is read by these roles; a call whose arguments are not all understood is left to the mixer's
own forward, which is slow but right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations

# The roles of a transformers mixer's arguments, and how they have been spelled.
INPUT, CACHE, MASK, POSITION, FRAMES = "hidden_states", "cache", "attention_mask", "cache_position", "frames"
_SPELLINGS = {
    "transformers": {
        "cache": CACHE,
        "cache_params": CACHE,
        "past_key_values": CACHE,
        "attention_mask": MASK,
        "cache_position": POSITION,
    },
    "mamba": {"inference_params": CACHE, "T": FRAMES},  # VideoMamba's number of frames changes nothing
}
_Parameter = inspect.Parameter


@dataclass(frozen=True)
class Signature:
    """The arguments of one forward.

    Attributes:
        kind: "transformers" or "mamba" (mamba_ssm), whose spellings differ.
        positional: their names in order, without ``self``.
        roles: (name, role) of each whose meaning is known.
        defaults: (name, default) of each whose meaning is not known.
        keywords: whether any other keyword is taken too, as with ``**kwargs``.
    """

    kind: str
    positional: tuple[str, ...]
    roles: tuple[tuple[str, str], ...]
    defaults: tuple[tuple[str, object], ...]
    keywords: bool

    def name_of(self, role: str) -> str | None:
        """What the argument of that role is called; None if there is none."""
        return next((name for name, own in self.roles if own == role), None)

    def reader(self) -> Callable[[tuple, dict], dict | None]:
        """A function of a call's (args, kwargs): the values by role; None if one has no known
        meaning, or is not what this forward takes.
        """
        positional, roles, defaults, keywords, spellings = (
            self.positional,
            dict(self.roles),
            dict(self.defaults),
            self.keywords,
            _SPELLINGS[self.kind],
        )

        def read(args: tuple, kwargs: dict) -> dict | None:
            if len(args) > len(positional):
                return None
            values, aliases = {}, {}
            for name, value in (*zip(positional, args, strict=False), *kwargs.items()):
                if name in roles:
                    if roles[name] in values:  # given twice: its own forward says so
                        return None
                    values[roles[name]] = value
                elif name in defaults:
                    if not _same(value, defaults[name]):
                        return None
                elif not keywords:
                    return None
                elif name in spellings:
                    aliases[spellings[name]] = value
            return aliases | values if INPUT in values else None

        return read

    def guesses(self) -> list[Signature]:
        """This signature with meanings given to the arguments that have none, in every way that
        makes sense, the likeliest first.
        """
        unknown = [name for name, default in self.defaults if default is None]
        missing = [role for role in (CACHE, MASK) if self.name_of(role) is None]
        found = []
        for count in range(min(len(unknown), len(missing)), 0, -1):
            for names in permutations(unknown, count):
                for roles in (missing,) if count == len(missing) else [[role] for role in missing]:
                    given = dict(zip(names, roles, strict=True))
                    rest = tuple(pair for pair in self.defaults if pair[0] not in given)
                    found.append(replace(self, roles=(*self.roles, *given.items()), defaults=rest))
        found.sort(
            key=lambda guess: sum(role.split("_")[-1] in name for name, role in guess.roles if name != INPUT),
            reverse=True,
        )
        return [*found, self] if unknown else [self]


def signature_of(cls: type, kind: str) -> Signature | None:
    """The signature of ``cls.forward``; None if it needs more than one argument."""
    parameters = list(inspect.signature(plain_forward(cls.forward)).parameters.values())[1:]
    named = [p for p in parameters if p.kind not in (_Parameter.VAR_POSITIONAL, _Parameter.VAR_KEYWORD)]
    positional = tuple(p.name for p in named if p.kind is not _Parameter.KEYWORD_ONLY)
    if not positional or any(p.default is _Parameter.empty for p in named[1:]):
        return None
    spellings = _SPELLINGS[kind]
    roles = {positional[0]: INPUT} | {p.name: spellings[p.name] for p in named[1:] if p.name in spellings}
    defaults = tuple((p.name, _hashable(p.default)) for p in named if p.name not in roles)
    return Signature(
        kind, positional, tuple(roles.items()), defaults, any(p.kind is _Parameter.VAR_KEYWORD for p in parameters)
    )


def plain_forward(function: Callable) -> Callable:
    """The forward within a decorator that hides its arguments (transformers has had one)."""
    named = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.kind not in (_Parameter.VAR_POSITIONAL, _Parameter.VAR_KEYWORD)
    ]
    held = (
        [cell.cell_contents for cell in function.__closure__ or ()]
        if len(named) <= 1 and inspect.isfunction(function)
        else []
    )
    return next((inner for inner in held if inspect.isfunction(inner) and inner.__name__ == "forward"), function)


def _same(value: object, default: object) -> bool:
    return value is default or (isinstance(value, (bool, int, float, str)) and value == default)


def _hashable(default: object) -> object:
    return default if default is None or isinstance(default, (bool, int, float, str)) else repr(default)
