"""Conversion of JSON schemas to those that xgrammar 0.2.8 enforces. Schemas that have no such form are rejected.

xgrammar ignores most keywords that it does not implement, so only keywords that it is known to enforce are accepted.
The result may allow fewer documents than the given schema, but never others.
"""

import json
from collections.abc import Iterator
from math import ceil, floor

from yuan_grpc.server.engine.vllm.constraints import string_lengths
from yuan_grpc.server.engine.vllm.constraints.json_keywords import (
    BOUNDS,
    Schema,
    check_encodable,
    read_bound,
    read_count,
    reject,
)
from yuan_grpc.server.engine.vllm.constraints.json_overlap import may_overlap
from yuan_grpc.server.engine.vllm.constraints.json_values import to_enforceable_values
from yuan_grpc.server.engine.vllm.constraints.regex import UnsupportedConstraintError, to_enforceable_regex
from yuan_grpc.server.engine.vllm.constraints.string_formats import FORMATS

MAX_DEPTH = 64
MAX_LENGTH = 2000
"""Maximum of a limit on a string's length: each character is a rule of the grammar."""

_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "discriminator")
)
_ROOT_ANNOTATIONS = frozenset(("$schema", "$id", "$defs", "definitions"))
_FAMILIES = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": BOUNDS,
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
}
"""Keywords by the type that they apply to."""
_TYPES = (*_FAMILIES, "integer", "boolean", "null")
_TYPED = frozenset(("type", *(keyword for keywords in _FAMILIES.values() for keyword in keywords)))
_ALONE = ("$ref", "allOf", "anyOf", "oneOf")
"""Keywords whose siblings xgrammar ignores."""
_KEYWORDS = _TYPED | {*_ALONE, "enum", "const"}


def to_enforceable_schema(text: str) -> str:
    """Return a schema that xgrammar enforces. Every document that it allows satisfies the given schema.

    Strings of limited length are constants of `string_lengths`, to be expanded in its grammar.

    Raises:
        UnsupportedConstraintError: a keyword cannot be enforced. The text names it and its JSON pointer.
        ValueError: the text is not JSON.
    """
    schema = json.loads(text)
    if not isinstance(schema, dict | bool):
        raise UnsupportedConstraintError("must be a JSON schema")
    return json.dumps(_Rewriter(schema).rewrite(), ensure_ascii=False, separators=(",", ":"))


class _Rewriter:
    def __init__(self, root: Schema | bool) -> None:
        self._root = root
        self._definitions: dict[str, Schema] = {}
        self._references = _references(root)
        self._tags = sorted(set(_tags(root)))

    def rewrite(self) -> Schema:
        schema = self._schema(self._root, "", 0)
        if not self._definitions:
            return schema
        return {**schema, "$defs": self._definitions}

    def _schema(self, schema: object, at: str, depth: int) -> Schema:
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            reject("false" if schema is False else "value", at)
        if depth > MAX_DEPTH:
            raise UnsupportedConstraintError(f"must be nested at most {MAX_DEPTH} levels deep")
        keywords = _known_keywords(schema, at)
        for keyword in _ALONE:
            if keyword in keywords:
                for other in keywords:
                    if other != keyword:
                        reject(other, at, f"next to `{keyword}`")
                return self._combination(keyword, keywords[keyword], at, depth)
        if "enum" in keywords or "const" in keywords:
            types = _types(keywords, at) if "type" in keywords else []
            return to_enforceable_values(keywords, types, at)
        return self._rewrite_by_type(keywords, at, depth)

    def _combination(self, keyword: str, value: object, at: str, depth: int) -> Schema:
        at_keyword = f"{at}/{keyword}"
        if keyword == "$ref":
            return self._reference(value, at, depth)
        if not isinstance(value, list) or not value:
            reject(keyword, at, "unless it is a list")
        if keyword == "allOf" and len(value) > 1:
            reject(keyword, at, "of several schemas")
        if keyword == "oneOf" and may_overlap(value, self._resolve, self._tags):
            reject(keyword, at, "whose schemas may overlap")
        schemas = [self._schema(one, f"{at_keyword}/{i}", depth + 1) for i, one in enumerate(value)]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

    def _reference(self, reference: object, at: str, depth: int) -> Schema:
        target = self._resolve(reference)
        if target is None or not isinstance(reference, str):
            reject("$ref", at, "unless it names an entry of `$defs`")
        name = self._references[reference][0]
        if name not in self._definitions:
            self._definitions[name] = {}
            self._definitions[name] = self._schema(target, reference.removeprefix("#"), depth + 1)
        return {"$ref": f"#/$defs/{name}"}

    def _resolve(self, reference: object) -> object:
        return self._references[reference][1] if isinstance(reference, str) and reference in self._references else None

    def _rewrite_by_type(self, keywords: Schema, at: str, depth: int) -> Schema:
        types = _types(keywords, at)
        if not types:
            return {}
        schemas = [self._rewrite_for_type(one, keywords, at, depth) for one in types]
        return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}

    def _rewrite_for_type(self, name: str, keywords: Schema, at: str, depth: int) -> Schema:
        family = "number" if name == "integer" else name
        own = {keyword: keywords[keyword] for keyword in _FAMILIES.get(family, ()) if keyword in keywords}
        match family:
            case "string":
                return _string(own, at)
            case "number":
                return _number(name, own, at)
            case "array":
                return self._array(own, at, depth)
            case "object":
                return self._object(own, at, depth)
        return {"type": name}

    def _array(self, own: Schema, at: str, depth: int) -> Schema:
        if own.get("uniqueItems", False) is not False:
            reject("uniqueItems", at)
        low, high = read_count("minItems", own, at) or 0, read_count("maxItems", own, at)
        prefix = own.get("prefixItems", [])
        if not isinstance(prefix, list):
            reject("prefixItems", at, "unless it is a list")
        items = own.get("items", low > len(prefix) or not prefix)
        result: Schema = {"type": "array"}
        if prefix:
            positions = enumerate(prefix)
            result["prefixItems"] = [self._schema(one, f"{at}/prefixItems/{i}", depth + 1) for i, one in positions]
        if items is False and low > len(prefix):
            reject("minItems", at, "above the number of items")
        result["items"] = False if items is False else self._schema(items, f"{at}/items", depth + 1)
        return result | ({"minItems": low} if low else {}) | ({"maxItems": high} if high is not None else {})

    def _object(self, own: Schema, at: str, depth: int) -> Schema:
        properties, required = _declared(own, self._tags, at)
        additional = own.get("additionalProperties", True)
        undeclared = [name for name in required if name not in properties]
        if undeclared and additional is False:
            reject("required", at, "of a property that `additionalProperties` excludes")
        if properties and additional not in (True, False, {}):
            reject("additionalProperties", at, "with a schema next to `properties`")
        absent = {name for name, schema in properties.items() if schema is False and name not in required}
        declared = {
            name: self._schema(schema, f"{at}/properties/{_pointer(name)}", depth + 1)
            for name, schema in properties.items()
            if name not in absent
        }
        extra = (
            {} if isinstance(additional, bool) else self._schema(additional, f"{at}/additionalProperties", depth + 1)
        )
        declared |= dict.fromkeys(undeclared, extra)
        result: Schema = {"type": "object"}
        if declared or own.get("properties") or additional is False:
            result |= {"properties": declared, "additionalProperties": False}
            result |= {"required": required} if required else {}
            return result | _closed_counts(own, len(declared), len(required), at)
        if not isinstance(additional, bool):
            result["additionalProperties"] = extra
        return result | _open_counts(own, at)


def _references(root: Schema | bool) -> dict[str, tuple[str, object]]:
    """Return the schemas that can be referenced, each with a new name, by reference."""
    root = root if isinstance(root, dict) else {}
    schemas: dict[str, object] = {"#": {key: root[key] for key in root if key not in _ROOT_ANNOTATIONS}}
    for keyword in ("$defs", "definitions"):
        entries = root.get(keyword)
        for name, schema in entries.items() if isinstance(entries, dict) else ():
            schemas[f"#/{keyword}/{_pointer(name)}"] = schema
    return {reference: (str(number), schema) for number, (reference, schema) in enumerate(schemas.items())}


def _tags(value: object) -> Iterator[str]:
    """Yield the names of properties that select a schema of a union, in the notation of OpenAPI and pydantic.

    They often have a default and are not required, but only they make the schemas mutually exclusive.
    """
    if isinstance(value, dict):
        tag = value.get("discriminator")
        if isinstance(tag, dict) and isinstance(tag.get("propertyName"), str):
            yield tag["propertyName"]
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _tags(one)


def _known_keywords(schema: Schema, at: str) -> Schema:
    """Return the keywords that are not annotations."""
    ignored = _ANNOTATIONS if at else _ANNOTATIONS | _ROOT_ANNOTATIONS
    keywords = {key: value for key, value in schema.items() if key not in ignored and not key.startswith("x-")}
    for keyword in keywords:
        if keyword not in _KEYWORDS:
            reject(keyword, at)
    return keywords


def _types(keywords: Schema, at: str) -> list[str]:
    """Return the types of a schema: the given ones, or the one that its keywords apply to."""
    if "type" not in keywords:
        families = [name for name, own in _FAMILIES.items() if any(keyword in keywords for keyword in own)]
        if len(families) > 1:
            keyword = next(keyword for keyword in _FAMILIES[families[1]] if keyword in keywords)
            reject(keyword, at, "without `type`")
        return families
    given = keywords["type"]
    types = (
        list(dict.fromkeys(given)) if isinstance(given, list) and all(isinstance(g, str) for g in given) else [given]
    )
    if not types or any(one not in (*_FAMILIES, "integer", "boolean", "null") for one in types if one):
        reject("type", at, "that is unknown")
    return [one for one in types if one != "integer" or "number" not in types]


def _string(own: Schema, at: str) -> Schema:
    low, high = read_count("minLength", own, at) or 0, read_count("maxLength", own, at)
    has_length = low > 0 or high is not None
    if high is not None and low > high:
        reject("minLength", at, "above `maxLength`")
    limits = [key for key in ("pattern", "format") if key in own]
    if len(limits) + has_length > 1:
        reject(limits[-1], at, "next to another limit of the string")
    if has_length:
        if max(low, high or 0) > MAX_LENGTH:
            reject("maxLength" if high else "minLength", at, f"above {MAX_LENGTH}")
        return {"const": string_lengths.constant(low, high)}
    if "format" in own:
        if not isinstance(own["format"], str) or own["format"] not in FORMATS:
            reject("format", at, f"other than {', '.join(FORMATS)}")
        return {"type": "string", "pattern": to_enforceable_regex(FORMATS[own["format"]], in_json=True)}
    if "pattern" in own:
        if not isinstance(own["pattern"], str):
            reject("pattern", at, "unless it is a string")
        try:
            return {"type": "string", "pattern": to_enforceable_regex(own["pattern"], in_json=True)}
        except UnsupportedConstraintError as error:
            raise UnsupportedConstraintError(f"{error} in `pattern` at {at or '/'}") from None
    return {"type": "string"}


def _number(name: str, own: Schema, at: str) -> Schema:
    bounds = {keyword: read_bound(keyword, own, at) for keyword in own}
    if name == "integer":
        lows = [ceil(bounds["minimum"])] if "minimum" in bounds else []
        lows += [floor(bounds["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in bounds else []
        highs = [floor(bounds["maximum"])] if "maximum" in bounds else []
        highs += [ceil(bounds["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in bounds else []
        return {"type": name} | ({"minimum": max(lows)} if lows else {}) | ({"maximum": min(highs)} if highs else {})
    for inclusive, exclusive, sign in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
        if inclusive in bounds and exclusive in bounds:
            is_looser = (bounds[exclusive] - bounds[inclusive]) * sign < 0
            del bounds[exclusive if is_looser else inclusive]
    return {"type": name, **{keyword: own[keyword] for keyword in bounds}}


def _declared(own: Schema, tags: list[str], at: str) -> tuple[Schema, list[str]]:
    properties, required = own.get("properties", {}), own.get("required", [])
    if not isinstance(properties, dict):
        reject("properties", at, "unless it is an object")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        reject("required", at, "unless it is a list of names")
    for name in (*properties, *required):
        check_encodable(name, "properties", at)
    return properties, list(dict.fromkeys([*required, *(name for name in tags if name in properties)]))


def _closed_counts(own: Schema, properties: int, required: int, at: str) -> Schema:
    """Return the limits on the number of properties that the declared ones do not imply."""
    low, high = read_count("minProperties", own, at) or 0, read_count("maxProperties", own, at)
    limits = {"minProperties": low} if low > required else {}
    return limits if high is None or high >= properties else limits | {"maxProperties": high}


def _open_counts(own: Schema, at: str) -> Schema:
    """Return the limits on the number of properties; the engine may write the same property twice."""
    low, high = read_count("minProperties", own, at) or 0, read_count("maxProperties", own, at)
    if low > 1:
        reject("minProperties", at, "above 1 without `properties`")
    return ({"minProperties": low} if low else {}) | ({} if high is None else {"maxProperties": high})


def _pointer(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
