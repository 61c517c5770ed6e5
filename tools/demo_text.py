"""The training text of the bundled demo model: small tasks and template sentences, all made from one seed.

The module reads no file and uses no network. Every document is a `Sample` of several `Piece`s of text. Some pieces are
prompts, which a model can't predict, and some are learnt (the answer, or running text). The code computes each sum that
it writes, so the arithmetic is always right.

About a tenth of all additions of two numbers from 0 to 99 are *held out*: they occur in no document, in no wording
and in neither order. The model's answers to them show whether it learnt to add or only to repeat.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

BOS, EOS = "<|bos|>", "<|eos|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL_TOKENS: tuple[str, ...] = (BOS, EOS, SYSTEM, USER, ASSISTANT, END)

DEFAULT_SEED = 2024
"""The seed of the shipped model; its held-out additions follow from it."""

OPERAND_LIMIT = 100
"""Held-out additions are drawn among the pairs of operands below this."""

FRUITS: tuple[str, ...] = (
    "apple", "banana", "cherry", "fig", "grape", "kiwi", "lemon", "lime", "mango", "melon", "olive", "orange",
    "peach", "pear", "plum", "berry",
)  # fmt: skip
ANIMALS: tuple[str, ...] = (
    "cat", "dog", "fox", "cow", "horse", "mouse", "bird", "fish", "frog", "goat", "bear", "lion", "tiger", "wolf",
    "duck", "owl", "rabbit", "sheep", "snake", "whale", "zebra", "ant", "bee", "shark", "turtle", "panda",
)  # fmt: skip
THINGS: tuple[str, ...] = (
    "book", "chair", "table", "lamp", "door", "window", "house", "garden", "river", "road", "bridge", "boat",
    "train", "car", "ship", "ball", "box", "bag", "cup", "plate", "knife", "spoon", "clock", "phone", "paper",
    "pencil", "letter", "key", "ring", "hat", "coat", "shoe", "shirt", "tree", "leaf", "flower", "grass", "stone",
    "sand", "hill", "lake", "sea", "star", "moon", "sun", "cloud", "rain", "snow", "wind", "fire", "water", "bread",
    "milk", "cheese", "cake", "salt", "sugar", "tea", "coffee", "music", "song", "story", "word", "number", "model",
    "token", "layer", "shoal", "server", "python", "king", "queen", "friend", "baby", "child", "doctor", "farmer",
    "city", "town", "school", "market", "island", "forest", "desert", "morning", "evening", "night", "summer",
    "winter", "spring", "world", "hand", "foot", "head", "heart", "eye", "ear", "nose", "mouth", "paint", "game",
)  # fmt: skip
OTHERS: tuple[str, ...] = (
    "hello", "happy", "little", "big", "small", "old", "new", "red", "blue", "green", "black", "white", "yellow",
    "brown", "fast", "slow", "hot", "cold", "good", "bad", "long", "short", "high", "low", "open", "light", "dark",
    "run", "walk", "jump", "swim", "read", "write", "sing", "sleep", "eat", "drink", "look", "play", "work", "give",
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)  # fmt: skip
WORDS: tuple[str, ...] = tuple(sorted({*FRUITS, *ANIMALS, *THINGS, *OTHERS}))
"""The words that are reversed."""
SORTED_WORDS: tuple[str, ...] = tuple(
    sorted({*FRUITS, *ANIMALS, "red", "blue", "green", "black", "white", "yellow", "brown", "tree", "house", "car"})
)
"""The words that are sorted: few enough for a small model to know the order of any two."""

CAPITALS: dict[str, str] = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "England": "London", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki",
    "Denmark": "Copenhagen", "Poland": "Warsaw", "Austria": "Vienna", "Greece": "Athens", "Japan": "Tokyo",
    "China": "Beijing", "India": "New Delhi", "Egypt": "Cairo", "Kenya": "Nairobi", "Canada": "Ottawa",
    "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Russia": "Moscow",
}  # fmt: skip
CITIES: dict[str, tuple[str, str]] = {
    "San Francisco": ("California", "the Golden Gate Bridge"),
    "Los Angeles": ("California", "its films"),
    "New York": ("the United States", "the Statue of Liberty"),
    "Chicago": ("Illinois", "its tall towers"),
    "Seattle": ("Washington", "its rain and its coffee"),
    "Boston": ("Massachusetts", "its old schools"),
    "Paris": ("France", "the Eiffel Tower"),
    "London": ("England", "the Tower Bridge"),
    "Berlin": ("Germany", "its museums"),
    "Hamburg": ("Germany", "its harbour"),
    "Rome": ("Italy", "the Colosseum"),
    "Venice": ("Italy", "its canals"),
    "Madrid": ("Spain", "its parks"),
    "Lisbon": ("Portugal", "its yellow trams"),
    "Athens": ("Greece", "its old temples"),
    "Vienna": ("Austria", "its music"),
    "Tokyo": ("Japan", "its fast trains"),
    "Cairo": ("Egypt", "the pyramids"),
    "Sydney": ("Australia", "its opera house"),
    "Toronto": ("Canada", "its high tower"),
}
OPPOSITES: dict[str, str] = {
    "hot": "cold", "big": "small", "long": "short", "high": "low", "fast": "slow", "old": "new", "good": "bad",
    "light": "dark", "open": "closed", "up": "down", "left": "right", "day": "night", "black": "white",
    "happy": "sad", "full": "empty", "early": "late", "wet": "dry", "hard": "soft", "yes": "no", "in": "out",
}  # fmt: skip
COLOURS: dict[str, str] = {
    "The sky": "blue", "The grass": "green", "The snow": "white", "The sun": "yellow", "A lemon": "yellow",
    "A banana": "yellow", "A cherry": "red", "A tomato": "red", "The night": "black", "A carrot": "orange",
    "Coal": "black", "Milk": "white", "A frog": "green", "The sea": "blue", "Chocolate": "brown",
}  # fmt: skip
DAYS: tuple[str, ...] = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS: tuple[str, ...] = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
NAMES: tuple[str, ...] = ("Anna", "Tom", "Maria", "Ben", "Lucy", "Max", "Nora", "Sam", "Emma", "Paul")
JOBS: tuple[str, ...] = ("teacher", "doctor", "farmer", "baker", "painter", "sailor")
PLACES: tuple[str, ...] = ("mat", "table", "chair", "hill", "bridge", "box", "road", "grass")
ADJECTIVES: tuple[str, ...] = ("little", "old", "big", "brown", "happy", "quick", "white")
VERBS: tuple[str, ...] = ("sat", "slept", "played", "waited", "jumped", "danced")

ABOUT_ME = "I am the demo model of Shoal. I can add, count, reverse a word and sort words."
NO_IDEA = "I am a very small model and I do not know that."


@dataclass(frozen=True)
class Piece:
    """A part of a text. `learnt` is False for a prompt, whose loss counts little."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class Sample:
    """One training document, without its BOS and EOS.

    `kind` names the task. The pieces are tokenized one by one; they are cut where the tokenizer would cut anyway
    (before a space or beside a special token), except in the few samples that imitate a prompt with a space at
    its end.
    """

    kind: str
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """The text of the whole document."""
        return "".join(piece.text for piece in self.pieces)


HeldOut = frozenset[tuple[int, int]]


def held_out_additions(seed: int = DEFAULT_SEED, share: float = 0.1) -> HeldOut:
    """Return the additions that no training text may contain: pairs `(a, b)` with `a <= b < 100`, for both orders."""
    pairs = [(a, b) for a in range(OPERAND_LIMIT) for b in range(a, OPERAND_LIMIT)]
    return frozenset(random.Random(f"held-out {seed}").sample(pairs, round(len(pairs) * share)))


def is_held_out(a: int, b: int, held_out: HeldOut) -> bool:
    """Return whether `a + b`, and therefore `b + a`, is held out of the training text."""
    return (min(a, b), max(a, b)) in held_out


def plain(kind: str, prompt: str, answer: str, rng: random.Random, open_end: float = 0.1) -> Sample:
    """Return a sample of a prompt and its answer, separated by one space.

    The space belongs to the answer. In a share `open_end` of the samples it belongs to the prompt instead, since users
    sometimes end a prompt with a space, which changes how the answer is tokenized.
    """
    if rng.random() < open_end:
        return Sample(kind, (Piece(prompt + " ", False), Piece(answer, True)))
    return Sample(kind, (Piece(prompt, False), Piece(" " + answer, True)))


def weighted(rng: random.Random, options: Sequence[str]) -> str:
    """Return one of the options. Each is twice as likely as the next, so that the likeliest one is clear."""
    return rng.choices(options, weights=[2.0**-i for i in range(len(options))])[0]


class TextMaker:
    """Draws training documents. The same seed gives the same documents and the same held-out additions."""

    def __init__(self, seed: int = DEFAULT_SEED) -> None:
        self.held_out = held_out_additions(seed)
        self.rng = random.Random(f"text {seed}")
        self._kinds: tuple[tuple[float, Callable[[], Sample]], ...] = (
            (0.37, self.addition),
            (0.11, self.counting),
            (0.11, self.reversing),
            (0.11, self.sorting),
            (0.08, self.sentence),
            (0.01, self.story),
            (0.18, self.short_chat),
            (0.03, self.long_chat),
        )

    def samples(self) -> Iterator[Sample]:
        """Yield documents of all kinds, without end."""
        weights = [weight for weight, _ in self._kinds]
        makers = [maker for _, maker in self._kinds]
        while True:
            yield self.rng.choices(makers, weights)[0]()

    # Operands and words

    def operands(self) -> tuple[int, int]:
        """Return two numbers to add: mostly below 100, some below 10 or below 1000; never a held-out pair."""
        rng = self.rng
        while True:
            size = rng.random()
            if size < 0.75:
                a, b = rng.randrange(100), rng.randrange(100)
            elif size < 0.80:
                a, b = rng.randrange(10), rng.randrange(10)
            elif size < 0.84:
                a, b = rng.randrange(1000), rng.randrange(100)
            elif size < 0.88:
                a, b = rng.randrange(100), rng.randrange(1000)
            else:
                a, b = rng.randrange(1000), rng.randrange(1000)
            if not is_held_out(a, b, self.held_out):
                return a, b

    def word(self) -> str:
        """Return a word of the list or, in three of ten cases, random syllables, so that the model learns to spell."""
        rng = self.rng
        if rng.random() < 0.7:
            return rng.choice(WORDS)
        word = ""
        for _ in range(rng.randint(1, 3)):
            word += rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou")
            if rng.random() < 0.4:
                word += rng.choice("lmnrst")
        return word

    def words_to_sort(self) -> list[str]:
        """Return two to five different words of the list."""
        return self.rng.sample(SORTED_WORDS, self.rng.choice((2, 3, 3, 3, 4, 4, 5)))

    def span(self) -> tuple[int, int]:
        """Return the first and last number to count (upwards): mostly about a dozen numbers, sometimes many."""
        rng = self.rng
        first = rng.choice((0, 1, 1, rng.randrange(1, 10), rng.randrange(100), rng.randrange(100)))
        longest = rng.choices((10, 30, 100), weights=(0.88, 0.10, 0.02))[0]
        return first, min(first + rng.randint(2, longest), 120)

    # Plain documents

    def addition(self) -> Sample:
        """Return `37 + 45 = 82`, or the same without spaces."""
        a, b = self.operands()
        if self.rng.random() < 0.08:
            return Sample("addition", (Piece(f"{a}+{b}=", False), Piece(f"{a + b}", True)))
        return plain("addition", f"{a} + {b} =", f"{a + b}", self.rng)

    def counting(self) -> Sample:
        """Return `Count from 3 to 9: 3 4 5 6 7 8 9`, or the same downwards."""
        first, last = self.span()
        if self.rng.random() < 0.2:
            return plain("counting", f"Count down from {last} to {first}:", count(last, first), self.rng)
        return plain("counting", f"Count from {first} to {last}:", count(first, last), self.rng)

    def reversing(self) -> Sample:
        """Return `Reverse: apple -> elppa` with another word."""
        word = self.word()
        return plain("reversing", f"Reverse: {word} ->", word[::-1], self.rng)

    def sorting(self) -> Sample:
        """Return `Sort: pear apple fig -> apple fig pear` with other words."""
        words = self.words_to_sort()
        return plain("sorting", f"Sort: {' '.join(words)} ->", " ".join(sorted(words)), self.rng)

    def sentence(self) -> Sample:
        """Return one to three sentences of running text about one subject."""
        return Sample("sentence", (Piece(self._sentence(), True),))

    def _sentence(self) -> str:
        """Return a fact, a person's introduction, or a sentence about an animal."""
        rng = self.rng
        choice = rng.randrange(8)
        if choice < 5:
            return self._fact()[1]
        if choice == 5:
            name, job = rng.choice(NAMES), weighted(rng, JOBS)
            return f"Hello, my name is {name}. I am a {job} and I like {weighted(rng, ('apples', 'music', 'books'))}."
        animal, verb, place = rng.choice(ANIMALS), weighted(rng, VERBS), weighted(rng, PLACES)
        if choice == 6:
            return f"The {animal} {verb} on the {place}."
        return f"The {rng.choice(ADJECTIVES)} {animal} {verb} on the {place}. It was {weighted(rng, ADJECTIVES)}."

    def story(self) -> Sample:
        """Return a longer text about one animal, from template sentences, so that the model learns long texts."""
        rng = self.rng
        hero, friend = rng.sample(ANIMALS, 2)
        name = rng.choice(NAMES)
        lines = [f"Once upon a time there was {with_article(weighted(rng, ADJECTIVES))} {hero}. Its name was {name}."]
        lines += rng.sample(
            [
                f"Every day {name} {weighted(rng, VERBS)} on the {weighted(rng, PLACES)}.",
                f"One day {name} met {with_article(friend)}.",
                f'"Hello," said the {friend}. "Do you want to play with me?"',
                f'"Yes," said {name}. "I like to play."',
                f"Then the {friend} gave {name} {with_article(weighted(rng, FRUITS))}.",
                f"The {hero} and the {friend} {weighted(rng, VERBS)} together.",
                f"In the evening the {hero} looked at the {weighted(rng, ('moon', 'stars', 'sea'))}.",
            ],
            rng.randint(3, 7),
        )
        lines.append(f"{name} was very happy. The end.")
        return Sample("story", (Piece(" ".join(lines), True),))

    # Conversations

    def short_chat(self) -> Sample:
        """Return a conversation with one question and its answer."""
        return self._chat("chat", 1)

    def long_chat(self) -> Sample:
        """Return a conversation with two to eight independent questions and their answers."""
        return self._chat("long chat", self.rng.randint(2, 8))

    def _chat(self, kind: str, turns: int) -> Sample:
        rng = self.rng
        pieces: list[Piece] = []
        if rng.random() < 0.15:
            helper = rng.choice(("You are a helpful assistant.", "You are a friendly helper.", "Answer briefly."))
            pieces.append(Piece(SYSTEM + helper + END, False))
        for _ in range(turns):
            question, answer = self.turn()
            pieces += [Piece(USER + question + END + ASSISTANT, False), Piece(answer + END, True)]
        return Sample(kind, tuple(pieces))

    def turn(self) -> tuple[str, str]:
        """Return a question and its answer."""
        rng = self.rng
        choice = rng.random()
        if choice < 0.50:
            a, b = self.operands()
            wordings = ("What is {} + {}?", "What is {} plus {}?", "{} + {}", "{} + {} =", "Add {} and {}.", "{}+{}")
            asked = rng.choices(wordings, weights=(6, 2, 2, 1, 1, 1))[0]
            return asked.format(a, b), f"{a} + {b} = {a + b}."
        if choice < 0.58:
            first, last = self.span()
            return f"Count from {first} to {last}.", count(first, last)
        if choice < 0.68:
            word = self.word()
            asked = rng.choice(("Reverse the word {}.", "Reverse: {}", "What is {} backwards?"))
            return asked.format(word), word[::-1]
        if choice < 0.76:
            words = self.words_to_sort()
            asked = rng.choice(("Sort these words: {}.", "Sort the words {}.", "Sort: {}"))
            return asked.format(" ".join(words)), " ".join(sorted(words))
        if choice < 0.90:
            return self._fact()
        return self._small_talk()

    def _fact(self) -> tuple[str, str]:
        """Return a question about the small world of the tables above, and the sentences that answer it."""
        rng = self.rng
        choice = rng.randrange(5)
        if choice == 0:
            country, capital = rng.choice(list(CAPITALS.items()))
            return f"What is the capital of {country}?", f"The capital of {country} is {capital}."
        if choice == 1:
            city, (land, fame) = rng.choice(list(CITIES.items()))
            asked = rng.choice(("Where is {}?", "What is {}?", "Tell me about {}."))
            return asked.format(city), f"{city} is a city in {land}. It is known for {fame}."
        if choice == 2:
            word, opposite = rng.choice(list(OPPOSITES.items()))
            return f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."
        if choice == 3:
            thing, colour = rng.choice(list(COLOURS.items()))
            lower = thing[0].lower() + thing[1:]
            return f"What colour is {lower}?", f"{thing} is {colour}."
        row, name = rng.choice(((DAYS, "day"), (MONTHS, "month")))
        at = rng.randrange(len(row))
        return f"What {name} comes after {row[at]}?", f"The {name} after {row[at]} is {row[(at + 1) % len(row)]}."

    def _small_talk(self) -> tuple[str, str]:
        """Return a greeting or the like, or a question that the model can't answer, with the reply."""
        rng = self.rng
        choice = rng.randrange(6)
        if choice == 0:
            asked = rng.choice(("Hello", "Hello!", "Hi", "Hi!", "Hello there", "Good day!"))
            return asked, "Hello! How can I help you?"
        if choice == 1:
            asked = rng.choice(("Who are you?", "What are you?", "What can you do?", "What is your name?", "Help"))
            return asked, ABOUT_ME
        if choice == 2:
            return rng.choice(("Thanks", "Thank you!", "Thank you.", "Thanks!")), "You are welcome."
        if choice == 3:
            return rng.choice(("How are you?", "How do you do?")), "I am fine, thank you."
        if choice == 4:
            name = rng.choice(NAMES)
            return rng.choice(("My name is {}.", "I am {}.")).format(name), f"Hello, {name}! How can I help you?"
        thing = rng.choice((*THINGS, *ANIMALS, *FRUITS))
        a_thing = with_article(thing)
        questions = (
            f"Why is the {thing} there?", f"Who made the {thing}?", f"Write a poem about {a_thing}.",
            f"How old is the {thing}?", f"What is {a_thing}?", f"Explain the {thing} to me.", f"Is the {thing} nice?",
            f"How do I make {a_thing}?", f"What is the best {thing} in the world?", f"Can you draw {a_thing}?",
        )  # fmt: skip
        return rng.choice(questions), NO_IDEA


def with_article(word: str) -> str:
    """Return the word with `a` or `an` before it."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def count(first: int, last: int) -> str:
    """Return the numbers from `first` to `last`, both included, upwards or downwards."""
    step = 1 if last >= first else -1
    return " ".join(str(number) for number in range(first, last + step, step))


def tokenizer_corpus(seed: int, documents: int) -> Iterator[str]:
    """Yield texts from which the tokenizer learns its merges.

    Reversed and random words are left out, since they would fill the vocabulary with sequences of letters that occur
    nowhere else. Special tokens are left out too, which is why the pieces come one by one.
    """
    maker = TextMaker(seed)
    makers = (maker.counting, maker.sorting, maker.sentence, maker.sentence, maker.story, maker.short_chat)
    for index in range(documents):
        sample = makers[index % len(makers)]()
        for piece in sample.pieces:
            text = piece.text
            if "everse" in text or "backwards" in text:
                break
            for token in SPECIAL_TOKENS:
                text = text.replace(token, "\n")
            yield text
    yield from ("Reverse:", " Reverse the word", "What is", " backwards?", " ->")
