"""Prompts written for this project: four groups of four requests, in which a file is edited again and again.

The answers of a group have much in common. "shapes" and "config" edit a file, and each request holds the file as the
edits before it left it, so that an answer repeats its own request, too. "notes" and "queue" ask again for a text that
is not in the request, each time with a change.
"""

_SHAPES = '''\
class Shape:
    """A shape with a name."""

    def __init__(self, name, width, height):
        self.name = name
        self.width = width
        self.height = height

    def area(self):
        return self.width * self.height

    def perimeter(self):
        return 2 * self.width + self.height

    def describe(self):
        return f"{self.name}: {self.width} x {self.height}, area {self.area()}"


def total_area(shapes):
    total = 0
    for shape in shapes:
        total += shape.area()
    return total
'''

_CONFIG = """\
{
  "service": "orders",
  "port": 8080,
  "workers": 4,
  "database": {
    "host": "db.internal",
    "port": 5432,
    "name": "orders",
    "timeout_seconds": 30
  },
  "cache": {
    "host": "cache.internal",
    "port": 6379,
    "timeout_seconds": 5
  },
  "logging": {
    "level": "info",
    "file": "/var/log/orders.log"
  }
}
"""

_NOTES = """\
Release notes
- Search results are sorted by date.
- The export to CSV keeps the order of the columns.
- Two crashes at startup were fixed.
"""

_QUEUE = """Write a Python class Queue with the methods put, get, peek and size, which keeps its items in a list, \
and a function main that shows how each method is used"""


def _edits(task: str, language: str, text: str, edits: list[tuple[str, str, str]]) -> list[dict]:
    """A request for each of `edits`: its instruction, and a replacement (old, new) that makes the file of the next."""
    prompts = []
    for number, (instruction, old, new) in enumerate(edits, 1):
        prompt = f"```{language}\n{text}```\n\n{instruction} Output the full {task} file."
        prompts.append({"id": f"{task} {number}", "task": task, "prompt": prompt})
        text = text.replace(old, new)
    return prompts


_INDEX = "- The documentation has a new index.\n"
_REQUESTS = {
    "notes": [
        f"{_NOTES}\nRewrite these release notes as a friendly e-mail to customers. Explain each item in two sentences.",
        *(
            f"{notes}\nRewrite these release notes as a {tone} e-mail to customers of version 2.1. "
            "Explain each item in two sentences."
            for notes, tone in ((_NOTES, "friendly"), (_NOTES + _INDEX, "friendly"), (_NOTES + _INDEX, "formal"))
        ),
    ],
    "queue": [
        f"{_QUEUE}.",
        f"{_QUEUE}. Each method has a docstring.",
        f"{_QUEUE}. Each method has a docstring, and get raises IndexError if the queue is empty.",
        f"{_QUEUE}. The class is called WaitingLine, each method has a docstring, and get raises IndexError if the "
        "queue is empty.",
    ],
}

PROMPTS = [
    *_edits("shapes", "python", _SHAPES, [
        ("Rename the class Shape to Rectangle.", "Shape", "Rectangle"),
        ("The method perimeter is wrong: both sides count twice. Fix it.", "2 * self.width + self.height",
         "2 * (self.width + self.height)"),
        ('Add an argument unit="cm" to __init__ and keep it in self.unit.', "height):",
         'height, unit="cm"):\n        self.unit = unit'),
        ("Translate the docstring to German.", "A shape with a name.", "Eine Form mit einem Namen."),
    ]),
    *_edits("config", "json", _CONFIG, [
        ("Change the port of the service to 9090.", "8080", "9090"),
        ("Change the timeout of the database to 60 seconds.", "30", "60"),
        ("Set the level of logging to debug.", "info", "debug"),
        ("Rename the service from orders to billing, everywhere.", "orders", "billing"),
    ]),
    *(
        {"id": f"{task} {number}", "task": task, "prompt": prompt}
        for task, requests in _REQUESTS.items()
        for number, prompt in enumerate(requests, 1)
    ),
]  # fmt: skip
