"""The benchmark's table; no test asserts a time."""

from graft.bench.results_table import results_table


def test_the_table_shows_medians_spread_and_ratios() -> None:
    figures = {"resident_bytes": [2e8] * 3}
    shown = results_table(
        "m10",
        {
            "graft": {
                "tokens_per_second": [90.0, 100.0, 130.0],
                "peak_memory_bytes": [1e8],
                **figures,
            },
            "mlx-lm": {"tokens_per_second": [40.0, 50.0, 55.0], **figures},
        },
    )
    ours, theirs = shown.splitlines()[-2:]
    for part in ("100 tokens/s", "(90 to 130)", "200 MB resident", "100 MB in MLX"):
        assert part in ours
    assert "graft x 2.00" in theirs and "in MLX" not in theirs


def test_the_table_tells_the_time_to_a_loss_and_where_it_was_not_reached() -> None:
    speeds = {"tokens_per_second": [100.0] * 3, "resident_bytes": [2e8] * 3}
    shown = results_table(
        "m10-to-loss",
        {
            "graft": {**speeds, "seconds_to_loss": [20.0, 10.0, 12.0]},
            "mlx-lm": {**speeds, "seconds_to_loss": [40.0, 30.0, 36.0]},
            "peft": speeds,
        },
    ).splitlines()
    ours, theirs, never = shown[3], shown[5], shown[7]
    assert ours.strip() == "the loss was reached after 12.0 s  (10.0 to 20.0)"
    assert theirs.strip() == "the loss was reached after 36.0 s  (30.0 to 40.0)  graft x 3.00"
    assert never.strip() == "the loss was not reached"


def test_a_server_s_table_tells_what_sharing_gains_and_costs() -> None:
    figures = {
        "tokens_per_second": [500.0, 900.0, 600.0],
        "one_by_one_tokens_per_second": [150.0, 120.0, 100.0],
        "mixed_over_single": [0.9, 0.95, 0.8],
        "longest_step_while_loading": [2.0, 1.5, 1.75],
        "resident_bytes": [2e8] * 3,
    }
    theirs = {name: figures[name] for name in ("tokens_per_second", "resident_bytes")}
    shown = results_table(
        "serve", {"graft": figures, "mlx-lm": {**theirs, "tokens_per_second": [200.0]}}
    )
    for part in (
        "5.0 times as fast as one after another (120 tokens/s)",
        "at 0.90 of",
        "in ordinary steps: 1.8",
    ):
        assert part in shown
    assert shown.count("times as fast") == 1 and "graft x 3.00" in shown
