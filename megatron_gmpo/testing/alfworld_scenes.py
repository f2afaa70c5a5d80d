"""Scenes and tasks in the manner of ALFRED, from the floor plans that the alfworld package holds.

A scene has the receptacles of a floor plan, with their places, and a random choice of the plan's objects in
receptacles that can hold them. Floor plans and the tables of what fits where are those of ``alfworld.gen``.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from importlib.resources import files

import alfworld.gen.constants as alfred  # pyright: ignore[reportMissingImports]
import alfworld.gen.goal_library as goals  # pyright: ignore[reportMissingImports]

TASKS = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
"""The six kinds of task of ALFWorld's text games."""
PLANS = {"train": sorted(alfred.TRAIN_SCENE_NUMBERS), "unseen": sorted(alfred.TEST_SCENE_NUMBERS)}
"""Numbers of the floor plans of each split, as in ALFRED."""

_LAYOUTS = files("alfworld.gen") / "layouts"
_WITHOUT_PLACE = {"StoveBurner": 4, "CoffeeMachine": 1, "Toaster": 1, "GarbageCan": 1}
"""Receptacles of ALFWorld's scenes that a plan may list without a place, and their number."""
_DEVICE = {
    "pick_clean_then_place_in_recep": ("Cleanable", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("Heatable", "Microwave"),
    "pick_cool_then_place_in_recep": ("Coolable", "Fridge"),
}
"""Task -> the property that its object needs, and the receptacle that changes the object."""
_PROPERTIES = ("Cleanable", "Heatable", "Coolable", "Sliceable")
_LAMP = "DeskLamp"
_LAMP_ON = ("CoffeeTable", "Desk", "DiningTable", "Dresser", "SideTable")
"""Receptacles on which a lamp may stand; ALFRED's tables leave out what cannot be moved."""
_HOLDS = {
    kind: things
    for kind, things in alfred.VAL_RECEPTACLE_OBJECTS.items()
    if kind not in alfred.MOVABLE_RECEPTACLES_SET
}
_MAX_COPIES = alfred.MAX_NUM_OF_OBJ_INSTANCES


@dataclass(frozen=True)
class Receptacle:
    """A receptacle: its name in PDDL, its type, and its place, at which others may be too."""

    name: str
    type: str
    place: str


@dataclass(frozen=True)
class Task:
    """A task: its kind, the type of its object, and that of the receptacle that gets it (or of the lamp)."""

    kind: str
    object: str
    target: str

    def goal(self) -> str:
        """Return the goal in PDDL."""
        text = goals.gdict[self.kind]["pddl"].replace("#", "-")
        text = text.format(obj=self.object, recep=self.target, toggle=self.target)
        return text.strip().removesuffix(")")  # which ends the problem

    def words(self, generator: random.Random) -> str:
        """Return one of ALFRED's phrases for the task."""
        names = {"obj": self.object.lower(), "recep": self.target.lower(), "toggle": self.target.lower()}
        return generator.choice(goals.gdict[self.kind]["templates"]).format(**names)


class FloorPlan:
    """A floor plan of AI2-THOR.

    Args:
        number: kitchens have 1 to 30, living rooms 201 to 230, bedrooms 301 to 330, bathrooms 401 to 430.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.room = next(room for room, numbers in alfred.SCENE_TYPE.items() if number in numbers)
        places = json.loads((_LAYOUTS / f"FloorPlan{number}-openable.json").read_text())
        listed = set(json.loads((_LAYOUTS / f"FloorPlan{number}-objects.json").read_text()))
        self.receptacles = [_receptacle(key, place) for key, place in sorted(places.items())]
        have = {receptacle.type for receptacle in self.receptacles}
        for kind in sorted(listed & set(_WITHOUT_PLACE) - have):
            for copy in range(_WITHOUT_PLACE[kind]):
                # any place that no other has: the text games show no coordinates
                self.receptacles.append(_receptacle(f"{kind}|+{copy:02}.00", [float(copy), len(kind), 0, 0]))
        self.types = sorted({receptacle.type for receptacle in self.receptacles} & set(_HOLDS))
        self.objects = sorted(kind for kind in listed if any(kind in _HOLDS[holder] for holder in self.types))
        self.lamp_on = [kind for kind in self.types if kind in _LAMP_ON and _LAMP in listed]

    def tasks(self, kind: str) -> list[Task]:
        """Return the tasks of a kind that this floor plan allows."""
        if self.room not in alfred.GOALS_VALID[kind]:
            return []
        if kind == "look_at_obj_in_light":
            return [Task(kind, thing, _LAMP) for thing in self.objects if self.lamp_on]
        needs, device = _DEVICE.get(kind, (None, None))
        if device and device not in self.types:
            return []
        return [
            Task(kind, thing, holder)
            for thing in self.objects
            for holder in self.types
            if thing in _HOLDS[holder]
            and holder != device
            and (needs is None or thing in alfred.VAL_ACTION_OBJECTS[needs])
            # the object must have another place to start from
            and any(thing in _HOLDS[other] for other in self.types if other != holder)
        ]


Placed = tuple[str, str, Receptacle]
"""An object of a scene: its name in PDDL, its type, and the receptacle that holds it."""


def problem(plan: FloorPlan, task: Task, objects: list[Placed]) -> str:
    """Return the PDDL problem of a scene of ``plan`` with these objects."""
    kinds = sorted({kind for _, kind, _ in objects})
    start = "loc_start"
    lines = ["(= (total-cost) 0)", f"(atLocation agent1 {start})"]
    for holder in plan.receptacles:
        lines += [
            f"(receptacleAtLocation {holder.name} {holder.place})",
            f"(receptacleType {holder.name} {holder.type}Type)",
        ]
        if holder.type in alfred.OPENABLE_CLASS_SET:
            lines.append(f"(openable {holder.name})")
    lines += [
        f"(canContain {holder}Type {kind}Type)"
        for holder in plan.types
        for kind in kinds
        if kind in _HOLDS[holder]
    ]
    for name, kind, holder in objects:
        lines += [
            f"(objectType {name} {kind}Type)",
            f"(inReceptacle {name} {holder.name})",
            f"(objectAtLocation {name} {holder.place})",
            f"(toggleable {name})" if kind == _LAMP else f"(pickupable {name})",
        ]
        lines += [
            f"({group.lower()} {name})" for group in _PROPERTIES if kind in alfred.VAL_ACTION_OBJECTS[group]
        ]
    # the domain's actions name the types of three receptacles
    rtypes = {holder.type for holder in plan.receptacles} | {"SinkBasin", "Microwave", "Fridge"}
    places = sorted({holder.place for holder in plan.receptacles} | {start})
    declared = {
        "agent": ["agent1"],
        "location": places,
        "receptacle": [holder.name for holder in plan.receptacles],
        "object": [name for name, _, _ in objects],
        "rtype": [f"{kind}Type" for kind in sorted(rtypes)],
        "otype": [f"{kind}Type" for kind in sorted({*kinds, task.object, "Knife", "ButterKnife"})],
    }
    names = "\n".join(f"  {' '.join(words)} - {kind}" for kind, words in declared.items())
    facts = "\n".join(f"  {line}" for line in lines)
    return (
        f"(define (problem plan_{plan.number})\n(:domain alfred)\n(:objects\n{names})\n(:init\n{facts})\n"
        f"{task.goal()}\n(:metric minimize (total-cost)))\n"
    )


def place(plan: FloorPlan, task: Task, generator: random.Random) -> list[Placed]:
    """Return the objects of a random scene in which ``task`` can be done and is not done yet."""
    placed: list[Placed] = []
    for kind in plan.objects:
        # like ALFRED, copies of the task's object lie outside its target
        avoid = task.target if kind == task.object else ""
        holders = [h for h in plan.receptacles if h.type != avoid and kind in _HOLDS.get(h.type, ())]
        least = (1 + (task.kind == "pick_two_obj_and_place")) * (kind == task.object)
        for copy in range(max(least, generator.randint(0, _MAX_COPIES))):
            placed.append((f"{kind}_bar__plus_{copy:02}_dot_00", kind, generator.choice(holders)))
    if plan.lamp_on:
        holders = [holder for holder in plan.receptacles if holder.type in plan.lamp_on]
        placed.append((f"{_LAMP}_bar__plus_00_dot_00", _LAMP, generator.choice(holders)))
    return placed


def expert(plan: FloorPlan, task: Task, objects: list[Placed]) -> list[str]:
    """Return commands that do the task, with names of PDDL: of an expert who knows where everything is.

    The planner of ALFWorld's engine finds such commands too, but takes minutes for a kitchen.
    """
    commands: list[str] = []
    opened: set[Receptacle] = set()
    at: Receptacle | None = None

    def go(holder: Receptacle, *, look_in: bool) -> None:
        nonlocal at
        if at != holder:
            commands.append(f"go to {holder.name}")
        at = holder
        if look_in and holder.type in alfred.OPENABLE_CLASS_SET and holder not in opened:
            commands.append(f"open {holder.name}")
            opened.add(holder)

    of_type = {holder.type: holder for holder in reversed(plan.receptacles)}
    wanted = [(name, holder) for name, kind, holder in objects if kind == task.object]
    for name, holder in wanted[: 2 if task.kind == "pick_two_obj_and_place" else 1]:
        go(holder, look_in=True)
        commands.append(f"take {name} from {holder.name}")
        if task.kind == "look_at_obj_in_light":
            lamp, on = next((lamp, on) for lamp, kind, on in objects if kind == _LAMP)
            go(on, look_in=False)
            commands.append(f"use {lamp}")
            break
        if task.kind in _DEVICE:
            device = of_type[_DEVICE[task.kind][1]]
            go(device, look_in=False)
            commands.append(f"{task.kind.split('_')[1]} {name} with {device.name}")
        go(of_type[task.target], look_in=True)
        commands.append(f"move {name} to {of_type[task.target].name}")
    return commands


def _receptacle(key: str, place: list[float]) -> Receptacle:
    """Return the receptacle of a key like ``Cabinet|+00.68|+00.50|-02.20`` and an agent's pose before it."""
    kind = key.partition("|")[0] + ("Basin" if key.endswith("Basin") else "")
    pose = "_bar_".join(f"{number:g}".replace("-", "_minus_").replace(".", "_dot_") for number in place)
    return Receptacle(_mangled(key), kind, f"loc_bar_{pose}")


def _mangled(key: str) -> str:
    """Return a name that PDDL can hold, from which ALFWorld's ``Demangler`` makes names like "cabinet 1"."""
    for sign, word in (("|", "_bar_"), ("-", "_minus_"), ("+", "_plus_"), (".", "_dot_"), (",", "_comma_")):
        key = key.replace(sign, word)
    return key
