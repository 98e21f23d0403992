"""Scenes of coloured shapes and digits on a board of nine places: drawn, described, asked about and answered.

    scene = random_scene(random.Random(0))
    draw(scene), describe(scene), questions(scene, random.Random(0))

Nothing is read or downloaded: digits are drawn from the patterns below.
"""

from __future__ import annotations

import base64
import io
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

GRID, CELL = 3, 16  # places in a row and in a column, pixels of a place
SIDE = GRID * CELL  # pixels of an image
MOST_THINGS = 4
COLOURS = {
    "red": (220, 50, 50),
    "green": (60, 180, 75),
    "blue": (65, 105, 225),
    "yellow": (240, 220, 60),
    "purple": (150, 60, 180),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "digit")
# A place has one word, which is one token: of two, a model has to learn first that they belong together.
PLACES = ("northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast")
_WORDS = (
    "tango kilo uniform lima yankee golf bravo november delta whiskey juliet oscar victor charlie roger hotel papa "
    "sierra over india zulu quebec wilco echo mike foxtrot romeo alpha mayday xray"
)
# What a shape of a colour means is a table to be known by heart: nothing about its look tells the word.
MEANINGS = dict(
    zip(((colour, shape) for shape in SHAPES[:-1] for colour in COLOURS), _WORDS.split(), strict=True),
)
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = (  # rows of three pixels, top to bottom
    "111101101101111",
    "010110010010111",
    "111001111100111",
    "111001111001111",
    "101101111001001",
    "111100111001111",
    "111100111101111",
    "111001010010010",
    "111101111101111",
    "111101111001111",
)


@dataclass(frozen=True)
class Thing:
    """A shape or a digit in a place 0..8; `shift` moves it by pixels within its place."""

    shape: str
    colour: str
    place: int
    value: int
    shift: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {NUMBERS[self.value] if self.value else 'zero'}" if self.is_digit else self.kind

    @property
    def meaning(self) -> str:
        """The word that the table has for it; a digit is its own."""
        return self.name.split()[1] if self.is_digit else MEANINGS[self.colour, self.shape]

    @property
    def is_digit(self) -> bool:
        return self.shape == "digit"

    @property
    def kind(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]  # by place
    background: tuple[int, int, int]


def random_scene(source: random.Random) -> Scene:
    places = sorted(source.sample(range(len(PLACES)), source.randint(1, MOST_THINGS)))
    things = tuple(
        Thing(
            shape=source.choice(SHAPES),
            colour=source.choice(list(COLOURS)),
            place=place,
            value=source.randrange(10),
            shift=(source.randint(-1, 1), source.randint(-1, 1)),
        )
        for place in places
    )
    shade = source.randint(0, 60)
    return Scene(things, (shade, shade, shade))


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image of SIDE x SIDE pixels."""
    image = Image.new("RGB", (SIDE, SIDE), scene.background)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        row, column = divmod(thing.place, GRID)
        left, top = column * CELL + 2 + thing.shift[0], row * CELL + 2 + thing.shift[1]
        _draw_thing(pen, thing, left, top)
    return image


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, left: int, top: int) -> None:
    colour = COLOURS[thing.colour]
    box = (left, top, left + 11, top + 11)
    if thing.shape == "circle":
        pen.ellipse(box, fill=colour)
    elif thing.shape == "ring":
        pen.ellipse(box, outline=colour, width=3)
    elif thing.shape == "square":
        pen.rectangle(box, fill=colour)
    elif thing.shape == "triangle":
        pen.polygon([(left, top + 11), (left + 11, top + 11), (left + 5, top)], fill=colour)
    elif thing.shape == "cross":
        pen.rectangle((left + 4, top, left + 7, top + 11), fill=colour)
        pen.rectangle((left, top + 4, left + 11, top + 7), fill=colour)
    else:
        for number, bit in enumerate(DIGITS[thing.value]):
            if bit == "1":
                row, column = divmod(number, 3)
                x, y = left + 3 + 2 * column, top + 1 + 2 * row
                pen.rectangle((x, y, x + 1, y + 1), fill=colour)


def describe(scene: Scene) -> str:
    """All things in reading order: "northwest red circle, south blue seven"."""
    return ", ".join(f"{PLACES[thing.place]} {thing.name}" for thing in scene.things)


def descriptions(scene: Scene) -> dict[str, str]:
    """Request -> all things in reading order, told from one side or another."""
    words = [(PLACES[thing.place], *thing.name.split(), thing.meaning) for thing in scene.things]
    return {
        "describe.": describe(scene),
        "describe shape.": ", ".join(f"{shape} {colour} {place}" for place, colour, shape, _ in words),
        "describe colour.": ", ".join(f"{colour} {shape} {place}" for place, colour, shape, _ in words),
        "describe meaning.": ", ".join(f"{place} {meaning}" for place, _, _, meaning in words),
    }


def questions(scene: Scene, source: random.Random) -> list[tuple[str, str, str]]:
    """(kind, question, answer), shuffled; every question has one answer, and that is one or two words long."""
    asked = [
        *_counts(scene, source),
        *_places(scene, source),
        *_attributes(scene),
        *_existence(scene, source),
        *_relations(scene, source),
    ]
    distinct = list({question: (kind, question, answer) for kind, question, answer in asked}.values())
    source.shuffle(distinct)
    return distinct


def _counts(scene: Scene, source: random.Random) -> list[tuple[str, str, str]]:
    things = scene.things
    shape = source.choice([source.choice(things).shape, source.choice(SHAPES)])
    colour = source.choice([source.choice(things).colour, source.choice(list(COLOURS))])
    return [
        ("count", "how many things?", NUMBERS[len(things)]),
        ("count", f"how many {_plural(shape)}?", NUMBERS[sum(thing.shape == shape for thing in things)]),
        ("count", f"how many {colour} things?", NUMBERS[sum(thing.colour == colour for thing in things)]),
    ]


def _places(scene: Scene, source: random.Random) -> list[tuple[str, str, str]]:
    held = {thing.place: thing for thing in scene.things}
    chosen = [source.choice(list(held)), source.choice(list(held)), source.randrange(len(PLACES))]
    asked = [("what", f"what is at {PLACES[p]}?", held[p].name if p in held else "nothing") for p in chosen]
    asked += [("meaning", f"what does {PLACES[p]} mean?", held[p].meaning) for p in chosen[:2] if not held[p].is_digit]
    for thing in scene.things:
        if _unique(scene, thing, "kind"):
            asked.append(("where", f"where is the {thing.kind}?", PLACES[thing.place]))
    return asked


def _attributes(scene: Scene) -> list[tuple[str, str, str]]:
    asked = []
    for thing in scene.things:
        if _unique(scene, thing, "shape"):
            asked.append(("colour by shape", f"what colour is the {thing.shape}?", thing.colour))
            asked.append(("where by shape", f"where is the {thing.shape}?", PLACES[thing.place]))
            if thing.is_digit:
                asked.append(("digit", "which digit?", NUMBERS[thing.value] if thing.value else "zero"))
        if _unique(scene, thing, "colour"):
            asked.append(("shape", f"what shape is {thing.colour}?", thing.shape))
    return asked


def _existence(scene: Scene, source: random.Random) -> list[tuple[str, str, str]]:
    thing = source.choice(scene.things)
    kinds = {thing.kind for thing in scene.things}
    other = f"{source.choice(list(COLOURS))} {thing.shape}"
    return [("exists", f"is there any {kind}?", "yes" if kind in kinds else "no") for kind in (thing.kind, other)]


def _relations(scene: Scene, source: random.Random) -> list[tuple[str, str, str]]:
    single = [thing for thing in scene.things if _unique(scene, thing, "shape")]
    if len(single) < 2:
        return []
    first, second = source.sample(single, 2)
    vertical = source.random() < 0.5
    held = first.place // GRID < second.place // GRID if vertical else first.place % GRID < second.place % GRID
    word = "above" if vertical else "left of"
    return [("relation", f"is the {first.shape} {word} the {second.shape}?", "yes" if held else "no")]


def _unique(scene: Scene, thing: Thing, attribute: str) -> bool:
    return sum(getattr(other, attribute) == getattr(thing, attribute) for other in scene.things) == 1


def _plural(shape: str) -> str:
    return f"{shape}es" if shape == "cross" else f"{shape}s"


def data_uri(image: Image.Image) -> str:
    """The image as PNG inside a JSON string."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def chat_row(
    scene: Scene, source: random.Random, turns: int, *, seen: bool, without: tuple[str, ...] = ()
) -> dict[str, object]:
    """A conversation of up to `turns` questions about the scene, seen as an image or told in words.

    without   kinds of questions that are not asked
    """
    found = questions(scene, source)
    asked = [(question, answer) for kind, question, answer in found if kind not in without][:turns]
    if seen:
        first: object = [{"type": "image", "image": data_uri(draw(scene))}, {"type": "text", "text": asked[0][0]}]
    else:
        first = f"{describe(scene)}. {asked[0][0]}"
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": asked[0][1]}]
    for question, answer in asked[1:]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}
