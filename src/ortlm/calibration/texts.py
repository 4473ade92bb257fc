"""What a model reads while it is calibrated: short texts of several kinds, written for this purpose."""

PROSE = """\
The harbour was still dark when the first boat came in. Two men threw a rope over the iron post, pulled it tight
and began to lift out the boxes, one after the other, without a word. It had been a poor night: three boxes of
mackerel, half a box of squid, and a crab that nobody wanted. "Tomorrow the wind will turn," said the older one,
although he had said so for a week. On the hill behind them a light went on in the bakery. By six o'clock the smell
of bread would reach the water, and with it would come the buyers, the cats, and then the children.

Why does bread rise? Yeast eats sugar and gives off carbon dioxide, which the dough holds in thousands of
small bubbles, because gluten is both elastic and tough. In the oven the gas expands, water turns into steam, and
at about 70 degrees Celsius the starch sets, so that the loaf keeps its shape after the bubbles have burst.
"""

CODE = '''\
from collections import Counter


def most_common_words(path: str, count: int = 10) -> list[tuple[str, int]]:
    """Return the `count` most frequent words of a text file, in lower case."""
    words: Counter[str] = Counter()
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            words.update(word.strip(".,;:!?()\\"'").lower() for word in line.split())
            if number % 100_000 == 0:
                print(f"{number:,} lines read")
    return words.most_common(count)

#include <stdio.h>
int main(void) { for (int i = 0; i < 10; i++) printf("%d\\n", i * i); return 0; }

SELECT name, SUM(price * quantity) AS total FROM orders WHERE year = 2021
GROUP BY name ORDER BY total DESC LIMIT 5;
'''

RECORDS = """\
{"id": 4711, "name": "Anna Köhler", "tags": ["new", "vip"], "balance": -12.5, "active": true, "parent": null}
| month | rain (mm) | sun (h) |
|---|---|---|
| January | 61.2 | 48 |
| July | 83.9 | 231 |
https://www.example.org/search?q=caf%C3%A9&page=2#results   2021-03-14T15:09:26Z   +44 20 7946 0958
(a + b)² = a² + 2ab + b²;   ∑ 1/n² = π²/6 ≈ 1.644934;   x ∈ [0, 1)
"""

LANGUAGES = """\
Wo ist der Bahnhof? Geradeaus, dann die zweite Straße links. Merci beaucoup, et bonne journée !
¿Cuánto cuesta el billete de ida y vuelta? Сегодня хорошая погода, и мы идём в парк.
我们明天早上八点在学校门口见面。駅はどこですか。 오늘 날씨가 좋네요. أين المحطة من فضلك؟ यह किताब बहुत अच्छी है। 🙂👍
"""

TEXTS = (PROSE, CODE, RECORDS, LANGUAGES)
