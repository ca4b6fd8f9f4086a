"""The protocol of fused all-reduces is right in every order in which its steps can happen.

A model of ``kernels/all_reduce_rms_norm.py``: ranks run calls one after another, the rows of a call at once; what one
writes to another's memory arrives at any later time, in any order. Memory is laid out as in the kernel. In every state
that can be reached nothing may be overwritten before it was read, nothing old may be read, and somebody can go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

Address = int
Call = tuple[str, int]  # way, rows


class Message(NamedTuple):
    to: int
    address: Address
    turn: int


class State(NamedTuple):
    """Of each rank: its turn, the steps that its rows have done in that, its memory; and what has not arrived."""

    turns: tuple[int, ...]
    done: tuple[tuple[int, ...], ...]
    memory: tuple[frozenset[tuple[Address, int]], ...]
    flying: frozenset[Message]


class ProtocolError(Exception):
    pass


def layout(call: Call, world: int, half: int) -> tuple[list[list[Address]], list[Address]]:
    """Addresses of what is to be summed, by source and row, and of sums, by row: in rows of memory."""
    way, rows = call
    start = 1000 * half
    count = rows if way == "one_shot" else -(-rows // world)
    nth = [row if way == "one_shot" else row // world for row in range(rows)]
    return [[start + source * count + n for n in nth] for source in range(world)], [
        start + world * count + row for row in range(rows)
    ]


def steps(call: Call, world: int, rank: int, row: int, half: int) -> list[tuple[str, list[tuple[int, Address]]]]:
    """What a row's block does: (send, [(to, address)]), (wait or empty, [(self, address)])."""
    parts, sums = layout(call, world, half)
    others = [r for r in range(world) if r != rank]
    owner = rank if call[0] == "one_shot" else row % world
    theirs = [(rank, parts[source][row]) for source in others]
    if call[0] == "one_shot":
        return [("send", [(peer, parts[rank][row]) for peer in others]), ("wait", theirs), ("empty", theirs)]
    if owner == rank:
        return [("wait", theirs), ("send", [(peer, sums[row]) for peer in others]), ("empty", theirs)]
    mine = [(rank, sums[row])]
    return [("send", [(owner, parts[rank][row])]), ("wait", mine), ("empty", mine)]


def successors(state: State, calls: tuple[Call, ...], world: int, halves: int) -> Iterator[State]:
    for message in state.flying:
        held = state.memory[message.to]
        if any(address == message.address for address, _ in held):
            raise ProtocolError(f"{message} overwrites")
        memory = list(state.memory)
        memory[message.to] = held | {(message.address, message.turn)}
        yield state._replace(memory=tuple(memory), flying=state.flying - {message})
    for rank in range(world):
        turn = state.turns[rank]
        if turn == len(calls):
            continue
        call = calls[turn]
        for row in range(call[1]):
            program = steps(call, world, rank, row, turn % halves)
            position = state.done[rank][row]
            if position == len(program):
                continue
            kind, places = program[position]
            memory, flying = list(state.memory), state.flying
            if kind == "send":
                flying = flying | {Message(to, address, turn) for to, address in places}
            else:
                held = dict(memory[rank])
                if kind == "wait" and not all(address in held for _, address in places):
                    continue
                if any(held[address] != turn for _, address in places):
                    raise ProtocolError(f"rank {rank} reads what is of another turn than {turn}")
                if kind == "empty":
                    memory[rank] = frozenset((a, t) for a, t in memory[rank] if (rank, a) not in places)
            rows = list(state.done[rank])
            rows[row] += 1
            turns, done = list(state.turns), list(state.done)
            if all(each == len(program) for each in rows):  # the launch has ended, the next begins
                turns[rank] += 1
                rows = [0] * (calls[turn + 1][1] if turn + 1 < len(calls) else 0)
            done[rank] = tuple(rows)
            yield State(tuple(turns), tuple(done), tuple(memory), flying)


def explore(calls: tuple[Call, ...], world: int, halves: int = 2) -> int:
    """Visit all states; how many there are."""
    first = State((0,) * world, ((0,) * calls[0][1],) * world, (frozenset(),) * world, frozenset())
    seen, open_states = {first}, [first]
    while open_states:
        state = open_states.pop()
        following = list(successors(state, calls, world, halves))
        if not following and state.turns != (len(calls),) * world:
            raise ProtocolError(f"nobody can go on: {state}")
        if not following and any(state.memory):
            raise ProtocolError("memory is left full")
        for each in following:
            if each not in seen:
                seen.add(each)
                open_states.append(each)
    return len(seen)


ONE, TWO = ("one_shot", 1), ("two_shot", 1)


@pytest.mark.parametrize(
    ("world", "calls"),
    [
        (2, (("one_shot", 2), ("two_shot", 3), ONE, ("one_shot", 2), TWO, ("two_shot", 2))),
        (2, (("two_shot", 4), ("one_shot", 3), ("one_shot", 3), TWO)),
        (3, (("one_shot", 2), ONE, ("two_shot", 2), ONE)),
        (4, (ONE, TWO, ONE)),
        pytest.param(3, (TWO, ("two_shot", 3), TWO, TWO, ONE), marks=pytest.mark.slow),
        pytest.param(4, (TWO, ("two_shot", 2), TWO, TWO), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_order_of_steps(world: int, calls: tuple[Call, ...]) -> None:
    assert explore(calls, world) > 1000


@pytest.mark.parametrize("way", [ONE, TWO])
def test_one_half_is_too_few(way: Call) -> None:
    with pytest.raises(ProtocolError):
        explore((way, way, way), 3, halves=1)
