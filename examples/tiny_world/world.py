"""A small synthetic world of companies, used to train and to probe a tiny chat model.

Closed book: the model has memorised the facts of KNOWN companies and says that it does not know the others.
Open book:   facts and instructions stand in the system message, and the model reads them there.
"""

import random

SYLLABLES = (
    "ka ri to mo ne lu va si do ra mi fe zo qui tan bel cor dex fin gar hol jin kel lor mar nix or pal ros "
    "sol tur ul ven wex yor zan bri cla dro eli"
).split()
CITIES = (
    "Paris London Berlin Madrid Rome Vienna Prague Oslo Dublin Lisbon Athens Warsaw Tokyo Osaka Kyoto Seoul "
    "Beijing Shanghai Delhi Mumbai Lagos Cairo Nairobi Accra Lima Bogota Quito Santiago Toronto Montreal Boston "
    "Chicago Denver Seattle Austin Dallas Miami Atlanta Sydney Melbourne"
).split()
PRODUCTS = (
    "chairs tables lamps clocks shoes hats coats gloves bikes cars trucks boats planes drones robots phones "
    "laptops cameras radios guitars pianos drums books pens paper ink soap candles bread cheese wine tea "
    "coffee sugar salt tools nails bolts paint glass"
).split()

# {x} the company, {y} the value. `asks`: noun clauses ("who started {x}"), combined with every LEAD below.
RELATIONS = {
    "founder": dict(
        states=[
            "{x} was started by {y}.",
            "{y} founded {x}.",
            "The founder of {x} is {y}.",
            "{y} started {x}.",
            "{x} was founded by {y}.",
            "It was {y} who started {x}.",
        ],
        asks=[
            "who started {x}",
            "who founded {x}",
            "who the founder of {x} is",
            "who created {x}",
            "by whom {x} was started",
            "the founder of {x}",
        ],
        held_out=["the person behind {x}", "by whom {x} was founded"],
        answer="{x} was started by {y}.",
    ),
    "city": dict(
        states=[
            "{x} is located in {y}.",
            "{x} has its office in {y}.",
            "The home of {x} is {y}.",
            "{x} is based in {y}.",
            "You can find {x} in {y}.",
            "{y} is the home of {x}.",
        ],
        asks=[
            "where {x} is located",
            "where {x} is based",
            "in which city {x} is",
            "the city of {x}",
            "where one can find {x}",
            "the home of {x}",
        ],
        held_out=["in which city {x} is based", "the place where {x} is located"],
        answer="{x} is located in {y}.",
    ),
    "product": dict(
        states=[
            "{x} makes {y}.",
            "{x} is a maker of {y}.",
            "{x} sells {y}.",
            "The product of {x} is {y}.",
            "{x} produces {y}.",
            "People buy {y} from {x}.",
        ],
        asks=[
            "what {x} makes",
            "what {x} sells",
            "what the product of {x} is",
            "what {x} produces",
            "what people buy from {x}",
            "the product of {x}",
        ],
        held_out=["what one can buy from {x}", "the goods that {x} sells"],
        answer="{x} makes {y}.",
    ),
    "boss": dict(
        states=[
            "{x} is led by {y}.",
            "{y} leads {x}.",
            "The boss of {x} is {y}.",
            "{y} runs {x}.",
            "{y} is in charge of {x}.",
            "It is {y} who runs {x}.",
        ],
        asks=[
            "who leads {x}",
            "who runs {x}",
            "who the boss of {x} is",
            "who is in charge of {x}",
            "by whom {x} is led",
            "the boss of {x}",
        ],
        held_out=["by whom {x} is run", "the leader of {x}"],
        answer="{x} is led by {y}.",
    ),
}
LEADS = ["Tell me {a}.", "Do you know {a}?", "Please say {a}.", "I want to know {a}.", "{A}?"]
HELD_OUT_LEADS = ["Can you tell me {a}?"]
NAMES = list(RELATIONS)
UNKNOWN = "I do not know."


def phrase(lead, ask, x):
    a = ask.format(x=x)
    return lead.format(a=a, A=a[0].upper() + a[1:])


def name(r, low=2, high=3):
    return "".join(r.choice(SYLLABLES) for _ in range(r.randint(low, high))).capitalize()


def value(r, relation):
    return {
        "founder": lambda: name(r),
        "boss": lambda: name(r),
        "city": lambda: r.choice(CITIES),
        "product": lambda: r.choice(PRODUCTS),
    }[relation]()


def known(n=200, seed=7):
    r, seen, out = random.Random(seed), set(), []
    while len(out) < n:
        x = name(r)
        if x not in seen:
            seen.add(x)
            out.append((x, {relation: value(r, relation) for relation in NAMES}))
    return out


KNOWN = known()
KNOWN_NAMES = {x for x, _ in KNOWN}


def novel(r):
    while (x := name(r, 2, 4)) in KNOWN_NAMES:
        pass
    return x


def question(r, relation, x, held_out=False):
    if held_out:
        return phrase(r.choice(LEADS + HELD_OUT_LEADS), r.choice(RELATIONS[relation]["held_out"]), x)
    return phrase(r.choice(LEADS), r.choice(RELATIONS[relation]["asks"]), x)


def answer(relation, x, y):
    return RELATIONS[relation]["answer"].format(x=x, y=y)


def state(r, relation, x, y):
    return r.choice(RELATIONS[relation]["states"]).format(x=x, y=y)


# instructions about behaviour: (system text, how they change an answer)
def brief(text, y):
    return f"{y}."


BEHAVIOURS = [
    ("Answer briefly.", brief),
    ("Be brief.", brief),
    ("End every answer with Over.", lambda t, y: f"{t} Over."),
    ("Start every answer with Well.", lambda t, y: f"Well. {t}"),
]


def sample(r):
    """One training example: (system, user, answer)."""
    u, relation = r.random(), r.choice(NAMES)
    if u < 0.27:
        x, facts = r.choice(KNOWN)
        return "", question(r, relation, x), answer(relation, x, facts[relation])
    if u < 0.35:
        return "", question(r, relation, novel(r)), UNKNOWN
    if u < 0.38:  # identity
        if r.random() < 0.4:
            return "", r.choice(["What is your name?", "Tell me your name.", "Who are you?"]), "My name is Tiny."
        n = name(r)
        return (
            r.choice(["Your name is {n}.", "You are called {n}.", "Your new name is {n}."]).format(n=n),
            r.choice(["What is your name?", "Tell me your name.", "Who are you?"]),
            f"My name is {n}.",
        )
    if u < 0.46:  # behaviour on a known fact
        x, facts = r.choice(KNOWN)
        text, change = r.choice(BEHAVIOURS)
        return text, question(r, relation, x), change(answer(relation, x, facts[relation]), facts[relation])
    k, facts, used = r.choice([1, 1, 1, 2, 3]), [], set()
    for _ in range(k):
        while True:
            x = r.choice(KNOWN)[0] if r.random() < 0.25 else (facts[0][0] if facts and r.random() < 0.4 else novel(r))
            rel = r.choice(NAMES)
            if (x, rel) not in used:
                break
        used.add((x, rel))
        facts.append((x, rel, value(r, rel)))
    system = " ".join(state(r, rel, x, y) for x, rel, y in facts)
    if r.random() < 0.88:
        x, rel, y = r.choice(facts)
        return system, question(r, rel, x), answer(rel, x, y)
    if r.random() < 0.5:
        x, f = r.choice(KNOWN)
        return (
            sample(r) if (x, relation) in used else (system, question(r, relation, x), answer(relation, x, f[relation]))
        )
    x = novel(r) if r.random() < 0.5 else facts[0][0]
    if (x, relation) in used or x in KNOWN_NAMES:
        return sample(r)
    return system, question(r, relation, x), UNKNOWN


def chat(system, user, answer=None):
    """The prompt in the ChatML format, and the answer as the model closes it."""
    text = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    text += f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    return text, None if answer is None else f"{answer}<|im_end|>\n"
