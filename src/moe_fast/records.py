"""Frozen dataclasses, made in a quarter of the time that those of the standard library take.

That writes the source of six functions for each class and compiles every one, which for the classes
of a build takes a third as long as loading NumPy. Here only `__init__` is compiled; the others are
the same functions for all classes. Type checkers see dataclasses, and `fields`, `replace` and
`asdict` do too. What makes the documentation does not: classes that users make have dataclasses of
the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:
    import dataclasses

    def dataclass(cls=None, *, frozen=False, init=True, slots=False, kw_only=False):
        """What `dataclasses.dataclass` makes by the same arguments."""
        if not frozen or not init:
            return dataclasses.dataclass(
                cls, frozen=frozen, init=init, slots=slots, kw_only=kw_only
            )

        def decorate(cls):
            functions = SHARED | OF_SLOTS if slots else SHARED
            functions = {n: function for n, function in functions.items() if n not in vars(cls)}
            cls = dataclasses.dataclass(
                init=False, repr=False, eq=False, slots=slots, kw_only=kw_only
            )(cls)
            cls.__init__ = make_init(cls)
            for name, function in functions.items():
                setattr(cls, name, function)
            return cls

        return decorate

    def make_init(cls):
        """`__init__` of a dataclass, whose attributes nothing else can set."""
        given = {"set_": object.__setattr__}
        parameters, positional, lines = [], True, []
        for field in sorted(dataclasses.fields(cls), key=lambda field: field.kw_only):
            name, value = field.name, field.name
            if field.default_factory is not dataclasses.MISSING:
                given[f"make_{name}"] = field.default_factory
                given["missing"] = dataclasses.MISSING
                value = f"make_{name}()"
                if field.init:
                    value += f" if {name} is missing else {name}"
                default = "=missing"
            elif field.default is not dataclasses.MISSING:
                given[f"default_{name}"] = field.default
                default = f"=default_{name}"
                if not field.init:
                    value = f"default_{name}"
            else:
                default = ""
            if field.init:
                if field.kw_only and positional:
                    parameters.append("*")
                    positional = False
                parameters.append(name + default)
            elif not default:
                continue
            lines.append(f"set_(self, {name!r}, {value})")
        if hasattr(cls, "__post_init__"):
            lines.append("self.__post_init__()")
        body = "; ".join(lines) or "pass"
        exec(f"def __init__(self, {', '.join(parameters)}): {body}", given)
        init = given["__init__"]
        init.__qualname__ = f"{cls.__qualname__}.__init__"
        init.__annotations__ = {f.name: f.type for f in dataclasses.fields(cls) if f.init}
        return init

    def values(self):
        return tuple([getattr(self, field.name) for field in dataclasses.fields(self)])

    def represent(self):
        shown = (f for f in dataclasses.fields(self) if f.repr)
        inner = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in shown)
        return f"{type(self).__qualname__}({inner})"

    def compared(self):
        return tuple([getattr(self, f.name) for f in dataclasses.fields(self) if f.compare])

    def equal(self, other):
        if other.__class__ is not self.__class__:
            return NotImplemented
        return compared(self) == compared(other)

    def set_attribute(self, name, value):
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

    def delete_attribute(self, name):
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")

    def set_values(self, state):
        for field, value in zip(dataclasses.fields(self), state, strict=True):
            object.__setattr__(self, field.name, value)

    SHARED = {
        "__repr__": represent,
        "__eq__": equal,
        "__hash__": lambda self: hash(compared(self)),
        "__setattr__": set_attribute,
        "__delattr__": delete_attribute,
    }
    # Pickles have no other way to those.
    OF_SLOTS = {"__getstate__": values, "__setstate__": set_values}
