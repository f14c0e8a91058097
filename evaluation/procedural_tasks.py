"""Procedural tasks with dense answers: made here, solved here, and held out by content.

A tiny model learns each in minutes, or shows how far it gets. What must not be shared between
training and testing (a row, a grid, a word) is a puzzle's content, and decides its part.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Literal

Part = Literal["train", "validation", "held_out"]
RESIDUES = 8  # of the content's hash: 0 is held out, 1 for validation, the others to train on


@dataclass(frozen=True, slots=True)
class Puzzle:
    """A question with its answer, and what of it must stay in one part of the data."""

    content: str
    instruction: str
    response: str


@dataclass(frozen=True, slots=True)
class ProceduralTask:
    """How puzzles are drawn, and how an answer is judged from the question alone."""

    name: str
    draw: Callable[[Random], Puzzle]
    is_right: Callable[[str, str], bool]  # (instruction, answer)


def part_of(content: str) -> Part:
    """The part that a content belongs to, whatever the seed."""
    residue = hashlib.blake2b(content.encode(), digest_size=8).digest()[0] % RESIDUES
    return "held_out" if residue == 0 else "validation" if residue == 1 else "train"


# Elementary cellular automaton, rule 110, zeros beyond both ends: the row after k steps.

CA_BITS, CA_MAX_STEPS, CA_RULE = 16, 6, 110


def _draw_ca(random: Random) -> Puzzle:
    row = f"{random.getrandbits(CA_BITS):0{CA_BITS}b}"
    steps = random.randint(1, CA_MAX_STEPS)
    return Puzzle(row, f"ca {steps} {row}", evolved(row, steps))


def evolved(row: str, steps: int) -> str:
    """The row of bits after that many steps of the automaton."""
    for _ in range(steps):
        padded = f"0{row}0"
        row = "".join(
            str(CA_RULE >> int(padded[at : at + 3], 2) & 1) for at in range(len(padded) - 2)
        )
    return row


def _ca_is_right(instruction: str, answer: str) -> bool:
    _, steps, row = instruction.split(" ")
    return answer == evolved(row, int(steps))


# Flood fill: mark the free cells (.) that can be reached from s, walls are #.

FLOOD_SIZE, FLOOD_WALLS, FLOOD_MIN_REACHED = 5, 0.4, 4


def _draw_flood(random: Random) -> Puzzle:
    while True:
        cells = ["#" if random.random() < FLOOD_WALLS else "." for _ in range(FLOOD_SIZE**2)]
        walls = "".join(cells)
        free = [at for at, cell in enumerate(cells) if cell == "."]
        if not free:
            continue
        cells[random.choice(free)] = "s"
        grid = _in_rows(cells, FLOOD_SIZE)
        answer = flooded(grid)
        if answer.count("o") >= FLOOD_MIN_REACHED:
            return Puzzle(walls, f"fill {grid}", answer)


def flooded(grid: str) -> str:
    """The grid (rows of equal length, spaces between) with an o on every cell that s reaches."""
    rows = [list(row) for row in grid.split(" ")]
    frontier = [(y, x) for y, row in enumerate(rows) for x, cell in enumerate(row) if cell == "s"]
    while frontier:
        y, x = frontier.pop()
        if 0 <= y < len(rows) and 0 <= x < len(rows[y]) and rows[y][x] in ".s":
            rows[y][x] = "o"
            frontier += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    return " ".join("".join(row) for row in rows)


def _flood_is_right(instruction: str, answer: str) -> bool:
    return answer == flooded(instruction.removeprefix("fill "))


# Word problem of S5: what a word of swaps (a-d: neighbours) and a rotation (e) makes of 12345.

S5_MIN_MOVES, S5_MAX_MOVES = 2, 8


def _draw_s5(random: Random) -> Puzzle:
    length = random.randint(S5_MIN_MOVES, S5_MAX_MOVES)
    word = "".join(random.choices("abcde", k=length))
    return Puzzle(word, f"s5 {word}", arranged(word))


def arranged(word: str) -> str:
    """12345 after the moves of the word, from left to right."""
    items = list("12345")
    for move in word:
        at = "abcde".index(move)
        if move == "e":
            items = [*items[1:], items[0]]
        else:
            items[at], items[at + 1] = items[at + 1], items[at]
    return "".join(items)


def _s5_is_right(instruction: str, answer: str) -> bool:
    return answer == arranged(instruction.removeprefix("s5 "))


# Sudoku of 4 x 4: the empty cells (.) filled so that rows, columns and boxes hold 1 to 4.

SUDOKU_MIN_EMPTY, SUDOKU_MAX_EMPTY = 6, 10
_GROUPS = [
    *([4 * row + column for column in range(4)] for row in range(4)),
    *([4 * row + column for row in range(4)] for column in range(4)),
    *([8 * y + 2 * x + offset for offset in (0, 1, 4, 5)] for y in range(2) for x in range(2)),
]


def _draw_sudoku(random: Random) -> Puzzle:
    while True:
        solution = random.choice(full_sudokus())
        num_empty = random.randint(SUDOKU_MIN_EMPTY, SUDOKU_MAX_EMPTY)
        empty = set(random.sample(range(16), num_empty))
        grid = "".join("." if at in empty else digit for at, digit in enumerate(solution))
        # The dots of the question match any digit of a solution.
        if len(re.findall(f"^{grid}$", "\n".join(full_sudokus()), re.MULTILINE)) == 1:
            question, answer = _in_rows(grid, 4), _in_rows(solution, 4)
            return Puzzle(solution, f"sudoku {question}", answer)


@lru_cache
def full_sudokus() -> tuple[str, ...]:
    """The 288 full grids, as 16 digits each."""
    rows = ["".join(order) for order in itertools.permutations("1234")]
    halves = [top + bottom for top in rows for bottom in rows if _has_no_repeat(top + bottom)]
    grids = (top + bottom for top in halves for bottom in halves)
    return tuple(grid for grid in grids if _has_no_repeat(grid))


def _has_no_repeat(grid: str) -> bool:
    """Whether no row, column or box of the grid, or of its upper rows, holds a digit twice."""
    filled = ([grid[at] for at in group if at < len(grid)] for group in _GROUPS)
    return all(len(set(digits)) == len(digits) for digits in filled)


def _agrees(grid: str, solution: str) -> bool:
    return all(given in (".", digit) for given, digit in zip(grid, solution, strict=True))


def _sudoku_is_right(instruction: str, answer: str) -> bool:
    grid = instruction.removeprefix("sudoku ").replace(" ", "")
    solution = answer.replace(" ", "")
    is_full = _in_rows(solution, 4) == answer and sorted(solution) == sorted("1234" * 4)
    return is_full and _has_no_repeat(solution) and _agrees(grid, solution)


def _in_rows(cells: Sequence[str], width: int) -> str:
    starts = range(0, len(cells), width)
    return " ".join("".join(cells[at : at + width]) for at in starts)


PROCEDURAL_TASKS = (
    ProceduralTask("ca", _draw_ca, _ca_is_right),
    ProceduralTask("flood_fill", _draw_flood, _flood_is_right),
    ProceduralTask("s5", _draw_s5, _s5_is_right),
    ProceduralTask("sudoku", _draw_sudoku, _sudoku_is_right),
)
