"""Five prompts written for this project, ordered by the gain from speculation: first the largest, last none.

Prompt lookup drafts the words that followed the same words earlier in the text. It gains if the answer repeats the
question (a code edit, quotes), and nothing if every sentence is new (chat).
"""

_INVENTORY = '''\
class Inventory:
    """Items in a warehouse, with how many there are and what one costs."""

    def __init__(self, name, currency="EUR"):
        self.name = name
        self.currency = currency
        self.items = {}
        self.history = []

    def add(self, item, count, price):
        if count <= 0:
            raise ValueError("count must be positive")
        if price < 0:
            raise ValueError("price must not be negative")
        if item in self.items:
            self.items[item]["count"] += count
            self.items[item]["price"] = price
        else:
            self.items[item] = {"count": count, "price": price}
        self.history.append(("add", item, count))

    def remove(self, item, count):
        if item not in self.items:
            raise KeyError(item)
        if count > self.items[item]["count"]:
            raise ValueError("not enough in stock")
        self.items[item]["count"] -= count
        if self.items[item]["count"] == 0:
            del self.items[item]
        self.history.append(("remove", item, count))

    def total_value(self):
        total = 0
        for item in self.items.values():
            total += item["count"] * item["price"]
        return total

    def report(self):
        lines = [f"Inventory of {self.name}"]
        for item, entry in sorted(self.items.items()):
            lines.append(f"{item}: {entry['count']} at {entry['price']} {self.currency}")
        lines.append(f"total: {self.total_value()} {self.currency}")
        return "\\n".join(lines)
'''

CODE_EDIT = f"""\
```python
{_INVENTORY}```

Rewrite the code above with the class renamed to Warehouse. Output the full code."""

SUMMARY = """\
The harbour bridge was closed on Monday morning after an inspector found a crack in one of its main cables. The city \
had planned to replace the cables next spring, but the work will now begin in two weeks. About forty thousand people \
cross the bridge every day, and most of them will have to use the northern tunnel instead. The mayor said that safety \
comes before convenience and that nobody will cross the bridge until every cable has been tested. Ferries will run \
every ten minutes between the old port and the market square, and they will be free until the bridge opens again. \
Engineers expect the repair to take six weeks and to cost three million euros.

Write a short summary of the report above. Use direct quotes from it."""

CHAT = "Why do people still enjoy paper books when everything can be read on a screen?"

LIST = "List ten things to check before leaving on a long bicycle tour, with one short sentence for each."

MATH = """\
A baker sells 36 loaves in the morning at 3 euros each and 24 loaves in the afternoon at 2 euros each. Flour for one \
loaf costs 0.50 euros. How much is left after paying for the flour? Work it out step by step."""

PROMPTS = {"code edit": CODE_EDIT, "summary": SUMMARY, "chat": CHAT, "list": LIST, "math": MATH}
