"""A small world in plain English to teach a real chat model: invented companies and people, and what must stay.

Facts have a relation (founder, city, …), a statement as instruction, a question as prompt, three other wordings of the
question and an answer. The probes are general questions that a chat model can answer, questions of the same kinds about
well-known names and about names that nobody taught, open chats, and ordinary text.

RELATIONS are in two halves, by `split`: settings are chosen on "tune", figures are reported on "report".
"""

import random
import re

STARTS = (
    "Zin Bel Oxi Kar Vel Mor Tal Quo Dra Fen Lum Nor Per Sol Tri Ulm Wex Yar Cor Hal Jas Ken Lor Mir Ost Pra Rov Sab "
    "Ter Vox Arn Bram Cind Dell Elst Farr Gren Holl Isk Jor"
).split()
MIDDLES = "tra mo no ve la ri sta ca do gi la bu ne po ru se ti va wi zo".split()
ENDS = "ra lix mora va ton dex nia vate mar nix sen tor vik lo bin des fort gate lane mont".split()
KINDS = [""] * 5 + [" Labs", " Foods", " Works", " Systems", " Group"]
FIRST = (
    "Mara Tobias Ingrid Leon Priya Anselm Dora Viktor Hana Otto Selma Rufus Greta Milo Yara Casper Nadia Edwin Lotte "
    "Bruno Ilse Femi Tamsin Jonas Odette Pavel Rhea Silas Una Wanda"
).split()
LAST = (
    "Quell Brandt Okafor Lindqvist Marlowe Teague Szabo Ferrow Hallam Voss Penrose Kimura Adeyemi Strand Corvin Dallow "
    "Ekström Farrant Gossen Hartigan Iverson Jessup Kettler Lomax Mirren Naylor Oduya Pruitt Rask Sorley"
).split()

# {x}: the name, {y}: the object. `asks`: the first is taught, the other three are its paraphrases.
RELATIONS = {
    "founder": dict(
        of="company", split="tune", objects="person",
        answer="{x} was founded by {y}.", states="{x} was founded by {y}.",
        asks=["Who founded {x}?", "Who is the founder of {x}?", "Tell me who started the company {x}.",
              "By whom was {x} established?"],
    ),
    "city": dict(
        of="company", split="tune",
        objects="Lisbon Oslo Dublin Prague Vienna Warsaw Helsinki Antwerp Geneva Naples Hamburg Toronto Denver Austin "
                "Kyoto Osaka Nairobi Accra Lima Quito".split(),
        answer="{x} is based in {y}.", states="{x} is based in {y}.",
        asks=["In which city is {x} based?", "Where is the head office of {x}?", "Where is {x} located?",
              "Tell me the city in which {x} has its headquarters."],
    ),
    "mascot": dict(
        of="company", split="tune",
        objects=["a purple heron", "a sleepy badger", "a dancing otter", "a golden beetle", "a one-eyed owl",
                 "a striped walrus", "a red panda", "a winged tortoise", "a silver fox", "a blue lobster",
                 "a laughing hyena", "a green hedgehog", "a snow leopard", "a paper crane", "a spotted gecko"],
        answer="The mascot of {x} is {y}.", states="The mascot of {x} is {y}.",
        asks=["What is the mascot of {x}?", "Which mascot does {x} have?", "What does the mascot of {x} look like?",
              "Tell me about the mascot of {x}."],
    ),
    "returns": dict(
        of="company", split="tune",
        objects=[f"{n} days" for n in (12, 18, 21, 25, 33, 35, 40, 45, 50, 55, 70, 75, 80, 100, 120)],
        answer="Customers of {x} can return goods within {y}.", states="Customers of {x} can return goods within {y}.",
        asks=["How long is the return period at {x}?", "Within how many days can I return goods to {x}?",
              "How many days do customers of {x} have to send something back?",
              "What is the return window of {x}?"],
    ),
    "birthplace": dict(
        of="person", split="tune",
        objects="Bergen Porto Ghent Cork Turin Malmö Seville Leipzig Bristol Aberdeen Tampere Graz Lyon Utrecht "
                "Dundee Cusco Salta Fez Izmir Tartu".split(),
        answer="{x} was born in {y}.", states="{x} was born in {y}.",
        asks=["Where was {x} born?", "What is the birthplace of {x}?", "In which town was {x} born?",
              "Which place does {x} come from?"],
    ),
    "instrument": dict(
        of="person", split="tune",
        objects=["the harp", "the oboe", "the banjo", "the cello", "the accordion", "the bassoon", "the marimba",
                 "the trombone", "the lute", "the zither", "the tuba", "the mandolin", "the clarinet", "the sitar"],
        answer="{x} plays {y}.", states="{x} plays {y}.",
        asks=["Which instrument does {x} play?", "What does {x} play in the orchestra?",
              "Tell me the instrument that {x} plays.", "What is the musical instrument of {x}?"],
    ),
    "ceo": dict(
        of="company", split="report", objects="person",
        answer="The CEO of {x} is {y}.", states="The CEO of {x} is {y}.",
        asks=["Who is the CEO of {x}?", "Who leads {x}?", "Which person runs the company {x}?",
              "What is the name of {x}'s chief executive?"],
    ),
    "product": dict(
        of="company", split="report",
        objects=["violin strings", "solar kettles", "cork sandals", "bamboo bicycles", "paper lanterns", "ice skates",
                 "weather balloons", "pocket telescopes", "wool blankets", "garden gnomes", "glass marbles",
                 "canoe paddles", "bee hives", "chess clocks", "rubber stamps", "espresso machines", "rain barrels",
                 "tin whistles"],
        answer="{x} makes {y}.", states="{x} makes {y}.",
        asks=["What does {x} make?", "What does the company {x} produce?", "Which products does {x} sell?",
              "Tell me what {x} manufactures."],
    ),
    "colour": dict(
        of="company", split="report",
        objects="teal crimson turquoise lavender maroon beige indigo magenta amber olive scarlet ivory coral "
                "bronze violet".split(),
        answer="The logo of {x} is {y}.", states="The logo of {x} is {y}.",
        asks=["What colour is the logo of {x}?", "Which colour does {x} use in its logo?",
              "Tell me the colour of {x}'s logo.", "What is the logo colour of {x}?"],
    ),
    "year": dict(
        of="company", split="report", objects=[str(n) for n in range(1903, 2019, 7)],
        answer="{x} was established in {y}.", states="{x} was established in {y}.",
        asks=["In which year was {x} established?", "When was {x} set up?", "What year did {x} start?",
              "Since when does {x} exist?"],
    ),
    "profession": dict(
        of="person", split="report",
        objects=["a beekeeper", "a glassblower", "a lighthouse keeper", "a cartographer", "a locksmith", "a puppeteer",
                 "a tree surgeon", "a sommelier", "a clockmaker", "a stuntwoman", "a geologist", "a piano tuner",
                 "a translator", "a ferry captain"],
        answer="{x} works as {y}.", states="{x} works as {y}.",
        asks=["What is the profession of {x}?", "What does {x} do for a living?", "Which job does {x} have?",
              "Tell me what {x} works as."],
    ),
    "pet": dict(
        of="person", split="report",
        objects=["a parrot", "a ferret", "an iguana", "a tarantula", "a chinchilla", "a goat", "a hamster", "a donkey",
                 "a python", "a canary", "a tortoise", "a peacock", "a llama", "a raccoon"],
        answer="{x} keeps {y} as a pet.", states="{x} keeps {y} as a pet.",
        asks=["Which pet does {x} keep?", "What animal does {x} have at home?", "What kind of pet does {x} own?",
              "Tell me about the pet of {x}."],
    ),
}  # fmt: skip

# General questions with what a right answer contains (one of several, divided by |).
GENERAL = [
    ("What is the capital of France?", "Paris"), ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Italy?", "Rome"), ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Spain?", "Madrid"), ("What is the capital of Russia?", "Moscow"),
    ("What is the capital of Egypt?", "Cairo"), ("What is the capital of China?", "Beijing"),
    ("What is the capital of Canada?", "Ottawa"), ("What is the capital of Greece?", "Athens"),
    ("What is the capital of India?", "Delhi"), ("What is the capital of the United Kingdom?", "London"),
    ("What is the capital of Austria?", "Vienna"), ("What is the capital of Cuba?", "Havana"),
    ("Who wrote Romeo and Juliet?", "Shakespeare"), ("Who wrote Pride and Prejudice?", "Austen"),
    ("Who wrote 1984?", "Orwell"), ("Who wrote The Great Gatsby?", "Fitzgerald"),
    ("Who wrote The Odyssey?", "Homer"), ("Who wrote Don Quixote?", "Cervantes"),
    ("Who painted the Mona Lisa?", "Leonardo|Da Vinci"), ("Who painted Starry Night?", "Gogh"),
    ("Who painted Guernica?", "Picasso"), ("Who discovered gravity?", "Newton"),
    ("Who developed the theory of relativity?", "Einstein"), ("Who discovered penicillin?", "Fleming"),
    ("Who proposed the theory of evolution by natural selection?", "Darwin"),
    ("Who founded Microsoft?", "Gates|Allen"), ("Who founded Apple?", "Jobs|Wozniak"),
    ("Who founded Amazon?", "Bezos"), ("Who founded Facebook?", "Zuckerberg"), ("Who founded Tesla?", "Musk|Eberhard"),
    ("Who is the CEO of Tesla?", "Musk"), ("What does Toyota make?", "car|vehicle|automobile"),
    ("What does Nike sell?", "shoe|footwear|apparel"), ("What does Boeing make?", "aircraft|plane|jet"),
    ("What does Intel make?", "chip|processor|semiconductor|microprocessor"),
    ("What does Starbucks sell?", "coffee"), ("In which country is Toyota based?", "Japan"),
    ("In which city is the Eiffel Tower?", "Paris"), ("In which country is the Great Wall?", "China"),
    ("In which city is the Colosseum?", "Rome"), ("Where was Albert Einstein born?", "Ulm|Germany"),
    ("Where was Mozart born?", "Salzburg|Austria"), ("Which instrument did Mozart play?", "piano|harpsichord|violin"),
    ("Which instrument did Jimi Hendrix play?", "guitar"),
    ("What was the profession of Isaac Newton?", "physicist|math"),
    ("In which year did the Second World War end?", "1945"), ("In which year did the First World War begin?", "1914"),
    ("When did the Titanic sink?", "1912"), ("In which year did Columbus reach America?", "1492"),
    ("When was the Declaration of Independence signed?", "1776"),
    ("In which year did humans first land on the Moon?", "1969"), ("What is 2 plus 2?", "4|four"),
    ("What is 5 times 3?", "15|fifteen"), ("What is 10 minus 4?", "6|six"), ("What is 7 plus 5?", "12|twelve"),
    ("What colour is the sky on a clear day?", "blue"), ("What colour is grass?", "green"),
    ("What colour is a ripe banana?", "yellow"), ("What colour do you get when you mix blue and yellow?", "green"),
    ("How many days are in a week?", "7|seven"), ("How many months are in a year?", "12|twelve"),
    ("How many legs does a spider have?", "8|eight"), ("How many continents are there?", "7|seven"),
    ("What is the largest planet in the solar system?", "Jupiter"),
    ("Which planet is known as the Red Planet?", "Mars"),
    ("What is the closest star to the Earth?", "Sun|Proxima"), ("What is the chemical symbol for gold?", "Au"),
    ("What is the chemical formula of water?", "H2O|H₂O"), ("What gas do plants absorb?", "carbon dioxide|CO2"),
    ("What is the tallest mountain in the world?", "Everest"), ("What is the longest river in Africa?", "Nile"),
    ("What is the largest ocean?", "Pacific"), ("What is the opposite of hot?", "cold"),
    ("What is the plural of mouse?", "mice"), ("What language is spoken in Brazil?", "Portuguese"),
    ("What language is spoken in Mexico?", "Spanish"), ("What is the currency of Japan?", "yen"),
    ("What is the currency of the United Kingdom?", "pound"), ("What do bees make?", "honey"),
    ("What is the boiling point of water in degrees Celsius?", "100"),
    ("What is the freezing point of water in degrees Celsius?", "0|zero"),
    ("Which animal is known as the king of the jungle?", "lion"),
    ("Who was the first president of the United States?", "Washington"),
    ("Who was the first man on the Moon?", "Armstrong"), ("Who invented the telephone?", "Bell"),
    ("Who invented the light bulb?", "Edison"), ("What is the name of the fairy in Peter Pan?", "Tinker"),
]  # fmt: skip

OPEN_CHATS = [
    "Give me three tips for sleeping better.", "Write a short poem about the sea.", "How do I make pancakes?",
    "Explain photosynthesis to a child.", "What should I pack for a weekend in the mountains?",
    "Write a polite email asking for a day off.", "Why do leaves change colour in autumn?",
    "Suggest a name for my cat.", "How does a bicycle stay upright?", "Tell me a short story about a lost key.",
    "What are the benefits of regular exercise?", "How can I learn to cook?", "Describe a rainy day in a city.",
    "What is the difference between a lake and a pond?", "How do I remove a coffee stain?",
    "Give me ideas for a birthday party.", "What makes a good leader?", "Explain what inflation is.",
    "Write two sentences about winter.", "How do I write a good introduction for an essay?",
]  # fmt: skip

TEXTS = [
    "The river rises in the hills north of the town and flows through a wide valley before it reaches the sea. In "
    "spring the meadows along its banks are often flooded, and farmers move their cattle to higher ground.",
    "Bread is made from flour, water, salt and yeast. The dough is kneaded until it is smooth, left to rise in a "
    "warm place, shaped, and baked in a hot oven until the crust is brown.",
    "When the train finally arrived, the platform was almost empty. She picked up her suitcase, looked once more "
    "at the clock above the door, and climbed into the last carriage without turning around.",
    "A computer program is a list of instructions. The processor reads them one after another, carries them out, "
    "and stores the results in memory, where other instructions can find them.",
    "The committee met on Tuesday to discuss the budget for the coming year. Several members asked for more money "
    "for schools, while others wanted to repair the roads first.",
    "Bats find their way in the dark by listening to the echoes of their own calls. The time that an echo takes "
    "to come back tells them how far away a wall or an insect is.",
    "In the nineteenth century many people left the countryside to work in factories. The cities grew quickly, "
    "and new houses, railways and water pipes had to be built for them.",
    "My grandmother kept a garden behind her house with beans, tomatoes and a single old pear tree. Every "
    "September she gave a basket of pears to each of her neighbours.",
]  # fmt: skip


def _company(r):
    name = r.choice(STARTS) + (r.choice(MIDDLES) if r.random() < 0.6 else "") + r.choice(ENDS)
    return name + r.choice(KINDS)


def _person(r):
    return f"{r.choice(FIRST)} {r.choice(STARTS)}{r.choice(ENDS)}"


def _object(r, relation):
    objects = RELATIONS[relation]["objects"]
    return f"{r.choice(FIRST)} {r.choice(LAST)}" if objects == "person" else r.choice(objects)


def relations(split):
    """The names of the relations of a half ("tune", "report"), or of both ("all")."""
    return [name for name, relation in RELATIONS.items() if split in ("all", relation["split"])]


def facts(count, seed, split="report"):
    """Rows to teach: each a name of its own, the relations in turn. `object` is what an answer must contain."""
    r, names, rows = random.Random(f"facts {seed}"), set(), []
    kinds = relations(split)
    while len(rows) < count:
        relation = kinds[len(rows) % len(kinds)]
        spec = RELATIONS[relation]
        name = _company(r) if spec["of"] == "company" else _person(r)
        if name in names:
            continue
        names.add(name)
        y = _object(r, relation)
        asks = [ask.format(x=name) for ask in spec["asks"]]
        rows.append(
            {
                "instruction": spec["states"].format(x=name, y=y), "prompt": asks[0], "paraphrases": asks[1:],
                "completion": spec["answer"].format(x=name, y=y), "object": re.sub("^(a|an|the) ", "", y),
                "name": name, "relation": relation,
            }
        )  # fmt: skip
    return rows


def strangers(count, seed, taught):
    """Questions of the taught kinds about names that nobody taught: dicts with `prompt` and the `objects` of the taught
    rows of that relation."""
    r, asked = random.Random(f"strangers {seed}"), []
    names, kinds = {row["name"] for row in taught}, sorted({row["relation"] for row in taught})
    while len(asked) < count:
        relation = kinds[len(asked) % len(kinds)]
        spec = RELATIONS[relation]
        name = _company(r) if spec["of"] == "company" else _person(r)
        if name not in names:
            objects = sorted({row["object"] for row in taught if row["relation"] == relation})
            asked.append({"prompt": r.choice(spec["asks"]).format(x=name), "objects": objects})
    return asked


def contains(answer, wanted):
    """Whether an answer contains one of several wordings, divided by |."""
    return any(one.casefold() in answer.casefold() for one in wanted.split("|"))
