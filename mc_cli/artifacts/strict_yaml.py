"""YAML that people wrote: nothing that runs code, no key given twice, and nothing that grows without end.

YAML keeps the last of two equal keys unsaid, follows any depth until the stack ends, and can repeat a part by its name:
ten lines of nine names each stand for 9**10 entries. A file counts with all its repetitions written out.
"""

from __future__ import annotations

from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.resolver import Resolver

from mc_cli.errors import shown

DEPTH = 50  # nested lists and mappings; a plan has 3
ENTRIES = 400_000  # keys, values and entries of lists; a plan of 60 layers with 384 experts has about 120,000
CHARACTERS = 32 * 2**20
DIGITS = 40
_MERGE = "tag:yaml.org,2002:merge"
# The safe loader's constructors raise these for texts that do not fit their tag's type, such as a 32nd of January.
_MISFITS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError)


def read_yaml(text: str, *, characters: int = CHARACTERS, entries: int = ENTRIES) -> Any:
    """Parses a YAML text of at most so many characters, and keys, values and entries of lists.

    Raises yaml.YAMLError where it is none, has other tags, a key twice or too much in it.
    """
    if len(text) > characters:
        raise yaml.YAMLError(f"it has more than the {characters:,} characters that are read")
    loader = _StrictLoader(text, entries)
    try:
        return loader.get_single_data()
    except _MISFITS as error:
        raise yaml.YAMLError(f"a value is not of its type ({type(error).__name__}: {str(error)[:200]})") from error
    finally:
        loader.dispose()


def _fastest_loader() -> Any:
    """The safe loader over libyaml's events, three times as fast, where PyYAML has it: large plans have a megabyte.

    The composer stays Python's, because libyaml's own cannot be stopped on the way.
    """
    if not yaml.__with_libyaml__:
        return yaml.SafeLoader
    from yaml.cyaml import CParser  # type: ignore[attr-defined]

    class Compiled(Composer, CParser, SafeConstructor, Resolver):
        def __init__(self, text: str) -> None:
            CParser.__init__(self, text)
            Composer.__init__(self)
            SafeConstructor.__init__(self)
            Resolver.__init__(self)

    return Compiled


class _StrictLoader(_fastest_loader()):  # type: ignore[misc]
    """The safe loader, with a check of every mapping's keys, of depth, and of how much all names stand for."""

    def __init__(self, text: str, most: int) -> None:
        super().__init__(text)
        self._most = most
        self._depth = 0
        self._entries: dict[int, int] = {}  # node's id -> entries of it and all below, with repetitions

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        self._depth += 1
        if self._depth > DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {DEPTH} levels", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and "\0" in node.value:  # no path, name or number has one
            raise yaml.composer.ComposerError(None, None, "a text with a NUL character", mark)
        if len(self._entries) > self._most:  # stops a long mapping before it ends
            raise yaml.composer.ComposerError(None, None, f"more than {self._most:,} entries", mark)
        if id(node) not in self._entries:
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            if any(id(part) not in self._entries for part in parts):
                raise yaml.composer.ComposerError(None, None, "a part that holds itself", mark)
            self._entries[id(node)] = 1 + sum(self._entries[id(part)] for part in parts)
        if self._entries[id(node)] > self._most:
            raise yaml.composer.ComposerError(
                None, None, f"more than {self._most:,} entries, parts repeated by name (*name) written out", mark
            )
        return node


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    twice: set[str] = set()
    for key_node, _ in node.value:
        if key_node.tag == _MERGE:
            raise yaml.constructor.ConstructorError(
                None, None, "a merge key (<<); write its entries out", key_node.start_mark
            )
        key = loader.construct_object(key_node, deep=True)
        try:
            if key in seen:
                twice.add(shown(key) if not isinstance(key, str) else key[:40])
            seen.add(key)
        except TypeError:
            message = f"a {type(key).__name__} cannot be a key"
            raise yaml.constructor.ConstructorError(None, None, message, key_node.start_mark) from None
    if twice:
        names = ", ".join(sorted(twice)[:20])
        raise yaml.constructor.ConstructorError(None, None, f"given twice: {names}", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _whole_number(loader: _StrictLoader, node: yaml.ScalarNode) -> int:
    if len(node.value) > DIGITS:
        message = f"a whole number of {len(node.value):,} digits"
        raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
    return int(yaml.SafeLoader.construct_yaml_int(loader, node))


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _whole_number)
