"""What a check measures where nothing is given: prompts on general topics, and ordinary text.

The prompts and the prose were written for this package and are under its licence. Documentation and code are read from
the Python that runs: they need not be shipped, and differ a little between its versions.
"""

from __future__ import annotations

import inspect

PROMPTS = (
    # how things are
    "Why is the sky blue during the day and red at sunset?",
    "What is the difference between weather and climate?",
    "How does a vaccine protect against a disease?",
    "What happens to water when it freezes?",
    "Name three planets that are larger than the Earth.",
    "Why do leaves change their colour in autumn?",
    # the world and its past
    "What is the capital of Australia?",
    "What caused the fall of the Western Roman Empire?",
    "Which countries does the Danube flow through?",
    "When did people first land on the Moon?",
    "What was the printing press, and why did it matter?",
    # numbers and logic
    "What is 17 times 6?",
    "A train travels 120 kilometres in 90 minutes. What is its average speed?",
    "If all roses are flowers and some flowers fade quickly, do all roses fade quickly?",
    "Explain what a prime number is, with two examples.",
    # language
    "Correct this sentence: He don't like apples.",
    "Translate into French: Where is the railway station?",
    "Give me three words that mean the same as 'happy'.",
    "Write a haiku about winter.",
    "Summarise in one sentence: The meeting was moved to Friday because two of the speakers are ill.",
    # code
    "Write a Python function that reverses a string.",
    "What does the SQL keyword JOIN do?",
    "What is the difference between a list and a tuple in Python?",
    # everyday life
    "How do I cook rice?",
    "Give me three tips for sleeping better.",
    "What should I pack for a day's hike in the mountains?",
    "Write a short, polite email that declines an invitation.",
    # a system of rules
    "What are the basic rules of chess?",
)

PROSE = """\
The river rises in a bog, at the foot of a hill that nobody has bothered to name. For the first two miles it is hardly
more than a wet line in the grass, and a child could step across it. Then three streams join it within an hour's walk,
and below the old mill it is deep enough to drown a cow, which happened in the spring of the great flood. The people of
the valley speak of it as one speaks of a difficult uncle: with patience, and with an eye on the door.

Bread needs four things: flour, water, salt and time. Of these, time is the one that most recipes try to save, and the
one that does most of the work. Mix 500 grams of flour with 350 grams of water and leave the dough alone for half an
hour. Then add ten grams of salt and a little yeast, fold it over a few times, and put it into a cool place overnight.
In the morning it will have doubled. Shape it gently, let it rise again, and bake it in a very hot oven, with some steam
at the start, until the crust is dark brown and the loaf sounds hollow when you knock on its base.

The committee met on Tuesday to discuss the budget for the coming year. Income from fees had fallen by four per cent,
mainly because two large members had left, while the cost of heating had risen by almost a third. Three proposals were
made: to raise the fees, to close the reading room on Mondays, and to replace the boiler. After an hour's debate the
second was withdrawn. The other two were put to a vote and accepted, the first with two votes against it.

"Did you lock the door?" she asked, when they had reached the end of the street.
"I think so."
"You think so."
"I remember the key in my hand. I remember putting the key into my pocket. What happened in between, I could not say in
a court of law." He stopped. "We had better go back."
"We always go back," she said, "and it is always locked."

A lens bends light because light travels more slowly in glass than in air. Where a ray meets the surface at an angle,
one side of it is slowed down before the other, and so it turns, as a cart turns when one wheel runs into mud. The
steeper the angle, the larger the turn. A surface that is curved in the right way turns all rays that come from one
point towards another point, and there an image appears. No real lens does this perfectly: blue light is bent a little
more than red, which is why cheap telescopes show a coloured edge around the Moon.

Dear neighbours, from the third of next month the water will be turned off for two days, while the pipes in the cellar
are replaced. Please fill a few buckets on the evening before. The workmen start at seven and have promised to be done
by four o'clock in the afternoon. If you have questions, or need help with carrying, ring at the second floor on the
left. We are sorry for the trouble, and hope that this will be the last time for many years.

Most of what is known about the trade of that age comes from tax lists. A ship that carried salt paid a tenth, one that
carried cloth a twentieth, and one that carried pilgrims paid nothing, so that a surprising number of weavers seem to
have travelled for the good of their souls. Historians have learnt to read such lists against the grain. What is written
down tells us what the state wished to know; what is missing tells us, sometimes, what people were able to hide.

Der Zug hatte vierzig Minuten Verspätung, und auf dem Bahnsteig wusste niemand, warum. Eine ältere Frau verteilte
Kekse. Als er schließlich kam, stiegen alle ein, ohne zu drängen, und jemand sagte, so freundlich sei es hier noch nie
gewesen.

Le marché ouvre à sept heures. On y trouve des légumes, du fromage et des fleurs, et, si l'on se lève assez tôt, le
meilleur pain de la ville. À midi, il ne reste plus que des caisses vides et quelques pigeons.

El faro ya no guía a nadie, pero el guarda sigue subiendo cada noche los ciento doce escalones. Dice que la luz no es
para los barcos, sino para quienes duermen mejor sabiendo que alguien está despierto.
"""


def general_texts() -> dict[str, str]:
    """Prose, documentation and code, by name; without those that this Python has stripped."""
    import difflib
    import heapq
    import statistics
    import textwrap

    documented = (textwrap, heapq, difflib.SequenceMatcher, statistics)
    documentation = "\n\n".join(inspect.getdoc(part) or "" for part in documented)
    try:
        code = inspect.getsource(heapq.merge) + "\n\n" + inspect.getsource(textwrap.TextWrapper)
    except (OSError, TypeError):  # a Python without sources
        code = ""
    found = {"prose": PROSE, "documentation": documentation, "code": code}
    return {name: text for name, text in found.items() if text.strip()}
