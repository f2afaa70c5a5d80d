"""A small text game of household tasks, without dependencies, for demos and tests.

A house has rooms, a room has places, and things lie on or in places. A place that closes must be opened
before its things are seen. The player carries one thing at a time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from ...batch.samples import Prompt
from ...errors import InputError
from . import Observation

PLACES = {
    "kitchen": ("counter", "fridge"),
    "bathroom": ("shelf", "basket"),
    "bedroom": ("bed", "chest"),
    "office": ("desk", "box"),
}
"""Room -> its places."""
CLOSING = {"fridge", "basket", "chest", "box"}
"""Places that are closed at the start."""
SINKS = ("kitchen", "bathroom")
"""Rooms in which things can be cleaned. Every house has one of them."""
THINGS = ("mug", "plate", "apple", "book", "pen", "towel", "sponge", "key")

Kind = Literal["take", "put", "clean"]
STEPS: dict[Kind, tuple[str, ...]] = {
    "take": ("take",),
    "put": ("take", "put"),
    "clean": ("take", "clean", "put"),
}
"""Kind of task -> its steps, in their order."""
Pair = tuple[str, str]
"""The thing of a task, and the place where it lies (``take``) or where it is put (``put``, ``clean``)."""


@dataclass(frozen=True)
class Task:
    """A task and the house in which it is done.

    Attributes:
        kind: ``take`` the thing, ``put`` it somewhere, or ``clean`` it first and then put it somewhere.
        thing: the thing.
        place: where to put it; "" for ``take``.
        house: room -> place -> the things there, in the order in which the game describes them.
    """

    kind: Kind
    thing: str
    place: str
    house: dict[str, dict[str, list[str]]]

    @classmethod
    def draw(cls, generator: random.Random) -> Task:
        """Return a random task in a house of two rooms and three things."""
        sink = generator.choice(SINKS)
        rooms = generator.sample([sink, generator.choice([room for room in PLACES if room != sink])], 2)
        house: dict[str, dict[str, list[str]]] = {
            room: {place: [] for place in generator.sample(PLACES[room], len(PLACES[room]))} for room in rooms
        }
        places = {place: things for room in house.values() for place, things in room.items()}
        things = generator.sample(THINGS, 3)
        for thing in things:
            places[generator.choice(list(places))].append(thing)
        kind = generator.choice(list(STEPS))
        others = [place for place in places if things[0] not in places[place]]
        return cls(kind, things[0], "" if kind == "take" else generator.choice(others), house)

    @classmethod
    def read(cls, prompt: Prompt) -> Task:
        """Return the task in the answer of a prompt.

        Raises:
            InputError: the answer is no task.
        """
        try:
            task = cls(**json.loads(prompt.answer))
            _ = STEPS[task.kind], [task.room_of(place) for place in (task.start[1], task.place) if place]
        except (TypeError, ValueError, AttributeError, KeyError, StopIteration):
            raise InputError(
                f"the answer of {prompt.id} is no household task: make them with megatron-gmpo household"
            ) from None
        return task

    @property
    def problem(self) -> str:
        """Return the text of the prompt."""
        what = {
            "take": f"Take the {self.thing}.",
            "put": f"Put the {self.thing} {_at(self.place, 'the ')}.",
            "clean": f"Put the clean {self.thing} {_at(self.place, 'the ')}.",
        }
        return f"{what[self.kind]} The house has {_listed(self.house)}."

    @property
    def answer(self) -> str:
        """Return the task as JSON text, which ``read`` reads."""
        return json.dumps(asdict(self))

    @property
    def pair(self) -> Pair:
        """Return the combination that decides whether the task is in the training data."""
        return self.thing, self.place or self.start[1]

    @property
    def start(self) -> Pair:
        """Return the room and the place where the thing lies at the start."""
        return next(
            (room, place)
            for room, places in self.house.items()
            for place, things in places.items()
            if self.thing in things
        )

    def room_of(self, place: str) -> str:
        """Return the room that has a place."""
        return next(room for room, places in self.house.items() if place in places)


class Household:
    """One episode of the game.

    The commands are ``go to ROOM``, ``open PLACE``, ``take THING``, ``put THING on PLACE`` (``in`` for places
    that close) and ``clean THING``. Each step of the task (taking the right thing, cleaning it, putting it
    down) earns an equal share of a reward of 1 when it is done for the first time. The last one ends the
    episode. The limit of turns is ``rollout.max_turns``.
    """

    def reset(self, prompt: Prompt) -> Observation:
        """Start the task in the prompt's answer. The prompt's text is all that the player knows."""
        self.task = Task.read(prompt)
        self.room = ""
        self.visited: set[str] = set()
        self.places = {
            place: list(things) for places in self.task.house.values() for place, things in places.items()
        }
        self.closed = CLOSING & self.places.keys()
        self.held = ""
        self.clean: set[str] = set()
        self.steps = list(STEPS[self.task.kind])
        return self._observation("", 0.0)

    def step(self, action: str) -> Observation:
        """Execute a command. An impossible one changes nothing, and the answer lists what is possible."""
        command = " ".join(action.lower().split())
        possible = self.commands()
        if command not in possible:
            return self._observation(f"You can only {', '.join(possible)}.", 0.0)
        verb, *words = command.split()
        text = getattr(self, f"_{verb}")(*words)
        return self._observation(text, self._progress())

    def commands(self) -> list[str]:
        """Return the commands that are possible now."""
        here = self.task.house.get(self.room, {})
        commands = [f"go to {room}" for room in self.task.house if room != self.room]
        commands += [f"open {place}" for place in here if place in self.closed]
        opened = [place for place in here if place not in self.closed]
        if self.held:
            commands += [f"put {self.held} {_at(place)}" for place in opened]
            commands += [f"clean {self.held}"] * (self.room in SINKS)
        else:
            commands += [f"take {thing}" for place in opened for thing in self.places[place]]
        return commands

    def _observation(self, text: str, reward: float) -> Observation:
        messages = [{"role": "user", "content": text}] if text else []
        info = {"name": self.task.kind, "success": not self.steps, "commands": self.commands()}
        return Observation(messages, reward, done=not self.steps, info=info)

    def _progress(self) -> float:
        """Return the reward of the command that was executed last."""
        done = {
            "take": self.held == self.task.thing,
            "clean": self.task.thing in self.clean,
            "put": self.task.thing in self.places.get(self.task.place, ()),
        }
        if not done[self.steps[0]]:
            return 0.0
        del self.steps[0]
        return 1 / len(STEPS[self.task.kind])

    def _go(self, _: str, room: str) -> str:
        self.room = room
        self.visited.add(room)
        seen = [self._look(place) for place in self.task.house[room]]
        return " ".join(seen + ["There is a sink."] * (room in SINKS))

    def _open(self, place: str) -> str:
        self.closed.discard(place)
        return self._look(place)

    def _take(self, thing: str) -> str:
        self.held = thing
        for things in self.places.values():
            if thing in things:
                things.remove(thing)
        return f"You have the {thing}."

    def _clean(self, thing: str) -> str:
        self.clean.add(thing)
        return f"The {thing} is clean."

    def _put(self, thing: str, _: str, place: str) -> str:
        self.places[place].append(thing)
        self.held = ""
        return f"The {thing} is {_at(place, 'the ')}."

    def _look(self, place: str) -> str:
        if place in self.closed:
            return f"The {place} is closed."
        things = self.places[place]
        return f"The {place} has {_listed(things)}." if things else f"The {place} is empty."


def expert(game: Household) -> str:
    """Return the next command of an expert, who knows only what the game has shown, and finishes every task.

    It looks for the thing in the order of the prompt and of the descriptions, and opens what is closed.
    """
    task, possible = game.task, game.commands()

    def first(verb: str, otherwise: str = "") -> str:
        return next((command for command in possible if command.startswith(verb)), otherwise)

    if game.held == task.thing:
        if game.steps[0] == "clean":
            return first("clean", f"go to {next(room for room in task.house if room in SINKS)}")
        if task.room_of(task.place) != game.room:
            return f"go to {task.room_of(task.place)}"
        return f"open {task.place}" if task.place in game.closed else f"put {task.thing} {_at(task.place)}"
    if game.held:
        return first("put", first("open"))
    place = next(place for place, things in game.places.items() if task.thing in things)
    room = task.room_of(place)
    if room in game.visited and place not in game.closed:
        return f"take {task.thing}" if room == game.room else f"go to {room}"
    unsearched = [
        room for room, places in task.house.items() if room not in game.visited or game.closed & places.keys()
    ]
    return first("open", f"go to {unsearched[0]}")


def _at(place: str, article: str = "") -> str:
    return f"{'in' if place in CLOSING else 'on'} {article}{place}"


def _listed(names: Iterable[str]) -> str:
    """Return "a mug, an apple and a key"."""
    *first, last = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    return f"{', '.join(first)} and {last}" if first else last
