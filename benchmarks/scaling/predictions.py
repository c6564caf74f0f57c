"""The record of all predictions, who is faster from how many ranks on, and the tables of docs/performance.md."""

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.scaling.hardware import COPY_SHARE, DEVICES, FABRICS, INFINIBAND, PRODUCT_SHARE, Device, Fabric
from benchmarks.scaling.schemes import (
    ON_LOGITS,
    OURS,
    OURS_LINEAR,
    REDUCTIONS,
    WITH_PROJECTION,
    Case,
    Cost,
    seconds,
)

RANKS = tuple(2**power for power in range(11))  # 1 to 1024
VOCABULARIES = (32000, 128256, 262144, 1048576)
TOKENS, HIDDEN_SIZE = 16384, 4096
TOKENS_COMPARED = (1024, 4096, 16384, 65536)
BEGIN = "<!-- predictions: written by python -m benchmarks.scaling --write -->\n"
END = "<!-- end of predictions -->"
SHOWN_VOCABULARY, SHOWN_RANKS = 128256, (8, 64)  # in the tables of the page
LEFT_OUT = ("Megatron-LM",)  # of the page: its fused loss is there

Scheme = Callable[[Case], Cost]


def place(device: Device, fabric: Fabric) -> str:
    """What the record calls a device in a fabric."""
    return f"{device.name}, {fabric.name}"


def new_record(tokens: int = TOKENS, hidden_size: int = HIDDEN_SIZE) -> dict[str, Any]:
    return {
        "what": "predictions by python -m benchmarks.scaling; nothing of it was measured on GPUs",
        "tokens": tokens,
        "hidden_size": hidden_size,
        "dtype": "bfloat16",
        "devices": [device._asdict() for device in DEVICES],
        "assumptions": {"infiniband": INFINIBAND, "share_of_copy": COPY_SHARE, "share_of_products": PRODUCT_SHARE},
        "on_logits": list(_rows(ON_LOGITS, tokens, hidden_size)),
        "with_projection": list(_rows(WITH_PROJECTION, tokens, hidden_size)),
        "all_reduces_from": list(_all_reduces_from()),
        "others_from": list(_others_from(tokens, hidden_size)),
    }


def _rows(schemes: dict[str, Scheme], tokens: int, hidden_size: int) -> Iterable[dict[str, Any]]:
    for V in VOCABULARIES:
        for ranks in RANKS:
            for name, scheme in schemes.items():
                case = Case(tokens, V, ranks, hidden_size)
                cost = scheme(case)
                times = {
                    place(device, fabric): _rounded(seconds(cost, ranks, device, fabric))
                    for device in DEVICES
                    for fabric in FABRICS
                }
                yield {
                    "scheme": name,
                    "vocab_size": V,
                    "ranks": ranks,
                    "moved_bytes": cost.all_moved,
                    "sent_bytes": round(cost.sent(ranks)),
                    "collectives": cost.calls,
                    "memory_bytes": cost.memory,
                    "seconds": times,
                }


def _rounded(number: float) -> float:
    """To four digits, so that a record is as good on another machine."""
    return float(f"{number:.4g}")


# ---------------------------------------------------------------------------------------------------------------------
# From how many ranks on another scheme is better


def first_better(better: Callable[[int], bool]) -> int | None:
    """The fewest ranks, of those that are looked at, from which on it is better at every number of ranks."""
    first = None
    for ranks in reversed(RANKS[1:]):
        if not better(ranks):
            break
        first = ranks
    return first


def faster_from(other: Scheme, own: Scheme, case: Case, device: Device, fabric: Fabric) -> int | None:
    """From how many ranks on `other` is predicted to take less time than `own`."""

    def better(ranks: int) -> bool:
        at = case._replace(ranks=ranks)
        return seconds(other(at), ranks, device, fabric) < seconds(own(at), ranks, device, fabric)

    return first_better(better)


def sends_less_from(other: Scheme, own: Scheme, case: Case) -> int | None:
    def better(ranks: int) -> bool:
        at = case._replace(ranks=ranks)
        return other(at).sent(ranks) < own(at).sent(ranks)

    return first_better(better)


def _all_reduces_from() -> Iterable[dict[str, Any]]:
    """From where on a maximum and a sum over the ranks would beat the one all-gather; whatever the vocabulary."""
    reductions, own = ON_LOGITS[REDUCTIONS], ON_LOGITS[OURS]
    for tokens in TOKENS_COMPARED:
        case = Case(tokens, SHOWN_VOCABULARY, 1)
        yield {
            "tokens": tokens,
            "sends_less": sends_less_from(reductions, own, case),
            "faster": {
                place(device, fabric): faster_from(reductions, own, case, device, fabric)
                for device in DEVICES
                for fabric in FABRICS
            },
        }


def _others_from(tokens: int, hidden_size: int) -> Iterable[dict[str, Any]]:
    for schemes, own in ((ON_LOGITS, OURS), (WITH_PROJECTION, OURS_LINEAR)):
        for V in VOCABULARIES:
            for name, scheme in schemes.items():
                if name == own:
                    continue
                case = Case(tokens, V, 1, hidden_size)
                yield {
                    "scheme": name,
                    "than": own,
                    "vocab_size": V,
                    "faster": {
                        place(device, fabric): faster_from(scheme, schemes[own], case, device, fabric)
                        for device in DEVICES
                        for fabric in FABRICS
                    },
                }


# ---------------------------------------------------------------------------------------------------------------------
# The page


def page_tables(record: dict[str, Any]) -> str:
    """In Markdown, of numbers that stand in the record."""
    ranks = " / ".join(map(str, SHOWN_RANKS)) + " ranks"
    return "\n".join(
        (
            f"The loss on logits of {record['tokens']} tokens x {SHOWN_VOCABULARY} classes, on each of {ranks}:\n",
            *_cost_table(record["on_logits"]),
            f"\nThe same with the output projection, hidden size {record['hidden_size']}:\n",
            *_cost_table(record["with_projection"]),
            "\nThe fewest ranks from which on two all-reduces would be better than the one all-gather:\n",
            *_all_reduces_table(record["all_reduces_from"]),
            "\nThe fewest ranks from which on others take less time, by vocabulary, on H100s in nodes of 8:\n",
            *_others_table(record["others_from"]),
            "",
        )
    )


def _cost_table(rows: list[dict[str, Any]]) -> Iterable[str]:
    h100, b200 = place(DEVICES[0], FABRICS[0]), place(DEVICES[-1], FABRICS[0])
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "moved, MB": lambda row: f"{row['moved_bytes'] / 1e6:.0f}",
        "sent, MB": lambda row: f"{row['sent_bytes'] / 1e6:.1f}",
        "collectives": lambda row: f"{row['collectives']}",
        "extra memory, MB": lambda row: f"{row['memory_bytes'] / 1e6:.0f}",
        "H100, ms": lambda row: f"{row['seconds'][h100] * 1e3:.2f}",
        "B200, ms": lambda row: f"{row['seconds'][b200] * 1e3:.2f}",
    }
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    shown = {(row["scheme"], row["ranks"]): row for row in rows if row["vocab_size"] == SHOWN_VOCABULARY}
    for scheme in dict.fromkeys(row["scheme"] for row in rows if row["scheme"] not in LEFT_OUT):
        cells = (" / ".join(cell(shown[scheme, ranks]) for ranks in SHOWN_RANKS) for cell in columns.values())
        yield f"| {scheme} | {' | '.join(cells)} |"


def _all_reduces_table(rows: list[dict[str, Any]]) -> Iterable[str]:
    places = [place(DEVICES[0], fabric) for fabric in FABRICS]
    yield f"| tokens | fewer bytes sent | {' | '.join(f'less time: {where}' for where in places)} |"
    yield "|---" * (len(places) + 2) + "|"
    for row in rows:
        times = " | ".join(str(row["faster"][where] or "never") for where in places)
        yield f"| {row['tokens']} | {row['sends_less']} | {times} |"


def _others_table(rows: list[dict[str, Any]]) -> Iterable[str]:
    """Of those that are no variants of our own."""
    where = place(DEVICES[0], FABRICS[0])
    yield f"| | than | {' | '.join(map(str, VOCABULARIES))} |"
    yield "|---" * (len(VOCABULARIES) + 2) + "|"
    for than, scheme in dict.fromkeys((row["than"], row["scheme"]) for row in rows):
        if scheme in LEFT_OUT or scheme.startswith((OURS, "the same")):
            continue
        found = [row["faster"][where] for row in rows if (row["than"], row["scheme"]) == (than, scheme)]
        yield f"| {scheme} | {than} | {' | '.join(str(ranks or 'never') for ranks in found)} |"


def page_with(text: str, tables: str) -> str:
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n{tables}\n{text[end:]}"
