"""Files of the cache and records: other settings, damaged files, full disks."""

import json
import lzma
import resource
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from helpers.quality import PDL, TINY, files_in, one_line

from benchmarks.quality import records
from benchmarks.quality.cache import Cache
from benchmarks.quality.errors import UserError
from benchmarks.quality.matrix import run_all
from benchmarks.quality.settings import for_device, quick

NO_SPACE = "No space left on device"


def test_other_settings_have_another_folder(tmp_path):
    changed = {
        "model": "other",
        "model_version": "2",
        "layers": None,
        "training_pairs": 25,
        "validation_pairs": 7,
        "held_out_pairs": 7,
        "batch_size": 5,
        "learning_rates": (1e-3,),
        "search_steps": 4,
        "seeds": 3,
        "compute_dtype": "bfloat16",
    }
    assert set(changed) == {field.name for field in fields(TINY)}
    every = [TINY, *(replace(TINY, **{name: value}) for name, value in changed.items())]
    assert len({Cache(tmp_path, settings).folder for settings in every}) == len(every)
    assert Cache(tmp_path, replace(TINY)).folder == Cache(tmp_path, TINY).folder
    assert Cache(tmp_path, TINY).load("settings.json") == json.loads(json.dumps(TINY.facts()))


def test_a_gpu_trains_everything_and_a_cpu_the_last_layers():
    cpu = for_device(torch.device("cpu"), torch.bfloat16, "folder", "v")
    gpu = for_device(torch.device("cuda"), torch.bfloat16, "folder", "v")
    assert (cpu.model, cpu.model_version, cpu.layers, cpu.compute_dtype) == ("folder", "v", 4, "bfloat16")
    assert (gpu.model, gpu.model_version, gpu.layers, gpu.compute_dtype) == ("folder", "v", None, "bfloat16")
    assert max(gpu.learning_rates) < min(cpu.learning_rates)
    everything = for_device(torch.device("cpu"), torch.float32, None, "", "all")
    assert (everything.layers, everything.learning_rates) == (None, gpu.learning_rates)
    for device in (torch.device("cpu"), torch.device("cuda")):
        last = for_device(device, torch.float32, None, "", 2)
        assert (last.layers, last.learning_rates) == (2, cpu.learning_rates)
    small = quick(cpu)
    assert (small.seeds, small.learning_rates) == (1, cpu.learning_rates[1:2])
    assert 1 < small.steps < cpu.steps / 10
    assert (small.layers, small.compute_dtype) == (cpu.layers, cpu.compute_dtype)


def test_what_is_kept_comes_back(tmp_path):
    cache = Cache(tmp_path, TINY)
    assert cache.load("dialogue/x.json") is None
    assert cache.load("dialogue/x.pt") is None
    cache.save("dialogue/x.json", {"a": [1, None, 2.5]})
    cache.save("dialogue/x.pt", {"values": torch.arange(3).bfloat16()})
    again = Cache(tmp_path, TINY)
    assert again.load("dialogue/x.json") == {"a": [1, None, 2.5]}
    found = again.load("dialogue/x.pt")["values"]
    assert (found.dtype, found.tolist()) == (torch.bfloat16, [0, 1, 2])
    cache.save("dialogue/x.pt", {"values": torch.zeros(3)})
    assert found.tolist() == [0, 1, 2], "what was read before stays as it was"
    again.remove("dialogue/x.pt")
    again.remove("dialogue/x.pt")
    assert cache.load("dialogue/x.pt") is None


# Damaged files

DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "overwritten": lambda content: b"\xff" * len(content),
}
OF_A_RUN = ("pairs.json", "training.pt", "pdl-1-learning-rate.json", "pdl-1-seed0.pt", "pdl-1-seed0.json")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_the_cache_is_named(make_experiment, count_calls, damage):
    count_calls("decode", failing=2)
    experiment = make_experiment()
    with pytest.raises(KeyboardInterrupt):
        run_all(experiment, [PDL])
    for name in OF_A_RUN:
        path = experiment.cache.path(f"dialogue/{name}")
        whole = path.read_bytes()
        path.write_bytes(DAMAGES[damage](whole))
        with pytest.raises(UserError) as caught:
            run_all(make_experiment(), [PDL])
        assert one_line(caught).startswith(f"{path} cannot be read (")
        assert one_line(caught).endswith("): delete it and start again")
        path.write_bytes(whole)


def test_tensors_damaged_in_a_few_bytes_are_named(tmp_path):
    cache = Cache(tmp_path, TINY)
    cache.save("x.pt", {"values": torch.zeros(3), "offsets": torch.arange(2)})
    whole = cache.path("x.pt").read_bytes()
    start = whole.index(b"ctorch._utils\n_rebuild_tensor")
    errors = set()
    for place in range(start, start + 200, 7):
        cache.path("x.pt").write_bytes(whole[:place] + b"N" + whole[place + 1 :])
        try:
            cache.load("x.pt")
        except Exception as error:
            errors.add(type(error))
    assert errors == {UserError}


# A disk that fills up


@pytest.mark.parametrize("name", ["x.json", "dialogue/x.pt"])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path, name, set_disk_full):
    cache = Cache(tmp_path, TINY)
    cache.save(name, {})
    before = files_in(tmp_path), cache.load(name)
    set_disk_full(True)
    with pytest.raises(UserError) as caught:
        cache.save(name, {"x": 1})
    assert one_line(caught) == f"{cache.path(name)}: {NO_SPACE}"
    assert (files_in(tmp_path), cache.load(name)) == before
    with pytest.raises(UserError, match=NO_SPACE):
        Cache(tmp_path, replace(TINY, seeds=1))
    assert files_in(tmp_path) == before[0]


@pytest.mark.parametrize("name", ["x.json", "x.pt"])
def test_a_file_that_cannot_be_written_to_its_end_is_told_and_the_one_before_stays(tmp_path, name):
    cache = Cache(tmp_path, TINY)
    small, large = ({"x": torch.ones(2)}, {"x": torch.ones(100_000)}) if name == "x.pt" else (["x"], ["x"] * 100_000)
    cache.save(name, small)
    before = files_in(tmp_path), cache.path(name).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes: a write beyond fails as on a full disk
    try:
        with pytest.raises(UserError) as caught:
            cache.save(name, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert one_line(caught).startswith(f"{cache.path(name)}: ")
    assert (files_in(tmp_path), cache.path(name).read_bytes()) == before


def test_a_record_on_a_full_disk_is_told_and_leaves_nothing(tmp_path, set_disk_full):
    set_disk_full(True)
    with pytest.raises(UserError) as caught:
        records.write(tmp_path / "dialogue" / "x.json.xz", {"a": 1})
    assert one_line(caught) == f"{tmp_path / 'dialogue' / 'x.json.xz'}: {NO_SPACE}"
    assert files_in(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for use in (
        lambda: Cache(file, TINY),
        lambda: records.write(file / "x.json.xz", {}),
    ):
        with pytest.raises(UserError) as caught:
            use()
        assert one_line(caught).startswith(str(file))


# Records


def test_scores_of_texts_are_kept_as_whole_numbers():
    scores = {"rouge_l": np.array([0.12349, 1.0]), "chrf": np.array([45.6789, 0.0]), "rare_hits": np.array([3, 0])}
    kept = records.compact(scores)
    assert kept == {"rouge_l": [123, 1000], "chrf": [45679, 0], "rare_hits": [3, 0]}
    back = records.expanded(json.loads(json.dumps(kept)))
    assert back["rouge_l"].tolist() == [0.123, 1.0]
    assert back["chrf"].tolist() == [45.679, 0.0]
    assert back["rare_hits"].tolist() == [3, 0]


def test_a_record_comes_back_as_it_was_written(tmp_path):
    path = records.record_path(tmp_path, "dialogue", "pdl-1", 2)
    assert path == tmp_path / "dialogue" / "pdl-1-seed2.json.xz"
    document = {"texts": ["naïve \u2028 text"], "n": 1.5}
    records.write(path, document)
    assert records.read(path) == {"schema": records.SCHEMA, "version": records.VERSION, **document}
    assert files_in(tmp_path) == ["dialogue/pdl-1-seed2.json.xz"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lzma.compress(b'{"schema": "pdl-kernels quality", "version": 1}'), "expected pdl-kernels quality 2"),
        (lzma.compress(b'{"version": 2}'), "expected pdl-kernels quality 2"),
        (lzma.compress(b'{"schema": "pdl'), "cannot be read: "),
        (lzma.compress(b'{"schema": "pdl-kernels quality", "version": 2}')[:-20], "cannot be read: "),
        (b"not compressed", "cannot be read: "),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, content, told):
    path = tmp_path / "x.json.xz"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        records.read(path)
    assert told in one_line(caught)
    assert one_line(caught).startswith(str(path))
    with pytest.raises(UserError, match=r"missing\.json\.xz cannot be read"):
        records.read(tmp_path / "missing.json.xz")
