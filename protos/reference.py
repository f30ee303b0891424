"""The API reference: a contract's comments and its example requests as one page of Markdown.

    python protos/reference.py DESCRIPTOR_SET EXAMPLES >PAGE

DESCRIPTOR_SET is what protoc writes for one file with --include_source_info, EXAMPLES the path from here to the folder
that has a `<Rpc>.json` for each RPC. PAGE is taken to lie one folder below here.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)

WELL_KNOWN = ".google.protobuf."
WELL_KNOWN_PAGE = "https://protobuf.dev/reference/protobuf/google.protobuf/"


class Page:
    """The page of one file. A path is protobuf's: the field numbers and places that lead to an element of the file."""

    def __init__(self, file: FileDescriptorProto, examples: Path) -> None:
        self.file = file
        self.examples = examples
        self.comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        self.rpcs = {method.name for service in file.service for method in service.method}
        self.types = {message.name for message in file.message_type} | {enum.name for enum in file.enum_type}

    def blocks(self) -> Iterator[str]:
        """All of the page, in blocks with an empty line between."""
        yield f"<!-- Written by `make proto` out of protos/{self.file.name}, whose comments these are. -->"
        yield f"# API reference of `{self.file.package}`"
        yield self.comment(FileDescriptorProto.SYNTAX_FIELD_NUMBER)
        yield from self.contents()
        for place, service in enumerate(self.file.service):
            yield from self.service(service, FileDescriptorProto.SERVICE_FIELD_NUMBER, place)
        yield "## Messages"
        for place, message in enumerate(self.file.message_type):
            yield from self.message(message, FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER, place)
        yield "## Enums"
        for place, enum in enumerate(self.file.enum_type):
            yield from self.enum(enum, FileDescriptorProto.ENUM_TYPE_FIELD_NUMBER, place)

    def contents(self) -> Iterator[str]:
        """The table of contents."""
        for at, service in enumerate(self.file.service):
            path = FileDescriptorProto.SERVICE_FIELD_NUMBER, at, ServiceDescriptorProto.METHOD_FIELD_NUMBER
            rows = ((link(method.name), self.summary(*path, place)) for place, method in enumerate(service.method))
            yield table((link(service.name), ""), rows)
        for title, types in (("Messages", self.file.message_type), ("Enums", self.file.enum_type)):
            yield f"{link(title)}: " + " · ".join(link(type_.name) for type_ in types)

    def service(self, service: ServiceDescriptorProto, *path: int) -> Iterator[str]:
        """A service and its RPCs."""
        yield f"## {service.name}"
        yield self.comment(*path)
        for place, method in enumerate(service.method):
            yield from self.rpc(method, *path, ServiceDescriptorProto.METHOD_FIELD_NUMBER, place)

    def rpc(self, method: MethodDescriptorProto, *path: int) -> Iterator[str]:
        """An RPC and its example."""
        asked = streamed(self.type_link(method.input_type), method.client_streaming)
        answered = streamed(self.type_link(method.output_type), method.server_streaming)
        example = self.examples / f"{method.name}.json"
        yield f"### {method.name}"
        yield f"{asked} → {answered}"
        yield self.comment(*path)
        yield f"An example, [{example}](../{example}):"
        yield f"```json\n{example.read_text('utf-8').strip()}\n```"

    def message(self, message: DescriptorProto, *path: int) -> Iterator[str]:
        """A message and the table of its fields, with what is said of a oneof in front."""
        yield f"### {message.name}"
        yield self.comment(*path)
        for place, oneof in enumerate(message.oneof_decl):
            # The oneofs that protoc makes of fields that are `optional` have no comment.
            if comment := self.comment(*path, DescriptorProto.ONEOF_DECL_FIELD_NUMBER, place):
                yield f"`{oneof.name}`: {comment}"
        if message.field:
            path = *path, DescriptorProto.FIELD_FIELD_NUMBER
            rows = (self.row(message, field, *path, place) for place, field in enumerate(message.field))
            yield table(("field", "type", "label", "description"), rows)

    def row(self, message: DescriptorProto, field: FieldDescriptorProto, *path: int) -> tuple[str, ...]:
        """A field's row."""
        entry = next((nested for nested in message.nested_type if field.type_name.endswith(f".{nested.name}")), None)
        type_, label = self.field_type(field), ""
        if entry:  # A map is a message of key and value, repeated.
            key, value = entry.field
            type_, label = f"map&lt;{self.field_type(key)}, {self.field_type(value)}&gt;", "map"
        elif field.label == FieldDescriptorProto.LABEL_REPEATED:
            label = "repeated"
        elif field.proto3_optional:
            label = "optional"
        elif field.HasField("oneof_index"):
            label = f"one of `{message.oneof_decl[field.oneof_index].name}`"
        return f"`{field.name}`", type_, label, self.comment(*path)

    def enum(self, enum: EnumDescriptorProto, *path: int) -> Iterator[str]:
        """An enum and the table of its values."""
        yield f"### {enum.name}"
        yield self.comment(*path)
        path = *path, EnumDescriptorProto.VALUE_FIELD_NUMBER
        rows = ((f"`{value.name}`", str(value.number), self.comment(*path, i)) for i, value in enumerate(enum.value))
        yield table(("value", "number", "description"), rows)

    def field_type(self, field: FieldDescriptorProto) -> str:
        """What a field holds; of a map's, its entry."""
        if field.type_name:
            return self.type_link(field.type_name)
        return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()

    def type_link(self, name: str) -> str:
        """A message or an enum, by its full name."""
        short = name.rpartition(".")[2]
        if name.startswith(WELL_KNOWN):
            return f"[{name[1:]}]({WELL_KNOWN_PAGE}#{short.lower()})"
        return link(short)

    def comment(self, *path: int) -> str:
        """The comment on an element, which is Markdown already, with links to the RPCs and the types it names."""
        lines = self.comments.get(path, "").splitlines()
        text = "\n".join(line.removeprefix(" ") for line in lines).strip()
        return re.sub(r"`[^`]*`|\b[A-Z]\w+\b", self.linked, text)

    def linked(self, word: re.Match[str]) -> str:
        """A word or a code span of a comment. Types are named in code spans only, RPCs in words only."""
        code = word[0].startswith("`")
        name = word[0].strip("`")
        return link(name, word[0]) if name in (self.types if code else self.rpcs) else word[0]

    def summary(self, *path: int) -> str:
        """The first sentence of an element's comment."""
        return re.split(r"(?<=\.)\s", self.comment(*path), maxsplit=1)[0]


def link(heading: str, text: str = "") -> str:
    """A link to a heading of the page, by the name that code hosts give it."""
    return f"[{text or heading}](#{heading.lower()})"


def streamed(type_: str, is_stream: bool) -> str:
    """What goes one way in an RPC."""
    return f"stream of {type_}" if is_stream else type_


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A table. Its cells are of one line, so that paragraphs become line breaks."""
    cells = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(map(cell, row))} |" for row in cells)


def cell(text: str) -> str:
    """A text as a table's cell."""
    return text.replace("|", r"\|").replace("\n\n", "<br><br>").replace("\n", " ")


def main(descriptor_set: str, examples: str) -> None:
    """Prints the page of the one file in the set."""
    (file,) = FileDescriptorSet.FromString(Path(descriptor_set).read_bytes()).file
    print(*Page(file, Path(examples)).blocks(), sep="\n\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
