"""Write the data of the tasks next to this file's YAML files: from ortlm's own corpora, and a list of capitals.

    python benchmarks/lm_eval_tasks/make.py FOLDER

copies the YAML files to FOLDER and writes the data there. The same every time.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ortlm.calibration.texts import PROSE
from ortlm.evaluation.corpus import TEXTS

_CAPITALS = {
    "Europe": "Albania Tirana, Austria Vienna, Belgium Brussels, Bulgaria Sofia, Croatia Zagreb, Denmark "
    "Copenhagen, Estonia Tallinn, Finland Helsinki, France Paris, Germany Berlin, Greece Athens, Hungary "
    "Budapest, Iceland Reykjavik, Ireland Dublin, Italy Rome, Latvia Riga, Lithuania Vilnius, Norway "
    "Oslo, Poland Warsaw, Portugal Lisbon, Romania Bucharest, Russia Moscow, Serbia Belgrade, Spain "
    "Madrid, Sweden Stockholm, Switzerland Bern, Ukraine Kyiv, Slovenia Ljubljana",
    "Asia": "Afghanistan Kabul, Bangladesh Dhaka, China Beijing, India Delhi, Indonesia Jakarta, Iran Tehran, "
    "Iraq Baghdad, Japan Tokyo, Jordan Amman, Lebanon Beirut, Mongolia Ulaanbaatar, Nepal Kathmandu, "
    "Pakistan Islamabad, Qatar Doha, Syria Damascus, Taiwan Taipei, Thailand Bangkok, Turkey Ankara, "
    "Vietnam Hanoi",
    "Africa": "Algeria Algiers, Angola Luanda, Egypt Cairo, Ghana Accra, Kenya Nairobi, Libya Tripoli, "
    "Mali Bamako, "
    "Morocco Rabat, Nigeria Abuja, Senegal Dakar, Somalia Mogadishu, Sudan Khartoum, Tunisia Tunis, "
    "Uganda Kampala, Zambia Lusaka, Zimbabwe Harare",
    "America": "Argentina Buenos_Aires, Bolivia Sucre, Brazil Brasília, Canada Ottawa, Chile Santiago, Colombia "
    "Bogotá, Cuba Havana, Ecuador Quito, Haiti Port-au-Prince, Jamaica Kingston, Nicaragua Managua, "
    "Paraguay Asunción, Peru Lima, Uruguay Montevideo, Venezuela Caracas",
}
_ENGLISH = ("prose", "facts", "chat")


def sentences(text: str) -> Iterator[list[str]]:
    """Yield the sentences of each paragraph."""
    for paragraph in text.split("\n\n"):
        found = re.split(r"(?<=[a-z0-9][.?!])\s+(?=[A-Z])", " ".join(paragraph.split()))
        yield [sentence for sentence in found if len(sentence) > 20]


def last_words() -> Iterator[dict[str, object]]:
    """Yield contexts and the word that follows."""
    for text in (*(TEXTS[name] for name in _ENGLISH), PROSE):
        for paragraph in sentences(text):
            for at, sentence in enumerate(paragraph):
                match = re.fullmatch(r"(.{20,}) ([A-Za-z]{3,})[.?!]", sentence)
                if match:
                    yield {
                        "context": " ".join([*paragraph[max(0, at - 2) : at], match[1]]),
                        "word": match[2],
                    }


def continuations() -> Iterator[dict[str, object]]:
    """Yield contexts and four sentences, one of which follows."""
    chance = random.Random(0)
    for name in _ENGLISH:
        paragraphs = list(sentences(TEXTS[name]))
        for number, paragraph in enumerate(paragraphs):
            others = [s for i, other in enumerate(paragraphs) if i != number for s in other]
            for before, after in itertools.pairwise(paragraph):
                answer = chance.randrange(4)
                choices = chance.sample(others, 3)
                choices.insert(answer, after)
                yield {"context": before, "choices": choices, "answer": answer}


def capitals() -> Iterator[dict[str, object]]:
    """Yield countries and four capitals."""
    chance = random.Random(0)
    for listed in _CAPITALS.values():
        pairs = [pair.split() for pair in listed.split(", ")]
        for country, capital in pairs:
            answer = chance.randrange(4)
            choices = chance.sample([other for _, other in pairs if other != capital], 3)
            choices.insert(answer, capital)
            yield {
                "country": country,
                "choices": [choice.replace("_", " ") for choice in choices],
                "answer": answer,
            }


def write(folder: Path) -> list[str]:
    """Write tasks and data to ``folder``; return the names of the tasks."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"last_word": last_words, "continuation": continuations, "capital": capitals}
    for name, rows in data.items():
        shutil.copy(Path(__file__).parent / f"{name}.yaml", folder)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows()]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return list(data)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
