"""docs/performance.md from the newest runs in `loadtests/results`: tables, a picture, and their source.

make bench-report
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from tests.bench.figures import RESULTS

DOCS = Path(__file__).parents[2] / "docs"
Line = dict[str, Any]


def runs(name: str) -> list[list[Line]]:
    """The lines of each run that is kept, the newest last; none if there is no such file."""
    file = RESULTS / f"{name}.jsonl"
    found: dict[str, list[Line]] = defaultdict(list)
    for line in file.read_text().splitlines() if file.exists() else []:
        found[json.loads(line)["run"]].append(json.loads(line))
    return list(found.values())


def tables(lines: list[Line]) -> dict[str, dict[str, dict[int, float]]]:
    """Part of the run -> contestant -> batch (or tokens) -> seconds."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        if "case" in line:
            who, size = line["case"]
            found[line["name"]][who][size] = line["seconds"]
    return found


def as_table(title: str, seconds: dict[str, dict[int, float]], unit: str) -> list[str]:
    """Tokens per second, a row per contestant."""
    sizes = sorted({size for row in seconds.values() for size in row})
    head = [f"| {title} | " + " | ".join(f"{unit} {size}" for size in sizes) + " |"]
    head.append("| --- |" + " ---: |" * len(sizes))
    for who, row in seconds.items():
        cells = [f"{size / row[size]:.1f}" if size in row else "" for size in sizes]
        head.append(f"| {who} | " + " | ".join(cells) + " |")
    return [*head, ""]


def picture(seconds: dict[str, dict[int, float]], path: Path) -> None:
    """Tokens per second over the batch, a line per contestant."""
    figure, axes = pyplot.subplots(figsize=(9, 4))
    for who, row in seconds.items():
        sizes = sorted(row)
        axes.plot(sizes, [size / row[size] for size in sizes], marker="o", label=who)
    axes.set(xlabel="sequences in the batch", ylabel="tokens per second", ylim=(0, None))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    pyplot.rcParams["svg.hashsalt"] = "loraplex"
    figure.savefig(path, metadata={"Date": None})


def source(line: Line) -> str:
    """Where a run's numbers are from."""
    where = f"at commit {line['commit']} on {line['machine']}, {line['run']}, seed {line['seed']}"
    return f"From `{line['command']}` {where}"


def speed(ended: list[list[Line]]) -> list[str]:
    """What the newest run of `make bench-cpu` found, and the figures of the newest on each machine."""
    lines = ended[-1]
    found = tables(lines)
    mixed = {f"{who}, own adapters": row for who, row in found["mixed"].items()}
    picture(found["decode"] | mixed, DOCS / "performance-cpu.svg")
    return [
        f"{source(lines[0])}: a Llama of 1.1 billion weights (16 layers, 2048 wide, 8192 inside, 32 heads, 8 of keys), "
        "random weights in NF4. Tokens per second, from the median step.",
        "",
        *as_table("decode, base alone", found["decode"], "batch"),
        *as_table("decode with adapters (rank 16, all linears, bfloat16)", found["adapters"], "batch"),
        *as_table("decode, every sequence its own adapter", found["mixed"], "batch"),
        *as_table("prefill", found["prefill"], "tokens"),
        "![Tokens per second over the batch](performance-cpu.svg)",
        "",
        *machines(ended),
    ]


def machines(ended: list[list[Line]]) -> list[str]:
    """A row per figure, a column per machine; what is short is bold, with its bound where that is not the row's."""
    newest: dict[str, list[Line]] = {}
    for lines in reversed(ended):
        newest.setdefault(lines[0]["machine"], lines)
    kept = [{line["name"]: line for line in lines if "status" in line} for lines in newest.values()]
    head = ["| figure | bound | " + " | ".join(newest) + " |", "| --- | ---: |" + " ---: |" * len(newest)]
    rows = []
    for name, line in kept[0].items():
        cells = [figure_cell(figures[name], line["bound"]) if name in figures else "" for figures in kept]
        rows.append(f"| `{name}` | {line['bound']:.3g} | " + " | ".join(cells) + " |")
    runs = [
        f"- {machine}: commit {lines[0]['commit']}, `{lines[0]['command']}`, {lines[0]['run']}"
        for machine, lines in newest.items()
    ]
    return [*head, *rows, "", "Short of its bound: **bold**. The newest run on each machine:", "", *runs]


def figure_cell(line: Line, bound: float) -> str:
    if line["value"] is None:
        return line["why"]
    value = f"{line['value']:.3g}" + (f" of {line['bound']:.3g}" if line["bound"] != bound else "")
    return f"**{value}**" if line["status"] == "short" else value


def figure_row(line: Line) -> str:
    if line["value"] is None:
        return f"| `{line['name']}` | | {line['bound']:.3g} | unmeasured: {line['why']} | {line['commit']} |"
    return f"| `{line['name']}` | {line['value']:.3g} | {line['bound']:.3g} | {line['status']} | {line['commit']} |"


def quality(lines: list[Line]) -> list[str]:
    """What one run of `tests.bench.int8_quality` found."""
    rows = ["| | tokens | perplexity fp32 | perplexity int8 | same next token | logit error |"]
    rows.append("| --- |" + " ---: |" * 5)
    for line in lines:
        demo = line["name"] == "demo"
        of = f"demo, {line['model']}" if demo else f"1.1 billion random weights, {line['model']}"
        perplexities = [f"{line[f'perplexity_{math}']:.4f}" if demo else "" for math in ("fp32", "int8")]
        agreement, error = f"{line['agreement']:.2%}", f"{line['logit_error']:.2%}"
        rows.append("| " + " | ".join([of, str(line["tokens"]), *perplexities, agreement, error]) + " |")
    return [f"{source(lines[0])}:", "", *rows]


def gpus() -> list[str]:
    """Every GPU that was measured, by the newest that complete runs on it say of each thing."""
    found = []
    for file in sorted(RESULTS.glob("*-bench.jsonl")):
        ended = complete(file.stem)
        found += [gpu(file.stem.removesuffix("-bench"), newest(ended))] if ended else []
    return [line for part in found for line in (*part, "")][:-1]


def newest(ended: list[list[Line]]) -> list[Line]:
    """Of each measurement and figure the last line, from the last whole run on: later ones may be of parts only."""
    whole = [number for number, lines in enumerate(ended) if lines[0]["command"] == "make gpu-bench"]
    since = ended[whole[-1] :] if whole else ended
    found = {(line["name"], str(line.get("case"))): line for lines in since for line in lines}
    return list(found.values())


def sources(lines: list[Line]) -> list[str]:
    """Where the numbers of all these lines are from, a run after the other."""
    found = {
        (line["run"], line["commit"]): source(line) for line in lines if {"seconds", "status"} & line.keys()
    }
    return [f"- {found[key]}" for key in sorted(found)]


def kernels(lines: list[Line]) -> list[str]:
    """Where the time of a decode step goes: a row per kernel that takes a hundredth of a millisecond."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for line in lines:
        kind, name = line["case"]
        found[name][kind] = line["seconds"] * 1e3
    kinds = list(dict.fromkeys(line["case"][0] for line in lines))
    rows = [
        f"| `{name}` | " + " | ".join(f"{row[kind]:.3g}" if kind in row else "" for kind in kinds) + " |"
        for name, row in sorted(found.items(), key=lambda item: -max(item[1].values()))
        if max(row.values()) >= 0.01
    ]
    return [f"| kernel, ms of a step | {' | '.join(kinds)} |", "| --- |" + " ---: |" * len(kinds), *rows, ""]


def gpu(name: str, lines: list[Line]) -> list[str]:
    """One GPU's tables, picture and figures."""
    (bandwidth,) = (line["gb_per_s"] for line in lines if line["name"] == "bandwidth")
    (card,) = (line["gpu"] for line in lines if line["name"] == "gpu")
    decode = [line for line in lines if line["name"] == "decode"]
    picture(tables(decode)["decode"], DOCS / f"performance-{name}.svg")
    return [
        f"### {card}",
        "",
        f"A Llama of 8 billion random weights in NF4; memory read and written at {bandwidth:.0f} GB/s. Milliseconds; "
        "in brackets how many times the floor: the time that its bytes take at that speed. Each is the newest of:",
        "",
        *sources(lines),
        "",
        *gpu_table(
            "the linears of all layers", "rows", [line for line in lines if line["name"] == "linears"]
        ),
        *gpu_table("a decode step at 1024 tokens", "batch", decode),
        "| other | case | ms |",
        "| --- | --- | ---: |",
        *(
            f"| {line['name']} | {' '.join(map(str, line['case']))} | {milliseconds(line)} |"
            for line in lines
            if line["name"] not in ("product", "linears", "decode", "upload", "kernel")
            and {"case", "seconds"} <= line.keys()
        ),
        "",
        *kernels([line for line in lines if line["name"] == "kernel"]),
        f"![A decode step over the batch](performance-{name}.svg)",
        "",
        "| figure | value | bound | | commit |",
        "| --- | ---: | ---: | --- | --- |",
        *(figure_row(line) for line in lines if "status" in line),
    ]


def gpu_table(title: str, unit: str, lines: list[Line]) -> list[str]:
    """Milliseconds, a row per contestant and a column per size."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for line in lines:
        who, size = line["case"]
        found[who][size] = milliseconds(line)
    sizes = sorted({size for row in found.values() for size in row})
    head = [f"| {title} | " + " | ".join(f"{unit} {size}" for size in sizes) + " |"]
    head.append("| --- |" + " ---: |" * len(sizes))
    rows = (
        f"| {who} | " + " | ".join(row.get(size, "") for size in sizes) + " |" for who, row in found.items()
    )
    return [*head, *rows, ""]


def milliseconds(line: Line) -> str:
    floor = line.get("floor_seconds")
    times = f" ({line['seconds'] / floor:.2f})" if floor else ""
    return f"{line['seconds'] * 1e3:.3g}{times}"


def complete(name: str) -> list[list[Line]]:
    """The runs that came to their end: to their figures, or to the last model that they score."""
    return [lines for lines in runs(name) if "status" in lines[-1] or lines[-1].get("model") == "adapter"]


def rewritten(page: str) -> str:
    """The page with the newest complete run of each kind between its marks; what was never run says so."""
    timed, scored = complete("cpu"), complete("int8")
    sections = {
        "cpu": speed(timed) if timed else [],
        "int8": quality(scored[-1]) if scored else [],
        "gpu": gpus(),
    }
    for name, lines in sections.items():
        begin, end = f"<!-- {name}: generated by tests/bench/report.py -->", f"<!-- end of {name} -->"
        before, found, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        assert found, f"docs/performance.md has no {begin}"
        assert ended, f"docs/performance.md has no {end}"
        text = "\n".join(lines) or "Not run yet."
        page = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    return page


def main() -> int:
    page = DOCS / "performance.md"
    page.write_text(rewritten(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
