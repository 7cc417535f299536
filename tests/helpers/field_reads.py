"""Which fields of which config dataclasses a program reads, found without running it.

A field counts as read where an attribute is taken of an expression whose type is known to be the
field's class: an annotated parameter or variable, `self`, an attribute with an annotation or an
assignment in a method, a call with a return annotation, or a chain of those. Another class's
attribute of the same name does not count.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Iterable, Iterator

Reads = set[tuple[type, str]]


def field_reads(modules: Iterable[types.ModuleType]) -> Reads:
    """(class that declares the field, field) for every field that the modules read."""
    readers = [_Module(module) for module in modules]
    assigned: dict[tuple[type, str], type] = {}
    for _ in range(2):  # attributes assigned from attributes that the first round found
        for reader in readers:
            reader.collect(assigned)
    return set().union(*(reader.reads for reader in readers))


def import_modules(names: Iterable[str]) -> Iterator[types.ModuleType]:
    """Import the modules, except those that need an engine or a page that is not installed."""
    for name in names:
        try:
            yield importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in ("vllm", "gradio"):
                raise


def declaring_classes(kind: type, name: str) -> list[type]:
    """The classes in whose body a dataclass field stands: again, where a default is changed."""
    bases = [base for base in kind.__mro__ if dataclasses.is_dataclass(base)]
    return [base for base in bases if name in inspect.get_annotations(base)]


class _Module:
    """The reads of one module."""

    def __init__(self, module: types.ModuleType) -> None:
        self.tree = ast.parse(inspect.getsource(module))
        self.names = dict(vars(module))
        self.reads: Reads = set()
        self.assigned: dict[tuple[type, str], type] = {}
        for node in ast.walk(self.tree):  # imports inside functions and for type checkers
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    self._import(node.module, alias.name, alias.asname or alias.name)

    def _import(self, module: str, name: str, known_as: str) -> None:
        if known_as not in self.names:
            try:
                self.names[known_as] = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError):
                return

    def collect(self, assigned: dict[tuple[type, str], type]) -> None:
        """Walk the module; `assigned` holds the types of attributes and grows."""
        self.assigned = assigned
        self.walk(self.tree.body, {}, None)

    def walk(self, body: list[ast.stmt], variables: dict[str, type], owner: type | None) -> None:
        for statement in body:
            if isinstance(statement, ast.ClassDef):
                kind = self.names.get(statement.name)
                self.walk(statement.body, dict(variables), kind if isinstance(kind, type) else None)
            elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                if statement.name != "__post_init__":  # what only its own check reads does nothing
                    self.walk(statement.body, self.parameters(statement, variables, owner), None)
            else:
                self.statement(statement, variables)

    def parameters(
        self,
        function: ast.FunctionDef | ast.AsyncFunctionDef,
        variables: dict[str, type],
        owner: type | None,
    ) -> dict[str, type]:
        """The variables inside a function: those around it, and its annotated parameters."""
        inside = dict(variables)
        arguments = function.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        for argument in named:
            inside.pop(argument.arg, None)
            kind = self.annotated(argument.annotation)
            if kind:
                inside[argument.arg] = kind
        static = any(ast.unparse(found) == "staticmethod" for found in function.decorator_list)
        if owner and named and not static:
            inside[named[0].arg] = owner
        return inside

    def statement(self, statement: ast.stmt, variables: dict[str, type]) -> None:
        for block in _blocks(statement):
            self.walk(block, variables, None)
        for expression in _expressions(statement):
            self.expression(expression, variables)
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            self.assign(statement.targets[0], statement.value, variables)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            kind = self.annotated(statement.annotation)
            if kind:
                variables[statement.target.id] = kind

    def assign(self, target: ast.expr, value: ast.expr, variables: dict[str, type]) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=False):
                self.assign(one, its, variables)
            return
        kind = self.type_of(value, variables)
        if isinstance(target, ast.Name):
            variables.pop(target.id, None)
            if kind:
                variables[target.id] = kind
        elif isinstance(target, ast.Attribute) and kind:
            owner = self.type_of(target.value, variables)
            if owner:
                self.assigned[owner, target.attr] = kind

    def expression(self, expression: ast.expr, variables: dict[str, type]) -> None:
        """Record the reads in an expression, also inside its lambdas and comprehensions."""
        for node in ast.walk(expression):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                self.read(self.type_of(node.value, variables), node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
                for name in self.names_of(node.args[1], variables):
                    self.read(self.type_of(node.args[0], variables), name)

    def names_of(self, node: ast.expr, variables: dict[str, type]) -> tuple[str, ...]:
        """The names that `node` may be: a constant, or a field whose type is a Literal."""
        if isinstance(node, ast.Constant):
            return (str(node.value),)
        owner = self.type_of(node.value, variables) if isinstance(node, ast.Attribute) else None
        hint = _hints(owner).get(node.attr) if owner and isinstance(node, ast.Attribute) else None
        return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()

    def read(self, kind: type | None, name: str) -> None:
        if kind and getattr(kind, "_is_protocol", False):
            self.reads.add((kind, name))
        elif kind:
            self.reads |= {(base, name) for base in declaring_classes(kind, name)}

    def annotated(self, annotation: ast.expr | None) -> type | None:
        """The class that an annotation names."""
        if annotation is None:
            return None
        try:
            return _class_of(eval(ast.unparse(annotation), {**vars(typing), **self.names}))
        except (NameError, TypeError, AttributeError, SyntaxError):
            return None

    def type_of(self, node: ast.expr, variables: dict[str, type]) -> type | None:
        if isinstance(node, ast.Name):
            return variables.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.type_of(node.value, variables)
            return self.attribute(owner, node.attr) if owner else None
        if isinstance(node, ast.NamedExpr):
            return self.type_of(node.value, variables)
        if isinstance(node, ast.IfExp):
            return self.type_of(node.body, variables) or self.type_of(node.orelse, variables)
        if isinstance(node, ast.BoolOp):
            return next(filter(None, (self.type_of(v, variables) for v in node.values)), None)
        return self.returned(node, variables) if isinstance(node, ast.Call) else None

    def attribute(self, owner: type, name: str) -> type | None:
        for base in owner.__mro__:
            if (base, name) in self.assigned:
                return self.assigned[base, name]
        member = inspect.getattr_static(owner, name, None)
        if isinstance(member, property | functools.cached_property):
            return _returns(getattr(member, "fget", None) or getattr(member, "func", None))
        return _class_of(_hints(owner).get(name))

    def returned(self, call: ast.Call, variables: dict[str, type]) -> type | None:
        name = ast.unparse(call.func)
        first = call.args[0] if call.args else None
        if name in ("parse_config", "load_config") and isinstance(first, ast.Name):
            return _class_of(self.names.get(first.id))
        if name in ("replace", "dataclasses.replace") and first is not None:
            return self.type_of(first, variables)
        if isinstance(call.func, ast.Name):
            called = self.names.get(call.func.id)
        elif isinstance(call.func, ast.Attribute):
            owner = self.type_of(call.func.value, variables)
            if owner is None and isinstance(call.func.value, ast.Name):
                owner = self.names.get(call.func.value.id)
            called = getattr(owner, call.func.attr, None)
        else:
            return None
        return _class_of(called) if isinstance(called, type) else _returns(called)


def _blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    """The bodies of a compound statement."""
    for name in ("body", "orelse", "finalbody"):
        yield getattr(statement, name, [])
    for handler in getattr(statement, "handlers", []):
        yield handler.body
    for case in getattr(statement, "cases", []):
        yield case.body


def _expressions(statement: ast.stmt) -> Iterator[ast.expr]:
    """The expressions of a statement itself, without those of the statements inside it."""
    for _, value in ast.iter_fields(statement):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.expr):
                yield item
            elif isinstance(item, ast.withitem):
                yield item.context_expr


def _class_of(hint: object) -> type | None:
    """The one class of ours in a type hint: `X`, `X | None`, `type[X]`."""
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint if hint.__module__.split(".")[0] not in ("builtins", "torch") else None
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(filter(None, map(_class_of, typing.get_args(hint))), None)
    return None


def _hints(thing: object) -> dict[str, object]:
    try:
        return typing.get_type_hints(thing)
    except (NameError, TypeError, AttributeError):
        return {}


def _returns(function: object) -> type | None:
    return _class_of(_hints(function).get("return")) if function else None
