from graft.pretrained.module_paths import collapsed, natural_key


def test_natural_order_puts_two_before_ten() -> None:
    assert sorted(["a.10", "a.2", "a.b"], key=natural_key) == ["a.b", "a.2", "a.10"]


def test_paths_collapse_to_patterns_with_counts() -> None:
    paths = ["a.0.b", "a.1.b", "a.1.c", "head"]
    assert collapsed(paths) == ["a.*.b (2)", "a.1.c", "head"]
