"""graft/corpus/public_names.py: which objects are a package's own, and under which path."""

from graft.corpus.public_names import Module, Name, documented, merge_modules, public_objects


def function(doc: str = "It works.", target: str = "") -> Name:
    return Name("function", doc, target)


def alias(target: str) -> Name:
    return Name("alias", target=target)


def paths(*modules: Module, root: str = "p") -> list[str]:
    """The public paths of the objects that have a docstring."""
    found = public_objects({module.path: module for module in modules}, root)
    return [one.path for one in found if one.doc]


def package(path: str = "p", **fields: object) -> Module:
    return Module(path, is_package=True, **fields)


def test_an_object_appears_once_under_its_shortest_path() -> None:
    assert paths(
        package(),
        package("p.nn", wildcards=["p.nn.layers"]),
        package("p.nn.layers", members={"relu": alias("p.nn.layers.activations.relu")}),
        Module("p.nn.layers.activations", members={"relu": function()}),
    ) == ["p.nn.relu"]


def test_what_is_imported_from_elsewhere_is_not_the_packages_own() -> None:
    members = {"array": alias("numpy.array"), "Any": alias("typing.Any"), "own": function()}
    assert paths(package(members=members, exports=["array", "Any", "own"])) == ["p.own"]


def test_what_a_module_imports_from_a_public_one_is_used_not_offered() -> None:
    assert paths(
        package(),
        Module("p.deep", members={"used": alias("p.long.road.used")}),
        package("p.long"),
        Module("p.long.road", members={"used": function()}),
    ) == ["p.long.road.used"]


def test_private_objects_are_public_where_a_public_name_exports_them() -> None:
    assert paths(
        package(members={"a": alias("p._x.a")}),
        Module("p.listed", exports=["b"], members={"b": alias("p._x.b")}),
        Module("p.imported", members={"c": alias("p._x.c")}),
        Module("p._x", members={name: function() for name in ("a", "b", "c", "hidden")}),
    ) == ["p.a", "p.imported.c", "p.listed.b"]


def test_nothing_with_a_leading_underscore_is_public() -> None:
    inner = Name("class", "A class.", members={"_method": function(), "method": function()})
    members = {"_f": function(), "C": inner, "_D": inner}
    found = paths(package(members=members, exports=["_f", "C", "_D"]), Module("p._m", "A module."))
    assert found == ["p.C", "p.C.method"]


def test_all_decides_which_names_are_public_but_not_which_submodules() -> None:
    module = package(exports=["a"], members={"a": function(), "b": function()})
    assert paths(module, Module("p.sub", "A module.")) == ["p.a", "p.sub"]


def test_all_takes_in_the_all_of_other_modules_however_they_are_named() -> None:
    core = Module("p._core", exports=["a", "*q"], members={"a": function(), "x": function()})
    other = Module("p._core.q", exports=["b"], members={"b": function()})
    module = package(
        exports=["*_core", "*short"],
        wildcards=["p._core", "p._core.q", "p._third"],
        members={"short": alias("p._third")},
    )
    third = Module("p._third", exports=["c"], members={"c": function()})
    assert paths(module, core, other, third) == ["p.a", "p.b", "p.c"]


def test_an_import_that_must_succeed_is_followed_past_an_incomplete_all() -> None:
    assert paths(
        package(members={"add": alias("p._core.add")}),
        package("p._core", wildcards=["p._core.numeric"]),
        Module("p._core.numeric", exports=["zeros"], members={"add": function()}),
    ) == ["p.add"]


def test_circles_of_imports_end() -> None:
    assert (
        paths(
            package(members={"a": alias("p.x.a"), "x": alias("p.x")}, wildcards=["p.x", "p.y"]),
            Module("p.x", members={"a": alias("p.y.a")}, wildcards=["p.y"]),
            Module("p.y", members={"a": alias("p.x.a")}, wildcards=["p.x"]),
        )
        == []
    )


def test_names_are_found_through_a_circle_of_wildcards() -> None:
    assert paths(
        package(),
        Module("p.a", wildcards=["p.b"], members={"one": function()}),
        Module("p.b", wildcards=["p.a"], members={"two": function()}),
    ) == ["p.a.one", "p.b.two"]


def test_a_function_hides_the_submodule_of_its_name() -> None:
    relu = Module("p.relu", "A module.", members={"relu": function("Rectifies.")})
    objects = public_objects(
        {"p": package(members={"relu": alias("p.relu.relu")}), "p.relu": relu}, "p"
    )
    assert [(one.path, one.kind) for one in objects if one.doc] == [("p.relu", "function")]


def test_of_equally_short_paths_the_defining_one_wins_then_the_objects_own_name() -> None:
    members = {"abs": alias("p._c.absolute"), "absolute": alias("p._c.absolute")}
    assert paths(package(members=members), Module("p._c", members={"absolute": function()})) == [
        "p.absolute"
    ]
    assert paths(
        package("p"),
        package("p.a", members={"f": alias("p.b.f")}),
        Module("p.b", members={"f": function()}),
    ) == ["p.b.f"]


def test_an_object_that_a_compiled_module_borrows_is_the_lenders() -> None:
    assert paths(
        package(),
        Module("p.compiled", members={"f": function("Here.", target="p.lender.f")}),
        Module("p.lender", members={"f": function("There.")}),
    ) == ["p.lender.f"]


def test_an_object_that_names_its_public_home_is_found_there() -> None:
    compiled = Module("p._c", members={"array": function("Makes one.", target="p.array")})
    assert paths(package(members={"array": alias("p._c.array")}), compiled) == ["p.array"]


def test_methods_are_named_with_their_class() -> None:
    members = {"C": Name("class", "A class.", members={"run": function()}), "run": function()}
    objects = public_objects({"p": package("p", doc="A package.", members=members)}, "p")
    assert [(one.path, one.name, one.kind) for one in objects] == [
        ("p", "p", "module"),
        ("p.C", "C", "class"),
        ("p.run", "run", "function"),
        ("p.C.run", "C.run", "method"),
    ]


def test_merging_fills_docstrings_and_names_and_keeps_what_there_is() -> None:
    first = Module("p", members={"f": function("First."), "g": Name("attribute")})
    second = Module(
        "p",
        "The module.",
        members={"f": function("Second."), "g": function("G."), "h": function("H.")},
    )
    merge_modules(first, second)
    assert first.doc == "The module."
    assert first.members == {"f": function("First."), "g": function("G."), "h": function("H.")}


def test_only_documented_names_of_a_stub_are_kept() -> None:
    inner = Name("class", members={"run": function(), "walk": function("")})
    kept = documented({"C": inner, "f": function(""), "t": alias("typing.Any")})
    assert kept == {"C": Name("class", members={"run": function()})}
