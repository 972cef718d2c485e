"""Compile kernels for a GPU that is not here, and read what the assembler made of them.

Triton decides when it is imported whether it interprets, so this compiles in a process of its own:
`machine_code(requests)` starts it, and it is this file run as a program. Knows nothing of what kernels compute.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Request:
    """A kernel and what it is compiled for."""

    kernel: str  # "kernels.nf4:_linear_kernel"
    arguments: dict[str, str]  # "*bf16" for pointers, "i32" for numbers, "i32:16" for multiples of 16
    constants: dict[str, Any]  # of every other parameter; lists become tuples
    warps: int
    stages: int
    capability: int  # 80, 90


@dataclass(frozen=True)
class Machine:
    """What came out; a loop is counted by the first part of its instructions' names, innermost loops only."""

    registers: int
    shared: int  # bytes
    spills: int  # loads and stores of local memory
    wgmma: int
    wgmma_from_registers: (
        int  # whose left operand is in registers: miscompiled by some assemblers (triton #9433)
    )
    touched_before_waiting: (
        bool  # global memory, before waiting for the kernel before; also where it never waits
    )
    loops: list[dict[str, int]] = field(default_factory=list)

    @property
    def main_loop(self) -> dict[str, int]:
        return max(self.loops, key=lambda loop: sum(loop.values()))


def machine_code(requests: list[Request]) -> list[Machine]:
    """Compile all in one process, in their order."""
    said = run_apart(__name__, said=json.dumps([asdict(request) for request in requests]))
    return [Machine(**found) for found in json.loads(said)]


def run_apart(module: str, *arguments: str, said: str = "") -> str:
    """What a module prints as a program of its own, in which Triton does not interpret; `said` is its input."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        input=said,
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _compile(request: Request) -> Machine:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = request.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    signature, constants, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        kind, _, multiple = request.arguments.get(argument, "constexpr").partition(":")
        signature[argument] = kind
        if kind == "constexpr":
            value = request.constants[argument]
            constants[(index,)] = tuple(value) if isinstance(value, list) else value
        elif multiple or kind.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": request.warps, "num_stages": request.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", request.capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = _run(tools / "nvdisasm", "-c", file.name)
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
    touches = [
        found.start()
        for found in re.finditer(r"\b(ld|st|atom|red)\.[\w.]*global|cp\.async\.c", compiled.asm["ptx"])
    ]
    waits = compiled.asm["ptx"].find("griddepcontrol.wait")
    multiplied = re.findall(r"wgmma\.mma_async[^;]*;", compiled.asm["ptx"])
    return Machine(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        wgmma=len(multiplied),
        wgmma_from_registers=sum(bool(re.search(r"\}\s*,\s*\{", text)) for text in multiplied),
        touched_before_waiting=waits < 0 or min(touches) < waits,
        loops=[_count(lines) for lines in _innermost_loops(code.splitlines())],
    )


def _run(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _innermost_loops(lines: list[str]) -> list[list[str]]:
    """From the target of each branch backwards to the branch, where no other loop lies inside."""
    labels = {found[1]: at for at, line in enumerate(lines) if (found := re.match(r"\s*(\.L_\w+):", line))}
    loops = [
        (labels[found[1]], at)
        for at, line in enumerate(lines)
        if (found := re.search(r"\bBRA\b[^.;]*\(?(\.L_\w+)", line)) and labels.get(found[1], at) < at
    ]
    return [
        lines[first : last + 1]
        for first, last in loops
        if not any((a, z) != (first, last) and first <= a and z <= last for a, z in loops)
    ]


def _count(lines: list[str]) -> dict[str, int]:
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", "\n".join(lines))
    return dict(collections.Counter(names))


if __name__ == "__main__":
    json.dump([asdict(_compile(Request(**request))) for request in json.load(sys.stdin)], sys.stdout)
