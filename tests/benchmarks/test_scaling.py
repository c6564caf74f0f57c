"""Predictions of losses whose vocabulary is split over ranks: formulas by hand, and what the page says of them."""

import itertools
import json
import statistics

import pytest

from benchmarks.scaling import gloo, hardware, predictions
from benchmarks.scaling.__main__ import PAGE, PLOT, RECORD, main
from benchmarks.scaling.hardware import (
    ALL_GATHER,
    ALL_REDUCE,
    DEVICES,
    FABRICS,
    REDUCE_SCATTER,
    Collective,
    collective_seconds,
    link_rate,
    sent_bytes,
)
from benchmarks.scaling.predictions import RANKS, VOCABULARIES, first_better, new_record, page_tables, page_with, place
from benchmarks.scaling.schemes import (
    ON_LOGITS,
    OURS,
    OURS_LINEAR,
    REDUCTIONS,
    WITH_PROJECTION,
    Case,
    chunk_lengths,
    exposed_seconds,
    gathered_logits,
    ours,
    ours_linear,
    ours_with_reductions,
    seconds,
)

H100, H200, B200 = DEVICES
NODES, APART = FABRICS
MEASURED = RECORD.parent / "nvidia-h100-80gb-hbm3"
SMALL = Case(tokens=5, vocab_size=11, ranks=3, hidden_size=8)  # 4 columns a rank: 20 local logits


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


@pytest.mark.parametrize(("kind", "sent"), [(ALL_GATHER, 30), (ALL_REDUCE, 15), (REDUCE_SCATTER, 7.5)])
def test_bytes_sent_by_each_of_four_ranks(kind, sent):
    assert sent_bytes(Collective(kind, 10), 4) == sent
    assert sent_bytes(Collective(kind, 10, count=3), 4) == 3 * sent
    assert sent_bytes(Collective(kind, 10), 1) == 0


class TestSchemes:
    def test_ours(self):
        exchanged = 4 * (3 * 5 + 3)  # three float32 numbers of each token, three of the call
        assert ours(SMALL).moved == 3 * 2 * 20 + 2 * (3 + 1) * exchanged
        assert ours(SMALL).sent(3) == 2 * exchanged
        assert ours(SMALL).calls == 1
        kept = (3 + 1) * exchanged + 5 * 8
        assert ours(SMALL, inplace=True).memory == kept
        assert ours(SMALL).memory == kept + 2 * 20
        assert ours(SMALL, label_smoothing=True, sharded_weights=True).sent(3) == 2 * 4 * (5 * 5 + 3 + 1)

    def test_two_all_reduces_send_the_same_numbers(self):
        cost = ours_with_reductions(SMALL)
        assert [collective.kind for collective in cost.collectives] == [ALL_REDUCE, ALL_REDUCE]
        assert sum(collective.payload for collective in cost.collectives) == 4 * (3 * 5 + 3)
        assert cost.collectives[0].payload == 4 * 5

    @pytest.mark.parametrize(
        ("name", "bytes_of_a_logit", "calls"),
        [
            ("Liger-Kernel", 22, 3),
            ("Megatron-LM, fused", 40, 2),
            ("Megatron-LM", 52, 3),
            ("torch loss_parallel", 60, 3),
        ],
    )
    def test_those_that_pass_several_times(self, name, bytes_of_a_logit, calls):
        cost = ON_LOGITS[name](SMALL)
        assert cost.moved == bytes_of_a_logit * 20
        assert cost.calls == calls

    def test_gathered_logits(self):
        cost = gathered_logits(SMALL)
        assert cost.sent(3) == 2 * 2 * 20
        assert cost.moved == 2 * 20 + 5 * 2 * 60 + 2 * 2 * 20
        assert cost.memory == 2 * 2 * 60 + 2 * 20

    def test_ours_with_the_projection(self):
        cost = ours_linear(SMALL, chunk_size=3, label_smoothing=True, sharded_weights=True, sequence_parallel=True)
        assert [(collective.kind, collective.payload) for collective in cost.collectives] == [
            (ALL_GATHER, 4 * 3),
            (ALL_REDUCE, 4 * (5 + 1)),
            (ALL_GATHER, 2 * 5 * 8 // 3),
            (ALL_GATHER, 4 * (4 * 3 + 3 + 1)),
            (ALL_GATHER, 4 * (4 * 2 + 3 + 1)),
            (REDUCE_SCATTER, 4 * 5 * 8),
        ]
        assert cost.collectives[3].behind == 2 * 2 * 4 * 8  # the second chunk's logits
        assert cost.collectives[4].behind == 0
        assert cost.flops == 3 * 2 * 20 * 8
        # By chunks of 3 and 2: weight read for logits and hidden gradient, its gradient written, then read and written.
        hidden, weight, logits = 5 * 8, 4 * 8, 2 * 20
        assert cost.products_moved == 3 * logits + 2 * 2 * hidden + 2 * 2 * 2 * weight + 4 * hidden + 3 * 4 * weight
        plain = ours_linear(SMALL, chunk_size=3)
        exchanged = [4 * (3 * 3 + 3), 4 * (3 * 2 + 3)]
        assert plain.moved == 3 * 2 * 20 + 2 * (3 + 1) * sum(exchanged) + (4 + 2) * (hidden + weight)
        assert plain.memory == 2 * (3 * 2 * 4 + (3 + 1) * exchanged[0]) + 4 * (hidden + weight) + 8 * 5
        half = ours_linear(SMALL, chunk_size=3, accumulated=2)
        assert half.memory == plain.memory - 2 * (hidden + weight)
        assert half.collectives[-1] == Collective(ALL_REDUCE, 2 * hidden)

    def test_chunks_are_those_of_the_loss(self):
        assert chunk_lengths(Case(16384, 128256, 8)) == [2048] * 8
        assert chunk_lengths(Case(100, 32000, 8)) == [100]

    @pytest.mark.parametrize("name", [*ON_LOGITS, *WITH_PROJECTION])
    def test_one_rank_sends_nothing(self, name):
        cost = {**ON_LOGITS, **WITH_PROJECTION}[name](Case(64, 1000, 1))
        assert cost.collectives == ()
        assert cost.sent(1) == 0
        assert exposed_seconds(cost, 1, H100, NODES) == 0

    @pytest.mark.parametrize("name", [name for name in ON_LOGITS if name != "gathered logits"])
    def test_more_ranks_move_fewer_logits(self, name):
        moved = [ON_LOGITS[name](Case(64, 1 << 20, ranks)).moved for ranks in RANKS[:8]]
        assert moved == sorted(moved, reverse=True)

    def test_an_all_gather_grows_with_the_ranks_and_an_all_reduce_does_not(self):
        sent = {
            name: [ON_LOGITS[name](Case(64, 1024, ranks)).sent(ranks) for ranks in RANKS] for name in (OURS, REDUCTIONS)
        }
        payload = 4 * (3 * 64 + 3)
        assert sent[OURS] == [(ranks - 1) * payload for ranks in RANKS]
        assert max(sent[REDUCTIONS]) < 2 * payload


class TestSeconds:
    def test_latencies(self):
        """Of a message of one byte, in microseconds, by the constants of the fastest protocol."""
        found = {
            (kind, ranks, fabric.name): collective_seconds(Collective(kind, 1), ranks, H100, fabric) * 1e6
            for kind in (ALL_GATHER, ALL_REDUCE)
            for ranks in (2, 16)
            for fabric in FABRICS
        }
        assert found == {
            (ALL_GATHER, 2, NODES.name): pytest.approx(6.6 + 0.6, abs=0.01),
            (ALL_GATHER, 16, NODES.name): pytest.approx(6.6 + 14 * 1.0 + 2.7, abs=0.01),
            (ALL_REDUCE, 2, NODES.name): pytest.approx(6.6 + 2 * 0.6, abs=0.01),
            (ALL_REDUCE, 16, NODES.name): pytest.approx(6.8 + 2 * (7 * 0.6 + 5.0), abs=0.01),
            (ALL_GATHER, 2, APART.name): pytest.approx(6.6 + 5.0, abs=0.01),
            (ALL_GATHER, 16, APART.name): pytest.approx(8.0 + 4 * 14 / 3.5 + 16 * 2.8, abs=0.01),
            (ALL_REDUCE, 2, APART.name): pytest.approx(6.6 + 2 * 5.0, abs=0.01),
            (ALL_REDUCE, 16, APART.name): pytest.approx(6.8 + 2 * 4 * 5.0, abs=0.01),
        }

    def test_rates(self):
        gigabyte = Collective(ALL_GATHER, 10**9)
        assert collective_seconds(gigabyte, 8, H100, NODES) == pytest.approx(7e9 / 370.8e9, rel=0.01)
        assert collective_seconds(gigabyte, 8, B200, NODES) == pytest.approx(7e9 / 721.8e9, rel=0.01)
        assert collective_seconds(gigabyte, 8, H100, APART) == pytest.approx(7e9 / 47e9, rel=0.01)
        assert link_rate(16, B200, NODES) == 8 * 47e9  # eight adapters at once

    @pytest.mark.parametrize("kind", [ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER])
    @pytest.mark.parametrize("fabric", FABRICS, ids=lambda fabric: fabric.name)
    def test_more_takes_longer(self, kind, fabric):
        for device, ranks in itertools.product(DEVICES, RANKS[1:]):
            times = [collective_seconds(Collective(kind, 4**power), ranks, device, fabric) for power in range(16)]
            assert times == sorted(times)
        latencies = [collective_seconds(Collective(kind, 1), ranks, H100, fabric) for ranks in RANKS]
        assert latencies == sorted(latencies)
        assert latencies[0] == 0

    def test_a_product_hides_what_is_sent_meanwhile(self):
        cost = ours_linear(Case(16384, 128256, 8))
        alone = [collective_seconds(collective, 8, H100, NODES) for collective in cost.collectives]
        claims, *chunks, gradient = alone
        assert len(chunks) == 8
        assert exposed_seconds(cost, 8, H100, NODES) == pytest.approx(claims + chunks[-1] + gradient)

    def test_the_longer_of_arithmetic_and_memory(self):
        cost = ours(Case(64, 1000, 1))._replace(moved=0)
        assert seconds(cost._replace(flops=10**15), 1, H100, NODES) == pytest.approx(1e15 / H100.product_rate)
        assert seconds(cost._replace(flops=1, products_moved=10**12), 1, H100, NODES) == pytest.approx(1e12 / 3.02e12)

    def test_what_was_measured(self):
        suite = json.loads((MEASURED / "2026-11-27-517d1bb-linear.json").read_text())
        assert suite["bandwidth"]["copy"] == pytest.approx(hardware.H100_COPY, rel=1e-3)
        products = 3 * 2 * 8192 * 4096 * 128256 / (_median(suite, "torch linear") - _median(_suite(), "torch"))
        assert products == pytest.approx(hardware.H100_PRODUCTS, rel=2e-3)


def _suite():
    return json.loads((MEASURED / "2026-11-27-517d1bb.json").read_text())


def _median(document, contender):
    """Seconds of forward + backward at 8192 x 128256."""
    (record,) = (
        record
        for record in document["records"]
        if (record["contender"], record["operation"]) == (contender, "forward-backward")
        and (record["rows"], record["vocab_size"]) == (8192, 128256)
    )
    return statistics.median(record["seconds"])


def test_from_how_many_ranks_on():
    assert first_better(lambda ranks: ranks >= 64) == 64
    assert first_better(lambda ranks: True) == 2
    assert first_better(lambda ranks: False) is None
    assert first_better(lambda ranks: ranks in (4, 512, 1024)) == 512


class TestRecord:
    def test_is_what_the_formulas_say(self, record):
        assert record == json.loads(json.dumps(new_record())), "python -m benchmarks.scaling --write"

    def test_is_on_the_page(self, record):
        text = PAGE.read_text(encoding="utf-8")
        assert page_with(text, page_tables(record)) == text, "python -m benchmarks.scaling --write"
        assert f"]({PLOT.name})" in text
        assert PLOT.exists()

    def test_all_reduces_send_less_from_three_ranks_on(self, record):
        assert {row["sends_less"] for row in record["all_reduces_from"]} == {4}  # 3 is not looked at, and 2 is a tie

    def test_the_all_gather_is_best_in_one_node(self, record):
        """What the page says of it, its exception included."""
        slower = set()
        for tokens, ranks, device in itertools.product(predictions.TOKENS_COMPARED, (2, 4, 8), DEVICES):
            case = Case(tokens, 128256, ranks)
            late = seconds(ours(case), ranks, device, NODES) - seconds(ours_with_reductions(case), ranks, device, NODES)
            assert abs(late) < 25e-6
            if late > 0:
                slower.add((tokens, ranks, device.name))
        assert slower == {(65536, 8, "H100"), (65536, 8, "H200")}
        places = [place(device, NODES) for device in DEVICES]
        assert {row["faster"][where] for row in record["all_reduces_from"] for where in places} == {32, 64}

    def test_what_decides_where(self, record):
        times = _times(record["on_logits"])
        for V, ranks, where in itertools.product(VOCABULARIES, RANKS, (place(device, NODES) for device in DEVICES)):
            at = {scheme: times[scheme, V, ranks][where] for scheme in ON_LOGITS}
            rivals = [at[name] for name in ("Liger-Kernel", "Megatron-LM, fused", "torch loss_parallel")]
            if ranks <= 32:
                assert at[OURS] < min(rivals)
            if ranks == 1024:
                assert at[OURS] > 4 * max(rivals)
            if ranks >= 4:
                assert max(at, key=at.get) == "gathered logits"

    def test_the_fused_loss_saves_memory_with_few_ranks(self, record):
        memory = {
            (row["scheme"], row["ranks"]): row["memory_bytes"]
            for row in record["with_projection"]
            if row["vocab_size"] == 128256
        }
        other = "projection, then pdl_cross_entropy in place"
        assert memory[OURS_LINEAR, 8] < memory[other, 8]
        assert memory[OURS_LINEAR, 64] > memory[other, 64]
        times = _times(record["with_projection"])
        in_bfloat16 = "the same, accumulate_dtype=torch.bfloat16"
        for ranks in (8, 64):
            for where, time in times[other, 128256, ranks].items():
                assert times[OURS_LINEAR, 128256, ranks][where] > time
                assert times[in_bfloat16, 128256, ranks][where] == pytest.approx(time, rel=0.06)


def _times(rows):
    return {(row["scheme"], row["vocab_size"], row["ranks"]): row["seconds"] for row in rows}


class TestProgram:
    def test_prints_and_records_and_draws(self, tmp_path, capsys):
        data, plot = tmp_path / "scaling.json", tmp_path / "scaling.png"
        assert main(["--tokens", "256", "--ranks", "8", "--json", str(data), "--plot", str(plot)]) == 0
        assert json.loads(data.read_text())["tokens"] == 256
        assert plot.read_bytes().startswith(b"\x89PNG")
        shown = capsys.readouterr().out
        assert "256 tokens x 128256, nodes of 8" in " ".join(shown.split())
        assert "nothing was measured on GPUs" in shown

    @pytest.mark.parametrize("arguments", [["--tokens", "0"], ["--ranks", "3"], ["--fabric", "none"]])
    def test_refuses_what_it_cannot_predict(self, arguments):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2

    def test_a_formula_that_is_wrong_is_noticed(self, monkeypatch, capsys):
        said = {"loss": OURS, "forward": [[ALL_GATHER, 300]], "backward": []}
        monkeypatch.setattr(gloo, "run_ranks", lambda groups: {2: [[said]]})
        assert main(["--check-with-gloo"]) == 0
        monkeypatch.setattr(gloo, "ours", lambda case: ours(case, label_smoothing=True))
        assert main(["--check-with-gloo"]) == 1
        assert "the formula says [('all-gather', 400)]" in capsys.readouterr().out


@pytest.mark.cpu_only(reason="its processes have CPU tensors alone")
def test_processes_send_what_the_formulas_say():
    found = list(gloo.comparisons())
    assert {compared.what.split(", ")[1] for compared in found} >= {OURS, OURS_LINEAR, "torch loss_parallel"}
    assert [compared for compared in found if not compared.agrees] == []
