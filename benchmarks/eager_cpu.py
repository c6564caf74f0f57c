"""The eager backend against torch on a CPU: time of forward + backward, and peak memory, as ratios.

    python -m benchmarks.eager_cpu [--threads 2] [--repeats 5] [--output FILE.json]

Everything compared runs interleaved in one process after a warm-up; the table shows medians with the 20th and 80th
percentile. Each contender is checked against the float64 reference before it is timed. Peak memory is measured in a
fresh process per contender, as the growth of the resident set over its inputs.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from pdl_kernels import pdl_cross_entropy, power_law_weights
from reference import reference_cross_entropy

SHAPES = ((1024, 32000), (512, 128256))  # rows, vocabulary
DTYPES = ("float32", "bfloat16")
# The goals of forward + backward: (time, at least so many times faster; memory, at most this share of torch's).
GOALS = {("float32", "new memory"): 2.0, ("bfloat16", "new memory"): 1.4}
INPLACE_GOAL = 2.0
MEMORY_GOAL = 0.5


def make_inputs(rows: int, vocab_size: int, dtype: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits like a trained model's (a few confident rows), Zipf targets, weights from the same counts."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, vocab_size + 1, dtype=torch.float64)
    frequencies = 1 / ranks
    targets = torch.multinomial(frequencies, rows, replacement=True, generator=generator)
    logits = torch.randn(rows, vocab_size, generator=generator) * 2
    confident = torch.arange(0, rows, 4)
    logits[confident, targets[confident]] += 15
    counts = (frequencies / frequencies.sum() * 1e8).round()
    return logits.to(getattr(torch, dtype)), targets, power_law_weights(counts, alpha=0.4, eps=1.0)


def torch_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, weight=weights.to(logits.dtype))


def pdl_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return pdl_cross_entropy(logits, targets, weights, backend="eager")


def pdl_loss_inplace(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return pdl_cross_entropy(logits, targets, weights, backend="eager", inplace=True)


CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "torch": torch_loss,
    "new memory": pdl_loss,
    "in place": pdl_loss_inplace,
}


class _Identity(torch.autograd.Function):
    """Makes a non-leaf of the logits without copying them; what it returns may be overwritten."""

    @staticmethod
    def forward(ctx: object, leaf: Tensor, storage: Tensor) -> Tensor:
        return storage.detach()

    @staticmethod
    def backward(ctx: object, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


def forward_backward(name: str, logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[float, Tensor, Tensor]:
    """Seconds, loss and gradient of one forward + backward on logits that a model would have made."""
    storage = logits.clone() if name == "in place" else logits
    leaf = torch.zeros((), dtype=logits.dtype).expand(logits.shape).requires_grad_()
    made = _Identity.apply(leaf, storage)
    start = time.perf_counter()
    loss = CONTENDERS[name](made, targets, weights)
    (gradient,) = torch.autograd.grad(loss, made)
    return time.perf_counter() - start, loss, gradient


def check(name: str, rows: int, vocab_size: int, dtype: str) -> None:
    """Raise unless loss and gradient agree with float64 to what the dtype allows."""
    logits, targets, weights = make_inputs(rows, vocab_size, dtype)
    exact = logits[:16].double().requires_grad_()
    expected, _ = reference_cross_entropy(exact, targets[:16], weights)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    _, loss, gradient = forward_backward(name, logits[:16].clone(), targets[:16], weights)
    loss_tolerance, gradient_tolerance = (1e-5, 1e-4) if dtype == "float32" else (3e-2, 2e-2)
    loss_error = ((loss.double() - expected).abs() / expected.abs()).item()
    gradient_error = ((gradient.double() - expected_gradient).abs().max() / expected_gradient.abs().max()).item()
    if not (loss_error <= loss_tolerance and gradient_error <= gradient_tolerance):
        raise SystemExit(f"{name} is wrong at {rows} x {vocab_size} {dtype}: {loss_error:.1e}, {gradient_error:.1e}")


def peak_extra_bytes(name: str, rows: int, vocab_size: int, dtype: str, threads: int) -> int:
    """Growth of the peak resident set during one forward + backward, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.eager_cpu", "--measure-memory", name, str(rows), str(vocab_size)]
    command += [dtype, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.strip().splitlines()[-1])


def measure_memory(name: str, rows: int, vocab_size: int, dtype: str) -> int:
    warm_up = make_inputs(8, 1000, dtype)
    forward_backward(name, *warm_up)
    logits, targets, weights = make_inputs(rows, vocab_size, dtype)
    # What making the inputs took is given back, so that the peak below is the loss's own.
    filler = torch.empty(0)
    del filler
    page = resource.getpagesize()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * page
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    storage = logits
    leaf = torch.zeros((), dtype=logits.dtype).expand(logits.shape).requires_grad_()
    made = _Identity.apply(leaf, storage)
    loss = CONTENDERS[name](made, targets, weights)
    torch.autograd.grad(loss, made)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return max(peak - before, 0)


def percentiles(samples: list[float]) -> tuple[float, float, float]:
    ordered = torch.tensor(samples).sort().values
    return tuple(ordered.quantile(q).item() for q in (0.5, 0.2, 0.8))


def run(threads: int, repeats: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []
    steps = len(SHAPES) * len(DTYPES) * len(CONTENDERS) * (repeats + 3)
    with tqdm(total=steps, unit="run", desc="eager backend") as progress:
        for rows, vocab_size in SHAPES:
            for dtype in DTYPES:
                inputs = make_inputs(rows, vocab_size, dtype)
                samples: dict[str, list[float]] = {name: [] for name in CONTENDERS}
                for name in CONTENDERS:
                    check(name, rows, vocab_size, dtype)
                    forward_backward(name, *inputs)
                    progress.update(2)
                for _ in range(repeats):
                    for name in CONTENDERS:
                        samples[name].append(forward_backward(name, *inputs)[0])
                        progress.update()
                for name in CONTENDERS:
                    memory = peak_extra_bytes(name, rows, vocab_size, dtype, threads)
                    progress.update()
                    row = {"rows": rows, "vocab_size": vocab_size, "dtype": dtype, "contender": name}
                    results.append({**row, "seconds": samples[name], "peak_extra_bytes": memory})
    return results


def report(results: list[dict[str, object]]) -> None:
    print(
        f"\n{'shape':>14} {'dtype':>9} {'contender':>11} {'ms':>8} {'p20':>8} {'p80':>8} {'speed':>7} {'extra MB':>9}"
    )
    for group in range(0, len(results), len(CONTENDERS)):
        base = results[group]
        base_time = percentiles(base["seconds"])[0]
        for row in results[group : group + len(CONTENDERS)]:
            median, low, high = percentiles(row["seconds"])
            name, dtype = row["contender"], row["dtype"]
            line = (
                f"{row['rows']:>6} x {row['vocab_size']:>5} {dtype:>9} {name:>11} {median * 1e3:8.1f} {low * 1e3:8.1f}"
            )
            line += f" {high * 1e3:8.1f} {base_time / median:6.2f}x {row['peak_extra_bytes'] / 1e6:9.0f}"
            if name != "torch":
                goal = GOALS.get((dtype, name), INPLACE_GOAL)
                share = row["peak_extra_bytes"] / base["peak_extra_bytes"]
                met = base_time / median >= goal, share <= MEMORY_GOAL
                line += f"   {goal}x {'met' if met[0] else 'missed'}; memory {share:.2f} of torch's, "
                line += f"goal {MEMORY_GOAL} {'met' if met[1] else 'missed'}"
            print(line)


def write_json(path: Path, results: list[dict[str, object]], threads: int) -> None:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    environment = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": model,
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"environment": environment, "results": results}, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write every sample and the environment as JSON")
    parser.add_argument("--measure-memory", nargs=4, metavar=("NAME", "ROWS", "V", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure_memory:
        name, rows, vocab_size, dtype = arguments.measure_memory
        print(measure_memory(name, int(rows), int(vocab_size), dtype))
        return
    print(f"torch {torch.__version__}, {arguments.threads} threads, forward + backward, upstream gradient 1")
    results = run(arguments.threads, arguments.repeats)
    report(results)
    if arguments.output:
        write_json(arguments.output, results, arguments.threads)


if __name__ == "__main__":
    main()
