"""Groups, splits that do not fit, ranks that do something else: functions of ranks/sharded_group_* and _trouble_*."""

from helpers.rank_cases import each_case


@each_case("sharded_group_cases")
def test_groups(rank_case, outcomes):
    outcomes.check(rank_case)


@each_case("sharded_agreement_cases")
def test_what_ranks_agree_on(rank_case, outcomes):
    outcomes.check(rank_case)


@each_case("sharded_trouble_cases")
def test_ranks_in_trouble(rank_case, outcomes):
    outcomes.check(rank_case)
