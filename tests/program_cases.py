"""The text of small compiled programs, shared by the tests of what is read from it."""

from sharding.program import Program, parse_program

HEAD = "HloModule jit_step, is_scheduled=true, entry_computation_layout={()->()}\n\n"
ADD = """%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

"""


def program_of(entry: str, others: str = "") -> Program:
    """A program of such instructions, one a line."""
    lines = "\n".join(f"  {line.strip()}" for line in entry.strip().splitlines())
    return parse_program(f"{HEAD}{ADD}{others}ENTRY %main (a: f32[8,4]) -> f32[8,4] {{\n{lines}\n}}\n")
