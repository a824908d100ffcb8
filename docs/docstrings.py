"""
Griffe extension for `make docs`: turns docstrings in the style of transformers into Markdown.

griffe has no parser for this style, in which a parameter is one line, ``name (`type`, *optional*):``, followed by an
indented description, and ``[`SamClipModel`]`` is a link.
"""

import ast
import re
import textwrap

import griffe

PARAMETER = re.compile(r"[\w*][\w*, ]* \(.+\):")
ERROR = re.compile(r"`?(\w+)`?: (.+)")
LINK = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
SECTIONS = {
    "Args:": "Parameters",
    "Attributes:": "Attributes",
    "Example:": "Example",
    "Examples:": "Examples",
    "Raises:": "Raises",
    "Returns:": "Returns",
    "Yields:": "Yields",
}


def to_markdown(docstring: str) -> str:
    """Section titles become bold lines, parameters and errors become lists; the rest is left alone."""
    lines: list[str] = []
    section, base = "", 0  # the current section and the indentation of its content
    in_code = False
    for line in docstring.splitlines():
        content, depth = line.strip(), len(line) - len(line.lstrip())
        if content.startswith("```"):
            in_code = not in_code
        if content in SECTIONS and not in_code:
            section, base = content, depth
            lines += ["", f"**{SECTIONS[content]}**", ""]
            continue
        if content and section and lines[-1] == "" and lines[-2].startswith("**"):
            base = depth  # the first line of the section
        elif content and depth < base:
            section, base = "", depth
        is_item = not in_code and content.startswith("- ")
        if not in_code and PARAMETER.fullmatch(content):
            name, _, kind = content.partition(" (")
            content, is_item = f"- **{name}** ({kind}", True
        elif section == "Raises:" and not in_code and depth == base and (match := ERROR.fullmatch(content)):
            content, is_item = f"- `{match[1]}`: {match[2]}", True
        if is_item and lines and lines[-1] and not lines[-1].startswith((" ", "- ")):
            lines.append("")  # Markdown starts a list only after an empty line
        lines.append(" " * max(depth - base, 0) + content)
    return "\n".join(lines)


def argument_help(attribute: griffe.Attribute) -> str | None:
    """`metadata["help"]` of a dataclass field, as transformers' argument classes have it."""
    try:
        call = ast.parse(str(attribute.value), mode="eval").body
    except SyntaxError:
        return None
    if isinstance(call, ast.Call):
        for keyword in call.keywords:
            if keyword.arg == "metadata":
                return ast.literal_eval(keyword.value).get("help")
    return None


def argument_default(attribute: griffe.Attribute) -> str | None:
    """The default of a dataclass field as source code."""
    call = ast.parse(str(attribute.value), mode="eval").body
    assert isinstance(call, ast.Call)
    for keyword in call.keywords:
        if keyword.arg == "default":
            return ast.unparse(keyword.value)
        if keyword.arg == "default_factory":
            value = keyword.value
            return ast.unparse(value.body if isinstance(value, ast.Lambda) else ast.Call(value, [], []))
    return None


class TransformersDocstrings(griffe.Extension):
    """Rewrites all docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        objects = list(walk(pkg))
        paths = {obj.name: obj.path for obj in objects if obj.is_class or obj.is_function}
        methods = {f"{obj.parent.name}.{obj.name}": obj.path for obj in objects if obj.parent and obj.parent.is_class}

        def link(match: re.Match) -> str:
            name = match[1]
            path = methods.get(name) or paths.get(name)
            code = f"<code>{name}</code>"
            return f'<autoref identifier="{path}" optional>{code}</autoref>' if path else code

        for obj in objects:
            if isinstance(obj, griffe.Attribute) and obj.value and (text := argument_help(obj)):
                obj.docstring = griffe.Docstring(text, parent=obj)
                obj.value = argument_default(obj)
            if obj.docstring:
                text = to_markdown(textwrap.dedent(obj.docstring.value))
                obj.docstring.value = LINK.sub(link, text)


def walk(obj: griffe.Object):
    """The object and all that is defined in it."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from walk(member)
