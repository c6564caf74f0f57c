"""What a session found, for people: README.md beside the results, and the table at the end."""

import json
from pathlib import Path
from typing import Any

FACTS = ("device", "gpu", "torch", "triton", "kit_triton", "python", "cpu", "commit", "note", "problem", "kit_problem")


def readme(summary: dict[str, Any], results: Path) -> str:
    facts = summary["facts"]
    device = facts.get("device", "a device that is not known")
    lines = [
        f"# {device}",
        "",
        f"{'A rehearsal of' if summary['rehearsal'] else 'Written by'} `scripts/gpu_session.sh` on {summary['date']}; "
        "[docs/gpu.md](../../../docs/gpu.md) says what it does.",
        "",
        f"**{'Every' if summary['passed'] else 'Not every'} stage about correctness passed.**",
        "",
    ]
    lines += [f"- {name}: {_shown(facts[name])}" for name in FACTS if facts.get(name)]
    lines += ["", "| stage | result | s, of at most | question |", "|---|---|---|---|"]
    for stage in summary["stages"]:
        result = stage["status"] + (f": {stage['problem']}" if stage["problem"] else "")
        row = (stage["name"], result, f"{stage['seconds']:.0f} of {stage['limit']}", stage["answers"])
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |")
    files = sorted(path for path in results.rglob("*") if path.is_file())
    if files:
        lines += ["", "Files:", ""]
        lines += [f"- [{path.name}]({path.name}){_described(path)}" for path in files]
    return "\n".join(lines) + "\n"


def _shown(fact: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in fact.items()) if isinstance(fact, dict) else str(fact)


def _described(path: Path) -> str:
    """What a JSON file of ours says in short."""
    if path.suffix != ".json":
        return ""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return ": not whole"
    schema = document.get("schema", "") if isinstance(document, dict) else ""
    if schema == "pdl-kernels doctor check":
        cases = document["cases"]
        right = sum(case["status"] == "right" for case in cases)
        return f": `doctor --check`, {right} of {len(cases)} cases right, {document['seconds']} s"
    if schema == "pdl-kernels benchmark":
        timed = sum(record["status"] == "timed" for record in document["records"])
        kinds = sorted({"linear" if record.get("hidden_size") else "logits" for record in document["records"]})
        triton = document["environment"]["packages"].get("triton")
        counted = f"{timed} of {len(document['records'])} records timed"
        return f": `python -m benchmarks`, Triton {triton}, loss on {' and '.join(kinds)}, {counted}"
    return ""


def table(records: list[dict[str, Any]]) -> str:
    width = max(len(record["name"]) for record in records)
    lines = []
    for record in records:
        problem = f"  {record['problem']}" if record["problem"] else ""
        lines.append(f"{record['name']:<{width}}  {record['status']:<12}  {record['seconds']:>5.0f} s{problem}")
    return "\n".join(lines)
