# ruff: noqa: E501, RUF001 - lines are as long as the text wants, in any writing
"""The project's own small corpus for evaluation: texts of several domains, written for this purpose.

It is large enough for figures that compare two models on the same tokens, not for a model's perplexity as such.
"""

from __future__ import annotations

_PROSE = """\
A river begins where more water arrives than the ground can hold. In the mountains this is often a wet meadow: rain
and melting snow sink into moss and peat, move slowly downhill, and come out again as a trickle between stones. The
trickle meets others, and after a few kilometres there is a stream with a name. It is fast and cold, it carries sand
and gravel, and it cuts a narrow valley in the shape of a V. Trout like such water, because cold water holds more
oxygen than warm water does.

Further down, the slope becomes gentle. The river slows, drops the gravel first, then the sand, and at last the fine
mud. It begins to wander. On the outside of every bend the water is quick and eats the bank; on the inside it is slow
and leaves a beach of sand. So the bends grow and move, until in some flood the river takes a short cut and leaves a
lake behind that is curved like a horn. People have always built their towns a little above such plains: close enough
to water the fields, and high enough to keep the cellar dry. Where they forgot this rule, or where land was too dear
to obey it, the river reminded them every thirty or forty years.

The mouth is the oldest part of the story and the youngest part of the land. Mud that was rock in the mountains a
thousand years ago settles where the current meets the tide, and reeds hold it together. Some rivers push a delta far
into the sea in this way; others, whose coast is swept by strong currents, have none. Engineers who want a harbour
there must dredge for ever, because the river does not stop working at night.

The clock on the town hall had been wrong for so long that nobody noticed it any more. It was eleven minutes fast in
winter and nine in summer, and Mrs Abel, who sold newspapers under it, had trained three generations of schoolchildren
to subtract. When the new mayor announced that it would be repaired, she was the only one who wrote a letter. "People
here have learned to be early," she wrote, "and I do not see why the council should pay to teach them otherwise." The
mayor laughed, read the letter aloud at the next meeting, and had the clock repaired all the same. On the first Monday
after that, forty-one people missed the bus at seven.

It took until spring before the town was punctual again, and it never was early any more. Mrs Abel kept her own watch
as it had been. "Someone," she said, "should remember what time it used to be."

Salt was once dear because it was work. Along warm coasts it could be had from shallow ponds, where the sun did most of
the labour; inland it had to be dug out of mountains or boiled from springs, and a single pan could burn a small wood
in a year. Towns grew rich on it and roads were named after it. Without salt there was no butter that kept, no fish in
winter, no leather and no cheese. What changed this was not one invention but several: coal in place of wood, pumps in
place of buckets, and ships and railways that made distance cheap. Within a hundred years salt turned from a treasure
into something that is thrown on icy streets.

A map is a promise about what can be left out. The one in the railway carriage shows every station and no hill; the
hiker's map shows every hill and only the stations where a path begins. Neither is wrong. A map with everything on it
would be as large as the country, and one would need another map to find one's way about it. Good makers of maps are
therefore less proud of what they draw than of what they omit: the width of a road that would cover a whole village if
it were drawn to scale, the bend of a river that nobody will ever need to count.

It snowed on the night before the election, and in the valley three of the five polling stations could not be reached
by car. At the school in Upper Birch the teacher lit the stove at six, put the box on the table, and waited. The first
voter came on skis at half past nine. He was eighty-four, had voted in every election since he was allowed to, and
wanted to know whether there was coffee. There was. By noon eleven people sat around the stove, among them both
candidates for the office of mayor, who had shared a sledge. Nobody spoke of politics. When the box was counted in the
evening it held twelve votes for each, and the teacher, who had forgotten to vote, was asked by both of them to think
about it carefully.
"""

_PYTHON = '''\
"""A queue of jobs that are tried again when they fail."""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(order=True)
class Job:
    """Something to do not before ``due``; jobs that are due at once run in the order of their numbers."""

    due: float
    number: int
    run: Callable[[], None] = field(compare=False)
    tries: int = field(default=0, compare=False)


class Queue:
    """Runs jobs one after the other and waits longer after every failure of the same one."""

    def __init__(self, most_tries: int = 5, first_wait: float = 0.5) -> None:
        self._jobs: list[Job] = []
        self._numbers = itertools.count()
        self._most_tries = most_tries
        self._first_wait = first_wait
        self.failed: list[tuple[Job, Exception]] = []

    def add(self, run: Callable[[], None], delay: float = 0.0) -> None:
        heapq.heappush(self._jobs, Job(time.monotonic() + delay, next(self._numbers), run))

    def work(self) -> int:
        """Run until nothing is left; return how many jobs were done."""
        done = 0
        while self._jobs:
            job = heapq.heappop(self._jobs)
            time.sleep(max(0.0, job.due - time.monotonic()))
            try:
                job.run()
            except Exception as error:
                job.tries += 1
                if job.tries >= self._most_tries:
                    self.failed.append((job, error))
                    continue
                wait = self._first_wait * 2**job.tries
                job.due = time.monotonic() + wait * random.uniform(0.8, 1.2)
                heapq.heappush(self._jobs, job)
            else:
                done += 1
        return done


if __name__ == "__main__":
    queue = Queue(most_tries=3)
    for name in ("first", "second", "third"):
        queue.add(lambda name=name: print(f"hello from {name}"))
    print(queue.work(), "jobs done,", len(queue.failed), "failed")
'''

_OTHER_CODE = """\
// A fixed ring of samples: pushing to a full one drops the oldest.
#include <array>
#include <cstddef>
#include <optional>

template <typename T, std::size_t N>
class Ring {
 public:
  void push(const T& value) {
    data_[(start_ + size_) % N] = value;
    if (size_ < N) {
      ++size_;
    } else {
      start_ = (start_ + 1) % N;
    }
  }

  std::optional<T> pop() {
    if (size_ == 0) return std::nullopt;
    T value = data_[start_];
    start_ = (start_ + 1) % N;
    --size_;
    return value;
  }

  std::size_t size() const { return size_; }

 private:
  std::array<T, N> data_{};
  std::size_t start_ = 0, size_ = 0;
};

/* Finds the shortest path in a grid of open (0) and blocked (1) cells. */
export function shortestPath(grid, start, goal) {
  const key = ([row, column]) => row * grid[0].length + column;
  const from = new Map([[key(start), null]]);
  const queue = [start];
  while (queue.length > 0) {
    const cell = queue.shift();
    if (key(cell) === key(goal)) break;
    for (const [dr, dc] of [[0, 1], [1, 0], [0, -1], [-1, 0]]) {
      const next = [cell[0] + dr, cell[1] + dc];
      if (grid[next[0]]?.[next[1]] !== 0 || from.has(key(next))) continue;
      from.set(key(next), cell);
      queue.push(next);
    }
  }
  if (!from.has(key(goal))) return null;
  const path = [];
  for (let cell = goal; cell !== null; cell = from.get(key(cell))) path.unshift(cell);
  return path;
}

CREATE TABLE reading (
    station INTEGER NOT NULL REFERENCES station(id),
    taken_at TIMESTAMP NOT NULL,
    celsius REAL CHECK (celsius BETWEEN -90 AND 60),
    PRIMARY KEY (station, taken_at)
);
SELECT s.name, date(r.taken_at) AS day, min(r.celsius), max(r.celsius), round(avg(r.celsius), 1) AS mean
FROM reading AS r JOIN station AS s ON s.id = r.station
WHERE r.taken_at >= date('now', '-30 days')
GROUP BY s.name, day HAVING count(*) > 20 ORDER BY day, s.name;

#!/bin/sh
set -eu
for file in "$@"; do
  [ -f "$file" ] || { echo "$file: no such file" >&2; exit 1; }
  gzip --keep --best "$file" && printf '%s %s\\n' "$(wc -c < "$file")" "$(wc -c < "$file.gz")"
done
"""

_RECORDS = """\
{
  "order": 20417,
  "customer": {"name": "Jonas Lindqvist", "email": "jonas@example.com", "since": "2019-08-02", "newsletter": false},
  "items": [
    {"sku": "LAMP-0031", "title": "Desk lamp, brass", "quantity": 1, "price": 48.90, "tags": ["light", "office"]},
    {"sku": "BULB-E27-8W", "title": "LED bulb 8 W", "quantity": 4, "price": 3.25, "tags": ["light"]},
    {"sku": "CORD-200", "title": "Textile cord 2 m, red", "quantity": 1, "price": 11.00, "tags": []}
  ],
  "shipping": {"method": "parcel", "address": {"street": "Kungsgatan 12", "zip": "411 19", "city": "Göteborg"}},
  "total": 72.90, "currency": "EUR", "paid": true, "note": null
}
station,date,temperature_c,rain_mm,wind_kmh
Hillfort,2022-11-03,7.4,12.6,31
Hillfort,2022-11-04,6.1,0.0,18
Hillfort,2022-11-05,5.8,3.2,22
Old Quay,2022-11-03,9.0,10.1,44
Old Quay,2022-11-04,8.2,0.4,27
<recipe servings="4"><title>Lentil soup</title><step n="1">Rinse 250 g of lentils.</step><step n="2">Fry one
onion and two carrots in oil.</step><step n="3">Add 1 l of water and simmer for 30 minutes.</step></recipe>
[server]
listen = "0.0.0.0:8080"
workers = 4
[server.limits]
body_bytes = 1_048_576
timeout_seconds = 30
2023-02-11 06:14:02,118 INFO  scheduler: 12 jobs loaded from disk in 0.03 s
2023-02-11 06:14:07,930 WARN  mailer: connection refused by 10.0.4.17:25, next try in 60 s
2023-02-11 06:15:08,011 ERROR mailer: giving up on message 7f3a-19c2 after 3 tries
"""

_MATH = """\
Problem. A train leaves at 9:40 and covers 150 km at 60 km/h; after a stop of 12 minutes it goes on for 80 km at
100 km/h. When does it arrive? Solution. The first part takes 150 / 60 = 2.5 hours, which is 2 hours and 30 minutes,
so the train stops from 12:10 to 12:22. The second part takes 80 / 100 = 0.8 hours, which is 48 minutes. It arrives at
13:10.

Problem. Show that the sum of the first n odd numbers is n². Proof. For n = 1 the sum is 1 = 1². Assume that
1 + 3 + ... + (2n - 1) = n². The next odd number is 2n + 1, and n² + 2n + 1 = (n + 1)², which is the claim for n + 1.
By induction it holds for all n.

Problem. Solve x² - 5x + 6 = 0. The discriminant is 25 - 24 = 1, so x = (5 ± 1) / 2, which gives x = 3 and x = 2.
Check: 9 - 15 + 6 = 0 and 4 - 10 + 6 = 0.

Problem. Two dice are thrown. How likely is a sum of at least ten? There are 36 equally likely pairs. A sum of 10 comes
from (4,6), (5,5), (6,4), a sum of 11 from (5,6), (6,5), and a sum of 12 from (6,6): 6 pairs. So the probability is
6/36 = 1/6.

Definition. A function f: R → R is continuous at a if for every ε > 0 there is a δ > 0 such that |x - a| < δ implies
|f(x) - f(a)| < ε. Example. \\(f(x) = 3x + 1\\) is continuous everywhere: given ε, take \\(\\delta = \\varepsilon / 3\\).
The derivative of \\(x^n\\) is \\(n x^{n-1}\\), and \\(\\int_0^1 x^2 \\, dx = \\frac{1}{3}\\).
"""

_GERMAN = """\
Als der alte Leuchtturm abgeschaltet wurde, glaubte niemand im Dorf, dass sich dadurch etwas ändern würde. Die Schiffe
fuhren längst nach Satellit, und der Wärter war schon vor Jahren in eine Wohnung mit Zentralheizung gezogen. Doch in der
ersten Nacht ohne Licht konnten viele nicht schlafen. Es fehlte der helle Streifen, der alle zwölf Sekunden über die
Decke gewandert war. Die Kinder fragten, ob der Mond kaputt sei. Schließlich beschloss der Gemeinderat mit sechs gegen
fünf Stimmen, eine schwächere Lampe einzubauen, die für die Schifffahrt ohne Bedeutung ist und allein den Bewohnern dient.

Wer ein Fahrrad reparieren will, braucht weniger Werkzeug, als er denkt, und mehr Geduld, als er hat. Zuerst hängt man es
so auf, dass sich die Räder frei drehen. Dann prüft man der Reihe nach die Bremsen, die Kette und das Licht. Eine Kette,
die sich vom Kettenblatt weit abheben lässt, ist verschlissen und muss ersetzt werden, bevor sie auch die Zahnräder
beschädigt. Für die meisten anderen Fehler genügen ein Lappen, ein Tropfen Öl und ein Schraubenschlüssel.

Sehr geehrte Frau Brandt, vielen Dank für Ihr Schreiben vom 3. Mai. Leider können wir den gewünschten Termin nicht
bestätigen, da der Saal an diesem Abend bereits vergeben ist. Wir bieten Ihnen stattdessen Freitag, den 21. Juni, ab
18 Uhr an. Bitte teilen Sie uns bis Ende des Monats mit, ob Ihnen dieser Tag zusagt. Mit freundlichen Grüßen
"""

_FRENCH = """\
Chaque année, à la fin du mois d'août, le village organise un concours que personne n'a jamais pris au sérieux et que
tout le monde veut gagner. Il s'agit de deviner le poids d'une citrouille. Les anciens la regardent de loin, les jeunes
la soulèvent, et le maire, qui n'a pas le droit de participer, donne des conseils à voix basse. L'an dernier, une fillette
de sept ans a trouvé le bon chiffre à dix grammes près. Quand on lui a demandé sa méthode, elle a répondu qu'elle avait
simplement fait la moyenne de tout ce que les adultes avaient dit avant elle.

La dentelle se fabriquait autrefois pendant les longues soirées d'hiver, à la lumière d'une seule bougie. Pour en tirer
plus de clarté, on plaçait devant la flamme une boule de verre remplie d'eau, qui concentrait la lumière sur l'ouvrage.
Il fallait jusqu'à deux cents fuseaux pour les motifs les plus fins, et une journée entière pour quelques centimètres.
Les machines ont remplacé ce travail, mais quelques ateliers conservent les gestes et les transmettent.

Pour préparer une omelette, battez trois œufs avec une pincée de sel, sans trop insister. Faites fondre une noix de beurre
dans une poêle bien chaude, versez les œufs et remuez aussitôt avec une fourchette. Dès que les bords prennent, cessez de
remuer, ajoutez les herbes, puis repliez l'omelette et servez-la sans attendre : elle doit rester moelleuse au milieu.
"""

_SPANISH = """\
Mi abuela decía que las casas también envejecen, y que hay que escucharlas como se escucha a una persona mayor. La suya
crujía al amanecer, cuando el sol calentaba las tejas, y volvía a crujir de noche, cuando el frío bajaba de la sierra.
Ella sabía por el sonido si iba a llover. Después de su muerte vinieron unos arquitectos, midieron las paredes y dijeron
que la estructura era sólida pero que la madera estaba llena de agua. Ninguno de ellos pudo explicar por qué la puerta
del patio se abría sola los domingos.

El faro de la isla funciona desde 1857. Al principio quemaba aceite de oliva, más tarde petróleo, y desde mediados del
siglo pasado se alimenta de la red eléctrica mediante un cable submarino. Su luz alcanza veinte millas en las noches
claras. Hoy nadie vive en él, pero cada verano un equipo de biólogos ocupa la vivienda del farero para contar las aves
que pasan camino de África. En septiembre pueden registrar más de diez mil en un solo día.

Para solicitar la beca es necesario presentar el formulario, una copia del documento de identidad y una carta de no más
de dos páginas en la que se explique el proyecto. El plazo termina el 15 de octubre a las 14.00 horas. Las solicitudes
incompletas podrán corregirse en los diez días siguientes; las que lleguen tarde no serán admitidas. La comisión publicará
la lista provisional antes de fin de año, y quienes no estén de acuerdo podrán presentar una reclamación por escrito.
"""

_RUSSIAN = """\
В нашем доме раньше была общая кухня, и по запаху можно было узнать, какой сегодня день недели. По понедельникам варили
щи, в четверг жарили рыбу, а в воскресенье кто-нибудь обязательно пёк пирог с капустой и угощал соседей. Ссорились часто,
но недолго: плита была одна, и зимой все всё равно собирались возле неё. Когда квартиры наконец разделили, люди радовались
тишине. А через год моя тётка призналась, что каждое утро ставит чайник на две чашки больше, чем ей нужно.

Байкальский лёд прозрачен, потому что вода в озере почти не содержит примесей и замерзает медленно. К февралю его толщина
достигает метра, и по нему прокладывают дорогу для автомобилей. Водители снимают ремни безопасности и едут с приоткрытой
дверью, чтобы в случае опасности быстро выйти. Трещины появляются от перепадов температуры: днём лёд расширяется, ночью
сжимается, и тогда над озером раздаётся звук, похожий на далёкий гром.

Чтобы оформить читательский билет, возьмите с собой паспорт и одну фотографию. Книги выдаются на три недели; срок можно
продлить по телефону, если издание не заказал другой читатель. За потерянную книгу нужно принести такую же или заплатить
её полную стоимость.
"""

_CHINESE = """\
老城的东门外有一条只有两百步长的小街，街上却开着七家茶馆。每家的茶都差不多，客人之所以各有各的去处，是因为讲故事的人
不同。第一家的先生只讲历史，第三家的先生只讲鬼怪，最后一家没有先生，由客人轮流来讲。外地人常常以为最后一家最便宜，其
实那里的茶最贵，因为在那儿喝茶的人都觉得自己讲得最好。下雨天生意最好，街上听不到雨声，只听到笑声。

竹子不是树，而是一种草。它的茎在出土的时候就已经和成年后一样粗，以后只长高，不再变粗。有些种类一天之内可以长高将近一
米，人站在旁边几乎能看见它在动。很多竹子几十年才开一次花，同一种竹子无论种在哪里，往往在同一年开花，然后一起枯死。科
学家至今没有完全弄清楚它们是怎样计算时间的。

请注意：本馆每周一闭馆，节假日除外。参观者须在入口处存放雨伞和大件行李，馆内可以拍照，但不得使用闪光灯。学生凭证件享受
半价优惠，六岁以下的儿童免费。语音导览有中文、英文和日文三种，租金二十元，押金一百元，归还设备时退还。最后入场时间为闭馆
前一小时。如果您在参观过程中遇到问题，请向穿蓝色制服的工作人员询问，他们很乐意为您提供帮助。
"""

_LANGUAGES = """\
Im Herbst werden die Tage kürzer, und die Blätter verlieren ihr Grün. Der Baum zieht die Stoffe, die er noch braucht, in
den Stamm zurück; was bleibt, leuchtet gelb und rot. Wer früh aufsteht, sieht über den Wiesen den Nebel liegen.
Le boulanger se lève à trois heures. Il allume le four, pèse la farine et l'eau, et laisse la pâte reposer. À six heures
et demie, les premiers clients attendent déjà devant la porte, malgré la pluie.
El mercado abre todos los días menos el lunes. Allí se venden naranjas, pescado, aceitunas y pan recién hecho. Los
niños corren entre los puestos, y una mujer mayor les regala una manzana a cada uno.
Il treno per Bologna parte dal binario sette con dieci minuti di ritardo. Chi ha perso la coincidenza può rivolgersi
all'ufficio informazioni, che si trova accanto alla biglietteria.
O barco regressa ao porto ao fim da tarde. Os pescadores arrumam as redes e contam o que viram: duas baleias, muitas
gaivotas e quase nenhum peixe.
Каждое утро дедушка кормил птиц. Он выходил во двор с небольшим мешком зерна, и воробьи уже ждали его на заборе. Зимой
он делал это дважды в день, потому что, как он говорил, холод удваивает голод.
Pociąg spóźnił się o kwadrans, ale nikomu to nie przeszkadzało: na peronie grała orkiestra, a słońce wreszcie wyszło zza
chmur.
Otobüs durağında bekleyen kadın bana saati sordu. Ona sekizi çeyrek geçtiğini söyledim ve birlikte yola baktık.
图书馆在河的对面，走过小桥就到了。周末那里人很多，但是二楼总有安静的座位。借书不需要付钱，只要带上证件就可以。
夏の夕方、祖母は庭に水をまいていました。風が吹くと、ぬれた土のにおいが部屋まで届きました。猫は縁側で眠っていました。
겨울이 오기 전에 농부들은 지붕을 고치고 장작을 쌓아 둔다. 눈이 많이 오면 마을로 가는 길이 며칠 동안 막히기 때문이다.
تقع المدينة القديمة على تل صغير، ويمكن رؤية البحر من أسوارها. في المساء تمتلئ المقاهي بالناس، ويلعب الأطفال في الساحة.
गाँव के बीच में एक बड़ा बरगद का पेड़ है। गर्मियों में लोग उसकी छाया में बैठकर बातें करते हैं और बच्चे झूला झूलते हैं।
Η βάρκα έφυγε πριν ξημερώσει. Η θάλασσα ήταν ήρεμη και τα φώτα του λιμανιού φαίνονταν από μακριά.
"""

_CHAT = """\
User: My houseplant has yellow leaves. What am I doing wrong?
Assistant: The most common reason is too much water. Put a finger into the soil: if it is wet two centimetres deep,
wait before you water again. Also check that the pot has a hole, so that water can leave it.
User: It is wet, and there is water in the saucer.
Assistant: Then pour the water away and let the soil dry for a week. If the leaves at the bottom are yellow and soft,
remove them. New leaves should come out green. Too little light makes it worse, because the plant drinks less.
User: Thanks! Should I give it fertilizer now?
Assistant: Not yet. A plant with wet roots cannot use it, and it may burn them. Wait until it grows again.

User: Can you make this sentence shorter? "Due to the fact that the weather was bad, we made the decision to stay at home."
Assistant: "The weather was bad, so we stayed at home."
User: And more formal?
Assistant: "Owing to the poor weather, we remained at home."

"Are you coming tonight?" "I'd like to, but the last train leaves at ten." "Then stay with us. There's a bed in the
study." "Won't your sister be there?" "She's in Leeds till Friday. And she wouldn't mind: she still talks about your
soup." "My soup!" he laughed. "That was from a tin." "Don't tell her," she said.

System: You are a helpful assistant that answers in one sentence.
User: Why is the sky dark at night although there are stars in every direction?
Assistant: Because the universe has a finite age and is expanding, the light of most stars has not reached us or has
been stretched beyond what eyes can see.
User: How many litres are in a cubic metre?
Assistant: There are 1,000 litres in a cubic metre.

Caller: Good morning, I ordered a pair of boots two weeks ago and they still haven't arrived.
Agent: I'm sorry to hear that. Could you give me the order number, please?
Caller: It's four, seven, seven, one, zero, nine.
Agent: Thank you. I see the parcel was returned to us because the house number was missing. Shall I send it again?
Caller: Yes please, to number 16, and it's the door at the back.
Agent: I've added that. It leaves our warehouse today and should be with you on Thursday. Is there anything else?
Caller: No, that's all. Thanks for being so quick about it.

User: Give me three names for a café by the sea, each with a short reason.
Assistant: 1. "The Tide Table": guests come and go like the water. 2. "Driftwood": it sounds worn and warm, like old
furniture. 3. "North Window": for a room with cool light and a view of the pier.
User: I like the second. What could be written on the sign below it?
Assistant: "Coffee, cake, and nowhere to be."
"""

_FACTS = """\
Copper is a reddish metal with the symbol Cu and the atomic number 29. It melts at 1,085 °C, conducts electricity better
than any other common metal, and forms bronze with tin and brass with zinc. Roofs of copper turn green with time,
because rain and air cover them with a thin layer of salts, which protects the metal below.

The honey bee lives in colonies of up to sixty thousand. Workers tell each other where food is by a dance: the angle to
the vertical gives the direction from the sun, and the length of the waggling run gives the distance. A worker in summer
lives about six weeks, and makes in that time less than a teaspoon of honey.

Lake Baikal in Siberia is the deepest lake on Earth, at 1,642 metres, and holds about a fifth of the fresh water that is
not frozen. The Danube flows through ten countries, more than any other river, and ends in the Black Sea. Mount
Kilimanjaro, 5,895 metres high, is the highest mountain of Africa and stands alone, because it is a volcano.

The first printed books in Europe looked like manuscripts, since that was what buyers expected a book to look like.
Page numbers, title pages and indexes came decades later. In 1895 Wilhelm Röntgen found rays that pass through flesh
but not through bone, and in 1903 a flight of twelve seconds began the age of aeroplanes. The metre was defined in
the 1790s as one ten-millionth of the way from the pole to the equator; since 1983 it has been the distance that light
travels in 1/299,792,458 of a second.

Sound travels through air at about 343 metres per second at 20 °C, through water more than four times as fast, and
through steel faster still. A thunderstorm is therefore about one kilometre away for every three seconds between the
flash and the thunder. Bats use echoes of calls between 20 and 120 kilohertz, far above what people hear, and can tell
a moth from a leaf in complete darkness.

Potatoes came to Europe from the Andes in the sixteenth century and were grown in gardens for their flowers long before
they were a common food. They yield more energy from a field than wheat does and keep through the winter, but plants
that are all alike also fall ill together: from 1845 on, a mould destroyed the harvest in Ireland several years in a row.
"""

# The domains, each of which reports show apart; every one is long enough to be scored on its own.
TEXTS = {
    "prose": _PROSE,
    "Python": _PYTHON,
    "other code": _OTHER_CODE,
    "records": _RECORDS,
    "mathematics": _MATH,
    "chat": _CHAT,
    "facts": _FACTS,
    "German": _GERMAN,
    "French": _FRENCH,
    "Spanish": _SPANISH,
    "Russian": _RUSSIAN,
    "Chinese": _CHINESE,
    "other languages": _LANGUAGES,
}
