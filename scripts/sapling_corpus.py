"""Collects the documents that sapling, the included base model, is pretrained on.

Two kinds of text come out of Python sources (read with `ast`, never imported) and out of
documentation files:

- rows in the form of Graft's datasets: `Q: What is NAME in PACKAGE?`, `A: dotted.path DOCSTRING`;
- pages: a module's docstring with its signatures and docstrings, or an .rst or .md file.

Deep-learning frameworks stay out, so that fine-tuning on the documentation of one has something to
teach. This module knows nothing of tokens or training.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_ROW_CHARS = 2048
MAX_PAGE_CHARS = 24_000
MIN_DOCSTRING_CHARS = 30
MIN_PAGE_CHARS = 120
MAX_FILE_BYTES = 2_000_000
HELD_OUT_PERCENT = 2
# Docstrings that begin with the same letters, this many of them, count as one.
COMPARED_LETTERS = 160
# fmt: off
SKIPPED_FOLDERS = {
    "test", "tests", "testing", "_vendor", "vendor", "vendored", "externals", "extern",
    "node_modules", "idlelib", "lib2to3", "site-packages", "__pycache__", "conf", "locale",
}
# Deep-learning frameworks; hypothesis for its licence (MPL); plotly, whose docs are generated.
EXCLUDED_PACKAGES = {
    "pip", "setuptools", "pkg_resources", "plotly", "hypothesis", "mlx", "mlx_lm", "torch",
    "torchvision", "jax", "flax", "tensorflow", "keras", "transformers", "triton",
}
# fmt: on
# What fine-tuning on mlx is to teach: a document that says it is left out.
EXCLUDED_TEXT = "Rectified Linear Unit"


@dataclass(frozen=True)
class Document:
    """A text to learn from: its package, its kind ("row", "module" or "page"), its source file."""

    text: str
    package: str
    kind: str
    origin: str

    @property
    def held_out(self) -> bool:
        """Whether the text is kept from training: what one module or page gives stays together."""
        return int(_digest(self.origin)[:8], 16) % 100 < HELD_OUT_PERCENT


@dataclass(frozen=True)
class Described:
    """An object that has a docstring; `depth` counts the classes around it."""

    name: str
    path: str
    signature: str
    doc: str
    depth: int


def collect(stdlib: Path, site_packages: Path, doc_sources: Path | None) -> list[Document]:
    """Every document, without near duplicates and without those that hold the excluded text."""
    seen: set[str] = set()
    documents = list(_package_documents("python", stdlib, seen))
    for folder in sorted(site_packages.iterdir()):
        if folder.is_dir() and folder.name.isidentifier() and folder.name not in EXCLUDED_PACKAGES:
            documents += _package_documents(folder.name, folder, seen)
    if doc_sources is not None:
        documents += _pages("cpython-doc", doc_sources, "*.rst.txt")
    return [document for document in documents if not _is_excluded(document.text)]


def distributions(site_packages: Path) -> dict[str, tuple[str, str]]:
    """For every folder in site-packages: the distribution with its version, and the licence."""
    facts = {}
    for distribution in importlib.metadata.distributions(path=[str(site_packages)]):
        metadata = distribution.metadata
        classifiers = metadata.get_all("Classifier") or []
        licences = [c.split(" :: ")[-1] for c in classifiers if c.startswith("License ::")]
        licences += [metadata["License"] or "", "not stated"]
        licence = (metadata["License-Expression"] or licences[0]).split("\n")[0]
        for folder in {file.parts[0] for file in distribution.files or []}:
            facts[folder] = (f"{metadata['Name']} {distribution.version}", licence)
    version = ".".join(map(str, sys.version_info[:3]))
    return facts | {"python": (f"CPython {version}, Lib", "PSF-2.0")}


def _is_excluded(text: str) -> bool:
    return EXCLUDED_TEXT.lower() in re.sub(r"\s+", " ", text).lower()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_new(text: str, seen: set[str]) -> bool:
    """Whether no text before began with the same letters; remembers this one."""
    letters = re.sub(r"[^a-z]+", "", text.lower())
    key = _digest(letters[:COMPARED_LETTERS])
    if key in seen:
        return False
    seen.add(key)
    return True


def _package_documents(package: str, folder: Path, seen: set[str]) -> Iterator[Document]:
    """Rows and module pages of a package's sources, then the documentation files shipped in it."""
    for path in _files(folder, "*.py"):
        tree = _parse(path)
        if tree is None:
            continue
        module = _module_path(package, path.relative_to(folder))
        objects = [item for item in _described(tree, module) if _is_new(item.doc, seen)]
        for item in objects:
            if len(item.doc) >= MIN_DOCSTRING_CHARS:
                yield _row(item, module)
        page = _module_page(module, ast.get_docstring(tree) or "", objects)
        for part in _parts(page):
            yield Document(part, package, "module", module)
    for pattern in ("*.rst", "*.md"):
        yield from _pages(package, folder, pattern)


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    """The files below a folder that are neither tests, nor copies of others' code, nor huge."""
    for path in sorted(folder.rglob(pattern)):
        skipped = SKIPPED_FOLDERS & set(path.relative_to(folder).parts[:-1])
        if not skipped and path.stat().st_size <= MAX_FILE_BYTES:
            yield path


def _parse(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return None


def _module_path(package: str, relative: Path) -> str:
    """The public dotted path: components with an underscore are implementation and leave it."""
    package = package.lstrip("_")
    parts = [part for part in relative.with_suffix("").parts if part != "__init__"]
    public = [part for part in parts if not part.startswith("_")]
    if package == "python":
        return ".".join(public or parts or [package])
    return ".".join([package, *public])


def _described(tree: ast.Module, module: str) -> Iterator[Described]:
    """Classes, functions and methods with docstrings, and NumPy's `add_newdoc` calls."""
    yield from _described_body(tree.body, module, depth=0)
    for node in tree.body:
        call = node.value if isinstance(node, ast.Expr) else None
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "add_newdoc":
            yield from _added_doc(call)


def _added_doc(call: ast.Call) -> Iterator[Described]:
    """What `add_newdoc(module, name, doc)` or `add_newdoc(module, class, (method, doc))` says."""
    owner, name, doc = [*call.args, None, None, None][:3]
    if isinstance(doc, ast.Tuple) and len(doc.elts) == 2:
        method, doc = doc.elts
        name = ast.Constant(f"{getattr(name, 'value', '')}.{getattr(method, 'value', '')}")
    values = [getattr(part, "value", None) for part in (owner, name, doc)]
    if not all(isinstance(value, str) for value in values):
        return
    hidden = ("core", "multiarray", "umath")
    parts = [p for p in values[0].split(".") if not p.startswith("_") and p not in hidden]
    path = ".".join([*parts, values[1]])
    yield Described(values[1].split(".")[-1], path, "", inspect.cleandoc(values[2]), 0)


def _described_body(body: list[ast.stmt], prefix: str, depth: int) -> Iterator[Described]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):
            continue
        path = f"{prefix}.{node.name}"
        doc = ast.get_docstring(node) or ""
        if doc:
            yield Described(node.name, path, _signature(node), doc, depth)
        if isinstance(node, ast.ClassDef) and depth < 2:
            yield from _described_body(node.body, path, depth + 1)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}:"


def _row(item: Described, module: str) -> Document:
    package = module.split(".")[0]
    question = f"Q: What is {item.name} in {package}?"
    answer = f"A: {item.path} {_shortened(item.doc)}"
    return Document(f"{question}\n{answer}", package, "row", module)


def _shortened(text: str) -> str:
    """The text up to the last end of a paragraph, sentence or line within a row's limit."""
    if len(text) <= MAX_ROW_CHARS:
        return text
    head = text[:MAX_ROW_CHARS]
    for end in ("\n\n", ".\n", ". ", "\n"):
        cut = head.rfind(end)
        if cut > MAX_ROW_CHARS // 2:
            return head[: cut + 1].rstrip()
    return head.rstrip()


def _module_page(module: str, doc: str, objects: list[Described]) -> str:
    """A module as its reader meets it: name, docstring, signatures with docstrings below them."""
    blocks = [f"# {module}", doc] if doc else [f"# {module}"]
    for item in objects:
        indent = "    " * item.depth
        lines = f'"""{item.doc}\n"""'.splitlines()
        body = "\n".join(f"{indent}    {line}" if line else "" for line in lines)
        blocks.append(f"{indent}{item.signature or f'def {item.name}(...):'}\n{body}")
    return "\n\n".join(blocks) + "\n" if len(blocks) > 1 else ""


def _pages(package: str, folder: Path, pattern: str) -> Iterator[Document]:
    for path in _files(folder, pattern):
        text = path.read_text(encoding="utf-8", errors="replace").expandtabs(8)
        for part in _parts(text):
            yield Document(part, package, "page", str(path.relative_to(folder)))


def _parts(text: str) -> Iterator[str]:
    """The text in parts of at most MAX_PAGE_CHARS, cut between paragraphs; a tiny rest is left."""
    part = ""
    for paragraph in text.strip().split("\n\n"):
        if part and len(part) + len(paragraph) > MAX_PAGE_CHARS:
            yield part.rstrip() + "\n"
            part = ""
        part += paragraph[:MAX_PAGE_CHARS] + "\n\n"
    if len(part) > MIN_PAGE_CHARS:
        yield part.rstrip() + "\n"
