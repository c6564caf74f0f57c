"""The loss on logits that are a DTensor, on meshes of 2, 4 and 2 x 2 ranks: functions of ranks/sharded_dtensor_*."""

from helpers.rank_cases import each_case


@each_case("sharded_dtensor_cases")
def test_dtensors(rank_case, outcomes):
    outcomes.check(rank_case)
