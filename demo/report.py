"""The table of gates in the README: written from measures, and read back for the test that holds it to them.

It knows the README's markers and the table's rows; it measures nothing.
"""

from pathlib import Path

from demo.evaluate import MODELS, Measures
from demo.grammar import ADAPTERS
from demo.lexicon import DOMAINS

BEGIN, STOP = "<!-- gates: written by demo.make -->", "<!-- end of gates -->"

Cells = dict[str, list[str]]


def cells(measures: Measures) -> Cells:
    """The table's rows by their first column; the other columns are the models, then the gate."""
    rows: Cells = {}
    for adapter in ADAPTERS:
        values = [f"{measures.perplexity[adapter][model]:.2f}" for model in MODELS]
        gate = f"own / next best {measures.ratio(adapter):.2f} (at most 0.80)"
        rows[f"{adapter}: held-out perplexity"] = [*values, gate]
    for domain in DOMAINS:
        values = [f"{measures.exact[domain][model]:.1%}" for model in MODELS]
        rows[f"{domain}: facts exact"] = [*values, "own at least 90 %, others at most 5 %"]
    senses = [f"{measures.sense[model]:.1%}" if model in measures.sense else "" for model in MODELS]
    rows["right sense on held-out pairs"] = [*senses, "at least 90 %"]
    tones = [f"{measures.tone[model]:.1%}" if model in measures.tone else "" for model in MODELS]
    rows["support tone on held-out pairs"] = [*tones, "support at least 90 %, others at most 5 %"]
    return rows


def table(measures: Measures) -> str:
    """The rows as Markdown, each domain's own figure in bold."""
    lines = [f"| | {' | '.join(MODELS)} | gate |", "|---" * (len(MODELS) + 2) + "|"]
    for name, row in cells(measures).items():
        marked = [
            f"**{value}**" if name.startswith(f"{model}:") else value
            for model, value in zip(MODELS, row, strict=False)
        ]
        lines.append(f"| {name} | {' | '.join([*marked, row[-1]])} |")
    return "\n".join(lines)


def write_table(readme: Path, measures: Measures, note: str) -> None:
    """Puts the table, and a note on how it was made, between the README's markers; a new README is just these."""
    text = readme.read_text() if readme.exists() else f"{BEGIN}\n{STOP}\n"
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(STOP)
    readme.write_text(f"{before}{BEGIN}\n{table(measures)}\n\n{note}\n{STOP}{after}")


def read_table(readme: Path) -> Cells:
    """The rows that the README prints, without their bold marks."""
    _, _, rest = readme.read_text().partition(BEGIN)
    text, _, _ = rest.partition(STOP)
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    rows = ([cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines)
    return {name: values for name, *values in rows}
