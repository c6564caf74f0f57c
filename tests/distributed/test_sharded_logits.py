"""The loss on logits whose columns are split over 2, 3 and 4 processes; the cases are functions of ranks/sharded_*."""

from helpers.rank_cases import each_case


@each_case("sharded_split_cases")
def test_splits_and_extreme_rows(rank_case, outcomes):
    outcomes.check(rank_case)


@each_case("sharded_option_cases")
def test_options_and_layouts(rank_case, outcomes):
    outcomes.check(rank_case)


@each_case("sharded_autograd_cases")
def test_autograd(rank_case, outcomes):
    outcomes.check(rank_case)


@each_case("sharded_traced_cases")
def test_tracing_gradcheck_and_triton(rank_case, outcomes):
    outcomes.check(rank_case)
