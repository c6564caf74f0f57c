"""The loss fused with an output projection whose rows are split over processes: functions of ranks/sharded_linear_*."""

from helpers.rank_cases import each_case


@each_case("sharded_linear_cases")
def test_linear(rank_case, outcomes):
    outcomes.check(rank_case)
